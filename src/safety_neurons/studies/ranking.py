"""Rank methods over organisms and budgets: which one should I use?

Where the truth is planted the question is recall at equal count, elsewhere the causal effect of a set of a
given size. A method's number over several organisms is their mean, beside the worst and every single one, so
that no ranking rests on one seed.
"""

import dataclasses
import pathlib
import statistics
from collections.abc import Sequence
from typing import Any

from safety_neurons.arguments import well_typed
from safety_neurons.counting import numbered
from safety_neurons.display import Displayed
from safety_neurons.errors import UsageError
from safety_neurons.model import load_pair
from safety_neurons.model.files import open_organism
from safety_neurons.prompt_lists import prompts
from safety_neurons.results import Difference, holm, paired_difference
from safety_neurons.results.estimates import FEWEST_SEEDS
from safety_neurons.results.measured import EntryRecord, LeaderRecord, RankingRecord, StandingRecord
from safety_neurons.results.records import DifferenceRecord, Recorded
from safety_neurons.studies.bench import Progress
from safety_neurons.studies.comparison import RANDOM, TRUTH, Comparison, Place, compare

MEASURES = {
    "recall": "share of the planted units found, at equal count",
    "causal_effect": "refusals restored by patching the set into the base, of those the aligned model adds",
    "necessity": "refusals that the aligned model loses while the set is off",
    "harmful_complied": "answers to harmful requests that do harm while the set is patched",
    "harmless_refused": "harmless requests refused while the set is patched",
    "seconds": "time of finding, in seconds",
}
SMALLER_IS_BETTER = ("harmful_complied", "harmless_refused", "seconds")


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

    def record(self) -> EntryRecord:
        """As JSON values."""
        return {
            "organism": self.organism,
            "kind": self.kind,
            "share": self.share,
            "group": self.group,
            **self.comparison.record(),
        }


@dataclasses.dataclass(frozen=True)
class Standing(Recorded[StandingRecord]):
    """One method's numbers of one measure in one group.

    Attributes:
        method: its name; all random sets are one method, and the planted truth is called one.
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
class Ranking(Displayed):
    """Methods over organisms."""

    verb = "compare"

    entries: tuple[Entry, ...]
    standings: tuple[Standing, ...]

    @property
    def leaders(self) -> list[LeaderRecord]:
        """For each group and measure, the methods whose mean is the best, those that come next, and the
        difference of the two over the same organisms.

        Random sets, the truth and times take no part.
        """
        leaders: list[LeaderRecord] = []
        for group, measure in dict.fromkeys(
            (one.group, one.measure) for one in self.standings if one.measure != "seconds"
        ):
            here = [
                one
                for one in self.standings
                if (one.group, one.measure) == (group, measure) and one.method not in (RANDOM, TRUTH)
            ]
            means = [one.mean for one in here if one.mean is not None]
            if means:
                best, *others = sorted(set(means), reverse=measure not in SMALLER_IS_BETTER)
                first, second = (
                    [one for one in here if one.mean == mean] for mean in (best, next(iter(others), None))
                )
                leaders.append(
                    {
                        "group": group,
                        "measure": measure,
                        "methods": [one.method for one in first],
                        "mean": best,
                        "next": [one.method for one in second] if others else [],
                        "ahead": _over_organisms(first[0], second[0]) if others else None,
                    }
                )
        told = holm([Difference.from_json(one["ahead"]) for one in leaders if one["ahead"] is not None])
        held = iter(told)
        return [one if one["ahead"] is None else {**one, "ahead": next(held).to_json()} for one in leaders]

    def record(self) -> RankingRecord:
        """As JSON values."""
        return {
            "organisms": [entry.record() for entry in self.entries],
            "ranking": [one.record() for one in self.standings],
            "leaders": self.leaders,
            "measures": MEASURES,
        }


def _over_organisms(first: Standing, second: Standing) -> DifferenceRecord:
    """The first minus the second over the organisms on which both are defined."""
    ours, theirs = ([one.by_organism.get(name) for name in first.by_organism] for one in (first, second))
    found = paired_difference(ours, theirs)
    why = f"not shown: {numbered(found.n, 'organism')}, at least {FEWEST_SEEDS} are needed"
    return (dataclasses.replace(found, why=why) if found.n < FEWEST_SEEDS else found).to_json()


@well_typed
def rank(
    organisms: Sequence[str | pathlib.Path],
    *,
    tops: Sequence[float] = (0.02,),
    find: int = 100,
    measured: int = 200,
    place: Place | None = None,
    progress: Progress | None = None,
    **how: Any,
) -> Ranking:
    """All methods on all organisms.

    Args:
        organisms: names of shipped organisms, or folders of built ones.
        tops: budgets on natural organisms, as shares of the units of `down`; on planted ones all sites are
            searched and as many units are taken as are true.
        find: prompts of the find half that methods look at, harmful and harmless ones each.
        measured: held-out prompts that sets are measured on, of each kind.
        place: where a file of that name is kept; a killed ranking continues.
        progress: told the name of every step.
        **how: `methods`, `random`, `seed`, `max_new_tokens` (24 by default) and `batch_size`, as for
            `compare`.

    Raises:
        InputError: no such organism.
        UsageError: no organism or budget, the same organism twice, or one without a pair.
    """
    opened = [open_organism(name) for name in organisms]
    names = [f"{one.record['name']}-{one.record['seed']}" for one in opened]
    if not opened or not tops or len(set(names)) < len(names):
        raise UsageError(
            f"organisms {', '.join(names) or 'none'} and budgets {list(tops)}: expected at least one of "
            "each, none twice"
        )
    single = [name for name, one in zip(names, opened, strict=True) if one.base == one.aligned]
    if single:
        raise UsageError(f"{single[0]} has one model; methods are compared on a base and an aligned one")
    entries: list[Entry] = []
    for name, one in zip(names, opened, strict=True):
        pair = load_pair(one.base, one.aligned)
        for share in tops if one.truth is None else (0.0,):
            texts = {
                kind: prompts(
                    f"builtin:{kind}", folder=one.prompts, limit=measured if kind.endswith("-test") else find
                )
                for kind in ("harmful", "harmless", "general", "harmful-test", "harmless-test")
            }
            compared = compare(
                pair.base,
                pair.aligned,
                texts["harmful-test"],
                texts["harmless-test"],
                find_prompts=texts["harmful"],
                find_harmless=texts["harmless"],
                find_general=texts["general"],
                truth=one.truth,
                top=share or 0.05,
                **_of_organism(name, share, place, progress),
                **{"max_new_tokens": 24, **how},
            )
            entries.append(
                Entry(name, one.record["kind"], share or compared.budget / compared.n_units, compared)
            )
    return Ranking(tuple(entries), tuple(standings(entries)))


def _of_organism(name: str, share: float, place: Place | None, progress: Progress | None) -> dict[str, Any]:
    """Where the scores of an organism and the answers at one budget are kept, and how steps are told, as
    arguments of `compare`.
    """
    return {
        "completions_file": None if place is None else place(f"{name}/completions-{share:g}.jsonl"),
        "place": None if place is None else lambda file: place(f"{name}/{file}"),
        "progress": None if progress is None else lambda step: progress(f"{name}: {step}"),
    }


def standings(entries: Sequence[Entry]) -> list[Standing]:
    """Every method's mean, worst and single values by group and measure, best mean first."""
    values: dict[tuple[str, str, str], dict[str, list[float | None]]] = {}
    for entry in entries:
        truth = entry.comparison.truth
        for row in (*entry.comparison.methods, *(() if truth is None else (truth,))):
            method = RANDOM if row.method.startswith(f"{RANDOM} ") else row.method
            numbers = {
                "recall": row.recall,
                "causal_effect": row.causal_effect.value,
                "necessity": row.necessity.value,
                "harmful_complied": row.harmful_complied.value,
                "harmless_refused": row.harmless_refused.value,
                "seconds": row.seconds,
            }
            for measure, value in numbers.items():
                if measure == "recall" and entry.kind != "planted":
                    continue
                values.setdefault((entry.group, measure, method), {}).setdefault(entry.organism, []).append(
                    value
                )
    rows = [
        Standing.of(method, group, measure, _means(by)) for (group, measure, method), by in values.items()
    ]
    order = list(MEASURES)

    def key(one: Standing) -> tuple[str, int, float]:
        sign = 1 if one.measure in SMALLER_IS_BETTER else -1
        return one.group, order.index(one.measure), float("inf") if one.mean is None else sign * one.mean

    return sorted(rows, key=key)


def _means(by: dict[str, list[float | None]]) -> dict[str, float | None]:
    known = {name: [value for value in values if value is not None] for name, values in by.items()}
    return {name: statistics.fmean(values) if values else None for name, values in known.items()}
