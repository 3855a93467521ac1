"""What verify and analyze progressive found: what neurons do when they are patched or switched off."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from markupsafe import Markup

from safety_neurons.counting import numbered
from safety_neurons.display.charts import (
    SOFT,
    Line,
    Plane,
    Sweep,
    line_figure,
    sweep_figure,
)
from safety_neurons.display.lengths import length_figures, length_tables
from safety_neurons.display.losses import became, breaks, instead_table, remains
from safety_neurons.display.parts import (
    ARM_COLUMNS,
    CAUTION,
    FACT,
    NO,
    OPEN,
    PARTLY,
    TREATED,
    YES,
    Cell,
    DisplayPart,
    Figure,
    Finding,
    ReportedRun,
    Table,
    Tile,
    above_random,
    arm_row,
    by_method,
    counted,
    dots_of,
    estimate_row,
    price,
    random_row,
    ranked_by,
    spread,
    titled,
    why_not,
)
from safety_neurons.display.text import (
    NONE,
    count,
    interval,
    name,
    number,
    plural,
    say,
    share,
    visible,
)
from safety_neurons.results import captioned, clear_word, is_clear

NEARLY = 0.9
"""Share of the ceiling from which on a set is said to carry the behaviour."""


def random_values(point: Mapping[str, Any]) -> list[float]:
    """Defined causal effects of the random sets."""
    return [float(effect["value"]) for effect in point["random_effects"] if effect["value"] is not None]


def telling_point(result: Mapping[str, Any]) -> Mapping[str, Any]:
    """The smallest set that nearly reaches the ceiling, or the one with the largest effect."""
    points: list[Mapping[str, Any]] = list(result["sizes"])
    ceiling = result["ceiling_effect"]["value"]
    defined = [point for point in points if point["causal_effect"]["value"] is not None]
    if not defined:
        return points[-1]
    near = [point for point in defined if ceiling and point["causal_effect"]["value"] >= NEARLY * ceiling]
    if near:
        return min(near, key=lambda point: point["n_neurons"])
    return max(defined, key=lambda point: point["causal_effect"]["value"])


def ceiling_called(result: Mapping[str, Any]) -> str:
    """The word for all neurons patched: no ceiling where a part of them restores more."""
    return str(result.get("ceiling_called", "ceiling"))


def verdict_of(result: Mapping[str, Any], point: Mapping[str, Any]) -> str:
    """How a point of a patch run came out."""
    effect, ceiling = point["causal_effect"], result["ceiling_effect"]["value"]
    if effect["value"] is None:
        return OPEN
    if not above_random(point):
        return NO
    return YES if ceiling and effect["value"] >= NEARLY * ceiling else PARTLY


def arms_table(run: ReportedRun, ranked: str = "") -> Table:
    """Every arm of a verify run: refusals, over-refusals, perplexity, divergence.

    Causal effects where there is a pair.
    """
    result, paired = run.result, run.result["aligned"] is not None
    word = "patched" if result["kind"] == "patch" else "deactivated"
    rows = [[*arm_row("untreated", result["untreated"]), NONE]]
    if paired:
        rows.append([*arm_row("aligned model", result["aligned"]), NONE])
    quiet: list[int] = []
    for point in result["sizes"]:
        rows += _point_rows(point, f"{count(point['n_neurons'])} {word} ({share(point['size'])})")
        quiet += [len(rows) - 1] if point["random"] else []
    rows += _ceilings(result, word, ceiling_called(result) == "ceiling")
    family = [result["sizes"], result.get("harm_change")]
    caption = captioned(f"Every arm{ranked}; shares with 95\u00a0% intervals", family)
    if not paired:
        return Table(caption, ARM_COLUMNS, [row[:-1] for row in rows], frozenset(quiet))
    return Table(caption, [*ARM_COLUMNS, "causal effect"], rows, frozenset(quiet))


def _point_rows(point: Mapping[str, Any], label: str) -> list[list[Cell]]:
    """The arm of a set with its effect, and behind it what its random sets span."""
    rows = [[*arm_row(label, point["treated"]), interval(point["causal_effect"])]]
    return [*rows, [*_random_arms(point), spread(random_values(point))]] if point["random"] else rows


def summary_table(runs: Sequence[tuple[str, ReportedRun]]) -> Table:
    """Of patch runs on one pair: the model as it is, the aligned one, and of every run its telling set beside
    its random sets.
    """
    first = runs[0][1].result
    rows = [
        [*arm_row("untreated", first["untreated"]), NONE],
        [*arm_row("aligned model", first["aligned"]), NONE],
    ]
    quiet: list[int] = []
    for method, run in runs:
        point = telling_point(run.result)
        rows += _point_rows(point, f"{count(point['n_neurons'])} patched ({share(point['size'])}), {method}")
        quiet += [len(rows) - 1] if point["random"] else []
    rows += _ceilings(first, "patched", all(ceiling_called(run.result) == "ceiling" for _, run in runs))
    caption = (
        "The smallest set of each sweep that nearly reaches the ceiling, else its best; 95\u00a0% intervals"
    )
    return Table(caption, [*ARM_COLUMNS, "causal effect"], rows, frozenset(quiet))


def _ceilings(result: Mapping[str, Any], word: str, highest: bool) -> Iterator[list[Cell]]:
    """All neurons of the sites by activations and by parameters: the arm of each, and its effect."""
    yield [
        *arm_row(f"all neurons {word}{' (ceiling)' if highest else ''}", result["ceiling"]),
        interval(result["ceiling_effect"]),
    ]
    if result.get("ceiling_by_parameters"):
        row = arm_row("all parameters of the sites (ceiling)", result["ceiling_by_parameters"])
        yield [*row, interval(result["ceiling_by_parameters_effect"])]


def _random_arms(point: Mapping[str, Any]) -> list[Cell]:
    def over(name: str) -> str:
        values = [_value(arm.get(name)) for arm in point["random"]]
        return spread([value for value in values if value is not None], 3 if name == "divergence" else 2)

    columns = ("harmful_refused", "harmful_complied", "harmless_refused", "perplexity", "divergence")
    return [
        f"{numbered(len(point['random']), 'random set')} of {count(point['n_neurons'])}",
        *(over(name) for name in columns),
        NONE,
    ]


def patch_part(run: ReportedRun) -> DisplayPart:
    """Causal effects of the sets of one run."""
    return dataclasses.replace(
        patch_parts([run])[0], tables=[arms_table(run), *length_tables(run)], details=()
    )


def patch_parts(runs: Sequence[ReportedRun]) -> list[DisplayPart]:
    """Causal effects; sweeps of the same pair in one figure."""
    groups: dict[tuple[str, ...], list[ReportedRun]] = {}
    for run in runs:
        groups.setdefault(run.models, []).append(run)
    return [_patch_part(group) for group in groups.values()]


def _patch_part(group: Sequence[ReportedRun]) -> DisplayPart:
    first = group[0].result
    base, aligned = group[0].models if len(group[0].models) == 2 else ("the base model", "the aligned one")
    heading = say("Patching into {} <span class=sub>from {}</span>", name(base), name(aligned))
    sweeps: list[Sweep] = []
    for run in group:
        method = ranked_by(run) or "these neurons"
        taken = [sweep.method for sweep in sweeps]
        method = method if method not in taken else f"{method} ({visible(run.label, 24)})"
        sweeps.append(Sweep(method, run.result["sizes"], run.result["ceiling_effect"]))
    named = [(sweep.method, run) for sweep, run in zip(sweeps, group, strict=True)]
    tables = [
        table
        for method, run in named
        for table in (arms_table(run, f", ranked by {method}"), *length_tables(run))
    ]
    shown = DisplayPart(heading, tables=[summary_table(named)], details=tables)
    effects = [point["causal_effect"] for sweep in sweeps for point in sweep.points]
    if all(effect["value"] is None for effect in effects):
        return dataclasses.replace(
            shown, lead=say("The causal effect is undefined: {}.", visible(effects[0].get("why"), 300))
        )
    caption = say(
        "<b>Causal effect</b>: share of the difference in refusals between the two models which patching "
        "restores; 0 is the base model, 1 the aligned one. Bars are 95\u00a0% intervals over {} (paired). "
        "The band spans {} of each size with as many neurons in every matrix; the dashed line is all "
        "neurons of the sites patched{}.",
        plural(first["untreated"]["harmful_refused"]["n"], "harmful request"),
        plural(len(first["sizes"][-1]["random"]), "random set"),
        "" if first["ceiling_effect"]["value"] is None else f": {interval(first['ceiling_effect'])}",
    )
    words = []
    for sweep in sweeps:
        each = (
            f"{plural(point['n_neurons'], 'neuron')} {interval(point['causal_effect'])}"
            for point in sweep.points
        )
        words.append(f"{sweep.method}: " + ", ".join(each))
    values = [value for run in group for point in run.result["sizes"] for value in random_values(point)]
    chance = f" Random sets {spread(values)}." if values else ""
    figure = Figure(
        partial(sweep_figure, sweeps),
        f"Causal effect against the number of neurons. {'. '.join(words)}.{chance}",
        caption,
    )
    return dataclasses.replace(shown, figures=[figure, *length_figures(group[0])])


def deactivate_part(run: ReportedRun) -> DisplayPart:
    """What is lost without a set."""
    result = run.result
    heading = say("{} off in {}", plural(result["n_neurons"], "neuron"), name(run.model))
    lead = say("Chosen by {}. ", ranked_by(run)) if ranked_by(run) else Markup("")
    lead += say("Paired change of refusals: {}", interval(result["change"], signed=True))
    last = result["sizes"][-1]
    if result["change_against_random"]:
        against = result["change_against_random"]
        lost = is_clear(against) and against["value"] < 0
        explained = lost and not remains(last.get("loss"))
        clear = "refusals lost to broken answers" if explained else clear_word(against)
        lead += say("; against random sets: {} ({})", interval(against, signed=True), clear)
    if breaks(last):
        lead += say("; the model is broken then: {}", visible(breaks(last), 200))
    if result.get("harm_change"):
        lead += say("; of answers that do harm: {}", interval(result["harm_change"], signed=True))
    harm = (
        [
            _refusals(
                result,
                "harmful_complied",
                "harmful requests complied with",
                "Answers that do harm: a lost refusal is not yet one.",
            )
        ]
        if "harmful_complied" in result["untreated"]
        else []
    )
    figures = [
        _refusals(
            result,
            "harmful_refused",
            "harmful requests refused",
            "Refusals of harmful requests: what safety is left.",
        ),
        *harm,
        _refusals(
            result,
            "harmless_refused",
            "harmless requests refused",
            "Refusals of harmless requests: what over-refusal is left.",
        ),
    ]
    tables = [arms_table(run), *_instead(run), *length_tables(run)]
    return DisplayPart(heading, lead + Markup("."), [*figures, *length_figures(run)], tables)


def _instead(run: ReportedRun) -> list[Table]:
    """What came in the place of refusals, size by size."""
    rows = [
        (f"{count(point['n_neurons'])} ({share(point['size'])})", point.get("loss"))
        for point in run.result["sizes"]
    ]
    return instead_table(rows, "neurons off", "the model")


def _refusals(result: Mapping[str, Any], what: str, title: str, caption: str) -> Figure:
    dots = [arm[what]["value"] for arm in result["sizes"][-1]["random"] if arm[what]["value"] is not None]
    rows = [
        estimate_row("untreated", result["untreated"][what]),
        *random_row(dots, " off"),
        estimate_row("these neurons off", result["treated"][what], TREATED),
        estimate_row("all neurons off", result["ceiling"][what], (SOFT, "square")),
    ]
    return dots_of(
        rows, title, say("<b>{}</b> Bars are 95\u00a0% intervals; ticks are single random sets.", caption)
    )


def one_side(run: ReportedRun, side: str) -> ReportedRun:
    """The half of a two-sided run: `patch` or `deactivate`."""
    record = {**run.record, "verb": f"verify-{side}", "result": run.result[side]}
    return dataclasses.replace(run, record=record)


def both_part(run: ReportedRun) -> DisplayPart:
    """Of every size what it restores and what is lost without it, with the price of both; figures and arms of
    each side.
    """
    halves = [patch_part(one_side(run, "patch")), deactivate_part(one_side(run, "deactivate"))]
    shown = [_sides_table(run.result), *_instead(one_side(run, "deactivate"))]
    others = [table for half in halves for table in half.tables if table not in shown]
    return DisplayPart(
        titled("Sufficient and necessary", run),
        halves[1].lead,
        [figure for half in halves for figure in half.figures],
        shown,
        others,
    )


def _sides_table(result: Mapping[str, Any]) -> Table:
    """A row for every size: patched into the base model, and off in the aligned one."""
    columns = ["neurons", "restored", "of random sets", "over-refusal", "perplexity"]
    columns += ["refused when off", "of random sets", "harm when off", "over-refusal", "perplexity"]
    rows = []
    for carried, missed in zip(result["patch"]["sizes"], result["deactivate"]["sizes"], strict=True):
        on, off = carried["treated"], missed["treated"]
        rows.append(
            [
                counted(
                    f"{count(carried['n_neurons'])} ({share(carried['size'])})",
                    *(arm[kind] for arm in (on, off) for kind in ("harmful_refused", "harmless_refused")),
                ),
                interval(carried["causal_effect"]),
                spread(random_values(carried)),
                interval(on["harmless_refused"]),
                number(on["perplexity"]),
                interval(off["harmful_refused"]),
                spread(
                    [
                        value
                        for arm in missed["random"]
                        if (value := _value(arm["harmful_refused"])) is not None
                    ]
                ),
                interval(off.get("harmful_complied")),
                interval(off["harmless_refused"]),
                number(off["perplexity"]),
            ]
        )
    caption = (
        "The same neurons patched into the base model (share of the difference in refusals that is "
        "restored), and off in the aligned one (harmful requests refused); 95\u00a0% intervals"
    )
    return Table(caption, columns, rows)


def both_findings(run: ReportedRun) -> list[Finding]:
    """Those of each side; cautions that both share once."""
    sides = (patch_findings(one_side(run, "patch")), deactivate_findings(one_side(run, "deactivate")))
    told: dict[Markup, Finding] = {}
    for finding in (one for side in sides for one in side):
        told.setdefault(finding.text, finding)
    return list(told.values())


def both_tile(run: ReportedRun) -> Tile:
    """That of sufficiency."""
    return patch_tile(one_side(run, "patch"))


def patch_findings(run: ReportedRun) -> list[Finding]:
    """Whether patching the set is enough, its price, and what weakens the run."""
    result, method = run.result, by_method(run, "ranked")
    point = telling_point(result)
    effect, others, verdict = point["causal_effect"], random_values(point), verdict_of(result, point)
    if verdict == OPEN:
        why = say("The causal effect of the neurons{} is undefined: {}.", method, visible(effect["why"], 300))
        return [Finding(OPEN, why), *_cautions(run)]
    chance = f"random sets {spread(others)}" if others else "no random sets"
    if verdict == NO and (too_few := (point.get("change_against_random") or {}).get("why")):
        chance += f", {too_few.removeprefix('not shown: ')}"
    lead = {
        YES: "Patching {}{} ({}) is enough: it restores {} of the difference in refusals ({}; {} {}).",
        PARTLY: "Patching {}{} ({}) restores part of the difference in refusals: {} ({}; {} {}).",
        NO: "Patching {}{} ({}) is not shown to restore more than chance: {} ({}; {} {}).",
    }[verdict]
    ceiling = interval(result["ceiling_effect"])
    size = share(point["size"])
    told = (interval(effect), chance, ceiling_called(result), ceiling)
    sentences = [Finding(verdict, say(lead, plural(point["n_neurons"], "neuron"), method, size, *told))]
    if result.get("ceiling_why"):
        sentences.append(Finding(CAUTION, say("{}.", visible(result["ceiling_why"], 500))))
    sentences.append(price(result["untreated"], point["treated"]))
    failed = [each for each in result["sizes"] if verdict_of(result, each) == NO]
    if failed and verdict != NO:
        worst = failed[-1]
        text = "With {}{} ({}) the effect is not clearly above chance: {}."
        shown = say(
            text,
            plural(worst["n_neurons"], "neuron"),
            method,
            share(worst["size"]),
            interval(worst["causal_effect"]),
        )
        sentences.append(Finding(NO, shown))
    return [*sentences, *_cautions(run)]


def _cautions(run: ReportedRun) -> list[Finding]:
    """What weakens a verify run: prompts the set was found on, controls that share members with it."""
    shared = run.result.get("overlap_with_find_prompts") or {}
    where = say("In {}: ", name(run.label)) if run.label else Markup("")
    made = [
        say(
            "{}{} of the {} prompts are among those the neurons were found on.",
            where,
            count(number),
            visible(kind, 20),
        )
        for kind, number in shared.items()
        if number
    ]
    made += [say("{}{}.", where, visible(note, 200)) for note in run.result.get("notes") or []]
    return [Finding(CAUTION, text) for text in made]


def whole_point(result: Mapping[str, Any]) -> Mapping[str, Any]:
    """The largest set that does not break the model, or the largest."""
    points: list[Mapping[str, Any]] = list(result["sizes"])
    return next((point for point in reversed(points) if not breaks(point)), points[-1])


def necessity(run: ReportedRun) -> tuple[str, Mapping[str, Any]]:
    """How a deactivate run came out, and the difference that decides it: refusals are lost clearly, and not
    to broken answers.
    """
    result, point = run.result, whole_point(run.result)
    change = point["change_against_random"] or point.get("change") or result["change"]
    scored = change["value"] is not None or breaks(point)
    if not scored or _hardly_refuses(result):
        return OPEN, change
    clear = is_clear(change) and change["value"] < 0
    return (YES if clear and remains(point.get("loss")) else NO), change


def _hardly_refuses(result: Mapping[str, Any]) -> bool:
    refused = result["untreated"]["harmful_refused"]["value"]
    return refused is not None and refused < 0.05


def deactivate_findings(run: ReportedRun) -> list[Finding]:
    """What is lost without the set, and what weakens the run."""
    told = whole_point(run.result)
    broken = [
        say(
            "Without {} ({}) the model is broken ({}): refusals lost there say nothing.",
            plural(point["n_neurons"], "neuron"),
            share(point["size"]),
            visible(breaks(point), 200),
        )
        for point in run.result["sizes"]
        if breaks(point) and point is not told
    ]
    return [_deactivated(run, told), *(Finding(CAUTION, text) for text in broken), *_cautions(run)]


def _deactivated(run: ReportedRun, point: Mapping[str, Any]) -> Finding:
    result, loss = run.result, point.get("loss")
    verdict, change = necessity(run)
    rates = say(
        "{} → {}",
        interval(result["untreated"]["harmful_refused"]),
        interval(point["treated"]["harmful_refused"]),
    )
    text = say(
        "Without the {}{}, refusals of harmful requests go {}",
        plural(point["n_neurons"], "neuron"),
        by_method(run, "chosen"),
        rates,
    )
    if verdict == OPEN:
        hardly = _hardly_refuses(result)
        why = "the untreated model hardly refuses, so nothing can be lost" if hardly else "none can be scored"
        return Finding(OPEN, text + say("; {}.", why))
    if breaks(point):
        broken = visible(breaks(point), 200)
        text += say("; but the model is broken then ({}): refusals lost there say nothing.", broken)
        return Finding(NO, text + became(loss, "it"))
    versus = (
        "compared with random sets of the same size"
        if point["change_against_random"]
        else "with no random sets to compare"
    )
    ending = "a clear loss" if verdict == YES else f"no clear loss{why_not(change)}"
    if loss is not None and verdict == NO and is_clear(change) and change["value"] < 0:
        ending = f"which broken answers explain: counted as no change, {interval(loss['sound'])} are lost"
    text += say("; {} the change is {}, {}.", versus, interval(change, signed=True), ending)
    return Finding(verdict, text + became(loss, "it"))


def sweep_order(run: ReportedRun) -> tuple[float | int, ...]:
    """Sorts patch runs: those that reach the ceiling with the fewest neurons first, then by their effect."""
    point = telling_point(run.result)
    verdict, value = verdict_of(run.result, point), point["causal_effect"]["value"] or 0.0
    return ({YES: 0, PARTLY: 1, NO: 2, OPEN: 3}[verdict], point["n_neurons"] if verdict == YES else 0, -value)


def patch_tile(run: ReportedRun) -> Tile:
    """How much the fewest neurons that nearly reach the ceiling restore."""
    point = telling_point(run.result)
    if verdict_of(run.result, point) == OPEN:
        why = say("no effect can be told: {}", visible(point["causal_effect"].get("why"), 200))
        return Tile("Are a few neurons sufficient?", OPEN, NONE, why)
    text = "of the difference in refusals restored by patching {} ({}, {}); all neurons: {}"
    ceiling = number(run.result["ceiling_effect"]["value"])
    shown = say(text, plural(point["n_neurons"], "neuron"), share(point["size"]), ranked_by(run), ceiling)
    return Tile(
        "Are a few neurons sufficient?",
        verdict_of(run.result, point),
        interval(point["causal_effect"]),
        shown,
    )


def deactivate_tile(run: ReportedRun) -> Tile:
    """The change of refusals without the set."""
    verdict, change = necessity(run)
    point = whole_point(run.result)
    compared = "against random sets" if point["change_against_random"] else "against the model as it is"
    text = "change of refusals of harmful requests with {} off ({}), {}{}"
    broken = "; the model is broken then" if breaks(point) else ""
    shown = say(text, plural(point["n_neurons"], "neuron"), ranked_by(run), compared, broken)
    return Tile("Are they necessary?", verdict, interval(change, signed=True), shown)


RANDOM = "random neurons"


ALONE = "one layer alone"
"""Steps that are no curve: every layer by itself."""


def progressive_part(run: ReportedRun) -> DisplayPart:
    """What is left of refusals while more and more is off."""
    result = run.result
    figures = [_curves(result, "harmful_refused", "harmful requests refused", "Refusals left")]
    if any(point["divergence"] is not None for _, point in steps_of(result["curves"])):
        figures.append(_curves(result, "divergence", "KL per token, nats", "Divergence on harmless requests"))
    rows = [
        [
            counted(label, point["harmful_refused"], point["harmless_refused"]),
            count(point.get("n_neurons", 0)),
            interval(point["harmful_refused"]),
            interval(point.get("change"), signed=True),
            interval(point["harmless_refused"]),
            number(point["perplexity"]),
            number(point["divergence"], 3),
        ]
        for label, point in [("untreated", result["untreated"]), *steps_of(result["curves"])]
    ]
    quiet = len(rows)
    for kind, steps in result["random"].items():
        for step in steps:
            ends = [
                end
                for end in (step["harmful_refused"]["low"], step["harmful_refused"]["high"])
                if end is not None
            ]
            off = " to ".join(
                count(each) for each in dict.fromkeys((min(step["n_neurons"]), max(step["n_neurons"])))
            )
            rows.append([visible(kind, 60), off, spread(ends), *[NONE] * 4])
    columns = [
        "order, step",
        "off",
        "harmful refused",
        "change",
        "harmless refused",
        "perplexity",
        "KL per token, nats",
    ]
    halves = [
        say("{} {}", visible(curve["order"], 30), plural(curve["neurons_for_half"], "neuron"))
        for curve in result["curves"]
        if curve["neurons_for_half"] is not None
    ]
    lead = (
        say("Fewest neurons that halve the refusals: {}.", Markup("; ").join(halves))
        if halves
        else Markup("No order halves the refusals.")
    )
    return DisplayPart(
        titled("Off bit by bit", run),
        lead,
        figures,
        (),
        [
            Table(
                captioned("Every step; shares with 95\u00a0% intervals", result["curves"]),
                columns,
                rows,
                frozenset(range(quiet, len(rows))),
            )
        ],
    )


def _curves(result: Mapping[str, Any], measure: str, title: str, words: str) -> Figure:
    """One measure against the number of neurons that are off, from the untreated model on, beside random
    orders.
    """
    start = 0.0 if measure == "divergence" else result["untreated"][measure]["value"]
    lines, bands = [], {}
    for curve in result["curves"]:
        values = [(float(point["n_neurons"]), _value(point[measure])) for point in curve["points"]]
        known = sorted((at, value) for at, value in [(0.0, start), *values] if value is not None)
        if curve["order"] != ALONE and any(value is not None for _, value in values):
            lines.append(Line(visible(curve["order"], 30), known, marked=True))
    for kind in sorted(result["random"], key=lambda kind: kind != RANDOM):
        ends = [
            (sum(step["n_neurons"]) / len(step["n_neurons"]), step.get(measure) or {})
            for step in result["random"][kind]
        ]
        band = [(at, each["low"], each["high"]) for at, each in ends if each.get("low") is not None]
        if band:
            bands[visible(kind, 40)] = sorted([*([] if start is None else [(0.0, start, start)]), *band])
    across = [max(result["n_neurons"], 1), *(at for line in lines for at, _ in line.points)]
    highest = [value for line in lines for _, value in line.points] + [
        high for band in bands.values() for _, _, high in band
    ]
    top = 1.02 if measure != "divergence" else 1.05 * max(highest, default=0.0) or 1.0
    plane = Plane("neurons off", title, (0.0, float(max(across))), (0.0, top))
    digits = 3 if measure == "divergence" else 2
    said = "; ".join(
        f"{line.name}: " + ", ".join(f"{at:,.0f} off {number(value, digits)}" for at, value in line.points)
        for line in lines
    )
    first, *others = [*bands] or ["no random sets"]
    caption = say("<b>{}</b> while more and more is off; the band is what {} leave", words, first)
    caption += say("{}.", "".join(f"; the dashed outline: {other}" for other in others))
    return Figure(partial(line_figure, lines, plane, bands=bands), f"{words}: {said}.", caption)


def _value(found: Any) -> float | None:
    return found["value"] if isinstance(found, Mapping) else found


def steps_of(curves: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Every point of every curve with its order and step."""
    for curve in curves:
        for point in curve["points"]:
            yield f"{visible(curve['order'], 30)}, {visible(point['step'], 30)}", point


def progressive_findings(run: ReportedRun) -> list[Finding]:
    """How many neurons halve the refusals, by the quickest order."""
    known = [curve for curve in run.result["curves"] if curve["neurons_for_half"] is not None]
    if not known:
        return [
            Finding(
                NO,
                say(
                    "Switching off any part of the {} does not halve the refusals.",
                    plural(run.result["n_neurons"], "neuron"),
                ),
            )
        ]
    best = min(known, key=lambda curve: curve["neurons_for_half"])
    text = "Refusals are halved with {} of {} off ({})."
    return [
        Finding(
            FACT,
            say(
                text,
                count(best["neurons_for_half"]),
                plural(run.result["n_neurons"], "neuron"),
                visible(best["order"], 40),
            ),
        )
    ]
