"""Parts of a report: tables, figures with captions and text alternatives; of verify, compare and find runs.

A map opens into the neurons behind every cell, their ranks by every method, and their cards, as one block of data. The page draws without
it; a script only looks things up there. The block is kept small: of a cell with many neurons those with the largest scores are in it, and
how many are left out is said.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from markupsafe import Markup

from safety_neurons.neurons import Scores, parse_key
from safety_neurons.report.charts import INK, SOFT, DotRow, Sweep, agreement_figure, dot_figure, look, site_map, sweep_figure
from safety_neurons.report.findings import methods_of, random_values, ranked_by, telling_point
from safety_neurons.report.reading import ReportedRun
from safety_neurons.report.text import NONE, count, duration, in_script, interval, name, number, plural, say, share, visible
from safety_neurons.results import captioned, clear_word

Cell = str | Markup
ARM_COLUMNS = ("arm", "harmful refused", "harmless refused", "perplexity", "KL per token, nats")


@dataclass(frozen=True)
class Table:
    """A caption, column headers, and rows whose first cell is a header."""

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    quiet: frozenset[int] = frozenset()
    """Rows that stand back, such as controls."""


def spread(values: Sequence[float | int], digits: int = 2) -> str:
    """`0.00 to 0.04`."""
    return f"{number(min(values), digits)} to {number(max(values), digits)}" if values else NONE


def arms_table(run: ReportedRun) -> Table:
    """Every arm of a verify run: refusals, over-refusals, perplexity, divergence; causal effects where there is a pair."""
    result, paired = run.result, run.result["aligned"] is not None
    rows = [arm_row("untreated", result["untreated"])]
    if paired:
        rows.append(arm_row("aligned model", result["aligned"]))
    effects: list[list[Cell]] = [[NONE, NONE]] * len(rows)
    quiet: list[int] = []
    word = "patched" if result["kind"] == "patch" else "deactivated"
    for point in result["sizes"]:
        rows.append(arm_row(f"{count(point['n_neurons'])} {word} ({share(point['size'])})", point["treated"]))
        effects.append([interval(point["causal_effect"]), spread(random_values(point))])
        if point["random"]:
            quiet.append(len(rows))
            rows.append(_random_arms(point))
            effects.append([NONE, NONE])
    called = " (ceiling)" if result.get("ceiling_called", "ceiling") == "ceiling" else ""
    rows.append(arm_row(f"all neurons {word}{called}", result["ceiling"]))
    effects.append([interval(result["ceiling_effect"]), NONE])
    if result.get("ceiling_by_parameters"):
        rows.append(arm_row("all parameters of the sites (ceiling)", result["ceiling_by_parameters"]))
        effects.append([interval(result["ceiling_by_parameters_effect"]), NONE])
    columns = list(ARM_COLUMNS)
    if paired:
        columns += ["causal effect", "same, random sets"]
        rows = [[*row, *effect] for row, effect in zip(rows, effects, strict=True)]
    return Table("Every arm; shares with 95\u00a0% intervals", columns, rows, frozenset(quiet))


def summary_table(runs: Sequence[tuple[str, ReportedRun]]) -> Table:
    """Of patch runs on one pair: the model as it is, the aligned one, and of every run its telling set beside its random sets."""
    first = runs[0][1].result
    rows: list[list[Cell]] = [[*arm_row("untreated", first["untreated"]), NONE], [*arm_row("aligned model", first["aligned"]), NONE]]
    quiet = []
    for method, run in runs:
        point = telling_point(run.result)
        label = f"{count(point['n_neurons'])} patched ({share(point['size'])}), {method}"
        rows.append([*arm_row(label, point["treated"]), interval(point["causal_effect"])])
        if point["random"]:
            quiet.append(len(rows))
            rows.append([*_random_arms(point), spread(random_values(point))])
    called = " (ceiling)" if all(run.result.get("ceiling_called", "ceiling") == "ceiling" for _, run in runs) else ""
    rows.append([*arm_row(f"all neurons patched{called}", first["ceiling"]), interval(first["ceiling_effect"])])
    if first.get("ceiling_by_parameters"):
        arm = arm_row("all parameters of the sites (ceiling)", first["ceiling_by_parameters"])
        rows.append([*arm, interval(first["ceiling_by_parameters_effect"])])
    caption = "The smallest set of each sweep that nearly reaches the ceiling, else its best; 95\u00a0% intervals"
    return Table(caption, [*ARM_COLUMNS, "causal effect"], rows, frozenset(quiet))


def arm_row(label: str, arm: Mapping[str, Any]) -> list[Cell]:
    """Cells of `ARM_COLUMNS` for one arm; what could not be scored is counted."""
    unscored = arm["harmful_refused"]["unscored"] + arm["harmless_refused"]["unscored"]
    shown = f"{label}, {unscored:,} unscored" if unscored else label
    refusals = [interval(arm["harmful_refused"]), interval(arm["harmless_refused"])]
    return [shown, *refusals, number(arm["perplexity"]), number(arm["divergence"], 3)]


def _random_arms(point: Mapping[str, Any]) -> list[Cell]:
    def over(name: str) -> str:
        values = [arm[name]["value"] if isinstance(arm[name], Mapping) else arm[name] for arm in point["random"]]
        return spread([value for value in values if value is not None], 3 if name == "divergence" else 2)

    columns = ("harmful_refused", "harmless_refused", "perplexity", "divergence")
    return [f"{len(point['random'])} random sets of {count(point['n_neurons'])}", *(over(name) for name in columns)]


def methods_table(run: ReportedRun) -> Table:
    """Every row of a comparison."""
    result = run.result
    real, chance = methods_of(result)
    known = any(row["recall"] is not None for row in result["methods"])
    rows = [
        [
            visible(row["method"], 40),
            count(row["n_units"]),
            count(row["n_neurons"]),
            *([number(row["recall"])] if known else []),
            interval(row["causal_effect"]),
            interval(row["necessity"]),
            interval(row["harmful_refused"]),
            interval(row["harmless_refused"]),
            duration(row["seconds"]) if row["seconds"] else NONE,
        ]
        for row in [*real, *chance]
    ]
    columns = [
        "method",
        "units",
        "neurons",
        *(["recall"] if known else []),
        "causal effect",
        "refusals lost when off",
        "harmful refused",
        "harmless refused",
        "time to find",
    ]
    return Table(captioned("Every method at the same number of units; 95\u00a0% intervals", result["methods"]), columns, rows)


def agreement_table(run: ReportedRun) -> Table:
    """Jaccard index of every two sets, beside chance."""
    rows = [
        [f"{visible(pair['methods'][0], 40)}, {visible(pair['methods'][1], 40)}", number(pair["jaccard"], 3), number(pair["chance"], 3)]
        for pair in sorted(run.result["agreement"], key=lambda pair: -pair["jaccard"])
    ]
    return Table("Units shared by two sets ÷ units in either", ["two sets", "Jaccard index", "two random sets"], rows)


def checks_table(run: ReportedRun) -> Table:
    """The doctor's checks."""
    words = {True: Markup('<span class="verdict yes">pass</span>'), False: Markup('<span class="verdict no">fail</span>'), None: "informs"}
    rows = [
        [
            visible(check["check"], 80),
            words[check["passed"]],
            visible(check["measured"], 300),
            visible(NONE if check["allowed"] is None else check["allowed"], 80),
        ]
        for check in run.result["checks"]
    ]
    return Table("Experiments on the model itself", ["check", "outcome", "measured", "allowed"], rows)


def neurons_table(run: ReportedRun, n: int = 25) -> Table | None:
    """The neurons with the largest scores among those kept."""
    if run.scores is None or run.neurons is None or not len(run.neurons):
        return None
    kept = [(key, members, run.scores[key][members]) for key, members in run.neurons.items() if key in run.scores]
    if not kept:
        return None
    values = np.concatenate([scores for _, _, scores in kept])
    keys = np.repeat(np.arange(len(kept)), [len(members) for _, members, _ in kept])
    indices = np.concatenate([members for _, members, _ in kept])
    rows: list[list[Cell]] = []
    for place in np.argsort(-values, kind="stable")[:n]:
        key = parse_key(kept[keys[place]][0])
        part = "shared expert" if key.shared else f"expert {key.expert}" if key.expert is not None else ""
        rows.append([f"{len(rows) + 1}", f"{key.layer}", f"{key.site} {part}".strip(), f"{indices[place]}", f"{values[place]:.4g}"])
    return Table(f"The {len(rows)} neurons with the largest scores", ["rank", "layer", "site", "index", "score"], rows)


def cells_table(counts: Mapping[tuple[int, str], tuple[int, int, float | None]]) -> Table:
    """The numbers of both maps."""
    rows = [
        [
            f"layer {layer}",
            site,
            f"{members:,}",
            f"{size:,}" if size else NONE,
            share(members / size) if size else NONE,
            NONE if mean is None else f"{mean:.3g}",
        ]
        for (layer, site), (members, size, mean) in sorted(counts.items())
        if members or mean is not None
    ]
    return Table("Neurons found and mean score, matrix by matrix", ["layer", "site", "found", "of", "share", "mean score"], rows)


@dataclass(frozen=True)
class Figure:
    """A drawing, what it shows in words, and a caption that says how to read it."""

    drawing: Markup
    alternative: str
    caption: Markup


@dataclass(frozen=True)
class ReportPart:
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


def titled(words: str, run: ReportedRun) -> Markup:
    """A heading of our own with the name of the run."""
    return say("{} <span class=sub>{}</span>", words, name(run.label))


def patch_parts(runs: Sequence[ReportedRun], everything: Sequence[ReportedRun]) -> list[ReportPart]:
    """Causal effects; sweeps of the same pair in one figure."""
    groups: dict[tuple[str, ...], list[ReportedRun]] = {}
    for run in runs:
        groups.setdefault(run.models, []).append(run)
    return [_patch_part(group, everything) for group in groups.values()]


def _patch_part(group: Sequence[ReportedRun], everything: Sequence[ReportedRun]) -> ReportPart:
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
        return ReportPart(
            heading, say("The causal effect is undefined: {}.", visible(undefined[0], 300)), (), [summary_table(named)], tables
        )
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
    return ReportPart(heading, Markup(""), [figure], [summary_table(named)], tables)


def deactivate_part(run: ReportedRun, everything: Sequence[ReportedRun]) -> ReportPart:
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
    return ReportPart(heading, lead + Markup("."), figures, [arms_table(run)])


def _refusals(result: Mapping[str, Any], what: str, title: str, caption: str) -> Figure:
    def row(label: str, arm: Mapping[str, Any], shape: str = "circle", colour: str = INK) -> DotRow:
        rate = arm[what]
        return DotRow(label, rate["value"], rate["low"], rate["high"], interval(rate), colour, shape)

    colour = look("contrast")[0]
    point = result["sizes"][-1]
    rows = [row("untreated", result["untreated"])]
    dots = [arm[what]["value"] for arm in point["random"] if arm[what]["value"] is not None]
    if dots:
        rows.append(_random_row(dots, " off"))
    rows.append(row("these neurons off", result["treated"], "diamond", colour))
    rows.append(row("all neurons off", result["ceiling"], "square", SOFT))
    alternative = f"{title}: " + "; ".join(f"{each.label} {each.text}" for each in rows)
    shown = say("<b>{}</b> Bars are 95\u00a0% intervals; ticks are single random sets.", caption)
    return Figure(dot_figure(rows, title, domain=(-0.03, 1.03)), alternative + ".", shown)


def _random_row(dots: Sequence[float], what: str = "") -> DotRow:
    """Single random sets as ticks, and their range."""
    return DotRow(f"{len(dots)} random sets{what}", None, None, None, f"{number(min(dots))} to {number(max(dots))}", SOFT, dots=dots)


def compare_part(run: ReportedRun) -> ReportPart:
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
    return ReportPart(heading, lead, figures, [methods_table(run)], details)


def _interval_rows(
    real: Sequence[Mapping[str, Any]], chance: Sequence[Mapping[str, Any]], names: Sequence[str], measure: str
) -> tuple[list[DotRow], tuple[float, float]]:
    """One row a method with its interval, one for the random sets, and the axis that holds them all."""
    rows = []
    for label, entry in zip(names, real, strict=True):
        value = entry[measure]
        colour, shape = look(label, names)
        rows.append(DotRow(label, value["value"], value["low"], value["high"], interval(value), colour, shape))
    dots = [entry[measure]["value"] for entry in chance if entry[measure]["value"] is not None]
    if dots:
        rows.append(_random_row(dots))
    ends = [end for row in rows for end in (row.low, row.high) if end is not None]
    return rows, (max(min([0.0, *ends, *dots]), -1.0) - 0.04, min(max([1.0, *ends]), 2.0) + 0.04)


def _recall(real: Sequence[Mapping[str, Any]], chance: Sequence[Mapping[str, Any]], names: Sequence[str]) -> Figure:
    rows = [
        DotRow(label, entry["recall"], None, None, number(entry["recall"]), *look(label, names))
        for label, entry in zip(names, real, strict=True)
    ]
    dots = [entry["recall"] for entry in chance if entry["recall"] is not None]
    if dots:
        rows.append(_random_row(dots))
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


ROOM = 6000
"""Neurons in the block, over all maps."""
LEAST, MOST = 6, 200
"""Neurons of one cell."""

Cells = dict[tuple[int, str], tuple[int, int, float | None]]
Ranks = dict[str, np.ndarray]


def place_of(layer: int, site: str) -> str:
    """Name of a cell in the page."""
    return f"{layer}.{site}"


def cells_of(run: ReportedRun) -> Cells:
    """Found, size and mean score of every layer and site; experts of a layer are counted together."""
    scores, neurons = run.scores, run.neurons
    table = (scores.table if scores is not None else None) or (neurons.table if neurons is not None else None)
    sums: dict[tuple[int, str], list[float]] = {}
    signed = is_signed(scores)

    def cell(key: str) -> list[float]:
        parsed = parse_key(key)
        return sums.setdefault((parsed.layer, parsed.site), [0.0, 0.0, 0.0, 0.0])

    for key, values in scores.items() if scores is not None else []:
        entry = cell(key)
        entry[1] += len(values)
        entry[2] += float(np.abs(values).sum(dtype=np.float64) if signed else values.sum(dtype=np.float64))
        entry[3] += len(values)
    for key, members in neurons.items() if neurons is not None else []:
        entry = cell(key)
        entry[0] += len(members)
        if scores is None and table is not None and key in table:
            entry[1] += table[key].size
    return {place: (int(e[0]), int(e[1]), e[2] / e[3] if e[3] else None) for place, e in sums.items()}


def is_signed(scores: Scores | None) -> bool:
    """Whether scores fall below zero, so that their size is what a mean can show."""
    return scores is not None and any((values < 0).any() for _, values in scores.items())


def ranks_of(scores: Scores) -> Ranks:
    """Rank of every neuron among all that were scored, 1 for the largest; ties by layer, site, index."""
    items = list(scores.items())
    whole = np.concatenate([values for _, values in items]) if items else np.zeros(0)
    ranks = np.empty(len(whole), np.int64)
    ranks[np.argsort(-whole, kind="stable")] = np.arange(1, len(whole) + 1)
    ends = np.cumsum([len(values) for _, values in items])[:-1]
    return dict(zip([key for key, _ in items], np.split(ranks, ends), strict=True)) if items else {}


@dataclass(frozen=True)
class Column:
    """One find run as a column of every other run's list."""

    run: ReportedRun
    ranks: Ranks

    def of(self, key: str, index: int) -> list[int]:
        """Rank of a neuron (0: not scored) and whether it was kept."""
        ranks, neurons = self.ranks.get(key), self.run.neurons
        rank = int(ranks[index]) if ranks is not None and index < len(ranks) else 0
        members = neurons[key] if neurons is not None else np.zeros(0, np.int64)
        place = int(np.searchsorted(members, index))
        return [rank, int(place < len(members) and int(members[place]) == index)]


def opened(runs: Sequence[ReportedRun]) -> list[ReportedRun]:
    """The find runs whose maps open: their score or neuron file is still in the folder."""
    return [run for run in runs if run.verb.startswith("find-") and (run.scores is not None or run.neurons is not None)]


def block(runs: Sequence[ReportedRun], cards: Mapping[str, Any]) -> Markup | None:
    """The data of every find run whose files are still in the folder; nothing where none is.

    Args:
        runs: all runs of the page.
        cards: neuron cards by `layers.{i}.{site}.{index}`, text in them already made visible.
    """
    found = opened(runs)
    if not found:
        return None
    columns = [Column(run, ranks_of(run.scores) if run.scores is not None else {}) for run in found]
    cells = {id(run): cells_of(run) for run in found}
    each = _most([kept for places in cells.values() for kept, _, _ in places.values()])
    record: dict[str, Any] = {"runs": [], "cards": dict(cards)}
    for column in columns:
        others = [other for other in columns if other is column or _same_model(other.run, column.run)]
        record["runs"].append(
            {
                "label": visible(column.run.label, 80),
                "method": visible(column.run.method, 40),
                "columns": [visible(_title(other.run, others), 60) for other in others],
                "own": others.index(column),
                "scored": len(column.run.scores) if column.run.scores is not None else 0,
                "kept": len(column.run.neurons) if column.run.neurons is not None else 0,
                "cells": {
                    place_of(*place): _cell(place, counts, column, others, each, cards) for place, counts in cells[id(column.run)].items()
                },
            }
        )
    return Markup(in_script(record))  # noqa: S704 - every character with a meaning in HTML is escaped


def _most(kept: Sequence[int]) -> int:
    """How many neurons of a cell fit, so that all cells together stay within the room: small cells are whole."""
    for most in range(MOST, LEAST, -1):
        if sum(min(max(count, LEAST), most) for count in kept) <= ROOM:
            return most
    return LEAST


def _title(run: ReportedRun, others: Sequence[Column]) -> str:
    several = sum(other.run.method == run.method for other in others) > 1
    return f"{run.method} ({run.label})" if several else run.method


def _same_model(first: ReportedRun, second: ReportedRun) -> bool:
    prints = [str((run.scores or run.neurons).provenance.model_fingerprint) for run in (first, second)]  # type: ignore[union-attr]
    return prints[0] == prints[1] != ""


def _cell(
    place: tuple[int, str],
    counts: tuple[int, int, float | None],
    column: Column,
    others: Sequence[Column],
    each: int,
    cards: Mapping[str, Any],
) -> dict[str, Any]:
    """Counts of a cell, and its neurons: those kept first, then the next ones, by score."""
    kept, size, mean = counts
    scores, neurons = column.run.scores, column.run.neurons
    rows: list[tuple[int, float, str, int]] = []
    for key in _keys(column.run, place):
        values = scores[key] if scores is not None and key in scores else None
        members = neurons[key] if neurons is not None else np.zeros(0, np.int64)
        chosen = set(_largest(members, values, each))
        if values is not None and len(chosen) < LEAST:
            chosen |= set(_largest(np.arange(len(values)), values, LEAST))
        chosen |= {int(name.rpartition(".")[2]) for name in cards if name.rpartition(".")[0] == key}
        held = set(members.tolist())
        rows += [(int(index not in held), float(values[index]) if values is not None else 0.0, key, index) for index in sorted(chosen)]
    rows.sort(key=lambda row: (row[0], -row[1]))
    listed = [
        [
            index,
            _rounded(score) if scores is not None else None,
            _part(key),
            [entry for other in others for entry in other.of(key, index)],
            f"{key}.{index}",
        ]
        for place, (_, score, key, index) in enumerate(rows)
        if place < max(each, LEAST) or f"{key}.{index}" in cards
    ]
    return {"of": size, "kept": kept, "mean": None if mean is None else _rounded(mean), "neurons": listed}


def _rounded(value: float) -> float | None:
    return float(f"{value:.4g}") if np.isfinite(value) else None


def _largest(members: np.ndarray, values: np.ndarray | None, each: int) -> list[int]:
    if values is None:
        return [int(index) for index in members[:each]]
    order = np.argsort(-values[members], kind="stable")[:each]
    return [int(index) for index in members[order]]


def _keys(run: ReportedRun, place: tuple[int, str]) -> list[str]:
    """The matrices of a cell, experts of a layer together."""
    seen: dict[str, None] = {}
    for nouns in (run.scores, run.neurons):
        for key, _ in nouns.items() if nouns is not None else []:
            parsed = parse_key(key)
            if (parsed.layer, parsed.site) == place:
                seen[key] = None
    return list(seen)


def _part(key: str) -> str:
    parsed = parse_key(key)
    return "shared expert" if parsed.shared else f"expert {parsed.expert}" if parsed.expert is not None else ""


TALL = 12
"""Layers beyond which two maps stand side by side."""


def find_part(run: ReportedRun, opens: int | None = None) -> ReportPart:
    """Where the neurons of a find run are."""
    heading = say("{} <span class=sub>on {}</span>", visible(run.method, 40), Markup(" → ").join(name(model) for model in run.models))
    used = run.result["prompts"]
    lead = say(
        "{} kept, {} of those searched and {} of all parameters, from {}.",
        plural(run.result["n_neurons"], "neuron"),
        share(run.result["share_of_neurons"]),
        share(run.result["share_of_parameters"], 2),
        plural(used["used"], "prompt"),
    )
    cells = cells_of(run)
    if not cells:
        return ReportPart(heading, lead + Markup(" The score and neuron files are no longer in the folder, so there is no map."))
    top = neurons_table(run)
    tall = len({layer for layer, _ in cells}) > TALL
    return ReportPart(heading, lead, _maps(run, cells), (), [*([top] if top else []), cells_table(cells)], opens, tall)


def _maps(run: ReportedRun, cells: Cells) -> list[Figure]:
    shares = {place: members / size for place, (members, size, _) in cells.items() if size}
    places = {place: place_of(*place) for place in cells}
    figures = []
    if shares:
        tips = {
            place: f"layer {place[0]}, {place[1]}: {cells[place][0]:,} of {cells[place][1]:,} neurons ({share(shares[place])})"
            for place in shares
        }
        labels = {place: _short(100 * value) for place, value in shares.items()}
        most = sorted(shares, key=lambda place: -shares[place])[:3]
        text = "Largest: " + "; ".join(tips[place] for place in most)
        caption = Markup("<b>Found</b>: neurons kept ÷ neurons of the matrix, in %.")
        drawn = site_map(shares, labels, tips, places)
        figures.append(Figure(drawn, f"Heat map of the share of each matrix kept. {text}.", caption))
    means = {place: mean for place, (_, _, mean) in cells.items() if mean is not None}
    if means:
        largest = max(abs(value) for value in means.values()) or 1.0
        tips = {place: f"layer {place[0]}, {place[1]}: mean score {value:.3g}" for place, value in means.items()}
        labels = {place: _short(100 * value / largest) for place, value in means.items()}
        most = sorted(means, key=lambda place: -means[place])[:3]
        what = "mean size of the score (signs left out)" if is_signed(run.scores) else "mean score"
        caption = say("<b>Score</b>: {} of all neurons of the matrix; 100 = {}.", what, f"{largest:.3g}")
        text = "Largest: " + "; ".join(tips[place] for place in most)
        figures.append(Figure(site_map(means, labels, tips, places), f"Heat map of the {what} of each matrix. {text}.", caption))
    return figures


def _short(value: float) -> str:
    return "0" if value == 0 else "<1" if abs(value) < 0.95 else f"{value:.0f}"
