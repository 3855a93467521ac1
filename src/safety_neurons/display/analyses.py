"""What analyses found: where sets lie, how far they agree, languages and transfer, the tax, single neurons.

Beside chance.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from markupsafe import Markup

from safety_neurons.display.charts import COLOURS, DotRow, agreement_figure, matrix_figure
from safety_neurons.display.parts import (
    CAUTION,
    FACT,
    NO,
    YES,
    DisplayPart,
    Figure,
    Finding,
    ReportedRun,
    Table,
    counted,
    dots_of,
    estimate_row,
    guarded,
    portion,
    random_row,
    titled,
)
from safety_neurons.display.text import NONE, count, interval, number, plural, say, share, visible
from safety_neurons.results import captioned, clear_word, stands_out
from safety_neurons.strict_json import JsonObject

MOST = 48
"""Rows of a chart."""
FEWEST_AMONG = 19
"""Random neurons among which one that none of them equals is one in twenty."""


def layers_part(run: ReportedRun) -> DisplayPart:
    """Where the neurons of sets lie, beside random sets of the same size."""
    figures, details, claims = [], [], []
    for found in run.result["sets"]:
        figures += [
            _places(found, f"by_{word}", word) for word in ("layer", "site") if len(found[f"by_{word}"]) > 1
        ]
        claims += [[visible(found["name"], 40), *_claim(claim)] for claim in found["claims"]]
        details.append(_places_table(found))
    columns = ["set", "claim", "paper", "holds", "measured", "random sets"]
    tables = [Table("What the papers say of place, asked of every set", columns, claims)]
    lead = Markup("A dot is what a set has, the grey bar what 95\u00a0% of random sets of its size have.")
    return DisplayPart(titled("Where sets lie", run), lead, figures, tables, details)


def _places(found: Mapping[str, Any], group: str, word: str) -> Figure:
    whole = max(found["n_neurons"], 1)
    rows = []
    for place in found[group][:MOST]:
        low, high = (place[end] / whole for end in ("low", "high"))
        text = f"{share(place['members'] / whole)}, {place['verdict']}"
        row = DotRow(str(place["name"]), place["members"] / whole, None, None, text, COLOURS[0])
        rows.append(
            replace(row, chance=[{"low": low, "high": high}], beside=f"random {share(low)} to {share(high)}")
        )
    caption = say(
        "<b>{}</b>: share of the set by {}; {}.{}",
        visible(found["name"], 40),
        word,
        plural(found["n_neurons"], "neuron"),
        _drawn("first", len(found[group])),
    )
    title = f"share of the set, {word}"
    return dots_of(rows, title, caption, f"{found['name']}, {title}", domain=_from_zero(rows, most=1.02))


def _drawn(which: str, whole: int) -> str:
    """Which rows of many a chart has; nothing where it has all."""
    return f" Drawn are the {which} {MOST} of {whole:,}." if whole > MOST else ""


def _from_zero(rows: Sequence[DotRow], most: float = math.inf) -> tuple[float, float]:
    """An axis that holds zero, the numbers and what chance gives."""
    ends = [
        end
        for row in rows
        for end in (
            row.value,
            row.low,
            row.high,
            *(each.get(to) for each in row.chance for to in ("low", "high")),
        )
    ]
    known = [0.0, *(end for end in ends if end is not None)]
    top, bottom = max(known) or 1.0, min(known)
    return bottom - 0.04 * (top - bottom), min(most, top + 0.06 * (top - bottom))


def _claim(claim: Mapping[str, Any]) -> list[Any]:
    holds = {True: "yes", False: "no", None: visible(claim["note"] or "cannot be told", 120)}[claim["holds"]]
    chance = claim["chance"]
    beside = (
        NONE
        if chance is None
        else f"{number(chance['low'])} to {number(chance['high'])}, {chance['verdict']}"
    )
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


def layers_findings(run: ReportedRun) -> list[Finding]:
    """Which claims on place hold, set by set."""
    made = []
    for found in run.result["sets"]:
        said = {
            word: [visible(claim["claim"], 60) for claim in found["claims"] if claim["holds"] is holds]
            for word, holds in _HOLDS
        }
        parts = "; ".join(f"{word}: {', '.join(claims)}" for word, claims in said.items() if claims)
        densest = max(found["by_layer"], key=lambda place: place["members"], default=None)
        where = (
            say(", most of all in {} ({})", densest["name"], share(densest["share_of_set"]))
            if densest
            else Markup("")
        )
        text = say(
            "<b>{}</b> lies in {}{}. {}.",
            visible(found["name"], 40),
            _layers(found),
            where,
            parts[:1].upper() + parts[1:],
        )
        made.append(Finding(FACT, text))
    return made


_HOLDS = (("holds", True), ("does not hold", False))


def _layers(found: Mapping[str, Any]) -> str:
    return plural(sum(place["members"] > 0 for place in found["by_layer"]), "layer")


def overlap_part(run: ReportedRun) -> DisplayPart:
    """How far sets agree, beside unrelated sets."""
    result = run.result
    names = [visible(found["name"], 30) for found in result["sets"]]
    jaccard = {
        (visible(a, 30), visible(b, 30)): pair["jaccard"]["value"]
        for pair in result["pairs"]
        for a, b in [pair["names"]]
    }
    words = "; ".join(f"{a} and {b} {value:.3f}" for (a, b), value in jaccard.items())
    caption = Markup("<b>Jaccard index</b>: neurons two sets share ÷ neurons in either.")
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
    columns = [
        "sets",
        "Jaccard index",
        "unrelated sets",
        "as many per matrix",
        "Spearman, all",
        "in the union (unrelated)",
    ]
    mean = result["mean_jaccard"]
    lead = say(
        "Mean Jaccard index of {}: {}; {} in all of them.",
        plural(mean["n_pairs"], "pair"),
        number(mean["value"], 3),
        _in_all(result),
    )
    return DisplayPart(
        titled("How far sets agree", run),
        lead,
        [
            _jaccards(result),
            Figure(
                partial(agreement_figure, names, jaccard),
                f"Jaccard index of every two sets: {words}.",
                caption,
            ),
        ],
        [Table("Every two sets beside unrelated ones; ranges hold 95\u00a0% of them", columns, rows)],
    )


BARS = "95\u00a0% of {} lie in the grey bar, of {} in the line below it; ticks are means."


def _jaccards(result: Mapping[str, Any]) -> Figure:
    """The Jaccard index of every two sets beside that of unrelated ones; of many pairs the closest."""
    rows = []
    for pair in sorted(result["pairs"], key=lambda pair: -pair["jaccard"]["value"])[:MOST]:
        found, matched = pair["jaccard"], pair["jaccard"]["matched"]
        told = f"unrelated {chance_range(found)}, as many per matrix {chance_range(matched)}"
        rows.append(_with_chance(pair["names"], found, number(found["value"], 3), told, [found, matched]))
    caption = say(
        "<b>Jaccard index beside chance</b>. " + BARS + "{}",
        "unrelated sets",
        "those with as many neurons per matrix",
        _drawn("closest", len(result["pairs"])),
    )
    return dots_of(rows, "Jaccard index of the neurons", caption, domain=_from_zero(rows, most=1.02))


def _with_chance(
    names: Sequence[str],
    found: Mapping[str, Any],
    text: str,
    told: str,
    chance: Sequence[Mapping[str, Any]],
    *,
    ends: bool = False,
) -> DotRow:
    label = " and ".join(visible(each, 30) for each in names)
    low, high = (found["low"], found["high"]) if ends else (None, None)
    return DotRow(label, found["value"], low, high, text, COLOURS[0], chance=chance, beside=told)


def _in_all(result: Mapping[str, Any]) -> str:
    found = result["in_all"]
    return (
        f"{plural(round(found['value']), 'neuron')} (unrelated sets {number(found['low'], 0)} to "
        f"{number(found['high'], 0)})"
    )


def chance_range(chance: Mapping[str, Any]) -> str:
    """What chance gives, from its lower to its upper end."""
    return (
        f"{number(chance['low'], 3)} to {number(chance['high'], 3)}"
        if chance.get("low") is not None
        else NONE
    )


def overlap_findings(run: ReportedRun) -> list[Finding]:
    """How many pairs agree beyond sets with as many neurons in every matrix."""
    pairs = run.result["pairs"]
    above = [pair for pair in pairs if pair["jaccard"]["matched"].get("verdict") == "more"]
    best = max(pairs, key=lambda pair: pair["jaccard"]["value"], default=None)
    if best is None:
        return []
    made = []
    for pair in pairs:
        left = [
            f"{count(n)} of {visible(each, 40)}"
            for n, each in zip(pair.get("outside") or (), pair["names"], strict=False)
            if n
        ]
        if left:
            where = "{}: {} left out, where the other search did not look."
            names = ", ".join(visible(each, 40) for each in pair["names"])
            made.append(Finding(CAUTION, say(where, names, " and ".join(left))))
    text = say(
        "{} of {} of sets share more neurons than unrelated sets with as many in every matrix; {} {} and {}, "
        "Jaccard index {} (unrelated {}).",
        len(above),
        plural(len(pairs), "pair"),
        "the closest are" if len(pairs) > 1 else "of",
        *(Markup("<b>{}</b>").format(visible(each, 40)) for each in best["names"]),
        number(best["jaccard"]["value"], 3),
        chance_range(best["jaccard"]["matched"]),
    )
    return [Finding(FACT if above else NO, text), *made]


def languages_part(run: ReportedRun) -> DisplayPart:
    """What languages share, and what is lost in one where the neurons of another are off."""
    result = run.result
    rows = [
        [
            visible(row["language"], 30),
            count(row["n_neurons"]),
            *(_specific(row[kind]) for kind in ("minus_intersection", "minus_union")),
        ]
        for row in result["languages"]
    ]
    columns = ["language", "neurons", "not in all languages", "in no other language"]
    tables = [Table("Sets by language and what is specific, by both published definitions", columns, rows)]
    figures, more = _matrix_figures(result)
    shared = result["shared"]
    lead = say(
        "{} in the sets of all languages; unrelated sets would share {}.",
        plural(round(shared["value"]), "neuron"),
        f"{number(shared['low'], 0)} to {number(shared['high'], 0)}",
    )
    if result.get("untreated"):
        rates = (f"{visible(each, 30)} {interval(rate)}" for each, rate in result["untreated"].items())
        lead += say(" Refused by the model as it is: {}.", ", ".join(rates))
    if result.get("skipped"):
        lead += say(
            " Not measured are the empty sets {}.", ", ".join(visible(each, 60) for each in result["skipped"])
        )
    return DisplayPart(titled("Languages", run), lead, figures, [*tables, *more])


def _specific(found: Mapping[str, Any]) -> str:
    ends = f"{number(found['low'], 0)} to {number(found['high'], 0)}"
    return (
        f"{count(found['value'])}, {share(found['share'])} (unrelated {ends}: "
        f"{visible(found['verdict'], 20)})"
    )


def _matrix_figures(result: Mapping[str, Any]) -> tuple[list[Figure], list[Table]]:
    cells = result.get("matrix") or []
    if not cells:
        return [], []
    sets, groups = (list(dict.fromkeys(cell[part] for cell in cells)) for part in ("set", "group"))
    effect = any(cell.get("causal_effect") for cell in cells)
    measure = "causal_effect" if effect else "change"
    values = {(cell["set"], cell["group"]): cell[measure]["value"] for cell in cells}
    words = "; ".join(
        f"{cell['set']} on {cell['group']} {interval(cell[measure], signed=not effect)}" for cell in cells
    )
    if effect:
        caption = Markup(
            "<b>Causal effect</b> of the neurons found on one group of requests (rows) on every group "
            "(columns)."
        )
    else:
        caption = Markup(
            "<b>Refusals lost</b>: change of refusals of harmful requests (columns) while the neurons of "
            "one set (rows) are off."
        )
    draw = partial(matrix_figure, sets, groups, values, ("neurons of", "requests"))
    figure = Figure(draw, f"{measure.replace('_', ' ')}: {visible(words, 2000)}.", caption)
    rows = [
        [
            counted(f"{visible(cell['set'], 30)} → {visible(cell['group'], 30)}", cell["harmful_refused"]),
            interval(cell["harmful_refused"]),
            interval(cell["change"], signed=True),
            interval(cell["change_against_random"], signed=True),
            clear_word(cell["change_against_random"]),
            *([interval(cell["causal_effect"])] if effect else []),
        ]
        for cell in cells
    ]
    columns = [
        "neurons → requests",
        "refused",
        "change",
        "against random sets",
        "clear",
        *(["causal effect"] if effect else []),
    ]
    return [figure], [Table(captioned("Every set on every group; 95\u00a0% intervals", cells), columns, rows)]


def transfer_part(run: ReportedRun) -> DisplayPart:
    """Effect on other requests, and what patching costs."""
    result = run.result
    figures, tables = _matrix_figures(result)
    means = result["own_and_other"]
    lead = say(
        "Mean causal effect on the requests the neurons were found on: {}; on the others: {}.",
        number(means["own"]["value"]),
        number(means["other"]["value"]),
    )
    tasks = list(dict.fromkeys(task for each in result["ability"] for task in each["capability"]))
    rows = [
        [
            counted(visible(each["name"], 40), each["harmless_refused"]),
            interval(each["harmless_refused"]),
            *(_measured(each["capability"].get(task)) for task in tasks),
        ]
        for each in result["ability"]
    ]
    ability = Table(
        "General ability under patching",
        ["model", "harmless refused", *(visible(task, 40) for task in tasks)],
        rows,
    )
    return DisplayPart(titled("Transfer to other requests", run), lead, figures, [*tables, ability])


def _measured(record: Any) -> str:
    if not isinstance(record, Mapping):
        return NONE
    return interval(record) if "low" in record else number(record.get("value"))


def matrix_findings(run: ReportedRun) -> list[Finding]:
    """In one sentence: how the diagonal of a matrix compares with the rest."""
    result = run.result
    cells = result.get("matrix") or []
    groups = {cell["group"] for cell in cells}
    known = [
        cell
        for cell in cells  # What languages share, or what is specific to one, was found on no one group.
        if cell["set"] in groups and (cell.get("causal_effect") or cell["change"])["value"] is not None
    ]
    own = [cell for cell in known if cell["set"] == cell["group"]]
    other = [cell for cell in known if cell["set"] != cell["group"]]
    if not own or not other:
        return []

    def mean(chosen: Sequence[Mapping[str, Any]]) -> float:
        return float(
            sum((cell.get("causal_effect") or cell["change"])["value"] for cell in chosen) / len(chosen)
        )

    transfers = any(cell.get("causal_effect") for cell in known)
    text = (
        (
            "Neurons found on one group of requests have a mean causal effect of {} on their own and of {} "
            "on the other groups."
        )
        if transfers
        else (
            "With the neurons of one language off, refusals change by {} in that language and by {} in the "
            "others."
        )
    )
    return [
        Finding(
            FACT,
            say(text, number(mean(own), signed=not transfers), number(mean(other), signed=not transfers)),
        )
    ]


def tax_part(run: ReportedRun) -> DisplayPart:
    """What two preference trainings share, and what cross-patching shows.

    In a notebook the second may stand alone.
    """
    result = run.result
    relations = result.get("relations") or []
    rows = [
        [
            " and ".join(visible(each, 30) for each in pair["pair"]),
            f"{number(pair['overlap']['value'], 0)} of {count(pair['size'])}",
            *(_expected(pair["chance"][kind]) for kind in ("all", "in_activation")),
            *(_ranked(pair["spearman"][kind]) for kind in ("all", "given_activation", "union")),
            NONE if pair["shared"] is None else interval(pair["shared"]["cosine"], signed=True),
        ]
        for pair in relations
    ]
    columns = [
        "trainings",
        "shared",
        "random sets",
        "as active",
        "Spearman, all",
        "given activation",
        "in the union",
        "cosine of changes",
    ]
    tables = (
        [Table("What every two trainings share; intervals of Spearman over prompts", columns, rows)]
        if rows
        else []
    )
    arms = [arm for arm in result["arms"] if "random" not in arm["arm"]]
    cells = [
        [
            counted(visible(arm["arm"], 60), arm["refused"], arm["over_refused"]),
            *(interval(arm[kind]) for kind in ("refused", "helpful", "over_refused")),
        ]
        for arm in result["arms"]
    ]
    quiet = frozenset(place for place, arm in enumerate(result["arms"]) if arm not in arms)
    tables.append(
        Table(
            "Cross-patching of the shared neurons",
            ["model", "harmful refused", "helpful", "harmless refused"],
            cells,
            quiet,
        )
    )
    moved = [
        [
            f"{visible(each['receiver'], 30)} from {visible(each['donor'], 30)}",
            *(
                (
                    f"{interval(each[kind]['change'], signed=True)}; "
                    f"{portion(each[kind]['share_of_gap'], 'the gap')}"
                )
                for kind in ("refused", "helpful")
            ),
        ]
        for each in result["cross_patching"]
    ]
    tables.append(
        Table(
            captioned("What each model gains by the other’s activations", result["cross_patching"]),
            ["direction", "refusals of harmful requests", "helpful answers"],
            moved,
        )
    )
    lead = say("{} shared", plural(result["n_shared"], "neuron"))
    lead += (
        say("; helpfulness is “{}”.", visible(result["helpfulness"], 30))
        if "helpfulness" in result
        else Markup(".")
    )
    figures = [
        *([_shared_figure(relations)] if relations else []),
        *(_ranks_figure(pair) for pair in relations),
        _arms_figure(result["arms"], "refused", "harmful requests refused"),
        _arms_figure(result["arms"], "helpful", "helpful answers"),
    ]
    return DisplayPart(titled("The alignment tax", run), lead, figures, tables)


def _shared_figure(relations: Sequence[Mapping[str, Any]]) -> Figure:
    """Neurons in both top sets of every two trainings, beside random sets."""
    rows = []
    for pair in relations:
        found, drawn = pair["overlap"], [pair["chance"][kind] for kind in ("all", "in_activation")]
        told = "random sets {}, as active {}".format(*map(_expected, drawn))
        text = f"{number(found['value'], 0)} of {count(pair['size'])}"
        rows.append(_with_chance(pair["pair"], found, text, told, drawn, ends=True))
    caption = say("<b>Overlap</b> of the top sets. " + BARS, "random sets", "those as active in their layers")
    return dots_of(rows, "neurons in both top sets", caption, "Overlap", domain=_from_zero(rows))


RANKS = {"all": "all neurons", "given_activation": "given activation", "union": "in either top set"}


def _ranks_figure(pair: Mapping[str, Any]) -> Figure:
    """Rank agreement of the change scores of two trainings, over every index set."""
    ranked = {word: _estimate(pair["spearman"][kind]) for kind, word in RANKS.items()}
    rows = [
        estimate_row(word, found, (colour, "circle"))
        for (word, found), colour in zip(ranked.items(), COLOURS, strict=False)
    ]
    names = " and ".join(visible(each, 30) for each in pair["pair"])
    caption = say("<b>Rank agreement</b> of {}; bars are 95\u00a0% intervals over prompts.", names)
    ends = [0.0, 1.0, *(end for found in ranked.values() for end in found.values() if end is not None)]
    domain = (min(ends) - 0.03, max(ends) + 0.03)
    return dots_of(
        rows, "Spearman of change scores", caption, f"Rank agreement of {names}", domain=domain, reference=0.0
    )


def _expected(chance: Mapping[str, Any]) -> str:
    return f"{number(chance['expected'], 1)} [{number(chance['low'], 0)}, {number(chance['high'], 0)}]"


def _arms_figure(arms: Sequence[Mapping[str, Any]], kind: str, title: str) -> Figure:
    """Every model as it is and patched; random sets are ticks in the row of what they control."""
    rows = []
    for arm in (arm for arm in arms if "random" not in arm["arm"]):
        chance = [other[kind]["value"] for other in arms if other["arm"].startswith(f"{arm['arm']}, random")]
        dots = [value for value in chance if value is not None]
        rows.append(estimate_row(arm["arm"], arm[kind], dots=dots))
    caption = say(
        "<b>{}</b>. Bars are 95\u00a0% intervals; ticks are random sets of as many neurons.",
        title.capitalize(),
    )
    return dots_of(rows, title, caption, title.capitalize())


def _ranked(found: Mapping[str, Any]) -> str:
    return interval(_estimate(found))


def _estimate(found: Mapping[str, Any]) -> dict[str, Any]:
    low, high = found.get("interval") or (None, None)
    return {"value": found["value"], "low": low, "high": high}


def tax_findings(run: ReportedRun) -> list[Finding]:
    """Shared beyond chance, and the price in both directions."""
    result, made = run.result, []
    for pair in (result.get("relations") or [])[:1]:
        chance = pair["chance"]["in_activation"]
        beyond = pair["overlap"]["value"] > chance["high"]
        text = "{} share {} of {} neurons, {} what sets of equally active neurons share ({})"
        names = Markup(" and ").join(Markup("<b>{}</b>").format(visible(each, 30)) for each in pair["pair"])
        shown = say(
            text,
            names,
            number(pair["overlap"]["value"], 0),
            count(pair["size"]),
            "more than" if beyond else "no more than",
            f"{number(chance['low'], 0)} to {number(chance['high'], 0)}",
        )
        made.append(Finding(YES if beyond else NO, shown + Markup(".")))
    for each in result["cross_patching"]:
        text = (
            "With the activations of {} in the shared neurons, {} changes refusals by {} and helpful "
            "answers by {}."
        )
        rates = [interval(each[kind]["change"], signed=True) for kind in ("refused", "helpful")]
        made.append(
            Finding(FACT, say(text, visible(each["donor"], 30), visible(each["receiver"], 30), *rates))
        )
    return made


VERB = "analyze-vocabulary"


TOKENS = 12
"""Tokens of either end on a card."""


PLACES = 5


def cards_of(runs: Sequence[ReportedRun]) -> dict[str, list[JsonObject]]:
    """By `KEY.INDEX` the sections of a neuron's card, for the maps; every text made visible."""
    found: dict[str, list[JsonObject]] = {}
    for run in runs:
        if run.verb == VERB:
            for card in run.result["cards"]:
                name = f"{visible(card['key'], 60)}.{int(card['index'])}"
                found[name] = guarded(run, lambda _, card=card: _sections(card))  # type: ignore[misc]
    return found


def _sections(card: Mapping[str, Any]) -> list[dict[str, Any]]:
    writes, active = card["writes"], card["active"]
    made: list[dict[str, Any]] = []
    for end, title in (("top", "pushes towards"), ("bottom", "pushes away from")):
        tokens = [visible(entry["token"], 40) for entry in writes[end][:TOKENS]]
        if tokens:
            made.append({"title": f"Writes: {title}", "items": tokens})
    if not writes["defined"]:
        made.append({"title": "Writes", "items": [f"nothing of its own: {visible(writes['how'], 120)}"]})
    for side, title in (("most_active", "Most active at"), ("least_active", "Least active at")):
        places = [_place(entry) for entry in active.get(side, [])[:PLACES]]
        if places:
            made.append({"title": title, "items": places})
    for treatment, effect in card["effects"].items():
        like = f"{effect['as_large_among_random']} of {effect['n_random']} random neurons change it as much"
        text = interval(effect, signed=True) + (f"; {like}" if effect["n_random"] else "")
        made.append({"title": f"Refusal log-odds, it alone: {visible(treatment, 40)}", "items": [text]})
    return made


def _place(entry: Mapping[str, Any]) -> list[str]:
    about = f"{number(entry['value'])} ({visible(entry['prompts'], 20)})"
    return [visible(entry["before"], 120), visible(entry["token"], 60), visible(entry["after"], 120), about]


def cards_part(run: ReportedRun) -> DisplayPart:
    """All cards of a run as a table."""
    result = run.result
    treatments = list(dict.fromkeys(treatment for card in result["cards"] for treatment in card["effects"]))
    rows: list[list[Any]] = []
    for card in result["cards"]:
        places = card["active"].get("most_active", [])[:1]
        rows.append(
            [
                visible(card["neuron"], 60),
                number(card["score"], 3),
                *(_tokens(card["writes"][end][:6]) for end in ("top", "bottom")),
                Markup(" ").join(_in_context(entry) for entry in places) or NONE,
                *(interval(card["effects"].get(treatment), signed=True) for treatment in treatments),
            ]
        )
    columns = ["neuron", "score", "writes towards", "writes away from", "most active at"]
    columns += [f"refusal log-odds, {visible(treatment, 30)}" for treatment in treatments]
    lead = say(
        "{}. Top and bottom tokens of the output direction through the unembedding; change of the "
        "refusal’s log-odds by the neuron alone. Random neurons of the same matrices change them by {}.",
        plural(len(rows), "neuron"),
        ", ".join(
            f"{number(chance['low'])} to {number(chance['high'])} ({visible(treatment, 30)})"
            for treatment, chance in result["random"].items()
            if chance["n"]
        )
        or "an unknown amount",
    )
    for treatment, odds in result.get("log_odds", {}).items():
        text = " Untreated the log-odds are {}; all of these together ({}) change them by {}."
        lead += say(
            text,
            number(odds["untreated"]),
            visible(treatment, 30),
            number(odds["change_together"]["value"], signed=True),
        )
    figures = [_effects_figure(result, treatment) for treatment in treatments]
    return DisplayPart(
        titled("Neuron cards", run),
        lead,
        figures,
        [Table(captioned("Neuron cards", result["cards"]), columns, rows)],
    )


def _effects_figure(result: Mapping[str, Any], treatment: str) -> Figure:
    """What every neuron of the cards does alone, beside random neurons of the same matrices."""
    rows = [
        estimate_row(
            f"{card['neuron'].removeprefix('layers.')} {_in_a_row(card['writes']['top'][:3])}",
            card["effects"][treatment],
        )
        for card in result["cards"]
        if treatment in card["effects"]
    ]
    alone = random_row(result["random"][treatment].get("values") or ())
    ends = [end for row in rows for end in (row.value, row.low, row.high, *row.dots) if end is not None]
    room = 0.06 * (max([0.0, *ends]) - min([0.0, *ends]) or 1.0)
    title = f"change of the refusal’s log-odds, {visible(treatment, 30)}"
    caption = say(
        "<b>{}</b> by each neuron alone; bars are 95\u00a0% intervals, ticks random neurons.",
        title.capitalize(),
    )
    return dots_of(
        [*rows, *alone], title, caption, domain=(min([0.0, *ends]) - room, max([0.0, *ends]) + room)
    )


def _in_a_row(entries: Sequence[Mapping[str, Any]]) -> str:
    """Tokens without the blanks around them; one of blanks alone is shown as Python writes it."""
    return " ".join(entry["token"].strip() or repr(entry["token"]) for entry in entries)


def _tokens(entries: Sequence[Mapping[str, Any]]) -> Markup | str:
    return (
        Markup(" ").join(
            Markup("<bdi class=token>{}</bdi>").format(visible(entry["token"], 30)) for entry in entries
        )
        or NONE
    )


def _in_context(entry: Mapping[str, Any]) -> Markup:
    parts = (visible(entry[part], 60) for part in ("before", "token", "after"))
    return Markup("<bdi>{}<mark>{}</mark>{}</bdi>").format(*parts)


def cards_findings(run: ReportedRun) -> list[Finding]:
    """How many single neurons change the refusal more than random ones do."""
    made = []
    for treatment, chance in run.result["random"].items():
        effects = [card["effects"][treatment] for card in run.result["cards"] if treatment in card["effects"]]
        known = [effect for effect in effects if effect["value"] is not None and chance["n"]]
        beyond = [effect for effect in known if stands_out(effect, chance)]
        if known:
            text = "{} of {} change the refusal’s log-odds more than random neurons do ({}, {} to {}{})."
            ends = number(chance["low"]), number(chance["high"])
            few = "; 19 of them are needed to tell" if chance["n"] < FEWEST_AMONG else ""
            many = plural(len(known), "single neuron")
            shown = say(text, len(beyond), many, visible(treatment, 40), *ends, few)
            made.append(Finding(FACT if beyond else NO, shown))
    return made
