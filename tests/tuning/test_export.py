import json
import pathlib
import sys
import warnings
from typing import Any

import peft
import pytest
import torch
import transformers
from test_artefacts import changed
from trained import assert_same_bits, batches, bits, model_of, randomised, some

from families import build
from safety_neurons import load
from safety_neurons.errors import MismatchError, RunError, UnsupportedModelError, UsageError
from safety_neurons.model import LanguageModel
from safety_neurons.neurons import NeuronSet, Provenance
from safety_neurons.tuning import Delta, applied, apply_delta, attach, delta_of, export_lora, export_merged, merged_base
from safety_neurons.tuning.artefacts import save_checkpoint
from tiny import tiny_llama_folder, tiny_tokenizer

FAMILIES = ["llama", "phi3", "gpt2", "gpt_neox", "falcon"]
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # PEFT asks transformers for a property by its old name


def loaded(model: Any, folder: pathlib.Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.PeftModel.from_pretrained(model, folder)


@pytest.mark.parametrize("vllm", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_peft_merges_the_folder_into_the_weights_of_ours_bit_for_bit(family: str, vllm: bool, tmp_path: pathlib.Path) -> None:
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
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]


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
    randomised([parameter for name, parameter in adapted.named_parameters() if "lora_" in name or "ia3_" in name], 0.3)
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
    plain = loaded(transformers.AutoModelForCausalLM.from_pretrained(exported.base), tmp_path / "lora").merge_and_unload()
    assert_same_bits(bits(whole), bits(plain))
    assert_same_bits(bits(merged_base(model).model), bits(transformers.AutoModelForCausalLM.from_pretrained(exported.base)))


def test_a_merged_checkpoint_is_an_ordinary_folder_without_cost_left(tmp_path: pathlib.Path) -> None:
    folder = tiny_llama_folder(tmp_path / "base")
    model = LanguageModel(transformers.AutoModelForCausalLM.from_pretrained(folder), tiny_tokenizer(), folder=folder)
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
        expected = {name: tensor.to(torch.bfloat16) if tensor.is_floating_point() else tensor for name, tensor in bits(model.model).items()}
    held = dict(again.named_parameters())
    assert_same_bits({name: expected[name] for name in held}, {name: tensor.detach() for name, tensor in held.items()})


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
def test_an_adapter_or_a_checkpoint_of_another_base_is_refused_or_asked_for(adapted: bool, tmp_path: pathlib.Path) -> None:
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
def test_a_full_disk_is_an_error_in_a_line_and_leaves_what_was_exported_before(export: Any, tmp_path: pathlib.Path) -> None:
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
    """A change of more neurons than `changed` makes, so that the configuration of its adapter is another one."""
    with attach(model, some(model, share)) as deltas:
        randomised(deltas.parameters())
        return deltas.tensors()


def furnished(folder: pathlib.Path) -> pathlib.Path:
    """A checkpoint with what real ones hold beside weights."""
    tiny_llama_folder(folder)
    for name in ("preprocessor_config.json", "processor_config.json", "LICENSE", "USE_POLICY.md", "code/modeling.py", "assets/logo.png"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(name.encode())
    aside = (".git/config", ".cache/x.lock", "__pycache__/a.pyc", "original/params.pth", "optimizer.pt", "model.safetensors.index.json")
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
    for name in ("preprocessor_config.json", "processor_config.json", "LICENSE", "USE_POLICY.md", "code/modeling.py", "assets/logo.png"):
        assert (written / name).read_bytes() == name.encode(), name
    assert (written / "inside.md").read_bytes() == b"USE_POLICY.md"
    for name in (".git", ".cache", "__pycache__", "original", "optimizer.pt", "linked.txt", "linked", "secret.txt"):
        assert not (written / name).exists(), name
    assert json.loads((written / "config.json").read_text())["model_type"] == "llama"
    assert not any(path.is_symlink() for path in written.rglob("*"))
    load(str(written))
