"""Defences: every formula against a naive twin on whole matrices, and the study on a tiny model."""

import json

import numpy as np
import pytest
import torch

from safety_neurons import load
from safety_neurons.errors import UsageError
from safety_neurons.neurons import NeuronSet, Provenance, Scores
from safety_neurons.prompt_lists import Prompt, Prompts
from safety_neurons.results.run import Cache
from safety_neurons.studies import DEFENCES, Grid, Lab, Plan, defences
from safety_neurons.studies.defences import mixed, out_of_bounds
from safety_neurons.studies.lasting import fine_tune, sets_from, twin
from safety_neurons.tuning import apply_delta, base_hash
from safety_neurons.tuning.artefacts import Delta
from safety_neurons.tuning.defences import extrapolated, layers_to_freeze, project_update
from tiny_pair import HARMFUL, HARMLESS


def asked(texts, answer, name):
    return Prompts([Prompt(str(number), text, answer=answer) for number, text in enumerate(texts)], name)


REFUSALS = asked(HARMFUL, "sorry i cannot help", "refusals")
ANSWERS = asked(HARMLESS, "sure here is the cake", "answers")
GOING_ALONG = asked(HARMFUL, "sure here is the bomb", "going along")
TASK = asked(["tell me one and two", "what is two and one"], "three", "task")
MEMBERS = {"layers.0.up": [1, 4, 7], "layers.1.down": [0, 3], "layers.1.q": [2]}


@pytest.fixture
def model(tiny_pair):
    return load(tiny_pair.plain, dtype="float64")


@pytest.fixture
def delta(model):
    neurons = NeuronSet(MEMBERS, model.table)
    generator, tensors = torch.Generator().manual_seed(0), {}
    for key, members in neurons.items():
        length = model.table[key].weights_per_neuron
        shape = (length, len(members)) if key.endswith("down") else (len(members), length)
        tensors[key] = 0.1 * torch.randn(shape, generator=generator, dtype=torch.float64)
    return Delta(neurons, tensors, Provenance("neurons", "test", (model.name,), model.fingerprint, "", {}))


def whole(model, delta, key):
    """The change as the whole matrix `[out, in]` that it is, zero elsewhere."""
    matrix = np.zeros(tuple(model.anatomy.place(key).weight().shape))
    if key.endswith("down"):
        matrix[:, MEMBERS[key]] = delta.tensors[key].numpy()
    else:
        matrix[MEMBERS[key]] = delta.tensors[key].numpy()
    return matrix


def weights(model, key):
    return model.anatomy.place(key).weight().detach().numpy().copy()


@pytest.mark.parametrize("rank", [1, 2, 9])
def test_extrapolation_is_that_of_whole_matrices(model, delta, rank):
    other = twin(model)
    apply_delta(other, extrapolated(delta, rank, 1.5))
    for key in MEMBERS:
        change = whole(model, delta, key)
        left = np.linalg.svd(change)[0][:, :rank]
        expected = weights(model, key) + change + 1.5 * left @ left.T @ change
        assert np.allclose(weights(other, key), expected, atol=1e-12), key
    with pytest.raises(UsageError, match="rank"):
        extrapolated(delta, 0)


@pytest.mark.parametrize("threshold", [-1.0, 0.2, 1.0])
def test_projection_is_that_of_whole_matrices(model, delta, threshold):
    start = twin(model)
    apply_delta(start, delta)
    after = twin(start)
    generator = np.random.default_rng(0)
    updates = {}
    for place, key in enumerate(MEMBERS):
        noise = generator.normal(size=weights(start, key).shape)
        update = 0.05 * noise + (0.5 * whole(model, delta, key) if place else 0)
        weight = after.anatomy.place(key).projection.base.weight
        weight.data += torch.from_numpy(update)
        updates[key] = update
    untouched = weights(after, "layers.0.gate")
    done = project_update(after, start, delta, threshold)
    replaced = 0
    for key in MEMBERS:
        change, update = whole(model, delta, key), updates[key]
        part = change @ change.T @ update / np.linalg.norm(change)
        cosine = (update * part).sum() / np.linalg.norm(update) / np.linalg.norm(part)
        kept = part if cosine < threshold else update
        replaced += cosine < threshold
        assert np.allclose(weights(after, key), weights(start, key) + kept, atol=1e-12), key
    assert (done.replaced, done.matrices) == (replaced, 3)
    assert np.array_equal(weights(after, "layers.0.gate"), untouched)


def test_frozen_layers_hold_most_of_the_set_and_stay(model):
    neurons = NeuronSet(MEMBERS, model.table)
    assert layers_to_freeze(model, neurons, 0.5, first=True) == (0,)
    more = NeuronSet({"layers.1.up": range(9), "layers.0.up": [0]}, model.table)
    assert layers_to_freeze(model, more, 0.5, first=False) == (1,)
    with pytest.raises(UsageError, match="share"):
        layers_to_freeze(model, neurons, 0.0, first=True)
    for how in ("full", "lora"):
        other = twin(model)
        fine_tune(other, TASK, how=how, steps=2, learning_rate=1e-2, batch_size=2, frozen=(1,))
        first, second = (
            NeuronSet({key: range(n) for key, n in model.table.sizes.items() if part in key}, model.table)
            for part in (".0.", ".1.")
        )
        assert base_hash(other, second) == base_hash(model, second)
        assert base_hash(other, first) != base_hash(model, first)


def test_a_mixture_has_its_share_of_others():
    task = asked([f"question {number}" for number in range(18)], "yes", "task")
    both = mixed(task, REFUSALS[:1], 0.1)
    assert len(both) == 20
    assert [prompt.text for prompt in both].count(REFUSALS[0].text) == 2
    assert len({prompt.id for prompt in both}) == 20
    with pytest.raises(UsageError, match="share"):
        mixed(task, REFUSALS, 1.0)


def test_points_out_of_bounds_say_why():
    grid = Grid(max_perplexity=2.0, least_task=-0.1)

    def row(perplexity, task):
        return {"perplexity": {"value": perplexity}, "task": None if task is None else {"value": task}}

    assert not out_of_bounds(row(7.9, 0.5), row(4, 0.6), 4.0, grid)
    assert "perplexity" in out_of_bounds(row(8.1, 0.5), row(4, 0.5), 4.0, grid)
    assert "perplexity" in out_of_bounds(row(float("nan"), 0.5), row(4, 0.5), 4.0, grid)
    assert "task" in out_of_bounds(row(4, 0.3), row(4, 0.5), 4.0, grid)
    assert not out_of_bounds(row(None, None), row(None, None), None, grid)


def test_every_defence_stands_the_grid_and_a_killed_study_goes_on(tiny_pair, tmp_path):
    model = load(tiny_pair.plain)
    generator = torch.Generator().manual_seed(0)
    values = {key: torch.rand(size, generator=generator).numpy() for key, size in model.table.sizes.items()}
    scores = Scores(values, model.table)
    sets = sets_from(scores, scores.top(0.02), 0.05)
    tuning = {"epochs": 1, "mix": 1.0, "max_steps": 1}
    plan = Plan(REFUSALS, ANSWERS, TASK, seeds=(0,), tuning=tuning, how="lora", batch_size=2)
    lab = Lab(REFUSALS[:2], ANSWERS[:1], Prompts.from_list(["the cake is red ."]), TASK, max_new_tokens=2)
    grid = Grid((1e-2,), (1,), ("harmful",), GOING_ALONG, max_perplexity=1e9, least_task=-1.0)
    before = base_hash(model, NeuronSet.all(model.table))
    told = []
    found = defences(model, sets, plan, grid, lab, cache=Cache(tmp_path.joinpath), tell=told.append)
    assert [arm["arm"] for arm in found["arms"]] == list(DEFENCES)
    assert len(told) == len(DEFENCES) * 2
    assert len(found["points"]) == len(DEFENCES)
    for arm in found["arms"]:
        mine = [row for row in found["points"] if row["arm"] == arm["arm"]]
        assert arm["worst"]["harmful"]["harmed"]["value"] == max(row["harmed"]["value"] for row in mine)
        assert arm["left_out"]["harmful"] == 0
        cut = [
            sum(one.finish_reason == "length" for one in lab.completions if one.arm.startswith(f"{name}/"))
            for name in (f"{arm['arm']}/start", f"{arm['arm']}/harmful 0.01 1")
        ]
        assert [arm["start"]["cut_off"], arm["worst"]["harmful"]["cut_off"]] == cut
        assert min(cut) > 0
    by_name = {arm["arm"]: arm["start"]["perplexity"]["value"] for arm in found["arms"]}
    assert by_name["LoX"] != by_name["SN-Tune"] == by_name["Safe LoRA"] != by_name["none"]
    assert set(found["differences"]) == {f"{arm} - SN-Tune" for arm in DEFENCES if arm != "SN-Tune"}
    assert base_hash(model, NeuronSet.all(model.table)) == before
    json.dumps(found, allow_nan=False)
    again = defences(model, sets, plan, grid, lab, cache=Cache(tmp_path.joinpath), tell=told.append)
    assert again == found
    assert len(told) == len(DEFENCES) * 2


def test_names_that_are_none_are_errors():
    with pytest.raises(UsageError, match="Safe LoRA"):
        Grid(arms=("everything",))
    with pytest.raises(UsageError, match="benign"):
        Grid(mixtures=("some",))
