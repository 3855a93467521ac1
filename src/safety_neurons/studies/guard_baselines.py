"""Classifiers that can embarrass a guard, fit by one procedure (words, sentence vectors, random neurons,
residual stream, sparse probes of all layers), and how many neurons it needs.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float32, Float64, Int

from safety_neurons.detectors.probe import l1_penalty
from safety_neurons.errors import UsageError
from safety_neurons.guard import Calibration, Pooling, fit_on_features, read_poolings, stratified_split
from safety_neurons.guard.calibration import fit_calibration
from safety_neurons.guard.fit import regression
from safety_neurons.model import BatchSize, LanguageModel
from safety_neurons.model.loading import load_as
from safety_neurons.model.passes import residual_stream
from safety_neurons.neurons import NeuronSet, Scores
from safety_neurons.neurons.sets import extra_of
from safety_neurons.prompt_lists import Prompts
from safety_neurons.results import AreaPart, auroc, holm_in, mean_area_difference
from safety_neurons.results.records import GuardCountRecord, GuardSettingRecord
from safety_neurons.studies.guard_data import AS_WRITTEN, Cases, Sources, cases_of, texts_of

GUARD, WORDS, CHARACTERS, RANDOM = "guard", "TF-IDF words", "TF-IDF characters", "random neurons"
RESIDUAL, DIRECTION, SPARSE = "residual stream", "refusal direction", "sparse probes of all layers"
SENTENCES = "sentence encoder"
PENALTIES = (1e-3, 1e-2, 1e-1)
"""Inverse strengths of the L2 penalty that validation chooses from, the same for all features that are
numbers.
"""
WORD_PENALTIES = (1.0, 10.0, 100.0)
SPARSE_PENALTY, MOST_SPARSE = 0.1, 64
"""Inverse strength of the L1 penalty of a layer's probe, and features of a layer that are kept at most."""

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
        classifier = fit_on_features(
            self.values[rows], self.labels[rows], penalties=PENALTIES, seed=seed
        ).classifier

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
class SparseLayers:
    """Of every layer the few features that an L1 probe keeps, weighted by how well the layer's probe
    validates, and logistic regression on all of them together.

    Attributes:
        values: the residual stream at the last token, after every layer.
        labels: which cases are unsafe.

    Source: SIREN (`llm-siren` 0.2.0): sparse linear probes of every layer, layers weighted by their
    validation, one classifier on what is left. Differs: read at the last token; logistic regression,
    calibrated, in the place of a network; at most 64 features a layer.
    """

    values: Float32[np.ndarray, "case layer hidden"]
    labels: Bool[np.ndarray, " case"]

    def fit(self, rows: Rows, seed: int) -> Score:
        """Fit on these cases."""
        from sklearn.linear_model import LogisticRegression

        split = stratified_split(self.labels[rows], seed=seed)
        train, held = rows[split.train], rows[split.validation]
        parts = []
        for layer in range(self.values.shape[1]):
            wide = self.values[:, layer].astype(np.float64)
            mean, scale = wide[train].mean(0), wide[train].std(0)
            wide = (wide - mean) / np.where(scale > 1e-6 * np.abs(wide[train]).max(0), scale, np.inf)
            probe: Any = LogisticRegression(
                solver="liblinear",
                C=SPARSE_PENALTY,
                class_weight="balanced",
                random_state=seed,
                **l1_penalty(),
            )
            weights = probe.fit(wide[train], self.labels[train]).coef_[0]
            area = auroc(wide[held] @ weights, self.labels[held]).value or 0.0
            kept = [place for place in np.argsort(-np.abs(weights))[:MOST_SPARSE] if weights[place]]
            if kept and area > 0.5:
                parts.append((2 * area - 1) * wide[:, kept])
        if not parts:  # no layer tells the validation split apart: all of the last one is as good as any
            return Linear(np.ascontiguousarray(self.values[:, -1]), self.labels).fit(rows, seed)
        return Linear(np.concatenate(parts, 1).astype(np.float32), self.labels).fit(rows, seed)


@dataclasses.dataclass(frozen=True, eq=False)
class DirectionProjection:
    """Projection on the difference of the mean residual streams of unsafe and safe requests, of the layer
    that validates best.

    Attributes:
        values: the residual stream at the last token, after every layer.
        labels: which cases are unsafe.

    Source: Arditi et al., NeurIPS 2024 (arXiv 2406.11717), section 2.3 (difference in means at the last
    token). Differs: the layer is chosen by how well it tells requests apart, not by what ablating it does;
    calibrated.
    """

    values: Float32[np.ndarray, "case layer hidden"]
    labels: Bool[np.ndarray, " case"]

    def fit(self, rows: Rows, seed: int) -> Score:
        """Fit on these cases."""
        split = stratified_split(self.labels[rows], seed=seed)
        train, held, calibration = (rows[part] for part in (split.train, split.validation, split.calibration))
        unsafe = self.labels[train]
        directions = self.values[train[unsafe]].mean(0, dtype=np.float64) - self.values[train[~unsafe]].mean(
            0, dtype=np.float64
        )

        def scores(layer: int, others: Rows) -> np.ndarray:
            return self.values[others, layer].astype(np.float64) @ directions[layer]

        areas = [
            auroc(scores(layer, held), self.labels[held]).value or 0.0 for layer in range(len(directions))
        ]
        layer = int(np.argmax(areas))
        calibrate = calibrated(scores(layer, calibration), self.labels[calibration], seed)
        return lambda others: calibrate(scores(layer, others))


@dataclasses.dataclass(frozen=True, eq=False)
class Words:
    """TF-IDF of word (1 and 2) or character (2 to 5) n-grams and logistic regression: what the wording alone
    gives away.

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
            {"token_pattern": r"(?u)\w+", "ngram_range": (1, 2)}
            if self.analyzer == "word"
            else {"ngram_range": (2, 5)}
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
        own: activations of the guard's neurons, as it reads them.
        sets: activations by name of a neuron set, at the last token where the guard asks for tokens that
            agree (with its own classifier).
        residual: at the last token after every layer; None where it was not asked for.
        truncated: cases that were longer than the context.
        lengths: tokens of each.
        notes: warnings.
    """

    own: Float32[np.ndarray, "case own"]
    sets: Mapping[str, Float32[np.ndarray, "case _"]]
    residual: Float32[np.ndarray, "case layer hidden"] | None
    truncated: Bool[np.ndarray, " case"]
    lengths: Int[np.ndarray, " case"]
    notes: tuple[str, ...]
    sentences: Float32[np.ndarray, "case vector"] | None = None


def read_cases(
    model: LanguageModel,
    prompts: Prompts,
    sets: Mapping[str, NeuronSet],
    pooling: Pooling,
    *,
    direction: torch.Tensor | None = None,
    residual: bool = True,
    encoder: str | None = None,
    batch_size: BatchSize = "auto",
) -> Read:
    """Activations of several neuron sets, and the residual stream at the last token, in one pass over the
    prompts (two where several tokens have to agree); of a sentence encoder's folder the vectors of their
    words.

    `direction`: of the guard's classifier, where its tokens have to agree.
    """
    words = None if encoder is None else sentence_vectors(encoder, texts_of(prompts))
    encoded = model.encode(prompts)
    union = functools.reduce(lambda one, other: one | other, sets.values())
    shared = Pooling("last") if pooling.agree else pooling
    with contextlib.ExitStack() as stack:
        stream, also = None, None
        if residual:
            stream, also = stack.enter_context(residual_stream(model, len(encoded)))
        found = read_poolings(model, encoded, union, [shared], batch_size=batch_size, also=also)[shared]
    place = {member: column for column, member in enumerate(union)}
    values = {
        name: np.ascontiguousarray(found.values[:, [place[member] for member in members]])
        for name, members in sets.items()
    }
    own = values[GUARD]
    if pooling.agree:
        own = read_poolings(
            model, encoded, sets[GUARD], [pooling], direction=direction, batch_size=batch_size
        )[pooling].values
    notes = [*found.notes]
    if encoder is None:
        notes.append("no sentence encoder was given (--encoder FOLDER), so that baseline is missing")
    return Read(own, values, stream, found.truncated, found.lengths, tuple(notes), words)


def sentence_vectors(
    folder: str, texts: Sequence[str], batch: int = 32
) -> Float32[np.ndarray, "case vector"]:
    """Vectors of texts by a sentence encoder: the mean of its last hidden states over their tokens, of
    length 1.

    Args:
        folder: of a checkpoint that transformers' `AutoModel` reads, with its tokenizer.
        texts: cut where they are longer than the encoder reads.
        batch: texts a pass.

    Raises:
        ModelError: it cannot be loaded.

    Source: Reimers and Gurevych, EMNLP 2019, section 3 (mean pooling).
    """
    encoder, tokenizer, _ = load_as("AutoModel", folder, offline=True)
    longest = min(int(getattr(encoder.config, "max_position_embeddings", 512)), 512)
    found = []
    with torch.no_grad():
        for start in range(0, len(texts), batch):
            given = tokenizer(
                list(texts[start : start + batch]),
                padding=True,
                truncation=True,
                max_length=longest,
                return_tensors="pt",
            )
            states = encoder(**given).last_hidden_state.float()
            mask = given["attention_mask"][:, :, None]
            means = (states * mask).sum(1) / mask.sum(1).clamp(min=1)
            found.append(torch.nn.functional.normalize(means, dim=-1))
    return torch.cat(found).cpu().numpy()


def baselines(
    read: Read, texts: Sequence[str], labels: Bool[np.ndarray, " case"], own: str = GUARD
) -> dict[str, Baseline]:
    """Every classifier by name: the guard's neurons first, random sets as `random neurons 0`, `random neurons
    1`, and so on.
    """
    found: dict[str, Baseline] = {own: Linear(read.sets[GUARD], labels)}
    found |= {name: Linear(values, labels) for name, values in read.sets.items() if name != GUARD}
    found |= {WORDS: Words(texts, labels), CHARACTERS: Words(texts, labels, "char_wb")}
    if read.residual is not None:
        found |= {
            RESIDUAL: Layered(read.residual, labels),
            DIRECTION: DirectionProjection(read.residual, labels),
            SPARSE: SparseLayers(read.residual, labels),
        }
    if read.sentences is not None:
        found[SENTENCES] = Linear(read.sentences, labels)
    return found


COUNTS = (10, 30, 100, 300, 1000)
PENALTY = 0.03
"""Inverse strength of the L2 penalty, the same for all."""
AS_FIT, LOOK_ALIKES, UNDER_ATTACK = "held out", "look-alikes", "under attack"
Progress = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class CountTests:
    """Which counts of neurons are tried, and what each is held against."""

    counts: Sequence[int] = COUNTS
    """Neurons of a set."""
    leave_out: Sequence[str] = ()
    """Columns, such as `language`, of which every value is left out of fitting once."""
    attacks: Sequence[str] = ()
    """Wrappers by name."""
    random: int = 3
    """Random sets beside each set."""
    fit_limit: int = 3000
    """Requests that a classifier is fit on at most."""
    seed: int = 0
    """Of random sets and draws."""


@dataclasses.dataclass(frozen=True)
class CountSetting:
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
    batch_size: BatchSize = "auto",
    progress: Progress | None = None,
    **tests: Any,
) -> list[GuardCountRecord]:
    """Areas under the ROC curve of classifiers on the highest-scored neurons, each beside random sets with as
    many in every matrix.

    Logistic regression on standardised activations at the last token, one penalty for all. Settings: held-out
    requests; look-alikes alone (where records have a `kind` of that name); the requests under attacks; for
    every column the mean over its values, each left out of fitting once.

    Args:
        model: whose activations are read.
        scores: of the detectors, by name.
        unsafe: requests to test on.
        safe: likewise.
        fit_unsafe: requests to fit on.
        fit_safe: likewise.
        batch_size: prompts a pass.
        progress: told the name of every step.
        **tests: the fields of `CountTests`.

    Returns:
        One row a detector, count and setting: `{method, count, setting, auroc, random, difference}`; `random`
        has every set's area, `difference` is paired with their mean.

    Raises:
        UsageError: no scores, or fewer than two random sets.
    """
    asked = CountTests(**tests)
    if not scores or asked.random < 2:
        raise UsageError(
            f"{len(scores)} score files and {asked.random} random sets; expected at least one and two"
        )
    tested = cases_of(unsafe, safe, variants=asked.attacks, seed=asked.seed, limit=500)
    fit = cases_of(fit_unsafe, fit_safe)
    cases = Cases(
        (*tested.items, *(dataclasses.replace(case, variant="fit", origin=-1) for case in fit.items))
    )
    everything = NeuronSet(
        {key: np.arange(len(values)) for one in scores.values() for key, values in one.items()}, model.table
    )
    if progress is not None:
        progress(f"read {len(everything):,} neurons on {len(cases):,} requests")
    last = Pooling("last")
    values = read_poolings(model, model.encode(cases.prompts), everything, [last], batch_size=batch_size)[
        last
    ].values
    areas = _SetAreas(values, everything, cases)
    settings = _settings(cases, asked)
    rows: list[GuardCountRecord] = []
    for name, one in scores.items():
        for count in sorted(
            {min(count, sum(len(part) for _, part in one.items())) for count in asked.counts}
        ):
            if progress is not None:
                progress(f"{count:,} neurons by {name}")
            members = one.count(count)
            sets = [members, *members.random_like(asked.seed, table=model.table, n=asked.random)]
            rows += [{"method": name, "count": count, **areas.row(setting, sets)} for setting in settings]
            areas.forget()
    return list(holm_in(rows))


def _settings(cases: Cases, asked: CountTests) -> list[CountSetting]:
    fit, written, unsafe = cases.where("fit"), cases.where(AS_WRITTEN), cases.unsafe
    draw = np.random.default_rng(asked.seed)

    def some(rows: Rows) -> Rows:
        return (
            np.sort(draw.choice(rows, asked.fit_limit, replace=False))
            if len(rows) > asked.fit_limit
            else rows
        )

    whole = some(fit)
    found = [CountSetting(AS_FIT, ((whole, written),))]
    look_alikes = cases.having("kind", "look_alike")[written]
    if look_alikes.any():
        found.append(CountSetting(LOOK_ALIKES, ((whole, written[look_alikes | unsafe[written]]),)))
    for column in asked.leave_out:
        parts = []
        for value in cases.values(column):
            having = cases.having(column, value)
            train, test = fit[~having[fit]], written[having[written]]
            if min(_fewest(unsafe[train]), _fewest(unsafe[test])) >= 10:
                parts.append((some(train), test))
        if not parts:
            raise UsageError(
                f"column {column!r}: no value that both kinds of requests have; expected a column such "
                "as language"
            )
        found.append(CountSetting(f"{column} left out", tuple(parts)))
    if asked.attacks:
        found.append(CountSetting(UNDER_ATTACK, tuple((whole, cases.where(name)) for name in asked.attacks)))
    return found


def _fewest(labels: Bool[np.ndarray, " row"]) -> int:
    return int(min(labels.sum(), (~labels).sum()))


class _SetAreas:
    """Fits a set of neurons on some cases, scores others, and remembers what it did."""

    def __init__(self, values: Float32[np.ndarray, "case neuron"], neurons: NeuronSet, cases: Cases) -> None:
        self.values, self.unsafe, self.groups = values, cases.unsafe, cases.groups
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

    def row(self, setting: CountSetting, sets: Sequence[NeuronSet]) -> GuardSettingRecord:
        """Areas of a set and of random ones, and their paired difference, averaged over the parts of the
        setting.
        """
        parts, areas = [], []
        for fit, test in setting.parts:
            labels = self.unsafe[test]
            found = [self.scores(members, fit, test) for members in sets]
            areas.append([auroc(scores, labels).value or 0.0 for scores in found])
            parts.append(AreaPart(found[0], found[1:], labels, self.groups(test)))
        means = np.mean(areas, axis=0)
        difference = mean_area_difference(parts, random=True, extra=extra_of(sets[1:])).to_json()
        return {
            "setting": setting.name,
            "auroc": float(means[0]),
            "random": [float(area) for area in means[1:]],
            "difference": difference,
        }
