"""Pooling pass by pass is pooling of the whole, whatever the padding and the chunks."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from safety_neurons.errors import UsageError
from safety_neurons.guard import Pooling
from safety_neurons.guard.features import Pool


def brute(values: np.ndarray, pooling: Pooling) -> np.ndarray:
    """The definition, row by row of a text without padding `[token, neuron]`."""
    if pooling.kind == "last":
        return values[-1]
    if pooling.kind == "mean" or len(values) < pooling.window:
        return values.mean(0)
    windows = [values[start : start + pooling.window].mean(0) for start in range(len(values) - pooling.window + 1)]
    return np.max(windows, axis=0)


@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    pooling=st.sampled_from([Pooling("last"), Pooling("mean"), Pooling("max", 1), Pooling("max", 3), Pooling("max", 5)]),
    left=st.booleans(),
    chunks=st.lists(st.integers(1, 4), max_size=3),
    seed=st.integers(0, 99),
)
def test_pooling_of_padded_chunks_is_the_definition(lengths: list[int], pooling: Pooling, left: bool, chunks: list[int], seed: int) -> None:
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
