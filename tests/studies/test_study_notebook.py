"""Results of studies in a notebook: every arm with the numbers of its record."""

import pathlib
import sys

import pytest

from safety_neurons.judges import Judgement, JudgeVerdict
from safety_neurons.results import Completions, Rate, read_json
from safety_neurons.studies import Examination, notebook
from safety_neurons.studies.examination import Check

sys.path.append(str(pathlib.Path(__file__).parents[1] / "report"))
import report_runs


@pytest.mark.parametrize(
    ("make", "shown"),
    [
        (lambda folder: report_runs.patch_run(folder, "contrast", (0.1, 0.9), n=20), notebook.verification_table),
        (lambda folder: report_runs.deactivate_run(folder, "contrast", n=20), notebook.verification_table),
        (lambda folder: report_runs.compare_run(folder, (0.1, 0.9), (0.0, 0.5), n=20), notebook.comparison_table),
        (lambda folder: report_runs.tune_run(folder, "importance", n=20), notebook.tuning_table),
        (report_runs.doctor_run, notebook.examination_table),
    ],
)
def test_a_study_shows_the_rates_of_its_record(tmp_path, make, shown):
    record = read_json(make(tmp_path / "run") / "run.json")["result"]
    text = shown(record)
    for arm in (record.get(name) for name in ("untreated", "treated", "before", "after", "ceiling")):
        if arm:
            rate = arm["harmful_refused"]
            assert f"{rate['value']:.2f} [{rate['low']:.2f}, {rate['high']:.2f}]" in text
    for row in [*record.get("methods", []), *record.get("checks", [])]:
        assert str(row.get("method", row.get("check", ""))) in text
    assert "<script" not in text


def test_results_use_these_tables():
    examined = Examination("<b>m</b>", (Check("a", False, "x<script>"), Check("b", None, 0.5)))
    assert "FAIL" in examined._repr_html_()
    assert "<script" not in examined._repr_html_()
    assert "<b>" not in examined._repr_html_()
    judged = Judgement("own", (JudgeVerdict("unscored", None, None, "empty"),), Rate(None, None, None, 0, 1), Completions())
    assert "empty: 1" in judged._repr_html_()
