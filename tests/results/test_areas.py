import numpy as np
import pytest

from safety_neurons.errors import InputError
from safety_neurons.results import cohen_kappa


def test_kappa_equals_scikit_learns():
    from sklearn.metrics import cohen_kappa_score

    generator = np.random.default_rng(0)
    first = generator.random(200) < 0.3
    second = np.where(generator.random(200) < 0.8, first, ~first)
    found = cohen_kappa(first, second)
    assert found.kappa.value == pytest.approx(cohen_kappa_score(first, second))
    assert found.kappa.low < found.kappa.value < found.kappa.high
    assert found.same.value == pytest.approx((first == second).mean())
    assert sum(map(sum, found.table)) == 200


def test_chance_is_zero_and_identity_is_one():
    assert cohen_kappa([True, True, False, False], [True, False, True, False]).kappa.value == pytest.approx(0)
    assert cohen_kappa([True, False], [True, False]).kappa.value == pytest.approx(1)


def test_completions_that_either_judge_left_unscored_are_counted():
    found = cohen_kappa([True, None, False, True], [True, True, float("nan"), False])
    assert (found.kappa.n, found.kappa.unscored, found.same.unscored) == (2, 2, 2)
    assert found.table == ((0, 0), (1, 1))


def test_one_verdict_throughout_has_no_kappa():
    found = cohen_kappa([True, True], [True, True])
    assert found.kappa.value is None
    assert found.same.value == 1
    assert cohen_kappa([], []).kappa.value is None


@pytest.mark.parametrize(("first", "second"), [([True], [True, False]), ([0.5], [True])])
def test_lists_that_cannot_be_compared_are_errors(first, second):
    with pytest.raises(InputError, match="expected"):
        cohen_kappa(first, second)
