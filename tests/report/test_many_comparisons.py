"""Tables of many comparisons: in the terminal, in a report and in a notebook the caption says that the family-wise rate is held."""

import copy
import dataclasses
import json

import guard_runs
import pytest
import report_runs

from safety_neurons.cli import analyze_effects, compare, guard, verify
from safety_neurons.report import read_runs
from safety_neurons.report.analyses import progressive_part
from safety_neurons.report.guards import baselines_table, counts_table, slices_table
from safety_neurons.report.parts import methods_table, patch_parts
from safety_neurons.results import comparisons, holm_in, paired_difference
from safety_neurons.studies import notebook

UNDEFINED = {"value": None, "why": "not measured"}
HELD = "comparisons the family-wise rate is held (Holm)"
POINT = {"n_neurons": 5, "step": "5", "harmful_refused": None, "harmless_refused": None, "perplexity": None, "divergence": None}


def many(result, name):
    """The result with twelve rows under a name, each with its differences, and what is clear of these held together."""
    result = copy.deepcopy(result)
    result[name] = holm_in([*result[name]] * 12)
    assert len(list(comparisons(result[name]))) > 10
    return result


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    root = tmp_path_factory.mktemp("families")
    made = {
        "patch": report_runs.patch_run(root / "patch", "contrast", (0.1, 0.9), n=20),
        "compare": report_runs.compare_run(root / "compare", (0.1, 0.9), n=20),
        "guard": guard_runs.evaluate_run(root / "guard", n=30),
    }
    return {name: read_runs([folder])[0] for name, folder in made.items()}


def with_result(run, result):
    """The run as it would be read had it found this."""
    return dataclasses.replace(run, record={**run.record, "result": result})


def captions(*tables):
    return "\n".join(str(table.caption) for table in tables)


def told(capsys, show, result):
    show(result)
    return " ".join(capsys.readouterr().out.split())


def test_a_sweep_of_sizes(runs, capsys):
    result = many(runs["patch"].result, "sizes")
    assert HELD in told(capsys, verify.show, result)
    assert HELD in notebook.verification_table(result)
    parts = patch_parts([with_result(runs["patch"], result)], [])
    assert HELD in captions(*parts[0].tables, *parts[0].details)
    assert HELD not in notebook.verification_table(runs["patch"].result) + told(capsys, verify.show, runs["patch"].result)


def test_methods_side_by_side(runs, capsys):
    result = {**many(runs["compare"].result, "methods"), "ceiling_why": None, "ceiling_by_parameters_effect": UNDEFINED}
    assert HELD in told(capsys, compare.show, result)
    assert HELD in notebook.comparison_table(result)
    assert HELD in captions(methods_table(with_result(runs["compare"], result)))


def test_a_guard_slice_by_slice_beside_its_baselines_and_by_number_of_neurons(runs, capsys):
    plain = runs["guard"].result
    result = many(many(plain, "baselines"), "lengths")
    difference = paired_difference([1] * 7 + [0] * 33, [0] * 40).to_json()
    result["counts"] = holm_in(
        [{"method": "contrast", "count": n, "setting": "x", "auroc": 0.9, "random": [0.8]} | {"difference": difference} for n in range(12)]
    )
    assert HELD in captions(slices_table("By length", result["lengths"]))
    assert HELD in captions(baselines_table(result))
    assert HELD in captions(counts_table(result["counts"]))
    assert HELD in notebook.guard_table(result)
    for part in ({"baselines": result["baselines"]}, {"lengths": result["lengths"]}, {"counts": result["counts"]}):
        lone = {**plain, "tables": {}, "leave_out": {}, "outputs": None, "counts": [], "lengths": [], **part}
        assert HELD in told(capsys, guard.show_worth, lone), part.keys()


def test_a_set_that_is_switched_off_bit_by_bit(runs, capsys):
    rate = {"value": 0.5, "low": 0.3, "high": 0.7, "n": 20, "unscored": 0}
    change = paired_difference([0] * 20, [1] * 20).to_json()
    point = {**POINT, "harmful_refused": rate, "harmless_refused": rate, "change": change}
    curves = holm_in([{"order": "by score", "points": [point] * 12, "neurons_for_half": 5}])
    result = {"n_neurons": 5, "untreated": point, "curves": curves, "random": {}}
    assert HELD in told(capsys, analyze_effects.show_progressive, result)
    part = progressive_part(with_result(runs["patch"], json.loads(json.dumps(result))))
    assert HELD in captions(*part.tables, *part.details)
