"""Hooks come on, do what they say, and come off."""

import pytest
import torch
from torch import Tensor, nn

from families import build, random_ids
from safety_neurons.errors import UnsupportedModelError
from safety_neurons.model.anatomy import resolve
from safety_neurons.model.hooks import around, editing, reading, with_forwards
from safety_neurons.model.proof import prove
from safety_neurons.model.sites import Anatomy


@pytest.fixture
def anatomy() -> Anatomy:
    return resolve(build("phi3"))


def hooks_on(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


@torch.no_grad()
def run(anatomy: Anatomy, rows: int = 2) -> Tensor:
    return anatomy.model(input_ids=random_ids((rows, 5))).logits


def test_hooks_come_off_when_the_block_a_reader_or_an_editor_raises(anatomy: Anatomy) -> None:
    def fail(values: Tensor) -> Tensor:
        raise KeyError("in the middle")

    clean = run(anatomy)
    keys = list(anatomy.places)
    for context in (reading(anatomy, dict.fromkeys(keys, fail)), editing(anatomy, dict.fromkeys(keys, fail))):
        with pytest.raises(KeyError, match="in the middle"), context:
            run(anatomy)
        assert hooks_on(anatomy.model) == 0
    with pytest.raises(ZeroDivisionError), editing(anatomy, dict.fromkeys(keys, torch.zeros_like)):
        _ = 1 / 0
    assert hooks_on(anatomy.model) == 0
    assert torch.equal(run(anatomy), clean)


def test_hooks_come_off_when_putting_them_on_fails_half_way(anatomy: Anatomy) -> None:
    good = anatomy.layers[0].attention.places["o"].module
    with pytest.raises(AttributeError), around(before={good: print, "no module": print}):
        pass
    with (
        pytest.raises(UnsupportedModelError, match=r"layers\.9\.down was asked"),
        reading(anatomy, {"layers.0.o": print, "layers.9.down": print}),
    ):
        pass
    assert hooks_on(anatomy.model) == 0


def test_fused_sites_share_one_hook_and_each_edit_lands_in_its_own_features(anatomy: Anatomy) -> None:
    sites = [f"layers.0.{site}" for site in "qkv"]
    fused = anatomy.place("layers.0.q").module
    output: list[Tensor] = []
    with editing(anatomy, {key: (lambda values, number=number: values * 0 + number) for number, key in enumerate(sites)}):
        assert len(fused._forward_hooks) == 1
        with around(fused, after=lambda values: output.append(values)):
            run(anatomy)
    assert output[0][0, 0].tolist() == [0.0] * 32 + [1.0] * 16 + [2.0] * 16


def test_reading_is_a_view_where_the_features_are_evenly_spaced(anatomy: Anatomy) -> None:
    output: list[Tensor] = []
    seen: list[Tensor] = []
    with (
        reading(anatomy, {"layers.0.k": seen.append}),
        around(anatomy.place("layers.0.k").module, after=lambda values: output.append(values)),
    ):
        run(anatomy)
    assert seen[0].untyped_storage().data_ptr() == output[0].untyped_storage().data_ptr()


def test_editing_leaves_the_tensors_of_the_model_alone(anatomy: Anatomy) -> None:
    before: list[Tensor] = []
    place = anatomy.place("layers.0.v")
    with (
        around(place.module, after=lambda values: before.extend((values, values.clone()))),
        editing(anatomy, {place.key: torch.zeros_like}),
    ):
        run(anatomy)
    assert torch.equal(before[0], before[1])


def test_edits_nest_in_the_order_of_their_contexts(anatomy: Anatomy) -> None:
    key = "layers.0.down"
    seen: list[Tensor] = []
    with (
        editing(anatomy, {key: torch.zeros_like}),
        editing(anatomy, {key: lambda values: values + 3}),
        reading(anatomy, {key: seen.append}),
    ):
        run(anatomy)
    assert torch.equal(seen[0], torch.full_like(seen[0], 3))


def test_gradients_flow_through_edits() -> None:
    anatomy = resolve(build("llama"))
    mask = torch.ones(48, requires_grad=True)
    with editing(anatomy, {"layers.0.down": lambda values: values * mask}):
        anatomy.model(input_ids=random_ids((1, 4))).logits.square().sum().backward()
    assert mask.grad is not None
    assert bool(mask.grad.abs().min() > 0)


def test_sites_are_read_at_every_step_of_a_generation_with_a_cache(anatomy: Anatomy) -> None:
    shapes: list[tuple[int, ...]] = []
    with reading(anatomy, {"layers.1.q": lambda values: shapes.append(tuple(values.shape))}) as firings:
        anatomy.model.generate(random_ids((2, 5)), max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert shapes == [(2, 5, 32), (2, 1, 32), (2, 1, 32), (2, 1, 32)]
    assert firings.passes == firings.counts["layers.1.q"] == 4


def test_a_site_that_never_comes_by_is_an_error(anatomy: Anatomy) -> None:
    layer = anatomy.layers[1].mlp.module
    replaced = {layer: lambda hidden: hidden}
    with (
        pytest.raises(UnsupportedModelError, match=r"layers\.1\.down never came by in pass 1, 5 tokens a row"),
        reading(anatomy, {"layers.1.down": print}),
        with_forwards(replaced),
    ):
        run(anatomy)
    with (
        pytest.raises(UnsupportedModelError, match=r"layers\.1\.up never came by"),
        editing(anatomy, {"layers.1.up": torch.zeros_like, "layers.0.up": torch.zeros_like}),
        with_forwards(replaced),
    ):
        run(anatomy)


def test_a_compiled_model_is_refused(anatomy: Anatomy) -> None:
    with pytest.raises(UnsupportedModelError, match="pass model._orig_mod"):
        resolve(torch.compile(anatomy.model, backend="eager"))
    anatomy.model.model._compiled_call_impl = lambda *args, **kwargs: None
    with pytest.raises(UnsupportedModelError, match="compiled model arrived"), reading(anatomy, {"layers.0.q": print}):
        pass


def test_around_sees_the_keywords_of_an_attention_and_may_change_what_goes_in_and_out(anatomy: Anatomy) -> None:
    attention = anatomy.layers[0].attention.module
    names: list[str] = []

    def before(args, kwargs):
        names.extend(kwargs)
        return args, {**kwargs, "hidden_states": torch.zeros_like(kwargs["hidden_states"])}

    seen: list[Tensor] = []
    with around(attention, before=before), reading(anatomy, {"layers.0.q": seen.append}):
        run(anatomy)
    assert {"position_embeddings", "attention_mask"} <= set(names)
    assert not seen[0].any()
    with around(anatomy.model.lm_head, after=lambda logits: logits * 0):
        assert not run(anatomy).any()


def test_a_stand_in_for_a_forward_goes_away_again(anatomy: Anatomy) -> None:
    clean = run(anatomy)
    module = anatomy.layers[0].mlp.module
    with with_forwards({module: lambda hidden: hidden * 0}):
        assert not torch.equal(run(anatomy), clean)
        with with_forwards({module: lambda hidden: hidden}):
            pass
        assert "forward" in module.__dict__
    assert "forward" not in module.__dict__
    assert torch.equal(run(anatomy), clean)


def test_experts_hooks_nest_and_come_off() -> None:
    anatomy = prove(resolve(build("mixtral")))
    clean = run(anatomy)
    rows = []
    key = "layers.0.experts.*.down"
    with editing(anatomy, {key: lambda rows: rows.values * 0}), reading(anatomy, {key: rows.append}):
        assert not torch.equal(run(anatomy), clean)
    assert not rows[0].values.any()
    assert not any("_apply_gate" in module.__dict__ for module in anatomy.model.modules())
    assert hooks_on(anatomy.model) == 0
    assert torch.equal(run(anatomy), clean)


def test_experts_whose_gate_step_is_bypassed_are_an_error() -> None:
    anatomy = prove(resolve(build("mixtral")))
    anatomy.model.set_experts_implementation("eager")
    with (
        pytest.raises(UnsupportedModelError, match=r"layers\.0\.experts\.1\.down never came by"),
        reading(anatomy, {"layers.0.experts.1.down": print}),
    ):
        run(anatomy)


def test_an_empty_set_of_readers_puts_nothing_on(anatomy: Anatomy) -> None:
    with reading(anatomy, {}), editing(anatomy, {}):
        assert hooks_on(anatomy.model) == 0
