"""The bench of an evaluation: every suite, judge and task, measured on one arm after the other."""

import dataclasses
import functools
import pathlib
from collections.abc import Sequence
from typing import Any

from safety_neurons.capability import Measured, Settings, Task
from safety_neurons.capability import measure as measure_task
from safety_neurons.capability.questions import asked_and_shown, cut, score_sums, sum_context
from safety_neurons.errors import UsageError
from safety_neurons.guard import Guard, guarding
from safety_neurons.interventions import deactivated, patched
from safety_neurons.judges import Judge
from safety_neurons.model import LanguageModel
from safety_neurons.model.chat_server import Endpoint
from safety_neurons.neurons import NeuronSet
from safety_neurons.prompts import Prompt, Prompts
from safety_neurons.results import Completion, Completions, cohen_kappa, write_json
from safety_neurons.studies.answering import Answers, Progress, Treatment, Writing
from safety_neurons.studies.changes import ITEMS, ArmScores
from safety_neurons.studies.requests import Requests
from safety_neurons.studies.scoring import scored

COMPLETIONS, JUDGEMENTS = "completions.jsonl", "judgements.sqlite"


class EvaluationBench:
    """What every arm is measured on, and how."""

    def __init__(
        self,
        model: LanguageModel | Endpoint,
        requests: Sequence[Requests],
        judges: Sequence[tuple[str, Judge]],
        tasks: Sequence[Task],
        how: Writing,
        settings: Settings,
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
        self.answers = Answers(_in(folder, COMPLETIONS), progress)
        self.notes: list[str] = []
        self.items: dict[str, dict[str, Any]] = {}
        self._judged: dict[str, list[Completions]] = {"harmful": [], "harmless": []}

    def measure(self, arm: str, treatment: Treatment, reference: LanguageModel | None) -> ArmScores:
        """Every suite and every task under one treatment."""
        written = [
            (part, self.answers.write(self.model, part.suite, part.prompts, self.how, arm, treatment)) for part in self.requests
        ]  # All completions first: a judge that is a model itself is loaded only then.
        suites = []
        for part, seeds in written:
            judged, names = self._judge(seeds)
            for completions in judged:
                self.answers.judged(completions)
            self._judged[part.kind] += judged
            suites.append(scored(part.suite, part.kind, judged, names))
        tasks = [task for task in self.tasks if not task.compares or arm == "treated" or reference is not None]
        capability = tuple(self._task(task, arm, treatment, reference) for task in tasks)
        self.items[arm] = {measured.task: measured.items() for measured in capability}
        for measured in capability:
            self.notes += measured.notes
        return ArmScores(arm, tuple(suites), capability)

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

    def _judge(self, seeds: Sequence[Completions]) -> tuple[list[Completions], dict[str, str]]:
        names: dict[str, str] = {}
        everything = functools.reduce(lambda one, other: one + other, seeds)
        for asked, judge in self.judges:
            judgement = judge.judge(everything, cache=_in(self.folder, JUDGEMENTS))
            everything, names[judgement.judge] = judgement.completions, asked
        size = len(everything) // len(seeds)
        return [everything[first : first + size] for first in range(0, len(everything), size)], names

    def _task(self, task: Task, arm: str, treatment: Treatment, reference: LanguageModel | None) -> Measured:
        if self.answers.progress is not None:
            self.answers.progress(f"{arm}, {task.name}")
        where = f"capability {task.name}"
        known = {int(name): one.completion for name, one in self.answers.known(arm, where, self.settings.seed).items()}
        if isinstance(self.model, Endpoint):
            return self._sums(task, arm, where)

        def answered(number: int, text: str) -> None:
            self.answers.keep(Completion(str(number), "", text, arm=arm, seed=self.settings.seed, meta={"suite": where}))

        return measure_task(task, self.model, treatment, self.settings, reference=reference, done=known, answered=answered)

    def _sums(self, task: Task, arm: str, where: str) -> Measured:
        """GSM8K by an endpoint, which is asked in one turn."""
        how = self.settings
        shots = {} if how.shots is None else {"shots": how.shots}
        sums, examples, notes = asked_and_shown(task.source, limit=how.limit, **shots)
        prompts = Prompts([Prompt(str(number), sum_context(one, examples)) for number, one in enumerate(sums)], where)
        greedy = dataclasses.replace(self.how, samples=1, temperature=0.0, max_new_tokens=how.max_new_tokens)
        answers = self.answers.write(self.model, where, prompts, greedy, arm)[0]
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
