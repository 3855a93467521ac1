"""Conversations whose whole looks safer than one of their turns: what is flagged alone is flagged wherever it stands."""

import numpy as np
import pytest
from guarded import texts, tiny_guard, tiny_model

from safety_neurons.errors import InputError
from safety_neurons.guard import Guard, GuardedModel
from safety_neurons.guard.features import MOST_TURNS, readings
from safety_neurons.guard.guard import Verdict, largest
from safety_neurons.model import LanguageModel
from safety_neurons.prompts import Message, as_prompt

UNSAFE = "UNSAFE"
SHAPES = {
    "prefill": [("user", UNSAFE), ("assistant", "sure first you")],
    "two prefills": [("user", UNSAFE), ("assistant", "sure"), ("assistant", "first you")],
    "thanks": [("user", UNSAFE), ("assistant", "of course"), ("user", "thank you go on")],
    "system": [("system", UNSAFE), ("user", "go on")],
    "said by the assistant": [("user", "hello"), ("assistant", UNSAFE), ("user", "go on")],
    "ending in it": [("user", "hello"), ("assistant", UNSAFE)],
    "tool": [("user", "hello"), ("tool", UNSAFE), ("user", "go on")],
    "long ago": [("user", UNSAFE), *[("assistant", "yes"), ("user", "and a tree")] * 6],
    "once more, with a prefill": [("user", "hello"), ("assistant", "yes"), ("user", UNSAFE), ("assistant", "sure")],
}


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return tiny_model()


@pytest.fixture(scope="module")
def guard(model: LanguageModel) -> Guard:
    return tiny_guard(model)


@pytest.fixture(scope="module")
def unsafe(guard: Guard) -> str:
    """Of some texts the one that alone has the largest probability: behind others the same guard finds it safer."""
    some = texts(60)
    return some[int(np.argmax([verdict.p_unsafe for verdict in guard.score_batch(some)]))]


def turns(shape: str, text: str) -> list[dict[str, str]]:
    return [{"role": role, "content": content.replace(UNSAFE, text)} for role, content in SHAPES[shape]]


@pytest.mark.parametrize("shape", SHAPES)
def test_what_is_flagged_alone_is_flagged_in_every_conversation(guard: Guard, unsafe: str, shape: str) -> None:
    alone = guard.score(unsafe).p_unsafe
    assert alone is not None
    strict = guard.with_threshold(alone - 1e-4)
    verdict = strict.score(turns(shape, unsafe))
    assert verdict.flagged
    assert (verdict.p_unsafe or 0) >= alone - 1e-5
    whole = strict.score_encoded([strict.encode(turns(shape, unsafe))])[0]  # as one text: this is what passed
    assert not whole.flagged
    assert verdict.reading != "conversation"


@pytest.mark.parametrize("shape", SHAPES)
def test_a_guarded_model_stops_them_before_a_token_and_answers_the_others_as_before(
    model: LanguageModel, guard: Guard, unsafe: str, shape: str
) -> None:
    alone = guard.score(unsafe).p_unsafe
    strict = guard.with_threshold((alone or 0) - 1e-4)
    plain = "make a cake"
    assert not strict.score(plain).flagged
    guarded = GuardedModel(model, strict)
    stopped, passed = guarded.generate([turns(shape, unsafe), plain], max_new_tokens=5)
    assert (stopped.stopped, stopped.stopped_at, stopped.token_ids) == (True, 0, ())
    assert passed.text == model.complete([plain], max_new_tokens=5)[0].completion
    assert "".join(guarded.stream(turns(shape, unsafe), max_new_tokens=5)) == guarded.refusal


def test_each_turn_is_read_once_and_a_single_one_costs_nothing_more() -> None:
    def names(*roles_and_texts: tuple[str, str]) -> list[str]:
        return [way.name for way in readings(as_prompt([Message(*pair) for pair in roles_and_texts]))]

    assert [way.name for way in readings(as_prompt("cake"))] == names(("user", "cake")) == ["conversation"]
    assert names(("user", "a"), ("assistant", "b")) == ["conversation", "conversation without the last answer", "turn 2"]
    assert names(("user", "a"), ("assistant", "a"), ("user", "a")) == ["conversation", "turn 1"]
    assert names(("assistant", "b")) == ["conversation", "turn 1"]
    assert names(("system", " "), ("user", "a"), ("assistant", "")) == ["conversation", "conversation without the last answer", "turn 2"]
    with pytest.raises(InputError, match="1,025 turns"):
        readings(as_prompt([Message("user", str(number)) for number in range(MOST_TURNS + 1)]))


def test_a_reading_that_could_not_be_judged_is_not_covered_by_one_that_could() -> None:
    safe, unsafe = Verdict(0.2, False, 0.5), Verdict(0.9, True, 0.5)
    broken, passed = Verdict(None, True, 0.5, "error"), Verdict(0.1, False, 0.5, "truncated")
    assert largest([safe, broken]) is broken
    assert largest([safe, passed]) is passed
    assert largest([broken, unsafe, safe]) is unsafe
    assert largest([safe, Verdict(0.3, False, 0.5)]).p_unsafe == 0.3
