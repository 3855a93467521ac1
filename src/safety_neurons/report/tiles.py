"""The first screen: one tile for every question, with its shortest true answer."""

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from safety_neurons.report.findings import (
    FACT,
    FAIL,
    NO,
    OPEN,
    PARTLY,
    PASS,
    YES,
    methods_of,
    necessity,
    ranked_by,
    telling_point,
    verdict_of,
)
from safety_neurons.report.reading import Run
from safety_neurons.report.text import NONE, count, interval, number, plural, say, share, visible


@dataclass(frozen=True)
class Tile:
    """One question of the first screen with its answer."""

    question: str
    verdict: str
    figure: str
    text: Markup


def tiles(runs: Sequence[Run]) -> list[Tile]:
    """The questions of the first screen with their shortest true answers."""
    made = []
    patch_runs = [run for run in runs if run.verb == "verify-patch"]
    if patch_runs:
        made.append(_sufficient(patch_runs, runs))
    deactivate_runs = [run for run in runs if run.verb == "verify-deactivate"]
    if deactivate_runs:
        run = deactivate_runs[0]
        verdict, change = necessity(run)
        compared = "against random sets" if run.result["change_against_random"] else "against the model as it is"
        text = say(
            "change of refusals of harmful requests with {} neurons off ({}), {}",
            count(run.result["n_neurons"]),
            ranked_by(run, runs),
            compared,
        )
        made.append(Tile("Are they necessary?", verdict, interval(change, signed=True), text))
    for run in [run for run in runs if run.kind == "compare"][:2]:
        made += _best_method(run)
    doctors = [run for run in runs if run.verb == "doctor"]
    if doctors:
        checks = [check for run in doctors for check in run.result["checks"] if check["passed"] is not None]
        held = sum(bool(check["passed"]) for check in checks)
        verdict = PASS if held == len(checks) else FAIL
        made.append(Tile("Is the model understood?", verdict, f"{held} of {len(checks)}", Markup("checks on the model itself pass")))
    return made


def sweep_order(run: Run) -> tuple[float | int, ...]:
    """Sorts patch runs: those that reach the ceiling with the fewest neurons first, then by their effect."""
    point = telling_point(run.result)
    verdict, value = verdict_of(run.result, point), point["causal_effect"]["value"] or 0.0
    return ({YES: 0, PARTLY: 1, NO: 2, OPEN: 3}[verdict], point["n_neurons"] if verdict == YES else 0, -value)


def _sufficient(patch_runs: Sequence[Run], runs: Sequence[Run]) -> Tile:
    """The run that reaches the ceiling with the fewest neurons, or comes nearest to it."""
    run = min(patch_runs, key=sweep_order)
    point = telling_point(run.result)
    if verdict_of(run.result, point) == OPEN:
        why = say("no effect can be told: {}", visible(point["causal_effect"].get("why"), 200))
        return Tile("Are a few neurons sufficient?", OPEN, NONE, why)
    text = "of the difference in refusals restored by patching {} ({}, {}); all neurons: {}"
    ceiling = number(run.result["ceiling_effect"]["value"])
    shown = say(text, plural(point["n_neurons"], "neuron"), share(point["size"]), ranked_by(run, runs), ceiling)
    return Tile("Are a few neurons sufficient?", verdict_of(run.result, point), interval(point["causal_effect"]), shown)


def _best_method(run: Run) -> list[Tile]:
    real, _ = methods_of(run.result)
    known = [row for row in real if row["recall"] is not None]
    if known:
        best = max(known, key=lambda row: row["recall"])
        verdict = YES if best["recall"] >= 0.95 else PARTLY if best["recall"] > 0 else NO
        text = say("of {} planted units found by {}", count(run.result["budget"]), visible(best["method"], 40))
        return [Tile("Is the planted truth found?", verdict, number(best["recall"]), text)]
    if not real:
        return []
    best = real[0]
    effect = best["causal_effect"]
    verdict = OPEN if effect["value"] is None else FACT
    text = say(
        "causal effect of {}, the largest of {} at {} of the units",
        visible(best["method"], 40),
        plural(len(real), "method"),
        share(run.result["budget"] / run.result["n_units"]),
    )
    return [Tile("Which method at equal budget?", verdict, interval(effect), text)]
