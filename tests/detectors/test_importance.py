"""Importance against its definition: every site of every family, in real float64 and in stock float32
code.
"""

import contextlib
import functools

import pytest
import torch

import families
from brute_force import brute_force
from exact64 import Exact64
from safety_neurons.detectors import importance as importance_readers
from safety_neurons.detectors.importance import ImportanceReaders, Options
from safety_neurons.model import LanguageModel
from safety_neurons.model.batches import collate, forward
from safety_neurons.model.hooks import reading
from safety_neurons.model.sites import SitePlace

EVERY = families.FAMILIES + families.MOE_FAMILIES


def language_model(family, dtype=torch.float64, **over):
    model = families.build(family, dtype, **over)
    if family in families.MOE_FAMILIES:
        model.set_experts_implementation("batched_mm")
    return LanguageModel(model, None)


@functools.cache
def unchanged(family):
    """One model for all tests that leave it as it is: making and proving it takes longer than they."""
    return language_model(family)


def closed(lm, sequences, keys=None, exact=True, **options):
    """Scores of every sequence by key, as tensors."""
    readers = ImportanceReaders(lm, tuple(keys or lm.table.keys), Options(**options))
    with torch.no_grad(), Exact64() if exact else contextlib.nullcontext(), readers.on():
        batch = collate(sequences, range(len(sequences)), pad_id=0)
        readers.start(batch)
        forward(lm.model, batch)
        scores = readers.take()
        return [
            {key: torch.from_numpy(values[row]) for key, values in scores.items()}
            for row in range(len(sequences))
        ]


def tokens(n, seed=0):
    return families.random_ids((n,), seed).tolist()


def close(found, expected, tolerance):
    for key, values in expected.items():
        size = values.abs().max().clamp(min=1e-30)
        worst = float((found[key] - values).abs().max() / size)
        assert worst <= tolerance, f"{key}: {worst:.1e}"


@pytest.mark.parametrize("family", EVERY)
def test_scores_equal_brute_force_in_exact_float64(family):
    lm, ids = unchanged(family), tokens(11)
    found = closed(lm, [ids])[0]
    assert set(found) == set(lm.table.keys)
    with Exact64():
        expected = brute_force(lm, ids, lm.table.keys, stride=5)
    close({key: values[::5] for key, values in found.items()}, expected, 1e-9)


@pytest.mark.parametrize("family", EVERY)
def test_scores_of_a_prompt_of_a_single_token_equal_brute_force(family):
    lm, ids = unchanged(family), tokens(1, seed=4)
    found = closed(lm, [ids, tokens(3)])[0]
    with Exact64():
        expected = brute_force(lm, ids, lm.table.keys, stride=11)
    close({key: values[::11] for key, values in found.items()}, expected, 1e-9)


@pytest.mark.parametrize("family", EVERY)
def test_prompts_scored_together_score_as_one_by_one(family, monkeypatch):
    lm, lengths = unchanged(family), (7, 7, 3, 7, 1, 1, 9)
    sequences = [tokens(length, seed) for seed, length in enumerate(lengths)]
    together = closed(lm, sequences)
    monkeypatch.setattr(importance_readers, "SHORT", 0)
    for found, expected in zip(together, closed(lm, sequences), strict=True):
        close(found, expected, 1e-9)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3", "olmo2", "bloom", "qwen2_moe"])
def test_what_stays_in_memory_is_made_before_the_first_pass(family):
    lm = language_model(family, torch.float32)
    readers = ImportanceReaders(lm, lm.table.keys)

    def held():
        return [sorted(vars(each)) for each in readers.factors.values()], sorted(readers.norms)

    with torch.no_grad(), readers.on():
        before, batch = held(), collate([tokens(5), tokens(7)], range(2), pad_id=0)
        readers.start(batch)
        forward(lm.model, batch)
        assert held() == before
        assert before[0]
        assert len({id(values.base) for values in readers.take().values()}) == 1  # one piece for all sites


@pytest.mark.parametrize("size", [30.0, 1000.0])
def test_activations_at_the_clamp_of_gpt_oss_are_proved_and_scored(size):
    model = families.build("gpt_oss", torch.float64)
    model.set_experts_implementation("batched_mm")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.experts.gate_up_proj.mul_(size)
    lm, ids, clamped = LanguageModel(model, None), tokens(5), []
    keys = [key for key in lm.table.keys if ".experts." in key]
    with reading(lm.anatomy, {"layers.0.experts.*.up": lambda rows: clamped.append(rows.values.abs() > 7)}):
        found = closed(lm, [ids], keys)[0]
    assert torch.cat(clamped).double().mean() > 0.5
    with Exact64():
        expected = brute_force(lm, ids, keys, stride=11)
    close({key: values[::11] for key, values in found.items()}, expected, 1e-9)


@pytest.mark.parametrize("family", EVERY)
def test_scores_equal_brute_force_of_stock_float32_code(family):
    lm, ids = language_model(family, torch.float32), tokens(9, seed=1)
    found = closed(lm, [ids], exact=False)[0]
    expected = brute_force(lm, ids, lm.table.keys, stride=13)
    close(
        {key: values[::13] for key, values in found.items()},
        {key: values.double() for key, values in expected.items()},
        1e-4,
    )


@pytest.mark.parametrize(
    "family", ["gemma2", "olmo2", "bloom", "falcon_alibi", "gptj", "mistral", "gpt_oss", "qwen2_moe"]
)
def test_batch_padding_and_chunks_change_nothing(family):
    lm = unchanged(family)
    sequences = [tokens(11), tokens(4, 1), tokens(8, 2)]
    together = closed(lm, sequences, budget=9000)
    for sequence, row in zip(sequences, together, strict=True):
        close(row, closed(lm, [sequence])[0], 1e-9)


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "gemma2", "qwen3", "olmo2"])
def test_large_changes_of_logits_do_not_overflow(family):
    lm, ids = language_model(family), tokens(9)
    with torch.no_grad():
        for key, place in lm.anatomy.places.items():
            if key.endswith((".q", ".k")):
                place.weight().mul_(30.0)
    keys = [key for key in lm.table.keys if key.endswith((".q", ".k"))]
    found = closed(lm, [ids], keys)[0]
    with Exact64():
        close({key: values[::2] for key, values in found.items()}, brute_force(lm, ids, keys, stride=2), 1e-9)


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3"])
def test_an_activation_that_is_not_zero_at_zero_is_exact(family):
    lm, ids = language_model(family), tokens(7)
    for layer in lm.anatomy.layers:
        for name in ("act_fn", "act", "activation_fn"):
            if hasattr(layer.mlp.module, name):
                setattr(layer.mlp.module, name, torch.nn.Sigmoid())
    lm = LanguageModel(lm.model, None)
    keys = [key for key in lm.table.keys if key.endswith(("gate", "up", "down"))]
    found = closed(lm, [ids], keys)[0]
    with Exact64():
        expected = brute_force(lm, ids, keys)
    close(found, expected, 1e-9)
    assert not torch.allclose(found[keys[0]], found["layers.0.down"])


def test_a_token_alone_gives_no_query_or_key_importance():
    row = closed(language_model("llama"), [tokens(1)])[0]
    assert all(bool((row[f"layers.{layer}.{site}"] == 0).all()) for layer in (0, 1) for site in "qk")


def test_a_zero_row_scores_exactly_zero():
    lm = language_model("llama")
    with torch.no_grad():
        for site in "qkv":
            base = lm.anatomy.places[f"layers.0.{site}"].projection.base
            base.weight[3], base.bias[3] = 0, 0
    row = closed(lm, [tokens(6)])[0]
    assert all(float(row[f"layers.0.{site}"][3]) == 0 for site in "qkv")


def test_a_key_entry_that_is_the_same_at_all_tokens_matters_to_no_query_row():
    lm = language_model("gpt2")
    place = lm.anatomy.places["layers.0.k"]
    with torch.no_grad():
        place.projection.base.weight[:, 32 + 5] = 0
    row = closed(lm, [tokens(8)])[0]
    assert float(row["layers.0.q"][5]) < 1e-13 * float(row["layers.0.q"].max())


def test_an_up_row_made_larger_and_its_column_smaller_keep_all_scores():
    lm, ids = language_model("llama"), tokens(8)
    before = closed(lm, [ids])[0]
    places = lm.anatomy.places
    with torch.no_grad():
        places["layers.0.up"].projection.base.weight[2] *= 5.0
        places["layers.0.up"].projection.base.bias[2] *= 5.0
        places["layers.0.down"].projection.base.weight[:, 2] /= 5.0
    close(closed(lm, [ids])[0], before, 1e-12)


def test_a_value_row_made_larger_and_its_columns_smaller_keep_all_scores():
    lm, ids = language_model("llama"), tokens(8)
    before = closed(lm, [ids])[0]
    places = lm.anatomy.places
    value, output = places["layers.0.v"].projection.base, places["layers.0.o"].projection.base
    with torch.no_grad():
        value.weight[3] *= 4.0
        value.bias[3] *= 4.0
        output.weight[:, [3, 8 + 3]] /= 4.0
    close(closed(lm, [ids])[0], before, 1e-12)


def test_a_rotary_pair_of_queries_made_larger_and_of_keys_smaller_keeps_all_scores():
    lm, ids = language_model("llama"), tokens(8)
    before = closed(lm, [ids])[0]
    places = lm.anatomy.places
    with torch.no_grad():
        for site, rows, factor in (("q", [1, 5, 9, 13], 3.0), ("k", [1, 5], 1 / 3.0)):
            base = places[f"layers.0.{site}"].projection.base
            base.weight[rows] *= factor
            base.bias[rows] *= factor
    close(closed(lm, [ids])[0], before, 1e-12)


def test_permuting_units_permutes_their_scores():
    lm, ids = language_model("llama"), tokens(8)
    before = closed(lm, [ids])[0]
    order = torch.randperm(48, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for site in ("gate", "up"):
            base = lm.anatomy.places[f"layers.0.{site}"].projection.base
            base.weight.copy_(base.weight[order].clone())
            base.bias.copy_(base.bias[order].clone())
        down = lm.anatomy.places["layers.0.down"].projection.base
        down.weight.copy_(down.weight[:, order].clone())
    after = closed(lm, [ids])[0]
    for site in ("gate", "up", "down"):
        torch.testing.assert_close(after[f"layers.0.{site}"], before[f"layers.0.{site}"][order])


def test_one_key_head_per_query_head_keeps_query_scores_and_splits_value_scores():
    shared, split = (
        language_model("mistral", num_hidden_layers=1),
        language_model("mistral", num_hidden_layers=1, num_key_value_heads=4),
    )
    with torch.no_grad():
        state = shared.model.state_dict()
        for name, weight in state.items():
            if "k_proj" in name or "v_proj" in name:
                state[name] = weight.unflatten(0, (2, 12)).repeat_interleave(2, 0).flatten(0, 1)
        split.model.load_state_dict(state)
    one, many = (closed(lm, [tokens(8)])[0] for lm in (shared, split))
    torch.testing.assert_close(many["layers.0.q"], one["layers.0.q"])
    heads = many["layers.0.v"].unflatten(0, (2, 2, 12))
    whole = one["layers.0.v"].unflatten(0, (2, 12))
    assert bool((whole <= heads.sum(1) + 1e-12).all())
    assert bool((whole >= (heads[:, 0] - heads[:, 1]).abs() - 1e-12).all())


def test_squared_scores_of_feed_forward_neurons_add_up_over_tokens_and_later_tokens_change_no_earlier_ones():
    lm, ids = language_model("llama"), tokens(9)
    keys = ["layers.0.down", "layers.1.up", "layers.0.v", "layers.0.q"]
    long, short = closed(lm, [ids], keys)[0], closed(lm, [ids[:6]], keys)[0]
    assert all(bool((long[key] >= short[key] - 1e-12).all()) for key in keys)


def test_probability_scores_stay_within_their_bound_and_join_the_heads_of_a_group():
    lm, ids = language_model("llama"), tokens(10)
    keys = ["layers.0.q", "layers.0.k", "layers.0.v", "layers.0.down"]
    found, output = closed(lm, [ids], keys, space="probability")[0], closed(lm, [ids], keys)[0]
    assert float(found["layers.0.q"].max()) <= (2 * 10) ** 0.5
    assert float(found["layers.0.k"].max()) <= (2 * 2 * 10) ** 0.5
    torch.testing.assert_close(found["layers.0.down"], output["layers.0.down"])
    many = language_model("llama", num_key_value_heads=4)
    state = lm.model.state_dict()
    for name, weight in state.items():
        if "k_proj" in name or "v_proj" in name:
            state[name] = weight.unflatten(0, (2, 8)).repeat_interleave(2, 0).flatten(0, 1)
    many.model.load_state_dict(state)
    apart = closed(many, [ids], ["layers.0.k"], space="probability")[0]["layers.0.k"].unflatten(0, (2, 2, 8))
    torch.testing.assert_close(apart.square().sum(1).sqrt().flatten(), found["layers.0.k"])


def test_the_public_codes_scores_look_at_no_weight_of_the_feed_forward_part(monkeypatch):
    def unreadable(_):
        raise AssertionError("a weight was read")

    lm = language_model("llama")
    lm.anatomy.check(lm.table.keys)  # whose proof reads them
    monkeypatch.setattr(SitePlace, "weight", unreadable)
    row = closed(lm, [tokens(5)], ["layers.0.up", "layers.0.down"], as_published=True)[0]
    assert {key: bool(values.isfinite().all()) for key, values in row.items()} == {
        "layers.0.up": True,
        "layers.0.down": True,
    }


def test_the_public_codes_scores_are_reproduced():
    lm, ids = language_model("llama"), tokens(7)
    row = closed(lm, [ids], [key for key in lm.table.keys if not key.endswith("gate")], as_published=True)[0]
    seen = {}
    module = lm.model.model.layers[0]
    with torch.no_grad(), Exact64():
        states = lm.model.model.embed_tokens(torch.tensor([ids]))
        cos, sin = lm.model.model.rotary_emb(states, torch.arange(7)[None])
        states = module.input_layernorm(states)
        for site in "qkv":
            seen[site] = (
                getattr(module.self_attn, f"{site}_proj")(states)[0].unflatten(-1, (-1, 8)).transpose(0, 1)
            )
    turn = lambda x: x * cos[0] + torch.cat([-x[..., 4:], x[..., :4]], -1) * sin[0]  # noqa: E731
    q, k = turn(seen["q"]), turn(seen["k"]).repeat_interleave(2, 0)
    hidden = torch.ones(7, 7).triu(1).bool()
    logits = (q @ k.mT / 8**0.5).masked_fill(hidden, -torch.inf)
    products = torch.einsum("hmd,hnd->hdmn", q, k)
    change = torch.softmax(logits[:, None] - products, -1) - torch.softmax(logits, -1)[:, None]
    query = change.square().sum((2, 3)).flatten()
    torch.testing.assert_close(row["layers.0.q"], query)
    torch.testing.assert_close(row["layers.0.k"], query.unflatten(0, (16, 2)).amax(1))
    mixed = (torch.softmax(logits, -1) @ seen["v"].repeat_interleave(2, 0)).abs().sum(1).flatten()
    torch.testing.assert_close(row["layers.0.o"], mixed)
    torch.testing.assert_close(row["layers.0.up"], row["layers.0.down"])
