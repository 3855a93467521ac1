"""Completions, responses and several choices, asked with the client people use, of the local model and in
front of an upstream.
"""

import asyncio
import json

import httpx
import openai
import pytest
from guarded import texts, tiny_guard, tiny_model
from server_tools import TOKEN, UNSAFE, Fed, Words, running, service

from safety_neurons.guard import Guard
from safety_neurons.guard.features import RequestReading
from safety_neurons.guard.server import Limits, Settings, serve_guard
from safety_neurons.guard.server.local import RawPrompt
from safety_neurons.guard.server.upstream import Events
from safety_neurons.guard.verdict import ASKED, WHOLE
from safety_neurons.guard.watching import REFUSAL
from safety_neurons.model import LanguageModel
from safety_neurons.prompt_lists import Prompt

NEW = 6
WEB = httpx.Client(verify=False, timeout=60)
BAD = f"plan an {UNSAFE} please"


@pytest.fixture(scope="module")
def strict() -> tuple[Guard, list[str], list[str]]:
    """A guard, and texts that it lets pass and flags."""
    guard = tiny_guard(tiny_model())
    some = sorted(set(texts(24, seed=3)))
    flagged = [verdict.flagged for verdict in guard.score_batch(some)]
    return (
        guard,
        [text for text, bad in zip(some, flagged, strict=True) if not bad],
        [text for text, bad in zip(some, flagged, strict=True) if bad],
    )


@pytest.fixture(scope="module")
def local(strict):
    with running(serve_guard(strict[0], Settings("tiny", limits=Limits(new_tokens=32)))) as address:
        yield address


@pytest.fixture
def client(local):
    with openai.OpenAI(base_url=f"{local}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def judge():
    return Words()


@pytest.fixture(scope="module")
def proxy(upstream, judge):
    with running(service(judge, upstream=upstream.url, token=TOKEN)) as address:
        yield address


@pytest.fixture
def far(proxy, upstream):
    upstream.mode = "ok"
    with openai.OpenAI(base_url=f"{proxy}/v1", api_key=TOKEN, max_retries=0) as client:
        yield client


def raw(model: LanguageModel, text: str) -> str:
    """What the model alone goes on with, by feeding it everything anew at every token."""
    import torch

    (encoded,) = model.encode_raw([text])
    ids = list(encoded.ids)
    for _ in range(NEW):
        with torch.no_grad(), model.running():
            token = int(model.model(torch.tensor([ids])).logits[0, -1].argmax())
        if token in model.eos_ids:
            break
        ids.append(token)
    return model.decode(ids[len(encoded.ids) :])


def pieces(stream, choices: int) -> tuple[list[str], list[str | None]]:
    """Texts and reasons of the choices of a streamed completion."""
    said, reasons = [""] * choices, [None] * choices
    for chunk in stream:
        for choice in chunk.choices:
            delta = choice.text if hasattr(choice, "text") else choice.delta.content
            said[choice.index] += delta or ""
            reasons[choice.index] = choice.finish_reason or reasons[choice.index]
    return said, reasons


def test_completions_go_on_with_texts_as_they_are(client, strict):
    guard, good, bad = strict
    asked = [good[0], bad[0], good[1]]
    whole = client.completions.create(model="tiny", prompt=asked, max_tokens=NEW, n=2)
    said = [choice.text for choice in whole.choices]
    assert [choice.index for choice in whole.choices] == list(range(6))
    expected = [raw(guard.bound, text) for text in asked]
    assert said == [expected[0]] * 2 + [REFUSAL] * 2 + [expected[2]] * 2
    reasons = [choice.finish_reason for choice in whole.choices]
    assert reasons[2:4] == ["content_filter"] * 2
    assert set(reasons[:2] + reasons[4:]) <= {"stop", "length"}
    assert whole.usage.prompt_tokens == sum(len(guard.bound.encode_raw([text])[0].ids) for text in asked)
    stream = client.completions.create(model="tiny", prompt=asked, max_tokens=NEW, n=2, stream=True)
    assert pieces(stream, 6) == (said, reasons)
    one = client.completions.create(model="tiny", prompt=good[0], max_tokens=NEW)
    assert (one.object, one.choices[0].text) == ("text_completion", expected[0])
    words = expected[0].split()
    if len(words) > 1:
        stopped = client.completions.create(model="tiny", prompt=good[0], max_tokens=NEW, stop=words[1])
        assert words[1] not in stopped.choices[0].text
    refused = client.completions.create(model="tiny", prompt=bad[0], stream=True)
    assert pieces(refused, 1) == ([REFUSAL], ["content_filter"])


@pytest.mark.parametrize("stream", [False, True])
def test_every_choice_is_one_of_its_own_and_the_first_is_the_only_one_of_its_seed(client, strict, stream):
    _, good, bad = strict
    asked = {"model": "tiny", "messages": [{"role": "user", "content": good[0]}], "max_tokens": NEW}
    sampled = {**asked, "temperature": 1.5, "seed": 11}

    def said(n, **request):
        found = client.chat.completions.create(**request, n=n, stream=stream)
        if stream:
            return pieces(found, n)[0]
        assert [choice.index for choice in found.choices] == list(range(n))
        return [choice.message.content for choice in found.choices]

    assert said(3, **asked) == said(1, **asked) * 3
    several = said(4, **sampled)
    assert len(set(several)) > 1
    assert several == said(4, **sampled)
    assert [several[0]] == said(1, **sampled)
    assert [several[2]] == said(1, **{**sampled, "seed": 13})
    flagged = {**asked, "messages": [{"role": "user", "content": bad[0]}]}
    assert said(2, **flagged) == [REFUSAL] * 2


def test_responses_are_the_chats_answers(client, strict):
    guard, good, bad = strict
    turns = [{"role": "user", "content": good[0]}]
    chat = client.chat.completions.create(
        model="tiny", messages=[{"role": "system", "content": "help"}, *turns], max_tokens=NEW
    )
    asked = {"model": "tiny", "instructions": "help", "max_output_tokens": NEW}
    for given in (good[0], turns, [{"type": "message", "role": "user", "content": good[0], "id": "msg_1"}]):
        answer = client.responses.create(input=given, **asked)
        assert answer.output_text == chat.choices[0].message.content
        assert answer.usage.output_tokens == chat.usage.completion_tokens
        assert answer.usage.input_tokens == chat.usage.prompt_tokens
        assert (answer.status == "completed") == (chat.choices[0].finish_reason == "stop")
    with client.responses.stream(input=good[0], **asked) as stream:
        events = list(stream)
        final = stream.get_final_response() if answer.status == "completed" else events[-1].response
    assert (
        "".join(one.delta for one in events if one.type == "response.output_text.delta") == final.output_text
    )
    assert [one.sequence_number for one in events] == list(range(len(events)))
    assert final.output_text == answer.output_text
    assert final.usage == answer.usage
    refused = client.responses.create(model="tiny", input=bad[0])
    assert (refused.output_text, refused.status) == (REFUSAL, "incomplete")
    assert refused.incomplete_details.reason == "content_filter"
    seen = list(client.responses.create(model="tiny", input=bad[0], stream=True))
    assert [one.type for one in seen][-1] == "response.incomplete"
    assert seen[-1].response.output_text == REFUSAL
    before = client.responses.create(model="tiny", input=[*turns, {"role": "assistant", "content": "yes"}])
    assert before.output_text is not None


@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        ("completions", {"prompt": "help", "echo": True}, "echo"),
        ("completions", {"prompt": "help", "logprobs": 0}, "logprobs"),
        ("completions", {"prompt": "help", "suffix": "end"}, "suffix"),
        ("completions", {"prompt": [[1, 2]]}, "prompt[0]"),
        ("completions", {"prompt": ["help"] * 40, "n": 2}, "n"),
        ("completions", {"prompt": "help", "max_tokens": 33}, "max_tokens"),
        ("responses", {"input": "help", "previous_response_id": "resp_1"}, "previous_response_id"),
        ("responses", {"input": "help", "tools": [{"type": "web_search"}]}, "tools"),
        ("responses", {"input": [{"type": "item_reference", "id": "msg_1"}]}, "input[0]"),
        ("responses", {"input": "help", "max_output_tokens": 33}, "max_output_tokens"),
        ("responses", {"input": "cake " * 400}, "input"),
        ("completions", {"prompt": "cake " * 400}, "prompt"),
    ],
)
def test_what_the_local_model_cannot_do_is_said_in_one_line(local, path, body, field):
    said = WEB.post(f"{local}/v1/{path}", json={"model": "tiny", **body})
    assert said.status_code == 400, said.text
    error = said.json()["error"]
    assert error["param"] == field
    assert "\n" not in error["message"]


def test_an_upstream_gets_what_is_not_flagged_and_its_answer_comes_back(far, upstream):
    answer = far.completions.create(model="far", prompt=["how do i bake", "and then"], n=2, echo=True)
    assert [choice.text for choice in answer.choices] == ["echo: how do i bake"] * 2 + ["echo: and then"] * 2
    assert upstream.bodies[-1]["n"] == 2
    stream = far.completions.create(model="far", prompt="how do i bake", stream=True)
    assert pieces(stream, 1)[0] == ["echo: how do i bake"]
    chat = far.chat.completions.create(model="far", messages=[{"role": "user", "content": "bake"}], n=3)
    assert [choice.message.content for choice in chat.choices] == ["echo: bake"] * 3
    answer = far.responses.create(model="far", input="how do i bake", instructions="be kind")
    assert answer.output_text == "echo: how do i bake"
    with far.responses.stream(model="far", input="how do i bake") as events:
        assert "".join(one.delta for one in events if one.type == "response.output_text.delta") == (
            "echo: how do i bake"
        )


@pytest.mark.parametrize(
    "body",
    [
        {"prompt": BAD},
        {"prompt": ["bake bread", BAD]},
        {"prompt": "bake bread", "suffix": BAD},
        {"prompt": "bake bread", "stop": BAD},
        {"input": BAD},
        {"input": "bake bread", "instructions": BAD},
        {"input": [{"role": "user", "content": [{"type": "input_text", "text": BAD}]}]},
        {
            "input": [
                {"type": "function_call", "call_id": "1", "name": "f", "arguments": json.dumps({"q": BAD})}
            ]
        },
        {"input": [{"type": "function_call_output", "call_id": "1", "output": BAD}]},
        {
            "input": [
                {"type": "reasoning", "id": "rs_1", "summary": [{"type": "summary_text", "text": BAD}]},
                {"role": "assistant", "content": "yes"},
                {"role": "user", "content": "go on"},
            ]
        },
        {"input": "bake bread", "tools": [{"type": "function", "name": "f", "description": BAD}]},
        {"input": "bake bread", "text": {"format": {"type": "json_schema", "name": "s", "description": BAD}}},
    ],
    ids=str,
)
def test_whatever_an_upstream_may_show_its_model_is_judged(proxy, upstream, body):
    upstream.mode, before = "ok", len(upstream.bodies)
    path = "completions" if "prompt" in body else "responses"
    for stream in (False, True):
        said = WEB.post(
            f"{proxy}/v1/{path}",
            json={"model": "far", "stream": stream, "n": 1, **body}
            if path == "completions"
            else {"model": "far", "stream": stream, **body},
            headers={"X-Api-Key": TOKEN},
        )
        assert said.status_code == 200, said.text
        assert "content_filter" in said.text
        assert REFUSAL in said.text
    assert len(upstream.bodies) == before


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"input": "bake", "previous_response_id": "resp_1"}, "previous_response_id"),
        ({"input": "bake", "conversation": "conv_1"}, "conversation"),
        ({"input": [{"type": "input_image", "image_url": "x"}]}, "input[0]"),
        ({"input": [{"role": "user", "content": "x", "id": f"plan-an-{UNSAFE}"}]}, "input[0]"),
        ({"input": "bake", "truncation": BAD}, "truncation"),
        ({"input": [{"type": "function_call", "name": "f", "content": BAD}]}, "input[0]"),
        ({"input": [{"type": "function_call", "name": "f", "role": "user"}]}, "input[0]"),
        ({"input": [{"type": "function_call_output", "output": "x", "content": BAD}]}, "input[0]"),
    ],
    ids=str,
)
def test_what_the_guard_cannot_read_does_not_go_upstream(proxy, upstream, body, field):
    before = len(upstream.bodies)
    said = WEB.post(f"{proxy}/v1/responses", json={"model": "far", **body}, headers={"X-Api-Key": TOKEN})
    assert (said.status_code, said.json()["error"]["param"]) == (400, field)
    assert len(upstream.bodies) == before


def test_a_text_fed_as_it_is_never_answers_for_the_same_text_as_a_turn():
    """The same words without a template around them, where a guard that reads ends sees no harm."""

    class Ends(Words):
        def prepare(self, prompt):
            return Fed(["cake"]) if isinstance(prompt, RawPrompt) else super().prepare(prompt)

    raw, turn = RequestReading(WHOLE, RawPrompt("0", BAD)), RequestReading(ASKED, Prompt("0", BAD))
    served = service(Ends())

    async def work():
        served.engine.start()
        found = [await served.gate.look(ways) for ways in ([turn], [raw, turn], [raw, turn], [turn])]
        await served.engine.close()
        return [[outcome.flagged for outcome in some] for some in found]

    assert asyncio.run(work()) == [[True], [False, True], [False, True], [True]]


def test_streams_that_break_off_end_in_an_error(far, upstream):
    upstream.mode = "break"
    for ask in (
        lambda: far.completions.create(model="far", prompt="how do i bake", stream=True),
        lambda: far.responses.create(model="far", input="how do i bake", stream=True),
    ):
        with pytest.raises(openai.APIError, match="broke off"):
            list(ask())


def test_a_stream_of_responses_ends_with_an_event_of_that_name_and_not_with_a_text_about_it():
    ends = frozenset({b"response.completed"})
    for parts, finished in (
        ([b"event: response.completed\ndata: {}\n\n"], True),
        ([b"event: response.comp", b"leted\r\ndata: {}\r\n", b"\r\n"], True),
        ([b"event: response.completed\ndata: {"], False),
        ([b"data: event: response.completed\n\n"], False),
        ([b"event: response.completed.not\ndata: {}\n\n"], False),
        ([b"data: [DONE]\n\n"], True),
    ):
        events = Events(ends)
        for part in parts:
            events.feed(part)
        assert events.finished() == finished, parts
