"""Sites under adapters: where they are, what their weights are, what acts when they are edited."""

import peft
import pytest
import torch
from torch import Tensor, nn

from families import build, random_ids
from safety_neurons.errors import UnsupportedModelError
from safety_neurons.model.anatomy import resolve
from safety_neurons.model.hooks import editing, reading
from safety_neurons.model.proof import prove
from safety_neurons.model.sites import full_weight, projection

pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing`:FutureWarning"
)  # PEFT asks a deprecated question


LLAMA = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


CASES = {
    "lora": ("llama", peft.LoraConfig(r=3, lora_alpha=5, target_modules=LLAMA, lora_bias=True)),
    "lora on transposed weights": (
        "gpt2",
        peft.LoraConfig(r=3, target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True),
    ),
    "lora on fused projections": (
        "phi3",
        peft.LoraConfig(r=3, target_modules=["qkv_proj", "gate_up_proj", "down_proj"]),
    ),
    "ia3": (
        "llama",
        peft.IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]),
    ),
    "ia3 on everything": (
        "llama",
        peft.IA3Config(target_modules=LLAMA, feedforward_modules=["down_proj", "o_proj"]),
    ),
    "ia3 on transposed weights": (
        "gpt2",
        peft.IA3Config(
            target_modules=["c_attn", "mlp.c_proj"], feedforward_modules=["mlp.c_proj"], fan_in_fan_out=True
        ),
    ),
}


def adapted(case: str, adapters: int = 1, dtype: torch.dtype = torch.float64) -> peft.PeftModel:
    """A tiny model with adapters that do something, in float64.

    Those of a half-precision model stay in float32, as PEFT has them.
    """
    family, config = CASES[case]
    model = peft.get_peft_model(build(family, dtype=dtype), config)
    for number in range(1, adapters):
        model.add_adapter(f"more{number}", config)
    model.base_model.set_adapter(["default", *(f"more{number}" for number in range(1, adapters))])
    generator = torch.Generator().manual_seed(3)
    size = (
        0.3 if dtype == torch.float64 else 0.1
    )  # attention saturates in half precision where logits are large
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "ia3_" in name:
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.copy_(1 + 0.4 * noise if "ia3_" in name else size * noise)
                parameter.data = parameter.data.to(torch.promote_types(dtype, torch.float32))
    return model.eval()


@torch.no_grad()
def logits(model: nn.Module, ids: Tensor) -> Tensor:
    return model(input_ids=ids).logits


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
@pytest.mark.parametrize("adapters", [1, 2])
@pytest.mark.parametrize("case", list(CASES))
def test_an_adapted_model_is_proved_and_covered(case: str, adapters: int) -> None:
    model = adapted(case, adapters)
    anatomy = prove(resolve(model))
    assert anatomy.coverage().complete
    plain = resolve(build(CASES[case][0]))
    assert anatomy.table.fingerprint == plain.table.fingerprint
    assert anatomy.table.n_parameters == plain.table.n_parameters


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
@pytest.mark.parametrize(
    ("case", "dtype"),
    [(case, torch.bfloat16) for case in ("lora", "lora on transposed weights", "ia3 on everything")]
    + [("lora", torch.float16)],
)
def test_an_adapted_model_in_half_precision_is_proved(case: str, dtype: torch.dtype) -> None:
    assert prove(resolve(adapted(case, dtype=dtype))).coverage().complete


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
@pytest.mark.parametrize("case", list(CASES))
def test_an_edit_to_zero_is_the_merged_model_with_the_weights_zeroed(case: str) -> None:
    ids = random_ids((2, 6))
    model = adapted(case)
    anatomy = prove(resolve(model))
    neurons = torch.tensor([1, 3])
    edited = {}
    for key in anatomy.places:
        with editing(anatomy, {key: lambda values: values.index_fill(-1, neurons, 0)}):
            edited[key] = logits(model, ids)
    clean = logits(model, ids)
    merged = resolve(adapted(case).merge_and_unload())
    assert (logits(merged.model, ids) - clean).abs().max() < 1e-11
    for key, place in merged.places.items():
        base = place.projection.base
        weight, bias = base.weight, base.bias if place.has_bias else None
        kept = weight.clone(), None if bias is None else bias.clone()
        features = torch.arange(place.features)
        features = features[neurons] if place.index is None else features[place.index][neurons]
        with torch.no_grad():
            weight.index_fill_(0 if (place.side == "output") != place.transposed else 1, features, 0)
            if bias is not None:
                bias[features] = 0
            expected = logits(merged.model, ids)
            weight.copy_(kept[0])
            if bias is not None:
                bias.copy_(kept[1])
        assert (edited[key] - expected).abs().max() < 1e-11, key


def test_an_input_scaled_by_ia3_is_read_after_the_scale() -> None:
    model = adapted("ia3")
    anatomy = resolve(model)
    place = anatomy.place("layers.0.down")
    seen: list[Tensor] = []
    raw: list[Tensor] = []
    handle = place.module.register_forward_pre_hook(lambda _, args: raw.append(args[0]))
    with reading(anatomy, {"layers.0.down": seen.append}):
        logits(model, random_ids((1, 5)))
    handle.remove()
    scale = place.module.ia3_l["default"].flatten()
    torch.testing.assert_close(seen[0], raw[0] * scale)
    assert (seen[0] - raw[0]).abs().max() > 0.01


def test_the_weight_of_a_lora_holds_its_share_until_it_is_switched_off() -> None:
    model = adapted("lora")
    place = resolve(model).place("layers.1.up")
    plain = place.projection.base.weight
    delta = place.module.get_delta_weight("default")
    torch.testing.assert_close(place.weight(), plain + delta)
    with model.disable_adapter():
        assert torch.equal(place.weight(), plain)
    model.merge_adapter()
    torch.testing.assert_close(place.weight(), plain)


def test_a_dora_says_that_it_has_to_be_merged() -> None:
    config = peft.LoraConfig(r=2, target_modules=["down_proj"], use_dora=True)
    place = resolve(peft.get_peft_model(build("llama"), config)).place("layers.0.down")
    with pytest.raises(UnsupportedModelError, match=r"layers\.0\.down: .*merge it into the model"):
        place.weight()


def test_quantised_weights_are_named_and_their_activations_still_read() -> None:
    class Eighths(nn.Linear):
        """A linear map that stores whole numbers."""

        def __init__(self, like: nn.Linear) -> None:
            super().__init__(like.in_features, like.out_features, bias=False)
            self.scale = like.weight.abs().amax() / 127
            self.weight = nn.Parameter((like.weight / self.scale).round().to(torch.int8), requires_grad=False)

        def forward(self, values: Tensor) -> Tensor:
            return nn.functional.linear(values, self.weight.to(values.dtype) * self.scale)

    model = build("mistral")
    for layer in model.model.layers:
        layer.mlp.down_proj = Eighths(layer.mlp.down_proj)
        layer.self_attn.q_proj = Eighths(layer.self_attn.q_proj)
    anatomy = prove(resolve(model))
    assert anatomy.coverage().complete
    with pytest.raises(
        UnsupportedModelError, match=r"layers\.1\.down: its weights are quantised \(Eighths\)"
    ):
        anatomy.place("layers.1.down").weight()
    assert anatomy.place("layers.1.down").projection.base.weight.dtype == torch.int8


def test_off_loaded_weights_are_named() -> None:
    part = projection(nn.Linear(4, 3, device="meta"))
    assert part is not None
    with pytest.raises(UnsupportedModelError, match="off-loaded"):
        full_weight(part, "layers.0.q")


def test_a_module_that_is_trained_whole_beside_an_adapter_is_the_projection() -> None:
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["down_proj"])
    model = peft.get_peft_model(build("llama", dtype=torch.float64), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter.mul_(1.5)
    anatomy = prove(resolve(model.eval()))
    place = anatomy.place("layers.0.down")
    assert torch.equal(place.weight(), place.module.modules_to_save["default"].weight)
