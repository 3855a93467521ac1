"""How many neurons a guard needs, and whether it matters which: sets of several detectors beside random ones, over sizes and settings."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float32, Float64, Int

from safety_neurons.errors import UsageError
from safety_neurons.guard import Pooling, read_poolings
from safety_neurons.guard.fit_features import regression
from safety_neurons.model import BatchSize, LanguageModel
from safety_neurons.neurons import NeuronSet, Scores
from safety_neurons.results import AreaPart, auroc, holm_in, mean_area_difference
from safety_neurons.studies.guard_requests import AS_WRITTEN, Cases, Sources, cases_of

COUNTS = (10, 30, 100, 300, 1000)
PENALTY = 0.03
"""Inverse strength of the L2 penalty, the same for all."""
AS_FIT, LOOK_ALIKES, UNDER_ATTACK = "held out", "look-alikes", "under attack"
Rows = Int[np.ndarray, " _"]
Progress = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Setting:
    """Requests to fit on and to test on, one pair or several whose areas are averaged."""

    name: str
    parts: tuple[tuple[Rows, Rows], ...]


def neuron_counts(
    model: LanguageModel,
    scores: Mapping[str, Scores],
    unsafe: Sources,
    safe: Sources,
    fit_unsafe: Sources,
    fit_safe: Sources,
    *,
    counts: Sequence[int] = COUNTS,
    leave_out: Sequence[str] = (),
    attacks: Sequence[str] = (),
    random: int = 3,
    fit_limit: int = 3000,
    seed: int = 0,
    batch_size: BatchSize = "auto",
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """Areas under the ROC curve of classifiers on the highest-scored neurons, each beside random sets with as many in every matrix.

    Logistic regression on standardised activations at the last token, one penalty for all. Settings: held-out requests; look-alikes alone
    (where records have a `kind` of that name); the requests under attacks; for every column the mean over its values, each left out of
    fitting once.

    Args:
        model: whose activations are read.
        scores: of the detectors, by name.
        unsafe: requests to test on.
        safe: likewise.
        fit_unsafe: requests to fit on.
        fit_safe: likewise.
        counts: neurons of a set.
        leave_out: columns, such as `language`.
        attacks: wrappers by name.
        random: random sets beside each set.
        fit_limit: requests that a classifier is fit on at most.
        seed: of random sets and draws.
        batch_size: prompts a pass.
        progress: told the name of every step.

    Returns:
        One row a detector, count and setting: `{method, count, setting, auroc, random, difference}`; `random` has every set's area,
        `difference` is paired with their mean.

    Raises:
        UsageError: no scores, or fewer than two random sets.
    """
    if not scores or random < 2:
        raise UsageError(f"{len(scores)} score files and {random} random sets; expected at least one and two")
    tested = cases_of(unsafe, safe, variants=attacks, seed=seed, limit=500)
    fit = cases_of(fit_unsafe, fit_safe)
    cases = Cases((*tested.items, *(dataclasses.replace(case, variant="fit", origin=-1) for case in fit.items)))
    everything = NeuronSet({key: np.arange(len(values)) for one in scores.values() for key, values in one.items()}, model.table)
    if progress is not None:
        progress(f"read {len(everything):,} neurons on {len(cases):,} requests")
    last = Pooling("last")
    values = read_poolings(model, model.encode(cases.prompts), everything, [last], batch_size=batch_size)[last].values
    bench = _Bench(values, everything, cases, seed)
    settings = _settings(cases, attacks, leave_out, fit_limit, seed)
    rows = []
    for name, one in scores.items():
        for count in sorted({min(count, sum(len(part) for _, part in one.items())) for count in counts}):
            if progress is not None:
                progress(f"{count:,} neurons by {name}")
            members = one.count(count)
            sets = [members, *members.random_like(seed, table=model.table, n=random)]
            rows += [{"method": name, "count": count, **bench.row(setting, sets)} for setting in settings]
            bench.forget()
    return list(holm_in(rows))


def _settings(cases: Cases, attacks: Sequence[str], leave_out: Sequence[str], limit: int, seed: int) -> list[Setting]:
    fit, written, unsafe = cases.where("fit"), cases.where(AS_WRITTEN), cases.unsafe
    draw = np.random.default_rng(seed)

    def some(rows: Rows) -> Rows:
        return np.sort(draw.choice(rows, limit, replace=False)) if len(rows) > limit else rows

    whole = some(fit)
    found = [Setting(AS_FIT, ((whole, written),))]
    look_alikes = cases.having("kind", "look_alike")[written]
    if look_alikes.any():
        found.append(Setting(LOOK_ALIKES, ((whole, written[look_alikes | unsafe[written]]),)))
    for column in leave_out:
        parts = []
        for value in cases.values(column):
            having = cases.having(column, value)
            train, test = fit[~having[fit]], written[having[written]]
            if min(_fewest(unsafe[train]), _fewest(unsafe[test])) >= 10:
                parts.append((some(train), test))
        if not parts:
            raise UsageError(f"column {column!r}: no value that both kinds of requests have; expected a column such as language")
        found.append(Setting(f"{column} left out", tuple(parts)))
    if attacks:
        found.append(Setting(UNDER_ATTACK, tuple((whole, cases.where(name)) for name in attacks)))
    return found


def _fewest(labels: Bool[np.ndarray, " row"]) -> int:
    return int(min(labels.sum(), (~labels).sum()))


class _Bench:
    """Fits a set of neurons on some cases, scores others, and remembers what it did."""

    def __init__(self, values: Float32[np.ndarray, "case neuron"], neurons: NeuronSet, cases: Cases, seed: int) -> None:
        self.values, self.unsafe, self.groups, self.seed = values, cases.unsafe, cases.groups, seed
        self.place = {member: column for column, member in enumerate(neurons)}
        self._known: dict[tuple[int, bytes], Any] = {}

    def forget(self) -> None:
        """Drop what was fit; settings of one set share fits, other sets do not."""
        self._known.clear()

    def scores(self, members: NeuronSet, fit: Rows, test: Rows) -> Float64[np.ndarray, " row"]:
        """Scores of the tested cases."""
        columns = np.array([self.place[member] for member in members], np.int64)
        key = (hash(members), fit.tobytes())
        if key not in self._known:
            self._known[key] = regression(self.values[np.ix_(fit, columns)], self.unsafe[fit], PENALTY)
        return self._known[key].scores(torch.from_numpy(self.values[np.ix_(test, columns)])).numpy()

    def row(self, setting: Setting, sets: Sequence[NeuronSet]) -> dict[str, Any]:
        """Areas of a set and of random ones, and their paired difference, averaged over the parts of the setting."""
        parts, areas = [], []
        for fit, test in setting.parts:
            labels = self.unsafe[test]
            found = [self.scores(members, fit, test) for members in sets]
            areas.append([auroc(scores, labels).value or 0.0 for scores in found])
            parts.append(AreaPart(found[0], found[1:], labels, self.groups(test)))
        means = np.mean(areas, axis=0)
        difference = mean_area_difference(parts, random=True).to_json()
        return {"setting": setting.name, "auroc": float(means[0]), "random": [float(area) for area in means[1:]], "difference": difference}
