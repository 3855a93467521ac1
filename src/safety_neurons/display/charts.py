"""All charts, as static SVG in the colours of a page or its own: drawn by Vega-Lite, then rewritten through a
list of what may stay.

The colours in a chart are placeholders (`INK`, `RAMP[3]`, …). Here they become classes, so that light, dark
and print are one drawing. Every chart comes with its labels in words; tables beside it carry the same
numbers.
"""

from __future__ import annotations

import functools
import importlib
import json
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

import numpy as np
from markupsafe import Markup

from safety_neurons.counting import numbered
from safety_neurons.display.text import interval, visible
from safety_neurons.neurons import SITES

if TYPE_CHECKING:
    import altair as alt
else:

    class _Later:
        """Altair, imported where a chart is drawn: a terminal shows tables and need not wait for it."""

        def __getattr__(self, name: str) -> Any:
            return getattr(importlib.import_module("altair"), name)

    alt = _Later()

INK, SOFT, FAINT, GRID, PAPER, BAND = "#f0a001", "#f0a002", "#f0a003", "#f0a004", "#f0a005", "#f0a006"
COLOURS = tuple(f"#f0b{number:03x}" for number in range(1, 9))
"""Categories; colour-blind-safe in both schemes, and never the only mark of a category."""
RAMP = tuple(f"#f0c{number:03x}" for number in range(9))
"""From little to much."""
ON_RAMP = ("#f0d001", "#f0d002")
"""Text on the lower and on the upper part of the ramp."""

_CLASSES = {
    **{INK: "ink", SOFT: "soft", FAINT: "faint", GRID: "grid", PAPER: "paper", BAND: "band"},
    **{colour: f"c{number}" for number, colour in enumerate(COLOURS)},
    **{colour: f"r{number}" for number, colour in enumerate(RAMP)},
    **{colour: f"on{number}" for number, colour in enumerate(ON_RAMP)},
}
_TAGS = {"svg", "g", "path", "line", "rect", "text", "tspan", "circle"}
_ATTRIBUTES = {
    *(
        "d",
        "x",
        "y",
        "x1",
        "x2",
        "y1",
        "y2",
        "dx",
        "dy",
        "cx",
        "cy",
        "r",
        "width",
        "height",
        "transform",
        "text-anchor",
        "opacity",
    ),
    *(
        "fill",
        "stroke",
        "fill-opacity",
        "stroke-opacity",
        "stroke-width",
        "stroke-dasharray",
        "stroke-linecap",
        "stroke-linejoin",
    ),
    *("font-size", "font-weight", "font-style", "stroke-miterlimit", "viewBox"),
}
ROOM = 16
_NAMESPACE = "{http://www.w3.org/2000/svg}"


FONT = "Helvetica, Arial, sans-serif"
_CONFIG = {
    "font": FONT,
    "background": "transparent",
    "view": {"stroke": None},
    "text": {"fontSize": 12, "color": INK},
    "legend": {
        "labelFontSize": 12,
        "labelColor": INK,
        "symbolStrokeWidth": 2.4,
        "symbolSize": 260,
        "labelLimit": 200,
        "title": None,
    },
    "axis": {
        **{
            "labelColor": SOFT,
            "titleColor": SOFT,
            "labelFontSize": 12,
            "titleFontSize": 12,
            "titleFontWeight": "normal",
            "labelLimit": 260,
        },
        **{
            "gridColor": GRID,
            "domainColor": FAINT,
            "tickColor": FAINT,
            "tickSize": 4,
            "titlePadding": 8,
            "labelPadding": 5,
        },
    },
}


@functools.lru_cache(maxsize=256)
def _drawn(specification: str) -> str:
    import vl_convert

    svg: str = vl_convert.vegalite_to_svg(specification)
    return svg


def drawing(
    chart: Any,
    width: float | int,
    height: float | int,
    *,
    step: bool = False,
    size: str = "",
    places: Mapping[str, str] | None = None,
) -> Markup:
    """The chart as an SVG element without scripts, styles, links or colours of its own.

    Args:
        chart: what to draw.
        width: of the plot, in pixels.
        height: of the plot, or with `step` of one of its rows, in pixels.
        step: whether the height is that of a row.
        size: an additional class, `wide`, `narrow` or `map`.
        places: names that a script finds marks by, keyed by what the mark says.
    """
    around = {"width": width, "height": {"step": height} if step else height, "padding": 2, "config": _CONFIG}
    specification = chart.to_dict(validate=False) | around
    root = ElementTree.fromstring(_drawn(json.dumps(specification)))
    clean = _cleaned(root, places or {})
    assert clean is not None
    whole, tall = float(root.get("width", "0")) + 3 * ROOM, float(root.get("height", "0"))
    clean.set(
        "viewBox", f"{-ROOM} 0 {whole:g} {tall:g}"
    )  # Fonts of the reader may be wider than those measured here.
    clean.set("width", f"{whole:g}")
    clean.set("class", f"chart {size}".strip())
    clean.set("aria-hidden", "true")
    clean.set("focusable", "false")
    return Markup(ElementTree.tostring(clean, encoding="unicode"))  # noqa: S704 - rebuilt from allowed tags and attributes


def _cleaned(element: ElementTree.Element, places: Mapping[str, str]) -> ElementTree.Element | None:
    tag = element.tag.removeprefix(_NAMESPACE)
    if tag not in _TAGS or element.get("display") == "none":
        return None
    if (
        tag == "path"
        and element.get("class") in ("background", "foreground")
        and element.get("stroke") is None
    ):
        return None
    kept = ElementTree.Element(tag)
    classes = []
    for attribute, value in element.attrib.items():
        if attribute not in _ATTRIBUTES:
            continue
        if attribute in ("fill", "stroke") and value.lower() in _CLASSES:
            classes.append(f"{attribute[0]}-{_CLASSES[value.lower()]}")
        else:
            kept.set(attribute, value)
    if classes:
        kept.set("class", " ".join(classes))
    if (
        element.get("role") == "graphics-symbol"
        and (label := element.get("aria-label"))
        and element.get("aria-roledescription") not in ("axis", "legend", "title")
    ):
        said = visible(label, 300)
        ElementTree.SubElement(kept, "title").text = said
        if said in places:
            kept.set("data-cell", places[said])
    kept.text = visible(element.text, 300) if element.text else None
    for child in element:
        clean = _cleaned(child, places)
        if clean is not None and (clean.tag != "g" or len(clean)):
            kept.append(clean)
    return kept


METHODS = (
    "contrast",
    "attribution-patching",
    "importance-contrast",
    "importance",
    "attribution",
    "weight-change",
    "mask",
)
SHAPES = (
    "circle",
    "diamond",
    "square",
    "triangle-up",
    "cross",
    "triangle-down",
    "triangle-left",
    "triangle-right",
)
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
    return alt.Data(values=tuple(dict(row) for row in rows))


def site_map(
    cells: Mapping[tuple[int, str], float],
    labels: Mapping[tuple[int, str], str],
    tips: Mapping[tuple[int, str], str],
    places: Mapping[tuple[int, str], str],
) -> Markup:
    """A heat map, layers down and sites across; the largest cell has the full colour.

    `places` name the cells for a script.
    """
    sites = [site for site in SITES if any(cell[1] == site for cell in cells)]
    layers = sorted({layer for layer, _ in cells})
    largest = max((abs(value) for value in cells.values()), default=0.0) or 1.0
    rows = []
    for (layer, site), value in cells.items():
        row = {"layer": layer, "site": site, "label": labels[layer, site], "tip": tips[layer, site]}
        rows.append(row | _on_ramp(value, largest))
    across = max(30, min(64, 300 // max(len(sites), 1)))
    gap = alt.Scale(paddingInner=0.07, paddingOuter=0.03)
    top = alt.Axis(orient="top", labelAngle=0, ticks=False, domain=False)
    left = alt.Axis(ticks=False, domain=False, titleAngle=0, titleAlign="right", titleY=-8)
    chart = _heat_map(
        rows,
        alt.X("site:N", sort=sites, title=None, axis=top, scale=gap),
        alt.Y("layer:O", sort=layers, title="layer", axis=left, scale=gap),
    )
    named = {visible(tips[cell], 300): places[cell] for cell in cells}
    return drawing(
        chart, across * len(sites), 26 if len(layers) <= 24 else 17, step=True, size="map", places=named
    )


def _on_ramp(value: float, largest: float = 1.0) -> dict[str, str]:
    """Colours of a cell and of its text, from little to much of the largest."""
    step = min(int(abs(value) / (largest or 1.0) * len(RAMP)), len(RAMP) - 1)
    return {"colour": RAMP[step], "text": ON_RAMP[step >= 5]}


def _heat_map(rows: Sequence[Mapping[str, Any]], x: alt.X, y: alt.Y, **edges: Any) -> Any:
    """A tile for every row, its label on it."""
    base = alt.Chart(data(rows)).encode(x=x, y=y, description=alt.Description("tip:N"))
    tiles = base.mark_rect(cornerRadius=2, **edges).encode(color=alt.Color("colour:N", scale=None))
    text = base.mark_text(fontSize=11, aria=False).encode(
        text=alt.Text("label:N"), color=alt.Color("text:N", scale=None)
    )
    return alt.layer(tiles, text)


def sweep_figure(sweeps: Sequence[Sweep]) -> Markup:
    """Causal effect against set size, drawn once for a page and once for a phone."""
    sizes = (("wide", WIDE, 350), ("narrow", NARROW, 300))
    return Markup("").join(
        drawing(_sweeps(sweeps, width, height), width, height, size=size) for size, width, height in sizes
    )


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
            tip = f"{sweep.method}, {numbered(n, 'neuron')}: {interval(effect)}"
            if effect["value"] is not None:
                ends = {name: float(effect[name]) for name in ("value", "low", "high")}
                lines.append(
                    {
                        "method": visible(sweep.method, 40),
                        "n": n,
                        "tip": tip,
                        "colour": colour,
                        "shape": shape,
                        **ends,
                    }
                )
            values = [
                float(other["value"]) for other in point["random_effects"] if other["value"] is not None
            ]
            if values:
                low, high = band.get(n, (np.inf, -np.inf))
                band[n] = (min(low, *values), max(high, *values))
    scale = _log_scale(list(sizes))
    top, bottom = _range(lines, band, sweeps)
    y = alt.Y(
        "value:Q",
        scale=alt.Scale(domain=[bottom, top], nice=False),
        title="causal effect",
        axis=alt.Axis(
            titleAngle=0,
            titleAlign="left",
            titleX=-36,
            titleY=-12,
            values=[0, 0.25, 0.5, 0.75, 1],
            format=".2~f",
            domain=False,
        ),
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


def _range(
    lines: list[dict[str, Any]], band: Mapping[int, tuple[float, float]], sweeps: Sequence[Sweep]
) -> tuple[float, float]:
    values = [
        0.0,
        1.0,
        *(row[end] for row in lines for end in ("low", "high")),
        *(value for ends in band.values() for value in ends),
    ]
    values += [sweep.ceiling["high"] for sweep in sweeps if sweep.ceiling.get("high") is not None]
    return min(max(values), 2.5) + 0.06, max(min(values), -1.5) - 0.06


def _band(band: Mapping[int, tuple[float, float]], x: alt.X, y: alt.Y) -> list[Any]:
    if not band:
        return []
    rows = [
        {
            "n": n,
            "value": low,
            "high": high,
            "tip": f"random sets of {numbered(n, 'neuron')}: {low:.2f} to {high:.2f}",
        }
        for n, (low, high) in sorted(band.items())
    ]
    base = alt.Chart(data(rows)).encode(x=x, y=y, y2=alt.Y2("high:Q"), description=alt.Description("tip:N"))
    label = alt.Chart(data(rows[-1:])).mark_text(
        align="right", dx=4, dy=-10, color=SOFT, fontSize=12, aria=False
    )
    return [
        base.mark_area(color=BAND, stroke=BAND, strokeWidth=5, strokeJoin="round", opacity=0.6, aria=False),
        base.mark_rule(color=BAND, strokeWidth=7, strokeCap="round"),
        label.encode(x=x, y=alt.Y("high:Q"), text=alt.TextValue("random sets (range)")),
    ]


def _ceilings(sweeps: Sequence[Sweep]) -> list[dict[str, Any]]:
    """The ceiling, once where all sweeps have the same."""
    known = {
        round(sweep.ceiling["value"], 3): sweep for sweep in sweeps if sweep.ceiling.get("value") is not None
    }
    rows = []
    for sweep in known.values():
        whose = "" if len(known) == 1 else f" ({visible(sweep.method, 40)})"
        rows.append(
            {
                "value": sweep.ceiling["value"],
                "method": f"all neurons{whose} {sweep.ceiling['value']:.2f}",
                "colour": INK,
            }
        )
    return rows


def _references(ceilings: list[dict[str, Any]], y: alt.Y, width: int) -> list[Any]:
    """Zero, and the ceiling, which is named at the right where there is room."""
    layers = [alt.Chart(data([{"value": 0}])).mark_rule(color=FAINT, aria=False).encode(y=y)]
    for row in ceilings:
        layers.append(
            alt.Chart(data([row]))
            .mark_rule(color=INK, strokeDash=[5, 4], strokeWidth=1.2, aria=False)
            .encode(y=y)
        )
        if width <= NARROW:
            text = alt.Chart(data([row])).mark_text(align="left", dy=-8, dx=2, color=INK, aria=False)
            layers.append(text.encode(y=y, x=alt.XValue(0), text=alt.Text("method:N")))
    return layers


def _lines(lines: list[dict[str, Any]], x: alt.X, y: alt.Y) -> list[Any]:
    base = alt.Chart(data(lines)).encode(x=x, y=y, color=alt.Color("colour:N", scale=None))
    points = base.mark_point(filled=True, size=58, opacity=1, stroke=PAPER, strokeWidth=1).encode(
        shape=alt.Shape("shape:N", scale=None), description=alt.Description("tip:N")
    )
    ends = base.mark_rule(strokeWidth=1.6, opacity=0.75, aria=False).encode(
        y=alt.Y("low:Q"), y2=alt.Y2("high:Q")
    )
    strokes = base.mark_line(strokeWidth=2.2, aria=False).encode(detail=alt.Detail("method:N"))
    return [ends, strokes, points]


def _names(
    lines: list[dict[str, Any]], ceilings: list[dict[str, Any]], y: alt.Y, width: int, per_pixel: float
) -> list[Any]:
    """The methods' names, at the ends of their lines; above the plot where there is no room beside it."""
    last = {row["method"]: row for row in sorted(lines, key=lambda row: row["n"])}
    ordered = sorted(last.values(), key=lambda row: -row["value"])
    colour = alt.Color("colour:N", scale=None)
    if width <= NARROW:
        return [
            alt.Chart(data([row]))
            .mark_text(align="right", fontWeight="bold", aria=False)
            .encode(
                x=alt.XValue(width),
                y=alt.YValue(-16 * (len(ordered) - place) - 8),
                text=alt.Text("method:N"),
                color=colour,
            )
            for place, row in enumerate(ordered)
        ]
    below, labels = np.inf, []
    for row in sorted([*ceilings, *ordered], key=lambda row: -row["value"]):
        below = min(row["value"], below - 17 * per_pixel)
        labels.append(row | {"value": below})
    text = alt.Chart(data(labels)).mark_text(align="left", fontWeight="bold", aria=False)
    return [text.encode(x=alt.XValue(width + 8), y=y, text=alt.Text("method:N"), color=colour)]


@dataclass(frozen=True)
class DotRow:
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
    chance: Sequence[Mapping[str, Any]] = ()
    """What chance gives, as `low`, `high` and `expected` where it is known: the first as a grey bar, a second
    as a line below it.
    """
    beside: str = ""
    """What the text alternative says of chance."""

    @property
    def words(self) -> str:
        """The row as text."""
        return f"{self.label}: {self.text}{self.beside and f' ({self.beside})'}"


NAMES = 72
"""Characters of a row's name: two names of sets and the word between them."""


def dot_figure(
    rows: Sequence[DotRow],
    title: str,
    *,
    domain: tuple[float | int, float | int],
    reference: float | int | None = None,
) -> Markup:
    """A dot plot with intervals, what chance gives, and the numbers at the right."""
    longest = max((len(visible(row.label, NAMES)) for row in rows), default=0)
    sizes = (("wide", 228, min(max(150, 7 * longest), 320)), ("narrow", 88, 132))
    return Markup("").join(
        drawing(_dots(rows, title, domain, reference, width, labels), width, 28, step=True, size=size)
        for size, width, labels in sizes
    )


def _dots(
    rows: Sequence[DotRow],
    title: str,
    domain: tuple[float | int, float | int],
    reference: float | int | None,
    width: int,
    labels: int,
) -> Any:
    order = [visible(row.label, NAMES) for row in rows]
    shown = [
        {
            "label": label,
            "value": row.value,
            "low": row.low,
            "high": row.high,
            "text": row.text,
            "colour": row.colour,
            "shape": row.shape,
        }
        | {"tip": row.words}
        for label, row in zip(order, rows, strict=True)
    ]
    axis = alt.Axis(ticks=False, domain=False, labelColor=INK, labelLimit=labels)
    y = alt.Y("label:N", sort=order, title=None, axis=axis, scale=alt.Scale(domain=order))
    room = (domain[1] - domain[0]) / (6 if width > 150 else 3)
    power = 10.0 ** np.floor(np.log10(room))
    step = float(
        next(power * part for part in (1, 2.5 if power >= 0.1 else 2, 5, 10) if power * part >= room)
    )
    ticks = [round(tick * step, 9) for tick in range(int(domain[0] / step) - 1, int(domain[1] / step) + 2)]
    ticks = [tick for tick in ticks if domain[0] <= tick <= domain[1]]
    x = alt.X(
        "value:Q",
        scale=alt.Scale(domain=list(domain), nice=False, clamp=True),
        title=title,
        axis=alt.Axis(values=ticks, format=",.3~r", domain=False),
    )
    colour = alt.Color("colour:N", scale=None)
    base = alt.Chart(data(shown)).encode(y=y)
    layers = _chance(order, rows, y, x)
    if reference is not None:
        rule = alt.Chart(data([{"value": reference}])).mark_rule(
            color=INK, strokeDash=[5, 4], strokeWidth=1.2, aria=False
        )
        layers.append(rule.encode(x=x))
    faint = [
        {"label": label, "value": dot} for label, row in zip(order, rows, strict=True) for dot in row.dots
    ]
    if faint:
        layers.append(
            alt.Chart(data(faint))
            .mark_tick(color=SOFT, thickness=2, size=11, opacity=0.8, aria=False)
            .encode(y=y, x=x)
        )
    ranged = alt.Chart(data([row for row in shown if row["low"] is not None])).mark_rule(
        strokeWidth=2.4, opacity=0.75, aria=False
    )
    dotted = alt.Chart(data([row for row in shown if row["value"] is not None])).mark_point(
        filled=True, size=80, opacity=1
    )
    layers.append(ranged.encode(y=y, x=alt.X("low:Q"), x2=alt.X2("high:Q"), color=colour))
    layers.append(
        dotted.encode(
            y=y,
            x=x,
            color=colour,
            shape=alt.Shape("shape:N", scale=None),
            description=alt.Description("tip:N"),
        )
    )
    layers.append(
        base.mark_text(align="left", dx=10, aria=False).encode(x=alt.XValue(width), text=alt.Text("text:N"))
    )
    return alt.layer(*layers)


def _chance(order: Sequence[str], rows: Sequence[DotRow], y: alt.Y, x: alt.X) -> list[Any]:
    """Ranges of chance behind the rows; two kinds differ in place and width, not by colour alone."""
    looks = ((BAND, 12, 0), (COLOURS[1], 3, 9))
    layers = []
    for kind, (colour, thick, below) in enumerate(looks):
        ranges = [
            {"label": label, **row.chance[kind]}
            for label, row in zip(order, rows, strict=True)
            if len(row.chance) > kind
        ]
        known = [each for each in ranges if each.get("low") is not None and each.get("high") is not None]
        means = [
            {"label": each["label"], "value": each["expected"]}
            for each in known
            if each.get("expected") is not None
        ]
        if known:
            bars = alt.Chart(data(known)).mark_rule(
                color=colour, strokeWidth=thick, yOffset=below, aria=False
            )
            layers.append(bars.encode(y=y, x=alt.X("low:Q"), x2=alt.X2("high:Q")))
        if means:
            ticks = alt.Chart(data(means)).mark_tick(
                color=colour if below else FAINT, thickness=2, size=12 - below // 3, yOffset=below
            )
            layers.append(ticks.encode(y=y, x=x, description=alt.DescriptionValue("mean of chance")))
    return layers


def agreement_figure(names: Sequence[str], jaccard: Mapping[tuple[str, str], float]) -> Markup:
    """Agreement of every two methods as a lower triangle."""
    rows = []
    for place, first in enumerate(names):
        for second in names[:place]:
            value = jaccard.get((first, second), jaccard.get((second, first)))
            if value is None:
                continue
            row = {"row": visible(first, 40), "column": visible(second, 40), "label": f"{value:.2f}"}
            rows.append(row | {"tip": f"{first} and {second}: {value:.2f}"} | _on_ramp(value))
    order = [visible(each, 40) for each in names]
    bottom = alt.Axis(orient="bottom", labelAngle=-40, ticks=False, domain=False)
    left = alt.Axis(ticks=False, domain=False, labelColor=INK)
    x, y = (
        alt.X("column:N", sort=order, title=None, axis=bottom),
        alt.Y("row:N", sort=order, title=None, axis=left),
    )
    chart = _heat_map(rows, x, y, stroke=PAPER, strokeWidth=2)
    columns = max(len(order) - 1, 1)
    narrow = max(20, 190 // columns) * columns
    return drawing(chart, 46 * columns, 32, step=True, size="wide") + drawing(
        chart, narrow, 32, step=True, size="narrow"
    )


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


Bands = Mapping[str, Sequence[tuple[float, float, float]]]
"""By name x, lower and upper end of what random choices give."""


def line_figure(
    lines: Sequence[Line], plane: Plane, *, bands: Bands | None = None, size: int = 330
) -> Markup:
    """Curves in one plane, with a key: the first of the bands is a grey area, others are dashed outlines."""
    kept = [line for line in lines if line.points][: len(COLOURS)]
    wide = drawing(_curves(kept, plane, bands or {}, size), size, size * 0.8, size="wide")
    return wide + drawing(_curves(kept, plane, bands or {}, PHONE), PHONE, 210, size="narrow")


def _curves(lines: Sequence[Line], plane: Plane, bands: Bands, width: int) -> Any:
    def axis(title: str, ends: tuple[float, float]) -> dict[str, Any]:
        return {
            "title": title,
            "scale": alt.Scale(domain=list(ends), nice=False, clamp=True),
            "axis": alt.Axis(tickCount=5, format=".2~f" if ends[1] <= 2 else ",~r", domain=False, grid=True),
        }

    x, y = alt.X("x:Q", **axis(plane.x, plane.x_range)), alt.Y("y:Q", **axis(plane.y, plane.y_range))
    layers: list[Any] = []
    for place, band in enumerate(bands.values()):
        rows = [{"x": at, "y": low, "high": high} for at, low, high in band]
        edge = (
            {"stroke": SOFT, "strokeDash": [3, 3], "strokeWidth": 1.2, "color": GRID}
            if place
            else {"color": BAND}
        )
        layers.append(
            alt.Chart(data(rows))
            .mark_area(opacity=0.6, aria=False, **edge)
            .encode(x=x, y=y, y2=alt.Y2("high:Q"))
        )
    if plane.diagonal:
        (left, right), (low, high) = plane.x_range, plane.y_range
        ends = data([{"x": left, "y": low}, {"x": right, "y": high}])
        layers.append(
            alt.Chart(ends)
            .mark_line(color=FAINT, strokeDash=[5, 4], strokeWidth=1.2, aria=False)
            .encode(x=x, y=y)
        )
    names = [visible(line.name, 40) for line in lines]
    legend = None
    if len(lines) > 1:
        legend = alt.Legend(title=None, orient="bottom" if width == PHONE else "right", columns=1)
    colour = alt.Color(
        "line:N", scale=alt.Scale(domain=names, range=list(COLOURS[: len(names)])), legend=legend
    )
    dash = alt.StrokeDash(
        "line:N", scale=alt.Scale(domain=names, range=list(DASHES[: len(names)])), legend=legend
    )
    for name, line in zip(names, lines, strict=True):
        made: list[dict[str, Any]] = [{"x": at, "y": value, "line": name} for at, value in line.points]
        mark = alt.Chart(data(made)).mark_line(
            strokeWidth=2, aria=False, interpolate="step-after" if line.step else "linear"
        )
        layers.append(mark.encode(x=x, y=y, color=colour, strokeDash=dash))
        if line.ends:
            rules = [
                {"x": at, "y": low, "high": high, "line": name}
                for (at, _), (low, high) in zip(line.points, line.ends, strict=True)
            ]
            layers.append(
                alt.Chart(data(rules))
                .mark_rule(strokeWidth=1.4, opacity=0.7, aria=False)
                .encode(x=x, y=y, y2=alt.Y2("high:Q"), color=colour)
            )
        if line.marked:
            dots = [row | {"tip": f"{name}: {row['x']:.4g}, {row['y']:.3f}"} for row in made]
            shape = SHAPES[names.index(name) % len(SHAPES)]
            points = alt.Chart(data(dots)).mark_point(filled=True, size=46, opacity=1, shape=shape)
            layers.append(
                points.encode(
                    x=x,
                    y=y,
                    color=alt.ColorValue(COLOURS[names.index(name)]),
                    description=alt.Description("tip:N"),
                )
            )
    return alt.layer(*layers)


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
            named = {
                "row": visible(row, 30),
                "column": visible(column, 30),
                "label": f"{value:.2f}".replace("-", "\N{MINUS SIGN}"),
            }
            tip = f"{titles[0]} {named['row']}, {titles[1]} {named['column']}: {named['label']}"
            cells.append(named | {"tip": tip} | _on_ramp(value, largest))
    gap = alt.Scale(paddingInner=0.06, paddingOuter=0.03)
    across = [visible(each, 30) for each in columns]
    down = [visible(each, 30) for each in rows]
    tilted = max(map(len, across), default=0) > 5
    top = alt.Axis(orient="top", labelAngle=-35 if tilted else 0, ticks=False, domain=False, titleColor=SOFT)
    left = alt.Axis(ticks=False, domain=False, labelColor=INK)
    chart = _heat_map(
        cells,
        alt.X("column:N", sort=across, title=titles[1], axis=top, scale=gap),
        alt.Y("row:N", sort=down, title=titles[0], axis=left, scale=gap),
    )
    count = max(len(across), 1)
    return drawing(chart, 50 * count, 30, step=True, size="wide") + drawing(
        chart, max(34, 190 // count) * count, 30, step=True, size="narrow"
    )


_LIGHT = {
    **{
        "ink": "#15202b",
        "soft": "#52606d",
        "faint": "#9aa7b4",
        "grid": "#e5e9ee",
        "paper": "#ffffff",
        "band": "#cfd6de",
    },
    **{
        "c0": "#0068a8",
        "c1": "#bf4d00",
        "c2": "#007a5a",
        "c3": "#a23b7c",
        "c4": "#574100",
        "c5": "#5a4fcf",
        "c6": "#a61e1e",
        "c7": "#46515c",
    },
    **{
        "r0": "#f0f4f8",
        "r1": "#dbe7f2",
        "r2": "#c0d7ea",
        "r3": "#9dc2df",
        "r4": "#77abd3",
        "r5": "#3878ad",
        "r6": "#256399",
    },
    **{"r7": "#154e82", "r8": "#0a3763", "on0": "#15202b", "on1": "#ffffff"},
}
"""What a page's classes are where there is no page: its colours in light."""
LINE = 17
"""Height of a line of a caption, in pixels."""


def standalone(drawn: Sequence[tuple[Markup, str]]) -> str:
    """Drawings of a page and their captions below one another, as one SVG file that needs no page.

    Args:
        drawn: what `drawing` made (of several sizes the first is taken) and the words above it.
    """
    root, top, right = ElementTree.Element("svg", {"xmlns": _NAMESPACE[1:-1], "font-family": FONT}), 0.0, 0.0
    paper = ElementTree.SubElement(root, "rect", {"fill": _LIGHT["paper"]})
    for markup, caption in drawn:
        chart = ElementTree.fromstring(f"<p>{markup}</p>")[0]
        width, tall = (float(number) for number in chart.get("viewBox", "").split()[2:])
        for line in textwrap.wrap(caption, int(max(width, 420) / 6)):
            top += LINE
            text = {"x": f"{ROOM}", "y": f"{top:g}", "font-size": "12", "fill": _LIGHT["soft"]}
            ElementTree.SubElement(root, "text", text).text = line
        for element in chart.iter():
            for name in (element.attrib.pop("class", None) or "").split():
                attribute, _, colour = name.partition("-")
                if colour in _LIGHT:
                    element.set({"f": "fill", "s": "stroke"}[attribute], _LIGHT[colour])
        chart.attrib |= {"y": f"{top + LINE / 2:g}", "height": f"{tall:g}"}
        root.append(chart)
        top, right = top + tall + 2 * LINE, max(right, width, 420.0)
    for element in (root, paper):
        element.attrib |= {"width": f"{right + ROOM:g}", "height": f"{top:g}"}
    return ElementTree.tostring(root, encoding="unicode")
