"""Tables of a report: plain rows under headers, with intervals."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import Markup

from safety_neurons.neurons import parse_key
from safety_neurons.report.findings import methods_of, random_values, telling_point
from safety_neurons.report.reading import Run
from safety_neurons.report.text import NONE, count, duration, interval, number, share, visible
from safety_neurons.results import captioned

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


def arms_table(run: Run) -> Table:
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


def summary_table(runs: Sequence[tuple[str, Run]]) -> Table:
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


def methods_table(run: Run) -> Table:
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


def agreement_table(run: Run) -> Table:
    """Jaccard index of every two sets, beside chance."""
    rows = [
        [f"{visible(pair['methods'][0], 40)}, {visible(pair['methods'][1], 40)}", number(pair["jaccard"], 3), number(pair["chance"], 3)]
        for pair in sorted(run.result["agreement"], key=lambda pair: -pair["jaccard"])
    ]
    return Table("Units shared by two sets ÷ units in either", ["two sets", "Jaccard index", "two random sets"], rows)


def checks_table(run: Run) -> Table:
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


def neurons_table(run: Run, n: int = 25) -> Table | None:
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
