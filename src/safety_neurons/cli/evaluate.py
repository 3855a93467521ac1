"""evaluate: harm, over-refusal and capability of a model as it is or treated, held to a gate."""

import dataclasses
import pathlib
from typing import Annotated, Any, ClassVar

from safety_neurons.cli.options import ModelName, NeuronFile, Some, listed, parse_object
from safety_neurons.cli.session import Session
from safety_neurons.cli.verb import verb
from safety_neurons.declarations import Count, Declaration, NotNegative, Panel, Positive, Reads, Share
from safety_neurons.errors import InputError, UsageError


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
    """Folder of a guard: flagged prompts get its refusal."""

    def check(self) -> None:
        """Also that there is one model with one treatment."""
        super().check()
        if (self.model is None) == (self.endpoint is None):
            raise UsageError(f"{'neither' if self.model is None else 'both'} of --model and --endpoint given, expected one of them")
        if parse_object("--request", self.request) is not None and self.endpoint is None:
            raise UsageError("--request without --endpoint; expected --endpoint URL#MODEL, whose requests these fields are for")
        treatments = [f"--{name}" for name in ("deactivate", "patch", "guard") if getattr(self, name) is not None]
        if self.endpoint is not None and (treatments or self.reference):
            raise UsageError(f"{[*treatments, '--reference'][0]} with --endpoint; expected --model, whose activations can be reached")
        if len(treatments) > 1:
            raise UsageError(f"{' and '.join(treatments)} given together; expected one treatment")
        if (self.patch is None) != (self.donor is None):
            raise UsageError("--patch and --donor belong together; expected both, or neither")
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
    """Comma-separated attacks put around harmful requests; direct is none."""
    judge: Annotated[str | None, Reads("judges")] = None
    """Comma-separated judges. [default: refusal,strings:advbench]"""
    capability: Annotated[str | None, Reads("files")] = None
    """Comma-separated: perplexity[:FILE], kl[:PROMPTS], wikitext:FILE, gsm8k:FILE, mmlu:FOLDER, lm-eval:TASK"""
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

    def check(self) -> None:
        """Also that the folder is one."""
        super().check()
        if self.tasks_folder is not None and not self.tasks_folder.is_dir():
            raise InputError(f"--tasks-folder {str(self.tasks_folder)!r} is no folder; expected task files of lm-evaluation-harness")


@dataclasses.dataclass(frozen=True)
class AnswerOptions(Declaration):
    """How the model answers."""

    PANEL: ClassVar[str | None] = "How it answers"

    max_new_tokens: Annotated[Positive, Panel("Prompts")] = 128
    """Length of a completion, in tokens."""
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
            raise UsageError(f"--samples {self.samples} at --temperature 0 are all the same; expected a temperature above 0, such as 1")


@dataclasses.dataclass(frozen=True)
class Held(Declaration):
    """What the result is held against."""

    PANEL: ClassVar[str | None] = "What it is compared with"

    baseline: Annotated[pathlib.Path | None, Reads("files")] = None
    """Folder of an earlier evaluate run, in place of the untreated arm."""
    gate: pathlib.Path | None = None
    """Thresholds in TOML; exit 3 where one is not met."""

    def check(self) -> None:
        """Also that the gate can be read."""
        super().check()
        if self.gate is not None:
            from safety_neurons.results import Gate

            Gate.load(self.gate)


@verb("evaluate")
def evaluate(
    session: Session, evaluated: Evaluated, requests: Questions, some: Some, tasks: Tasks, answers: AnswerOptions, held: Held
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
                **{name: value for name, value in answers.values().items() if name != "answer_tokens"},
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
        endpoint = Endpoint(evaluated.endpoint, system=common.system, request=request, think_end=common.think_end, offline=common.offline)
        return {"model": endpoint}
    assert evaluated.model is not None
    if evaluated.patch is not None and evaluated.donor is not None:
        pair = session.pair(evaluated.model, evaluated.donor)
        loaded = {"model": pair.base, "donor": pair.aligned, "patch": session.neurons(evaluated.patch, pair.base)}
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
