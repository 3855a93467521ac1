"""Figures of the analyses as SVG files, drawn by Vega-Lite: for a paper or a page; a report draws its own from the same numbers."""

import pathlib
from collections.abc import Sequence
from typing import Any

import altair as alt

from safety_neurons.analysis.layers import Layers
from safety_neurons.analysis.overlap import Overlap
from safety_neurons.neurons import SITES
from safety_neurons.results.files import write_bytes
from safety_neurons.results.notebook import visible

BLUE, ORANGE, GREY, BAND, INK = "#1f6fb2", "#c7521a", "#8a8a8a", "#d9d9d9", "#222222"
JACCARD = "Jaccard index of the neurons"
_CONFIG = {
    "font": "Helvetica, Arial, sans-serif",
    "background": "white",
    "view": {"stroke": None},
    "axis": {"labelFontSize": 12, "titleFontSize": 12, "titleFontWeight": "normal", "gridColor": "#ececec", "labelLimit": 260},
    "title": {"fontSize": 13, "anchor": "start", "fontWeight": "bold"},
    "legend": {"labelFontSize": 12, "titleFontSize": 12},
}


def save(chart: Any, place: pathlib.Path) -> None:
    """Write a chart as an SVG file; characters that no XML may hold, as names and tokens can have, are named."""
    import vl_convert

    specification = _readable(chart.to_dict(validate=False)) | {"padding": 12, "config": _CONFIG}
    write_bytes(place, vl_convert.vegalite_to_svg(specification).encode())


def _readable(part: Any) -> Any:
    """A specification with every text in it made visible: one control character would end the process that draws it."""
    if isinstance(part, dict):
        return {visible(name): _readable(value) for name, value in part.items()}
    if isinstance(part, list):
        return [_readable(value) for value in part]
    return visible(part) if isinstance(part, str) else part


def rows_of(values: Sequence[dict[str, Any]]) -> alt.Data:
    """Rows as inline data."""
    return alt.Data(values=[dict(row) for row in values])


def layers_figure(found: Sequence[Layers], place: pathlib.Path) -> None:
    """For every set the share of it in each layer and site: bars, with the range of random sets of the same size."""
    save(alt.vconcat(*(_layers_of(each) for each in found), spacing=18), place)


def _layers_of(found: Layers) -> Any:
    n = max(1, len(found.item.neurons))
    groups = (("layer", found.by_layer, [row.name.removeprefix("layer ") for row in found.by_layer]), ("site", found.by_site, list(SITES)))
    charts = []
    for title, places, order in groups:
        rows = []
        for each in places:
            expected = each.chance.expectation(lambda counts: counts / n)
            name = each.name.removeprefix("layer ")
            rows.append({"place": name, "share": each.members / n, "low": expected.low, "high": expected.high, "mean": expected.expected})
        base = alt.Chart(rows_of(rows)).encode(x=alt.X("place:N", sort=order, title=title, axis=alt.Axis(labelAngle=0)))
        y = alt.Y("share:Q", title="share of the set" if title == "layer" else None, axis=alt.Axis(format="%"))
        bars = base.mark_bar(color=BLUE).encode(y=y)
        band = base.mark_rule(color=ORANGE, strokeWidth=3).encode(y=alt.Y("low:Q"), y2="high:Q")
        ticks = base.mark_tick(color=ORANGE, thickness=2, width=14).encode(y="mean:Q")
        charts.append(alt.layer(bars, band, ticks).properties(width=max(90, min(900, 26 * len(rows))), height=150))
    name = f"{found.item.name}: {len(found.item.neurons):,} neurons (orange: random sets of this size, 95 %)"
    return alt.hconcat(*charts, spacing=24).properties(title=name)


def overlap_figure(found: Overlap, place: pathlib.Path) -> None:
    """For every two sets the Jaccard index of their neurons, with the range of unrelated sets, over all candidates and per matrix."""
    rows, bands = [], []
    for pair in found.pairs:
        name, jaccard = " and ".join(pair.names), pair.neurons.record()["jaccard"]
        rows.append({"pair": name, "value": jaccard["value"], "text": f"{jaccard['value']:.3f}"})
        for kind, chance in (("any neuron", jaccard), ("as many per matrix", jaccard["matched"])):
            bands.append({"pair": name, "low": chance["low"], "high": chance["high"], "mean": chance["expected"], "unrelated sets": kind})
    order = [row["pair"] for row in rows]
    y = alt.Y("pair:N", sort=order, title=None)
    x = alt.X("value:Q", title=JACCARD, scale=alt.Scale(domainMin=0))
    colour = alt.Color("unrelated sets:N", scale=alt.Scale(range=[GREY, ORANGE]), legend=alt.Legend(orient="top"))
    offset = alt.YOffset("unrelated sets:N")
    chance = alt.Chart(rows_of(bands)).encode(y=y, yOffset=offset, color=colour)
    layers = [
        chance.mark_rule(strokeWidth=5, opacity=0.7).encode(x=alt.X("low:Q", title=JACCARD), x2="high:Q"),
        chance.mark_tick(thickness=2, height=9).encode(x=alt.X("mean:Q", title=JACCARD)),
        alt.Chart(rows_of(rows)).mark_point(filled=True, size=80, color=BLUE, opacity=1).encode(y=y, x=x),
        alt.Chart(rows_of(rows)).mark_text(align="left", dx=9, color=INK).encode(y=y, x=x, text="text:N"),
    ]
    save(alt.layer(*layers).properties(width=420, height={"step": 30}), place)
