"""Caches with room hold what transformers' own hold, whatever is done to them, and copy nothing at a step."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from families import build
from safety_neurons.model import LanguageModel, room
from safety_neurons.model.decoding import Decoding
from safety_neurons.model.language_model import generate
from safety_neurons.model.room import ROOM, RoomyLayer, RoomySlidingWindowLayer, with_room

WINDOW = 9
LAYERS: dict[str, Callable[[], Any]] = {
    "whole": DynamicLayer,
    "window": lambda: DynamicSlidingWindowLayer(sliding_window=WINDOW),
}


def roomy(layer: Any) -> Any:
    """The layer as `with_room` makes it."""
    cache = DynamicCache()
    cache.layers = [layer]
    return with_room(cache).layers[0]


def states(rows: int, tokens: int, start: int) -> tuple[Tensor, Tensor]:
    """Keys and values, all different, of two heads and as many features as differ in both."""
    keys = torch.arange(rows * 2 * tokens * 3).view(rows, 2, tokens, 3) + start
    values = torch.arange(rows * 2 * tokens * 5).view(rows, 2, tokens, 5) - start
    return keys.float(), values.float()


def same(one: Any, other: Any) -> None:
    """Both hold the same numbers."""
    assert one.get_seq_length() == other.get_seq_length()
    if one.get_seq_length():
        assert torch.equal(one.keys, other.keys)
        assert torch.equal(one.values, other.values)


DONE = st.one_of(
    st.tuples(st.just("add"), st.integers(1, 2 * ROOM)),
    st.tuples(st.just("step"), st.integers(1, 3)),
    st.tuples(st.just("select"), st.integers(0, 7)),
    st.tuples(st.just("repeat"), st.integers(2, 3)),
    st.tuples(st.just("reorder"), st.integers(0, 7)),
    st.tuples(st.just("crop"), st.integers(1, 4)),
    st.tuples(st.just("copy"), st.just(0)),
)


@pytest.mark.parametrize("kind", LAYERS)
@settings(max_examples=60, deadline=None)
@given(done=st.lists(DONE, min_size=2, max_size=9))
def test_a_layer_with_room_is_the_same_layer(kind: str, done: list[tuple[str, int]]) -> None:
    plain, ours, rows = LAYERS[kind](), roomy(LAYERS[kind]()), 2
    for number, (what, count) in enumerate(done):
        if what in ("add", "step"):
            for step in range(1 if what == "add" else count):
                given = states(rows, count if what == "add" else 1, 1000 * number + step)
                for one, other in zip(plain.update(*given), ours.update(*given), strict=True):
                    assert torch.equal(one, other)
        elif not plain.is_initialized:
            continue
        elif what == "select":
            chosen = torch.tensor([row for row in range(rows) if count >> row & 1] or [0])
            rows = len(chosen)
            plain.batch_select_indices(chosen), ours.batch_select_indices(chosen)
        elif what == "repeat" and rows < 8:
            rows *= count
            plain.batch_repeat_interleave(count), ours.batch_repeat_interleave(count)
        elif what == "reorder":
            order = torch.arange(rows).roll(count)
            plain.reorder_cache(order), ours.reorder_cache(order)
        elif what == "crop" and count < plain.get_seq_length() < (WINDOW if kind == "window" else 10**9):
            plain.crop(-count), ours.crop(-count)
        elif what == "copy":
            ours = copy.deepcopy(ours)
        same(plain, ours)


@pytest.mark.parametrize("kind", LAYERS)
def test_a_step_moves_nothing_of_what_is_held(kind: str) -> None:
    layer = roomy(LAYERS[kind]())
    layer.update(*states(4, 2, 0))
    layer.update(*states(4, 1, 0))
    where = layer.keys.data_ptr(), layer.values.data_ptr()
    steps = WINDOW - 4 if kind == "window" else ROOM
    for step in range(steps):
        layer.update(*states(4, 1, step))
        assert (layer.keys.data_ptr(), layer.values.data_ptr()) == where
    layer.update(*states(4, 1, steps))
    assert layer.keys.data_ptr() != where[0]  # no more room: all moves once


@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_numbers_of_heads_and_types_are_kept(heads: int, dtype: torch.dtype) -> None:
    plain, ours = DynamicLayer(), roomy(DynamicLayer())
    for tokens in (5, 1, 1, 70, 1):
        given = torch.randn(2, heads, tokens, 4).to(dtype), torch.randn(2, heads, tokens, 4).to(dtype)
        plain.update(*given)
        found = ours.update(*given)
        same(plain, ours)
        assert [one.dtype for one in found] == [dtype, dtype]


def test_room_is_as_much_as_was_asked_for() -> None:
    cache = DynamicCache()
    cache.layers = [DynamicLayer()]
    layer = with_room(cache, 5).layers[0]
    layer.update(*states(2, 3, 0))
    for _ in range(5):
        layer.update(*states(2, 1, 0))
    assert layer.keys.untyped_storage().nbytes() == 4 * 2 * 2 * (3 + 1 + 5) * 3


def test_what_gradients_or_another_mode_need_is_copied() -> None:
    layer = roomy(DynamicLayer())
    keys, values = (each.requires_grad_() for each in states(1, 2, 0))
    layer.update(keys, values)
    layer.update(*states(1, 1, 0))[0].square().sum().backward()
    assert torch.equal(keys.grad, 2 * keys.detach())
    other = roomy(DynamicLayer())
    with torch.inference_mode():
        for _ in range(2):
            other.update(*states(1, 1, 0))
    other.update(*states(1, 1, 0))
    assert other.get_seq_length() == 3


def test_rows_that_were_selected_write_to_no_other_rows() -> None:
    layer = roomy(DynamicLayer())
    layer.update(*states(3, 2, 0))
    layer.update(*states(3, 1, 9))
    before = layer.keys
    kept = before.clone()
    layer.batch_select_indices(torch.tensor([1]))
    layer.update(*states(1, 1, 500))
    assert torch.equal(before, kept)


def test_only_ordinary_dynamic_layers_get_room() -> None:
    class Other(DynamicLayer):
        pass

    cache = DynamicCache()
    cache.layers = [DynamicLayer(), DynamicSlidingWindowLayer(sliding_window=4), Other()]
    assert with_room(cache) is cache
    assert [type(layer) for layer in cache.layers] == [RoomyLayer, RoomySlidingWindowLayer, Other]
    assert [type(layer) for layer in with_room(cache).layers] == [RoomyLayer, RoomySlidingWindowLayer, Other]
    assert with_room(None) is None


def test_layers_that_a_cache_makes_later_have_room_too() -> None:
    cache = with_room(DynamicCache())
    cache.update(*states(1, 1, 0), 0)
    assert [type(layer) for layer in cache.layers] == [RoomyLayer]


@pytest.mark.parametrize("sample", [False, True])
@pytest.mark.parametrize("rows", [1, 9])
def test_answers_are_written_with_room(sample: bool, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, written = LanguageModel(build("llama")), 0
    update = RoomyLayer.update

    def counted(self: RoomyLayer, *states: Tensor, **others: Any) -> tuple[Tensor, Tensor]:
        nonlocal written
        written += 1
        return update(self, *states, **others)

    how = Decoding(4, sample=sample)
    given = [[5, 6, 7 + row] for row in range(rows)]
    monkeypatch.setattr(model, "eos_ids", ())
    monkeypatch.setattr(RoomyLayer, "update", counted)
    with_it = generate(model, given, how, batch_size=rows)
    assert written == 4 * model.config.num_hidden_layers
    monkeypatch.setattr(room, "_WITH_ROOM", {})
    assert generate(model, given, how, batch_size=rows) == with_it
