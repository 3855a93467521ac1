import pytest
from twins import model

from safety_neurons.detectors import find_random
from safety_neurons.errors import UsageError
from safety_neurons.neurons import NeuronSet


def test_a_random_set_matches_counts_is_disjoint_and_seeded():
    table = model(0).table
    like = NeuronSet({"layers.0.down": range(10), "layers.1.q": [1, 2]}, table)
    one, same, other = (find_random(table, like=like, seed=seed) for seed in (3, 3, 4))
    assert one.neurons.counts() == like.counts()
    assert not len(one.neurons & like)
    assert one.neurons == same.neurons != other.neurons
    assert one.scores.count(len(like)) == one.neurons
    crowded = find_random(table, like=NeuronSet({"layers.0.down": range(40)}, table))
    assert "not disjoint" in crowded.notes[0]


def test_a_random_set_of_a_share_has_that_size_and_takes_no_selection_beside_a_set():
    table = model(0).table
    found = find_random(table, sites=("down",), top=0.25, seed=1)
    assert len(found.neurons) == 24
    assert set(found.scores.keys()) == {"layers.0.down", "layers.1.down"}
    with pytest.raises(UsageError, match="leave the selection out"):
        find_random(table, like=found.neurons, top=0.1)
    with pytest.raises(UsageError, match="no prompts to agree"):
        find_random(table, top=0.1, agreement=0.5)
