"""The sections of a report: for every group of runs its figures, captions, text alternatives and tables."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from markupsafe import Markup

from safety_neurons.report.charts import Row, Sweep, agreement_figure, dot_figure, look, sweep_figure
from safety_neurons.report.findings import methods_of, random_values, ranked_by
from safety_neurons.report.reading import Run
from safety_neurons.report.svg import INK, SOFT
from safety_neurons.report.tables import Table, agreement_table, arms_table, methods_table, summary_table
from safety_neurons.report.text import interval, name, number, plural, say, share, visible
from safety_neurons.results import captioned, clear_word


@dataclass(frozen=True)
class Figure:
    """A drawing, what it shows in words, and a caption that says how to read it."""

    drawing: Markup
    alternative: str
    caption: Markup


@dataclass(frozen=True)
class Part:
    """One heading with its sentences, figures and tables."""

    heading: Markup
    lead: Markup = Markup("")
    figures: Sequence[Figure] = ()
    tables: Sequence[Table] = ()
    details: Sequence[Table] = field(default_factory=tuple)
    """Tables that are folded at first."""
    opens: int | None = None
    """Number of the map whose cells open into neurons."""
    tall: bool = False
    """Whether its drawings have so many rows that they stand side by side."""


def titled(words: str, run: Run) -> Markup:
    """A heading of our own with the name of the run."""
    return say("{} <span class=sub>{}</span>", words, name(run.label))


def patch_parts(runs: Sequence[Run], everything: Sequence[Run]) -> list[Part]:
    """Causal effects; sweeps of the same pair in one figure."""
    groups: dict[tuple[str, ...], list[Run]] = {}
    for run in runs:
        groups.setdefault(run.models, []).append(run)
    return [_patch_part(group, everything) for group in groups.values()]


def _patch_part(group: Sequence[Run], everything: Sequence[Run]) -> Part:
    heading = say("Patching into {} <span class=sub>from {}</span>", *(name(model) for model in (*group[0].models, "?", "?")[:2]))
    sweeps: list[Any] = []
    tables: list[Any] = []
    words: list[Any] = []
    named: list[Any] = []
    for run in group:
        method = ranked_by(run, everything)
        taken = [sweep.method for sweep in sweeps]
        method = method if method not in taken else f"{method} ({visible(run.label, 24)})"
        points = run.result["sizes"]
        sweeps.append(Sweep(method, points, run.result["ceiling_effect"]))
        each = (f"{point['n_neurons']:,} neurons {interval(point['causal_effect'])}" for point in points)
        words.append(f"{method}: " + ", ".join(each))
        table = arms_table(run)
        named.append((method, run))
        tables.append(
            Table(
                captioned(f"Every arm, ranked by {method}; 95\u00a0% intervals", points),
                table.columns,
                table.rows,
                table.quiet,
            )
        )
    first = group[0].result
    undefined = [point["causal_effect"].get("why") for sweep in sweeps for point in sweep.points if point["causal_effect"]["value"] is None]
    if undefined and not any(point["causal_effect"]["value"] is not None for sweep in sweeps for point in sweep.points):
        return Part(heading, say("The causal effect is undefined: {}.", visible(undefined[0], 300)), (), [summary_table(named)], tables)
    n = first["untreated"]["harmful_refused"]["n"]
    sets = len(first["sizes"][-1]["random"])
    caption = say(
        "<b>Causal effect</b>: share of the difference in refusals between the two models which patching restores; "
        "0 is the base model, 1 the aligned one. Bars are 95\u00a0% intervals over {} (paired). "
        "The band spans {} of each size with as many neurons in every matrix; the dashed line is all neurons of the sites patched{}.",
        plural(n, "harmful request"),
        plural(sets, "random set"),
        "" if first["ceiling_effect"]["value"] is None else f": {interval(first['ceiling_effect'])}",
    )
    lows = sorted({value for run in group for point in run.result["sizes"] for value in random_values(point)})
    chance = f" Random sets {number(lows[0])} to {number(lows[-1])}." if lows else ""
    figure = Figure(sweep_figure(sweeps), f"Causal effect against the number of neurons. {'. '.join(words)}.{chance}", caption)
    return Part(heading, Markup(""), [figure], [summary_table(named)], tables)


def deactivate_part(run: Run, everything: Sequence[Run]) -> Part:
    """What is lost without a set."""
    result = run.result
    heading = say("{} off in {}", plural(result["n_neurons"], "neuron"), name(run.models[-1]))
    lead = say("Chosen by {}. Paired change of refusals: {}", ranked_by(run, everything), interval(result["change"], signed=True))
    if result["change_against_random"]:
        against = result["change_against_random"]
        lead += say("; against random sets: {} ({})", interval(against, signed=True), clear_word(against))
    figures = [
        _refusals(result, "harmful_refused", "harmful requests refused", "Refusals of harmful requests: what safety is left."),
        _refusals(result, "harmless_refused", "harmless requests refused", "Refusals of harmless requests: what over-refusal is left."),
    ]
    return Part(heading, lead + Markup("."), figures, [arms_table(run)])


def _refusals(result: Mapping[str, Any], what: str, title: str, caption: str) -> Figure:
    def row(label: str, arm: Mapping[str, Any], shape: str = "circle", colour: str = INK) -> Row:
        rate = arm[what]
        return Row(label, rate["value"], rate["low"], rate["high"], interval(rate), colour, shape)

    colour = look("contrast")[0]
    point = result["sizes"][-1]
    rows = [row("untreated", result["untreated"])]
    dots = [arm[what]["value"] for arm in point["random"] if arm[what]["value"] is not None]
    if dots:
        rows.append(Row(f"{len(dots)} random sets off", None, None, None, f"{number(min(dots))} to {number(max(dots))}", SOFT, dots=dots))
    rows.append(row("these neurons off", result["treated"], "diamond", colour))
    rows.append(row("all neurons off", result["ceiling"], "square", SOFT))
    alternative = f"{title}: " + "; ".join(f"{each.label} {each.text}" for each in rows)
    shown = say("<b>{}</b> Bars are 95\u00a0% intervals; ticks are single random sets.", caption)
    return Figure(dot_figure(rows, title, domain=(-0.03, 1.03)), alternative + ".", shown)


def compare_part(run: Run) -> Part:
    """Methods at one budget."""
    result = run.result
    real, chance = methods_of(result)
    heading = say("{} <span class=sub>{}</span>", Markup(" → ").join(name(model) for model in run.models), plural(result["budget"], "unit"))
    lead = say(
        "{} of {:,} units (sites: {}). Every method chooses as many; they are patched from the aligned into the base model.",
        share(result["budget"] / result["n_units"]),
        int(result["n_units"]),
        ", ".join(visible(site, 8) for site in result["sites"]),
    )
    names = [visible(row["method"], 40) for row in real]
    rows, domain = _interval_rows(real, chance, names, "causal_effect")
    ceiling = result["ceiling_effect"]
    caption = Markup("<b>Causal effect</b> of each method’s set; bars are 95\u00a0% intervals, ticks single random sets")
    line = ", the dashed line is all neurons of the sites patched, {}."
    caption += say(line, interval(ceiling)) if ceiling["value"] is not None else Markup(".")
    words = "; ".join(f"{row.label} {row.text}" for row in rows)
    figures = [
        Figure(
            dot_figure(rows, "causal effect", domain=domain, reference=ceiling["value"]),
            f"Causal effect at equal budget: {words}.",
            caption,
        )
    ]
    rows, domain = _interval_rows(real, chance, names, "necessity")
    words = "; ".join(f"{row.label} {row.text}" for row in rows)
    caption = Markup("<b>Refusals lost when off</b>: share of harmful requests that the aligned model no longer refuses while the set is ")
    caption += Markup("deactivated; bars are 95\u00a0% intervals, ticks single random sets.")
    figures.append(Figure(dot_figure(rows, "refusals lost when off", domain=domain), f"Refusals lost at equal budget: {words}.", caption))
    if any(entry["recall"] is not None for entry in real):
        figures.append(_recall(real, chance, names))
    if result["agreement"]:
        figures.append(_agreement(result, names))
    details = [agreement_table(run)] if result["agreement"] else []
    return Part(heading, lead, figures, [methods_table(run)], details)


def _interval_rows(
    real: Sequence[Mapping[str, Any]], chance: Sequence[Mapping[str, Any]], names: Sequence[str], measure: str
) -> tuple[list[Row], tuple[float, float]]:
    """One row a method with its interval, one for the random sets, and the axis that holds them all."""
    rows = []
    for label, entry in zip(names, real, strict=True):
        value = entry[measure]
        colour, shape = look(label, names)
        rows.append(Row(label, value["value"], value["low"], value["high"], interval(value), colour, shape))
    dots = [entry[measure]["value"] for entry in chance if entry[measure]["value"] is not None]
    if dots:
        rows.append(Row(f"{len(dots)} random sets", None, None, None, f"{number(min(dots))} to {number(max(dots))}", SOFT, dots=dots))
    ends = [end for row in rows for end in (row.low, row.high) if end is not None]
    return rows, (max(min([0.0, *ends, *dots]), -1.0) - 0.04, min(max([1.0, *ends]), 2.0) + 0.04)


def _recall(real: Sequence[Mapping[str, Any]], chance: Sequence[Mapping[str, Any]], names: Sequence[str]) -> Figure:
    rows = [
        Row(label, entry["recall"], None, None, number(entry["recall"]), *look(label, names))
        for label, entry in zip(names, real, strict=True)
    ]
    dots = [entry["recall"] for entry in chance if entry["recall"] is not None]
    if dots:
        rows.append(Row(f"{len(dots)} random sets", None, None, None, f"{number(min(dots))} to {number(max(dots))}", SOFT, dots=dots))
    words = "; ".join(f"{row.label} {row.text}" for row in rows)
    caption = Markup("<b>Recall</b>: share of the planted units in the set. All of them are counted, so there is no sampling interval.")
    return Figure(dot_figure(rows, "planted units found", domain=(-0.02, 1.02)), f"Recall of planted units: {words}.", caption)


def _agreement(result: Mapping[str, Any], names: Sequence[str]) -> Figure:
    jaccard = {(visible(a, 40), visible(b, 40)): float(pair["jaccard"]) for pair in result["agreement"] for a, b in [pair["methods"]]}
    order = [*names, *sorted({each for pair in jaccard for each in pair if each.startswith("random")})[:1]]
    chance = float(result["agreement"][0]["chance"])
    kept = sorted(((pair, value) for pair, value in jaccard.items() if set(pair) <= set(names)), key=lambda item: -item[1])
    words = "; ".join(f"{a} and {b} {value:.2f}" for (a, b), value in kept)
    caption = say(
        "<b>Agreement</b>: units two sets share ÷ units in either (Jaccard index). Two random sets would have {}.", number(chance, 3)
    )
    return Figure(agreement_figure(order, jaccard), f"Agreement of every two methods: {words}. Chance {chance:.3f}.", caption)
