"""What a report says of a tune run: what was trained, what that did to refusals, and its price."""

from collections.abc import Mapping
from typing import Any

from markupsafe import Markup

from safety_neurons.report.charts import Row, dot_figure, look
from safety_neurons.report.findings import FAIL, NO, OPEN, PRICE, YES, Finding
from safety_neurons.report.reading import Run
from safety_neurons.report.sections import Figure, Part
from safety_neurons.report.svg import INK
from safety_neurons.report.tables import ARM_COLUMNS, Table, arm_row
from safety_neurons.report.text import count, interval, name, number, plural, say, share, visible
from safety_neurons.report.tiles import Tile
from safety_neurons.results import is_clear


def tune_part(run: Run) -> Part:
    """Before and after, and what held-out prompts said on the way."""
    result = run.result
    heading = say("{} tuned in {}", plural(result["n_neurons"], "neuron"), name(run.models[-1]))
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
    return Part(heading, lead, figures, [Table("Before and after; shares with 95\u00a0% intervals", ARM_COLUMNS, rows)], details)


def _refusals(result: Mapping[str, Any], what: str, title: str, caption: str) -> Figure:
    looks = (INK, "circle"), (look("contrast")[0], "diamond")
    rows = []
    for arm, (colour, shape) in zip(("before", "after"), looks, strict=True):
        rate = result[arm][what]
        rows.append(Row(arm, rate["value"], rate["low"], rate["high"], interval(rate), colour, shape))
    alternative = f"{title}: " + "; ".join(f"{row.label} {row.text}" for row in rows) + "."
    shown = say("<b>{}</b> Bars are 95\u00a0% intervals.", caption)
    return Figure(dot_figure(rows, title, domain=(-0.03, 1.03)), alternative, shown)


def verdict_of(run: Run) -> str:
    """Whether tuning achieved what it is for."""
    change = run.result["change"]
    if change["value"] is None:
        return OPEN
    return YES if run.result.get("achieved", is_clear(change) and change["value"] > 0) else NO  # runs of earlier versions do not say


def tuned(run: Run) -> list[Finding]:
    """The sentences of a tune run."""
    result = run.result
    before, after = result["before"], result["after"]
    text = say(
        "Training {} of {} ({} of its parameters) takes refusals of harmful requests from {} to {}; paired change {}",
        plural(result["n_neurons"], "neuron"),
        name(run.models[-1]),
        share(result["share_of_parameters"], 2),
        interval(before["harmful_refused"]),
        interval(after["harmful_refused"]),
        interval(result["change"], signed=True),
    )
    price = say(
        "Its price: refusals of harmless requests go from {} to {}",
        interval(before["harmless_refused"]),
        interval(after["harmless_refused"]),
    )
    if before["perplexity"] is not None and after["perplexity"] is not None:
        price += say(", perplexity from {} to {}", number(before["perplexity"]), number(after["perplexity"]))
    if "why" in result:
        text = say("{}: {}. {}", "Achieved" if result["achieved"] else "Not achieved", visible(result["why"], 400), text)
    made = [Finding(verdict_of(run), text + Markup(".")), Finding(PRICE, price + Markup("."))]
    if result["frozen_unchanged"] is False:
        made.append(Finding(FAIL, say("In {}, weights outside the set changed.", name(run.label))))
    return made


def tile(run: Run) -> Tile:
    """The question of the first screen."""
    text = say("change of refusals of harmful requests by tuning {}", plural(run.result["n_neurons"], "neuron"))
    return Tile("Does tuning them make it safer?", verdict_of(run), interval(run.result["change"], signed=True), text)
