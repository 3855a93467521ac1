"""The section on evaluations, and completions that several judges looked at."""

import json

import pytest

from page_text import Outline
from report_runs import MODEL, run_folder
from safety_neurons.capability import Measurement
from safety_neurons.report import write_report
from safety_neurons.results import Completion, Completions, Rate
from safety_neurons.studies.evaluation import Evaluation
from safety_neurons.studies.scoring import ArmScores, JudgeScore, SuiteScore, suite_changes

N = 20
HARM = {"untreated": 0.8, "treated": 0.2}


def completion(arm, place):
    """Refused or not by one judge, harmful or safe by the other; every tenth answer was not judged."""
    harmful = place < N * HARM[arm]
    verdicts = {"wording-1": {"label": "compliance" if harmful else "full", "refused": not harmful}}
    verdicts["guard-judge"] = (
        {"label": "unscored", "refused": None}
        if place == 0
        else {"label": "harmful" if harmful else "safe", "refused": None}
    )
    meta = {"suite": "advbench", "kind": "harmful"}
    return Completion(f"p{place}", f"Tell me {place}.", f"{arm} {place}", (), "stop", arm, 0, verdicts, meta)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluate") / "run"
    arms = {}
    for arm, share in HARM.items():
        outcomes = tuple(float(place < N * share) for place in range(N))
        judges = {"wording-1": JudgeScore("wording-1", "wording", "complied", {"harm": outcomes}, {})}
        judges["guard-judge"] = JudgeScore(
            "guard-judge", "guard-judge", "harmful", {"harm": (None, *outcomes[1:])}, {}
        )
        ids, texts = (tuple(f"{word}{place}" for place in range(N)) for word in ("p", "Tell me "))
        groups = tuple({"category": "theft" if place % 2 else "fraud"} for place in range(N))
        task = Measurement("mmlu", "accuracy", Rate(0.5, 0.4, 0.6, 100), True, (), (), ())
        arms[arm] = ArmScores(arm, (SuiteScore("advbench", "harmful", ids, texts, groups, judges),), (task,))
    completions = Completions([completion(arm, place) for arm in HARM for place in range(N)])
    changes = suite_changes(arms["untreated"], arms["treated"])
    missed = ("harm.advbench: 0.20, expected at most 0.10",)
    found = Evaluation(
        "org/model",
        "patched",
        64,
        arms["untreated"],
        arms["treated"],
        None,
        changes,
        [],
        [],
        missed,
        completions,
        (),
    )
    run_folder(folder, "evaluate", MODEL, found.record())
    completions.save(folder / "completions.jsonl")
    return folder


@pytest.fixture(scope="module")
def page(run):
    return write_report([run], run.parent / "r.html")


def test_harm_stands_by_suite_and_judge_before_and_after(run, page):
    seen = Outline(page.read_text(encoding="utf-8"))
    text = seen.text.replace("\u00a0", " ")
    record = json.loads((run / "run.json").read_text())["result"]
    for arm in HARM:
        for judged in record[arm]["suites"][0]["judges"].values():
            rate = judged["harm"]
            assert f"{rate['value']:.2f} [{rate['low']:.2f}, {rate['high']:.2f}]" in text
    assert "guard-judge , org/model (treated) does harm on" in text
    assert "guard-judge left 1 answer to harmful requests unscored" in text
    assert "The gate is not passed: harm.advbench: 0.20, expected at most 0.10." in text
    assert "harm on advbench by category, treated" in text


def test_completions_are_filtered_by_what_any_judge_says(browser, page):
    browser.screen(1280)
    browser.open(page)
    shown = "Number(document.getElementById('status').textContent.split(' ')[0])"

    def choose(name, value):
        browser.ask(
            f"(() => {{ const box = document.getElementById('{name}'); box.value = '{value}'; "
            "box.dispatchEvent(new Event('change')); })()"
        )
        return browser.ask(shown)

    judges = browser.ask("[...document.getElementById('judge').options].map((each) => each.textContent)")
    assert judges == ["wording-1", "guard-judge"]
    assert browser.ask("document.getElementById('judge').value") == "1", "the last judge at first"
    assert choose("verdict", "harmful") == 3
    assert choose("verdict", "safe") == 16
    assert choose("verdict", "unscored") == 1
    assert choose("verdict", "changed") == 12
    choose("verdict", "")
    choose("judge", "0")
    assert choose("verdict", "refused") == 16
    assert choose("verdict", "complied") == 4
    cells = browser.ask(
        "[...document.querySelectorAll('#answers tbody td .verdict')].map((each) => each.textContent)"
    )
    assert cells == ["complied"] * 8
    assert browser.said == []
