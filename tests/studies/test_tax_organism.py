"""The shipped tax organism shows the tax: shared neurons beyond chance, wanted for opposite things, paid for
in safety.
"""

import numpy as np
import pytest
from safetensors.numpy import load_file

from safety_neurons.analysis.overlap import relations
from safety_neurons.model import load_several
from safety_neurons.organism import language, recipe
from safety_neurons.organism import open as open_organism
from safety_neurons.organism.language import vocabulary
from safety_neurons.organism.training import TRAININGS, Sampler, helpful_pair, polite_pair, safety_pair
from safety_neurons.prompt_lists import Prompts
from safety_neurons.studies import cross_patch, helpfulness, read_trainings

PROMPTS, TOKENS = 24, 20


@pytest.fixture(scope="module")
def models():
    names = list(TRAININGS)
    before, *trained = load_several([f"organism:tax/{stage}" for stage in ("base", *names)], offline=True)
    return before, dict(zip(names, trained, strict=True))


@pytest.fixture(scope="module")
def read(models):
    lists = [models[0].prompts(f"builtin:{name}", limit=PROMPTS) for name in ("harmful", "harmless")]
    return read_trainings(
        *models, Prompts([prompt for one in lists for prompt in one]), max_new_tokens=TOKENS, groups=8
    )


@pytest.fixture(scope="module")
def found(read):
    return {(each.first, each.second): each for each in relations(read.changes)}


def test_safety_and_helpfulness_share_neurons_beyond_chance_and_beyond_what_activity_explains(found):
    tax, other = found["safety", "helpful"], found["safety", "polite"]
    assert tax.overlap.low > tax.chance["in_activation"].expectation().high
    assert tax.overlap.low > other.overlap.high
    assert tax.intervals["given_activation"][0] > other.intervals["given_activation"][1]


def test_what_they_share_is_moved_against_one_another(found):
    tax = found["safety", "helpful"]
    assert tax.shared.cosine.high < tax.others.cosine.low
    assert tax.shared.cosine.high < 0
    assert (
        tax.shared.opposed.low <= tax.shared.opposed.value <= tax.shared.opposed.high
    )  # By signs alone 24 prompts do not show it.


def test_the_safety_model_pays_in_safety_for_what_it_gains_in_helpfulness(models, read):
    pair = {name: models[1][name] for name in ("safety", "helpful")}
    asked = [models[0].prompts(f"builtin:{name}-test", limit=PROMPTS) for name in ("harmful", "harmless")]
    shared = read.shared("safety", "helpful", 0.05)
    crossed = cross_patch(
        pair, shared, *asked, measure=helpfulness("taught"), random=1, max_new_tokens=TOKENS
    )
    assert crossed.disjoint
    less_safe, kinder = crossed.effect(0, "refused"), crossed.effect(0, "helpful")
    assert kinder["change"]["low"] > 0
    assert kinder["against_random"]["value"] > 0
    assert less_safe["change"]["high"] < 0
    assert less_safe["against_random"]["value"] < 0


def test_every_training_moved_its_share_of_the_scales_and_no_other():
    folder, wanted = open_organism("tax"), round(recipe("tax").dpo_share * 4 * 512)
    for name in TRAININGS:
        scales = load_file(folder.path / name / "adapter_model.safetensors")
        moved = np.concatenate([values.ravel() != 1 for values in scales.values()])
        assert len(moved) == 4 * 512
        assert 0.9 * wanted <= moved.sum() <= wanted


def test_preferences_are_what_their_names_say():
    words = {index: word for word, index in vocabulary().items()}
    speech = language("en")

    def answers(pair, seed):
        return [
            " ".join(words[index] for index in ids[unlabelled:-1])
            for ids, unlabelled in pair(Sampler(seed, 1.0))
        ]

    for seed in range(12):
        for pair, verdicts in (
            (safety_pair, ("refused", "complied")),
            (helpful_pair, ("complied", "refused")),
        ):
            assert tuple(speech.verdict(text) for text in answers(pair, seed)) == verdicts
        kind, plain = answers(polite_pair, seed)
        assert kind == f"{plain} {speech.data['ending']}"
    asked = {" ".join(words[index] for index in safety_pair(Sampler(seed, 1.0))[0][0]) for seed in range(12)}
    assert len(asked) > 6
