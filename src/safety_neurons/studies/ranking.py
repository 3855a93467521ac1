"""Which method should I use: the comparison over several organisms, budgets and seeds, and one table over all of them.

Where the truth is planted the question is recall at equal count, elsewhere the causal effect of a set of a given size. A method's
number over several organisms is their mean, beside the worst and every single one, so that no ranking rests on one seed.
"""

import dataclasses
import pathlib
import statistics
from collections.abc import Callable, Sequence
from typing import Any

from safety_neurons.errors import UsageError
from safety_neurons.model import LanguageModel
from safety_neurons.model.batches import BatchSize
from safety_neurons.organism import OrganismFolder, load_pair
from safety_neurons.organism import open as open_organism
from safety_neurons.prompts import prompts
from safety_neurons.studies.arms import Progress
from safety_neurons.studies.comparison import Comparison, compare

MEASURES = {
    "recall": "share of the planted units found, at equal count",
    "causal_effect": "refusals restored by patching the set into the base, of those the aligned model adds",
    "necessity": "refusals that the aligned model loses while the set is off",
    "harmless_refused": "harmless requests refused while the set is patched",
    "seconds": "time of finding, in seconds",
}
SMALLER_IS_BETTER = ("harmless_refused", "seconds")
HIGH, WHOLE = 0.95, 0.9
"""What is asked of a method: recall of planted units, and causal effect."""


@dataclasses.dataclass(frozen=True)
class Entry:
    """One organism at one budget.

    Attributes:
        organism: its name and seed.
        kind: planted or natural.
        share: the budget as a share of the units; of planted organisms as many units as are true.
        comparison: what was measured.
    """

    organism: str
    kind: str
    share: float
    comparison: Comparison

    @property
    def group(self) -> str:
        """Entries of a group are averaged: all planted organisms, or the natural ones at one budget."""
        return "planted" if self.kind == "planted" else f"{self.kind} {self.share:g}"

    def record(self) -> dict[str, Any]:
        """As JSON values."""
        return {"organism": self.organism, "kind": self.kind, "share": self.share, "group": self.group, **self.comparison.record()}


@dataclasses.dataclass(frozen=True)
class Standing:
    """One method's numbers of one measure in one group.

    Attributes:
        method: its name; all random sets are one method.
        group: which organisms.
        measure: one of `MEASURES`.
        mean: over the organisms; None where it is nowhere defined.
        worst: the least good of them.
        by_organism: every one; None where it is undefined there.
    """

    method: str
    group: str
    measure: str
    mean: float | None
    worst: float | None
    by_organism: dict[str, float | None]

    @staticmethod
    def of(method: str, group: str, measure: str, values: dict[str, float | None]) -> "Standing":
        """From the values of every organism."""
        known = [value for value in values.values() if value is not None]
        worst = (max if measure in SMALLER_IS_BETTER else min)(known, default=None)
        return Standing(method, group, measure, statistics.fmean(known) if known else None, worst, values)


@dataclasses.dataclass(frozen=True)
class Ranking:
    """Methods over organisms."""

    entries: tuple[Entry, ...]
    standings: tuple[Standing, ...]

    @property
    def leaders(self) -> list[dict[str, Any]]:
        """For each group and measure, the methods whose mean is the best; random sets and times take no part."""
        found = []
        for group, measure in dict.fromkeys((one.group, one.measure) for one in self.standings if one.measure != "seconds"):
            here = [one for one in self.standings if (one.group, one.measure) == (group, measure) and one.method != "random"]
            means = [one.mean for one in here if one.mean is not None]
            if means:
                best = (min if measure in SMALLER_IS_BETTER else max)(means)
                names = [one.method for one in here if one.mean == best]
                found.append({"group": group, "measure": measure, "methods": names, "mean": best})
        return found

    def record(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "organisms": [entry.record() for entry in self.entries],
            "ranking": [dataclasses.asdict(one) for one in self.standings],
            "leaders": self.leaders,
            "measures": MEASURES,
        }


def rank(
    organisms: Sequence[str | pathlib.Path],
    *,
    tops: Sequence[float] = (0.02,),
    methods: Sequence[str] | None = None,
    random: int = 5,
    find: int = 100,
    measured: int = 200,
    max_new_tokens: int = 24,
    seed: int = 0,
    batch_size: BatchSize = "auto",
    place: Callable[[str], pathlib.Path] | None = None,
    progress: Progress | None = None,
) -> Ranking:
    """All methods on all organisms.

    Args:
        organisms: names of shipped organisms, or folders of built ones.
        tops: budgets on natural organisms, as shares of the units of `down`; on planted ones all sites are searched and as many units are
            taken as are true.
        methods: names from `METHODS`; None for all.
        random: random sets on every organism.
        find: prompts of the find half that methods look at, harmful and harmless ones each.
        measured: held-out prompts that sets are measured on, of each kind.
        max_new_tokens: length of a completion, in tokens.
        seed: of random sets.
        batch_size: prompts per pass.
        place: where a file of that name is kept; a killed ranking continues.
        progress: told the name of every step.

    Raises:
        InputError: no such organism.
        UsageError: no organism or budget, the same organism twice, or one without a pair.
    """
    opened = [open_organism(name) for name in organisms]
    names = [f"{one.record['name']}-{one.record['seed']}" for one in opened]
    if not opened or not tops or len(set(names)) < len(names):
        raise UsageError(f"organisms {', '.join(names) or 'none'} and budgets {list(tops)}: expected at least one of each, none twice")
    single = [name for name, one in zip(names, opened, strict=True) if one.base == one.aligned]
    if single:
        raise UsageError(f"{single[0]} has one model; methods are compared on a base and an aligned one")
    entries: list[Entry] = []
    options: dict[str, Any] = {"methods": methods, "random": random, "seed": seed, "batch_size": batch_size}
    for name, one in zip(names, opened, strict=True):
        pair = load_pair(one.base, one.aligned)
        shares = tops if one.truth is None else (0.0,)
        for share in shares:
            made = _Run(one, name, share, find, measured, max_new_tokens, place, progress).compare(pair.base, pair.aligned, options)
            entries.append(Entry(name, one.record["kind"], share or made.budget / made.n_units, made))
    return Ranking(tuple(entries), tuple(standings(entries)))


@dataclasses.dataclass(frozen=True)
class _Run:
    """One organism at one budget."""

    folder: OrganismFolder
    name: str
    share: float
    find: int
    measured: int
    max_new_tokens: int
    place: Callable[[str], pathlib.Path] | None
    progress: Progress | None

    def compare(self, base: LanguageModel, aligned: LanguageModel, options: dict[str, Any]) -> Comparison:
        """The comparison; scores are kept per organism, answers per budget."""
        place, said = self.place, self.progress

        def texts(kind: str, limit: int) -> Any:
            return prompts(f"builtin:{kind}", folder=self.folder.prompts, limit=limit)

        return compare(
            base,
            aligned,
            texts("harmful-test", self.measured),
            texts("harmless-test", self.measured),
            find_prompts=texts("harmful", self.find),
            find_harmless=texts("harmless", self.find),
            truth=self.folder.truth,
            top=self.share or 0.05,
            max_new_tokens=self.max_new_tokens,
            completions_file=place(f"{self.name}/completions-{self.share:g}.jsonl") if place is not None else None,
            place=(lambda file: place(f"{self.name}/{file}")) if place is not None else None,
            progress=(lambda step: said(f"{self.name}: {step}")) if said is not None else None,
            **options,
        )


def standings(entries: Sequence[Entry]) -> list[Standing]:
    """Every method's mean, worst and single values by group and measure, best mean first."""
    values: dict[tuple[str, str, str], dict[str, list[float | None]]] = {}
    for entry in entries:
        for row in entry.comparison.methods:
            method = "random" if row.method.startswith("random ") else row.method
            told = {
                "recall": row.recall,
                "causal_effect": row.causal_effect.value,
                "necessity": row.necessity.value,
                "harmless_refused": row.harmless_refused.value,
                "seconds": row.seconds,
            }
            for measure, value in told.items():
                if measure == "recall" and entry.kind != "planted":
                    continue
                values.setdefault((entry.group, measure, method), {}).setdefault(entry.organism, []).append(value)
    made = [Standing.of(method, group, measure, _means(by)) for (group, measure, method), by in values.items()]
    order = list(MEASURES)

    def key(one: Standing) -> tuple[str, int, float]:
        sign = 1 if one.measure in SMALLER_IS_BETTER else -1
        return one.group, order.index(one.measure), float("inf") if one.mean is None else sign * one.mean

    return sorted(made, key=key)


def _means(by: dict[str, list[float | None]]) -> dict[str, float | None]:
    known = {name: [value for value in values if value is not None] for name, values in by.items()}
    return {name: statistics.fmean(values) if values else None for name, values in known.items()}
