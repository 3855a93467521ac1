"""guard: fit a classifier on neurons that stops unsafe output before it is written, and set its thresholds anew for an updated model.

Further commands of the group live in modules of their own, which `register` themselves here where they are there.
"""

import importlib
import importlib.util
import math
import pathlib
from collections.abc import Mapping
from typing import Annotated, Any

import typer

from safety_neurons.cli import console
from safety_neurons.cli.options import Column, Common, Limit, Model
from safety_neurons.cli.pages import Contents
from safety_neurons.cli.session import Session
from safety_neurons.cli.verb import verb
from safety_neurons.errors import InputError, UsageError
from safety_neurons.prompts.readers import LOOK_ALIKES

app = typer.Typer(
    help="Stop unsafe output before it is written: fit, recalibrate, evaluate and serve a guard on neurons.",
    no_args_is_help=True,
    cls=Contents,
    rich_markup_mode=None,
)

DATA, FIT, CHECKS = "What is unsafe and what is safe", "How it is fit", "Thresholds"
Neurons = Annotated[str, typer.Option(help="Neuron file (or the folder of a find run): what the guard reads.", rich_help_panel="Models")]
Unsafe = Annotated[str | None, typer.Option(help="Prompts to flag: a file or builtin:NAME[/LANG].", rich_help_panel=DATA)]
Safe = Annotated[str | None, typer.Option(help="Prompts to let pass: a file or builtin:NAME[/LANG].", rich_help_panel=DATA)]
Labelled = Annotated[str | None, typer.Option(help="A prompt file with a label in every record.", rich_help_panel=DATA)]
LabelColumn = Annotated[str, typer.Option(help="Field of --labelled that holds the label.", rich_help_panel=DATA)]
CompletionsFile = Annotated[
    pathlib.Path | None,
    typer.Option(help="What the model wrote: a prompt is unsafe if --judge calls its answer harmful.", rich_help_panel=DATA),
]
JudgeName = Annotated[str | None, typer.Option(help="Judge of --completions, as for evaluate.", rich_help_panel=DATA)]
ArmName = Annotated[str | None, typer.Option(help="The arm of --completions whose answers count.", rich_help_panel=DATA)]
NONE = "none"
OtherUnsafe = Annotated[
    str, typer.Option(help="Requests from another source to measure on: a file, builtin:NAME, or none.", rich_help_panel=CHECKS)
]
OtherSafe = Annotated[str, typer.Option(help="Likewise, safe ones: what a guard that only knows its lists flags.", rich_help_panel=CHECKS)]
PoolingName = Annotated[str, typer.Option(help="last, mean, max, or auto for what validation prefers.", rich_help_panel=FIT)]
Window = Annotated[int | None, typer.Option(min=1, help="Tokens of a window of --pooling max.", rich_help_panel=FIT)]
CalibrationName = Annotated[str, typer.Option(help="temperature, isotonic, or auto for the smaller log loss.", rich_help_panel=FIT)]
FalsePositives = Annotated[float, typer.Option(help="False-positive rate of the threshold in force.", rich_help_panel=CHECKS)]
RecheckEvery = Annotated[
    int, typer.Option(min=0, help="Also measure a threshold for re-checks every N generated tokens.", rich_help_panel=CHECKS)
]
RecheckTokens = Annotated[int, typer.Option(min=1, help="Longest answer that re-checks are measured on.", rich_help_panel=CHECKS)]


@verb(app, "fit")
def fit(
    common: Common,
    model: Model,
    neurons: Neurons,
    unsafe: Unsafe = None,
    safe: Safe = None,
    labelled: Labelled = None,
    label_column: LabelColumn = "label",
    completions: CompletionsFile = None,
    judge: JudgeName = None,
    arm: ArmName = None,
    column: Column = None,
    limit: Limit = None,
    pooling: PoolingName = "auto",
    window: Window = None,
    calibration: CalibrationName = "auto",
    fpr: FalsePositives = 0.01,
    other_unsafe: OtherUnsafe = LOOK_ALIKES[0],
    other_safe: OtherSafe = LOOK_ALIKES[1],
    recheck_every: RecheckEvery = 0,
    recheck_tokens: RecheckTokens = 64,
) -> dict[str, Any]:
    """Fit a guard: a calibrated classifier on what these neurons do at the prompt, bound to this model."""
    options = {name: value for name, value in locals().items() if name != "common"}
    check(options)
    session = Session("guard-fit", common, options)

    def work() -> dict[str, Any]:
        from safety_neurons.guard import calibrate_recheck, fit_guard

        loaded = session.model(model)
        data = examples(session, options, loaded)
        others = [
            session.prompts(name, loaded, None if name.startswith("builtin:") else column)
            for name in (other_unsafe, other_safe)
            if name != NONE
        ]
        with session.progress("reading") as progress:
            found = fit_guard(
                loaded,
                session.neurons(neurons, loaded),
                data.unsafe,
                data.safe,
                pooling=pooling,
                window=window,
                calibration=calibration,
                fpr=fpr,
                other=(others[0], others[1]) if others else None,
                seed=common.seed,
                batch_size=session.batch_size(),
                progress=progress,
            )
        if recheck_every:
            with session.progress("re-checks") as progress:
                found = calibrate_recheck(
                    found,
                    data.safe,
                    data.unsafe,
                    every=recheck_every,
                    max_new_tokens=recheck_tokens,
                    fpr=fpr,
                    batch_size=session.batch_size(),
                    progress=progress,
                )
        return written(session, found, data.labels)

    return session.run(work, show)


@verb(app, "recalibrate")
def recalibrate(
    common: Common,
    model: Model,
    guard: Annotated[pathlib.Path, typer.Option(help="Folder of the guard.", rich_help_panel="Models")],
    unsafe: Unsafe = None,
    safe: Safe = None,
    labelled: Labelled = None,
    label_column: LabelColumn = "label",
    completions: CompletionsFile = None,
    judge: JudgeName = None,
    arm: ArmName = None,
    column: Column = None,
    limit: Limit = None,
    calibration: CalibrationName = "auto",
    fpr: Annotated[
        float | None, typer.Option(help="False-positive rate of the threshold in force. [default: the guard's]", rich_help_panel=CHECKS)
    ] = None,
) -> dict[str, Any]:
    """After a model update: keep neurons and weights, set calibration, thresholds and bindings anew, say how far it moved."""
    options = {name: value for name, value in locals().items() if name != "common"}
    check(options)
    session = Session("guard-recalibrate", common, options)

    def work() -> dict[str, Any]:
        from safety_neurons.guard import Guard
        from safety_neurons.guard import recalibrate as again

        old, loaded = Guard.load(guard), session.model(model)
        data = examples(session, options, loaded)
        with session.progress("reading") as progress:
            found = again(
                old,
                loaded,
                data.unsafe,
                data.safe,
                calibration=calibration,
                fpr=fpr,
                seed=common.seed,
                batch_size=session.batch_size(),
                progress=progress,
            )
        return written(session, found, data.labels)

    return session.run(work, show)


def check(options: Mapping[str, Any]) -> None:
    """Where the two kinds of prompts come from, and what no model can make right."""
    sources = [f"--{name}" for name in ("unsafe", "labelled", "completions") if options[name] is not None]
    if not sources:
        raise UsageError("no unsafe prompts; expected --unsafe and --safe, --labelled, or --completions with --judge")
    if sources == ["--unsafe"] and options["safe"] is None:
        raise UsageError("--unsafe without --safe; expected prompts of both kinds")
    if (options["completions"] is None) != (options["judge"] is None):
        raise UsageError("--completions and --judge belong together; expected both, or neither")
    if options["completions"] is not None and not options["completions"].is_file():
        raise InputError(f"--completions {str(options['completions'])!r}: no such file; expected completions in JSON Lines: check the path")
    if options.get("guard") is not None:
        from safety_neurons.guard import Guard

        Guard.load(options["guard"])
    if options["arm"] is not None and options["completions"] is None:
        raise UsageError("--arm without --completions; expected a completions file whose arm it names")
    if "other_safe" in options and (options["other_unsafe"] == NONE) != (options["other_safe"] == NONE):
        raise UsageError("--other-unsafe and --other-safe belong together; expected requests of both kinds, or none twice")
    if options["fpr"] is not None and not 0 < options["fpr"] < 1:
        raise UsageError(f"--fpr {options['fpr']:g}; expected a share between 0 and 1, such as 0.01")
    if options["calibration"] not in ("auto", "temperature", "isotonic"):
        raise UsageError(f"--calibration {options['calibration']!r}; expected auto, temperature or isotonic")
    if options.get("pooling", "auto") not in ("auto", "last", "mean", "max"):
        raise UsageError(f"--pooling {options['pooling']!r}; expected auto, last, mean or max")
    if options.get("window") is not None and options["pooling"] != "max":
        raise UsageError(f"--window {options['window']} with --pooling {options['pooling']}; only max has windows")
    if options.get("recheck_every", 0) > options.get("recheck_tokens", 1):
        raise UsageError(f"--recheck-every {options['recheck_every']} of --recheck-tokens {options['recheck_tokens']}; expected no more")


def examples(session: Session, options: Mapping[str, Any], model: Any) -> Any:
    """The prompts of all sources together."""
    from safety_neurons.judges.judgement import ending
    from safety_neurons.results import Completions
    from safety_neurons.studies.guard_fitting import given, labelled_by_column, labelled_by_completions

    column, limit = options["column"], options["limit"]
    lists = {name: session.prompts(options[name], model, column, limit) if options[name] else None for name in ("unsafe", "safe")}
    data = given(lists["unsafe"], lists["safe"])
    if options["labelled"] is not None:
        data += labelled_by_column(session.prompts(options["labelled"], model, column, limit), options["label_column"])
    if options["completions"] is not None:
        settings = {name: value for name, value in (("device", session.common.device), ("offline", session.common.offline)) if value}
        cache = session.folder.path("judgements.sqlite")
        completions = ending(Completions.load(options["completions"]), session.common.think_end)
        data += labelled_by_completions(completions, options["judge"], arm=options["arm"], judge_options=settings, cache=cache)
    session.notes.extend(data.notes)
    return data


def written(session: Session, guard: Any, labels: Mapping[str, Any]) -> dict[str, Any]:
    """Save the guard into the run's folder and say what it is worth."""
    from safety_neurons.guard.files import FACTS, WEIGHTS

    for name in (FACTS, WEIGHTS):
        session.folder.path(f"guard/{name}")
    guard.save(session.folder.folder / "guard")
    session.notes.extend(guard.notes)
    report = guard.report.get("recalibrated") or guard.report
    return {
        "achieved": guard.why_idle is None,
        "why": guard.why_idle or "it catches some of the unsafe requests it was calibrated on",
        "guard": str((session.folder.folder / "guard").absolute()),
        "model": guard.bindings.model,
        "n_neurons": len(guard.neurons),
        "pooling": str(guard.pooling),
        "poolings": guard.report["poolings"],
        "auroc": report["auroc"],
        "auroc_before": report.get("auroc_before"),
        "expected_calibration_error": report["expected_calibration_error"],
        "calibration": guard.calibration.kind,
        **guard.standing,
        "other": guard.report.get("other"),
        "conversations": guard.report.get("conversations"),
        "operating_points": [point.to_json() for point in guard.operating_points],
        "recheck": None if guard.recheck is None else guard.recheck.to_json(),
        "prompts": report["prompts"],
        "split": guard.report["split"],
        "labels": dict(labels),
    }


def show(result: dict[str, Any]) -> None:
    """What it was fit on, how well it ranks, its operating points, what the threshold in force catches."""
    prompts, before = result["prompts"], result["auroc_before"]
    if not result["achieved"]:
        console.say(("bold red", "Not achieved"), f": {result['why']}")
    left = f", {prompts['left_out']:,} left out" if prompts["left_out"] else ""
    console.say(
        ("bold", f"guard on {result['n_neurons']:,} neurons of {result['model']}"),
        f", {prompts['unsafe']:,} unsafe and {prompts['safe']:,} safe prompts{left}",
    )
    if len(result["poolings"]) > 1 and before is None:
        chosen = [
            [entry["pooling"], entry["auroc"], entry["log_loss"], entry["pooling"] == result["pooling"]] for entry in result["poolings"]
        ]
        console.print_table("\nPooling, by validation", ["pooling", "AUROC", "log loss", "chosen"], chosen)
    console.print_table(
        "\nOn prompts that neither fit nor chose anything",
        ["measure", "value"],
        [
            ["AUROC", shown(result["auroc"])],
            *([["AUROC where it was fit", shown(before)]] if before else []),
            [f"expected calibration error ({result['calibration']})", result["expected_calibration_error"]],
        ],
    )
    rows = [
        [
            f"{point['fpr_target']:g}",
            "–" if point["threshold"] is None else f"{point['threshold']:.4g}",
            shown(point["fpr"]),
            shown(point["tpr"]),
            "yes" if point["supported"] else f"no, {point['fpr']['n']:,} of {math.ceil(20 / point['fpr_target']):,} safe",
        ]
        for point in result["operating_points"]
    ]
    columns = ["FPR wanted", "threshold", "FPR", "TPR", "supported"]
    console.print_table(
        "\nOperating points",
        columns,
        rows,
        caption="95 % intervals. FPR: safe prompts flagged, TPR: unsafe ones.\nA point that too few safe prompts support has no threshold.",
    )
    console.say(f"\nthreshold in force {result['threshold']:.4g} ({result['in_force']})")
    flagged = [["held-out requests of the fit", shown(result["caught"]), shown(result["false_positives"])]]
    if result["conversations"]:
        told = result["conversations"]
        flagged.append(["conversations among them", shown(told["tpr"]), shown(told["fpr"])])
        flagged.append(["the same read as a whole only", shown(told["tpr_read_whole"]), shown(told["fpr_read_whole"])])
    if result["other"]:
        told = result["other"]
        flagged.append([f"another source: {told['unsafe']}, {told['safe']}", shown(told["tpr"]), shown(told["fpr"])])
    console.print_table(
        "\nWhat it flags at the threshold in force",
        ["requests", "unsafe", "safe"],
        flagged,
        caption="95 % intervals. What it flags of your own safe requests nobody knows until it was measured on them.",
    )
    if result["recheck"]:
        again = result["recheck"]
        console.say(
            f"re-checks every {again['every']} tokens: threshold {again['threshold']:.4g}, stops {shown(again['fpr'])} of the answers to "
            f"safe prompts and {shown(again['tpr'])} of those to unsafe ones"
        )
    console.say(f"guard {result['guard']}")


def shown(rate: Mapping[str, Any] | None) -> str:
    """A rate with its interval, with digits for small ones."""
    return console.interval(rate, 3)


for _name in ("guard_evaluate", "guard_serve"):
    if importlib.util.find_spec(f"safety_neurons.cli.{_name}") is not None:
        importlib.import_module(f"safety_neurons.cli.{_name}").register(app)
