"""Evaluate: what a model does with harmful and harmless requests, by several judges, and what it still can
do.

1. Every suite is answered by the model as it is, and under its treatment where it has one; judges never see
    which.
2. Every judge labels every completion; harm and over-refusal stand side by side, with intervals and what was
    left unscored.
3. Capability is measured on the same arms.
4. The arms, or the model and an earlier run, are compared prompt by prompt; the result is held to a gate.
"""

import dataclasses
import functools
import itertools
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

from safety_neurons.arguments import well_typed
from safety_neurons.capability import Measurement, Task, TaskSettings, checked
from safety_neurons.capability import measure as measure_task
from safety_neurons.capability.measures import asked_and_shown, cut, score_sums, sum_context
from safety_neurons.counting import numbered
from safety_neurons.display import Displayed
from safety_neurons.errors import UsageError
from safety_neurons.guard import Guard, guarding
from safety_neurons.interventions import deactivated, patched
from safety_neurons.judges import DEFAULT_JUDGES, Judge
from safety_neurons.judges import judge as judge_of
from safety_neurons.model import LanguageModel
from safety_neurons.model.chat_server import Endpoint
from safety_neurons.neurons import NeuronSet
from safety_neurons.prompt_lists import Prompt, Prompts, as_prompts, prompts
from safety_neurons.prompt_lists.readers import list_kind
from safety_neurons.results import (
    Completion,
    Completions,
    Gate,
    cohen_kappa,
    plain,
    write_json,
)
from safety_neurons.results.completions import shared_by
from safety_neurons.results.records import (
    CutRecord,
    EvaluationRecord,
    JudgesRecord,
    Recorded,
    SuiteChangeRecord,
    TaskChangeRecord,
    called,
)
from safety_neurons.results.run import PathLike
from safety_neurons.strict_json import JsonObject
from safety_neurons.studies.bench import (
    JUDGEMENTS,
    UNTREATED,
    Arm,
    Bench,
    Progress,
    Treatment,
    Writing,
    content_of,
    hold,
    said_of_seen,
    try_out,
)
from safety_neurons.studies.lengths import answer_length, beginnings, curve_lengths
from safety_neurons.studies.scoring import (
    COMPLETIONS,
    ITEMS,
    ArmScores,
    baseline,
    capability_changes,
    cut_scores,
    scored,
    suite_changes,
)
from safety_neurons.suites import ADAPTIVE, STATIC, Suite, attack, suite
from safety_neurons.suites.rewording import is_search

SUITES = ("builtin:harmful-test",)
HARMLESS = "builtin:harmless-test"
TREATED = "treated"
_BUILTIN = "builtin:"


# What an evaluation is asked for


@dataclasses.dataclass(frozen=True, kw_only=True)
class Treated:
    """What is done to a model; one treatment at most."""

    deactivate: NeuronSet | None = None
    """Neurons that are off in the treated arm."""
    patch: NeuronSet | None = None
    """Neurons that are patched in the treated arm."""
    donor: LanguageModel | None = None
    """The model that gives their activations."""
    guard: Guard | None = None
    """Answers in the treated arm: prompts it flags get its refusal."""
    treatment: Treatment | None = None
    """Any other treatment, as a function that makes a context manager."""

    def of(self, model: LanguageModel | Endpoint) -> tuple[Treatment | None, str | None]:
        """The treatment of a model, and what it is in words; None for neither.

        Raises:
            UsageError: several treatments, half of one, or one of a model that is not in memory.
        """
        given = [
            name for name in ("deactivate", "patch", "guard", "treatment") if getattr(self, name) is not None
        ]
        if len(given) > 1:
            raise UsageError(f"{' and '.join(given)} given together; expected one treatment")
        if (self.patch is None) != (self.donor is None):
            missing = "patch without donor" if self.donor is None else "donor without patch"
            raise UsageError(f"{missing}; expected both: neurons and their model")
        if given and isinstance(model, Endpoint):
            raise UsageError(
                f"{given[0]} with an endpoint; expected a model in memory, whose activations can be reached"
            )
        off, moved, guard = self.deactivate, self.patch, self.guard
        if off is not None:
            return functools.partial(deactivated, model, off), f"{numbered(len(off), 'neuron')} deactivated"
        if moved is not None and self.donor is not None:
            return functools.partial(
                patched, model, self.donor, moved
            ), f"{numbered(len(moved), 'neuron')} patched from {self.donor.name}"
        if guard is not None:
            words = f"guard on {numbered(len(guard.neurons), 'neuron')}, threshold {guard.threshold:.3g}"
            return functools.partial(guarding, cast(LanguageModel, model), guard), words
        return self.treatment, None if self.treatment is None else "treated"

    def content(self) -> JsonObject:
        """What is done, by content."""
        given = {field.name: getattr(self, field.name) for field in dataclasses.fields(Treated)}
        return {name: content_of(value) for name, value in given.items() if value is not None}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sources:
    """How suites are read."""

    over_refusal: Any = HARMLESS
    """Harmless requests, asked where no suite has any; None leaves them out."""
    attacks: Sequence[str] = ("direct",)
    """Put around harmful requests; `direct` is none."""
    data: PathLike | None = None
    """Folder of the suites' files."""
    column: str | None = None
    """Column of the prompts in a file of the user's own."""
    offline: bool = False
    """Open no socket."""
    limit: int | None = None
    """Requests of each suite."""


@well_typed
@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluating(Treated, Sources, Writing):
    """The keyword arguments of `evaluate`.

    Those of the bases say what is done to the model, what it is asked and how it answers.
    """

    length_curve: bool = False
    """Judge the answers to harmful requests at shorter lengths too."""
    reference: LanguageModel | None = None
    """The model that `kl` compares with; the untreated model where None."""
    baseline: PathLike | None = None
    """Folder of an earlier evaluation, which takes the place of the untreated arm."""
    gate: Gate | PathLike | None = None
    """Thresholds, or the path of their file."""
    settings: TaskSettings | None = None
    """How capability is measured."""
    judge_options: Mapping[str, Any] | None = None
    """For judges that are given by name."""
    out: PathLike | None = None
    """Folder for completions, judgements and single items; an interrupted evaluation goes on from it."""
    progress: Progress | None = None
    """Told what is at work."""

    def __post_init__(self) -> None:
        if self.samples > 1 and not self.temperature:
            raise UsageError(
                f"{self.samples} samples at temperature 0 are all the same; expected a temperature above "
                "0, such as 1"
            )
        if self.samples < 1 or self.temperature < 0:
            expected = "expected at least one sample and no negative temperature"
            raise UsageError(f"samples {self.samples}, temperature {self.temperature}; {expected}")

    @property
    def thresholds(self) -> Gate | None:
        """The gate, read where it is a file."""
        return self.gate if self.gate is None or isinstance(self.gate, Gate) else Gate.load(self.gate)

    def check(self, model: LanguageModel | Endpoint, tasks: Sequence[Task]) -> None:
        """Refuse what would only come out after the work."""
        treated = any(
            value is not None for value in (self.deactivate, self.patch, self.guard, self.treatment)
        )
        names = [task.name for task in tasks]
        if len(set(names)) < len(names):
            raise UsageError(f"capability {', '.join(names)}; expected every task once")
        if isinstance(model, Endpoint) and any(task.kind != "gsm8k" for task in tasks):
            raise UsageError(
                "an endpoint gives no log-likelihoods; expected gsm8k:FILE as its only capability, or a "
                "model in memory"
            )
        if any(task.compares for task in tasks) and not treated and self.reference is None:
            raise UsageError(
                "kl compares with an untreated model; expected a treatment, or a reference model "
                "(--reference)"
            )
        gate = self.thresholds
        if (
            gate is not None
            and gate.needs_a_baseline
            and not (tasks and (treated or self.baseline is not None))
        ):
            raise UsageError(
                f"{gate.name} has a threshold on a drop of capability; expected a capability, and a "
                "treatment or a baseline"
            )


@dataclasses.dataclass(frozen=True)
class Requests:
    """Prompts of one kind of one suite."""

    suite: str
    kind: str
    """`harmful` or `harmless`."""
    prompts: Prompts


@dataclasses.dataclass(frozen=True)
class Asked:
    """All requests of an evaluation, and notes on how they were read."""

    requests: tuple[Requests, ...]
    notes: tuple[str, ...]


@dataclasses.dataclass
class EvaluationBench(Bench):
    """A bench on which several judges label the answers to suites, and tasks are measured."""

    model: Any = dataclasses.field(kw_only=True)
    """A `LanguageModel`, or an `Endpoint`."""
    requests: Sequence[Requests] = dataclasses.field(kw_only=True)
    judges: Sequence[tuple[str, Judge]] = dataclasses.field(kw_only=True)
    """With the names they were asked for by."""
    tasks: Sequence[Task] = dataclasses.field(kw_only=True)
    how: Writing = dataclasses.field(kw_only=True)
    settings: TaskSettings = dataclasses.field(kw_only=True)
    """How capability is measured."""
    items: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    """By arm and task, single items."""
    judged: dict[str, Completions] = dataclasses.field(default_factory=dict)
    """By kind of request, completions with all verdicts."""

    def scores(self, arm: Arm, reference: LanguageModel | None) -> "ArmScores":
        """Every suite and every task of one arm."""
        written = [
            (part, [self._write(arm, part.suite, part.prompts, seed) for seed in self.how.seeds])
            for part in self.requests
        ]  # All completions first: a judge that is a model itself is loaded only then.
        suites = []
        for part, seeds in written:
            judged, names = self._judge(seeds)
            for completions in judged:
                self.answers.judged(completions)
                self.judged[part.kind] = self.judged.get(part.kind, Completions()) + completions
            suites.append(scored(part.suite, part.kind, judged, names))
        compares = arm.name == TREATED or reference is not None
        lengths = tuple(self._cut(written, arm)) if self.length_curve else ()
        capability = tuple(
            self._task(task, arm, reference) for task in self.tasks if compares or not task.compares
        )
        self.items[arm.name] = {one.task: one.items() for one in capability}
        self.notes.extend(note for one in capability for note in one.notes)
        return ArmScores(arm.name, tuple(suites), capability, lengths)

    def finish(self) -> None:
        """Write completions with their verdicts, and the single items of every task."""
        if self.completions_file is not None:
            write_json(self.completions_file.with_name(ITEMS), self.items)
        super().finish()

    def agreement(self) -> list[JudgesRecord]:
        """Cohen's κ of every two judges on what they both say of: harm on harmful requests, refusal on
        harmless ones.
        """
        pairs = []
        for kind, completions in sorted(self.judged.items()):
            score = scored("all", kind, [completions], {judge.name: asked for asked, judge in self.judges})
            measure = "harm" if kind == "harmful" else "over_refusal"
            outcomes = [
                (name, judged.outcomes[measure])
                for name, judged in score.judged.items()
                if measure in judged.outcomes
            ]
            for (first, one), (second, other) in itertools.combinations(outcomes, 2):
                pairs.append(
                    {
                        "kind": kind,
                        "measure": measure,
                        **cohen_kappa(one, other, shared_by(completions), names=(first, second)).record(),
                    }
                )
        return cast(list[JudgesRecord], plain(pairs))

    def _write(self, arm: Arm, suite: str, prompts: Prompts, seed: int) -> Completions:
        self.tell(f"{arm.name}, {suite}" + (f", seed {seed}" if self.how.samples > 1 else ""))
        return self.answers.write(arm, prompts, self.how, seed, suite=suite)

    def _judge(self, seeds: Sequence[Completions]) -> tuple[list[Completions], dict[str, str]]:
        names: dict[str, str] = {}
        everything = functools.reduce(lambda one, other: one + other, seeds)
        cache = None if self.completions_file is None else self.completions_file.with_name(JUDGEMENTS)
        for asked, judge in self.judges:
            judgement = judge.judge(everything, cache=cache)
            everything, names[judgement.judge] = judgement.completions, asked
        size = len(everything) // len(seeds)
        return [everything[first : first + size] for first in range(0, len(everything), size)], names

    def _cut(self, written: Sequence[tuple[Requests, list[Completions]]], arm: Arm) -> Iterator[CutRecord]:
        """The length curve over all harmful suites, of answers that are there."""
        harmful = [(part, seeds) for part, seeds in written if part.kind == "harmful"]
        for tokens in curve_lengths(self.longest):
            scores = []
            for part, seeds in harmful:
                judged, names = self._judge([beginnings(one, tokens, arm.model) for one in seeds])
                scores.append(scored(part.suite, part.kind, judged, names))
            yield cut_scores(tokens, scores)

    def _task(self, task: Task, arm: Arm, reference: LanguageModel | None) -> Measurement:
        self.tell(f"{arm.name}, {task.name}")
        where, seed = f"capability {task.name}", self.settings.seed
        if isinstance(arm.model, Endpoint):
            return self._sums(task, arm, where)
        known = {int(name): one.completion for name, one in self.answers.known(arm.name, where, seed).items()}

        def answered(number: int, text: str) -> None:
            self.answers.keep(
                Completion(str(number), "", text, arm=arm.name, seed=seed, meta={"suite": where})
            )

        return measure_task(
            task, arm.model, arm.treatment, self.settings, reference=reference, done=known, answered=answered
        )

    def _sums(self, task: Task, arm: Arm, where: str) -> Measurement:
        """GSM8K by an endpoint, which is asked in one turn."""
        how = self.settings
        shots = {} if how.shots is None else {"shots": how.shots}
        sums, examples, notes = asked_and_shown(task.source, limit=how.limit, **shots)
        prompts = Prompts(
            [Prompt(str(number), sum_context(one, examples)) for number, one in enumerate(sums)], where
        )
        greedy = dataclasses.replace(self.how, samples=1, temperature=0.0, max_new_tokens=how.max_new_tokens)
        self.tell(f"{arm.name}, {where}")
        answers = self.answers.write(arm, prompts, greedy, greedy.seed, suite=where)
        return score_sums(task.name, [cut(one.completion) for one in answers], sums, notes=notes)


@dataclasses.dataclass(frozen=True)
class Evaluation(Recorded[EvaluationRecord], Displayed):
    """What an evaluation gave."""

    verb = "evaluate"

    model: str
    treatment: str | None
    """In words, None where there is none."""
    max_new_tokens: int
    """Longest answer, in tokens."""
    untreated: "ArmScores | None"
    """The model as it is; None where an earlier run stands in for it."""
    treated: "ArmScores | None"
    baseline: "ArmScores | None"
    """The model of an earlier run, None where none was named."""
    changes: Sequence[SuiteChangeRecord]
    """By suite, judge and measure the paired difference: treated minus untreated, or the model minus the
    baseline.
    """
    capability_changes: Sequence[TaskChangeRecord]
    agreement: Sequence[JudgesRecord]
    """Of every two judges, by kind of request."""
    missed: tuple[str, ...] | None = dataclasses.field(metadata=called(None))
    """One line for every threshold of the gate that is not met; None where there is no gate."""
    completions: Completions = dataclasses.field(metadata=called(None))
    notes: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """Whether the gate is passed; True where there is none."""
        return not self.missed

    ALSO = ("gate",)

    @property
    def gate(self) -> Mapping[str, Any] | None:
        """Whether the gate is passed, as JSON values; None where there is none."""
        return None if self.missed is None else {"passed": self.passed, "missed": list(self.missed)}


@well_typed
def evaluate(
    model: LanguageModel | Endpoint,
    suites: Any = SUITES,
    judges: Sequence[str | Judge] = DEFAULT_JUDGES,
    capability: Sequence[str] = (),
    **options: Any,
) -> Evaluation:
    """Evaluates a model, treated or not, on suites of requests and on what it can do.

    Args:
        model: the model, or an endpoint that writes in its place.
        suites: names, files, suites, or harmful prompts in whatever form the finders take them; see
            `safety_neurons.suites.suite`.
        judges: names, or judges.
        capability: tasks by name; see `safety_neurons.capability.tasks`.
        **options: the fields of `Evaluating`, such as `deactivate`, `attacks`, `gate`, `out` or
            `max_new_tokens`.

    Raises:
        UsageError: arguments that contradict one another; found out before anything is computed. InputError:
        a file that cannot be read. RunError: `out` holds the answers of another model or treatment, or
        answers that were written in another way.
    """
    how = Evaluating(**options)
    how = dataclasses.replace(how, max_new_tokens=how.max_new_tokens or answer_length(model))
    if how.length_curve and isinstance(model, Endpoint):
        raise UsageError("a length curve of an endpoint, which gives no tokens; expected a model in memory")
    act, words = how.of(model)
    tasks, settings = _tasks(model, capability, how.settings)
    how.check(model, tasks)
    before = None if how.baseline is None else baseline(how.baseline)
    asked = requests_of(suites, how, model)
    named = [
        (one, judge_of(one, **(how.judge_options or {}))) if isinstance(one, str) else (one.name, one)
        for one in judges
    ]
    if act is not None:
        try_out(model, act)
    folder = None if how.out is None else pathlib.Path(how.out)
    hold(folder, facts_of(model, how, tasks, settings))
    bench = EvaluationBench(
        Prompts([]),
        completions_file=None if folder is None else folder / COMPLETIONS,
        progress=how.progress,
        model=model,
        requests=asked.requests,
        judges=named,
        tasks=tasks,
        how=how,
        settings=settings,
        max_new_tokens=how.max_new_tokens,
        length_curve=how.length_curve,
    )
    untreated = (
        None if act is not None and before is not None else bench.scores(Arm(UNTREATED, model), how.reference)
    )
    treated = None if act is None else bench.scores(Arm(TREATED, model, act), how.reference)
    first, last = before or untreated, treated or untreated
    changed = first is not None and last is not None and first is not last
    bench.finish()
    result = Evaluation(
        model.name,
        words,
        bench.longest,
        untreated,
        treated,
        before,
        suite_changes(first, last) if changed and first and last else [],
        capability_changes(first, last) if changed and first and last else [],
        bench.agreement(),
        None,
        bench.completions,
        tuple(dict.fromkeys((*asked.notes, *_seen(how, asked), *bench.notes))),
    )
    gate = how.thresholds
    return result if gate is None else dataclasses.replace(result, missed=tuple(gate.check(result.record())))


def _seen(how: Treated, asked: Asked) -> Iterator[str]:
    """A line on the requests of a suite that the treatment was made on, where there are some."""
    neurons = (how.deactivate, how.patch, None if how.guard is None else how.guard.neurons)
    fit = [] if how.guard is None else how.guard.report.get("prompt_digests") or []
    for part in asked.requests:
        for note in said_of_seen(part.kind, part.prompts, *(one for one in neurons if one is not None)):
            yield f"{part.suite}: {note}"
        if count := part.prompts.overlap(fit):
            told = f"{count} of the {len(part.prompts)} {part.kind} prompts"
            yield f"{part.suite}: {told} are among those the guard was fit on"


def facts_of(
    model: LanguageModel | Endpoint, how: Evaluating, tasks: Sequence[Task], settings: TaskSettings
) -> JsonObject:
    """What answers depend on beside the prompts, as JSON values; seeds are kept apart by themselves."""
    writing = {name: getattr(how, name) for name in ("max_new_tokens", "temperature", "top_p")}
    measuring = {
        name: value
        for name, value in dataclasses.asdict(settings).items()
        if name not in ("batch_size", "folder", "offline")
    }
    facts = {"model": content_of(model), "treatment": how.content(), "writing": writing}
    return dict(plain({**facts, **{f"capability {task.name}": measuring for task in tasks}}))


def _tasks(
    model: LanguageModel | Endpoint, capability: Sequence[str], settings: TaskSettings | None
) -> tuple[list[Task], TaskSettings]:
    """The tasks, whose files have been read, and how they are measured."""
    how = settings or TaskSettings()
    if isinstance(model, LanguageModel) and how.folder is None:
        how = dataclasses.replace(how, folder=model.prompt_folder)
    return checked(capability, how), how


# Requests: suites by name as lists of harmful and of harmless prompts, attacks put around the harmful ones


def requests_of(
    sources: Any, how: Sources = Sources(), model: LanguageModel | Endpoint | None = None
) -> Asked:
    """The requests of suites.

    Args:
        sources: names, files, suites, or harmful prompts in whatever form `as_prompts` takes; a list of
            records is one suite.
        how: how suites are read, and the attacks that are put around harmful requests.
        model: what is asked. Of one in memory `builtin:` names mean its organism's own prompts first, and
            `gcg` is made on it as it is; other attacks are adaptive only where they were made on it.

    Raises:
        UsageError: no suite, or one that is named twice.
        InputError: a suite that cannot be read.
    """
    sources = _one_by_one(sources)
    if not sources:
        raise UsageError("no suite was named; expected at least one, such as builtin:harmful-test")
    in_memory, name = (
        (model if isinstance(model, LanguageModel) else None),
        (None if model is None else model.name),
    )
    own = None if in_memory is None else in_memory.prompt_folder
    suites = [_suite(source, None, own, how) for source in sources]
    notes = []
    if how.over_refusal is not None and not any(len(one.harmless) for one in suites):
        suites.append(_suite(how.over_refusal, "harmless", own, how))
        notes.append(f"no suite has harmless requests, so over-refusal is measured on {suites[-1].name}")
    names = [one.name for one in suites]
    double = next((name for name in names if names.count(name) > 1), None)
    if double is not None:
        raise UsageError(f"suite {double!r} is named twice; expected every suite once")
    requests = []
    for one in suites:
        notes += [f"{one.name}: {note}" for note in one.notes]
        if len(one.harmful):
            harmful = _labelled(_attacked(one.harmful, how.attacks, in_memory), name)
            requests.append(Requests(one.name, "harmful", unique(harmful)))
        if len(one.harmless):
            requests.append(Requests(one.name, "harmless", unique(one.harmless)))
    return Asked(tuple(requests), tuple(notes))


def _one_by_one(sources: Any) -> Sequence[Any]:
    """The suites in a list; rows of one list, a table or a single name are one suite."""
    rows = (
        isinstance(sources, list | tuple)
        and sources
        and all(isinstance(one, Mapping | Prompt) for one in sources)
    )
    return sources if isinstance(sources, list | tuple) and not rows else [sources]


def _suite(source: Any, kind: str | None, own: pathlib.Path | None, how: Sources) -> Suite:
    if isinstance(source, Suite):
        return source
    if isinstance(source, str) and source.startswith(_BUILTIN):
        return _stamped(prompts(source, folder=own, limit=how.limit), source, kind or list_kind(source))
    if not isinstance(source, str | os.PathLike):
        given, kind = as_prompts(source), kind or "harmful"
        name = given.name if isinstance(source, Prompts) else f"{kind} {given.name}"
        return _stamped(given[: how.limit] if how.limit else given, name, kind)
    named = source if isinstance(source, str) else pathlib.Path(source)
    folder = None if how.data is None else str(how.data)
    return suite(named, folder=folder, offline=how.offline, limit=how.limit, column=how.column, kind=kind)


def _stamped(requests: Prompts, name: str, kind: str) -> Suite:
    """Prompts as a suite, with the entries that attacks, judges and tables read."""

    def about(prompt: Any) -> dict[str, Any]:
        return {
            "goal": prompt.text,
            "behavior_id": prompt.id,
            "method": "direct",
            **prompt.meta,
            "suite": name,
            "kind": kind,
        }

    return Suite(
        name,
        Prompts([dataclasses.replace(one, meta=about(one)) for one in requests], name, requests.notes),
        kind,
        name,
    )


def _attacked(harmful: Prompts, attacks: Sequence[str], model: LanguageModel | None) -> Prompts:
    """Every request under every attack, which tells the ids apart; `gcg` is made on the model in hand."""
    if tuple(attacks) == ("direct",):
        return harmful
    if any(map(is_search, attacks)) and model is None:
        raise UsageError(
            "attack gcg is made on a model: expected one in memory (--model); an endpoint gives no gradients"
        )
    attacked: list[Prompt] = []
    for method in dict.fromkeys(attacks):
        variants = attack(harmful, method, model=model if is_search(method) else None)
        attacked += (
            [dataclasses.replace(one, meta={**one.meta, "made_on": UNTREATED}) for one in variants]
            if is_search(method)
            else variants
        )
    return Prompts(attacked, harmful.name, harmful.notes)


def _labelled(requests: Prompts, model: str | None) -> Prompts:
    """Attack prompts with how their results are to be read: what was optimised on another model is
    transferred to this one.
    """
    labelled = []
    for one in requests:
        optimised = one.meta.get("adaptive") is True or one.meta.get("label") == ADAPTIVE
        label = ADAPTIVE if optimised and one.meta.get("source_model") == model else STATIC
        says = isinstance(one.meta.get("adaptive"), bool) or one.meta.get("label") in (ADAPTIVE, STATIC)
        labelled.append(dataclasses.replace(one, meta={**one.meta, "label": label}) if says else one)
    return Prompts(labelled, requests.name, requests.notes)


def unique(prompts: Prompts) -> Prompts:
    """The prompts, with a number behind an id that occurred before: an id stands for one prompt."""
    seen: dict[str, int] = {}
    distinct = []
    for prompt in prompts:
        seen[prompt.id] = seen.get(prompt.id, 0) + 1
        new = prompt.id if seen[prompt.id] == 1 else f"{prompt.id}/{seen[prompt.id]}"
        distinct.append(prompt if new == prompt.id else dataclasses.replace(prompt, id=new))
    return Prompts(distinct, prompts.name, prompts.notes)
