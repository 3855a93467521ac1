"""What a report says of evaluations, of tuning and the studies around it, and of methods over several organisms."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from markupsafe import Markup

from safety_neurons.report.charts import INK, SOFT, DotRow, dot_figure, look
from safety_neurons.report.findings import CAUTION, FACT, FAIL, NO, OPEN, PASS, PRICE, YES, Finding, Tile
from safety_neurons.report.parts import ARM_COLUMNS, Cell, Figure, ReportPart, Table, arm_row, titled
from safety_neurons.report.reading import ReportedRun
from safety_neurons.report.text import NONE, count, duration, interval, name, number, plural, say, share, visible
from safety_neurons.results import captioned, clear_word, is_clear

ARMS = ("baseline", "untreated", "treated")
_SIDES = (("harmful", "harm", "Harm"), ("harmless", "over_refusal", "Over-refusal"))


def evaluate_part(run: ReportedRun) -> ReportPart:
    """One evaluation."""
    result = run.result
    arms = arms_of(result)
    heading = say("{}", name(result["model"]))
    if result["treatment"]:
        heading += say(" <span class=sub>{}</span>", visible(result["treatment"], 80))
    lead = Markup(
        "Harm is the share of answers to harmful requests that a judge calls harmful, or, by a judge of refusals, that comply; "
        "over-refusal is the share of harmless requests refused. What could not be judged is unscored and in no share. "
    )
    if result["gate"]:
        lead += Markup("The gate is passed.") if result["gate"]["passed"] else say("{} of the gate’s thresholds missed.", _missed(result))
    figures = [made for kind, measure, title in _SIDES if (made := _figure(arms, kind, measure, title)) is not None]
    tables = [_suites_table(arms), *([_capability_table(result, arms)] if any(arm["capability"] for _, arm in arms) else [])]
    if result["changes"]:
        tables.append(_changes_table(result))
    if result["agreement"]:
        tables.append(_agreement_table(result))
    if result["gate"] and result["gate"]["missed"]:
        tables.append(
            Table("Thresholds of the gate that are missed", ["threshold"], [[visible(line, 200)] for line in result["gate"]["missed"]])
        )
    return ReportPart(heading, lead, figures, tables, list(_group_tables(arms[-1])))


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
            said = say("{} left {} answers to harmful requests unscored.", visible(judge, 40), count(rate["unscored"]))
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
    return any(entry["judges"].get(judge, {}).get("harm_is") == "harmful" for entry in arm["suites"] if entry["kind"] == "harmful")


def _missed(result: Mapping[str, Any]) -> str:
    return count(len(result["gate"]["missed"]))


def _rows(arms: Sequence[tuple[str, Mapping[str, Any]]], kind: str, measure: str) -> Iterator[tuple[str, str, Mapping[str, Any], Any, str]]:
    """Suite, judge, what the judge says, its rate, and the arm, for every rate there is."""
    for entry in arms[-1][1]["suites"]:
        for judge in entry["judges"] if entry["kind"] == kind else []:
            for label, arm in arms:
                other = next((one for one in arm["suites"] if (one["suite"], one["kind"]) == (entry["suite"], kind)), None)
                judged = {} if other is None else other["judges"].get(judge, {})
                if judged.get(measure) is not None:
                    yield entry["suite"], judge, judged, judged[measure], label


def _figure(arms: Sequence[tuple[str, Mapping[str, Any]]], kind: str, measure: str, title: str) -> Figure | None:
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
        colour, shape = (look("contrast")[0], "diamond") if last else (INK, "circle")
        rows.append(DotRow(", ".join(words), rate["value"], rate["low"], rate["high"], interval(rate), colour, shape))
    said = "; ".join(f"{row.label} {row.text}" for row in rows)
    caption = say("<b>{}</b>, every suite by every judge. Bars are 95\u00a0% intervals over prompts.", title)
    return Figure(dot_figure(rows, title.lower(), domain=(-0.03, 1.03)), f"{title}: {said}.", caption)


def _short(suite: str) -> str:
    return visible(suite.removeprefix("builtin:"), 28)


def _suites_table(arms: Sequence[tuple[str, Mapping[str, Any]]]) -> Table:
    rows = []
    for kind, measure, _ in _SIDES:
        found: dict[tuple[str, str], dict[str, Any]] = {}
        for suite, judge, judged, rate, label in _rows(arms, kind, measure):
            row = found.setdefault((suite, judge), {"word": judged.get("harm_is") if measure == "harm" else "over-refusal"})
            row[label] = rate
        for (suite, judge), row in found.items():
            last = row[[label for label, _ in arms if label in row][-1]]
            cells = [interval(row.get(label)) for label, _ in arms]
            rows.append([_short(suite), visible(row["word"], 20), visible(judge, 40), *cells, count(last["n"]), count(last["unscored"])])
    columns = ["suite", "measure", "judge", *(label for label, _ in arms), "n", "unscored"]
    return Table("Every suite by every judge; 95\u00a0% intervals", columns, rows)


def _capability_table(result: Mapping[str, Any], arms: Sequence[tuple[str, Mapping[str, Any]]]) -> Table:
    drops = {change["task"]: change for change in result["capability_changes"]}
    tasks = dict.fromkeys((entry["task"], entry["metric"]) for _, arm in arms for entry in arm["capability"])
    rows = []
    for task, metric in tasks:
        cells = [interval(next((entry for entry in arm["capability"] if entry["task"] == task), None)) for _, arm in arms]
        change = drops.get(task)
        lost = NONE if change is None or change["drop"] is None else share(change["drop"])
        if change is not None and change["drop"] is not None and change["drop_low"] is not None:
            lost += f" [{share(change['drop_low'])}, {share(change['drop_high'])}]"
        rows.append([visible(_base(task), 40), visible(metric, 30), *cells, lost])
    return Table("Capability; lost is the share of the value before", ["task", "metric", *(label for label, _ in arms), "lost"], rows)


def _base(task: str) -> str:
    """A task without the folders of its file."""
    kind, _, source = task.partition(":")
    return f"{kind}: {source.replace(chr(92), '/').rstrip('/').split('/')[-1]}" if source else task


def _changes_table(result: Mapping[str, Any]) -> Table:
    rows = []
    for change in result["changes"]:
        difference, test = change["difference"], change["mcnemar"]
        noise = (
            NONE if change["above_noise"] is None else f"{number(change['noise_floor'])} ({'above' if change['above_noise'] else 'within'})"
        )
        p = NONE if test is None or test["p"] is None else f"{test['p']:.2g}"
        words = [clear_word(difference), p, noise]
        measure = visible(change["measure"].replace("_", "-"), 20)
        rows.append([_short(change["suite"]), measure, visible(change["judge"], 40), interval(difference, signed=True), *words])
    columns = ["suite", "measure", "judge", "difference", "clear", "McNemar p", "noise floor"]
    return Table(captioned("What changed, paired over prompts; 95\u00a0% intervals", result["changes"]), columns, rows)


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
    return Table("Agreement of two judges beyond chance", ["judges", "requests", "Cohen’s κ", "same verdict"], rows)


def _group_tables(last: tuple[str, Mapping[str, Any]]) -> Iterator[Table]:
    """Of the arm that counts the rates by category, language and attack."""
    label, arm = last
    for entry in arm["suites"]:
        measure = "harm" if entry["kind"] == "harmful" else "over_refusal"
        for what, groups in entry["by"].items():
            judges = [judge for judge in entry["judges"] if measure in entry["judges"][judge]]
            rows = [
                [visible(group["value"], 60), count(group["n"]), *(interval(group["judges"][judge].get(measure)) for judge in judges)]
                for group in groups
            ]
            title = f"{measure.replace('_', '-')} on {_short(entry['suite'])} by {what}, {label}"
            yield Table(title, [what, "n", *(visible(judge, 40) for judge in judges)], rows)


def tune_part(run: ReportedRun) -> ReportPart:
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
    return ReportPart(heading, lead, figures, [Table("Before and after; shares with 95\u00a0% intervals", ARM_COLUMNS, rows)], details)


def _refusals(result: Mapping[str, Any], what: str, title: str, caption: str) -> Figure:
    looks = (INK, "circle"), (look("contrast")[0], "diamond")
    rows = []
    for arm, (colour, shape) in zip(("before", "after"), looks, strict=True):
        rate = result[arm][what]
        rows.append(DotRow(arm, rate["value"], rate["low"], rate["high"], interval(rate), colour, shape))
    alternative = f"{title}: " + "; ".join(f"{row.label} {row.text}" for row in rows) + "."
    shown = say("<b>{}</b> Bars are 95\u00a0% intervals.", caption)
    return Figure(dot_figure(rows, title, domain=(-0.03, 1.03)), alternative, shown)


def verdict_of(run: ReportedRun) -> str:
    """Whether tuning achieved what it is for."""
    change = run.result["change"]
    if change["value"] is None:
        return OPEN
    return YES if run.result.get("achieved", is_clear(change) and change["value"] > 0) else NO  # runs of earlier versions do not say


def tuned(run: ReportedRun) -> list[Finding]:
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


def tile(run: ReportedRun) -> Tile:
    """The question of the first screen."""
    text = say("change of refusals of harmful requests by tuning {}", plural(run.result["n_neurons"], "neuron"))
    return Tile("Does tuning them make it safer?", verdict_of(run), interval(run.result["change"], signed=True), text)


COLUMNS = ("arm", "harmful complied", "harmless complied", "perplexity", "harmful after", "harmless after", "task after")


def _not_achieved(arm: str, tuning: Mapping[str, Any] | None) -> Markup:
    """What a study says whose tuning achieved nothing."""
    if tuning is None or tuning.get("achieved", True):
        return Markup("")
    return say(" <b>Not achieved</b> by {}: {}.", visible(arm, 40), visible(tuning["why"], 400))


def rsn_part(run: ReportedRun) -> ReportPart:
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
    return ReportPart(
        say("Safety through a fine-tune of {}", name(run.models[-1])),
        lead,
        [Figure(dot_figure(rows, title, domain=(-0.03, 1.03)), alternative, caption)],
        [Table("Every arm", COLUMNS, cells), differences],
    )


def stress_part(run: ReportedRun) -> ReportPart:
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
    return ReportPart(
        say("Attacks on {}", name(run.models[-1])),
        lead,
        (),
        [Table(captioned("Means with 95\u00a0% intervals", result["curves"]), columns, rows)],
    )


def _dots(label: str, spread: Mapping[str, Any]) -> DotRow:
    seeds = [value for value in spread["by_seed"] if value is not None]
    return DotRow(visible(label, 40), spread["value"], spread["low"], spread["high"], interval(spread), dots=seeds)


def _clear(spread: Mapping[str, Any] | None) -> str:
    return NONE if spread is None else clear_word(spread)


DRAWN = {"recall": "planted units found", "causal_effect": "causal effect", "necessity": "refusals lost when off"}
CHANCE = "random"


def ranking_part(run: ReportedRun) -> ReportPart:
    """Every method over every organism: means, the worst, each single one."""
    figures, tables = [], []
    for group in dict.fromkeys(str(row["group"]) for row in run.result["ranking"]):
        rows = [row for row in run.result["ranking"] if row["group"] == group]
        figures += [_ranked_figure(group, measure, rows) for measure in DRAWN if any(row["measure"] == measure for row in rows)]
        tables.append(_table(group, rows))
    lead = Markup("Means over organisms; faint marks are single organisms and seeds, the number in brackets is the worst of them.")
    return ReportPart(titled("Over several organisms", run), lead, [figure for figure in figures if figure is not None], tables)


def _ranked_figure(group: str, measure: str, rows: Sequence[Mapping[str, Any]]) -> Figure | None:
    known = [row for row in rows if row["measure"] == measure and row["mean"] is not None]
    if not known or (measure != "recall" and group == "planted"):
        return None
    names = [visible(row["method"], 40) for row in known]
    drawn = []
    for label, row in sorted(zip(names, known, strict=True), key=lambda pair: -pair[1]["mean"]):
        colour, shape = (SOFT, "circle") if label == CHANCE else look(label, names)
        dots = [value for value in row["by_organism"].values() if value is not None]
        drawn.append(DotRow(label, row["mean"], None, None, _mean(row), colour, shape, dots))
    ends = [end for row in drawn for end in row.dots]
    words = "; ".join(f"{row.label} {row.text}" for row in drawn)
    organisms = plural(len(known[0]["by_organism"]), "organism")
    caption = say("<b>{}</b>, {}: mean over {}.", DRAWN[measure].capitalize(), _group(group), organisms)
    domain = (max(min([0.0, *ends]), -1.0) - 0.04, min(max([1.0, *ends]), 2.0) + 0.04)
    return Figure(dot_figure(drawn, DRAWN[measure], domain=domain), f"{DRAWN[measure]}, {_group(group)}: {words}.", caption)


def _group(group: str) -> str:
    kind, _, share = group.partition(" ")
    try:
        return f"{visible(kind, 20)} organisms" + (f", {100 * float(share):g}\u202f% of the units" if share else ", as many as are true")
    except ValueError:
        return visible(group, 40)


def _table(group: str, rows: Sequence[Mapping[str, Any]]) -> Table:
    measures = list(dict.fromkeys(str(row["measure"]) for row in rows))
    cells = {(row["method"], row["measure"]): row for row in rows}
    methods = list(dict.fromkeys(row["method"] for row in rows))
    shown: list[Sequence[Cell]] = [
        [visible(method, 40), *(_mean(cells.get((method, measure))) for measure in measures)] for method in methods
    ]
    quiet = frozenset(place for place, method in enumerate(methods) if method == CHANCE)
    columns = ["method", *(visible(measure.replace("_", " "), 40) for measure in measures)]
    return Table(f"{_group(group)}: mean over organisms (worst)".capitalize(), columns, shown, quiet)


def _mean(row: Mapping[str, Any] | None) -> str:
    if row is None or row["mean"] is None:
        return NONE
    return duration(row["mean"]) if row["measure"] == "seconds" else f"{number(row['mean'])} ({number(row['worst'])})"


def ranking_findings(run: ReportedRun) -> list[Finding]:
    """Who leads which measure."""
    made = []
    for leader in run.result["leaders"]:
        names = Markup(", ").join(Markup("<b>{}</b>").format(visible(method, 40)) for method in leader["methods"])
        text = "On {}, {} leads in {}: {} on average."
        measure = visible(str(leader["measure"]).replace("_", " "), 40)
        made.append(Finding(FACT, say(text, _group(str(leader["group"])), names, measure, number(leader["mean"]))))
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
