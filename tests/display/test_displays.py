"""Displays: the same words and numbers in a terminal, in a notebook and in a report, whatever text the record
holds.
"""

import copy
import dataclasses
import json
import re
from collections import Counter

import pytest
from markupsafe import Markup
from rich.cells import cell_len

import guard_runs
import report_runs
from page_text import Outline
from safety_neurons import analysis
from safety_neurons.cli import console
from safety_neurons.display import DISPLAYS, Displayed, ReportedRun, part_of
from safety_neurons.display.analyses import overlap_findings
from safety_neurons.display.defended import defences_findings
from safety_neurons.display.found import neurons_table, ranking_table
from safety_neurons.display.parts import plain
from safety_neurons.display.registry import html_of
from safety_neurons.neurons import NeuronSet
from safety_neurons.report.page import read_runs, render
from safety_neurons.results import comparisons, holm_in, paired_difference
from safety_neurons.studies import Examination
from safety_neurons.studies.examination import Check

UNDEFINED = {
    "value": None,
    "low": None,
    "high": None,
    "n": 0,
    "unscored": 0,
    "measure": "refused",
    "why": "base and aligned do not differ",
}
HELD = "comparisons the family-wise rate is held (Holm)"
MAKE = {
    "verify-patch": lambda folder: report_runs.patch_run(folder, "contrast", (0.1, 0.9), n=20),
    "verify-deactivate": lambda folder: report_runs.deactivate_run(folder, "contrast", n=20),
    "compare": lambda folder: report_runs.compare_run(folder, (0.1, 0.9), (0.0, 0.5), n=20),
    "tune": lambda folder: report_runs.tune_run(folder, "importance", 0.1, n=20),
    "find": lambda folder: report_runs.find_run(folder, "contrast"),
    "doctor": lambda folder: report_runs.doctor_run(folder, failed=True),
    "guard-fit": guard_runs.fit_run,
    "guard-evaluate": lambda folder: guard_runs.evaluate_run(folder, n=30),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    return {kind: read_runs([make(root / kind)])[0] for kind, make in MAKE.items()}


@pytest.fixture
def shown(capsys, monkeypatch):
    """What a run looks like: the text of the terminal, of the notebook and of the page."""
    monkeypatch.setenv("COLUMNS", "400")

    def of(run):
        console.show(run)
        texts = [capsys.readouterr().out, Outline(html_of(run)).text, Outline(render([run], title="t")).text]
        return [plain(" ".join(text.split())) for text in texts]

    return of


def with_result(run, **changes):
    """The run as it would be read had it found this."""
    return dataclasses.replace(run, record={**run.record, "result": {**run.result, **changes}})


UNTOLD = ("random", "random_effects", "tables", "lengths", "checks")
"""What stands in tables as a range, or in those that a page folds."""


def rates(value, key=""):
    """The estimates that stand in the tables: every rate of refusal and every causal effect."""
    if isinstance(value, dict):
        if (
            key in ("harmful_refused", "harmless_refused", "causal_effect", "auroc")
            and value.get("low") is not None
        ):
            yield value
        for name, part in value.items():
            yield from () if name in UNTOLD else rates(part, name)
    elif isinstance(value, list):
        for part in value:
            yield from rates(part, key)


@pytest.mark.parametrize("kind", MAKE)
def test_the_numbers_of_the_record_stand_in_all_three(runs, shown, kind):
    run = runs[kind]
    terminal, notebook, page = shown(run)
    digits = 3 if kind.startswith("guard") else 2
    told = [row for row in run.result.get("methods", [])] or dict(run.result)
    for rate in rates(told):
        ends = [f"{rate[end]:.{digits}f}" for end in ("value", "low", "high")]
        for text in (terminal, notebook, page):
            assert f"{ends[0]} [{ends[1]}, {ends[2]}]" in text.replace(
                "-0." + "0" * digits, "0." + "0" * digits
            )
    for row in [
        *run.result.get("methods", []),
        *run.result.get("checks", []),
        *run.result.get("baselines", []),
    ]:
        name = row.get("method") or row.get("check") or row.get("name")
        assert all(name in text for text in (terminal, notebook, page) if name is not None)
    for table in part_of(run).tables:
        assert plain(table.caption) in terminal
        assert plain(table.caption) in notebook


def test_what_a_page_marks_stands_in_brackets_elsewhere():
    assert plain(Markup("<bdi>to <mark>kill</mark> time &lt;mark&gt;</bdi>")) == "to [kill] time <mark>"


def test_a_share_that_is_undefined_is_said_in_words(runs, shown):
    run = runs["compare"]
    for text in shown(with_result(run, ceiling_effect=UNDEFINED)):
        assert "All neurons of the sites patched restore an undefined share" in text


@pytest.mark.parametrize("kind", ["verify-patch", "verify-deactivate", "compare"])
def test_what_could_not_be_scored_stands_in_the_tables(runs, shown, kind):
    def some(value, key=""):
        if isinstance(value, dict):
            found = {name: some(part, name) for name, part in value.items()}
            return {**found, "unscored": 3} if key == "harmful_refused" else found
        return [some(part, key) for part in value] if isinstance(value, list) else value

    run = dataclasses.replace(runs[kind], record=some(runs[kind].record))
    assert all("3 unscored" in text for text in shown(run))
    assert not any("3 unscored" in text for text in shown(runs[kind]))


@pytest.mark.parametrize("kind", ["verify-patch", "compare", "doctor", "tune", "guard-fit", "guard-evaluate"])
def test_hostile_text_is_seen_and_obeyed_by_none(runs, shown, kind):
    text = "<img src=x onerror=a()>\u202e\x00\x1b[2J"

    def spoilt(value, key=""):
        if isinstance(value, dict):
            return {name: spoilt(part, name) for name, part in value.items()}
        if isinstance(value, list):
            return [spoilt(part, key) for part in value]
        told = (
            "why",
            "method",
            "check",
            "measured",
            "name",
            "stopped",
            "model",
            "base",
            "aligned",
            "in_force",
            "pooling",
            "judge",
        )
        return text if isinstance(value, str) and key in told else value

    run = runs[kind]
    made = dataclasses.replace(run, folder=run.folder.with_name("<b>\u202e"), record=spoilt(run.record))
    for seen in shown(made):
        assert not re.search("[\x00-\x08\x0b-\x1f\x7f\u202a-\u202e]", seen)
        assert "<img src=x onerror=a()>⟨U+202E⟩⟨U+0000⟩⟨U+001B⟩" in seen
    outline = Outline(html_of(made))
    assert not {"script", "img", "svg", "style", "iframe", "meta", "a"} & set(outline.tags)
    assert not [name for name in outline.attributes if name.startswith("on")]


def many(result, name):
    """Twelve rows under a name, each with its differences, and what is clear of these held together."""
    rows = holm_in([*copy.deepcopy(result[name])] * 12)
    assert len(list(comparisons(rows))) > 10
    return {name: rows}


CLEAR = paired_difference([1] * 7 + [0] * 33, [0] * 40).to_json()
COUNTS = [
    {"method": "contrast", "count": n, "setting": "x", "auroc": 0.9, "random": [0.8], "difference": CLEAR}
    for n in range(12)
]


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("verify-patch", lambda result: many(result, "sizes")),
        ("compare", lambda result: many(result, "methods")),
        ("guard-evaluate", lambda result: many(result, "baselines")),
        ("guard-evaluate", lambda result: many(result, "lengths")),
        ("guard-evaluate", lambda result: {"counts": holm_in(copy.deepcopy(COUNTS))}),
    ],
)
def test_tables_of_many_comparisons_say_that_the_family_wise_rate_is_held(runs, shown, kind, change):
    run = runs[kind]
    plainly = (
        with_result(run, tables={}, leave_out={}, outputs=None, counts=[], lengths=[])
        if kind == "guard-evaluate"
        else run
    )
    assert HELD not in "".join(shown(plainly))
    changed = change(run.result)
    terminal, notebook, page = shown(with_result(plainly, **changed))
    assert HELD in terminal
    assert HELD in page
    assert HELD in notebook or "lengths" in changed, "what a page folds is not in a notebook"


def test_the_change_of_harm_is_counted_with_the_family_of_a_sweep(runs, shown):
    deactivated = runs["verify-deactivate"]
    harm = paired_difference([0] * 20, [1] * 20).to_json()
    sizes = holm_in([deactivated.result["sizes"][-1]] * 11)
    number = sum(one["p_holm"] is not None for one in comparisons(sizes))
    for told, count in ((harm, number), ({**harm, "p_holm": 0.5}, number + 1)):
        terminal, *_ = shown(with_result(deactivated, sizes=sizes, harm_change=told))
        assert f"Of {count} {HELD}" in terminal


def test_a_set_that_is_switched_off_bit_by_bit_is_many_comparisons(shown, tmp_path):
    rate = {"value": 0.5, "low": 0.3, "high": 0.7, "n": 20, "unscored": 0}
    point = {
        "n_neurons": 5,
        "step": "5",
        "harmful_refused": rate,
        "harmless_refused": rate,
        "perplexity": None,
        "divergence": None,
    }
    point["change"] = paired_difference([0] * 20, [1] * 20).to_json()
    curves = holm_in([{"order": "by score", "points": [point] * 12, "neurons_for_half": 5}])
    result = json.loads(json.dumps({"n_neurons": 5, "untreated": point, "curves": curves, "random": {}}))
    folder = report_runs.run_folder(tmp_path / "run", "analyze-progressive", {"model": "m"}, result)
    terminal, _, page = shown(read_runs([folder])[0])
    assert HELD in terminal
    assert HELD in page
    assert "Refusals are halved with 5 of 5 neurons off (by score)." in terminal


def test_an_undefined_effect_says_why(runs, shown):
    run = runs["verify-patch"]
    sizes = [
        {**point, "causal_effect": UNDEFINED, "random_effects": [UNDEFINED] * 3}
        for point in run.result["sizes"]
    ]
    for text in shown(with_result(run, sizes=sizes, causal_effect=UNDEFINED, ceiling_effect=UNDEFINED)):
        assert "undefined: base and aligned do not differ" in text.replace("is undefined", "undefined")


def test_what_was_not_achieved_is_said_first(runs, shown):
    terminal, notebook, page = shown(runs["tune"])
    for text in (terminal, notebook, page):
        assert "Not achieved: refusals of harmful requests rise by 0 points." in text
    assert terminal.startswith("Not achieved: refusals of harmful requests rise by 0 points.")
    terminal, *_ = shown(with_result(runs["guard-fit"], achieved=False, why="it flags nothing"))
    assert terminal.startswith("Not achieved: it flags nothing.")


@pytest.mark.parametrize("n_unread", [0, 3])
def test_requests_that_could_not_be_read_are_said_beside_the_shares(runs, shown, n_unread):
    def more(rate):
        return {**rate, "unscored": n_unread}

    worth, fit = runs["guard-evaluate"], runs["guard-fit"]
    rates = {name: more(worth.result[name]) for name in ("flagged_unsafe", "flagged_safe")}
    rate = {"value": 0.5, "low": 0.4, "high": 0.6, "n": 50, "unscored": n_unread}
    other = {"safe": "builtin:look-alikes", "tpr": rate, "fpr": rate}
    for run in (with_result(worth, **rates), with_result(fit, other=other)):
        for text in shown(run):
            assert ("6 could not be read and are in neither share" in text) == (n_unread > 0)


def test_a_claim_that_cannot_be_told_says_so(shown, tmp_path):
    claim = {
        "claim": "mostly in self-attention",
        "paper": 1,
        "holds": None,
        "note": "",
        "value": None,
        "chance": None,
    }
    place = {
        "name": "layer 0",
        "members": 3,
        "candidates": 9,
        "expected": 1.0,
        "low": 0,
        "high": 2,
        "enrichment": 3.0,
        "verdict": "more",
    }
    found = {
        "name": "one",
        "n_neurons": 3,
        "claims": [claim],
        "by_part": [],
        "by_site": [],
        "by_layer": [{**place, "share_of_set": 1.0}],
    }
    folder = report_runs.run_folder(tmp_path / "run", "analyze-layers", {"sets": ["one"]}, {"sets": [found]})
    for text in shown(read_runs([folder])[0]):
        assert "cannot be told" in text


def test_every_display_has_a_section_and_a_result_in_memory_shows_itself():
    assert all(display.section for display in DISPLAYS.values())
    examined = Examination("<b>m</b>", (Check("a", False, "x<script>"), Check("b", None, 0.5)))
    assert examined.tables()[0].columns == ["check", "outcome", "measured", "allowed"]
    assert [finding.verdict for finding in examined.findings()] == ["fail"]
    assert list(examined.figures()) == []
    assert repr(examined).splitlines() == ["Examination:", plain(examined.findings()[0].text)]
    assert all(each.__repr__ is Displayed.__repr__ for each in Displayed.__subclasses__())
    assert len(Displayed.__subclasses__()) > 8
    seen = Outline(examined._repr_html_())
    assert "x<script>" in seen.text
    assert "1 of the checks fail on <b>m</b> (a)" in seen.text
    assert {"script"}.isdisjoint(seen.tags)


def test_a_result_that_only_is_in_memory_needs_no_folder(runs, shown):
    for kind, run in runs.items():
        if kind != "find":
            terminal, *_ = shown(ReportedRun.of(run.verb, run.result))
            assert "the model" in terminal or "the base model" in terminal or run.result.get("model"), kind


@pytest.mark.parametrize("width", [80, 120])
def test_a_narrow_terminal_folds_words_and_sets_columns_below_and_cuts_nothing(
    runs, capsys, monkeypatch, width
):
    monkeypatch.setenv("COLUMNS", str(width))
    run = runs["compare"]
    console.show(run)
    out = capsys.readouterr().out
    lines = out.split("\n\n")
    assert "…" not in out
    for row in run.result["methods"]:
        effect = row["causal_effect"]
        cell = f"{effect['value']:.2f} [{effect['low']:.2f}, {effect['high']:.2f}]"
        assert any(row["method"] in line and cell in line for piece in lines for line in piece.splitlines())


@pytest.mark.parametrize(
    "row",
    [
        ["p8.jsonl", "over-refusal", "strings-advbench-1", "0.00 [0.00, 0.14]", 24, 0, 12],
        ["类别 日本語のとても長い名前", "وصف", "👩‍👩‍👧‍👦 x", "1.00 [0.86, 1.00]", 1234567, 3, 7],
    ],
)
def test_no_width_of_a_terminal_takes_a_cell_off_a_table(capsys, monkeypatch, row):
    """Eighty columns are one of the widths at which a header can be folded and its column had no room."""
    columns = ["suite", "measure", "judge", "untreated", "n", "unscored", "cut off"]
    whole = [f"{cell:,}" for cell in row if isinstance(cell, int)] + [row[3]]
    letters = Counter("".join([*columns, *map(str, row)]))
    del letters[" "]
    for width in range(29, 131, 3):
        monkeypatch.setenv("COLUMNS", str(width))
        console.print_table("a title", columns, [row])
        out = capsys.readouterr().out
        assert max(map(cell_len, out.splitlines())) <= width
        assert [cell for cell in whole if not re.search(rf"(?<!\S){re.escape(cell)}(?!\S)", out)] == []
        assert letters - Counter(out) == Counter(), width


def test_what_a_page_folds_is_printed_where_it_is_short_and_named_where_it_is_long(runs, capsys):
    console.show(runs["tune"])
    assert "Checks while training" in capsys.readouterr().out
    console.show(runs["compare"])
    assert "in a report also: Units shared by two sets" in capsys.readouterr().out
    console.show(runs["find"])
    out = capsys.readouterr().out
    assert re.search(r"all +205 +205", out)
    assert "in a report also: The 25 of 205 neurons with the largest scores" in out


SUPERLATIVE = re.compile(
    r"largest causal effect|the largest of|the closest are|the fewest of|with the largest"
)


def test_nothing_is_called_the_largest_of_all_there_is(runs, shown):
    """With one method, pair or defence, and a list that is whole, there is nothing to be larger than."""
    compared = runs["compare"].result
    one = next(row for row in compared["methods"] if row["causal_effect"]["value"] is not None)
    sets = [
        (name, NeuronSet({"layers.3.down": members}, report_runs.table()))
        for name, members in (("one", range(9)), ("two", range(5, 14)))
    ]
    agreed = analysis.overlap(analysis.name_sets(sets)).record()
    worst = {"harmed": {"value": 0.5}}
    defended = {
        "grid": {"mixtures": ["benign"]},
        "arms": [{"arm": "lox", "worst": {"benign": worst}}],
        "differences": {},
    }
    found = with_result(runs["find"], ranking=[[0, 3, 0.5], [1, 2, 0.25]])
    alone = [
        *shown(with_result(runs["compare"], methods=[one])),
        *[plain(said.text) for said in overlap_findings(ReportedRun.of("analyze-overlap", agreed))],
        *[plain(said.text) for said in defences_findings(ReportedRun.of("study-defences", defended))],
        *[table.caption for table in ranking_table(found)],
        neurons_table(runs["find"], n=500).caption,
    ]
    for text in alone:
        assert not SUPERLATIVE.search(text), text
    assert plain(ranking_table(found, n=1)[0].caption).startswith("The 1 of 2 heads with the largest scores")
    assert SUPERLATIVE.search(shown(runs["compare"])[0])


def test_analyses_in_memory_show_what_the_report_shows():
    table = report_runs.table()
    sets = [
        (name, NeuronSet({"layers.3.down": list(range(start, start + 40))}, table))
        for name, start in (("one", 0), ("two", 20))
    ]
    named = analysis.name_sets(sets)
    where, agreed, spoken = analysis.layers(named[0]), analysis.overlap(named), analysis.languages(dict(sets))
    assert "one lies in 1 layer" in plain(where.findings()[0].text)
    assert [len(list(shown.figures())) for shown in (where, agreed, spoken)] == [2, 2, 0]
    assert "0.333" in Outline(agreed._repr_html_()).text
    assert "Sets by language" in Outline(spoken._repr_html_()).text
