"""analyze tax from the command line: files, figure and numbers that agree with one another, and what is
refused.
"""

import pathlib

import pytest
from running import command, done

from safety_neurons.neurons import NeuronSet, Scores
from safety_neurons.results import Completions
from tiny import tiny_adapter_folder


@pytest.fixture(scope="module")
def arguments(tiny_pair):
    adapters = [
        tiny_adapter_folder(tiny_pair.plain, tiny_pair.folder / name, seed=seed)
        for name, seed in (("kind", 4), ("other", 5))
    ]
    kind, other = (f"{tiny_pair.base}+{adapter}" for adapter in adapters)
    models = [
        "--base",
        tiny_pair.base,
        "--safety",
        tiny_pair.aligned,
        "--helpful",
        kind,
        "--control",
        f"other={other}",
    ]
    lists = ["--prompts", tiny_pair.harmful, "--also", tiny_pair.harmless, *tiny_pair.measured_on]
    return [
        "analyze",
        "tax",
        *models,
        *lists,
        "--top",
        "0.4",
        "--random",
        "1",
        "--max-new-tokens",
        "4",
        "--helpfulness",
        "answered",
    ]


@pytest.fixture(scope="module")
def result(arguments, tmp_path_factory):
    out = tmp_path_factory.mktemp("tax") / "run"
    return done(*arguments, "--out", out)


def test_every_pair_of_trainings_is_there_and_files_hold_what_is_said(result):
    assert [each["pair"] for each in result["relations"]] == [
        ["safety", "helpful"],
        ["safety", "other"],
        ["helpful", "other"],
    ]
    scores = {name: Scores.load(result["files"][f"scores_{name}"]) for name in ("safety", "helpful", "other")}
    shared = NeuronSet.load(result["files"]["shared"])
    assert shared == scores["safety"].top(0.4) & scores["helpful"].top(0.4)
    assert len(shared) == result["n_shared"] == result["relations"][0]["overlap"]["value"]
    for each in result["relations"]:
        first, second = (scores[name] for name in each["pair"])
        assert each["spearman"]["all"]["value"] == pytest.approx(first.rank_correlation(second), abs=1e-6)
        assert each["overlap"]["value"] == len(first.top(0.4) & second.top(0.4))


def test_both_directions_are_measured_and_the_figure_is_drawn(result):
    assert [(each["receiver"], each["donor"]) for each in result["cross_patching"]] == [
        ("safety", "helpful"),
        ("helpful", "safety"),
    ]
    answers = Completions.load(result["completions"])
    assert len(result["arms"]) == 6
    assert set(answers.arms) == {
        f"{arm['arm']}/{kind}" for arm in result["arms"] for kind in ("harmful", "harmless")
    }
    figure = pathlib.Path(result["figure"]).read_text(encoding="utf-8")
    assert figure.startswith("<svg")
    assert all(f">{arm['arm']}<" in figure for arm in result["arms"] if "random" not in arm["arm"])


@pytest.mark.parametrize(
    ("extra", "told"),
    [
        (["--control", "nothing"], "NAME=MODEL"),
        (["--control", "safety=x"], "no other training"),
        (["--top", "0"], "expected above 0"),
    ],
)
def test_what_cannot_be_meant_is_refused_before_anything_is_loaded(arguments, extra, told, tmp_path):
    outcome = command(*arguments, *extra, "--out", tmp_path / "run", "--json")
    assert outcome.code == 2
    assert told in outcome.json["error"]
