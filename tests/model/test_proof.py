"""The proof finds what is wrong: layouts, weights, formulas, rows of experts, sites without effect."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from families import build, random_ids
from safety_neurons.errors import NumericalError, UnsupportedModelError
from safety_neurons.model.anatomy import FUSED_LAYOUTS, resolve
from safety_neurons.model.proof import prove
from safety_neurons.model.sites import Anatomy, Layout, split_qkv, unwrapped


@pytest.mark.parametrize(
    ("family", "wrong"),
    [("gpt2", "grouped"), ("phi3", "grouped"), ("gpt_neox", "contiguous"), ("bloom", "contiguous"), ("falcon", "contiguous")],
)
def test_a_wrong_layout_of_queries_keys_and_values_is_found_out(family: str, wrong: str) -> None:
    with pytest.raises(UnsupportedModelError, match=r"layers\.0: q, k and v could not be proved \(" + wrong):
        prove(resolve(build(family), layouts={"qkv": wrong}))


@pytest.mark.parametrize("family", ["gpt2", "phi3", "gpt_neox", "bloom", "falcon"])
def test_a_wrong_guess_of_the_table_is_put_right_by_the_proof(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(family)
    right = prove(resolve(model))
    names = {place.module_name.rpartition(".")[2] for place in right.places.values() if place.index is not None}
    guesses = {name: Layout.CONTIGUOUS if FUSED_LAYOUTS.get(name) else Layout.GROUPED for name in names}
    monkeypatch.setattr("safety_neurons.model.anatomy.FUSED_LAYOUTS", guesses)
    guessed = resolve(model)
    assert guessed.layers[0].attention.layout != right.layers[0].attention.layout
    settled = prove(guessed)
    assert [layer.attention.layout for layer in settled.layers] == [layer.attention.layout for layer in right.layers]
    for key, place in right.places.items():
        assert str(settled.places[key].index) == str(place.index)


@pytest.mark.parametrize("swapped", [("q", "k"), ("k", "v")])
def test_two_sites_of_a_fused_projection_taken_for_one_another_are_found_out(swapped: tuple[str, str]) -> None:
    anatomy = resolve(build("gpt2"), layouts={"qkv": "contiguous"})
    with pytest.raises(UnsupportedModelError, match="could not be proved"):
        prove(_swapped(anatomy, *swapped))


def _swapped(anatomy: Anatomy, one: str, other: str) -> Anatomy:
    layers = []
    for layer in anatomy.layers:
        attention = layer.attention
        assert attention is not None
        places = dict(attention.places)
        places[one], places[other] = places[one].at(places[other].index), places[other].at(places[one].index)
        layers.append(replace(layer, attention=replace(attention, places=places)))
    return replace(anatomy, layers=tuple(layers))


@pytest.mark.parametrize("wrong", ["alternating", "up_first"])
def test_a_wrong_layout_of_gate_and_up_is_found_out_and_an_own_guess_put_right(wrong: str) -> None:
    model = build("phi3")
    with pytest.raises(UnsupportedModelError, match=r"layers\.0\.gate: layout '" + wrong + "' was asked for and fails, 'contiguous'"):
        prove(resolve(model, layouts={"gate_up": wrong}))
    guessed = replace(resolve(model, layouts={"gate_up": wrong}), chosen={})
    assert [layer.mlp.layout for layer in prove(guessed).layers] == [Layout.CONTIGUOUS] * 2


@pytest.mark.parametrize("site", ["q", "o", "up", "down"])
def test_a_place_that_is_another_layers_is_found_out(site: str) -> None:
    anatomy = resolve(build("llama"))
    layers = list(anatomy.layers)
    part = "attention" if site in "qkvo" else "mlp"
    mine, other = getattr(layers[0], part), getattr(layers[1], part)
    borrowed = replace(mine.places[site], projection=replace(mine.places[site].projection, base=other.places[site].projection.base))
    layers[0] = replace(layers[0], **{part: replace(mine, places={**mine.places, site: borrowed})})
    with pytest.raises(UnsupportedModelError, match=rf"layers\.0\.{site} \(model\.layers\.0\.\w+\.{site}_proj\) could not be proved"):
        prove(replace(anatomy, layers=tuple(layers)))


def test_a_feed_forward_part_of_another_formula_keeps_its_down_neurons_and_refuses_the_rest() -> None:
    model = build("llama")

    class Twice(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.gate_proj, self.up_proj, self.down_proj, self.act_fn = inner.gate_proj, inner.up_proj, inner.down_proj, inner.act_fn

        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            return self.down_proj(2 * self.act_fn(self.gate_proj(hidden)) * self.up_proj(hidden))

    model.model.layers[1].mlp = Twice(model.model.layers[1].mlp)
    anatomy = prove(resolve(model))
    assert set(anatomy.refused) == {"layers.1.gate", "layers.1.up"}
    coverage = anatomy.coverage()
    assert not coverage.complete
    assert str(coverage).startswith("sites 12/14, ")
    assert "layers.1.down" in anatomy.table
    with pytest.raises(UnsupportedModelError, match=r"layers\.1\.up is not supported on this LlamaForCausalLM: what down is given is not"):
        anatomy.place("layers.1.up")


def test_a_norm_before_the_output_projection_refuses_queries_keys_and_values_only() -> None:
    model = build("llama")

    class Normed(nn.Module):
        def __init__(self, inner: nn.Linear) -> None:
            super().__init__()
            self.norm, self.o_proj = nn.LayerNorm(inner.in_features), inner

        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            return self.o_proj(self.norm(hidden))

    model.model.layers[0].self_attn.o_proj = Normed(model.model.layers[0].self_attn.o_proj)
    anatomy = prove(resolve(model, sites={"o": "self_attn.o_proj.o_proj"}))
    assert sorted(anatomy.refused) == ["layers.0.k", "layers.0.q", "layers.0.v"]
    assert "layers.0.o" in anatomy.places


def test_a_site_without_effect_is_an_error_unless_its_weights_are_empty() -> None:
    model = build("llama")
    with torch.no_grad():
        model.model.layers[1].self_attn.o_proj.weight.zero_()
    assert prove(resolve(model)).coverage().complete
    ignored = build("llama")

    class Ignored(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            return 0 * self.inner(hidden)

    ignored.model.layers[1].mlp = Ignored(ignored.model.layers[1].mlp)
    with pytest.raises(UnsupportedModelError, match=r"layers\.1\.gate: setting its neurons to zero changes no logit"):
        prove(resolve(ignored))


def test_a_model_of_nan_is_named() -> None:
    model = build("llama")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(NumericalError, match="NaN or infinity on random tokens"):
        prove(resolve(model))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["llama", "gpt_neox", "gpt_oss"])
def test_half_precision_is_proved_too(family: str, dtype: torch.dtype) -> None:
    assert prove(resolve(build(family, dtype=dtype))).coverage().complete


def test_rows_of_experts_in_another_order_are_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("mixtral")
    anatomy = resolve(model)
    kind = type(anatomy.layers[0].experts)
    right = kind.routing

    def reversed_rows(self, chosen, weights):
        routing = right(self, chosen, weights)
        return replace(routing, token_index=routing.token_index.flip(0))

    monkeypatch.setattr(kind, "routing", reversed_rows)
    with pytest.raises(UnsupportedModelError, match=r"layers\.0\.experts: the rows of gate and up are not what the weights"):
        prove(anatomy)


@pytest.mark.parametrize(("family", "wrong"), [("mixtral", "alternating"), ("mixtral", "up_first"), ("gpt_oss", "contiguous")])
def test_a_wrong_layout_of_experts_is_found_out(family: str, wrong: str) -> None:
    with pytest.raises(UnsupportedModelError, match=rf"layers\.0\.experts: layout '{wrong}' fails"):
        prove(resolve(build(family), layouts={"experts": wrong}))


def test_the_proof_takes_few_passes_whatever_the_number_of_layers() -> None:
    counts = []
    for layers in (2, 6):
        model = build("gpt2", n_layer=layers)
        passes: list[int] = []
        handle = model.transformer.h[0].register_forward_pre_hook(lambda *_, passes=passes: passes.append(1))
        prove(resolve(model))
        handle.remove()
        counts.append(len(passes))
    assert counts[0] == counts[1] <= 7  # two of them a prefill and a decoding step


def test_global_random_state_is_left_alone() -> None:
    model = build("llama")
    state = torch.random.get_rng_state()
    prove(resolve(model))
    assert torch.equal(torch.random.get_rng_state(), state)


def test_layouts_say_where_each_head_is() -> None:
    grouped = split_qkv(Layout.GROUPED, 4, 2, 2)
    assert grouped["q"].tolist() == [0, 1, 2, 3, 8, 9, 10, 11]
    assert grouped["k"].tolist() == [4, 5, 12, 13]
    assert grouped["v"].tolist() == [6, 7, 14, 15]
    assert split_qkv(Layout.GROUPED, 4, 1, 2) == {"q": slice(0, 8, 1), "k": slice(8, 10, 1), "v": slice(10, 12, 1)}
    assert split_qkv(Layout.CONTIGUOUS, 4, 2, 2) == {"q": slice(0, 8), "k": slice(8, 12), "v": slice(12, 16)}
    with pytest.raises(UnsupportedModelError, match="cannot be split"):
        split_qkv(Layout.ALTERNATING, 4, 2, 2)


def test_the_model_inside_a_wrapper_is_found() -> None:
    model = build("llama")
    assert unwrapped(model) is model
    assert model(random_ids((1, 3))).logits.shape == (1, 3, 96)
