"""Figures of what was measured on a model: matrices, neuron cards, curves; drawn from the JSON values of a run."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import altair as alt

from safety_neurons.analysis.figures import BAND, BLUE, GREY, INK, ORANGE, rows_of, save
from safety_neurons.results import is_clear

_DIVERGING = ["#b2182b", "#ef8a62", "#f7f7f7", "#67a9cf", "#2166ac"]


def matrix_figure(cells: Sequence[Mapping[str, Any]], field: str, title: str, place: pathlib.Path) -> None:
    """Sets down, groups across; a star where a set clearly does more than random sets."""
    rows = []
    for cell in cells:
        value = cell[field]["value"]
        against = cell["change_against_random"]
        clear = is_clear(against) and (against["value"] < 0 if field == "change" else against["value"] > 0)
        text = "–" if value is None else f"{value:+.2f}" if field == "change" else f"{value:.2f}"
        rows.append({"set": cell["set"], "group": cell["group"], "value": value, "text": text + ("*" if clear else "")})
    sets, groups = (list(dict.fromkeys(row[name] for row in rows)) for name in ("set", "group"))
    base = alt.Chart(rows_of(rows)).encode(
        x=alt.X("group:N", sort=groups, title="measured on", axis=alt.Axis(orient="top", labelAngle=-30 if len(groups) > 4 else 0)),
        y=alt.Y("set:N", sort=sets, title=title),
    )
    scale = alt.Scale(domain=[-1, 1], range=_DIVERGING, clamp=True)
    tiles = base.mark_rect(stroke="white", strokeWidth=2).encode(color=alt.Color("value:Q", scale=scale, legend=None))
    text = base.mark_text(fontSize=12).encode(
        text="text:N", color=alt.condition("abs(datum.value) > 0.6", alt.value("white"), alt.value(INK))
    )
    save(alt.layer(tiles, text).properties(width={"step": 74}, height={"step": 28}), place)


def cards_figure(result: Mapping[str, Any], place: pathlib.Path) -> None:
    """For every card and treatment the effect on the refusal's log-odds, with the range of random neurons."""
    charts = []
    for kind, reference in result["random"].items():
        rows = [
            {"neuron": _label(card), **{end: card["effects"][kind][end] for end in ("value", "low", "high")}}
            for card in result["cards"]
            if card["effects"][kind]["value"] is not None
        ]
        order = [row["neuron"] for row in rows]
        y = alt.Y("neuron:N", sort=order, title=None, axis=alt.Axis(labelLimit=420))
        title = f"change of the refusal's log-odds, {kind}"
        x = alt.X("value:Q", title=title)
        layers = []
        if reference["n"]:
            band = alt.Chart(rows_of([{"value": reference["low"], "high": reference["high"]}]))
            layers.append(band.mark_rect(color=BAND, opacity=0.8).encode(x=x, x2="high:Q"))
        base = alt.Chart(rows_of(rows)).encode(y=y)
        layers.append(base.mark_rule(color=BLUE, strokeWidth=2.5).encode(x=alt.X("low:Q", title=title), x2="high:Q"))
        layers.append(base.mark_point(filled=True, size=70, color=BLUE, opacity=1).encode(x=x))
        charts.append(alt.layer(*layers).properties(width=380, height={"step": 24}))
    save(alt.vconcat(*charts, spacing=16).properties(title="Single neurons (grey: 95 % of random neurons of the same matrices)"), place)


def _label(card: Mapping[str, Any]) -> str:
    return f"{card['neuron']}  {words(card['writes']['top'][:4])}".strip()


def words(entries: Sequence[Mapping[str, Any]]) -> str:
    """Tokens in a row, without the blanks around them; one of blanks alone is shown as Python writes it."""
    return " ".join(entry["token"].strip() or repr(entry["token"]) for entry in entries)


def progressive_figure(result: Mapping[str, Any], place: pathlib.Path) -> None:
    """Refusals of harmful requests and divergence while more and more neurons are off, with the bands of random orders."""
    orders = [curve for curve in result["curves"] if curve["order"] != "one layer alone"]
    start = {"harmful_refused": result["untreated"]["harmful_refused"]["value"], "divergence": 0.0}
    charts = []
    for field, title in (("harmful_refused", "harmful requests refused"), ("divergence", "KL per token on harmless requests")):
        rows = [{"order": curve["order"], "n": 0, "value": start[field]} for curve in orders]
        for curve in orders:
            for point in curve["points"]:
                value = point[field]["value"] if isinstance(point[field], Mapping) else point[field]
                rows.append({"order": curve["order"], "n": point["n_neurons"], "value": value})
        layers = [_band(name, points, field, start[field]) for name, points in result["random"].items() if points]
        colours = alt.Scale(domain=[curve["order"] for curve in orders], range=[BLUE, ORANGE, INK][: len(orders)])
        base = alt.Chart(rows_of([row for row in rows if row["value"] is not None])).encode(
            x=alt.X("n:Q", title="neurons switched off"),
            y=alt.Y("value:Q", title=title),
            color=alt.Color("order:N", scale=colours, legend=alt.Legend(orient="bottom", title=None, columns=2)),
            shape=alt.Shape("order:N", legend=None),
        )
        layers += [base.mark_line(strokeWidth=2), base.mark_point(filled=True, size=55, opacity=1)]
        charts.append(alt.layer(*layers).properties(width=330, height=230))
    shown = [f"{name} ({'grey' if name.startswith('random neurons') else 'orange'})" for name in result["random"]]
    save(alt.hconcat(*charts, spacing=26).properties(title=f"Bands: {' and '.join(shown) or 'none'}"), place)


def _band(name: str, points: Sequence[Mapping[str, Any]], field: str, start: float | None) -> Any:
    rows = [{"n": 0, "value": start, "high": start}]
    rows += [
        {"n": sum(point["n_neurons"]) / len(point["n_neurons"]), "value": point[field]["low"], "high": point[field]["high"]}
        for point in points
        if point[field]["low"] is not None
    ]
    colour = GREY if name.startswith("random neurons") else ORANGE
    return (
        alt.Chart(rows_of(rows))
        .mark_area(color=colour, opacity=0.22, stroke=colour, strokeWidth=1)
        .encode(x=alt.X("n:Q"), y=alt.Y("value:Q"), y2="high:Q")
    )
