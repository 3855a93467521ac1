"""overlap: counted by brute force, expectations held against simulated sets, agreement told from agreement on places."""

import itertools

import numpy as np
import pytest
import scipy.stats
from analysed_sets import random_scores, random_set, small_table

from safety_neurons import organism
from safety_neurons.analysis import Named, name_sets, overlap
from safety_neurons.analysis.chance import simulated
from safety_neurons.errors import NeuronError
from safety_neurons.neurons import NeuronSet

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
        like = {key: generator.choice(TABLE.sizes[key], len(indices), replace=False) for key, indices in second.items()}
        matched.append(_jaccard(set(first), set(NeuronSet(like, TABLE))))
        drawn = generator.choice(len(everything), len(second), replace=False)
        anywhere.append(_jaccard(set(first), {everything[place] for place in drawn}))
    for record, draws in ((found["jaccard"], anywhere), (found["jaccard"]["matched"], matched)):
        assert record["expected"] == pytest.approx(np.mean(draws), abs=0.01)
        assert (record["low"], record["high"]) == pytest.approx(tuple(np.quantile(draws, (0.025, 0.975))), abs=0.03)


def _jaccard(one, other):
    return len(one & other) / len(one | other)


def test_agreeing_on_a_layer_is_more_than_chance_but_not_more_than_matched():
    generator = np.random.default_rng(5)
    sets = [NeuronSet({"layers.0.down": generator.choice(12, 6, replace=False), "layers.0.up": [seed]}, TABLE) for seed in range(2)]
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
    return overlap([Named(name, part.count(20), part) for name, part in zip("ab", scores, strict=True)]), scores


def test_spearman_is_that_of_scipy_over_both_index_sets(ranked):
    found, scores = only(ranked[0]), ranked[1]
    flat = [np.concatenate([values for _, values in part.items()]) for part in scores]
    assert found["spearman"]["value"] == pytest.approx(scipy.stats.spearmanr(*flat).statistic)
    masks = [np.concatenate([part.count(20).mask(key) for key in TABLE.keys]) for part in scores]
    union = masks[0] | masks[1]
    assert found["spearman_union"]["n"] == union.sum()
    assert found["spearman_union"]["value"] == pytest.approx(scipy.stats.spearmanr(flat[0][union], flat[1][union]).statistic)


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
        type(random_scores(TABLE, 0))({key: level[key] + generator.normal(size=size) for key, size in TABLE.sizes.items()}, TABLE)
        for _ in range(2)
    ]
    found = only(overlap([Named(name, part.count(20), part) for name, part in zip("ab", scores, strict=True)]))["spearman"]
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
    assert found["mean_jaccard"] == {"value": pytest.approx(np.mean(values)), "lowest": min(values), "highest": max(values), "n_pairs": 3}


def test_the_planted_truth_of_two_languages_is_shared_beyond_chance_and_the_decoys_are_not():
    files = {name: organism.spec(f"planted/{name}") for name in ("truth", "truth-de", "decoys")}
    found = overlap(name_sets((name, NeuronSet.load(file)) for name, file in files.items())).record()
    languages, decoys, _ = found["pairs"]
    assert languages["jaccard"]["verdict"] == languages["jaccard"]["matched"]["verdict"] == "more"
    assert decoys["shared"]["value"] == 0
    units = organism.open("planted").record["truth"]["units"]
    works = [{number for number, unit in enumerate(units) if unit["shares"][code] >= 0.01} for code in ("en", "de")]
    assert languages["units"]["shared"]["value"] == len(works[0] & works[1])
