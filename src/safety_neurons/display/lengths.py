"""The length curve of verify and evaluate: refusal and harm of the same answers, cut at several lengths."""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from safety_neurons.counting import numbered
from safety_neurons.display.charts import Line, Plane, line_figure
from safety_neurons.display.parts import Cell, Figure, ReportedRun, Table
from safety_neurons.display.text import count, interval, number, say, visible

_ARMS = ("untreated", "aligned", "treated")
_MEASURES = (("refused", "harmful requests refused"), ("complied", "harmful requests complied with"))
Row = tuple[str, int, Mapping[str, Any] | None, Mapping[str, Any] | None, int]
"""Arm (and judge), tokens, refusal, harm, answers cut off."""


def _arms(result: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Arms by name, those of a dose curve behind the others; a factor of 1 is the untreated one again."""
    for name in _ARMS:
        yield name, result.get(name) or {}
    for dose in result.get("doses") or ():
        if dose["factor"] != 1:
            yield f"factor {dose['factor']:g}", dose["treated"]


def _rows(run: ReportedRun) -> list[Row]:
    """Every point of every arm: verify has one judge of each kind, evaluate rates by judge."""
    rows: list[Row] = []
    for name, arm in _arms(run.result):
        for point in arm.get("lengths") or ():
            if "harm" in point:
                rows += _by_judge(name, point)
            else:
                told = point["harmful_refused"], point["harmful_complied"]
                rows.append((name, point["tokens"], *told, point["cut_off"]))
    order = list(dict.fromkeys(row[0] for row in rows))
    return sorted(rows, key=lambda row: order.index(row[0]))


def _by_judge(name: str, point: Mapping[str, Any]) -> Iterator[Row]:
    for judge in dict.fromkeys([*point["refused"], *point["harm"]]):
        told = point["refused"].get(judge), point["harm"].get(judge)
        yield f"{name}, {visible(judge, 24)}", point["tokens"], *told, point["cut_off"]


def length_tables(run: ReportedRun) -> list[Table]:
    """One row for every arm and length; no table where no curve was asked for."""
    shown: list[Sequence[Cell]] = [
        [name, count(tokens), interval(refused), interval(harm), count(cut)]
        for name, tokens, refused, harm, cut in _rows(run)
    ]
    columns = ["arm", "tokens", "harmful refused", "harmful complied", "cut off"]
    caption = "The same answers, cut at a number of tokens; 95\u00a0% intervals"
    return [Table(caption, columns, shown)] if shown else []


def length_figures(run: ReportedRun) -> list[Figure]:
    """Refusal, and harm, against the tokens that are judged."""
    rows, figures = _rows(run), []
    for place, (word, title) in enumerate(_MEASURES, 2):
        lines = []
        for name in dict.fromkeys(row[0] for row in rows):
            points: list[tuple[float, Any]] = [(float(row[1]), row[place]) for row in rows if row[0] == name]
            known = [
                (at, float(found["value"])) for at, found in points if found and found["value"] is not None
            ]
            if known:
                lines.append(Line(name, known, marked=True))
        if not lines:
            continue
        longest = max(row[1] for row in rows)
        plane = Plane("tokens of an answer that are judged", title, (0.0, float(longest)), (0.0, 1.02))
        said = "; ".join(
            f"{line.name}: "
            + ", ".join(f"{numbered(round(at), 'token')} {number(value)}" for at, value in line.points)
            for line in lines
        )
        caption = say(
            "<b>Length curve</b>: {}, by the beginning of the same answers; a short limit cuts off what an "
            "answer turns into.",
            title,
        )
        figures.append(Figure(partial(line_figure, lines, plane), f"{word} by length: {said}.", caption))
    return figures
