"""layers: every share recounted by hand, chance held against random sets, planted places found as such."""

import numpy as np
import pytest
from analysed_sets import random_scores, random_set, small_table

from safety_neurons import organism
from safety_neurons.analysis import Named, layers, name_sets
from safety_neurons.neurons import ATTENTION_SITES, NeuronSet, Provenance, parse_key

TABLE = small_table()


def records(group):
    return {place.name: place.record() for place in group}


def test_members_shares_and_parameters_are_those_of_the_set():
    neurons = random_set(TABLE, 0.3, seed=1)
    found = layers(*name_sets([("set", neurons)]))
    for group in (found.by_layer, found.by_site, found.by_part, found.by_matrix):
        assert sum(place.members for place in group) == len(neurons)
        assert sum(place.candidates for place in group) == TABLE.n_neurons
        assert sum(place.parameters for place in group) == neurons.n_parameters
        assert sum(place.record()["share_of_parameters"] for place in group) == pytest.approx(
            neurons.share_of_parameters
        )
        assert sum(place.record()["share_of_set"] for place in group) == pytest.approx(1)
        assert sum(place.record()["expected"] for place in group) == pytest.approx(len(neurons))
    matrix = records(found.by_matrix)["layers.1.up"]
    assert matrix["members"] == len(neurons["layers.1.up"])
    assert matrix["share_of_population"] == len(neurons["layers.1.up"]) / 12
    assert matrix["enrichment"] == pytest.approx(matrix["members"] / (12 / TABLE.n_neurons * len(neurons)))
    assert [place.name for place in found.by_site] == ["q", "k", "v", "o", "gate", "up", "down"]


def test_random_sets_are_as_chance_in_nineteen_of_twenty_places():
    verdicts = []
    for seed in range(30):
        found = layers(*name_sets([("set", random_set(TABLE, 0.4, seed))]))
        verdicts += [place.record()["verdict"] for place in (*found.by_layer, *found.by_site)]
        verdicts.append(found.depth["verdict"])
    outside = 1 - verdicts.count("as chance") / len(verdicts)
    assert 0.005 < outside < 0.07


def test_heads_are_held_against_their_own_matrix():
    neurons = NeuronSet({"layers.2.q": [4, 5, 6, 7], "layers.0.o": [0, 4], "layers.1.down": [3]}, TABLE)
    found = records(layers(*name_sets([("set", neurons)])).by_head)
    assert set(found) == {"layers.0.o head 0", "layers.0.o head 1", "layers.2.q head 0", "layers.2.q head 1"}
    assert found["layers.2.q head 1"]["members"] == 4
    assert found["layers.2.q head 1"]["expected"] == pytest.approx(2)
    assert found["layers.2.q head 1"]["share_of_set"] == 1


def test_the_claims_hold_for_a_set_that_was_made_to_have_them_and_not_for_its_opposite():
    early = NeuronSet({"layers.0.q": range(6), "layers.0.v": range(3), "layers.1.o": [1]}, TABLE)
    late = NeuronSet({"layers.2.down": range(9), "layers.2.up": [1]}, TABLE)
    answers = {
        item.name: {claim["claim"]: claim["holds"] for claim in layers(item).claims}
        for item in name_sets([("early", early), ("late", late)])
    }
    assert answers["early"] == {
        "less than 1 % of all parameters": False,
        "mostly in self-attention": True,
        "in the first third of the layers": True,
        "in the last third of the layers": False,
        "nearer to the first layer than a random set": True,
    }
    assert {name: holds for name, holds in answers["late"].items() if holds} == {
        "in the last third of the layers": True
    }
    shares = {claim["claim"]: claim["value"] for claim in layers(*name_sets([("early", early)])).claims}
    assert shares["mostly in self-attention"] == 1
    assert shares["in the first third of the layers"] == 0.9
    assert shares["less than 1 % of all parameters"] == 10 * 8 / 5000


def test_a_search_of_one_site_has_its_own_population_and_no_answer_on_attention():
    neurons = random_set(TABLE, 0.5, seed=3, sites=("down",))
    found = layers(*name_sets([("set", neurons)]))
    assert [place.candidates for place in found.by_layer] == [12, 12, 12]
    attention = next(claim for claim in found.claims if claim["claim"] == "mostly in self-attention")
    assert (attention["holds"], attention["value"]) == (None, None)
    assert "only feed-forward" in attention["note"]


def test_ranks_and_skewness_are_those_of_the_scores():
    scores = random_scores(TABLE, seed=4)
    found = layers(Named("set", scores.count(10), scores))
    pairs = [(key, value) for key, values in scores.items() for value in values.tolist()]
    ordered = [key for key, _ in sorted(pairs, key=lambda pair: -pair[1])]
    for block, row in enumerate(found.ranks):
        keys = [parse_key(key) for key in ordered[10 * block : 10 * block + 10]]
        assert row["ranks"] == [10 * block + 1, 10 * block + 10]
        assert row["mean_depth"] == pytest.approx(sum(key.layer for key in keys) / 10 / 2)
        assert row["share_of_self_attention"] == pytest.approx(
            sum(key.site in ATTENTION_SITES for key in keys) / 10
        )
    values = np.array([value for _, value in pairs])
    assert found.skewness == pytest.approx(((values - values.mean()) ** 3).mean() / values.std() ** 3)


def test_the_record_is_json_with_what_a_report_needs():
    provenance = Provenance(
        "neurons", "contrast", ("base", "aligned"), TABLE.fingerprint, config={"sites": ["down"]}
    )
    record = layers(Named("one", NeuronSet({"layers.0.down": [1]}, TABLE, provenance))).record()
    assert record["name"] == "one"
    assert record["models"] == ["base", "aligned"]
    assert (record["n_neurons"], record["n_candidates"]) == (1, 36)
    assert record.keys() >= {
        "by_layer",
        "by_site",
        "by_part",
        "by_matrix",
        "by_head",
        "depth",
        "ranks",
        "skewness",
        "claims",
    }
    assert record["by_layer"][0].keys() >= {
        "layer",
        "members",
        "candidates",
        "expected",
        "low",
        "high",
        "verdict",
        "enrichment",
    }


def test_the_planted_truth_is_found_to_lie_where_it_was_planted():
    planted = organism.open("planted")
    found = layers(*name_sets([("truth", planted.truth)]))
    depth = planted.record["recipe"]["planted_depth"]
    assert [place.members for place in found.by_layer[depth:]] == [0] * (4 - depth)
    answers = {claim["claim"]: claim["holds"] for claim in found.claims}
    assert answers["nearer to the first layer than a random set"]
    assert answers["in the first third of the layers"]
    assert not answers["in the last third of the layers"]


def test_what_could_not_have_been_otherwise_is_no_answer():
    def answers(layers_of_search, members):
        provenance = Provenance("neurons", "drawn", config={"layers": layers_of_search})
        found = layers(Named("set", NeuronSet(members, TABLE, provenance)))
        return {claim["claim"]: (claim["holds"], claim["note"]) for claim in found.claims}

    last = answers("2:3", {"layers.2.down": [0, 1], "layers.2.q": [0]})
    assert last["in the first third of the layers"] == (None, "none of it was searched")
    assert last["in the last third of the layers"] == (None, "nothing else was searched")
    assert last["nearer to the first layer than a random set"] == (None, "only layer 2 was searched")
    assert last["mostly in self-attention"][0] is False
    assert (
        answers("1:3", {"layers.2.down": [0, 1, 2, 3, 4, 5, 6]})["in the last third of the layers"][0] is True
    )
    assert set(answers(None, {}).values()) == {(None, "the set is empty")}
