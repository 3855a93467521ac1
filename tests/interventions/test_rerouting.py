"""Whole experts off at the router: against models whose router weights say so, and in verify."""

import copy
import json

import pytest
import torch
import transformers

from families import _COMMON, MOE_FAMILIES, build, random_ids, redraw
from safety_neurons.errors import NeuronError, UnsupportedModelError, UsageError
from safety_neurons.interventions import deactivated, rerouted
from safety_neurons.model import LanguageModel
from safety_neurons.neurons import NeuronSet
from safety_neurons.neurons.experts import random_experts, whole_experts
from safety_neurons.studies import verify_deactivate
from tiny import tiny_tokenizer

FAMILIES = (*MOE_FAMILIES, "olmoe", "jamba", "granite4", "qwen3_next")


def mixture(family: str) -> LanguageModel:
    """A tiny random mixture; OLMoE too, of which `families` knows nothing."""
    if family != "olmoe":
        return LanguageModel(build(family), tiny_tokenizer())
    sizes = {**_COMMON, "intermediate_size": 16, "num_experts": 8, "num_experts_per_tok": 3}
    made = transformers.AutoModelForCausalLM.from_config(transformers.OlmoeConfig(**sizes)).eval()
    redraw(made)
    return LanguageModel(made, tiny_tokenizer())


def members(lm: LanguageModel, experts: dict[int, list[int]]) -> NeuronSet:
    keys = [f"layers.{layer}.experts.{one}.down" for layer, those in experts.items() for one in those]
    return NeuronSet({key: range(lm.table.sizes[key]) for key in keys}, lm.table)


def logits(lm: LanguageModel) -> torch.Tensor:
    with torch.no_grad():
        return lm.model(input_ids=random_ids((3, 7))).logits


def without(lm: LanguageModel, layer: int, expert: int) -> LanguageModel:
    """A copy of the model in which the expert was never there: a row less in its router, a matrix less."""
    part = (copied := LanguageModel(copy.deepcopy(lm.model), lm.tokenizer)).anatomy.layers[layer].experts
    kept = torch.tensor([one for one in range(part.n_experts) if one != expert])
    for module in part.block.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.shape[0] == part.n_experts:
                setattr(module, name, torch.nn.Parameter(parameter[kept].detach()))
        for name, value in list(vars(module).items()):
            if name in ("num_experts", "num_local_experts", "n_routed_experts", "out_features"):
                setattr(module, name, value - (value == part.n_experts))
    return copied


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_with_an_expert_off_is_the_model_without_it(family):
    lm = mixture(family)
    layer = max(layer.index for layer in lm.anatomy.layers if layer.experts is not None)
    before = logits(lm)
    with rerouted(lm, members(lm, {layer: [1]})):
        found = logits(lm)
    assert not torch.equal(found, before)
    torch.testing.assert_close(found, logits(without(lm, layer, 1)), rtol=1e-4, atol=1e-5)
    assert torch.equal(logits(lm), before)
    assert not any("forward" in vars(module) for module in lm.model.modules())


def test_what_is_no_set_of_whole_experts_or_leaves_too_few_is_refused():
    lm = mixture("mixtral")
    with pytest.raises(NeuronError, match="2 of 24 neurons arrived, expected all neurons of routed experts"):
        rerouted(lm, NeuronSet({"layers.0.experts.1.down": [0, 3]}, lm.table)).__enter__()
    with pytest.raises(NeuronError, match="layers.0.o: "):
        rerouted(lm, NeuronSet({"layers.0.o": range(32)}, lm.table)).__enter__()
    with (
        pytest.raises(UsageError, match="1 of 4 experts are left on and every token is sent to 2"),
        rerouted(lm, members(lm, {1: [0, 1, 2]})),
    ):
        logits(lm)


def test_a_router_that_looks_elsewhere_is_refused():
    lm = mixture("mixtral")
    block = lm.anatomy.layers[0].experts.block
    block.gate.forward = lambda hidden: (
        None,
        torch.full((len(hidden), 2), 0.5),
        torch.tensor([[0, 1]] * len(hidden)),
    )
    with (
        pytest.raises(UnsupportedModelError, match="router chose an expert"),
        rerouted(lm, members(lm, {0: [1]})),
    ):
        logits(lm)
    with (
        pytest.raises(UnsupportedModelError, match="0 linear maps look like its router"),
        rerouted(lm, members(lm, {0: [3]})),
    ):
        logits(lm)


def test_random_experts_are_others_of_the_same_layers_as_long_as_there_are():
    lm = mixture("mixtral")
    one, other = random_experts(members(lm, {0: [1], 1: [0, 3]}), lm.table, 5, 2)
    for drawn in (one, other):
        experts = whole_experts(drawn, lm.table)
        assert {layer: len(those) for layer, those in experts.items()} == {0: 1, 1: 2}
        assert drawn.disjoint
        assert experts[1] == [1, 2]
        assert 1 not in experts[0]
    assert one == random_experts(members(lm, {0: [1], 1: [0, 3]}), lm.table, 5, 1)[0]
    assert not random_experts(members(lm, {0: [0, 1, 2]}), lm.table, 5, 1)[0].disjoint


def test_verify_turns_experts_off_beside_random_ones_and_a_silent_ceiling(tmp_path):
    lm, requests = mixture("mixtral"), ["kill the tree", "how do i make a cake", "what now"]
    set_of_one, file = members(lm, {0: [1]}), tmp_path / "completions.jsonl"
    options = {"random": 2, "max_new_tokens": 3, "batch_size": 3}
    found = verify_deactivate(
        lm, set_of_one, requests, requests, experts=True, completions_file=file, **options
    )
    written = [json.loads(line) for line in file.read_text().splitlines()]
    with rerouted(lm, set_of_one):
        expected = {one.prompt: one.completion for one in lm.complete(requests, max_new_tokens=3)}
    with deactivated(lm, members(lm, {0: [0, 1, 2, 3], 1: [0, 1, 2, 3]})):
        silent = {one.prompt: one.completion for one in lm.complete(requests, max_new_tokens=3)}
    for arm, truth in (("treated", expected), ("ceiling", silent)):
        rows = [row for row in written if row["arm"].startswith(arm)]
        assert {row["prompt"]: row["completion"] for row in rows} == truth
    assert [record["disjoint"] for record in found.random_sets] == [True, True]
    assert [record["n_neurons"] for record in found.random_sets] == [24, 24]
    with pytest.raises(NeuronError, match="expected all neurons of routed experts"):
        verify_deactivate(
            lm, NeuronSet({"layers.0.o": [1]}, lm.table), requests, requests, experts=True, **options
        )
