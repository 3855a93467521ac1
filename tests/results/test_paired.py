"""McNemar's exact test against scipy's binomial test."""

import numpy as np
import pytest
import scipy.stats

from safety_neurons.errors import InputError
from safety_neurons.results import mcnemar, per_token, perplexity
from safety_neurons.results.paired import binomial_p


@pytest.mark.parametrize("n", [1, 2, 7, 40, 999, 1000, 3001])
def test_the_p_value_is_the_two_sided_binomial_one(n):
    for fewer in {0, n // 10, n // 3, n // 2}:
        assert binomial_p(fewer, n) == pytest.approx(scipy.stats.binomtest(fewer, n, 0.5).pvalue, rel=1e-9)


def test_prompts_are_counted_by_who_alone_has_the_outcome():
    found = mcnemar([1, 1, 0, 0, 1, None], [0, 1, 1, 0, 0, 1])
    assert (found.first_only, found.second_only, found.n, found.unscored) == (2, 1, 5, 1)
    assert found.p == 1.0


def test_equal_outcomes_are_no_evidence_and_no_outcomes_no_test():
    assert mcnemar([1, 0], [1, 0]).p == 1.0
    assert mcnemar([None], [1]).p is None


def test_means_over_seeds_have_no_such_test():
    assert mcnemar([0.5, 1], [1, 1]) is None


def test_lists_of_different_length_are_refused():
    with pytest.raises(InputError, match="same prompts"):
        mcnemar([1], [1, 0])


def test_a_mean_per_token_is_the_logarithm_of_the_perplexity():
    totals, counts = [3.0, 8.0, None, 1.0], [2, 5, 4, 0]
    mean, found = per_token(totals, counts), perplexity(totals, counts)
    assert mean.value == pytest.approx(11 / 7)
    assert (mean.n, mean.unscored) == (2, 2)
    assert [found.value, found.low, found.high] == pytest.approx(list(np.exp([mean.value, mean.low, mean.high])))
