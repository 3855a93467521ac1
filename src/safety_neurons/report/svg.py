"""Charts as static SVG that follows the page's colours: drawn by Vega-Lite, then rewritten through a list of what may stay.

The colours in a chart are placeholders (`INK`, `RAMP[3]`, …). Here they become classes, so that light, dark and print are one drawing.
"""

import functools
import json
from collections.abc import Mapping
from typing import Any
from xml.etree import ElementTree

import vl_convert
from markupsafe import Markup

from safety_neurons.report.text import visible

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
    *("d", "x", "y", "x1", "x2", "y1", "y2", "dx", "dy", "cx", "cy", "r", "width", "height", "transform", "text-anchor", "opacity"),
    *("fill", "stroke", "fill-opacity", "stroke-opacity", "stroke-width", "stroke-dasharray", "stroke-linecap", "stroke-linejoin"),
    *("font-size", "font-weight", "font-style", "stroke-miterlimit", "viewBox"),
}
ROOM = 16
_NAMESPACE = "{http://www.w3.org/2000/svg}"


_CONFIG = {
    "font": "Helvetica, Arial, sans-serif",
    "background": "transparent",
    "view": {"stroke": None},
    "text": {"fontSize": 12, "color": INK},
    "legend": {"labelFontSize": 12, "labelColor": INK, "symbolStrokeWidth": 2.4, "symbolSize": 260, "labelLimit": 200, "title": None},
    "axis": {
        **{
            "labelColor": SOFT,
            "titleColor": SOFT,
            "labelFontSize": 12,
            "titleFontSize": 12,
            "titleFontWeight": "normal",
            "labelLimit": 260,
        },
        **{"gridColor": GRID, "domainColor": FAINT, "tickColor": FAINT, "tickSize": 4, "titlePadding": 8, "labelPadding": 5},
    },
}


@functools.lru_cache(maxsize=256)
def _drawn(specification: str) -> str:
    return vl_convert.vegalite_to_svg(specification)


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
    clean.set("viewBox", f"{-ROOM} 0 {whole:g} {tall:g}")  # Fonts of the reader may be wider than those measured here.
    clean.set("width", f"{whole:g}")
    clean.set("class", f"chart {size}".strip())
    clean.set("aria-hidden", "true")
    clean.set("focusable", "false")
    return Markup(ElementTree.tostring(clean, encoding="unicode"))  # noqa: S704 - rebuilt from allowed tags and attributes


def _cleaned(element: ElementTree.Element, places: Mapping[str, str]) -> ElementTree.Element | None:
    tag = element.tag.removeprefix(_NAMESPACE)
    if tag not in _TAGS or element.get("display") == "none":
        return None
    if tag == "path" and element.get("class") in ("background", "foreground") and element.get("stroke") is None:
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
