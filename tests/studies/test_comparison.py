"""compare: equal budgets, recall in units, agreement beside chance, and files a killed comparison takes
up.
"""

import dataclasses
import functools
import itertools
import types

import numpy as np
import pytest
import torch

from conforming import misfits
from families import build, sibling
from safety_neurons.errors import RunError, UnsupportedModelError, UsageError
from safety_neurons.interventions import deactivated
from safety_neurons.judges import judge_refusal
from safety_neurons.model import LanguageModel, load_pair
from safety_neurons.neurons import SITES, NeuronSet, Scores
from safety_neurons.prompt_lists import Prompts
from safety_neurons.results.estimates import MANY, rate
from safety_neurons.results.measured import ComparisonRecord
from safety_neurons.studies import comparison, losses, verify_deactivate, verify_patch
from safety_neurons.studies.comparison import compare, unit_recall, whole_units
from tiny import CHAT_TEMPLATE, tiny_tokenizer
from tiny_pair import HARMFUL, HARMLESS

OPTIONS = {"max_new_tokens": 2, "batch_size": 4}


@pytest.fixture(scope="module")
def pair(tiny_pair):
    return load_pair(tiny_pair.base, tiny_pair.aligned)


@pytest.fixture(scope="module")
def prompts():
    return Prompts.from_list(HARMFUL[:4]), Prompts.from_list(HARMLESS[:3])


@pytest.fixture(scope="module")
def compared(pair, prompts):
    looked_at = {"find_prompts": prompts[0], "find_harmless": prompts[1], "find_general": prompts[1]}
    return compare(
        pair.base, pair.aligned, *prompts, **looked_at, sites=["up", "down"], top=0.1, random=2, **OPTIONS
    )


def units_of(neurons):
    numbers = neurons.table.units()
    return {int(unit) for key, indices in neurons.items() for unit in numbers[key][indices]}


def test_every_set_has_exactly_the_budget_in_units(compared):
    assert compared.n_units == 96
    assert compared.budget == 10
    fit = [
        name for name in comparison.METHODS if name not in ("heads", "routing")
    ]  # of a dense model's units
    assert [row.method for row in compared.methods] == [*fit, "random 0", "random 1"]
    for row in compared.methods:
        assert row.n_units == len(units_of(row.neurons)) == 10
        assert {key.rsplit(".", 1)[1] for key in row.neurons.keys()} <= {"up", "down"}  # noqa: SIM118 - not a mapping


def test_necessity_is_what_the_aligned_model_loses_while_the_set_is_off(compared, pair, prompts):
    row = compared.methods[0]
    with deactivated(pair.aligned, row.neurons):
        off = judge_refusal(pair.aligned.complete(prompts[0], **OPTIONS)).refused
    kept = [
        (a, b) for a, b in zip(compared.aligned.harmful, off, strict=True) if a is not None and b is not None
    ]
    assert row.necessity.n == len(kept)
    assert row.necessity.value == (
        pytest.approx(np.mean([float(a) - float(b) for a, b in kept])) if kept else None
    )


def test_a_set_holds_every_neuron_of_its_units(pair):
    table = pair.base.table
    whole = whole_units(
        NeuronSet({"layers.0.up": [3], "layers.1.v": [2]}, table), ("v", "o", "gate", "up", "down")
    )
    assert [list(whole[f"layers.0.{site}"]) for site in ("gate", "up", "down")] == [[3]] * 3
    assert list(whole["layers.1.v"]) == [2]
    assert len(whole["layers.1.o"]) == table["layers.1.o"].n_heads // table["layers.1.v"].n_heads
    assert whole.n_units == 2


def test_agreement_is_the_jaccard_index_of_units_beside_chance(compared):
    sets = {row.method: units_of(row.neurons) for row in compared.methods}
    like = {(row.control["like"], row.method) for row in compared.methods if row.control is not None}
    assert {tuple(pair["methods"]) for pair in compared.agreement} == {
        *itertools.combinations(sets, 2)
    } - like
    for pair in compared.agreement:
        first, second = (sets[name] for name in pair["methods"])
        assert pair["jaccard"] == pytest.approx(len(first & second) / len(first | second))
        assert 0 < pair["chance"] < 0.1
    draws = np.random.default_rng(0)
    overlap = [
        len({*draws.choice(96, 10, replace=False)} & {*draws.choice(96, 10, replace=False)})
        for _ in range(4000)
    ]
    jaccard = np.mean([shared / (20 - shared) for shared in overlap])
    assert compared.agreement[0]["chance"] == pytest.approx(jaccard, rel=0.1)


def test_a_perfect_method_recalls_the_whole_truth_and_a_blind_one_none_of_it(pair, prompts, monkeypatch):
    table = pair.base.table
    truth = NeuronSet(
        {"layers.0.up": [3, 9], "layers.0.down": [3], "layers.1.gate": [40], "layers.1.v": [2]}, table
    )
    keys = table.keys

    def planted(method, _models, _prompts, **_):
        assert tuple(method.sites) == SITES  # no method is told where the truth lies
        sign = 1.0 if method.NAME == "contrast" else -1.0
        values = {key: np.random.default_rng(1).uniform(0, 0.5, table[key].size) for key in keys}
        for key, indices in truth.items():
            values[key][indices] = sign
        for key in ("gate", "up", "down"):
            values[f"layers.0.{key}"][[3, 9]] = sign
            values[f"layers.1.{key}"][40] = sign
        return types.SimpleNamespace(scores=Scores(values, table), notes=())

    monkeypatch.setattr(comparison, "find", planted)
    found = compare(
        *(pair.base, pair.aligned, *prompts),
        find_prompts=prompts[0],
        truth=truth,
        methods=["contrast", "importance"],
        random=0,
        **OPTIONS,
    )
    assert found.budget == 4
    assert [row.recall for row in found.methods] == [1.0, 0.0]
    assert found.methods[0].n_units == 4


def test_recall_counts_a_unit_once(pair):
    table = pair.base.table
    truth = NeuronSet({"layers.0.up": [3], "layers.0.down": [3], "layers.0.gate": [3, 4]}, table)
    assert unit_recall(NeuronSet({"layers.0.down": [3]}, table), truth) == 0.5
    assert unit_recall(NeuronSet({"layers.0.down": [4, 5, 6]}, table), truth) == 0.5
    assert unit_recall(NeuronSet({"layers.1.down": [3, 4]}, table), truth) == 0.0


def test_random_sets_are_made_of_what_the_methods_sets_are_made_of_in_turn(compared):
    assert misfits(compared.record(), ComparisonRecord) == []
    rows = {row.method: row for row in compared.methods}
    for number, like in enumerate(list(comparison.METHODS)[:2]):
        row = rows[f"random {number}"]
        assert row.control == {
            "like": like,
            "seed": 0,
            "number": number,
            "n_neurons": row.n_neurons,
            "n_units": 10,
            "disjoint": True,
        }
        assert row.neurons.counts() == rows[like].neurons.counts()
        assert not len(row.neurons & rows[like].neurons)
        assert row.record()["control"] == row.control
    assert all(row.control is None for row in compared.methods[:-2])


def test_random_sets_are_made_of_what_the_truth_is_made_of(pair, prompts, monkeypatch):
    table = pair.base.table
    truth = NeuronSet(
        {**{f"layers.0.{site}": [3, 9] for site in ("gate", "up", "down")}, "layers.1.q": [1]}, table
    )
    options = {"find_prompts": prompts[0], "truth": truth, "methods": ["weight-magnitude"], **OPTIONS}
    found = compare(pair.base, pair.aligned, *prompts, random=3, **options)
    assert [row.neurons.counts() for row in found.methods[1:]] == [truth.counts()] * 3
    assert [row.control["like"] for row in found.methods[1:]] == ["truth"] * 3
    assert [row.recall for row in found.methods[1:]] == [0.0] * 3


THREE = ["weight-magnitude", "activation-magnitude", "effect-size"]
TRUTH = {"layers.0.up": [3, 9], "layers.0.down": [3], "layers.1.gate": [40], "layers.1.v": [2]}


@pytest.fixture(scope="module")
def known(pair, prompts):
    """A comparison with a truth of four units, of as many methods as need no correction."""
    return compare(
        *(pair.base, pair.aligned, *prompts),
        find_prompts=prompts[0],
        find_harmless=prompts[1],
        truth=NeuronSet(TRUTH, pair.base.table),
        methods=THREE,
        random=3,
        **OPTIONS,
    )


def test_the_truth_is_measured_as_its_set_is_by_verify(known, pair, prompts):
    row, truth = known.truth, whole_units(NeuronSet(TRUTH, pair.base.table), SITES)
    assert misfits(known.record(), ComparisonRecord) == []
    assert (row.method, row.recall, row.n_units, row.seconds, row.control) == ("truth", 1.0, 4, 0.0, None)
    assert row.neurons == truth
    patched = verify_patch(pair.base, pair.aligned, truth, *prompts, random=0, **OPTIONS)
    off = verify_deactivate(pair.aligned, truth, *prompts, random=0, **OPTIONS)
    assert row.causal_effect == patched.causal_effect
    assert row.harmful_refused == patched.treated.harmful_refused
    assert row.harmless_refused == patched.treated.harmless_refused
    assert row.complied_off == off.treated.harmful_complied
    assert row.necessity.value == (None if off.change.value is None else -off.change.value)
    assert row.loss == off.points[0].loss


def test_the_truth_is_no_method(known):
    assert [row.method for row in known.methods] == [*THREE, *(f"random {number}" for number in range(3))]
    assert all("truth" not in one["methods"] for one in known.agreement)
    assert (known.truth.behind, known.truth.necessity_behind) == (None, None)
    told = (known.truth.against_random, known.truth.necessity_against_random, known.truth.necessity)
    assert all(one.p is not None and one.p_holm is None for one in told)  # a family of its own


def test_all_differences_of_methods_are_one_family(pair, prompts):
    more = [*THREE, "refusal-direction"]
    found = compare(
        *(pair.base, pair.aligned, *prompts),
        find_prompts=prompts[0],
        find_harmless=prompts[1],
        methods=more,
        random=3,
        **OPTIONS,
    )
    assert 3 * len(more) > MANY >= 2 * len(more)
    for row in found.methods[:4]:
        told = (row.against_random, row.necessity_against_random, row.necessity, row.behind)
        assert all(one.p_holm >= one.p for one in (*told, row.necessity_behind) if one is not None)
    assert all(row.necessity.p_holm is None for row in found.methods[4:])


def test_without_random_sets_what_is_lost_is_a_family_too(compared):
    made = types.SimpleNamespace(
        verdicts={}, bench=types.SimpleNamespace(harmful=Prompts([])), _behind=lambda _: {}
    )
    first = compared.methods[0]
    row = dataclasses.replace(first, necessity=dataclasses.replace(first.necessity, p_holm=None))
    for number, held in ((MANY, False), (MANY + 1, True)):
        rows = [dataclasses.replace(row, method=f"m{one}") for one in range(number)]
        rows = comparison._Rows.compared(made, rows)
        assert [row.necessity.p_holm is not None for row in rows] == [held] * number
        assert all(row.against_random is compared.methods[0].against_random for row in rows)


def test_methods_are_told_apart_request_by_request(compared):
    """Intervals of two methods overlap although one restores eight requests more of the very same."""
    first = compared.methods[0]
    asked = Prompts.from_list([f"p{place}" for place in range(40)])

    def behind(restored, lost, broken=()):
        rows = []
        made = types.SimpleNamespace(bench=types.SimpleNamespace(harmful=asked), verdicts={}, kept={})
        for name, here in restored.items():
            loss = dataclasses.replace(
                first.loss,
                sound=dataclasses.replace(first.necessity, value=lost[name] / 40),
                breaks="broken" if name in broken else None,
            )
            effect = dataclasses.replace(first.causal_effect, value=here / 40)
            rows.append(dataclasses.replace(first, method=name, causal_effect=effect, loss=loss))
            made.verdicts[name] = [place < here for place in range(40)], ()
            made.kept[name] = [place >= lost[name] for place in range(40)]
        return comparison._Rows._behind(made, rows)

    one, two = (rate([place < many for place in range(40)]) for many in (20, 12))
    assert one.low < two.high
    found = behind(
        {"a": 12, "b": 20, "c": 19, "random 0": 40}, {"a": 9, "b": 0, "c": 40, "random 0": 0}, ["c"]
    )
    assert set(found) == {("a", "behind"), ("c", "behind"), ("b", "necessity_behind")}
    assert (found["a", "behind"].value, found["a", "behind"].clear) == (8 / 40, True)
    assert (found["c", "behind"].value, found["c", "behind"].clear) == (1 / 40, False)
    assert (found["b", "necessity_behind"].value, found["b", "necessity_behind"].clear) == (9 / 40, True)
    asked = Prompts([dataclasses.replace(one, group=str(place % 4)) for place, one in enumerate(asked)])
    assert not behind({"a": 12, "b": 20}, {"a": 0, "b": 0})["a", "behind"].clear


def test_a_set_without_which_general_text_has_become_unlikely_breaks_the_model(pair, prompts, monkeypatch):
    monkeypatch.setattr(losses, "MOST_PERPLEXITY", 0.0)  # any perplexity is too much
    options = {"find_prompts": prompts[0], "methods": ["weight-magnitude"], "random": 1, "top": 0.1}

    def breaks(**text):
        found = compare(pair.base, pair.aligned, *prompts, **options, **text, **OPTIONS)
        return [row.loss.breaks is not None for row in found.methods]

    assert breaks(find_general=prompts[1]) == [True, True]
    assert breaks() == [False, False]


def test_a_comparison_without_a_truth_has_none(compared):
    assert compared.truth is None
    assert compared.record()["truth"] is None


def test_of_a_truth_the_part_at_the_searched_sites_is_measured_and_one_without_is_refused(pair, prompts):
    options = {"find_prompts": prompts[0], "methods": ["weight-magnitude"], "random": 1, **OPTIONS}
    truth = NeuronSet(TRUTH, pair.base.table)
    part = compare(pair.base, pair.aligned, *prompts, truth=truth, sites=["up", "down"], **options)
    assert (part.budget, part.truth.n_units, part.truth.recall) == (4, 3, 0.75)
    assert {key.rsplit(".", 1)[1] for key in part.truth.neurons.keys()} == {"up", "down"}  # noqa: SIM118 - not a mapping
    with pytest.raises(UsageError, match="no neuron at the sites q, k"):
        compare(pair.base, pair.aligned, *prompts, truth=NeuronSet({"layers.1.up": [3]}, pair.base.table),
                sites=["q", "k"], **options)  # fmt: skip


def test_a_comparison_goes_on_with_the_answers_of_the_same_truth_alone(pair, prompts, tmp_path):
    def run(members):
        return compare(
            *(pair.base, pair.aligned, *prompts),
            find_prompts=prompts[0],
            truth=NeuronSet(members, pair.base.table),
            methods=["weight-magnitude"],
            random=1,
            completions_file=tmp_path / "completions.jsonl",
            place=tmp_path.joinpath,
            **OPTIONS,
        )

    first = run(TRUTH)
    arms = {one.arm for one in first.bench.completions}
    assert arms >= {"truth/harmful", "truth/harmless", "truth deactivated/harmful"}
    again = run(TRUTH)
    assert again.bench.answers.new == 0
    assert again.record() == first.record()
    with pytest.raises(RunError, match="different truth"):
        run({**TRUTH, "layers.1.v": [3]})


def test_the_ceiling_of_adapters_on_down_restores_the_aligned_answers(compared):
    told = compared.bench.completions
    assert [one.token_ids for one in told.arm("ceiling/harmful")] == [
        one.token_ids for one in told.arm("aligned/harmful")
    ]


def test_scores_of_a_finished_method_are_taken_up_only_for_the_same_prompts_and_weights(
    pair, prompts, tmp_path, monkeypatch
):
    calls = []
    real = comparison.find
    monkeypatch.setattr(
        comparison,
        "find",
        lambda method, *words, **more: (calls.append(method.NAME), real(method, *words, **more))[1],
    )
    names = ["weight-change", "importance"]

    def run(find_prompts):
        return compare(
            *(pair.base, pair.aligned, *prompts),
            find_prompts=find_prompts,
            methods=names,
            random=0,
            place=tmp_path.joinpath,
            **OPTIONS,
        )

    first = run(prompts[0])
    again = run(prompts[0])
    assert calls == names
    assert [row.neurons for row in again.methods] == [row.neurons for row in first.methods]
    assert [row.seconds for row in again.methods] == [row.seconds for row in first.methods]
    run(prompts[1])
    assert calls == [*names, *names]
    with torch.no_grad():
        pair.aligned.inner.get_input_embeddings().weight.data[3, 3] += 1
    try:
        run(prompts[1])
    finally:
        with torch.no_grad():
            pair.aligned.inner.get_input_embeddings().weight.data[3, 3] -= 1
    assert calls == [*names, *names, *names]


def test_what_cannot_be_compared_is_refused(pair, prompts):
    for options, said in (
        ({"methods": ["magic"]}, "unknown method 'magic'"),
        ({"methods": ["snip"]}, "snip reads harmless prompts too"),
        ({"top": 0.0}, "not a share"),
        ({"top": 1.5}, "not a share"),
        ({"truth": NeuronSet({}, pair.base.table)}, "empty"),
        ({"methods": []}, "no method and no truth"),
        ({"methods": ["contrast", "importance", "contrast"]}, "'contrast' is named twice"),
    ):
        with pytest.raises(UsageError, match=said):
            compare(pair.base, pair.aligned, *prompts, find_prompts=prompts[0], **options)


def of_two(family):
    """The comparison of two models of a family, with all that methods look at."""
    base, words = build(family), tiny_tokenizer(CHAT_TEMPLATE)
    models = [LanguageModel(model, words) for model in (base, sibling(base))]
    asked = [Prompts.from_list(texts[:2]) for texts in (HARMFUL, HARMLESS)]
    looked_at = {"find_prompts": asked[0], "find_harmless": asked[1], "find_general": asked[1]}
    return functools.partial(compare, *models, *asked, **looked_at, **OPTIONS)


def test_every_method_that_fits_a_pair_of_mixtures_is_compared_and_others_are_left_out_with_a_reason():
    """All of `down` is routed experts', which are deactivated and never patched."""
    compared = of_two("mixtral")
    found = compared(top=0.1, random=1)
    names = [row.method for row in found.methods]
    left_out = [note.split()[0] for note in found.bench.notes if "was left out" in note]
    dense = {"importance-contrast", "swap-attribution", "relp", "snip", "wanda", "probe", "refusal-direction"}
    assert set(left_out) == {"heads", "probe-weights", *dense}
    assert sorted([*left_out, *names]) == sorted([*comparison.METHODS, "random 0"])
    for row in found.methods:
        assert (row.harmful_refused.n, row.causal_effect.why) == (0, comparison.UNPATCHED)
        assert row.necessity.n > 0
    assert found.ceiling_effect.why == comparison.UNPATCHED
    found.record()
    with pytest.raises(UnsupportedModelError, match="probe"):
        compared(methods=["probe"], random=0)


def test_a_method_that_only_finds_out_at_work_that_it_does_not_fit_is_left_out_of_a_pair_of_hybrids():
    """Relevance has no rule for the convolution of one layer, which every other method passes by."""
    compared = of_two("lfm2")
    found = compared(top=0.1, random=1)
    left_out = {note.split()[0] for note in found.bench.notes if "was left out" in note}
    assert left_out == {"heads", "routing", "relp"}
    names = [row.method for row in found.methods]
    assert sorted([*left_out, *names]) == sorted([*comparison.METHODS, "random 0"])
    with pytest.raises(UnsupportedModelError, match="relp has rules"):
        compared(methods=["relp"], random=0)


def test_what_searches_say_is_among_the_notes_also_of_a_run_that_goes_on(pair, prompts, tmp_path):
    def run():
        return compare(
            *(pair.base, pair.aligned, *prompts),
            find_prompts=prompts[0],
            methods=["attribution-patching"],
            settle=0.9,
            random=0,
            place=lambda name: tmp_path / name,
            **OPTIONS,
        ).bench.notes

    said = run()
    assert any(note.startswith("attribution-patching: 4.0 of 8 points of the path") for note in said)
    assert run() == said
