"""Rates, differences and effects: what they say, that their intervals are never empty, and that nothing
contradicts "clear".

How often the intervals cover is in `test_coverage.py`."""

import dataclasses
import json
import math
import pathlib
import re

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

import safety_neurons
from safety_neurons.errors import InputError
from safety_neurons.results import (
    AreaPart,
    Difference,
    Effect,
    Rate,
    against_random,
    area_difference,
    captioned,
    causal_effect,
    clear_word,
    cohen_kappa,
    comparisons,
    difference_over_seeds,
    family,
    holm,
    holm_in,
    is_clear,
    mcnemar,
    paired_difference,
    per_token,
    perplexity,
    rate,
    rate_over_seeds,
    stands_out,
)
from safety_neurons.results.estimates import freedom_of, share_of

# Rates


def test_a_rate_reads_as_value_interval_n_and_unscored():
    assert str(rate([True] * 124 + [False] * 4 + [None])) == "0.97 [0.92, 0.99], n 128, unscored 1"
    assert json.loads(json.dumps(rate([True, None]).to_json())).keys() == {
        "value",
        "low",
        "high",
        "n",
        "unscored",
    }


def test_unscored_outcomes_are_counted_and_never_zero():
    assert rate([True, None, math.nan, True]).value == 1.0
    assert rate([True, None, math.nan, True]).unscored == 2


def test_nothing_scored_is_undefined_and_not_zero():
    assert rate([]) == Rate(None, None, None, 0, 0)
    assert rate([None, None]) == Rate(None, None, None, 0, 2)
    assert "undefined" in str(rate([None]))


@pytest.mark.parametrize(("yes", "no"), [(8, 2), (0, 10), (10, 0), (1, 0), (0, 1), (3, 497)])
def test_the_interval_of_yes_and_no_is_the_exact_one(yes, no):
    found = rate([True] * yes + [False] * no)
    expected = scipy.stats.binomtest(yes, yes + no).proportion_ci(0.95, "exact")
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=1e-9)
    assert found.low < found.high


@given(st.lists(st.one_of(st.none(), st.booleans(), st.floats(-100, 100)), max_size=30))
def test_the_interval_surrounds_the_value_and_is_never_empty(outcomes):
    found = rate(outcomes)
    assert found.n + found.unscored == len(outcomes)
    if found.low is not None:
        assert found.low - 1e-9 <= found.value <= found.high + 1e-9
        assert found.low < found.high
    elif found.value is not None:
        assert "no spread" in found.why


@pytest.mark.parametrize("outcomes", [[1.0], [0.0] * 40, [1.0] * 40, [0.5] * 20, [0.3, 0.3], [0.99] * 500])
@pytest.mark.parametrize("groups", [None, "one", "pairs"])
def test_no_rate_between_0_and_1_has_an_interval_without_width(outcomes, groups):
    labels = {
        "one": ["a"] * len(outcomes),
        "pairs": [str(number // 2) for number in range(len(outcomes))],
    }.get(groups)
    found = rate(outcomes, labels)
    assert 0 <= found.low < found.high <= 1
    assert found.low <= found.value <= found.high


def test_prompts_of_one_group_count_as_one():
    outcomes = [True] * 50 + [False] * 50
    apart, together = rate(outcomes), rate(outcomes, [str(number // 10) for number in range(100)])
    assert together.value == apart.value
    assert together.high - together.low > 2 * (apart.high - apart.low)
    own = rate(outcomes, [None] * 100)
    assert own == apart
    with pytest.raises(InputError, match="3 groups for 100"):
        rate(outcomes, ["a"] * 3)


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
    assert found.low < found.value < found.high
    assert perplexity([], []) == Rate(None, None, None, 0, 0)
    with pytest.raises(InputError, match="one of each"):
        perplexity([1.0], [1, 2])
    assert per_token([3.0], [2]).why.startswith("no spread")
    assert per_token([3.0], [2]).low is None


def test_a_mean_per_token_is_the_logarithm_of_the_perplexity():
    totals, counts = [3.0, 8.0, None, 1.0], [2, 5, 4, 0]
    mean, found = per_token(totals, counts), perplexity(totals, counts)
    assert mean.value == pytest.approx(11 / 7)
    assert (mean.n, mean.unscored) == (2, 2)
    assert [found.value, found.low, found.high] == pytest.approx(
        list(np.exp([mean.value, mean.low, mean.high]))
    )


def test_an_estimate_comes_back_from_its_json_whatever_stands_beside_it():
    found = rate([True, False, None, True])
    assert Rate.from_json({**json.loads(json.dumps(found.to_json())), "other": "kept apart"}) == found
    with pytest.raises(KeyError):
        Rate.from_json({"value": 0.5})
    change = paired_difference([1] * 9, [0] * 9)
    assert Difference.from_json(json.loads(json.dumps(change.to_json()))) == change
    effect = causal_effect([0] * 9, [1] * 9, [1] * 5 + [0] * 4)
    assert Effect.from_json(json.loads(json.dumps(effect.to_json()))) == effect


# Effects


def test_an_effect_is_the_share_of_the_gap_that_is_restored():
    found = causal_effect([False] * 40, [True] * 40, [True] * 30 + [False] * 10)
    assert found.value == 0.75
    assert 0.55 < found.low < 0.75 < found.high < 0.95
    assert found.to_json().keys() == {"value", "low", "high", "measure", "n", "unscored"}


def test_patching_nothing_is_nought_and_patching_everything_is_one_and_neither_is_certain():
    base, aligned = [0, 0, 1, 0] * 10, [1, 1, 1, 0] * 10
    nothing, whole = causal_effect(base, aligned, base), causal_effect(base, aligned, aligned)
    assert nothing.value == 0.0
    assert nothing.low < 0 < nothing.high
    assert whole.value == 1.0
    assert whole.low < 1 < whole.high
    assert whole.high - whole.low < 0.4


@given(st.integers(0, 1000), st.floats(0.01, 50), st.sampled_from([-1, 1]), st.floats(-50, 50))
def test_an_effect_does_not_change_when_the_score_is_scaled_and_shifted(seed, a, sign, b):
    generator = np.random.default_rng(seed)
    base, aligned = generator.normal(size=30), generator.normal(size=30) + 1.5 * (seed % 2)
    patched = (base + aligned) / 2 + generator.normal(size=30) / 10
    plain = causal_effect(base, aligned, patched)
    moved = causal_effect(sign * a * base + b, sign * a * aligned + b, sign * a * patched + b)
    assert (plain.value is None) == (moved.value is None)
    if plain.value is not None:
        assert (moved.value, moved.low, moved.high) == pytest.approx(
            (plain.value, plain.low, plain.high), rel=1e-6, abs=1e-6
        )


def test_yes_and_no_on_another_scale_have_the_same_effect():
    base, aligned, patched = ([0] * 20, [1] * 18 + [0] * 2, [1] * 9 + [0] * 11)
    plain = causal_effect(base, aligned, patched)
    moved = causal_effect(*(10 * np.array(arm) - 3 for arm in (base, aligned, patched)))
    assert (moved.value, moved.low, moved.high) == pytest.approx((plain.value, plain.low, plain.high))


@pytest.mark.parametrize(
    ("base", "aligned"),
    [
        ([0, 1] * 20, [0, 1] * 20),
        ([0, 1] * 20, [1, 0] * 20),
        ([0] * 50, [1] + [0] * 49),
        ([0.1] * 20, [0.1 + 1e-12] * 10 + [0.1 - 1e-12] * 10),
        ([0], [1]),
        ([0] * 5, [1] * 5),
    ],
)
def test_an_effect_is_undefined_and_says_why_where_the_gap_is_about_nought(base, aligned):
    found = causal_effect(base, aligned, [1] * len(base))
    assert (found.value, found.low, found.high) == (None, None, None)
    assert "includes 0" in found.why
    assert "why" in json.loads(json.dumps(found.to_json()))
    assert "undefined" in str(found)


def test_prompts_that_one_arm_left_unscored_are_left_out_of_all_and_counted():
    found = causal_effect([0] * 8 + [None, 0, 0], [1] * 8 + [1, None, 1], [1] * 4 + [0] * 4 + [1, 1, None])
    assert (found.n, found.unscored) == (8, 3)
    assert found.value == 0.5
    assert causal_effect([None], [1], [1]).why.startswith("no prompt")


def test_two_numbers_of_one_prompt_are_no_yes_and_no():
    """What else than the two there may be nobody knows."""
    one = paired_difference([1.75], [1.5])
    assert (one.value, one.low, one.high, one.clear) == (0.25, None, None, False)
    assert paired_difference([7, 7, 3], [3, 7, 3]).low is not None


def test_arms_of_different_length_are_an_error():
    with pytest.raises(InputError, match="same prompts"):
        causal_effect([0], [1, 1], [0])
    with pytest.raises(InputError, match="same prompts"):
        paired_difference([0], [1, 1])
    with pytest.raises(InputError, match="same prompts"):
        against_random([0], [[1, 1]])


def test_a_share_of_a_whole_that_may_be_nought_has_no_interval():
    assert share_of([0, 0], [0, 0]).value is None
    few = share_of([1, 0], [1, 0])
    assert few.value == 1
    assert few.low is None
    many = share_of([1] * 30 + [0] * 30, [1] * 60)
    assert many.low < 0.5 < many.high


# Differences and "clear"


def test_one_decision_that_the_exact_test_never_contradicts():
    for n in [*range(1, 26), 100, 200]:
        for moved in range(min(n, 30) + 1):
            for lost in range(moved // 2 + 1):
                first = [1] * (moved - lost) + [0] * (n - moved + lost)
                second = [0] * (moved - lost) + [1] * lost + [0] * (n - moved)
                found, test = paired_difference(first, second), mcnemar(first, second)
                assert found.p == test.p
                assert found.clear == found.excludes_zero == (test.p <= 0.05)
                assert -1 <= found.low < found.high <= 1
                assert found.low <= found.value <= found.high


def test_one_prompt_is_never_clear_nor_are_four_of_two_hundred():
    assert not paired_difference([1], [0]).clear
    assert not paired_difference([1] * 4 + [0] * 196, [0] * 200).clear
    assert paired_difference([1] * 6 + [0] * 194, [0] * 200).clear
    assert not paired_difference([1] * 30, [0] * 30, ["one deed"] * 30).clear
    assert not against_random([1], [[0]] * 20).clear
    assert not against_random([1] * 40, [[0] * 40] * 20, ["one deed"] * 40).clear


def test_pairing_makes_a_small_steady_difference_clear():
    generator = np.random.default_rng(0)
    first = generator.normal(size=50) * 10
    assert paired_difference(first + 0.5 + generator.normal(size=50) / 100, first).clear
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


def test_json_says_whether_it_is_clear_and_one_without_the_word_is_not():
    found = paired_difference([1] * 9, [0] * 9).to_json()
    assert found.keys() == {"value", "low", "high", "n", "unscored", "clear", "p"}
    assert is_clear(found)
    assert not is_clear({"value": 0.5, "low": 0.4, "high": 0.6})
    assert clear_word(None) == "not compared"


# Random sets


def test_one_set_of_random_neurons_scatters_into_the_difference_from_them():
    sets = [[1] * share + [0] * (100 - share) for share in (95, 60, 85, 70, 98)]
    inside, outside = [1] * 40 + [0] * 60, [0] * 100
    assert paired_difference(inside, np.mean(sets, axis=0)).clear  # over prompts alone
    assert not against_random(inside, sets).clear
    assert against_random(outside, sets).clear
    assert against_random(outside, sets).value == pytest.approx(-0.816)


def test_too_few_random_sets_are_never_clear_and_that_is_said():
    for sets in (1, 2):
        found = against_random([0] * 200, [[1] * 200] * sets)
        assert not found.clear
        assert found.why == (
            f"not shown: {sets} random set{'s' * (sets > 1)}, at least 3 are needed to know how much "
            "they differ"
        )
        assert clear_word(found.to_json()) == found.why
    assert against_random([0] * 200, [[1] * 200] * 3).clear
    with pytest.raises(InputError, match="no random set"):
        against_random([0], [])


def test_sets_that_do_not_differ_leave_the_paired_test():
    few = against_random([1] * 4 + [0] * 196, [[0] * 200] * 20)
    assert few.p >= mcnemar([1] * 4 + [0] * 196, [0] * 200).p
    assert not few.clear


def test_unscored_arms_do_not_count():
    assert against_random([None] * 3, [[1, 1, 1]]).value is None
    found = against_random([1, None, 1], [[None] * 3, [0, 0, 0]])
    assert (found.value, found.n, found.unscored) == (1.0, 2, 1)
    assert "1 random set," in found.why


# Seeds


def test_the_mean_is_over_all_scored_outcomes_and_every_seed_is_told():
    spread = rate_over_seeds([[True, False, None, True], [False, False, False, True]])
    assert spread.value == pytest.approx(3 / 7)
    assert (spread.n, spread.unscored) == (7, 1)
    assert spread.by_seed == (pytest.approx(2 / 3), 0.25)
    assert spread.low < spread.value < spread.high
    assert spread.to_json()["highest"] == pytest.approx(2 / 3)


def test_seeds_that_disagree_widen_the_interval():
    same = rate_over_seeds([[True, False] * 50] * 5)
    apart = rate_over_seeds([[True] * 100, [False] * 100] * 2 + [[True, False] * 50])
    assert apart.high - apart.low > 2 * (same.high - same.low)


def test_a_difference_over_seeds_is_paired_and_needs_five():
    rows = np.random.default_rng(0).random((5, 60)) < 0.5
    fewer = rows.copy()
    fewer[:, :12] = False
    rows[:, :12] = True
    found = difference_over_seeds(rows.tolist(), fewer.tolist())
    assert found.value == pytest.approx(0.2)
    assert found.clear
    assert found.to_json()["by_seed"] == pytest.approx([0.2] * 5)
    assert not difference_over_seeds(rows.tolist(), rows.tolist()).clear
    four = difference_over_seeds(rows[:4].tolist(), fewer[:4].tolist())
    assert not four.clear
    assert clear_word(four.to_json()) == "not shown: 4 seeds, at least 5 are needed"


def test_seeds_that_agree_on_nothing_are_not_clear_however_many_prompts_there_are():
    first, second = [[1] * 400, [0] * 400, [1] * 400, [1] * 400, [1] * 400], [[0] * 400] * 5
    assert paired_difference(np.mean(first, axis=0), np.mean(second, axis=0)).value == 0.8
    assert difference_over_seeds(first, second).clear
    first[0] = [0] * 400
    assert not difference_over_seeds(first, second).clear


def test_the_interval_of_no_case_at_all_depends_on_the_prompts_and_not_on_the_seeds():
    few, many = rate_over_seeds([[False] * 20] * 5), rate_over_seeds([[False] * 20] * 50)
    assert few.value == few.low == 0
    assert few.high == pytest.approx(many.high, abs=1e-9)
    assert 0.1 < few.high < 0.25


def test_nothing_scored_over_seeds_is_undefined():
    assert rate_over_seeds([[None, None]]).value is None
    with pytest.raises(InputError, match="no seed"):
        rate_over_seeds([])


# Many comparisons


def test_a_table_of_more_than_ten_holds_the_family_wise_rate_and_a_short_one_is_left_alone():
    weak, strong = (
        paired_difference([1] * 7 + [0] * 93, [0] * 100),
        paired_difference([1] * 40 + [0] * 60, [0] * 100),
    )
    assert weak.clear
    short = holm([weak] * 9 + [strong])
    assert all(one.clear for one in short)
    long = holm([weak] * 10 + [strong])
    assert [one.clear for one in long] == [False] * 10 + [True]
    assert long[-1].p_holm == pytest.approx(11 * strong.p)
    assert long[0].p_holm == pytest.approx(10 * weak.p)
    assert [one.p for one in long] == [weak.p] * 10 + [strong.p]
    assert holm([weak] * 11 + [Difference(None, None, None, 0)])[-1].p_holm is None


def test_a_table_of_json_values_is_held_however_it_is_nested_and_its_caption_says_so():
    weak, strong = (
        paired_difference([1] * 7 + [0] * 93, [0] * 100),
        paired_difference([1] * 40 + [0] * 60, [0] * 100),
    )
    cells = [
        {
            "name": "a",
            "by": {"x": weak.to_json(), "y": None},
            "rate": rate([1, 0]).to_json(),
            "more": (weak.to_json(),),
        }
    ] * 5
    table = [*cells, {"name": "b", "difference": strong.to_json(), "mcnemar": mcnemar([1], [0]).to_json()}]
    held = holm_in(table)
    assert [one["p_holm"] for one in comparisons(held)] == [
        one.p_holm for one in holm([weak] * 10 + [strong])
    ]
    assert [is_clear(one) for one in comparisons(held)] == [False] * 10 + [True]
    assert family(held) == "Of 11 comparisons the family-wise rate is held (Holm)."
    assert (held[0]["name"], held[0]["rate"], held[-1]["mcnemar"]) == (
        "a",
        cells[0]["rate"],
        table[-1]["mcnemar"],
    )
    assert holm_in(cells) == [{**cell, "more": list(cell["more"])} for cell in cells]
    assert family(cells) == family(holm_in(cells)) == ""
    assert (captioned("Rates", held), captioned("Rates", cells), captioned("", cells)) == (
        f"Rates. {family(held)}",
        "Rates",
        "",
    )


# McNemar's test


@pytest.mark.parametrize("n", [1, 2, 7, 40, 999, 1000, 3001])
def test_the_p_value_is_the_two_sided_binomial_one(n):
    for fewer in {0, n // 10, n // 3, n // 2}:
        found = mcnemar([1] * (n - fewer) + [0] * fewer, [0] * (n - fewer) + [1] * fewer)
        assert found.p == pytest.approx(scipy.stats.binomtest(fewer, n, 0.5).pvalue, rel=1e-9)


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


# One place


@pytest.mark.parametrize("sizes", [[3, 3, 3, 3], [1, 2, 3], [60, 4, 4, 4], [5, 1, 1, 9, 30, 2]])
def test_the_variance_over_uneven_groups_is_the_jackknifes(sizes):
    generator = np.random.default_rng(sum(sizes))
    clusters = np.repeat(np.arange(len(sizes)), sizes)
    outcomes = generator.normal(size=len(sizes))[clusters] + generator.normal(size=len(clusters))
    left_out = np.array([outcomes[clusters != one].mean() for one in range(len(sizes))])
    variance = ((left_out - outcomes.mean()) ** 2).sum() * (1 - 1 / len(sizes))
    even = len(set(sizes)) == 1
    if even:
        assert variance == pytest.approx(np.var(left_out * (1 - len(sizes)), ddof=1) / len(sizes))
    shares = np.array(sizes) / sum(sizes)
    residuals = (shares / (1 - shares))[:, None] * (np.eye(len(sizes)) - shares)
    square = residuals @ residuals.T
    freedom = np.trace(square) ** 2 / np.trace(square @ square)
    assert freedom_of(np.array(sizes, float)) == pytest.approx(freedom)
    assert freedom <= len(sizes) - 1 + 1e-9
    assert (freedom == pytest.approx(len(sizes) - 1)) == even
    found = rate(outcomes, list(map(str, clusters)))
    half = scipy.stats.t.ppf(0.975, freedom) * math.sqrt(variance)
    assert (found.low, found.high) == pytest.approx((outcomes.mean() - half, outcomes.mean() + half))


def test_examples_that_any_classifier_left_unscored_are_left_out_of_their_difference():
    unsafe = np.array([True, True, True, False, False, False])
    first, second = np.array([0.9, 0.2, 0.8, 0.1, 0.3, np.nan]), np.array([0.5, 0.4, np.nan, 0.6, 0.2, 0.1])
    found = area_difference(AreaPart(first, [second], unsafe, list("aabbcd")))
    known = [0, 1, 3, 4]
    alone = AreaPart(first[known], [second[known]], unsafe[known], list("aabc"))
    assert (found.n, found.unscored) == (4, 2)
    assert (found.value, found.low, found.p) == (
        (whole := area_difference(alone)).value,
        whole.low,
        whole.p,
    )


def test_nothing_else_decides_what_is_clear_or_makes_intervals_of_its_own():
    """Ranges of chance (what random draws do) are no intervals of an estimate."""
    own = re.compile(
        r"\[\"high\"\] < 0|\[\"low\"\] > 0|\.low > 0 or|\.high < 0|1\.96\b|1\.959963|np\.percentile|\(0\.025, 0\.975\)"  # noqa: E501
    )
    allowed = {
        "results/estimates.py",
        "results/records.py",
        "analysis/chance.py",
        "analysis/overlap.py",
        "studies/vocabulary.py",
    }
    source = pathlib.Path(safety_neurons.__file__).parent
    found = {
        path.relative_to(source).as_posix()
        for path in source.rglob("*.py")
        if own.search(path.read_text(encoding="utf-8"))
    }
    assert found <= allowed


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


def test_mcnemars_test_says_nothing_of_prompts_that_share_groups():
    first, second = [1, 1, 1, 0], [0, 0, 0, 0]
    assert mcnemar(first, second, ["a", "b", None, None]) == mcnemar(first, second)
    assert mcnemar(first, second, ["a", "a", None, None]) is None
    assert mcnemar([1, None, 1, 0], second, ["a", "a", "b", "c"]).n == 3


@pytest.mark.parametrize(
    ("larger", "random", "said"),
    [(0, 20, True), (0, 19, True), (0, 18, False), (1, 20, False), (1, 39, True)],
)
def test_what_stands_out_among_random_ones_is_at_most_one_in_twenty(larger, random, said):
    """Of a neuron that is random itself, beyond the range of 20 others on one side is one time in ten."""
    change = paired_difference([0.1] * 8 + [0.2] * 8, [0.0] * 8 + [0.03] * 8)
    change = dataclasses.replace(change, low=0.05, high=0.2, p=0.001)
    told = {**change.to_json(), "p_among_random": (1 + larger) / (1 + random)}
    assert stands_out(told, {"low": -0.1, "high": 0.01}) is said
    assert not stands_out(told, {"low": -0.1, "high": 0.06})
