"""Tables of a guard: beside its baselines, slice by slice, by number of neurons, and what is left of unsafe outputs."""

from collections.abc import Mapping, Sequence
from typing import Any

from safety_neurons.report.tables import Cell, Table
from safety_neurons.report.text import NONE, SPACE, count, number, visible
from safety_neurons.report.text import interval as with_digits
from safety_neurons.results import captioned, is_clear

OURS = "guard"


def interval(record: Mapping[str, Any] | None, *, signed: bool = False) -> str:
    """Areas and rates near 1 need a third digit."""
    return with_digits(record, signed=signed, digits=3)


def percent(rate: float) -> str:
    """A rate that somebody chose: 5\u202f%, 0.1\u202f%."""
    return f"{100 * rate:g}{SPACE}%"


def interval_of(value: Any) -> str:
    """A rate with its interval, or a bare number."""
    return interval(value) if isinstance(value, Mapping) else number(value, 3)


def baselines_table(result: Mapping[str, Any]) -> Table:
    """The guard and every classifier that needs no safety neurons."""
    entries = [{"name": OURS, **result}, *result["baselines"]]
    every = list(result["tpr_at_fpr"])
    targets = [target for target in every if any(entry["tpr_at_fpr"][target]["value"] is not None for entry in entries)]
    rows = []
    for entry in entries:
        difference = entry.get("difference") if entry["name"] != OURS else None
        rows.append(
            [
                visible(entry["name"], 40),
                interval(entry["auroc"]),
                NONE if difference is None else interval(difference, signed=True),
                interval(entry["average_precision"]),
                *(_supported(entry["tpr_at_fpr"][target]) for target in targets),
                number(entry["expected_calibration_error"], 3),
            ]
        )
    rates = [f"unsafe flagged at {percent(float(target))} of the safe" for target in targets]
    columns = ["classifier", "AUROC", f"{visible(result['compared'], 20)} minus it", "average precision", *rates, "calibration error"]
    caption = "The guard beside what needs no safety neurons; 95\u00a0% intervals, of random neurons the range of sets"
    lacking = [percent(float(target)) for target in every if target not in targets]
    caption += f"; too few safe requests for a rate of {', '.join(lacking)}" if lacking else ""
    return Table(captioned(caption, result["baselines"]), columns, rows)


def _supported(rate: Mapping[str, Any]) -> str:
    return "too few safe requests" if rate["value"] is None and rate.get("why") else interval(rate)


def slices_table(title: str, rows: Sequence[Mapping[str, Any]]) -> Table:
    """One row a slice: what is flagged, the guard's area, and its difference from every other classifier."""
    names = list(dict.fromkeys(label for row in rows for label in row["auroc"]))
    others = list(dict.fromkeys(label for row in rows for label in row["difference"]))
    ours = [label for label in names if label not in others]
    cells = []
    for row in rows:
        against = f" (against {visible(row['against'], 20)})" if row["against"] else ""
        cells.append(
            [
                visible(row["value"], 60) + against,
                f"{count(row['n_unsafe'])} / {count(row['n_safe'])}",
                interval(row["flagged_unsafe"]) if row["n_unsafe"] else NONE,
                interval(row["flagged_safe"]) if row["n_safe"] else NONE,
                *(interval(row["auroc"].get(label)) for label in ours),
                *(interval(row["difference"].get(label), signed=True) for label in others),
            ]
        )
    columns = ["requests", "unsafe / safe", "unsafe flagged", "safe flagged", *(f"AUROC, {visible(label, 24)}" for label in ours)]
    return Table(captioned(title, rows), [*columns, *(f"minus {visible(label, 24)}" for label in others)], cells)


def outputs_table(found: Mapping[str, Any]) -> Table:
    """Unsafe outputs without and with the guard, by language."""
    rows: list[Sequence[Cell]] = [
        [visible(row["language"], 40), *(interval(row[part]) for part in ("before", "after", "cut", "blocked"))]
        for row in [{"language": "all", **found}, *found["by"]]
    ]
    columns = ["requests", "unsafe outputs", "with the guard", "cut by", "safe requests blocked"]
    caption = f"What the model writes, by {visible(found['judge'], 40)}; {count(found['changed'])} answers that were let pass differ"
    return Table(caption, columns, rows)


def counts_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """How many neurons, and whether it matters which."""
    settings = list(dict.fromkeys(row["setting"] for row in rows))
    known = {(row["method"], row["count"], row["setting"]): row for row in rows}
    cells: list[Sequence[Cell]] = []
    for method, size in dict.fromkeys((row["method"], row["count"]) for row in rows):
        found = [known.get((method, size, setting)) for setting in settings]
        shown = [NONE if row is None else _beside_random(row) for row in found]
        cells.append([f"{visible(method, 40)}, {count(size)}", *shown])
    columns = ["neurons by", *(visible(setting, 40) for setting in settings)]
    caption = "How many neurons, and which: AUROC (mean of random sets with as many in every matrix)"
    return Table(captioned(caption, rows), columns, cells)


def _beside_random(row: Mapping[str, Any]) -> str:
    area, random = row["auroc"], row["random"]
    value = area["value"] if isinstance(area, Mapping) else area
    difference = row["difference"]
    word = "" if not is_clear(difference) else ", better" if difference["value"] > 0 else ", worse"
    return f"{number(value, 3)} ({number(sum(random) / len(random), 3) if random else NONE}){word}"
