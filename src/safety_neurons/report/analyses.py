"""What a report says of analyses of sets: where they lie and how far they agree, every number beside chance."""

from collections.abc import Mapping
from typing import Any

from markupsafe import Markup

from safety_neurons.report.charts import agreement_figure
from safety_neurons.report.curves import Beside, beside_figure
from safety_neurons.report.findings import FACT, NO, Finding
from safety_neurons.report.reading import Run
from safety_neurons.report.sections import Figure, Part, titled
from safety_neurons.report.tables import Table
from safety_neurons.report.text import NONE, count, number, plural, say, share, visible

MOST = 48
"""Rows of a chart."""


def layers_part(run: Run) -> Part:
    """Where the neurons of sets lie, beside random sets of the same size."""
    figures, details, claims = [], [], []
    for found in run.result["sets"]:
        figures += [_places(found, f"by_{word}", word) for word in ("layer", "site") if len(found[f"by_{word}"]) > 1]
        claims += [[visible(found["name"], 40), *_claim(claim)] for claim in found["claims"]]
        details.append(_places_table(found))
    columns = ["set", "claim", "paper", "holds", "measured", "random sets"]
    tables = [Table("What the papers say of place, asked of every set", columns, claims)]
    lead = Markup("A dot is what a set has, the grey bar what 95\u00a0% of random sets of its size have.")
    return Part(titled("Where sets lie", run), lead, figures, tables, details)


def _places(found: Mapping[str, Any], group: str, word: str) -> Figure:
    whole = max(found["n_neurons"], 1)
    rows = [
        Beside(
            str(place["name"]),
            place["members"] / whole,
            place["low"] / whole,
            place["high"] / whole,
            f"{share(place['members'] / whole)}, {place['verdict']}",
        )
        for place in found[group][:MOST]
    ]
    top = max([end for row in rows for end in (row.value, row.high) if end is not None], default=1.0)
    words = "; ".join(f"{row.label} {row.text} (random {share(row.low)} to {share(row.high)})" for row in rows)
    caption = say("<b>{}</b>: share of the set by {}; {}.", visible(found["name"], 40), word, plural(found["n_neurons"], "neuron"))
    title = f"share of the set, {word}"
    return Figure(
        beside_figure(rows, title, domain=(-0.04 * top, min(1.02, top * 1.06) or 1.0)), f"{found['name']}, {title}: {words}.", caption
    )


def _claim(claim: Mapping[str, Any]) -> list[Any]:
    holds = {True: "yes", False: "no", None: visible(claim["note"] or "cannot be told", 120)}[claim["holds"]]
    chance = claim["chance"]
    beside = NONE if chance is None else f"{number(chance['low'])} to {number(chance['high'])}, {chance['verdict']}"
    return [visible(claim["claim"], 80), str(claim["paper"]), holds, number(claim["value"], 3), beside]


def _places_table(found: Mapping[str, Any]) -> Table:
    rows = [
        [
            visible(place["name"], 40),
            count(place["members"]),
            count(place["candidates"]),
            f"{number(place['expected'], 1)} [{number(place['low'], 0)}, {number(place['high'], 0)}]",
            number(place["enrichment"]),
            visible(place["verdict"], 20),
        ]
        for group in ("by_part", "by_site", "by_layer")
        for place in found[group]
    ]
    columns = ["place", "in the set", "searched", "random set", "÷ expected", "against chance"]
    return Table(f"{visible(found['name'], 40)}, place by place", columns, rows)


def layers_findings(run: Run) -> list[Finding]:
    """Which claims on place hold, set by set."""
    made = []
    for found in run.result["sets"]:
        said = {word: [visible(claim["claim"], 60) for claim in found["claims"] if claim["holds"] is holds] for word, holds in _HOLDS}
        parts = "; ".join(f"{word}: {', '.join(claims)}" for word, claims in said.items() if claims)
        densest = max(found["by_layer"], key=lambda place: place["members"], default=None)
        where = say(", most of all in {} ({})", densest["name"], share(densest["share_of_set"])) if densest else Markup("")
        text = say("<b>{}</b> lies in {}{}. {}.", visible(found["name"], 40), _layers(found), where, parts[:1].upper() + parts[1:])
        made.append(Finding(FACT, text))
    return made


_HOLDS = (("holds", True), ("does not hold", False))


def _layers(found: Mapping[str, Any]) -> str:
    return plural(sum(place["members"] > 0 for place in found["by_layer"]), "layer")


def overlap_part(run: Run) -> Part:
    """How far sets agree, beside unrelated sets."""
    result = run.result
    names = [visible(found["name"], 30) for found in result["sets"]]
    jaccard = {(visible(a, 30), visible(b, 30)): pair["jaccard"]["value"] for pair in result["pairs"] for a, b in [pair["names"]]}
    words = "; ".join(f"{a} and {b} {value:.3f}" for (a, b), value in jaccard.items())
    caption = Markup("<b>Jaccard index</b>: neurons two sets share ÷ neurons in either; what unrelated sets give stands in the table.")
    rows = [
        [
            f"{visible(pair['names'][0], 30)}, {visible(pair['names'][1], 30)}",
            number(pair["jaccard"]["value"], 3),
            chance_range(pair["jaccard"]),
            chance_range(pair["jaccard"]["matched"]),
            number(pair["spearman"]["value"]),
            f"{number(pair['spearman_union']['value'])} ({number(pair['spearman_union'].get('expected'))})",
        ]
        for pair in result["pairs"]
    ]
    columns = ["sets", "Jaccard index", "unrelated sets", "as many per matrix", "Spearman, all", "in the union (unrelated)"]
    mean = result["mean_jaccard"]
    lead = say(
        "Mean Jaccard index of {}: {}; {} in all of them.", plural(mean["n_pairs"], "pair"), number(mean["value"], 3), _in_all(result)
    )
    return Part(
        titled("How far sets agree", run),
        lead,
        [Figure(agreement_figure(names, jaccard), f"Jaccard index of every two sets: {words}.", caption)],
        [Table("Every two sets beside unrelated ones; ranges hold 95\u00a0% of them", columns, rows)],
    )


def _in_all(result: Mapping[str, Any]) -> str:
    found = result["in_all"]
    return f"{plural(round(found['value']), 'neuron')} (unrelated sets {number(found['low'], 0)} to {number(found['high'], 0)})"


def chance_range(chance: Mapping[str, Any]) -> str:
    """What chance gives, from its lower to its upper end."""
    return f"{number(chance['low'], 3)} to {number(chance['high'], 3)}" if chance.get("low") is not None else NONE


def overlap_findings(run: Run) -> list[Finding]:
    """How many pairs agree beyond sets with as many neurons in every matrix."""
    pairs = run.result["pairs"]
    above = [pair for pair in pairs if pair["jaccard"]["matched"].get("verdict") == "more"]
    best = max(pairs, key=lambda pair: pair["jaccard"]["value"], default=None)
    if best is None:
        return []
    text = say(
        "{} of {} of sets share more neurons than unrelated sets with as many in every matrix; the closest are {} and {}, Jaccard index {} "
        "(unrelated {}).",
        len(above),
        plural(len(pairs), "pair"),
        *(Markup("<b>{}</b>").format(visible(each, 40)) for each in best["names"]),
        number(best["jaccard"]["value"], 3),
        chance_range(best["jaccard"]["matched"]),
    )
    return [Finding(FACT if above else NO, text)]
