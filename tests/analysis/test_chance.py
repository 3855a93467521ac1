"""chance: held against scipy, against every draw of a small urn, and against simulation."""

import itertools

import numpy as np
import pytest
import scipy.stats

from safety_neurons.analysis.chance import Counts, Expectation, beside, hypergeometric, mean_of_draw, of_draws, total
from safety_neurons.errors import UsageError


@pytest.mark.parametrize(("population", "marked", "drawn"), [(10, 4, 3), (500, 40, 25), (1_700_000, 17_000, 85_000), (7, 7, 5), (9, 5, 8)])
def test_the_distribution_is_the_hypergeometric_one(population, marked, drawn):
    found = hypergeometric(population, marked, drawn)
    exact = scipy.stats.hypergeom(population, marked, drawn)
    assert found.weights == pytest.approx(exact.pmf(found.values), rel=1e-6, abs=1e-14)
    assert found.mean == pytest.approx(marked * drawn / population)
    expected = found.expectation()
    assert (expected.low, expected.high) == tuple(exact.ppf([0.025, 0.975]))
    middle = int(found.mean)
    assert found.at_least(middle) == pytest.approx(exact.sf(middle - 1))
    assert found.at_least(found.start) == pytest.approx(1)


def test_more_marked_than_there_are_is_refused():
    with pytest.raises(UsageError, match="at most as many"):
        hypergeometric(5, 6, 1)


def test_a_sum_of_counts_is_that_of_every_pair_of_draws():
    parts = [(5, 2, 3), (6, 3, 2)]
    tally: dict[int, float] = {}
    draws = [list(itertools.combinations(range(population), drawn)) for population, _, drawn in parts]
    for first, second in itertools.product(*draws):
        shared = sum(place < parts[0][1] for place in first) + sum(place < parts[1][1] for place in second)
        tally[shared] = tally.get(shared, 0) + 1 / (len(draws[0]) * len(draws[1]))
    found = total(hypergeometric(*part) for part in parts)
    assert dict(zip(found.values.tolist(), found.weights, strict=True)) == pytest.approx(tally)
    assert total([]).mean == 0


def test_expectations_go_through_functions_that_rise():
    counts = Counts(2, np.array([0.25, 0.5, 0.25]))
    found = counts.expectation(lambda values: values / 10)
    assert (found.expected, found.low, found.high) == pytest.approx((0.3, 0.2, 0.4))
    assert [found.verdict(value) for value in (0.1, 0.2, 0.4, 0.41)] == ["fewer", "as chance", "as chance", "more"]
    assert beside(0.5, found) == {"value": 0.5, "expected": found.expected, "low": 0.2, "high": 0.4, "verdict": "more"}


def test_the_mean_of_a_draw_has_the_spread_of_draws_without_replacement():
    values, counts, drawn = np.array([0.0, 0.5, 1.0]), np.array([30.0, 10.0, 20.0]), 15
    found = mean_of_draw(values, counts, drawn)
    generator = np.random.default_rng(0)
    urn = np.repeat(values, counts.astype(int))
    simulated = of_draws(np.array([generator.choice(urn, drawn, replace=False).mean() for _ in range(4000)]))
    assert found.expected == pytest.approx(simulated.expected, abs=0.01)
    assert (found.low, found.high) == pytest.approx((simulated.low, simulated.high), abs=0.03)
    everything = mean_of_draw(values, counts, 60)
    assert everything.low == everything.high == pytest.approx(urn.mean())


def test_of_draws_keeps_the_middle_ninety_five_per_cent():
    assert of_draws(np.arange(1001.0)) == Expectation(500.0, 25.0, 975.0)
