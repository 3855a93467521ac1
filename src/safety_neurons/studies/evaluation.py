"""Evaluate: what a model does with harmful and harmless requests, by several judges, and what it still can do.

1. Every suite is answered by the model as it is, and under its treatment where it has one; judges never see which.
2. Every judge labels every completion; harm and over-refusal stand side by side, with intervals and what was left unscored.
3. Capability is measured on the same arms.
4. The arms, or the model and an earlier run, are compared prompt by prompt; the result is held to a gate.
"""

import contextlib
import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from safety_neurons.capability import Settings, Task
from safety_neurons.capability import check as check_task
from safety_neurons.capability import task as task_of
from safety_neurons.errors import UsageError
from safety_neurons.guard import Guard
from safety_neurons.judges import DEFAULT_JUDGES, Judge
from safety_neurons.judges import judge as judge_of
from safety_neurons.model import LanguageModel
from safety_neurons.model.chat_server import Endpoint
from safety_neurons.neurons import NeuronSet
from safety_neurons.results import Completions, Gate
from safety_neurons.results.files import PathLike
from safety_neurons.studies import notebook
from safety_neurons.studies.answering import Progress, Treatment, Writing
from safety_neurons.studies.changes import ArmScores, capability_changes, suite_changes
from safety_neurons.studies.changes import baseline as baseline_of
from safety_neurons.studies.evaluation_bench import Applied, EvaluationBench, treatment_of
from safety_neurons.studies.kept import facts_of, hold
from safety_neurons.studies.requests import HARMLESS, requests_of
from safety_neurons.studies.scoring import pooled

SUITES = ("builtin:harmful-test",)


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
    settings: Settings | None = None,
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
    untreated = bench.measure("untreated", contextlib.nullcontext, reference) if plain else None
    treated = None if treat.act is None else bench.measure("treated", treat.act, reference)
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


def _tasks(model: LanguageModel | Endpoint, capability: Sequence[str], settings: Settings | None) -> tuple[list[Task], Settings]:
    """The tasks, whose files have been read, and how they are measured."""
    how = settings or Settings()
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
