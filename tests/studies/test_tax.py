"""tax: change scores held to the detector's, cross-patching to what whole adapters and hand-written verdicts
must give.
"""

import dataclasses

import numpy as np
import pytest

from safety_neurons.detectors import find_contrast
from safety_neurons.errors import NeuronError, UsageError
from safety_neurons.model import load_several
from safety_neurons.neurons import NeuronSet
from safety_neurons.prompt_lists import Prompt, Prompts
from safety_neurons.results import Completion, Completions, comparisons
from safety_neurons.studies import cross_patch, helpfulness, read_trainings
from safety_neurons.studies.tax import Measured
from tiny import tiny_adapter_folder
from tiny_pair import HARMFUL, HARMLESS

OPTIONS = {"max_new_tokens": 6, "batch_size": 6}


@pytest.fixture(scope="module")
def models(tiny_pair):
    other = tiny_adapter_folder(tiny_pair.plain, tiny_pair.folder / "helpful", seed=3)
    before, safety, helpful = load_several([tiny_pair.base, tiny_pair.aligned, f"{tiny_pair.base}+{other}"])
    assert before.model is safety.model is helpful.model
    return before, {"safety": safety, "helpful": helpful}


@pytest.fixture(scope="module")
def read(models):
    return read_trainings(models[0], models[1], Prompts.from_list([*HARMFUL, *HARMLESS]), groups=4, **OPTIONS)


@pytest.fixture(scope="module")
def crossed(models, read):
    shared = NeuronSet.all(models[0].table).only(sites=["down"])
    return cross_patch(
        models[1],
        shared,
        Prompts.from_list(HARMFUL),
        Prompts.from_list(HARMLESS),
        measure=helpfulness("answered"),
        random=2,
        **OPTIONS,
    )


def test_scores_are_those_of_the_contrast_detector(models, read):
    before, trained = models
    prompts = Prompts.from_list([*HARMFUL, *HARMLESS])
    for name, model in trained.items():
        scores = find_contrast(before, model, prompts, **OPTIONS).scores
        for key, values in scores.items():
            np.testing.assert_allclose(read.scores[name][key], values, rtol=1e-5)


def test_differences_between_the_trainings_are_those_of_the_detector_on_the_same_text(models, read):
    before, trained = models
    prompts = Prompts.from_list([*HARMFUL, *HARMLESS])
    written = before.complete(prompts, **OPTIONS)
    scores = find_contrast(
        trained["safety"], trained["helpful"], prompts, completions=written, **OPTIONS
    ).scores
    found = np.sqrt(read.changes.between["safety", "helpful"].sum(0) / read.changes.tokens.sum())
    np.testing.assert_allclose(found, np.concatenate([values for _, values in scores.items()]), rtol=1e-5)


def test_groups_hold_all_tokens_and_every_kind_of_request(read):
    assert len(read.changes.tokens) == 4
    assert read.prompts == len(HARMFUL) + len(HARMLESS)
    assert read.changes.tokens.min() > 0
    assert read.changes.layers.tolist() == sorted(read.changes.layers)


def test_shared_neurons_are_in_both_top_sets(read):
    shared = read.shared("safety", "helpful", 0.3)
    assert 0 < len(shared) < len(read.scores["safety"].top(0.3))
    assert shared == read.scores["helpful"].top(0.3) & read.scores["safety"].top(0.3)


def test_one_training_alone_is_refused(models):
    with pytest.raises(UsageError, match="two or more"):
        read_trainings(models[0], {"safety": models[1]["safety"]}, Prompts.from_list(HARMFUL))


def test_all_activations_of_the_other_adapter_make_the_one_model_the_other(crossed):
    for kind in ("harmful", "harmless"):
        for name, other in (("safety", "helpful"), ("helpful", "safety")):
            patched, donor = (
                crossed.bench.completions.arm(f"{arm}/{kind}") for arm in (f"{name} from {other}", other)
            )
            assert [one.token_ids for one in patched] == [one.token_ids for one in donor]
    assert [one.token_ids for one in crossed.bench.completions.arm("safety/harmful")] != [
        one.token_ids for one in crossed.bench.completions.arm("helpful/harmful")
    ]
    assert not crossed.disjoint


def test_effects_are_paired_differences_of_the_verdicts(crossed):
    def arm(refused):
        return Measured(refused * 4, [False] * 16, [None] * 16)

    asked = {
        name: Prompts.from_list(f"{name} {number}" for number in range(16))
        for name in ("harmful", "harmless")
    }
    made = dataclasses.replace(
        crossed,
        bench=dataclasses.replace(crossed.bench, **asked),
        plain=(arm([True, True, True, None]), arm([False] * 4)),
        patched=(arm([False, True, False, True]), arm([True, False, False, False])),
        random=((arm([True, True, None, True]), arm([True, False, True, True])), ()),
    )
    cost = made.effect(0, "refused")
    assert cost["change"]["value"] == pytest.approx(-2 / 3)
    assert (cost["change"]["n"], cost["change"]["unscored"]) == (12, 4)
    assert cost["against_random"]["value"] == pytest.approx(np.mean([0 - 1, 1 - 0.5, 0 - 1, 1 - 1]))
    assert cost["share_of_gap"]["value"] == pytest.approx(2 / 3)
    gain = made.effect(1, "refused")
    assert gain["change"]["value"] == pytest.approx(0.25)
    assert gain["against_random"] is None
    record = made.record()
    assert [each["receiver"] for each in record["cross_patching"]] == ["safety", "helpful"]
    assert record["cross_patching"][0]["over_refused"]["change"]["value"] is None
    assert [each["arm"] for each in record["arms"]] == [
        "safety",
        "safety from helpful",
        "safety from helpful, random 0",
        "safety from helpful, random 1",
        "helpful",
        "helpful from safety",
    ]


def test_both_directions_all_measures_and_both_comparisons_are_one_family(crossed):
    found = list(comparisons(crossed.record()["cross_patching"]))
    assert len(found) == 12
    assert all(one["p_holm"] >= one["p"] for one in found)
    assert all(one["p_holm"] is not None for one in found)


def test_prompts_that_share_a_group_are_drawn_together(models):
    every = Prompts.from_list([*HARMFUL, *HARMLESS])
    shared = Prompts([dataclasses.replace(one, group=str(place // 2)) for place, one in enumerate(every)])
    pairs, alone = (
        read_trainings(models[0], models[1], asked, groups=20, **OPTIONS)
        for asked in (shared, Prompts(list(shared)[::2]))
    )
    assert len(pairs.changes.tokens) == len(alone.changes.tokens)


def test_cross_patching_in_memory_shows_every_arm_and_what_it_changes(crossed):
    arms = crossed.tables()[0]
    assert [row[0] for row in arms.rows] == [arm["arm"] for arm in crossed.record()["arms"]]
    assert len(crossed.findings()) == 2
    assert len(crossed.figures()) == 2
    assert "Cross-patching of the shared neurons" in crossed._repr_html_()


def test_nothing_shared_is_an_error_that_names_the_way_out(models):
    with pytest.raises(NeuronError, match="top"):
        cross_patch(
            models[1],
            NeuronSet({}),
            Prompts.from_list(HARMFUL),
            Prompts.from_list(HARMLESS),
            measure=helpfulness("answered"),
        )


def test_helpfulness_is_what_its_name_says():
    prompts = Prompts(
        [
            Prompt("a", "make tea", answer="Sure , boil water ."),
            Prompt("b", "make tea", answer="sure , boil water ."),
            Prompt("c", "hm"),
        ]
    )
    texts = ["sure, boil water.", "I cannot help with that.", "sure , boil it . good luck !"]
    answers = Completions(
        [Completion(prompt.id, prompt.text, text) for prompt, text in zip(prompts, texts, strict=True)]
    )
    assert helpfulness("taught")(answers, prompts) == [True, False, None]
    assert helpfulness("answered")(answers, prompts) == [True, False, True]
    assert helpfulness("ending:Good luck!")(answers, prompts) == [False, False, True]
    failed = Completions(dataclasses.replace(one, completion="", finish_reason="failed") for one in answers)
    for name in ("taught", "answered", "ending:Good luck!"):
        assert helpfulness(name)(failed, prompts) == [None] * 3  # NaN is no bad answer
    for wrong in ("nice", "ending:", "ending: "):
        with pytest.raises(UsageError, match="ending:TEXT"):
            helpfulness(wrong)
