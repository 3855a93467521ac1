"""Ceilings: what all neurons restore by activations and by parameters, and what they are called where a part
of them restores more.
"""

import copy

import pytest
import torch

from safety_neurons.model import LanguageModel, load_pair
from safety_neurons.neurons import NeuronSet
from safety_neurons.prompt_lists import Prompts
from safety_neurons.results import Effect, rate
from safety_neurons.studies import compare, verify_patch
from safety_neurons.studies.bench import ArmOutcome
from safety_neurons.studies.verification import ALL_PATCHED, CEILING, columns_differ, named, with_parameters
from tiny import CHAT_TEMPLATE, tiny_llama, tiny_tokenizer
from tiny_pair import HARMFUL, HARMLESS

OPTIONS = {"max_new_tokens": 4, "batch_size": 4, "random": 1}
MLP = ("gate", "up", "down")


def moved(model, sites, seed=1):
    """A copy of the model with other parameters at some sites."""
    other = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if any(f".{site}_proj." in name for site in sites):
                parameter += 0.5 * torch.randn(parameter.shape, generator=generator)
    return other


@pytest.fixture(scope="module")
def two():
    base = tiny_llama()
    return tuple(LanguageModel(model, tiny_tokenizer(CHAT_TEMPLATE)) for model in (base, moved(base, MLP)))


@pytest.fixture(scope="module")
def prompts():
    return Prompts.from_list(HARMFUL[:4]), Prompts.from_list(HARMLESS[:4])


def answers(found, arm):
    return [one.token_ids for one in found.bench.completions.arm(f"{arm}/harmful")]


def test_parameters_of_the_sites_make_the_donor_of_two_models_and_every_bit_comes_back(two, prompts):
    base, donor = two
    before = {name: value.clone() for name, value in base.model.state_dict().items()}
    everything = NeuronSet.all(base.table).only(sites=MLP)
    ids = torch.arange(4, 20)[None]
    with torch.no_grad(), with_parameters(base, donor, everything):
        assert torch.equal(base.model(ids).logits, donor.model(ids).logits)
    assert all(torch.equal(value, before[name]) for name, value in base.model.state_dict().items())
    found = verify_patch(base, donor, everything.only(layers=[0]), *prompts, **OPTIONS)
    assert answers(found, "ceiling by parameters") == answers(found, "aligned")
    assert (
        found.record()["ceiling_by_parameters"]["harmful_refused"]
        == found.record()["aligned"]["harmful_refused"]
    )
    assert all(torch.equal(value, before[name]) for name, value in base.model.state_dict().items())


def test_parameters_of_adapters_are_exchanged_too(tiny_pair, prompts):
    pair = load_pair(tiny_pair.base, tiny_pair.aligned)
    down = NeuronSet.all(pair.base.table).only(sites=["down"])
    before = [value.clone() for value in pair.base.model.state_dict().values()]
    found = verify_patch(pair.base, pair.aligned, down.only(layers=[0]), *prompts, **OPTIONS)
    assert answers(found, "ceiling by parameters") == answers(found, "aligned")
    assert all(
        torch.equal(one, other)
        for one, other in zip(pair.base.model.state_dict().values(), before, strict=True)
    )


def test_a_comparison_has_both_ceilings(two, prompts):
    found = compare(
        *two, *prompts, find_prompts=prompts[0], sites=["up"], methods=["weight-change"], top=0.1, **OPTIONS
    )
    record = found.record()
    assert record["ceiling_called"] in (CEILING, ALL_PATCHED)
    assert record.keys() >= {"ceiling_why", "ceiling_by_parameters", "ceiling_by_parameters_effect"}


def effect(value):
    return Effect(value, None, None, 1, 0, None if value is not None else "no gap", "refused")


def arm(refused):
    none = [False] * len(refused)
    return ArmOutcome(
        "ceiling",
        rate(refused),
        rate(none),
        None,
        None,
        tuple(refused),
        tuple(none),
        harmful_complied=rate(none),
        complied=tuple(none),
    )


def refusing(share, n):
    return [number < round(share * n) for number in range(n)]


@pytest.mark.parametrize(
    ("whole", "parts", "n", "called"),
    [
        (0.9, (0.5, 0.9), 30, CEILING),
        (0.36, (0.2, 0.82), 32, ALL_PATCHED),
        (0.96, (0.5, 1.0), 24, CEILING),  # one answer more of 24
        (0.4, (0.6,), 5, CEILING),
        (None, (0.5,), 30, CEILING),
        (0.3, (None,), 30, CEILING),
    ],
)
@pytest.mark.parametrize("differ", [True, False])
def test_what_a_part_clearly_beats_is_no_ceiling_and_that_is_explained(whole, parts, n, called, differ):
    found = named(
        arm(refusing(whole or 0, n)),
        effect(whole),
        [(effect(part), tuple(refusing(part or 0, n))) for part in parts],
        (None, effect(None)),
        differ,
    )
    assert found.name == called
    assert (found.why is None) == (called == CEILING)
    assert ("columns" in (found.why or "")) == (differ and called == ALL_PATCHED)


@pytest.mark.parametrize(
    ("sites", "differ"), [(("gate", "up", "q"), False), (("down",), True), (("o",), True)]
)
def test_whether_columns_differ_is_looked_at(two, sites, differ):
    base = two[0]
    assert columns_differ(base, LanguageModel(moved(base.model, sites))) == differ
