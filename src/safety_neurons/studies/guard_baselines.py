"""Classifiers that can embarrass a guard, fit on the same requests by one procedure: words, random neurons, residual stream."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Float64, Int

from safety_neurons.guard import Calibration, fit_on_features, read_poolings, stratified_split
from safety_neurons.guard.calibration import fit_calibration
from safety_neurons.guard.fit_features import regression
from safety_neurons.guard.pooling import Pooling
from safety_neurons.model import BatchSize, LanguageModel
from safety_neurons.model.batches import Batch
from safety_neurons.model.hooks import around
from safety_neurons.model.passes import run_batches
from safety_neurons.neurons import NeuronSet
from safety_neurons.prompts import Prompts
from safety_neurons.results import auroc

GUARD, WORDS, CHARACTERS, RANDOM = "guard", "TF-IDF words", "TF-IDF characters", "random neurons"
RESIDUAL, DIRECTION = "residual stream", "refusal direction"
PENALTIES = (1e-3, 1e-2, 1e-1)
"""Inverse strengths of the L2 penalty that validation chooses from, the same for all features that are numbers."""
WORD_PENALTIES = (1.0, 10.0, 100.0)

Rows = Int[np.ndarray, " _"]
Score = Callable[[Rows], Float64[np.ndarray, " _"]]
"""Calibrated log odds of being unsafe, for cases by number."""


@runtime_checkable
class Baseline(Protocol):
    """A way to tell unsafe requests from safe ones, which can be fit on any of the cases."""

    def fit(self, rows: Rows, seed: int) -> Score:
        """Fit on these cases; returns what scores any case."""
        ...


@dataclasses.dataclass(frozen=True, eq=False)
class Linear:
    """Logistic regression on features, with penalty and calibration as a guard's are chosen.

    Attributes:
        values: features of every case.
        labels: which cases are unsafe.
    """

    values: Float32[np.ndarray, "case feature"]
    labels: Bool[np.ndarray, " case"]

    def fit(self, rows: Rows, seed: int) -> Score:
        """Fit on these cases."""
        rows = rows[np.isfinite(self.values[rows]).all(axis=1)]
        classifier = fit_on_features(self.values[rows], self.labels[rows], penalties=PENALTIES, seed=seed).classifier

        def score(others: Rows) -> np.ndarray:
            features = torch.from_numpy(np.ascontiguousarray(self.values[others]))
            return classifier.calibration(classifier.scores(features)).numpy()

        return score


@dataclasses.dataclass(frozen=True, eq=False)
class Layered:
    """Of several layers the one that does best on the validation split, then logistic regression on it.

    Attributes:
        values: the residual stream at the last token, after every layer.
        labels: which cases are unsafe.
    """

    values: Float32[np.ndarray, "case layer hidden"]
    labels: Bool[np.ndarray, " case"]

    def fit(self, rows: Rows, seed: int) -> Score:
        """Fit on these cases."""
        split = stratified_split(self.labels[rows], seed=seed)
        train, held = rows[split.train], rows[split.validation]

        def quality(layer: int) -> float:
            fitted = regression(self.values[train, layer], self.labels[train], PENALTIES[1])
            scores = fitted.scores(torch.from_numpy(np.ascontiguousarray(self.values[held, layer]))).numpy()
            return auroc(scores, self.labels[held]).value or 0.0

        layer = max(range(self.values.shape[1]), key=quality)
        return Linear(np.ascontiguousarray(self.values[:, layer]), self.labels).fit(rows, seed)


@dataclasses.dataclass(frozen=True, eq=False)
class Projection:
    """Projection on the difference of the mean residual streams of unsafe and safe requests, of the layer that validates best.

    Attributes:
        values: the residual stream at the last token, after every layer.
        labels: which cases are unsafe.

    Source: Arditi et al., NeurIPS 2024 (arXiv 2406.11717), section 2.3 (difference in means at the last token).
    Differs: the layer is chosen by how well it tells requests apart, not by what ablating it does; calibrated.
    """

    values: Float32[np.ndarray, "case layer hidden"]
    labels: Bool[np.ndarray, " case"]

    def fit(self, rows: Rows, seed: int) -> Score:
        """Fit on these cases."""
        split = stratified_split(self.labels[rows], seed=seed)
        train, held, calibration = (rows[part] for part in (split.train, split.validation, split.calibration))
        unsafe = self.labels[train]
        directions = self.values[train[unsafe]].mean(0, dtype=np.float64) - self.values[train[~unsafe]].mean(0, dtype=np.float64)

        def scores(layer: int, others: Rows) -> np.ndarray:
            return self.values[others, layer].astype(np.float64) @ directions[layer]

        areas = [auroc(scores(layer, held), self.labels[held]).value or 0.0 for layer in range(len(directions))]
        layer = int(np.argmax(areas))
        calibrate = calibrated(scores(layer, calibration), self.labels[calibration], seed)
        return lambda others: calibrate(scores(layer, others))


@dataclasses.dataclass(frozen=True, eq=False)
class Words:
    """TF-IDF of word (1 and 2) or character (2 to 5) n-grams and logistic regression: what the wording alone gives away.

    Attributes:
        texts: of every case.
        labels: which cases are unsafe.
        analyzer: `word` or `char_wb`.
    """

    texts: Sequence[str]
    labels: Bool[np.ndarray, " case"]
    analyzer: str = "word"

    def fit(self, rows: Rows, seed: int) -> Score:
        """Fit on these cases."""
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.linear_model import LogisticRegression

        split = stratified_split(self.labels[rows], seed=seed)
        train, held, calibration = (rows[part] for part in (split.train, split.validation, split.calibration))
        options: dict[str, Any] = (
            {"token_pattern": r"(?u)\w+", "ngram_range": (1, 2)} if self.analyzer == "word" else {"ngram_range": (2, 5)}
        )

        def fitted(among: Rows, penalty: float) -> Score:
            counted = TfidfVectorizer(analyzer=self.analyzer, sublinear_tf=True, **options)
            model = LogisticRegression(C=penalty, class_weight="balanced", max_iter=1000)
            model.fit(counted.fit_transform(self._of(among)), self.labels[among])
            return lambda others: model.decision_function(counted.transform(self._of(others)))

        def quality(penalty: float) -> float:
            return auroc(fitted(train, penalty)(held), self.labels[held]).value or 0.0

        plain = fitted(np.concatenate([train, held]), max(WORD_PENALTIES, key=quality))
        calibrate = calibrated(plain(calibration), self.labels[calibration], seed)
        return lambda others: calibrate(plain(others))

    def _of(self, rows: Rows) -> list[str]:
        return [self.texts[row] for row in rows]


def calibrated(
    scores: Float64[np.ndarray, " row"], unsafe: Bool[np.ndarray, " row"], seed: int
) -> Callable[[Float64[np.ndarray, " row"]], Float64[np.ndarray, " row"]]:
    """Turns scores into calibrated log odds, by temperature or isotonic regression as a guard's are."""
    calibration: Calibration = fit_calibration(scores, unsafe, "auto", seed)[0]
    return lambda others: calibration(torch.from_numpy(others)).numpy()


# Reading


@dataclasses.dataclass(frozen=True, eq=False)
class Read:
    """What was read of the model on every case.

    Attributes:
        sets: activations by name of a neuron set.
        residual: at the last token after every layer; None where it was not asked for.
        truncated: cases that were longer than the context.
        lengths: tokens of each.
        notes: what had to be said.
    """

    sets: Mapping[str, Float32[np.ndarray, "case neuron"]]
    residual: Float32[np.ndarray, "case layer hidden"] | None
    truncated: Bool[np.ndarray, " case"]
    lengths: Int[np.ndarray, " case"]
    notes: tuple[str, ...]


def read_cases(
    model: LanguageModel,
    prompts: Prompts,
    sets: Mapping[str, NeuronSet],
    pooling: Pooling,
    *,
    residual: bool = True,
    batch_size: BatchSize = "auto",
) -> Read:
    """Activations of several neuron sets, and the residual stream at the last token, in two passes over the prompts."""
    encoded = model.encode(prompts)
    union = functools.reduce(lambda one, other: one | other, sets.values())
    found = read_poolings(model, encoded, union, [pooling], batch_size=batch_size)[pooling]
    place = {member: column for column, member in enumerate(union)}
    values = {name: np.ascontiguousarray(found.values[:, [place[member] for member in members]]) for name, members in sets.items()}
    stream = read_residual(model, [item.ids for item in encoded], batch_size) if residual else None
    return Read(values, stream, found.truncated, found.lengths, found.notes)


def read_residual(
    model: LanguageModel, sequences: Sequence[Sequence[int]], batch_size: BatchSize = "auto"
) -> Float[np.ndarray, "case layer hidden"]:
    """The residual stream at the last token after every layer, in float32."""
    layers = model.anatomy.layers
    seen: dict[int, torch.Tensor] = {}
    found = np.empty((len(sequences), len(layers), int(model.config.hidden_size)), np.float32)

    def keep(number: int) -> Callable[[Any], None]:
        def after(output: Any) -> None:
            seen[number] = output[0] if isinstance(output, tuple) else output

        return after

    def take(batch: Batch) -> None:
        last = torch.tensor(batch.lengths) - 1
        for number, values in seen.items():
            found[batch.indices, number] = values[torch.arange(len(last)), last.to(values.device)].float().cpu().numpy()
        seen.clear()

    with around(after={layer.module: keep(number) for number, layer in enumerate(layers)}):
        run_batches(model, sequences, take, batch_size)
    return found


def baselines(read: Read, texts: Sequence[str], labels: Bool[np.ndarray, " case"], own: str = GUARD) -> dict[str, Baseline]:
    """Every classifier by name: the guard's neurons first, random sets as `random neurons 0`, `random neurons 1`, and so on."""
    found: dict[str, Baseline] = {own: Linear(read.sets[GUARD], labels)}
    found |= {name: Linear(values, labels) for name, values in read.sets.items() if name != GUARD}
    found |= {WORDS: Words(texts, labels), CHARACTERS: Words(texts, labels, "char_wb")}
    if read.residual is not None:
        found |= {RESIDUAL: Layered(read.residual, labels), DIRECTION: Projection(read.residual, labels)}
    return found
