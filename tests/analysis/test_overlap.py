"""Overlap of sets, of scores, and of what two trainings changed, beside chance."""

import itertools

import numpy as np
import pytest
import scipy.stats
from analysed_sets import random_scores, random_set, small_table
from scipy import stats

from safety_neurons import organism
from safety_neurons.analysis import Named, name_sets, overlap
from safety_neurons.analysis.chance import simulated
from safety_neurons.analysis.overlap import (
    Changes,
    activation_bins,
    chance_overlap,
    directions,
    partial_spearman,
    relations,
    top_neurons,
)
from safety_neurons.errors import InputError, NeuronError
from safety_neurons.neurons import NeuronSet, Scores

TABLE = small_table()


def only(found):
    assert len(found.pairs) == 1
    return found.pairs[0].record()


def test_jaccard_and_coefficient_are_those_of_the_members():
    first, second = random_set(TABLE, 0.3, 1), random_set(TABLE, 0.5, 2)
    found = only(overlap(name_sets([("a", first), ("b", second)])))
    one, other = set(first), set(second)
    assert found["shared"]["value"] == len(one & other)
    assert found["jaccard"]["value"] == len(one & other) / len(one | other)
    assert found["overlap_coefficient"]["value"] == len(one & other) / min(len(one), len(other))
    assert found["shared"]["expected"] == pytest.approx(len(one) * len(other) / TABLE.n_neurons)
    by_matrix = sum(len(first[key]) * len(second[key]) / size for key, size in TABLE.sizes.items())
    assert found["shared"]["matched"]["expected"] == pytest.approx(by_matrix, rel=0.01)
    units = TABLE.units()
    mine, theirs = ({int(units[key][index]) for key, index in part} for part in (first, second))
    assert found["units"]["shared"]["value"] == len(mine & theirs)
    assert found["units"]["sizes"] == [len(mine), len(theirs)]
    assert found["units"]["candidates"] == len(np.unique(np.concatenate(list(units.values()))))


def test_both_expectations_are_those_of_sets_drawn_at_random():
    first, second = random_set(TABLE, 0.15, 3), random_set(TABLE, 0.3, 4)
    found = only(overlap(name_sets([("a", first), ("b", second)])))
    matched, anywhere = [], []
    everything = [(key, index) for key, size in TABLE.sizes.items() for index in range(size)]
    generator = np.random.default_rng(0)
    for _ in range(250):
        like = {
            key: generator.choice(TABLE.sizes[key], len(indices), replace=False)
            for key, indices in second.items()
        }
        matched.append(_jaccard(set(first), set(NeuronSet(like, TABLE))))
        drawn = generator.choice(len(everything), len(second), replace=False)
        anywhere.append(_jaccard(set(first), {everything[place] for place in drawn}))
    for record, draws in ((found["jaccard"], anywhere), (found["jaccard"]["matched"], matched)):
        assert record["expected"] == pytest.approx(np.mean(draws), abs=0.01)
        assert (record["low"], record["high"]) == pytest.approx(
            tuple(np.quantile(draws, (0.025, 0.975))), abs=0.03
        )


def _jaccard(one, other):
    return len(one & other) / len(one | other)


def test_agreeing_on_a_layer_is_more_than_chance_but_not_more_than_matched():
    generator = np.random.default_rng(5)
    sets = [
        NeuronSet({"layers.0.down": generator.choice(12, 6, replace=False), "layers.0.up": [seed]}, TABLE)
        for seed in range(2)
    ]
    found = only(overlap(name_sets(zip("ab", sets, strict=True))))
    assert found["jaccard"]["verdict"] == "more"
    assert found["jaccard"]["matched"]["verdict"] == "as chance"
    assert found["p_at_least"]["chance"] < 0.05 < found["p_at_least"]["matched"]


def test_equal_and_disjoint_sets_are_at_the_ends():
    one = NeuronSet({"layers.1.down": [1, 2, 3]}, TABLE)
    same = only(overlap(name_sets([("a", one), ("b", one)])))
    assert same["jaccard"]["value"] == same["overlap_coefficient"]["value"] == same["corrected"] == 1
    apart = only(overlap(name_sets([("a", one), ("b", NeuronSet({"layers.2.down": [1]}, TABLE))])))
    assert apart["jaccard"]["value"] == 0
    assert apart["corrected"] < 0


def test_only_what_both_searched_is_compared_and_the_rest_is_counted():
    all_sites, down = random_set(TABLE, 0.4, 6), random_set(TABLE, 0.4, 7, sites=("down",))
    found = only(overlap(name_sets([("a", all_sites), ("b", down)])))
    assert found["candidates"] == 36
    assert found["sizes"] == [len(all_sites.only(sites=["down"])), len(down)]
    assert found["outside"] == [len(all_sites) - len(all_sites.only(sites=["down"])), 0]
    assert found["spearman"]["value"] is None
    assert "without scores" in found["spearman"]["why"]
    with pytest.raises(NeuronError, match="different sites"):
        overlap(name_sets([("a", random_set(TABLE, 0.4, 6, sites=("up",))), ("b", down)]))
    with pytest.raises(NeuronError, match="at least two"):
        overlap(name_sets([("a", down)]))


@pytest.fixture(scope="module")
def ranked():
    scores = [random_scores(TABLE, seed) for seed in (8, 9)]
    return overlap(
        [Named(name, part.count(20), part) for name, part in zip("ab", scores, strict=True)]
    ), scores


def test_spearman_is_that_of_scipy_over_both_index_sets(ranked):
    found, scores = only(ranked[0]), ranked[1]
    flat = [np.concatenate([values for _, values in part.items()]) for part in scores]
    assert found["spearman"]["value"] == pytest.approx(scipy.stats.spearmanr(*flat).statistic)
    masks = [np.concatenate([part.count(20).mask(key) for key in TABLE.keys]) for part in scores]
    union = masks[0] | masks[1]
    assert found["spearman_union"]["n"] == union.sum()
    assert found["spearman_union"]["value"] == pytest.approx(
        scipy.stats.spearmanr(flat[0][union], flat[1][union]).statistic
    )


def test_unrelated_scores_run_against_one_another_in_the_union_and_that_is_expected(ranked):
    found = only(ranked[0])
    assert found["spearman_union"]["expected"] < -0.4
    assert found["spearman_union"]["verdict"] == "as chance"
    assert found["spearman"]["expected"] == pytest.approx(0, abs=1e-9)
    n = TABLE.n_neurons
    assert found["spearman"]["high"] == pytest.approx(1.96 / np.sqrt(n - 1), rel=0.01)


def test_agreement_on_matrices_alone_is_expected_by_the_matched_spearman():
    generator = np.random.default_rng(10)
    level = {key: 3 * number for number, key in enumerate(TABLE.keys)}
    scores = [
        type(random_scores(TABLE, 0))(
            {key: level[key] + generator.normal(size=size) for key, size in TABLE.sizes.items()}, TABLE
        )
        for _ in range(2)
    ]
    found = only(
        overlap([Named(name, part.count(20), part) for name, part in zip("ab", scores, strict=True)])
    )["spearman"]
    assert found["value"] > 0.9
    assert found["verdict"] == "more"
    assert found["matched"]["expected"] == pytest.approx(found["value"], abs=0.02)
    assert found["matched"]["verdict"] == "as chance"
    permuted = []
    for _ in range(100):
        second = np.concatenate([generator.permutation(scores[1][key]) for key in TABLE.keys])
        first = np.concatenate([scores[0][key] for key in TABLE.keys])
        permuted.append(scipy.stats.spearmanr(first, second).statistic)
    assert found["matched"]["expected"] == pytest.approx(np.mean(permuted), abs=0.002)
    assert found["matched"]["high"] == pytest.approx(np.quantile(permuted, 0.975), abs=0.006)


def test_every_pair_and_what_all_have_is_there():
    sets = [random_set(TABLE, 0.5, seed) for seed in (11, 12, 13)]
    found = overlap(name_sets(zip("abc", sets, strict=True))).record()
    assert [tuple(pair["names"]) for pair in found["pairs"]] == list(itertools.combinations("abc", 2))
    assert found["in_all"]["value"] == len(sets[0] & sets[1] & sets[2])
    exact = sum(size * np.prod([len(part[key]) / size for part in sets]) for key, size in TABLE.sizes.items())
    assert found["in_all"]["expected"] == pytest.approx(exact, rel=0.03)
    draws = simulated(sets[:2], TABLE, 0, 4000)
    pair = found["pairs"][0]["shared"]["matched"]
    assert draws.mean() == pytest.approx(pair["expected"], rel=0.03)
    values = [pair["jaccard"]["value"] for pair in found["pairs"]]
    assert found["mean_jaccard"] == {
        "value": pytest.approx(np.mean(values)),
        "lowest": min(values),
        "highest": max(values),
        "n_pairs": 3,
    }


def test_the_planted_truth_of_two_languages_is_shared_beyond_chance_and_the_decoys_are_not():
    files = {name: organism.spec(f"planted/{name}") for name in ("truth", "truth-de", "decoys")}
    found = overlap(name_sets((name, NeuronSet.load(file)) for name, file in files.items())).record()
    languages, decoys, _ = found["pairs"]
    assert languages["jaccard"]["verdict"] == languages["jaccard"]["matched"]["verdict"] == "more"
    assert decoys["shared"]["value"] == 0
    units = organism.open("planted").record["truth"]["units"]
    works = [
        {number for number, unit in enumerate(units) if unit["shares"][code] >= 0.01} for code in ("en", "de")
    ]
    assert languages["units"]["shared"]["value"] == len(works[0] & works[1])


GROUPS, TOKENS, LAYERS, WIDTH = 6, 40, 2, 60


def changes_of(before, after):
    """Sums over tokens from whole activations [group, token, neuron]."""
    names = list(after)
    pairs = [(a, b) for place, a in enumerate(names) for b in names[place + 1 :]]
    squares = {name: ((values - before) ** 2).sum(1) for name, values in after.items()}
    between = {(a, b): ((after[a] - after[b]) ** 2).sum(1) for a, b in pairs}
    layers = np.repeat(np.arange(LAYERS), WIDTH)
    return Changes(
        squares, between, np.full(GROUPS, float(TOKENS)), layers, np.sqrt((before**2).mean((0, 1)))
    )


@pytest.fixture(scope="module")
def activations():
    """Safety moves neurons 0-9 up, helpful the same ones down and 10-14 as well, control 60-69.

    Every neuron moves a little.
    """
    random = np.random.default_rng(0)
    before = random.normal(size=(GROUPS, TOKENS, LAYERS * WIDTH)) * random.uniform(0.5, 2, LAYERS * WIDTH)
    after = {}
    for name, places, step in (
        ("safety", range(10), 3.0),
        ("helpful", range(15), -3.0),
        ("control", range(60, 70), 3.0),
    ):
        moved = before + 0.2 * random.normal(size=before.shape)
        moved[:, :, list(places)] += step
        after[name] = moved
    return before, after


@pytest.fixture(scope="module")
def found(activations):
    return relations(changes_of(*activations), top=10 / (LAYERS * WIDTH))


def test_every_pair_is_compared_in_order(found):
    assert [(each.first, each.second) for each in found] == [
        ("safety", "helpful"),
        ("safety", "control"),
        ("helpful", "control"),
    ]


def test_planted_overlap_is_found_and_an_unrelated_training_shares_nothing(found):
    both, other, _ = found
    assert both.overlap.value >= 6
    assert both.overlap.value > both.chance["in_activation"].expectation().high
    assert other.overlap.value == 0
    assert both.record()["chance"]["in_layers"]["p_at_least"] < 1e-3


def test_shared_neurons_that_are_moved_opposite_ways_are_seen_as_such(found, activations):
    before, after = activations
    shared = np.flatnonzero(
        top_neurons(changes_of(before, after).scores("safety"), 1 / 12)
        & top_neurons(changes_of(before, after).scores("helpful"), 1 / 12)
    )
    ours, theirs = ((after[name] - before)[:, :, shared].ravel() for name in ("safety", "helpful"))
    by_hand = ours @ theirs / np.sqrt((ours @ ours) * (theirs @ theirs))
    assert found[0].shared.cosine.value == pytest.approx(by_hand)
    assert found[0].shared.cosine.high < -0.9
    assert found[0].shared.opposed.value == 1.0
    gap = (after["safety"] - after["helpful"])[:, :, shared]
    assert found[0].shared.difference.value == pytest.approx(
        np.sqrt((gap**2).mean((0, 1)).sum() / (before[:, :, shared] ** 2).mean((0, 1)).sum())
    )
    assert abs(found[0].others.cosine.value) < 0.9


def test_the_top_set_is_what_a_selection_from_the_scores_takes():
    values = np.random.default_rng(1).integers(0, 9, 50).astype(float)
    scores = Scores({"layers.0.down": values[:20], "layers.1.down": values[20:]})
    for top in (0.02, 0.1, 0.33, 1.0):
        chosen = scores.top(top)
        mask = np.concatenate(
            [np.isin(np.arange(20), chosen["layers.0.down"]), np.isin(np.arange(30), chosen["layers.1.down"])]
        )
        assert np.array_equal(top_neurons(values, top), mask)


def test_chance_is_what_drawing_anew_within_strata_gives():
    random = np.random.default_rng(2)
    strata = np.repeat([0, 1, 2], [10, 30, 20])
    first, second = random.random(60) < 0.4, random.random(60) < np.array([0.8, 0.1, 0.4])[strata]
    exact = chance_overlap(first, second, strata)
    drawn = []
    for _ in range(4000):
        other = second.copy()
        for stratum in range(3):
            inside = np.flatnonzero(strata == stratum)
            other[inside] = second[random.permutation(inside)]
        drawn.append((first & other).sum())
    assert exact.mean == pytest.approx(np.mean(drawn), abs=0.15)
    assert exact.at_least(int(np.median(drawn)) + 2) == pytest.approx(
        np.mean(np.array(drawn) >= np.median(drawn) + 2), abs=0.03
    )


def test_bins_hold_equal_numbers_of_every_layer_ordered_by_activation():
    activation = np.random.default_rng(3).random(60)
    layers = np.repeat([0, 1], [40, 20])
    bins = activation_bins(activation, layers)
    assert np.bincount(bins).tolist() == [4] * 10 + [2] * 10
    for layer in (0, 1):
        inside = layers == layer
        assert (np.diff(bins[inside][np.argsort(activation[inside])]) >= 0).all()


def test_partial_correlation_is_that_of_the_residuals_of_ranks():
    random = np.random.default_rng(4)
    given = random.random(200)
    first, second = given + 0.3 * random.random(200), given + 0.3 * random.random(200)
    ranks = [stats.rankdata(values) for values in (first, second, given)]
    left = [side - np.polyval(np.polyfit(ranks[2], side, 1), ranks[2]) for side in ranks[:2]]
    assert partial_spearman(first, second, given) == pytest.approx(np.corrcoef(*left)[0, 1])
    assert abs(partial_spearman(first, second, given)) < 0.25 < 0.7 < stats.spearmanr(first, second)[0]
    assert partial_spearman(given, given, np.ones(200)) is None


def test_scores_that_only_follow_activation_overlap_by_chance_and_no_more():
    random = np.random.default_rng(5)
    size = random.lognormal(sigma=1.0, size=LAYERS * WIDTH)
    before = random.normal(size=(GROUPS, TOKENS, LAYERS * WIDTH)) * size
    after = {name: before * (1 + 0.1 * random.normal(size=LAYERS * WIDTH)) for name in ("one", "other")}
    (pair,) = relations(changes_of(before, after), top=0.2)
    assert pair.overlap.value > pair.chance["all"].expectation().high
    assert pair.overlap.value <= pair.chance["in_activation"].expectation().high
    assert pair.spearman_given_activation < pair.spearman_all["value"]


def test_intervals_hold_their_numbers_and_none_is_without_width(found):
    for each in found:
        record = each.record()
        for name in ("all", "union", "given_activation"):
            low, high = record["spearman"][name]["interval"]
            assert low <= high
        assert each.overlap.low <= each.overlap.value <= each.overlap.high
    values = np.random.default_rng(6).random((1, 20)).repeat(4, 0)
    same = Changes(
        {"a": values, "b": values**2}, {("a", "b"): values}, np.ones(4), np.zeros(20, int), np.ones(20)
    )
    (pair,) = relations(same, top=0.2)
    assert pair.overlap.low < pair.overlap.value <= pair.overlap.high
    assert pair.intervals["all"] == (None, None)
    for moved in (pair.others, *(each.shared for each in found if each.shared)):
        for number in (moved.cosine, moved.opposed, moved.difference):
            assert number.low is None or number.low < number.high, number
    assert found[0].shared.opposed.value == 1.0 > found[0].shared.opposed.low


def test_directions_of_models_that_did_not_move_are_undefined():
    nothing = np.zeros((3, 5))
    still = Changes(
        {"a": nothing, "b": nothing}, {("a", "b"): nothing}, np.ones(3), np.zeros(5, int), np.ones(5)
    )
    found = directions(still, "a", "b", np.ones(5, bool), np.zeros((4, 3), int))
    assert found.cosine.value is None
    assert found.opposed.why
    assert found.difference.value == 0


def test_one_group_of_prompts_is_refused():
    values = np.ones((1, 4))
    with pytest.raises(InputError, match="two groups"):
        relations(
            Changes(
                {"a": values, "b": values}, {("a", "b"): values}, np.ones(1), np.zeros(4, int), np.ones(4)
            )
        )
