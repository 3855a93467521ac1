"""Methods that contrast one model's activations on harmful and harmless prompts: CNA, effect size, sparse
probes.
"""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from twins import PROMPTS, model, untouched

from families import build
from safety_neurons.detectors import find_cna, find_effect_size, find_probe, probe
from safety_neurons.detectors.methods import SparseProbe
from safety_neurons.errors import InputError, UnsupportedModelError, UsageError
from safety_neurons.model import LanguageModel
from safety_neurons.prompt_lists import Prompts
from tiny import WORDS, tiny_llama, tiny_tokenizer

HARMFUL = PROMPTS[:3]
HARMLESS = Prompts.from_list(["open the door", "grow a small tree in the house", "what is blue water"])
GENERAL = Prompts.from_list([f"the {word} house is {other}" for word in WORDS[:3] for other in ("red", "a")])
TEXTS = {"harmless": HARMLESS, "general": GENERAL}
WIDE = {"dtype": torch.float64}
UNIT = 7


@pytest.fixture(scope="module")
def lm():
    return model(0, **WIDE)


def seen(lm, ids):
    """What every down projection reads, `[layer, token, unit]`, of one sequence alone."""
    kept = []
    handles = [
        layer.mlp.down_proj.register_forward_pre_hook(lambda _, args: kept.append(args[0][0].clone()))
        for layer in lm.model.model.layers
    ]
    with torch.no_grad():
        lm.model(input_ids=torch.tensor([ids]))
    for handle in handles:
        handle.remove()
    return torch.stack(kept)


def by_prompt(lm, prompts, positions="prompt-last"):
    """One prompt after the other: the mean over its positions that count, `[prompt, layer, unit]`."""
    rows = []
    answers = lm.complete(prompts, max_new_tokens=4, batch_size=1)
    for row, answer in zip(lm.encode(prompts), answers, strict=True):
        new = [token for token in answer.token_ids if token not in lm.eos_ids]
        whole = [*row.ids, *new] if positions == "completion" else row.ids
        first = {"prompt": 0, "prompt-last": len(row.ids) - 1, "completion": len(row.ids)}[positions]
        if len(whole) > first:
            rows.append(seen(lm, whole)[:, first:].mean(1))
    return torch.stack(rows).numpy()


@pytest.fixture(scope="module")
def planted():
    """One layer without attention whose unit 7 alone tells the last words of harmful prompts from others."""
    made = tiny_llama(3, num_hidden_layers=1, hidden_size=64).double()
    lm = LanguageModel(made, tiny_tokenizer(), template="none")
    words = [word for word in WORDS if len(lm.tokenizer(word)["input_ids"]) == 2][:48]
    with torch.no_grad():
        made.model.layers[0].self_attn.o_proj.weight.zero_()
        mlp = made.model.layers[0].mlp
        for row in (mlp.gate_proj.weight, mlp.up_proj.weight):
            row[:, 0] = 0.0
            row[UNIT] = 0.0
            row[UNIT, 0] = 1.0
        for number, word in enumerate(words):
            made.model.embed_tokens.weight[lm.tokenizer(word)["input_ids"][1], 0] = 2.0 * (number % 2)
    return lm, Prompts.from_list(words[1::2]), Prompts.from_list(words[::2])


def test_cna_is_the_difference_of_means_at_the_last_token(lm):
    found = find_cna(lm, HARMFUL, **TEXTS, most_active=0, count=9)
    differences = by_prompt(lm, HARMFUL).mean(0) - by_prompt(lm, HARMLESS).mean(0)
    for layer in (0, 1):
        np.testing.assert_allclose(
            found.scores[f"layers.{layer}.down"], np.abs(differences[layer]), rtol=1e-6
        )
    chosen = [differences[int(key.split(".")[1]), index] for key, index in found.neurons]
    more = sum(value > 0 for value in chosen)
    assert (
        f"of 9 chosen neurons larger on harmful prompts: {more}, on harmless ones: {9 - more}"
        in found.notes[-1]
    )
    for sign, side in (("harmful", 1), ("harmless", -1)):
        one = find_cna(lm, HARMFUL, **TEXTS, most_active=0, sign=sign, count=3)
        expected = np.maximum(side * differences[1], 0)
        np.testing.assert_allclose(one.scores["layers.1.down"], expected, rtol=1e-6)
    assert untouched(lm)


def test_units_that_are_active_on_everything_are_left_out_and_counted(lm):
    found, whole = (
        find_cna(lm, HARMFUL, **TEXTS, most_active=number, universal=0.5, count=9) for number in (3, 0)
    )
    active, left_out = by_prompt(lm, GENERAL), 0
    for layer in (0, 1):
        among = [set(np.argsort(-np.abs(row))[:3]) for row in active[:, layer]]
        universal = [unit for unit in range(48) if sum(unit in one for one in among) >= 0.5 * len(among)]
        left_out += len(universal)
        expected = whole.scores[f"layers.{layer}.down"].copy()
        expected[universal] = 0
        np.testing.assert_array_equal(found.scores[f"layers.{layer}.down"], expected)
    assert left_out > 0
    assert f"{left_out} of 96 neurons are universal and left out" in found.notes[0]
    assert found.neurons.provenance.config["universal_neurons"] == left_out
    capped = find_cna(lm, HARMFUL, **TEXTS, count=9)
    assert "among the 4 most active of their layer" in capped.notes[0]  # a tenth of 48


@pytest.mark.parametrize("positions", ["prompt-last", "prompt", "completion"])
def test_effect_size_is_cohens_d_over_prompts(lm, positions):
    options = {"harmless": HARMLESS, "positions": positions, "max_new_tokens": 4}
    found = find_effect_size(lm, HARMFUL, **options, count=9)
    one, other = (by_prompt(lm, prompts, positions) for prompts in (HARMFUL, HARMLESS))
    freedom = len(one) + len(other) - 2
    pooled = np.sqrt(
        ((len(one) - 1) * one.var(0, ddof=1) + (len(other) - 1) * other.var(0, ddof=1)) / freedom
    )
    expected = np.abs(one.mean(0) - other.mean(0)) / pooled
    for layer in (0, 1):
        np.testing.assert_allclose(found.scores[f"layers.{layer}.down"], expected[layer], rtol=1e-5)
    again = find_effect_size(lm, HARMFUL, **options, count=9, batch_size=1)
    np.testing.assert_allclose(again.scores["layers.1.down"], found.scores["layers.1.down"], rtol=1e-5)


def test_a_constant_neuron_has_no_effect_size(lm):
    constant = model(0, **WIDE)
    with torch.no_grad():
        constant.model.model.layers[1].mlp.up_proj.weight[5] = 0.0
    found = find_effect_size(constant, HARMFUL, harmless=HARMLESS, count=9)
    assert found.scores["layers.1.down"][5] == 0
    with pytest.raises(InputError, match="1 harmless prompt can be used"):
        find_effect_size(lm, HARMFUL, harmless=HARMLESS[:1])


def test_each_of_them_finds_the_planted_unit_first(planted):
    lm, harmful, harmless = planted
    for find, options in (
        (find_cna, {"general": GENERAL}),
        (find_effect_size, {}),
        (find_probe, {"pool": "last"}),
    ):
        found = find(lm, harmful, harmless=harmless, count=1, **options)
        assert list(found.neurons) == [("layers.0.down", UNIT)]
        assert found.prompts.used == len(harmful)


def made_up(n=30, size=12, seed=0):
    draws = np.random.default_rng(seed)
    labels = np.arange(n) % 3 // 2
    features = draws.normal(size=(n, size)) + 1.2 * labels[:, None] * (np.arange(size) < 3)
    features[:, 5] = 4.0
    return probe.ProbeData(labels, np.arange(n)), torch.tensor(features)


def test_a_sparse_probe_is_where_no_weight_gains_by_moving():
    labelled, features = made_up()
    made = probe.Sparse.of_array(probe.sparse(SparseProbe(strength=0.3), labelled, features))
    scaled = probe.standardised(features).numpy()
    weights, intercept, converged = probe.logistic(labelled, scaled, 0.3)
    odds = scaled @ weights + intercept
    pull = 0.3 * scaled.T @ (labelled.balance * (labelled.labels - 1 / (1 + np.exp(-odds))))
    assert converged
    assert made.converged
    assert 0 < (weights != 0).sum() < 8
    np.testing.assert_allclose(pull[weights != 0], np.sign(weights[weights != 0]), atol=1e-3)
    assert np.abs(pull[weights == 0]).max() < 1
    twin = LogisticRegression(C=0.3, l1_ratio=1.0, solver="saga", tol=1e-8, max_iter=50_000)
    twin.fit(scaled, labelled.labels, sample_weight=labelled.balance)
    np.testing.assert_allclose(weights, twin.coef_[0], atol=5e-3)
    scores = made.scores("both")
    np.testing.assert_array_equal(scores[weights != 0], np.abs(weights[weights != 0]))
    without = np.flatnonzero(weights == 0)
    order = without[np.argsort(-np.abs(pull[without]))]  # nearest to a weight first; a constant feature last
    assert order[-1] == 5
    assert (np.diff(scores[order]) < 0).all()
    assert scores[order[0]] < 0
    assert (made.scores("harmful")[weights <= 0] < 0).all()


def test_the_penalty_is_chosen_on_prompts_of_other_groups(monkeypatch):
    labelled, features = made_up()
    labelled = probe.ProbeData(labelled.labels, np.arange(30) // 3)  # both kinds in every group
    trained, logistic = [], probe.logistic
    monkeypatch.setattr(
        probe, "logistic", lambda part, *rest: (trained.append(part.groups), logistic(part, *rest))[1]
    )
    scaled = probe.standardised(features).numpy()
    losses = probe.held_out(labelled, scaled, [0.05, 5.0], 5)
    assert len(trained) == 10
    for groups in trained:
        assert len(groups) == 24  # eight whole groups of three
        assert set(np.bincount(groups)) <= {0, 3}
    kept = probe.Sparse.of_array(probe.sparse(SparseProbe(), labelled, features))
    assert kept.loss < min(*losses, np.log(2))
    grouped, alone = Prompts.from_list(["a", "b"]), Prompts.from_list(["c"])
    assert [list(one) for one in probe.group_numbers([grouped, alone])] == [[0, 1], [2]]


def test_a_probe_says_what_it_found_and_needs_groups(lm):
    found = find_probe(lm, HARMFUL, harmless=HARMLESS, count=2)
    record = found.scores.provenance.config["probes"]["layers.1.down"]
    assert record["weights"] == int((found.scores["layers.1.down"] > 0).sum())
    assert record["log_loss"] > 0
    assert any("log loss" in note for note in found.notes)
    fixed = find_probe(lm, HARMFUL, harmless=HARMLESS, strength=1.0, count=2)
    assert fixed.scores.provenance.config["probes"]["layers.0.down"]["log_loss"] is None
    with pytest.raises(InputError, match="3 of harmful and 1 of harmless"):
        find_probe(lm, HARMFUL, harmless=HARMLESS[:1])
    with pytest.raises(UsageError, match="reads general prompts too"):
        find_cna(lm, HARMFUL, harmless=HARMLESS)


def test_experts_count_what_was_routed_to_them():
    lm = LanguageModel(build("mixtral"), tiny_tokenizer())
    for found in (
        find_cna(lm, HARMFUL, **TEXTS, batch_size=2, count=4),
        find_effect_size(lm, HARMFUL, harmless=HARMLESS, positions="prompt", count=4),
    ):
        assert len(found.neurons) == 4
        assert any(".experts." in key and values.any() for key, values in found.scores.items())
    with pytest.raises(UnsupportedModelError, match="routed|expert"):
        find_probe(lm, HARMFUL, harmless=HARMLESS)
