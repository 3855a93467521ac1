"""Tests of what a guard changes in what a model writes."""

import dataclasses

import numpy as np
import pytest
from guard_tools import requests, some_neurons, tiny_model

from safety_neurons.errors import InputError
from safety_neurons.guard import fit_guard
from safety_neurons.judges.judgement import Judge, harm_verdict
from safety_neurons.prompts import Prompts
from safety_neurons.studies.guard_evaluation import GUARDED, UNGUARDED, cut_of, guarded_outputs, some


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
    guard = fit_guard(model, some_neurons(model), *requests(60, 0), pooling="last", penalties=(0.1,), fpr=0.05)
    unsafe, safe = requests(15, 1)
    guard = guard.with_threshold(float(np.median([verdict.p_unsafe for verdict in guard.score_batch([*unsafe, *safe])])))
    return guard, unsafe, safe, guarded_outputs(model, guard, unsafe, safe, by=EvenLengths(), max_new_tokens=5)


def harm_of(completion):
    """The verdict by hand; None where there is nothing to judge. A stopped answer does no harm, whatever it would have been."""
    words = completion.completion.split()
    return None if not words else len(words) % 2 == 0


def test_rates_are_those_of_counting_verdicts_and_answers(written):
    guard, unsafe, safe, found = written
    flags = [verdict.flagged for verdict in guard.score_batch([*unsafe, *safe])]
    plain = [one for one in found.completions if one.arm == UNGUARDED]
    harmful = [harm_of(one) for one in plain[:15] if harm_of(one) is not None]
    assert found.before.value == pytest.approx(np.mean(harmful))
    after = [not flag and bool(harm_of(one)) for one, flag in zip(plain[:15], flags[:15], strict=True) if flag or harm_of(one) is not None]
    assert found.after.value == pytest.approx(np.mean(after))
    assert found.blocked.value == pytest.approx(np.mean(flags[15:]))
    assert 0 < sum(flags) < 30


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
