"""Neuron cards: what single neurons write, where they are active, what each does to the refusal; in the maps and as a table."""

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from safety_neurons.report.findings import FACT, NO, Finding
from safety_neurons.report.reading import Run, guarded
from safety_neurons.report.sections import Part, titled
from safety_neurons.report.tables import Table
from safety_neurons.report.text import NONE, interval, number, plural, say, visible
from safety_neurons.results import stands_out

VERB = "analyze-vocabulary"
TOKENS = 12
"""Tokens of either end on a card."""
PLACES = 5


def cards_of(runs: Sequence[Run]) -> dict[str, list[dict[str, Any]]]:
    """By `KEY.INDEX` the sections of a neuron's card, for the maps; every text made visible."""
    found: dict[str, list[dict[str, Any]]] = {}
    for run in runs:
        if run.verb == VERB:
            for card in run.result["cards"]:
                found[f"{visible(card['key'], 60)}.{int(card['index'])}"] = guarded(run, lambda card=card: _sections(card))  # type: ignore[misc]
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


def cards_part(run: Run) -> Part:
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
        "{}. Top and bottom tokens of the output direction through the unembedding; change of the refusal’s log-odds by the neuron alone. "
        "Random neurons of the same matrices change them by {}.",
        plural(len(rows), "neuron"),
        ", ".join(
            f"{number(chance['low'])} to {number(chance['high'])} ({visible(treatment, 30)})"
            for treatment, chance in result["random"].items()
            if chance["n"]
        )
        or "an unknown amount",
    )
    return Part(titled("Neuron cards", run), lead, (), [Table("Neuron cards", columns, rows)])


def _tokens(entries: Sequence[Mapping[str, Any]]) -> Markup | str:
    return Markup(" ").join(Markup("<bdi class=token>{}</bdi>").format(visible(entry["token"], 30)) for entry in entries) or NONE


def _in_context(entry: Mapping[str, Any]) -> Markup:
    parts = (visible(entry[part], 60) for part in ("before", "token", "after"))
    return Markup("<bdi>{}<mark>{}</mark>{}</bdi>").format(*parts)


def cards_findings(run: Run) -> list[Finding]:
    """How many single neurons change the refusal more than random ones do."""
    made = []
    for treatment, chance in run.result["random"].items():
        effects = [card["effects"][treatment] for card in run.result["cards"] if treatment in card["effects"]]
        known = [effect for effect in effects if effect["value"] is not None and chance["n"]]
        beyond = [effect for effect in known if stands_out(effect, chance)]
        if known:
            text = "{} of {} change the refusal’s log-odds more than random neurons do ({}, {} to {})."
            ends = number(chance["low"]), number(chance["high"])
            shown = say(text, len(beyond), plural(len(known), "single neuron"), visible(treatment, 40), *ends)
            made.append(Finding(FACT if beyond else NO, shown))
    return made
