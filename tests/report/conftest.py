"""Pages and a browser for all tests of the report: made once."""

import json
import pathlib
import shutil
from collections.abc import Iterator

import headless
import pytest

import report_runs
from page_text import HALF, HOSTILE, Outline
from safety_neurons.report import write_report
from safety_neurons.results import Completion, Completions


@pytest.fixture(scope="session")
def browser() -> Iterator[headless.Browser]:
    """A Chromium; the test is skipped where none is installed."""
    if headless.installed() is None:
        pytest.skip("no chromium is installed")
    with headless.Browser() as opened:
        yield opened


@pytest.fixture(scope="session")
def story(tmp_path_factory) -> list[pathlib.Path]:
    """The runs of the demo, which nobody writes into."""
    return report_runs.story(tmp_path_factory.mktemp("story"), n=40)


@pytest.fixture(scope="session")
def page(story) -> pathlib.Path:
    return write_report(story, story[0].parent / "out", title="An organism")


@pytest.fixture(scope="session")
def outline(page) -> Outline:
    return Outline(page.read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def hostile(story, tmp_path_factory) -> pathlib.Path:
    root = tmp_path_factory.mktemp("hostile")
    runs = [shutil.copytree(run, root / run.name) for run in story]
    for run in runs:
        text = (run / "run.json").read_text(encoding="utf-8")
        (run / "run.json").write_text(text.replace(str(story[0].parent), str(root)), encoding="utf-8")
    verify = root / "verify-contrast"
    completions = list(Completions.load(verify / "completions.jsonl"))
    for place, text in enumerate([*HOSTILE, HALF, "long " * 200_000]):
        verdict = {"wording-1": {"label": text, "refused": True}}
        for arm in ("untreated/harmful", "treated 1638/harmful", f"{text[:200]}/harmful"):
            completions.insert(
                0, Completion(f"bad-{place}{text[:80]}", text, text, (), "stop", arm, 0, verdict)
            )
    Completions(completions).save(verify / "completions.jsonl")
    for run in runs:
        record = json.loads((run / "run.json").read_text())
        record["notes"] = list(HOSTILE)
        record["hashes"] = {text: text for text in HOSTILE}
        record["device"] = record["versions"]["torch"] = HOSTILE[0]
        record["arguments"]["system"] = " ".join(HOSTILE)
        for name in ("base", "aligned", "model"):
            if name in record["arguments"]:
                record["arguments"][name] = HOSTILE[1] + name + HOSTILE[8]
        for check in record["result"].get("checks", []):
            check["check"] = check["measured"] = HOSTILE[0]
        for row in record["result"].get("methods", []):
            row["method"] = HOSTILE[0] + row["method"] + HOSTILE[-1]
        (run / "run.json").write_text(json.dumps(record))
    return write_report(runs, root / "out.html", title=HOSTILE[0] + HOSTILE[8] + HALF)
