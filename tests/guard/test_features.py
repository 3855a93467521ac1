"""Tests of features: against plain hooks, pooled by hand, and read in every way a request is."""

import numpy as np
import pytest
import torch
from guarded import some_neurons, texts, tiny_guard, tiny_model
from hypothesis import given
from hypothesis import strategies as st

from families import MOE_FAMILIES, VOCABULARY, build
from safety_neurons import NeuronSet
from safety_neurons.errors import InputError, NeuronError, UsageError
from safety_neurons.guard import Pooling, read_features, read_poolings
from safety_neurons.guard.features import Collector, Pool
from safety_neurons.model import Encoded, LanguageModel
from safety_neurons.model.batches import collate

LAYOUTS = ("llama", "mistral", "gemma2", "phi3", "gpt2", "gpt_neox", "bloom", "falcon", "opt")
"""Families that differ in how projections hold their neurons: apart, fused in a row, grouped by head,
transposed, without a gate.
"""
POOLINGS = (Pooling("last"), Pooling("mean"), Pooling("max", 3))


def sequences(count: int, seed: int = 0) -> list[list[int]]:
    generator = np.random.default_rng(seed)
    return [generator.integers(3, VOCABULARY, generator.integers(2, 11)).tolist() for _ in range(count)]


def naive(twin: LanguageModel, neurons: NeuronSet, ids: list[int]) -> np.ndarray:
    """`[token, neuron]` in float64: one pass over one text, hooks of torch's own on the projections."""
    seen: dict[str, torch.Tensor] = {}
    handles = []
    for key in neurons.keys():  # noqa: SIM118
        place = twin.anatomy.place(key)

        def keep(
            _: object,
            args: tuple[torch.Tensor, ...],
            output: torch.Tensor,
            key: str = key,
            side: str = place.side,
        ) -> None:
            values = (output if side == "output" else args[0]).reshape(len(ids), -1)
            index = twin.anatomy.place(key).index
            seen[key] = values if index is None else values[:, index]

        handles.append(place.hooked.register_forward_hook(keep))
    with torch.no_grad():
        twin.inner(input_ids=torch.tensor([ids]), use_cache=False)
    for handle in handles:
        handle.remove()
    return np.concatenate(
        [seen[key][:, torch.from_numpy(indices.copy())].numpy() for key, indices in neurons.items()], axis=1
    )


@pytest.mark.parametrize("family", LAYOUTS)
def test_features_are_the_activations_of_a_float64_twin(family: str) -> None:
    model, twin = (LanguageModel(build(family, dtype)) for dtype in (torch.float32, torch.float64))
    neurons = some_neurons(model, 2)
    fed = sequences(5)
    encoded = [Encoded(str(number), ids) for number, ids in enumerate(fed)]
    raw = [naive(twin, neurons, ids) for ids in fed]
    found = read_poolings(model, encoded, neurons, POOLINGS, batch_size=3)
    for pooling in POOLINGS:
        expected = np.stack([brute(values, pooling) for values in raw])
        np.testing.assert_allclose(
            found[pooling].values, expected, atol=2e-4 * max(1, np.abs(expected).max()), err_msg=str(pooling)
        )
    only_last = read_poolings(model, encoded, neurons, POOLINGS[:1], batch_size=5)[POOLINGS[0]].values
    np.testing.assert_array_equal(only_last.shape, found[POOLINGS[0]].values.shape)
    np.testing.assert_allclose(
        only_last, found[POOLINGS[0]].values, atol=2e-5 * max(1, np.abs(only_last).max())
    )


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe"])
def test_an_experts_neuron_is_read_where_tokens_are_routed_to_it_and_0_elsewhere(family: str) -> None:
    model = LanguageModel(build(family, torch.float32))
    keys = [f"layers.1.experts.{expert}.{site}" for expert in (0, 2) for site in ("gate", "down")]
    neurons = NeuronSet({key: [1, 4] for key in keys}, model.table)
    fed = sequences(4)
    found = read_poolings(
        model, [Encoded(str(n), ids) for n, ids in enumerate(fed)], neurons, POOLINGS, batch_size=4
    )
    experts = model.anatomy.layers[1].experts
    assert experts is not None
    for row, ids in enumerate(fed):
        expected = np.zeros((len(ids), len(neurons)))
        given: list[tuple[torch.Tensor, ...]] = []
        handle = experts.module.register_forward_pre_hook(lambda _, args, given=given: given.append(args))
        with torch.no_grad():
            model.inner(input_ids=torch.tensor([ids]), use_cache=False)
        handle.remove()
        hidden, chosen = given[0][0].reshape(len(ids), -1), given[0][1].reshape(len(ids), -1)
        for token in range(len(ids)):
            for column, (key, index) in enumerate(neurons):
                expert, site = int(key.split(".")[3]), key.split(".")[4]
                if expert in chosen[token].tolist():
                    gate = hidden[token] @ experts.weight(expert, "gate").T
                    up = hidden[token] @ experts.weight(expert, "up").T
                    value = gate if site == "gate" else torch.nn.functional.silu(gate) * up
                    expected[token, column] = float(value.detach()[index])
        for pooling in POOLINGS:
            np.testing.assert_allclose(
                found[pooling].values[row], brute(expected, pooling), atol=1e-4, err_msg=str(pooling)
            )


def test_every_moe_family_can_be_read() -> None:
    for family in MOE_FAMILIES:
        model = LanguageModel(build(family))
        neurons = NeuronSet({model.table.keys[-1]: [0]}, model.table)
        assert np.isfinite(
            read_poolings(model, [Encoded("0", [5, 6, 7])], neurons, POOLINGS[:1])[POOLINGS[0]].values
        ).all()


def test_features_of_a_batch_are_those_of_single_prompts_in_the_order_of_the_prompts() -> None:
    model = tiny_model()
    neurons, asked = some_neurons(model), texts(9)
    for pooling in ("last", "mean", "max"):
        together = read_features(model, asked, neurons, pooling=pooling, batch_size=9).values
        alone = np.concatenate(
            [read_features(model, [text], neurons, pooling=pooling).values for text in asked]
        )
        np.testing.assert_allclose(together, alone, atol=2e-5)
        assert np.abs(together - together[::-1]).max() > 0.01


def test_right_and_left_padding_give_the_same_last_token() -> None:
    model = tiny_model()
    neurons, fed = some_neurons(model), [[5, 6, 7, 8, 9], [10, 11], [12, 13, 14]]
    batch = collate(fed, [0, 1, 2])
    left = torch.zeros_like(batch.input_ids)
    mask = torch.zeros_like(left)
    for row, ids in enumerate(fed):
        left[row, 5 - len(ids) :] = torch.tensor(ids)
        mask[row, 5 - len(ids) :] = 1
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    for pooling in POOLINGS:
        collector, found = Collector(model.anatomy, neurons, [pooling]), []
        with torch.no_grad(), collector:
            collector.start(batch.attention_mask)
            model.inner(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
            found.append(collector.result()[pooling])
            collector.start(mask, left=True)
            model.inner(input_ids=left, attention_mask=mask, position_ids=positions)
            found.append(collector.result()[pooling])
        torch.testing.assert_close(found[0], found[1], atol=2e-5, rtol=1e-4)


def test_a_prompt_in_pieces_behind_a_cache_gives_what_the_whole_gives() -> None:
    from transformers import DynamicCache

    model, ids = tiny_model(), torch.tensor([[5, 6, 7, 8, 9, 10, 11]])
    neurons = some_neurons(model)
    for pooling in POOLINGS:
        collector, cache = Collector(model.anatomy, neurons, [pooling]), DynamicCache()
        with torch.no_grad(), collector:
            collector.start(left=True)
            for piece in ids.split([3, 1, 3], dim=1):
                model.inner(input_ids=piece, past_key_values=cache)
            pieces = collector.result()[pooling]
            collector.start(left=True)
            model.inner(input_ids=ids)
            torch.testing.assert_close(pieces, collector.result()[pooling], atol=1e-5, rtol=1e-4)


def test_features_of_a_bfloat16_model_are_float32_and_near_those_of_float32() -> None:
    exact, rough = tiny_model(), tiny_model()
    rough.inner.to(torch.bfloat16)
    neurons = some_neurons(exact)
    values = read_features(rough, texts(4), neurons).values
    assert values.dtype == np.float32
    expected = read_features(exact, texts(4), neurons).values
    assert np.abs(values - expected).max() < 0.1 * np.abs(expected).max()


def test_columns_follow_the_order_of_the_neuron_set() -> None:
    model = tiny_model()
    whole = NeuronSet({"layers.1.down": range(48), "layers.0.q": range(32)}, model.table)
    part = NeuronSet({"layers.1.down": [40, 3], "layers.0.q": [9]}, model.table)
    all_values, values = (
        read_features(model, ["make a cake"], neurons).values[0] for neurons in (whole, part)
    )
    np.testing.assert_array_equal(values, [all_values[9], all_values[32 + 3], all_values[32 + 40]])


def test_prompts_longer_than_the_context_are_marked_and_said() -> None:
    model = tiny_model(max_position_embeddings=16)
    found = read_features(model, ["cake", "cake " * 40], some_neurons(model))
    assert found.truncated.tolist() == [False, True]
    assert found.usable.tolist() == [True, False]
    assert any("1 of 2 prompts were longer" in note for note in found.notes)


def test_no_neurons_or_no_prompts_is_an_error() -> None:
    model = tiny_model()
    with pytest.raises(NeuronError, match="empty"):
        read_features(model, ["cake"], NeuronSet({}, model.table))
    with pytest.raises(InputError, match="no prompts"):
        read_features(model, [], some_neurons(model))


def test_a_pass_that_never_came_is_an_error_and_hooks_come_off() -> None:
    model = tiny_model()
    guard = tiny_guard(model)
    with guard.collector:
        guard.collector.start()
        with pytest.raises(NeuronError, match="came by"):
            guard.collector.result()
    assert (
        sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.inner.modules())
        == 0
    )


def brute(values: np.ndarray, pooling: Pooling) -> np.ndarray:
    """The definition, row by row of a text without padding `[token, neuron]`."""
    if pooling.kind == "last":
        return values[-1]
    if pooling.kind == "mean" or len(values) < pooling.window:
        return values.mean(0)
    windows = [
        values[start : start + pooling.window].mean(0) for start in range(len(values) - pooling.window + 1)
    ]
    return np.max(windows, axis=0)


@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    pooling=st.sampled_from(
        [Pooling("last"), Pooling("mean"), Pooling("max", 1), Pooling("max", 3), Pooling("max", 5)]
    ),
    left=st.booleans(),
    chunks=st.lists(st.integers(1, 4), max_size=3),
    seed=st.integers(0, 99),
)
def test_pooling_of_padded_chunks_is_the_definition(
    lengths: list[int], pooling: Pooling, left: bool, chunks: list[int], seed: int
) -> None:
    generator = np.random.default_rng(seed)
    rows = [generator.normal(size=(length, 2)) for length in lengths]
    width = max(lengths)
    values = torch.full((len(rows), width, 2), torch.nan, dtype=torch.float64)  # padding holds NaN
    real = torch.zeros(len(rows), width, dtype=torch.bool)
    for number, row in enumerate(rows):
        place = slice(width - len(row), width) if left else slice(0, len(row))
        values[number, place] = torch.from_numpy(row)
        real[number, place] = True
    pool, start = Pool(pooling), 0
    for size in [*chunks, width]:
        if start < width:
            pool.add(values[:, start : start + size], real[:, start : start + size])
            start += size
    expected = np.stack([brute(row, pooling) for row in rows])
    np.testing.assert_allclose(pool.result().numpy(), expected, rtol=1e-12, atol=1e-12)


def test_nan_at_a_real_token_comes_through_every_pooling() -> None:
    values = torch.zeros(1, 6, 1)
    values[0, 2] = torch.nan
    for pooling in (Pooling("mean"), Pooling("max", 2), Pooling("max", 9)):
        pool = Pool(pooling)
        pool.add(values, None)
        assert pool.result().isnan().all()


@pytest.mark.parametrize("wrong", [("middle", 0), ("max", 0), ("last", 3)])
def test_a_pooling_that_makes_no_sense_is_a_usage_error(wrong: tuple[str, int]) -> None:
    with pytest.raises(UsageError):
        Pooling(*wrong)
