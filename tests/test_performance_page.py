"""docs/performance.md and docs/scale.md against the committed records of their measurements."""

import importlib.util
import json
import pathlib
import re

ROOT = pathlib.Path(__file__).resolve().parents[1]


def module_of(name: str):
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", ROOT / "benchmarks" / f"{name}.py")
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def test_plans_of_the_page_are_those_of_the_record():
    dry_run = module_of("dry_run")
    lines = dry_run.table(json.loads(dry_run.RESULT.read_text(encoding="utf-8"))["rows"])
    page = (ROOT / "docs" / "scale.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) >= 14
    models = tuple({line[: line.index("|", 2)] for line in lines})
    assert [line for line in page if line.startswith(models)] == lines


def test_measured_rows_of_the_page_are_those_of_the_records_and_no_peer_is_left_out(monkeypatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    run = module_of("run")
    own = set(run.table(run.RESULTS).splitlines()[2:])
    peers = set(run.table(run.RESULTS / "peers", run.PEERS).splitlines()[2:])
    page = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8").splitlines()
    measured = {line for line in page if re.search(r" \| -?\d\S* \[.*\] .*\| \d+ \| \d+\.\d \|$", line)}
    assert len(measured) > 40
    assert peers
    assert peers <= measured <= own | peers


def test_what_two_processes_save_is_what_was_measured():
    record = json.loads((ROOT / "benchmarks" / "results" / "processes.json").read_text(encoding="utf-8"))
    page = (ROOT / "docs" / "scale.md").read_text(encoding="utf-8")
    for row in record["rows"]:
        found = row["value"]
        assert f"| {found['median']:.3f} [{found['low']:.3f}, {found['high']:.3f}] | ≥ 1.6 |" in page


def test_how_time_grows_is_what_was_measured(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    scaling = module_of("scaling")
    record = json.loads((ROOT / "benchmarks" / "results" / "scaling.json").read_text(encoding="utf-8"))
    page = (ROOT / "docs" / "scale.md").read_text(encoding="utf-8").splitlines()
    works = tuple(f"| {work} |" for work in record["seconds"])
    assert [line for line in page if line.startswith(works) and " … " in line] == scaling.table(record)
    assert scaling.PAGE.read_text(encoding="utf-8") == scaling.figure(record)
