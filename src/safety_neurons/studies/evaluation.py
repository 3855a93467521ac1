"""Evaluate: what a model does with harmful and harmless requests, by several judges, and what it still can do.

1. Every suite is answered by the model as it is, and under its treatment where it has one; judges never see which.
2. Every judge labels every completion; harm and over-refusal stand side by side, with intervals and what was left unscored.
3. Capability is measured on the same arms.
4. The arms, or the model and an earlier run, are compared prompt by prompt; the result is held to a gate.
"""

import dataclasses
import functools
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from safety_neurons.capability import Measurement, Task, TaskSettings
from safety_neurons.capability import check as check_task
from safety_neurons.capability import measure as measure_task
from safety_neurons.capability import task as task_of
from safety_neurons.capability.measures import asked_and_shown, cut, score_sums, sum_context
from safety_neurons.errors import UsageError
from safety_neurons.guard import Guard, guarding
from safety_neurons.interventions import deactivated, patched
from safety_neurons.judges import DEFAULT_JUDGES, Judge
from safety_neurons.judges import judge as judge_of
from safety_neurons.model import LanguageModel
from safety_neurons.model.chat_server import Endpoint
from safety_neurons.neurons import NeuronSet
from safety_neurons.prompt_lists import Prompt, Prompts, as_prompts, prompts
from safety_neurons.results import Completion, Completions, Gate, cohen_kappa, write_json
from safety_neurons.results.files import PathLike
from safety_neurons.studies import notebook
from safety_neurons.studies.bench import UNTREATED, Answers, Arm, Progress, Treatment, Writing, facts_of, hold
from safety_neurons.studies.scoring import ITEMS, ArmScores, capability_changes, pooled, scored, suite_changes
from safety_neurons.studies.scoring import baseline as baseline_of
from safety_neurons.suites import ADAPTIVE, STATIC, Suite, attack, suite

SUITES = ("builtin:harmful-test",)
HARMLESS = "builtin:harmless-test"
TREATED = "treated"
COMPLETIONS, JUDGEMENTS = "completions.jsonl", "judgements.sqlite"
_BUILTIN = "builtin:"


@dataclasses.dataclass(frozen=True)
class Requests:
    """Prompts of one kind of one suite.

    Attributes:
        suite: name of the suite.
        kind: `harmful` or `harmless`.
        prompts: what is asked.
    """

    suite: str
    kind: str
    prompts: Prompts


@dataclasses.dataclass(frozen=True)
class Asked:
    """All requests of an evaluation, and what had to be said of them."""

    requests: tuple[Requests, ...]
    notes: tuple[str, ...]


class EvaluationBench:
    """What every arm is measured on, and how."""

    def __init__(
        self,
        model: LanguageModel | Endpoint,
        requests: Sequence[Requests],
        judges: Sequence[tuple[str, Judge]],
        tasks: Sequence[Task],
        how: Writing,
        settings: TaskSettings,
        folder: pathlib.Path | None = None,
        progress: Progress | None = None,
    ) -> None:
        """Takes up what an interrupted evaluation left in the folder.

        Args:
            model: what answers.
            requests: what it is asked.
            judges: with the names they were asked for by.
            tasks: of capability.
            how: how completions are written.
            settings: how capability is measured.
            folder: where completions, judgements and single items are kept; nowhere where None.
            progress: told what is at work.
        """
        self.model, self.requests, self.judges, self.tasks = model, requests, judges, tasks
        self.how, self.settings, self.folder = how, settings, folder
        self.answers, self.progress = Answers(_in(folder, COMPLETIONS)), progress
        self.notes: list[str] = []
        self.items: dict[str, dict[str, Any]] = {}
        self._judged: dict[str, list[Completions]] = {"harmful": [], "harmless": []}

    def measure(self, name: str, treatment: Treatment | None, reference: LanguageModel | None) -> ArmScores:
        """Every suite and every task under one treatment."""
        arm = Arm(name, self.model) if treatment is None else Arm(name, self.model, treatment)
        written = [
            (part, [self._write(arm, part.suite, part.prompts, seed) for seed in self.how.seeds]) for part in self.requests
        ]  # All completions first: a judge that is a model itself is loaded only then.
        suites = []
        for part, seeds in written:
            judged, names = self._judge(seeds)
            for completions in judged:
                self.answers.judged(completions)
            self._judged[part.kind] += judged
            suites.append(scored(part.suite, part.kind, judged, names))
        tasks = [task for task in self.tasks if not task.compares or treatment is not None or reference is not None]
        capability = tuple(self._task(task, arm, reference) for task in tasks)
        self.items[name] = {measured.task: measured.items() for measured in capability}
        for measured in capability:
            self.notes += measured.notes
        return ArmScores(name, tuple(suites), capability)

    def finish(self) -> Completions:
        """Write completions with their verdicts, and the single items of every task."""
        if self.folder is not None:
            write_json(self.folder / ITEMS, self.items)
        return self.answers.finish()

    def agreement(self) -> list[dict[str, Any]]:
        """Cohen's κ of every two judges on what they both say of: harm on harmful requests, refusal on harmless ones."""
        found = []
        for kind, lists in self._judged.items():
            if not lists:
                continue
            everything = functools.reduce(lambda one, other: one + other, lists)
            score = scored("all", kind, [everything], {judge.name: asked for asked, judge in self.judges})
            measure = "harm" if kind == "harmful" else "over_refusal"
            said = [(name, judged.outcomes[measure]) for name, judged in score.judged.items() if measure in judged.outcomes]
            for place, (first, one) in enumerate(said):
                for second, other in said[place + 1 :]:
                    found.append({"kind": kind, "measure": measure, **cohen_kappa(one, other, names=(first, second)).to_json()})
        return found

    def _tell(self, line: str) -> None:
        if self.progress is not None:
            self.progress(line)

    def _write(self, arm: Arm, suite: str, prompts: Prompts, seed: int) -> Completions:
        self._tell(f"{arm.name}, {suite}" + (f", seed {seed}" if self.how.samples > 1 else ""))
        return self.answers.write(arm, prompts, self.how, seed, suite=suite)

    def _judge(self, seeds: Sequence[Completions]) -> tuple[list[Completions], dict[str, str]]:
        names: dict[str, str] = {}
        everything = functools.reduce(lambda one, other: one + other, seeds)
        for asked, judge in self.judges:
            judgement = judge.judge(everything, cache=_in(self.folder, JUDGEMENTS))
            everything, names[judgement.judge] = judgement.completions, asked
        size = len(everything) // len(seeds)
        return [everything[first : first + size] for first in range(0, len(everything), size)], names

    def _task(self, task: Task, arm: Arm, reference: LanguageModel | None) -> Measurement:
        self._tell(f"{arm.name}, {task.name}")
        where, seed = f"capability {task.name}", self.settings.seed
        if isinstance(arm.model, Endpoint):
            return self._sums(task, arm, where)
        known = {int(name): one.completion for name, one in self.answers.known(arm.name, where, seed).items()}

        def answered(number: int, text: str) -> None:
            self.answers.keep(Completion(str(number), "", text, arm=arm.name, seed=seed, meta={"suite": where}))

        return measure_task(task, arm.model, arm.treatment, self.settings, reference=reference, done=known, answered=answered)

    def _sums(self, task: Task, arm: Arm, where: str) -> Measurement:
        """GSM8K by an endpoint, which is asked in one turn."""
        how = self.settings
        shots = {} if how.shots is None else {"shots": how.shots}
        sums, examples, notes = asked_and_shown(task.source, limit=how.limit, **shots)
        prompts = Prompts([Prompt(str(number), sum_context(one, examples)) for number, one in enumerate(sums)], where)
        greedy = dataclasses.replace(self.how, samples=1, temperature=0.0, max_new_tokens=how.max_new_tokens)
        self._tell(f"{arm.name}, {where}")
        answers = self.answers.write(arm, prompts, greedy, greedy.seed, suite=where)
        return score_sums(task.name, [cut(one.completion) for one in answers], sums, notes=notes)


@dataclasses.dataclass(frozen=True)
class Applied:
    """A treatment, and what it is in words; None for neither."""

    act: Treatment | None
    words: str | None


def treatment_of(
    model: LanguageModel | Endpoint,
    deactivate: NeuronSet | None,
    patch: NeuronSet | None,
    donor: LanguageModel | None,
    treatment: Treatment | None,
    guard: Guard | None = None,
) -> Applied:
    """The treatment that is asked for.

    Raises:
        UsageError: several treatments, half of one, or one of a model that is not in memory.
    """
    named = (("deactivate", deactivate), ("patch", patch), ("guard", guard), ("treatment", treatment))
    given = [name for name, value in named if value is not None]
    if len(given) > 1:
        raise UsageError(f"{' and '.join(given)} given together; expected one treatment")
    if (patch is None) != (donor is None):
        raise UsageError(f"{'patch without donor' if donor is None else 'donor without patch'}; expected both: neurons and their model")
    if given and isinstance(model, Endpoint):
        raise UsageError(f"{given[0]} with an endpoint; expected a model in memory, whose activations can be reached")
    if deactivate is not None:
        return Applied(lambda: deactivated(model, deactivate), f"{len(deactivate):,} neurons deactivated")
    if patch is not None and donor is not None:
        return Applied(lambda: patched(model, donor, patch), f"{len(patch):,} neurons patched from {donor.name}")
    if guard is not None and not isinstance(model, Endpoint):
        return Applied(lambda: guarding(model, guard), f"guard on {len(guard.neurons):,} neurons, threshold {guard.threshold:.3g}")
    return Applied(treatment, None if treatment is None else "treated")


def _in(folder: pathlib.Path | None, name: str) -> pathlib.Path | None:
    return None if folder is None else folder / name


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What an evaluation gave.

    Attributes:
        model: what was evaluated.
        treatment: in words, None where there is none.
        untreated: the model as it is; None where an earlier run stands in for it.
        treated: the model under its treatment, None where there is none.
        baseline: the model of an earlier run, None where none was named.
        changes: by suite, judge and measure the paired difference: treated minus untreated, or the model minus the baseline.
        capability_changes: by task the share that is lost.
        agreement: of every two judges, by kind of request.
        missed: one line for every threshold of the gate that is not met; None where there is no gate.
        completions: all completions with their verdicts.
        notes: what had to be said.
    """

    model: str
    treatment: str | None
    untreated: ArmScores | None
    treated: ArmScores | None
    baseline: ArmScores | None
    changes: Sequence[Mapping[str, Any]]
    capability_changes: Sequence[Mapping[str, Any]]
    agreement: Sequence[Mapping[str, Any]]
    missed: tuple[str, ...] | None
    completions: Completions
    notes: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """Whether the gate is passed; True where there is none."""
        return not self.missed

    def _repr_html_(self) -> str:
        return notebook.evaluation_table(self.record())

    def record(self) -> dict[str, Any]:
        """The evaluation as JSON values."""
        return {
            "model": self.model,
            "treatment": self.treatment,
            **{name: _arm_record(getattr(self, name)) for name in ("untreated", "treated", "baseline")},
            "changes": list(self.changes),
            "capability_changes": list(self.capability_changes),
            "agreement": list(self.agreement),
            "gate": None if self.missed is None else {"passed": self.passed, "missed": list(self.missed)},
            "notes": list(self.notes),
        }


def evaluate(
    model: LanguageModel | Endpoint,
    suites: Any = SUITES,
    judges: Sequence[str | Judge] = DEFAULT_JUDGES,
    capability: Sequence[str] = (),
    *,
    over_refusal: Any = HARMLESS,
    attacks: Sequence[str] = ("direct",),
    deactivate: NeuronSet | None = None,
    patch: NeuronSet | None = None,
    donor: LanguageModel | None = None,
    guard: Guard | None = None,
    treatment: Treatment | None = None,
    reference: LanguageModel | None = None,
    baseline: PathLike | None = None,
    gate: Gate | PathLike | None = None,
    limit: int | None = None,
    data: PathLike | None = None,
    column: str | None = None,
    offline: bool = False,
    settings: TaskSettings | None = None,
    judge_options: Mapping[str, Any] | None = None,
    out: PathLike | None = None,
    progress: Progress | None = None,
    **writing: Any,
) -> Evaluation:
    """Evaluates a model, treated or not, on suites of requests and on what it can do.

    Args:
        model: the model, or an endpoint that writes in its place.
        suites: names, files, suites, or harmful prompts in whatever form the finders take them; see `safety_neurons.suites.suite`.
        judges: names, or judges.
        capability: tasks by name; see `safety_neurons.capability.tasks`.
        over_refusal: harmless requests, asked where no suite has any; None leaves them out.
        attacks: put around harmful requests; `direct` is none.
        deactivate: neurons that are off in the treated arm.
        patch: neurons that are patched in the treated arm.
        donor: the model that gives their activations.
        guard: answers in the treated arm: prompts it flags get its refusal.
        treatment: any other treatment, as a function that makes a context manager.
        reference: the model that `kl` compares with; the untreated model where None.
        baseline: folder of an earlier evaluation, which takes the place of the untreated arm.
        gate: thresholds, or the path of their file.
        limit: requests of each suite.
        data: folder of the suites' files.
        column: column of the prompts in a file.
        offline: open no socket.
        settings: how capability is measured.
        judge_options: for judges that are given by name.
        out: folder for completions, judgements and single items; an interrupted evaluation goes on from it.
        progress: told what is at work.
        **writing: how completions are written; see `Writing`.

    Raises:
        UsageError: arguments that contradict one another; found out before anything is computed.
        InputError: a file that cannot be read.
        RunError: `out` holds the answers of another model or treatment, or answers that were written in another way.
    """
    how, treat = Writing(**writing), treatment_of(model, deactivate, patch, donor, treatment, guard)
    tasks, measuring = _tasks(model, capability, settings)
    held = gate if gate is None or isinstance(gate, Gate) else Gate.load(gate)
    _check(model, tasks, how, treat.act is not None, baseline is not None, reference is not None, held)
    before = None if baseline is None else baseline_of(baseline)
    asked = requests_of(suites, over_refusal, attacks, data=data, column=column, offline=offline, limit=limit, model=model)
    named = [(one, judge_of(one, **(judge_options or {}))) if isinstance(one, str) else (one.name, one) for one in judges]
    place = None if out is None else pathlib.Path(out)
    treated = {"deactivate": deactivate, "patch": patch, "donor": donor, "guard": guard, "treatment": treatment}
    hold(place, facts_of(model, treated, how, tasks, measuring))
    bench = EvaluationBench(model, asked.requests, named, tasks, how, measuring, place, progress)
    result = _compared(bench, treat, before, reference, asked.notes)
    return result if held is None else dataclasses.replace(result, missed=tuple(held.check(result.record())))


def _compared(
    bench: EvaluationBench, treat: Applied, before: ArmScores | None, reference: LanguageModel | None, notes: Sequence[str]
) -> Evaluation:
    """Measure the arms and compare them."""
    plain = treat.act is None or before is None
    untreated = bench.measure(UNTREATED, None, reference) if plain else None
    treated = None if treat.act is None else bench.measure(TREATED, treat.act, reference)
    first, last = before or untreated, treated or untreated
    compared = first is not None and last is not None and first is not last
    return Evaluation(
        bench.model.name,
        treat.words,
        untreated,
        treated,
        before,
        suite_changes(first, last) if compared and first and last else (),
        capability_changes(first, last) if compared and first and last else (),
        bench.agreement(),
        None,
        bench.finish(),
        tuple(dict.fromkeys((*notes, *bench.notes, *bench.answers.notes))),
    )


def _tasks(model: LanguageModel | Endpoint, capability: Sequence[str], settings: TaskSettings | None) -> tuple[list[Task], TaskSettings]:
    """The tasks, whose files have been read, and how they are measured."""
    how = settings or TaskSettings()
    if isinstance(model, LanguageModel) and how.folder is None:
        how = dataclasses.replace(how, folder=model.prompt_folder)
    tasks = [task_of(name) for name in capability]
    for task in tasks:
        check_task(task, how)
    return tasks, how


def _check(
    model: LanguageModel | Endpoint,
    tasks: Sequence[Task],
    how: Writing,
    treated: bool,
    compared: bool,
    referred: bool,
    gate: Gate | None,
) -> None:
    """Refuses what would only come out after the work."""
    if how.samples > 1 and not how.temperature:
        raise UsageError(f"{how.samples} samples at temperature 0 are all the same; expected a temperature above 0, such as 1")
    if how.samples < 1 or how.temperature < 0:
        raise UsageError(f"samples {how.samples}, temperature {how.temperature}; expected at least one sample and no negative temperature")
    names = [task.name for task in tasks]
    if len(set(names)) < len(names):
        raise UsageError(f"capability {', '.join(names)}; expected every task once")
    if isinstance(model, Endpoint) and any(task.kind != "gsm8k" for task in tasks):
        raise UsageError("an endpoint gives no log-likelihoods; expected gsm8k:FILE as its only capability, or a model in memory")
    if any(task.compares for task in tasks) and not treated and not referred:
        raise UsageError("kl compares with an untreated model; expected a treatment, or a reference model (--reference)")
    if gate is not None and gate.needs_a_baseline and (not tasks or not (treated or compared)):
        raise UsageError(f"{gate.name} has a threshold on a drop of capability; expected a capability, and a treatment or a baseline")


def _arm_record(arm: ArmScores | None) -> dict[str, Any] | None:
    if arm is None:
        return None
    sides = {kind: [score for score in arm.suites if score.kind == kind] for kind in ("harmful", "harmless")}
    return {
        "name": arm.name,
        "harm": pooled(sides["harmful"], "harm"),
        "over_refusal": pooled(sides["harmless"], "over_refusal"),
        "suites": [score.record() for score in arm.suites],
        "capability": [measured.record() for measured in arm.capability],
    }


# Requests: suites by name as lists of harmful and of harmless prompts, attacks put around the harmful ones


def requests_of(
    sources: Any,
    harmless: Any = HARMLESS,
    attacks: Sequence[str] = ("direct",),
    *,
    data: PathLike | None = None,
    column: str | None = None,
    offline: bool = False,
    limit: int | None = None,
    model: LanguageModel | Endpoint | None = None,
) -> Asked:
    """The requests of suites.

    Args:
        sources: names, files, suites, or harmful prompts in whatever form `as_prompts` takes; a list of records is one suite.
        harmless: what over-refusal is measured on where no suite has harmless requests; None for nothing.
        attacks: put around harmful requests; `direct` is none.
        data: folder of the suites' files.
        column: column of the prompts in a file of the user's own.
        offline: open no socket.
        limit: requests of each suite.
        model: what is asked. Of one in memory `builtin:` names mean its organism's own prompts first, and `gcg` is made on it as it is;
            other attacks are adaptive only where they were made on it.

    Raises:
        UsageError: no suite, or one that is named twice.
        InputError: a suite that cannot be read.
    """
    sources = _one_by_one(sources)
    if not sources:
        raise UsageError("no suite was named; expected at least one, such as builtin:harmful-test")
    in_memory, name = (model if isinstance(model, LanguageModel) else None), (None if model is None else model.name)
    own = None if in_memory is None else in_memory.prompt_folder
    suites = [_suite(source, None, own, data, column, offline, limit) for source in sources]
    notes = []
    if harmless is not None and not any(len(one.harmless) for one in suites):
        suites.append(_suite(harmless, "harmless", own, data, column, offline, limit))
        notes.append(f"no suite has harmless requests, so over-refusal is measured on {suites[-1].name}")
    names = [one.name for one in suites]
    double = next((name for name in names if names.count(name) > 1), None)
    if double is not None:
        raise UsageError(f"suite {double!r} is named twice; expected every suite once")
    found = []
    for one in suites:
        notes += [f"{one.name}: {note}" for note in one.notes]
        if len(one.harmful):
            found.append(Requests(one.name, "harmful", unique(_labelled(_attacked(one.harmful, attacks, in_memory), name))))
        if len(one.harmless):
            found.append(Requests(one.name, "harmless", unique(one.harmless)))
    return Asked(tuple(found), tuple(notes))


def _one_by_one(sources: Any) -> Sequence[Any]:
    """The suites in a list; rows of one list, a table or a single name are one suite."""
    rows = isinstance(sources, list | tuple) and sources and all(isinstance(one, Mapping | Prompt) for one in sources)
    return sources if isinstance(sources, list | tuple) and not rows else [sources]


def _suite(
    source: Any,
    kind: str | None,
    own: pathlib.Path | None,
    data: PathLike | None,
    column: str | None,
    offline: bool,
    limit: int | None,
) -> Suite:
    if isinstance(source, Suite):
        return source
    if isinstance(source, str) and source.startswith(_BUILTIN):
        about = "harmless" if source.removeprefix(_BUILTIN).startswith(("harmless", "general")) else "harmful"
        return _stamped(prompts(source, folder=own, limit=limit), source, kind or about)
    if not isinstance(source, str | os.PathLike):
        found, kind = as_prompts(source), kind or "harmful"
        name = found.name if isinstance(source, Prompts) else f"{kind} {found.name}"
        return _stamped(found[:limit] if limit else found, name, kind)
    folder = None if data is None else str(data)
    named = source if isinstance(source, str) else pathlib.Path(source)
    return suite(named, folder=folder, offline=offline, limit=limit, column=column, kind=kind)


def _stamped(found: Prompts, name: str, kind: str) -> Suite:
    """Prompts as a suite, with the entries that attacks, judges and tables read."""

    def about(prompt: Any) -> dict[str, Any]:
        return {"goal": prompt.text, "behavior_id": prompt.id, "method": "direct", **prompt.meta, "suite": name, "kind": kind}

    return Suite(name, Prompts([dataclasses.replace(one, meta=about(one)) for one in found], name, found.notes), kind, name)


def _attacked(harmful: Prompts, attacks: Sequence[str], model: LanguageModel | None) -> Prompts:
    """Every request under every attack, which tells the ids apart; `gcg` is made on the model in hand."""
    if tuple(attacks) == ("direct",):
        return harmful
    if "gcg" in attacks and model is None:
        raise UsageError("attack gcg is made on a model: expected one in memory (--model); an endpoint gives no gradients")
    kept: list[Prompt] = []
    for method in dict.fromkeys(attacks):
        made = attack(harmful, method, model=model if method == "gcg" else None)
        kept += [dataclasses.replace(one, meta={**one.meta, "made_on": UNTREATED}) for one in made] if method == "gcg" else made
    return Prompts(kept, harmful.name, harmful.notes)


def _labelled(found: Prompts, model: str | None) -> Prompts:
    """Attack prompts with how their results are to be read: what was optimised on another model is transferred to this one."""
    kept = []
    for one in found:
        optimised = one.meta.get("adaptive") is True or one.meta.get("label") == ADAPTIVE
        label = ADAPTIVE if optimised and one.meta.get("source_model") == model else STATIC
        says = isinstance(one.meta.get("adaptive"), bool) or one.meta.get("label") in (ADAPTIVE, STATIC)
        kept.append(dataclasses.replace(one, meta={**one.meta, "label": label}) if says else one)
    return Prompts(kept, found.name, found.notes)


def unique(prompts: Prompts) -> Prompts:
    """The prompts, with a number behind an id that occurred before: an id stands for one prompt."""
    seen: dict[str, int] = {}
    kept = []
    for prompt in prompts:
        seen[prompt.id] = seen.get(prompt.id, 0) + 1
        new = prompt.id if seen[prompt.id] == 1 else f"{prompt.id}/{seen[prompt.id]}"
        kept.append(prompt if new == prompt.id else dataclasses.replace(prompt, id=new))
    return Prompts(kept, prompts.name, prompts.notes)
