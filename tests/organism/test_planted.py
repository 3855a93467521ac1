import dataclasses

import pytest
import torch
from torch.func import functional_call

from safety_neurons.organism.language import Recipe
from safety_neurons.organism.planted import (
    choose_units,
    neurons_of,
    output_columns,
    shapley,
    silencer,
    train_planted,
)
from safety_neurons.organism.training import make_model

RECIPE = Recipe(
    "micro",
    "planted",
    "",
    layers=2,
    hidden=16,
    d_ff=16,
    heads=4,
    kv_heads=2,
    batch=4,
    plant_steps=2,
    planted_depth=2,
    planted_mlp=6,
    planted_attention=2,
)
IDS = torch.tensor([[1, 5, 40, 41, 42, 6]])


def trained(*, alive):
    recipe = dataclasses.replace(RECIPE, alive=alive)
    base = make_model(recipe, 0)
    if not alive:
        planted, decoys = choose_units(recipe, 0)
        silencer(base, planted + decoys, recipe)()
    return train_planted(recipe, 0, base)


@pytest.fixture(scope="module")
def silent():
    return trained(alive=False)


@pytest.fixture(scope="module")
def alive():
    return trained(alive=True)


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def test_deactivating_silent_units_gives_the_control_bit_for_bit(silent):
    weights = dict(silent.aligned.named_parameters())
    for unit in silent.planted:
        for site, name, indices in unit.rows(silent.recipe):
            weight = weights[name].detach().clone()
            weight[(slice(None), indices) if site in ("o", "down") else indices] = 0
            weights[name] = weight
    with torch.no_grad():
        treated = functional_call(silent.aligned, weights, args=(), kwargs={"input_ids": IDS}).logits
    assert torch.equal(treated, logits(silent.control))
    assert not torch.equal(logits(silent.aligned), logits(silent.control))


def test_restoring_the_base_rows_of_living_units_gives_the_control_bit_for_bit(alive):
    base, control = dict(alive.base.named_parameters()), dict(alive.control.named_parameters())
    weights = {name: value.detach().clone() for name, value in alive.aligned.named_parameters()}
    for unit in alive.planted:
        for site, name, indices in unit.rows(alive.recipe):
            place = (slice(None), indices) if site in ("o", "down") else indices
            weights[name][place] = base[name].detach()[place]
    assert all(torch.equal(weights[name], control[name]) for name in weights)


def test_living_units_work_in_the_base(alive):
    weights = dict(alive.base.named_parameters())
    assert all(
        weights[name][:, indices].any()
        for name, indices in output_columns(alive.planted, alive.recipe).items()
    )


def test_some_of_the_units_give_a_model_in_between(silent):
    none = torch.zeros(len(silent.planted))
    weights = silent.weights_with(none)
    control = dict(silent.control.named_parameters())
    assert all(torch.equal(value, control[name]) for name, value in weights.items())
    every = silent.weights_with(torch.ones(len(silent.planted)))
    aligned = dict(silent.aligned.named_parameters())
    assert all(torch.equal(value, aligned[name]) for name, value in every.items())


def test_planted_units_and_decoys_are_as_many_in_every_layer_and_part():
    planted, decoys = choose_units(RECIPE, 7)
    assert [(unit.layer, unit.part) for unit in planted] == [(unit.layer, unit.part) for unit in decoys]
    assert not {(unit.layer, unit.part, unit.index) for unit in planted} & {
        (unit.layer, unit.part, unit.index) for unit in decoys
    }
    assert {unit.owner for unit in planted} == {"all", "en", "de", "es"}


def test_an_attention_unit_is_a_value_row_and_the_columns_it_feeds():
    unit = next(unit for unit in choose_units(RECIPE, 0)[0] if unit.part == "attention")
    group, offset = divmod(unit.index, 4)
    neurons = neurons_of([unit], RECIPE)
    assert neurons[f"layers.{unit.layer}.v"] == [unit.index]
    assert neurons[f"layers.{unit.layer}.o"] == [(2 * group) * 4 + offset, (2 * group + 1) * 4 + offset]


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
