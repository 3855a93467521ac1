"""What verify scale found: dose curves of a set beside those of random sets."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from markupsafe import Markup

from safety_neurons.display.charts import Line, Plane, line_figure
from safety_neurons.display.lengths import length_figures, length_tables
from safety_neurons.display.parts import (
    CAUTION,
    FACT,
    NO,
    YES,
    Cell,
    DisplayPart,
    Figure,
    Finding,
    ReportedRun,
    Table,
    Tile,
    by_method,
    counted,
    spread,
    why_not,
)
from safety_neurons.display.text import NONE, count, interval, name, number, plural, say, visible
from safety_neurons.results import captioned, clear_word, is_clear

MEASURES = {
    "harmful_refused": "harmful requests refused",
    "harmful_complied": "harmful requests complied with",
    "harmless_refused": "harmless requests refused",
    "repetition": "repeated sequences of four words",
    "perplexity_interval": "perplexity",
}
"""By key of an arm what is drawn against the factor."""


def scale_part(run: ReportedRun) -> DisplayPart:
    """A curve of every measure, and a row of every factor."""
    result = run.result
    heading = say("{} scaled in {}", plural(result["n_neurons"], "neuron"), name(run.model))
    lead = say("Activations{} are multiplied by a factor", by_method(run, "of the set chosen"))
    if result["condition"]:
        flagged = result["flagged"]
        lead += say(
            ", only for requests that the {} flags: {} of the harmful, {} of the harmless ones",
            visible(result["condition"], 60),
            interval(flagged["harmful"]),
            interval(flagged["harmless"]),
        )
    drawn = [_curve(result, key, title) for key, title in MEASURES.items()]
    figures = [figure for figure in drawn if figure is not None]
    tables = [_table(result), _changes(result), *length_tables(run)]
    return DisplayPart(heading, lead + Markup("."), [*figures, *length_figures(run)], tables)


def _value(arm: Mapping[str, Any], key: str) -> float | None:
    found = arm.get(key)
    return found["value"] if found else None


def _known(arms: Sequence[Mapping[str, Any]], key: str) -> list[float]:
    return [value for arm in arms if (value := _value(arm, key)) is not None]


def _table(result: Mapping[str, Any]) -> Table:
    rows: list[Sequence[Cell]] = []
    quiet = []
    for dose in result["doses"]:
        arm, random = dose["treated"], dose["random"]
        label = counted(f"{dose['factor']:g}", arm["harmful_refused"], arm["harmless_refused"])
        rows.append([label, *(interval(arm.get(key)) for key in MEASURES), count(arm["cut_off"])])
        if random:
            quiet.append(len(rows))
            cells = [spread(_known(random, key)) for key in MEASURES]
            rows.append([f"{dose['factor']:g} ({plural(len(random), 'random set')})", *cells, NONE])
    columns = [
        "factor",
        "harmful refused",
        "harmful complied",
        "harmless refused",
        "repetition",
        "perplexity",
        "cut off",
    ]
    return Table("Every factor; 95\u00a0% intervals", columns, rows, frozenset(quiet))


def _changes(result: Mapping[str, Any]) -> Table:
    rows = [
        [
            f"{dose['factor']:g}",
            interval(dose["change"], signed=True),
            interval(dose["harm_change"], signed=True),
            *(
                cell
                for against in (dose["change_against_random"], dose.get("harm_change_against_random"))
                for cell in (interval(against, signed=True), clear_word(against) if against else NONE)
            ),
        ]
        for dose in result["doses"]  # Runs of earlier versions hold no harm against random sets.
    ]
    columns = [
        *("factor", "refusals", "answers that do harm"),
        *("refusals, against random sets", "clear", "harm, against random sets", "clear"),
    ]
    caption = "Paired change from the model as it is; 95\u00a0% intervals"
    return Table(captioned(caption, result["doses"]), columns, rows)


def _curve(result: Mapping[str, Any], key: str, title: str) -> Figure | None:
    """One measure against the factor, with the band of the random sets."""
    points, ends, band = [], [], []
    for dose in result["doses"]:
        found = dose["treated"].get(key)
        if not found or found["value"] is None:
            continue
        points.append((float(dose["factor"]), float(found["value"])))
        low, high = (found["value"] if found[end] is None else found[end] for end in ("low", "high"))
        ends.append((float(low), float(high)))
        chance = _known(dose["random"], key)
        if chance:
            band.append((float(dose["factor"]), min(chance), max(chance)))
    if not points:
        return None
    factors = [at for at, _ in points]
    # A broken model's perplexity has no bound: the axis ends at four times that of the model as it is.
    untreated = _value(result["untreated"], key) or 1.0
    top = 4 * untreated if key == "perplexity_interval" else 1.02
    plane = Plane(
        "factor of the activations", title, (min(factors), max(*factors, min(factors) + 1)), (0.0, top)
    )
    said = ", ".join(f"{at:g} times {number(value)}" for at, value in points)
    caption = say("<b>{}</b> by factor; the band is what random sets give, 1 is the model as it is.", title)
    line = Line("these neurons", points, ends, marked=True)
    bands = {"random sets": band} if band else {}
    return Figure(partial(line_figure, [line], plane, bands=bands), f"{title} by factor: {said}.", caption)


def _strongest(result: Mapping[str, Any]) -> Mapping[str, Any]:
    """The dose that moves refusals most, clear ones first; factor 1 is the model as it is."""
    moved = [dose for dose in result["doses"] if dose["factor"] != 1]
    return max(
        moved or result["doses"],
        key=lambda dose: (is_clear(dose["change_against_random"]), abs(dose["change"]["value"] or 0.0)),
    )


def scale_findings(run: ReportedRun) -> list[Finding]:
    """Whether refusals follow the factor, beyond random sets, and what the largest factor costs."""
    result = run.result
    best, last = _strongest(result), max(result["doses"], key=lambda dose: dose["factor"])
    against = best["change_against_random"]
    text = say(
        "Multiplied by {}, the {}{} change refusals of harmful requests by {}; against random sets {}{}.",
        f"{best['factor']:g}",
        plural(result["n_neurons"], "neuron"),
        by_method(run, "chosen"),
        interval(best["change"], signed=True),
        interval(against, signed=True),
        "" if is_clear(against) else f", not clear{why_not(against)}",
    )
    cost = say(
        "At factor {}, harmless requests refused {}, repetition {}, perplexity {}; as it is {}, {}, {}.",
        f"{last['factor']:g}",
        *(
            interval(arm.get(key))
            for arm in (last["treated"], result["untreated"])
            for key in ("harmless_refused", "repetition", "perplexity_interval")
        ),
    )
    notes = [Finding(CAUTION, say("{}.", visible(note, 200))) for note in result["notes"]]
    shared = [
        Finding(CAUTION, say("{} of the {} prompts are among those the set was found on.", count(n), kind))
        for kind, n in result["overlap_with_find_prompts"].items()
        if n
    ]
    return [Finding(YES if is_clear(against) else NO, text), Finding(FACT, cost), *shared, *notes]


def scale_tile(run: ReportedRun) -> Tile:
    """The strongest dose."""
    best = _strongest(run.result)
    verdict = YES if is_clear(best["change_against_random"]) else NO
    text = say(
        "change of refusals of harmful requests with {} multiplied by {}",
        plural(run.result["n_neurons"], "neuron"),
        f"{best['factor']:g}",
    )
    return Tile("Do refusals follow the dose?", verdict, interval(best["change"], signed=True), text)
