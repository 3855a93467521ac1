"""Means over seeds and prompts."""

import numpy as np
import pytest

from safety_neurons.studies.seeds import difference_over_seeds, mean_of, over_seeds


def test_the_mean_is_over_all_scored_outcomes_and_every_seed_is_told():
    spread = over_seeds([[True, False, None, True], [False, False, False, True]])
    assert spread.value == pytest.approx(3 / 7)
    assert (spread.n, spread.unscored) == (7, 1)
    assert spread.by_seed == (pytest.approx(2 / 3), 0.25)
    assert spread.low < spread.value < spread.high
    assert spread.record()["highest"] == pytest.approx(2 / 3)


def test_seeds_that_disagree_widen_the_interval():
    same = over_seeds([[True, False] * 50] * 4)
    apart = over_seeds([[True] * 100, [False] * 100] * 2)
    assert apart.high - apart.low > 2 * (same.high - same.low)


def test_a_difference_is_paired():
    rows = np.random.default_rng(0).random((3, 60)) < 0.5
    fewer = rows.copy()
    fewer[:, :6] = False
    rows[:, :6] = True
    difference = difference_over_seeds(rows.tolist(), fewer.tolist())
    assert difference.value == pytest.approx(0.1)
    assert difference.clear
    assert not difference_over_seeds(rows.tolist(), rows.tolist()).clear


def test_the_interval_of_no_case_at_all_depends_on_the_prompts_and_not_on_the_seeds():
    few, many = over_seeds([[False] * 20] * 2), over_seeds([[False] * 20] * 50)
    assert few.value == few.low == 0
    assert few.high == many.high == pytest.approx(0.161, abs=1e-3)


def test_nothing_scored_is_undefined():
    assert over_seeds([[None, None]]).value is None
    assert mean_of([None]) == {"value": None, "lowest": None, "highest": None, "by_seed": [None]}
    assert mean_of([1.0, 3.0])["value"] == 2.0
