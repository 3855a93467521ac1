"""Guard evaluation: what a guard is worth on requests it has not seen, beside classifiers that need no safety neurons.

1. Requests are scored as written, in attacks and perturbed; what wraps an unsafe request wraps the safe ones too.
2. Baselines are fit by the guard's own procedure: on the requests named for fitting, or by folds of the evaluated ones, and then the
   guard's neurons are fit anew on the same folds and take the guard's place in comparisons.
3. Left out: for every value of a column all classifiers are fit on the others and held against it.
4. Differences of areas are paired over requests; random sets are compared by their mean.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float64, Int

from safety_neurons.errors import InputError, UsageError
from safety_neurons.guard import Guard, stratified_split
from safety_neurons.guard.fit_features import LEAST, largest_scores
from safety_neurons.guard.fitting import further_readings
from safety_neurons.model import BatchSize, LanguageModel
from safety_neurons.neurons import NeuronSet
from safety_neurons.prompts import Prompts
from safety_neurons.results import holm_in
from safety_neurons.studies import notebook
from safety_neurons.studies.guard_baselines import GUARD, RANDOM, Baseline, Read, baselines, read_cases
from safety_neurons.studies.guard_measures import Row, Scored
from safety_neurons.studies.guard_requests import AS_WRITTEN, ATTACKS, OVER_REFUSAL, PERTURBATIONS, Case, Cases, Sources, cases_of

FIT = "fit"
FOLDS = 3
REFITTED = "guard's neurons"
COLUMNS = ("source", "language", "category", "kind")
Progress = Callable[[str], None]
Rows = Int[np.ndarray, " _"]


@dataclasses.dataclass(frozen=True, eq=False)
class GuardEvaluation:
    """What a guard is worth.

    Attributes:
        scored: every request with the scores of every classifier.
        result: the tables as JSON values.
        curves: ROC, precision-recall and reliability, for drawing.
        notes: what had to be said.
    """

    scored: Scored
    result: dict[str, Any]
    curves: dict[str, Any]
    notes: tuple[str, ...]

    @property
    def auroc(self) -> Row:
        """Area under the ROC curve of the guard."""
        return self.result["auroc"]

    def _repr_html_(self) -> str:
        return notebook.guard_table(self.result)

    def record(self) -> dict[str, Any]:
        """The evaluation as JSON values, with at least the keys of the design."""
        return {**self.result, "curves": self.curves, "notes": list(self.notes)}


def evaluate_guard(
    model: LanguageModel,
    guard: Guard,
    unsafe: Sources,
    safe: Sources,
    *,
    fit_unsafe: Sources | None = None,
    fit_safe: Sources | None = None,
    over_refusal: Sources = (),
    attacks: Sequence[str] = (),
    perturbations: Sequence[str] = tuple(PERTURBATIONS),
    leave_out: Sequence[str] = (),
    random: int = 5,
    variant_limit: int = 500,
    seed: int = 0,
    batch_size: BatchSize = "auto",
    progress: Progress | None = None,
) -> GuardEvaluation:
    """What a guard is worth on labelled requests.

    Args:
        model: the guard's.
        guard: bound to it or not.
        unsafe: requests it should flag, one list a data set; none of them from fitting.
        safe: requests it should let pass.
        fit_unsafe: requests baselines are fit on; with those the guard was fit on, they had the same to learn from.
        fit_safe: likewise.
        over_refusal: more safe requests that look unsafe, one list a set.
        attacks: wrappers by name.
        perturbations: changes of wording by name.
        leave_out: columns (`source`, `language`, `category`, …) of which every value is left out of fitting once.
        random: random neuron sets with as many members in every matrix.
        variant_limit: requests of either kind in each attack and perturbation.
        seed: of random sets, folds, perturbations and bootstraps.
        batch_size: prompts a pass.
        progress: told the name of every step.

    Raises:
        UsageError: an unknown attack, one kind of fitting request without the other, no random set asked for.
        InputError: no requests of a kind, or too few to fit baselines on.
    """
    if (fit_unsafe is None) != (fit_safe is None):
        raise UsageError("fitting requests of one kind only; expected unsafe and safe ones, or neither")
    if random < 1:
        raise UsageError(f"{random} random sets; expected at least one: without it nobody can tell what the neurons are worth")
    wrong = [name for name in (*attacks, *perturbations) if name not in (ATTACKS if name in attacks else PERTURBATIONS)]
    if wrong:
        raise UsageError(f"{wrong[0]!r} is no attack or perturbation; expected some of {', '.join([*ATTACKS, *PERTURBATIONS])}")
    say = progress or (lambda _step: None)
    variants = (*attacks, *perturbations)
    cases = cases_of(unsafe, safe, over_refusal=over_refusal, variants=variants, seed=seed, limit=variant_limit)
    unknown = [column for column in leave_out if not cases.values(column)]
    if unknown:
        raise UsageError(f"--leave-out {unknown[0]}: no request has this field; expected a column such as source or language")
    if fit_unsafe is not None and fit_safe is not None:
        cases = _with_fit(cases, cases_of(fit_unsafe, fit_safe))
    bound = guard if guard.model is model else guard.bind(model)
    sets = {GUARD: bound.neurons}
    sets |= {f"{RANDOM} {number}": one for number, one in enumerate(bound.neurons.random_like(seed, table=model.table, n=random))}
    say(f"read {len(cases):,} requests")
    read = read_cases(model, cases.prompts, sets, bound.pooling, batch_size=batch_size)
    bench = _Bench(bound, cases, read, sets, seed, say)
    scored = bench.scored()
    result = _result(bound, scored, read, attacks, perturbations)
    result["leave_out"] = {column: bench.left_out(column) for column in leave_out}
    notes = tuple(dict.fromkeys([*cases.notes, *read.notes, *bench.notes, *_overlaps(bound, cases), *bound.notes]))
    return GuardEvaluation(scored, result, scored.curves(), notes)


def _with_fit(cases: Cases, fit: Cases) -> Cases:
    items = [dataclasses.replace(case, variant=FIT, origin=-1) for case in fit.items]
    return Cases((*cases.items, *items), (*cases.notes, *fit.notes))


class _Bench:
    """Fits classifiers on some cases and scores others."""

    def __init__(self, guard: Guard, cases: Cases, read: Read, sets: dict[str, NeuronSet], seed: int, say: Progress) -> None:
        self.guard, self.cases, self.read, self.seed, self.say = guard, cases, read, seed, say
        self.labels = cases.unsafe
        self.classifiers = baselines(read, cases.texts, self.labels, REFITTED)
        self.fit = cases.where(FIT)
        self.written = cases.where(AS_WRITTEN)
        finite = np.logical_and.reduce([np.isfinite(values).all(axis=1) for values in read.sets.values()])
        if read.residual is not None:
            finite &= np.isfinite(read.residual).all(axis=(1, 2))
        self.usable = finite & ~read.truncated
        self.notes: list[str] = []
        if not self.usable.all():
            lost = int((~self.usable).sum())
            self.notes.append(f"{lost} of {len(self.usable)} requests were truncated or gave NaN: flagged, and left out of areas")
        crowded = [name for name, members in sets.items() if not members.disjoint]
        if crowded:
            self.notes.append("random sets share members with the guard's neurons, which take more than half of a layer")

    def scored(self) -> Scored:
        """The guard as it is, and every baseline: fit on the fitting requests, or by folds."""
        classifier = self.guard.classifier
        features = torch.from_numpy(self.read.sets[GUARD]).nan_to_num()
        others = np.flatnonzero([case.variant != FIT for case in self.cases.items])
        asked = [self.cases.items[row].prompt for row in others]
        further = further_readings(self.guard.bound, asked, self.guard.neurons, self.guard.pooling)
        readings = {int(others[place]): values for place, values in further.items()}
        found = torch.from_numpy(largest_scores(classifier, features, map(readings.get, range(len(features)))))
        scores = {GUARD: np.where(self.usable, classifier.calibration(found).numpy(), np.nan)}
        flagged = (classifier.chances(found).numpy() >= self.guard.threshold) | ~self.usable
        if further:
            self.notes.append(
                f"{len(further)} conversations: the guard judges them by the largest of their readings, the baselines read them as a whole"
            )
        plan = [(self.fit, others)] if len(self.fit) else self._folds()
        for name, baseline in self.classifiers.items():
            if name == REFITTED and len(self.fit):
                continue
            self.say(f"fit {name}")
            scores[name] = self._scores(baseline, plan)
        return Scored(self.cases, scores, GUARD if len(self.fit) else REFITTED, flagged, self.seed)

    def _scores(self, baseline: Baseline, plan: Sequence[tuple[Rows, Rows]]) -> Float64[np.ndarray, " case"]:
        found = np.full(len(self.cases), np.nan)
        for fit, others in plan:
            rows = others[self.usable[others]]
            if len(rows):
                found[rows] = baseline.fit(fit[self.usable[fit]], self.seed)(rows)
        return found

    def _folds(self) -> list[tuple[Rows, Rows]]:
        """Thirds of the requests as written; a changed request goes with the one it was made of, an over-refusal set with the first."""
        self._enough(self.written, "the evaluated requests by folds")
        self.notes.append(
            f"no requests to fit baselines on were given: they and the guard's neurons were fit by {FOLDS} folds of the evaluated requests"
        )
        third = (1 / FOLDS, 1 / FOLDS, 1 - 2 / FOLDS)
        split = stratified_split(self.labels[self.written], seed=self.seed, shares=third, groups=self.cases.groups(self.written))
        fold = np.zeros(len(self.cases), np.int64)
        for number, part in enumerate((split.train, split.validation, split.calibration)):
            fold[self.written[part]] = number
        for row, case in enumerate(self.cases.items):
            fold[row] = fold[case.origin] if case.origin >= 0 else 0
        everything = np.arange(len(self.cases))
        return [(self.written[fold[self.written] != number], everything[fold == number]) for number in range(FOLDS)]

    def left_out(self, column: str) -> list[Row]:
        """Every value of a column: classifiers fit on requests with other values, held against the requests with this one.

        Where only one kind has a value, it is held against the requests of the other kind that have none of the column's shared values.
        """
        pool = self.fit if len(self.fit) else self.written
        rows = []
        for value in self.cases.values(column):
            having = self.cases.having(column, value)
            test, fit = self.written[having[self.written]], pool[~having[pool]]
            if len(set(self.labels[test].tolist())) < 2 or not self._can_fit(fit):
                self.notes.append(f"{column} {value} was not left out: it, or what is left, has requests of one kind only")
                continue
            self.say(f"leave out {column} {value}")
            found = {name: self._scores(baseline, [(fit, test)]) for name, baseline in self.classifiers.items()}
            flagged = np.zeros(len(self.cases), bool)
            flagged[test] = found[REFITTED][test] >= 0
            row = Scored(self.cases, found, REFITTED, flagged, self.seed).row(value, test)
            kinds = self.cases.having("kind", "look_alike")[test] | self.labels[test]
            if kinds.any() and not kinds.all() and not self.labels[test[kinds]].all():
                row["look_alikes"] = Scored(self.cases, found, REFITTED, flagged, self.seed).row("look_alike", test[kinds])
            rows.append(row)
        if not rows:
            raise UsageError(
                f"--leave-out {column}: no value that both kinds of requests have; expected a column such as source or language"
            )
        return holm_in(rows)

    def _can_fit(self, rows: Rows) -> bool:
        n_unsafe = int(self.labels[rows].sum())
        return min(n_unsafe, len(rows) - n_unsafe) >= LEAST

    def _enough(self, rows: Rows, where: str) -> None:
        n_unsafe = int(self.labels[rows].sum())
        if min(n_unsafe, len(rows) - n_unsafe) < 2 * LEAST:
            raise InputError(
                f"{n_unsafe} unsafe and {len(rows) - n_unsafe} safe requests; expected {2 * LEAST} of either to fit baselines on {where}"
            )


def _result(guard: Guard, scored: Scored, read: Read, attacks: Sequence[str], perturbations: Sequence[str]) -> dict[str, Any]:
    groups, written = scored.groups(), scored.cases.where(AS_WRITTEN)
    ours = scored.summary(GUARD, [GUARD])
    labels = scored.cases.unsafe[written]
    flagged = scored.row("all", written)
    return {
        **{name: ours[name] for name in ("auroc", "average_precision", "tpr_at_fpr", "expected_calibration_error")},
        "n_neurons": len(guard.neurons),
        "pooling": str(guard.pooling),
        "threshold": guard.threshold,
        "in_force": guard.in_force,
        "n_unsafe": int(labels.sum()),
        "n_safe": int((~labels).sum()),
        "flagged_unsafe": flagged["flagged_unsafe"],
        "flagged_safe": flagged["flagged_safe"],
        "compared": scored.reference,
        "baselines": holm_in([scored.summary(name, members) for name, members in groups.items() if name != GUARD]),
        "tables": {column: holm_in(scored.by(column)) for column in COLUMNS if len(scored.cases.values(column)) > 1},
        "over_refusal": holm_in(scored.over_refusal()),
        "attacks": holm_in(scored.by_variant(attacks)) if attacks else [],
        "perturbations": holm_in(scored.by_variant(perturbations)) if perturbations else [],
        "lengths": holm_in(scored.by_length(read.lengths)),
    }


def _overlaps(guard: Guard, cases: Cases) -> list[str]:
    """Requests that were seen before: in fitting the guard, in finding its neurons, in fitting the baselines."""
    written = Prompts([case.prompt for case in cases.items if case.variant in (AS_WRITTEN, OVER_REFUSAL)])
    fit = [case.prompt.digest for case in cases.items if case.variant == FIT]
    known = guard.report.get("prompt_digests") or []
    where = {
        "the guard was fit on": known,
        "its neurons were found on": guard.neurons.provenance.config.get("prompt_digests") or [],
        "the baselines were fit on": fit,
    }
    counts = {name: written.overlap(digests) for name, digests in where.items()}
    notes = [f"{count} of the {len(written)} evaluated requests are among those {name}" for name, count in counts.items() if count]
    if fit and known and set(fit) != set(known):
        notes.append(f"the baselines were fit on {len(set(fit)):,} requests and the guard on {len(set(known)):,} that are not the same")
    return notes


__all__ = ["COLUMNS", "Case", "GuardEvaluation", "evaluate_guard"]
