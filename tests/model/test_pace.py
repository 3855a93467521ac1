"""Layers that are timed from a shape alone: which families can, what is counted, and that nothing else is
touched.
"""

import contextlib
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from families import FAMILIES, HYBRID_FAMILIES, MOE_FAMILIES, build
from safety_neurons.detectors.methods import Importance
from safety_neurons.errors import UnsupportedModelError
from safety_neurons.model import LanguageModel, pace
from safety_neurons.model.anatomy import resolve
from safety_neurons.model.batches import Batch, forward
from safety_neurons.model.outline import outlines
from safety_neurons.model.pace import Throughput, TimedLayers, attended_in, sampled
from tiny import tiny_llama, tiny_llama_folder

CPU = torch.device("cpu")


@pytest.mark.parametrize("family", FAMILIES + MOE_FAMILIES + HYBRID_FAMILIES)
def test_the_layers_of_every_family_read_and_decode_by_themselves(family: str) -> None:
    with torch.device("meta"):
        model = build(family)
    layers = TimedLayers(resolve(model), torch.float32, CPU)
    assert layers.seconds(2, 5) > 0
    assert layers.seconds(2, 1, held=4) > 0
    assert all(parameter.is_meta for parameter in model.parameters())


def test_a_layer_is_what_two_take_beyond_one(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = TimedLayers(resolve(tiny_llama(num_hidden_layers=5)), torch.float32, CPU)
    calls: list[Any] = []

    def took(action: Any, device: torch.device) -> float:
        before = len(calls)
        handles = [
            module.register_forward_hook(lambda *_: calls.append(1))
            for module in layers._list._modules.values()
        ]
        action()
        for handle in handles:
            handle.remove()
        return 10.0 + len(calls) - before  # ten of what is no layer's

    monkeypatch.setattr(pace, "_took", took)
    monkeypatch.setattr(pace, "LEAST_SECONDS", 1e-9)
    assert layers.seconds(3, 4) == max(1.0, 12 / 4)  # never below a quarter, whatever the clock says
    monkeypatch.setattr(pace, "_took", lambda action, device: took(action, device) - 10)
    assert layers.seconds(3, 4) == 1.0
    assert len(layers._list._modules) == 2


def test_a_method_is_what_two_layers_take_beyond_one_once_and_a_batch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    layers = TimedLayers(resolve(tiny_llama(num_hidden_layers=5)), torch.float32, CPU)
    clock, batches = [0.0], []

    @contextlib.contextmanager
    def reading(lm: LanguageModel) -> Iterator[Callable[[Batch], object]]:
        there = len(lm.anatomy.layers)
        clock[0] += 100 + 3 * there

        def read(batch: Batch) -> None:
            clock[0] += 10 + 2 * there
            batches.append(batch.lengths)
            forward(lm.model, batch)

        yield read

    def took(action: Any, device: torch.device) -> float:
        before = clock[0]
        action()
        return clock[0] - before

    monkeypatch.setattr(pace, "_took", took)
    assert layers.reading(reading, [4, 4, 6]) == (3.0, max(2.0, 14 / 4))  # never below a quarter
    assert set(map(tuple, batches)) == {(4, 4, 6)}
    assert len(layers._list._modules) == 2
    assert layers._model.config.num_hidden_layers == 5


@pytest.mark.parametrize(
    ("most", "expected"), [(100, [5, 5, 7, 9, 9]), (20, [7]), (6, [3]), (0, [1])], ids=str
)
def test_a_sample_of_lengths_keeps_those_of_one_length_together(most: int, expected: list[int]) -> None:
    assert sampled([9, 5, 7, 5, 9], float, float(most)) == expected


def test_a_sample_of_one_length_takes_fewer_of_it() -> None:
    assert sampled([8] * 9, float, 20.0) == [8, 8]


def test_what_a_method_does_is_timed_once_for_batches_of_the_same_lengths(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    [outline], _ = outlines([tiny_llama_folder(tmp_path / "model")])
    timed: list[Any] = []

    def reading(self: TimedLayers, what: Any, lengths: Any) -> tuple[float, float]:
        timed.append(tuple(lengths))
        if max(lengths) > 8:
            raise UnsupportedModelError("no such site")
        return 1.0, 2.0

    monkeypatch.setattr(TimedLayers, "reading", reading)
    rate, method = Throughput(outline), Importance()
    given = [
        (method, (5, 7)),
        (method, (5, 7)),
        (method, (5, 5)),
        (Importance(), (5, 5)),
        (method, (9,)),
        (method, (9,)),
    ]
    told = [
        rate.of_reading(one.reading(), lengths, lambda _, length: float(length)) for one, lengths in given
    ]
    assert timed == [(5, 7), (5, 5), (5, 5), (9,)]  # another method's own time is its own
    assert told[0] == told[1] == (1.0, 6.0)
    assert told[4] is told[5] is None
    assert len(rate.notes) == 1


@pytest.mark.parametrize("family", FAMILIES + MOE_FAMILIES)
def test_exact_importance_of_every_family_goes_through_made_up_layers(family: str) -> None:
    with torch.device("meta"):
        model = build(family)
    layers = TimedLayers(resolve(model), torch.float32, CPU)
    once, batch = layers.reading(Importance().reading(), [3, 3, 5])
    assert once >= 0
    assert batch > 0


def test_operations_of_the_rate_are_those_of_the_layer(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    [outline], _ = outlines([tiny_llama_folder(tmp_path / "model")])
    layer = outline.anatomy.layers[1]
    passed = sum(parameter.numel() for parameter in layer.module.parameters())
    assert outline.passed_in(layer) == passed
    assert outline.decoder_parameters == sum(map(outline.passed_in, outline.anatomy.layers)) + outline.hidden
    monkeypatch.setattr(TimedLayers, "seconds", lambda self, rows, tokens, held=0: 2.0)
    heads, wide = layer.attention.n_heads, layer.attention.head_dim  # type: ignore[union-attr]
    assert attended_in(outline, layer, 7) == 2 * heads * wide * 7
    assert Throughput(outline)(3, 7) == 3 * 7 * (2 * passed + 2 * heads * wide * 7) / 2
    assert Throughput(outline)(3, 1, 8) == 3 * (2 * passed + 2 * heads * wide * 17) / 2


@pytest.mark.parametrize("broken", ["large", "memory", "alone"])
def test_a_rate_that_is_of_products_alone_says_so(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    def fails(*_: Any) -> Any:
        raise torch.OutOfMemoryError("no room\nfor it")

    [outline], _ = outlines([tiny_llama_folder(tmp_path / "model")])
    if broken == "large":
        monkeypatch.setattr(pace, "MOST_BYTES", 10)
        with pytest.raises(UnsupportedModelError, match="at most 0.0 GB"):
            TimedLayers(outline.anatomy, torch.float32, CPU)
    else:
        monkeypatch.setattr(TimedLayers, "_fill" if broken == "memory" else "_timed", fails)
    rate = Throughput(outline)
    assert rate(2, 3) > 0
    [note] = rate.notes
    assert "products of matrices alone, a lower bound" in note
    assert "\n" not in note


def test_layers_of_several_sizes_are_said_and_nothing_is_timed_twice(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    [outline], _ = outlines([tiny_llama_folder(tmp_path / "model")])
    calls: list[Any] = []
    monkeypatch.setattr(TimedLayers, "seconds", lambda self, *shape: calls.append(shape) or 1.0)
    rate = Throughput(outline)
    assert rate.notes == ()
    assert [rate(2, 3), rate(2, 3), rate(2, 1, 3)] == [rate(2, 3), rate(2, 3), rate(2, 1, 3)]
    assert calls == [(2, 3, 0), (2, 1, 3)]
    monkeypatch.setattr(type(outline), "passed_in", lambda self, layer: 100 + layer.index)
    assert "first two layers" in Throughput(outline).notes[0]


def test_a_model_in_memory_stays_as_it_is() -> None:
    model = tiny_llama()
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    TimedLayers(resolve(model), torch.float32, CPU).seconds(1, 2)
    assert all(module.training for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_numbers_that_others_draw_stay_the_same() -> None:
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    TimedLayers(resolve(tiny_llama()), torch.float32, CPU).seconds(1, 2)
    assert torch.equal(torch.rand(2), expected)
