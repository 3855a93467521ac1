"""Interrupted commands: wherever it happens, one line says what is true of what was written, and where."""

import importlib
import json
import os
import signal
import subprocess
import sys

import pytest
from running import command, done, record

from safety_neurons import model, report
from safety_neurons.cli import runs, session, verb
from safety_neurons.detectors import runner
from safety_neurons.model import gguf
from safety_neurons.results import Checkpoint, RunFolder

NOTHING = "interrupted: nothing was written"
CONTINUES = "interrupted: nothing finished is lost; the same command with --out {} continues"
FINISHED = "interrupted: the run is finished, and whole in {}"
PLACES = {
    "while the command is read": (verb.Page, "parse_args", False, NOTHING),
    "while options are checked": (session.Common, "check", False, NOTHING),
    "while inputs are hashed": (session, "inputs_of", False, NOTHING),
    "when the folder is made": (RunFolder, "_make", True, NOTHING),
    "when the record is written": (RunFolder, "_begin", True, CONTINUES),
    "while a model is loaded": (model, "load", False, NOTHING),
    "at work": (runner.Stream, "save", True, CONTINUES),
    "before the result is written": (RunFolder, "finish", False, CONTINUES),
    "when the result is written": (RunFolder, "_remove", True, FINISHED),
    "while the result is shown": (session.Session, "_show", False, FINISHED),
}


def interrupted(monkeypatch, owner, name, after=False, at=1):
    """A function that is interrupted: before or after it does its work, at which of its calls."""
    work, calls = getattr(owner, name), []

    def stopped(*args, **options):
        calls.append(name)
        if len(calls) == at and not after:
            raise KeyboardInterrupt
        found = work(*args, **options)
        if len(calls) == at:
            raise KeyboardInterrupt
        return found

    monkeypatch.setattr(owner, name, stopped)


def find(pair, out):
    prompts = ["--prompts", pair.harmful, "--limit", "4", "--batch-size", "2", "--top", "0.1"]
    return ["find", "importance", "--model", pair.plain, *prompts, "--out", out]


def said(monkeypatch, words, *place, **how):
    """The one line of an interrupted command."""
    with monkeypatch.context() as patched:
        patched.setattr(Checkpoint, "due", True)
        interrupted(patched, *place, **how)
        outcome = command(*words)
    assert outcome.code == 130
    if "--json" in words:
        assert outcome.err == ""
        assert outcome.json["exit_code"] == 130
        return outcome.json["error"]
    [line] = [line for line in outcome.err.splitlines() if not line.startswith("this run is finished")]
    return line.removeprefix("safety-neurons: ")


@pytest.mark.parametrize("form", [[], ["--json"]], ids=["line", "json"])
@pytest.mark.parametrize("when", PLACES)
def test_an_interrupted_run_says_what_there_is_of_it(when, form, tiny_pair, tmp_path, monkeypatch):
    if (when, form) == ("while the result is shown", ["--json"]):
        return  # of which there is nothing to show
    out = tmp_path / "run"
    owner, name, after, expected = PLACES[when]
    assert said(monkeypatch, [*find(tiny_pair, out), *form], owner, name, after) == expected.format(out)
    there = record(out)["status"] if (out / "run.json").exists() else None
    assert there == {NOTHING: None, CONTINUES: "running", FINISHED: "finished"}[expected]
    assert not out.exists() or expected != NOTHING or not any(out.glob("*"))
    assert done(*find(tiny_pair, out))["n_neurons"]


def test_a_run_that_goes_on_keeps_what_it_had_when_it_is_interrupted_before_any_work(
    tiny_pair, tmp_path, monkeypatch
):
    words = find(tiny_pair, tmp_path / "run")
    said(monkeypatch, words, runner.Stream, "save", True)
    assert said(monkeypatch, words, model, "load") == CONTINUES.format(tmp_path / "run")
    assert any((tmp_path / "run" / "checkpoints").iterdir())


@pytest.mark.parametrize("form", [[], ["--json"]], ids=["line", "json"])
def test_a_second_interruption_changes_nothing_of_what_is_said(form, tiny_pair, tmp_path, monkeypatch):
    """A terminal and a launcher each send one."""
    left = session.Session.left

    def again(self):
        os.kill(os.getpid(), signal.SIGINT)
        return left(self)

    monkeypatch.setattr(session.Session, "left", again)
    handler, words = signal.default_int_handler, [*find(tiny_pair, tmp_path / "run"), *form]
    before = signal.signal(signal.SIGINT, handler)  # A shell may have started this process with none.
    try:
        assert said(monkeypatch, words, runner.Stream, "save", True) == CONTINUES.format(tmp_path / "run")
        assert signal.getsignal(signal.SIGINT) is handler
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.fixture
def whole(tiny_pair, tmp_path, monkeypatch):
    """Commands of two searches: a recipe's and the demo's, both into `run`."""
    recipe, out = tmp_path / "two.json", tmp_path / "run"
    arguments = {"model": tiny_pair.plain, "prompts": tiny_pair.harmful, "limit": 4, "batch_size": "2"}
    steps = [{"name": name, "verb": "find-importance", "arguments": arguments} for name in ("a", "b")]
    recipe.write_text(json.dumps({"steps": steps}), encoding="utf-8")
    told = [(name, find(tiny_pair, out / name)) for name in ("a", "b")]
    monkeypatch.setattr(runs, "chapters", lambda *_, **__: [(one, [*map(str, line)]) for one, line in told])
    return {"recipe": ["run", recipe, "--out", out], "demo": ["demo", "--out", out]}, out


@pytest.mark.parametrize("form", [[], ["--json"]], ids=["line", "json"])
@pytest.mark.parametrize("which", ["recipe", "demo"])
def test_a_command_of_several_names_its_own_folder_and_not_that_of_a_step(which, form, whole, monkeypatch):
    commands, out = whole
    words = [*commands[which], *form]
    assert said(monkeypatch, words, model, "load") == NOTHING
    assert not out.exists()
    assert said(monkeypatch, words, model, "load", at=2) == CONTINUES.format(out)
    assert record(out / "a")["status"] == "finished"
    assert said(monkeypatch, words, runner.Stream, "save", after=True) == CONTINUES.format(out)
    assert record(out / "b")["status"] == "running"


def test_a_repeated_run_names_the_folder_of_the_run(tiny_pair, tmp_path, monkeypatch):
    arguments = {"model": tiny_pair.plain, "prompts": tiny_pair.harmful, "limit": 4, "batch_size": "2"}
    recipe = tmp_path / "one.json"
    recipe.write_text(json.dumps({"verb": "find-importance", "arguments": arguments}), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    words = ["run", recipe]
    assert said(monkeypatch, words, model, "load") == NOTHING
    line = said(monkeypatch, words, runner.Stream, "save", True)
    [folder] = (tmp_path / "runs").iterdir()
    assert line == CONTINUES.format(f"runs/{folder.name}")
    assert done(*words, "--out", folder)["run"] == str(folder)


def test_what_keeps_no_run_says_what_it_leaves(tmp_path, monkeypatch):
    language = importlib.import_module("safety_neurons.organism.language")  # a function has its name
    requests = ["organism", "requests", "--out", tmp_path / "requests"]
    assert said(monkeypatch, requests, language, "write_bytes") == NOTHING
    line = said(monkeypatch, requests, language, "write_bytes", after=True)
    assert line == f"interrupted: what was written is in {tmp_path / 'requests'}"
    page = tmp_path / "page.html"
    page.write_text("as it was")
    words = ["report", tmp_path, "--out", page]
    assert said(monkeypatch, words, report, "write_report") == NOTHING
    line = said(monkeypatch, ["data", "models", "smollm2-135m-instruct"], gguf, "packaged")
    assert line == "interrupted: what was fetched is kept; the same command goes on"


@pytest.mark.parametrize("form", [[], ["--json"]], ids=["line", "json"])
def test_a_command_that_is_interrupted_before_it_is_there_says_so(form):
    program = f"""
import builtins, sys
own = builtins.__import__
def stopped(name, *rest):
    if name == "safety_neurons.cli.verb":
        raise KeyboardInterrupt
    return own(name, *rest)
builtins.__import__ = stopped
from safety_neurons.cli import main
sys.argv = ["safety-neurons", "find", *{form}]
main()
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert ended.returncode == 130
    if form:
        assert (json.loads(ended.stdout), ended.stderr) == ({"error": NOTHING, "exit_code": 130}, "")
    else:
        assert (ended.stdout, ended.stderr) == ("", f"safety-neurons: {NOTHING}\n")
