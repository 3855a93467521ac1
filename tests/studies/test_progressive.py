"""progressive: the sets that are off at every step, their numbers measured again by hand, bands over random
orders.
"""

import dataclasses

import numpy as np
import pytest

from conforming import misfits
from safety_neurons import load, organism
from safety_neurons.capability import divergence, perplexity
from safety_neurons.errors import NeuronError
from safety_neurons.interventions import deactivated
from safety_neurons.model import load_pair
from safety_neurons.neurons import NeuronSet, Scores
from safety_neurons.prompt_lists import Prompts
from safety_neurons.results import rate
from safety_neurons.results.measured import ProgressiveRecord
from safety_neurons.studies import progressive
from safety_neurons.studies.verification import ladder, layer_blocks
from tiny_pair import GENERAL, HARMFUL, HARMLESS

OPTIONS = {"max_new_tokens": 3, "batch_size": 6}


@pytest.fixture(scope="module")
def model(tiny_pair):
    return load_pair(tiny_pair.base, tiny_pair.aligned).aligned


@pytest.fixture(scope="module")
def scores(model):
    generator = np.random.default_rng(0)
    sizes = model.table.select(sites=["down", "o"]).sizes
    return Scores({key: generator.normal(size=size) for key, size in sizes.items()}, model.table)


@pytest.fixture(scope="module")
def prompts():
    return Prompts.from_list(HARMFUL[:4]), Prompts.from_list(HARMLESS[:4])


@pytest.fixture(scope="module")
def by_layer(model, scores, prompts):
    return progressive(
        model, scores.count(30), *prompts, text=Prompts.from_list(GENERAL), random=2, **OPTIONS
    )


def test_layers_are_switched_off_from_either_end_and_alone(by_layer, scores):
    neurons = scores.count(30)
    sizes = [len(neurons.only(layers=[layer])) for layer in (0, 1)]
    shape = {
        order: [(step.layers, step.n_neurons) for step in by_layer.curve(order)] for order in by_layer.orders
    }
    assert shape["front to back"] == [((0,), sizes[0]), ((0, 1), 30)]
    assert shape["back to front"] == [((1,), sizes[1]), ((0, 1), 30)]
    assert shape["one layer alone"] == [((0,), sizes[0]), ((1,), sizes[1])]
    assert shape["random neurons 0"] == shape["random neurons 1"] == shape["front to back"]
    last = [by_layer.curve(order)[-1].arm for order in ("front to back", "back to front")]
    assert last[0] == last[1]


def test_a_step_is_measured_while_exactly_its_neurons_are_off(by_layer, model, scores, prompts):
    step = by_layer.curve("back to front")[0]
    off = scores.count(30).only(layers=[1])

    def treated():
        return deactivated(model, off)

    assert step.arm.perplexity == pytest.approx(
        perplexity(model, Prompts.from_list(GENERAL), treated), rel=1e-6
    )
    assert step.arm.divergence == pytest.approx(divergence(model, prompts[1], treated), rel=1e-5)
    assert by_layer.untreated.perplexity == pytest.approx(
        perplexity(model, Prompts.from_list(GENERAL)), rel=1e-6
    )


def test_bands_are_over_random_sets_step_by_step(by_layer):
    record = by_layer.record()
    assert misfits(record, ProgressiveRecord) == []
    assert list(record["random"]) == ["random neurons"]
    band = record["random"]["random neurons"]
    for place, point in enumerate(band):
        steps = [by_layer.curve(f"random neurons {number}")[place] for number in range(2)]
        values = [step.arm.divergence for step in steps]
        assert (point["divergence"]["low"], point["divergence"]["high"]) == (min(values), max(values))
        assert point["divergence"]["value"] == pytest.approx(sum(values) / 2)
    assert [curve["order"] for curve in record["curves"]] == [
        "front to back",
        "back to front",
        "one layer alone",
    ]


def test_neurons_go_off_by_score(model, scores, prompts):
    found = progressive(model, scores.count(12), *prompts, scores=scores, random=1, points=3, **OPTIONS)
    assert [step.n_neurons for step in found.curve("by score")] == [5, 10, 12]
    ten = found.curve("by score")[1]
    off = scores.count(10)
    assert ten.arm.divergence == pytest.approx(
        divergence(model, prompts[1], lambda: deactivated(model, off)), rel=1e-5
    )
    assert [step.n_neurons for step in found.curve("random neurons 0")] == [5, 10, 12]


def test_only_members_of_the_set_go_off_by_score(model, scores, prompts):
    """A set that is not the top of the scores, as after `--subtract`."""
    best = scores.count(12)
    kept = best - scores.count(4)
    found = progressive(model, kept, *prompts, scores=scores, random=0, points=2, **OPTIONS)
    assert [step.n_neurons for step in found.curve("by score")] == [5, 8]
    off = scores.count(9) - scores.count(4)
    step = found.curve("by score")[0]
    assert step.arm.divergence == pytest.approx(
        divergence(model, prompts[1], lambda: deactivated(model, off)), rel=1e-5
    )
    assert found.curve("by score")[-1].arm == found.curve("front to back")[-1].arm


def test_steps_are_few_and_end_with_everything(model):
    assert ladder(100, 20) == [1, 2, 5, 10, 20, 50, 100]
    assert ladder(7, 3) == [2, 5, 7]
    assert ladder(1, 8) == [1]
    neurons = NeuronSet({f"layers.{layer}.down": [0] for layer in range(10)})
    assert layer_blocks(neurons, 4) == [[0, 1, 2], [3, 4, 5], [6, 7], [8, 9]]
    assert layer_blocks(NeuronSet({"layers.3.q": [1], "layers.1.down": [0]}), 4) == [[1], [3]]
    with pytest.raises(NeuronError, match="empty"):
        progressive(
            model, NeuronSet({}, model.table), Prompts.from_list(["a"]), Prompts.from_list(["b"]), **OPTIONS
        )


def test_a_step_without_a_scored_answer_halves_nothing(by_layer):
    """What cannot be scored is no refusal that was lost."""
    whole = dataclasses.replace(by_layer.untreated, harmful_refused=rate([True] * 4))
    silent = dataclasses.replace(whole, harmful_refused=rate([None] * 4))
    halved = dataclasses.replace(whole, harmful_refused=rate([True, True, False, False]))
    steps = tuple(
        dataclasses.replace(step, arm=silent if len(step.layers) == 1 else halved) for step in by_layer.steps
    )
    found = dataclasses.replace(by_layer, untreated=whole, steps=steps)
    curves = {curve["order"]: curve["neurons_for_half"] for curve in found.record()["curves"]}
    assert curves == {"front to back": 30, "back to front": 30, "one layer alone": None}


def test_the_planted_units_stand_in_for_one_another_until_all_layers_are_off():
    model = load("organism:planted")
    truth = organism.open("planted").truth
    tests = model.prompts("builtin:harmful-test", limit=4), model.prompts("builtin:harmless-test", limit=1)
    found = progressive(model, truth, *tests, random=1, max_new_tokens=8)
    assert [step.layers for step in found.curve("one layer alone")] == [(0,), (1,), (2,)]
    assert all(step.arm.harmful_refused.value >= 0.75 for step in found.curve("one layer alone"))
    for order in ("front to back", "back to front", "random order of layers 0"):
        steps = found.curve(order)
        assert [len(step.layers) for step in steps] == [1, 2, 3]
        assert steps[-1].arm.harmful_refused.value == 0
    assert found.record()["curves"][0]["neurons_for_half"] <= len(truth)
    assert max(found.record()["random"]["random neurons"][-1]["n_neurons"]) == len(truth)
    assert found.record()["random"]["random neurons"][-1]["harmful_refused"]["value"] >= 0.5
