"""Relations of trainings: held to algebra on made-up activations, to simulated draws, and to a planted truth."""

import numpy as np
import pytest
from scipy import stats

from safety_neurons.analysis.overlap import Changes, activation_bins, chance_overlap, directions, partial_spearman, relations, top_neurons
from safety_neurons.errors import InputError
from safety_neurons.neurons import Scores

GROUPS, TOKENS, LAYERS, WIDTH = 6, 40, 2, 60


def changes_of(before, after):
    """Sums over tokens from whole activations [group, token, neuron]."""
    names = list(after)
    pairs = [(a, b) for place, a in enumerate(names) for b in names[place + 1 :]]
    squares = {name: ((values - before) ** 2).sum(1) for name, values in after.items()}
    between = {(a, b): ((after[a] - after[b]) ** 2).sum(1) for a, b in pairs}
    layers = np.repeat(np.arange(LAYERS), WIDTH)
    return Changes(squares, between, np.full(GROUPS, float(TOKENS)), layers, np.sqrt((before**2).mean((0, 1))))


@pytest.fixture(scope="module")
def activations():
    """Safety moves neurons 0-9 up, helpful the same ones down and 10-14 as well, control 60-69; every neuron moves a little."""
    random = np.random.default_rng(0)
    before = random.normal(size=(GROUPS, TOKENS, LAYERS * WIDTH)) * random.uniform(0.5, 2, LAYERS * WIDTH)
    after = {}
    for name, places, step in (("safety", range(10), 3.0), ("helpful", range(15), -3.0), ("control", range(60, 70), 3.0)):
        moved = before + 0.2 * random.normal(size=before.shape)
        moved[:, :, list(places)] += step
        after[name] = moved
    return before, after


@pytest.fixture(scope="module")
def found(activations):
    return relations(changes_of(*activations), top=10 / (LAYERS * WIDTH))


def test_every_pair_is_compared_in_order(found):
    assert [(each.first, each.second) for each in found] == [("safety", "helpful"), ("safety", "control"), ("helpful", "control")]


def test_planted_overlap_is_found_and_an_unrelated_training_shares_nothing(found):
    both, other, _ = found
    assert both.overlap.value >= 6
    assert both.overlap.value > both.chance["in_activation"].expectation().high
    assert other.overlap.value == 0
    assert both.record()["chance"]["in_layers"]["p_at_least"] < 1e-3


def test_shared_neurons_that_are_moved_opposite_ways_are_seen_as_such(found, activations):
    before, after = activations
    shared = np.flatnonzero(
        top_neurons(changes_of(before, after).scores("safety"), 1 / 12) & top_neurons(changes_of(before, after).scores("helpful"), 1 / 12)
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
        mask = np.concatenate([np.isin(np.arange(20), chosen["layers.0.down"]), np.isin(np.arange(30), chosen["layers.1.down"])])
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
    assert exact.at_least(int(np.median(drawn)) + 2) == pytest.approx(np.mean(np.array(drawn) >= np.median(drawn) + 2), abs=0.03)


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
    same = Changes({"a": values, "b": values**2}, {("a", "b"): values}, np.ones(4), np.zeros(20, int), np.ones(20))
    (pair,) = relations(same, top=0.2)
    assert pair.overlap.low < pair.overlap.value <= pair.overlap.high
    assert pair.intervals["all"] == (None, None)
    for moved in (pair.others, *(each.shared for each in found if each.shared)):
        for number in (moved.cosine, moved.opposed, moved.difference):
            assert number.low is None or number.low < number.high, number
    assert found[0].shared.opposed.value == 1.0 > found[0].shared.opposed.low


def test_directions_of_models_that_did_not_move_are_undefined():
    nothing = np.zeros((3, 5))
    still = Changes({"a": nothing, "b": nothing}, {("a", "b"): nothing}, np.ones(3), np.zeros(5, int), np.ones(5))
    found = directions(still, "a", "b", np.ones(5, bool), np.zeros((4, 3), int))
    assert found.cosine.value is None
    assert found.opposed.why
    assert found.difference.value == 0


def test_one_group_of_prompts_is_refused():
    values = np.ones((1, 4))
    with pytest.raises(InputError, match="two groups"):
        relations(Changes({"a": values, "b": values}, {("a", "b"): values}, np.ones(1), np.zeros(4, int), np.ones(4)))
