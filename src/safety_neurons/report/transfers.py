"""What a report says of analyses with a model: languages, transfer, the alignment tax, progressive deactivation."""

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from safety_neurons.report.analyses import chance_range
from safety_neurons.report.charts import Row, dot_figure
from safety_neurons.report.curves import Line, Plane, line_figure, matrix_figure
from safety_neurons.report.findings import FACT, NO, YES, Finding
from safety_neurons.report.reading import Run
from safety_neurons.report.sections import Figure, Part, titled
from safety_neurons.report.tables import Table
from safety_neurons.report.text import NONE, count, interval, number, plural, say, share, visible
from safety_neurons.results import captioned, clear_word

RANDOM = "random neurons"
ALONE = "one layer alone"
"""Steps that are no curve: every layer by itself."""


def languages_part(run: Run) -> Part:
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
    return Part(titled("Languages", run), lead, figures, [*tables, *more])


def _specific(found: Mapping[str, Any]) -> str:
    ends = f"{number(found['low'], 0)} to {number(found['high'], 0)}"
    return f"{count(found['value'])}, {share(found['share'])} (unrelated {ends}: {visible(found['verdict'], 20)})"


def _matrix_figures(result: Mapping[str, Any]) -> tuple[list[Figure], list[Table]]:
    cells = result.get("matrix") or []
    if not cells:
        return [], []
    sets, groups = (list(dict.fromkeys(cell[part] for cell in cells)) for part in ("set", "group"))
    effect = any(cell.get("causal_effect") for cell in cells)
    measure = "causal_effect" if effect else "change"
    values = {(cell["set"], cell["group"]): cell[measure]["value"] for cell in cells}
    words = "; ".join(f"{cell['set']} on {cell['group']} {interval(cell[measure], signed=not effect)}" for cell in cells)
    if effect:
        caption = Markup("<b>Causal effect</b> of the neurons found on one group of requests (rows) on every group (columns).")
    else:
        caption = Markup(
            "<b>Refusals lost</b>: change of refusals of harmful requests (columns) while the neurons of one set (rows) are off."
        )
    figure = Figure(
        matrix_figure(sets, groups, values, ("neurons of", "requests")), f"{measure.replace('_', ' ')}: {visible(words, 2000)}.", caption
    )
    rows = [
        [
            f"{visible(cell['set'], 30)} → {visible(cell['group'], 30)}",
            interval(cell["harmful_refused"]),
            interval(cell["change"], signed=True),
            interval(cell["change_against_random"], signed=True),
            clear_word(cell["change_against_random"]),
            *([interval(cell["causal_effect"])] if effect else []),
        ]
        for cell in cells
    ]
    columns = ["neurons → requests", "refused", "change", "against random sets", "clear", *(["causal effect"] if effect else [])]
    return [figure], [Table(captioned("Every set on every group; 95\u00a0% intervals", cells), columns, rows)]


def transfer_part(run: Run) -> Part:
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
            visible(each["name"], 40),
            interval(each["harmless_refused"]),
            *(_measured(each["capability"].get(task)) for task in tasks),
        ]
        for each in result["ability"]
    ]
    ability = Table("General ability under patching", ["model", "harmless refused", *(visible(task, 40) for task in tasks)], rows)
    return Part(titled("Transfer to other requests", run), lead, figures, [*tables, ability])


def _measured(record: Any) -> str:
    if not isinstance(record, Mapping):
        return NONE
    return interval(record) if "low" in record else number(record.get("value"))


def matrix_findings(run: Run) -> list[Finding]:
    """In one sentence: how the diagonal of a matrix compares with the rest."""
    result = run.result
    cells = result.get("matrix") or []
    known = [cell for cell in cells if (cell.get("causal_effect") or cell["change"])["value"] is not None]
    own = [cell for cell in known if cell["set"] == cell["group"]]
    other = [cell for cell in known if cell["set"] != cell["group"]]
    if not own or not other:
        return []

    def mean(chosen: Sequence[Mapping[str, Any]]) -> float:
        return float(sum((cell.get("causal_effect") or cell["change"])["value"] for cell in chosen) / len(chosen))

    transfers = any(cell.get("causal_effect") for cell in known)
    text = (
        "Neurons found on one group of requests have a mean causal effect of {} on their own and of {} on the other groups."
        if transfers
        else "With the neurons of one language off, refusals change by {} in that language and by {} in the others."
    )
    return [Finding(FACT, say(text, number(mean(own), signed=not transfers), number(mean(other), signed=not transfers)))]


def tax_part(run: Run) -> Part:
    """What two preference trainings share, and what cross-patching shows."""
    result = run.result
    rows = [
        [
            " and ".join(visible(each, 30) for each in pair["pair"]),
            f"{number(pair['overlap']['value'], 0)} of {count(pair['size'])}",
            *(_expected(pair["chance"][kind]) for kind in ("all", "in_activation")),
            *(_ranked(pair["spearman"][kind]) for kind in ("all", "given_activation", "union")),
            NONE if pair["shared"] is None else interval(pair["shared"]["cosine"], signed=True),
        ]
        for pair in result["relations"]
    ]
    columns = ["trainings", "shared", "random sets", "as active", "Spearman, all", "given activation", "in the union", "cosine of changes"]
    tables = [Table("What every two trainings share; intervals of Spearman over prompts", columns, rows)]
    arms = [arm for arm in result["arms"] if "random" not in arm["arm"]]
    cells = [[visible(arm["arm"], 60), *(interval(arm[kind]) for kind in ("refused", "helpful", "over_refused"))] for arm in result["arms"]]
    quiet = frozenset(place for place, arm in enumerate(result["arms"]) if arm not in arms)
    tables.append(Table("Cross-patching of the shared neurons", ["model", "harmful refused", "helpful", "harmless refused"], cells, quiet))
    moved = [
        [
            f"{visible(each['receiver'], 30)} from {visible(each['donor'], 30)}",
            *(
                f"{interval(each[kind]['change'], signed=True)}; {interval(each[kind]['share_of_gap'])} of the gap"
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
    lead = say("{} shared; helpfulness is “{}”.", plural(result["n_shared"], "neuron"), visible(result["helpfulness"], 30))
    figures = [
        _arms_figure(result["arms"], "refused", "harmful requests refused"),
        _arms_figure(result["arms"], "helpful", "helpful answers"),
    ]
    return Part(titled("The alignment tax", run), lead, figures, tables)


def _expected(chance: Mapping[str, Any]) -> str:
    return f"{number(chance['expected'], 1)} [{number(chance['low'], 0)}, {number(chance['high'], 0)}]"


def _arms_figure(arms: Sequence[Mapping[str, Any]], kind: str, title: str) -> Figure:
    """Every model as it is and patched; random sets are ticks in the row of what they control."""
    rows = []
    for arm in (arm for arm in arms if "random" not in arm["arm"]):
        chance = [other[kind]["value"] for other in arms if other["arm"].startswith(f"{arm['arm']}, random")]
        dots = [value for value in chance if value is not None]
        rate = arm[kind]
        rows.append(Row(visible(arm["arm"], 40), rate["value"], rate["low"], rate["high"], interval(rate), dots=dots))
    said = "; ".join(f"{row.label} {row.text}" for row in rows)
    caption = say("<b>{}</b>. Bars are 95\u00a0% intervals; ticks are random sets of as many neurons.", title.capitalize())
    return Figure(dot_figure(rows, title, domain=(-0.03, 1.03)), f"{title.capitalize()}: {said}.", caption)


def _ranked(found: Mapping[str, Any]) -> str:
    low, high = found.get("interval") or (None, None)
    return interval({"value": found["value"], "low": low, "high": high})


def tax_findings(run: Run) -> list[Finding]:
    """Shared beyond chance, and the price in both directions."""
    result, made = run.result, []
    for pair in result["relations"][:1]:
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
            chance_range(chance),
        )
        made.append(Finding(YES if beyond else NO, shown + Markup(".")))
    for each in result["cross_patching"]:
        text = "With the activations of {} in the shared neurons, {} changes refusals by {} and helpful answers by {}."
        rates = [interval(each[kind]["change"], signed=True) for kind in ("refused", "helpful")]
        made.append(Finding(FACT, say(text, visible(each["donor"], 30), visible(each["receiver"], 30), *rates)))
    return made


def progressive_part(run: Run) -> Part:
    """What is left of refusals while more and more is off."""
    result = run.result
    whole = max(result["n_neurons"], 1)
    lines = []
    for curve in result["curves"]:
        points = [(float(point["n_neurons"]), point["harmful_refused"]) for point in curve["points"]]
        known = [(at, rate) for at, rate in points if rate["value"] is not None]
        drawn = sorted((at, rate["value"]) for at, rate in known)
        if curve["order"] != ALONE:
            lines.append(Line(visible(curve["order"], 30), drawn, marked=True))
    highest = float(max([whole, *(at for line in lines for at, _ in line.points)]))
    chance = next((kind for kind in (RANDOM, *result["random"]) if kind in result["random"]), None)
    band = [
        (sum(step["n_neurons"]) / len(step["n_neurons"]), step["harmful_refused"]["low"], step["harmful_refused"]["high"])
        for steps in ([result["random"][chance]] if chance else [])
        for step in steps
        if step["harmful_refused"]["low"] is not None
    ]
    plane = Plane("neurons off", "harmful requests refused", (0.0, highest), (0.0, 1.02))
    said = "; ".join(f"{line.name}: " + ", ".join(f"{at:,.0f} off {number(value)}" for at, value in line.points) for line in lines)
    beside = visible(chance or "no random sets", 40)
    caption = say("<b>Refusals left</b> while more and more is off; the band is what {} leave.", beside)
    figure = Figure(line_figure(lines, plane, band=sorted(band)), f"Refusals left: {said}.", caption)
    rows = [
        [
            f"{visible(curve['order'], 30)}, {visible(point['step'], 30)}",
            count(point["n_neurons"]),
            interval(point["harmful_refused"]),
            interval(point["change"], signed=True),
            interval(point["harmless_refused"]),
            number(point["perplexity"]),
            number(point["divergence"], 3),
        ]
        for curve in result["curves"]
        for point in curve["points"]
    ]
    columns = ["order, step", "off", "harmful refused", "change", "harmless refused", "perplexity", "KL per token, nats"]
    halves = [
        say("{} {}", visible(curve["order"], 30), plural(curve["neurons_for_half"], "neuron"))
        for curve in result["curves"]
        if curve["neurons_for_half"] is not None
    ]
    lead = (
        say("Fewest neurons that halve the refusals: {}.", Markup("; ").join(halves)) if halves else Markup("No order halves the refusals.")
    )
    return Part(
        titled("Off bit by bit", run),
        lead,
        [figure],
        (),
        [Table(captioned("Every step; shares with 95\u00a0% intervals", result["curves"]), columns, rows)],
    )


def progressive_findings(run: Run) -> list[Finding]:
    """How many neurons halve the refusals, by the quickest order."""
    known = [curve for curve in run.result["curves"] if curve["neurons_for_half"] is not None]
    if not known:
        return [
            Finding(NO, say("Switching off any part of the {} does not halve the refusals.", plural(run.result["n_neurons"], "neuron")))
        ]
    best = min(known, key=lambda curve: curve["neurons_for_half"])
    text = "Refusals are halved with {} of {} off ({})."
    return [
        Finding(FACT, say(text, count(best["neurons_for_half"]), plural(run.result["n_neurons"], "neuron"), visible(best["order"], 40)))
    ]
