"""What find found: where the neurons are, and the block of data in which a map opens into them.

A map opens into the neurons behind every cell, their ranks by every method, and their cards, as one block of
data. The page draws without it; a script only looks things up there. The block is kept small: of a cell with
many neurons those with the largest scores are in it, and how many are left out is said.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from markupsafe import Markup

from safety_neurons.display.charts import site_map
from safety_neurons.display.parts import FOUND, Cell, DisplayPart, Figure, Finding, ReportedRun, Table
from safety_neurons.display.text import NONE, count, first_of, in_script, name, plural, say, share, visible
from safety_neurons.neurons import SITES, Scores, parse_key

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
    return [
        run
        for run in runs
        if run.verb.startswith("find-") and (run.scores is not None or run.neurons is not None)
    ]


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
                    place_of(*place): _cell(place, counts, column, others, each, cards)
                    for place, counts in cells[id(column.run)].items()
                },
            }
        )
    return Markup(in_script(record))  # noqa: S704 - every character with a meaning in HTML is escaped


def _most(kept: Sequence[int]) -> int:
    """How many neurons of a cell fit, so that all cells together stay within the room: small cells are
    whole.
    """
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
        rows += [
            (int(index not in held), float(values[index]) if values is not None else 0.0, key, index)
            for index in sorted(chosen)
        ]
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
    return (
        "shared expert" if parsed.shared else f"expert {parsed.expert}" if parsed.expert is not None else ""
    )


TALL = 12
"""Layers beyond which two maps stand side by side."""


def find_part(run: ReportedRun) -> DisplayPart:
    """Where the neurons of a find run are."""
    heading = say("{} <span class=sub>on {}</span>", visible(run.method, 40), run.pair)
    used = run.result["prompts"]
    lead = say(
        "{} kept, {} of those searched and {} of all parameters, from {}.",
        plural(run.result["n_neurons"], "neuron"),
        share(run.result["share_of_neurons"]),
        share(run.result["share_of_parameters"], 2),
        plural(used["used"], "prompt"),
    )
    lead += specific_words(run)
    cells = cells_of(run)
    if not cells:
        return DisplayPart(
            heading,
            lead + Markup(" The score and neuron files are no longer in the folder, so there is no map."),
        )
    top = neurons_table(run)
    tall = len({layer for layer, _ in cells}) > TALL
    return DisplayPart(
        heading,
        lead,
        _maps(run, cells),
        (),
        [
            *specific_table(run),
            *ranking_table(run),
            sites_table(cells),
            *([top] if top else []),
            cells_table(cells),
        ],
        tall=tall,
    )


def specific_words(run: ReportedRun) -> Markup:
    """How much of what was chosen is specific to the prompts, where other prompts were taken away."""
    specific = run.result.get("specific")
    if not specific or specific["share"] is None:
        return Markup("")
    chance = specific["by_chance"]
    words = say(
        " Specific to the prompts: {} of {} chosen",
        share(specific["share"]),
        plural(specific["n_chosen"], "neuron"),
    )
    if chance is not None:
        words += say(" (half of the prompts beside the other half: {})", share(chance))
    return words + Markup(".")


def specific_finding(run: ReportedRun) -> Markup:
    """The same as a part of a sentence."""
    words = specific_words(run)
    return Markup("; s" + words[2:-1]) if words else words


def specific_table(run: ReportedRun) -> list[Table]:
    """What was chosen on the prompts that were taken away."""
    specific = run.result.get("specific")
    if not specific:
        return []
    rows: list[list[Cell]] = [
        [
            visible(one["name"], 60),
            count(one["n_prompts"]),
            count(one["n_neurons"]),
            count(one["n_shared"]),
            f"{one['jaccard']:.2f}",
        ]
        for one in specific["minus"]
    ]
    return [
        Table(
            "Taken away: chosen on other prompts too",
            ["prompts", "number", "neurons chosen", "shared", "Jaccard"],
            rows,
        )
    ]


def ranking_table(run: ReportedRun, n: int = 25) -> list[Table]:
    """The heads or experts with the largest scores, of a method that scores these."""
    ranking = run.result.get("ranking")
    if not ranking:
        return []
    what = "expert" if run.method == "routing" else "head"
    rows: list[list[Cell]] = [
        [f"{rank}", f"{layer}", f"{number}", f"{score:.4g}"]
        for rank, (layer, number, score) in enumerate(ranking[:n], 1)
    ]
    return [
        Table(
            f"{first_of(len(rows), len(ranking), what)}, by {visible(run.method, 40)}",
            ["rank", "layer", "number", "score"],
            rows,
        )
    ]


def _maps(run: ReportedRun, cells: Cells) -> list[Figure]:
    shares = {place: members / size for place, (members, size, _) in cells.items() if size}
    places = {place: place_of(*place) for place in cells}
    figures = []
    if shares:
        tips = {
            place: (
                f"layer {place[0]}, {place[1]}: {cells[place][0]:,} of {cells[place][1]:,} neurons "
                f"({share(shares[place])})"
            )
            for place in shares
        }
        labels = {place: _short(100 * value) for place, value in shares.items()}
        most = sorted(shares, key=lambda place: -shares[place])[:3]
        text = "Largest: " + "; ".join(tips[place] for place in most)
        caption = Markup("<b>Found</b>: neurons kept ÷ neurons of the matrix, in %.")
        drawn = partial(site_map, shares, labels, tips, places)
        figures.append(Figure(drawn, f"Heat map of the share of each matrix kept. {text}.", caption))
    means = {place: mean for place, (_, _, mean) in cells.items() if mean is not None}
    if means:
        largest = max(abs(value) for value in means.values()) or 1.0
        tips = {
            place: f"layer {place[0]}, {place[1]}: mean score {value:.3g}" for place, value in means.items()
        }
        labels = {place: _short(100 * value / largest) for place, value in means.items()}
        most = sorted(means, key=lambda place: -means[place])[:3]
        what = "mean size of the score (signs left out)" if is_signed(run.scores) else "mean score"
        caption = say("<b>Score</b>: {} of all neurons of the matrix; 100 = {}.", what, f"{largest:.3g}")
        text = "Largest: " + "; ".join(tips[place] for place in most)
        figures.append(
            Figure(
                partial(site_map, means, labels, tips, places),
                f"Heat map of the {what} of each matrix. {text}.",
                caption,
            )
        )
    return figures


def _short(value: float) -> str:
    return "0" if value == 0 else "<1" if abs(value) < 0.95 else f"{value:.0f}"


def foreign_part(run: ReportedRun) -> DisplayPart:
    """Neurons that others found."""
    result = run.result
    lead = say(
        "{}, {} of all.", plural(result["n_neurons"], "neuron"), share(result["share_of_all_neurons"], 2)
    )
    rows = [[visible(key, 60), count(members)] for key, members in result["counts"].items()]
    heading = say("Neurons read from a file <span class=sub>{}</span>", visible(result["format"], 40))
    return DisplayPart(heading, lead, tables=[Table("Neurons of every matrix", ["matrix", "neurons"], rows)])


def named_part(run: ReportedRun) -> DisplayPart:
    """Neurons under the names of another tool."""
    result = run.result
    lead = say("{} at {}.", plural(result["n_neurons"], "neuron"), plural(len(result["places"]), "place"))
    return DisplayPart(say("Neurons named for {}", visible(result["tool"], 40)), lead)


def neurons_table(run: ReportedRun, n: int = 25) -> Table | None:
    """The neurons with the largest scores among those kept."""
    if run.scores is None or run.neurons is None or not len(run.neurons):
        return None
    kept = [
        (key, members, run.scores[key][members]) for key, members in run.neurons.items() if key in run.scores
    ]
    if not kept:
        return None
    values = np.concatenate([scores for _, _, scores in kept])
    keys = np.repeat(np.arange(len(kept)), [len(members) for _, members, _ in kept])
    indices = np.concatenate([members for _, members, _ in kept])
    rows: list[list[Cell]] = []
    for place in np.argsort(-values, kind="stable")[:n]:
        key = parse_key(kept[keys[place]][0])
        part = "shared expert" if key.shared else f"expert {key.expert}" if key.expert is not None else ""
        rows.append(
            [
                f"{len(rows) + 1}",
                f"{key.layer}",
                f"{key.site} {part}".strip(),
                f"{indices[place]}",
                f"{values[place]:.4g}",
            ]
        )
    return Table(
        first_of(len(rows), len(values), "neuron"),
        ["rank", "layer", "site", "index", "score"],
        rows,
    )


def sites_table(counts: Cells) -> Table:
    """How many neurons were found in every layer, site by site."""
    sites = [
        site for site in SITES if any(at == site and members for (_, at), (members, _, _) in counts.items())
    ]
    layers = sorted({layer for (layer, _), (members, _, _) in counts.items() if members})

    def row(label: str, chosen: Sequence[int]) -> list[Cell]:
        numbers = [sum(counts.get((layer, site), (0,))[0] for layer in chosen) for site in sites]
        return [label, *map(count, numbers), count(sum(numbers))]

    rows = [*(row(f"layer {layer}", [layer]) for layer in layers), row("all", layers)]
    return Table("Neurons found, layer by layer", ["", *sites, "together"], rows)


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
    return Table(
        "Neurons found and mean score, matrix by matrix",
        ["layer", "site", "found", "of", "share", "mean score"],
        rows,
    )


def find_findings(run: ReportedRun) -> list[Finding]:
    """How many neurons are kept, and where most of them are."""
    result = run.result
    text = say(
        "<b>{}</b> keeps {} of {}: {} of those searched, {} of all parameters",
        visible(run.method, 40),
        plural(result["n_neurons"], "neuron"),
        name(run.model),
        share(result["share_of_neurons"]),
        share(result["share_of_parameters"], 2),
    )
    if run.neurons is not None and len(run.neurons):
        layers: dict[int, int] = {}
        for key, members in run.neurons.items():
            layers[parse_key(key).layer] = layers.get(parse_key(key).layer, 0) + len(members)
        most = max(layers, key=lambda layer: layers[layer])
        text += say("; {} of them sit in layer {}", share(layers[most] / len(run.neurons), 0), most)
    text += specific_finding(run)
    lost = [
        f"{plural(result['prompts'][what], 'prompt')} {what}"
        for what in ("failed", "truncated")
        if result["prompts"].get(what)
    ]
    return [Finding(FOUND, text + (say("; {}", ", ".join(lost)) if lost else "") + Markup("."))]
