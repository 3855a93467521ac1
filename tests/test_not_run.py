"""The line at the end of a run of the suite, and waits that end."""

import ast
import pathlib
import re

import pytest

import waiting
from not_run import not_run

HERE = pathlib.Path(__file__).parent
MEANINGLESS_HERE = (
    "there is a GPU here",
    "this transformers has the experts interface",
    "limits on the size of a file are set the way of POSIX",
    "lm-evaluation-harness is installed",
    "the superuser may write anywhere",
    "one shared pair is enough",
    "transformers 4 has no experts interface",
    "transformers 4 cannot make this model",
    "this build of torch makes no stream on this machine, so no cache is off-loaded",
)
"""Reasons that no installation changes."""


def test_what_was_not_run_is_counted_by_what_it_lacks():
    line = not_run(
        ["Skipped: no chromium is installed"] * 2
        + ["Skipped: inspect_ai is not installed", "Skipped: there is a GPU here"]
    )
    assert line == (
        "not run: 3 tests: 2 for want of a browser (install chromium), 1 for want of inspect_ai (pip "
        "install -e '.[inspect]')"
    )
    assert not_run(["Skipped: there is a GPU here"]) == ""


def test_every_reason_to_skip_is_known():
    found = {}
    for path in sorted(HERE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and re.search(r"\.skip$|skipif$", ast.unparse(node.func)):
                told = [*node.args, *(keyword.value for keyword in node.keywords if keyword.arg == "reason")]
                texts = [
                    part.value for each in told for part in ast.walk(each) if isinstance(part, ast.Constant)
                ]
                for text in (text for text in texts if isinstance(text, str) and " " in text):
                    found.setdefault(text, path.name)
    assert found
    unknown = {
        text: name for text, name in found.items() if text not in MEANINGLESS_HERE and not not_run([text])
    }
    assert not unknown, "say in not_run.py what it lacks and how to get it"


def test_a_wait_gives_what_happened_and_names_what_never_does(monkeypatch):
    seen = iter([0, "", "there"])
    assert waiting.until(lambda: next(seen)) == "there"
    monkeypatch.setattr(waiting, "HANG", 0.0)
    with pytest.raises(AssertionError, match="the answer never happened"):
        waiting.until(lambda: False, "the answer")
