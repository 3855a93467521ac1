"""Transfer: neurons found on one red-team set, patched, and what that restores on all the others and costs elsewhere."""

import contextlib
import dataclasses
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from safety_neurons.capability import Measured, Settings, Task, measure, task
from safety_neurons.interventions import patched
from safety_neurons.model import LanguageModel
from safety_neurons.model.batches import BatchSize
from safety_neurons.neurons import NeuronSet
from safety_neurons.prompts import Prompts, as_prompts
from safety_neurons.prompts.readers import Source
from safety_neurons.results import Completions, Difference, paired_difference, rate
from safety_neurons.results.estimates import GroupLabels
from safety_neurons.studies.arms import Bench, Progress
from safety_neurons.studies.downstream import solved
from safety_neurons.studies.groups import Cell, Groups, Matrix, Verdicts, held_together
from safety_neurons.studies.kept import hold_answers

TASKS = ("perplexity", "kl")
Treatment = Callable[[], contextlib.AbstractContextManager[Any]]


@dataclasses.dataclass(frozen=True)
class Ability:
    """What a treatment costs where no harm is asked."""

    name: str
    measured: tuple[Measured, ...]
    harmless: Verdicts
    """Refusals of harmless requests."""
    answered: Verdicts | None
    """Whether the answers of a task are given, where there is a task."""
    shared: tuple[GroupLabels, GroupLabels] = (None, None)
    """What the harmless requests share, and the questions of the task."""

    def record(self, untreated: "Ability | None") -> dict[str, Any]:
        """As JSON values, differences paired with the untreated model."""
        found: dict[str, Any] = {
            "name": self.name,
            "capability": {one.task: one.record() for one in self.measured},
            "harmless_refused": rate(self.harmless, self.shared[0]).to_json(),
            "task": rate(self.answered, self.shared[1]).to_json() if self.answered is not None else None,
        }
        if untreated is not None:
            found["harmless_change"] = paired_difference(self.harmless, untreated.harmless, self.shared[0]).to_json()
            found["task_change"] = self._task_change(untreated)
        return found

    def _task_change(self, untreated: "Ability") -> dict[str, Any] | None:
        if self.answered is None or untreated.answered is None:
            return None
        change: Difference = paired_difference(self.answered, untreated.answered, self.shared[1])
        return change.to_json()


@dataclasses.dataclass(frozen=True)
class Transfer:
    """A k × k matrix of causal effects, and the ability of the patched models."""

    groups: tuple[str, ...]
    untreated: Mapping[str, Verdicts]
    aligned: Mapping[str, Verdicts]
    cells: tuple[Cell, ...]
    """One for every set and group, set by set."""
    abilities: tuple[Ability, ...]
    """The untreated model, the aligned one, then one for every set."""
    shared: Mapping[str, GroupLabels]
    """What the prompts of every group share."""
    notes: tuple[str, ...]

    def cell(self, found_on: str, measured_on: str) -> Cell:
        """The cell of a set and a group."""
        return next(cell for cell in self.cells if (cell.set, cell.group) == (found_on, measured_on))

    def record(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "groups": list(self.groups),
            "untreated": {name: rate(outcomes, self.shared[name]).to_json() for name, outcomes in self.untreated.items()},
            "aligned": {name: rate(outcomes, self.shared[name]).to_json() for name, outcomes in self.aligned.items()},
            "matrix": [cell.record() for cell in self.cells],
            "own_and_other": self._own_and_other(),
            "ability": [each.record(self.abilities[0] if number else None) for number, each in enumerate(self.abilities)],
        }

    def _own_and_other(self) -> dict[str, Any]:
        """Mean causal effect on the group a set was found on, and on the others."""
        known = [(cell.set == cell.group, cell.effect.value) for cell in self.cells if cell.effect is not None]
        means = {}
        for name, wanted in (("own", True), ("other", False)):
            values = [value for own, value in known if own == wanted and value is not None]
            means[name] = {"value": sum(values) / len(values) if values else None, "n": len(values)}
        return means


def transfer(
    base: LanguageModel,
    aligned: LanguageModel,
    sets: Mapping[str, NeuronSet],
    harmful: Mapping[str, Source],
    harmless: Source,
    *,
    tasks: Sequence[str] = TASKS,
    answers: Source | None = None,
    random: int = 5,
    seed: int = 0,
    limit: int | None = None,
    max_new_tokens: int = 64,
    batch_size: BatchSize = "auto",
    completions_file: pathlib.Path | None = None,
    progress: Progress | None = None,
) -> Transfer:
    """Causal effect of every set on every group of harmful requests, and what patching it costs in general ability.

    Args:
        base: the less safe model, which is patched.
        aligned: the safer one, whose activations are put in.
        sets: neurons by the group they were found on.
        harmful: requests by group, apart from those the sets were found on.
        harmless: requests on which over-refusal is measured.
        tasks: capability by name (`perplexity`, `kl`, `gsm8k:FILE`, `mmlu:FOLDER`, …).
        answers: a task as questions with answers; the share of answers given word for word is measured.
        random: random sets for each set, with as many neurons in every matrix.
        seed: of random sets.
        limit: items of each capability task.
        max_new_tokens: length of a completion, in tokens.
        batch_size: prompts per pass.
        completions_file: where completions are kept; a killed study goes on from it.
        progress: told every arm.

    Source: Chen et al., NeurIPS 2025, section 4 (change-score neurons found on one red-team set and patched on others; general ability).
    Differs: a full matrix with paired intervals, random sets for every row, refusals by a named judge instead of a cost model.
    """
    harmless = as_prompts(harmless)
    answers = None if answers is None else as_prompts(answers)
    groups = Groups({name: as_prompts(asked) for name, asked in harmful.items()})
    hold_answers(completions_file, base=base, aligned=aligned, sets=sets, seed=seed, max_new_tokens=max_new_tokens)
    bench = Bench(groups.pooled, harmless, None, max_new_tokens, batch_size, seed, completions_file, progress)
    settings = Settings(limit=limit, batch_size=batch_size, seed=seed, folder=base.prompt_folder)
    lab = _Lab(bench, [task(name) for name in tasks], settings, answers)
    goal = groups.split(bench.verdicts(aligned, "aligned", "harmful", contextlib.nullcontext))
    matrix = Matrix(bench, groups, base, lambda neurons: lambda: patched(base, aligned, neurons), random, goal)
    abilities = [lab.ability(base, "untreated"), lab.ability(aligned, "aligned", reference=base)]
    cells: list[Cell] = []
    for name, neurons in sets.items():
        cells += matrix.row(name, neurons)
        abilities.append(lab.ability(base, name, matrix.treat(neurons), arm=f"{name} of {len(neurons)}"))
    bench.finish()
    notes = (*matrix.notes, *bench.notes)
    return Transfer(tuple(groups.names), matrix.untreated, goal, held_together(cells), tuple(abilities), groups.shared, notes)


@dataclasses.dataclass
class _Lab:
    """Measures what a treatment costs."""

    bench: Bench
    tasks: Sequence[Task]
    settings: Settings
    answers: Prompts | None

    def ability(
        self,
        model: LanguageModel,
        name: str,
        treatment: Treatment = contextlib.nullcontext,
        reference: LanguageModel | None = None,
        arm: str | None = None,
    ) -> Ability:
        """Over-refusal, capability and the task of one arm."""
        if self.bench.progress is not None:
            self.bench.progress(f"ability, {name}")
        untreated = treatment is contextlib.nullcontext and reference is None
        wanted = [one for one in self.tasks if not (one.compares and untreated)]
        measured = tuple(measure(one, model, treatment, self.settings, reference=reference if one.compares else None) for one in wanted)
        harmless = tuple(self.bench.verdicts(model, arm or name, "harmless", treatment))
        return Ability(name, measured, harmless, self._answered(model, treatment), self._shared())

    def _shared(self) -> tuple[GroupLabels, GroupLabels]:
        return self.bench.harmless.groups, None if self.answers is None else self.answers.groups

    def _answered(self, model: LanguageModel, treatment: Treatment) -> Verdicts | None:
        if self.answers is None:
            return None
        with treatment():
            done: Completions = model.complete(
                self.answers, max_new_tokens=self.bench.max_new_tokens, batch_size=self.bench.batch_size, seed=self.bench.seed
            )
        return tuple(solved(done, self.answers))
