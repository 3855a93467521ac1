"""What guards are worth: their fit, what they catch and miss, what they cost, beside baselines."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from markupsafe import Markup

from safety_neurons.display.charts import COLOURS, INK, DotRow, Line, Plane, line_figure
from safety_neurons.display.parts import (
    CAUTION,
    FACT,
    NO,
    OPEN,
    YES,
    Cell,
    DisplayPart,
    Figure,
    Finding,
    ReportedRun,
    Table,
    Tile,
    dots_of,
)
from safety_neurons.display.text import NONE, SPACE, count, name, number, plural, say, share, visible
from safety_neurons.display.text import interval as with_digits
from safety_neurons.errors import InputError
from safety_neurons.results import captioned, is_clear, read_json

OURS = "guard"


interval = partial(with_digits, digits=3)
"""Areas and rates near 1 need a third digit."""


def percent(rate: float) -> str:
    """A rate that somebody chose: 5\u202f%, 0.1\u202f%."""
    return f"{100 * rate:g}{SPACE}%"


def interval_of(value: Any) -> str:
    """A rate with its interval, or a bare number."""
    return interval(value) if isinstance(value, Mapping) else number(value, 3)


def baselines_table(result: Mapping[str, Any]) -> Table:
    """The guard and every classifier that needs no safety neurons."""
    entries = [{"name": OURS, **result}, *result["baselines"]]
    every, with_f1 = list(result["tpr_at_fpr"]), all("macro_f1" in entry for entry in entries)
    targets = [
        target
        for target in every
        if any(entry["tpr_at_fpr"][target]["value"] is not None for entry in entries)
    ]
    rows = []
    for entry in entries:
        difference = entry.get("difference") if entry["name"] != OURS else None
        rows.append(
            [
                visible(entry["name"], 40),
                interval(entry["auroc"]),
                NONE if difference is None else interval(difference, signed=True),
                interval(entry["average_precision"]),
                *([interval(entry["macro_f1"])] if with_f1 else []),
                *(_supported(entry["tpr_at_fpr"][target]) for target in targets),
                number(entry["expected_calibration_error"], 3),
            ]
        )
    rates = [f"unsafe flagged at {percent(float(target))} of the safe" for target in targets]
    columns = [
        "classifier",
        "AUROC",
        f"{visible(result['compared'], 20)} minus it",
        "average precision",
        *(["macro-F1 at one half"] if with_f1 else []),
        *rates,
        "calibration error",
    ]
    caption = (
        "The guard beside what needs no safety neurons; 95\u00a0% intervals, of random neurons the range "
        "of sets"
    )
    lacking = [percent(float(target)) for target in every if target not in targets]
    caption += f"; too few safe requests for a rate of {', '.join(lacking)}" if lacking else ""
    return Table(captioned(caption, result["baselines"]), columns, rows)


def _supported(rate: Mapping[str, Any]) -> str:
    return "too few safe requests" if rate["value"] is None and rate.get("why") else interval(rate)


def slices_table(title: str, rows: Sequence[Mapping[str, Any]]) -> Table:
    """One row a slice: what is flagged, the guard's area, and its difference from every other classifier."""
    names = list(dict.fromkeys(label for row in rows for label in row["auroc"]))
    others = list(dict.fromkeys(label for row in rows for label in row["difference"]))
    ours = [label for label in names if label not in others]
    rated = list(
        dict.fromkeys(
            (target, label)
            for row in rows
            for target, rates in (row.get("tpr_at_fpr") or {}).items()
            for label, rate in rates.items()
            if rate["value"] is not None
        )
    )
    cells = []
    for row in rows:
        against = f" (against {visible(row['against'], 20)})" if row["against"] else ""
        cells.append(
            [
                visible(row["value"], 60) + against,
                f"{count(row['n_unsafe'])} / {count(row['n_safe'])}",
                interval(row["flagged_unsafe"]) if row["n_unsafe"] else NONE,
                interval(row["flagged_safe"]) if row["n_safe"] else NONE,
                *(interval(row["auroc"].get(label)) for label in ours),
                *(interval(row["difference"].get(label), signed=True) for label in others),
                *(
                    interval((row.get("tpr_at_fpr") or {}).get(target, {}).get(label))
                    for target, label in rated
                ),
            ]
        )
    columns = [
        "requests",
        "unsafe / safe",
        "unsafe flagged",
        "safe flagged",
        *(f"AUROC, {visible(label, 24)}" for label in ours),
    ]
    return Table(
        captioned(title, rows),
        [
            *columns,
            *(f"minus {visible(label, 24)}" for label in others),
            *(f"TPR at {percent(float(target))} FPR, {visible(label, 24)}" for target, label in rated),
        ],
        cells,
    )


def outputs_table(found: Mapping[str, Any]) -> Table:
    """Unsafe outputs without and with the guard, by language."""
    rows: list[Sequence[Cell]] = [
        [
            visible(row["language"], 40),
            *(interval(row[part]) for part in ("before", "after", "cut", "blocked")),
        ]
        for row in [{"language": "all", **found}, *found["by"]]
    ]
    columns = ["requests", "unsafe outputs", "with the guard", "cut by", "safe requests blocked"]
    caption = (
        f"What the model writes, by {visible(found['judge'], 40)}; answers that were let "
        f"pass and differ: {count(found['changed'])}"
    )
    if "asked" in found:
        caption += (
            f"; AUROC for what is asked {interval(found['asked'])}, for what would be written "
            f"{interval(found['written'])}"
        )
        caption += (
            f"; unsafe requests without an unsafe answer to begin with: {count(found['refused_by_model'])}"
        )
    return Table(caption, columns, rows)


def answers_table(found: Mapping[str, Any]) -> Table:
    """Labelled answers that re-checks stop, by source."""
    rows: list[Sequence[Cell]] = [
        [
            visible(row["source"], 40),
            interval(row["auroc"]),
            interval(row["stopped_unsafe"]),
            interval(row["stopped_safe"]),
        ]
        for row in [*found["by"], found]
    ]
    caption = (
        f"Answers that were labelled before, read every {count(found['every'])} tokens, at threshold "
        f"{number(found['threshold'], 3)}{_unread(found['stopped_unsafe'], found['stopped_safe'])}"
    )
    return Table(caption, ["answers", "AUROC", "unsafe ones stopped", "safe ones stopped"], rows)


def counts_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """How many neurons, and whether it matters which."""
    settings = list(dict.fromkeys(row["setting"] for row in rows))
    known = {(row["method"], row["count"], row["setting"]): row for row in rows}
    cells: list[Sequence[Cell]] = []
    for method, size in dict.fromkeys((row["method"], row["count"]) for row in rows):
        found = [known.get((method, size, setting)) for setting in settings]
        shown = [NONE if row is None else _beside_random(row) for row in found]
        cells.append([f"{visible(method, 40)}, {count(size)}", *shown])
    columns = ["neurons by", *(visible(setting, 40) for setting in settings)]
    caption = "How many neurons, and which: AUROC (mean of random sets with as many in every matrix)"
    return Table(captioned(caption, rows), columns, cells)


def _beside_random(row: Mapping[str, Any]) -> str:
    area, random = row["auroc"], row["random"]
    value = area["value"] if isinstance(area, Mapping) else area
    difference = row["difference"]
    word = "" if not is_clear(difference) else ", better" if difference["value"] > 0 else ", worse"
    return f"{number(value, 3)} ({number(sum(random) / len(random), 3) if random else NONE}){word}"


SLICES = {
    "over_refusal": "safe requests that look unsafe",
    "attacks": "attacks",
    "perturbations": "perturbations",
    "lengths": "length",
}


def fit_part(run: ReportedRun) -> DisplayPart:
    """A guard as it was fit, or set anew after an update of the model."""
    result = run.result
    prompts = result["prompts"]
    lead = say(
        "{} read ({}), {} unsafe and {} safe prompts; probabilities by {}, expected calibration error {}; "
        "AUROC {} on prompts that neither fit nor chose anything. Threshold in force {} ({}).",
        plural(result["n_neurons"], "neuron"),
        visible(result["pooling"], 30),
        count(prompts["unsafe"]),
        count(prompts["safe"]),
        visible(result["calibration"], 20),
        number(result["expected_calibration_error"], 3),
        interval(result["auroc"]),
        number(result["threshold"], 3),
        visible(result["in_force"], 60),
    )
    if result.get("caught"):
        flagged = interval(result["caught"]), interval(result["false_positives"])
        lead += say(
            " There it catches {} of the unsafe prompts that set it and flags {} of the safe ones.", *flagged
        )
    if result.get("other"):
        told = result["other"]
        lead += say(
            " Of requests from another source ({}) it flags {} of the unsafe and ",
            visible(told["safe"], 60),
            interval(told["tpr"]),
        )
        lead += say("{} of the safe ones{}.", interval(told["fpr"]), _unread(told["tpr"], told["fpr"]))
    if result.get("conversations"):
        read = result["conversations"]
        text = (
            " Of conversations among them it flags {} of the unsafe and {} of the safe ones ({} and {} "
            "where each is read as a whole)."
        )
        lead += say(
            text, *(interval(read[rate]) for rate in ("tpr", "fpr", "tpr_read_whole", "fpr_read_whole"))
        )
    if result.get("recheck"):
        again = result["recheck"]
        text = (
            " A classifier for answers, which reads them every {} tokens, at threshold {}, stops {} of the "
            "unsafe answers and {} of the safe ones."
            if again.get("own")
            else " Re-checks every {} tokens, at threshold {}, stop {} of the answers to unsafe prompts "
            "and {} of those to safe ones."
        )
        lead += say(
            text,
            count(again["every"]),
            number(again["threshold"], 3),
            interval(again["tpr"]),
            interval(again["fpr"]),
        )
    if result.get("auroc_before"):
        lead += say(" On the model it was fit on the AUROC was {}.", interval(result["auroc_before"]))
    points = [
        [
            percent(point["fpr_target"]),
            number(point["threshold"], 3) if point["supported"] else NONE,
            interval(point["fpr"]),
            interval(point["tpr"]),
            "yes" if point["supported"] else visible(point["why"], 120),
        ]
        for point in result["operating_points"]
    ]
    columns = [
        "false-positive rate asked for",
        "threshold",
        "safe prompts flagged",
        "unsafe prompts flagged",
        "supported",
    ]
    tables = [
        Table(
            "Operating points; 95\u00a0% intervals. Without enough safe prompts a point has no threshold",
            columns,
            points,
        )
    ]
    details = []
    if len(result["poolings"]) > 1:
        rows = [
            [visible(each["pooling"], 30), interval_of(each["auroc"]), number(each["log_loss"], 3)]
            for each in result["poolings"]
        ]
        details.append(
            Table("How the prompt’s tokens are pooled, by validation", ["pooling", "AUROC", "log loss"], rows)
        )
    return DisplayPart(say("Guard on {}", name(result["model"])), lead, (), tables, details)


def _unread(*rates: Mapping[str, Any]) -> str:
    """That some requests are in none of the rates, where there are some."""
    unread = sum(rate.get("unscored") or 0 for rate in rates)
    return f" ({count(unread)} could not be read and are in neither share)" if unread else ""


def worth_part(run: ReportedRun) -> DisplayPart:
    """A guard beside its baselines."""
    result = run.result
    lead = say(
        (
            "{} ({}) on {} unsafe and {} safe requests. Baselines are fit by the guard’s own procedure; "
            "differences are paired over requests. "
        ),
        plural(result["n_neurons"], "neuron"),
        visible(result["pooling"], 30),
        count(result["n_unsafe"]),
        count(result["n_safe"]),
    )
    lead += say(
        "At the threshold in force ({}) it flags {} of the unsafe and {} of the safe ones{}.",
        visible(result["in_force"], 60),
        interval(result["flagged_unsafe"]),
        interval(result["flagged_safe"]),
        _unread(result["flagged_unsafe"], result["flagged_safe"]),
    )
    tables = [baselines_table(result)]
    details = [slices_table(f"By {column}", rows) for column, rows in result["tables"].items()]
    details += [slices_table(f"By {words}", result[part]) for part, words in SLICES.items() if result[part]]
    for column, rows in (result.get("leave_out") or {}).items():
        tables.append(slices_table(f"Left out of fitting: every {visible(column, 30)} once", rows))
    if result.get("outputs"):
        tables.append(outputs_table(result["outputs"]))
    if result.get("answers"):
        tables.append(answers_table(result["answers"]))
    if result.get("counts"):
        tables.append(counts_table(result["counts"]))
    return DisplayPart(say("Guard of {}", name(run.model)), lead, _figures(run), tables, details)


def _figures(run: ReportedRun) -> list[Figure]:
    areas = _areas(run.result)
    rows = [
        DotRow(
            visible(label, 30),
            area["value"],
            area["low"],
            area["high"],
            interval(area),
            COLOURS[0] if label == OURS else INK,
            "diamond" if label == OURS else "circle",
            area.get("sets") or (),
        )
        for label, area in areas
    ]
    lowest = min((row.low for row in rows if row.low is not None), default=0.5)
    near = lowest > 0.75
    domain = (
        (lowest - 0.15 * (1.005 - lowest), 1.0 + 0.05 * (1.005 - lowest))
        if near
        else (max(0.0, min(0.45, lowest) - 0.03), 1.01)
    )
    caption = Markup(
        "<b>Area under the ROC curve</b>: how often an unsafe request scores above a safe one; 0.5 is "
        "chance. Bars are "
    )
    caption += Markup("95\u00a0% intervals; of random neurons the bar spans the sets, each of them a tick.")
    drawn = {"domain": domain, "reference": None if near else 0.5}
    figures = [dots_of(rows, "AUROC", caption, "Area under the ROC curve", **drawn)]
    curves = _curves(run)
    return [*figures, *_drawn(curves, areas)] if curves else figures


def _areas(result: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    return [(OURS, result["auroc"]), *((entry["name"], entry["auroc"]) for entry in result["baselines"])]


def _curves(run: ReportedRun) -> Mapping[str, Any] | None:
    """The curves of an evaluation: beside its record, where the file is still in the folder."""
    given = run.result.get("curves")
    if isinstance(given, Mapping):
        return given
    place = run.path("curves.json")
    if place is None:
        return None
    found = read_json(place)
    if not isinstance(found, Mapping):
        raise InputError(
            f"{str(place)!r} does not hold the curves of a guard, expected an object; evaluate again"
        )
    return found


def _drawn(curves: Mapping[str, Any], areas: Sequence[tuple[str, Mapping[str, Any]]]) -> list[Figure]:
    order = [label for label, _ in areas if label in curves["roc"]]
    lines = [Line(label, [(x, y) for x, y in curves["roc"][label]]) for label in order]
    plane = Plane("safe requests flagged", "unsafe requests flagged", diagonal=True)
    said = "; ".join(f"{label} {interval(area)}" for label, area in areas)
    caption = Markup(
        "<b>ROC</b>: unsafe against safe requests flagged, threshold by threshold; the dashed line is chance."
    )
    figures = [
        Figure(partial(line_figure, lines, plane), f"ROC curves; areas: {visible(said, 600)}.", caption)
    ]
    shown = next(iter(curves["reliability"]), None)
    bins = curves["reliability"].get(OURS) or (curves["reliability"][shown] if shown else [])
    if bins:
        line = Line(
            OURS,
            [(each["probability"], each["unsafe"]) for each in bins],
            [(each["low"], each["high"]) for each in bins],
            marked=True,
        )
        words = "; ".join(
            f"said {number(each['probability'])}, were {interval_of_bin(each)}" for each in bins
        )
        plane = Plane("probability said", "share that was unsafe", diagonal=True)
        caption = Markup(
            "<b>Reliability</b>: what the guard says against what came true, in bins of equally many "
            "requests; on the dashed "
        )
        caption += Markup("line a probability means what it says. Bars are 95\u00a0% intervals.")
        figures.append(
            Figure(partial(line_figure, [line], plane, size=260), f"Reliability: {words}.", caption)
        )
    return [*figures, *_histogram(curves)]


def interval_of_bin(each: Mapping[str, Any]) -> str:
    """The share of a reliability bin with its interval."""
    return interval({"value": each["unsafe"], "low": each["low"], "high": each["high"]})


def _histogram(curves: Mapping[str, Any]) -> list[Figure]:
    found = curves.get("histogram")
    if not found:
        return []
    edges, lines, words = found["edges"], [], []
    for kind in ("unsafe", "safe"):
        counts = found[kind]
        whole = sum(counts) or 1
        shares = [each / whole for each in counts]
        lines.append(Line(kind, list(zip(edges, [*shares, shares[-1]], strict=True)), step=True))
        low, high = (
            sum(each for at, each in zip(edges, shares, strict=False) if (at >= 0.5) == above)
            for above in (False, True)
        )
        words.append(f"{kind} requests: {share(low)} below 0.5, {share(high)} above")
    top = max(value for line in lines for _, value in line.points)
    plane = Plane("probability said", "share of requests", y_range=(0.0, max(top * 1.05, 0.01)))
    caption = Markup(
        "<b>Probabilities</b> of unsafe and safe requests; where the two overlap, every threshold errs."
    )
    return [
        Figure(
            partial(line_figure, lines, plane, size=260),
            f"Histogram of probabilities. {'; '.join(words)}.",
            caption,
        )
    ]


def worth_findings(run: ReportedRun) -> list[Finding]:
    """How well the guard tells, and which baselines it does not clearly beat."""
    result = run.result
    text = say(
        "The guard on {} tells unsafe from safe requests with AUROC {}; at its threshold ({}) it flags {} "
        "of the unsafe and {} of the safe ones{}.",
        plural(result["n_neurons"], "neuron"),
        interval(result["auroc"]),
        visible(result["in_force"], 60),
        interval(result["flagged_unsafe"]),
        interval(result["flagged_safe"]),
        _unread(result["flagged_unsafe"], result["flagged_safe"]),
    )
    if "macro_f1_in_force" in result:
        text += say(" Macro-F1 there: {}.", interval(result["macro_f1_in_force"]))
    found = [Finding(FACT, text)]
    outputs = result.get("outputs")
    if outputs and outputs["cut"]["value"] is not None:
        lead = (
            "Of the model’s unsafe outputs, by {}, the guard cuts {}: from {} to {} of the unsafe "
            "requests. It blocks {} of the safe ones."
        )
        rates = (interval(outputs[part]) for part in ("cut", "before", "after", "blocked"))
        found.append(
            Finding(
                YES if is_clear(outputs.get("change")) else NO,
                say(lead, visible(outputs["judge"], 40), *rates),
            )
        )
    better: list[Markup] = []
    alike: list[Markup] = []
    worse: list[Markup] = []
    for entry in result["baselines"]:
        difference = entry.get("difference")
        if difference is None or difference["value"] is None:
            continue
        group = alike if not is_clear(difference) else better if difference["value"] > 0 else worse
        group.append(say("{} ({})", visible(entry["name"], 40), interval(difference, signed=True)))
    for verdict, words, group in (
        (YES, "clearly better than", better),
        (NO, "not clearly better than", alike),
        (NO, "worse than", worse),
    ):
        if group:
            found.append(
                Finding(
                    verdict,
                    say(
                        "AUROC of the {}: {} {}.",
                        visible(result["compared"], 20),
                        words,
                        Markup(", ").join(group),
                    ),
                )
            )
    return found


def fit_findings(run: ReportedRun) -> list[Finding]:
    """Which operating points the prompts support."""
    result = run.result
    lacking = [percent(point["fpr_target"]) for point in result["operating_points"] if not point["supported"]]
    text = say(
        "The guard on {} reaches AUROC {} on held-out prompts.",
        plural(result["n_neurons"], "neuron"),
        interval(result["auroc"]),
    )
    made = [Finding(FACT, text)]
    if lacking:
        made.append(
            Finding(
                CAUTION,
                say(
                    "Too few safe prompts support a threshold for a false-positive rate of {}.",
                    ", ".join(lacking),
                ),
            )
        )
    return made


def worth_tile(run: ReportedRun) -> Tile:
    """The guard's area, and whether it beats every baseline."""
    result = run.result
    known = [
        entry for entry in result["baselines"] if (entry.get("difference") or {}).get("value") is not None
    ]
    beaten = sum(is_clear(entry["difference"]) and entry["difference"]["value"] > 0 for entry in known)
    verdict = OPEN if result["auroc"]["value"] is None else YES if known and beaten == len(known) else FACT
    text = say(
        "AUROC on {} requests; clearly above {} of {} baselines",
        count(result["n_unsafe"] + result["n_safe"]),
        beaten,
        len(known),
    )
    return Tile("Can a guard tell in advance?", verdict, interval(result["auroc"]), text)
