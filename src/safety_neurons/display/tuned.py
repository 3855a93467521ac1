"""What tune, repair and the studies around tuning found: before and after, through a fine-tune, under attack."""

from collections.abc import Mapping
from typing import Any

from markupsafe import Markup

from safety_neurons.display.charts import DotRow
from safety_neurons.display.parts import (
    ARM_COLUMNS,
    FAIL,
    NO,
    OPEN,
    TREATED,
    YES,
    Cell,
    DisplayPart,
    Figure,
    Finding,
    ReportedRun,
    Table,
    Tile,
    arm_row,
    dots_of,
    estimate_row,
    price,
)
from safety_neurons.display.text import NONE, count, interval, name, number, plural, say, share, visible
from safety_neurons.results import captioned, clear_word, is_clear


def tune_part(run: ReportedRun) -> DisplayPart:
    """Before and after, and what held-out prompts said on the way."""
    result = run.result
    heading = say("{} tuned in {}", plural(result["n_neurons"], "neuron"), name(run.model))
    lead = say(
        "{} trained, {} of the model, in {} of {} ({}); the state of step {} is kept. Everything outside the set is {}.",
        plural(result["trained_parameters"], "parameter"),
        share(result["share_of_parameters"], 2),
        count(result["steps"]),
        plural(result["planned_steps"], "step"),
        visible(result["stopped"], 60),
        count(result["kept_step"]),
        {True: "bit for bit as it was", False: "NOT as it was"}.get(result["frozen_unchanged"], "taken to be as it was (not looked at)"),
    )
    if result.get("survives_cast") is not None:
        lead += say(" {} of the changed weights survive the cast to the model’s type.", share(result["survives_cast"]))
    figures = [
        _refusals(result, "harmful_refused", "harmful requests refused", "Refusals of harmful requests: what tuning is for."),
        _refusals(result, "harmless_refused", "harmless requests refused", "Refusals of harmless requests: its price."),
    ]
    rows = [arm_row(arm, result[arm]) for arm in ("before", "after")]
    checks = [
        [count(each["step"]), interval(each["harmful_refused"]), interval(each["harmless_refused"]), number(each["divergence"], 3)]
        for each in result["checks"]
    ]
    columns = ["step", "harmful refused", "harmless refused", "KL per token, nats"]
    details = [Table("Checks while training, on prompts held out of the data", columns, checks)] if checks else []
    return DisplayPart(heading, lead, figures, [Table("Before and after; shares with 95\u00a0% intervals", ARM_COLUMNS, rows)], details)


def _refusals(result: Mapping[str, Any], what: str, title: str, caption: str) -> Figure:
    rows = [estimate_row("before", result["before"][what]), estimate_row("after", result["after"][what], TREATED)]
    return dots_of(rows, title, say("<b>{}</b> Bars are 95\u00a0% intervals.", caption))


def verdict_of(run: ReportedRun) -> str:
    """Whether tuning achieved what it is for."""
    change = run.result["change"]
    if change["value"] is None:
        return OPEN
    return YES if run.result.get("achieved", is_clear(change) and change["value"] > 0) else NO  # runs of earlier versions do not say


def tune_findings(run: ReportedRun) -> list[Finding]:
    """The sentences of a tune run."""
    result = run.result
    before, after = result["before"], result["after"]
    text = say(
        "Training {} of {} ({} of its parameters) takes refusals of harmful requests from {} to {}; paired change {}",
        plural(result["n_neurons"], "neuron"),
        name(run.model),
        share(result["share_of_parameters"], 2),
        interval(before["harmful_refused"]),
        interval(after["harmful_refused"]),
        interval(result["change"], signed=True),
    )
    if "why" in result:
        text = say("{}: {}. {}", "Achieved" if result["achieved"] else "Not achieved", visible(result["why"], 400), text)
    made = [Finding(verdict_of(run), text + Markup(".")), price(before, after)]
    if result["frozen_unchanged"] is False:
        made.append(Finding(FAIL, say("In {}, weights outside the set changed.", name(run.label))))
    return made


def tune_tile(run: ReportedRun) -> Tile:
    """The question of the first screen."""
    text = say("change of refusals of harmful requests by tuning {}", plural(run.result["n_neurons"], "neuron"))
    return Tile("Does tuning them make it safer?", verdict_of(run), interval(run.result["change"], signed=True), text)


COLUMNS = ("arm", "harmful complied", "harmless complied", "perplexity", "harmful after", "harmless after", "task after")


def repair_part(run: ReportedRun) -> DisplayPart:
    """What was put back."""
    result = run.result
    text = "{} put back: {} of {} weights differed"
    lead = say(text, plural(result["n_neurons"], "neuron"), count(result["changed"]), count(result["n_entries"]))
    if result["adapter_changed"]:
        lead += say(", {} entries of adapters cleared", count(result["adapter_changed"]))
    return DisplayPart(say("Repair of {}", name(run.model)), lead + Markup("."))


def rsn_part(run: ReportedRun) -> DisplayPart:
    """Arms before and after the downstream fine-tune."""
    result, safety = run.result, run.result["sets"]["safety"]
    down = result["downstream"]
    lead = say(
        "{} ({} of the parameters) tuned with {}, then {} of {} fine-tuning on the task; {} of the safety neurons are foundation neurons "
        "too. Shares are means over seeds and prompts with 95\u00a0% intervals; 100 times the first column is the harmful score.",
        plural(safety["n_neurons"], "neuron"),
        share(safety["share_of_parameters"], 2),
        plural(len(result["seeds"]), "seed"),
        plural(down["steps"], "step"),
        visible(down["how"], 20),
        share(result["sets"]["shared_share"], 0),
    )
    when = "after" if down["steps"] else "before"
    rows = [_seeds(arm["arm"], arm[when]["harmful"]) for arm in result["arms"]]
    title = f"harmful requests complied with {when} the task" if down["steps"] else "harmful requests complied with"
    caption = say("<b>{}.</b> Bars are 95\u00a0% intervals over seeds and prompts, faint dots single seeds.", title.capitalize())
    cells: list[list[Cell]] = []
    for arm in result["arms"]:
        before, after = arm["before"], arm["after"]
        shown = [interval(before["harmful"]), interval(before["harmless"]), number(before["perplexity"]["value"])]
        cells.append([visible(arm["arm"], 40), *shown, interval(after["harmful"]), interval(after["harmless"]), interval(after["task"])])
    pairs = [
        [visible(pair, 60), interval(found["before"], signed=True), interval(found["after"], signed=True), _clear(found[when])]
        for pair, found in result["differences"].items()
    ]
    differences = Table(
        captioned("Paired differences of harmful requests complied with", result["differences"]),
        ("arms", "before", "after", "clear"),
        pairs,
    )
    return DisplayPart(
        say("Safety through a fine-tune of {}", name(run.model)),
        lead,
        [dots_of(rows, title, caption)],
        [Table("Every arm", COLUMNS, cells), differences],
    )


def stress_part(run: ReportedRun) -> DisplayPart:
    """Curves under attack, before and after tuning."""
    result = run.result
    rows: list[list[Cell]] = [
        [
            visible(point["attack"], 40),
            number(point["amount"]) if "prune" in point["attack"] else count(point["amount"]),
            interval(point["before"]),
            interval(point["after"]),
            interval(point["difference"], signed=True),
            clear_word(point["difference"]),
        ]
        for point in result["curves"]
    ]
    lead = say(
        "Harmful requests complied with while the model is attacked, over {}: shares of the set that are switched off (random ones as a "
        "control), steps of LoRA tuning on harmful answers, steps on the task.",
        plural(len(result["seeds"]), "seed"),
    )
    columns = ("attack", "how much", "untuned", "tuned", "difference", "clear")
    return DisplayPart(
        say("Attacks on {}", name(run.model)),
        lead,
        (),
        [Table(captioned("Means with 95\u00a0% intervals", result["curves"]), columns, rows)],
    )


def _seeds(label: str, found: Mapping[str, Any]) -> DotRow:
    return estimate_row(label, found, dots=[value for value in found["by_seed"] if value is not None])


def _clear(spread: Mapping[str, Any] | None) -> str:
    return NONE if spread is None else clear_word(spread)
