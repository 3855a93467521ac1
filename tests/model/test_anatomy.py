"""What the anatomy does with models it does not know: it asks, refuses a site by name, or says what it found.

It never skips.

The proof finds what is wrong: layouts, weights, formulas, rows of experts, sites without effect.
"""

from dataclasses import replace

import pytest
import torch
import transformers
from torch import nn
from torch.nn.utils import parametrizations

from families import MOE_FAMILIES, OLD_TRANSFORMERS, build, config_of, random_ids
from safety_neurons.errors import NumericalError, UnsupportedModelError, UsageError
from safety_neurons.model.anatomy import FUSED_LAYOUTS, resolve
from safety_neurons.model.hooks import reading
from safety_neurons.model.proof import prove
from safety_neurons.model.sites import Anatomy, Layout, split_qkv, unwrapped


class Renamed(nn.Module):
    """A feed-forward part whose projections have names of their own."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.alpha, self.beta, self.gamma, self.act_fn = (
            inner.gate_proj,
            inner.up_proj,
            inner.down_proj,
            inner.act_fn,
        )

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.gamma(self.act_fn(self.alpha(hidden)) * self.beta(hidden))


def renamed() -> nn.Module:
    model = build("llama")
    for layer in model.model.layers:
        layer.mlp = Renamed(layer.mlp)
    return model


def test_unknown_names_are_refused_by_site_and_a_mapping_settles_them() -> None:
    anatomy = resolve(renamed())
    assert sorted(anatomy.refused) == [
        f"layers.{layer}.{site}" for layer in (0, 1) for site in ("down", "gate", "up")
    ]
    coverage = anatomy.coverage()
    assert not coverage.complete
    assert coverage.share < 1
    assert str(coverage).startswith("sites 8/14, ")
    with pytest.raises(
        UnsupportedModelError,
        match=r"layers\.0\.down is not .*\(mlp\.alpha, mlp\.beta, mlp\.gamma\); .* sites=",
    ):
        anatomy.place("layers.0.down")
    told = prove(resolve(renamed(), sites={"gate": "mlp.alpha", "up": "mlp.beta", "down": "mlp.gamma"}))
    assert told.coverage().complete
    assert told.place("layers.1.down").module_name == "model.layers.1.mlp.gamma"


def test_a_mapping_that_takes_up_for_gate_does_not_pass_the_proof() -> None:
    wrong = prove(resolve(renamed(), sites={"gate": "mlp.beta", "up": "mlp.alpha", "down": "mlp.gamma"}))
    assert sorted(wrong.refused) == ["layers.0.gate", "layers.0.up", "layers.1.gate", "layers.1.up"]
    assert not wrong.coverage().complete


def test_a_layer_without_feed_forward_part_has_no_such_sites() -> None:
    model = build("llama")

    class Nothing(nn.Module):
        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            return torch.zeros_like(hidden)

    model.model.layers[0].mlp = Nothing()
    anatomy = prove(resolve(model))
    assert str(anatomy.coverage()) == "sites 11/11, 100 % of attention and MLP parameters"
    with pytest.raises(
        UnsupportedModelError,
        match=r"layers\.0\.down was asked, this LlamaForCausalLM has 11 sites in 2 layers",
    ):
        anatomy.place("layers.0.down")


def test_widths_that_are_no_grouped_query_attention_are_refused() -> None:
    model = build("llama")
    model.model.layers[1].self_attn.q_proj = nn.Linear(32, 40)
    anatomy = resolve(model)
    assert sorted(anatomy.refused) == [f"layers.1.{site}" for site in "koqv"]
    assert "q, k, v have {'q': 40" in anatomy.refused["layers.1.q"]


def test_experts_as_a_list_of_modules_name_the_version_that_is_needed() -> None:
    model = build("llama")

    class Sparse(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.gate = nn.Linear(32, 2)
            self.experts = nn.ModuleList([inner, build("llama", seed=1).model.layers[0].mlp])

        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            return sum(expert(hidden) for expert in self.experts)

    model.model.layers[0].mlp = Sparse(model.model.layers[0].mlp)
    with pytest.raises(
        UnsupportedModelError,
        match=r"layers\.0\.experts: 2 experts as a list of modules .*"
        + ("use transformers 5" if OLD_TRANSFORMERS else "own code"),
    ) as error:
        resolve(model)
    assert "\n" not in str(error.value)


@pytest.mark.skipif(not OLD_TRANSFORMERS, reason="this transformers has the experts interface")
@pytest.mark.parametrize("family", MOE_FAMILIES)
def test_without_the_experts_interface_a_mixture_of_experts_is_refused_and_the_version_named(
    family: str,
) -> None:
    model = transformers.AutoModelForCausalLM.from_config(config_of(family))
    with pytest.raises(
        UnsupportedModelError,
        match=r"^layers\.\d\.experts: .*: use transformers 5 or later for mixture-of-experts models$",
    ):
        resolve(model)


def test_no_advice_is_the_word_of_a_placeholder_and_wrong_sites_are_refused() -> None:
    refused = resolve(renamed()).refused["layers.0.down"]
    assert "Ellipsis" not in refused
    assert "in Python" in refused
    for sites in ({"query": "self_attn.q_proj"}, {"q": "self_attn.absent"}, {"q": ""}):
        with pytest.raises(UsageError, match="expected") as error:
            resolve(build("llama"), sites=sites)
        assert "\n" not in str(error.value)


class Mixer(nn.Module):
    """A layer that is neither attention nor a feed-forward part."""

    def __init__(self) -> None:
        super().__init__()
        self.in_map, self.out_map = nn.Linear(32, 8), nn.Linear(8, 32)

    def forward(self, hidden: torch.Tensor, **_: object) -> torch.Tensor:
        return hidden + self.out_map(self.in_map(hidden))


def test_a_layer_of_unknown_parts_only_is_left_out_and_counted() -> None:
    model = build("llama")
    model.model.layers[1] = Mixer()
    anatomy = prove(resolve(model))
    assert sorted(anatomy.refused) == [f"layers.1.{site}" for site in "koqv"]
    assert anatomy.unknown == {1: ("in_map", "out_map")}
    coverage = anatomy.coverage()
    assert (coverage.found, coverage.expected) == (7, 11)
    assert coverage.left_out == "in_map, out_map of 1 layer (1)"
    with pytest.raises(
        UnsupportedModelError, match=r"layers\.1\.q is not .*maps of unknown role \(in_map, out_map\)"
    ):
        anatomy.place("layers.1.q")


def test_a_model_of_unknown_parts_only_is_an_error() -> None:
    model = build("llama")
    model.model.layers = nn.ModuleList([Mixer(), Mixer()])
    with pytest.raises(
        UnsupportedModelError,
        match=r"no layer has a part .*layers\.0: model\.layers\.0 has .* unknown role \(in_map, out_map\)",
    ):
        resolve(model)


def test_weights_that_several_layers_share_are_neurons_of_none() -> None:
    model = build("llama", num_hidden_layers=3)
    model.model.layers[2].mlp = model.model.layers[0].mlp
    anatomy = prove(resolve(model))
    assert sorted(anatomy.refused) == [
        f"layers.{layer}.{site}" for layer in (0, 2) for site in ("down", "gate", "up")
    ]
    assert "layers 0, 2 share the weights" in anatomy.refused["layers.2.up"]


def test_computed_weights_are_never_taken_for_shared_ones_and_shared_sources_of_theirs_are() -> None:
    # A weight norm makes the weight anew on every access; the address of the one before is then free for it.
    model = build("llama", num_hidden_layers=4)
    for layer in model.model.layers:
        for path in ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"):
            parametrizations.weight_norm(layer.get_submodule(path))
    for _ in range(20):
        assert resolve(model).refused == {}
    first, last = (model.model.layers[layer].mlp.up_proj.parametrizations.weight for layer in (0, 3))
    last.original0 = first.original0
    assert sorted(resolve(model).refused) == ["layers.0.up", "layers.3.up"]


def test_an_activation_function_that_no_module_holds_is_found_by_what_it_gives() -> None:
    model = build("llama", hidden_act="gelu_pytorch_tanh")
    for layer in model.model.layers:
        act = layer.mlp.act_fn
        layer.mlp.act_fn = None
        layer.mlp.forward = lambda x, mlp=layer.mlp, act=act: mlp.down_proj(
            act(mlp.gate_proj(x)) * mlp.up_proj(x)
        )
    anatomy = prove(resolve(model))
    assert anatomy.coverage().complete
    values = torch.linspace(-3, 3, 7)
    expected = torch.nn.functional.gelu(values, approximate="tanh")
    assert torch.equal(anatomy.layers[0].mlp.activation(values), expected)


def test_a_model_without_a_list_of_layers_says_so() -> None:
    model = build("llama")
    model.config.num_hidden_layers = 5
    with pytest.raises(
        UnsupportedModelError, match=r"0 lists of 5 layers with linear maps were found \(none\)"
    ):
        resolve(model)


def test_norm_lists_as_long_as_the_model_is_deep_are_not_taken_for_layers() -> None:
    anatomy = resolve(build("stablelm_qk_norm", num_hidden_layers=4))
    assert [layer.module_name for layer in anatomy.layers] == [f"model.layers.{layer}" for layer in range(4)]


def test_a_hybrid_of_dense_and_sparse_layers_is_told_layer_by_layer() -> None:
    anatomy = resolve(build("qwen3_moe"))
    assert anatomy.layers[0].mlp is not None
    assert anatomy.layers[0].experts is None
    assert anatomy.layers[1].mlp is None
    assert anatomy.layers[1].experts is not None
    assert anatomy.layers[1].experts.n_experts == 6
    shared = resolve(build("qwen2_moe"))
    assert shared.layers[0].shared is not None
    assert "layers.0.shared_expert.down" in shared.places


def test_an_experts_implementation_that_hides_the_gate_step_is_named_with_those_that_do_not() -> None:
    model = build("mixtral")
    model.config._experts_implementation = "sonicmoe"
    anatomy = resolve(model)
    expected = r"layers\.0\.experts: experts implementation 'sonicmoe' hides the gate step; expected 'grouped_mm' or 'batched_mm'"  # noqa: E501
    with (
        pytest.raises(UnsupportedModelError, match=expected),
        reading(anatomy, {"layers.0.experts.0.down": print}),
    ):
        pass


@pytest.mark.parametrize(
    ("family", "wrong"),
    [
        ("gpt2", "grouped"),
        ("phi3", "grouped"),
        ("gpt_neox", "contiguous"),
        ("bloom", "contiguous"),
        ("falcon", "contiguous"),
    ],
)
def test_a_wrong_layout_of_queries_keys_and_values_is_found_out(family: str, wrong: str) -> None:
    with pytest.raises(UnsupportedModelError, match=r"layers\.0: q, k and v could not be proved \(" + wrong):
        prove(resolve(build(family), layouts={"qkv": wrong}))


@pytest.mark.parametrize("family", ["gpt2", "phi3", "gpt_neox", "bloom", "falcon"])
def test_a_wrong_guess_of_the_table_is_put_right_by_the_proof(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(family)
    right = prove(resolve(model))
    names = {
        place.module_name.rpartition(".")[2] for place in right.places.values() if place.index is not None
    }
    guesses = {name: Layout.CONTIGUOUS if FUSED_LAYOUTS.get(name) else Layout.GROUPED for name in names}
    monkeypatch.setattr("safety_neurons.model.anatomy.FUSED_LAYOUTS", guesses)
    guessed = resolve(model)
    assert guessed.layers[0].attention.layout != right.layers[0].attention.layout
    settled = prove(guessed)
    assert [layer.attention.layout for layer in settled.layers] == [
        layer.attention.layout for layer in right.layers
    ]
    for key, place in right.places.items():
        assert str(settled.places[key].index) == str(place.index)


@pytest.mark.parametrize("swapped", [("q", "k"), ("k", "v")])
def test_two_sites_of_a_fused_projection_taken_for_one_another_are_found_out(
    swapped: tuple[str, str],
) -> None:
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
    with pytest.raises(
        UnsupportedModelError,
        match=r"layers\.0\.gate: layout '" + wrong + "' was asked for and fails, 'contiguous'",
    ):
        prove(resolve(model, layouts={"gate_up": wrong}))
    guessed = replace(resolve(model, layouts={"gate_up": wrong}), chosen={})
    assert [layer.mlp.layout for layer in prove(guessed).layers] == [Layout.CONTIGUOUS] * 2


@pytest.mark.parametrize("site", ["q", "o", "up", "down"])
def test_a_place_that_is_another_layers_is_found_out(site: str) -> None:
    anatomy = resolve(build("llama"))
    layers = list(anatomy.layers)
    part = "attention" if site in "qkvo" else "mlp"
    mine, other = getattr(layers[0], part), getattr(layers[1], part)
    borrowed = replace(
        mine.places[site],
        projection=replace(mine.places[site].projection, base=other.places[site].projection.base),
    )
    layers[0] = replace(layers[0], **{part: replace(mine, places={**mine.places, site: borrowed})})
    with pytest.raises(
        UnsupportedModelError,
        match=rf"layers\.0\.{site} \(model\.layers\.0\.\w+\.{site}_proj\) could not be proved",
    ):
        prove(replace(anatomy, layers=tuple(layers)))


def test_a_feed_forward_part_of_another_formula_keeps_its_down_neurons_and_refuses_the_rest() -> None:
    model = build("llama")

    class Twice(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.gate_proj, self.up_proj, self.down_proj, self.act_fn = (
                inner.gate_proj,
                inner.up_proj,
                inner.down_proj,
                inner.act_fn,
            )

        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            return self.down_proj(2 * self.act_fn(self.gate_proj(hidden)) * self.up_proj(hidden))

    model.model.layers[1].mlp = Twice(model.model.layers[1].mlp)
    anatomy = prove(resolve(model))
    assert set(anatomy.refused) == {"layers.1.gate", "layers.1.up"}
    coverage = anatomy.coverage()
    assert not coverage.complete
    assert str(coverage).startswith("sites 12/14, ")
    assert "layers.1.down" in anatomy.table
    with pytest.raises(
        UnsupportedModelError,
        match=r"layers\.1\.up is not supported on this LlamaForCausalLM: what down is given is not",
    ):
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
    with pytest.raises(
        UnsupportedModelError, match=r"layers\.1\.gate: setting its neurons to zero changes no logit"
    ):
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
    with pytest.raises(
        UnsupportedModelError, match=r"layers\.0\.experts: the rows of gate and up are not what the weights"
    ):
        prove(anatomy)


@pytest.mark.parametrize(
    ("family", "wrong"), [("mixtral", "alternating"), ("mixtral", "up_first"), ("gpt_oss", "contiguous")]
)
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
    assert counts[0] == counts[1] <= 8  # two of them a prefill and a decoding step


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
    assert split_qkv(Layout.GROUPED, 4, 1, 2) == {
        "q": slice(0, 8, 1),
        "k": slice(8, 10, 1),
        "v": slice(10, 12, 1),
    }
    assert split_qkv(Layout.CONTIGUOUS, 4, 2, 2) == {"q": slice(0, 8), "k": slice(8, 12), "v": slice(12, 16)}
    with pytest.raises(UnsupportedModelError, match="cannot be split"):
        split_qkv(Layout.ALTERNATING, 4, 2, 2)


def test_the_model_inside_a_wrapper_is_found() -> None:
    model = build("llama")
    assert unwrapped(model) is model
    assert model(random_ids((1, 3))).logits.shape == (1, 3, 96)
