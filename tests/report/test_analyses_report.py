"""The sections on analyses: every number beside chance, from the records that the analyses make."""

import numpy as np
import pytest

import report_runs
from page_text import HOSTILE, Outline
from report_runs import MODEL, run_folder
from safety_neurons import analysis
from safety_neurons.errors import InputError
from safety_neurons.neurons import NeuronSet
from safety_neurons.report import write_report
from safety_neurons.results import Difference, Rate, paired_difference, rate
from safety_neurons.studies.bench import ArmOutcome
from safety_neurons.studies.verification import ALONE, RANDOM_NEURONS, SCORE, Progressive, Step
from safety_neurons.studies.vocabulary import Card, Cards

HALF = Rate(0.5, 0.4, 0.6, 40)
HARM = {"harmful_complied": HALF, "complied": ()}
MOVED = Difference(-0.25, -0.35, -0.15, 40)


def page(tmp_path, *runs):
    return Outline(write_report(runs, tmp_path / "report.html").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def sets():
    table = report_runs.table()
    generator = np.random.default_rng(0)
    late = NeuronSet(
        {"layers.3.down": generator.choice(1024, 80, replace=False), "layers.1.down": [1, 2, 3]}, table
    )
    other = NeuronSet(
        {"layers.3.down": np.append(late["layers.3.down"][:40], [1000]), "layers.0.q": [5]}, table
    )
    return analysis.name_sets([("late", late), ("other", other)])


def test_layers_and_overlap_stand_beside_chance(tmp_path, sets):
    found = [analysis.layers(item) for item in sets]
    layers = run_folder(
        tmp_path / "layers",
        "analyze-layers",
        {"sets": ["a", "b"]},
        {"sets": [each.record() for each in found]},
    )
    record = analysis.overlap(sets).record()
    overlap = run_folder(tmp_path / "overlap", "analyze-overlap", {"sets": ["runs/a", "b=runs/b c"]}, record)
    seen = page(tmp_path, layers, overlap)
    share = 80 / 83
    assert f"layer 3: {100 * share:.1f} %, more" in seen.text
    assert "late lies in 2 layers" in seen.text
    assert f"{record['pairs'][0]['jaccard']['value']:.3f}" in seen.text
    assert "share more neurons than unrelated sets" in seen.text
    assert "safety-neurons analyze overlap runs/a 'b=runs/b c' --seed 0" in seen.text


def test_a_matrix_of_languages_and_one_of_transfer_are_drawn(tmp_path):
    cell = {
        "harmful_refused": {**HALF.to_json(), "unscored": 2},
        "change_against_random": None,
        "random_refused": [0.9],
    }
    cells = [
        {
            "set": a,
            "group": b,
            **cell,
            "change": Difference(-0.8 if a == b else -0.1, -0.9, -0.05, 40).to_json(),
        }
        for a in ("en", "de")
        for b in ("en", "de")
    ]
    of_both = [
        {**each, "set": "shared by all", "change": Difference(-1.0, -1.0, -0.5, 40).to_json()}
        for each in cells[:2]
    ]
    chance = {"value": 3, "expected": 0.5, "low": 0, "high": 2, "verdict": "more"}
    rows = [
        {
            "language": each,
            "n_neurons": 50,
            "n_units": 50,
            "minus_intersection": {"n_units": 47, "share": 0.94, **chance},
        }
        | {"minus_union": {"n_units": 40, "share": 0.8, **chance}}
        for each in ("en", "de")
    ]
    languages = {
        "languages": rows,
        "shared": {"n_units": 3, **chance},
        "pairs": [],
        "mean_jaccard": {},
        "untreated": {},
        "matrix": [*cells, *of_both],
    }
    moved = [
        {
            **each,
            "causal_effect": {**Difference(0.9, 0.8, 1.0, 9).to_json(), "measure": "refused"},
            "random_effects": [],
        }
        for each in cells
    ]
    ability = [
        {
            "name": "untreated",
            "capability": {"perplexity": {"value": 14.2}},
            "harmless_refused": HALF.to_json(),
            "task": None,
        }
    ]
    transfer = {"groups": ["en", "de"], "matrix": moved, "ability": ability}
    transfer["own_and_other"] = {"own": {"value": 0.9, "n": 2}, "other": {"value": 0.5, "n": 2}}
    runs = [
        run_folder(tmp_path / "languages", "analyze-languages", MODEL, languages),
        run_folder(tmp_path / "transfer", "analyze-transfer", MODEL, transfer),
    ]
    seen = page(tmp_path, *runs)
    assert "refusals change by \u22120.80 in that language and by \u22120.10 in the others" in seen.text
    assert "3, 80 % (unrelated 0 to 2: more)" in seen.text
    assert (
        "Mean causal effect on the requests the neurons were found on: 0.90; on the others: 0.50" in seen.text
    )
    assert "neurons of en, requests de: \u22120.10" in seen.text
    assert "en → de, 2 unscored" in seen.text


def test_progressive_deactivation_is_a_curve_beside_random_ones(tmp_path):
    def step(order, number, refused):
        outcomes = tuple(bool(place < 40 * refused) for place in range(40))
        arm = ArmOutcome(
            f"{order} {number}", rate(outcomes), HALF, 14.0 + number, 0.1, outcomes, outcomes, **HARM
        )
        return Step(order, str(number), (0,), number, arm, paired_difference(outcomes, [True] * 40))

    whole = ArmOutcome(
        "untreated", Rate(1.0, 0.9, 1.0, 40), HALF, 14.0, None, (True,) * 40, (True,) * 40, **HARM
    )
    steps = [step(SCORE, 10, 0.75), step(SCORE, 50, 0.25), step(ALONE, 10, 0.5)]
    steps += [step(f"{RANDOM_NEURONS} {seed}", number, 0.95) for seed in (0, 1) for number in (10, 50)]
    record = Progressive(50, whole, tuple(steps), None, ()).record()
    seen = page(tmp_path, run_folder(tmp_path / "progressive", "analyze-progressive", MODEL, record))
    assert "Refusals are halved with 50 of 50 neurons off (by score)." in seen.text
    assert "by score: 10, 0.750" in seen.text
    assert "the band is what random neurons leave" in seen.text


def test_cards_stand_in_the_map_and_in_a_table(tmp_path):
    find = report_runs.find_run(tmp_path / "contrast", "contrast")
    place = {
        "prompts": "harmful",
        "prompt_id": "p",
        "value": 3.2,
        "position": 4,
        "token": HOSTILE[0],
        "before": "tell me ",
        "after": " now",
    }
    writes = {
        "defined": True,
        "how": "",
        "top": [{"token": HOSTILE[1], "id": 1, "score": 2.0}],
        "bottom": [],
        "largest": 2.0,
    }
    effect = {**MOVED.to_json(), "as_large_among_random": 0, "n_random": 20, "p": 0.05}
    active = {
        "harmful": {"mean": 1.0, "largest": 3.2, "smallest": 0.0},
        "most_active": [place],
        "least_active": [],
    }
    card = Card("layers.0.down", 7, 0.3, writes, active, {"deactivated": effect})
    random = {"deactivated": {"value": 0.0, "low": -0.1, "high": 0.1, "n": 20, "values": []}}
    cards = run_folder(
        tmp_path / "cards", "analyze-vocabulary", MODEL, Cards((card,), {}, random, {}).record()
    )
    text = write_report([find, cards], tmp_path / "report.html").read_text(encoding="utf-8")
    seen = Outline(text)
    assert "1 of 1 single neuron change the refusal’s log-odds more than random neurons do" in seen.text
    assert "layers.0.down:7" in seen.text
    assert seen.tags["mark"] == 1
    assert '"layers.0.down.7":[{"title":"Writes: pushes towards"' in text
    assert text.count('"layers.0.down.7"') == 2, "in the cards and in the list of its cell"
    assert "<img" not in text


def test_the_tax_says_what_each_model_gains_and_pays(tmp_path):
    chance = {"expected": 5.0, "low": 1.0, "high": 9.0, "p_at_least": 0.0}
    ranks = {kind: {"value": 0.4, "interval": [0.3, 0.5]} for kind in ("all", "given_activation", "union")}
    pair = {
        "pair": ["safety", "helpfulness"],
        "candidates": 2048,
        "size": 102,
        "overlap": {"value": 40, "low": 35, "high": 44},
    }
    pair |= {"chance": {"all": chance, "in_activation": chance}, "spearman": ranks, "shared": None}
    arms = [
        {"arm": name, **{kind: HALF.to_json() for kind in ("refused", "helpful", "over_refused")}}
        for name in ("safety", "safety random 0")
    ]
    gain = {
        "change": MOVED.to_json(),
        "against_random": None,
        "share_of_gap": {"value": 0.6, "low": 0.5, "high": 0.7},
    }
    crossed = [
        {"receiver": "safety", "donor": "helpfulness", "refused": gain, "helpful": gain, "over_refused": gain}
    ]
    result = {
        "top": 0.05,
        "prompts": 64,
        "helpfulness": "taught",
        "relations": [pair],
        "n_shared": 40,
        "arms": arms,
        "cross_patching": crossed,
    }
    seen = page(tmp_path, run_folder(tmp_path / "tax", "analyze-tax", MODEL, result))
    assert (
        "safety and helpfulness share 40 of 102 neurons, more than what sets of equally active neurons share"
        in seen.text
    )
    assert "safety changes refusals by \u22120.25" in seen.text
    damaged = run_folder(tmp_path / "damaged", "analyze-tax", MODEL, {"relations": 1})
    with pytest.raises(InputError, match="analyze-tax"):
        write_report([damaged], tmp_path / "r.html")


def test_methods_over_several_organisms_are_ranked_with_every_seed(tmp_path):
    values = {"mask": (0.95, 0.9), "contrast": (0.4, 0.2), "random": (0.03, 0.05)}
    standings = [
        {
            "method": name,
            "group": "natural 0.02",
            "measure": "causal_effect",
            "mean": sum(pair) / 2,
            "worst": min(pair),
        }
        | {"by_organism": dict(zip(("seed 0", "seed 1"), pair, strict=True))}
        for name, pair in values.items()
    ]
    standings += [
        {**standings[0], "measure": "recall", "group": "planted"},
        {**standings[0], "measure": "seconds", "mean": 7.0},
    ]
    leader = {"group": "natural 0.02", "measure": "causal_effect", "methods": ["mask"], "mean": 0.925}
    leaders = [leader]
    result = {
        "organisms": [],
        "ranking": standings,
        "leaders": leaders,
        "measures": {},
        "methods": [],
        "figure": "x",
    }
    seen = page(tmp_path, run_folder(tmp_path / "ranked", "compare", {"organism": ["a", "b"]}, result))
    assert (
        "On natural organisms, 2 % of the units, mask has the best mean of causal effect, 0.93." in seen.text
    )
    assert "0.30 (0.20)" in seen.text
    assert "Which method should I use?" in seen.text
    assert "mask: 0.93 (0.90)" in seen.text, "marks say their numbers"
