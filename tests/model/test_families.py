"""The contract that every supported family keeps, on tiny random models."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

from families import FAMILIES, MOE_FAMILIES, build, random_ids
from safety_neurons.errors import UnsupportedModelError
from safety_neurons.model.anatomy import resolve
from safety_neurons.model.hooks import editing, reading
from safety_neurons.model.proof import prove
from safety_neurons.model.sites import Anatomy, ExpertRows, SitePlace

ALL = FAMILIES + MOE_FAMILIES


@pytest.fixture(scope="module", params=ALL)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def anatomy(family: str) -> Anatomy:
    return prove(resolve(build(family, dtype=torch.float64)))


def hooked_modules(model: nn.Module) -> list[str]:
    return [
        name
        for name, module in model.named_modules()
        if module._forward_hooks
        or module._forward_pre_hooks
        or "_apply_gate" in module.__dict__
        or "forward" in module.__dict__
    ]


@torch.no_grad()
def logits(anatomy: Anatomy, ids: Tensor) -> Tensor:
    return anatomy.model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits


@contextmanager
def zeroed(
    weight: Tensor, index: tuple[object, ...], bias: Tensor | None = None, entries: object = None
) -> Iterator[None]:
    """Parts of a weight (and bias entries) set to zero for the time of the context."""
    kept = weight.detach().clone(), None if bias is None else bias.detach().clone()
    with torch.no_grad():
        weight[index] = 0
        if bias is not None:
            bias[entries] = 0
        yield
        weight.copy_(kept[0])
        if bias is not None:
            bias.copy_(kept[1])


def zeroed_site(place: SitePlace, neurons: Tensor):
    """The stored rows or columns of some neurons of a site set to zero, by the place's module, side and
    index.
    """
    base = place.projection.base
    features = torch.arange(place.features)
    features = features[neurons] if place.index is None else features[place.index][neurons]
    rows = (place.side == "output") != place.transposed
    return zeroed(
        base.weight,
        (features,) if rows else (slice(None), features),
        base.bias if place.has_bias else None,
        features,
    )


def test_every_site_and_every_parameter_is_covered(anatomy: Anatomy) -> None:
    coverage = anatomy.coverage()
    assert coverage.complete
    assert not anatomy.refused
    assert re.fullmatch(r"sites (\d+)/\1, 100 % of attention and MLP parameters", str(coverage))


def test_the_table_names_every_neuron_once(anatomy: Anatomy, family: str) -> None:
    config = anatomy.model.config
    table = anatomy.table
    assert table.architecture == type(anatomy.model).__name__
    assert table.n_parameters == sum(parameter.numel() for parameter in anatomy.model.parameters())
    assert table["layers.1.q"].n_heads == config.num_attention_heads
    assert table["layers.1.o"].size == table["layers.1.q"].size
    assert table["layers.1.k"].n_heads * table["layers.1.k"].head_dim == table["layers.1.v"].size
    if family in MOE_FAMILIES:
        assert "layers.1.experts.3.down" in table


def test_reading_gives_each_site_its_own_shape_and_leaves_logits_bit_identical(anatomy: Anatomy) -> None:
    ids = random_ids((3, 7))
    clean = logits(anatomy, ids)
    shapes: dict[str, tuple[int, ...]] = {}

    def keep(key: str):
        return lambda values: shapes.__setitem__(key, tuple(values.shape))

    with reading(anatomy, {key: keep(key) for key in anatomy.places}) as firings:
        assert torch.equal(logits(anatomy, ids), clean)
    assert shapes == {key: (3, 7, anatomy.table[key].size) for key in anatomy.places}
    assert firings.passes == 1
    assert set(firings.counts.values()) == {1}
    assert hooked_modules(anatomy.model) == []


def test_an_edit_to_zero_is_the_model_with_the_weights_zeroed(anatomy: Anatomy) -> None:
    ids = random_ids((2, 7))
    clean = logits(anatomy, ids)
    for key, place in anatomy.places.items():
        neurons = torch.tensor(sorted({0, 1, place.size // 2, place.size - 1}))
        with editing(anatomy, {key: lambda values, neurons=neurons: values.index_fill(-1, neurons, 0)}):
            edited = logits(anatomy, ids)
        with zeroed_site(place, neurons):
            expected = logits(anatomy, ids)
        assert (edited - expected).abs().max() <= 1e-12, key
        assert (edited - clean).abs().max() > 1e-9, key
    assert hooked_modules(anatomy.model) == []
    assert torch.equal(logits(anatomy, ids), clean)


def test_all_sites_edited_at_once_are_all_weights_zeroed_at_once(anatomy: Anatomy) -> None:
    ids = random_ids((2, 7))
    neurons = torch.tensor([0, 2])
    with editing(anatomy, {key: lambda values: values.index_fill(-1, neurons, 0) for key in anatomy.places}):
        edited = logits(anatomy, ids)
    kept = {name: value.clone() for name, value in anatomy.model.state_dict().items()}
    for place in anatomy.places.values():
        context = zeroed_site(place, neurons)
        context.__enter__()  # restored from the state below, all at once
    expected = logits(anatomy, ids)
    anatomy.model.load_state_dict(kept)
    assert (edited - expected).abs().max() <= 1e-12


def test_weight_and_bias_give_the_activation(anatomy: Anatomy) -> None:
    """Index round trip: neuron n of the activation is row n of weight() applied to the projection's input."""
    ids = random_ids((2, 5))
    seen: dict[str, Tensor] = {}
    given: dict[str, Tensor] = {}
    handles = [
        place.projection.base.register_forward_pre_hook(
            lambda _, args, key=key: given.__setitem__(key, args[0])
        )
        for key, place in anatomy.places.items()
    ]
    with reading(
        anatomy,
        {key: (lambda values, key=key: seen.__setitem__(key, values.clone())) for key in anatomy.places},
    ):
        logits(anatomy, ids)
    for handle in handles:
        handle.remove()
    for key, place in anatomy.places.items():
        weight = place.weight()
        if place.side == "output":
            assert weight.shape == (place.size, place.weights_per_neuron)
            expected = nn.functional.linear(given[key], weight, place.bias()).view(seen[key].shape)
            torch.testing.assert_close(seen[key], expected, rtol=0, atol=1e-12)
        else:
            assert weight.shape == (place.weights_per_neuron, place.size)
            assert place.bias() is None
            torch.testing.assert_close(seen[key], given[key].view(seen[key].shape), rtol=0, atol=0)


def test_right_padding_changes_no_activation(anatomy: Anatomy) -> None:
    lengths = [4, 7]
    ids = random_ids((2, 7))
    mask = torch.ones_like(ids)
    mask[0, 4:] = 0
    together: dict[str, Tensor] = {}
    with reading(
        anatomy,
        {key: (lambda values, key=key: together.__setitem__(key, values.clone())) for key in anatomy.places},
    ):
        anatomy.model(input_ids=ids, attention_mask=mask, use_cache=False)
    for row, length in enumerate(lengths):
        alone: dict[str, Tensor] = {}
        with reading(
            anatomy,
            {
                key: (lambda values, key=key, alone=alone: alone.__setitem__(key, values.clone()))
                for key in anatomy.places
            },
        ):
            logits(anatomy, ids[row : row + 1, :length])
        for key in anatomy.places:
            torch.testing.assert_close(together[key][row, :length], alone[key][0], rtol=0, atol=1e-5)


def test_nothing_of_the_model_is_changed_by_proof_and_hooks(family: str) -> None:
    model = build(family)
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    implementation = model.config._attn_implementation
    prove(resolve(model))
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.config._attn_implementation == implementation
    assert all(module.training for module in model.modules())
    assert hooked_modules(model) == []


@pytest.mark.parametrize("implementation", ["batched_mm", "eager"])
@pytest.mark.parametrize("moe_family", MOE_FAMILIES)
def test_zeroing_an_expert_neuron_is_zeroing_its_weights(moe_family: str, implementation: str) -> None:
    model = build(moe_family, dtype=torch.float64)
    model.set_experts_implementation(implementation)
    if implementation == "eager" and moe_family != "gpt_oss":
        with pytest.raises(
            UnsupportedModelError, match=r"layers\.\d\.experts\S* .*set_experts_implementation"
        ):
            prove(resolve(model))
        return
    anatomy = prove(resolve(model))
    ids = random_ids((2, 7))
    clean = logits(anatomy, ids)
    experts = anatomy.layers[1].experts
    assert experts is not None
    neurons = torch.tensor([1, experts.width - 1])
    moved = 0
    for expert in range(experts.n_experts):
        for site in ("gate", "up", "down"):
            key = experts.key(expert, site)
            with editing(anatomy, {key: lambda rows: rows.values.index_fill(-1, neurons, 0)}):
                edited = logits(anatomy, ids)
            with zeroed_expert(experts, expert, site, neurons):
                expected = logits(anatomy, ids)
            assert (edited - expected).abs().max() <= 1e-12, key
            moved += int((edited - clean).abs().max() > 1e-9)
    assert moved >= 6  # experts that no token chose have no effect


def zeroed_expert(experts, expert: int, site: str, neurons: Tensor):
    if site == "down":
        weight, features = experts.module.down_proj, neurons
        index = (expert, features) if experts.transposed else (expert, slice(None), features)
        return zeroed(weight, index)
    weight = experts.module.gate_up_proj
    features = torch.arange(2 * experts.width)[experts.index[site]][neurons]
    index = (expert, slice(None), features) if experts.transposed else (expert, features)
    bias = experts.module.gate_up_proj_bias if experts.has_bias else None
    return zeroed(weight, index, bias, (expert, features))


@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm"])
@pytest.mark.parametrize("moe_family", MOE_FAMILIES)
def test_rows_of_experts_say_token_weight_and_expert(moe_family: str, implementation: str) -> None:
    model = build(moe_family)
    model.set_experts_implementation(implementation)
    anatomy = prove(resolve(model))
    experts = anatomy.layers[1].experts
    assert experts is not None
    ids = random_ids((2, 7))
    every: list[ExpertRows] = []
    single: dict[int, ExpertRows] = {}
    readers = {
        experts.key(expert, "down"): (lambda rows, expert=expert: single.__setitem__(expert, rows))
        for expert in range(4)
    }
    with reading(anatomy, {"layers.1.experts.*.down": every.append, **readers}):
        reading_logits = logits(anatomy, ids)
    assert torch.equal(reading_logits, logits(anatomy, ids))
    (rows,) = every
    top_k = model.config.num_experts_per_tok
    assert len(rows) == 14 * top_k
    assert torch.equal(rows.token_index.bincount(), torch.full((14,), top_k))
    for expert, mine in single.items():
        where = rows.expert_index == expert
        assert len(mine) == int(where.sum())
        assert torch.equal(mine.values, rows.values[where])
        assert torch.equal(mine.token_index, rows.token_index[where])
        assert torch.equal(mine.weight, rows.weight[where])


@pytest.mark.parametrize("name", MOE_FAMILIES)
def test_experts_of_a_layer_get_as_many_rows_as_tokens_are_sent_to_experts(name: str) -> None:
    anatomy = resolve(build(name))
    layers = [layer for layer in anatomy.layers if layer.experts is not None]
    rows: dict[int, int] = {}

    def count(layer: int):
        return lambda values: rows.update({layer: rows.get(layer, 0) + len(values)})

    ids = random_ids((2, 7))
    with reading(anatomy, {f"layers.{one.index}.experts.*.down": count(one.index) for one in layers}):
        logits(anatomy, ids)
    assert rows == {one.index: ids.numel() * anatomy.experts_per_token(one.index) for one in layers}
    for layer in layers:
        experts = layer.experts.n_experts  # type: ignore[union-attr]
        share = anatomy.share_of_tokens(f"layers.{layer.index}.experts.0.down")
        assert share == pytest.approx(anatomy.experts_per_token(layer.index) / experts)
    assert anatomy.share_of_tokens(next(iter(anatomy.places))) == 1


def test_experts_of_a_token_may_be_told_layer_by_layer() -> None:
    anatomy = resolve(build("qwen3_moe"))
    config = vars(anatomy.model.config)  # as HunYuan's configuration tells it, past the types of this one
    config["num_experts_per_tok"] = [1, 2]
    assert [anatomy.experts_per_token(layer) for layer in (0, 1)] == [1, 2]
    config["num_experts_per_tok"] = None
    assert anatomy.experts_per_token(1) == 0
    assert anatomy.share_of_tokens("layers.1.experts.0.down") == 1
