"""Charts of curves, ranges of chance and matrices, drawn once for a page and once for a phone."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import altair as alt
from markupsafe import Markup

from safety_neurons.report.charts import NARROW, SHAPES, data
from safety_neurons.report.svg import BAND, COLOURS, FAINT, INK, ON_RAMP, RAMP, SOFT, drawing
from safety_neurons.report.text import visible

PHONE = NARROW - 30
DASHES = ([1, 0], [7, 3], [2, 2], [9, 3, 2, 3], [5, 2], [3, 5], [12, 4], [1, 3])
"""Every line has a pattern of its own beside its colour."""


@dataclass(frozen=True)
class Line:
    """One named curve."""

    name: str
    points: Sequence[tuple[float, float]]
    """x and y."""
    ends: Sequence[tuple[float, float]] = ()
    """Lower and upper end of the interval of every point."""
    marked: bool = False
    """Whether every point is a measurement, to be drawn as one."""
    step: bool = False
    """Whether the value holds up to the next point."""


@dataclass(frozen=True)
class Plane:
    """What the axes are."""

    x: str
    y: str
    x_range: tuple[float, float] = (0.0, 1.0)
    y_range: tuple[float, float] = (0.0, 1.0)
    diagonal: bool = False
    """Whether the diagonal is what chance (or perfection) gives."""


def line_figure(lines: Sequence[Line], plane: Plane, *, band: Sequence[tuple[float, float, float]] = (), size: int = 330) -> Markup:
    """Curves in one plane, with a key. `band` is x, lower and upper end of what random choices give."""
    kept = [line for line in lines if line.points][: len(COLOURS)]
    wide = drawing(_lines(kept, plane, band, size), size, size * 0.8, size="wide")
    return wide + drawing(_lines(kept, plane, band, PHONE), PHONE, 210, size="narrow")


def _lines(lines: Sequence[Line], plane: Plane, band: Sequence[tuple[float, float, float]], width: int) -> Any:
    def axis(title: str, ends: tuple[float, float]) -> dict[str, Any]:
        return {
            "title": title,
            "scale": alt.Scale(domain=list(ends), nice=False, clamp=True),
            "axis": alt.Axis(tickCount=5, format=".2~f" if ends[1] <= 2 else ",~r", domain=False, grid=True),
        }

    x, y = alt.X("x:Q", **axis(plane.x, plane.x_range)), alt.Y("y:Q", **axis(plane.y, plane.y_range))
    layers: list[Any] = []
    if band:
        rows = [{"x": at, "y": low, "high": high} for at, low, high in band]
        layers.append(alt.Chart(data(rows)).mark_area(color=BAND, opacity=0.6, aria=False).encode(x=x, y=y, y2="high:Q"))
    if plane.diagonal:
        (left, right), (low, high) = plane.x_range, plane.y_range
        ends = data([{"x": left, "y": low}, {"x": right, "y": high}])
        layers.append(alt.Chart(ends).mark_line(color=FAINT, strokeDash=[5, 4], strokeWidth=1.2, aria=False).encode(x=x, y=y))
    names = [visible(line.name, 40) for line in lines]
    legend = None
    if len(lines) > 1:
        legend = alt.Legend(title=None, orient="bottom" if width == PHONE else "right", columns=1)
    colour = alt.Color("line:N", scale=alt.Scale(domain=names, range=list(COLOURS[: len(names)])), legend=legend)
    dash = alt.StrokeDash("line:N", scale=alt.Scale(domain=names, range=list(DASHES[: len(names)])), legend=legend)
    for name, line in zip(names, lines, strict=True):
        made: list[dict[str, Any]] = [{"x": at, "y": value, "line": name} for at, value in line.points]
        mark = alt.Chart(data(made)).mark_line(strokeWidth=2, aria=False, interpolate="step-after" if line.step else "linear")
        layers.append(mark.encode(x=x, y=y, color=colour, strokeDash=dash))
        if line.ends:
            rules = [{"x": at, "y": low, "high": high, "line": name} for (at, _), (low, high) in zip(line.points, line.ends, strict=True)]
            layers.append(
                alt.Chart(data(rules)).mark_rule(strokeWidth=1.4, opacity=0.7, aria=False).encode(x=x, y=y, y2="high:Q", color=colour)
            )
        if line.marked:
            dots = [row | {"tip": f"{name}: {row['x']:.4g}, {row['y']:.3f}"} for row in made]
            shape = SHAPES[names.index(name) % len(SHAPES)]
            points = alt.Chart(data(dots)).mark_point(filled=True, size=46, opacity=1, shape=shape)
            layers.append(points.encode(x=x, y=y, color=alt.value(COLOURS[names.index(name)]), description="tip:N"))
    return alt.layer(*layers)


@dataclass(frozen=True)
class Beside:
    """A number beside the range that chance gives for it."""

    label: str
    value: float | int | None
    low: float | int | None
    high: float | int | None
    text: str


def beside_figure(rows: Sequence[Beside], title: str, *, domain: tuple[float, float]) -> Markup:
    """A dot for every number on a grey bar for the range of chance, and the numbers at the right."""
    sizes = (("wide", 240, 190), ("narrow", 96, 110))
    return Markup("").join(drawing(_beside(rows, title, domain, labels), width, 24, step=True, size=size) for size, width, labels in sizes)


def _beside(rows: Sequence[Beside], title: str, domain: tuple[float, float], labels: int) -> Any:
    order = [visible(row.label, 48) for row in rows]
    shown = [
        {"label": label, "value": row.value, "low": row.low, "high": row.high, "text": row.text, "tip": f"{label}: {row.text}"}
        for label, row in zip(order, rows, strict=True)
    ]
    y = alt.Y("label:N", sort=order, title=None, axis=alt.Axis(ticks=False, domain=False, labelColor=INK, labelLimit=labels))
    x_axis = alt.Axis(tickCount=4, format=".2~f", domain=False)
    x = alt.X("value:Q", title=title, scale=alt.Scale(domain=list(domain), nice=False, clamp=True), axis=x_axis)
    ranged = alt.Chart(data([row for row in shown if row["low"] is not None]))
    dotted = alt.Chart(data([row for row in shown if row["value"] is not None]))
    narrow = labels < 150
    return alt.layer(
        ranged.mark_rule(color=BAND, strokeWidth=11, aria=False).encode(y=y, x=alt.X("low:Q"), x2="high:Q"),
        dotted.mark_point(filled=True, size=72, opacity=1, color=COLOURS[0]).encode(y=y, x=x, description="tip:N"),
        alt.Chart(data(shown)).mark_text(align="left", dx=8, aria=False).encode(y=y, x=alt.value(96 if narrow else 240), text="text:N"),
    )


def matrix_figure(
    rows: Sequence[str],
    columns: Sequence[str],
    values: Mapping[tuple[str, str], float | None],
    titles: tuple[str, str],
    *,
    largest: float = 1.0,
) -> Markup:
    """A heat map with a number in every cell; rows and columns are named, in their order."""
    cells = []
    for row in rows:
        for column in columns:
            value = values.get((row, column))
            if value is None:
                continue
            step = min(max(int(abs(value) / (largest or 1.0) * len(RAMP)), 0), len(RAMP) - 1)
            named = {"row": visible(row, 30), "column": visible(column, 30), "label": f"{value:.2f}".replace("-", "\N{MINUS SIGN}")}
            tip = f"{titles[0]} {named['row']}, {titles[1]} {named['column']}: {named['label']}"
            cells.append(named | {"tip": tip, "colour": RAMP[step], "text": ON_RAMP[step >= 5]})
    gap = alt.Scale(paddingInner=0.06, paddingOuter=0.03)
    across = [visible(each, 30) for each in columns]
    down = [visible(each, 30) for each in rows]
    tilted = max(map(len, across), default=0) > 5
    top = alt.Axis(orient="top", labelAngle=-35 if tilted else 0, ticks=False, domain=False, titleColor=SOFT)
    base = alt.Chart(data(cells)).encode(
        x=alt.X("column:N", sort=across, title=titles[1], axis=top, scale=gap),
        y=alt.Y("row:N", sort=down, title=titles[0], axis=alt.Axis(ticks=False, domain=False, labelColor=INK), scale=gap),
        description="tip:N",
    )
    tiles = base.mark_rect(cornerRadius=2).encode(color=alt.Color("colour:N", scale=None))
    text = base.mark_text(fontSize=11, aria=False).encode(text="label:N", color=alt.Color("text:N", scale=None))
    chart = alt.layer(tiles, text)
    count = max(len(across), 1)
    return drawing(chart, 50 * count, 30, step=True, size="wide") + drawing(
        chart, max(34, 190 // count) * count, 30, step=True, size="narrow"
    )
