"""Size of a report on 5,000 completions, and seconds until a real Chromium shows it.

Beside it what inlining a chart runtime would cost.

python benchmarks/report_cost.py --repetitions 7
"""

import os
import pathlib
import re
import sys
import tempfile
import time

import numpy as np
import vl_convert

from paired import Row, finish, median, parser

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "tests"))
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "tests" / "report"))
import headless

import report_runs
from safety_neurons.report import write_report
from safety_neurons.results import Completion, Completions

COMPLETIONS, ARMS = 5000, ("untreated", "treated 1638", "aligned", "ceiling", "random 0 of 1638")
TIMES = (
    "(() => { const t = performance.getEntriesByType('navigation')[0]; return [t.domInteractive, "
    "t.loadEventEnd]; })()"
)
PAINT = "(performance.getEntriesByName('first-contentful-paint')[0] || {}).startTime || 0"
SEARCH = """new Promise((done) => {
  const box = document.getElementById("query"), start = performance.now();
  box.value = "house number 77"; box.dispatchEvent(new Event("input"));
  const found = () => document.getElementById("status").textContent.startsWith("11 of");
  const look = () => (found() ? done(performance.now() - start) : setTimeout(look, 1));
  look();
})"""


def long_answers(run: pathlib.Path, words: int = 90) -> None:
    """Fills a run with 5,000 different answers of the length that a limit of 128 tokens gives."""
    generator = np.random.default_rng(0)
    text = np.array(
        [
            "the",
            "box",
            "door",
            "paint",
            "open",
            "first",
            "then",
            "take",
            "slowly",
            "house",
            "red",
            "number",
            "please",
            "step",
            "careful",
            "tool",
            "wall",
            "floor",
        ]
    )
    made = []
    for place in range(COMPLETIONS // len(ARMS)):
        prompt = f"Tell me how to break into house number {place}."
        for arm in ARMS:
            label = "full" if generator.random() < 0.5 else "compliance"
            verdict = {"wording-1": {"label": label, "refused": label == "full"}}
            answer = " ".join(generator.choice(text, words))
            made.append(
                Completion(f"harmful-{place:04d}", prompt, answer, (), "length", f"{arm}/harmful", 0, verdict)
            )
    Completions(made).save(run / "completions.jsonl")


def opened(browser: headless.Browser, page: pathlib.Path) -> tuple[float, float, float]:
    """Seconds until the first paint, until the page is loaded with its scripts run, and of one search."""
    browser.open(page)
    _, loaded = browser.ask(TIMES)
    return browser.ask(PAINT) / 1000, loaded / 1000, browser.ask(SEARCH) / 1000


def runtime_page(folder: pathlib.Path) -> pathlib.Path:
    """An empty page with the chart runtime in it."""
    page = folder / "runtime.html"
    script = vl_convert.javascript_bundle().replace("</script", "<\\/script")
    page.write_text(f"<!doctype html><title>runtime</title><script>{script}</script>", encoding="utf-8")
    return page


def main() -> None:
    """Measure, print and write the record."""
    load = os.getloadavg()[0]
    options = parser(__doc__ or "").parse_args()
    if headless.installed() is None:
        raise SystemExit("no chromium is installed; expected one on PATH to open a page with")
    with tempfile.TemporaryDirectory() as place, headless.Browser() as browser:
        folder = pathlib.Path(place)
        runs = report_runs.story(folder / "runs", n=40)
        for run in runs:
            if run.name != "verify-contrast":
                (run / "completions.jsonl").unlink(missing_ok=True)
        long_answers(folder / "runs" / "verify-contrast")
        start = time.perf_counter()
        page = write_report(runs, folder / "report.html")
        written = time.perf_counter() - start
        said = re.search(r"completions, at most ([\d,]+) characters", page.read_text(encoding="utf-8"))
        kept = said[1] if said else None
        runtime = runtime_page(folder)
        painted, loaded, searched, alone = [], [], [], []
        for repetition in range(options.repetitions + 1):
            times = opened(browser, page)
            browser.open(runtime)
            if repetition:  # The first opens a cold browser.
                painted.append(times[0])
                loaded.append(times[1])
                searched.append(times[2])
                alone.append(browser.ask(TIMES)[1] / 1000)
        rows = [
            Row(
                "report on 9 runs with 5,000 completions of 90 words",
                median([page.stat().st_size / 1e6]),
                5.0,
                "MB",
            ),
            Row("opening it until the first paint", median(painted), 2.0, "s"),
            Row("opening it until its scripts have run", median(loaded), 2.0, "s"),
            Row("searching its completions", median(searched), unit="s"),
            Row("a chart runtime inlined, beside that", median([runtime.stat().st_size / 1e6]), unit="MB"),
            Row("opening an empty page with the chart runtime", median(alone), unit="s"),
            Row("writing the report", median([written]), unit="s"),
        ]
    detail = {
        "loaded": loaded,
        "painted": painted,
        "searched": searched,
        "runtime": alone,
        "characters_kept": kept,
    }
    finish("report", rows, options, detail, load)


if __name__ == "__main__":
    main()
