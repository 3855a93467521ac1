"""transfer: every cell recomputed from the kept completions, ability measured under the same patch."""

import dataclasses

import pytest

from families import build, sibling
from safety_neurons import organism
from safety_neurons.capability import divergence, perplexity
from safety_neurons.errors import UnsupportedModelError
from safety_neurons.interventions import patched
from safety_neurons.judges import judge_refusal
from safety_neurons.model import LanguageModel, load_pair
from safety_neurons.neurons import NeuronSet, Scores
from safety_neurons.prompt_lists import Prompt, Prompts
from safety_neurons.results import causal_effect
from safety_neurons.studies import Bench, Groups, bench, comparison, find_by_group, transfer
from tiny import CHAT_TEMPLATE, tiny_tokenizer
from tiny_pair import GENERAL, HARMFUL, HARMLESS

OPTIONS = {"max_new_tokens": 4, "batch_size": 6}
GROUPS = {"first": Prompts.from_list(HARMFUL[:5]), "second": Prompts.from_list(HARMFUL[5:])}


def parity(completions):
    """A judge that refuses where the sum of the ids is even, so that every arm has both verdicts."""
    found = judge_refusal(completions)
    verdicts = [
        type(old)(old.label, sum(one.token_ids) % 2 == 0, old.p_refusal, old.why)
        for old, one in zip(found.verdicts, completions, strict=True)
    ]
    return type(found)(found.judge, tuple(verdicts), found.rate, found.completions)


@pytest.fixture(scope="module")
def pair(tiny_pair):
    return load_pair(tiny_pair.base, tiny_pair.aligned)


@pytest.fixture(scope="module")
def moved(pair, tiny_pair):
    table = pair.base.table
    sets = {
        "first": NeuronSet({"layers.0.down": range(20)}, table),
        "second": NeuronSet({"layers.1.down": range(5, 30)}, table),
    }
    answers = Prompts([Prompt(str(number), text, answer="the") for number, text in enumerate(HARMLESS[:3])])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench, "judge_refusal", parity)
        benches: list[Bench] = []
        real = Bench.finish
        patch.setattr(Bench, "finish", lambda self: (benches.append(self), real(self))[1])
        options = {
            "tasks": [f"perplexity:{tiny_pair.text}", f"kl:{tiny_pair.harmless}"],
            "answers": answers,
            "random": 1,
        }
        found = transfer(
            pair.base, pair.aligned, sets, GROUPS, Prompts.from_list(HARMLESS), **options, **OPTIONS
        )
    return found, sets, benches[0]


def test_every_cell_is_that_of_the_completions_of_its_prompts(moved):
    found, sets, bench = moved

    def told(arm):
        return [verdict.refused for verdict in parity(bench.completions.arm(f"{arm}/harmful")).verdicts]

    for name, neurons in sets.items():
        for group, part in (("first", slice(0, 5)), ("second", slice(5, None))):
            outcomes = [told(arm)[part] for arm in ("untreated", "aligned", f"{name} of {len(neurons)}")]
            cell = found.cell(name, group)
            assert cell.effect == causal_effect(*outcomes)
            assert cell.refused.value == pytest.approx(sum(outcomes[2]) / len(outcomes[2]))
            drawn = told(f"random 0 like {name} of {len(neurons)}")[part]
            assert cell.random == (pytest.approx(sum(drawn) / len(drawn)),)
    record = found.record()
    assert [(cell["set"], cell["group"]) for cell in record["matrix"]] == [
        (a, b) for a in sets for b in GROUPS
    ]


def test_completions_under_a_patch_are_those_of_the_patched_model(moved, pair):
    _, sets, bench = moved
    with patched(pair.base, pair.aligned, sets["second"]):
        plain = pair.base.complete(Groups(GROUPS).pooled, **OPTIONS)
    kept = bench.completions.arm("second of 25/harmful")
    assert [one.token_ids for one in kept] == [one.token_ids for one in plain]


def test_ability_is_measured_under_the_same_patch(moved, pair, tiny_pair):
    found, sets, _ = moved
    text, harmless = Prompts.from_list(GENERAL), pair.base.prompts(tiny_pair.harmless)
    by_name = {each["name"]: each for each in found.record()["ability"]}
    assert list(by_name) == ["untreated", "aligned", "first", "second"]
    task, kl = f"perplexity:{tiny_pair.text}", f"kl:{tiny_pair.harmless}"

    def treated():
        return patched(pair.base, pair.aligned, sets["first"])

    assert by_name["first"]["capability"][task]["value"] == pytest.approx(
        perplexity(pair.base, text, treated), rel=1e-5
    )
    assert by_name["first"]["capability"][kl]["value"] == pytest.approx(
        divergence(pair.base, harmless, treated), rel=1e-4
    )
    assert by_name["aligned"]["capability"][task]["value"] == pytest.approx(
        perplexity(pair.aligned, text), rel=1e-5
    )
    assert by_name["aligned"]["capability"][kl]["value"] > 0
    assert kl not in by_name["untreated"]["capability"]
    assert by_name["second"]["task"]["n"] == 3
    assert by_name["untreated"].keys() & {"harmless_change", "task_change"} == set()


def test_a_killed_study_goes_on_from_the_answers_it_has(pair, tmp_path, monkeypatch):
    sets = {"first": NeuronSet({"layers.0.down": range(20)}, pair.base.table)}
    harmless = Prompts.from_list(HARMLESS[:3])
    options = {"tasks": (), "random": 1, "completions_file": tmp_path / "completions.jsonl", **OPTIONS}
    before = transfer(pair.base, pair.aligned, sets, GROUPS, harmless, **options)
    lines = options["completions_file"].read_text().splitlines(keepends=True)
    options["completions_file"].write_text("".join(lines[:-4]))
    asked = []
    real = type(pair.base).complete

    def complete(model, prompts, **given):
        asked.append(len(prompts) - len(given["done"]))
        return real(model, prompts, **given)

    monkeypatch.setattr(type(pair.base), "complete", complete)
    after = transfer(pair.base, pair.aligned, sets, GROUPS, harmless, **options)
    assert sum(asked) == 4
    assert after.record() == before.record()


def test_sets_are_those_of_their_own_group_and_are_taken_up_again(pair, tmp_path, monkeypatch):
    groups = Groups(GROUPS)
    options = {"method": "contrast", "units": 7, "sites": ("down",), **OPTIONS}
    found = find_by_group(pair.base, pair.aligned, groups, place=lambda name: tmp_path / name, **options)
    for name, prompts in GROUPS.items():
        alone = find_by_group(pair.base, pair.aligned, Groups({name: prompts}), **options)
        assert found[name] == alone[name]
        assert found[name].n_units == 7
    assert found["first"] != found["second"]
    searched = []
    find = comparison.find

    def said(*given, **more):
        searched.append(given)
        return dataclasses.replace(find(*given, **more), notes=("a batch was halved",))

    monkeypatch.setattr(comparison, "find", said)
    again = find_by_group(pair.base, pair.aligned, groups, place=lambda name: tmp_path / name, **options)
    assert again == found
    assert not searched
    file = tmp_path / "first.scores.safetensors"
    kept = Scores.load(file)
    Scores({key: -values for key, values in kept.items()}, kept.table, kept.provenance).save(
        file
    )  # no longer what was found
    notes: list[str] = []
    options |= {"place": lambda name: tmp_path / name, "notes": notes}
    assert find_by_group(pair.base, pair.aligned, groups, **options) == found
    assert len(searched) == 1
    assert [note for note in notes if "halved" in note] == ["first: a batch was halved"]


def test_routed_experts_are_refused_before_anything_is_found_where_sets_are_to_be_patched(monkeypatch):
    base = build("mixtral")
    models = [
        LanguageModel(model, tiny_tokenizer(CHAT_TEMPLATE), name="experts") for model in (base, sibling(base))
    ]
    options = {"method": "contrast", "units": 3, **OPTIONS}
    found = find_by_group(*models, Groups(GROUPS), sites=("o",), to_patch=True, **options)
    assert [neurons.n_units for neurons in found.values()] == [3, 3]
    monkeypatch.setattr(comparison, "find", None)
    with pytest.raises(UnsupportedModelError, match="8 matrices of routed experts at sites down,"):
        find_by_group(*models, Groups(GROUPS), sites=("down",), to_patch=True, **options)


def test_sets_found_on_one_category_of_the_organism_restore_refusals_on_another():
    pair = organism.load_pair("organism:natural/sft", "organism:natural/dpo")
    find, test = (
        Groups.by(pair.base.prompts(name), "category") for name in ("builtin:harmful", "builtin:harmful-test")
    )
    names = ("drugs", "theft")
    few = Groups({name: find.members[name][:5] for name in names})
    sets = find_by_group(
        pair.base, pair.aligned, few, method="contrast", top=0.1, sites=("down",), max_new_tokens=16
    )
    requests = {name: test.members[name][:6] for name in names}
    harmless = pair.base.prompts("builtin:harmless-test", limit=2)
    found = transfer(
        pair.base, pair.aligned, sets, requests, harmless, tasks=("kl",), random=1, limit=6, max_new_tokens=8
    )
    for found_on in names:
        for measured_on in names:
            cell = found.cell(found_on, measured_on)
            assert cell.change.value >= 0.6
            assert (
                "which includes 0" in cell.effect.why
            )  # two deeds a category are too few for a share of anything
            assert cell.against_random.value > 0.3
            assert not cell.against_random.clear  # one random set
    cost = {each["name"]: each["capability"]["kl"]["value"] for each in found.record()["ability"][1:]}
    assert max(cost["drugs"], cost["theft"]) < cost["aligned"] / 2
