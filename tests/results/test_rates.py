import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from safety_neurons.errors import InputError
from safety_neurons.results import Rate, perplexity, rate


def test_a_rate_reads_as_value_interval_n_and_unscored():
    assert str(rate([True] * 124 + [False] * 4 + [None])) == "0.97 [0.92, 0.99], n 128, unscored 1"
    assert json.loads(json.dumps(rate([True, None]).to_json())).keys() == {"value", "low", "high", "n", "unscored"}


def test_unscored_outcomes_are_counted_and_never_zero():
    assert rate([True, None, math.nan, True]).value == 1.0
    assert rate([True, None, math.nan, True]).unscored == 2


def test_nothing_scored_is_undefined_and_not_zero():
    assert rate([]) == Rate(None, None, None, 0, 0)
    assert rate([None, None]) == Rate(None, None, None, 0, 2)
    assert "undefined" in str(rate([None]))


def test_wilsons_interval_is_the_textbooks():
    found = rate([True] * 8 + [False] * 2)
    assert (found.low, found.high) == pytest.approx((0.4901625, 0.9433178), abs=1e-6)


def test_a_share_of_nought_or_all_still_has_an_interval():
    assert rate([False] * 10).high == pytest.approx(0.2775, abs=1e-3)
    assert rate([True] * 10).low == pytest.approx(0.7225, abs=1e-3)


@given(st.lists(st.one_of(st.none(), st.booleans(), st.floats(-100, 100)), max_size=30), st.integers(0, 5))
def test_the_interval_surrounds_the_value_and_the_seed_decides(outcomes, seed):
    found = rate(outcomes, seed)
    assert found.n + found.unscored == len(outcomes)
    assert rate(outcomes, seed) == found
    if found.value is not None:
        assert found.low - 1e-9 <= found.value <= found.high + 1e-9 or found.n < 8


def test_the_bootstrap_covers_the_mean_about_as_often_as_it_says():
    generator = np.random.default_rng(0)
    inside = sum(abs((found := rate(generator.normal(size=60), seed=0)).low + found.high) < found.high - found.low for _ in range(200))
    assert 175 <= inside <= 200


def test_infinite_outcomes_are_an_error():
    with pytest.raises(InputError, match="infinite"):
        rate([1.0, math.inf])


def test_numpy_outcomes_are_taken_as_they_are():
    assert rate(np.array([True, False])).value == 0.5
    assert rate([np.bool_(True), np.float32(0.0)]).value == 0.5


def test_perplexity_weighs_texts_by_their_tokens_and_leaves_out_what_is_unscored():
    found = perplexity([10.0, 30.0, None, 1.0], [5, 5, 3, 0])
    assert found.value == pytest.approx(math.exp(4.0))
    assert (found.n, found.unscored) == (2, 2)
    assert found.low <= found.value <= found.high
    assert perplexity([], []) == Rate(None, None, None, 0, 0)
    with pytest.raises(InputError, match="one of each"):
        perplexity([1.0], [1, 2])


def test_a_rate_comes_back_from_its_json_whatever_stands_beside_it():
    found = rate([True, False, None, True])
    assert Rate.from_json({**json.loads(json.dumps(found.to_json())), "why": "kept apart"}) == found
    with pytest.raises(KeyError):
        Rate.from_json({"value": 0.5})
