"""What a report says of methods over several organisms: which one should I use."""

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from safety_neurons.report.charts import Row, dot_figure, look
from safety_neurons.report.findings import FACT, Finding
from safety_neurons.report.reading import Run
from safety_neurons.report.sections import Figure, Part, titled
from safety_neurons.report.svg import SOFT
from safety_neurons.report.tables import Cell, Table
from safety_neurons.report.text import NONE, duration, number, plural, say, visible
from safety_neurons.report.tiles import Tile

DRAWN = {"recall": "planted units found", "causal_effect": "causal effect", "necessity": "refusals lost when off"}
CHANCE = "random"


def ranking_part(run: Run) -> Part:
    """Every method over every organism: means, the worst, each single one."""
    figures, tables = [], []
    for group in dict.fromkeys(str(row["group"]) for row in run.result["ranking"]):
        rows = [row for row in run.result["ranking"] if row["group"] == group]
        figures += [_figure(group, measure, rows) for measure in DRAWN if any(row["measure"] == measure for row in rows)]
        tables.append(_table(group, rows))
    lead = Markup("Means over organisms; faint marks are single organisms and seeds, the number in brackets is the worst of them.")
    return Part(titled("Over several organisms", run), lead, [figure for figure in figures if figure is not None], tables)


def _figure(group: str, measure: str, rows: Sequence[Mapping[str, Any]]) -> Figure | None:
    known = [row for row in rows if row["measure"] == measure and row["mean"] is not None]
    if not known or (measure != "recall" and group == "planted"):
        return None
    names = [visible(row["method"], 40) for row in known]
    drawn = []
    for label, row in sorted(zip(names, known, strict=True), key=lambda pair: -pair[1]["mean"]):
        colour, shape = (SOFT, "circle") if label == CHANCE else look(label, names)
        dots = [value for value in row["by_organism"].values() if value is not None]
        drawn.append(Row(label, row["mean"], None, None, _mean(row), colour, shape, dots))
    ends = [end for row in drawn for end in row.dots]
    words = "; ".join(f"{row.label} {row.text}" for row in drawn)
    organisms = plural(len(known[0]["by_organism"]), "organism")
    caption = say("<b>{}</b>, {}: mean over {}.", DRAWN[measure].capitalize(), _group(group), organisms)
    domain = (max(min([0.0, *ends]), -1.0) - 0.04, min(max([1.0, *ends]), 2.0) + 0.04)
    return Figure(dot_figure(drawn, DRAWN[measure], domain=domain), f"{DRAWN[measure]}, {_group(group)}: {words}.", caption)


def _group(group: str) -> str:
    kind, _, share = group.partition(" ")
    try:
        return f"{visible(kind, 20)} organisms" + (f", {100 * float(share):g}\u202f% of the units" if share else ", as many as are true")
    except ValueError:
        return visible(group, 40)


def _table(group: str, rows: Sequence[Mapping[str, Any]]) -> Table:
    measures = list(dict.fromkeys(str(row["measure"]) for row in rows))
    cells = {(row["method"], row["measure"]): row for row in rows}
    methods = list(dict.fromkeys(row["method"] for row in rows))
    shown: list[Sequence[Cell]] = [
        [visible(method, 40), *(_mean(cells.get((method, measure))) for measure in measures)] for method in methods
    ]
    quiet = frozenset(place for place, method in enumerate(methods) if method == CHANCE)
    columns = ["method", *(visible(measure.replace("_", " "), 40) for measure in measures)]
    return Table(f"{_group(group)}: mean over organisms (worst)".capitalize(), columns, shown, quiet)


def _mean(row: Mapping[str, Any] | None) -> str:
    if row is None or row["mean"] is None:
        return NONE
    return duration(row["mean"]) if row["measure"] == "seconds" else f"{number(row['mean'])} ({number(row['worst'])})"


def ranking_findings(run: Run) -> list[Finding]:
    """Who leads which measure."""
    made = []
    for leader in run.result["leaders"]:
        names = Markup(", ").join(Markup("<b>{}</b>").format(visible(method, 40)) for method in leader["methods"])
        text = "On {}, {} leads in {}: {} on average."
        measure = visible(str(leader["measure"]).replace("_", " "), 40)
        made.append(Finding(FACT, say(text, _group(str(leader["group"])), names, measure, number(leader["mean"]))))
    return made


def ranking_tile(run: Run) -> Tile:
    """The leader in the causal effect, or in recall where nothing else was measured."""
    found = {str(leader["measure"]): leader for leader in reversed(run.result["leaders"])}
    leader = found.get("causal_effect") or found.get("recall")
    if leader is None:
        return Tile("Which method should I use?", FACT, NONE, Markup("no measure is defined"))
    names = ", ".join(visible(each, 40) for each in leader["methods"])
    text = say("{} of {}, mean over {}", DRAWN[leader["measure"]], names, _group(str(leader["group"])))
    return Tile("Which method should I use?", FACT, number(leader["mean"]), text)
