"""How often the intervals cover and how often "clear" is wrong, by seeded simulation.

Larger ones are `benchmarks/coverage.py`.

Every bound leaves four standard errors of the simulation below the coverage that is promised: .93 at least,
.07 false at most.
"""

import math

import numpy as np
import pytest
import scipy.stats

from safety_neurons.neurons.sets import extra_variance
from safety_neurons.prompt_lists import prompts
from safety_neurons.results import (
    AreaPart,
    Completion,
    against_random,
    area_difference,
    auroc,
    causal_effect,
    cohen_kappa,
    difference_over_seeds,
    paired_difference,
    per_token,
    rate,
    rate_over_seeds,
)
from safety_neurons.results.completions import shared_by


def least(draws: int, promised: float = 0.93) -> float:
    return promised - 4 * math.sqrt(promised * (1 - promised) / draws)


def most(draws: int, promised: float = 0.07) -> float:
    return promised + 4 * math.sqrt(promised * (1 - promised) / draws)


def chances(logits: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-logits))


@pytest.mark.parametrize("n", [16, 50, 200, 500])
def test_a_rate_covers_at_every_truth(n):
    ends = [(found.low, found.high) for found in (rate([1] * yes + [0] * (n - yes)) for yes in range(n + 1))]
    low, high = np.array(ends).T
    for truth in np.linspace(0, 1, 101):
        weights = scipy.stats.binom.pmf(np.arange(n + 1), n, truth)
        assert weights[(low <= truth) & (truth <= high)].sum() >= 0.95 - 1e-9


@pytest.mark.parametrize("n", [16, 50, 200])
def test_a_difference_covers_where_only_one_side_ever_changes(n):
    """Exactly, over the number of prompts that change: where resampling covered .34."""
    ends = []
    for moved in range(n + 1):
        found = paired_difference([1] * moved + [0] * (n - moved), [0] * n)
        ends.append((found.low, found.high))
    low, high = np.array(ends).T
    for truth in np.linspace(0, 1, 101):
        weights = scipy.stats.binom.pmf(np.arange(n + 1), n, truth)
        assert weights[(low <= truth) & (truth <= high)].sum() >= 0.93


@pytest.mark.parametrize("n", [16, 100])
@pytest.mark.parametrize(("base", "aligned"), [(0.0, 1.0), (0.1, 0.9)])
def test_a_causal_effect_covers_at_every_truth(n, base, aligned):
    generator, draws = np.random.default_rng(n), 80
    for truth in (0.0, 0.5, 1.0):
        inside = defined = 0
        for _ in range(draws):
            shared = generator.random(n)
            rows = [
                np.where(generator.random(n) < 0.7, shared, generator.random(n)) < share
                for share in (base, aligned, base + truth * (aligned - base))
            ]
            found = causal_effect(*rows)
            if found.value is not None:
                defined += 1
                inside += found.low <= truth <= found.high
                assert found.low < found.high
        assert defined > draws / 2
        assert inside / defined >= least(defined)


@pytest.mark.parametrize("size", [2, 8])
def test_groups_are_what_counts(size):
    generator, draws, groups = np.random.default_rng(size), 200, 25
    labels = [str(group) for group in range(groups) for _ in range(size)]
    hits = {"rate": 0, "difference": 0, "prompts alone": 0}
    for _ in range(draws):
        first, second = (np.repeat(generator.random(groups), size) < share for share in (0.6, 0.4))
        hits["rate"] += (found := rate(first, labels)).low <= 0.6 <= found.high
        hits["difference"] += (change := paired_difference(first, second, labels)).low <= 0.2 <= change.high
        hits["prompts alone"] += (alone := paired_difference(first, second)).low <= 0.2 <= alone.high
    assert min(hits["rate"], hits["difference"]) / draws >= least(draws)
    assert hits["prompts alone"] / draws < hits["difference"] / draws


def test_means_over_samples_of_a_prompt_cover_near_the_ends():
    generator, draws = np.random.default_rng(3), 200
    for truth in (0.02, 0.5, 0.97):
        inside = 0
        for _ in range(draws):
            outcomes = generator.binomial(3, generator.beta(truth, 1 - truth, 60)) / 3
            inside += (found := rate(outcomes)).low <= truth <= found.high
        assert inside / draws >= least(draws)


def test_a_mean_per_token_covers():
    generator, draws = np.random.default_rng(4), 400
    inside = 0
    for _ in range(draws):
        counts = generator.integers(5, 60, 20)
        totals = counts * 2.0 + generator.normal(size=20) * np.sqrt(counts)
        inside += (found := per_token(totals, counts)).low <= 2.0 <= found.high
    assert inside / draws >= least(draws)


def test_a_mean_of_a_long_tail_is_covered_more_often_and_an_even_one_no_wider():
    """Log-normal divergences of texts, a few of which make up the sum: Student's interval covered .64."""
    generator, draws, n, inside = np.random.default_rng(12), 300, 32, 0
    for _ in range(draws):
        counts = generator.integers(10, 60, n)
        found = per_token(generator.lognormal(0, 2, n) * counts, counts)
        inside += found.low <= math.exp(2) <= found.high
    assert inside / draws >= least(draws, 0.84)
    values = scipy.stats.norm.ppf((np.arange(n) + 0.5) / n)
    half = scipy.stats.t.ppf(0.975, n - 1) * values.std(ddof=1) / math.sqrt(n)
    assert rate(5 + 2 * values).high == pytest.approx(5 + 2 * half)
    right, left = rate(5 + values**2), rate(5 - values**2)
    assert right.high - right.value > 1.2 * (right.value - right.low)
    assert left.value - left.low == pytest.approx(right.high - right.value)


def test_differences_with_a_long_tail_that_are_none_are_rarely_clear():
    """Changes of log-odds, most of them small and a few large: Student's interval alone called .09 clear."""
    generator, draws, n, false = np.random.default_rng(13), 1500, 32, 0
    for _ in range(draws):
        before = generator.normal(size=n)
        found = paired_difference(before + generator.chisquare(1, n) - 1, before)
        assert (found.p <= 0.05) == found.excludes_zero == found.clear
        false += found.clear
    assert false / draws <= most(draws, 0.05)


UNEVEN = {
    "one of most": lambda generator: np.r_[60, np.full(15, 4)],
    "lognormal": lambda generator: generator.lognormal(2, 1.2, 16).astype(int) + 1,
    "three": lambda generator: np.r_[60, 4, 4],
}
"""Sizes of clusters, from which intervals that took them for even covered .35 to .87."""


@pytest.mark.parametrize("uneven", UNEVEN)
def test_uneven_texts_and_groups_are_covered_and_not_called_clear(uneven):
    generator, draws = np.random.default_rng(6), 300
    tokens = means = rates = false = 0
    for _ in range(draws):
        sizes = UNEVEN[uneven](generator)
        clusters = np.repeat(np.arange(len(sizes)), sizes)
        groups = list(map(str, clusters))
        tokens += (
            abs((found := per_token(generator.normal(2, 1, len(sizes)) * sizes, sizes)).value - 2)
            <= (found.high - found.low) / 2
        )
        shifts = generator.normal(size=len(sizes))[clusters]
        means += (found := rate(shifts + generator.normal(size=len(clusters)), groups)).low <= 0 <= found.high
        chance = generator.beta(0.5, 0.5, (2, len(sizes)))[:, clusters]
        first, second = generator.random(chance.shape) < chance
        rates += (found := rate(first, groups)).low <= 0.5 <= found.high
        false += paired_difference(first, second, groups).clear
    assert min(tokens, means, rates) / draws >= least(draws)
    assert false / draws <= most(draws)


@pytest.mark.parametrize("uneven", UNEVEN)
def test_areas_of_uneven_groups_are_covered_and_not_called_clear(uneven):
    generator, draws, truth = np.random.default_rng(7), 200, scipy.stats.norm.cdf(1 / math.sqrt(2))
    inside = false = 0
    for _ in range(draws):
        sizes = np.r_[UNEVEN[uneven](generator), UNEVEN[uneven](generator)]
        clusters = np.repeat(np.arange(len(sizes)), sizes)
        unsafe, groups = clusters < len(sizes) // 2, list(map(str, clusters))
        first, second = (
            0.9 * generator.normal(size=len(sizes))[clusters]
            + math.sqrt(0.19) * generator.normal(size=len(clusters))
            + unsafe
            for _ in range(2)
        )
        inside += (found := auroc(first, unsafe, groups)).low <= truth <= found.high
        false += area_difference(AreaPart(first, [second], unsafe, groups)).clear
    assert inside / draws >= least(draws)
    assert false / draws <= most(draws)


def test_kappa_covers():
    generator, draws = np.random.default_rng(5), 200
    for truth in (0.0, 0.5, 1.0):
        inside = 0
        for _ in range(draws):
            first = generator.random(60) < 0.4
            second = np.where(generator.random(60) < truth, first, generator.random(60) < 0.4)
            found = cohen_kappa(first, second).kappa
            assert found.low < found.high
            inside += found.low <= truth <= found.high
        assert inside / draws >= least(draws)


@pytest.mark.parametrize(
    "cells", [(0.1, 0.8, 0.05, 0.05), (0, 0.5, 0.5, 0), (0, 0.9, 0.1, 0), (0.05, 0.55, 0.35, 0.05)]
)
@pytest.mark.parametrize("n", [16, 60])
def test_kappa_covers_judges_that_lean_to_opposite_verdicts(cells, n):
    """With the judges' shares of yes taken as given, .11 to .88."""
    generator, draws, inside = np.random.default_rng(n), 200, 0
    table = np.reshape(cells, (2, 2))
    yes, also = table[1].sum(), table[:, 1].sum()
    chance = yes * also + (1 - yes) * (1 - also)
    truth = (np.trace(table) - chance) / (1 - chance)
    for _ in range(draws):
        drawn = generator.choice(4, n, p=cells)
        found = cohen_kappa(drawn >= 2, drawn % 2 == 1).kappa
        inside += found.low - 1e-9 <= truth <= found.high + 1e-9
    assert inside / draws >= least(draws)


@pytest.mark.parametrize("sets", [3, 5, 10, 20])
@pytest.mark.parametrize("spread", [0.0, 0.5, 1.5])
def test_one_more_random_set_is_rarely_clear(sets, spread):
    generator, draws, n = np.random.default_rng([sets, int(10 * spread)]), 90, 100
    false = 0
    for number in range(draws):
        prompts = (-2.0, 0.0, 2.5)[number % 3] + 1.5 * generator.normal(size=n)
        rows = generator.random((sets + 1, n)) < chances(
            prompts + spread * generator.normal(size=(sets + 1, 1))
        )
        false += against_random(rows[0], list(rows[1:])).clear
    assert false / draws <= most(draws)


@pytest.mark.parametrize("share", [0.2, 0.4])
def test_a_random_set_is_rarely_clear_beside_random_sets_that_keep_clear_of_it(share):
    """Units push refusals either way. Sets that are drawn from what one leaves have more in common, so that
    .10 to .30 of the sets were clear.
    """
    generator, draws, units = np.random.default_rng(int(10 * share)), 150, 100
    taken, false = round(share * units), 0
    extra = extra_variance([(taken, units)])
    for _ in range(draws):
        pushes = generator.normal(size=units) / math.sqrt(taken)
        order = generator.permutation(units)
        sets = [order[:taken], *(generator.permutation(order[taken:])[:taken] for _ in range(20))]
        moved = np.array([[pushes[members].sum()] for members in sets])
        rows = generator.random((21, 100)) < chances(1.2 * generator.normal(size=100) + 2 * moved)
        false += against_random(rows[0], list(rows[1:]), extra=extra).clear
    assert false / draws <= most(draws)


def test_the_outside_finding_six_random_sets_each_against_the_other_five():
    """Resampling prompts alone, 9 of 12 such comparisons were "clear": three arms of two kinds with six
    random sets.
    """
    generator, before, after, compared = np.random.default_rng(0), 0, 0, 0
    for _ in range(6):
        prompts = 1.0 + 1.5 * generator.normal(size=200)
        rows = generator.random((6, 200)) < chances(prompts + 0.9 * generator.normal(size=(6, 1)))
        for one in range(6):
            others = [row for number, row in enumerate(rows) if number != one]
            compared += 1
            before += paired_difference(rows[one], np.mean(others, axis=0)).clear
            after += against_random(rows[one], others).clear
    assert before / compared > 0.6  # what resampling prompts alone calls clear
    assert after / compared <= most(compared)


@pytest.mark.parametrize("seeds", [2, 3, 5, 10])
@pytest.mark.parametrize("spread", [0.0, 1.0])
def test_means_over_seeds_cover(seeds, spread):
    generator, draws, n = np.random.default_rng([seeds, int(spread)]), 60, 60
    nodes, weights = np.polynomial.hermite_e.hermegauss(61)
    for centre in (-3.0, 0.5):
        truth = float(weights @ chances(centre + math.hypot(1.0, spread) * nodes) / weights.sum())
        inside = none = 0
        for _ in range(draws):
            rows = generator.random((2, seeds, n)) < chances(
                centre + generator.normal(size=n) + spread * generator.normal(size=(2, seeds, 1))
            )
            inside += (found := rate_over_seeds(list(rows[0]))).low <= truth <= found.high
            none += (change := difference_over_seeds(list(rows[0]), list(rows[1]))).low <= 0 <= change.high
            assert not (seeds < 5 and change.clear)
        assert inside / draws >= least(draws)
        assert none / draws >= least(draws)


def test_what_several_answers_to_a_prompt_share_is_no_further_evidence():
    """Eight samples of a prompt that are judged alike."""
    generator, draws, hits = np.random.default_rng(10), 200, np.zeros(2)
    for _ in range(draws):
        first = generator.random(30) < 0.4
        second = np.where(generator.random(30) < 0.5, first, generator.random(30) < 0.4)
        answers = [Completion(str(place), f"p{place}", "x") for place in range(30) for _ in range(8)]
        groups = shared_by(answers)
        kappa = cohen_kappa(first.repeat(8), second.repeat(8), groups).kappa
        hits += (
            (found := rate(first.repeat(8), groups)).low <= 0.4 <= found.high,
            kappa.low <= 0.5 <= kappa.high,
        )
    assert hits.min() / draws >= least(draws)


@pytest.mark.parametrize("chance", [0.3, 0.9])
def test_copies_of_a_prompt_in_groups_of_their_own_are_no_further_evidence(chance):
    """Every prompt twice, in files whose column of groups tells each row apart: rates covered .88 and .12 of
    differences that are none were clear.
    """
    asked = prompts([{"prompt": f"p{place // 2}", "group": f"g{place}"} for place in range(80)])
    generator, draws, inside, false = np.random.default_rng(11), 200, 0, 0
    for _ in range(draws):
        first, second = ((generator.random(40) < chance).repeat(2) for _ in range(2))
        inside += (found := rate(first, asked.groups)).low <= chance <= found.high
        false += paired_difference(first, second, asked.groups).clear
    assert inside / draws >= least(draws)
    assert false / draws <= most(draws)


def test_answers_of_one_prompt_each_and_of_no_known_prompt_are_by_themselves():
    single = [Completion(str(place), f"p{place}", "x") for place in range(5)]
    assert rate([1, 0, 1, 0, 1], shared_by(single)) == rate([1, 0, 1, 0, 1])
    assert shared_by([Completion("0", "", "x")] * 3) == [None] * 3
    assert len({*shared_by([Completion("0", text, "x", meta={"group": "g"}) for text in "pq"])}) == 1
    assert len({*shared_by([Completion(number, "p", "x") for number in "01"])}) == 1  # a copy
