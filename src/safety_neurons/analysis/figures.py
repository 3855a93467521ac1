"""Figures of the analyses as SVG files, drawn by Vega-Lite: for a paper or a page; a report draws its own from the same numbers.

What was measured on a model (matrices, cards, curves, the alignment tax) is drawn from the JSON values of a run.
"""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import altair as alt

from safety_neurons.analysis.layers import Layers
from safety_neurons.analysis.overlap import Overlap
from safety_neurons.neurons import SITES
from safety_neurons.results import is_clear
from safety_neurons.results.notebook import visible
from safety_neurons.results.run import write_bytes

BLUE, ORANGE, GREY, BAND, INK = "#1f6fb2", "#c7521a", "#8a8a8a", "#d9d9d9", "#222222"
_DIVERGING = ["#b2182b", "#ef8a62", "#f7f7f7", "#67a9cf", "#2166ac"]
MEASURES = {"refused": "harmful requests refused", "helpful": "harmless requests answered well"}
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
        for kind, beside in (("any neuron", jaccard), ("as many per matrix", jaccard["matched"])):
            bands.append({"pair": name, "low": beside["low"], "high": beside["high"], "mean": beside["expected"], "unrelated sets": kind})
    order = [" and ".join(pair.names) for pair in found.pairs]
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


# The alignment tax: what two trainings share, and what cross-patching the shared neurons does


def tax_figure(result: Mapping[str, Any], place: pathlib.Path) -> None:
    """Above overlap and rank agreement of every two trainings beside chance, below both models with and without the other's activations.

    Args:
        result: the JSON values of `analyze tax`.
        place: the SVG file to write.
    """
    above = alt.hconcat(_tax_overlap(result), _tax_ranks(result), spacing=40).resolve_scale(color="independent", yOffset="independent")
    save(alt.vconcat(above, _tax_patching(result), spacing=26).resolve_scale(color="independent"), place)


def _tax_overlap(result: Mapping[str, Any]) -> Any:
    drawn = {"all": "any neuron", "in_activation": "as active, in its layer"}
    rows, bands = [], []
    for pair in result["relations"]:
        name = " and ".join(pair["pair"])
        rows.append({"pair": name, **pair["overlap"]})
        for key, kind in drawn.items():
            bands.append({"pair": name, "drawn from": kind, **pair["chance"][key]})
    order = [row["pair"] for row in rows]
    y = alt.Y("pair:N", sort=order, title=None)
    colour = alt.Color(
        "drawn from:N",
        scale=alt.Scale(domain=list(drawn.values()), range=[GREY, ORANGE]),
        legend=alt.Legend(orient="bottom", title="random sets drawn from"),
    )
    chance = alt.Chart(rows_of(bands)).encode(y=y, yOffset="drawn from:N", color=colour)
    found = alt.Chart(rows_of(rows)).encode(y=y)
    layers = [
        chance.mark_rule(strokeWidth=5, opacity=0.7).encode(x=alt.X("low:Q", title=None), x2="high:Q"),
        chance.mark_tick(thickness=2, height=9).encode(x="expected:Q"),
        found.mark_rule(color=BLUE).encode(x="low:Q", x2="high:Q"),
        found.mark_point(filled=True, size=80, color=BLUE, opacity=1).encode(
            x=alt.X("value:Q", title=f"neurons in both top sets of {result['relations'][0]['size']}")
        ),
    ]
    return alt.layer(*layers).properties(width=250, height=46 * len(rows), title="Overlap")


def _tax_ranks(result: Mapping[str, Any]) -> Any:
    kinds = {"all": "all neurons", "given_activation": "given activation", "union": "either top set"}
    rows = [
        {
            "pair": " and ".join(pair["pair"]),
            "over": word,
            "value": found["value"],
            "low": found["interval"][0],
            "high": found["interval"][1],
        }
        for pair in result["relations"]
        for key, word in kinds.items()
        if (found := pair["spearman"][key])["value"] is not None
    ]
    order = [" and ".join(pair["pair"]) for pair in result["relations"]]
    colour = alt.Color(
        "over:N",
        sort=list(kinds.values()),
        scale=alt.Scale(domain=list(kinds.values()), range=[BLUE, ORANGE, GREY]),
        legend=alt.Legend(orient="bottom", title="over"),
    )
    base = alt.Chart(rows_of(rows)).encode(
        y=alt.Y("pair:N", sort=order, title=None, axis=alt.Axis(labels=False, ticks=False)),
        yOffset=alt.YOffset("over:N", sort=list(kinds.values())),
        color=colour,
    )
    layers = [
        base.mark_rule(strokeWidth=2).encode(x="low:Q", x2="high:Q"),
        base.mark_point(filled=True, size=60, opacity=1).encode(x=alt.X("value:Q", title="Spearman of change scores")),
    ]
    return alt.layer(*layers).properties(width=230, height=46 * len(order), title="Rank agreement")


def _tax_patching(result: Mapping[str, Any]) -> Any:
    rows = []
    for arm in result["arms"]:
        name, random = arm["arm"].split(", random")[0], ", random" in arm["arm"]
        for measure, title in MEASURES.items():
            if arm[measure]["value"] is not None:
                rows.append({"model": name, "measure": title, "neurons": "random" if random else "shared", **arm[measure]})
    order = list(dict.fromkeys(row["model"] for row in rows))
    charts = []
    for number, title in enumerate(MEASURES.values()):
        part = [row for row in rows if row["measure"] == title]
        axis = alt.Axis() if number == 0 else alt.Axis(labels=False, ticks=False)
        y = alt.Y("model:N", sort=order, title=None, axis=axis)
        x = alt.X("value:Q", title=title, scale=alt.Scale(domain=[0, 1]), axis=alt.Axis(format="%"))
        shared = alt.Chart(rows_of([row for row in part if row["neurons"] == "shared"])).encode(y=y)
        random_sets = alt.Chart(rows_of([row for row in part if row["neurons"] == "random"])).encode(y=y)
        layers = [
            shared.mark_bar(color=BLUE, height=15).encode(x=x),
            shared.mark_rule(color=INK, strokeWidth=1.5).encode(x="low:Q", x2="high:Q"),
            random_sets.mark_tick(color=ORANGE, thickness=2, height=19).encode(x="value:Q"),
        ]
        charts.append(alt.layer(*layers).properties(width=250, height={"step": 30}))
    title = f"Cross-patching of {result['n_shared']} shared neurons (orange: as many random ones)"
    return alt.hconcat(*charts, spacing=24).properties(title=title)
