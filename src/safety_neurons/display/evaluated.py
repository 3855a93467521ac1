"""What evaluate, doctor, tune, repair and the studies around tuning found: harm and over-refusal, before and
after, under attack.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from markupsafe import Markup

from safety_neurons.counting import numbered
from safety_neurons.display.charts import INK, DotRow
from safety_neurons.display.lengths import length_figures, length_tables
from safety_neurons.display.parts import (
    ARM_COLUMNS,
    CAUTION,
    FACT,
    FAIL,
    NO,
    OPEN,
    PASS,
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

ARMS = ("baseline", "untreated", "treated")


_SIDES = (("harmful", "harm", "Harm"), ("harmless", "over_refusal", "Over-refusal"))


def evaluate_part(run: ReportedRun) -> DisplayPart:
    """One evaluation."""
    result = run.result
    arms = arms_of(result)
    heading = say("{}", name(result["model"]))
    if result["treatment"]:
        heading += say(" <span class=sub>{}</span>", visible(result["treatment"], 80))
    lead = Markup(
        "Harm is the share of answers to harmful requests that a judge calls harmful, or, by a judge of "
        "refusals, that comply; over-refusal is the share of harmless requests refused. What could not be "
        "judged is unscored and in no share. "
    )
    if result["gate"]:
        lead += (
            Markup("The gate is passed.")
            if result["gate"]["passed"]
            else say("{} of the gate’s thresholds missed.", _missed(result))
        )
    figures = [
        made for kind, measure, title in _SIDES if (made := _figure(arms, kind, measure, title)) is not None
    ]
    tables = [
        _suites_table(arms),
        *([_capability_table(result, arms)] if any(arm["capability"] for _, arm in arms) else []),
    ]
    if result["changes"]:
        tables.append(_changes_table(result))
    if result["agreement"]:
        tables.append(_agreement_table(result))
    if result["gate"] and result["gate"]["missed"]:
        tables.append(
            Table(
                "Thresholds of the gate that are missed",
                ["threshold"],
                [[visible(line, 200)] for line in result["gate"]["missed"]],
            )
        )
    tables += length_tables(run)
    return DisplayPart(heading, lead, [*figures, *length_figures(run)], tables, list(_group_tables(arms[-1])))


def evaluate_findings(run: ReportedRun) -> list[Finding]:
    """What an evaluation found, in a sentence for harm and over-refusal, and one for what is unscored."""
    result = run.result
    label, arm = arms_of(result)[-1]
    sentences = []
    for judge, rate in arm["harm"].items():
        refused = arm["over_refusal"].get(judge)
        over = say("; refuses {} of the harmless ones", interval(refused)) if refused else Markup("")
        text = say(
            "By <b>{}</b>, {} ({}) {} {} of the harmful requests",
            visible(judge, 40),
            name(result["model"]),
            label,
            "does harm on" if _says_harm(arm, judge) else "does not refuse",
            interval(rate),
        )
        sentences.append(Finding(FACT, text + over + Markup(".")))
        if rate["unscored"]:
            said = say(
                "{} left {} to harmful requests unscored.",
                visible(judge, 40),
                plural(rate["unscored"], "answer"),
            )
            sentences.append(Finding(CAUTION, said))
    if result["gate"]:
        passed = result["gate"]["passed"]
        text = (
            Markup("The gate is passed.")
            if passed
            else say("The gate is not passed: {}.", visible("; ".join(result["gate"]["missed"]), 300))
        )
        sentences.append(Finding(PASS if passed else FAIL, text))
    return sentences


def evaluate_tile(run: ReportedRun) -> Tile:
    """Harm by the first judge, over-refusal beside it."""
    result = run.result
    label, arm = arms_of(result)[-1]
    judge = next(iter(arm["harm"]), None)
    if judge is None:
        judge = next(iter(arm["over_refusal"]), "")
        return Tile(
            "Does it refuse too much?",
            FACT,
            interval(arm["over_refusal"].get(judge)),
            say("of harmless requests, by {}", visible(judge, 40)),
        )
    over = arm["over_refusal"].get(judge)
    beside = say("; over-refusal {}", interval(over)) if over else Markup("")
    verdict = FACT if not result["gate"] else PASS if result["gate"]["passed"] else FAIL
    return Tile(
        "How much harm is left?",
        verdict,
        interval(arm["harm"][judge]),
        say("of harmful requests, {}, by {}", label, visible(judge, 40)) + beside,
    )


def arms_of(result: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """The arms that were measured, the one that counts last."""
    return [(label, result[label]) for label in ARMS if result[label]]


def _says_harm(arm: Mapping[str, Any], judge: str) -> bool:
    """Whether a judge says what is harmful, and not only what is refused."""
    return any(
        entry["judges"].get(judge, {}).get("harm_is") == "harmful"
        for entry in arm["suites"]
        if entry["kind"] == "harmful"
    )


def _missed(result: Mapping[str, Any]) -> str:
    return count(len(result["gate"]["missed"]))


def _rows(
    arms: Sequence[tuple[str, Mapping[str, Any]]], kind: str, measure: str
) -> Iterator[tuple[str, str, Mapping[str, Any], Any, str]]:
    """Suite, judge, what the judge says, its rate, and the arm, for every rate there is."""
    for entry in arms[-1][1]["suites"]:
        for judge in entry["judges"] if entry["kind"] == kind else []:
            for label, arm in arms:
                other = next(
                    (one for one in arm["suites"] if (one["suite"], one["kind"]) == (entry["suite"], kind)),
                    None,
                )
                judged = {} if other is None else other["judges"].get(judge, {})
                if judged.get(measure) is not None:
                    yield entry["suite"], judge, judged, judged[measure], label


def _figure(
    arms: Sequence[tuple[str, Mapping[str, Any]]], kind: str, measure: str, title: str
) -> Figure | None:
    found = list(_rows(arms, kind, measure))
    if not found:
        return None
    several, suites, judges = len(arms) > 1, {suite for suite, *_ in found}, {judge for _, judge, *_ in found}
    rows = []
    for suite, judge, _, rate, label in found:
        last = several and label == arms[-1][0]
        words = [label] if several else []
        words += [visible(judge, 16)] if len(judges) > 1 else []
        words += [_short(suite)] if len(suites) > 1 or not words else []
        rows.append(estimate_row(", ".join(words), rate, TREATED if last else (INK, "circle")))
    caption = say("<b>{}</b>, every suite by every judge. Bars are 95\u00a0% intervals over prompts.", title)
    return dots_of(rows, title.lower(), caption, title)


def _short(suite: str) -> str:
    return visible(suite.removeprefix("builtin:"), 28)


def _suites_table(arms: Sequence[tuple[str, Mapping[str, Any]]]) -> Table:
    rows = []
    for kind, measure, _ in _SIDES:
        found: dict[tuple[str, str], dict[str, Any]] = {}
        for suite, judge, judged, rate, label in _rows(arms, kind, measure):
            row = found.setdefault(
                (suite, judge), {"word": judged.get("harm_is") if measure == "harm" else "over-refusal"}
            )
            row[label] = rate
        for (suite, judge), row in found.items():
            last = row[[label for label, _ in arms if label in row][-1]]
            cells = [interval(row.get(label)) for label, _ in arms]
            rows.append(
                [
                    _short(suite),
                    visible(row["word"], 20),
                    visible(judge, 40),
                    *cells,
                    count(last["n"]),
                    count(last["unscored"]),
                    _cut_off(arms[-1][1], suite, kind),
                ]
            )
    columns = ["suite", "measure", "judge", *(label for label, _ in arms), "n", "unscored", "cut off"]
    return Table("Every suite by every judge; 95\u00a0% intervals", columns, rows)


def _cut_off(arm: Mapping[str, Any], suite: str, kind: str) -> str:
    """Answers of a suite that ended at the limit of tokens."""
    entry = next(one for one in arm["suites"] if (one["suite"], one["kind"]) == (suite, kind))
    return count(entry.get("cut_off"))


def _capability_table(result: Mapping[str, Any], arms: Sequence[tuple[str, Mapping[str, Any]]]) -> Table:
    drops = {change["task"]: change for change in result["capability_changes"]}
    tasks = dict.fromkeys((entry["task"], entry["metric"]) for _, arm in arms for entry in arm["capability"])
    rows = []
    for task, metric in tasks:
        cells = [
            interval(next((entry for entry in arm["capability"] if entry["task"] == task), None))
            for _, arm in arms
        ]
        change = drops.get(task)
        lost = NONE if change is None or change["drop"] is None else share(change["drop"])
        if change is not None and change["drop"] is not None and change["drop_low"] is not None:
            lost += f" [{share(change['drop_low'])}, {share(change['drop_high'])}]"
        rows.append([visible(_base(task), 40), visible(metric, 30), *cells, lost])
    return Table(
        "Capability; lost is the share of the value before",
        ["task", "metric", *(label for label, _ in arms), "lost"],
        rows,
    )


def _base(task: str) -> str:
    """A task without the folders of its file."""
    kind, _, source = task.partition(":")
    return f"{kind}: {source.replace(chr(92), '/').rstrip('/').split('/')[-1]}" if source else task


def _changes_table(result: Mapping[str, Any]) -> Table:
    rows = []
    for change in result["changes"]:
        difference, test = change["difference"], change["mcnemar"]
        noise = (
            NONE
            if change["above_noise"] is None
            else f"{number(change['noise_floor'])} ({'above' if change['above_noise'] else 'within'})"
        )
        p = NONE if test is None or test["p"] is None else f"{test['p']:.2g}"
        words = [clear_word(difference), p, noise]
        measure = visible(change["measure"].replace("_", "-"), 20)
        rows.append(
            [
                _short(change["suite"]),
                measure,
                visible(change["judge"], 40),
                interval(difference, signed=True),
                *words,
            ]
        )
    columns = ["suite", "measure", "judge", "difference", "clear", "McNemar p", "noise floor"]
    return Table(
        captioned("What changed, paired over prompts; 95\u00a0% intervals", result["changes"]), columns, rows
    )


def _agreement_table(result: Mapping[str, Any]) -> Table:
    rows = [
        [
            f"{visible(pair['first'], 40)}, {visible(pair['second'], 40)}",
            visible(pair["kind"], 10),
            interval(pair["kappa"]),
            interval(pair["same"]),
        ]
        for pair in result["agreement"]
    ]
    return Table(
        "Agreement of two judges beyond chance", ["judges", "requests", "Cohen’s κ", "same verdict"], rows
    )


def _group_tables(last: tuple[str, Mapping[str, Any]]) -> Iterator[Table]:
    """Of the arm that counts the rates by category, language and attack."""
    label, arm = last
    for entry in arm["suites"]:
        measure = "harm" if entry["kind"] == "harmful" else "over_refusal"
        for what, groups in entry["by"].items():
            judges = [judge for judge in entry["judges"] if measure in entry["judges"][judge]]
            rows = [
                [
                    visible(group["value"], 60),
                    count(group["n"]),
                    *(interval(group["judges"][judge].get(measure)) for judge in judges),
                ]
                for group in groups
            ]
            title = f"{measure.replace('_', '-')} on {_short(entry['suite'])} by {what}, {label}"
            yield Table(title, [what, "n", *(visible(judge, 40) for judge in judges)], rows)


def checks_table(run: ReportedRun) -> Table:
    """The doctor's checks."""
    words = {
        True: Markup('<span class="verdict yes">pass</span>'),
        False: Markup('<span class="verdict no">fail</span>'),
        None: "informs",
    }
    rows = [
        [
            visible(check["check"], 80),
            words[check["passed"]],
            visible(check["measured"], 300),
            visible(NONE if check["allowed"] is None else check["allowed"], 80),
        ]
        for check in run.result["checks"]
    ]
    return Table("Experiments on the model itself", ["check", "outcome", "measured", "allowed"], rows)


def doctor_part(run: ReportedRun) -> DisplayPart:
    """The doctor's checks."""
    return DisplayPart(say("Checks on {}", name(run.result["model"])), tables=[checks_table(run)])


def doctor_findings(run: ReportedRun) -> list[Finding]:
    """Whether the checks pass."""
    checks = run.result["checks"]
    failed = [visible(check["check"], 80) for check in checks if check["passed"] is False]
    held = sum(check["passed"] is True for check in checks)
    if failed:
        text = "{} of the checks fail on {} ({}): numbers found on it are not to be trusted."
        return [Finding(FAIL, say(text, len(failed), name(run.result["model"]), ", ".join(failed)))]
    return [Finding(PASS, say("All {} checks with a limit pass on {}.", held, name(run.result["model"])))]


def doctor_tile(run: ReportedRun) -> Tile:
    """How many checks pass."""
    checks = [check for check in run.result["checks"] if check["passed"] is not None]
    held = sum(bool(check["passed"]) for check in checks)
    verdict = PASS if held == len(checks) else FAIL
    return Tile(
        "Is the model understood?",
        verdict,
        f"{held} of {len(checks)}",
        Markup("checks on the model itself pass"),
    )


def tune_part(run: ReportedRun) -> DisplayPart:
    """Before and after, and what held-out prompts said on the way."""
    result = run.result
    heading = say("{} tuned in {}", plural(result["n_neurons"], "neuron"), name(run.model))
    lead = say(
        (
            "{} trained, {} of the model, in {} of {} ({}); the state of step {} is kept. Everything outside "
            "the set is {}."
        ),
        plural(result["trained_parameters"], "parameter"),
        share(result["share_of_parameters"], 2),
        count(result["steps"]),
        plural(result["planned_steps"], "step"),
        visible(result["stopped"], 60),
        count(result["kept_step"]),
        {True: "bit for bit as it was", False: "NOT as it was"}.get(
            result["frozen_unchanged"], "taken to be as it was (not looked at)"
        ),
    )
    if result.get("survives_cast") is not None:
        lead += say(
            " {} of the changed weights survive the cast to the model’s type.", share(result["survives_cast"])
        )
    figures = [
        _refusals(
            result,
            "harmful_refused",
            "harmful requests refused",
            "Refusals of harmful requests: what tuning is for.",
        ),
        _refusals(
            result,
            "harmless_refused",
            "harmless requests refused",
            "Refusals of harmless requests: its price.",
        ),
    ]
    rows = [arm_row(arm, result[arm]) for arm in ("before", "after")]
    checks = [
        [
            count(each["step"])
            + (
                f", {each['share']:.0%} of the way".replace("%", "\u00a0%")
                if each.get("share", 1) < 1
                else ""
            ),
            interval(each["harmful_refused"]),
            interval(each["harmless_refused"]),
            number(each["divergence"], 3),
        ]
        for each in result["checks"]
    ]
    columns = ["step", "harmful refused", "harmless refused", "KL per token of the answers, nats"]
    details = (
        [Table("Checks while training, on prompts held out of the data", columns, checks)] if checks else []
    )
    return DisplayPart(
        heading,
        lead,
        figures,
        [Table("Before and after; shares with 95\u00a0% intervals", ARM_COLUMNS, rows)],
        details,
    )


def _refusals(result: Mapping[str, Any], what: str, title: str, caption: str) -> Figure:
    rows = [
        estimate_row("before", result["before"][what]),
        estimate_row("after", result["after"][what], TREATED),
    ]
    return dots_of(rows, title, say("<b>{}</b> Bars are 95\u00a0% intervals.", caption))


def verdict_of(run: ReportedRun) -> str:
    """Whether tuning achieved what it is for."""
    change = run.result["change"]
    if change["value"] is None:
        return OPEN
    return (
        YES if run.result.get("achieved", is_clear(change) and change["value"] > 0) else NO
    )  # runs of earlier versions do not say


def tune_findings(run: ReportedRun) -> list[Finding]:
    """The sentences of a tune run."""
    result = run.result
    before, after = result["before"], result["after"]
    text = say(
        (
            "Training {} of {} ({} of its parameters) takes refusals of harmful requests from {} to {}; "
            "paired change {}"
        ),
        plural(result["n_neurons"], "neuron"),
        name(run.model),
        share(result["share_of_parameters"], 2),
        interval(before["harmful_refused"]),
        interval(after["harmful_refused"]),
        interval(result["change"], signed=True),
    )
    if "why" in result:
        text = say(
            "{}: {}. {}",
            "Achieved" if result["achieved"] else "Not achieved",
            visible(result["why"], 400),
            text,
        )
    made = [Finding(verdict_of(run), text + Markup(".")), price(before, after)]
    if result["frozen_unchanged"] is False:
        made.append(Finding(FAIL, say("In {}, weights outside the set changed.", name(run.label))))
    return made


def tune_tile(run: ReportedRun) -> Tile:
    """The question of the first screen."""
    text = say(
        "change of refusals of harmful requests by tuning {}", plural(run.result["n_neurons"], "neuron")
    )
    return Tile(
        "Does tuning them make it safer?", verdict_of(run), interval(run.result["change"], signed=True), text
    )


COLUMNS = (
    "arm",
    "harmful complied",
    "harmless complied",
    "perplexity",
    "harmful after",
    "harmless after",
    "task after",
)


TIMES = ("before", "after")
JUDGED = ("arm", *(f"{what} {at}" for at in TIMES for what in ("refused", "harmed", "cut off")))
PAIRED = {"before": "before", "after": "after", "harm_before": "harm before", "harm_after": "harm after"}
"""By name of a paired difference its column; harm is by its judge."""


def repair_part(run: ReportedRun) -> DisplayPart:
    """What was put back."""
    result = run.result
    text = "{} put back: {} of {} differed"
    lead = say(
        text,
        plural(result["n_neurons"], "neuron"),
        count(result["changed"]),
        plural(result["n_entries"], "weight"),
    )
    if result["adapter_changed"]:
        lead += say(", {} of adapters cleared", numbered(result["adapter_changed"], "entry", "entries"))
    return DisplayPart(say("Repair of {}", name(run.model)), lead + Markup("."))


def rsn_part(run: ReportedRun) -> DisplayPart:
    """Arms before and after the downstream fine-tune."""
    result, safety = run.result, run.result["sets"]["safety"]
    down = result["downstream"]
    lead = say(
        "{} ({} of the parameters) tuned with {}, then {} of {} fine-tuning on the task; {} of the safety "
        "neurons are foundation neurons too. Shares are means over seeds and prompts with 95\u00a0% "
        "intervals; 100 times the first column is the harmful score.",
        plural(safety["n_neurons"], "neuron"),
        share(safety["share_of_parameters"], 2),
        plural(len(result["seeds"]), "seed"),
        plural(down["steps"], "step"),
        visible(down["how"], 20),
        share(result["sets"]["shared_share"], 0),
    )
    when = "after" if down["steps"] else "before"
    rows = [_seeds(arm["arm"], arm[when]["harmful"]) for arm in result["arms"]]
    title = (
        f"harmful requests complied with {when} the task"
        if down["steps"]
        else "harmful requests complied with"
    )
    caption = say(
        "<b>{}.</b> Bars are 95\u00a0% intervals over seeds and prompts, faint dots single seeds.",
        title.capitalize(),
    )
    cells: list[list[Cell]] = []
    for arm in result["arms"]:
        before, after = arm["before"], arm["after"]
        shown = [
            interval(before["harmful"]),
            interval(before["harmless"]),
            number(before["perplexity"]["value"]),
        ]
        cells.append(
            [
                visible(arm["arm"], 40),
                *shown,
                interval(after["harmful"]),
                interval(after["harmless"]),
                interval(after["task"]),
            ]
        )
    # Runs of earlier versions have no differences of harm.
    pairs = [
        [
            visible(pair, 60),
            *(interval(found.get(name), signed=True) for name in PAIRED),
            _clear(found[when]),
            _clear(found.get(f"harm_{when}")),
        ]
        for pair, found in result["differences"].items()
    ]
    differences = Table(
        captioned("Paired differences of harmful requests complied with, and of harm", result["differences"]),
        ("arms", *PAIRED.values(), f"clear {when}", f"harm clear {when}"),
        pairs,
    )
    judged = [
        [
            visible(arm["arm"], 40),
            *(
                cell
                for at in TIMES
                for cell in (
                    *(interval(arm[at][kind]) for kind in ("refused", "harmed")),
                    count(arm[at].get("cut_off")),
                )
            ),
        ]
        for arm in result["arms"]
        if arm["before"].get("refused")  # runs of earlier versions do not say
    ]
    tables = [Table("Every arm", COLUMNS, cells), differences]
    if judged:
        tables.insert(1, Table("Refusal and harm by their judges; answers cut off", JUDGED, judged))
    return DisplayPart(
        say("Safety through a fine-tune of {}", name(run.model)),
        lead,
        [dots_of(rows, title, caption)],
        tables,
    )


def stress_part(run: ReportedRun) -> DisplayPart:
    """Curves under attack, before and after tuning."""
    result = run.result
    rows, others = list[list[Cell]](), list[list[Cell]]()
    for point in result["curves"]:
        whole = point["attack"] not in ("prune", "prune random", "subtraction")
        amount = count(point["amount"]) if whole else f"{point['amount']:g}"
        what: list[Cell] = [visible(point["attack"], 40), amount]
        difference = interval(point["difference"], signed=True)
        rates = [interval(point[side]) for side in ("before", "after")]
        rows.append([*what, *rates, difference, clear_word(point["difference"])])
        if "refused" in point:
            pairs = [point[kind][side] for kind in ("refused", "harmed") for side in ("before", "after")]
            text = [number(point["perplexity"][side]["value"]) for side in ("before", "after")]
            cut = point.get("cut_off") or {}
            others.append(
                [
                    *what,
                    *map(interval, pairs),
                    interval(point.get("harm_difference"), signed=True),
                    clear_word(point["harm_difference"]) if point.get("harm_difference") else NONE,
                    *text,
                    *(count(cut.get(side)) for side in ("before", "after")),
                ]
            )
    lead = say(
        "Harmful requests complied with while the model is attacked, over {}: shares of the set that are "
        "switched off (random ones as a control), directions taken out of the residual stream, what is left "
        "of the tuned change, steps of LoRA tuning on harmful answers, steps on the task.",
        plural(len(result["seeds"]), "seed"),
    )
    columns = ("attack", "how much", "untuned", "tuned", "difference", "clear")
    tables = [Table(captioned("Means with 95\u00a0% intervals", result["curves"]), columns, rows)]
    if others:
        tables.append(
            Table(
                captioned("Refusal and harm by their judges, perplexity, answers cut off", result["curves"]),
                ATTACKED,
                others,
            )
        )
    if result.get("directions"):
        tables.append(Table("Directions that abliteration took out", DIRECTIONS, _directions(result)))
    return DisplayPart(say("Attacks on {}", name(run.model)), lead, (), tables)


ATTACKED = (
    *("attack", "how much", "untuned refuses", "tuned refuses", "untuned harms", "tuned harms"),
    *("difference of harm", "clear", "untuned perplexity", "tuned perplexity"),
    *("untuned cut off", "tuned cut off"),
)
DIRECTIONS = ("model", "seed", "layer", "attack", "directions", "share of the stream before", "after")


def _directions(result: Mapping[str, Any]) -> list[list[Cell]]:
    return [
        [
            visible(found["state"], 40),
            count(found["seed"]),
            count(found["layer"]),
            visible(one["attack"], 40),
            count(one["directions"]),
            number(one["before"]),
            number(one["after"]),
        ]
        for found in result["directions"]
        for one in found["along"]
    ]


def _seeds(label: str, found: Mapping[str, Any]) -> DotRow:
    return estimate_row(label, found, dots=[value for value in found["by_seed"] if value is not None])


def _clear(spread: Mapping[str, Any] | None) -> str:
    return NONE if spread is None else clear_word(spread)
