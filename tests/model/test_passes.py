"""Batches and passes against plain calls; statistics against a naive computation that stores activations.

Estimates against sizes.
"""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from families import build
from rounding import additions, of_a_sum
from safety_neurons.errors import InputError, MismatchError, ModelError, NumericalError, UsageError
from safety_neurons.model import Halving, LanguageModel, activation_statistics, batches, run_batches
from safety_neurons.model.batches import collate, is_out_of_memory, next_token_rows, plan
from safety_neurons.model.hooks import around, reading
from safety_neurons.model.passes import FEW, PassOptions, reduced, reduced_by_group
from tiny import tiny_llama

SEQUENCES = [[1, 5, 6, 7], [1, 9], [1, 20, 21, 22, 23, 24, 25], [1, 9, 8], [30]]


def _last(batch):
    return {
        index: batch.output[row, length - 1]
        for row, (index, length) in enumerate(zip(batch.indices, batch.lengths, strict=True))
    }


def _by_index(parts):
    return {index: value for part in parts for index, value in part.items()}


@given(
    st.lists(st.integers(1, 50), min_size=1, max_size=40),
    st.one_of(st.just("auto"), st.integers(1, 7)),
    st.integers(1, 200),
)
@settings(max_examples=60, deadline=None)
def test_a_plan_holds_every_sequence_once_longest_first_and_keeps_to_its_limits(lengths, batch_size, budget):
    groups = plan(lengths, batch_size, budget)
    flat = [index for group in groups for index in group]
    assert sorted(flat) == list(range(len(lengths)))
    assert [lengths[index] for index in flat] == sorted(lengths, reverse=True)
    for group in groups:
        if batch_size == "auto":
            assert len(group) == 1 or len(group) * lengths[group[0]] <= budget
        else:
            assert len(group) <= batch_size


def test_batches_are_padded_on_the_right_and_know_their_real_tokens():
    (batch,) = batches(SEQUENCES, batch_size=5, pad_id=3)
    assert batch.indices == [2, 0, 3, 1, 4]
    assert batch.lengths == [7, 4, 3, 2, 1]
    assert batch.input_ids[3].tolist() == [1, 9, 3, 3, 3, 3, 3]
    assert batch.attention_mask[1].tolist() == [1, 1, 1, 1, 0, 0, 0]
    assert batch.position_ids[4].tolist() == list(range(7))
    assert batch.input_ids.flatten()[batch.rows].tolist() == [
        token for index in batch.indices for token in SEQUENCES[index]
    ]
    assert batch.n_tokens == sum(map(len, SEQUENCES))


def test_the_halves_of_a_batch_are_its_rows_without_needless_padding():
    (batch,) = batches(SEQUENCES, batch_size=5)
    first, second = batch.split()
    assert first.indices + second.indices == batch.indices
    assert second.input_ids.shape == (2, 2)
    assert second.input_ids[1, 0] == 30


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom", "opt", "gemma2"])
def test_batch_size_and_padding_change_no_hidden_state(family):
    lm = LanguageModel(build(family))
    alone = _by_index(run_batches(lm, SEQUENCES, _last, batch_size=1))
    together = _by_index(run_batches(lm, SEQUENCES, _last, batch_size=5))
    for index, value in alone.items():
        torch.testing.assert_close(together[index], value, atol=1e-5, rtol=1e-5)


def test_hidden_states_equal_those_of_a_plain_call_and_logits_come_when_asked_for():
    model = tiny_llama()
    lm = LanguageModel(model)
    ids = torch.tensor([SEQUENCES[0]])
    plain = model(ids, output_hidden_states=True)
    (hidden,) = run_batches(lm, SEQUENCES[:1], lambda batch: batch.output)
    (logits,) = run_batches(lm, SEQUENCES[:1], lambda batch: batch.output, with_logits=True)
    torch.testing.assert_close(hidden, plain.hidden_states[-1])
    torch.testing.assert_close(logits, plain.logits)
    assert not logits.requires_grad


def test_the_head_is_left_out_unless_something_is_hooked_on_the_whole_model():
    model = tiny_llama()
    lm, calls = LanguageModel(model), []
    with around(before={model.lm_head: lambda *_: calls.append("head")}):
        run_batches(lm, SEQUENCES, len)
        assert calls == []
        with around(before={model: lambda *_: calls.append("model")}):
            run_batches(lm, SEQUENCES, len)
    assert set(calls) == {"head", "model"}


def test_a_pass_stops_behind_the_last_layer_that_is_wanted():
    model = tiny_llama()
    lm, calls = LanguageModel(model), []
    _ = lm.anatomy
    watched = {
        layer: lambda *_, number=number: calls.append(number)
        for number, layer in enumerate(model.model.layers)
    }
    with around(before=watched):
        outputs = run_batches(
            lm, SEQUENCES[:2], lambda batch: batch.output, batch_size=2, options=PassOptions(last_layer=0)
        )
    assert calls == [0]
    assert outputs == [None]
    with pytest.raises(InputError, match="layer 7"):
        run_batches(lm, SEQUENCES, len, options=PassOptions(last_layer=7))


def test_dropout_is_off_meanwhile_and_training_mode_comes_back():
    lm = LanguageModel(tiny_llama(attention_dropout=0.5).train())
    first, second = (run_batches(lm, SEQUENCES[:1], lambda batch: batch.output)[0] for _ in range(2))
    torch.testing.assert_close(first, second)
    assert all(module.training for module in lm.model.modules())


def test_a_batch_that_does_not_fit_is_halved_and_its_rows_are_counted_once():
    lm, seen, notes = LanguageModel(tiny_llama()), [], []

    def refuse_large(batch):
        seen.append(len(batch))
        if len(batch) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")

    parts = run_batches(
        lm, SEQUENCES, _last, batch_size=5, notes=notes, options=PassOptions(before=refuse_large)
    )
    assert sorted(_by_index(parts)) == list(range(5))
    assert seen == [5, 2, 1, 2]
    assert len(notes) == 1
    assert "5 × 7" in notes[0]
    assert "halved" in notes[0]
    reference = _by_index(run_batches(lm, SEQUENCES, _last, batch_size=1))
    for index, value in _by_index(parts).items():
        torch.testing.assert_close(value, reference[index], atol=1e-5, rtol=1e-5)


def test_after_one_failure_larger_batches_are_split_before_they_fail():
    halving, tried = Halving(), []

    def work(batch):
        tried.append(len(batch))
        if len(batch) > 2:
            raise MemoryError
        return len(batch)

    batch = collate([[1] * 4] * 4, range(4))
    assert halving.run(batch, work) == [2, 2]
    assert halving.run(batch, work) == [2, 2]
    assert tried == [4, 2, 2, 2, 2]


def test_one_sequence_that_does_not_fit_is_an_error_and_other_errors_pass_through():
    def fail(error):
        def work(batch):
            raise error

        return work

    batch = collate([[1, 2, 3]], [0])
    with pytest.raises(ModelError, match="out of memory on one sequence of 3 tokens"):
        Halving().run(batch, fail(RuntimeError("DefaultCPUAllocator: can't allocate memory")))
    with pytest.raises(RuntimeError, match="shapes"):
        Halving().run(batch, fail(RuntimeError("shapes")))
    assert not is_out_of_memory(ValueError("out of memory"))


def test_a_run_starts_behind_the_batches_that_are_done_and_reports_each():
    lm, steps, finished = LanguageModel(tiny_llama()), [], []
    every = run_batches(lm, SEQUENCES, lambda batch: batch.indices, batch_size=2)
    options = PassOptions(1, finished.append)
    rest = run_batches(
        lm,
        SEQUENCES,
        lambda batch: batch.indices,
        2,
        progress=lambda *step: steps.append(step),
        options=options,
    )
    assert rest == every[1:]
    assert steps == [(2, 3, 16), (3, 3, 17)]
    assert finished == [2, 3]


def test_next_token_rows_name_the_positions_that_predict_and_what_they_predict():
    (batch,) = batches([[4, 5, 6], [7, 8], [9]], batch_size=3)
    rows, targets = next_token_rows(batch)
    assert rows.tolist() == [0, 1, 3]
    assert targets.tolist() == [5, 6, 8]


def test_empty_sequences_and_batch_sizes_below_one_are_refused():
    with pytest.raises(InputError, match="without tokens"):
        batches([[1], []])
    with pytest.raises(InputError, match="batch size 0"):
        batches([[1]], batch_size=0)


LONG = [[1 + (7 * row + 3 * token) % 90 for token in range(100 + 9 * row)] for row in range(3)]


def naive(lm, sequences):
    """Every activation of every token, one sequence at a time, joined."""
    stored = {key: [] for key in lm.table.keys}  # noqa: SIM118 - keys of a table
    for ids in sequences:
        with (
            reading(
                lm.anatomy,
                {key: (lambda values, key=key: stored[key].append(rows_of(values))) for key in stored},
            ),
            torch.no_grad(),
        ):
            lm.model(input_ids=torch.tensor([ids]))
    return {key: torch.cat(parts).double().numpy() for key, parts in stored.items()}


def rows_of(values):
    return (values.flatten(0, 1) if isinstance(values, torch.Tensor) else values.values).clone()


def assert_same(lm, statistics, stored):
    """Equal to what rounding allows: in the model's type while it runs and while a batch is summed, batches
    are merged in float64.
    """
    assert set(statistics.sums) == set(stored)
    before = additions(lm.model)
    for key, values in stored.items():
        assert statistics.counts[key] == len(values), key
        for found, terms in ((statistics.sums[key], values), (statistics.sums_of_squares[key], values**2)):
            np.testing.assert_allclose(
                found, terms.sum(0), rtol=0, atol=of_a_sum(terms, lm.dtype, before), err_msg=key
            )


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
        statistics = activation_statistics(
            lm, sequences, sites=["q", "gate"], layers="1:2", batch_size=len(sequences)
        )
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
    halves = activation_statistics(lm, SEQUENCES[:2], batch_size=1) + activation_statistics(
        lm, SEQUENCES[2:], batch_size=1
    )
    assert halves.counts == whole.counts
    for key in whole.sums:
        np.testing.assert_allclose(halves.sums[key], whole.sums[key], rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(halves.sums_of_squares[key], whole.sums_of_squares[key], rtol=1e-12)


def test_statistics_of_other_sites_do_not_add_up():
    lm = LanguageModel(tiny_llama())
    with pytest.raises(MismatchError, match="expected the same sites"):
        _ = activation_statistics(lm, SEQUENCES, sites=["q"]) + activation_statistics(
            lm, SEQUENCES, sites=["q", "k"]
        )


def test_mean_deviation_and_root_mean_square_follow_from_the_sums():
    lm = LanguageModel(tiny_llama().double())
    statistics = activation_statistics(lm, SEQUENCES, sites=["down"], layers=range(1, 2))
    values = naive(lm, SEQUENCES)["layers.1.down"]
    assert list(statistics.sums) == ["layers.1.down"]
    np.testing.assert_allclose(statistics.mean()["layers.1.down"], values.mean(0), atol=1e-12)
    np.testing.assert_allclose(
        statistics.standard_deviation()["layers.1.down"], values.std(0, ddof=1), rtol=1e-9
    )
    np.testing.assert_allclose(
        statistics.root_mean_square()["layers.1.down"], np.sqrt((values**2).mean(0)), rtol=1e-12
    )


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
    pieces = [
        torch.randn(length, size * stride, generator=generator).to(dtype)[:, ::stride] for length in lengths
    ]
    pieces = [piece[:, :size] for piece in pieces]
    joined = torch.cat(pieces).double()
    sums = reduced(pieces, size, torch.float32)
    for found, terms in zip(sums, (joined, joined.square()), strict=True):
        torch.testing.assert_close(
            found.double(), terms.sum(0), rtol=0, atol=of_a_sum(terms.numpy(), torch.float32, before=1)
        )


def test_groups_of_rows_reduce_to_the_sums_of_each_also_where_a_group_is_empty():
    values = torch.randn(9, 5, generator=torch.Generator().manual_seed(0)).bfloat16()
    counts = torch.tensor([2, 0, 6, 1])
    for group, (piece, sums) in enumerate(
        zip(values.split(counts.tolist()), reduced_by_group(values, counts, torch.float32), strict=True)
    ):
        for found, terms in zip(sums, (piece.double(), piece.double().square()), strict=True):
            bound = of_a_sum(terms.numpy(), torch.float32, before=1)
            torch.testing.assert_close(found.double(), terms.sum(0), rtol=0, atol=bound, msg=f"group {group}")
