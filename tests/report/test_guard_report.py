"""The section on guards: its tables say what the evaluation says, also where a baseline wins."""

import json

import pytest

import guard_runs
from page_text import HOSTILE, Outline
from safety_neurons.display import findings_of, part_of
from safety_neurons.errors import InputError
from safety_neurons.report import read_runs, write_report


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    root = tmp_path_factory.mktemp("guard")
    return [guard_runs.fit_run(root / "fit"), guard_runs.evaluate_run(root / "evaluate")]


@pytest.fixture(scope="module")
def seen(runs):
    return Outline(write_report(runs, runs[0].parent / "r.html").read_text(encoding="utf-8"))


def test_the_guard_stands_beside_every_baseline_with_its_numbers(runs, seen):
    result = json.loads((runs[1] / "run.json").read_text())["result"]
    for entry in result["baselines"]:
        area, difference = entry["auroc"], entry["difference"]
        shown = f"{area['value']:.3f} [{area['low']:.3f}, {area['high']:.3f}]"
        assert f"{entry['name']} {shown}" in seen.text.replace("\u00a0", " ")
        assert f"{difference['value']:+.3f}".replace("-", "\u2212") in seen.text
    assert "Can a guard tell in advance?" in seen.text
    assert "too few safe requests for a rate of 1 %, 0.1 %" in seen.text.replace("\u00a0", " ")


def test_what_is_left_of_unsafe_outputs_and_how_many_neurons_it_takes_are_told(seen):
    text = seen.text.replace("\u00a0", " ")
    assert "the guard cuts 0.944 [0.924, 0.964]: from 0.900 [0.880, 0.920] to 0.050 [0.030, 0.070]" in text
    assert "contrast, 100 0.910 (0.820), better" in text


def test_a_baseline_that_wins_is_said_to_win(runs):
    said = [(finding.verdict, str(finding.text)) for finding in findings_of(read_runs(runs[1:])[0])]
    for verdict, name in (
        ("not shown", "TF-IDF words"),
        ("shown", "random neurons"),
        ("shown", "residual stream"),
    ):
        assert [each for each, text in said if name in text] == [verdict]


def test_operating_points_without_enough_prompts_have_no_threshold(seen):
    assert "Operating points" in seen.text
    assert "400 safe examples, 2,000 are needed" in seen.text
    assert "Too few safe prompts support a threshold for a false-positive rate of 1 %, 0.1 %." in seen.text


def test_curves_are_drawn_for_every_classifier_and_told_in_words(runs):
    figures = {
        str(figure.caption).partition("</b>")[0]: figure for figure in part_of(read_runs(runs[1:])[0]).figures
    }
    assert list(figures) == ["<b>Area under the ROC curve", "<b>ROC", "<b>Reliability", "<b>Probabilities"]
    for name in ("guard", "random neurons", "TF-IDF words", "residual stream"):
        assert name in figures["<b>ROC"].drawing
        assert name in figures["<b>ROC"].alternative
    assert "said 0." in figures["<b>Reliability"].alternative
    assert "unsafe requests: " in figures["<b>Probabilities"].alternative
    assert all(f">{tick}<" in figures["<b>ROC"].drawing for tick in ("0", "0.2", "1"))


def test_an_evaluation_whose_curves_are_gone_keeps_its_tables(tmp_path):
    run = guard_runs.evaluate_run(tmp_path / "evaluate", 30)
    (run / "curves.json").unlink()
    seen = Outline(write_report([run], tmp_path / "r.html").read_text(encoding="utf-8"))
    assert seen.tags["figure"] == 1
    assert "The guard beside what needs no safety neurons" in seen.text


def test_damaged_and_hostile_records_of_guards_do_no_harm(tmp_path, runs):
    record = json.loads((runs[1] / "run.json").read_text())
    (tmp_path / "run.json").write_text(json.dumps(record | {"result": {**record["result"], "baselines": 3}}))
    with pytest.raises(InputError, match="guard-evaluate"):
        write_report([tmp_path], tmp_path / "r.html")
    for entry in record["result"]["baselines"]:
        entry["name"] = HOSTILE[0] + HOSTILE[8]
    record["result"]["pooling"] = record["result"]["in_force"] = HOSTILE[2]
    (tmp_path / "run.json").write_text(json.dumps(record))
    text = write_report([tmp_path], tmp_path / "r.html").read_text(encoding="utf-8")
    assert "<script>document" not in text
    assert "\u202e" not in text
    assert not [name for name in Outline(text).attributes if name.startswith("on")]
