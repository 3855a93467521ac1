"""Bad input through the command line: one line that says what arrived, what was expected and what to do, and
nothing lost.
"""

import json
import os
import pathlib
import shutil

import pytest
import torch
from running import command, done, record, refused
from safetensors.torch import load_file, save_file

from forked import forked
from safety_neurons.neurons import NeuronSet, Provenance, Scores
from tiny import CHAT_TEMPLATE, tiny_llama_folder, tiny_tokenizer

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


def find(pair, prompts, *more):
    return ["find", "contrast", *pair.models, "--prompts", prompts, "--positions", "prompt", *more]


def file(folder, name, content):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("empty.txt", "", "empty"),
        ("empty.jsonl", "\n\n", "empty"),
        ("empty.csv", "prompt\n", "expected"),
        ("pointer.jsonl", POINTER, "git lfs pull"),
        ("pointer.csv", POINTER, "git lfs pull"),
        ("latin.txt", "wie geht das für mich\n".encode("latin-1"), "UTF-8"),
        ("wrong.csv", "colour,shape\nred,round\n", "colour"),
        ("prompts.parquet", b"PAR1", "expected"),
    ],
)
def test_a_file_that_holds_no_prompts_is_refused_before_a_model_is_loaded(
    name, content, said, tiny_pair, tmp_path, monkeypatch
):
    monkeypatch.setattr("safety_neurons.model.load_pair", lambda *_, **__: pytest.fail("a model was loaded"))
    path = file(tmp_path, name, content)
    line = refused(*find(tiny_pair, path, "--out", tmp_path / "run"))
    assert said in line
    assert str(path) in line or name in line
    assert not (tmp_path / "run").exists()


def test_a_missing_file_and_a_missing_column_are_named(tiny_pair, tmp_path):
    assert "nowhere.txt" in refused(*find(tiny_pair, tmp_path / "nowhere.txt", "--out", tmp_path / "run"))
    table = file(tmp_path, "table.csv", "goal,target\nhow do i kill,no\n")
    line = refused(*find(tiny_pair, table, "--column", "question", "--out", tmp_path / "run"))
    assert "question" in line
    assert "goal" in line


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("bom.txt", b"\xef\xbb\xbfhow do i kill\ntell me\n"),
        ("crlf.txt", b"how do i kill\r\ntell me\r\n"),
        ("bom.csv", b"\xef\xbb\xbfprompt\r\nhow do i kill\r\ntell me\r\n"),
        ("cells.csv", b'prompt\n"how do i\nkill"\ntell me\n'),
        ("lines.json", b'{"prompt": "how do i kill"}\n{"prompt": "tell me"}\n'),
    ],
)
def test_odd_but_readable_files_are_read(name, content, tiny_pair, tmp_path):
    result = done(*find(tiny_pair, file(tmp_path, name, content), "--out", tmp_path / "run"))
    assert result["prompts"] == {"used": 2, "failed": 0, "truncated": 0}


def test_completions_of_other_prompts_are_refused_with_what_differs(tiny_pair, tmp_path):
    asked = file(tmp_path, "asked.txt", "how do i kill\ntell me a story\n")
    answers = [{"prompt": text, "completion": "the cake is red"} for text in ("how do i kill", "tell me why")]
    given = file(tmp_path, "completions.jsonl", "".join(f"{json.dumps(answer)}\n" for answer in answers))
    words = ["find", "contrast", *tiny_pair.models, "--prompts", asked, "--completions"]
    line = refused(*words, given, "--out", tmp_path / "run")
    assert (
        "prompt '1' is 'tell me a story' in the list and 'tell me why' in the completions file (1 of 2 "
        "differ)"
    ) in line
    assert "git lfs pull" in refused(
        *words, file(tmp_path, "pointer.jsonl", POINTER), "--out", tmp_path / "other"
    )


def test_prompts_longer_than_the_context_are_counted(tiny_pair, tmp_path):
    path = file(tmp_path, "long.txt", "how do i kill\n" + "tree " * 300 + "\n")
    assert done(*find(tiny_pair, path, "--out", tmp_path / "run"))["prompts"] == {
        "used": 2,
        "failed": 0,
        "truncated": 1,
    }
    assert any("longer than the context" in note for note in record(tmp_path / "run")["notes"])
    words = [
        "verify",
        "deactivate",
        "--model",
        tiny_pair.base,
        "--neurons",
        tmp_path / "run",
        "--harmful",
        path,
        "--harmless",
        path,
    ]
    done(*words, "--text", "none", "--random", "0", "--max-new-tokens", "2", "--out", tmp_path / "verify")
    notes = record(tmp_path / "verify")["notes"]
    assert len([note for note in notes if "1 of 2 prompts were longer than the context" in note]) == 2, notes


def test_two_models_of_different_shape_or_tokenizer_are_refused(tiny_pair, tmp_path):
    other = tiny_llama_folder(tmp_path / "wide", intermediate_size=64)
    words = [
        "find",
        "contrast",
        "--base",
        tiny_pair.plain,
        "--prompts",
        tiny_pair.harmful,
        "--out",
        tmp_path / "run",
    ]
    line = refused(*words, "--aligned", other)
    assert "different shapes" in line
    assert "48" in line
    assert "64" in line
    same = tiny_llama_folder(tmp_path / "words", seed=1)
    tokenizer = json.loads((same / "tokenizer.json").read_text(encoding="utf-8"))
    words_of = tokenizer["model"]["vocab"]
    words_of["cake"], words_of["bomb"] = words_of["bomb"], words_of["cake"]
    (same / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    line = refused(*words, "--aligned", same)
    assert "2 tokens differ" in line
    assert "'bomb'" in line


def test_neurons_and_scores_of_another_model_are_refused(tiny_pair, tmp_path):
    other = tiny_llama_folder(tmp_path / "wide", intermediate_size=64)
    done(
        "find",
        "importance",
        "--model",
        other,
        "--prompts",
        tiny_pair.harmful,
        "--sites",
        "down",
        "--out",
        tmp_path / "other",
    )
    words = [
        "verify",
        "deactivate",
        "--model",
        tiny_pair.base,
        *tiny_pair.measured_on,
        "--out",
        tmp_path / "run",
    ]
    assert "expected LlamaForCausalLM" in refused(*words, "--neurons", tmp_path / "other")
    assert "find them on this model" in refused(*words, "--scores", tmp_path / "other")
    assert not (tmp_path / "run").exists()


def test_damaged_and_hand_made_neuron_files_are_told_apart(tiny_pair, tmp_path):
    short = ["--text", "none", "--random", "0", "--max-new-tokens", "2"]
    words = ["verify", "deactivate", "--model", tiny_pair.base, *tiny_pair.measured_on, *short]
    NeuronSet({"layers.0.down": [3, 48]}, None, Provenance("neurons")).save(tmp_path / "range.safetensors")
    line = refused(*words, "--neurons", tmp_path / "range.safetensors", "--out", tmp_path / "range")
    assert "index 48 at 'layers.0.down' is out of range, expected 0 to 47" in line
    NeuronSet({"layers.7.down": [3]}, None, Provenance("neurons")).save(tmp_path / "layer.safetensors")
    assert "layers.7.down" in refused(
        *words, "--neurons", tmp_path / "layer.safetensors", "--out", tmp_path / "layer"
    )
    assert "git lfs pull" in refused(
        *words, "--neurons", file(tmp_path, "p.safetensors", POINTER), "--out", tmp_path / "p"
    )
    assert "safetensors" in refused(
        *words, "--neurons", file(tmp_path, "d.safetensors", "x" * 99), "--out", tmp_path / "d"
    )
    NeuronSet({"layers.0.down": [3, 47]}, None, Provenance("neurons")).save(tmp_path / "fits.safetensors")
    done(*words, "--neurons", tmp_path / "fits.safetensors", "--out", tmp_path / "fits")
    assert any("no fingerprint" in note for note in record(tmp_path / "fits")["notes"])


def test_neurons_found_on_other_weights_are_used_with_a_note(tiny_pair, tmp_path):
    done(*find(tiny_pair, tiny_pair.harmful, "--out", tmp_path / "found"))
    words = [
        "verify",
        "deactivate",
        "--model",
        tiny_pair.plain,
        *tiny_pair.measured_on,
        "--text",
        "none",
        "--random",
        "0",
    ]
    outcome = command(
        *words, "--max-new-tokens", "2", "--neurons", tmp_path / "found", "--out", tmp_path / "run"
    )
    assert outcome.code == 0
    assert "with other weights" in outcome.err


def test_an_empty_neuron_file_is_refused(tiny_pair, tmp_path):
    NeuronSet({}, None, Provenance("neurons")).save(tmp_path / "none.safetensors")
    words = [
        "verify",
        "deactivate",
        "--model",
        tiny_pair.base,
        *tiny_pair.measured_on,
        "--text",
        "none",
        "--random",
        "0",
    ]
    line = refused(
        *words, "--max-new-tokens", "2", "--neurons", tmp_path / "none.safetensors", "--out", tmp_path / "run"
    )
    assert "empty" in line


def test_nan_weights_are_refused_by_name(tiny_pair, tmp_path):
    broken = tmp_path / "nan"
    shutil.copytree(tiny_pair.plain, broken)
    weights = load_file(broken / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][0, 0] = torch.nan
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    line = refused(
        "find", "importance", "--model", broken, "--prompts", tiny_pair.harmful, "--out", tmp_path / "run"
    )
    assert "model.layers.1.mlp.up_proj.weight holds 1 NaN" in line


def test_a_model_without_a_chat_template_gets_the_stated_plain_one(tiny_pair, tmp_path):
    bare = tiny_llama_folder(tmp_path / "bare", chat_template=None)
    result = done(
        "find",
        "importance",
        "--model",
        bare,
        "--prompts",
        tiny_pair.harmful,
        "--sites",
        "down",
        "--out",
        tmp_path / "auto",
    )
    assert result["prompts"]["used"] == 9
    other = done(
        *("find", "importance", "--model", bare, "--prompts", tiny_pair.harmful, "--sites", "down"),
        "--template",
        "none",
        "--out",
        tmp_path / "none",
    )
    assert Scores.load(result["scores"]) != Scores.load(other["scores"])


def test_a_template_that_is_no_template_is_refused(tiny_pair, tmp_path):
    words = find(tiny_pair, tiny_pair.harmful, "--out", tmp_path / "run")
    assert "expected auto, none, tulu" in refused(*words, "--template", "alpaca", code=2)
    refused(*words, "--template", file(tmp_path, "bad.jinja", "{% for %}"))
    refused(*words, "--template", file(tmp_path, "nothing.jinja", ""))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_gpu_asked_and_absent_is_said(tiny_pair, tmp_path):
    line = refused(*find(tiny_pair, tiny_pair.harmful, "--device", "cuda", "--out", tmp_path / "run"))
    assert "0 CUDA devices" in line
    assert "--device cpu" in line
    assert not (tmp_path / "run").exists()
    refused(*find(tiny_pair, tiny_pair.harmful, "--device", "toaster", "--out", tmp_path / "run"), code=2)


def test_an_output_that_cannot_be_written_is_found_before_a_model_is_loaded(tiny_pair, tmp_path, monkeypatch):
    monkeypatch.setattr("safety_neurons.model.load_pair", lambda *_, **__: pytest.fail("a model was loaded"))
    blocked = file(tmp_path, "file", "not a folder")
    line = refused(*find(tiny_pair, tiny_pair.harmful, "--out", blocked / "run"))
    assert "--out" in line or "writable" in line
    assert blocked.read_text(encoding="utf-8") == "not a folder"
    refused(*find(tiny_pair, tiny_pair.harmful, "--out", blocked))
    if os.geteuid():
        closed = tmp_path / "closed"
        closed.mkdir(mode=0o500)
        assert "writable" in refused(*find(tiny_pair, tiny_pair.harmful, "--out", closed / "run"))


LONG = "n" * 300


@pytest.mark.parametrize("option", ["--prompts", "--model", "--template", "--out"])
def test_a_path_that_the_system_will_not_look_at_is_said_in_one_line(option, tiny_pair, tmp_path):
    given = {
        "--model": tiny_pair.plain,
        "--prompts": tiny_pair.harmful,
        "--template": "auto",
        "--out": tmp_path,
    }
    said = refused("find", "importance", *(word for pair in {**given, option: LONG}.items() for word in pair))
    assert "nnn' (File name too long); expected a path that can be read or written" in said
    assert len(said) < 300


def test_a_folder_that_is_not_to_be_looked_into_is_said_in_one_line(tiny_pair, tmp_path):
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o600)

    def asked():
        if not os.getuid():
            os.seteuid(65534)  # The superuser may look into every folder.
        return command("find", "importance", "--model", tiny_pair.plain, "--prompts", closed / "p.txt").err

    said = forked(asked)
    assert said.count("\n") == 1
    assert "p.txt' (Permission denied); expected" in said


def test_a_model_that_is_not_there_is_named(tiny_pair, tmp_path):
    words = ["find", "importance", "--prompts", tiny_pair.harmful, "--offline", "--out", tmp_path / "run"]
    assert "no such folder" in refused(*words, "--model", tmp_path / "nowhere")
    assert "write BASE+" in refused(*words, "--model", tiny_pair.folder / "dpo")
    assert "pickle" in refused(*words, "--model", _pickled(tiny_pair, tmp_path))
    assert "org/none" in refused(*words, "--model", "org/none")
    assert "no-such" in refused(*words, "--model", "organism:no-such")
    refused(*words, "--model", "", code=2)


def _pickled(pair, folder):
    copy = folder / "pickled"
    shutil.copytree(pair.plain, copy)
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    return copy


def test_a_failed_command_keeps_what_an_earlier_one_wrote(tiny_pair, tmp_path):
    first = done(*find(tiny_pair, tiny_pair.harmful, "--out", tmp_path / "run"))
    before = {path: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    refused(*find(tiny_pair, file(tmp_path, "empty.txt", ""), "--out", tmp_path / "run", "--overwrite"))
    refused(
        *find(tiny_pair, tiny_pair.harmful, "--sites", "x", "--out", tmp_path / "run", "--overwrite"), code=2
    )
    assert {path: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before
    assert pathlib.Path(first["neurons"]).exists()


def test_a_folder_of_ones_own_survives_a_failed_run(tiny_pair, tmp_path):
    mine = tmp_path / "mine"
    mine.mkdir()
    refused(*find(tiny_pair, file(tmp_path, "empty.txt", ""), "--out", mine))
    assert mine.is_dir()
    assert list(mine.iterdir()) == []
    done(*find(tiny_pair, tiny_pair.harmful, "--out", mine))


def test_adapters_of_two_types_are_refused_with_the_way_out(tiny_pair, tmp_path):
    from tiny import tiny_adapter_folder

    lora = tiny_adapter_folder(pathlib.Path(tiny_pair.plain), tmp_path / "lora", seed=1, kind="lora")
    words = [
        "find",
        "importance",
        "--prompts",
        tiny_pair.harmful,
        "--sites",
        "down",
        "--model",
        f"{tiny_pair.base}+{lora}",
    ]
    assert "--merge-adapters" in refused(*words, "--out", tmp_path / "run", code=2)
    done(*words, "--merge-adapters", "--out", tmp_path / "run")


def test_a_tokenizer_that_does_not_belong_to_the_model_is_said(tiny_pair, tmp_path):
    small = tiny_llama_folder(tmp_path / "small", vocab_size=20)
    tiny_tokenizer(CHAT_TEMPLATE).save_pretrained(small)
    line = refused(
        "find", "importance", "--model", small, "--prompts", tiny_pair.harmful, "--out", tmp_path / "run"
    )
    assert "20 embeddings" in line
