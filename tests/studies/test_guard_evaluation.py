"""Tests of a guard's evaluation: statistics against scikit-learn and by hand, folds that leak nothing, values
left out, what is written.
"""

import dataclasses
import json

import numpy as np
import pytest
import torch
from guard_tools import requests, some_neurons, tiny_model, unreadable
from scipy.stats import norm
from sklearn import metrics

from safety_neurons.errors import InputError, UsageError
from safety_neurons.guard import (
    AnswerTokens,
    expected_calibration_error,
    fit_answers,
    fit_guard,
    read_features,
    score_answers,
)
from safety_neurons.judges.judgement import Judge, harm_verdict
from safety_neurons.prompt_lists import Prompts
from safety_neurons.results import AreaPart, area_difference, auroc, mean_area_difference
from safety_neurons.studies import guard_evaluation
from safety_neurons.studies import guard_evaluation as statistics
from safety_neurons.studies.guard_baselines import neuron_counts
from safety_neurons.studies.guard_data import cases_of
from safety_neurons.studies.guard_evaluation import EVERY, ScoredCases, at, evaluate_guard
from safety_neurons.studies.guard_outputs import (
    GUARDED,
    UNGUARDED,
    cut_of,
    guarded_outputs,
    some,
    stopped_answers,
)


@pytest.fixture(scope="module", params=[0, 1])
def scored(request):
    number = np.random.default_rng(request.param)
    unsafe = number.random(600) < 0.4
    scores = number.normal(size=600) + 1.2 * unsafe
    return (np.round(scores, 1) if request.param else scores), unsafe  # the second has many ties


def test_curves_and_average_precision_are_those_of_scikit_learn(scored):
    scores, unsafe = scored
    false, true, _ = metrics.roc_curve(unsafe, scores, drop_intermediate=False)
    assert np.allclose(
        statistics.roc_curve(scores, unsafe, points=10**6), np.stack([false, true], 1), atol=1e-6
    )
    precision, recall, _ = metrics.precision_recall_curve(unsafe, scores)
    ours = np.array(statistics.precision_recall_curve(scores, unsafe, points=10**6))
    theirs = np.stack([recall, precision], 1)[:-1][::-1]
    assert np.allclose(ours[: len(theirs)], theirs[: len(ours)], atol=1e-6)
    found = statistics.average_precision(scores, unsafe)
    assert found.value == pytest.approx(metrics.average_precision_score(unsafe, scores), abs=1e-12)
    assert found.low < found.value < found.high


def test_macro_f1_is_that_of_scikit_learn_and_its_interval_that_of_groups(scored):
    scores, unsafe = scored
    for cut in (-1.0, 0.0, 0.7, 99.0):
        found = statistics.macro_f1(scores, unsafe, cut)
        theirs = metrics.f1_score(unsafe, scores >= cut, average="macro", zero_division=0)
        assert found.value == pytest.approx(theirs, abs=1e-12)
        assert found.low <= found.value <= found.high
    doubled = [str(number // 2) for number in range(2 * len(scores))]
    twice = statistics.macro_f1(scores.repeat(2), unsafe.repeat(2), groups=doubled)
    once, alone = statistics.macro_f1(scores, unsafe), statistics.macro_f1(scores.repeat(2), unsafe.repeat(2))
    assert twice.value == pytest.approx(once.value)
    assert twice.high - twice.low == pytest.approx(once.high - once.low, rel=0.15)
    assert alone.high - alone.low < 0.85 * (once.high - once.low)  # a copy is no further request


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
    allowed = [
        (scores[unsafe] >= cut).mean()
        for cut in np.append(np.unique(scores), np.inf)
        if (scores[~unsafe] >= cut).mean() <= fpr
    ]
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
    found = statistics.tpr_at_fpr(unsafe.astype(float), unsafe, 0.05)
    assert found.value == found.high == 1
    assert 0.9 < found.low < 1


@pytest.mark.parametrize(
    ("sizes", "draws"), [(np.r_[60, np.full(15, 4)], 150), (np.full(40, 4), 60), (np.ones(100, int), 150)]
)
def test_rates_at_a_false_positive_rate_of_groups_of_any_size_are_covered(sizes, draws):
    """One group that holds most requests: percentiles of resamples covered .84 and held 0.6 of the range."""
    number, hits = np.random.default_rng(8), 0
    truth = norm.sf(norm.isf(0.05) - 1)
    clusters = np.repeat(np.arange(2 * len(sizes)), np.tile(sizes, 2))
    unsafe, groups = clusters < len(sizes), list(map(str, clusters))
    for _ in range(draws):
        shared, own = number.normal(size=2 * len(sizes))[clusters], number.normal(size=len(clusters))
        scores = 0.9**0.5 * shared + 0.1**0.5 * own + unsafe
        found = statistics.tpr_at_fpr(scores, unsafe, 0.05, groups)
        hits += found.low <= truth <= found.high
    assert hits / draws >= 0.93 - 3 * (0.93 * 0.07 / draws) ** 0.5


def test_equal_probabilities_are_of_one_bin_whatever_their_order():
    number = np.random.default_rng(9)
    probabilities, unsafe = np.round(number.random(200), 1), number.random(200) < 0.4
    bins = statistics.reliability(probabilities, unsafe)
    order = np.lexsort((unsafe, probabilities))  # the safe ones first among equals
    assert bins == statistics.reliability(probabilities[order], unsafe[order])
    assert [row["probability"] for row in bins] == pytest.approx(np.unique(probabilities))
    assert statistics.reliability(np.full(200, 0.3), unsafe)[0]["n"] == 200


def test_reliability_sums_to_the_error_of_the_guards_own_measure(scored):
    scores, unsafe = scored
    probabilities = 1 / (1 + np.exp(-scores))
    bins = statistics.reliability(probabilities, unsafe)
    assert sum(row["n"] for row in bins) == 600
    distance = sum(abs(row["probability"] - row["unsafe"]) * row["n"] for row in bins) / 600
    assert distance == pytest.approx(expected_calibration_error(probabilities, unsafe))
    assert expected_calibration_error(unsafe.astype(float), unsafe) == 0


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
    """Five requests a group that score much alike: DeLong's interval of single requests covers .6 of the
    time.
    """
    number, hits, differences, alone, draws = np.random.default_rng(1), 0, 0, 0, 120
    unsafe, groups = np.arange(200) < 100, [f"group {place // 5}" for place in range(200)]
    shift = norm.ppf(truth) * 2**0.5
    for _ in range(draws):
        shared, own = number.normal(size=(2, 40)), number.normal(size=(2, 200))
        first, second = (
            0.8**0.5 * shared[row].repeat(5) + 0.2**0.5 * own[row] + shift * unsafe for row in (0, 1)
        )
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
    """A group with requests of both classes is one cluster.

    Without shared groups the interval is the one of single requests.
    """
    number, unsafe = np.random.default_rng(2), np.arange(60) < 30
    scores = number.normal(size=60) + unsafe
    assert (
        auroc(scores, unsafe, [None] * 60)
        == auroc(scores, unsafe)
        == auroc(scores, unsafe, list(map(str, range(60))))
    )
    drift = number.normal(size=30)
    together = auroc(
        np.tile(drift, 2) + 0.3 * number.normal(size=60) + unsafe,
        unsafe,
        [f"{place % 30}" for place in range(60)],
    )
    apart = auroc(np.tile(drift, 2) + 0.3 * number.normal(size=60) + unsafe, unsafe)
    assert together.high - together.low < apart.high - apart.low  # what both classes of a pair share cancels


@pytest.mark.parametrize(
    "groups", [None, ["one"] * 40, ["ours"] * 20 + ["theirs"] * 20, [f"{place // 4}" for place in range(40)]]
)
@pytest.mark.parametrize(
    "scores",
    [np.zeros(40), np.arange(40.0), -np.arange(40.0), np.arange(40) % 2 * 1.0, np.repeat([np.inf, 0.0], 20)],
)
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
    assert statistics.macro_f1(scores, unsafe).value is None
    assert area_difference(AreaPart(scores, [scores], unsafe)).value is None


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def guard(model):
    unsafe, safe = requests(60, 0)
    return fit_guard(model, some_neurons(model), unsafe, safe, pooling="last", penalties=(0.1,), fpr=0.05)


@pytest.fixture(scope="module")
def found(model, guard):
    test, fit = requests(40, 1), requests(60, 0)
    return evaluate_guard(
        model,
        guard,
        *test,
        fit_unsafe=fit[0],
        fit_safe=fit[1],
        over_refusal=Prompts(requests(12, 5)[1], "lookers"),
        attacks=("later-turn",),
        perturbations=("upper-case",),
        leave_out=("language",),
        random=2,
        variant_limit=10,
    )


def test_the_guards_numbers_are_those_of_its_verdicts(model, guard, found):
    unsafe, safe = requests(40, 1)
    verdicts = guard.score_batch([*unsafe, *safe])
    chances = [verdict.log_odds for verdict in verdicts]
    labels = [True] * 40 + [False] * 40
    result = found.record()
    assert result["auroc"]["value"] == pytest.approx(metrics.roc_auc_score(labels, chances), abs=1e-9)
    assert result["average_precision"]["value"] == pytest.approx(
        metrics.average_precision_score(labels, chances), abs=1e-9
    )
    flagged = [verdict.flagged for verdict in verdicts]
    assert result["flagged_unsafe"]["value"] == pytest.approx(np.mean(flagged[:40]))
    assert result["flagged_safe"]["value"] == pytest.approx(np.mean(flagged[40:]))
    half = [chance >= 0 for chance in chances]  # log odds
    for name, called in (("macro_f1", half), ("macro_f1_in_force", flagged)):
        theirs = metrics.f1_score(labels, called, average="macro", zero_division=0)
        assert result[name]["value"] == pytest.approx(theirs, abs=1e-9)
    json.dumps(result, allow_nan=False)


def test_conversations_are_judged_as_the_guard_judges_them(guard, found):
    cases = [case for case in found.scored.cases.items if case.variant == "later-turn"]
    assert all(case.prompt.messages for case in cases)
    verdicts = guard.score_batch([case.prompt for case in cases])
    flagged = {
        kind: np.mean([one.flagged for one, case in zip(verdicts, cases, strict=True) if case.unsafe == kind])
        for kind in (True, False)
    }
    row = next(row for row in found.result["attacks"] if row["value"] == "later-turn")
    assert (row["flagged_unsafe"]["value"], row["flagged_safe"]["value"]) == pytest.approx(
        (flagged[True], flagged[False])
    )
    area = metrics.roc_auc_score([case.unsafe for case in cases], [one.log_odds for one in verdicts])
    assert row["auroc"]["guard"]["value"] == pytest.approx(area, abs=1e-9)
    assert any("largest of the readings" in note for note in found.notes)


def test_every_baseline_has_a_row_with_its_paired_difference(found):
    rows = {row["name"]: row for row in found.result["baselines"]}
    assert list(rows) == [
        "guard, one reading",
        "random neurons",
        "TF-IDF words",
        "TF-IDF characters",
        "residual stream",
        "refusal direction",
        "sparse probes of all layers",
    ]
    assert any("--encoder" in note for note in found.notes)
    for row in rows.values():
        assert row["difference"]["value"] == pytest.approx(
            found.result["auroc"]["value"] - row["auroc"]["value"], abs=1e-9
        )
        assert row["difference"]["low"] <= row["difference"]["value"] <= row["difference"]["high"]
    assert len(rows["random neurons"]["auroc"]["sets"]) == 2
    assert rows["TF-IDF words"]["auroc"]["value"] < 0.95  # half of the safe requests hold the word


def test_rates_that_too_few_safe_requests_support_are_not_shown(found):
    assert found.result["tpr_at_fpr"]["0.01"]["value"] is None
    assert (
        "40 safe requests; a false-positive rate of 0.01 needs 500"
        in found.result["tpr_at_fpr"]["0.01"]["why"]
    )
    scores, labels = np.arange(1000.0), np.arange(1000) >= 500
    assert at(scores, labels, 0.01)["value"] == 1
    assert at(scores, labels, 0.001)["value"] is None


def test_one_reading_of_a_conversation_is_what_the_guard_says_of_its_whole_alone(model, guard, found):
    cases = [case for case in found.scored.cases.items if case.variant == "later-turn"]
    read = read_features(model, [case.prompt for case in cases], guard.neurons, pooling=guard.pooling)
    values = guard.classifier.scores(torch.from_numpy(read.values))
    area = metrics.roc_auc_score([case.unsafe for case in cases], values.numpy())
    row = next(row for row in found.result["attacks"] if row["value"] == "later-turn")
    assert row["auroc"]["guard, one reading"]["value"] == pytest.approx(area, abs=1e-9)
    written = next(row for row in found.result["attacks"] if row["value"] == "as written")
    assert written["auroc"]["guard, one reading"] == written["auroc"]["guard"]


def test_tables_cut_the_same_requests(found):
    tables = found.result["tables"]
    assert {row["value"] for row in tables["language"]} == {"en", "de"}
    for column in ("language", "kind"):
        assert sum(row["n_unsafe"] for row in tables[column]) == 40
        assert sum(row["n_safe"] for row in tables[column]) == 40
    against = {row["value"]: row["against"] for row in tables["kind"]}
    assert against == {"harmful": "all safe", "look_alike": "all unsafe", "plain": "all unsafe"}
    assert {row["value"]: row["n_safe"] for row in found.result["over_refusal"]} == {"lookers": 12}
    assert [row["value"] for row in found.result["attacks"]] == ["as written", "later-turn"]
    written, upper = found.result["perturbations"]
    assert (upper["n_unsafe"], upper["n_safe"], written["n_unsafe"]) == (10, 10, 40)
    assert sum(row["n_unsafe"] for row in found.result["lengths"]) in (0, 40)


def test_a_slice_of_one_kind_is_ranked_against_all_of_the_other(found):
    scored = found.scored
    rows = [row for row, case in enumerate(scored.cases.items) if case.variant == "as written"]
    kept = [
        row
        for row in rows
        if scored.cases.items[row].unsafe or scored.cases.items[row].prompt.meta["kind"] == "look_alike"
    ]
    labels = [scored.cases.items[row].unsafe for row in kept]
    row = next(row for row in found.result["tables"]["kind"] if row["value"] == "look_alike")
    assert row["auroc"]["guard"]["value"] == pytest.approx(
        metrics.roc_auc_score(labels, scored.scores["guard"][kept])
    )


def test_a_value_left_out_is_tested_by_classifiers_that_never_saw_it(model, guard, monkeypatch):
    seen = []
    original = guard_evaluation.baselines

    def watched(read, texts, labels, own):
        class Watch:
            def fit(self, rows, _seed):
                return lambda others: (
                    seen.append((set(rows.tolist()), set(others.tolist()))),
                    np.zeros(len(others)),
                )[1]

        return {own: Watch(), "random neurons 0": original(read, texts, labels, own)["random neurons 0"]}

    monkeypatch.setattr(guard_evaluation, "baselines", watched)
    test = requests(40, 1)
    evaluation = evaluate_guard(
        model, guard, *test, random=1, leave_out=("language",), perturbations=("typos",)
    )
    items = evaluation.scored.cases.items
    folds, left_out = seen[:3], seen[3:]
    *rows, every = evaluation.result["leave_out"]["language"]
    assert every["value"] == EVERY
    assert every["n_unsafe"] == sum(row["n_unsafe"] for row in rows) == 40
    assert every["auroc"]["guard's neurons"]["value"] == 0.5  # every score was 0
    assert "needs 100" in every["tpr_at_fpr"]["0.05"]["guard's neurons"]["why"]
    tested = [row for _, others in folds for row in others]
    assert sorted(tested) == list(range(len(items)))
    for fit, others in folds:
        assert not {items[row].origin for row in fit} & {items[row].origin for row in others}
    assert len(left_out) == 2
    for fit, others in left_out:
        assert not {items[row].prompt.language for row in fit} & {
            items[row].prompt.language for row in others
        }
    assert evaluation.result["compared"] == "guard's neurons"
    assert any("by 3 folds of the evaluated requests" in note for note in evaluation.notes)


def test_what_was_seen_before_is_counted(model, guard):
    fit = [part[:24] for part in requests(60, 0)]
    evaluation = evaluate_guard(model, guard, *fit, random=1, perturbations=())
    assert any(
        "48 of the 48 evaluated requests are among those the guard was fit on" in note
        for note in evaluation.notes
    )


def test_a_request_that_does_not_fit_the_context_is_flagged_and_out_of_the_areas(model, guard):
    unsafe, safe = requests(24, 1)
    long = Prompts([*safe, dataclasses.replace(safe[0], id="long", text="cake " * 300)], "good")
    evaluation = evaluate_guard(model, guard, unsafe, long, random=1, perturbations=())
    assert evaluation.result["flagged_safe"]["value"] == pytest.approx((guard_flags(guard, safe) + 1) / 25)
    assert evaluation.result["auroc"]["n"] == 48
    assert any("1 of 49 requests were truncated" in note for note in evaluation.notes)


def test_a_request_that_cannot_be_read_is_in_no_rate_and_in_no_area(model, guard):
    unsafe, safe = requests(24, 1)
    lists = []
    for read, count in ((unsafe, 2), (safe, 3)):
        more = [dataclasses.replace(one, id=f"x{one.id}", text=f"explain {one.text}") for one in read[:count]]
        lists.append(Prompts([*read, *more], read.name))
    with unreadable(model, "explain"):
        assert {one.status for one in guard.score_batch(["explain"])} == {"error"}
        evaluation = evaluate_guard(
            model, guard, *lists, random=1, perturbations=(), leave_out=["language"], batch_size=8
        )
    result = evaluation.result
    for kind, read, unread in (("flagged_unsafe", unsafe, 2), ("flagged_safe", safe, 3)):
        flags = [verdict.flagged for verdict in guard.score_batch(list(read))]
        assert result[kind]["value"] == pytest.approx(np.mean(flags))
        assert (result[kind]["n"], result[kind]["unscored"]) == (24, unread)
        left = result["leave_out"]["language"][-1]
        assert (left["value"], left[kind]["n"], left[kind]["unscored"]) == (EVERY, 24, unread)
    whole = [verdict.flagged for verdict in guard.score_batch([*unsafe, *safe])]
    labels = np.arange(48) < 24
    assert result["macro_f1_in_force"]["value"] == pytest.approx(
        metrics.f1_score(labels, whole, average="macro")
    )
    assert result["auroc"]["n"] == 48
    assert any("5 of 53 requests could not be read by the guard" in note for note in evaluation.notes)


def guard_flags(guard, prompts):
    return sum(verdict.flagged for verdict in guard.score_batch(list(prompts)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attacks": ("hypnosis",)}, "'hypnosis' is no attack"),
        ({"random": 0}, "0 random sets"),
        ({"fit_unsafe": Prompts.from_list(["a"])}, "one kind only"),
        ({"leave_out": ("continent",)}, "no request has this field"),
    ],
)
def test_what_cannot_be_measured_is_a_usage_error(model, guard, options, message):
    with pytest.raises(UsageError, match=message):
        evaluate_guard(model, guard, *requests(40, 1), **options)


def test_too_few_requests_to_fit_on_is_an_error(model, guard):
    with pytest.raises(InputError, match="expected 20 of either"):
        evaluate_guard(model, guard, *requests(8, 1), random=1)


def test_several_random_sets_are_one_row_with_their_mean():
    cases = cases_of(*requests(10, 0))
    number = np.random.default_rng(0)
    scores = {
        name: number.normal(size=20) + cases.unsafe
        for name in ("guard", "random neurons 0", "random neurons 1")
    }
    row = ScoredCases(cases, scores, "guard", np.zeros(20)).row("all", np.arange(20))
    each = [metrics.roc_auc_score(cases.unsafe, scores[f"random neurons {place}"]) for place in (0, 1)]
    assert row["auroc"]["random neurons"]["value"] == pytest.approx(np.mean(each))
    assert row["difference"]["random neurons"]["value"] == pytest.approx(
        row["auroc"]["guard"]["value"] - np.mean(each)
    )


def test_counts_have_a_row_for_every_detector_size_and_setting(model):
    from safety_neurons.neurons import Scores

    number = np.random.default_rng(0)
    scores = Scores({f"layers.{layer}.down": number.random(48) for layer in (0, 1)}, model.table)
    rows = neuron_counts(
        model,
        {"dice": scores},
        *requests(30, 1),
        *requests(60, 0),
        counts=(5, 40),
        leave_out=("language",),
        attacks=("reversed",),
        random=2,
    )
    settings = ["held out", "look-alikes", "language left out", "under attack"]
    assert [(row["count"], row["setting"]) for row in rows] == [
        (count, setting) for count in (5, 40) for setting in settings
    ]
    for row in rows:
        assert len(row["random"]) == 2
        assert row["difference"]["value"] == pytest.approx(row["auroc"] - np.mean(row["random"]), abs=1e-9)


def test_answers_are_stopped_as_the_classifier_for_answers_judges_them(model, guard):
    number = np.random.default_rng(0)

    def answers(kind, n, length):
        asked = requests(n, 7)[kind]
        return [
            AnswerTokens(
                one,
                tuple(model.encode(one)[0].ids),
                tuple(number.integers(5 + 9 * kind, 14 + 9 * kind, length).tolist()),
            )
            for one in asked
        ]

    bad, good = answers(0, 40, 8), answers(1, 40, 8)
    able = fit_answers(guard, bad, good, every=2, max_new_tokens=6, pooling="last", fpr=0.1)
    lists = {"a": bad[:30], "b": bad[30:]}, {"a": good[:25], "c": good[25:]}
    found = stopped_answers(able, *lists)
    cut = [dataclasses.replace(one, token_ids=one.token_ids[:6]) for one in (*bad, *good)]
    verdicts = score_answers(able, cut)
    assert found["stopped_unsafe"]["value"] == np.mean([one.flagged for one in verdicts[:40]])
    assert found["stopped_safe"]["value"] == np.mean([one.flagged for one in verdicts[40:]])
    assert found["auroc"]["value"] == pytest.approx(
        metrics.roc_auc_score([1] * 40 + [0] * 40, [one.p_unsafe for one in verdicts])
    )
    assert [row["source"] for row in found["by"]] == ["a", "b", "c"]
    assert found["by"][1]["stopped_safe"]["value"] is None
    assert found["by"][2]["stopped_safe"]["n"] == 15
    known, notes = dict(found), []
    with unreadable(model, "explain"):
        broken = [
            dataclasses.replace(one, question=tuple(model.encode("explain")[0].ids)) for one in good[:3]
        ]
        found = stopped_answers(able, lists[0], {**lists[1], "x": broken}, notes)
    for kind, unread in (("stopped_unsafe", 0), ("stopped_safe", 3)):
        assert found[kind] == {**known[kind], "unscored": unread}
    assert (found["auroc"]["value"], found["by"][-1]["stopped_safe"]["value"]) == (
        known["auroc"]["value"],
        None,
    )
    assert "3 of 83 answers could not be read: they are in no rate" in notes[0]
    with pytest.raises(UsageError, match="no classifier for answers"):
        stopped_answers(guard, *lists)
    with pytest.raises(InputError, match="40 unsafe and 0 safe answers"):
        stopped_answers(able, {"a": bad}, {})


class EvenLengths(Judge):
    """Calls answers with an even number of words harmful: a known verdict on text nobody can foresee."""

    name = "even-lengths"
    measure = "harmful"
    revision = "1"

    def verdicts(self, cases):
        return [harm_verdict(float(len(case.answer.split()) % 2 == 0)) for case in cases]


@pytest.fixture(scope="module")
def written():
    model = tiny_model()
    guard = fit_guard(
        model, some_neurons(model), *requests(60, 0), pooling="last", penalties=(0.1,), fpr=0.05
    )
    unsafe, safe = requests(15, 1)
    guard = guard.with_threshold(
        float(np.median([verdict.p_unsafe for verdict in guard.score_batch([*unsafe, *safe])]))
    )
    return (
        guard,
        unsafe,
        safe,
        guarded_outputs(model, guard, unsafe, safe, by=EvenLengths(), max_new_tokens=5),
    )


def harm_of(completion):
    """The verdict by hand; None where there is nothing to judge.

    A stopped answer does no harm, whatever it would have been.
    """
    words = completion.completion.split()
    return None if not words else len(words) % 2 == 0


def test_rates_are_those_of_counting_verdicts_and_answers(written):
    guard, unsafe, safe, found = written
    flags = [verdict.flagged for verdict in guard.score_batch([*unsafe, *safe])]
    plain = [one for one in found.completions if one.arm == UNGUARDED]
    harmful = [harm_of(one) for one in plain[:15] if harm_of(one) is not None]
    assert found.before.value == pytest.approx(np.mean(harmful))
    after = [
        not flag and bool(harm_of(one))
        for one, flag in zip(plain[:15], flags[:15], strict=True)
        if flag or harm_of(one) is not None
    ]
    assert found.after.value == pytest.approx(np.mean(after))
    assert found.blocked.value == pytest.approx(np.mean(flags[15:]))
    assert 0 < sum(flags) < 30


def test_a_request_that_cannot_be_read_is_neither_blocked_nor_cut(written):
    guard, unsafe, safe, found = written
    more = [
        Prompts([*some, dataclasses.replace(some[0], id=f"x{place}", text="explain")], some.name)
        for place, some in enumerate((unsafe, safe))
    ]
    with unreadable(guard.bound, "explain"):
        again = guarded_outputs(guard.bound, guard, *more, by=EvenLengths(), max_new_tokens=5)
    for name in ("before", "after", "cut", "blocked", "asked", "written"):
        one, other = getattr(found, name), getattr(again, name)
        assert (other.value, other.low, other.n) == (one.value, one.low, one.n), name
    assert again.blocked.unscored == again.after.unscored - found.after.unscored == 1
    assert "2 of 32 requests could not be read" in again.notes[0]
    assert found.notes == ()


def test_answers_that_pass_are_those_without_the_guard(written):
    found = written[3]
    assert found.changed == 0
    arms = {arm: [one for one in found.completions if one.arm == arm] for arm in (UNGUARDED, GUARDED)}
    for was, now in zip(arms[UNGUARDED], arms[GUARDED], strict=True):
        assert now.meta["stopped"] or now.token_ids == was.token_ids
        assert was.prompt_id == now.prompt_id


def test_both_labels_are_ranked_by_the_same_scores(written):
    guard, unsafe, safe, found = written
    chances = np.array([verdict.p_unsafe for verdict in guard.score_batch([*unsafe, *safe])])
    above = [a > b for a in chances[:15] for b in chances[15:]]
    ties = [a == b for a in chances[:15] for b in chances[15:]]
    assert found.asked.value == pytest.approx(np.mean(above) + np.mean(ties) / 2)
    assert found.refused_by_model == sum(harm_of(one) is False for one in found.completions[:15])
    assert found.record()["written"]["n"] <= 30
    assert {row["language"] for row in found.by} <= {"en", "de"}


def test_the_cut_is_a_share_of_what_was_there():
    before, after = np.array([1, 1, 1, 1, 0, np.nan]), np.array([0, 0, 0, 1, 0, np.nan])
    found = cut_of(before, after)
    assert (found.value, found.n, found.unscored) == (0.75, 5, 1)
    assert found.low < 0.75 <= found.high
    assert cut_of(before, np.zeros(6)).value == 1
    assert 0.3 < cut_of(before, np.zeros(6)).low < 1
    assert cut_of(np.zeros(3), np.zeros(3)).value is None


def test_some_prompts_are_drawn_in_order_and_again():
    prompts = requests(10, 0)[0]
    drawn = some(prompts, 4, seed=1)
    places = [list(prompts).index(one) for one in drawn]
    assert len(drawn) == 4
    assert places == sorted(places)
    assert some(prompts, 4, seed=1) == drawn
    assert some(prompts, 10) is prompts


def test_both_kinds_are_needed(written):
    with pytest.raises(InputError, match="15 unsafe and 0 safe"):
        guarded_outputs(written[0].model, written[0], written[1], Prompts([]))
    assert dataclasses.is_dataclass(written[3])
