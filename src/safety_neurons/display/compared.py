"""What compare found: methods at one budget on one pair of models, and ranked over several organisms."""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from markupsafe import Markup

from safety_neurons.display.charts import (
    INK,
    SOFT,
    DotRow,
    agreement_figure,
    look,
)
from safety_neurons.display.losses import became, breaks, instead_table, remains
from safety_neurons.display.parts import (
    CAUTION,
    FACT,
    NO,
    OPEN,
    PARTLY,
    YES,
    Cell,
    DisplayPart,
    Figure,
    Finding,
    ReportedRun,
    Table,
    Tile,
    above_random,
    counted,
    dots_of,
    estimate_row,
    portion,
    random_row,
    titled,
    why_not,
)
from safety_neurons.display.text import (
    NONE,
    count,
    duration,
    interval,
    name,
    number,
    plural,
    say,
    share,
    visible,
)
from safety_neurons.results import captioned, is_clear

ALIGNED = "the aligned model"


def methods_of(result: Mapping[str, Any]) -> tuple[list[Mapping[str, Any]], list[Mapping[str, Any]]]:
    """Rows of real methods, largest effect first, and rows of random sets; the truth is neither."""
    real = [row for row in result["methods"] if not str(row["method"]).startswith("random")]
    chance = [row for row in result["methods"] if str(row["method"]).startswith("random")]

    def order(row: Mapping[str, Any]) -> tuple[float | int, ...]:
        value = row["causal_effect"]["value"]
        return (-(value if value is not None else -9.0), -(row["recall"] or 0.0))

    return sorted(real, key=order), chance


def truth_of(result: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The row of the planted truth, where there is one: runs of earlier versions have none."""
    return [result["truth"]] if result.get("truth") else []


def _label(row: Mapping[str, Any]) -> str:
    return visible(row["method"], 40)


def methods_table(run: ReportedRun) -> Table:
    """Every row of a comparison: methods, the truth, random sets."""
    result = run.result
    real, chance = methods_of(result)
    known = any(row["recall"] is not None for row in result["methods"])
    # Runs of earlier versions have no judge of harm.
    harm = all("harmful_complied" in row for row in result["methods"])
    rows = [
        [
            counted(_label(row), row["harmful_refused"], row["harmless_refused"], row.get("complied_off")),
            count(row["n_units"]),
            count(row["n_neurons"]),
            *([number(row["recall"])] if known else []),
            interval(row["causal_effect"]),
            interval(row["necessity"]),
            interval(row["harmful_refused"]),
            *([interval(row["harmful_complied"])] if harm else []),
            interval(row["harmless_refused"]),
            *([interval(row["complied_off"])] if harm else []),
            duration(row["seconds"]) if row["seconds"] else NONE,
        ]
        for row in [*real, *truth_of(result), *chance]
    ]
    columns = [
        "method",
        "units",
        "neurons",
        *(["recall"] if known else []),
        "causal effect",
        "refusals lost when off",
        "harmful refused",
        *(["harmful complied"] if harm else []),
        "harmless refused",
        *(["complied when off"] if harm else []),
        "time to find",
    ]
    return Table(
        captioned("Every method at the same number of units; 95\u00a0% intervals", result["methods"]),
        columns,
        rows,
    )


def agreement_table(run: ReportedRun) -> Table:
    """Jaccard index of every two sets, beside chance."""
    rows = [
        [
            f"{visible(pair['methods'][0], 40)}, {visible(pair['methods'][1], 40)}",
            number(pair["jaccard"], 3),
            number(pair["chance"], 3),
        ]
        for pair in sorted(run.result["agreement"], key=lambda pair: -pair["jaccard"])
    ]
    return Table(
        "Units shared by two sets ÷ units in either", ["two sets", "Jaccard index", "two random sets"], rows
    )


def compare_part(run: ReportedRun) -> DisplayPart:
    """Methods at one budget."""
    result = run.result
    real, chance = methods_of(result)
    heading = say("{} <span class=sub>{}</span>", run.pair, plural(result["budget"], "unit"))
    lead = say(
        (
            "{} of {} (sites: {}). Every method chooses as many; they are patched from the aligned "
            "into the base model."
        ),
        share(result["budget"] / result["n_units"]),
        plural(int(result["n_units"]), "unit"),
        ", ".join(visible(site, 8) for site in result["sites"]),
    )
    lead += say(
        " All neurons of the sites patched restore {}", portion(result["ceiling_effect"], "the difference")
    )
    if result.get("ceiling_by_parameters_effect"):
        lead += say("; all their parameters {}", portion(result["ceiling_by_parameters_effect"], "it"))
    lead += Markup(".")
    names = [visible(row["method"], 40) for row in real]
    rows, domain = _interval_rows(result, names, "causal_effect")
    ceiling = result["ceiling_effect"]
    caption = Markup(
        "<b>Causal effect</b> of each method’s set; bars are 95\u00a0% intervals, ticks single random sets"
    )
    line = ", the dashed line is all neurons of the sites patched, {}."
    caption += say(line, interval(ceiling)) if ceiling["value"] is not None else Markup(".")
    drawn = {"domain": domain, "reference": ceiling["value"]}
    figures = [dots_of(rows, "causal effect", caption, "Causal effect at equal budget", **drawn)]
    rows, domain = _interval_rows(result, names, "necessity")
    caption = Markup(
        "<b>Refusals lost when off</b>: share of harmful requests that the aligned model no longer "
        "refuses while the set is "
    )
    caption += Markup("deactivated; bars are 95\u00a0% intervals, ticks single random sets.")
    figures.append(
        dots_of(rows, "refusals lost when off", caption, "Refusals lost at equal budget", domain=domain)
    )
    if any(entry["recall"] is not None for entry in real):
        figures.append(_recall(real, chance, names))
    if result["agreement"]:
        figures.append(_agreement(result, names))
    told = [(_label(row), row.get("loss")) for row in [*real, *truth_of(result), *chance]]
    tables = [methods_table(run), *instead_table(told, "method", ALIGNED)]
    details = [agreement_table(run)] if result["agreement"] else []
    return DisplayPart(heading, lead, figures, tables, details)


def _interval_rows(
    result: Mapping[str, Any], names: Sequence[str], measure: str
) -> tuple[list[DotRow], tuple[float, float]]:
    """One row a method with its interval, one for the truth, one for the random sets, and the axis that holds
    them all.
    """
    real, chance = methods_of(result)
    dots = [entry[measure]["value"] for entry in chance if entry[measure]["value"] is not None]
    rows = [
        estimate_row(label, entry[measure], look(label, names))
        for label, entry in zip(names, real, strict=True)
    ]
    rows += [estimate_row(_label(entry), entry[measure], (INK, "square")) for entry in truth_of(result)]
    rows += random_row(dots)
    ends = [end for row in rows for end in (row.low, row.high) if end is not None]
    return rows, (max(min([0.0, *ends, *dots]), -1.0) - 0.04, min(max([1.0, *ends]), 2.0) + 0.04)


def _recall(
    real: Sequence[Mapping[str, Any]], chance: Sequence[Mapping[str, Any]], names: Sequence[str]
) -> Figure:
    rows = [
        DotRow(label, entry["recall"], None, None, number(entry["recall"]), *look(label, names))
        for label, entry in zip(names, real, strict=True)
    ]
    rows += random_row([entry["recall"] for entry in chance if entry["recall"] is not None])
    caption = Markup(
        "<b>Recall</b>: share of the planted units in the set. All of them are counted, so there is no "
        "sampling interval."
    )
    return dots_of(rows, "planted units found", caption, "Recall of planted units", domain=(-0.02, 1.02))


def _agreement(result: Mapping[str, Any], names: Sequence[str]) -> Figure:
    jaccard = {
        (visible(a, 40), visible(b, 40)): float(pair["jaccard"])
        for pair in result["agreement"]
        for a, b in [pair["methods"]]
    }
    order = [*names, *sorted({each for pair in jaccard for each in pair if each.startswith("random")})[:1]]
    chance = float(result["agreement"][0]["chance"])
    kept = sorted(
        ((pair, value) for pair, value in jaccard.items() if set(pair) <= set(names)),
        key=lambda item: -item[1],
    )
    words = "; ".join(f"{a} and {b} {value:.2f}" for (a, b), value in kept)
    caption = say(
        (
            "<b>Agreement</b>: units two sets share ÷ units in either (Jaccard index). Two random sets would "
            "have {}."
        ),
        number(chance, 3),
    )
    return Figure(
        partial(agreement_figure, order, jaccard),
        f"Agreement of every two methods: {words}. Chance {chance:.3f}.",
        caption,
    )


def compare_findings(run: ReportedRun) -> list[Finding]:
    """What the truth can do at all, which set is needed most, which restores most, and which do no more than
    chance.
    """
    result = run.result
    real, chance = methods_of(result)
    pair = say("On {}", name(run.model))
    sentences = []
    defined = [row for row in real if row["causal_effect"]["value"] is not None]
    budget = say(
        "{} of {} units ({})",
        count(result["budget"]),
        count(result["n_units"]),
        share(result["budget"] / result["n_units"]),
    )
    known = list(_truth(pair, result, chance))
    if not defined:
        why = real[0]["causal_effect"].get("why") if real else "no method was run"
        text = "{} the methods cannot be compared by causal effect: {}."
        needed = _most_necessary(pair, budget, result) if real else []
        return [Finding(OPEN, say(text, pair, visible(why, 300))), *known, *needed]
    best = defined[0]
    ceiling = result["ceiling_effect"]
    if ceiling["low"] is not None and ceiling["low"] <= 0:
        text = (
            "{}, patching all neurons of these sites restores {} of the difference: no method can show "
            "more here."
        )
        sentences.append(Finding(NO, say(text, pair, interval(ceiling))))
    if result.get("ceiling_why"):
        sentences.append(Finding(CAUTION, say("{}.", visible(result["ceiling_why"], 500))))
    sentences += [*known, *_most_necessary(pair, budget, result)]
    text = say(
        "{}, at {}, <b>{}</b> has {} causal effect: {}",
        pair,
        budget,
        visible(best["method"], 40),
        "the largest" if len(defined) > 1 else "a",
        interval(best["causal_effect"]),
    )
    if len(defined) > 1:
        second = defined[1]
        text += say("; then <b>{}</b>, {}", _label(second), interval(second["causal_effect"]))
        text += _order(second.get("behind"), "request by request")
    sentences.append(Finding(FACT, text + Markup(".")))
    weak = [visible(row["method"], 40) for row in defined if not above_random(row, "against_random")]
    if weak:
        reason = why_not(defined[0].get("against_random"))
        sentences.append(
            Finding(
                NO, say("{}, not clearly above chance at this budget{}: {}.", pair, reason, ", ".join(weak))
            )
        )
    if best["recall"] is not None:
        by_recall = sorted(real, key=lambda row: -row["recall"])
        parts = ", ".join(f"{visible(row['method'], 40)} {number(row['recall'])}" for row in by_recall)
        luck = ", ".join(number(row["recall"]) for row in chance)
        sentences.append(
            Finding(
                FACT,
                say(
                    "{}, share of the planted units found: {}{}.",
                    pair,
                    parts,
                    f"; random {luck}" if luck else "",
                ),
            )
        )
    return sentences


def _order(behind: Mapping[str, Any] | None, over: str) -> Markup:
    """Whether the first of two is clearly ahead of the second; runs of earlier versions do not say."""
    if behind is None:
        return Markup("")
    word = "clearly less" if is_clear(behind) else "their order is open"
    reason = f" ({behind['why']})" if behind.get("why") else ""
    return say(", {} {}{}", interval(behind, signed=True), f"behind {over}: {word}", reason)


def _truth(pair: Markup, result: Mapping[str, Any], chance: Sequence[Mapping[str, Any]]) -> Iterator[Finding]:
    """What the planted truth itself does, which no method can be asked to exceed."""
    for row in truth_of(result):
        seen = above_random(row, "against_random") or _needed(row)
        text = say(
            "{}, the planted truth itself ({}) restores {}, and with it off {} of the "
            "harmful requests are no longer refused{}: ",
            pair,
            plural(row["n_units"], "unit"),
            portion(row["causal_effect"], "the difference"),
            interval(row["necessity"]),
            _luck(chance),
        )
        reason = why_not(row["against_random"])
        text += (
            Markup("so much can be seen at this budget.")
            if seen
            else say("neither is shown to be an effect beyond chance{}; effects rank no method here.", reason)
        )
        yield Finding(FACT if seen else NO, text + became(row["loss"], ALIGNED))
        if row["n_units"] != result["budget"]:
            size = "The truth has {} units at the searched sites, the sets {}: {}."
            more = row["n_units"] > result["budget"]
            why = "none of them can hold it" if more else "the rest of it lies where no method searches"
            yield Finding(CAUTION, say(size, count(row["n_units"]), count(result["budget"]), why))


def _needed(row: Mapping[str, Any]) -> bool:
    """Whether the aligned model clearly loses refusals with the set off, and not to broken answers."""
    return above_random(row, "necessity_against_random") and remains(row.get("loss"))


def _answered(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """Refusals lost with the set off, broken answers counted as no change where that is known."""
    found: Mapping[str, Any] = row["loss"]["sound"] if row.get("loss") else row["necessity"]
    return found


def _luck(chance: Sequence[Mapping[str, Any]]) -> Markup:
    luck = [row["necessity"]["value"] for row in chance if row["necessity"]["value"] is not None]
    return say(" (random sets up to {})", number(max(luck))) if luck else Markup("")


def _most_necessary(pair: Markup, budget: Markup, result: Mapping[str, Any]) -> list[Finding]:
    """Which set costs the aligned model most refusals while it is off, and which sets only break it."""
    (real, chance), truth = methods_of(result), truth_of(result)
    broken = [row for row in real if breaks(row)]
    sound = [row for row in real if row not in broken and _answered(row)["value"] is not None]
    needed = [row for row in sound if _needed(row)]
    made = []
    if best := max(needed or sound, key=lambda row: _answered(row)["value"], default=None):
        others = [row for row in sound if row is not best]
        # All differences are from the set without which most is lost, which this one need not be.
        told = [row for row in others if row.get("necessity_behind") and not best.get("necessity_behind")]
        level = [_label(row) for row in told if not is_clear(row["necessity_behind"])]
        text = (
            "{}, at {}, the set of <b>{}</b> is {}: with it off, {} of the harmful requests are no longer "
            "refused{}{}{}."
            if needed
            else "{}, at {}, no set is shown to be necessary; without that of <b>{}</b>{}, {} of the harmful "
            "requests are no longer refused{}{}{}."
        )
        first = told and len(told) == len(others) and not level
        word = ("the most necessary" if first else "necessary") if needed else ", most of all here"
        aside = ", broken answers aside" if best.get("loss") else ""
        beside = f"; not clearly more than without that of {', '.join(level)}" if needed and level else ""
        shown = say(
            text, pair, budget, _label(best), word, interval(_answered(best)), aside, _luck(chance), beside
        )
        made.append(Finding(FACT if needed else NO, shown + became(best.get("loss"), ALIGNED)))
    elif not broken:
        made.append(Finding(OPEN, say("{}, no refusal could be scored while the sets were off.", pair)))
    if broken := [*broken, *(row for row in truth if breaks(row))]:
        text = "{}, with these sets off the aligned model is broken, and refusals lost there say nothing: {}."
        each = Markup("; ").join(
            say("<b>{}</b> ({})", _label(row), visible(breaks(row), 200)) for row in broken
        )
        made.append(Finding(CAUTION, say(text, pair, each)))
    lost = [row for row in sound if above_random(row, "necessity_against_random") and row not in needed]
    if lost:
        text = "{}, the loss of refusals without these sets is one that broken answers explain: {}."
        each = Markup("; ").join(
            say(
                "<b>{}</b> ({}, {} where these count as no change)",
                _label(row),
                interval(row["necessity"]),
                interval(row["loss"]["sound"]),
            )
            for row in lost
        )
        made.append(Finding(CAUTION, say(text, pair, each)))
    return made


def compare_tile(run: ReportedRun) -> Tile:
    """Which method finds the planted truth, or has the largest effect."""
    real, _ = methods_of(run.result)
    known = [row for row in real if row["recall"] is not None]
    if known:
        best = max(known, key=lambda row: row["recall"])
        verdict = YES if best["recall"] >= 0.95 else PARTLY if best["recall"] > 0 else NO
        text = say(
            "of {} planted units found by {}", count(run.result["budget"]), visible(best["method"], 40)
        )
        return Tile("Is the planted truth found?", verdict, number(best["recall"]), text)
    if not real:
        return Tile("Which method at equal budget?", OPEN, NONE, Markup("no method was run"))
    best = real[0]
    effect = best["causal_effect"]
    verdict = OPEN if effect["value"] is None else FACT
    text = say(
        "causal effect of {}{} at {} of the units",
        visible(best["method"], 40),
        say(", the largest of {},", plural(len(real), "method")) if len(real) > 1 else "",
        share(run.result["budget"] / run.result["n_units"]),
    )
    return Tile("Which method at equal budget?", verdict, interval(effect), text)


DRAWN = {
    "recall": "planted units found",
    "causal_effect": "causal effect",
    "necessity": "refusals lost when off",
}


CHANCE, TRUTH = "random", "truth"
"""What is no method, among the methods of a ranking."""


def ranking_part(run: ReportedRun) -> DisplayPart:
    """Every method over every organism: means, the worst, each single one."""
    figures, tables = [], []
    for group in dict.fromkeys(str(row["group"]) for row in run.result["ranking"]):
        rows = [row for row in run.result["ranking"] if row["group"] == group]
        figures += [
            _ranked_figure(group, measure, rows)
            for measure in DRAWN
            if any(row["measure"] == measure for row in rows)
        ]
        tables.append(_table(group, rows))
    lead = Markup(
        "Means over organisms; faint marks are single organisms and seeds, the number in brackets is the "
        "worst of them."
    )
    return DisplayPart(
        titled("Over several organisms", run),
        lead,
        [figure for figure in figures if figure is not None],
        tables,
    )


def _ranked_figure(group: str, measure: str, rows: Sequence[Mapping[str, Any]]) -> Figure | None:
    known = [
        row
        for row in rows
        if row["measure"] == measure and row["mean"] is not None and row["method"] != TRUTH
    ]
    if not known or (measure != "recall" and group == "planted"):
        return None
    names = [visible(row["method"], 40) for row in known]
    drawn = []
    for label, row in sorted(zip(names, known, strict=True), key=lambda pair: -pair[1]["mean"]):
        colour, shape = (SOFT, "circle") if label == CHANCE else look(label, names)
        dots = [value for value in row["by_organism"].values() if value is not None]
        drawn.append(DotRow(label, row["mean"], None, None, _mean(row), colour, shape, dots))
    ends = [end for row in drawn for end in row.dots]
    organisms = plural(len(known[0]["by_organism"]), "organism")
    caption = say("<b>{}</b>, {}: mean over {}.", DRAWN[measure].capitalize(), _group(group), organisms)
    domain = (max(min([0.0, *ends]), -1.0) - 0.04, min(max([1.0, *ends]), 2.0) + 0.04)
    return dots_of(drawn, DRAWN[measure], caption, f"{DRAWN[measure]}, {_group(group)}", domain=domain)


def _group(group: str) -> str:
    kind, _, share = group.partition(" ")
    try:
        return f"{visible(kind, 20)} organisms" + (
            f", {100 * float(share):g}\u202f% of the units" if share else ", as many as are true"
        )
    except ValueError:
        return visible(group, 40)


def _table(group: str, rows: Sequence[Mapping[str, Any]]) -> Table:
    measures = list(dict.fromkeys(str(row["measure"]) for row in rows))
    cells = {(row["method"], row["measure"]): row for row in rows}
    methods = sorted(dict.fromkeys(row["method"] for row in rows), key=(TRUTH, CHANCE).__contains__)
    shown: list[Sequence[Cell]] = [
        [visible(method, 40), *(_mean(cells.get((method, measure))) for measure in measures)]
        for method in methods
    ]
    quiet = frozenset(place for place, method in enumerate(methods) if method == CHANCE)
    columns = ["method", *(visible(measure.replace("_", " "), 40) for measure in measures)]
    return Table(f"{_group(group)}: mean over organisms (worst)".capitalize(), columns, shown, quiet)


def _mean(row: Mapping[str, Any] | None) -> str:
    if row is None or row["mean"] is None:
        return NONE
    return (
        duration(row["mean"])
        if row["measure"] == "seconds"
        else f"{number(row['mean'])} ({number(row['worst'])})"
    )


def ranking_findings(run: ReportedRun) -> list[Finding]:
    """Which methods have the best mean of each measure, and whether they are ahead of the next."""
    made = []
    for leader in run.result["leaders"]:
        first, second = (
            Markup(", ").join(Markup("<b>{}</b>").format(visible(method, 40)) for method in names)
            for names in (leader["methods"], leader.get("next") or ())
        )
        measure = visible(str(leader["measure"]).replace("_", " "), 40)
        text = say(
            "On {}, {} has the best mean of {}, {}",
            _group(str(leader["group"])),
            first,
            measure,
            number(leader["mean"]),
        )
        if second:
            text += say("; then {}", second) + _order(leader["ahead"], "over the organisms")
        made.append(Finding(FACT, text + Markup(".")))
    return made


def ranking_tile(run: ReportedRun) -> Tile:
    """The leader in the causal effect, or in recall where nothing else was measured."""
    found = {str(leader["measure"]): leader for leader in reversed(run.result["leaders"])}
    leader = found.get("causal_effect") or found.get("recall")
    if leader is None:
        return Tile("Which method should I use?", FACT, NONE, Markup("no measure is defined"))
    names = ", ".join(visible(each, 40) for each in leader["methods"])
    text = say("{} of {}, mean over {}", DRAWN[leader["measure"]], names, _group(str(leader["group"])))
    return Tile("Which method should I use?", FACT, number(leader["mean"]), text)
