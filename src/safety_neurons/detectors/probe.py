"""Linear probes of harmful against harmless prompts, one a site: how much they lean on each neuron."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from safety_neurons.counting import numbered
from safety_neurons.detectors.activity import (
    Pool,
    at_last,
    largest,
    mean,
    pooled_activations,
    sorted_out,
    whole_rows,
)
from safety_neurons.detectors.methods import ProbeWeights, SparseProbe
from safety_neurons.detectors.runner import Run, Scored
from safety_neurons.errors import InputError
from safety_neurons.prompt_lists import Prompts

SAME = 1e-5
"""Share of its size below which a feature's spread is rounding: the largest activation is often that of a
token all prompts begin with.
"""
Fit = Callable[["ProbeData", Float[Tensor, "prompt neuron"]], Float[np.ndarray, " number"]]
"""What is kept of one site's probe."""


@dataclass(frozen=True)
class ProbeData:
    """Whose features are classified.

    Attributes:
        labels: 1 for harmful prompts.
        groups: what a prompt shares with others, as a number; its own where it shares nothing.
    """

    labels: Int[np.ndarray, " prompt"]
    groups: Int[np.ndarray, " prompt"]

    @property
    def balance(self) -> Float[np.ndarray, " prompt"]:
        """Weights by which both kinds count alike; their mean is 1."""
        counts = np.bincount(self.labels, minlength=2)
        weights: np.ndarray = len(self.labels) / 2 / counts[self.labels]
        return weights

    def part(self, rows: Int[np.ndarray, " row"]) -> "ProbeData":
        """Some of the prompts."""
        return ProbeData(self.labels[rows], self.groups[rows])


def fitted(run: Run, pool: Pool, fit: Fit) -> tuple[dict[str, np.ndarray], Scored]:
    """What is kept of every site's probe, and scores yet to be filled; a probe that was fitted is not fitted
    again by a run that goes on.
    """
    model, stream = run.aligned, run.stream
    assert run.harmless is not None
    lists = (run.prompts, run.harmless)
    encoded = [model.encode(text) for text in lists]
    seen = [
        pooled_activations(run, text, run.sizes, pool, name)
        for name, text in zip(("harmful", "harmless"), encoded, strict=True)
    ]
    whole, counts, notes = sorted_out(encoded, [whole_rows(part.values()) for part in seen])
    run.notes += notes
    kept = [used.numpy() for used in whole]
    labelled = ProbeData(
        np.repeat([1, 0], [int(used.sum()) for used in kept]),
        np.concatenate([part[used] for part, used in zip(group_numbers(lists), kept, strict=True)]),
    )
    done = stream.named("probe")
    with stream.kept():
        for number, key in enumerate(run.sizes):
            if key not in done:
                features = torch.cat([part[key][used] for part, used in zip(seen, whole, strict=True)])
                done[key] = fit(labelled, features.double())
                stream.put("probe", {key: done[key]})
                stream.went_on()
            if run.progress is not None:
                run.progress(number + 1, len(run.sizes), 0)
    return {key: done[key] for key in run.sizes}, Scored({}, counts)


def group_numbers(lists: Sequence[Prompts]) -> list[Int[np.ndarray, " prompt"]]:
    """A number for what every prompt shares with others, over all lists."""
    numbers: dict[Any, int] = {}
    return [
        np.array(
            [
                numbers.setdefault((place, row) if group is None else group, len(numbers))
                for row, group in enumerate(text.groups)
            ]
        )
        for place, text in enumerate(lists)
    ]


def standardised(features: Float[Tensor, "prompt neuron"]) -> Float[Tensor, "prompt neuron"]:
    """Features of mean 0 and standard deviation 1; a constant one is 0."""
    centred = features - features.mean(0)
    spread = centred.std(0, correction=0)
    varies = spread > SAME * features.abs().amax(0)
    return torch.where(varies, centred / torch.where(varies, spread, 1.0), 0.0)


def score_weights(_: ProbeWeights, run: Run) -> Scored:
    """Signed z-scores of the weights of an L2-penalised probe."""

    def fit(labelled: ProbeData, features: Tensor) -> np.ndarray:
        weights = probe(features, torch.from_numpy(labelled.labels).double())
        scores = (weights - weights.mean()) / weights.std(correction=0).clamp(min=1e-30)
        return (weights.sign() * scores.abs()).numpy()

    values, scored = fitted(run, largest, fit)
    return replace(scored, values=values)


def probe(
    features: Float[Tensor, "prompt neuron"], labels: Float[Tensor, " prompt"]
) -> Float[Tensor, " neuron"]:
    """Weights of a logistic regression on standardised features (a constant feature is 0), with an intercept
    that is not penalised.
    """
    scaled = standardised(features)
    values = torch.zeros(scaled.shape[1] + 1, dtype=scaled.dtype, requires_grad=True)
    solver = torch.optim.LBFGS(
        [values], max_iter=500, tolerance_grad=1e-9, tolerance_change=1e-14, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        solver.zero_grad()
        odds = scaled @ values[:-1] + values[-1]
        loss = torch.nn.functional.binary_cross_entropy_with_logits(odds, labels, reduction="sum")
        loss = loss + ProbeWeights.PENALTY / 2 * values[:-1].square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        solver.step(closure)
    return values.detach()[:-1]


POOLS: dict[str, Pool] = {"mean": mean, "last": at_last, "largest": largest}
STRENGTHS = tuple(float(step) for step in np.geomspace(1.25, 256, 8))
"""Values of C that are tried, in units of the largest that leaves every weight 0."""
NEARLY = 1e-6
"""Size of the scores of neurons without a weight: below every weight, and in an order of their own."""
INTERCEPT = 100.0
"""The solver penalises the intercept too; a constant feature of this size divides that by as much."""


def score_sparse(method: SparseProbe, run: Run) -> Scored:
    """Sizes of the weights of an L1-penalised probe."""
    values, scored = fitted(run, POOLS[method.pool], partial(sparse, method))
    made = {key: Sparse.of_array(kept) for key, kept in values.items()}
    weights = {key: one.weights for key, one in made.items()}
    given = sum(int((one.weights != 0).sum()) for one in made.values())
    run.notes.append(
        f"{numbered(len(made), 'probe gives', 'probes give')} a weight to {given:,} of "
        f"{numbered(sum(run.sizes.values()), 'neuron')}"
    )
    best = min(made, key=lambda key: made[key].loss)
    if np.isfinite(made[best].loss):
        run.notes.append(
            f"the best of them in cross-validation is that of {best}: log loss {made[best].loss:.2f} per "
            f"prompt, {np.log(2):.2f} by chance"
        )
    loose = sum(not one.converged for one in made.values())
    if loose:
        run.notes.append(f"{numbered(loose, 'probe')} did not converge")
    if method.sign == "both":
        more = sum(int((one > 0).sum()) for one in weights.values())
        run.notes.append(
            f"{numbered(more, 'weight points', 'weights point')} to harmful prompts, {given - more:,} to "
            "harmless ones"
        )
    probes = {key: one.record() for key, one in made.items()}
    return replace(
        scored, values={key: one.scores(method.sign) for key, one in made.items()}, config={"probes": probes}
    )


@dataclass(frozen=True)
class Sparse:
    """An L1-penalised probe of one site.

    Attributes:
        weights: of standardised activations; positive for what is larger on harmful prompts.
        pull: by how much of the penalty the loss pulls at each weight, with the sign it pulls to; of size 1
            where a weight is not 0, below where it is.
        strength: C.
        loss: mean log loss of a held-out prompt; NaN where C was given.
        converged: whether the solver came to an end.
    """

    weights: Float[np.ndarray, " neuron"]
    pull: Float[np.ndarray, " neuron"]
    strength: float
    loss: float
    converged: bool

    def array(self) -> Float[np.ndarray, " number"]:
        """As one array, to be kept."""
        return np.concatenate([self.weights, self.pull, [self.strength, self.loss, self.converged]])

    @staticmethod
    def of_array(kept: Float[np.ndarray, " number"]) -> "Sparse":
        """From what `array` gave."""
        weights, pull = np.split(kept[:-3], 2)
        return Sparse(weights, pull, float(kept[-3]), float(kept[-2]), bool(kept[-1]))

    def scores(self, sign: str) -> Float[np.ndarray, " neuron"]:
        """The size of each weight, or of those of one sign; for the others how near they are to having one,
        a little below 0.
        """
        side = {"both": np.sign(self.pull), "harmful": 1.0, "harmless": -1.0}[sign]
        sizes = self.weights * side
        near = NEARLY * (np.clip(self.pull * side, 0, 1) - 1)
        scores: np.ndarray = np.where(sizes > 0, sizes, near)
        return scores

    def record(self) -> dict[str, float | int | None]:
        """What the provenance says of it."""
        loss = self.loss if np.isfinite(self.loss) else None
        return {"strength": self.strength, "log_loss": loss, "weights": int((self.weights != 0).sum())}


def sparse(method: SparseProbe, labelled: ProbeData, features: Float[Tensor, "prompt neuron"]) -> np.ndarray:
    """The probe of one site, at the given C or at that of the smallest held-out loss (the smallest C among
    equals).
    """
    scaled = standardised(features).numpy()
    least = 1 / max(float(np.abs(scaled.T @ (labelled.balance * (labelled.labels - 0.5))).max()), 1e-12)
    strength, loss = float(method.strength or 0.0), float("nan")
    if method.strength is None:
        losses = held_out(labelled, scaled, [least * step for step in STRENGTHS], method.folds)
        best = min(range(len(losses)), key=losses.__getitem__)
        strength, loss = least * STRENGTHS[best], losses[best]
    weights, intercept, converged = logistic(labelled, scaled, strength)
    wrong = labelled.labels - _chances(scaled @ weights + intercept)
    pull = strength * (scaled.T @ (labelled.balance * wrong))
    pull = np.where(weights != 0, np.sign(weights), np.clip(pull, -1, 1))
    return Sparse(weights, pull, strength, loss, converged).array()


def logistic(
    labelled: ProbeData, scaled: Float[np.ndarray, "prompt neuron"], strength: float
) -> tuple[Float[np.ndarray, " neuron"], float, bool]:
    """Weights and intercept that minimise ‖w‖₁ + C · Σ balance · log loss, and whether the solver came to an
    end.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    model: Any = LogisticRegression(
        C=strength,
        solver="liblinear",
        tol=1e-6,
        max_iter=1000,
        random_state=0,
        intercept_scaling=INTERCEPT,
        **l1_penalty(),
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.fit(scaled, labelled.labels, sample_weight=labelled.balance)
    loose = any(issubclass(one.category, ConvergenceWarning) for one in caught)
    return model.coef_[0].astype(np.float64), float(model.intercept_[0]), not loose


def l1_penalty() -> dict[str, Any]:
    """scikit-learn's L1 penalty, by the name that the installed version knows it by; the other is ignored
    or gone.
    """
    import sklearn

    version = tuple(int(part) for part in sklearn.__version__.split(".")[:2])
    return {"l1_ratio": 1.0} if version >= (1, 8) else {"penalty": "l1"}


def held_out(
    labelled: ProbeData, scaled: Float[np.ndarray, "prompt neuron"], strengths: Sequence[float], folds: int
) -> list[float]:
    """Mean log loss of a held-out prompt for every C, both kinds counted alike; in a fold C is larger by as
    much as it has fewer prompts.

    Raises:
        InputError: fewer than two groups of a kind, or no fold that leaves prompts of both.
    """
    from sklearn.model_selection import StratifiedGroupKFold

    n_groups = [len(np.unique(labelled.groups[labelled.labels == label])) for label in (1, 0)]
    parts = min(folds, *n_groups)
    if parts < 2:
        raise InputError(
            f"a probe is cross-validated over groups of prompts, and there are {n_groups[0]} of harmful and "
            f"{n_groups[1]} of harmless ones; give more prompts, or a strength"
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Fewer prompts of a kind than folds: groups are what is counted.
        split = StratifiedGroupKFold(parts, shuffle=True, random_state=0)
        divided = list(split.split(scaled, labelled.labels, labelled.groups))
    divided = [
        (train, test) for train, test in divided if len(test) and len(set(labelled.labels[train])) == 2
    ]
    if not divided:
        raise InputError(
            "no part of the prompts leaves harmful and harmless ones of other groups; give more groups, or a "
            "strength"
        )
    sums, balance = np.zeros(len(strengths)), labelled.balance
    for train, test in divided:
        for number, strength in enumerate(strengths):
            larger = strength * len(labelled.labels) / len(train)
            weights, intercept, _ = logistic(labelled.part(train), scaled[train], larger)
            odds = (scaled[test] @ weights + intercept) * np.where(labelled.labels[test] == 1, 1, -1)
            sums[number] += float((balance[test] * np.logaddexp(0, -odds)).sum())
    tested = sum(float(balance[test].sum()) for _, test in divided)
    return [float(one) for one in sums / tested]


def _chances(odds: Float[np.ndarray, " prompt"]) -> Float[np.ndarray, " prompt"]:
    chances: np.ndarray = np.exp(-np.logaddexp(0, -odds))
    return chances
