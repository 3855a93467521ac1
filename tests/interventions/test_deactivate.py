import copy

import pytest
import torch
from naive import alone, columns, full, generated, lm, no_hooks, shared_pair, some

from families import build, random_ids
from safety_neurons.errors import ForeignModelError, NeuronError
from safety_neurons.interventions import deactivated, patched
from safety_neurons.model import LanguageModel
from safety_neurons.model.sites import projection
from safety_neurons.neurons import NeuronSet

FAMILIES = [
    "llama",
    "gpt2",
    "gpt_neox",
    "phi3",
    "qwen3",
    "gemma2",
    "bloom",
    "opt",
    "falcon",
    "olmo2",
    "granite",
    "phi",
]


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor]:
    return random_ids((3, 7)), torch.ones(3, 7, dtype=torch.long)


def zeroed(model: LanguageModel, neurons: NeuronSet) -> LanguageModel:
    """A copy whose rows (with their bias entries) and columns of these neurons are zero, adapters' shares
    included.
    """
    other = lm(copy.deepcopy(model.model))
    with torch.no_grad():
        for key, index in neurons.items():
            place = model.anatomy.places[key]  # the copy has the same places, and need not be proved again
            module = other.model.get_submodule(place.module_name)
            where = columns(place)[torch.tensor(index)]
            output = place.side == "output"
            part = projection(module)
            assert part is not None
            base = part.base
            weight = base.weight.T if place.transposed else base.weight
            if output:
                weight[where] = 0
                if base.bias is not None:
                    base.bias[where] = 0
                for factor in getattr(module, "lora_B", {}).values():
                    factor.weight[where] = 0
            else:
                weight[:, where] = 0
                for factor in getattr(module, "lora_A", {}).values():
                    factor.weight[:, where] = 0
    return other


def assert_equal(one: torch.Tensor, other: torch.Tensor) -> None:
    assert (one - other).abs().max() <= 1e-12 * other.abs().max().clamp(min=1)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_zeroed_rows_and_columns(
    family: str, batch: tuple[torch.Tensor, torch.Tensor]
) -> None:
    model = lm(build(family, torch.float64))
    plain = full(model, *batch)
    for site in ("q", "k", "v", "o", "gate", "up", "down"):
        neurons = some(model, 0.3, sites=(site,))
        if not len(neurons):
            continue
        with deactivated(model, neurons):
            logits = full(model, *batch)
        assert_equal(logits, full(zeroed(model, neurons), *batch))
        assert not torch.equal(logits, plain)
    assert torch.equal(full(model, *batch), plain)
    assert no_hooks(model.model)


@pytest.mark.parametrize("kind", ["ia3", "lora"])
def test_an_adapters_share_is_deactivated_too(kind: str, batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    base, aligned = shared_pair(kind, dtype=torch.float64)
    for view in (base, aligned):
        neurons = some(view, 0.3)
        apart = alone(view)
        with deactivated(view, neurons):
            logits = full(view, *batch)
        assert_equal(logits, full(zeroed(apart, neurons), *batch))


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_generation_with_a_cache_is_that_of_zeroed_weights(
    family: str, batch: tuple[torch.Tensor, torch.Tensor]
) -> None:
    model = lm(build(family, torch.float64))
    neurons = some(model, 0.2)
    with deactivated(model, neurons):
        output = generated(model, *batch, 6)
    expected = generated(zeroed(model, neurons), *batch, 6)
    assert torch.equal(output.sequences, expected.sequences)
    assert_equal(torch.stack(output.logits), torch.stack(expected.logits))


def test_several_sets_at_once_and_nested_are_their_union(batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    model = lm(build("phi3", torch.float64))
    one, other = some(model, 0.2, seed=1), some(model, 0.2, seed=2)
    with deactivated(model, one | other):
        expected = full(model, *batch)
    with deactivated(model, one, other):
        assert torch.equal(full(model, *batch), expected)
    with deactivated(model, one), deactivated(model, other):
        assert torch.equal(full(model, *batch), expected)
    with deactivated(model, one):
        assert not torch.equal(full(model, *batch), expected)


def test_no_set_and_an_empty_set_change_nothing(batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    model = lm(build("llama"))
    plain = full(model, *batch)
    with deactivated(model):
        assert torch.equal(full(model, *batch), plain)
    with deactivated(model, NeuronSet({}, model.table)):
        assert torch.equal(full(model, *batch), plain)


def test_a_bare_model_of_transformers_is_accepted(batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    model = build("llama", torch.float64)
    with deactivated(model, {"layers.1.down": [3, 4]}) as same, torch.no_grad():
        assert same is model
        logits = model(input_ids=batch[0]).logits
        model.model.layers[1].mlp.down_proj.weight[:, [3, 4]] = 0
    with torch.no_grad():
        assert_equal(logits, model(input_ids=batch[0]).logits)


def test_an_undefined_activation_is_silenced(batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    model = lm(build("llama"))
    assert model.anatomy.coverage().complete  # proved while every number is finite
    with torch.no_grad():
        model.model.model.layers[0].mlp.up_proj.weight[5] = float("nan")
    with deactivated(model, {"layers.0.up": [5]}):
        assert full(model, *batch).isfinite().all()


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("site", ["gate", "up", "down"])
def test_neurons_of_experts_are_deactivated(
    family: str, site: str, batch: tuple[torch.Tensor, torch.Tensor]
) -> None:
    model = lm(build(family))
    plain = full(model, *batch)
    members = {
        key: range(model.table.sizes[key])
        for key in model.table.keys
        if ".experts." in key and key.endswith(site)
    }
    with deactivated(model, members):
        silent = full(model, *batch)
    assert not torch.equal(silent, plain)
    assert torch.equal(full(model, *batch), plain)
    if site != "down":
        return
    other = copy.deepcopy(model.model)
    with torch.no_grad():
        for module in other.modules():
            if isinstance(getattr(module, "down_proj", None), torch.nn.Parameter):
                module.down_proj.zero_()
    assert (silent - full(lm(other), *batch)).abs().max() <= 1e-5


def test_foreign_neurons_are_refused() -> None:
    model, other = lm(build("llama")), lm(build("llama", intermediate_size=40))
    with pytest.raises(ForeignModelError), deactivated(model, some(other)):
        pass
    with pytest.raises(NeuronError), deactivated(model, {"layers.0.down": [999]}):
        pass


def test_hooks_come_off_when_something_raises(batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    model = lm(build("llama"))
    with pytest.raises(RuntimeError, match="stop"), deactivated(model, some(model)):
        raise RuntimeError("stop")
    assert no_hooks(model.model)


@pytest.mark.parametrize("kind", ["ia3", "lora"])
@pytest.mark.parametrize("stacked", [True, False])
@pytest.mark.parametrize("inside", [True, False])
def test_deactivating_one_view_of_a_patched_pair_leaves_the_other_alone(
    kind: str,
    stacked: bool,
    inside: bool,
    batch: tuple[torch.Tensor, torch.Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base, donor = shared_pair(kind)
    neurons, silent = some(base, 0.3, seed=1), some(base, 0.3, seed=2)
    apart = alone(base), alone(donor)
    if not stacked:
        monkeypatch.setattr("safety_neurons.interventions.patch.can_stack", lambda *_: False)
    for which in (0, 1):
        view, copied = (base, donor)[which], apart[which]
        if inside:
            with patched(base, donor, neurons), deactivated(view, silent):
                logits = full(base, *batch)
            with patched(*apart, neurons), deactivated(copied, silent):
                expected = full(apart[0], *batch)
        else:
            with deactivated(view, silent), patched(base, donor, neurons):
                logits = full(base, *batch)
            with deactivated(copied, silent), patched(*apart, neurons):
                expected = full(apart[0], *batch)
        assert (logits - expected)[batch[1].bool()].abs().max() <= 2e-5
