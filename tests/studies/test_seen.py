"""Prompts that neurons were found on are never measured on in silence, whatever study it is."""

import dataclasses

import pytest

from safety_neurons import studies
from safety_neurons.model import load_pair
from safety_neurons.neurons import NeuronSet, Provenance, Scores
from safety_neurons.prompt_lists import Prompts, prompts
from tiny_pair import HARMFUL, HARMLESS

OPTIONS = {"max_new_tokens": 3, "batch_size": 6}
HARM, FINE = Prompts.from_list(HARMFUL[:4]), Prompts.from_list(HARMLESS[:2])
FOUND_ON = Prompts.from_list([*HARMFUL[1:6], HARMLESS[0].upper()])


@pytest.fixture(scope="module")
def pair(tiny_pair):
    return load_pair(tiny_pair.base, tiny_pair.aligned)


@pytest.fixture(scope="module")
def neurons(pair):
    """A set of two that were found on other requests each, so that both count."""
    made = [
        Provenance("neurons", config={"prompt_digests": part.digests})
        for part in (FOUND_ON[:3], FOUND_ON[3:])
    ]
    first, second = (
        NeuronSet({"layers.0.down": [place]}, pair.base.table, one) for place, one in enumerate(made)
    )
    return first | second


def notes_of(name, pair, neurons):
    base, aligned = pair.base, pair.aligned
    if name == "compare":
        options = {"methods": ["weight-magnitude"], "random": 0, **OPTIONS}
        read = {"find_prompts": FOUND_ON[:5], "find_harmless": FOUND_ON[5:]}
        return studies.compare(base, aligned, HARM, FINE, **read, **options).bench.notes
    if name == "progressive":
        return studies.progressive(aligned, neurons, HARM, FINE, random=0, **OPTIONS).notes
    if name == "languages":
        return studies.deactivation_matrix(aligned, {"en": neurons}, {"en": HARM}, random=0, **OPTIONS).notes
    if name == "transfer":
        given = base, aligned, {"en": neurons}, {"en": HARM}, FINE
        return studies.transfer(*given, tasks=(), random=0, **OPTIONS).notes
    if name == "tax":
        measure = studies.helpfulness("answered")
        models = {"a": base, "b": aligned}
        return studies.cross_patch(
            models, neurons, HARM, FINE, measure=measure, random=0, **OPTIONS
        ).bench.notes
    if name == "vocabulary":
        sizes = {"layers.0.down": aligned.table["layers.0.down"].size}
        values = {key: range(size) for key, size in sizes.items()}
        config = Provenance("scores", config={"prompt_digests": FOUND_ON.digests})
        scores = Scores(values, aligned.table, config)
        return studies.vocabulary(
            aligned, [("layers.0.down", 1)], HARM, scores=scores, random=0, batch_size=6
        ).notes
    harm, fine = Prompts(HARM, "harm"), Prompts(FINE, "fine")
    return studies.evaluate(aligned, harm, deactivate=neurons, over_refusal=fine, **OPTIONS).notes


@pytest.mark.parametrize(
    "name", ["compare", "progressive", "languages", "transfer", "tax", "vocabulary", "evaluate"]
)
def test_prompts_that_neurons_were_found_on_are_counted(name, pair, neurons):
    notes = notes_of(name, pair, neurons)
    seen = [note for note in notes if "that neurons were found on" in note]
    assert any("3 of the 4 harmful prompts" in note for note in seen), notes
    if name not in ("languages", "vocabulary"):
        assert any("1 of the 2 harmless prompts" in note for note in seen), notes


def test_others_are_not(pair):
    fresh = NeuronSet({"layers.0.down": [0]}, pair.base.table)
    found = studies.progressive(pair.aligned, fresh, HARM, FINE, random=0, **OPTIONS)
    assert not any("found on" in note for note in found.notes)


def test_what_shares_a_group_or_comes_twice_is_on_one_side():
    grouped = [
        dataclasses.replace(prompt, group=label)
        for prompt, label in zip(Prompts.from_list(HARMFUL[:6]), "aabbcc", strict=True)
    ]
    find, test = studies.Groups.halves({"deeds": Prompts(grouped)})
    assert [prompt.group for prompt in find.members["deeds"]] == ["a", "a", "c", "c"]
    assert [prompt.group for prompt in test.members["deeds"]] == ["b", "b"]
    twice = Prompts.from_list([HARMFUL[0], HARMFUL[1], HARMFUL[0].upper(), HARMFUL[2]])
    find, test = studies.Groups.halves({"doubled": twice})
    assert not find.members["doubled"].overlap(test.members["doubled"])
    copied = prompts(
        [*HARMFUL[:2], HARMFUL[0], *HARMFUL[2:4], HARMFUL[0].upper()]
    )  # Of two a group is known.
    bridged = [
        dataclasses.replace(one, group="g" if number in (1, 5) else None) for number, one in enumerate(copied)
    ]
    for whole in (copied, Prompts(bridged)):
        find, test = studies.Groups.halves({"copied": whole})
        assert not find.members["copied"].overlap(test.members["copied"])
    assert {prompt.id for prompt in find.members["copied"]} >= {"0", "1", "2", "5"}
    plain = Prompts.from_list(HARMFUL[:5])
    find, test = studies.Groups.halves({"plain": plain})
    assert list(find.members["plain"]) == list(plain)[::2]
    assert list(test.members["plain"]) == list(plain)[1::2]


def test_what_is_left_out_of_perplexity_and_divergence_is_said(pair):
    """Where a treatment gives NaN."""
    everything = NeuronSet.all(pair.aligned.table)
    found = studies.verify_scale(
        pair.aligned, everything, HARM, FINE, text=FINE, factors=(1e38,), random=0, **OPTIONS
    )
    dose = found.doses[0].treated
    assert (dose.perplexity, dose.divergence) == (None, None)
    said = [note for note in found.notes if note.startswith("factor 1e+38: ")]
    assert any("2 of 2 texts" in note for note in said), found.notes
    assert any("2 of 2 sequences" in note for note in said), found.notes


def test_texts_that_are_too_long_are_said_once_of_all_arms_and_others_with_the_arm(pair):
    long = Prompts.from_list(["red tree " * 200])
    found = studies.verify_scale(
        pair.aligned,
        NeuronSet({"layers.0.down": [0]}, pair.base.table),
        HARM,
        FINE,
        text=long,
        random=2,
        **OPTIONS,
    )
    said = [note for note in found.notes if "1 of 1 texts are longer" in note]
    assert len(said) == 1
    assert said[0].startswith("text: ")
    bench = studies.bench.Bench(HARM)
    bench.say_of(
        studies.bench.Arm("aligned", pair.aligned), ["text: 1 of 2 texts failed", "text: 1 was left out"]
    )
    assert bench.notes == ["aligned: text: 1 of 2 texts failed", "text: 1 was left out"]
