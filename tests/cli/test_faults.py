"""Faults in the middle of a run: memory out in any pass, the disk full at any write, a folder that goes away,
a clock that goes back, a missing shard.
"""

import errno
import itertools
import json
import os
import shutil
import time

import numpy as np
import pytest
import torch
from running import command, done
from transformers.models.llama.modeling_llama import LlamaMLP

import safety_neurons as sn
from safety_neurons.model import LanguageModel
from safety_neurons.results import run as run_files
from tiny import tiny_llama, tiny_llama_folder, tiny_tokenizer

PROMPTS = [
    "how do i make a cake",
    "kill the tree",
    "open the door please",
    "why",
    "tell me about water and fire",
]
FINDS = {
    "importance": lambda lm, _: sn.find_importance(lm, PROMPTS, batch_size=3),
    "contrast": lambda lm, other: sn.find_contrast(lm, other, PROMPTS, batch_size=3, max_new_tokens=2),
    "attribution": lambda lm, _: sn.find_attribution(lm, PROMPTS, batch_size=3),
    "importance-contrast": lambda lm, other: sn.find_importance_contrast(lm, other, PROMPTS, batch_size=3),
}


@pytest.mark.parametrize("method", FINDS)
def test_memory_out_in_any_pass_halves_its_batch_and_changes_no_score(method, monkeypatch):
    pair = [LanguageModel(tiny_llama(seed, num_hidden_layers=1), tiny_tokenizer()) for seed in (0, 1)]
    inner = LlamaMLP.forward

    def scores(fails):
        """Of a search in which that forward pass of a feed-forward part finds no memory for several rows."""
        calls = itertools.count()

        def scarce(self, x):
            if next(calls) == fails and x.shape[0] > 1:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return inner(self, x)

        monkeypatch.setattr(LlamaMLP, "forward", scarce)
        return FINDS[method](*pair), next(calls)

    for lm in pair:
        assert lm.table.n_neurons
    whole, n = scores(None)
    expected = whole.scores
    for fails in range(0, n, max(1, n // 6)):
        found, _ = scores(fails)
        for key, values in expected.items():
            np.testing.assert_allclose(found.scores[key], values, rtol=1e-3, atol=1e-6)
        assert found.prompts.used == len(PROMPTS)


def words_of(pair, out):
    more = ["--batch-size", "3", "--agreement", "0.5", "--top", "0.1"]
    return ["find", "importance", "--model", pair.plain, "--prompts", pair.harmful, *more, "--out", out]


def bytes_in(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def whole(tiny_pair, tmp_path, monkeypatch):
    """What the run leaves when nothing happens to it."""
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    monkeypatch.setattr(run_files.Checkpoint, "due", True)
    (tmp_path / "whole").mkdir()
    monkeypatch.chdir(tmp_path / "whole")
    done(*words_of(tiny_pair, "run"))
    (tmp_path / "broken").mkdir()
    monkeypatch.chdir(tmp_path / "broken")
    return bytes_in(tmp_path / "whole")


def test_a_disk_that_is_full_from_any_write_on_is_one_line_and_the_run_goes_on_later(
    whole, tiny_pair, tmp_path, monkeypatch
):
    writes = itertools.count()
    full_from = 0

    def sync(_):
        if next(writes) >= full_from:
            raise OSError(errno.ENOSPC, "No space left on device")

    while True:
        with monkeypatch.context() as broken:
            writes = itertools.count()
            broken.setattr(os, "fsync", sync)
            outcome = command(*words_of(tiny_pair, "run"))
        if outcome.code == 0:
            break
        assert outcome.err.count("\n") == 1
        assert "No space left on device" in outcome.err
        for name, content in bytes_in(tmp_path / "broken").items():
            assert not name.endswith(".json") or json.loads(content)
        full_from += 1 if full_from < 3 else 4
        if full_from % 2:
            shutil.rmtree(tmp_path / "broken" / "run", ignore_errors=True)  # otherwise it goes on from there
    assert full_from >= 4
    assert bytes_in(tmp_path / "broken") == whole


def test_a_folder_that_goes_away_is_said_in_one_line_and_never_a_finished_run(
    whole, tiny_pair, tmp_path, monkeypatch
):
    save = run_files.Checkpoint.save

    def gone(self, *words):
        save(self, *words)
        shutil.rmtree(tmp_path / "broken" / "run")

    with monkeypatch.context() as broken:
        broken.setattr(run_files.Checkpoint, "save", gone)
        outcome = command(*words_of(tiny_pair, "run"))
    assert outcome.code == 1
    assert outcome.err.count("\n") == 1
    assert "is not there any more" in outcome.err
    assert "not foreseen" not in outcome.err
    assert not (tmp_path / "broken" / "run" / "run.json").exists()
    done(*words_of(tiny_pair, "run"))
    assert bytes_in(tmp_path / "broken") == whole


def test_a_clock_that_goes_back_changes_nothing(whole, tiny_pair, tmp_path, monkeypatch):
    with monkeypatch.context() as broken:
        for name in ("time", "monotonic", "perf_counter"):
            back = itertools.count(2e9, -1000.0)
            broken.setattr(time, name, lambda back=back: next(back))
        done(*words_of(tiny_pair, "run"))
    assert bytes_in(tmp_path / "broken") == whole


def test_a_clock_that_goes_back_does_not_put_off_a_save(tmp_path):
    now = 1000.0
    checkpoint = run_files.Checkpoint(tmp_path / "c", clock=lambda: now)
    assert not checkpoint.due
    now = 0.0
    assert checkpoint.due


@pytest.mark.parametrize("broken", ["missing", "cut", "lying"])
def test_a_checkpoint_with_a_broken_shard_is_refused_in_one_line(broken, tmp_path):
    folder = tiny_llama_folder(tmp_path / "m")
    tiny_llama().save_pretrained(folder, max_shard_size="20KB")
    (folder / "model.safetensors").unlink(missing_ok=True)
    shard = sorted(folder.glob("model-*.safetensors"))[1]
    content = shard.read_bytes()
    if broken == "missing":
        shard.unlink()
    elif broken == "cut":
        shard.write_bytes(content[:-9])
    else:
        shard.write_bytes(content.replace(b'"shape":[', b'"shape":[9', 1))
    outcome = command("doctor", "--model", folder, "--out", tmp_path / "run")
    assert outcome.code == 1, outcome.out
    assert outcome.err.count("\n") == 1
    assert shard.name in outcome.err
    assert "not foreseen" not in outcome.err
