import pytest

from safety_neurons.organism.truth import shapley


def test_shapley_values_of_an_additive_game_are_its_weights():
    values = shapley(4, lambda members: [float(sum(members))], orders=2, seed=0)
    assert values[0] == pytest.approx([0, 1, 2, 3])


def test_two_players_who_need_one_another_share_alike():
    values = shapley(3, lambda members: [float({0, 1} <= set(members))], orders=40, seed=0)
    assert values[0] == pytest.approx([0.5, 0.5, 0.0])


def test_shares_of_every_game_sum_to_what_all_players_gain():
    values = shapley(5, lambda members: [len(members) ** 2, float(4 in members)], orders=6, seed=1)
    assert sum(values[0]) == pytest.approx(25)
    assert values[1] == pytest.approx([0, 0, 0, 0, 1])
