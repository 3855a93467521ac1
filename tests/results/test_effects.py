import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from safety_neurons.errors import InputError
from safety_neurons.results import causal_effect, paired_difference


def test_an_effect_is_the_share_of_the_gap_that_is_restored():
    found = causal_effect([False] * 40, [True] * 40, [True] * 30 + [False] * 10)
    assert found.value == 0.75
    assert 0.55 < found.low < 0.75 < found.high < 0.9
    assert found.to_json().keys() == {"value", "low", "high", "measure", "n", "unscored"}


def test_patching_nothing_is_nought_and_patching_everything_is_one():
    base, aligned = [0, 0, 1, 0] * 10, [1, 1, 1, 0] * 10
    assert causal_effect(base, aligned, base).value == 0.0
    whole = causal_effect(base, aligned, aligned)
    assert (whole.value, whole.low, whole.high) == (1.0, 1.0, 1.0)


@given(st.integers(0, 1000), st.floats(0.01, 50), st.sampled_from([-1, 1]), st.floats(-50, 50))
def test_an_effect_does_not_change_when_the_score_is_scaled_and_shifted(seed, a, sign, b):
    generator = np.random.default_rng(seed)
    base, aligned = generator.normal(size=30), generator.normal(size=30) + 1.5 * (seed % 2)
    patched = (base + aligned) / 2 + generator.normal(size=30) / 10
    plain = causal_effect(base, aligned, patched)
    moved = causal_effect(sign * a * base + b, sign * a * aligned + b, sign * a * patched + b)
    assert (plain.value is None) == (moved.value is None)
    if plain.value is not None:
        assert (moved.value, moved.low, moved.high) == pytest.approx((plain.value, plain.low, plain.high), rel=1e-6, abs=1e-6)


@pytest.mark.parametrize(
    ("base", "aligned"),
    [
        ([0, 1] * 20, [0, 1] * 20),
        ([0, 1] * 20, [1, 0] * 20),
        ([0] * 50, [1] + [0] * 49),
        ([0.1] * 20, [0.1 + 1e-12] * 10 + [0.1 - 1e-12] * 10),
    ],
)
def test_an_effect_is_undefined_and_says_why_where_the_gap_is_about_nought(base, aligned):
    found = causal_effect(base, aligned, [1] * len(base))
    assert (found.value, found.low, found.high) == (None, None, None)
    assert "includes 0" in found.why
    assert "why" in json.loads(json.dumps(found.to_json()))
    assert "undefined" in str(found)


def test_prompts_that_one_arm_left_unscored_are_left_out_of_all_and_counted():
    found = causal_effect([0, 0, None, 0, 0], [1, 1, 1, None, 1], [1, 0, 1, 1, None])
    assert (found.n, found.unscored) == (2, 3)
    assert found.value == 0.5
    assert causal_effect([None], [1], [1]).why.startswith("no prompt")


def test_arms_of_different_length_are_an_error():
    with pytest.raises(InputError, match="same prompts"):
        causal_effect([0], [1, 1], [0])
    with pytest.raises(InputError, match="same prompts"):
        paired_difference([0], [1, 1])


def test_the_same_seed_gives_the_same_interval_and_another_seed_another():
    generator = np.random.default_rng(0)
    arms = [generator.random(50) + shift for shift in (0, 1, 0.5)]
    assert causal_effect(*arms, seed=3) == causal_effect(*arms, seed=3)
    assert causal_effect(*arms, seed=3).low != causal_effect(*arms, seed=4).low


def test_pairing_makes_a_small_steady_difference_clear():
    generator = np.random.default_rng(0)
    first = generator.normal(size=50) * 10
    assert paired_difference(first + 0.5, first).clear
    assert paired_difference(first + 0.5, first).value == pytest.approx(0.5)
    assert not paired_difference(first, generator.normal(size=50) * 10).clear


def test_no_difference_is_not_clear_and_the_sign_is_that_of_the_first():
    assert not paired_difference([1, 0, 1], [1, 0, 1]).clear
    assert paired_difference([1] * 9, [0] * 9).value == 1.0
    assert paired_difference([None], [1]).value is None
    assert not paired_difference([None], [1]).clear


def test_ten_thousand_prompts_take_bounded_memory_and_little_time():
    scores = np.random.default_rng(0).random(10_000)
    assert causal_effect(scores, scores + 1, scores + 0.5).value == pytest.approx(0.5)
