"""The charts of a report. Every one comes with its labels in words; tables beside it carry the same numbers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import altair as alt
import numpy as np
from markupsafe import Markup

from safety_neurons.neurons import SITES
from safety_neurons.report.svg import BAND, COLOURS, FAINT, INK, ON_RAMP, PAPER, RAMP, SOFT, drawing
from safety_neurons.report.text import interval, visible

METHODS = ("contrast", "attribution-patching", "importance-contrast", "importance", "attribution", "weight-change", "mask")
SHAPES = ("circle", "diamond", "square", "triangle-up", "cross", "triangle-down", "triangle-left", "triangle-right")
WIDE, NARROW = 770, 262


@dataclass(frozen=True)
class Sweep:
    """Causal effects of one method over set sizes."""

    method: str
    points: Sequence[Mapping[str, Any]]
    """`size`, `n_neurons`, `causal_effect`, `random_effects`."""
    ceiling: Mapping[str, Any] = field(default_factory=dict)


def look(method: str, others: Sequence[str] = ()) -> tuple[str, str]:
    """Colour and shape of a method, the same in every figure."""
    known = [*METHODS, *(other for other in others if other not in METHODS)]
    place = min(known.index(method) if method in known else len(METHODS), len(COLOURS) - 1)
    return COLOURS[place], SHAPES[place]


def data(rows: Sequence[Mapping[str, Any]]) -> alt.Data:
    """Rows as inline data."""
    return alt.Data(values=[dict(row) for row in rows])


def site_map(
    cells: Mapping[tuple[int, str], float],
    labels: Mapping[tuple[int, str], str],
    tips: Mapping[tuple[int, str], str],
    places: Mapping[tuple[int, str], str],
) -> Markup:
    """A heat map, layers down and sites across; the largest cell has the full colour. `places` name the cells for a script."""
    sites = [site for site in SITES if any(cell[1] == site for cell in cells)]
    layers = sorted({layer for layer, _ in cells})
    largest = max((abs(value) for value in cells.values()), default=0.0) or 1.0
    rows = []
    for (layer, site), value in cells.items():
        step = min(int(abs(value) / largest * len(RAMP)), len(RAMP) - 1)
        row = {"layer": layer, "site": site, "label": labels[layer, site], "tip": tips[layer, site]}
        rows.append(row | {"colour": RAMP[step], "text": ON_RAMP[step >= 5]})
    across = max(30, min(64, 300 // max(len(sites), 1)))
    gap = alt.Scale(paddingInner=0.07, paddingOuter=0.03)
    base = alt.Chart(data(rows)).encode(
        x=alt.X("site:N", sort=sites, title=None, axis=alt.Axis(orient="top", labelAngle=0, ticks=False, domain=False), scale=gap),
        y=alt.Y(
            "layer:O",
            sort=layers,
            title="layer",
            axis=alt.Axis(ticks=False, domain=False, titleAngle=0, titleAlign="right", titleY=-8),
            scale=gap,
        ),
        description="tip:N",
    )
    tiles = base.mark_rect(cornerRadius=2).encode(color=alt.Color("colour:N", scale=None))
    text = base.mark_text(fontSize=11, aria=False).encode(text="label:N", color=alt.Color("text:N", scale=None))
    named = {visible(tips[cell], 300): places[cell] for cell in cells}
    return drawing(alt.layer(tiles, text), across * len(sites), 26 if len(layers) <= 24 else 17, step=True, size="map", places=named)


def sweep_figure(sweeps: Sequence[Sweep]) -> Markup:
    """Causal effect against set size, drawn once for a page and once for a phone."""
    sizes = (("wide", WIDE, 350), ("narrow", NARROW, 300))
    return Markup("").join(drawing(_sweeps(sweeps, width, height), width, height, size=size) for size, width, height in sizes)


def _sweeps(sweeps: Sequence[Sweep], width: int, height: int) -> Any:
    names = [sweep.method for sweep in sweeps]
    lines: list[Any] = []
    band: dict[Any, Any] = {}
    sizes: dict[int, float] = {}
    for sweep in sweeps:
        colour, shape = look(sweep.method, names)
        for point in sweep.points:
            effect, n = point["causal_effect"], int(point["n_neurons"])
            sizes[n] = float(point["size"])
            tip = f"{sweep.method}, {n:,} neurons: {interval(effect)}"
            if effect["value"] is not None:
                ends = {name: float(effect[name]) for name in ("value", "low", "high")}
                lines.append({"method": visible(sweep.method, 40), "n": n, "tip": tip, "colour": colour, "shape": shape, **ends})
            values = [float(other["value"]) for other in point["random_effects"] if other["value"] is not None]
            if values:
                low, high = band.get(n, (np.inf, -np.inf))
                band[n] = (min(low, *values), max(high, *values))
    scale = _log_scale(list(sizes))
    top, bottom = _range(lines, band, sweeps)
    y = alt.Y(
        "value:Q",
        scale=alt.Scale(domain=[bottom, top], nice=False),
        title="causal effect",
        axis=alt.Axis(titleAngle=0, titleAlign="left", titleX=-36, titleY=-12, values=[0, 0.25, 0.5, 0.75, 1], format=".2~f", domain=False),
    )
    x = alt.X("n:Q", scale=scale, title=_size_title(width), axis=_size_axis(sizes, width))
    ceilings = _ceilings(sweeps)
    layers = [*_band(band, x, y), *_references(ceilings, y, width)]
    if lines:
        layers += _lines(lines, x, y)
    layers += _names(lines, ceilings, y, width, (top - bottom) / height)
    return alt.layer(*layers)


def _size_title(width: int) -> str | list[str]:
    words = ["neurons patched (log scale)", "and share of those scored"]
    return words if width <= NARROW else " ".join(words)


def _log_scale(sizes: list[int]) -> alt.Scale:
    smallest, largest = max(min(sizes, default=1), 1), max(max(sizes, default=1), 1)
    room = max((largest / smallest) ** 0.05, 1.15)
    return alt.Scale(type="log", domain=[smallest / room, largest * room], nice=False)


def _size_axis(sizes: Mapping[int, float], width: int) -> alt.Axis:
    """Ticks at the sizes measured, as many as have room."""
    kept: list[int] = []
    ordered = sorted(sizes, reverse=True)
    span = np.log(max(ordered[0] / max(ordered[-1], 1), 1.2))
    for n in ordered:
        if not kept or np.log(kept[-1] / max(n, 1)) / span * width > 52:
            kept.append(n)
    text = "datum.value"
    for n in kept:
        text = f"datum.value == {n} ? ['{n:,}', '{100 * sizes[n]:.3g} %'] : {text}"
    return alt.Axis(values=kept, labelExpr=text, grid=False)


def _range(lines: list[dict[str, Any]], band: Mapping[int, tuple[float, float]], sweeps: Sequence[Sweep]) -> tuple[float, float]:
    values = [0.0, 1.0, *(row[end] for row in lines for end in ("low", "high")), *(value for ends in band.values() for value in ends)]
    values += [sweep.ceiling["high"] for sweep in sweeps if sweep.ceiling.get("high") is not None]
    return min(max(values), 2.5) + 0.06, max(min(values), -1.5) - 0.06


def _band(band: Mapping[int, tuple[float, float]], x: alt.X, y: alt.Y) -> list[Any]:
    if not band:
        return []
    rows = [
        {"n": n, "value": low, "high": high, "tip": f"random sets of {n:,} neurons: {low:.2f} to {high:.2f}"}
        for n, (low, high) in sorted(band.items())
    ]
    base = alt.Chart(data(rows)).encode(x=x, y=y, y2="high:Q", description="tip:N")
    label = alt.Chart(data(rows[-1:])).mark_text(align="right", dx=4, dy=-10, color=SOFT, fontSize=12, aria=False)
    return [
        base.mark_area(color=BAND, stroke=BAND, strokeWidth=5, strokeJoin="round", opacity=0.6, aria=False),
        base.mark_rule(color=BAND, strokeWidth=7, strokeCap="round"),
        label.encode(x=x, y=alt.Y("high:Q"), text=alt.value("random sets (range)")),
    ]


def _ceilings(sweeps: Sequence[Sweep]) -> list[dict[str, Any]]:
    """The ceiling, once where all sweeps have the same."""
    known = {round(sweep.ceiling["value"], 3): sweep for sweep in sweeps if sweep.ceiling.get("value") is not None}
    rows = []
    for sweep in known.values():
        whose = "" if len(known) == 1 else f" ({visible(sweep.method, 40)})"
        rows.append({"value": sweep.ceiling["value"], "method": f"all neurons{whose} {sweep.ceiling['value']:.2f}", "colour": INK})
    return rows


def _references(ceilings: list[dict[str, Any]], y: alt.Y, width: int) -> list[Any]:
    """Zero, and the ceiling, which is named at the right where there is room."""
    layers = [alt.Chart(data([{"value": 0}])).mark_rule(color=FAINT, aria=False).encode(y=y)]
    for row in ceilings:
        layers.append(alt.Chart(data([row])).mark_rule(color=INK, strokeDash=[5, 4], strokeWidth=1.2, aria=False).encode(y=y))
        if width <= NARROW:
            text = alt.Chart(data([row])).mark_text(align="left", dy=-8, dx=2, color=INK, aria=False)
            layers.append(text.encode(y=y, x=alt.value(0), text="method:N"))
    return layers


def _lines(lines: list[dict[str, Any]], x: alt.X, y: alt.Y) -> list[Any]:
    base = alt.Chart(data(lines)).encode(x=x, y=y, color=alt.Color("colour:N", scale=None))
    points = base.mark_point(filled=True, size=58, opacity=1, stroke=PAPER, strokeWidth=1).encode(
        shape=alt.Shape("shape:N", scale=None), description="tip:N"
    )
    ends = base.mark_rule(strokeWidth=1.6, opacity=0.75, aria=False).encode(y=alt.Y("low:Q"), y2="high:Q")
    strokes = base.mark_line(strokeWidth=2.2, aria=False).encode(detail="method:N")
    return [ends, strokes, points]


def _names(lines: list[dict[str, Any]], ceilings: list[dict[str, Any]], y: alt.Y, width: int, per_pixel: float) -> list[Any]:
    """The methods' names, at the ends of their lines; above the plot where there is no room beside it."""
    last = {row["method"]: row for row in sorted(lines, key=lambda row: row["n"])}
    ordered = sorted(last.values(), key=lambda row: -row["value"])
    colour = alt.Color("colour:N", scale=None)
    if width <= NARROW:
        return [
            alt.Chart(data([row]))
            .mark_text(align="right", fontWeight="bold", aria=False)
            .encode(x=alt.value(width), y=alt.value(-16 * (len(ordered) - place) - 8), text="method:N", color=colour)
            for place, row in enumerate(ordered)
        ]
    below, labels = np.inf, []
    for row in sorted([*ceilings, *ordered], key=lambda row: -row["value"]):
        below = min(row["value"], below - 17 * per_pixel)
        labels.append(row | {"value": below})
    text = alt.Chart(data(labels)).mark_text(align="left", fontWeight="bold", aria=False)
    return [text.encode(x=alt.value(width + 8), y=y, text="method:N", color=colour)]


@dataclass(frozen=True)
class Row:
    """One row of a dot plot."""

    label: str
    value: float | int | None
    low: float | int | None
    high: float | int | None
    text: str
    """What is written at the right."""
    colour: str = INK
    shape: str = "circle"
    dots: Sequence[float | int] = ()
    """Further values drawn faintly, such as single random sets."""


def dot_figure(rows: Sequence[Row], title: str, *, domain: tuple[float | int, float | int], reference: float | int | None = None) -> Markup:
    """A dot plot with intervals and the numbers at the right."""
    sizes = (("wide", 228, 150), ("narrow", 88, 132))
    return Markup("").join(
        drawing(_dots(rows, title, domain, reference, width, labels), width, 28, step=True, size=size) for size, width, labels in sizes
    )


def _dots(
    rows: Sequence[Row], title: str, domain: tuple[float | int, float | int], reference: float | int | None, width: int, labels: int
) -> Any:
    order = [visible(row.label, 40) for row in rows]
    shown = [
        {"label": label, "value": row.value, "low": row.low, "high": row.high, "text": row.text, "colour": row.colour, "shape": row.shape}
        | {"tip": f"{label}: {row.text}"}
        for label, row in zip(order, rows, strict=True)
    ]
    axis = alt.Axis(ticks=False, domain=False, labelColor=INK, labelLimit=labels)
    y = alt.Y("label:N", sort=order, title=None, axis=axis, scale=alt.Scale(domain=order))
    room = (domain[1] - domain[0]) / (6 if width > 150 else 3)
    step = next((step for step in (0.01, 0.02, 0.05, 0.1, 0.25, 0.5) if step >= room), 1.0)
    ticks = [round(tick * step, 2) for tick in range(round(-4 / step), round(4 / step) + 1) if domain[0] <= tick * step <= domain[1]]
    x = alt.X(
        "value:Q",
        scale=alt.Scale(domain=list(domain), nice=False, clamp=True),
        title=title,
        axis=alt.Axis(values=ticks, format=".2~f", domain=False),
    )
    colour = alt.Color("colour:N", scale=None)
    base = alt.Chart(data(shown)).encode(y=y)
    layers = []
    if reference is not None:
        rule = alt.Chart(data([{"value": reference}])).mark_rule(color=INK, strokeDash=[5, 4], strokeWidth=1.2, aria=False)
        layers.append(rule.encode(x=x))
    faint = [{"label": label, "value": dot} for label, row in zip(order, rows, strict=True) for dot in row.dots]
    if faint:
        layers.append(alt.Chart(data(faint)).mark_tick(color=SOFT, thickness=2, size=11, opacity=0.8, aria=False).encode(y=y, x=x))
    ranged = alt.Chart(data([row for row in shown if row["low"] is not None])).mark_rule(strokeWidth=2.4, opacity=0.75, aria=False)
    dotted = alt.Chart(data([row for row in shown if row["value"] is not None])).mark_point(filled=True, size=80, opacity=1)
    layers.append(ranged.encode(y=y, x=alt.X("low:Q"), x2="high:Q", color=colour))
    layers.append(dotted.encode(y=y, x=x, color=colour, shape=alt.Shape("shape:N", scale=None), description="tip:N"))
    layers.append(base.mark_text(align="left", dx=10, aria=False).encode(x=alt.value(width), text="text:N"))
    return alt.layer(*layers)


def agreement_figure(names: Sequence[str], jaccard: Mapping[tuple[str, str], float]) -> Markup:
    """Agreement of every two methods as a lower triangle."""
    rows = []
    for place, first in enumerate(names):
        for second in names[:place]:
            value = jaccard.get((first, second), jaccard.get((second, first)))
            if value is None:
                continue
            step = min(int(value * len(RAMP)), len(RAMP) - 1)
            row = {
                "row": visible(first, 40),
                "column": visible(second, 40),
                "label": f"{value:.2f}",
                "tip": f"{first} and {second}: {value:.2f}",
            }
            rows.append(row | {"colour": RAMP[step], "text": ON_RAMP[step >= 5]})
    order = [visible(each, 40) for each in names]
    base = alt.Chart(data(rows)).encode(
        x=alt.X("column:N", sort=order, title=None, axis=alt.Axis(orient="bottom", labelAngle=-40, ticks=False, domain=False)),
        y=alt.Y("row:N", sort=order, title=None, axis=alt.Axis(ticks=False, domain=False, labelColor=INK)),
        description="tip:N",
    )
    tiles = base.mark_rect(cornerRadius=2, stroke=PAPER, strokeWidth=2).encode(color=alt.Color("colour:N", scale=None))
    text = base.mark_text(fontSize=11, aria=False).encode(text="label:N", color=alt.Color("text:N", scale=None))

    columns = max(len(order) - 1, 1)
    chart = alt.layer(tiles, text)
    narrow = max(20, 190 // columns) * columns
    return drawing(chart, 46 * columns, 32, step=True, size="wide") + drawing(chart, narrow, 32, step=True, size="narrow")
