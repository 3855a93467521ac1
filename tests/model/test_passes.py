import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from families import build
from safety_neurons.errors import InputError, ModelError
from safety_neurons.model import Halving, LanguageModel, batches, run_batches
from safety_neurons.model.batches import collate, is_out_of_memory, next_token_rows, plan
from safety_neurons.model.hooks import around
from tiny import tiny_llama

SEQUENCES = [[1, 5, 6, 7], [1, 9], [1, 20, 21, 22, 23, 24, 25], [1, 9, 8], [30]]


def _last(batch):
    return {index: batch.output[row, length - 1] for row, (index, length) in enumerate(zip(batch.indices, batch.lengths, strict=True))}


def _by_index(parts):
    return {index: value for part in parts for index, value in part.items()}


@given(st.lists(st.integers(1, 50), min_size=1, max_size=40), st.one_of(st.just("auto"), st.integers(1, 7)), st.integers(1, 200))
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
    assert batch.input_ids.flatten()[batch.rows].tolist() == [token for index in batch.indices for token in SEQUENCES[index]]
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
    watched = {layer: lambda *_, number=number: calls.append(number) for number, layer in enumerate(model.model.layers)}
    with around(before=watched):
        outputs = run_batches(lm, SEQUENCES[:2], lambda batch: batch.output, batch_size=2, last_layer=0)
    assert calls == [0]
    assert outputs == [None]
    with pytest.raises(InputError, match="layer 7"):
        run_batches(lm, SEQUENCES, len, last_layer=7)


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

    parts = run_batches(lm, SEQUENCES, _last, batch_size=5, before=refuse_large, notes=notes)
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
    reports = {"progress": lambda *step: steps.append(step), "finished": finished.append}
    rest = run_batches(lm, SEQUENCES, lambda batch: batch.indices, batch_size=2, start=1, **reports)
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
