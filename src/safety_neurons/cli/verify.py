"""verify, compare, evaluate: measure what a set of neurons does, methods side by side, and a model as it is
or treated, held to a gate.
"""

import dataclasses
import functools
import math
import pathlib
from collections.abc import Callable
from typing import Annotated, Any, ClassVar

from safety_neurons.cli.session import (
    EvaluationPrompts,
    JudgedBy,
    ModelName,
    NeuronFile,
    OneModel,
    OtherText,
    PromptFile,
    Requested,
    ScoreFile,
    Session,
    Some,
    TwoModels,
    listed,
    parse_object,
    parse_sizes,
)
from safety_neurons.cli.verb import verb
from safety_neurons.declarations import Count, Declaration, NotNegative, Panel, Positive, Reads, Share
from safety_neurons.detectors.methods import EarlyStop, by_name
from safety_neurons.detectors.rules import AtSites
from safety_neurons.errors import InputError, UsageError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verified(Declaration):
    """The set, or the scores whose largest are taken."""

    neurons: NeuronFile | None = None
    """Neuron file (or the folder of a find run)."""
    scores: ScoreFile | None = None
    """Score file (or the folder of a find run), with --sizes."""
    sizes: str | None = None
    """Comma-separated shares of the scored neurons: 0.005,0.01,0.05"""

    def check(self) -> None:
        """Also that there is a set, or scores with sizes."""
        super().check()
        if (self.neurons is None) == (self.scores is None):
            which = "neither" if self.neurons is None else "both"
            raise UsageError(f"{which} of --neurons and --scores given, expected one of them")
        if self.neurons is not None and self.sizes is not None:
            raise UsageError("--sizes needs --scores: a neuron file has one size")
        parse_sizes(self.sizes)


@dataclasses.dataclass(frozen=True, kw_only=True)
class VerifiedOn(JudgedBy, Some, EvaluationPrompts):
    """What it is measured on, and beside how many random sets; the last base has the first options."""

    random: Count = 5
    """Random control sets for each size."""
    max_new_tokens: Annotated[Positive | None, Panel("Prompts")] = None
    """Length of a completion, in tokens. [default: 256, on organisms 64]"""
    length_curve: Annotated[bool, Panel("Prompts")] = False
    """Judge the answers cut at 32, 64, 128, … tokens too; they are written once."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class AtRouter(Declaration):
    """How experts are turned off."""

    experts: bool = False
    """Turn whole experts off at the router, so that others take their tokens."""


@verb("verify deactivate")
def deactivate(
    session: Session, models: OneModel, verified: Verified, at: AtRouter, beside: VerifiedOn
) -> dict[str, Any]:
    """Necessity: what the model loses while these neurons are off."""

    def work() -> dict[str, Any]:
        from safety_neurons.studies import verify_deactivate

        model = session.model(models.model)
        return measured(
            session, verified, beside, model, functools.partial(verify_deactivate, model, experts=at.experts)
        )

    return session.run(work)


@verb("verify patch")
def patch(session: Session, models: TwoModels, verified: Verified, beside: VerifiedOn) -> dict[str, Any]:
    """Sufficiency: how much safety these neurons' activations alone carry from the aligned model into the
    base model.
    """

    def work() -> dict[str, Any]:
        from safety_neurons.studies import verify_patch

        pair = session.pair(models.base, models.aligned)
        study = functools.partial(verify_patch, pair.base, pair.aligned)
        return measured(session, verified, beside, pair.base, study)

    return session.run(work)


@verb("verify both")
def both(session: Session, models: TwoModels, verified: Verified, beside: VerifiedOn) -> dict[str, Any]:
    """Sufficiency and necessity of the same neurons, size by size, in one table."""

    def work() -> dict[str, Any]:
        from safety_neurons.studies import verify_both

        pair = session.pair(models.base, models.aligned)
        session.folder.path("deactivated-completions.jsonl")
        study = functools.partial(verify_both, pair.base, pair.aligned)
        return measured(session, verified, beside, pair.base, study)

    return session.run(work)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScaledSet(Declaration):
    """The set, and what its activations are multiplied by."""

    neurons: NeuronFile
    """Neuron file (or the folder of a find run)."""
    factors: str = "0,0.5,1,2,4"
    """Comma-separated factors: 0 is off, 1 as it is, 2 twice."""
    when_guard: Annotated[pathlib.Path | None, Reads("files")] = None
    """Folder of a guard, or of the run that fit it: scale only for the requests that it flags."""

    def check(self) -> None:
        """Also that the factors are numbers."""
        super().check()
        self.numbers()

    def look(self) -> None:
        """The guard."""
        super().look()
        if self.when_guard is not None:
            from safety_neurons.guard import Guard

            Guard.load(self.when_guard)

    def numbers(self) -> list[float]:
        """The factors."""
        try:
            factors = [float(part) for part in self.factors.split(",")]
        except ValueError:
            factors = []
        if not factors or not all(map(math.isfinite, factors)) or len(set(factors)) < len(factors):
            raise UsageError(
                f"--factors {self.factors!r}: expected comma-separated numbers, none twice, such as 0,0.5,1,2"
            )
        return factors


@verb("verify scale")
def scale(session: Session, models: OneModel, chosen: ScaledSet, beside: VerifiedOn) -> dict[str, Any]:
    """Dose: refusal, harm, repetition and perplexity while these neurons are multiplied, factor by factor."""

    def work() -> dict[str, Any]:
        from safety_neurons.guard import Guard
        from safety_neurons.studies import verify_scale

        model = session.model(models.model)
        study = functools.partial(
            verify_scale,
            model,
            factors=chosen.numbers(),
            when=None if chosen.when_guard is None else Guard.load(chosen.when_guard),
        )
        return reported(session, study, session.neurons(chosen.neurons, model), beside, model)

    return session.run(work)


def measured(
    session: Session, verified: Verified, beside: VerifiedOn, model: Any, study: Any
) -> dict[str, Any]:
    """Load the set, or the scores with their sizes, and measure."""
    if verified.neurons is not None:
        chosen, sizes = session.neurons(verified.neurons, model), []
    else:
        chosen, sizes = session.scores(str(verified.scores), model), parse_sizes(verified.sizes)
    return reported(session, functools.partial(study, sizes=sizes), chosen, beside, model)


def reported(
    session: Session, study: Callable[..., Any], chosen: Any, beside: VerifiedOn, model: Any
) -> dict[str, Any]:
    """Read the prompts, run a study of a set on them, keep the completions, and say what has to be said."""
    harmful, harmless, text = (
        session.read(name, model, beside.limit) for name in ("harmful", "harmless", "text")
    )
    completions = session.folder.path("completions.jsonl")
    with session.status("verify") as progress:
        verification = study(
            chosen,
            harmful,
            harmless,
            text=text,
            random=beside.random,
            max_new_tokens=session.answer_length(beside.max_new_tokens),
            length_curve=beside.length_curve,
            completions_file=completions,
            harm_judge=session.judge(beside.harm_judge),
            progress=progress,
            **session.running,
        )
    session.notes.extend(verification.notes)
    for name, shared in verification.overlap.items():
        if shared:
            session.notes.append(f"{shared} of the {name} prompts are among those the set was found on")
    return {**verification.record(), "completions": str(completions)}


PROMPTS = Panel("Prompts")


@dataclasses.dataclass(frozen=True)
class Compared(Declaration):
    """A pair of models, or organisms in its place."""

    base: ModelName | None = None
    """The less safe model: ID[@REVISION][+ADAPTER…] or organism:NAME/base."""
    aligned: ModelName | None = None
    """The safer model of the same architecture."""
    organism: Annotated[list[str] | None, Reads("organism")] = None
    """Instead of models: an organism, by name or folder; several rank methods."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LookedAt(Declaration):
    """What methods look at."""

    prompts: Annotated[PromptFile, PROMPTS] = "builtin:harmful"
    """A file or builtin:NAME[/LANG]."""
    find_harmless: PromptFile = "builtin:harmless"
    """Harmless prompts some methods look at: a file or builtin:NAME[/LANG]."""
    find_general: OtherText = "builtin:general"
    """General prompts some methods look at: a file or builtin:NAME[/LANG]."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lists(Some, Requested, LookedAt):
    """All prompts; the last base has the first options."""


@dataclasses.dataclass(frozen=True)
class KnownTruth(Declaration):
    """What is known of the neurons."""

    truth: NeuronFile | None = None
    """Neuron file of the planted truth: its number of units is the budget, and it has a row of its own."""


@dataclasses.dataclass(frozen=True)
class MethodBudget(JudgedBy, EarlyStop):
    """Which methods, at which budget."""

    top: str = "0.05"
    """Budget as a share of the units, without --truth; with --organism several: 0.01,0.02."""
    methods: str | None = None
    """Comma-separated methods. [default: all]"""
    random: Count = 5
    """Random sets."""
    find: Positive = 100
    """With --organism: prompts that methods look at, of each kind."""
    max_new_tokens: Annotated[Positive | None, PROMPTS] = None
    """Length of a completion, in tokens. [default: 256, on organisms 64]"""

    def check(self) -> None:
        """Also the shares and the names of methods."""
        super().check()
        parse_sizes(self.top, "--top")
        names = listed(self.methods) or ()
        for name in names:
            by_name(name)
            if names.count(name) > 1:
                raise UsageError(f"--methods names {name!r} twice; expected every method once")

    def values(self) -> dict[str, Any]:
        """With one share as a number, so that 0.05 and 0.050 are the same run."""
        shares = parse_sizes(self.top, "--top")
        return super().values() | ({"top": shares[0]} if len(shares) == 1 else {})


@verb("compare")
def compare(
    session: Session, compared: Compared, lists: Lists, truth: KnownTruth, at: AtSites, budget: MethodBudget
) -> dict[str, Any]:
    """Detectors side by side at equal budget, against random sets; on one pair of models, or over several
    organisms.
    """
    base, aligned, shares = compared.base, compared.aligned, parse_sizes(budget.top, "--top")
    if compared.organism:
        if base or aligned or truth.truth or at.sites:
            raise UsageError(
                "--organism brings its own models, truth and sites; leave --base, --aligned, --truth and "
                "--sites out"
            )
        return ranked(session, compared.organism, lists, budget)
    if base is None or aligned is None or len(shares) != 1:
        raise UsageError("expected --base and --aligned with one --top, or --organism")

    def work() -> dict[str, Any]:
        from safety_neurons.studies import compare as study

        pair = session.pair(base, aligned)
        completions = session.folder.path("completions.jsonl")
        names = ("harmful", "harmless", "prompts", "find_harmless", "find_general")
        harmful, harmless, *looked_at = (session.read(name, pair.base, lists.limit) for name in names)
        with session.status("compare") as progress:
            comparison = study(
                pair.base,
                pair.aligned,
                harmful,
                harmless,
                find_prompts=looked_at[0],
                find_harmless=looked_at[1],
                find_general=looked_at[2],
                truth=session.neurons(truth.truth, pair.base) if truth.truth else None,
                sites=listed(at.sites),
                top=shares[0],
                methods=listed(budget.methods),
                settle=budget.settle,
                random=budget.random,
                max_new_tokens=session.answer_length(budget.max_new_tokens),
                completions_file=completions,
                harm_judge=session.judge(budget.harm_judge),
                place=session.folder.path,
                progress=progress,
                **session.running,
            )
        session.notes.extend(comparison.bench.notes)
        return {**comparison.record(), "completions": str(completions)}

    return session.run(work)


def ranked(session: Session, organisms: list[str], lists: Lists, budget: MethodBudget) -> dict[str, Any]:
    """All methods over several organisms, with a figure beside the table."""

    def work() -> dict[str, Any]:
        from safety_neurons.studies import rank

        with session.status("compare") as progress:
            ranking = rank(
                organisms,
                tops=parse_sizes(budget.top, "--top"),
                methods=listed(budget.methods),
                random=budget.random,
                settle=budget.settle,
                find=budget.find,
                measured=lists.limit or 200,
                max_new_tokens=budget.max_new_tokens,
                harm_judge=session.judge(budget.harm_judge),
                place=session.folder.path,
                progress=progress,
                **session.running,
            )
        session.notes.extend(
            dict.fromkeys(note for entry in ranking.entries for note in entry.comparison.bench.notes)
        )
        record = ranking.record()
        shown = session.drawn(dict(record), session.folder.path("ranking.svg").absolute())
        return {**shown, "methods": record["organisms"][0]["methods"]}

    return session.run(work)


@dataclasses.dataclass(frozen=True)
class Evaluated(Declaration):
    """The model that is evaluated, or a server in its place, and what is done to it."""

    PANEL: ClassVar[str | None] = "Treatment"
    MODELS = Panel("Models")

    model: Annotated[ModelName | None, MODELS] = None
    """ID[@REVISION][+ADAPTER…], a folder, or organism:NAME."""
    endpoint: Annotated[str | None, MODELS] = None
    """An OpenAI-compatible server in the place of --model: URL#MODEL; its key in OPENAI_API_KEY."""
    request: Annotated[str | None, MODELS] = None
    """JSON object: further fields of each request to --endpoint; null leaves one out."""
    reference: Annotated[ModelName | None, MODELS] = None
    """The model that capability kl compares with."""
    deactivate: NeuronFile | None = None
    """Neuron file: these are off."""
    patch: NeuronFile | None = None
    """Neuron file: patched from --donor."""
    donor: ModelName | None = None
    """The model that gives the activations of --patch."""
    guard: Annotated[pathlib.Path | None, Reads("files")] = None
    """Folder of a guard, or of the run that fit it: flagged prompts get its refusal."""

    def check(self) -> None:
        """Also that there is one model with one treatment."""
        super().check()
        if (self.model is None) == (self.endpoint is None):
            raise UsageError(
                f"{'neither' if self.model is None else 'both'} of --model and --endpoint given, "
                "expected one of them"
            )
        if parse_object("--request", self.request) is not None and self.endpoint is None:
            raise UsageError(
                "--request without --endpoint; expected --endpoint URL#MODEL, whose requests these "
                "fields are for"
            )
        treatments = [
            f"--{name}" for name in ("deactivate", "patch", "guard") if getattr(self, name) is not None
        ]
        if self.endpoint is not None and (treatments or self.reference):
            raise UsageError(
                f"{[*treatments, '--reference'][0]} with --endpoint; expected --model, whose activations "
                "can be reached"
            )
        if len(treatments) > 1:
            raise UsageError(f"{' and '.join(treatments)} given together; expected one treatment")
        if (self.patch is None) != (self.donor is None):
            raise UsageError("--patch and --donor belong together; expected both, or neither")

    def look(self) -> None:
        """The guard."""
        super().look()
        if self.guard is not None:
            from safety_neurons.guard import Guard

            Guard.load(self.guard)


@dataclasses.dataclass(frozen=True)
class Questions(Declaration):
    """What the model is asked, and who judges."""

    PANEL: ClassVar[str | None] = "What is asked"

    suite: Annotated[str, Reads("suites")] = "builtin:harmful-test"
    """Comma-separated: builtin:NAME, names of `data list`, files, NAME=FILE, hub:…"""
    over_refusal: Annotated[str, Reads("suites")] = "builtin:harmless-test"
    """Harmless requests, asked where no suite has any; none leaves them out."""
    attack: str = "direct"
    """Comma-separated attacks put around harmful requests; direct is none, gcg:500x512 names steps and
    candidates.
    """
    judge: Annotated[str | None, Reads("judges")] = None
    """Comma-separated judges. [default: refusal,strings:advbench,goes-along]"""
    capability: Annotated[str | None, Reads("files")] = None
    """Comma-separated: perplexity[:FILE], kl[:PROMPTS], wikitext:FILE, gsm8k:FILE, mmlu:FOLDER,
    lm-eval:TASK
    """
    folder: Annotated[pathlib.Path | None, Reads("folder")] = None
    """Folder of the suites' files. [default: SAFETY_NEURONS_DATA]"""

    def check(self) -> None:
        """Also that something is asked."""
        super().check()
        for name in ("suite", "attack"):
            if not listed(getattr(self, name)):
                raise UsageError(f"--{name} names nothing; expected at least one, comma-separated")


@dataclasses.dataclass(frozen=True)
class Tasks(Declaration):
    """How capability is measured."""

    PANEL: ClassVar[str | None] = "What is asked"

    capability_limit: Positive | None = None
    """Items of each capability task."""
    shots: Count | None = None
    """Examples shown by tasks. [default: what is usual]"""
    tasks_folder: Annotated[pathlib.Path | None, Reads("files")] = None
    """Task files of lm-evaluation-harness."""

    def look(self) -> None:
        """The folder."""
        super().look()
        if self.tasks_folder is not None and not self.tasks_folder.is_dir():
            raise InputError(
                f"--tasks-folder {str(self.tasks_folder)!r} is no folder; expected task files of "
                "lm-evaluation-harness"
            )


@dataclasses.dataclass(frozen=True)
class AnswerOptions(Declaration):
    """How the model answers."""

    PANEL: ClassVar[str | None] = "How it answers"

    max_new_tokens: Annotated[Positive | None, Panel("Prompts")] = None
    """Length of a completion, in tokens. [default: 256, on organisms 64]"""
    length_curve: Annotated[bool, Panel("Prompts")] = False
    """Judge the answers cut at 32, 64, 128, … tokens too; they are written once."""
    answer_tokens: Positive = 256
    """Length of an answer in tasks that generate."""
    samples: Positive = 1
    """Completions of every prompt, each with its own seed."""
    temperature: NotNegative = 0.0
    """Of sampling; 0 is greedy."""
    top_p: Share = 1.0
    """Of sampling."""

    def check(self) -> None:
        """Also that samples differ."""
        super().check()
        if self.samples > 1 and not self.temperature:
            raise UsageError(
                f"--samples {self.samples} at --temperature 0 are all the same; expected a temperature "
                "above 0, such as 1"
            )


@dataclasses.dataclass(frozen=True)
class Held(Declaration):
    """What the result is held against."""

    PANEL: ClassVar[str | None] = "What it is compared with"

    baseline: Annotated[pathlib.Path | None, Reads("files")] = None
    """Folder of an earlier evaluate run, in place of the untreated arm."""
    gate: pathlib.Path | None = None
    """Thresholds in TOML; exit 3 where one is not met."""

    def look(self) -> None:
        """The gate."""
        super().look()
        if self.gate is not None:
            from safety_neurons.results import Gate

            Gate.load(self.gate)


@verb("evaluate")
def evaluate(
    session: Session,
    evaluated: Evaluated,
    requests: Questions,
    some: Some,
    tasks: Tasks,
    answers: AnswerOptions,
    held: Held,
) -> dict[str, Any]:
    """Harm, over-refusal and capability of a model as it is or treated, by several judges, held to a gate."""

    def work() -> dict[str, Any]:
        from safety_neurons.capability import TaskSettings
        from safety_neurons.studies import evaluate as study

        common, loaded = session.common, models(session, evaluated)
        for name in ("completions.jsonl", "judgements.sqlite", "capability.json", "answered_by.json"):
            session.folder.path(name)
        settings = TaskSettings(
            tasks.capability_limit,
            tasks.shots,
            answers.answer_tokens,
            session.batch_size(),
            common.seed,
            tasks_folder=tasks.tasks_folder,
            offline=common.offline,
        )
        judges: dict[str, Any] = {"judges": listed(requests.judge)} if requests.judge else {}
        with session.status("evaluate") as progress:
            evaluation = study(
                loaded.pop("model"),
                listed(requests.suite) or (),
                capability=listed(requests.capability) or (),
                over_refusal=None if requests.over_refusal == "none" else requests.over_refusal,
                attacks=listed(requests.attack) or (),
                limit=some.limit,
                data=requests.folder,
                column=some.column,
                offline=common.offline,
                settings=settings,
                judge_options=session.judging,
                out=session.folder.folder,
                progress=progress,
                max_new_tokens=session.answer_length(answers.max_new_tokens),
                **{
                    name: value
                    for name, value in answers.values().items()
                    if name not in ("answer_tokens", "max_new_tokens")
                },
                **held.values(),
                **session.running,
                **judges,
                **loaded,
            )
        session.notes.extend(evaluation.notes)
        return {**evaluation.record(), "completions": str(session.folder.path("completions.jsonl"))}

    return session.gated(session.run(work), held.gate)


def models(session: Session, evaluated: Evaluated) -> dict[str, Any]:
    """The model, its treatment and its reference, as the study takes them."""
    common = session.common
    if evaluated.endpoint is not None:
        from safety_neurons.model.chat_server import Endpoint

        session.device = "endpoint"
        request = parse_object("--request", evaluated.request)
        endpoint = Endpoint(
            evaluated.endpoint,
            system=common.system,
            request=request,
            think_end=common.think_end,
            offline=common.offline,
        )
        return {"model": endpoint}
    assert evaluated.model is not None
    if evaluated.patch is not None and evaluated.donor is not None:
        pair = session.pair(evaluated.model, evaluated.donor)
        loaded = {
            "model": pair.base,
            "donor": pair.aligned,
            "patch": session.neurons(evaluated.patch, pair.base),
        }
    else:
        loaded = {"model": session.model(evaluated.model)}
        if evaluated.deactivate is not None:
            loaded["deactivate"] = session.neurons(evaluated.deactivate, loaded["model"])
    if evaluated.guard is not None:
        from safety_neurons.guard import Guard

        loaded["guard"] = Guard.load(evaluated.guard, loaded["model"])
    if evaluated.reference is not None:
        loaded["reference"] = session.model(evaluated.reference)
    return loaded
