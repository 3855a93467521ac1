"""Learning rates and their schedule."""

import math

import pytest

from safety_neurons.errors import UsageError
from safety_neurons.model import LanguageModel
from safety_neurons.neurons import NeuronSet
from safety_neurons.tuning.train import SHARE, factor, learning_rates
from tiny import tiny_llama


def test_the_automatic_rate_is_relative_to_the_weights():
    model = LanguageModel(tiny_llama())
    neurons = NeuronSet({"layers.0.q": [0, 1], "layers.1.down": [2]}, model.table)
    rates = learning_rates(model, neurons)
    for key, name in (("layers.0.q", "model.layers.0.self_attn.q_proj"), ("layers.1.down", "model.layers.1.mlp.down_proj")):
        rms = float(model.inner.get_submodule(name).weight.detach().square().mean().sqrt())
        assert rates[key] == pytest.approx(SHARE * rms / math.sqrt(32), rel=1e-5)


@pytest.mark.parametrize(("rms", "width", "low", "high"), [(0.015, 4096, 5e-5, 1e-4), (0.02, 896, 1e-4, 3e-4), (0.1, 64, 2e-3, 6e-3)])
def test_the_automatic_rate_is_what_people_use_at_every_size(rms, width, low, high):
    assert low < SHARE * rms / math.sqrt(width) < high


@pytest.mark.parametrize("rate", [0.0, -1e-3, math.nan, math.inf, "fast"])
def test_a_rate_that_trains_nothing_is_refused(rate):
    model = LanguageModel(tiny_llama())
    with pytest.raises(UsageError, match="expected auto or a number above 0"):
        learning_rates(model, NeuronSet({"layers.0.q": [0]}, model.table), rate)


@pytest.mark.parametrize("warmup", [0.0, 0.05, 0.5, 1.0])
@pytest.mark.parametrize("steps", [1, 2, 3, 7, 40])
def test_no_step_of_any_schedule_has_a_rate_of_zero(steps, warmup):
    shares = [factor(step, steps, warmup) for step in range(steps)]
    assert min(shares) > 0
    assert max(shares) <= 1
    assert shares[max(1, round(warmup * steps)) - 1] == 1


def test_the_rate_rises_and_falls_in_straight_lines():
    assert [factor(step, 10, 0.2) for step in range(10)] == pytest.approx([0.5, 1, *(1 - 0.9 * k / 8 for k in range(1, 9))])


def test_the_published_recipe_would_move_something_here():
    assert factor(0, 1, 0.05) == 1
