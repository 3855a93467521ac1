"""Tables of a guard's evaluation: one row a slice of the requests, the guard beside every baseline on the same requests."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float64, Int

from safety_neurons.results import AreaPart, Rate, area_difference, auroc, rate
from safety_neurons.results.estimates import GroupLabels
from safety_neurons.studies.guard_baselines import RANDOM
from safety_neurons.studies.guard_requests import AS_WRITTEN, OVER_REFUSAL, Cases
from safety_neurons.studies.guard_statistics import (
    average_precision,
    calibration_error,
    precision_recall_curve,
    reliability,
    roc_curve,
    tpr_at_fpr,
)

RATES = (0.05, 0.01, 0.001)
EXAMPLES = 20
"""Safe requests times false-positive rate that a rate needs to be shown."""
FEWEST = 5
"""Requests of a class that a slice needs for an area."""
Row = dict[str, Any]


@dataclasses.dataclass(frozen=True, eq=False)
class Scored:
    """Log odds of every case by every classifier, and what the guard flags.

    Attributes:
        cases: what was scored.
        scores: log odds by classifier; NaN where there is none. Random sets are `random neurons 0`, `1`, ….
        reference: the classifier that the others are compared with: the guard, or its neurons fit anew on the same requests.
        flagged: by the guard, unscored and truncated requests too.
        seed: of bootstraps.
    """

    cases: Cases
    scores: Mapping[str, Float64[np.ndarray, " case"]]
    reference: str
    flagged: Bool[np.ndarray, " case"]
    seed: int = 0

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

    def row(self, value: str, rows: Int[np.ndarray, " row"], *, against: str | None = None, flags: np.ndarray | None = None) -> Row:
        """One slice: the area of every classifier on it, differences from the reference, what the guard flags.

        Args:
            value: name of the slice.
            rows: cases of both kinds that areas are of.
            against: what a slice of one kind is held against.
            flags: the cases whose flags are counted, where they are fewer.
        """
        used, unsafe = self.usable(rows), self.cases.unsafe
        labels, own = unsafe[used], rows if flags is None else flags
        enough = min(int(labels.sum()), int((~labels).sum())) >= FEWEST
        found: Row = {"value": value, "n_unsafe": int(unsafe[own].sum()), "n_safe": int((~unsafe[own]).sum()), "against": against}
        for kind, some in (("flagged_unsafe", own[unsafe[own]]), ("flagged_safe", own[~unsafe[own]])):
            found[kind] = rate(self.flagged[some], self.cases.groups(some)).to_json()
        found["auroc"], found["difference"] = {}, {}
        for name, members in self.groups().items() if enough else ():
            found["auroc"][name] = self.area(members, used)
            if name != self.reference:
                found["difference"][name] = self.difference(name, members, used)
        return found

    def difference(self, name: str, members: Sequence[str], rows: Int[np.ndarray, " row"]) -> Row:
        """The reference's area minus that of a classifier, or of random sets."""
        ours, others = self.scores[self.reference][rows], [self.scores[member][rows] for member in members]
        part = AreaPart(ours, others, self.cases.unsafe[rows], self.cases.groups(rows))
        return area_difference(part, random=name == RANDOM).to_json()

    def area(self, members: Sequence[str], rows: Int[np.ndarray, " row"]) -> Row:
        """AUROC with its interval; of several sets their mean, lowest and highest."""
        labels = self.cases.unsafe[rows]
        areas = [auroc(self.scores[member][rows], labels, self.cases.groups(rows)) for member in members]
        if len(areas) == 1:
            return areas[0].to_json()
        values = [area.value for area in areas if area.value is not None]
        return {"value": float(np.mean(values)), "low": min(values), "high": max(values), "n": len(rows), "unscored": 0, "sets": values}

    def summary(self, name: str, members: Sequence[str]) -> Row:
        """What a classifier does on the requests as written; of random sets the mean of each number."""
        rows = self.usable(self.cases.where(AS_WRITTEN))
        labels, shared = self.cases.unsafe[rows], self.cases.groups(rows)
        found: list[Row] = []
        for member in members:
            scores = self.scores[member][rows]
            bins = reliability(1 / (1 + np.exp(-np.clip(scores, -30, 30))), labels, groups=shared)
            found.append(
                {
                    "average_precision": average_precision(scores, labels, self.seed, shared).to_json(),
                    "tpr_at_fpr": {str(fpr): at(scores, labels, fpr, self.seed, shared) for fpr in RATES},
                    "expected_calibration_error": calibration_error(bins),
                }
            )
        row = {"name": name, "auroc": self.area(members, rows), **(found[0] if len(found) == 1 else _mean(found))}
        if name != self.reference:
            row["difference"] = self.difference(name, members, rows)
        return row

    def curves(self) -> Row:
        """ROC and precision-recall of every classifier (of random sets the first), and the reliability of the reference."""
        rows = self.usable(self.cases.where(AS_WRITTEN))
        labels = self.cases.unsafe[rows]
        found: Row = {"roc": {}, "precision_recall": {}}
        for name, members in self.groups().items():
            scores = self.scores[members[0]][rows]
            found["roc"][name] = roc_curve(scores, labels)
            found["precision_recall"][name] = precision_recall_curve(scores, labels)
        chances = {name: 1 / (1 + np.exp(-np.clip(self.scores[members[0]][rows], -30, 30))) for name, members in self.groups().items()}
        found["reliability"] = {name: reliability(values, labels, groups=self.cases.groups(rows)) for name, values in chances.items()}
        edges = np.linspace(0, 1, 21)
        ours = chances[self.reference]
        found["histogram"] = {
            "edges": edges.tolist(),
            "safe": np.histogram(ours[~labels], edges)[0].tolist(),
            "unsafe": np.histogram(ours[labels], edges)[0].tolist(),
        }
        return found

    # Tables

    def by(self, column: str) -> list[Row]:
        """One row a value of a column; a value that only one kind has is held against all requests of the other."""
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
                self.row(value, np.concatenate([own, other]), against="all safe" if unsafe[own].all() else "all unsafe", flags=own)
            )
        return found

    def by_variant(self, names: Sequence[str]) -> list[Row]:
        """One row a variant: changed unsafe requests against safe ones changed in the same way; first the requests as written."""
        return [self.row(name, self.cases.where(name)) for name in (AS_WRITTEN, *names)]

    def over_refusal(self) -> list[Row]:
        """One row a set of safe requests that look unsafe, held against all unsafe requests."""
        rows = self.cases.where(OVER_REFUSAL)
        written = self.cases.where(AS_WRITTEN)
        unsafe = written[self.cases.unsafe[written]]
        found = []
        for source in dict.fromkeys(self.cases.items[row].source for row in rows):
            own = np.array([row for row in rows if self.cases.items[row].source == source])
            found.append(self.row(source, np.concatenate([own, unsafe]), against="all unsafe", flags=own))
        return found

    def by_length(self, lengths: Int[np.ndarray, " case"], parts: int = 4) -> list[Row]:
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


def at(scores: Float64[np.ndarray, " row"], labels: Bool[np.ndarray, " row"], fpr: float, seed: int, groups: GroupLabels = None) -> Row:
    """True-positive rate at a false-positive rate as JSON values; without a value where safe requests are too few to tell."""
    n_safe = int((~labels).sum())
    if n_safe * fpr < EXAMPLES - 1e-9:
        why = f"{n_safe} safe requests; a false-positive rate of {fpr:g} needs {round(EXAMPLES / fpr):,}"
        return {**Rate(None, None, None, int(labels.sum())).to_json(), "why": why}
    return tpr_at_fpr(scores, labels, fpr, seed, groups).to_json()


def _mean(found: Sequence[Row]) -> Row:
    """The mean of every number of several rows, with the lowest and highest value in the place of an interval."""

    def spread(rates: Sequence[Row]) -> Row:
        values = [one["value"] for one in rates if one["value"] is not None]
        if not values:
            return rates[0]
        return {"value": float(np.mean(values)), "low": min(values), "high": max(values), "n": rates[0]["n"], "unscored": 0}

    return {
        "average_precision": spread([row["average_precision"] for row in found]),
        "tpr_at_fpr": {fpr: spread([row["tpr_at_fpr"][fpr] for row in found]) for fpr in found[0]["tpr_at_fpr"]},
        "expected_calibration_error": float(np.mean([row["expected_calibration_error"] for row in found])),
    }
