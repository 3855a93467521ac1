"""Tests of a guard's evaluation: numbers against counting by hand, folds that leak nothing, values left out, what is said of overlap."""

import dataclasses
import json

import numpy as np
import pytest
from guard_tools import requests, some_neurons, tiny_model
from sklearn import metrics

from safety_neurons.errors import InputError, UsageError
from safety_neurons.guard import fit_guard
from safety_neurons.prompts import Prompts
from safety_neurons.studies import guard_evaluation
from safety_neurons.studies.guard_baselines import neuron_counts
from safety_neurons.studies.guard_data import cases_of
from safety_neurons.studies.guard_evaluation import Scored, at, evaluate_guard


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
    assert result["average_precision"]["value"] == pytest.approx(metrics.average_precision_score(labels, chances), abs=1e-9)
    flagged = [verdict.flagged for verdict in verdicts]
    assert result["flagged_unsafe"]["value"] == pytest.approx(np.mean(flagged[:40]))
    assert result["flagged_safe"]["value"] == pytest.approx(np.mean(flagged[40:]))
    json.dumps(result, allow_nan=False)


def test_conversations_are_judged_as_the_guard_judges_them(guard, found):
    cases = [case for case in found.scored.cases.items if case.variant == "later-turn"]
    assert all(case.prompt.messages for case in cases)
    verdicts = guard.score_batch([case.prompt for case in cases])
    flagged = {
        kind: np.mean([one.flagged for one, case in zip(verdicts, cases, strict=True) if case.unsafe == kind]) for kind in (True, False)
    }
    row = next(row for row in found.result["attacks"] if row["value"] == "later-turn")
    assert (row["flagged_unsafe"]["value"], row["flagged_safe"]["value"]) == pytest.approx((flagged[True], flagged[False]))
    area = metrics.roc_auc_score([case.unsafe for case in cases], [one.log_odds for one in verdicts])
    assert row["auroc"]["guard"]["value"] == pytest.approx(area, abs=1e-9)
    assert any("largest of their readings" in note for note in found.notes)


def test_every_baseline_has_a_row_with_its_paired_difference(found):
    rows = {row["name"]: row for row in found.result["baselines"]}
    assert list(rows) == ["random neurons", "TF-IDF words", "TF-IDF characters", "residual stream", "refusal direction"]
    for row in rows.values():
        assert row["difference"]["value"] == pytest.approx(found.result["auroc"]["value"] - row["auroc"]["value"], abs=1e-9)
        assert row["difference"]["low"] <= row["difference"]["value"] <= row["difference"]["high"]
    assert len(rows["random neurons"]["auroc"]["sets"]) == 2
    assert rows["TF-IDF words"]["auroc"]["value"] < 0.95  # half of the safe requests hold the word


def test_rates_that_too_few_safe_requests_support_are_not_shown(found):
    assert found.result["tpr_at_fpr"]["0.01"]["value"] is None
    assert "40 safe requests; a false-positive rate of 0.01 needs 2,000" in found.result["tpr_at_fpr"]["0.01"]["why"]
    scores, labels = np.arange(3000.0), np.arange(3000) >= 2500
    assert at(scores, labels, 0.01, 0)["value"] == 1
    assert at(scores, labels, 0.001, 0)["value"] is None


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
    kept = [row for row in rows if scored.cases.items[row].unsafe or scored.cases.items[row].prompt.meta["kind"] == "look_alike"]
    labels = [scored.cases.items[row].unsafe for row in kept]
    row = next(row for row in found.result["tables"]["kind"] if row["value"] == "look_alike")
    assert row["auroc"]["guard"]["value"] == pytest.approx(metrics.roc_auc_score(labels, scored.scores["guard"][kept]))


def test_a_value_left_out_is_tested_by_classifiers_that_never_saw_it(model, guard, monkeypatch):
    seen = []
    original = guard_evaluation.baselines

    def watched(read, texts, labels, own):
        class Watch:
            def fit(self, rows, _seed):
                return lambda others: (seen.append((set(rows.tolist()), set(others.tolist()))), np.zeros(len(others)))[1]

        return {own: Watch(), "random neurons 0": original(read, texts, labels, own)["random neurons 0"]}

    monkeypatch.setattr(guard_evaluation, "baselines", watched)
    test = requests(40, 1)
    evaluation = evaluate_guard(model, guard, *test, random=1, leave_out=("language",), perturbations=("typos",))
    items = evaluation.scored.cases.items
    folds, left_out = seen[:3], seen[3:]
    tested = [row for _, others in folds for row in others]
    assert sorted(tested) == list(range(len(items)))
    for fit, others in folds:
        assert not {items[row].origin for row in fit} & {items[row].origin for row in others}
    assert len(left_out) == 2
    for fit, others in left_out:
        assert not {items[row].prompt.language for row in fit} & {items[row].prompt.language for row in others}
    assert evaluation.result["compared"] == "guard's neurons"
    assert any("by 3 folds of the evaluated requests" in note for note in evaluation.notes)


def test_what_was_seen_before_is_counted(model, guard):
    fit = requests(60, 0)
    evaluation = evaluate_guard(model, guard, *fit, random=1, perturbations=())
    assert any("120 of the 120 evaluated requests are among those the guard was fit on" in note for note in evaluation.notes)


def test_a_request_that_does_not_fit_the_context_is_flagged_and_out_of_the_areas(model, guard):
    unsafe, safe = requests(40, 1)
    long = Prompts([*safe, dataclasses.replace(safe[0], id="long", text="cake " * 300)], "good")
    evaluation = evaluate_guard(model, guard, unsafe, long, random=1, perturbations=())
    assert evaluation.result["flagged_safe"]["value"] == pytest.approx((guard_flags(guard, safe) + 1) / 41)
    assert evaluation.result["auroc"]["n"] == 80
    assert any("1 of 81 requests were truncated" in note for note in evaluation.notes)


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
    scores = {name: number.normal(size=20) + cases.unsafe for name in ("guard", "random neurons 0", "random neurons 1")}
    row = Scored(cases, scores, "guard", np.zeros(20, bool)).row("all", np.arange(20))
    each = [metrics.roc_auc_score(cases.unsafe, scores[f"random neurons {place}"]) for place in (0, 1)]
    assert row["auroc"]["random neurons"]["value"] == pytest.approx(np.mean(each))
    assert row["difference"]["random neurons"]["value"] == pytest.approx(row["auroc"]["guard"]["value"] - np.mean(each))


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
    assert [(row["count"], row["setting"]) for row in rows] == [(count, setting) for count in (5, 40) for setting in settings]
    for row in rows:
        assert len(row["random"]) == 2
        assert row["difference"]["value"] == pytest.approx(row["auroc"] - np.mean(row["random"]), abs=1e-9)
