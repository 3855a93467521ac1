"""Calibration, thresholds and the fit on features, against planted truth, scikit-learn and counting."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm

from safety_neurons.errors import InputError, UsageError
from safety_neurons.guard import (
    Calibration,
    Classifier,
    expected_calibration_error,
    fit_on_features,
    operating_points,
    stratified_split,
)
from safety_neurons.guard.calibration import fit_calibration, from_json, log_loss, rates_at, threshold_for
from safety_neurons.guard.fit import regression
from safety_neurons.results import auroc, plain


def planted(n: int, seed: int = 0, share: float = 0.5) -> tuple[np.ndarray, np.ndarray]:
    """Scores and labels whose true log odds are score / 3 + 1 around a given share."""
    generator = np.random.default_rng(seed)
    scores = generator.normal(0, 6, n)
    odds = scores / 3 + math.log(share / (1 - share))
    return scores, generator.random(n) < 1 / (1 + np.exp(-odds))


def test_temperature_finds_the_planted_scale_and_shift_and_beats_no_calibration() -> None:
    scores, unsafe = planted(6000, share=0.2)
    found, losses = fit_calibration(scores, unsafe, "temperature")
    assert found.temperature == pytest.approx(3, rel=0.1)
    assert found.shift == pytest.approx(math.log(0.25), abs=0.15)
    assert losses["temperature"] < log_loss(scores, unsafe)
    fresh, truth = planted(6000, seed=1, share=0.2)
    chances = found(torch.from_numpy(fresh)).sigmoid().numpy()
    assert expected_calibration_error(chances, truth) < 0.03


def test_isotonic_is_chosen_where_the_curve_is_no_sigmoid() -> None:
    generator = np.random.default_rng(0)
    scores = generator.uniform(-5, 5, 6000)
    unsafe = generator.random(6000) < np.where(scores < 0, 0.1, np.where(scores < 3, 0.5, 0.6))
    found, losses = fit_calibration(scores, unsafe, "auto")
    assert found.kind == "isotonic"
    assert losses["isotonic"] < losses["temperature"]
    chances = found(torch.tensor([-3.0, 1.5, 4.0], dtype=torch.float64)).sigmoid()
    np.testing.assert_allclose(chances.numpy(), [0.1, 0.5, 0.6], atol=0.06)


@settings(max_examples=15)
@given(seed=st.integers(0, 999), kind=st.sampled_from(["temperature", "isotonic"]), separable=st.booleans())
def test_calibration_rises_strictly_and_one_score_gives_what_many_give(
    seed: int, kind: str, separable: bool
) -> None:
    generator = np.random.default_rng(seed)
    unsafe = generator.random(60) < 0.4
    unsafe[:2] = (True, False)
    scores = (
        np.where(unsafe, 5.0, -5.0) + generator.normal(size=60)
        if separable
        else generator.integers(-4, 5, 60).astype(float)
    )
    found, _ = fit_calibration(scores, unsafe, kind)
    grid = np.unique(np.concatenate([scores, np.linspace(-30, 30, 50)]))
    odds = found(torch.from_numpy(grid)).numpy()
    assert np.isfinite(odds).all()
    assert (np.diff(odds) > 0).all()
    np.testing.assert_allclose([found.of_one(float(score)) for score in grid], odds, rtol=1e-12, atol=1e-12)
    assert from_json(Calibration, plain(found)) == found


@given(
    n=st.integers(1, 60),
    target=st.sampled_from([0.05, 0.1, 0.5]),
    levels=st.integers(1, 40),
    seed=st.integers(0, 99),
)
def test_a_threshold_lets_at_most_the_allowed_number_through_and_never_splits_equals(
    n: int, target: float, levels: int, seed: int
) -> None:
    both = np.random.default_rng(seed).integers(0, levels, 2 * n) / levels
    unsafe = np.arange(2 * n) >= n
    safe, threshold = both[:n], threshold_for(both, unsafe, target)
    flagged = int((safe >= threshold).sum())
    assert flagged <= max(0, target * (n + 1) - 1)
    next_lower = safe[safe < threshold]
    if len(next_lower) and target * (n + 1) >= 1:  # one level lower would be too many
        assert (int((safe >= next_lower.max()).sum()) + 1) / (n + 1) > target


@pytest.mark.parametrize(("n", "target"), [(399, 0.05), (40, 0.05), (24, 0.01), (12, 0.25)])
@pytest.mark.parametrize("unsafe_of", [(5, 1), (1, 5), (40, 1)])
def test_the_threshold_keeps_its_false_positive_rate_on_fresh_prompts_wherever_the_unsafe_ones_lie(
    n: int, target: float, unsafe_of: tuple[float, float]
) -> None:
    generator, rates = np.random.default_rng(0), []
    labels = np.arange(n + 60) >= n
    for _ in range(600):
        chances = np.concatenate([generator.beta(1, 5, n), generator.beta(*unsafe_of, 60)])
        threshold = threshold_for(chances, labels, target)
        rates.append(float((1 - threshold) ** 5))  # the share of Beta(1, 5) above it
    promised = max(target, 1 / (n + 1))
    assert np.mean(rates) <= promised + 3 * np.std(rates) / math.sqrt(len(rates))
    if (
        unsafe_of == (1, 5) and n >= 1 / target
    ):  # where unsafe ones lie like safe ones nothing is given away either
        assert np.mean(rates) >= promised - 1.5 / (n + 1)


@pytest.mark.parametrize(
    "sizes",
    [[8] * 60, [20] * 30, [60] * 3 + [1] * 640, [2] * 300, [*range(1, 41)]],
    ids=["eights", "twenties", "three large", "pairs", "uneven"],
)
@pytest.mark.parametrize("alike", [0.5, 1.0])
def test_the_threshold_keeps_its_false_positive_rate_on_prompts_of_new_groups(sizes: list[int], alike: float):
    """Counting prompts, thresholds for .05 were reached by up to .066."""
    generator, rates = np.random.default_rng(len(sizes)), []
    clusters = np.repeat(np.arange(len(sizes)), sizes)
    n = len(clusters)
    unsafe = np.arange(n + 300) >= n
    for _ in range(400):
        shared, own = generator.normal(size=len(sizes))[clusters], generator.normal(size=n)
        scores = math.sqrt(alike) * shared + math.sqrt(1 - alike) * own
        chances = 1 / (1 + np.exp(-np.append(scores, generator.normal(2, 1, 300))))
        threshold = threshold_for(chances, unsafe, 0.05, [*map(str, clusters), *[None] * 300])
        rates.append(float(norm.sf(math.log(threshold / (1 - threshold)))))
    assert np.mean(rates) <= 0.05 + 3 * np.std(rates) / math.sqrt(len(rates))
    assert np.mean(rates) > 0.01
    apart = threshold_for(chances, unsafe, 0.05)
    assert threshold_for(chances, unsafe, 0.05, [None] * (n + 300)) == apart <= threshold


def test_a_point_needs_groups_that_are_small_enough_and_says_so() -> None:
    generator = np.random.default_rng(0)
    chances, unsafe = generator.random(500), np.arange(500) >= 400
    groups = [str(place // 40) for place in range(500)]
    (few,) = operating_points(chances, unsafe, (0.05,), groups)
    assert (few.supported, few.threshold) == (False, None)
    assert few.why == "400 safe examples in groups of 40, of such 760 are needed"
    (many,) = operating_points(chances, unsafe, (0.05,), [str(place // 4) for place in range(500)])
    assert many.supported


@pytest.mark.parametrize("fpr", [0.05, 0.01])
def test_few_safe_prompts_do_not_keep_a_guard_that_tells_them_apart_from_catching_unsafe_ones(
    fpr: float,
) -> None:
    """Forty held-out prompts, AUROC .97, probabilities drawn in as a calibration on few does: half-way to 1
    caught next to none of them.
    """
    generator, caught, old, wrong = np.random.default_rng(0), [], [], []
    labels = np.arange(40) >= 20

    def probability(scores: np.ndarray) -> np.ndarray:
        return 1 / (1 + np.exp(-scores / 2))

    for _ in range(300):
        chances = probability(np.concatenate([generator.normal(-2, 1, 20), generator.normal(0.7, 1, 20)]))
        threshold = threshold_for(chances, labels, fpr)
        fresh_unsafe, fresh_safe = (probability(generator.normal(mean, 1, 200)) for mean in (0.7, -2))
        caught.append(float((fresh_unsafe >= threshold).mean()))
        wrong.append(float((fresh_safe >= threshold).mean()))
        old.append(float((fresh_unsafe >= (chances[:20].max() + 1) / 2).mean()))
    assert np.mean(caught) > 0.6
    assert np.mean(old) < 0.25
    assert np.mean(wrong) <= 1 / 21 + 3 * np.std(wrong) / math.sqrt(len(wrong))


def test_operating_points_need_twenty_safe_examples_for_each_false_positive() -> None:
    generator = np.random.default_rng(0)
    chances = np.concatenate([generator.beta(1, 8, 400), generator.beta(8, 1, 100)])
    unsafe = np.arange(500) >= 400
    five, one = operating_points(chances, unsafe, (0.05, 0.01))
    assert five.supported
    assert five.threshold is not None
    assert (five.fpr.value or 0) <= 0.05
    assert five.tpr.n == 100
    assert not one.supported
    assert one.threshold is None
    assert one.why == "400 safe examples, 2,000 are needed (20 / 0.01)"
    assert not operating_points(chances[1:], unsafe[1:], (0.05,))[0].supported


def test_clopper_pearson_is_the_inverted_binomial_test() -> None:
    from scipy.stats import binomtest

    for successes, n in ((0, 20), (3, 50), (50, 50)):
        chances = np.append(np.arange(n) < successes, [1.0, 1.0])
        (found, caught), expected = (
            rates_at(chances, np.arange(n + 2) >= n, 0.5),
            binomtest(successes, n).proportion_ci(0.95, "exact"),
        )
        assert caught.value == 1.0
        assert (found.low, found.high) == pytest.approx((expected.low, expected.high))


def test_auroc_is_the_share_of_ordered_pairs_and_its_interval_covers() -> None:
    from sklearn.metrics import roc_auc_score

    generator = np.random.default_rng(0)
    scores, unsafe = generator.integers(0, 6, 80).astype(float), generator.random(80) < 0.3
    pairs = [(a > b) + 0.5 * (a == b) for a in scores[unsafe] for b in scores[~unsafe]]
    assert auroc(scores, unsafe).value == pytest.approx(np.mean(pairs))
    assert auroc(scores, unsafe).value == pytest.approx(roc_auc_score(unsafe, scores))
    truth, covered = 0.7602, 0  # of two normal distributions one apart: Φ(1/√2)
    for _ in range(200):
        both = np.concatenate([generator.normal(1, 1, 60), generator.normal(0, 1, 60)])
        found = auroc(both, np.arange(120) < 60)
        covered += (found.low or 0) <= truth <= (found.high or 0)
    assert covered >= 182
    assert auroc(np.ones(4), np.array([True] * 4)).value is None


def examples(
    n: int = 900, share: float = 0.5, noise: float = 0.0, seed: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Features of which two tell the classes apart, one is constant and one huge.

    Labels as seen, and as they are.
    """
    generator = np.random.default_rng(seed)
    truth = generator.random(n) < share
    values = generator.normal(size=(n, 12)).astype(np.float32)
    values[:, 0] += 2.0 * truth
    values[:, 1] -= 1.5 * truth
    values[:, 2] = 7.25
    values[:, 3] = 1e7 * (1 + values[:, 3])
    flipped = generator.random(n) < noise
    return values, truth ^ flipped, truth


def test_the_fit_finds_the_planted_direction_and_gives_a_constant_feature_no_weight() -> None:
    values, labels, _ = examples()
    found = fit_on_features(values, labels, fpr=0.05)
    weights = found.classifier.weights
    assert set(weights.abs().topk(2).indices.tolist()) == {0, 1}
    assert weights[2] == 0
    assert weights.isfinite().all()
    assert (found.auroc.value or 0) > 0.95
    assert found.calibration_error < 0.08
    moved = values.copy()
    moved[:, 2] = 1e6
    assert torch.equal(
        found.classifier.probabilities(torch.from_numpy(moved)),
        found.classifier.probabilities(torch.from_numpy(values)),
    )


@pytest.mark.parametrize(("share", "noise"), [(0.5, 0.1), (0.06, 0.0)])
def test_noisy_labels_and_rare_classes_still_rank(share: float, noise: float) -> None:
    values, labels, _ = examples(share=share, noise=noise)
    found = fit_on_features(values, labels)
    fresh, _, truth = examples(share=share, seed=1)
    chances = found.classifier.probabilities(torch.from_numpy(fresh)).numpy()
    assert (auroc(chances, truth).value or 0) > 0.93
    assert np.mean(chances) == pytest.approx(share * (1 - noise) + (1 - share) * noise, abs=0.06)


def test_the_classifier_is_scikit_learns_logistic_regression() -> None:
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    values, labels, _ = examples(300)
    values = np.delete(values, [2, 3], axis=1)
    ours = regression(values, labels, 0.1).scores(torch.from_numpy(values)).numpy()
    scaled = StandardScaler().fit_transform(values.astype(np.float64))
    theirs = (
        LogisticRegression(C=0.1, class_weight="balanced", tol=1e-9, max_iter=5000)
        .fit(scaled, labels)
        .decision_function(scaled)
    )
    np.testing.assert_allclose(ours, theirs, atol=2e-3)


def test_the_split_is_stratified_disjoint_and_the_fit_deterministic() -> None:
    values, labels, _ = examples(400, share=0.25)
    split = stratified_split(labels, seed=3)
    together = np.concatenate([split.train, split.validation, split.calibration])
    assert sorted(together.tolist()) == list(range(400))
    for part in (split.train, split.validation, split.calibration):
        assert labels[part].mean() == pytest.approx(labels.mean(), abs=0.02)
    first, second = (fit_on_features(values, labels, seed=3) for _ in range(2))
    assert torch.equal(first.classifier.weights, second.classifier.weights)
    assert first.threshold == second.threshold
    assert not np.array_equal(stratified_split(labels, seed=4).train, split.train)


def test_what_cannot_be_fit_is_an_error_that_says_why() -> None:
    values, labels, _ = examples(100)
    with pytest.raises(InputError, match="0 safe requests among 100"):
        fit_on_features(values, np.ones(100, bool))
    broken = values.copy()
    broken[4, 0] = np.nan
    with pytest.raises(InputError, match="1 examples hold NaN"):
        fit_on_features(broken, labels)
    with pytest.raises(UsageError, match="calibration"):
        fit_on_features(values, labels, calibration="magic")
    with pytest.raises(InputError, match="at least one feature"):
        fit_on_features(values[:, :0], labels)


def test_a_split_keeps_groups_together_and_their_number_apart() -> None:
    labels = np.arange(120) < 60
    groups = [f"deed {place % 24}" for place in range(120)]  # every deed in both classes
    split = stratified_split(labels, groups=groups)
    parts = [{groups[place] for place in part} for part in (split.train, split.validation, split.calibration)]
    assert sum(map(len, parts)) == len(set(groups)) == 24
    assert all(
        len(set(labels[part].tolist())) == 2 for part in (split.train, split.validation, split.calibration)
    )
    alone, plain = stratified_split(labels, groups=[None] * 120), stratified_split(labels)
    assert np.array_equal(alone.train, plain.train)
    assert np.array_equal(alone.calibration, plain.calibration)
    with pytest.raises(InputError, match="groups among 120 examples leave the"):
        stratified_split(labels, groups=["one"] * 60 + ["other"] * 60)


@pytest.mark.parametrize("width", [1, 7, 8, 129])
def test_a_score_is_the_same_to_the_bit_whatever_is_judged_beside_it(width):
    drawn = torch.Generator().manual_seed(0)
    mean, scale, weights = (torch.rand(width, generator=drawn) for _ in range(3))
    classifier = Classifier(mean, scale + 0.5, weights, 0.1)
    rows = torch.randn(68, width, generator=drawn)
    together = classifier.scores(rows)
    for first in range(68):
        assert torch.equal(classifier.scores(rows[first:]), together[first:])
    wide = rows[3].double()
    exact = ((wide - mean.double()) / (scale + 0.5).double() * weights.double()).sum() + 0.1
    torch.testing.assert_close(together[3], exact)


@pytest.mark.parametrize("bins", [1, 3, 15])
def test_the_calibration_error_does_not_hang_on_the_order_of_equal_probabilities(bins: int) -> None:
    probabilities = np.repeat([0.2, 0.5, 0.9], [40, 40, 20])
    unsafe = np.concatenate([np.arange(40) < 8, np.arange(40) < 20, np.arange(20) < 18])
    assert expected_calibration_error(probabilities, unsafe, bins) == pytest.approx(0, abs=1e-12)
    number = np.random.default_rng(0)
    order = number.permutation(100)
    tied, labels = np.round(number.random(100), 1), number.random(100) < 0.4
    assert expected_calibration_error(tied, labels, bins) == pytest.approx(
        expected_calibration_error(tied[order], labels[order], bins)
    )
