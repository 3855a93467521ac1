"""guard evaluate: what a guard is worth on requests it has not seen, beside classifiers that need no safety neurons."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import typer

from safety_neurons.cli import console
from safety_neurons.cli.inputs import NOT_A_FILE
from safety_neurons.cli.options import Column, Common, Limit, MaxNewTokens, Model, listed
from safety_neurons.cli.session import Session
from safety_neurons.cli.verb import verb
from safety_neurons.errors import UsageError

ASKED, LEARNED, CHANGED = "What it is held against", "What it is compared with", "How requests are changed"
WRITTEN = "What the model writes"
ALL = "all"
CURVES = "curves.json"

Unsafe = Annotated[str, typer.Option(help="Comma-separated: FILE, NAME=FILE or builtin:NAME, one a data set.", rich_help_panel=ASKED)]
Safe = Annotated[str, typer.Option(help="Safe requests, likewise; the same NAME makes them one data set.", rich_help_panel=ASKED)]
OverRefusal = Annotated[
    str | None, typer.Option(help="More safe requests that look unsafe, likewise; reported apart.", rich_help_panel=ASKED)
]
FitUnsafe = Annotated[
    str | None, typer.Option(help="What baselines are fit on. [default: folds of what is evaluated]", rich_help_panel=LEARNED)
]
FitSafe = Annotated[str | None, typer.Option(help="Likewise, safe requests.", rich_help_panel=LEARNED)]
LeaveOut = Annotated[
    str | None,
    typer.Option(help="Comma-separated columns, such as source, language: fit without each value, test on it.", rich_help_panel=LEARNED),
]
Random = Annotated[int, typer.Option(min=1, help="Random neuron sets with as many in every matrix.", rich_help_panel=LEARNED)]
Detectors = Annotated[
    str | None,
    typer.Option(
        help="Comma-separated NAME=SCORES: how many neurons are needed and whether it matters which; needs --fit-unsafe.",
        rich_help_panel=LEARNED,
    ),
]
Counts = Annotated[str, typer.Option(help="Comma-separated set sizes for --detectors.", rich_help_panel=LEARNED)]
AttackNames = Annotated[str | None, typer.Option(help="Comma-separated wrappers around both kinds, or all.", rich_help_panel=CHANGED)]
PerturbationNames = Annotated[str, typer.Option(help="Comma-separated changes of wording, all or none.", rich_help_panel=CHANGED)]
VariantLimit = Annotated[int, typer.Option(min=1, help="Requests of either kind in each attack and perturbation.", rich_help_panel=CHANGED)]
Outputs = Annotated[
    int,
    typer.Option(
        min=0, help="Also let the model answer so many requests of either kind, with and without the guard.", rich_help_panel=WRITTEN
    ),
]
JudgeName = Annotated[str, typer.Option(help="Which judge calls an answer unsafe, as for evaluate.", rich_help_panel=WRITTEN)]
GuardFolder = Annotated[pathlib.Path, typer.Option(help="Folder of the guard, or of the run that fit it.", rich_help_panel="Models")]
Fpr = Annotated[float | None, typer.Option(help="Use the guard's operating point for this rate. [default: its own]", rich_help_panel=ASKED)]


def register(app: typer.Typer) -> None:
    """Add the command to the group."""
    verb(app, "evaluate")(evaluate)


def evaluate(
    common: Common,
    model: Model,
    guard: GuardFolder,
    unsafe: Unsafe = "builtin:harmful-test",
    safe: Safe = "builtin:harmless-test",
    over_refusal: OverRefusal = None,
    fpr: Fpr = None,
    column: Column = None,
    limit: Limit = None,
    fit_unsafe: FitUnsafe = None,
    fit_safe: FitSafe = None,
    leave_out: LeaveOut = None,
    random: Random = 5,
    detectors: Detectors = None,
    counts: Counts = "10,30,100,300,1000",
    attacks: AttackNames = None,
    perturbations: PerturbationNames = ALL,
    variant_limit: VariantLimit = 500,
    outputs: Outputs = 0,
    judge: JudgeName = "refusal",
    max_new_tokens: MaxNewTokens = 64,
) -> dict[str, Any]:
    """What a guard is worth: curves, fixed rates, calibration, slices, attacks, left-out data, beside baselines that can embarrass it."""
    options = {name: value for name, value in locals().items() if name != "common"}
    check(options)
    session = Evaluating("guard-evaluate", common, options)
    return session.run(lambda: work(session, options), show)


LISTS = ("unsafe", "safe", "over_refusal", "fit_unsafe", "fit_safe")
"""Options that name lists of requests."""


class Evaluating(Session):
    """A session whose lists of requests may have several parts, each with a name."""

    def foresee(self) -> None:
        """Read the files that lists and detectors name, so that a wrong one is found before a model is loaded."""
        from safety_neurons.neurons import Scores
        from safety_neurons.prompts import prompts

        for name in LISTS:
            for _, path in named(self.options[name]):
                if not path.startswith(NOT_A_FILE):
                    prompts(path, column=self.options["column"])
        for _, path in named(self.options["detectors"]):
            Scores.load(path)


def check(options: Mapping[str, Any]) -> None:
    """What no model can make right, found out before one is loaded."""
    if (options["fit_unsafe"] is None) != (options["fit_safe"] is None):
        raise UsageError("--fit-unsafe and --fit-safe belong together; expected both, or neither")
    for name in ("unsafe", "safe"):
        if not listed(options[name]):
            raise UsageError(f"--{name} names nothing; expected a file or builtin:NAME")
    if options["detectors"] is not None and options["fit_unsafe"] is None:
        raise UsageError("--detectors without --fit-unsafe and --fit-safe; expected requests to fit their neurons on")
    if not all(part.isdigit() and int(part) for part in listed(options["counts"]) or ("",)):
        raise UsageError(f"--counts {options['counts']!r}; expected comma-separated numbers such as 10,100")
    if options["fpr"] is not None and not 0 < options["fpr"] < 1:
        raise UsageError(f"--fpr {options['fpr']:g}; expected a share between 0 and 1, such as 0.01")


def work(session: Session, options: Mapping[str, Any]) -> dict[str, Any]:
    """Load, evaluate, keep the curves in a file of their own."""
    from safety_neurons.guard import Guard
    from safety_neurons.results.files import write_json
    from safety_neurons.studies.guard_counts import neuron_counts
    from safety_neurons.studies.guard_evaluation import evaluate_guard
    from safety_neurons.studies.guard_requests import ATTACKS, PERTURBATIONS

    lists = {name: named(options[name]) for name in LISTS}
    model = session.model(options["model"])
    found = Guard.load(guard_folder(options["guard"]), model)
    if options["fpr"] is not None:
        found = found.at(options["fpr"])

    def read(name: str) -> Any:
        limit = None if name.startswith("fit") else options["limit"]
        return [_renamed(session.prompts(path, model, options["column"], limit), label) for label, path in lists[name]]

    with session.status("guard evaluate") as progress:
        evaluation = evaluate_guard(
            model,
            found,
            read("unsafe"),
            read("safe"),
            fit_unsafe=read("fit_unsafe") or None,
            fit_safe=read("fit_safe") or None,
            over_refusal=read("over_refusal"),
            attacks=chosen(options["attacks"], ATTACKS),
            perturbations=chosen(options["perturbations"], PERTURBATIONS),
            leave_out=listed(options["leave_out"]) or (),
            random=options["random"],
            variant_limit=options["variant_limit"],
            seed=session.common.seed,
            batch_size=session.batch_size(),
            progress=progress,
        )
        sizes = None
        if options["detectors"] is not None:
            sizes = neuron_counts(
                model,
                {name: session.scores(path, model) for name, path in named(options["detectors"])},
                read("unsafe"),
                read("safe"),
                read("fit_unsafe"),
                read("fit_safe"),
                counts=[int(part) for part in listed(options["counts"]) or ()],
                leave_out=listed(options["leave_out"]) or (),
                attacks=chosen(options["attacks"], ATTACKS),
                random=max(2, options["random"]),
                seed=session.common.seed,
                batch_size=session.batch_size(),
                progress=progress,
            )
        answered = outputs_of(session, options, model, found, read, progress) if options["outputs"] else None
    curves = session.folder.path(CURVES)
    write_json(curves, evaluation.curves)
    session.notes.extend(evaluation.notes)
    return {**evaluation.result, "counts": sizes, "outputs": answered, "curves": str(curves)}


def outputs_of(session: Session, options: Mapping[str, Any], model: Any, guard: Any, read: Any, progress: Any) -> dict[str, Any]:
    """What the model writes with and without the guard; the completions are kept beside the result."""
    from safety_neurons.studies.guard_outputs import guarded_outputs, some

    joined = [sum(lists[1:], lists[0]) for lists in (read("unsafe"), read("safe"))]
    kinds = [some(prompts, options["outputs"], session.common.seed) for prompts in joined]
    file = session.folder.path("completions.jsonl")
    found = guarded_outputs(
        model,
        guard,
        *kinds,
        by=options["judge"],
        max_new_tokens=options["max_new_tokens"],
        batch_size=session.batch_size(),
        completions_file=file,
        progress=progress,
    )
    return {**found.record(), "completions": str(file)}


def named(text: str | None) -> list[tuple[str, str]]:
    """(name, file) of every part of a comma-separated list of FILE, NAME=FILE and builtin:NAME."""
    found = []
    for part in listed(text) or ():
        name, sign, path = part.partition("=")
        if not sign or pathlib.Path(part).exists():
            name, path = (part if part.startswith(NOT_A_FILE) else pathlib.Path(part).name.partition(".")[0]), part
        found.append((name, path))
    return found


def chosen(text: str | None, known: Mapping[str, Any]) -> tuple[str, ...]:
    """Names of a comma-separated list; `all` for every known one, `none` for none."""
    if text in (None, "none"):
        return ()
    return tuple(known) if text == ALL else listed(text) or ()


def guard_folder(folder: pathlib.Path) -> pathlib.Path:
    """The folder a guard lies in: the one named, or `guard` inside the run that fit it."""
    inside = folder / "guard"
    return inside if (inside / "guard.json").is_file() else folder


def _renamed(prompts: Any, name: str) -> Any:
    from safety_neurons.prompts import Prompts

    return Prompts(prompts, name, prompts.notes)


# What a person sees


def show(result: dict[str, Any]) -> None:
    """The guard beside the baselines, then every table, then what to take away."""
    console.say(
        ("bold", f"guard on {result['n_neurons']:,} neurons"),
        f" ({result['pooling']}), {result['n_unsafe']:,} unsafe and {result['n_safe']:,} safe requests",
    )
    ours = {"name": "guard", **{name: result[name] for name in ("auroc", "average_precision", "tpr_at_fpr", "expected_calibration_error")}}
    wide = console.out().width >= 120
    cell = fine if wide else point
    rows = [
        [
            row["name"],
            fine(row["auroc"]) if wide else short(row["auroc"]),
            cell(row["average_precision"]),
            *(cell(row["tpr_at_fpr"][fpr]) for fpr in ("0.05", "0.01")),
        ]
        + [f"{row['expected_calibration_error']:.3f}", signed(row.get("difference"), short=not wide)]
        for row in (ours, *result["baselines"])
    ]
    heads = ["average precision", "TPR at FPR 5 %", "TPR at FPR 1 %", "ECE", "AUROC difference"]
    console.print_table(
        "\nOn the requests as written",
        ["classifier", "AUROC", *(heads if wide else ["AP", "TPR 5 %", "TPR 1 %", "ECE", "difference"])],
        rows,
        caption="[95 % interval]; of random sets mean, lowest, highest. TPR at a false-positive rate.\n"
        f"Difference of AUROC: {result['compared']} minus this one, paired; * clear.",
        compared=result["baselines"],
    )
    shown = fine(result["flagged_unsafe"]), fine(result["flagged_safe"])
    console.say(
        f"\nat threshold {result['threshold']:.4g} ({result['in_force']}) it flags {shown[0]} of the unsafe requests "
        f"and {shown[1]} of the safe ones"
    )
    for column, rows in result["tables"].items():
        sliced(f"By {column}", rows, result["compared"])
    for title, name in (
        ("Over-refusal sets", "over_refusal"),
        ("Under attack", "attacks"),
        ("Perturbed", "perturbations"),
        ("By length", "lengths"),
    ):
        sliced(title, result[name], result["compared"])
    for column, rows in result["leave_out"].items():
        sliced(f"Each {column} left out of fitting", rows, "guard's neurons", flags=False)
    counted(result["counts"] or ())
    if result["outputs"]:
        written(result["outputs"])


def written(found: Mapping[str, Any]) -> None:
    """Unsafe outputs before and after, by language."""
    rows = [{"language": "all", **found}, *found["by"]]
    cells = [[row["language"], *(fine(row[name]) for name in ("before", "after", "cut", "blocked"))] for row in rows]
    console.print_table(
        "\nWhat the model writes",
        ["", "unsafe outputs", "with the guard", "cut by", "safe requests blocked"],
        cells,
        caption=f"judge: {found['judge']}; {found['changed']} answers that the guard let pass differ from those without it\n"
        f"AUROC for what is asked {fine(found['asked'])}, for what would be written {fine(found['written'])}; "
        f"{found['refused_by_model']} unsafe requests have no unsafe answer to begin with",
    )


def counted(rows: Sequence[Mapping[str, Any]]) -> None:
    """Sizes by setting: the area of each detector's neurons, the mean of its random sets behind it."""
    settings = list(dict.fromkeys(row["setting"] for row in rows))
    table = {(row["method"], row["count"], row["setting"]): row for row in rows}
    cells = []
    for method, count in dict.fromkeys((row["method"], row["count"]) for row in rows):
        found = [table[method, count, setting] for setting in settings]
        pairs = [f"{row['auroc']:.3f} ({sum(row['random']) / len(row['random']):.3f}){mark(row['difference'])}" for row in found]
        cells.append([f"{method}, {count:,}", *pairs])
    if cells:
        console.print_table(
            "\nHow many neurons, and which",
            ["", *settings],
            cells,
            caption="AUROC (mean of random sets with as many in every matrix); + or -: clearly better or worse than these",
            compared=rows,
        )


SHORT = {
    "guard's neurons": "neurons",
    "random neurons": "random",
    "TF-IDF words": "words",
    "TF-IDF characters": "letters",
    "residual stream": "residual",
    "refusal direction": "direction",
}
"""Names of classifiers where a table has one column for each."""
LEFT_OUT = ("TF-IDF characters", "residual stream")
"""Classifiers that a narrow terminal has no room for; they are in the result."""


def sliced(title: str, rows: Sequence[Mapping[str, Any]], reference: str, *, flags: bool = True) -> None:
    """One table: a slice a row, the area of every classifier, what the guard flags."""
    if not rows:
        return
    names = list(dict.fromkeys(name for row in rows for name in row["auroc"] if name != "guard" or reference == "guard"))
    names.sort(key=lambda name: name != reference)
    if console.out().width < 100:
        names = [name for name in names if name not in LEFT_OUT]
    flagged = ["caught", "blocked"] if flags else []
    cells = [
        [row["value"] + ("*" if row["against"] else ""), f"{row['n_unsafe']:,}/{row['n_safe']:,}"]
        + [point(row["auroc"].get(name)) + mark(row["difference"].get(name)) for name in names]
        + ([point(row["flagged_unsafe"]), point(row["flagged_safe"])] if flags else [])
        for row in rows
    ]
    console.print_table(
        f"\n{title}",
        ["", "unsafe/safe", *(SHORT.get(name, name) for name in names), *flagged],
        cells,
        caption=f"AUROC; + or -: {SHORT.get(reference, reference)} clearly better or worse than this one (95 % interval, paired)"
        + ("; caught, blocked: unsafe and safe requests it flags" if flags else "")
        + ("\n* one kind alone, held against all requests of the other" if any(row["against"] for row in rows) else ""),
        compared=rows,
    )


def fine(found: Mapping[str, Any] | None) -> str:
    """A rate with its interval in three digits."""
    return "–" if found is None or found["value"] is None else console.interval(found, 3)


def short(found: Mapping[str, Any]) -> str:
    """A rate with its interval, without the leading zeros."""
    return fine(found).replace("0.", ".")


def point(found: Mapping[str, Any] | None) -> str:
    """A rate without its interval."""
    return "–" if found is None or found["value"] is None else f"{found['value']:.3f}"


def signed(found: Mapping[str, Any] | None, *, short: bool = False) -> str:
    """A difference with its interval, a star where it is clear."""
    if found is None or found["value"] is None:
        return "–"
    if short:
        return f"{found['value']:+.3f}{'*' if mark(found) else ''}"
    return f"{console.interval(found, 3, signed=True)}{'*' if mark(found) else ''}"


def mark(found: Mapping[str, Any] | None) -> str:
    """`+` where the difference is clearly above 0, `-` where it is clearly below."""
    from safety_neurons.results import is_clear

    return "" if found is None or not is_clear(found) else "+" if found["value"] > 0 else "-"
