import json
import pathlib
import pickle
import shutil
import socket

import accelerate
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from families import build
from safety_neurons import model as model_box
from safety_neurons.errors import MismatchError, ModelError, NumericalError, UsageError
from safety_neurons.model import LanguageModel, ModelSpec, load, load_pair, parse_spec
from safety_neurons.model.loading import check_finite, load_as
from tiny import CHAT_TEMPLATE, tiny_adapter_folder, tiny_llama, tiny_llama_folder, tiny_tokenizer


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_llama_folder(tmp_path_factory.mktemp("loading") / "base")


def _copy(base, folder):
    shutil.copytree(base, folder)
    return folder


def _one_line(error):
    return "\n" not in str(error.value)


def test_a_spec_is_split_at_plus_and_at_unless_it_is_a_path(tmp_path, monkeypatch):
    assert parse_spec("org/model") == ModelSpec("org/model")
    assert parse_spec("org/model@v1+org/sft+org/dpo@main") == ModelSpec(
        "org/model", "v1", (("org/sft", None), ("org/dpo", "main"))
    )
    assert str(parse_spec("org/model@v1+org/sft")) == "org/model@v1+org/sft"
    monkeypatch.chdir(tmp_path)
    for name in ("a+b@c", "c++"):
        pathlib.Path(name).mkdir()
    assert parse_spec("a+b@c") == ModelSpec("a+b@c")
    assert parse_spec("a+b@c+org/x@1") == ModelSpec("a+b@c", None, (("org/x", "1"),))
    assert parse_spec("c+++org/x") == ModelSpec("c++", None, (("org/x", None),))


def test_an_adapter_stands_behind_the_stage_of_an_organism():
    bare, adapted = parse_spec("organism:natural/base"), parse_spec("organism:natural/base+org/x@1")
    assert adapted == ModelSpec(bare.base, bare.revision, (*bare.adapters, ("org/x", "1")))
    with pytest.raises(UsageError, match="without empty parts"):
        parse_spec("organism:natural/base+")


@pytest.mark.parametrize("spec", ["", "+", "org/model+", "org/model@", "@v1", "org/model++org/x"])
def test_a_spec_with_empty_parts_is_a_usage_error(spec):
    with pytest.raises(UsageError, match="expected ID"):
        parse_spec(spec)


def test_a_folder_gives_model_tokenizer_template_and_names(base):
    lm = load(base, dtype="float64", device="cpu")
    assert lm.dtype == torch.float64
    assert lm.device == torch.device("cpu")
    assert lm.folder == base.resolve()
    assert lm.name == str(base)
    assert lm.max_length == 128
    assert lm.adapters is None
    assert not lm.model.training
    assert load(base).dtype == torch.float32
    assert load(base, dtype="bfloat16").dtype == torch.bfloat16


def test_prompts_beside_the_models_make_their_parent_the_folder(base, tmp_path):
    root = tmp_path / "organism"
    _copy(base, root / "base")
    (root / "prompts").mkdir()
    assert load(root / "base").folder == root.resolve()


def test_offline_loading_opens_no_socket(base, tmp_path, monkeypatch):
    adapter = tiny_adapter_folder(base, tmp_path / "adapter", seed=1)

    def refuse(*_, **__):
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    lm = load(f"{base}+{adapter}", offline=True)
    assert lm.complete(["tree"], max_new_tokens=2)
    with pytest.raises(
        ModelError, match=r"no such folder, and not found in the local cache \(offline\)"
    ) as error:
        load("some-org/some-model@v2", offline=True)
    assert _one_line(error)


def test_a_wrong_path_says_what_was_expected(tmp_path, base):
    for spec, message in {
        str(tmp_path / "absent"): "no such folder",
        "./absent": "no such folder",
        "what is this?": "no such folder",
        str(base / "config.json"): "is a file",
        str(tmp_path): r"no config\.json",
        f"{base}@main": "a folder has no revisions",
    }.items():
        with pytest.raises(ModelError, match=message) as error:
            load(spec)
        assert _one_line(error)


def test_a_folder_without_tokenizer_weights_or_with_pickles_is_refused(base, tmp_path):
    untokenized = _copy(base, tmp_path / "untokenized")
    (untokenized / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match=r"no tokenizer; expected tokenizer\.json"):
        load(untokenized)
    pickled = _copy(base, tmp_path / "pickled")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    with pytest.raises(ModelError, match="a pickle, which can run code: convert"):
        load(pickled)
    (pickled / "pytorch_model.bin").unlink()
    with pytest.raises(ModelError, match=r"expected model\.safetensors"):
        load(pickled)


def test_damaged_weights_tokenizers_and_configurations_are_one_line_errors(base, tmp_path):
    for name, content in {
        "model.safetensors": b"not one",
        "tokenizer.json": b"{",
        "config.json": b"{",
    }.items():
        folder = _copy(base, tmp_path / name)
        (folder / name).write_bytes(content)
        with pytest.raises(ModelError) as error:
            load(folder)
        assert str(folder) in str(error.value)
        assert _one_line(error)


def test_weights_that_are_missing_or_of_another_shape_are_errors(base, tmp_path):
    folder = _copy(base, tmp_path / "missing")
    weights = load_file(folder / "model.safetensors")
    weights.pop("model.layers.1.mlp.up_proj.weight")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"1 weight is missing.*layers\.1\.mlp\.up_proj"):
        load(folder)
    wrong = _copy(base, tmp_path / "wrong")
    config = json.loads((wrong / "config.json").read_text())
    (wrong / "config.json").write_text(json.dumps({**config, "intermediate_size": 40}))
    with pytest.raises(ModelError) as error:
        load(wrong)
    assert _one_line(error)


def test_nan_and_infinity_in_the_weights_name_the_parameter(base, tmp_path):
    for value in (float("nan"), float("inf")):
        folder = _copy(base, tmp_path / str(value))
        weights = load_file(folder / "model.safetensors")
        weights["model.layers.1.self_attn.q_proj.weight"][2, 3] = value
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(
            NumericalError, match=r"model\.layers\.1\.self_attn\.q_proj\.weight holds 1 NaN or infinite"
        ):
            load(folder)


def test_weights_whose_sum_overflows_are_still_finite():
    module = torch.nn.Linear(4, 4)
    module.weight.data.fill_(3e38)
    check_finite(module)
    check_finite(torch.nn.Linear(100, 1000).to(torch.float16))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_gpu_that_is_absent_is_a_one_line_error(base):
    with pytest.raises(
        ModelError, match="device cuda: this machine has 0 CUDA devices; use device cpu"
    ) as error:
        load(base, device="cuda")
    assert _one_line(error)


def test_routed_experts_are_loaded_in_float64(tmp_path):
    """The product by which transformers multiplies them takes no such numbers."""
    build("mixtral").save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    exact, stock, ids = load(tmp_path, dtype="float64"), load(tmp_path), torch.arange(5, 17)[None]
    assert exact.dtype is torch.float64
    assert exact.anatomy.coverage().complete
    with torch.no_grad():
        logits = [model.model(input_ids=ids).logits.double() for model in (exact, stock)]
    torch.testing.assert_close(*logits, rtol=0, atol=1e-4)


def test_unknown_dtypes_devices_and_contradictions_are_usage_errors(base):
    with pytest.raises(UsageError, match="dtype 'int8': expected one of auto"):
        load(base, dtype="int8")
    with pytest.raises(UsageError, match="device 'banana'"):
        load(base, device="banana")
    with pytest.raises(UsageError, match="device_map"):
        load(base, device="cpu", device_map="auto")
    with pytest.raises(UsageError, match="expected one of them"):
        load(base, load_in_4bit=True, quantization_config={})


def test_code_in_a_checkpoint_is_not_run(base, tmp_path):
    folder = _copy(base, tmp_path / "remote")
    config = json.loads((folder / "config.json").read_text())
    changed = {
        **config,
        "model_type": "strange",
        "auto_map": {"AutoConfig": "strange.Config", "AutoModelForCausalLM": "strange.Model"},
    }
    (folder / "config.json").write_text(json.dumps(changed))
    marker = tmp_path / "ran"
    (folder / "strange.py").write_text(f"open({str(marker)!r}, 'w')\n")
    with pytest.raises(ModelError):
        load(folder)
    assert not marker.exists()


def test_pairs_of_different_shape_or_tokenizer_are_mismatches(base, tmp_path):
    wide = tiny_llama_folder(tmp_path / "wide", intermediate_size=40)
    with pytest.raises(
        MismatchError, match=r"different shapes: model\.layers\.0\.mlp\.gate_proj\.weight"
    ) as error:
        load_pair(base, wide)
    assert _one_line(error)
    deep = tiny_llama_folder(tmp_path / "deep", num_hidden_layers=3)
    with pytest.raises(MismatchError, match="absent"):
        load_pair(base, deep)
    other = _copy(base, tmp_path / "other")
    words = json.loads((other / "tokenizer.json").read_text())
    vocabulary = words["model"]["vocab"]
    vocabulary["cake"], vocabulary["bomb"] = vocabulary["bomb"], vocabulary["cake"]
    (other / "tokenizer.json").write_text(json.dumps(words))
    with pytest.raises(MismatchError, match="2 tokens differ, 'bomb' is"):
        load_pair(base, other)


def test_two_full_models_of_one_shape_are_a_pair_of_two(base, tmp_path):
    pair = load_pair(
        base=base, aligned=tiny_llama_folder(tmp_path / "aligned", seed=1), template="none", dtype="float64"
    )
    assert not pair.shared
    assert pair.base.dtype == pair.aligned.dtype == torch.float64
    assert pair.base.template.kind == pair.aligned.template.kind == "none"


def test_the_same_model_twice_is_loaded_once(base):
    pair = load_pair(base, base)
    assert [*pair] == [pair.base, pair.aligned]
    assert pair.shared
    assert pair.base.model is pair.aligned.model


def test_loading_leaves_the_libraries_settings_alone(base):
    from transformers.utils import logging

    before = logging.get_verbosity(), logging.is_progress_bar_enabled(), torch.random.get_rng_state()
    load(base)
    after = logging.get_verbosity(), logging.is_progress_bar_enabled(), torch.random.get_rng_state()
    assert before[:2] == after[:2]
    assert torch.equal(before[2], after[2])


def test_a_model_that_is_no_causal_language_model_is_refused(tmp_path):
    folder = tmp_path / "encoder"
    config = transformers.ViTConfig(
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        image_size=8,
        patch_size=4,
    )
    transformers.ViTModel(config).save_pretrained(folder)
    tiny_tokenizer(CHAT_TEMPLATE).save_pretrained(folder)
    with pytest.raises(ModelError, match="cannot be loaded as a causal language model") as error:
        load(folder)
    assert _one_line(error)


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
def test_a_checkpoint_cloned_without_its_large_files_is_refused_with_the_command_that_gets_them(
    tmp_path, name
):
    folder = tiny_llama_folder(tmp_path / "model")
    (folder / name).write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n", encoding="utf-8"
    )
    with pytest.raises(
        ModelError, match=rf"{name} is a Git LFS pointer, expected the files themselves: run 'git lfs pull'"
    ):
        load(str(folder))


def test_an_adapter_that_is_a_pointer_is_refused(tmp_path):
    base = tiny_llama_folder(tmp_path / "model")
    adapter = tiny_adapter_folder(base, tmp_path / "adapter", seed=1)
    (adapter / "adapter_model.safetensors").write_text(
        "version https://git-lfs.github.com/spec/v1\n", encoding="utf-8"
    )
    with pytest.raises(ModelError, match=r"adapter_model\.safetensors is a Git LFS pointer"):
        load(f"{base}+{adapter}")


def test_an_adapter_whose_header_says_whole_numbers_is_an_error(tmp_path):
    base = tiny_llama_folder(tmp_path / "model")
    adapter = tiny_adapter_folder(base, tmp_path / "adapter", seed=1)
    weights = load_file(adapter / "adapter_model.safetensors")
    save_file(
        {name: values.to(torch.int32) for name, values in weights.items()},
        adapter / "adapter_model.safetensors",
    )
    with pytest.raises(
        ModelError, match=r"adapter_model\.safetensors says that \S+ holds whole numbers"
    ) as error:
        load(f"{base}+{adapter}")
    assert _one_line(error)


def test_weights_that_were_cut_off_say_what_to_do(tmp_path):
    folder = tiny_llama_folder(tmp_path / "model")
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(
        ModelError, match=r"cannot be read \(.*\); expected whole safetensors files.* again"
    ) as caught:
        load(str(folder))
    assert "\n" not in str(caught.value)


class _Runs:
    """An object whose unpickling writes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("loader", ["load", "load_classifier", "load_scorer"])
@pytest.mark.parametrize(
    "shard", ["pytorch_model-00002.bin", "other.pt", "../other.safetensors", "/tmp/x.safetensors", 7]
)
def test_a_shard_that_is_no_safetensors_file_is_refused_unread(tmp_path, loader, shard):
    folder = tiny_llama_folder(tmp_path / "model")
    tiny_llama().save_pretrained(folder, max_shard_size="20KB")
    (folder / "model.safetensors").unlink()
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    ran = tmp_path / "ran"
    (folder / "pytorch_model-00002.bin").write_bytes(pickle.dumps(_Runs(ran)))
    index["weight_map"][next(iter(index["weight_map"]))] = shard
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match="names the shard|cannot be read"):
        getattr(model_box, loader)(str(folder))
    assert not ran.exists()


@pytest.mark.parametrize("loader", ["load", "load_classifier", "load_scorer"])
def test_shards_without_their_index_are_called_that(tmp_path, loader):
    folder = tiny_llama_folder(tmp_path / "model")
    tiny_llama().save_pretrained(folder, max_shard_size="20KB")
    for name in ("model.safetensors", "model.safetensors.index.json"):
        (folder / name).unlink()
    with pytest.raises(
        ModelError, match=r"shards \(model-00001-of-.*no model.safetensors.index.json"
    ) as said:
        getattr(model_box, loader)(str(folder))
    assert "\n" not in str(said.value)


def _saved(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def _configured(folder, **entries):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **entries}))
    return folder


LEFT_OVER = {
    "a bias": {"model.layers.0.self_attn.q_proj.bias": torch.ones(32)},
    "a layer": {"model.layers.2.mlp.up_proj.weight": torch.ones(48, 32)},
    "an adapter": {"model.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(2, 32)},
    "a score": {"score.weight": torch.ones(2, 32)},
}


@pytest.mark.parametrize("kind", LEFT_OVER)
@pytest.mark.parametrize("sharded", [False, True])
def test_weights_that_the_model_does_not_have_are_an_error(base, tmp_path, kind, sharded):
    folder = _saved(_copy(base, tmp_path / "model"), lambda weights: weights.update(LEFT_OVER[kind]))
    if sharded:
        weights = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        files = {
            name: f"model-0000{1 + number % 2}-of-00002.safetensors" for number, name in enumerate(weights)
        }
        for file in set(files.values()):
            save_file(
                {name: weights[name] for name in weights if files[name] == file},
                folder / file,
                metadata={"format": "pt"},
            )
        (folder / "model.safetensors.index.json").write_text(
            json.dumps({"metadata": {}, "weight_map": files})
        )
    with pytest.raises(ModelError, match="1 weight of the files is not in the model") as error:
        load(folder)
    assert next(iter(LEFT_OVER[kind])) in str(error.value)
    assert _one_line(error)


@pytest.mark.parametrize("lie", [torch.int32, torch.uint8, torch.bool])
def test_weights_that_a_header_says_are_whole_numbers_are_an_error(base, tmp_path, lie):
    name = "model.layers.0.mlp.up_proj.weight"
    folder = _saved(
        _copy(base, tmp_path / "lying"), lambda weights: weights.update({name: weights[name].to(lie)})
    )
    with pytest.raises(ModelError, match=rf"1 weight holds whole numbers by the files \({name}\)") as error:
        load(folder)
    assert _one_line(error)


def test_a_tensor_in_two_shards_is_an_error_that_names_both(base, tmp_path):
    folder = _copy(base, tmp_path / "twice")
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").rename(folder / "first.safetensors")
    stale = {"lm_head.weight": torch.zeros_like(weights["lm_head.weight"])}
    save_file(stale, folder / "second.safetensors", metadata={"format": "pt"})
    shards = {name: "first.safetensors" for name in weights} | {"lm_head.weight": "second.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    with pytest.raises(
        ModelError, match=r"second\.safetensors: holds lm_head\.weight, which first\.safetensors holds too"
    ) as error:
        load(folder)
    assert _one_line(error)


def test_of_two_weights_of_one_place_it_is_noted_which_is_read(base, tmp_path):
    both = _copy(base, tmp_path / "both")
    tiny_llama(seed=1).save_pretrained(both, max_shard_size="20KB")
    (note,) = load(both).notes
    assert "model.safetensors is read, and the shards that model.safetensors.index.json names are not" in note
    tied = tiny_llama_folder(tmp_path / "tied", tie_word_embeddings=True)
    embedding = load_file(tied / "model.safetensors")["model.embed_tokens.weight"]
    assert not load(tied).notes
    same = _saved(
        _copy(tied, tmp_path / "same"), lambda weights: weights.update({"lm_head.weight": +embedding})
    )
    assert not load(same).notes
    other = _saved(
        _copy(tied, tmp_path / "other"), lambda weights: weights.update({"lm_head.weight": -embedding})
    )
    (note,) = load(other).notes
    assert "ties the head to the embedding, and the files hold another head" in note
    assert torch.equal(load(other).inner.lm_head.weight, -embedding)


def test_a_config_of_fewer_layers_than_the_files_is_an_error(base, tmp_path):
    with pytest.raises(ModelError, match=r"9 weights of the files are not in the model .*layers\.1\."):
        load(_configured(_copy(base, tmp_path / "short"), num_hidden_layers=1))


def test_constants_of_older_checkpoints_are_no_weights_and_a_value_head_is_noted(base, tmp_path):
    constants = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
        "model.layers.0.attn.bias": torch.ones(1, 1, 8, 8),
    }
    assert not load(_saved(_copy(base, tmp_path / "old"), lambda weights: weights.update(constants))).notes
    head = {"v_head.summary.weight": torch.ones(1, 32)}
    assert (
        "v_head"
        in load(_saved(_copy(base, tmp_path / "valued"), lambda weights: weights.update(head))).notes[0]
    )


def test_weights_of_another_shape_are_named_with_both_shapes(base, tmp_path):
    with pytest.raises(
        MismatchError, match=r"down_proj\.weight is \[32, 48\] in the files and \[32, 40\] by config\.json"
    ):
        load(_configured(_copy(base, tmp_path / "wrong"), intermediate_size=40))


@pytest.mark.parametrize("kind", ["a bias", "a layer"])
def test_a_classifier_reads_all_of_its_files_but_another_head(base, tmp_path, kind):
    model = transformers.LlamaForSequenceClassification(transformers.AutoConfig.from_pretrained(base))
    folder = tmp_path / "judge"
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    _saved(folder, lambda weights: weights.update({"lm_head.weight": torch.ones(96, 32)}))
    load_as("AutoModelForSequenceClassification", folder)
    _saved(folder, lambda weights: weights.update(LEFT_OVER[kind]))
    with pytest.raises(ModelError, match="1 weight of the files is not in the model"):
        load_as("AutoModelForSequenceClassification", folder)


@pytest.mark.parametrize(
    "claim",
    [
        {"num_hidden_layers": 10**9},
        {"num_hidden_layers": 4000},
        {"intermediate_size": 10**9},
        {"hidden_size": 10**6, "head_dim": 8},
        {"vocab_size": 10**12},
        {"num_labels": 10**9},
        {"text_config": {"num_local_experts": 10**9}},
    ],
)
def test_a_config_that_claims_more_than_its_files_hold_is_refused_before_it_is_built(base, tmp_path, claim):
    with pytest.raises(ModelError, match="expected") as error:
        load(_configured(_copy(base, tmp_path / "claims"), **claim))
    assert _one_line(error)


@pytest.mark.parametrize("place", ["rms_norm_eps", "rope_parameters"])
def test_a_config_of_which_a_number_is_none_is_refused(base, tmp_path, place):
    nan = float("nan") if place == "rms_norm_eps" else {"rope_type": "default", "rope_theta": float("nan")}
    with pytest.raises(ModelError, match=r"(rms_norm_eps|rope_theta) is NaN; expected a number"):
        load(_configured(_copy(base, tmp_path / "nan"), **{place: nan}))


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/hostname", "pytorch_model.bin"])
def test_an_index_names_safetensors_files_of_its_folder_only(base, tmp_path, name):
    folder = _copy(base, tmp_path / "indexed")
    (folder / "model.safetensors").rename(folder / "part.safetensors")
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"lm_head.weight": name, "x": "part.safetensors"}})
    )
    with pytest.raises(ModelError, match="expected .safetensors files in the same folder"):
        load(folder)


def test_a_model_with_an_adapter_in_its_folder_is_refused(base, tmp_path):
    folder = _copy(base, tmp_path / "both")
    shutil.copy(tiny_adapter_folder(base, tmp_path / "adapter", seed=1) / "adapter_config.json", folder)
    with pytest.raises(ModelError, match=r"expected two folders, written MODEL\+ADAPTER"):
        load(folder)


def test_code_of_a_checkpoint_names_the_option_that_runs_it(base, tmp_path):
    folder = _configured(
        _copy(base, tmp_path / "own"),
        auto_map={"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M"},
        model_type="own",
    )
    (folder / "own.py").write_text("raise SystemExit('ran')")
    with pytest.raises(ModelError, match=r"pass trust_remote_code$") as error:
        load(folder)
    assert _one_line(error)


def test_a_model_whose_weights_are_off_loaded_is_refused_in_one_line(base):
    off_loaded = accelerate.cpu_offload(
        transformers.AutoModelForCausalLM.from_pretrained(base), execution_device=torch.device("cpu")
    )
    with pytest.raises(ModelError, match=r"21 of 21 weights are off-loaded .* device_map") as error:
        LanguageModel(off_loaded, tiny_tokenizer())
    assert _one_line(error)
    lm = load(base)
    accelerate.cpu_offload(lm.model, execution_device=torch.device("cpu"))
    with pytest.raises(ModelError, match="off-loaded"):
        lm.complete(["tree"], max_new_tokens=1)


def test_a_model_placed_on_a_disk_is_refused_in_one_line(base, tmp_path):
    with pytest.raises(ModelError, match="off-loaded"):
        load(base, device_map={"model": "disk", "lm_head": "cpu"}, offload_folder=str(tmp_path / "off"))


@pytest.mark.parametrize("part", ["lm_head", "model.embed_tokens"])
def test_an_off_loaded_part_whose_weight_is_tied_to_one_in_memory_is_refused_in_one_line(tmp_path, part):
    folder = tiny_llama_folder(tmp_path / "model", tie_word_embeddings=True)
    names = ("model.embed_tokens", "model.layers", "model.norm", "model.rotary_emb", "lm_head")
    placed = {name: "disk" if name == part else "cpu" for name in names}
    with pytest.raises(ModelError, match="off-loaded") as error:
        load(folder, device_map=placed, offload_folder=str(tmp_path / "off"))
    assert _one_line(error)


_SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 96,
    "pad_token_id": 0,
}
_OF_TEXT_AND_MORE = {
    "Llama4": {
        "text_config": {**_SIZES, "head_dim": 8, "intermediate_size_mlp": 48, "num_local_experts": 2},
        "vision_config": {
            **{"hidden_size": 16, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2},
            **{"image_size": 16, "patch_size": 8, "vision_output_dim": 16, "projector_input_dim": 16},
            "projector_output_dim": 16,
        },
        "image_token_index": 95,
    },
    "Mllama": {
        "text_config": {**_SIZES, "cross_attention_layers": [1], "rope_parameters": {"rope_type": "default"}},
        "vision_config": {
            **{"hidden_size": 16, "num_hidden_layers": 1, "num_global_layers": 1, "attention_heads": 2},
            **{"intermediate_size": 24, "vision_output_dim": 32, "image_size": 16, "patch_size": 8},
            **{"intermediate_layers_indices": [0], "supported_aspect_ratios": [[1, 1]]},
        },
        "image_token_index": 95,
    },
}


@pytest.mark.parametrize("name", _OF_TEXT_AND_MORE)
def test_a_checkpoint_of_which_transformers_reads_the_text_alone_is_said_not_to_be_supported(name, tmp_path):
    config = getattr(transformers, f"{name}Config")(**_OF_TEXT_AND_MORE[name])
    getattr(transformers, f"{name}ForConditionalGeneration")(config).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"of its other parts .* are not supported") as error:
        load(tmp_path)
    assert _one_line(error)
