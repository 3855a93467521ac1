import pytest

from safety_neurons.errors import InputError
from safety_neurons.organism import recipe, recipes
from safety_neurons.organism.train import make_model


def test_every_recipe_has_five_seeds_and_says_what_it_is_for():
    for item in recipes().values():
        assert len(item.seeds) >= 5
        assert item.about


def test_parameters_are_counted_as_the_model_has_them():
    item = recipe("planted")
    assert item.n_parameters == sum(parameter.numel() for parameter in make_model(item, 0).parameters())


def test_planted_recipes_cover_silent_and_alive_attention_and_feed_forward():
    planted = [item for item in recipes().values() if item.kind == "planted"]
    assert {item.alive for item in planted} == {True, False}
    assert any(item.planted_mlp == 0 for item in planted)
    assert any(item.planted_attention == 0 for item in planted)
    assert len({item.layers for item in planted}) > 1
    assert len({item.d_ff for item in planted}) > 1


def test_an_unknown_recipe_is_refused_with_those_there_are():
    with pytest.raises(InputError, match="natural"):
        recipe("nobody")
