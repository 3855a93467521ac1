"""A killed find: the same command goes on behind the last finished batch and gives the same files."""

import collections
import os
import pathlib
import signal
import sys
import time

import pytest
from running import command, done, record

from forked import Forked
from safety_neurons import cli
from safety_neurons.detectors import runner
from safety_neurons.model import language_model
from safety_neurons.neurons import NeuronSet, Scores
from safety_neurons.results import run as run_files

METHODS = {
    "importance": ["--agreement", "0.5"],
    "attribution": [],
    "contrast": ["--max-new-tokens", "4"],
    "importance-contrast": ["--positions", "completion", "--max-new-tokens", "4", "--sites", "down,up"],
    "attribution-patching": ["--midpoints", "2"],
}


def words_of(method, pair, out):
    models = ["--model", pair.aligned] if method in ("importance", "attribution") else pair.models
    return [
        "find",
        method,
        *models,
        "--prompts",
        pair.harmful,
        "--batch-size",
        "2",
        *METHODS[method],
        "--top",
        "0.1",
        "--out",
        out,
    ]


def counted(monkeypatch, die_after=None):
    """Counts batches that are fed and batches of text that are written.

    Saves after each and dies right after a state was saved.
    """
    seen = collections.Counter()
    collate, save, write = runner.collate, runner.Stream.save, language_model._generate_rows

    def counting_collate(*args, **options):
        seen["fed"] += 1
        return collate(*args, **options)

    def counting_write(*args, **options):
        seen["written"] += 1
        return write(*args, **options)

    def saving(self):
        save(self)
        seen["saved"] += 1
        if seen["saved"] == die_after:
            raise MemoryError("killed here")

    monkeypatch.setattr(runner, "collate", counting_collate)
    monkeypatch.setattr(language_model, "_generate_rows", counting_write)
    monkeypatch.setattr(run_files.Checkpoint, "due", True)
    monkeypatch.setattr(runner.Stream, "save", saving)
    return seen


@pytest.mark.parametrize("method", METHODS)
def test_a_killed_find_does_no_finished_batch_again_and_gives_the_same(
    method, tiny_pair, tmp_path, monkeypatch
):
    with monkeypatch.context() as patched:
        whole = counted(patched)
        expected = done(*words_of(method, tiny_pair, tmp_path / "whole"))
    assert whole["fed"] == 5
    for die_after in {whole["saved"] - 2, 2 if method == "contrast" else whole["saved"] - 2}:
        folder = tmp_path / f"killed {die_after}"
        with monkeypatch.context() as patched:
            before = counted(patched, die_after)
            assert command(*words_of(method, tiny_pair, folder)).code == 1
        assert record(folder)["status"] == "running"
        assert (folder / "checkpoints").is_dir()
        with monkeypatch.context() as patched:
            after = counted(patched)
            result = done(*words_of(method, tiny_pair, folder))
        assert before["fed"] + after["fed"] == whole["fed"]
        assert before["written"] + after["written"] == whole["written"]
        assert Scores.load(result["scores"]) == Scores.load(expected["scores"])
        assert NeuronSet.load(result["neurons"]) == NeuronSet.load(expected["neurons"])
        assert result["prompts"] == expected["prompts"]
        assert not (folder / "checkpoints").exists()


def test_another_batch_size_in_the_same_folder_is_refused_and_loses_nothing(tiny_pair, tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        counted(patched, 2)
        assert command(*words_of("importance", tiny_pair, tmp_path / "run")).code == 1
    files = {path: path.read_bytes() for path in (tmp_path / "run" / "checkpoints").iterdir()}
    outcome = command(*words_of("importance", tiny_pair, tmp_path / "run"), "--batch-size", "3")
    assert outcome.code == 1
    assert "batch_size" in outcome.err
    assert {path: path.read_bytes() for path in (tmp_path / "run" / "checkpoints").iterdir()} == files


def test_a_process_that_is_killed_goes_on(tiny_pair, tmp_path, monkeypatch):
    words = words_of("importance", tiny_pair, tmp_path / "run")
    save = runner.Stream.save

    def saved(self):
        """Says so and waits, so that no signal falls elsewhere."""
        save(self)
        os.write(1, b"saved\n")
        while True:  # A signal that comes right before a wait without end is not noticed in it.
            time.sleep(0.01)

    def killed():
        monkeypatch.setattr(run_files.Checkpoint, "due", True)
        monkeypatch.setattr(runner.Stream, "save", saved)
        monkeypatch.setattr(sys, "argv", ["safety-neurons", *map(str, words)])
        cli.main()

    for kill, code in ((signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)):
        running = Forked(killed)
        assert running.out.readline() == "saved\n", running.ended()
        running.send(kill)
        out, err = running.ended()
        assert (running.code, out) == (code, "")
        if kill == signal.SIGINT:
            assert err.startswith("safety-neurons: interrupted: nothing finished is lost")
            assert err.count("\n") == 1
            assert str(tmp_path / "run") in err
    expected = done(*words_of("importance", tiny_pair, tmp_path / "whole"))
    result = done(*words)
    assert pathlib.Path(result["scores"]).parent == tmp_path / "run"
    assert Scores.load(result["scores"]) == Scores.load(expected["scores"])
    assert NeuronSet.load(result["neurons"]) == NeuronSet.load(expected["neurons"])
