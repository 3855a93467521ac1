"""What all prompts of a batch begin with is read once, and answers are those of whole prompts."""

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from families import FAMILIES, MOE_FAMILIES, OLD_TRANSFORMERS, build, sibling
from safety_neurons.interventions import deactivated, patched, scaled
from safety_neurons.model import LanguageModel, decoding
from safety_neurons.model.batches import decoder_of
from safety_neurons.model.decoding import Decoding, common_start
from safety_neurons.model.hooks import around
from safety_neurons.model.language_model import generate
from safety_neurons.neurons import NeuronSet

START = [7, 11, 13, 17, 19, 23, 29, 31, 37, 41]
STEPS = 5
PROMPTS = [[*START, *range(50 + row, 50 + row + 1 + row % 4)] for row in range(9)]
"""Of one start and several lengths: some rows have padding where others begin."""


def model_of(family: str) -> LanguageModel:
    model = LanguageModel(build(family, dtype=torch.float64))
    model.eos_ids = ()
    return model


def answers(model: LanguageModel, prompts: list[list[int]] = PROMPTS) -> tuple[dict[int, list[int]], int]:
    """Ids that the model writes, and how many tokens its decoder was given."""
    tokens = 0

    def count(args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        nonlocal tokens
        given = kwargs.get("input_ids", args[0] if args else None)
        tokens += given.numel() if isinstance(given, torch.Tensor) else 0

    with around(decoder_of(model.model), before=count):
        written = generate(model, prompts, Decoding(STEPS), batch_size=len(prompts))
    return {row: one.token_ids for row, one in written.items()}, tokens


def whole(model: LanguageModel, monkeypatch: pytest.MonkeyPatch, treated: object) -> dict[int, list[int]]:
    """The same without a shared start."""
    with monkeypatch.context() as patch, treated():
        patch.setattr(decoding, "SHARED", 10**9)
        return answers(model)[0]


def some(model: LanguageModel) -> NeuronSet:
    """Every third neuron, but for those of routed experts."""
    return NeuronSet(
        {key: range(0, size, 3) for key, size in model.table.sizes.items() if "experts" not in key},
        model.table,
    )


def treatment(name: str, model: LanguageModel) -> object:
    neurons = some(model)
    if name == "two models":
        return functools.partial(patched, model, LanguageModel(sibling(model.model)), neurons)
    if name == "one model":
        return functools.partial(patched, model, model, neurons)
    return functools.partial(deactivated, model, neurons)


@given(
    rows=st.lists(st.lists(st.integers(1, 2), min_size=1, max_size=6), min_size=2, max_size=5),
    start=st.lists(st.integers(1, 2), max_size=4),
)
@settings(deadline=None)
def test_a_common_start_is_what_all_rows_begin_with(rows: list[list[int]], start: list[int]) -> None:
    rows = [start + row for row in rows]
    width, shortest = max(map(len, rows)), min(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    alike = [len({tuple(row[:length]) for row in rows}) == 1 for length in range(1, shortest)]
    assert common_start(ids, mask) == sum(alike)


@pytest.mark.parametrize("family", FAMILIES + MOE_FAMILIES)
def test_answers_behind_a_common_start_are_those_of_whole_prompts(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of(family)
    monkeypatch.setattr(decoding, "SHARED", 3)  # windows are of five tokens
    assert answers(model)[0] == whole(model, monkeypatch, lambda: deactivated(model))


@pytest.mark.parametrize("treated", ["one model", "two models", "deactivated"])
@pytest.mark.parametrize("family", ["llama", "bloom", "gemma2"])
def test_treated_answers_are_those_of_whole_prompts(
    family: str, treated: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of(family)
    treat = treatment(treated, model)
    monkeypatch.setattr(decoding, "SHARED", 3)
    with treat():
        found = answers(model)[0]
    assert found == whole(model, monkeypatch, treat)
    if treated != "one model":
        assert found != answers(model)[0]


def test_a_common_start_is_read_in_one_row() -> None:
    model = model_of("llama")
    widest = max(map(len, PROMPTS))
    later = len(PROMPTS) * (widest - len(START) + STEPS - 1)
    assert answers(model)[1] == len(START) + later
    apart = [[90 - row, *prompt] for row, prompt in enumerate(PROMPTS)]
    assert answers(model, apart)[1] == len(PROMPTS) * (widest + 1 + STEPS - 1)
    short = [prompt[len(START) - 7 :] for prompt in PROMPTS]
    assert answers(model, short)[1] == len(PROMPTS) * (widest - len(START) + 7 + STEPS - 1)


@pytest.mark.parametrize("kind", ["dynamic", "longrope", "default"])
def test_positions_that_are_turned_by_the_longest_row_are_read_whole(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit = 12  # behind which these turn every token by other factors; prompts are of 11 to 14 tokens
    rope: dict[str, object] = {"rope_type": kind, "rope_theta": 10000.0}
    if kind == "dynamic":
        rope |= {"factor": 8.0, "original_max_position_embeddings": limit}
    if kind == "longrope":
        half = 4
        rope |= {
            "short_factor": [1.0] * half,
            "long_factor": [40.0] * half,
            "original_max_position_embeddings": limit,
            "factor": 4.0,
        }
    named = "rope_scaling" if OLD_TRANSFORMERS else "rope_parameters"
    network = build("llama", dtype=torch.float64, max_position_embeddings=limit, **{named: rope})
    model = LanguageModel(network)
    model.eos_ids = ()
    found, tokens = answers(model)
    assert found == whole(model, monkeypatch, lambda: deactivated(model))
    read = len(PROMPTS) * (max(map(len, PROMPTS)) + STEPS - 1)
    assert tokens == read if kind != "default" else tokens < read


def test_noise_is_drawn_for_every_row(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("llama")
    noisy = functools.partial(patched, model, None, some(model), mode="noise", values=2.0)
    with noisy():
        found = answers(model)[0]
    assert found == whole(model, monkeypatch, noisy)
    assert found != answers(model)[0]


def test_hooks_of_others_see_whole_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    model, lengths = model_of("llama"), []

    def steer(_module: object, _args: object, output: torch.Tensor) -> torch.Tensor:
        lengths.append(output.shape[1])
        output[:, -1] += 3.0  # the last token of the request, and every one that is written
        return output

    handle = model.inner.get_input_embeddings().register_forward_hook(steer)
    found = answers(model)[0]
    assert lengths[0] == max(map(len, PROMPTS))
    assert found == whole(model, monkeypatch, lambda: deactivated(model))
    handle.remove()
    assert found != answers(model)[0]


def test_whoever_asks_about_requests_gets_whole_ones() -> None:
    model, seen = model_of("llama"), []

    def even(requests: list[list[int]]) -> list[bool]:
        seen.extend(map(list, requests))
        return [len(request) % 2 == 0 for request in requests]

    with scaled(model, some(model), 3.0, when=even):
        found = answers(model)[0]
    assert sorted(seen) == sorted(PROMPTS)
    with scaled(model, some(model), 3.0):
        always = answers(model)[0]
    never = answers(model)[0]
    assert always != never
    assert found == {
        row: (always if len(prompt) % 2 == 0 else never)[row] for row, prompt in enumerate(PROMPTS)
    }
