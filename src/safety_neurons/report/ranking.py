"""The figure of a ranking: every method's mean over organisms, and every organism as a mark of its own."""

from collections.abc import Mapping, Sequence
from typing import Any

import altair as alt
import vl_convert

SHOWN = {"recall": "planted units found", "causal_effect": "causal effect", "harmless_refused": "harmless refused"}
"""Measures that have a panel, and what it says above."""
DOT, BAR, GREY = "#0072b2", "#d55e00", "#5b6470"


def ranking_figure(record: Mapping[str, Any]) -> str:
    """A standalone SVG with one panel per group of organisms and measure: dots are organisms, the bar is their mean."""
    panels: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for standing in record["ranking"]:
        if standing["measure"] in SHOWN and standing["mean"] is not None:
            panels.setdefault((standing["measure"], standing["group"]), []).append(standing)
    drawn = [_panel(measure, group, rows) for (measure, group), rows in panels.items() if _tells(measure, group)]
    chart = alt.hconcat(*drawn, spacing=28).configure_view(stroke=None).configure_axis(labelFontSize=12, titleFontSize=12)
    svg: str = vl_convert.vegalite_to_svg(chart.to_json())
    return svg


def _tells(measure: str, group: str) -> bool:
    """Patching cannot restore what is silent in the base, so planted organisms have no panel of causal effects."""
    return group != "planted" or measure == "recall"


def _panel(measure: str, group: str, rows: Sequence[Mapping[str, Any]]) -> Any:
    methods = [row["method"] for row in rows]
    dots = [
        {"method": row["method"], "organism": name, "value": value}
        for row in rows
        for name, value in row["by_organism"].items()
        if value is not None
    ]
    means = [{"method": row["method"], "value": row["mean"]} for row in rows]
    y = alt.Y("method:N", sort=methods, title=None)
    highest = max([1.0, *(dot["value"] for dot in dots)])
    lowest = min([0.0, *(dot["value"] for dot in dots)])
    x = alt.X("value:Q", title=SHOWN[measure], scale=alt.Scale(domain=[lowest, highest]))
    title = f"{group.split()[0]} organisms" + (f", {float(group.split()[1]):.0%} of the units" if " " in group else ", as many as are true")
    points = alt.Chart(alt.Data(values=dots)).mark_circle(size=42, opacity=0.55, color=DOT).encode(x=x, y=y)
    ticks = alt.Chart(alt.Data(values=means)).mark_tick(thickness=3, size=16, color=BAR).encode(x=x, y=y)
    return (points + ticks).properties(width=230, height=alt.Step(20), title=alt.Title(title, fontSize=12, color=GREY, anchor="start"))
