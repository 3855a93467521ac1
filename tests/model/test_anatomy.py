"""What the anatomy does with models it does not know: it asks, refuses a site by name, or says what it found; it never skips."""

import pytest
import torch
import transformers
from torch import nn

from families import MOE_FAMILIES, OLD_TRANSFORMERS, build, config_of
from safety_neurons.errors import UnsupportedModelError, UsageError
from safety_neurons.model.anatomy import resolve
from safety_neurons.model.hooks import reading
from safety_neurons.model.proof import prove


class Renamed(nn.Module):
    """A feed-forward part whose projections have names of their own."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.alpha, self.beta, self.gamma, self.act_fn = inner.gate_proj, inner.up_proj, inner.down_proj, inner.act_fn

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.gamma(self.act_fn(self.alpha(hidden)) * self.beta(hidden))


def renamed() -> nn.Module:
    model = build("llama")
    for layer in model.model.layers:
        layer.mlp = Renamed(layer.mlp)
    return model


def test_unknown_names_are_refused_by_site_and_a_mapping_settles_them() -> None:
    anatomy = resolve(renamed())
    assert sorted(anatomy.refused) == [f"layers.{layer}.{site}" for layer in (0, 1) for site in ("down", "gate", "up")]
    coverage = anatomy.coverage()
    assert not coverage.complete
    assert coverage.share < 1
    assert str(coverage).startswith("sites 8/14, ")
    with pytest.raises(UnsupportedModelError, match=r"layers\.0\.down is not .*\(mlp\.alpha, mlp\.beta, mlp\.gamma\); .* sites="):
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
    with pytest.raises(UnsupportedModelError, match=r"layers\.0\.down was asked, this LlamaForCausalLM has 11 sites in 2 layers"):
        anatomy.place("layers.0.down")


def test_widths_that_are_no_grouped_query_attention_are_refused() -> None:
    model = build("llama")
    model.model.layers[1].self_attn.q_proj = nn.Linear(32, 64)
    anatomy = resolve(model)
    assert sorted(anatomy.refused) == [f"layers.1.{site}" for site in "koqv"]
    assert "q, k, v have {'q': 64" in anatomy.refused["layers.1.q"]


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
        match=r"layers\.0\.experts: 2 experts as a list of modules .*" + ("use transformers 5" if OLD_TRANSFORMERS else "own code"),
    ) as error:
        resolve(model)
    assert "\n" not in str(error.value)


@pytest.mark.skipif(not OLD_TRANSFORMERS, reason="this transformers has the experts interface")
@pytest.mark.parametrize("family", MOE_FAMILIES)
def test_without_the_experts_interface_a_mixture_of_experts_is_refused_and_the_version_named(family: str) -> None:
    model = transformers.AutoModelForCausalLM.from_config(config_of(family))
    with pytest.raises(
        UnsupportedModelError, match=r"^layers\.\d\.experts: .*: use transformers 5 or later for mixture-of-experts models$"
    ):
        resolve(model)


def test_no_advice_is_the_word_of_a_placeholder_and_wrong_sites_are_refused() -> None:
    model = build("llama")
    model.model.layers[0].mlp.act_fn = None
    refused = resolve(model).refused["layers.0.down"]
    assert "Ellipsis" not in refused
    assert "in Python" in refused
    for sites in ({"query": "self_attn.q_proj"}, {"q": "self_attn.absent"}, {"q": ""}):
        with pytest.raises(UsageError, match="expected") as error:
            resolve(build("llama"), sites=sites)
        assert "\n" not in str(error.value)


def test_a_layer_of_unknown_parts_only_is_an_error() -> None:
    model = build("llama")

    class Mixer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.in_map, self.out_map = nn.Linear(32, 8), nn.Linear(8, 32)

    model.model.layers[1] = Mixer()
    with pytest.raises(UnsupportedModelError, match=r"layers\.1: model\.layers\.1 has linear maps of unknown role \(in_map, out_map\)"):
        resolve(model)


def test_a_model_without_a_list_of_layers_says_so() -> None:
    model = build("llama")
    model.config.num_hidden_layers = 5
    with pytest.raises(UnsupportedModelError, match=r"0 lists of 5 layers with linear maps were found \(none\)"):
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
    expected = r"layers\.0\.experts: experts implementation 'sonicmoe' hides the gate step; expected 'grouped_mm' or 'batched_mm'"
    with pytest.raises(UnsupportedModelError, match=expected), reading(anatomy, {"layers.0.experts.0.down": print}):
        pass
