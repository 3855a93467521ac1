"""Tests of what scores are worth: against counting by hand, scikit-learn, resampling, and coverage on drawn data."""

import numpy as np
import pytest
from scipy.stats import norm
from sklearn import metrics

from safety_neurons.errors import InputError
from safety_neurons.guard import expected_calibration_error
from safety_neurons.results import AreaPart, area_difference, auroc, mean_area_difference
from safety_neurons.studies import guard_evaluation as statistics


@pytest.fixture(scope="module", params=[0, 1])
def scored(request):
    number = np.random.default_rng(request.param)
    unsafe = number.random(600) < 0.4
    scores = number.normal(size=600) + 1.2 * unsafe
    return (np.round(scores, 1) if request.param else scores), unsafe  # the second has many ties


def test_curves_and_average_precision_are_those_of_scikit_learn(scored):
    scores, unsafe = scored
    false, true, _ = metrics.roc_curve(unsafe, scores, drop_intermediate=False)
    assert np.allclose(statistics.roc_curve(scores, unsafe, points=10**6), np.stack([false, true], 1), atol=1e-6)
    precision, recall, _ = metrics.precision_recall_curve(unsafe, scores)
    ours = np.array(statistics.precision_recall_curve(scores, unsafe, points=10**6))
    theirs = np.stack([recall, precision], 1)[:-1][::-1]
    assert np.allclose(ours[: len(theirs)], theirs[: len(ours)], atol=1e-6)
    found = statistics.average_precision(scores, unsafe)
    assert found.value == pytest.approx(metrics.average_precision_score(unsafe, scores), abs=1e-12)
    assert found.low < found.value < found.high


def test_a_thinned_curve_keeps_its_ends_and_its_area(scored):
    scores, unsafe = scored
    thin = np.array(statistics.roc_curve(scores, unsafe, points=50))
    assert len(thin) <= 52
    assert tuple(thin[0]) == (0, 0)
    assert tuple(thin[-1]) == (1, 1)
    assert metrics.auc(*thin.T) == pytest.approx(auroc(scores, unsafe).value, abs=0.01)


@pytest.mark.parametrize("fpr", [0.05, 0.01, 0.5])
def test_the_rate_at_a_false_positive_rate_is_the_best_that_any_threshold_gives(scored, fpr):
    scores, unsafe = scored
    allowed = [(scores[unsafe] >= cut).mean() for cut in np.append(np.unique(scores), np.inf) if (scores[~unsafe] >= cut).mean() <= fpr]
    assert statistics.tpr_at_fpr(scores, unsafe, fpr).value == pytest.approx(max(allowed))


def test_its_interval_is_that_of_plain_resampling(scored):
    scores, unsafe = scored
    number, draws = np.random.default_rng(5), []
    for _ in range(1500):
        ours, safe = (number.choice(part, len(part)) for part in (scores[unsafe], scores[~unsafe]))
        draws.append((ours > np.sort(safe)[::-1][int(0.05 * len(safe))]).mean())
    found = statistics.tpr_at_fpr(scores, unsafe, 0.05)
    assert np.allclose([found.low, found.high], np.quantile(draws, (0.025, 0.975)), atol=0.03)


def test_perfect_scores_leave_doubt():
    unsafe = np.arange(200) < 50
    found = statistics.tpr_at_fpr(unsafe.astype(float), unsafe, 0.01)
    assert found.value == found.high == 1
    assert 0.9 < found.low < 1


def test_reliability_sums_to_the_error_of_the_guards_own_measure(scored):
    scores, unsafe = scored
    probabilities = 1 / (1 + np.exp(-scores))
    bins = statistics.reliability(probabilities, unsafe)
    assert sum(row["n"] for row in bins) == 600
    assert statistics.calibration_error(bins) == pytest.approx(expected_calibration_error(probabilities, unsafe))
    sure = statistics.reliability(unsafe.astype(float), unsafe)
    assert statistics.calibration_error(sure) == 0


def test_the_paired_difference_covers_the_true_one_and_is_narrower_than_an_unpaired_one():
    number, hits, widths = np.random.default_rng(3), 0, []
    for _ in range(200):
        unsafe = np.arange(160) < 60
        common = number.normal(size=160) + 1.5 * unsafe
        first, second = common + 0.4 * number.normal(size=160), common + 0.4 * number.normal(size=160)
        found = area_difference(AreaPart(first, [second], unsafe))
        hits += found.low <= 0 <= found.high
        widths.append(found.high - found.low)
    assert 0.89 <= hits / 200 <= 0.99
    apart = auroc(first, unsafe)
    assert np.mean(widths) < apart.high - apart.low


def test_the_difference_from_several_is_from_their_mean_and_doubts_more_where_they_scatter():
    number = np.random.default_rng(4)
    unsafe = np.arange(300) < 120
    first = number.normal(size=300) + 2 * unsafe
    near = [number.normal(size=300) + unsafe for _ in range(3)]
    far = [number.normal(size=300) + shift * unsafe for shift in (0, 1, 2)]
    found = area_difference(AreaPart(first, near, unsafe), random=True)
    areas = [metrics.roc_auc_score(unsafe, scores) for scores in near]
    assert found.value == pytest.approx(metrics.roc_auc_score(unsafe, first) - np.mean(areas), abs=1e-12)
    scattered = area_difference(AreaPart(first, far, unsafe), random=True)
    assert scattered.high - scattered.low > found.high - found.low
    with pytest.raises(InputError, match="nothing|no other scores"):
        area_difference(AreaPart(first, [], unsafe))


@pytest.mark.parametrize("sets", [2, 3, 5])
def test_one_more_random_classifier_is_rarely_clear(sets):
    """With a normal quantile .16 of them were."""
    number, false, draws = np.random.default_rng(sets), 0, 200
    unsafe = np.arange(120) < 60
    for _ in range(draws):
        scores = [number.normal(size=120) + (1 + 0.5 * number.normal()) * unsafe for _ in range(sets + 1)]
        found = area_difference(AreaPart(scores[0], scores[1:], unsafe), random=True)
        false += found.clear
        assert (found.why is None) == (sets >= 3)
    assert false / draws <= 0.07 + 4 * (0.07 * 0.93 / draws) ** 0.5
    assert sets > 2 or not false


def test_no_interval_of_a_guard_is_without_width():
    unsafe = np.arange(80) < 40
    perfect = unsafe.astype(float)
    for found in (
        statistics.average_precision(perfect, unsafe),
        statistics.tpr_at_fpr(perfect, unsafe, 0.05),
        statistics.tpr_at_fpr(perfect, unsafe, 1.0),
        area_difference(AreaPart(perfect, [perfect], unsafe)),
        area_difference(AreaPart(perfect, [perfect] * 5, unsafe), random=True),
    ):
        assert found.low <= found.value <= found.high
        assert found.low < found.high


@pytest.mark.parametrize("truth", [0.5, 0.9, 0.99])
def test_areas_of_requests_in_groups_are_covered(truth):
    """Five requests a group that score much alike: DeLong's interval of single requests covers .6 of the time."""
    number, hits, differences, alone, draws = np.random.default_rng(1), 0, 0, 0, 120
    unsafe, groups = np.arange(200) < 100, [f"group {place // 5}" for place in range(200)]
    shift = norm.ppf(truth) * 2**0.5
    for _ in range(draws):
        shared, own = number.normal(size=(2, 40)), number.normal(size=(2, 200))
        first, second = (0.8**0.5 * shared[row].repeat(5) + 0.2**0.5 * own[row] + shift * unsafe for row in (0, 1))
        found = auroc(first, unsafe, groups)
        hits += found.low <= truth <= found.high
        narrow = auroc(first, unsafe)
        alone += narrow.low <= truth <= narrow.high
        difference = area_difference(AreaPart(first, [second], unsafe, groups))
        differences += difference.low <= 0 <= difference.high
    least = 0.93 - 3 * (0.93 * 0.07 / draws) ** 0.5
    assert min(hits, differences) / draws >= least
    assert alone < hits


def test_groups_count_whichever_class_they_are_of_and_alone_change_nothing():
    """A group with requests of both classes is one cluster; without shared groups the interval is the one of single requests."""
    number, unsafe = np.random.default_rng(2), np.arange(60) < 30
    scores = number.normal(size=60) + unsafe
    assert auroc(scores, unsafe, [None] * 60) == auroc(scores, unsafe) == auroc(scores, unsafe, list(map(str, range(60))))
    drift = number.normal(size=30)
    together = auroc(np.tile(drift, 2) + 0.3 * number.normal(size=60) + unsafe, unsafe, [f"{place % 30}" for place in range(60)])
    apart = auroc(np.tile(drift, 2) + 0.3 * number.normal(size=60) + unsafe, unsafe)
    assert together.high - together.low < apart.high - apart.low  # what both classes of a pair share cancels


@pytest.mark.parametrize("groups", [None, ["one"] * 40, ["ours"] * 20 + ["theirs"] * 20, [f"{place // 4}" for place in range(40)]])
@pytest.mark.parametrize("scores", [np.zeros(40), np.arange(40.0), -np.arange(40.0), np.arange(40) % 2 * 1.0, np.repeat([np.inf, 0.0], 20)])
def test_no_area_is_without_width_or_off_its_interval(scores, groups):
    unsafe = np.arange(40) < 20
    found, others = (
        auroc(scores, unsafe, groups),
        (
            area_difference(AreaPart(scores, [scores] * 3, unsafe, groups), random=True),
            statistics.average_precision(scores, unsafe, groups=groups),
            statistics.tpr_at_fpr(scores, unsafe, 0.05, groups=groups),
        ),
    )
    for one in (found, *others):
        assert one.low <= one.value <= one.high
        assert one.low < one.high
    assert not others[0].clear


def test_unscored_requests_are_counted_and_left_out_of_an_area():
    scores, unsafe = np.array([3.0, 2.0, np.nan, 1.0, 0.0]), np.array([True, True, True, False, False])
    found = auroc(scores, unsafe)
    assert (found.value, found.n, found.unscored) == (1.0, 4, 1)
    with pytest.raises(InputError, match="1 groups for 5 outcomes"):
        auroc(scores, unsafe, ["a"])


def test_a_mean_difference_over_parts_is_narrower_than_any_and_right_in_the_middle():
    number = np.random.default_rng(6)
    parts = []
    for _ in range(3):
        unsafe = np.arange(200) < 80
        parts.append((number.normal(size=200) + 2 * unsafe, [number.normal(size=200) + 1.5 * unsafe], unsafe))
    alone = [area_difference(AreaPart(*part)) for part in parts]
    together = mean_area_difference([AreaPart(*part) for part in parts])
    assert together.value == pytest.approx(np.mean([one.value for one in alone]))
    assert together.high - together.low < min(one.high - one.low for one in alone)


def test_one_class_alone_has_no_value():
    scores, unsafe = np.arange(5.0), np.ones(5, bool)
    assert statistics.average_precision(scores, unsafe).value is None
    assert statistics.tpr_at_fpr(scores, unsafe, 0.05).value is None
    assert area_difference(AreaPart(scores, [scores], unsafe)).value is None
