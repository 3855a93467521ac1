"""Probe weights and the refusal direction: against planted truth and sums by hand."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from twins import PROMPTS, model, separate, untouched

from safety_neurons.detectors import find_probe_weights, find_refusal_direction
from safety_neurons.detectors.baselines import probe
from safety_neurons.errors import UsageError

HARMFUL, HARMLESS = PROMPTS[:3], PROMPTS[3:]


def test_the_probe_is_the_logistic_regression_of_a_common_library():
    draws = np.random.default_rng(0)
    features, labels = draws.normal(size=(40, 12)), (draws.random(40) < 0.4).astype(float)
    features[:, 3] = 5.0  # a constant feature
    ours = probe(torch.tensor(features), torch.tensor(labels)).numpy()
    twin = LogisticRegression(C=1.0, tol=1e-10, max_iter=10_000).fit(StandardScaler().fit_transform(features), labels)
    np.testing.assert_allclose(ours, twin.coef_[0], atol=1e-5)
    assert ours[3] == 0


def test_scores_are_signed_z_scores_of_each_sites_probe_on_the_largest_activation_of_a_prompt():
    lm = model(0, dtype=torch.float64)  # in float32 what is constant up to rounding is noise to the library
    found = find_probe_weights(lm, HARMFUL, harmless=HARMLESS, sites=("up", "down"), threshold=1.0)
    for key, values in found.scores.items():
        assert (values**2).mean() == pytest.approx(1, abs=0.01)  # a weight of exactly 0 scores 0
        assert set(found.neurons[key]) == set(np.flatnonzero(values >= 1.0))
    features = []
    for row in lm.encode(PROMPTS):
        seen = []
        handle = lm.anatomy.layers[1].mlp.module.up_proj.register_forward_hook(lambda _, __, out, seen=seen: seen.append(out))
        with torch.no_grad():
            lm.model(input_ids=torch.tensor([row.ids]))
        handle.remove()
        features.append(seen[0][0].amax(0).numpy())
    scaled = StandardScaler().fit_transform(np.stack(features).astype(np.float64))
    weights = LogisticRegression(C=1.0, tol=1e-10, max_iter=10_000).fit(scaled, [1] * 3 + [0] * 3).coef_[0]
    scores = np.sign(weights) * np.abs((weights - weights.mean()) / weights.std())
    np.testing.assert_allclose(found.scores["layers.1.up"], scores, atol=1e-3)
    assert untouched(lm)


HARMFUL, HARMLESS = PROMPTS[:3], PROMPTS[3:]


def hidden_states(lm, prompts):
    """Per layer boundary (the embedding first), the mean over prompts at the last token, one prompt at a time."""
    each = []
    for row in lm.encode(prompts):
        seen = []

        def keep(_, __, out, seen=seen):
            seen.append(out if isinstance(out, torch.Tensor) else out[0])

        handles = [part.module.register_forward_hook(keep) for part in lm.anatomy.layers]
        with torch.no_grad():
            lm.model(input_ids=torch.tensor([row.ids]))
            embedded = lm.model.get_input_embeddings()(torch.tensor([row.ids]))
        for handle in handles:
            handle.remove()
        each.append(torch.stack([embedded[0, -1], *(out[0, -1] for out in seen)]))
    return torch.stack(each).mean(0)


def test_contributions_of_all_writers_add_up_to_what_the_layers_put_along_the_direction():
    lm, _ = separate()
    harmful, harmless = hidden_states(lm, HARMFUL), hidden_states(lm, HARMLESS)
    for layer in (0, 1):
        difference = harmful - harmless
        direction = difference[layer + 1] / difference[layer + 1].norm()
        expected = float((difference[layer + 1] - difference[0]) @ direction)
        found = find_refusal_direction(lm, HARMFUL, harmless=HARMLESS, layer=layer, sites=("o", "down"), layers=range(layer + 1)).scores
        assert sum(float(values.sum()) for _, values in found.items()) == pytest.approx(expected, rel=1e-4)
    assert untouched(lm)


def test_rows_have_what_their_columns_write_and_queries_and_keys_nothing():
    lm = model(0)
    found = find_refusal_direction(lm, HARMFUL, harmless=HARMLESS, sites=("q", "k", "v", "o", "gate", "up", "down"), layer=0).scores
    assert not found["layers.0.q"].any()
    assert not found["layers.1.k"].any()
    np.testing.assert_array_equal(found["layers.1.gate"], found["layers.1.down"])
    heads = found["layers.0.o"].reshape(2, 2, 8)  # two key-value heads of two query heads of eight features
    np.testing.assert_allclose(found["layers.0.v"], heads.sum(1).ravel(), rtol=1e-5, atol=1e-7)


def test_a_neuron_that_fires_for_harm_alone_and_writes_along_the_direction_comes_first():
    lm = model(0)
    place = lm.anatomy.layers[1].mlp
    plain = find_refusal_direction(lm, HARMFUL, harmless=HARMLESS, layer=1)
    k = int(np.abs(plain.scores["layers.1.down"]).argmax())
    with torch.no_grad():
        place.module.down_proj.weight[:, k] *= 5 * np.sign(plain.scores["layers.1.down"][k])
    louder = find_refusal_direction(lm, HARMFUL, harmless=HARMLESS, layer=1, count=1)
    assert list(louder.neurons) == [("layers.1.down", k)]


def test_the_layer_is_chosen_by_separation_and_one_that_is_not_there_is_refused():
    lm = model(0)
    found = find_refusal_direction(lm, HARMFUL, harmless=HARMLESS, count=3)
    assert found.neurons.provenance.config["layer"] == 0  # the only one among the first four fifths of two
    with pytest.raises(UsageError, match="expected 0 to 1"):
        find_refusal_direction(lm, HARMFUL, harmless=HARMLESS, layer=2)
