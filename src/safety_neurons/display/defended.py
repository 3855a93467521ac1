"""What study defences found: the worst of a grid of fine-tunes that every defence has to stand."""

from collections.abc import Mapping
from typing import Any

from safety_neurons.display.parts import (
    CAUTION,
    FACT,
    FAIL,
    PASS,
    Cell,
    DisplayPart,
    Figure,
    Finding,
    ReportedRun,
    Table,
    dots_of,
    estimate_row,
)
from safety_neurons.display.text import NONE, count, interval, name, number, plural, say, share, visible
from safety_neurons.results import captioned, clear_word, is_clear

WORST = (
    *("defence", "fine-tune", "rate", "steps", "harm", "refused", "complied with", "harmless answered"),
    *("task", "perplexity", "cut off", "left out"),
)
STARTS = ("defence", "harm", "refused", "complied with", "harmless answered", "task", "perplexity", "cut off")
POINTS = (
    *("defence", "fine-tune", "rate", "steps", "harm", "refused", "task", "perplexity", "cut off"),
    "left out for",
)
UNTUNED, TUNED = "none", "SN-Tune"


def defences_part(run: ReportedRun) -> DisplayPart:
    """The worst point of every defence, and all points."""
    result = run.result
    grid, down = result["grid"], result["downstream"]
    lead = say(
        "Every defence against {} of {} ({} fine-tuning, rates {}, steps {}), with {}. A point counts "
        "where perplexity is at most {} times the untuned model’s and the task changes by at least {}; the "
        "worst is the one that counts with most harm. It is chosen on the requests it is measured on, alike "
        "for every defence.",
        plural(result["arms"][0]["points"], "fine-tune"),
        " and ".join(visible(each, 20) for each in grid["mixtures"]),
        visible(down["how"], 20),
        ", ".join(f"{rate:g}" for rate in grid["rates"]),
        ", ".join(count(steps) for steps in grid["steps"]),
        plural(len(result["seeds"]), "seed"),
        number(grid["max_perplexity"]),
        number(grid["least_task"]),
    )
    pairs: list[list[Cell]] = [
        [
            visible(pair, 60),
            visible(mixture, 20),
            interval(found, signed=True) if found else NONE,
            clear_word(found) if found else NONE,
        ]
        for pair, by_mixture in result["differences"].items()
        for mixture, found in by_mixture.items()
    ]
    differences = Table(
        captioned("Harm at the worst point, minus that of SN-Tune", result["differences"]),
        ("defences", "fine-tune", "difference", "clear"),
        pairs,
    )
    tables = [
        Table("The worst case that counts", WORST, [_worst(arm, each) for arm, each in _cases(result)]),
        Table("Before any fine-tune", STARTS, [_start(arm) for arm in result["arms"]]),
        differences,
    ]
    return DisplayPart(
        say("What keeps {} safe", name(run.model)),
        lead,
        [_figure(result, mixture) for mixture in grid["mixtures"]],
        tables,
        [Table("Every point of the grid", POINTS, [_point(row) for row in result["points"]])],
    )


def _figure(result: Mapping[str, Any], mixture: str) -> Figure:
    rows = []
    for arm in result["arms"]:
        worst = arm["worst"][mixture]
        if worst is not None:
            dots = [value for value in worst["harmed"]["by_seed"] if value is not None]
            rows.append(estimate_row(arm["arm"], worst["harmed"], dots=dots))
    title = f"harmful requests answered with harm, worst {mixture} fine-tune"
    caption = say(
        "<b>{}.</b> Bars are 95\u00a0% intervals over seeds and prompts, faint dots single seeds.",
        title.capitalize(),
    )
    return dots_of(rows, title, caption)


def _cases(result: Mapping[str, Any]) -> list[tuple[Mapping[str, Any], str]]:
    return [(arm, mixture) for arm in result["arms"] for mixture in result["grid"]["mixtures"]]


def _worst(arm: Mapping[str, Any], mixture: str) -> list[Cell]:
    worst, out = arm["worst"][mixture], f"{arm['left_out'][mixture]} of {arm['points']}"
    what: list[Cell] = [visible(arm["arm"], 40), visible(mixture, 20)]
    if worst is None:
        return [*what, *[NONE] * 9, out]
    return [*what, f"{worst['rate']:g}", count(worst["steps"]), *_measures(worst), out]


def _start(arm: Mapping[str, Any]) -> list[Cell]:
    return [visible(arm["arm"], 40), *_measures(arm["start"])]


def _measures(row: Mapping[str, Any]) -> list[Cell]:
    rates = [
        interval(row[kind]) if row[kind] else NONE
        for kind in ("harmed", "refused", "harmful", "harmless", "task")
    ]
    return [*rates, number(row["perplexity"]["value"]), count(row.get("cut_off"))]


def _point(row: Mapping[str, Any]) -> list[Cell]:
    return [
        visible(row["arm"], 40),
        visible(row["mixture"], 20),
        f"{row['rate']:g}",
        count(row["steps"]),
        *(interval(row[kind]) if row[kind] else NONE for kind in ("harmed", "refused", "task")),
        number(row["perplexity"]["value"]),
        count(row.get("cut_off")),
        visible(row["left_out"], 80) or NONE,
    ]


def defences_findings(run: ReportedRun) -> list[Finding]:
    """With which defence least harm is done at its worst, and with which clearly less than with SN-Tune."""
    result, said = run.result, list[Finding]()
    for mixture in result["grid"]["mixtures"]:
        known = [arm for arm in result["arms"] if arm["worst"][mixture] is not None]
        if not known:
            text = say("No {} fine-tune left a model within the bounds: nothing is compared.", mixture)
            said.append(Finding(CAUTION, text))
            continue
        best = min(known, key=lambda arm: arm["worst"][mixture]["harmed"]["value"] or 0.0)
        text = say(
            "Against the worst {} fine-tune, {} of the harmful requests are answered with harm with {}{}",
            visible(mixture, 20),
            share(best["worst"][mixture]["harmed"]["value"], 0),
            visible(best["arm"], 40),
            f", the fewest of {len(known)}" if len(known) > 1 else "",
        )
        plain = next((arm for arm in known if arm["arm"] == UNTUNED), None)
        if plain is not None and plain is not best:
            value = plain["worst"][mixture]["harmed"]["value"]
            text += say(" (untuned {})", share(value, 0))
        said.append(Finding(FACT, text + say(".")))
        pairs = [(pair, found[mixture]) for pair, found in result["differences"].items() if found[mixture]]
        better = [
            visible(pair.removesuffix(f" - {TUNED}"), 40)
            for pair, found in pairs
            if is_clear(found) and found["value"] < 0
        ]
        if pairs:
            words = ", ".join(better) if better else "no other defence"
            verdict = PASS if better else FAIL
            said.append(Finding(verdict, say("Clearly less harm than after SN-Tune alone: {}.", words)))
    return said
