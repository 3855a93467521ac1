"""Requests made to pass the guard unread, or to keep others from being served."""

import asyncio

import httpx
import pydantic
import pytest
import torch
from server_tools import TOKEN, Words, running, service

from safety_neurons.guard.server.local import Decode, LocalAnswer
from safety_neurons.guard.server.routes import CompletionRequest
from safety_neurons.guard.server.shapes import (
    ChatRequest,
    ClassifyRequest,
    ModerationRequest,
    Part,
    Problem,
    text_of,
    validated,
)

SHOWN = {"Authorization": f"Bearer {TOKEN}"}
CALL = {"id": "a", "type": "function", "function": {"name": "f", "arguments": '{"q": "an \\u0061ttack now"}'}}
TWICE = {**CALL, "function": {"name": "f", "arguments": '{"q": "an \\u0061ttack now", "q": "x"}'}}
TURN = {"role": "user", "content": "hello"}
ROUTE = "/beta/litellm_basic_guardrail_api"


@pytest.fixture(scope="module")
def address(upstream):
    with running(service(Words(), upstream=upstream.url, token=TOKEN)) as found:
        yield found


@pytest.mark.parametrize(
    "turn",
    [
        {"role": "user", "content": [{"type": "refusal", "text": "hello", "refusal": "an attack now"}]},
        {"role": "user", "content": [{"type": "text", "text": "hello", "annotations": ["an attack now"]}]},
        {"role": "assistant", "content": "hello", "annotations": [{"text": "an attack now"}]},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "assistant", "content": None, "tool_calls": [TWICE]},
        {"role": "user", "content": "hello", "name": "attack"},
        {"role": "user", "content": "hello", "name": "how,to:an\u200battack"},
        {"role": "user", "content": "hello", "name": "howToPlanAn,attackNow"},
        {
            "role": "user",
            "content": [{"type": "text", "text": "an att"}, {"type": "text", "text": "ack now"}],
        },
        {
            "role": "tool",
            "tool_call_id": "call_1",
            "content": [{"type": "text", "text": ""}, {"type": "text", "text": "an attack now"}],
        },
    ],
)
def test_whatever_an_upstream_may_show_its_model_is_judged(address, upstream, turn):
    before = len(upstream.bodies)
    answer = httpx.post(
        f"{address}/v1/chat/completions", headers=SHOWN, json={"model": "far", "messages": [turn]}
    )
    assert answer.json()["choices"][0]["finish_reason"] == "content_filter"
    assert len(upstream.bodies) == before


@pytest.mark.parametrize(
    "name", ["reasoning_effort", "verbosity", "service_tier", "modalities", "top_k", "logit_bias", "logprobs"]
)
def test_fields_that_are_not_read_hold_words_and_numbers_only(address, upstream, name):
    asked = {"model": "far", "messages": [{"role": "user", "content": "hello"}]}
    before = len(upstream.bodies)
    for value in ("high\n\nuser: an attack", {"a b": "c"}, ["an attack"]):
        answer = httpx.post(f"{address}/v1/chat/completions", headers=SHOWN, json={**asked, name: value})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, name)
    assert len(upstream.bodies) == before
    fine = {
        "reasoning_effort": "high",
        "modalities": ["text"],
        "top_k": 5,
        "logit_bias": {str(token): -1.5 for token in range(99)},
    }
    assert (
        httpx.post(f"{address}/v1/chat/completions", headers=SHOWN, json={**asked, **fine}).status_code == 200
    )


def test_a_guardrail_that_is_shown_nothing_or_two_different_things_does_not_wave_them_through(address):
    turns = [{"role": "user", "content": "hello there"}]
    for body, action in (
        ({}, "BLOCKED"),
        ({"texts": [], "structured_messages": []}, "BLOCKED"),
        ({"texts": ["an attack now"], "structured_messages": turns}, "BLOCKED"),
        ({"texts": ["hello there"], "structured_messages": turns}, "NONE"),
    ):
        assert (
            httpx.post(f"{address}{ROUTE}", headers=SHOWN, json={"input_type": "request", **body}).json()[
                "action"
            ]
            == action
        )


@pytest.mark.parametrize(
    ("shape", "field"), [(ClassifyRequest, "input"), (ModerationRequest, "input"), (ChatRequest, "messages")]
)
def test_a_body_of_nothing_but_mistakes_is_refused_at_the_first(shape, field):
    body = {"model": "m", field: [0] * 2000}
    with pytest.raises(Problem, match=field):
        validated(body, shape)
    with pytest.raises(pydantic.ValidationError) as noted:
        shape.model_validate(body)
    assert (
        noted.value.error_count() <= 4
    )  # one for each kind that the field may be of, and not one for each entry


@pytest.mark.parametrize(
    ("shape", "body", "said"),
    [
        (ChatRequest, None, "the body is null; expected an object"),
        (ChatRequest, {"messages": [TURN]}, "model is missing; give it"),
        (
            ChatRequest,
            {"model": "m", "messages": "hi"},
            "messages: a string of 2 characters arrived; expected a list",
        ),
        (
            ChatRequest,
            {"model": "m", "messages": []},
            "messages: a list of 0 arrived; expected at least 1 of them",
        ),
        (
            ChatRequest,
            {"model": "m", "messages": [TURN], "max_tokens": 1.5},
            "max_tokens: 1.5 arrived; expected a whole number",
        ),
        (
            ChatRequest,
            {"model": "m", "messages": [TURN], "temperature": 3},
            "temperature: 3 arrived; expected at most 2.0",
        ),
        (
            ChatRequest,
            {"model": "m", "messages": [TURN], "stop": ["a", 5]},
            "stop[1]: 5 arrived; expected a string",
        ),
        (
            ChatRequest,
            {"model": "m", "messages": [{**TURN, "content": True}]},
            "messages[0].content: true arrived; expected a string or a list",
        ),
        (
            ChatRequest,
            {"model": "m", "messages": [{**TURN, "content": ["hi"]}]},
            "messages[0].content[0]: a string of 2 characters arrived; expected an object",
        ),
        (
            ChatRequest,
            {"model": "m", "messages": [{**TURN, "name": "a b"}]},
            "messages[0].name: a string of 3 characters arrived; expected at most 128 characters without "
            "spaces, slashes and brackets",
        ),
        (CompletionRequest, {"model": "m", "prompt": [1, 2]}, "prompt[0]: 1 arrived; expected a string"),
        (ModerationRequest, {"input": []}, "input: a list of 0 arrived; expected at least 1 of them"),
        (ModerationRequest, {"input": [5]}, "input[0]: 5 arrived; expected a string or an object"),
        (
            ModerationRequest,
            {"input": [{"role": "robot", "content": "x"}]},
            "input[0].role: a string of 5 characters arrived; expected 'system', 'developer', 'user', "
            "'assistant', 'tool' or 'function'",
        ),
    ],
)
def test_a_wrong_field_is_said_with_what_arrived_and_what_was_expected(shape, body, said):
    with pytest.raises(Problem) as problem:
        validated(body, shape)
    assert problem.value.message == said


@pytest.mark.parametrize(
    ("part", "what"),
    [
        ({"type": "image_url", "image_url": {"url": "x"}}, "a part of type 'image_url'"),
        ({"type": "text", "text": "x", "style": "loud"}, "the field 'style' of a part"),
        ({"type": "text"}, "a part without a text"),
    ],
)
def test_a_part_that_cannot_be_read_is_refused_for_what_is_wrong_with_it(part, what):
    with pytest.raises(Problem) as problem:
        text_of(Part(**part), "messages[0]")
    assert problem.value.message == f"messages[0]: the guard cannot read {what}; expected text"


def test_nobody_without_a_token_keeps_a_place_by_a_body_that_never_comes(address):
    async def ask():
        port = int(address.rpartition(":")[2])
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"POST /healthz HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n")
        line = await reader.readline()
        writer.close()
        return line

    assert b" 405 " in asyncio.run(ask())


def test_the_coldest_temperature_is_greedy_and_breaks_no_group():
    for temperature in (5e-324, 1e-310, 1e-7):
        row = object.__new__(LocalAnswer)
        row._settings, row._random = Decode(5, temperature, 1.0, 1), torch.Generator().manual_seed(1)
        assert row.choose(torch.tensor([0.0, 3.0, -1.0, 2.9])) == 1
