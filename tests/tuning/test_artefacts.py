"""A trained change saved, loaded, applied to weights, exported as LoRA and as checkpoint: the same numbers,
and nothing else moved.
"""

import copy
import errno
import json
import pathlib
import sys
import warnings
from typing import Any

import peft
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.utils import parametrizations
from trained import assert_same_bits, batches, bits, model_of, randomised, some

from families import build
from safety_neurons import load
from safety_neurons.errors import (
    ForeignModelError,
    MismatchError,
    NeuronError,
    NumericalError,
    RunError,
    UnsupportedModelError,
    UsageError,
)
from safety_neurons.model import LanguageModel
from safety_neurons.neurons import NeuronSet, Provenance
from safety_neurons.results import run as run_files
from safety_neurons.tuning import (
    Delta,
    applied,
    apply_delta,
    attach,
    base_hash,
    delta_of,
    export_lora,
    export_merged,
    load_delta,
    merged_base,
    outside_hash,
    save_delta,
    survival,
)
from safety_neurons.tuning.artefacts import save_checkpoint
from tiny import tiny_llama_folder, tiny_tokenizer

FAMILIES = ["llama", "phi3", "gpt2", "gpt_neox"]
pytestmark = pytest.mark.filterwarnings(
    "ignore::FutureWarning"
)  # PEFT asks transformers for a property by its old name


def changed(model: LanguageModel, size: float = 0.05, share: float = 0.3) -> Delta:
    """A change of some rows and columns, from deltas that were attached."""
    with attach(model, some(model, share)) as deltas:
        randomised(deltas.parameters(), size)
        return delta_of(deltas)


def test_the_outside_of_a_set_in_computed_weights_has_no_hash() -> None:
    model = model_of("llama")
    neurons = some(model)
    for layer in model.model.model.layers:
        parametrizations.weight_norm(layer.mlp.down_proj)
    with pytest.raises(UnsupportedModelError, match=r"layers\.\d\.down: its weight is computed"):
        outside_hash(model, neurons)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_change_in_the_weights_acts_as_the_deltas_did_and_is_undone_bit_for_bit(family: str) -> None:
    model = model_of(family)
    ids = batches(1)[0]
    neurons = some(model)
    before, outside = bits(model.model), outside_hash(model, neurons)
    with attach(model, neurons) as deltas, torch.no_grad():
        randomised(deltas.parameters())
        logits = model.model(input_ids=ids).logits
        delta = delta_of(deltas)
        assert outside_hash(model, neurons) == outside
    with applied(model, delta), torch.no_grad():
        assert (model.model(input_ids=ids).logits - logits).abs().max() <= 1e-11
        assert outside_hash(model, neurons) == outside
        after = bits(model.model)
    assert_same_bits(before, bits(model.model))
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {f"{model.anatomy.places[key].module_name}.weight" for key, _ in neurons.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_sum_in_the_weights_is_rounded_once(dtype: torch.dtype) -> None:
    model = model_of("llama", dtype)
    delta = changed(model, 0.01)
    key = "layers.0.down"
    weight = model.anatomy.places[key].projection.base.weight
    columns = torch.from_numpy(delta.neurons[key].copy())
    exact = weight.detach()[:, columns].double() + delta.tensors[key].double()
    apply_delta(model, delta)
    assert torch.equal(weight[:, columns], exact.to(torch.float32).to(dtype))


def test_a_change_of_an_expert_goes_into_its_slice_of_the_tensor() -> None:
    model = LanguageModel(build("mixtral", torch.float32))
    neurons = NeuronSet(
        {"layers.0.experts.1.up": [2, 5], "layers.1.experts.3.down": [0], "layers.0.q": [1]}, model.table
    )
    sizes = {key: model.table[key].weights_per_neuron for key, _ in neurons.items()}
    tensors = {
        "layers.0.experts.1.up": torch.ones(2, sizes["layers.0.experts.1.up"]),
        "layers.1.experts.3.down": torch.ones(sizes["layers.1.experts.3.down"], 1),
        "layers.0.q": torch.ones(1, sizes["layers.0.q"]),
    }
    delta = Delta(neurons, tensors, Provenance("neurons"))
    outside, before = outside_hash(model, neurons), bits(model.model)
    experts = model.anatomy.layers[0].experts
    assert experts is not None
    up = experts.weight(1, "up").detach().clone()
    with applied(model, delta):
        assert outside_hash(model, neurons) == outside
        added = experts.weight(1, "up") - up
        assert added[[2, 5]].sub(1).abs().max() <= 1e-6
        assert float(added.detach().abs().sum()) == pytest.approx(2 * up.shape[1], rel=1e-4)
    assert_same_bits(before, bits(model.model))


def test_files_give_the_same_change_again(tmp_path: pathlib.Path) -> None:
    model = model_of("llama", torch.float32)
    delta = changed(model)
    save_delta(tmp_path, delta)
    again = load_delta(tmp_path)
    assert again.neurons == delta.neurons == NeuronSet.load(tmp_path)
    assert again.neurons.table == model.table
    assert_same_bits(delta.tensors, again.tensors)
    assert all(tensor.dtype == torch.float32 for tensor in again.tensors.values())
    assert again.base == delta.base != ""
    assert again.provenance.models == (model.name,)
    assert repr(again).startswith(f"Delta({again.n_parameters:,} parameters of NeuronSet(")
    assert len(repr(again).splitlines()) == 1
    assert again != delta  # Which tensors are equal is not asked of a change as a whole.
    assert again.n_parameters == sum(tensor.numel() for tensor in delta.tensors.values())


@given(share=st.floats(0.0, 0.4), seed=st.integers(0, 100))
def test_any_change_of_any_set_survives_its_file(share: float, seed: int) -> None:
    import tempfile

    model = _shared_model()
    neurons = some(model, share, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for key, members in neurons.items():
        n, length = len(members), model.table[key].weights_per_neuron
        shape = (length, n) if key.endswith((".o", ".down")) else (n, length)
        tensors[key] = torch.randn(shape, generator=generator)
    with tempfile.TemporaryDirectory() as folder:
        save_delta(folder, Delta(neurons, tensors, Provenance("neurons")))
        again = load_delta(folder)
    assert again.neurons == neurons
    assert_same_bits(tensors, again.tensors)


_MODELS: list[LanguageModel] = []


def _shared_model() -> LanguageModel:
    if not _MODELS:
        _MODELS.append(model_of("llama", torch.float32))
    return _MODELS[0]


def test_a_disk_that_fills_up_leaves_the_earlier_change_whole(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of("llama", torch.float32)
    first, second = changed(model), changed(model, 0.1)
    save_delta(tmp_path, first)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(run_files.os, "fsync", full)
    with pytest.raises(RunError, match="No space left"):
        save_delta(tmp_path, second)
    monkeypatch.undo()
    assert_same_bits(first.tensors, load_delta(tmp_path).tensors)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["delta.safetensors", "neurons.safetensors"]


def test_damaged_missing_and_foreign_files_are_one_line_errors(tmp_path: pathlib.Path) -> None:
    model = model_of("llama", torch.float32)
    with pytest.raises(NeuronError, match="no file"):
        load_delta(tmp_path)
    delta = changed(model)
    save_delta(tmp_path, delta)
    whole = (tmp_path / "delta.safetensors").read_bytes()
    (tmp_path / "delta.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(NeuronError, match="copy it again"):
        load_delta(tmp_path)
    with pytest.raises(NeuronError, match="expected 'delta'"):
        load_delta(tmp_path / "neurons.safetensors")
    broken = {key: tensor.clone() for key, tensor in delta.tensors.items()}
    next(iter(broken.values()))[0, 0] = float("nan")
    save_delta(tmp_path, Delta(delta.neurons, broken, delta.provenance))
    with pytest.raises(NumericalError, match="NaN"):
        load_delta(tmp_path)
    with pytest.raises(NeuronError, match="were expected"):
        Delta(delta.neurons, {}, delta.provenance)
    with pytest.raises(NeuronError, match="axis"):
        Delta(delta.neurons, {key: tensor.T for key, tensor in delta.tensors.items()}, delta.provenance)


def test_a_change_goes_only_into_the_weights_it_was_trained_on_or_where_the_caller_says_so() -> None:
    model = model_of("llama", torch.float32)
    delta = changed(model)
    other = LanguageModel(build("llama", torch.float32, seed=1))
    with pytest.raises(MismatchError, match="trained on other weights"):
        apply_delta(other, delta)
    apply_delta(other, delta, any_base=True)
    apply_delta(model, delta)
    with pytest.raises(MismatchError, match="trained on other weights"):
        apply_delta(model, delta)
    with pytest.raises(ForeignModelError):
        apply_delta(model_of("gpt2", torch.float32), delta)


def test_a_copy_of_the_base_in_another_type_is_the_same_base() -> None:
    model = model_of("llama", torch.float32)
    half = LanguageModel(copy.deepcopy(model.model).to(torch.bfloat16))
    neurons = some(model)
    assert base_hash(model, neurons) == base_hash(half, NeuronSet(dict(neurons.items()), half.table))
    with attach(model, neurons):
        attached = base_hash(model, neurons)
    assert attached == base_hash(model, neurons) != base_hash(LanguageModel(build("llama", seed=1)), neurons)


def test_attached_deltas_and_adapters_are_no_place_to_write_to() -> None:
    import peft

    model = model_of("llama", torch.float32)
    delta = changed(model)
    with attach(model, delta.neurons), pytest.raises(UsageError, match="detach"):
        apply_delta(model, delta)
    adapted = peft.get_peft_model(
        build("llama"), peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    )
    with pytest.raises(UsageError, match="merge"):
        apply_delta(LanguageModel(adapted), delta)


def test_quantised_weights_take_up_no_change() -> None:
    model = model_of("llama", torch.float32)
    delta = changed(model)
    weight = model.anatomy.places["layers.0.q"].projection.base.weight
    weight.quant_state = object()
    with pytest.raises(
        UnsupportedModelError, match=r"layers\.0\.q: quantised weights cannot take up a change exactly"
    ):
        apply_delta(model, delta)


def test_survival_counts_the_changed_weights_that_are_other_numbers_after_the_cast() -> None:
    model = model_of("llama", torch.float32)
    large, small = changed(model, 0.5), changed(model, 1e-6)
    assert survival(model, large, torch.float32) > 0.999
    assert survival(model, large, torch.bfloat16) > 0.99
    share = survival(model, small, torch.bfloat16)
    assert 0 < share < 0.05
    key, members = next(iter(small.neurons.items()))
    zeros = {name: torch.zeros_like(tensor) for name, tensor in small.tensors.items()}
    assert survival(model, Delta(small.neurons, zeros, small.provenance), torch.bfloat16) == 0.0
    weight = model.anatomy.places[key].weight().detach()[torch.from_numpy(members.copy())]
    only = {**zeros, key: small.tensors[key]}
    expected = (
        ((weight + small.tensors[key]).bfloat16() != weight.bfloat16())[small.tensors[key] != 0]
        .float()
        .mean()
    )
    assert survival(model, Delta(small.neurons, only, small.provenance), torch.bfloat16) == pytest.approx(
        float(expected), abs=1e-6
    )


@pytest.mark.parametrize("what", ["norm", "bias", "row", "embedding"])
def test_the_hash_of_the_rest_sees_one_flipped_bit(what: str) -> None:
    model = model_of("llama", torch.float32)
    neurons = NeuronSet({"layers.0.q": [3], "layers.1.down": [4, 5]}, model.table)
    before = outside_hash(model, neurons)
    attention = model.model.model.layers[0].self_attn.q_proj
    target = {
        "norm": model.model.model.norm.weight.detach(),
        "bias": attention.bias.detach()[3:4],
        "row": attention.weight.detach()[4],
        "embedding": model.model.model.embed_tokens.weight.detach()[0],
    }[what]
    with torch.no_grad():
        attention.weight[3] += 1.0
        model.model.model.layers[1].mlp.down_proj.weight[:, 4:6] += 1.0
        assert outside_hash(model, neurons) == before
        target.view(torch.int32)[0] ^= 1
    assert outside_hash(model, neurons) != before


EXPORTED = ["llama", "phi3", "gpt2", "gpt_neox", "falcon"]


def loaded(model: Any, folder: pathlib.Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.PeftModel.from_pretrained(model, folder)


@pytest.mark.parametrize("vllm", [False, True])
@pytest.mark.parametrize("family", EXPORTED)
def test_peft_merges_the_folder_into_the_weights_of_ours_bit_for_bit(
    family: str, vllm: bool, tmp_path: pathlib.Path
) -> None:
    model = model_of(family, torch.float32)
    delta = changed(model)
    before = bits(model.model)
    exported = export_lora(tmp_path, model, delta, vllm=vllm)
    assert_same_bits(before, bits(model.model))
    ids = batches(1)[0]
    adapted = loaded(build(family, torch.float32), tmp_path)
    with torch.no_grad(), applied(model, delta):
        ours = bits(model.model)
        assert torch.allclose(adapted(input_ids=ids).logits, model.model(input_ids=ids).logits, atol=1e-4)
    assert_same_bits(ours, bits(adapted.merge_and_unload()))
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    assert settings["r"] == settings["lora_alpha"] == exported.rank
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


def test_in_bfloat16_the_merged_weights_are_ours_too(tmp_path: pathlib.Path) -> None:
    model = model_of("llama", torch.bfloat16)
    delta = changed(model, 0.003)
    export_lora(tmp_path, model, delta)
    merged = loaded(build("llama", torch.bfloat16), tmp_path).merge_and_unload()
    apply_delta(model, delta)
    assert_same_bits(bits(model.model), bits(merged))


def test_for_vllm_all_projections_have_one_allowed_rank(tmp_path: pathlib.Path) -> None:
    model = model_of("phi3", torch.float32)
    delta = changed(model)
    exported = export_lora(tmp_path, model, delta, vllm=True)
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    assert exported.rank == settings["r"] == settings["lora_alpha"] == 32
    assert settings["rank_pattern"] == settings["alpha_pattern"] == {}
    import safetensors.torch

    weights = safetensors.torch.load_file(tmp_path / "adapter_model.safetensors")
    assert {weight.shape[0 if ".lora_A." in name else 1] for name, weight in weights.items()} == {32}


def test_more_rows_than_vllm_allows_are_to_be_merged(tmp_path: pathlib.Path) -> None:
    model = model_of("llama", torch.float32, intermediate_size=600)
    delta = changed(model, share=0.9)
    with pytest.raises(UnsupportedModelError, match="export a merged checkpoint"):
        export_lora(tmp_path, model, delta, vllm=True)
    assert not list(tmp_path.iterdir())
    assert export_lora(tmp_path, model, delta).rank == 540


def test_one_factor_is_one_hot(tmp_path: pathlib.Path) -> None:
    import safetensors.torch

    model = model_of("llama", torch.float32)
    export_lora(tmp_path, model, changed(model))
    weights = safetensors.torch.load_file(tmp_path / "adapter_model.safetensors")
    for name, weight in weights.items():
        columns = "o_proj" in name or "down_proj" in name
        if columns == (".lora_A." in name):
            assert set(weight.unique().tolist()) == {0.0, 1.0}
            assert torch.equal(weight.sum(1 if columns else 0), torch.ones(min(weight.shape)))


def test_experts_are_exported_merged_only(tmp_path: pathlib.Path) -> None:
    model = LanguageModel(build("mixtral", torch.float32))
    neurons = NeuronSet({"layers.0.experts.1.up": [2]}, model.table)
    delta = Delta(neurons, {"layers.0.experts.1.up": torch.ones(1, 32)}, Provenance("neurons"))
    with pytest.raises(UnsupportedModelError, match="export it merged"):
        export_lora(tmp_path, model, delta)
    export_merged(tmp_path / "merged", model, delta)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    with applied(model, delta):
        assert_same_bits(bits(model.model), bits(again))


@pytest.mark.parametrize("kind", ["ia3", "lora"])
def test_a_base_with_adapters_is_merged_first_and_says_so(kind: str, tmp_path: pathlib.Path) -> None:
    targets = ["q_proj", "v_proj", "down_proj"]
    config = (
        peft.LoraConfig(r=2, target_modules=targets, task_type="CAUSAL_LM")
        if kind == "lora"
        else peft.IA3Config(target_modules=targets, feedforward_modules=["down_proj"], task_type="CAUSAL_LM")
    )
    adapted = peft.get_peft_model(build("llama", torch.float32), config)
    randomised(
        [parameter for name, parameter in adapted.named_parameters() if "lora_" in name or "ia3_" in name],
        0.3,
    )
    model = LanguageModel(adapted, tiny_tokenizer())
    ids = batches(1)[0]
    before = bits(model.model)
    delta = changed(model)
    with attach(model, delta.neurons) as deltas, torch.no_grad():
        deltas.load_tensors(delta.tensors)
        ours = model.model(input_ids=ids).logits
    exported = export_lora(tmp_path / "lora", model, delta)
    assert "merged into its weights first" in exported.notes[0]
    assert_same_bits(before, bits(model.model))
    base = transformers.AutoModelForCausalLM.from_pretrained(exported.base)
    with torch.no_grad():
        assert torch.allclose(loaded(base, tmp_path / "lora")(input_ids=ids).logits, ours, atol=1e-4)
    merged = export_merged(tmp_path / "merged", model, delta)
    assert "merged" in merged.notes[0]
    whole = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    plain = loaded(
        transformers.AutoModelForCausalLM.from_pretrained(exported.base), tmp_path / "lora"
    ).merge_and_unload()
    assert_same_bits(bits(whole), bits(plain))
    assert_same_bits(
        bits(merged_base(model).model), bits(transformers.AutoModelForCausalLM.from_pretrained(exported.base))
    )


def test_a_merged_checkpoint_is_an_ordinary_folder_without_cost_left(tmp_path: pathlib.Path) -> None:
    folder = tiny_llama_folder(tmp_path / "base")
    model = LanguageModel(
        transformers.AutoModelForCausalLM.from_pretrained(folder), tiny_tokenizer(), folder=folder
    )
    delta = changed(model)
    before = bits(model.model)
    exported = export_merged(tmp_path / "tuned", model, delta)
    assert_same_bits(before, bits(model.model))
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "tuned")
    with applied(model, delta):
        assert_same_bits(bits(model.model), bits(again))
    assert [type(module) for module in again.modules()] == [type(module) for module in model.model.modules()]
    assert exported.survived == 1.0
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "tuned").eos_token == "</s>"


def test_a_cast_on_the_way_out_is_recorded_and_its_losses_counted(tmp_path: pathlib.Path) -> None:
    model = model_of("llama", torch.float32)
    delta = changed(model, 1e-6)
    exported = export_merged(tmp_path / "half", model, delta, dtype=torch.bfloat16)
    assert exported.survived is not None
    assert exported.survived < 0.05
    assert "survive the cast to bfloat16" in exported.notes[0]
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "half", dtype="auto")
    assert again.dtype == torch.bfloat16
    with applied(model, delta):
        expected = {
            name: tensor.to(torch.bfloat16) if tensor.is_floating_point() else tensor
            for name, tensor in bits(model.model).items()
        }
    held = dict(again.named_parameters())
    assert_same_bits(
        {name: expected[name] for name in held}, {name: tensor.detach() for name, tensor in held.items()}
    )


def test_a_folder_with_other_things_is_not_replaced_and_a_failure_leaves_the_earlier_checkpoint(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of("llama", torch.float32)
    delta = changed(model)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("all of it")
    with pytest.raises(RunError, match="other things"):
        export_merged(tmp_path / "mine", model, delta)
    export_merged(tmp_path / "out", model, delta)
    first = (tmp_path / "out" / "model.safetensors").read_bytes()

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(model.model), "save_pretrained", full)
    with pytest.raises(RunError, match="No space left"):
        export_merged(tmp_path / "out", model, changed(model, 0.2))
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == first
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "out"]


def test_attached_deltas_are_to_be_taken_off_first(tmp_path: pathlib.Path) -> None:
    model = model_of("llama", torch.float32)
    delta = changed(model)
    with attach(model, delta.neurons):
        for export in (export_lora, export_merged):
            with pytest.raises(UsageError, match="detach"):
                export(tmp_path / "out", model, delta)


@pytest.mark.parametrize("adapted", [False, True])
def test_an_adapter_or_a_checkpoint_of_another_base_is_refused_or_asked_for(
    adapted: bool, tmp_path: pathlib.Path
) -> None:
    model = model_of("llama", torch.float32)
    with attach(model, some(model)) as deltas:
        randomised(deltas.parameters())
        delta = delta_of(deltas)
    with torch.no_grad():
        for parameter in model.model.parameters():
            parameter += 0.1
    if adapted:
        config = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
        model = LanguageModel(peft.get_peft_model(model.model, config), tiny_tokenizer())
    for export in (export_lora, export_merged):
        with pytest.raises(MismatchError, match="other weights"):
            export(tmp_path / export.__name__, model, delta)
        assert not (tmp_path / export.__name__).exists()
        export(tmp_path / export.__name__, model, delta, any_base=True)


@pytest.mark.skipif(sys.platform == "win32", reason="limits on the size of a file are set the way of POSIX")
@pytest.mark.parametrize("export", [export_lora, export_merged])
def test_a_full_disk_is_an_error_in_a_line_and_leaves_what_was_exported_before(
    export: Any, tmp_path: pathlib.Path
) -> None:
    import resource

    model = model_of("llama", torch.float32)
    export(tmp_path / "out", model, changed(model))
    first = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    again = Delta(some(model, 0.5), changed_tensors(model, 0.5), Provenance("neurons"))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(RunError, match="cannot write"):
            export(tmp_path / "out", model, again)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == first
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def changed_tensors(model: LanguageModel, share: float) -> dict[str, torch.Tensor]:
    """A change of more neurons than `changed` makes, so that the configuration of its adapter is another
    one.
    """
    with attach(model, some(model, share)) as deltas:
        randomised(deltas.parameters())
        return deltas.tensors()


def furnished(folder: pathlib.Path) -> pathlib.Path:
    """A checkpoint with what real ones hold beside weights."""
    tiny_llama_folder(folder)
    for name in (
        "preprocessor_config.json",
        "processor_config.json",
        "LICENSE",
        "USE_POLICY.md",
        "code/modeling.py",
        "assets/logo.png",
    ):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(name.encode())
    aside = (
        ".git/config",
        ".cache/x.lock",
        "__pycache__/a.pyc",
        "original/params.pth",
        "optimizer.pt",
        "model.safetensors.index.json",
    )
    for name in aside:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"aside")
    outside = folder.parent / "secret.txt"
    outside.write_text("not of this folder")
    (folder / "linked.txt").symlink_to(outside)
    (folder / "linked").symlink_to(folder.parent)
    (folder / "inside.md").symlink_to("USE_POLICY.md")
    return folder


def merged_whole(model: LanguageModel, folder: pathlib.Path) -> pathlib.Path:
    export_merged(folder, model, changed(model))
    return folder


def base_of_lora(model: LanguageModel, folder: pathlib.Path) -> pathlib.Path:
    config = peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    adapted = LanguageModel(peft.get_peft_model(model.model, config), model.tokenizer, name=model.name)
    export_lora(folder, adapted, changed(adapted))
    return folder / "base"


def whole(model: LanguageModel, folder: pathlib.Path) -> pathlib.Path:
    save_checkpoint(folder, model)
    return folder


@pytest.mark.parametrize("write", [merged_whole, base_of_lora, whole])
def test_whatever_the_base_holds_beside_weights_comes_along(write: Any, tmp_path: pathlib.Path) -> None:
    source = furnished(tmp_path / "base")
    (source / "model.safetensors.index.json").unlink()
    model = load(str(source))
    written = write(model, tmp_path / "out" / "written")
    (source / "config.json").write_text("{}")
    for name in (
        "preprocessor_config.json",
        "processor_config.json",
        "LICENSE",
        "USE_POLICY.md",
        "code/modeling.py",
        "assets/logo.png",
    ):
        assert (written / name).read_bytes() == name.encode(), name
    assert (written / "inside.md").read_bytes() == b"USE_POLICY.md"
    for name in (
        ".git",
        ".cache",
        "__pycache__",
        "original",
        "optimizer.pt",
        "linked.txt",
        "linked",
        "secret.txt",
    ):
        assert not (written / name).exists(), name
    assert json.loads((written / "config.json").read_text())["model_type"] == "llama"
    assert not any(path.is_symlink() for path in written.rglob("*"))
    load(str(written))
