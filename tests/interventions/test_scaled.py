"""Scaled neurons against scaled weights, and the condition on the request."""

import copy

import pytest
import torch
from naive import columns, full, generated, lm, no_hooks, some
from transformers import DynamicCache

from families import build, random_ids
from safety_neurons.errors import DecodeError, NeuronError, UsageError
from safety_neurons.interventions import deactivated, scaled
from safety_neurons.model import LanguageModel
from safety_neurons.model.decoding import Decoding, following
from safety_neurons.model.language_model import generate
from safety_neurons.model.sites import projection
from safety_neurons.neurons import NeuronSet
from tiny import CHAT_TEMPLATE, FILL, tiny_llama, tiny_tokenizer

IDS, MASK = random_ids((3, 7)), torch.ones(3, 7, dtype=torch.long)


def multiplied(model: LanguageModel, neurons: NeuronSet, factor: float) -> LanguageModel:
    """A copy whose rows (with their bias entries) and columns of these neurons are multiplied."""
    other = lm(copy.deepcopy(model.model))
    with torch.no_grad():
        for key, index in neurons.items():
            place = model.anatomy.places[key]
            base = projection(other.model.get_submodule(place.module_name)).base
            weight = base.weight.T if place.transposed else base.weight
            where = columns(place)[torch.tensor(index)]
            if place.side == "output":
                weight[where] *= factor
                if base.bias is not None:
                    base.bias[where] *= factor
            else:
                weight[:, where] *= factor
    return other


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "gemma2"])
@pytest.mark.parametrize("factor", [0.5, 2.0, -1.0])
def test_a_factor_on_activations_is_a_factor_on_weights(family: str, factor: float) -> None:
    model = lm(build(family, torch.float64))
    neurons = some(model, 0.3)
    with scaled(model, neurons, factor):
        logits = full(model, IDS, MASK)
    expected = full(multiplied(model, neurons, factor), IDS, MASK)
    assert (logits - expected).abs().max() <= 1e-12 * expected.abs().max().clamp(min=1)
    no_hooks(model.model)


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return lm(build("llama"))


def test_one_changes_no_bit_and_zero_is_deactivation(model: LanguageModel) -> None:
    plain = full(model, IDS, MASK)
    with scaled(model, some(model), 1):
        assert torch.equal(full(model, IDS, MASK), plain)
    with deactivated(model, some(model)):
        off = generated(model, IDS, MASK, 4)
    with scaled(model, some(model), 0):
        output = generated(model, IDS, MASK, 4)
    assert torch.equal(torch.stack(output.logits), torch.stack(off.logits))


def second_only(seen: list) -> object:
    def holds(rows: list[list[int]]) -> list[bool]:
        seen.append(rows)
        return [row == IDS[1].tolist() for row in rows]

    return holds


@pytest.mark.parametrize("cached", [True, False])
def test_a_condition_is_asked_once_and_holds_row_by_row(model: LanguageModel, cached: bool) -> None:
    seen: list = []
    plain = generated(model, IDS, MASK, 4, use_cache=cached)
    with scaled(model, some(model), 3):
        every = generated(model, IDS, MASK, 4, use_cache=cached)
    with scaled(model, some(model), 3, when=second_only(seen)):
        output = generated(model, IDS, MASK, 4, use_cache=cached)
    assert seen == [IDS.tolist()]
    chosen, others = torch.stack(output.logits), torch.stack(plain.logits)
    assert torch.equal(chosen[:, [0, 2]], others[:, [0, 2]])
    assert torch.allclose(chosen[:, 1], torch.stack(every.logits)[:, 1])
    assert not torch.allclose(chosen[:, 1], others[:, 1])


def test_padding_is_no_part_of_a_request_and_nothing_is_scaled_while_asking(model: LanguageModel) -> None:
    mask = MASK.clone()
    mask[0, :3] = 0
    plain, read = full(model, IDS, MASK), []

    def holds(rows: list[list[int]]) -> list[bool]:
        read.extend(map(len, rows))
        with torch.no_grad():
            assert torch.equal(model.model(input_ids=IDS, attention_mask=MASK).logits, plain)
        return [True] * len(rows)

    with scaled(model, some(model), 3, when=holds):
        full(model, IDS, mask)
    assert read == [4, 7, 7]


def test_experts_are_scaled_by_the_request_their_token_is_of() -> None:
    model = lm(build("mixtral", torch.float64))
    neurons = NeuronSet.all(model.table).only(sites=["down"])
    plain = full(model, IDS, MASK)
    with scaled(model, neurons, 2):
        every = full(model, IDS, MASK)
    with scaled(model, neurons, 2, when=second_only([])):
        output = full(model, IDS, MASK)
    assert torch.equal(output[[0, 2]], plain[[0, 2]])
    assert torch.allclose(output[1], every[1])
    assert not torch.allclose(plain[1], every[1])


def test_what_cannot_be_is_refused(model: LanguageModel) -> None:
    with pytest.raises(UsageError, match="finite"), scaled(model, some(model), float("nan")):
        pass
    with pytest.raises(NeuronError), scaled(model, {"layers.0.down": [10**6]}, 2):
        pass
    with (
        pytest.raises(UsageError, match="2 answers about 3"),
        scaled(model, some(model), 2, when=lambda rows: [True, True]),
    ):
        full(model, IDS, MASK)
    with scaled(model, some(model), 2, when=lambda rows: [True] * len(rows)), pytest.raises(DecodeError):
        model.model(inputs_embeds=model.model.get_input_embeddings()(IDS))
    no_hooks(model.model)


class Left:
    """Writes down which rows of a batch are left."""

    def __init__(self, left: list[list[int]]) -> None:
        self.left = left

    def alike(self) -> None:
        return None

    def keep(self, _: object, rows: torch.Tensor) -> None:
        self.left.append(rows.tolist())


def test_rows_that_leave_a_batch_take_their_answers_with_them() -> None:
    inner = tiny_llama(3)
    with torch.no_grad():
        inner.lm_head.weight[2] *= 2.5
    model = LanguageModel(inner, tiny_tokenizer(CHAT_TEMPLATE))
    asked = [" ".join(FILL[place : place + 2 + place % 5]) for place in range(12)]
    flags = {tuple(row.ids): place % 2 == 0 for place, row in enumerate(model.encode(asked))}
    ids, neurons = list(flags), some(model, 0.3)
    left: list = []

    def answers(size: int) -> list[list[int]]:
        found = generate(model, ids, Decoding(12), batch_size=size)
        return [found[place].token_ids for place in range(len(ids))]

    plain = answers(1)
    with scaled(model, neurons, 3):
        every = answers(1)
    with (
        scaled(model, neurons, 3, when=lambda rows: [flags[tuple(row)] for row in rows]),
        following(Left(left)),
    ):
        together = answers(12)
    assert left
    assert left[0][:2] != [0, 1]
    assert together == [every[place] if place % 2 == 0 else plain[place] for place in range(12)]
    assert together != plain
    assert together != every


def test_two_requests_may_be_continued_in_turn(model: LanguageModel) -> None:
    def read(ids: torch.Tensor, cache: DynamicCache) -> torch.Tensor:
        with torch.no_grad():
            return model.model(input_ids=ids, past_key_values=cache).logits

    def last(condition: object) -> torch.Tensor:
        caches = [DynamicCache(config=model.model.config) for _ in range(2)]
        with scaled(model, some(model), 3, when=condition):
            for row, cache in zip(IDS, caches, strict=False):
                read(row[None, :-1], cache)
            return read(IDS[:1, -1:], caches[0])

    def first_only(rows: list[list[int]]) -> list[bool]:
        return [row == IDS[0, :-1].tolist() for row in rows]

    assert torch.equal(last(first_only), last(lambda rows: [True] * len(rows)))
    assert not torch.allclose(last(first_only), last(lambda rows: [False] * len(rows)))
