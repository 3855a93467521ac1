"""guard fit, recalibrate, evaluate, serve: a classifier on neurons that stops unsafe output before it is
written, behind an endpoint.
"""

import contextlib
import dataclasses
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Annotated, Any, ClassVar

from safety_neurons.cli.served import banner, lines, say, tell_json
from safety_neurons.cli.session import NeuronFile, OneModel, PromptFile, Session, Some, listed, named, resolve
from safety_neurons.cli.verb import verb
from safety_neurons.counting import numbered
from safety_neurons.declarations import Between, Count, Declaration, OneOf, OpenShare, Panel, Positive, Reads
from safety_neurons.errors import InputError, UsageError
from safety_neurons.prompt_lists.readers import LOOK_ALIKES

CHECKS, ALL, CURVES = "Thresholds", "all", "curves.json"
POOLINGS, WINDOW = ("last", "mean", "max", "agree"), 8
OtherSource = Annotated[str, Reads("prompts", column=True, words=("none",))]
UnsafeAnswers = Annotated[str, Reads("prompts", answers="harmful_answer_column", several=True)]
SafeAnswers = Annotated[str, Reads("prompts", answers="harmless_answer_column", several=True)]
Seconds = Annotated[float, Between(0, above=True)]
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
    """Folder of the guard, or of the run that fit it."""

    def look(self) -> None:
        """The guard."""
        from safety_neurons.guard import Guard

        super().look()
        Guard.load(self.guard)


@dataclasses.dataclass(frozen=True)
class Examples(Declaration):
    """Where the two kinds of prompts come from."""

    PANEL: ClassVar[str | None] = "What is unsafe and what is safe"

    unsafe: PromptFile | None = None
    """Prompts to flag: a file, builtin:NAME[/LANG] or suite:NAME."""
    safe: PromptFile | None = None
    """Prompts to let pass: a file, builtin:NAME[/LANG] or suite:NAME."""
    labelled: PromptFile | None = None
    """A prompt file with a label in every record, or suite:NAME with --label-column kind."""
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
        sources = [
            f"--{name}" for name in ("unsafe", "labelled", "completions") if getattr(self, name) is not None
        ]
        if not sources:
            raise UsageError(
                "no unsafe prompts; expected --unsafe and --safe, --labelled, or --completions with --judge"
            )
        if sources == ["--unsafe"] and self.safe is None:
            raise UsageError("--unsafe without --safe; expected prompts of both kinds")
        if (self.completions is None) != (self.judge is None):
            raise UsageError("--completions and --judge belong together; expected both, or neither")
        if self.arm is not None and self.completions is None:
            raise UsageError("--arm without --completions; expected a completions file whose arm it names")

    def look(self) -> None:
        """The completions."""
        super().look()
        if self.completions is not None and not self.completions.is_file():
            raise InputError(
                f"--completions {str(self.completions)!r}: no such file; expected completions in JSON "
                "Lines: check the path"
            )

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
            data += labelled_by_completions(
                completions, str(self.judge), arm=self.arm, judge_options=session.judging, cache=cache
            )
        session.notes.extend(data.notes)
        return data


@dataclasses.dataclass(frozen=True)
class Fitting(Declaration):
    """How a guard is fit."""

    PANEL: ClassVar[str | None] = "How it is fit"

    pooling: Annotated[str, OneOf("auto", *POOLINGS)] = "auto"
    """last, mean, max, agree (several of the last tokens), or auto for what validation prefers."""
    window: Positive | None = None
    """Tokens of a window of --pooling max, or that --pooling agree asks."""
    agree: Positive | None = None
    """How many of them have to agree. [default: half]"""

    def check(self) -> None:
        """Also that windows have a use."""
        super().check()
        if self.window is not None and self.pooling not in ("max", "agree"):
            raise UsageError(
                f"--window {self.window} with --pooling {self.pooling}; only max and agree have windows"
            )
        if self.agree is not None and (self.pooling != "agree" or self.agree > (self.window or WINDOW)):
            raise UsageError(
                f"--agree {self.agree} with --pooling {self.pooling}; expected --pooling agree and no more "
                f"than its window of {self.window or WINDOW} tokens"
            )


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

    def check(self) -> None:
        """Also that there are other requests of both kinds or of none."""
        super().check()
        if (self.other_unsafe == "none") != (self.other_safe == "none"):
            raise UsageError(
                "--other-unsafe and --other-safe belong together; expected requests of both kinds, or "
                "none twice"
            )


@dataclasses.dataclass(frozen=True)
class LabelledAnswers(Declaration):
    """Answers that were labelled before."""

    PANEL: ClassVar[str | None] = "Answers under way"

    answers_harmful: UnsafeAnswers | None = None
    """Comma-separated: prompts with unsafe answers, FILE or NAME=FILE; guard fit without them lets the model
    answer the unsafe prompts.
    """
    answers_harmless: SafeAnswers | None = None
    """Likewise, prompts with safe answers."""
    harmful_answer_column: str | None = None
    """Column of the answers of --answers-harmful, such as rejected."""
    harmless_answer_column: str | None = None
    """Column of the answers of --answers-harmless, such as chosen."""

    def check(self) -> None:
        """Also that there are answers of both kinds or of none."""
        super().check()
        if (self.answers_harmful is None) != (self.answers_harmless is None):
            raise UsageError(
                "--answers-harmful and --answers-harmless belong together; expected both, or neither"
            )

    def read(self, session: Session, model: Any, limit: int | None) -> list[dict[str, Any]]:
        """Unsafe and safe answers, each by the name of their list."""
        from safety_neurons.guard import answers_in

        return [
            {prompts.name: answers_in(model, prompts) for prompts in session.lists(name, model, limit)}
            for name in ("answers_harmful", "answers_harmless")
        ]


@dataclasses.dataclass(frozen=True)
class Rechecks(LabelledAnswers):
    """What a classifier for answers is fit on, which stops them while they are written."""

    recheck_every: Count = 0
    """Also fit a classifier for answers, which reads them every N tokens."""
    recheck_tokens: Positive = 64
    """Tokens of an answer that it reads at most."""
    answers_judge: Annotated[str, Reads("judges")] = "refusal"
    """Judge of what the model answers to unsafe prompts: what it calls harmful is unsafe, the rest safe."""
    answers_pooling: Annotated[str, OneOf("auto", *POOLINGS)] = "auto"
    """How the tokens of an answer are pooled, as --pooling."""

    def check(self) -> None:
        """Also that a check comes before the end, and that answers have a use."""
        super().check()
        if self.recheck_every > self.recheck_tokens:
            raise UsageError(
                f"--recheck-every {self.recheck_every} of --recheck-tokens {self.recheck_tokens}; "
                "expected no more"
            )
        if self.answers_harmful is not None and not self.recheck_every:
            raise UsageError(
                "--answers-harmful without --recheck-every; expected every how many tokens to read"
            )

    def answers(self, session: Session, model: Any, data: Any, limit: int | None) -> tuple[Any, Any]:
        """Unsafe and safe answers: those of the files, or what the model writes, judged."""
        from safety_neurons.studies.guard_data import own_answers

        if self.answers_harmful is not None:
            harmful, harmless = (
                [one for some in lists.values() for one in some] for lists in self.read(session, model, limit)
            )
            return harmful, harmless
        with session.progress("answers") as progress:
            found = own_answers(
                model,
                data,
                self.answers_judge,
                max_new_tokens=self.recheck_tokens,
                judge_options=session.judging,
                batch_size=session.batch_size(),
                progress=progress,
            )
        session.notes.extend(found.notes)
        return found.unsafe, found.safe


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
    rechecks: Rechecks,
) -> dict[str, Any]:
    """Fit a guard: a calibrated classifier on what these neurons do at the prompt, bound to this model."""

    def work() -> dict[str, Any]:
        from safety_neurons.guard import fit_answers, fit_guard

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
        if not rechecks.recheck_every:
            return written(session, guard, data.labels)
        written(session, guard, data.labels)  # what was fit is kept, whatever comes of the answers
        bad, good = rechecks.answers(session, model, data, some.limit)
        with session.progress("read answers") as progress:
            guard = fit_answers(
                guard,
                bad,
                good,
                every=rechecks.recheck_every,
                max_new_tokens=rechecks.recheck_tokens,
                fpr=thresholds.fpr,
                pooling=rechecks.answers_pooling,
                progress=progress,
                **calibrated.values(),
                **session.running,
            )
        return written(session, guard, data.labels)

    return session.run(work)


@verb("guard recalibrate")
def recalibrate(
    session: Session,
    of: OfGuard,
    examples: Examples,
    some: Some,
    calibrated: Calibrated,
    threshold: NewThreshold,
) -> dict[str, Any]:
    """After a model update: keep neurons and weights, set calibration, thresholds and bindings anew, say how
    far it moved.
    """

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
    from safety_neurons.guard.guard import ANSWERS, FACTS, WEIGHTS
    from safety_neurons.results.records import plain

    folders = ("guard", f"guard/{ANSWERS}") if guard.answers is not None else ("guard",)
    for name in (f"{folder}/{file}" for folder in folders for file in (FACTS, WEIGHTS)):
        session.folder.path(name)
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
        "answers": guard.answers and dict(guard.answers.report, pooling=str(guard.answers.pooling)),
        "prompts": report["prompts"],
        "split": guard.report["split"],
        "labels": dict(labels),
    }


# What a guard is worth


@dataclasses.dataclass(frozen=True)
class HeldAgainst(Declaration):
    """The requests that a guard is held against."""

    PANEL: ClassVar[str | None] = "What it is held against"

    unsafe: SeveralLists = "builtin:harmful-test"
    """Comma-separated: FILE, NAME=FILE, builtin:NAME or suite:NAME, one a data set."""
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
                raise UsageError(f"--{name} names nothing; expected a file, builtin:NAME or suite:NAME")


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
    encoder: Annotated[str | None, Reads("files")] = None
    """Folder of a sentence encoder, or real:all-minilm-l6-v2: one more baseline."""
    detectors: Annotated[str | None, Reads("scores", several=True)] = None
    """Comma-separated NAME=SCORES: how many neurons are needed and whether it matters which; needs
    --fit-unsafe.
    """
    counts: str = "10,30,100,300,1000"
    """Comma-separated set sizes for --detectors."""

    def check(self) -> None:
        """Also what the options need of one another."""
        super().check()
        if (self.fit_unsafe is None) != (self.fit_safe is None):
            raise UsageError("--fit-unsafe and --fit-safe belong together; expected both, or neither")
        if self.detectors is not None and self.fit_unsafe is None:
            raise UsageError(
                "--detectors without --fit-unsafe and --fit-safe; expected requests to fit their neurons on"
            )
        if not all(part.isdigit() and int(part) for part in listed(self.counts) or ("",)):
            raise UsageError(f"--counts {self.counts!r}; expected comma-separated numbers such as 10,100")


@dataclasses.dataclass(frozen=True)
class Variants(Declaration):
    """How requests are changed."""

    PANEL: ClassVar[str | None] = "How requests are changed"

    attacks: str | None = None
    """Comma-separated wrappers around both kinds, all or none."""
    perturbations: str = ALL
    """Comma-separated changes of wording, all or none."""
    variant_limit: Positive = 500
    """Requests of either kind in each attack and perturbation."""

    def check(self) -> None:
        """Also the names."""
        super().check()
        _ = self.chosen

    @property
    def chosen(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Names of the attacks and of the perturbations."""
        from safety_neurons.studies.guard_data import ATTACKS, PERTURBATIONS

        return (
            chosen("--attacks", self.attacks, ATTACKS),
            chosen("--perturbations", self.perturbations, PERTURBATIONS),
        )


@dataclasses.dataclass(frozen=True)
class Outputs(Declaration):
    """What the model writes, with and without the guard."""

    PANEL: ClassVar[str | None] = "What the model writes"

    outputs: Count = 0
    """Also let the model answer so many requests of either kind, with and without the guard."""
    judge: Annotated[str, Reads("judges")] = "refusal"
    """Which judge calls an answer unsafe, as for evaluate."""
    max_new_tokens: Annotated[Positive | None, Panel("Prompts")] = None
    """Length of a completion, in tokens. [default: 256, on organisms 64]"""


@verb("guard evaluate")
def evaluate(
    session: Session,
    guarded: OfGuard,
    held: HeldAgainst,
    some: Some,
    baselines: Baselines,
    variants: Variants,
    outputs: Outputs,
    labelled: LabelledAnswers,
) -> dict[str, Any]:
    """What a guard is worth: curves, fixed rates, calibration, slices, attacks, left-out data, beside
    baselines that can embarrass it.
    """

    def work() -> dict[str, Any]:
        from safety_neurons.guard import Guard
        from safety_neurons.model.gguf import REAL, packaged
        from safety_neurons.results.run import write_json
        from safety_neurons.studies.guard_baselines import neuron_counts
        from safety_neurons.studies.guard_evaluation import evaluate_guard
        from safety_neurons.studies.guard_outputs import stopped_answers

        encoder = baselines.encoder
        if encoder is not None and encoder.startswith(REAL):
            encoder = str(packaged(encoder.removeprefix(REAL), offline=session.common.offline))
        model = session.model(guarded.model)
        guard = Guard.load(guarded.guard, model)
        if held.fpr is not None:
            guard = guard.at(held.fpr)
        if labelled.answers_harmful is not None and guard.answers is None:
            raise UsageError(
                "--answers-harmful, and the guard has no classifier for answers; fit it with --recheck-every"
            )

        def read(name: str) -> list[Any]:
            return session.lists(name, model, None if name.startswith("fit") else some.limit)

        (attacks, perturbations), left_out = variants.chosen, listed(baselines.leave_out) or ()
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
                perturbations=perturbations,
                leave_out=left_out,
                random=baselines.random,
                encoder=encoder,
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
            stopped = None
            if labelled.answers_harmful is not None:
                if progress is not None:
                    progress("labelled answers")
                unsafe, safe = labelled.read(session, model, some.limit)
                stopped = stopped_answers(guard, unsafe, safe, session.notes)
        curves = session.folder.path(CURVES)
        write_json(curves, evaluation.curves)
        session.notes.extend(evaluation.notes)
        return {
            **evaluation.result,
            "counts": sizes,
            "outputs": answered,
            "answers": stopped,
            "curves": str(curves),
        }

    return session.run(work)


def answers_of(
    session: Session,
    outputs: Outputs,
    model: Any,
    guard: Any,
    read: Callable[[str], list[Any]],
    progress: Any,
) -> dict[str, Any]:
    """What the model writes with and without the guard; the completions are kept beside the result."""
    from safety_neurons.studies.guard_outputs import guarded_outputs, some

    joined = [sum(lists[1:], lists[0]) for lists in (read("unsafe"), read("safe"))]
    file = session.folder.path("completions.jsonl")
    answered = guarded_outputs(
        model,
        guard,
        *(some(prompts, outputs.outputs, session.common.seed) for prompts in joined),
        by=outputs.judge,
        max_new_tokens=session.answer_length(outputs.max_new_tokens),
        batch_size=session.batch_size(),
        progress=progress,
    )
    session.notes.extend(answered.notes)
    answered.completions.save(file)
    return {**answered.record(), "completions": str(file)}


def chosen(flag: str, text: str | None, known: Mapping[str, Any]) -> tuple[str, ...]:
    """Names of a comma-separated list; `all` for every known one, `none` for none.

    Raises:
        UsageError: a name that is not known.
    """
    names = () if text in (None, "none") else tuple(known) if text == ALL else listed(text) or ()
    wrong = next((name for name in names if name not in known), None)
    if wrong is not None:
        raise UsageError(f"{flag} {wrong!r} is unknown; expected all, none or some of {', '.join(known)}")
    return names


INSTALL = "pip install 'safety-neurons[serve]'"
TOKEN_VARIABLE, UPSTREAM_KEY_VARIABLE = "SAFETY_NEURONS_TOKEN", "SAFETY_NEURONS_UPSTREAM_KEY"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Behind(OneModel):
    """The guard, and who answers behind it."""

    PANEL: ClassVar[str | None] = "Models"

    guard: str
    """Folder of the guard, or of the run that fit it."""
    upstream: str | None = None
    """OpenAI-compatible server that answers, up to /v1; its key in SAFETY_NEURONS_UPSTREAM_KEY."""
    served_name: str | None = None
    """What clients call the model. [default: its name]"""


@dataclasses.dataclass(frozen=True)
class Listening(Declaration):
    """Where it listens."""

    PANEL: ClassVar[str | None] = "Where it listens"

    host: str = "127.0.0.1"
    """Others than this machine need the token in SAFETY_NEURONS_TOKEN."""
    port: Annotated[int, Between(0, 65535)] = 8600
    """0 takes any that is free."""
    docs: bool = False
    """Pages at /docs, whose scripts come from elsewhere."""


@dataclasses.dataclass(frozen=True)
class Guarding(Declaration):
    """What the guard does."""

    PANEL: ClassVar[str | None] = "What the guard does"

    fpr: OpenShare | None = None
    """Operating point: the false-positive rate it was chosen for."""
    threshold: Annotated[float | None, Between(0, 1)] = None
    """A threshold of your own in its place."""
    force: bool = False
    """Serve a guard that may stop nothing."""
    on_unsafe: Annotated[str, OneOf("refuse", "error")] = "refuse"
    """refuse with a text, or answer with an error."""
    refusal: str | None = None
    """Text of the refusal."""
    fail_open: bool = False
    """Let through what the guard could not judge."""
    shadow: bool = False
    """Judge, count and log; never hold back."""
    recheck_every: Count = 0
    """Check the local model's answers again every N tokens, as the guard was fit to."""
    log_prompts: bool = False
    """Put prompts into the log."""
    pass_field: list[str] | None = None
    """Chat field to hand to the upstream unread; may be repeated."""

    def check(self) -> None:
        """Also that there is one threshold."""
        super().check()
        if self.fpr is not None and self.threshold is not None:
            raise UsageError("--fpr and --threshold: expected one of them")


@dataclasses.dataclass(frozen=True)
class Limited(Declaration):
    """How much is taken."""

    PANEL: ClassVar[str | None] = "Limits"

    max_body: Positive = 1 << 20
    """Bytes of a request."""
    max_messages: Positive = 256
    """Turns of a conversation."""
    max_inputs: Positive = 64
    """Texts of one request."""
    max_prompt_tokens: Positive | None = None
    """Tokens of a prompt. [default: the context]"""
    max_characters: Positive | None = None
    """Characters of a prompt, refused untokenised. [default: 16 a token]"""
    max_new_tokens: Positive = 1024
    """Tokens of an answer of the local model."""
    max_requests: Positive = 512
    """Requests under way; more get 429."""
    queue: Positive = 256
    """Prompts that may wait for the model; more get 429."""
    queue_bytes: Positive = 1 << 25
    """Bytes of all requests under way; more get 429."""
    max_batch: Positive = 32
    """Prompts judged together."""
    timeout: Seconds = 30.0
    """Seconds for a verdict; later is not safe."""
    upstream_timeout: Seconds = 120.0
    """Seconds of silence of the upstream."""
    max_connections: Positive | None = None
    """Connections. [default: what the limit of descriptors has room for]"""
    header_timeout: Seconds = 10.0
    """Seconds for a request's head to arrive."""
    body_timeout: Seconds = 10.0
    """Seconds for a body to arrive."""
    idle_timeout: Seconds = 75.0
    """Seconds between two requests of a connection."""


LIMITS = {
    "max_body": "body_bytes",
    "max_messages": "messages",
    "max_inputs": "inputs",
    "max_prompt_tokens": "prompt_tokens",
    "max_characters": "characters",
    "max_new_tokens": "new_tokens",
    "max_requests": "requests",
    "queue": "waiting",
    "queue_bytes": "bytes_under_way",
    "max_batch": "batch",
    "timeout": "seconds",
    "upstream_timeout": "upstream_seconds",
    "max_connections": "connections",
    "header_timeout": "header_seconds",
    "body_timeout": "body_seconds",
    "idle_timeout": "idle_seconds",
}
"""For every limit what the server calls it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Served(Limited, Guarding, Listening, Behind):
    """Everything that decides how a guard is served; the last base has the first options."""

    def check(self) -> None:
        """Also that what is handed on has somebody to go to."""
        super().check()
        if self.pass_field and self.upstream is None:
            raise UsageError("--pass-field without --upstream; expected a server that the field is handed to")


@verb("guard serve")
def serve(session: Session, served: Served) -> None:
    """Serve a guard: chat completions behind it, moderations, and the routes LiteLLM and NeMo Guardrails
    ask.
    """
    common, settings = session.common, configured(served)
    with listening(settings) as sock:
        from safety_neurons.guard import Guard
        from safety_neurons.guard.server import serve_guard
        from safety_neurons.guard.server.serving import address, run

        guard = Guard.load(served.guard)
        if served.fpr is not None:
            guard = guard.at(served.fpr)
        elif served.threshold is not None:
            guard = guard.with_threshold(served.threshold)
        if guard.why_idle is not None and not served.force:
            raise UsageError(
                f"{guard.why_idle}; recalibrate it on more prompts, give a lower --threshold, or serve "
                "it with --force"
            )
        bound = guard.bind(session.model(resolve(served.model)))
        log = lines(as_json=common.json, debug=common.debug)
        service = serve_guard(bound, settings, log)
        where = address(sock)
        run(
            service,
            sock,
            lambda: (
                tell_json(bound, service.settings, where)
                if common.json
                else say(banner(bound, service.settings, where))
            ),
        )
    counts = service.engine.counts
    if common.json:
        log(
            {
                "event": "ended",
                "judged": counts.judged,
                "batches": counts.batches,
                "answered": counts.answered,
            }
        )
    else:
        judged = (
            f"{numbered(counts.judged, 'prompt')} judged in {numbered(counts.batches, 'batch', 'batches')}"
        )
        say([f"ended: {judged}, {counts.answered:,} in the prefill of their answers"])


def configured(served: Served) -> Any:
    """The settings that the options mean, secrets from the environment.

    Raises:
        UsageError: the extra is missing, or the options contradict one another.
    """
    try:
        from safety_neurons.guard.server.door import REFUSAL, Limits, Settings
    except ModuleNotFoundError as error:
        raise UsageError(f"guard serve needs {error.name}, which is not installed; run {INSTALL}") from None
    same = (
        "host",
        "port",
        "upstream",
        "on_unsafe",
        "fail_open",
        "shadow",
        "recheck_every",
        "log_prompts",
        "docs",
    )
    return Settings(
        name=served.served_name or short_name(served.model),
        token=os.environ.get(TOKEN_VARIABLE) or None,
        upstream_key=os.environ.get(UPSTREAM_KEY_VARIABLE) or None,
        refusal=REFUSAL if served.refusal is None else served.refusal,
        passed=tuple(served.pass_field or ()),
        limits=Limits(**{limit: getattr(served, option) for option, limit in LIMITS.items()}),
        **{name: getattr(served, name) for name in same},
    )


def short_name(model: str) -> str:
    """What clients call a model: of a folder its last name, so that no path of this machine is told to
    them.
    """
    if model.startswith("organism:"):
        return model.removeprefix("organism:")
    first, *adapters = model.split("+")
    parts = [pathlib.PurePath(part).name if os.path.exists(part) else part for part in (first, *adapters)]
    return "+".join(parts)


@contextlib.contextmanager
def listening(settings: Any) -> Any:
    """The socket, bound before a model is loaded: an address that is taken is found at once."""
    from safety_neurons.guard.server.serving import bound

    with contextlib.closing(bound(settings.host, settings.port)) as sock:
        yield sock
