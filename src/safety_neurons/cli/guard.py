"""guard fit, recalibrate, evaluate: a classifier on neurons that stops unsafe output before it is written, and what it is worth."""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping
from typing import Annotated, Any, ClassVar

from safety_neurons.cli.options import NeuronFile, OneModel, PromptFile, Some, listed, named
from safety_neurons.cli.session import Session
from safety_neurons.cli.verb import verb
from safety_neurons.declarations import Count, Declaration, OneOf, OpenShare, Panel, Positive, Reads
from safety_neurons.errors import InputError, UsageError
from safety_neurons.prompt_lists.readers import LOOK_ALIKES

CHECKS, ALL, CURVES = "Thresholds", "all", "curves.json"
OtherSource = Annotated[str, Reads("prompts", column=True, words=("none",))]
SeveralLists = Annotated[str, Reads("prompts", column=True, several=True)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class OnNeurons(OneModel):
    """The model, and the neurons that the guard reads."""

    PANEL: ClassVar[str | None] = "Models"

    neurons: NeuronFile
    """Neuron file (or the folder of a find run): what the guard reads."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class OfGuard(OneModel):
    """The model, and a guard that was fit before."""

    PANEL: ClassVar[str | None] = "Models"

    guard: Annotated[pathlib.Path, Reads("files")]
    """Folder of the guard."""

    def check(self) -> None:
        """Also that the guard can be read."""
        from safety_neurons.guard import Guard

        super().check()
        Guard.load(self.guard)


@dataclasses.dataclass(frozen=True)
class Examples(Declaration):
    """Where the two kinds of prompts come from."""

    PANEL: ClassVar[str | None] = "What is unsafe and what is safe"

    unsafe: PromptFile | None = None
    """Prompts to flag: a file or builtin:NAME[/LANG]."""
    safe: PromptFile | None = None
    """Prompts to let pass: a file or builtin:NAME[/LANG]."""
    labelled: PromptFile | None = None
    """A prompt file with a label in every record."""
    label_column: str = "label"
    """Field of --labelled that holds the label."""
    completions: Annotated[pathlib.Path | None, Reads("files")] = None
    """What the model wrote: a prompt is unsafe if --judge calls its answer harmful."""
    judge: Annotated[str | None, Reads("judges")] = None
    """Judge of --completions, as for evaluate."""
    arm: str | None = None
    """The arm of --completions whose answers count."""

    def check(self) -> None:
        """Also that there are prompts of both kinds."""
        super().check()
        sources = [f"--{name}" for name in ("unsafe", "labelled", "completions") if getattr(self, name) is not None]
        if not sources:
            raise UsageError("no unsafe prompts; expected --unsafe and --safe, --labelled, or --completions with --judge")
        if sources == ["--unsafe"] and self.safe is None:
            raise UsageError("--unsafe without --safe; expected prompts of both kinds")
        if (self.completions is None) != (self.judge is None):
            raise UsageError("--completions and --judge belong together; expected both, or neither")
        if self.completions is not None and not self.completions.is_file():
            raise InputError(f"--completions {str(self.completions)!r}: no such file; expected completions in JSON Lines: check the path")
        if self.arm is not None and self.completions is None:
            raise UsageError("--arm without --completions; expected a completions file whose arm it names")

    def read(self, session: Session, model: Any, limit: int | None) -> Any:
        """The prompts of all sources together."""
        from safety_neurons.judges.judgement import ending
        from safety_neurons.results import Completions
        from safety_neurons.studies.guard_data import given, labelled_by_column, labelled_by_completions

        unsafe, safe, labelled = (session.read(name, model, limit) for name in ("unsafe", "safe", "labelled"))
        data = given(unsafe, safe)
        if labelled is not None:
            data += labelled_by_column(labelled, self.label_column)
        if self.completions is not None:
            cache = session.folder.path("judgements.sqlite")
            completions = ending(Completions.load(self.completions), session.common.think_end)
            data += labelled_by_completions(completions, str(self.judge), arm=self.arm, judge_options=session.judging, cache=cache)
        session.notes.extend(data.notes)
        return data


@dataclasses.dataclass(frozen=True)
class Fitting(Declaration):
    """How a guard is fit."""

    PANEL: ClassVar[str | None] = "How it is fit"

    pooling: Annotated[str, OneOf("auto", "last", "mean", "max")] = "auto"
    """last, mean, max, or auto for what validation prefers."""
    window: Positive | None = None
    """Tokens of a window of --pooling max."""

    def check(self) -> None:
        """Also that windows have a use."""
        super().check()
        if self.window is not None and self.pooling != "max":
            raise UsageError(f"--window {self.window} with --pooling {self.pooling}; only max has windows")


@dataclasses.dataclass(frozen=True)
class Calibrated(Declaration):
    """How its scores become probabilities."""

    calibration: Annotated[str, OneOf("auto", "temperature", "isotonic"), Panel(Fitting.PANEL)] = "auto"
    """temperature, isotonic, or auto for the smaller log loss."""


@dataclasses.dataclass(frozen=True)
class Thresholds(Declaration):
    """What a threshold is chosen for, and what it is measured on."""

    PANEL: ClassVar[str | None] = CHECKS

    fpr: OpenShare = 0.01
    """False-positive rate of the threshold in force."""
    other_unsafe: OtherSource = LOOK_ALIKES[0]
    """Requests from another source to measure on: a file, builtin:NAME, or none."""
    other_safe: OtherSource = LOOK_ALIKES[1]
    """Likewise, safe ones: what a guard that only knows its lists flags."""
    recheck_every: Count = 0
    """Also measure a threshold for re-checks every N generated tokens."""
    recheck_tokens: Positive = 64
    """Longest answer that re-checks are measured on."""

    def check(self) -> None:
        """Also that there are other requests of both kinds or of none, and that a re-check comes before the end."""
        super().check()
        if (self.other_unsafe == "none") != (self.other_safe == "none"):
            raise UsageError("--other-unsafe and --other-safe belong together; expected requests of both kinds, or none twice")
        if self.recheck_every > self.recheck_tokens:
            raise UsageError(f"--recheck-every {self.recheck_every} of --recheck-tokens {self.recheck_tokens}; expected no more")


@dataclasses.dataclass(frozen=True)
class NewThreshold(Declaration):
    """What the threshold of an updated guard is chosen for."""

    fpr: Annotated[OpenShare | None, Panel(CHECKS)] = None
    """False-positive rate of the threshold in force. [default: the guard's]"""


@verb("guard fit")
def fit(
    session: Session,
    on: OnNeurons,
    examples: Examples,
    some: Some,
    fitting: Fitting,
    calibrated: Calibrated,
    thresholds: Thresholds,
) -> dict[str, Any]:
    """Fit a guard: a calibrated classifier on what these neurons do at the prompt, bound to this model."""

    def work() -> dict[str, Any]:
        from safety_neurons.guard import calibrate_recheck, fit_guard

        model = session.model(on.model)
        data = examples.read(session, model, some.limit)
        unsafe, safe = (session.read(name, model) for name in ("other_unsafe", "other_safe"))
        with session.progress("reading") as progress:
            guard = fit_guard(
                model,
                session.neurons(on.neurons, model),
                data.unsafe,
                data.safe,
                fpr=thresholds.fpr,
                other=None if unsafe is None else (unsafe, safe),
                progress=progress,
                **fitting.values(),
                **calibrated.values(),
                **session.running,
            )
        if thresholds.recheck_every:
            with session.progress("re-checks") as progress:
                guard = calibrate_recheck(
                    guard,
                    data.safe,
                    data.unsafe,
                    every=thresholds.recheck_every,
                    max_new_tokens=thresholds.recheck_tokens,
                    fpr=thresholds.fpr,
                    batch_size=session.batch_size(),
                    progress=progress,
                )
        return written(session, guard, data.labels)

    return session.run(work)


@verb("guard recalibrate")
def recalibrate(
    session: Session, of: OfGuard, examples: Examples, some: Some, calibrated: Calibrated, threshold: NewThreshold
) -> dict[str, Any]:
    """After a model update: keep neurons and weights, set calibration, thresholds and bindings anew, say how far it moved."""

    def work() -> dict[str, Any]:
        from safety_neurons.guard import Guard
        from safety_neurons.guard import recalibrate as again

        old, model = Guard.load(of.guard), session.model(of.model)
        data = examples.read(session, model, some.limit)
        options = {**calibrated.values(), **threshold.values(), **session.running}
        with session.progress("reading") as progress:
            guard = again(old, model, data.unsafe, data.safe, progress=progress, **options)
        return written(session, guard, data.labels)

    return session.run(work)


def written(session: Session, guard: Any, labels: Mapping[str, Any]) -> dict[str, Any]:
    """Save the guard into the run's folder and say what it is worth."""
    from safety_neurons.guard.guard import FACTS, WEIGHTS
    from safety_neurons.results.records import plain

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
        "calibration": guard.classifier.calibration.kind,
        **guard.standing,
        "other": guard.report.get("other"),
        "conversations": guard.report.get("conversations"),
        "operating_points": plain(guard.operating_points),
        "recheck": plain(guard.recheck),
        "prompts": report["prompts"],
        "split": guard.report["split"],
        "labels": dict(labels),
    }


# What a guard is worth


@dataclasses.dataclass(frozen=True, kw_only=True)
class Guarded(OneModel):
    """The model, and the guard that is evaluated."""

    PANEL: ClassVar[str | None] = "Models"

    guard: Annotated[pathlib.Path, Reads("files")]
    """Folder of the guard, or of the run that fit it."""

    @property
    def folder(self) -> pathlib.Path:
        """The folder the guard lies in: the one named, or `guard` inside the run that fit it."""
        inside = self.guard / "guard"
        return inside if (inside / "guard.json").is_file() else self.guard


@dataclasses.dataclass(frozen=True)
class HeldAgainst(Declaration):
    """The requests that a guard is held against."""

    PANEL: ClassVar[str | None] = "What it is held against"

    unsafe: SeveralLists = "builtin:harmful-test"
    """Comma-separated: FILE, NAME=FILE or builtin:NAME, one a data set."""
    safe: SeveralLists = "builtin:harmless-test"
    """Safe requests, likewise; the same NAME makes them one data set."""
    over_refusal: SeveralLists | None = None
    """More safe requests that look unsafe, likewise; reported apart."""
    fpr: OpenShare | None = None
    """Use the guard's operating point for this rate. [default: its own]"""

    def check(self) -> None:
        """Also that there are some of both kinds."""
        super().check()
        for name in ("unsafe", "safe"):
            if not listed(getattr(self, name)):
                raise UsageError(f"--{name} names nothing; expected a file or builtin:NAME")


@dataclasses.dataclass(frozen=True)
class Baselines(Declaration):
    """What it is compared with."""

    PANEL: ClassVar[str | None] = "What it is compared with"

    fit_unsafe: SeveralLists | None = None
    """What baselines are fit on. [default: folds of what is evaluated]"""
    fit_safe: SeveralLists | None = None
    """Likewise, safe requests."""
    leave_out: str | None = None
    """Comma-separated columns, such as source, language: fit without each value, test on it."""
    random: Positive = 5
    """Random neuron sets with as many in every matrix."""
    detectors: Annotated[str | None, Reads("scores", several=True)] = None
    """Comma-separated NAME=SCORES: how many neurons are needed and whether it matters which; needs --fit-unsafe."""
    counts: str = "10,30,100,300,1000"
    """Comma-separated set sizes for --detectors."""

    def check(self) -> None:
        """Also what the options need of one another."""
        super().check()
        if (self.fit_unsafe is None) != (self.fit_safe is None):
            raise UsageError("--fit-unsafe and --fit-safe belong together; expected both, or neither")
        if self.detectors is not None and self.fit_unsafe is None:
            raise UsageError("--detectors without --fit-unsafe and --fit-safe; expected requests to fit their neurons on")
        if not all(part.isdigit() and int(part) for part in listed(self.counts) or ("",)):
            raise UsageError(f"--counts {self.counts!r}; expected comma-separated numbers such as 10,100")


@dataclasses.dataclass(frozen=True)
class Variants(Declaration):
    """How requests are changed."""

    PANEL: ClassVar[str | None] = "How requests are changed"

    attacks: str | None = None
    """Comma-separated wrappers around both kinds, or all."""
    perturbations: str = ALL
    """Comma-separated changes of wording, all or none."""
    variant_limit: Positive = 500
    """Requests of either kind in each attack and perturbation."""


@dataclasses.dataclass(frozen=True)
class Outputs(Declaration):
    """What the model writes, with and without the guard."""

    PANEL: ClassVar[str | None] = "What the model writes"

    outputs: Count = 0
    """Also let the model answer so many requests of either kind, with and without the guard."""
    judge: Annotated[str, Reads("judges")] = "refusal"
    """Which judge calls an answer unsafe, as for evaluate."""
    max_new_tokens: Annotated[Positive, Panel("Prompts")] = 64
    """Length of a completion, in tokens."""


@verb("guard evaluate")
def evaluate(
    session: Session,
    guarded: Guarded,
    held: HeldAgainst,
    some: Some,
    baselines: Baselines,
    variants: Variants,
    outputs: Outputs,
) -> dict[str, Any]:
    """What a guard is worth: curves, fixed rates, calibration, slices, attacks, left-out data, beside baselines that can embarrass it."""

    def work() -> dict[str, Any]:
        from safety_neurons.guard import Guard
        from safety_neurons.results.run import write_json
        from safety_neurons.studies.guard_baselines import neuron_counts
        from safety_neurons.studies.guard_data import ATTACKS, PERTURBATIONS
        from safety_neurons.studies.guard_evaluation import evaluate_guard

        model = session.model(guarded.model)
        guard = Guard.load(guarded.folder, model)
        if held.fpr is not None:
            guard = guard.at(held.fpr)

        def read(name: str) -> list[Any]:
            limit = None if name.startswith("fit") else some.limit
            parts = named(session.options[name])
            return [_renamed(session.prompts(path, model, limit, column=some.column), label) for label, path in parts]

        attacks, left_out = chosen(variants.attacks, ATTACKS), listed(baselines.leave_out) or ()
        with session.status("guard evaluate") as progress:
            evaluation = evaluate_guard(
                model,
                guard,
                read("unsafe"),
                read("safe"),
                fit_unsafe=read("fit_unsafe") or None,
                fit_safe=read("fit_safe") or None,
                over_refusal=read("over_refusal"),
                attacks=attacks,
                perturbations=chosen(variants.perturbations, PERTURBATIONS),
                leave_out=left_out,
                random=baselines.random,
                variant_limit=variants.variant_limit,
                progress=progress,
                **session.running,
            )
            sizes = None
            if baselines.detectors is not None:
                sizes = neuron_counts(
                    model,
                    {name: session.scores(path, model) for name, path in named(baselines.detectors)},
                    *(read(name) for name in ("unsafe", "safe", "fit_unsafe", "fit_safe")),
                    counts=[int(part) for part in listed(baselines.counts) or ()],
                    leave_out=left_out,
                    attacks=attacks,
                    random=max(2, baselines.random),
                    progress=progress,
                    **session.running,
                )
            answered = answers_of(session, outputs, model, guard, read, progress) if outputs.outputs else None
        curves = session.folder.path(CURVES)
        write_json(curves, evaluation.curves)
        session.notes.extend(evaluation.notes)
        return {**evaluation.result, "counts": sizes, "outputs": answered, "curves": str(curves)}

    return session.run(work)


def answers_of(
    session: Session, outputs: Outputs, model: Any, guard: Any, read: Callable[[str], list[Any]], progress: Any
) -> dict[str, Any]:
    """What the model writes with and without the guard; the completions are kept beside the result."""
    from safety_neurons.studies.guard_evaluation import guarded_outputs, some

    joined = [sum(lists[1:], lists[0]) for lists in (read("unsafe"), read("safe"))]
    file = session.folder.path("completions.jsonl")
    answered = guarded_outputs(
        model,
        guard,
        *(some(prompts, outputs.outputs, session.common.seed) for prompts in joined),
        by=outputs.judge,
        max_new_tokens=outputs.max_new_tokens,
        batch_size=session.batch_size(),
        progress=progress,
    )
    answered.completions.save(file)
    return {**answered.record(), "completions": str(file)}


def chosen(text: str | None, known: Mapping[str, Any]) -> tuple[str, ...]:
    """Names of a comma-separated list; `all` for every known one, `none` for none."""
    if text in (None, "none"):
        return ()
    return tuple(known) if text == ALL else listed(text) or ()


def _renamed(prompts: Any, name: str) -> Any:
    from safety_neurons.prompt_lists import Prompts

    return Prompts(prompts, name, prompts.notes)
