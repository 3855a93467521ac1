"""Groups: prompts under names (languages, categories, red-team sets), a set found on each, and what each set does to every group.

All groups are answered in one go under every treatment and told apart afterwards: a matrix of k sets by k groups costs k passes over the
prompts and not k × k.
"""

import contextlib
import dataclasses
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from safety_neurons.detectors import find
from safety_neurons.detectors.methods import METHODS, by_name, with_options
from safety_neurons.errors import InputError, NeuronError, UsageError
from safety_neurons.model import LanguageModel
from safety_neurons.model.batches import BatchSize
from safety_neurons.neurons import SITES, NeuronSet, Scores, parse_key
from safety_neurons.prompts import Prompts
from safety_neurons.results import Difference, Effect, Rate, against_random, causal_effect, holm, paired_difference, rate
from safety_neurons.results.estimates import GroupLabels
from safety_neurons.studies.arms import Bench, Progress
from safety_neurons.studies.comparison import Verdicts, whole_units
from safety_neurons.studies.verification import MEASURE

Treat = Callable[[NeuronSet], Callable[[], contextlib.AbstractContextManager[Any]]]
Place = Callable[[str], pathlib.Path]


@dataclasses.dataclass(frozen=True)
class Groups:
    """Prompts by group."""

    members: Mapping[str, Prompts]

    def __post_init__(self) -> None:
        empty = [name for name, prompts in self.members.items() if not len(prompts)]
        if empty or not self.members:
            raise InputError(f"group {empty[0]!r} has no prompts; expected some in each" if empty else "no group of prompts was given")

    @property
    def names(self) -> list[str]:
        """The groups, in order."""
        return list(self.members)

    @property
    def pooled(self) -> Prompts:
        """All prompts one after another; ids carry the name of the group, so that parallel lists stay apart."""
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
            value = getattr(prompt, field, None) if field in ("category", "language") else prompt.meta.get(field)
            if value is not None:
                apart.setdefault(str(value), []).append(prompt)
        kept = {name: Prompts(items, name) for name, items in apart.items() if len(items) >= fewest}
        if not kept:
            raise InputError(f"no {fewest} prompts of {prompts.name!r} share a {field}; expected a field that tells them apart")
        return Groups(kept)


def find_by_group(
    base: LanguageModel | None,
    aligned: LanguageModel,
    groups: Groups,
    *,
    method: str,
    units: int | None = None,
    top: float | int = 0.02,
    sites: Sequence[str] | None = None,
    max_new_tokens: int = 64,
    batch_size: BatchSize = "auto",
    place: Place | None = None,
    progress: Progress | None = None,
) -> dict[str, NeuronSet]:
    """For every group the units with the largest scores on its prompts; the same number for all.

    Args:
        base: the less safe model; None where the method needs one model.
        aligned: the safer model.
        groups: prompts to find on.
        method: the name of a registered method.
        units: how many units; a feed-forward index or a `v` row with its `o` columns counts once.
        top: share of the units, where no number is given.
        sites: where to look; by default everywhere.
        max_new_tokens: length of completions, for methods that write some.
        batch_size: prompts per pass.
        place: where the scores of every group are kept, which a killed study takes up again.
        progress: told every group.

    Raises:
        UsageError: an unknown method, one that needs a pair, or a share that is none.
    """
    check_method(method, base, units, top)
    table = aligned.table
    sites = tuple(site for site in sites or SITES if any(parse_key(key).site == site for key in table.keys))
    budget = units or max(1, round(top * NeuronSet.all(table).only(sites=sites).n_units))
    searching = with_options(method, sites=sites, max_new_tokens=max_new_tokens)
    models = [base or aligned, aligned] if searching.PAIR else [aligned]
    found = {}
    for name, prompts in groups.members.items():
        if progress is not None:
            progress(f"find on {name}")
        file = place(f"{_file_name(name)}.scores.safetensors") if place is not None else None
        scores = _kept(file, aligned, prompts)
        if scores is None:
            scores = find(searching, models, prompts, batch_size=batch_size).scores
            if file is not None:
                scores.save(file)
        found[name] = whole_units(scores.top_units(budget), sites)
    return found


def check_method(method: str, base: object | None, units: int | None, top: float | int) -> None:
    """Refuse what no model can make right.

    Raises:
        UsageError: an unknown method, one that needs a pair, or a budget that is none.
    """
    if by_name(method).HARMLESS == "needed":
        raise UsageError(f"{method} reads harmless prompts too, which groups have none of; expected another method")
    if base is None and by_name(method).PAIR:
        of_one = [name for name, one in METHODS.items() if not one.PAIR and one.HARMLESS != "needed"]
        raise UsageError(f"{method} needs a pair; give --base and --aligned, or one of {', '.join(of_one)}")
    if units is None and not 0 < top <= 1:
        raise UsageError(f"top {top} is not a share; expected above 0 and at most 1 (0.02 for two per cent)")


def _kept(file: pathlib.Path | None, model: LanguageModel, prompts: Prompts) -> Scores | None:
    if file is None or not file.is_file():
        return None
    scores = Scores.load(file, table=model.table)
    return scores if scores.provenance.prompts_sha256 in ("", prompts.sha256) else None


def _file_name(name: str) -> str:
    return "".join(letter if letter.isalnum() or letter in "-_" else "-" for letter in name) or "group"


@dataclasses.dataclass(frozen=True)
class Cell:
    """What one set does to one group."""

    set: str
    group: str
    refused: Rate
    change: Difference
    """Refusals under the treatment minus refusals without it, over the same prompts."""
    against_random: Difference | None
    """The same minus what random sets do, as a difference from the next one to be drawn."""
    random: tuple[float | None, ...]
    """Share refused under each random set."""
    effect: Effect | None = None
    """Causal effect, under patching."""
    random_effects: tuple[float | None, ...] = ()
    controls: tuple[NeuronSet, ...] = ()
    """The random sets."""

    def record(self) -> dict[str, Any]:
        """As JSON values."""
        found = {
            "set": self.set,
            "group": self.group,
            "harmful_refused": self.refused.to_json(),
            "change": self.change.to_json(),
            "change_against_random": self.against_random.to_json() if self.against_random else None,
            "random_refused": list(self.random),
            "random_sets": [control.control_record() for control in self.controls],
        }
        if self.effect is not None:
            found |= {"causal_effect": self.effect.to_json(), "random_effects": list(self.random_effects)}
        return found


@dataclasses.dataclass
class Matrix:
    """Measures rows of a matrix: a set under a treatment, all groups, random sets of the same distribution beside it."""

    bench: Bench
    groups: Groups
    model: LanguageModel
    treat: Treat
    random: int = 3
    goal: Mapping[str, Verdicts] | None = None
    """Verdicts of the aligned model by group, under patching."""
    untreated: Mapping[str, Verdicts] = dataclasses.field(init=False)
    notes: list[str] = dataclasses.field(default_factory=list)

    def __post_init__(self) -> None:
        self.untreated = self.groups.split(self._verdicts("untreated", contextlib.nullcontext))

    def row(self, name: str, neurons: NeuronSet) -> list[Cell]:
        """The cells of one set.

        Raises:
            NeuronError: the set is empty.
        """
        if not len(neurons):
            raise NeuronError(f"the set {name!r} is empty; expected at least one neuron")
        treated = self.groups.split(self._verdicts(f"{name} of {len(neurons)}", self.treat(neurons)))
        controls = neurons.random_like(self.bench.seed, table=self.model.table, n=self.random)
        if not all(control.disjoint for control in controls):
            self.notes.append(f"random sets like {name!r} share members with it, which takes more than half of a layer")
        drawn = [
            self.groups.split(self._verdicts(f"random {number} like {name} of {len(neurons)}", self.treat(control)))
            for number, control in enumerate(controls)
        ]
        cells = [self._cell(name, group, treated[group], [part[group] for part in drawn]) for group in self.groups.names]
        return [dataclasses.replace(cell, controls=tuple(controls)) for cell in cells]

    def _cell(self, name: str, group: str, treated: Verdicts, drawn: Sequence[Verdicts]) -> Cell:
        before, shared = self.untreated[group], self.groups.members[group].groups
        against = against_random(treated, drawn, shared) if drawn else None
        effect: Effect | None = None
        effects: tuple[float | None, ...] = ()
        if self.goal is not None:
            effect = causal_effect(before, self.goal[group], treated, MEASURE, shared)
            effects = tuple(causal_effect(before, self.goal[group], part, MEASURE, shared).value for part in drawn)
        rates = tuple(rate(part).value for part in drawn)
        change = paired_difference(treated, before, shared)
        return Cell(name, group, rate(treated, shared), change, against, rates, effect, effects)

    def _verdicts(self, arm: str, treatment: Callable[[], contextlib.AbstractContextManager[Any]]) -> Verdicts:
        if self.bench.progress is not None:
            self.bench.progress(arm)
        return self.bench.verdicts(self.model, arm, "harmful", treatment)


def held_together(cells: Sequence[Cell]) -> tuple[Cell, ...]:
    """The cells of one table: of more than ten comparisons, changes and those against random alike, the family-wise rate is held."""
    held = iter(holm([one for cell in cells for one in (cell.change, cell.against_random) if one is not None]))
    return tuple(
        dataclasses.replace(cell, change=next(held), against_random=None if cell.against_random is None else next(held)) for cell in cells
    )
