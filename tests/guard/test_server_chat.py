import asyncio
import json

import httpx
import openai
import pytest
from server_tools import TOKEN, Words, connected, running, service

from safety_neurons.guard.watching import REFUSAL
from waiting import until

ASKED = [{"role": "user", "content": "how do i bake bread"}]
BAD = [{"role": "user", "content": "plan an attack please"}]


@pytest.fixture(scope="module")
def judge():
    return Words()


@pytest.fixture(scope="module")
def proxy(upstream, judge):
    with running(
        service(judge, upstream=upstream.url, token=TOKEN, upstream_key="the-key-of-the-upstream")
    ) as address:
        yield address


@pytest.fixture
def client(proxy, upstream):
    upstream.mode = "ok"
    with openai.OpenAI(base_url=f"{proxy}/v1", api_key=TOKEN, max_retries=0) as client:
        yield client


def test_the_openai_client_gets_the_upstreams_answer_unchanged(client, upstream):
    answer = client.chat.completions.create(model="far", messages=ASKED, temperature=0.3)
    assert answer.choices[0].message.content == "echo: how do i bake bread"
    assert upstream.bodies[-1] == {"model": "far", "messages": ASKED, "temperature": 0.3}


def test_a_flagged_conversation_is_refused_and_never_reaches_the_upstream(client, upstream):
    before = len(upstream.bodies)
    answer = client.chat.completions.create(model="far", messages=BAD)
    assert answer.choices[0].finish_reason == "content_filter"
    assert "can't help" in answer.choices[0].message.content
    assert answer.usage.total_tokens == 0
    assert len(upstream.bodies) == before


def test_streams_come_piece_by_piece_and_end(client):
    pieces = list(client.chat.completions.create(model="far", messages=ASKED, stream=True))
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == "echo: how do i bake bread"
    assert len(pieces) > 3
    assert pieces[-1].choices[0].finish_reason == "stop"


def test_a_refusal_is_a_stream_where_a_stream_was_asked_for(client):
    asked = client.chat.completions.create(
        model="far", messages=BAD, stream=True, stream_options={"include_usage": True}
    )
    pieces = list(asked)
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices) == REFUSAL
    assert [piece.choices[0].finish_reason for piece in pieces if piece.choices][-1] == "content_filter"
    assert pieces[-1].usage.total_tokens == 0


def test_the_asynchronous_client_works_many_at_a_time(proxy, upstream):
    upstream.mode = "ok"

    async def ask(client, number):
        bad = number % 3 == 0
        text = f"{'attack' if bad else 'bread'} number {number}"
        stream = await client.chat.completions.create(
            model="far", messages=[{"role": "user", "content": text}], stream=True
        )
        said, reason = "", None
        async for piece in stream:
            said += piece.choices[0].delta.content or ""
            reason = piece.choices[0].finish_reason or reason
        assert (reason == "content_filter") == bad
        assert bad or said == f"echo: {text}"

    async def ask_all():
        async with openai.AsyncOpenAI(base_url=f"{proxy}/v1", api_key=TOKEN, max_retries=0) as client:
            await asyncio.gather(*(ask(client, number) for number in range(40)))

    asyncio.run(ask_all())


def test_the_upstream_gets_its_own_key_and_nothing_of_the_clients_headers(client, upstream):
    client.chat.completions.create(model="far", messages=ASKED, extra_headers={"x-internal": "secret"})
    assert upstream.headers[-1]["authorization"] == "Bearer the-key-of-the-upstream"
    assert "x-internal" not in upstream.headers[-1]
    assert TOKEN not in json.dumps(upstream.headers)


def test_tools_and_schemas_are_read_by_the_guard(client, judge):
    tool = {
        "type": "function",
        "function": {"name": "f", "description": "use it to attack , now", "parameters": {}},
    }
    answer = client.chat.completions.create(model="far", messages=ASKED, tools=[tool])
    assert answer.choices[0].finish_reason == "content_filter"
    assert any("attack" in fed for batch in judge.batches for fed in batch if "bake" not in fed)


def test_what_tools_said_is_read_by_the_guard(client):
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    turns = [
        *ASKED,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "attack"},
    ]
    assert (
        client.chat.completions.create(model="far", messages=turns).choices[0].finish_reason
        == "content_filter"
    )


@pytest.mark.parametrize("field", ["chat_template", "documents", "guided_json", "add_generation_prompt"])
def test_fields_that_could_hide_a_prompt_are_refused(client, upstream, field):
    before = len(upstream.bodies)
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model="far", messages=ASKED, extra_body={field: "attack"})
    assert refused.value.code == "unknown_parameter"
    assert refused.value.param == field
    assert len(upstream.bodies) == before


def test_images_are_refused_because_the_guard_cannot_read_them(client):
    parts = [
        {"type": "text", "text": "look"},
        {"type": "image_url", "image_url": {"url": "https://example.org/a.png"}},
    ]
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model="far", messages=[{"role": "user", "content": parts}])
    assert refused.value.code == "unreadable_content"


def test_parts_of_text_are_read_together(client):
    parts = [{"type": "text", "text": "plan an"}, {"type": "text", "text": "attack"}]
    assert (
        client.chat.completions.create(model="far", messages=[{"role": "user", "content": parts}])
        .choices[0]
        .finish_reason
        == "content_filter"
    )


def test_a_prompt_longer_than_the_guard_reads_is_not_passed_on(client, upstream):
    before = len(upstream.bodies)
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model="far", messages=[{"role": "user", "content": "endless"}])
    assert refused.value.code == "context_length_exceeded"
    assert len(upstream.bodies) == before


@pytest.mark.parametrize("word", ["poison", "nan"])
def test_a_guard_that_fails_lets_nothing_through(client, upstream, word):
    before = len(upstream.bodies)
    with pytest.raises(openai.InternalServerError) as refused:
        client.chat.completions.create(model="far", messages=[{"role": "user", "content": word}])
    assert refused.value.code == "guard_error"
    assert len(upstream.bodies) == before


def test_models_are_the_upstreams(client):
    assert [model.id for model in client.models.list()] == ["far"]


@pytest.mark.parametrize(
    ("mode", "status"), [("error", 500), ("refuse", 502), ("redirect", 502), ("garbage", 502)]
)
@pytest.mark.parametrize("stream", [False, True])
def test_an_upstream_that_fails_is_an_error_in_one_shape(client, upstream, mode, status, stream):
    upstream.mode = mode
    with pytest.raises(openai.APIStatusError) as failed:
        list(client.chat.completions.create(model="far", messages=ASKED, stream=stream))
    assert failed.value.status_code == status
    assert set(failed.value.body) == {"message", "type", "param", "code"}
    assert "key-of-the-upstream" not in str(failed.value)


def test_a_stream_that_breaks_off_ends_in_an_error_and_not_as_an_answer(proxy, upstream):
    upstream.mode = "break"
    with (
        openai.OpenAI(base_url=f"{proxy}/v1", api_key=TOKEN, max_retries=0) as client,
        pytest.raises(openai.APIError),
    ):
        list(client.chat.completions.create(model="far", messages=ASKED, stream=True))
    sent = httpx.post(
        f"{proxy}/v1/chat/completions",
        json={"model": "far", "messages": ASKED, "stream": True},
        headers={"x-api-key": TOKEN},
    )
    assert "[DONE]" not in sent.text
    assert "upstream_unavailable" in sent.text


def test_a_stream_that_breaks_off_is_in_the_log(upstream):
    events, asked = [], {"model": "far", "messages": ASKED, "stream": True}
    with running(service(upstream=upstream.url, log=events.append)) as address:
        for mode in ("break", "ok"):
            upstream.mode = mode
            httpx.post(f"{address}/v1/chat/completions", json=asked)
        until(lambda: len(events) == 2)
    assert [event.get("code") for event in events] == ["upstream_unavailable", None]


def test_an_answer_of_an_upstream_that_knows_no_streams_is_called_what_it_is(proxy, upstream):
    upstream.mode, asked = "unstreamed", {"model": "far", "messages": ASKED, "stream": True}
    said = httpx.post(f"{proxy}/v1/chat/completions", json=asked, headers={"x-api-key": TOKEN})
    upstream.mode = "ok"
    assert said.headers["content-type"] == "application/json"
    assert said.json()["choices"][0]["message"]["content"].startswith("echo")


def test_every_error_is_counted_once_by_its_code(upstream):
    good, route = {"model": "far", "messages": ASKED}, "/v1/chat/completions"
    with running(service(upstream=upstream.url, on_unsafe="error")) as address:
        asked = [(route, good), (route, {**good, "messages": []}), (route, {**good, "messages": BAD})]
        asked += [(route, {**good, "messages": [{"role": "user", "content": "x" * (1 << 21)}]})]
        statuses = [
            httpx.post(f"{address}{path}", json=body).status_code for path, body in [*asked, ("/v1/no", good)]
        ]
        page = httpx.get(f"{address}/metrics").text
    counted = dict(line.rsplit(" ", 1) for line in page.splitlines() if "_rejected_total{" in line)
    assert statuses == [200, 400, 400, 413, 404]
    assert sum(map(float, counted.values())) == 4
    for code in ("content_filter", "body_too_large", "not_found"):
        assert counted[f'safety_neurons_guard_rejected_total{{code="{code}"}}'] == "1.0"


def test_an_upstream_that_dies_is_502_and_one_that_returns_answers_again(proxy, upstream):
    upstream.mode = "ok"
    with openai.OpenAI(base_url=f"{proxy}/v1", api_key=TOKEN, max_retries=0) as client:
        upstream.die()
        with pytest.raises(openai.InternalServerError) as failed:
            client.chat.completions.create(model="far", messages=ASKED)
        assert failed.value.status_code == 502
        assert (
            client.chat.completions.create(model="far", messages=BAD).choices[0].finish_reason
            == "content_filter"
        )
        upstream.start()
        assert (
            client.chat.completions.create(model="far", messages=ASKED)
            .choices[0]
            .message.content.startswith("echo")
        )


def test_a_client_that_leaves_ends_the_upstreams_work(proxy, upstream):
    upstream.mode, before = "slow", len(upstream.bodies)
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nX-Api-Key: {TOKEN}\r\nContent-Type: "
        "application/json\r\n"
    )
    body = json.dumps({"model": "far", "messages": ASKED}).encode()
    with connected(proxy) as connection:
        connection.sendall(head.encode() + f"Content-Length: {len(body)}\r\n\r\n".encode() + body)
        until(lambda: len(upstream.bodies) > before)
    wanted = {
        "safety_neurons_guard_disconnected_total 1.0",
        "safety_neurons_guard_in_flight 1.0",
    }  # under way: this very question
    until(
        lambda: (
            wanted
            <= set(
                httpx.get(f"{proxy}/metrics", headers={"x-api-key": TOKEN}, timeout=None).text.splitlines()
            )
        )
    )
    upstream.mode = "ok"


def test_shadow_mode_answers_everything_and_counts_what_it_would_have_held(upstream):
    upstream.mode = "ok"
    events = []
    with running(service(upstream=upstream.url, shadow=True, log=events.append)) as address:
        said = httpx.post(f"{address}/v1/chat/completions", json={"model": "far", "messages": BAD})
        assert said.json()["choices"][0]["message"]["content"] == "echo: plan an attack please"
        flagged = 'flagged_total{route="/v1/chat/completions"} 1.0'
        until(lambda: flagged in httpx.get(f"{address}/metrics", timeout=None).text)
        page = httpx.get(f"{address}/metrics", timeout=None).text
        assert 'blocked_total{route="/v1/chat/completions"} 1.0' not in page
    seen = next(event for event in events if event["event"] == "shadow")
    assert (seen["flagged"], seen["p_unsafe"]) == (1, 0.9)
    assert seen["id"] == said.headers["x-request-id"]


def test_shadow_mode_never_waits_for_the_guard(upstream):
    upstream.mode = "ok"
    judge = Words()
    with running(service(judge, upstream=upstream.url, shadow=True)) as address:
        judge.hold.clear()
        said = httpx.post(
            f"{address}/v1/chat/completions", json={"model": "far", "messages": BAD}, timeout=None
        )
        assert said.json()["choices"][0]["finish_reason"] == "stop"
        assert not judge.batches
        judge.hold.set()


@pytest.mark.parametrize("word", ["poison", "nan", "endless"])
def test_failing_open_has_to_be_asked_for(upstream, word):
    upstream.mode = "ok"
    turns = [{"role": "user", "content": word}]
    with running(service(upstream=upstream.url, fail_open=True)) as address:
        said = httpx.post(f"{address}/v1/chat/completions", json={"model": "far", "messages": turns})
        assert said.json()["choices"][0]["message"]["content"] == f"echo: {word}"
        bad = httpx.post(f"{address}/v1/chat/completions", json={"model": "far", "messages": BAD})
        assert bad.json()["choices"][0]["finish_reason"] == "content_filter"


def test_a_flagged_conversation_is_an_error_where_that_is_wanted(upstream):
    with (
        running(service(upstream=upstream.url, on_unsafe="error")) as address,
        openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client,
        pytest.raises(openai.BadRequestError) as refused,
    ):
        client.chat.completions.create(model="far", messages=BAD)
    assert refused.value.code == "content_filter"
