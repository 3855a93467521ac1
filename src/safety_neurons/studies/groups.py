"""Groups: prompts under names (languages, categories, red-team sets), a set found on each, and what each set
does to every group.

Languages: deactivate the neurons found in one language, and measure refusals in all of them. Transfer: patch
the neurons found on one red-team set, and measure what that restores on the others and costs elsewhere.

All groups are answered in one go under every treatment and told apart afterwards: a matrix of k sets by k
groups costs k passes over the prompts and not k × k.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, Unpack

from safety_neurons.arguments import well_typed
from safety_neurons.capability import Measurement, Task, TaskSettings, checked, measure
from safety_neurons.counting import numbered
from safety_neurons.detectors.methods import METHODS, HowFound, by_name, with_options
from safety_neurons.errors import InputError, NeuronError, UnsupportedModelError, UsageError
from safety_neurons.interventions import deactivated, patched
from safety_neurons.interventions.by_row import SetTreatment
from safety_neurons.model import LanguageModel
from safety_neurons.model.batches import BatchSize
from safety_neurons.neurons import SITES, NeuronSet, parse_key
from safety_neurons.neurons.sets import extra_of
from safety_neurons.prompt_lists import Prompts, as_prompts, hanging_together
from safety_neurons.prompt_lists.readers import Source
from safety_neurons.results import Difference, Effect, Rate, holm, paired_difference, rate
from safety_neurons.results.estimates import GroupLabels, clusters_of
from safety_neurons.results.records import DifferenceRecord, Recorded, called
from safety_neurons.strict_json import JsonObject
from safety_neurons.studies.bench import (
    UNTREATED,
    Arm,
    Bench,
    How,
    Progress,
    Treat,
    Verdicts,
    contrast,
    try_out,
)
from safety_neurons.studies.comparison import UNPATCHED, Place, Searches, routed_keys, whole_units
from safety_neurons.studies.lasting import questions_of, solved
from safety_neurons.studies.lengths import answer_length

TASKS = ("perplexity", "kl")


@dataclasses.dataclass(frozen=True)
class Groups:
    """Prompts by group."""

    members: Mapping[str, Prompts]

    def __post_init__(self) -> None:
        empty = [name for name, prompts in self.members.items() if not len(prompts)]
        if empty or not self.members:
            raise InputError(
                f"group {empty[0]!r} has no prompts; expected some in each"
                if empty
                else "no group of prompts was given"
            )

    @property
    def names(self) -> list[str]:
        """The groups, in order."""
        return list(self.members)

    @property
    def pooled(self) -> Prompts:
        """All prompts one after another.

        Ids carry the name of the group, so that parallel lists stay apart.
        """
        return Prompts(
            [
                dataclasses.replace(prompt, id=f"{name}:{number}:{prompt.id}")
                for name, prompts in self.members.items()
                for number, prompt in enumerate(prompts)
            ],
            " + ".join(self.names),
            [note for prompts in self.members.values() for note in prompts.notes],
        )

    @property
    def shared(self) -> dict[str, GroupLabels]:
        """What the prompts of every group share among one another."""
        return {name: prompts.groups for name, prompts in self.members.items()}

    def split(self, outcomes: Verdicts) -> dict[str, Verdicts]:
        """Outcomes of the pooled prompts by group."""
        found: dict[str, Verdicts] = {}
        start = 0
        for name, prompts in self.members.items():
            found[name] = tuple(outcomes[start : start + len(prompts)])
            start += len(prompts)
        return found

    @staticmethod
    def halves(lists: Mapping[str, Prompts]) -> "tuple[Groups, Groups]":
        """Every list apart in two, record by record in turn: to find on, and to measure on.

        What shares a group, and a request that comes twice, stays on one side.

        Raises:
            InputError: nothing is left to measure on.
        """
        sides: tuple[dict[str, Prompts], ...] = {}, {}
        for name, prompts in lists.items():
            asked = zip(
                prompts.digests, prompts.groups, strict=True
            )  # None is the group of one prompt alone.
            together = hanging_together(
                ((digest,), *([(0, group)] if group else [])) for digest, group in asked
            )
            shared = clusters_of([str(place) for place in together], len(prompts)).tolist()
            for side, part in enumerate(sides):
                mine = (prompt for prompt, number in zip(prompts, shared, strict=True) if number % 2 == side)
                part[name] = Prompts(mine, name)
        return Groups(sides[0]), Groups(sides[1])

    @staticmethod
    def by(prompts: Prompts, field: str, *, fewest: int = 1) -> "Groups":
        """Prompts apart by a field of theirs: `category`, `language`, or an entry of their notes.

        Args:
            prompts: all of them.
            field: the field.
            fewest: groups with fewer prompts are left out.

        Raises:
            InputError: no prompt has the field, or no group is large enough.
        """
        apart: dict[str, list[Any]] = {}
        for prompt in prompts:
            value = (
                getattr(prompt, field, None) if field in ("category", "language") else prompt.meta.get(field)
            )
            if value is not None:
                apart.setdefault(str(value), []).append(prompt)
        kept = {name: Prompts(items, name) for name, items in apart.items() if len(items) >= fewest}
        if not kept:
            raise InputError(
                f"no value of {field!r} is that of {fewest} of the {len(prompts)} prompts or more; "
                "expected a field that tells them apart, such as category"
            )
        return Groups(kept)


@well_typed
def find_by_group(
    base: LanguageModel | None,
    aligned: LanguageModel,
    groups: Groups,
    *,
    sites: Sequence[str] | None = None,
    max_new_tokens: int | None = None,
    place: Place | None = None,
    progress: Progress | None = None,
    notes: list[str] | None = None,
    **options: Any,
) -> dict[str, NeuronSet]:
    """For every group the units with the largest scores on its prompts; the same number for all.

    Args:
        base: the less safe model; None where the method needs one model.
        aligned: the safer model.
        groups: prompts to find on.
        sites: where to look; by default everywhere.
        max_new_tokens: length of completions, for methods that write some; None is what is usual for the
            models.
        place: where the scores of every group are kept, which a killed study takes up again.
        progress: told every group.
        notes: gets what the searches had to say, with the group.
        **options: `method`, and otherwise the fields of `HowFound`: a feed-forward index or a `v` row with
            its `o` columns counts as one unit; `batch_size`, prompts per pass; `to_patch`, whether the sets
            are to be patched, so that what cannot be is refused before the search.

    Raises:
        UsageError: an unknown method, one that needs a pair, or a share that is none. UnsupportedModelError:
            the sets are to be patched, and neurons of routed experts would be scored.
    """
    batch_size: BatchSize = options.pop("batch_size", "auto")
    to_patch: bool = options.pop("to_patch", False)
    how = HowFound.of(**options)
    how.check()
    method = by_name(how.method or "")
    needed = [name for name, needs in method.shown().items() if needs]
    if needed:
        raise UsageError(
            f"{how.method} reads {needed[0]} prompts too, which groups have none of; expected another method"
        )
    if base is None and method.PAIR:
        of_one = [name for name, one in METHODS.items() if not one.PAIR and not any(one.shown().values())]
        raise UsageError(
            f"{how.method} needs a pair; give --base and --aligned, or one of {', '.join(of_one)}"
        )
    table = aligned.table
    sites = tuple(site for site in sites or SITES if any(parse_key(key).site == site for key in table.keys))
    candidates = NeuronSet.all(table).only(sites=sites)
    routed = routed_keys(candidates) if to_patch and method.ROUTED else []
    if routed:
        raise UnsupportedModelError(
            f"{how.method} would score {numbered(len(routed), 'matrix', 'matrices')} of routed experts at "
            f"--sites {','.join(sites)}, and {UNPATCHED}; take dense sites, such as --sites q,k,v,o"
        )
    budget = how.units or max(1, round(how.top * candidates.n_units))
    longest = max_new_tokens or answer_length(base or aligned, aligned)
    searching = with_options(method.NAME, sites=sites, max_new_tokens=longest)
    searches, sets = Searches((base or aligned, aligned), place), {}
    for name, prompts in groups.members.items():
        if progress is not None:
            progress(f"find on {name}")
        scores, cost = searches.scores(_file_name(name), searching, prompts, batch_size)
        if notes is not None:
            notes += [f"{name}: {note}" for note in cost["notes"]]
        sets[name] = whole_units(scores.top_units(budget), sites)
    return sets


def _file_name(name: str) -> str:
    return "".join(letter if letter.isalnum() or letter in "-_" else "-" for letter in name) or "group"


@dataclasses.dataclass(frozen=True)
class Cell(Recorded[JsonObject]):
    """What one set does to one group."""

    set: str
    group: str
    refused: Rate = dataclasses.field(metadata=called("harmful_refused"))
    change: Difference
    """Refusals under the treatment minus refusals without it, over the same prompts."""
    against_random: Difference | None = dataclasses.field(metadata=called("change_against_random"))
    """The same minus what random sets do, as a difference from the next one to be drawn."""
    random: tuple[float | None, ...] = dataclasses.field(metadata=called("random_refused"))
    """Share refused under each random set."""
    effect: Effect | None = dataclasses.field(default=None, metadata=called("causal_effect"))
    """Causal effect, under patching."""
    random_effects: tuple[float | None, ...] = ()
    controls: tuple[NeuronSet, ...] = dataclasses.field(default=(), metadata=called(None))
    """The random sets."""

    def record(self) -> JsonObject:
        """As JSON values."""
        written = {**super().record(), "random_sets": [control.control_record() for control in self.controls]}
        unpatched = () if self.effect is not None else ("causal_effect", "random_effects")
        return {name: value for name, value in written.items() if name not in unpatched}


@dataclasses.dataclass
class Matrix:
    """Measures rows of a matrix: a set under a treatment, all groups, random sets of the same distribution
    beside it.
    """

    bench: Bench
    groups: Groups
    model: LanguageModel
    treat: Treat
    goal: Mapping[str, Verdicts] | None = None
    """Verdicts of the aligned model by group, under patching."""
    untreated: Mapping[str, Verdicts] = dataclasses.field(init=False)
    notes: list[str] = dataclasses.field(default_factory=list)

    def __post_init__(self) -> None:
        self.untreated = self.refused(Arm(UNTREATED, self.model))

    def refused(self, arm: Arm) -> dict[str, Verdicts]:
        """By group whether an arm refuses each request."""
        self.bench.tell(arm.name)
        return self.groups.split(self.bench.refused(arm))

    def row(self, name: str, neurons: NeuronSet) -> list[Cell]:
        """The cells of one set.

        Raises:
            NeuronError: the set is empty.
        """
        if not len(neurons):
            raise NeuronError(f"the set {name!r} is empty; expected at least one neuron")
        controls = neurons.random_like(self.bench.seed, table=self.model.table, n=self.bench.random)
        drawn = [
            Arm(f"random {number} like {name} of {len(neurons)}", self.model, self.treat(control))
            for number, control in enumerate(controls)
        ]
        self.bench.ahead([self.arm(name, neurons), *drawn], "harmful")
        treated = self.refused(self.arm(name, neurons))
        if not all(control.disjoint for control in controls):
            self.notes.append(
                f"random sets like {name!r} share members with it, which takes more than half of a layer"
            )
        random = list(map(self.refused, drawn))
        cells = [
            self._cell(
                name, group, treated[group], [outcomes[group] for outcomes in random], extra_of(controls)
            )
            for group in self.groups.names
        ]
        return [dataclasses.replace(cell, controls=tuple(controls)) for cell in cells]

    def arm(self, name: str, neurons: NeuronSet) -> Arm:
        """The model under the treatment of a set."""
        return Arm(f"{name} of {len(neurons)}", self.model, self.treat(neurons))

    def _cell(
        self, name: str, group: str, treated: Verdicts, random: Sequence[Verdicts], extra: float
    ) -> Cell:
        labels, goal = self.groups.members[group].groups, None if self.goal is None else self.goal[group]
        found = contrast(treated, self.untreated[group], labels, random=random, goal=goal, extra=extra)
        rates = tuple(rate(outcomes).value for outcomes in random)
        cell = Cell(name, group, rate(treated, labels), found.change, found.against_random, rates)
        if goal is None:
            return cell
        return dataclasses.replace(
            cell, effect=found.effect, random_effects=tuple(effect.value for effect in found.random_effects)
        )


def held_together(cells: Sequence[Cell]) -> tuple[Cell, ...]:
    """The cells of one table: of more than ten comparisons, changes and those against random alike, the
    family-wise rate is held.
    """
    held = iter(
        holm([one for cell in cells for one in (cell.change, cell.against_random) if one is not None])
    )
    return tuple(
        dataclasses.replace(
            cell, change=next(held), against_random=None if cell.against_random is None else next(held)
        )
        for cell in cells
    )


@dataclasses.dataclass(frozen=True)
class LanguageMatrix:
    """Refusals in every language while a set is off."""

    languages: tuple[str, ...]
    untreated: Mapping[str, Verdicts]
    cells: tuple[Cell, ...]
    """One for every set and language, set by set."""
    skipped: tuple[str, ...]
    """Sets without members."""
    shared: Mapping[str, GroupLabels]
    """What the prompts of every language share."""
    notes: tuple[str, ...]

    def cell(self, name: str, language: str) -> Cell:
        """The cell of a set and a language."""
        return next(cell for cell in self.cells if (cell.set, cell.group) == (name, language))

    def record(self) -> JsonObject:
        """As JSON values."""
        return {
            "untreated": {
                name: rate(outcomes, self.shared[name]).to_json() for name, outcomes in self.untreated.items()
            },
            "matrix": [cell.record() for cell in self.cells],
            "skipped": list(self.skipped),
        }


@well_typed
def deactivation_matrix(
    model: LanguageModel, sets: Mapping[str, NeuronSet], harmful: Mapping[str, Prompts], **how: Unpack[How]
) -> LanguageMatrix:
    """Refusals of harmful requests in every language while each of the sets is off, beside random sets of the
    same distribution.

    Args:
        model: the model that refuses.
        sets: by name; empty ones are skipped, and named.
        harmful: requests by language, best parallel and apart from those the sets were found on.
        **how: `random` sets for each set, with as many neurons in every matrix, and the rest of `How`.

    Source: Zhao et al., ICLR 2025, section 2.3 (safety neurons are specific to a language). Differs: refusals
    in every language are measured for every set, with paired intervals and random sets, not in its own
    language only.
    """
    groups = Groups(harmful)
    bench = Bench.of({"model": model, "sets": sets}, groups.pooled, **how)
    bench.say_seen(*sets.values())
    matrix = Matrix(bench, groups, model, lambda neurons: SetTreatment(deactivated, (model,), neurons))
    cells = [cell for name, neurons in sets.items() if len(neurons) for cell in matrix.row(name, neurons)]
    bench.finish()
    skipped = tuple(name for name, neurons in sets.items() if not len(neurons))
    return LanguageMatrix(
        tuple(groups.names),
        matrix.untreated,
        held_together(cells),
        skipped,
        groups.shared,
        (*matrix.notes, *bench.notes, *bench.cut_off_notes()),
    )


@dataclasses.dataclass(frozen=True)
class Ability:
    """What a treatment costs where no harm is asked."""

    name: str
    measured: tuple[Measurement, ...]
    harmless: Verdicts
    """Refusals of harmless requests."""
    answered: Verdicts | None
    """Whether the answers of a task are given, where there is a task."""
    shared: tuple[GroupLabels, GroupLabels] = (None, None)
    """What the harmless requests share, and the questions of the task."""

    def record(self, untreated: "Ability | None") -> JsonObject:
        """As JSON values, differences paired with the untreated model."""
        found: dict[str, Any] = {
            "name": self.name,
            "capability": {one.task: one.record() for one in self.measured},
            "harmless_refused": rate(self.harmless, self.shared[0]).to_json(),
            "task": rate(self.answered, self.shared[1]).to_json() if self.answered is not None else None,
        }
        if untreated is not None:
            found["harmless_change"] = paired_difference(
                self.harmless, untreated.harmless, self.shared[0]
            ).to_json()
            found["task_change"] = self._task_change(untreated)
        return found

    def _task_change(self, untreated: "Ability") -> DifferenceRecord | None:
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

    def record(self) -> JsonObject:
        """As JSON values."""
        return {
            "groups": list(self.groups),
            "untreated": {
                name: rate(outcomes, self.shared[name]).to_json() for name, outcomes in self.untreated.items()
            },
            "aligned": {
                name: rate(outcomes, self.shared[name]).to_json() for name, outcomes in self.aligned.items()
            },
            "matrix": [cell.record() for cell in self.cells],
            "own_and_other": self._own_and_other(),
            "ability": [
                each.record(self.abilities[0] if number else None)
                for number, each in enumerate(self.abilities)
            ],
        }

    def _own_and_other(self) -> dict[str, Any]:
        """Mean causal effect on the group a set was found on, and on the others."""
        known = [
            (cell.set == cell.group, cell.effect.value) for cell in self.cells if cell.effect is not None
        ]
        means = {}
        for name, wanted in (("own", True), ("other", False)):
            values = [value for own, value in known if own == wanted and value is not None]
            means[name] = {"value": sum(values) / len(values) if values else None, "n": len(values)}
        return means


@well_typed
def ability_tasks(
    base: LanguageModel, tasks: Sequence[str], answers: Source | None, limit: int | None
) -> tuple[list[Task], TaskSettings, Prompts]:
    """What `transfer` measures of general ability, read before anything is found or answered.

    Raises:
        UsageError: an unknown task. InputError: its file cannot be read, or a question has no answer.
    """
    settings = TaskSettings(limit=limit, folder=base.prompt_folder)
    questions = Prompts([]) if answers is None else questions_of(answers)
    return checked(tasks, settings), settings, questions


@well_typed
def transfer(
    base: LanguageModel,
    aligned: LanguageModel,
    sets: Mapping[str, NeuronSet],
    harmful: Mapping[str, Source],
    harmless: Source,
    *,
    tasks: Sequence[str] = TASKS,
    answers: Source | None = None,
    limit: int | None = None,
    **how: Unpack[How],
) -> Transfer:
    """Causal effect of every set on every group of harmful requests, and what patching it costs in general
    ability.

    Args:
        base: the less safe model, which is patched.
        aligned: the safer one, whose activations are put in.
        sets: neurons by the group they were found on.
        harmful: requests by group, apart from those the sets were found on.
        harmless: requests on which over-refusal is measured.
        tasks: capability by name (`perplexity`, `kl`, `gsm8k:FILE`, `mmlu:FOLDER`, …).
        answers: a task as questions with answers; the share of answers given word for word is measured.
        limit: items of each capability task.
        **how: `random` sets for each set, with as many neurons in every matrix, and the rest of `How`.

    Source: Chen et al., NeurIPS 2025, section 4 (change-score neurons found on one red-team set and patched
    on others; general ability). Differs: a full matrix with paired intervals, random sets for every row,
    refusals by a named judge instead of a cost model.
    """
    groups = Groups({name: as_prompts(asked) for name, asked in harmful.items()})
    if empty := [name for name, neurons in sets.items() if not len(neurons)]:
        raise NeuronError(f"the set {empty[0]!r} is empty; expected at least one neuron")
    wanted, settings, questions = ability_tasks(base, tasks, answers, limit)
    try_out(base, *(functools.partial(patched, base, aligned, neurons) for neurons in sets.values()))
    bench = Bench.of({"base": base, "aligned": aligned, "sets": sets}, groups.pooled, harmless, **how)
    bench.task = questions
    bench.say_seen(*sets.values())
    settings = dataclasses.replace(settings, batch_size=bench.batch_size, seed=bench.seed)
    measured = functools.partial(_ability, bench, wanted, settings)
    donor = Arm("aligned", aligned)
    goal = groups.split(bench.refused(donor))
    matrix = Matrix(
        bench, groups, base, lambda neurons: SetTreatment(patched, (base, aligned), neurons), goal
    )
    abilities = [measured(Arm(UNTREATED, base), UNTREATED), measured(donor, "aligned", reference=base)]
    cells: list[Cell] = []
    for name, neurons in sets.items():
        cells += matrix.row(name, neurons)
        abilities.append(measured(matrix.arm(name, neurons), name))
    bench.finish()
    notes = (*matrix.notes, *bench.notes, *bench.cut_off_notes())
    return Transfer(
        tuple(groups.names),
        matrix.untreated,
        goal,
        held_together(cells),
        tuple(abilities),
        groups.shared,
        notes,
    )


def _ability(
    bench: Bench,
    tasks: Sequence[Task],
    settings: TaskSettings,
    arm: Arm,
    name: str,
    reference: LanguageModel | None = None,
) -> Ability:
    """Over-refusal, capability and the task of one arm."""
    bench.tell(f"ability, {name}")
    wanted = [one for one in tasks if not (one.compares and arm.name == UNTREATED)]
    measured = tuple(
        measure(one, arm.model, arm.treatment, settings, reference=reference if one.compares else None)
        for one in wanted
    )
    harmless = tuple(bench.refused(arm, "harmless"))
    bench.say_of(arm, [note for each in measured for note in each.notes])
    answered = tuple(solved(bench.completed(arm, "task"), bench.task)) if len(bench.task) else None
    return Ability(name, measured, harmless, answered, (bench.harmless.groups, bench.task.groups))
