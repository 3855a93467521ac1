"""What a recipe found: published numbers beside the measured ones, and the steps that were left out."""

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from safety_neurons.display.parts import CAUTION, FACT, Cell, DisplayPart, Finding, ReportedRun, Table
from safety_neurons.display.text import NONE, interval, name, number, plural, say, visible
from safety_neurons.results.replication import NOT_RUN, PERCENT

COLUMNS = ("what", "of", "published", "measured", "difference")


def recipe_part(run: ReportedRun) -> DisplayPart:
    """A row of every published number; steps, sources and notes below."""
    result = run.result
    lead = say("{}", visible(result["about"], 1000))
    if result["trial"]:
        lead = say("<b>A trial</b>, on next to no prompts: its numbers mean nothing. {}", lead)
    rows: list[Sequence[Cell]] = [
        [
            visible(row["what"], 120),
            name(row["of"]) if row["of"] else NONE,
            _published(row),
            _measured(row),
            _signed(row["difference"], row["unit"]),
        ]
        for row in result["published"]
    ]
    quiet = frozenset(place for place, row in enumerate(result["published"]) if row["measured"] is None)
    caption = "Published and measured; measured with its 95\u00a0% interval where there is one"
    return DisplayPart(
        say("Published beside measured <span class=sub>{}</span>", visible(run.arguments.get("recipe"), 200)),
        lead,
        tables=[Table(caption, COLUMNS, rows, quiet)],
        details=[_steps(result), _sources(result)],
    )


def recipe_findings(run: ReportedRun) -> list[Finding]:
    """How many published numbers were measured, and how many of those the intervals hold."""
    result = run.result
    published = [row for row in result["published"] if row["published"] is not None]
    compared = [row for row in published if row["difference"] is not None]
    bounded = [row["measured"] for row in compared if row["measured"]["low"] is not None]
    held = sum(
        row["measured"]["low"] <= row["published"] <= row["measured"]["high"]
        for row in compared
        if row["measured"] in bounded
    )
    text = say("{} of {} are measured here", f"{len(compared)}", plural(len(published), "published number"))
    if bounded:
        text += say("; {} of {} intervals hold the published number", f"{held}", f"{len(bounded)}")
    left_out = [step for step in result["steps"] if step["why"] is not None]
    findings = [Finding(FACT, text + Markup("."))]
    if left_out:
        findings.append(
            Finding(
                CAUTION,
                say(
                    "{} of {} not run: {}.",
                    f"{len(left_out)}",
                    plural(len(result["steps"]), "step"),
                    Markup(", ").join(name(step["name"]) for step in left_out),
                ),
            )
        )
    return findings


def _published(row: Mapping[str, Any]) -> str:
    """A number in its unit, or why none is known."""
    value, unit = row["published"], row["unit"]
    return row["unpublished"] if value is None else f"{number(value, _digits(unit))}{_behind(unit)}"


def _measured(row: Mapping[str, Any]) -> str:
    found, unit = row["measured"], row["unit"]
    if found is None:
        why = row.get("why") or NOT_RUN
        return NOT_RUN if why.startswith(NOT_RUN) else visible(why, 160)
    if found["value"] is None:
        return f"undefined ({visible(found.get('why') or 'no number', 100)})"
    return f"{interval(found, digits=_digits(unit))}{_behind(unit)}"


def _signed(value: float | None, unit: str) -> str:
    return number(value, _digits(unit), signed=True)


def _digits(unit: str) -> int:
    return 1 if unit == PERCENT else 3


def _behind(unit: str) -> str:
    return f"\u00a0{visible(unit, 20)}" if unit else ""


def _steps(result: Mapping[str, Any]) -> Table:
    rows: list[Sequence[Cell]] = [
        [visible(step["name"], 60), visible(step["verb"], 40), visible(step["why"] or "run", 400)]
        for step in result["steps"]
    ]
    return Table("Steps", ("step", "verb", "what became of it"), rows)


def _sources(result: Mapping[str, Any]) -> Table:
    """Each quantity once: where it was published, and what differs here."""
    rows: dict[str, Sequence[Cell]] = {
        row["what"]: [
            visible(row["what"], 120),
            visible(row["source"], 300),
            visible(row["note"] or NONE, 600),
        ]
        for row in result["published"]
    }
    return Table(
        "Sources, and what differs here", ("what", "published in", "what differs here"), list(rows.values())
    )
