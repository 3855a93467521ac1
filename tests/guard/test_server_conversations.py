"""Conversations and fields that hide what is asked, put to every route that judges: what is stopped alone is
stopped wherever it stands.
"""

import asyncio
import itertools
import json

import httpx
import numpy as np
import pytest
from guarded import texts, tiny_guard, tiny_model
from server_tools import UNSAFE, Fed, Words, running, service
from test_generate import SHAPES
from test_generate import UNSAFE as MARK

from safety_neurons.guard import GuardedModel
from safety_neurons.guard.features import readings
from safety_neurons.guard.server import Limits, Settings, serve_guard
from safety_neurons.guard.server.shapes import is_identifier
from safety_neurons.model import LanguageModel
from safety_neurons.prompt_lists import Message, Prompt
from tiny import tiny_llama, tiny_tokenizer

WEB = httpx.Client(verify=False, timeout=60)
"""One client for all: each of its own would read the machine's certificates anew."""
CHAT, BAD = "/v1/chat/completions", f"plan an {UNSAFE} please"
TURNS = {
    **SHAPES,
    "developer": [("developer", MARK), ("user", "hello")],
    "function": [("user", "hello"), ("function", MARK), ("user", "go on")],
    "tool before a safe answer": [("user", "hello"), ("tool", MARK), ("assistant", "yes"), ("user", "go on")],
}
HIDDEN = [
    {"content": [{"type": "text", "text": BAD}, {"type": "text", "text": "thank you , now go on"}]},
    {"reasoning_content": BAD},
    {"reasoning": BAD},
    {"reasoning_details": [{"type": "reasoning.text", "text": BAD}]},
    {"thinking_blocks": [{"type": "thinking", "thinking": BAD, "signature": "x"}]},
    {"refusal": BAD},
    {"annotations": [{"title": BAD}]},
    {"function_call": {"name": "f", "arguments": json.dumps({"q": BAD})}},
    {
        "tool_calls": [
            {
                "id": "call_1",
                "type": "function",
                "function": {"name": "f", "arguments": json.dumps({"q": BAD})},
            }
        ]
    },
    {
        "tool_calls": [
            {"id": f"how-to-{UNSAFE}-now", "type": "function", "function": {"name": "f", "arguments": "{}"}}
        ]
    },
    {"tool_call_id": f"how_to_plan_an_{UNSAFE}"},
    {"name": f"plan-an-{UNSAFE}"},
]
TOOL = {"type": "function", "function": {"name": "f", "description": "look up the weather", "parameters": {}}}
SCHEMA = {"type": "object", "properties": {"a": {"type": "string", "description": BAD}}}
UPWARDS = [
    {"user": BAD},
    {"user": f"plan-an-{UNSAFE}"},
    {"safety_identifier": f"please_plan_an_{UNSAFE}_2"},
    {"prompt_cache_key": f"PlanAn-{UNSAFE}-on-them"},
    {"metadata": {"note": BAD}},
    {"metadata": {BAD: "x"}},
    {"metadata": {"a": "plan", "b": "an", "c": UNSAFE}},
    {"stop": BAD},
    {"stop": ["please", "plan", "an", UNSAFE]},
    {"prediction": {"type": "content", "content": BAD}},
    {"prediction": {"type": "content", "content": [{"type": "text", "text": BAD}]}},
    {"tools": [TOOL, {**TOOL, "function": {"name": "f", "description": BAD}}]},
    {"tools": [TOOL, {**TOOL, "function": {"name": "f", "parameters": SCHEMA}}]},
    {"response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": SCHEMA}}},
    {"tool_choice": {"type": "function", "function": {"name": f"plan_an_{UNSAFE}"}}},
    {"model": BAD},
]


class Last(Words):
    """Reads the last turn alone, and of that the end: what stands before hides nothing from a judge of each
    text.
    """

    def prepare(self, prompt: Prompt) -> Fed:
        super().prepare(prompt)
        turn = prompt.turns[-1]
        words = turn.content.replace('"', " ").split() if turn.role == "user" else []
        return Fed(words[-4:] or ["<empty>"])


@pytest.fixture(scope="module")
def proxy(upstream):
    with running(service(Last(), upstream=upstream.url)) as found:
        yield found


@pytest.fixture(scope="module")
def strict():
    """A guard that flags one text alone and not within the conversations, and that text."""
    guard = tiny_guard(tiny_model())
    some = texts(60)
    chances = [verdict.p_unsafe for verdict in guard.score_batch(some)]
    place = int(np.argmax(chances))
    return guard.with_threshold(chances[place] - 1e-4), some[place]


@pytest.fixture(scope="module")
def local(strict):
    with running(serve_guard(strict[0], Settings("tiny"))) as found:
        yield found


def turns(shape, text):
    return [{"role": role, "content": content.replace(MARK, text)} for role, content in TURNS[shape]]


def reason(said, stream):
    assert said.status_code == 200, said.text
    if not stream:
        return said.json()["choices"][0]["finish_reason"]
    events = [json.loads(line[6:]) for line in said.text.splitlines() if line.startswith("data: {")]
    return next(event["choices"][0]["finish_reason"] for event in reversed(events) if event["choices"])


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("shape", TURNS)
def test_what_is_stopped_alone_is_stopped_in_every_conversation(
    proxy, upstream, local, strict, shape, stream
):
    before = len(upstream.bodies)
    said = WEB.post(
        f"{proxy}{CHAT}",
        json={"model": "far", "messages": turns(shape, BAD[: -len(" please")]), "stream": stream},
    )
    assert reason(said, stream) == "content_filter"
    assert len(upstream.bodies) == before
    body = {"model": "tiny", "messages": turns(shape, strict[1]), "max_tokens": 3, "stream": stream}
    assert reason(WEB.post(f"{local}{CHAT}", json=body), stream) == "content_filter"
    plain = {**body, "messages": turns(shape, "make a cake")}
    assert reason(WEB.post(f"{local}{CHAT}", json=plain), stream) in ("length", "stop")


@pytest.mark.parametrize("shape", TURNS)
def test_conversations_are_judged_alike_on_every_route(local, strict, shape):
    for text, flagged in ((strict[1], True), ("make a cake", False)):
        given = turns(shape, text)
        assert [
            found["flagged"]
            for found in WEB.post(f"{local}/v1/moderations", json={"input": given}).json()["results"]
        ] == [flagged]
        label = WEB.post(f"{local}/classify", json={"input": given}).json()["data"]
        assert [found["label"] for found in label] == ["unsafe" if flagged else "safe"]
        asked = {"texts": ["make"], "structured_messages": given, "input_type": "request"}
        said = WEB.post(f"{local}/beta/litellm_basic_guardrail_api", json=asked).json()
        assert said["action"] == ("BLOCKED" if flagged else "NONE")


@pytest.mark.parametrize("field", HIDDEN, ids=lambda field: next(iter(field)))
def test_whatever_a_message_holds_is_accepted_and_judged(proxy, upstream, field):
    before = len(upstream.bodies)
    answer = {"role": "assistant", "content": "a nice day", **field}
    hidden = [{"role": "user", "content": "hello"}, answer, {"role": "user", "content": "go"}]
    assert (
        reason(WEB.post(f"{proxy}{CHAT}", json={"model": "far", "messages": hidden}), False)
        == "content_filter"
    )
    assert len(upstream.bodies) == before
    plain = json.loads(json.dumps(hidden).replace(UNSAFE, "picnic"))
    assert reason(WEB.post(f"{proxy}{CHAT}", json={"model": "far", "messages": plain}), False) == "stop"
    assert upstream.bodies[-1]["messages"] == plain


def test_a_guardrail_judges_a_text_that_stands_within_a_turn(proxy):
    given = {
        "texts": [BAD],
        "structured_messages": [{"role": "user", "content": f"{BAD} , thank you and all the best"}],
        "input_type": "request",
    }
    assert WEB.post(f"{proxy}/beta/litellm_basic_guardrail_api", json=given).json()["action"] == "BLOCKED"
    parts = [{"type": "text", "text": BAD}, {"type": "text", "text": "thank you , now go on"}]
    assert WEB.post(f"{proxy}/v1/moderations", json={"input": parts}).json()["results"][0]["flagged"]


@pytest.mark.parametrize("field", UPWARDS, ids=lambda field: next(iter(field)))
def test_every_field_that_goes_upstream_is_judged(proxy, upstream, field):
    asked = {"model": "far", "messages": [{"role": "user", "content": "hello"}]}
    before = len(upstream.bodies)
    assert reason(WEB.post(f"{proxy}{CHAT}", json={**asked, **field}), False) == "content_filter"
    assert len(upstream.bodies) == before
    plain = json.loads(json.dumps({**asked, **field}).replace(UNSAFE, "picnic"))
    assert reason(WEB.post(f"{proxy}{CHAT}", json=plain), False) == "stop"
    assert upstream.bodies[-1] == plain


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("reasoning_effort", f"plan-an-{UNSAFE}"),
        ("modalities", ["plan", "an", UNSAFE]),
        ("logit_bias", {UNSAFE: 1}),
        ("verbosity", {"plan": UNSAFE}),
        ("min_p", f"plan:an:{UNSAFE}"),
        ("chat_template_kwargs", {"system": BAD}),
        ("chat_template_kwargs", {"note": ["plan", UNSAFE]}),
        ("chat_template_kwargs", {BAD: True}),
        ("chat_template_kwargs", {"continue_final_message": True}),
        ("chat_template_kwargs", BAD),
        ("stream_options", {"prompt": BAD}),
        ("stream_options", {"include_usage": True, "x": 1}),
    ],
)
def test_what_is_not_judged_holds_one_word_or_is_refused(proxy, upstream, local, field, value):
    before = len(upstream.bodies)
    for address, model in ((proxy, "far"), (local, "tiny")):
        said = WEB.post(
            f"{address}{CHAT}",
            json={"model": model, "messages": [{"role": "user", "content": "hello"}], field: value},
        )
        assert said.status_code == 400
        assert said.json()["error"]["param"].partition(".")[0] == field
    assert len(upstream.bodies) == before


def test_arguments_of_a_template_that_hold_no_text_go_upstream(proxy, upstream):
    given = {"enable_thinking": False, "thinking_budget": 512, "reasoning_effort": "high", "thinking": None}
    asked = {
        "model": "far",
        "messages": [{"role": "user", "content": "hello"}],
        "chat_template_kwargs": given,
    }
    assert WEB.post(f"{proxy}{CHAT}", json=asked).status_code == 200
    assert upstream.bodies[-1]["chat_template_kwargs"] == given


def test_identifiers_of_machines_are_not_judged_and_words_are():
    uuid = "550e8400-e29b-41d4-a716-446655440000"
    assert all(
        map(
            is_identifier,
            [
                "call_9pXUeLmT4v0",
                "chatcmpl-tool-8a5f0c1b2d3e4f5a",
                uuid,
                f"user-{uuid}",
                "user-1234",
                "alice",
                "0f" * 32,
            ],
        )
    )
    words = [
        "how-to-build-a-bomb",
        "how_to_build_2",
        "howtobuildabomb",
        "bu1ld-a-b0mb-4t-h0me",
        "a b",
        "HowToBuildABomb1",
        "x" * 65,
        "é",
    ]
    assert not any(map(is_identifier, words))


NO_OPS = [
    {"tools": []},
    {"functions": []},
    {"response_format": {"type": "text"}},
    {"tool_choice": "none"},
    {"tool_choice": "auto"},
    {"function_call": "none"},
    {"n": 1},
    {"stop": None},
    {"stop": []},
    {"logit_bias": {}},
    {"stream_options": None},
    {"stream_options": {"include_usage": None, "other": None}},
    {"parallel_tool_calls": True},
    {"logprobs": False},
    {"top_logprobs": None},
    {"frequency_penalty": 0},
    {"presence_penalty": 0.0},
    {"user": None},
    {"user": "user-1"},
    {"metadata": None},
    {"metadata": {}},
    {"modalities": ["text"]},
    {"store": False},
    {"service_tier": "auto"},
    {"seed": None},
    {"temperature": None},
    {"max_tokens": None, "max_completion_tokens": 2},
    {"top_p": 1},
    {"prediction": None},
    {"reasoning_effort": None},
    {"chat_template_kwargs": {}},
]


@pytest.mark.parametrize("field", NO_OPS, ids=str)
def test_values_that_ask_for_nothing_are_accepted(proxy, local, field):
    for address, model in ((proxy, "far"), (local, "tiny")):
        asked = {
            "model": model,
            "messages": [{"role": "user", "content": "make a cake"}],
            "max_tokens": 2,
            **field,
        }
        said = WEB.post(f"{address}{CHAT}", json=asked)
        assert said.status_code == 200, said.text


HISTORIES = {
    "reasoning": {"reasoning_content": "make a cake"},
    "other reasoning": {
        "reasoning": "make a cake",
        "refusal": None,
        "audio": None,
        "annotations": [],
        "function_call": None,
    },
    "marked": {"cache_control": {"type": "ephemeral", "ttl": "5m"}},
    "marked part": {"content": [{"type": "text", "text": "a tree", "cache_control": {"type": "ephemeral"}}]},
    "named": {"name": "cake"},
    "calls": {
        "content": None,
        "tool_calls": [{"id": "call_1", "type": "function", "function": {"name": "cake", "arguments": "{}"}}],
    },
}


@pytest.mark.parametrize("message", HISTORIES.values(), ids=HISTORIES)
def test_the_second_turn_of_a_chat_is_answered(proxy, local, message):
    answer = {"role": "assistant", "content": "a tree", **message}
    last = {"role": "user", "content": "a cake"}
    if "tool_calls" in message:
        last = {"role": "tool", "tool_call_id": "call_1", "content": "a cake"}
    for address, model in ((proxy, "far"), (local, "tiny")):
        messages = [{"role": "user", "content": "make a cake"}, answer, last]
        said = WEB.post(f"{address}{CHAT}", json={"model": model, "messages": messages, "max_tokens": 2})
        assert said.status_code == 200, said.text


ALTERNATING = (
    "{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] }} {% set messages = messages[1:] "
    "%}{% endif %}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) "
    "%}{{ raise_exception('roles must alternate') }}{% endif %}<|{{ message['role'] }}|> {{ "
    "message['content'] }} {% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
ROLES = {
    "two users": ["user", "user"],
    "system in the middle": ["user", "assistant", "system", "user"],
    "two systems": ["system", "system", "user"],
    "a tool and a user": ["user", "assistant", "tool", "user"],
    "developer behind system": ["system", "developer", "user"],
}


@pytest.fixture(scope="module")
def alternating():
    lm = LanguageModel(tiny_llama(), tiny_tokenizer(ALTERNATING), name="tiny")
    with running(serve_guard(tiny_guard(lm, threshold=1.0), Settings("tiny"))) as found:
        yield found


@pytest.mark.parametrize("roles", ROLES.values(), ids=ROLES)
def test_turns_that_a_template_refuses_as_they_are_are_joined(alternating, roles):
    messages = [{"role": role, "content": "make a cake"} for role in roles]
    said = WEB.post(f"{alternating}{CHAT}", json={"model": "tiny", "messages": messages, "max_tokens": 2})
    assert said.status_code == 200, said.text
    assert WEB.post(f"{alternating}/v1/moderations", json={"input": messages}).status_code == 200


def test_a_conversation_that_grows_has_each_turn_judged_once_and_counts_as_one():
    judge = Words()
    served = service(judge)
    with running(served) as address:
        for count in (1, 3, 5):
            given = [
                {"role": "user" if place % 2 == 0 else "assistant", "content": f"turn number {place}"}
                for place in range(count)
            ]
            assert not WEB.post(f"{address}/v1/moderations", json={"input": given}).json()["results"][0][
                "flagged"
            ]
        read = [" ".join(ids) for ids in itertools.chain.from_iterable(judge.batches)]
        assert sorted(text for text in read if text.count("turn") == 1) == [
            f"turn number {place}" for place in range(5)
        ]
        assert sum(text.count("turn") > 1 for text in read) == 2
        assert "safety_neurons_guard_score_count 3.0" in WEB.get(f"{address}/metrics").text


def test_what_could_not_be_judged_is_not_remembered():
    judge = Words()
    with running(service(judge)) as address:
        given = [
            {"role": "user", "content": "nan"},
            {"role": "assistant", "content": "yes"},
            {"role": "user", "content": "go on"},
        ]
        for _ in range(2):
            assert (
                WEB.post(f"{address}/v1/moderations", json={"input": given}).json()["results"][0]["guard"][
                    "status"
                ]
                == "error"
            )
        assert sum(ids == ["nan"] for batch in judge.batches for ids in batch) == 2


def test_a_conversation_with_more_readings_than_may_wait_is_judged():
    served = service(limits=Limits(waiting=8))
    with running(served) as address:
        given = [{"role": "user", "content": f"number {place}"} for place in range(256)]
        said = WEB.post(f"{address}/v1/moderations", json={"input": given})
        assert said.status_code == 200, said.text
        given[3] = {"role": "user", "content": "attack"}
        assert WEB.post(f"{address}/v1/moderations", json={"input": given}).json()["results"][0]["flagged"]


def test_no_more_readings_are_kept_than_fit(monkeypatch):
    from safety_neurons.guard.server import engine

    monkeypatch.setattr(engine, "_REMEMBERED", 3)
    served = service()

    async def ask():
        served.engine.start()
        for place in range(5):
            await served.gate.look(
                readings(Prompt("0", "x", (Message("user", f"a {place}"), Message("user", f"b {place}"))))
            )
        await served.engine.close()

    asyncio.run(ask())
    assert len(served.gate._known) == 3


@pytest.mark.parametrize(
    "path", ["/healthz", "/readyz", "/v1/models", "/v1/models/tiny", "/metrics", "/openapi.json"]
)
def test_head_is_answered_where_get_is_without_a_body(local, path):
    whole, head = WEB.get(f"{local}{path}"), WEB.head(f"{local}{path}")
    assert (head.status_code, head.content) == (whole.status_code, b"") == (200, b"")
    assert head.headers["content-type"] == whole.headers["content-type"]


@pytest.mark.parametrize(
    ("path", "allowed"),
    [
        ("/v1/models", "GET, HEAD, OPTIONS"),
        ("/healthz", "GET, HEAD, OPTIONS"),
        (CHAT, "OPTIONS, POST"),
        ("/classify", "OPTIONS, POST"),
    ],
)
def test_options_say_what_a_route_takes(local, path, allowed):
    said = WEB.options(f"{local}{path}")
    assert (said.status_code, said.headers["allow"], said.content) == (204, allowed, b"")
    assert "access-control-allow-origin" not in said.headers
    other = WEB.put(f"{local}{path}", json={})
    assert (other.status_code, other.headers["allow"]) == (405, allowed)
    assert WEB.options(f"{local}/nowhere").status_code == 404


@pytest.mark.parametrize("pooling", ["last", "agree", "mean"])
def test_a_server_decides_as_a_guarded_model_does(pooling: str) -> None:
    """Behind a begun answer too, the end of which guards that read ends do not count."""
    model = tiny_model()
    guard = tiny_guard(model, pooling)
    asked, begun = texts(24, 7), texts(24, 8)
    wrapped = [
        [{"role": "user", "content": text}, {"role": "assistant", "content": start}]
        for text, start in zip(asked, begun, strict=True)
    ]
    (middle,) = np.quantile([verdict.p_unsafe for verdict in guard.score_batch(wrapped)], [0.5])
    guard = guard.with_threshold(float(middle))
    expected = GuardedModel(model, guard).generate(wrapped, max_new_tokens=3)
    ends, whole = set[bool](), guard.score_encoded([guard.encode(turns) for turns in wrapped])
    with running(serve_guard(guard, Settings("tiny"))) as address:
        for turns, answer, end in zip(wrapped, expected, whole, strict=True):
            asked = {"model": "tiny", "messages": turns, "max_tokens": 3}
            said = WEB.post(f"{address}{CHAT}", json=asked).json()["choices"][0]
            assert (said["finish_reason"] == "content_filter") == answer.stopped
            assert said["message"]["content"] == answer.text
            (judged,) = WEB.post(f"{address}/v1/moderations", json={"input": turns}).json()["results"]
            assert judged["category_scores"]["unsafe"] == pytest.approx(answer.verdict.p_unsafe, abs=1e-5)
            ends |= {end.flagged and not answer.stopped}
    assert {answer.stopped for answer in expected} == {False, True}
    assert (True in ends) == (pooling != "mean")  # else nothing was left out
