"""The figure of the alignment tax: what two trainings share, and what cross-patching the shared neurons does."""

import pathlib
from collections.abc import Mapping
from typing import Any

import altair as alt

from safety_neurons.analysis.figures import BLUE, GREY, INK, ORANGE, rows_of, save

MEASURES = {"refused": "harmful requests refused", "helpful": "harmless requests answered well"}


def tax_figure(result: Mapping[str, Any], place: pathlib.Path) -> None:
    """Above overlap and rank agreement of every two trainings beside chance, below both models with and without the other's activations.

    Args:
        result: the JSON values of `analyze tax`.
        place: the SVG file to write.
    """
    above = alt.hconcat(_overlap(result), _ranks(result), spacing=40).resolve_scale(color="independent", yOffset="independent")
    save(alt.vconcat(above, _patching(result), spacing=26).resolve_scale(color="independent"), place)


def _overlap(result: Mapping[str, Any]) -> Any:
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


def _ranks(result: Mapping[str, Any]) -> Any:
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


def _patching(result: Mapping[str, Any]) -> Any:
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
