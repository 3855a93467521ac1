"""Methods: one declaration is all that find, compare, their help, their resume and a report know of a
method.
"""

import dataclasses
import json

import numpy as np
import pytest
from running import command, done, record

from safety_neurons.cli.verb import DECLARED
from safety_neurons.declarations import Count
from safety_neurons.detectors import METHODS, Method, PromptCounts, Scored, register
from safety_neurons.detectors.rules import Ranked
from safety_neurons.errors import UsageError


@pytest.fixture
def own():
    @register
    @dataclasses.dataclass(frozen=True)
    class Position(Method, Ranked):
        """Where a neuron stands in its matrix: a method of one's own."""

        NAME = "position"
        PANEL = None
        start: Count = 0
        """Number of the first."""

        def score(self, run):
            return Scored(
                {key: (self.start + np.arange(size)).astype(float) for key, size in run.sizes.items()},
                PromptCounts(len(run.prompts)),
            )

    known = dict(DECLARED)
    yield Position
    del METHODS["position"]
    DECLARED.clear()
    DECLARED.update(known)


def test_a_method_is_one_class_of_ten_lines(own, tiny_pair, tmp_path):
    words = ["--model", tiny_pair.aligned, "--prompts", tiny_pair.harmful, "--sites", "down", "--count", 3]
    found = done("find", "position", *words, "--start", 7, "--out", tmp_path / "run")
    assert (found["n_neurons"], found["method"]) == (3, "position")
    assert record(tmp_path / "run")["arguments"]["start"] == 7
    assert "Number of the first." in command("find", "position", "--help").out
    assert "Where a neuron stands" in command("find", "--help").out
    assert command("find", "position", *words, "--start", "-1").code == 2
    assert (
        "holds a run with start '7', not '8'"
        in command("find", "position", *words, "--start", 8, "--out", tmp_path / "run").err
    )
    assert json.dumps(
        done("find", "position", *words, "--start", 7, "--out", tmp_path / "run")
    ) == json.dumps(found)


def test_compare_and_a_report_know_it(own, tiny_pair, tmp_path):
    pair = [
        "--base",
        tiny_pair.base,
        "--aligned",
        tiny_pair.aligned,
        "--harmful",
        tiny_pair.harmful,
        "--harmless",
        tiny_pair.harmless,
    ]
    more = [
        "--prompts",
        tiny_pair.harmful,
        "--find-harmless",
        tiny_pair.harmless,
        "--random",
        0,
        "--max-new-tokens",
        2,
        "--limit",
        2,
    ]
    rows = done("compare", *pair, *more, "--methods", "position", "--out", tmp_path / "run")["methods"]
    assert [row["method"] for row in rows] == ["position"]
    assert command("report", tmp_path / "run", "--out", tmp_path / "report.html").code == 0
    assert "position" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_a_name_is_given_once(own):
    with pytest.raises(UsageError, match="registered already"):
        register(dataclasses.make_dataclass("Other", [], bases=(own,), frozen=True))
