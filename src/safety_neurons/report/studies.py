"""What a report says of the studies around tuning: does safety outlive a fine-tune, how easily is it cut out."""

from collections.abc import Mapping
from typing import Any

from markupsafe import Markup

from safety_neurons.report.charts import Row, dot_figure
from safety_neurons.report.reading import Run
from safety_neurons.report.sections import Figure, Part
from safety_neurons.report.tables import Cell, Table
from safety_neurons.report.text import NONE, count, interval, name, number, plural, say, share, visible
from safety_neurons.results import captioned, clear_word

COLUMNS = ("arm", "harmful complied", "harmless complied", "perplexity", "harmful after", "harmless after", "task after")


def _not_achieved(arm: str, tuning: Mapping[str, Any] | None) -> Markup:
    """What a study says whose tuning achieved nothing."""
    if tuning is None or tuning.get("achieved", True):
        return Markup("")
    return say(" <b>Not achieved</b> by {}: {}.", visible(arm, 40), visible(tuning["why"], 400))


def rsn_part(run: Run) -> Part:
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
    told = [(arm["arm"], arm.get("tuning")) for arm in result["arms"]]
    lead += Markup("").join(_not_achieved(arm, tuning) for arm, tuning in told)
    when = "after" if down["steps"] else "before"
    rows = [_dots(arm["arm"], arm[when]["harmful"]) for arm in result["arms"]]
    title = f"harmful requests complied with {when} the task" if down["steps"] else "harmful requests complied with"
    alternative = f"{title}: " + "; ".join(f"{row.label} {row.text}" for row in rows) + "."
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
    return Part(
        say("Safety through a fine-tune of {}", name(run.models[-1])),
        lead,
        [Figure(dot_figure(rows, title, domain=(-0.03, 1.03)), alternative, caption)],
        [Table("Every arm", COLUMNS, cells), differences],
    )


def stress_part(run: Run) -> Part:
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
    lead += _not_achieved("SN-Tune", result)
    columns = ("attack", "how much", "untuned", "tuned", "difference", "clear")
    return Part(
        say("Attacks on {}", name(run.models[-1])),
        lead,
        (),
        [Table(captioned("Means with 95\u00a0% intervals", result["curves"]), columns, rows)],
    )


def _dots(label: str, spread: Mapping[str, Any]) -> Row:
    seeds = [value for value in spread["by_seed"] if value is not None]
    return Row(visible(label, 40), spread["value"], spread["low"], spread["high"], interval(spread), dots=seeds)


def _clear(spread: Mapping[str, Any] | None) -> str:
    return NONE if spread is None else clear_word(spread)
