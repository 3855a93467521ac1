import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from twins import PROMPTS, model, untouched

from safety_neurons.detectors import find_probe_weights
from safety_neurons.detectors.probe_weights import probe

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
