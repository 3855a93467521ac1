"""Statistics of activations against a naive computation that stores them."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from families import build
from rounding import additions, of_a_sum
from safety_neurons.errors import MismatchError, NumericalError, UsageError
from safety_neurons.model import LanguageModel, activation_statistics
from safety_neurons.model.hooks import around, reading
from safety_neurons.model.passes import FEW, reduced, reduced_by_group, run_batches
from tiny import tiny_llama

SEQUENCES = [[1, 5, 6, 7], [1, 9], [1, 20, 21, 22, 23, 24, 25], [1, 9, 8], [30]]
LONG = [[1 + (7 * row + 3 * token) % 90 for token in range(100 + 9 * row)] for row in range(3)]


def naive(lm, sequences):
    """Every activation of every token, one sequence at a time, joined."""
    stored = {key: [] for key in lm.table.keys}  # noqa: SIM118 - keys of a table
    for ids in sequences:
        with reading(lm.anatomy, {key: (lambda values, key=key: stored[key].append(rows_of(values))) for key in stored}), torch.no_grad():
            lm.model(input_ids=torch.tensor([ids]))
    return {key: torch.cat(parts).double().numpy() for key, parts in stored.items()}


def rows_of(values):
    return (values.flatten(0, 1) if isinstance(values, torch.Tensor) else values.values).clone()


def assert_same(lm, statistics, stored):
    """Equal to what rounding allows: in the model's type while it runs and while a batch is summed, batches are merged in float64."""
    assert set(statistics.sums) == set(stored)
    before = additions(lm.model)
    for key, values in stored.items():
        assert statistics.counts[key] == len(values), key
        for found, terms in ((statistics.sums[key], values), (statistics.sums_of_squares[key], values**2)):
            np.testing.assert_allclose(found, terms.sum(0), rtol=0, atol=of_a_sum(terms, lm.dtype, before), err_msg=key)


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2", "opt", "mixtral", "qwen2_moe"])
def test_sums_are_those_of_stored_activations(family):
    lm = LanguageModel(build(family))
    assert_same(lm, activation_statistics(lm, SEQUENCES, batch_size=3), naive(lm, SEQUENCES))


@pytest.mark.parametrize("batch_size", [1, 2, 3, "auto"])
@pytest.mark.parametrize("sequences", [SEQUENCES, LONG], ids=["short", "long"])
def test_neither_padding_nor_batch_size_changes_the_sums(batch_size, sequences):
    lm = LanguageModel(tiny_llama(intermediate_size=FEW // 100).double())
    assert_same(lm, activation_statistics(lm, sequences, batch_size=batch_size), naive(lm, sequences))


@pytest.mark.parametrize("sequences", [SEQUENCES, LONG], ids=["short", "long"])
def test_nan_in_the_padding_reaches_no_sum(sequences):
    lm = LanguageModel(tiny_llama(intermediate_size=FEW // 100))
    width = max(map(len, sequences))
    mask = torch.zeros(len(sequences), width, dtype=torch.bool)
    for row, ids in enumerate(sorted(sequences, key=len, reverse=True)):
        mask[row, len(ids) :] = True

    def spoil(output):
        return output.masked_fill(mask[..., None], torch.nan)

    stored = naive(lm, sequences)
    places = [lm.anatomy.place(f"layers.1.{site}").module for site in ("gate", "q")]
    with around(after=dict.fromkeys(places, spoil)):
        statistics = activation_statistics(lm, sequences, sites=["q", "gate"], layers="1:2", batch_size=len(sequences))
    assert_same(lm, statistics, {key: stored[key] for key in ("layers.1.q", "layers.1.gate")})


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_experts_that_run_one_by_one_or_together_have_the_same_sums(implementation):
    model = build("gpt_oss")
    model.set_experts_implementation(implementation)
    lm = LanguageModel(model)
    assert_same(lm, activation_statistics(lm, SEQUENCES, batch_size=5), naive(lm, SEQUENCES))


def test_the_statistics_of_two_halves_add_up_to_those_of_the_whole():
    lm = LanguageModel(tiny_llama())
    whole = activation_statistics(lm, SEQUENCES, batch_size=1)
    halves = activation_statistics(lm, SEQUENCES[:2], batch_size=1) + activation_statistics(lm, SEQUENCES[2:], batch_size=1)
    assert halves.counts == whole.counts
    for key in whole.sums:
        np.testing.assert_allclose(halves.sums[key], whole.sums[key], rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(halves.sums_of_squares[key], whole.sums_of_squares[key], rtol=1e-12)


def test_statistics_of_other_sites_do_not_add_up():
    lm = LanguageModel(tiny_llama())
    with pytest.raises(MismatchError, match="expected the same sites"):
        _ = activation_statistics(lm, SEQUENCES, sites=["q"]) + activation_statistics(lm, SEQUENCES, sites=["q", "k"])


def test_mean_deviation_and_root_mean_square_follow_from_the_sums():
    lm = LanguageModel(tiny_llama().double())
    statistics = activation_statistics(lm, SEQUENCES, sites=["down"], layers=range(1, 2))
    values = naive(lm, SEQUENCES)["layers.1.down"]
    assert list(statistics.sums) == ["layers.1.down"]
    np.testing.assert_allclose(statistics.mean()["layers.1.down"], values.mean(0), atol=1e-12)
    np.testing.assert_allclose(statistics.standard_deviation()["layers.1.down"], values.std(0, ddof=1), rtol=1e-9)
    np.testing.assert_allclose(statistics.root_mean_square()["layers.1.down"], np.sqrt((values**2).mean(0)), rtol=1e-12)


def test_one_token_has_no_deviation():
    statistics = activation_statistics(LanguageModel(tiny_llama()), [[5]], sites=["v"])
    assert np.isnan(statistics.standard_deviation()["layers.0.v"]).all()


def test_a_batch_that_does_not_fit_is_counted_once(monkeypatch):
    lm = LanguageModel(tiny_llama())
    expected = naive(lm, SEQUENCES)
    before_last = lm.anatomy.layers[1].mlp.places["down"].module
    failures = []

    def fail_once(args, kwargs):
        if not failures:
            failures.append(1)
            raise torch.OutOfMemoryError("out of memory")

    notes = []
    with around(before={before_last: fail_once}):
        statistics = activation_statistics(lm, SEQUENCES, batch_size=4, notes=notes)
    assert failures
    assert "halved" in notes[0]
    assert_same(lm, statistics, expected)


def test_reading_leaves_no_hook_and_stops_behind_the_last_layer_it_needs():
    lm = LanguageModel(tiny_llama())
    came_by = []
    with around(after={lm.anatomy.layers[1].module: lambda output: came_by.append(1)}):
        activation_statistics(lm, SEQUENCES, layers="0:1")
    assert came_by == []
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in lm.model.modules())
    assert run_batches(lm, SEQUENCES, lambda batch: batch.output is not None)[0]


def test_an_unknown_site_and_broken_weights_are_said():
    lm = LanguageModel(tiny_llama())
    with pytest.raises(UsageError, match="mlp"):
        activation_statistics(lm, SEQUENCES, sites=["mlp"])
    _ = lm.anatomy
    with torch.no_grad():
        lm.anatomy.place("layers.1.up").module.weight[3] = torch.nan
    with pytest.raises(NumericalError, match=r"layers\.1\.(up|down)"):
        activation_statistics(lm, SEQUENCES, sites=["up", "down"])


@given(
    st.lists(st.integers(1, 70), min_size=1, max_size=4),
    st.integers(1, 30000),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.integers(1, 3),
)
def test_rows_reduce_to_their_sums_whatever_the_pieces_width_type_and_stride(lengths, size, dtype, stride):
    size = min(size, 200_000 // sum(lengths) // stride) or 1
    generator = torch.Generator().manual_seed(size)
    pieces = [torch.randn(length, size * stride, generator=generator).to(dtype)[:, ::stride] for length in lengths]
    pieces = [piece[:, :size] for piece in pieces]
    joined = torch.cat(pieces).double()
    sums = reduced(pieces, size, torch.float32)
    for found, terms in zip(sums, (joined, joined.square()), strict=True):
        torch.testing.assert_close(found.double(), terms.sum(0), rtol=0, atol=of_a_sum(terms.numpy(), torch.float32, before=1))


def test_groups_of_rows_reduce_to_the_sums_of_each_also_where_a_group_is_empty():
    values = torch.randn(9, 5, generator=torch.Generator().manual_seed(0)).bfloat16()
    counts = torch.tensor([2, 0, 6, 1])
    for group, (piece, sums) in enumerate(zip(values.split(counts.tolist()), reduced_by_group(values, counts, torch.float32), strict=True)):
        for found, terms in zip(sums, (piece.double(), piece.double().square()), strict=True):
            bound = of_a_sum(terms.numpy(), torch.float32, before=1)
            torch.testing.assert_close(found.double(), terms.sum(0), rtol=0, atol=bound, msg=f"group {group}")
