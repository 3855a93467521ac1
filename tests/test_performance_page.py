"""docs/performance.md against the committed records of its measurements."""

import importlib.util
import pathlib
import re

ROOT = pathlib.Path(__file__).resolve().parents[1]


def test_measured_rows_of_the_page_are_those_of_the_records_and_no_peer_is_left_out(monkeypatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    spec = importlib.util.spec_from_file_location("benchmark_tables", ROOT / "benchmarks" / "run.py")
    run = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(run)
    own = set(run.table(run.RESULTS).splitlines()[2:])
    peers = set(run.table(run.RESULTS / "peers", run.PEERS).splitlines()[2:])
    page = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8").splitlines()
    measured = {line for line in page if re.search(r" \| -?\d\S* \[.*\] .*\| \d+ \| \d+\.\d \|$", line)}
    assert len(measured) > 40
    assert peers
    assert peers <= measured <= own | peers
