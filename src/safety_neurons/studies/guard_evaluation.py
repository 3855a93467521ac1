"""Guard evaluation: what a guard is worth on requests it has not seen, beside classifiers that need no safety
neurons.

1. Requests are scored as written, in attacks and perturbed; what wraps an unsafe request wraps the safe ones
    too.
2. Baselines are fit by the guard's own procedure: on the requests named for fitting, or by folds of the
   evaluated ones, and then the guard's neurons are fit anew on the same folds and take the guard's place in
   comparisons.
3. Left out: for every value of a column all classifiers are fit on the others and held against it.
4. Differences of areas are paired over requests; random sets are compared by their mean.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Bool, Float64, Int

from safety_neurons.arguments import well_typed
from safety_neurons.counting import numbered
from safety_neurons.display import Displayed
from safety_neurons.errors import InputError, UsageError
from safety_neurons.guard import Guard, stratified_split
from safety_neurons.guard.calibration import LIMIT, TARGETS, expected_calibration_error
from safety_neurons.guard.features import begun_answer
from safety_neurons.guard.fit import LEAST, further_readings, largest_scores
from safety_neurons.model import BatchSize, LanguageModel
from safety_neurons.neurons import NeuronSet
from safety_neurons.neurons.sets import extra_of
from safety_neurons.prompt_lists import Prompts
from safety_neurons.results import (
    AreaPart,
    Rate,
    area_difference,
    auroc,
    holm_in,
    rate,
)
from safety_neurons.results.estimates import GroupLabels
from safety_neurons.results.records import (
    AreaRecord,
    DifferenceRecord,
    EstimateRecord,
    GuardClassifierRecord,
    GuardCurvesRecord,
    GuardEvaluationRecord,
    GuardMeasures,
    GuardSliceRecord,
    GuardWorthRecord,
)
from safety_neurons.studies.guard_baselines import GUARD, RANDOM, Baseline, Read, baselines, read_cases
from safety_neurons.studies.guard_curves import (
    Scores,
    average_precision,
    macro_f1,
    precision_recall_curve,
    reliability,
    roc_curve,
    tpr_at_fpr,
)
from safety_neurons.studies.guard_data import (
    AS_WRITTEN,
    ATTACKS,
    OVER_REFUSAL,
    PERTURBATIONS,
    Cases,
    Sources,
    cases_of,
)

FEWEST = 5
"""Requests of a class that a slice needs for an area, and safe ones above a threshold that it needs for a
rate.
"""
EVERY = "each in its turn"
"""Row of all values of a column together, each scored by the classifiers that it was left out of."""


@dataclasses.dataclass(frozen=True, eq=False)
class ScoredCases:
    """Log odds of every case by every classifier, and what the guard flags.

    Attributes:
        cases: what was scored.
        scores: log odds by classifier; NaN where there is none. Random sets are `random neurons 0`, `1`, ….
        reference: the classifier that the others are compared with: the guard, or its neurons fit anew on the
            same requests.
        flagged: 1 where the guard flags, truncated requests too; NaN of those that could not be read.
        seed: of bootstraps.
        extra: variance beside random sets, as for `against_random`.
    """

    cases: Cases
    scores: Mapping[str, Float64[np.ndarray, " case"]]
    reference: str
    flagged: Float64[np.ndarray, " case"]
    seed: int = 0
    extra: float = 1.0

    def groups(self) -> dict[str, list[str]]:
        """Classifiers by the name of their row: random sets are one."""
        found: dict[str, list[str]] = {}
        for name in self.scores:
            found.setdefault(RANDOM if name.startswith(f"{RANDOM} ") else name, []).append(name)
        return found

    def usable(self, rows: Int[np.ndarray, " row"]) -> Int[np.ndarray, " kept"]:
        """Those that every classifier scored."""
        kept = np.ones(len(rows), bool)
        for scores in self.scores.values():
            kept &= np.isfinite(scores[rows])
        return rows[kept]

    def row(
        self,
        value: str,
        rows: Int[np.ndarray, " row"],
        *,
        against: str | None = None,
        flags: np.ndarray | None = None,
    ) -> GuardSliceRecord:
        """One slice: the area of every classifier on it, differences from the reference, what the guard
        flags.

        Args:
            value: name of the slice.
            rows: cases of both kinds that areas are of.
            against: what a slice of one kind is held against.
            flags: the cases whose flags are counted, where they are fewer.
        """
        used, unsafe = self.usable(rows), self.cases.unsafe
        labels, own = unsafe[used], rows if flags is None else flags
        enough = min(int(labels.sum()), int((~labels).sum())) >= FEWEST
        kinds = own[unsafe[own]], own[~unsafe[own]]
        flagged = [rate(self.flagged[some], self.cases.groups(some)).to_json() for some in kinds]
        found: GuardSliceRecord = {
            "value": value,
            "n_unsafe": len(kinds[0]),
            "n_safe": len(kinds[1]),
            "against": against,
            "flagged_unsafe": flagged[0],
            "flagged_safe": flagged[1],
            "auroc": {},
            "difference": {},
        }
        for name, members in self.groups().items() if enough else ():
            found["auroc"][name] = self.area(members, used)
            if name != self.reference:
                found["difference"][name] = self.difference(name, members, used)
        return found

    def rates(self, rows: Int[np.ndarray, " row"]) -> dict[str, dict[str, EstimateRecord]]:
        """True-positive rate of every classifier on some cases, by false-positive rate (5 % and 1 %); of
        random sets the mean.
        """
        used = self.usable(rows)
        labels, shared = self.cases.unsafe[used], self.cases.groups(used)
        return {
            str(fpr): {
                name: _spread([at(self.scores[one][used], labels, fpr, shared) for one in members])
                for name, members in self.groups().items()
            }
            for fpr in LEFT_OUT_RATES
        }

    def difference(
        self, name: str, members: Sequence[str], rows: Int[np.ndarray, " row"]
    ) -> DifferenceRecord:
        """The reference's area minus that of a classifier, or of random sets."""
        ours, others = self.scores[self.reference][rows], [self.scores[member][rows] for member in members]
        part = AreaPart(ours, others, self.cases.unsafe[rows], self.cases.groups(rows))
        return area_difference(part, random=name == RANDOM, extra=self.extra).to_json()

    def area(self, members: Sequence[str], rows: Int[np.ndarray, " row"]) -> AreaRecord:
        """AUROC with its interval; of several sets their mean, lowest and highest."""
        labels = self.cases.unsafe[rows]
        areas = [auroc(self.scores[member][rows], labels, self.cases.groups(rows)) for member in members]
        if len(areas) == 1:
            return cast(AreaRecord, areas[0].to_json())
        values = [area.value for area in areas if area.value is not None]
        return {
            "value": float(np.mean(values)),
            "low": min(values),
            "high": max(values),
            "n": len(rows),
            "unscored": 0,
            "sets": values,
        }

    def summary(self, name: str, members: Sequence[str]) -> GuardClassifierRecord:
        """What a classifier does on the requests as written; of random sets the mean of each number."""
        rows = self.usable(self.cases.where(AS_WRITTEN))
        labels, shared = self.cases.unsafe[rows], self.cases.groups(rows)
        found: list[GuardMeasures] = []
        for member in members:
            scores = self.scores[member][rows]
            found.append(
                {
                    "average_precision": average_precision(scores, labels, self.seed, shared).to_json(),
                    "macro_f1": macro_f1(scores, labels, 0.0, self.seed, shared).to_json(),
                    "tpr_at_fpr": {str(fpr): at(scores, labels, fpr, shared) for fpr in TARGETS},
                    "expected_calibration_error": expected_calibration_error(_probabilities(scores), labels),
                }
            )
        row: GuardClassifierRecord = {
            "name": name,
            "auroc": self.area(members, rows),
            **(found[0] if len(found) == 1 else _mean(found)),
        }
        if name != self.reference:
            row["difference"] = self.difference(name, members, rows)
        return row

    def curves(self) -> GuardCurvesRecord:
        """ROC and precision-recall of every classifier (of random sets the first), and the reliability of the
        reference.
        """
        rows = self.usable(self.cases.where(AS_WRITTEN))
        labels = self.cases.unsafe[rows]
        scores = {name: self.scores[members[0]][rows] for name, members in self.groups().items()}
        chances = {name: _probabilities(found) for name, found in scores.items()}
        edges, ours = np.linspace(0, 1, 21), chances[self.reference]
        return {
            "roc": {name: roc_curve(found, labels) for name, found in scores.items()},
            "precision_recall": {
                name: precision_recall_curve(found, labels) for name, found in scores.items()
            },
            "reliability": {
                name: reliability(found, labels, groups=self.cases.groups(rows))
                for name, found in chances.items()
            },
            "histogram": {
                "edges": edges.tolist(),
                "safe": np.histogram(ours[~labels], edges)[0].tolist(),
                "unsafe": np.histogram(ours[labels], edges)[0].tolist(),
            },
        }

    # Tables

    def by(self, column: str) -> list[GuardSliceRecord]:
        """One row a value of a column.

        A value that only one kind has is held against all requests of the other.
        """
        written, unsafe = self.cases.where(AS_WRITTEN), self.cases.unsafe
        found = []
        for value in self.cases.values(column):
            own = written[self.cases.having(column, value)[written]]
            kinds = set(unsafe[own].tolist())
            if len(kinds) == 2:
                found.append(self.row(value, own))
                continue
            other = written[unsafe[written] != kinds.pop()]
            found.append(
                self.row(
                    value,
                    np.concatenate([own, other]),
                    against="all safe" if unsafe[own].all() else "all unsafe",
                    flags=own,
                )
            )
        return found

    def by_variant(self, names: Sequence[str]) -> list[GuardSliceRecord]:
        """One row a variant: changed unsafe requests against safe ones changed in the same way.

        First the requests as written.
        """
        return [self.row(name, self.cases.where(name)) for name in (AS_WRITTEN, *names)]

    def over_refusal(self) -> list[GuardSliceRecord]:
        """One row a set of safe requests that look unsafe, held against all unsafe requests."""
        rows = self.cases.where(OVER_REFUSAL)
        written = self.cases.where(AS_WRITTEN)
        unsafe = written[self.cases.unsafe[written]]
        found = []
        for source in dict.fromkeys(self.cases.items[row].source for row in rows):
            own = np.array([row for row in rows if self.cases.items[row].source == source])
            found.append(self.row(source, np.concatenate([own, unsafe]), against="all unsafe", flags=own))
        return found

    def by_length(self, lengths: Int[np.ndarray, " case"], parts: int = 4) -> list[GuardSliceRecord]:
        """Quarters of the requests as written by their number of tokens; equal lengths stay together."""
        written = self.cases.where(AS_WRITTEN)
        edges = np.unique(np.quantile(lengths[written], np.linspace(0, 1, parts + 1)).round().astype(int))
        if len(edges) < 3:
            return []
        found = []
        for low, high in zip(edges, edges[1:], strict=False):
            top = high if high == edges[-1] else high - 1
            own = written[(lengths[written] >= low) & (lengths[written] <= top)]
            if len(own):
                found.append(self.row(f"{low} to {top} tokens" if top > low else f"{low} tokens", own))
        return found


def at(
    scores: Float64[np.ndarray, " row"],
    labels: Bool[np.ndarray, " row"],
    fpr: float,
    groups: GroupLabels = None,
) -> EstimateRecord:
    """True-positive rate at a false-positive rate as JSON values.

    Without a value where fewer than five safe requests may be flagged: too few to tell. With five the
    interval held the true rate in .97 of simulated evaluations (two normal distributions, 100 safe requests).
    """
    n_safe = int((~labels).sum())
    if n_safe * fpr < FEWEST - 1e-9:
        why = f"{n_safe} safe requests; a false-positive rate of {fpr:g} needs {round(FEWEST / fpr):,}"
        return {**Rate(None, None, None, int(labels.sum())).to_json(), "why": why}
    return tpr_at_fpr(scores, labels, fpr, groups).to_json()


def _probabilities(log_odds: Scores) -> Float64[np.ndarray, " request"]:
    return 1 / (1 + np.exp(-np.clip(log_odds, -LIMIT, LIMIT)))


def _spread(rates: Sequence[EstimateRecord]) -> EstimateRecord:
    """The mean of the rates of several sets, with the lowest and highest in the place of an interval."""
    values = [one["value"] for one in rates if one["value"] is not None]
    if len(rates) == 1 or not values:
        return rates[0]
    return {
        "value": float(np.mean(values)),
        "low": min(values),
        "high": max(values),
        "n": rates[0]["n"],
        "unscored": 0,
    }


def _mean(found: Sequence[GuardMeasures]) -> GuardMeasures:
    """The mean of every number of several rows, with the lowest and highest value in the place of an
    interval.
    """
    return {
        "average_precision": _spread([row["average_precision"] for row in found]),
        "macro_f1": _spread([row["macro_f1"] for row in found]),
        "tpr_at_fpr": {
            fpr: _spread([row["tpr_at_fpr"][fpr] for row in found]) for fpr in found[0]["tpr_at_fpr"]
        },
        "expected_calibration_error": float(np.mean([row["expected_calibration_error"] for row in found])),
    }


FIT = "fit"
FOLDS = 3
REFITTED, READ_WHOLE = "guard's neurons", "guard, one reading"
"""The guard's neurons fit anew on the baselines' requests; the guard where it reads a conversation as a whole
alone, without its turns.
"""
LEFT_OUT_RATES = (0.05, 0.01)
"""False-positive rates that classifiers are held to on what they were not fit on."""
COLUMNS = ("source", "language", "category", "kind")
Progress = Callable[[str], None]
Rows = Int[np.ndarray, " _"]


@dataclasses.dataclass(frozen=True, eq=False)
class GuardEvaluation(Displayed):
    """What a guard is worth.

    Attributes:
        scored: every request with the scores of every classifier.
        result: the tables as JSON values.
        curves: ROC, precision-recall and reliability, for drawing.
        notes: warnings.
    """

    verb = "guard-evaluate"

    scored: ScoredCases
    result: GuardEvaluationRecord
    curves: GuardCurvesRecord
    notes: tuple[str, ...]

    @property
    def auroc(self) -> AreaRecord:
        """Area under the ROC curve of the guard."""
        return self.result["auroc"]

    def record(self) -> GuardWorthRecord:
        """The evaluation as JSON values, with at least the keys of the design."""
        return {**self.result, "curves": self.curves, "notes": list(self.notes)}


@well_typed
@dataclasses.dataclass(frozen=True)
class GuardTests:
    """What a guard is held against, beside the labelled requests."""

    fit_unsafe: Sources | None = None
    """Requests baselines are fit on; with those the guard was fit on, they had the same to learn from."""
    fit_safe: Sources | None = None
    """Likewise."""
    over_refusal: Sources = ()
    """More safe requests that look unsafe, one list a set."""
    attacks: Sequence[str] = ()
    """Wrappers by name."""
    perturbations: Sequence[str] = tuple(PERTURBATIONS)
    """Changes of wording by name."""
    leave_out: Sequence[str] = ()
    """Columns (`source`, `language`, `category`, …) of which every value is left out of fitting once."""
    random: int = 5
    """Random neuron sets with as many members in every matrix."""
    encoder: str | None = None
    """Folder of a sentence encoder (all-MiniLM-L6-v2, say), whose vectors are one more baseline."""
    variant_limit: int = 500
    """Requests of either kind in each attack and perturbation."""
    seed: int = 0
    """Of random sets, folds, perturbations and bootstraps."""

    def __post_init__(self) -> None:
        if (self.fit_unsafe is None) != (self.fit_safe is None):
            raise UsageError("fitting requests of one kind only; expected unsafe and safe ones, or neither")
        if self.random < 1:
            raise UsageError(
                f"{self.random} random sets; expected at least one: without it nobody can tell what the "
                "neurons are worth"
            )
        wrong = [
            name for name in self.variants if name not in (ATTACKS if name in self.attacks else PERTURBATIONS)
        ]
        if wrong:
            raise UsageError(
                f"{wrong[0]!r} is no attack or perturbation; expected some of "
                f"{', '.join([*ATTACKS, *PERTURBATIONS])}"
            )

    @property
    def variants(self) -> tuple[str, ...]:
        """Attacks and perturbations."""
        return (*self.attacks, *self.perturbations)

    def cases(self, unsafe: Sources, safe: Sources) -> Cases:
        """The requests in all variants, and those for fitting.

        Raises:
            UsageError: a column to leave out that no request has.
        """
        found = cases_of(
            unsafe,
            safe,
            over_refusal=self.over_refusal,
            variants=self.variants,
            seed=self.seed,
            limit=self.variant_limit,
        )
        unknown = [column for column in self.leave_out if not found.values(column)]
        if unknown:
            raise UsageError(
                f"--leave-out {unknown[0]}: no request has this field; expected a column such as "
                "source or language"
            )
        if self.fit_unsafe is None or self.fit_safe is None:
            return found
        fit = cases_of(self.fit_unsafe, self.fit_safe)
        items = [dataclasses.replace(case, variant=FIT, origin=-1) for case in fit.items]
        return Cases((*found.items, *items), (*found.notes, *fit.notes))


@well_typed
def evaluate_guard(
    model: LanguageModel,
    guard: Guard,
    unsafe: Sources,
    safe: Sources,
    *,
    batch_size: BatchSize = "auto",
    progress: Progress | None = None,
    **tests: Any,
) -> GuardEvaluation:
    """What a guard is worth on labelled requests.

    Args:
        model: the guard's.
        guard: bound to it or not.
        unsafe: requests it should flag, one list a data set; none of them from fitting.
        safe: requests it should let pass.
        batch_size: prompts a pass.
        progress: told the name of every step.
        **tests: the fields of `GuardTests`.

    Raises:
        UsageError: an unknown attack, one kind of fitting request without the other, no random set asked for.
        InputError: no requests of a kind, or too few to fit baselines on.
    """
    asked = GuardTests(**tests)
    say = progress or (lambda _step: None)
    cases = asked.cases(unsafe, safe)
    bound = guard if guard.model is model else guard.bind(model)
    sets = {GUARD: bound.neurons}
    controls = bound.neurons.random_like(asked.seed, table=model.table, n=asked.random)
    sets |= {f"{RANDOM} {number}": members for number, members in enumerate(controls)}
    say(f"read {len(cases):,} requests")
    read = read_cases(
        model,
        cases.prompts,
        sets,
        bound.pooling,
        direction=bound.classifier.direction,
        encoder=asked.encoder,
        batch_size=batch_size,
    )
    classifiers = _Classifiers(bound, cases, read, sets, asked.seed, say)
    scored = classifiers.scored()
    result = _result(bound, scored, read, asked)
    result["leave_out"] = {column: classifiers.left_out(column) for column in asked.leave_out}
    notes = tuple(
        dict.fromkeys([*cases.notes, *read.notes, *classifiers.notes, *_overlaps(bound, cases), *bound.notes])
    )
    return GuardEvaluation(scored, result, scored.curves(), notes)


class _Classifiers:
    """Fits classifiers on some cases and scores others."""

    def __init__(
        self, guard: Guard, cases: Cases, read: Read, sets: dict[str, NeuronSet], seed: int, say: Progress
    ) -> None:
        self.guard, self.cases, self.read, self.seed, self.say = guard, cases, read, seed, say
        self.labels, self.extra = cases.unsafe, extra_of(sets.values())
        self.classifiers = baselines(read, cases.texts, self.labels, REFITTED)
        self.fit = cases.where(FIT)
        self.written = cases.where(AS_WRITTEN)
        finite = np.isfinite(read.own).all(axis=1)
        finite &= np.logical_and.reduce([np.isfinite(values).all(axis=1) for values in read.sets.values()])
        if read.residual is not None:
            finite &= np.isfinite(read.residual).all(axis=(1, 2))
        self.usable = finite & ~read.truncated
        self.notes: list[str] = []
        if read.truncated.any():
            self.notes.append(
                f"{int(read.truncated.sum())} of {len(self.usable)} requests were truncated: flagged, and "
                "left out of areas"
            )
        others = np.isfinite(read.own).all(axis=1) & ~finite
        if others.any():
            self.notes.append(
                f"{int(others.sum())} of {len(finite)} requests gave NaN or infinity where the guard does "
                "not look: left out of areas"
            )
        crowded = [name for name, members in sets.items() if not members.disjoint]
        if crowded:
            self.notes.append(
                "random sets share members with the guard's neurons, which take more than half of a layer"
            )

    def scored(self) -> ScoredCases:
        """The guard as it is, and every baseline: fit on the fitting requests, or by folds."""
        classifier = self.guard.classifier
        features = torch.from_numpy(self.read.own).nan_to_num()
        others = np.flatnonzero([case.variant != FIT for case in self.cases.items])
        asked = [self.cases.items[row].prompt for row in others]
        guard = self.guard
        further, unread = further_readings(
            guard.bound, asked, guard.neurons, guard.pooling, direction=classifier.direction
        )
        readings = {int(others[place]): values for place, values in further.items()}
        begun = {row for row in readings if guard.reads_ends and begun_answer(self.cases.items[row].prompt)}
        found = torch.from_numpy(
            largest_scores(classifier, features, map(readings.get, range(len(features))), begun)
        )
        scores = {GUARD: np.where(self.usable, classifier.calibration(found).numpy(), np.nan)}
        sound = np.isfinite(self.read.own).all(axis=1)
        sound[others[sorted(unread)]] = False
        self.usable &= sound
        flagged = (classifier.chances(found).numpy() >= self.guard.threshold) | self.read.truncated
        flagged = np.where(sound, flagged, np.nan)
        if not sound.all():
            self.notes.append(
                f"{int((~sound).sum())} of {len(sound)} requests could not be read by the guard (NaN or "
                "infinity): they are in no rate and no area, and flagged where it serves"
            )
        if further:
            whole = classifier.calibration(classifier.scores(features)).numpy()
            scores[READ_WHOLE] = np.where(self.usable, whole, np.nan)
            self.notes.append(
                f"{numbered(len(further), 'conversation')}: the guard judges by the largest of the readings, "
                "the baselines read the whole"
            )
        plan = [(self.fit, others)] if len(self.fit) else self._folds()
        for name, baseline in self.classifiers.items():
            if name == REFITTED and len(self.fit):
                continue
            self.say(f"fit {name}")
            scores[name] = self._scores(baseline, plan)
        reference = GUARD if len(self.fit) else REFITTED
        return ScoredCases(self.cases, scores, reference, flagged, self.seed, self.extra)

    def _scores(self, baseline: Baseline, plan: Sequence[tuple[Rows, Rows]]) -> Float64[np.ndarray, " case"]:
        found = np.full(len(self.cases), np.nan)
        for fit, others in plan:
            rows = others[self.usable[others]]
            if len(rows):
                found[rows] = baseline.fit(fit[self.usable[fit]], self.seed)(rows)
        return found

    def _folds(self) -> list[tuple[Rows, Rows]]:
        """Thirds of the requests as written.

        A changed request goes with the one it was made of, an over-refusal set with the first.
        """
        self._enough(self.written, "the evaluated requests by folds")
        self.notes.append(
            "no requests to fit baselines on were given: they and the guard's neurons were fit by "
            f"{FOLDS} folds of the evaluated requests"
        )
        third = (1 / FOLDS, 1 / FOLDS, 1 - 2 / FOLDS)
        split = stratified_split(
            self.labels[self.written], seed=self.seed, shares=third, groups=self.cases.groups(self.written)
        )
        fold = np.zeros(len(self.cases), np.int64)
        for number, part in enumerate((split.train, split.validation, split.calibration)):
            fold[self.written[part]] = number
        for row, case in enumerate(self.cases.items):
            fold[row] = fold[case.origin] if case.origin >= 0 else 0
        everything = np.arange(len(self.cases))
        return [
            (self.written[fold[self.written] != number], everything[fold == number])
            for number in range(FOLDS)
        ]

    def left_out(self, column: str) -> list[GuardSliceRecord]:
        """Every value of a column: classifiers fit on requests with other values, held against the requests
        with this one.

        A value that only one kind has is left aside, and a note says so. Behind the values stands a row of
        all of them together: what one threshold is worth on requests of a kind that nothing was fit on.
        """
        pool = self.fit if len(self.fit) else self.written
        rows, tested, every = [], list[Rows](), dict[str, Float64[np.ndarray, " case"]]()
        for value in self.cases.values(column):
            having = self.cases.having(column, value)
            test, fit = self.written[having[self.written]], pool[~having[pool]]
            if len(set(self.labels[test].tolist())) < 2 or not self._can_fit(fit):
                self.notes.append(
                    f"{column} {value} was not left out: it, or what is left, has requests of one kind only"
                )
                continue
            self.say(f"leave out {column} {value}")
            found = {
                name: self._scores(baseline, [(fit, test)]) for name, baseline in self.classifiers.items()
            }
            scored = self._of_left_out(found, test)
            row = scored.row(value, test)
            row["tpr_at_fpr"] = scored.rates(test)
            kinds = self.cases.having("kind", "look_alike")[test] | self.labels[test]
            if kinds.any() and not kinds.all() and not self.labels[test[kinds]].all():
                row["look_alikes"] = scored.row("look_alike", test[kinds])
            rows.append(row)
            tested.append(test)
            for name, scores in found.items():
                every.setdefault(name, np.full(len(self.cases), np.nan))[test] = scores[test]
        if not rows:
            raise UsageError(
                f"--leave-out {column}: no value that both kinds of requests have; expected a column "
                "such as source or language"
            )
        if len(rows) > 1:  # one threshold for all of them, each scored by who never saw it
            together = np.concatenate(tested)
            scored = self._of_left_out(every, together)
            rows.append({**scored.row(EVERY, together), "tpr_at_fpr": scored.rates(together)})
        return holm_in(rows)

    def _of_left_out(self, scores: Mapping[str, Float64[np.ndarray, " case"]], test: Rows) -> ScoredCases:
        """Scores of requests by classifiers that were fit without them; above one half is flagged."""
        own = scores[REFITTED][test]
        flagged = np.full(len(self.cases), np.nan)
        flagged[test] = np.where(np.isnan(own), np.nan, own >= 0)
        return ScoredCases(self.cases, scores, REFITTED, flagged, self.seed, self.extra)

    def _can_fit(self, rows: Rows) -> bool:
        n_unsafe = int(self.labels[rows].sum())
        return min(n_unsafe, len(rows) - n_unsafe) >= LEAST

    def _enough(self, rows: Rows, where: str) -> None:
        n_unsafe = int(self.labels[rows].sum())
        if min(n_unsafe, len(rows) - n_unsafe) < 2 * LEAST:
            raise InputError(
                f"{n_unsafe} unsafe and {len(rows) - n_unsafe} safe requests; expected {2 * LEAST} of "
                f"either to fit baselines on {where}"
            )


def _result(guard: Guard, scored: ScoredCases, read: Read, asked: GuardTests) -> GuardEvaluationRecord:
    ours, all_ = scored.summary(GUARD, [GUARD]), scored.row("all", scored.cases.where(AS_WRITTEN))
    written = scored.cases.where(AS_WRITTEN)
    told = written[np.isfinite(scored.flagged[written])]
    flags, labels = scored.flagged[told], scored.cases.unsafe[told]
    in_force = macro_f1(flags, labels, 0.5, scored.seed, scored.cases.groups(told))
    return {
        "auroc": ours["auroc"],
        "average_precision": ours["average_precision"],
        "macro_f1": ours["macro_f1"],
        "macro_f1_in_force": in_force.to_json(),
        "tpr_at_fpr": ours["tpr_at_fpr"],
        "expected_calibration_error": ours["expected_calibration_error"],
        "n_neurons": len(guard.neurons),
        "pooling": str(guard.pooling),
        "threshold": guard.threshold,
        "in_force": guard.in_force,
        "n_unsafe": all_["n_unsafe"],
        "n_safe": all_["n_safe"],
        "flagged_unsafe": all_["flagged_unsafe"],
        "flagged_safe": all_["flagged_safe"],
        "compared": scored.reference,
        "baselines": holm_in(
            [scored.summary(name, members) for name, members in scored.groups().items() if name != GUARD]
        ),
        "tables": {
            column: holm_in(scored.by(column)) for column in COLUMNS if len(scored.cases.values(column)) > 1
        },
        "over_refusal": holm_in(scored.over_refusal()),
        "attacks": holm_in(scored.by_variant(asked.attacks)) if asked.attacks else [],
        "perturbations": holm_in(scored.by_variant(asked.perturbations)) if asked.perturbations else [],
        "lengths": holm_in(scored.by_length(read.lengths)),
        "leave_out": {},
    }


def _overlaps(guard: Guard, cases: Cases) -> list[str]:
    """Requests that were seen before: in fitting the guard, in finding its neurons, in fitting the
    baselines.
    """
    written = Prompts([case.prompt for case in cases.items if case.variant in (AS_WRITTEN, OVER_REFUSAL)])
    fit = [case.prompt.digest for case in cases.items if case.variant == FIT]
    known = guard.report.get("prompt_digests") or []
    where = {
        "the guard was fit on": known,
        "its neurons were found on": guard.neurons.provenance.config.get("prompt_digests") or [],
        "the baselines were fit on": fit,
    }
    counts = {name: written.overlap(digests) for name, digests in where.items()}
    notes = [
        f"{count} of the {len(written)} evaluated requests are among those {name}"
        for name, count in counts.items()
        if count
    ]
    if fit and known and set(fit) != set(known):
        notes.append(
            f"the baselines were fit on {len(set(fit)):,} requests and the guard on {len(set(known)):,} "
            "that are not the same"
        )
    return notes
