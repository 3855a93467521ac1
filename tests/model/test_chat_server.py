"""Completions from an OpenAI-compatible server that runs in a process of its own."""

import json
import pathlib
import subprocess
import sys
import urllib.request

import pytest

from safety_neurons.errors import UsageError
from safety_neurons.model.chat_server import Endpoint, ServerError
from safety_neurons.prompt_lists import Message, Prompt, Prompts
from safety_neurons.results import Completions

SERVER = """
import http.server, json, sys, threading
asked, lock = [], threading.Lock()

class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def log_message(self, *args): pass
    def say(self, status, record, **headers):
        body = json.dumps(record).encode()
        self.send_response(status)
        own = {"Content-Length": str(len(body)), "Content-Type": "application/json"}
        for name, value in {**own, **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)
    def do_GET(self):
        self.say(200, asked)
    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        text = request["messages"][-1]["content"]
        with lock:
            seen = sum(one["messages"] == request["messages"] for one in asked)
            asked.append({**request, "key": self.headers.get("Authorization")})
        if text.startswith("busy") and not seen:
            return self.say(429, {"error": {"message": "slow down"}}, Retry_After="0")
        if text.startswith("{") and not (seen and json.loads(text).get("once")):
            wanted = json.loads(text)
            if not wanted.get("unless") or wanted["unless"] in request:
                return self.say(wanted.get("status", 200), wanted["record"], **wanted.get("headers", {}))
        if text.startswith("broken"):
            return self.say(400, {"error": {"message": "no such thing"}})
        reasons = {"long": "length", "held": "content_filter"}
        reason = reasons.get(text[:4], "stop")
        answer = "I cannot help with that." if "harm" in text or "bomb" in text else f"Sure, here is {text}"
        message = {"role": "assistant", "content": None if reason == "content_filter" else answer}
        self.say(200, {"choices": [{"message": message, "finish_reason": reason}]})

server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
print(server.server_address[1], flush=True)
server.serve_forever()
"""


@pytest.fixture
def server(tmp_path):
    script = pathlib.Path(tmp_path / "server.py")
    script.write_text(SERVER)
    with subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True) as process:
        try:
            yield f"http://127.0.0.1:{process.stdout.readline().strip()}/v1"
        finally:
            process.kill()


def requests_of(server):
    with urllib.request.urlopen(server, timeout=600) as answer:
        return json.loads(answer.read())


def test_answers_come_back_in_the_order_of_the_prompts(server):
    model = Endpoint(f"{server}#tiny", backoff=0.01)
    found = model.complete(
        ["one", "busy two", "long three", "harm four"], max_new_tokens=7, arm="plain", seed=3
    )
    assert [one.completion for one in found] == [
        "Sure, here is one",
        "Sure, here is busy two",
        "Sure, here is long three",
        "I cannot help with that.",
    ]
    assert [one.finish_reason for one in found] == ["stop", "stop", "length", "stop"]
    assert {one.arm for one in found} == {"plain"}
    assert model.name == f"{server}#tiny"
    asked = requests_of(server)
    assert len(asked) == 5  # The busy one twice.
    assert all(
        (one["model"], one["max_tokens"], one["temperature"], one["seed"]) == ("tiny", 7, 0.0, 3)
        for one in asked
    )


def test_a_prompts_own_turns_and_the_system_prompt_are_sent(server, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    turns = (Message("user", "hello"), Message("assistant", "hi"), Message("user", "go on"))
    Endpoint(f"{server}#m", system="be kind").complete(
        Prompts([Prompt("0", "go on", turns)]), sample=True, temperature=0.7, top_p=0.9
    )
    (request,) = requests_of(server)
    assert [turn["role"] for turn in request["messages"]] == ["system", "user", "assistant", "user"]
    assert (request["temperature"], request["top_p"], request["key"]) == (0.7, 0.9, "Bearer secret")


def test_finished_prompts_are_not_asked_again(server):
    model = Endpoint(f"{server}#m")
    first = model.complete(["one", "two"])
    kept = []
    again = model.complete(["one", "two", "three"], done=Completions(first[:2]), answered=kept.append)
    assert [one.completion for one in again] == [
        "Sure, here is one",
        "Sure, here is two",
        "Sure, here is three",
    ]
    assert [one.prompt for one in kept] == ["three"]
    assert len(requests_of(server)) == 3


def test_an_answer_that_is_held_back_is_counted(server):
    notes = []
    (found,) = Endpoint(f"{server}#m").complete(["held"], notes=notes)
    assert found.completion == ""
    assert found.meta["finish_reason"] == "content_filter"
    assert "content filter" in notes[0]


@pytest.mark.parametrize("status", [400, 403, 413, 422, 451])
def test_a_request_that_is_refused_for_what_is_in_it_is_a_failed_prompt_and_asked_again_later(server, status):
    notes, model = [], Endpoint(f"{server}#m")
    prompts = ["one", json.dumps({"status": status, "record": {"error": {"message": "too long"}}}), "two"]
    found = model.complete(prompts, notes=notes)
    assert [one.completion for one in found] == ["Sure, here is one", "", "Sure, here is two"]
    assert [one.finish_reason for one in found] == ["stop", "failed", "stop"]
    assert "too long" in found[1].meta["error"]
    assert notes[0].startswith("1 of 3 answers failed")
    assert "too long" in notes[1]
    model.complete(prompts, done=found)
    assert len(requests_of(server)) == 4


@pytest.mark.parametrize(
    "asked",
    [["broken", "broken too"], ["one", json.dumps({"status": 401, "record": {"error": "no such thing"}})]],
)
def test_a_call_ends_with_what_the_server_said_where_all_requests_or_the_key_are_refused(server, asked):
    with pytest.raises(ServerError, match="no such thing"):
        Endpoint(f"{server}#m").complete(asked)


def test_addresses_that_are_none_are_refused():
    with pytest.raises(UsageError, match="names no model"):
        Endpoint("http://localhost:1/v1")
    with pytest.raises(UsageError):
        Endpoint("localhost#m")
    with pytest.raises(UsageError, match="offline"):
        Endpoint("http://example.org/v1#m", offline=True)
    with pytest.raises(ServerError, match="cannot be reached"):
        Endpoint("http://127.0.0.1:9/v1#m", retries=0).complete(["one"])


def test_a_server_is_told_to_go_on_with_an_answer_that_is_begun(server):
    begun = Prompt("0", "hello", (Message("user", "hello"), Message("assistant", "Sure:")))
    Endpoint(f"{server}#m").complete(Prompts([begun]))
    Endpoint(f"{server}#m").complete(["hello"])
    first, second = requests_of(server)
    assert (first["continue_final_message"], first["add_generation_prompt"]) == (True, False)
    assert "continue_final_message" not in second


def _reply(content=None, reason="stop", **message):
    return json.dumps(
        {
            "record": {
                "choices": [
                    {"message": {"role": "assistant", "content": content, **message}, "finish_reason": reason}
                ]
            }
        }
    )


OURS = {
    "error": {
        "message": "unsafe",
        "type": "invalid_request_error",
        "param": "messages",
        "code": "content_filter",
    }
}


AZURE = {
    "error": {"message": "filtered", "code": "400", "innererror": {"code": "ResponsibleAIPolicyViolation"}}
}


TEXTS = {
    "one part": (_reply([{"type": "text", "text": "yes"}]), "yes", "stop", None),
    "several parts": (
        _reply([{"type": "text", "text": "I "}, {"type": "output_text", "text": "can't"}, "."]),
        "I can't.",
        "stop",
        None,
    ),
    "a part of thoughts": (
        _reply([{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "yes"}]),
        "yes",
        "stop",
        None,
    ),
    "a part that refuses": (_reply([{"type": "refusal", "refusal": "No."}]), "No.", "stop", None),
    "a refusal": (_reply(None, refusal="No."), "No.", "stop", None),
    "no parts": (_reply([]), "", "stop", None),
    "thoughts alone": (_reply(None, "length", reasoning_content="hm"), "", "length", None),
    "thoughts beside": (_reply("yes", reasoning_content="hm"), "yes", "stop", None),
    "an end of another name": (_reply("yes", "end_turn"), "yes", "stop", None),
    "a tool": (_reply(None, "tool_calls", tool_calls=[{"id": "1"}]), "", "stop", "tool_calls"),
    "a tool without a reason": (_reply(None, None, tool_calls=[{"id": "1"}]), "", "stop", "tool_calls"),
    "an old filter": (_reply("", "safety"), "", "stop", "content_filter"),
    "a filter of prompts": (json.dumps({"status": 400, "record": OURS}), "", "stop", "content_filter"),
    "Azure's filter": (json.dumps({"status": 400, "record": AZURE}), "", "stop", "content_filter"),
    "a filter at the server's side": (
        json.dumps({"status": 500, "record": OURS}),
        "",
        "stop",
        "content_filter",
    ),
    "a filter in an answer": (json.dumps({"record": OURS}), "", "stop", "content_filter"),
    "no choices": (json.dumps({"record": {"choices": []}}), "", "stop", "unreadable"),
    "no message": (
        json.dumps({"record": {"choices": [{"finish_reason": "stop"}]}}),
        "",
        "stop",
        "unreadable",
    ),
    "a number": (_reply(3), "", "stop", "unreadable"),
    "a part without text": (_reply([{"type": "text"}]), "", "stop", "unreadable"),
    "a list": (json.dumps({"record": [1]}), "", "stop", "unreadable"),
}


@pytest.mark.parametrize("kind", TEXTS)
def test_every_shape_of_reply_is_read_or_counted_and_ends_nothing(server, kind):
    prompt, text, reason, meant = TEXTS[kind]
    notes = []
    found = Endpoint(f"{server}#m", backoff=0.0).complete(["one", prompt], notes=notes)
    assert [one.completion for one in found] == ["Sure, here is one", text]
    assert found[1].finish_reason == reason
    assert found[1].meta.get("finish_reason") == meant
    assert len(notes) == (meant is not None)


@pytest.mark.parametrize(
    "error",
    [
        {"code": 429},
        {"code": "503"},
        {"type": "server_error"},
        {"code": "rate_limit_exceeded"},
        {},
        "overloaded",
    ],
)
def test_an_error_in_an_answer_of_status_200_is_tried_again_like_its_status(server, error):
    error = {"message": "later", **error} if isinstance(error, dict) else error
    asked = json.dumps({"record": {"error": error}, "once": True})
    (found,) = Endpoint(f"{server}#m", backoff=0.0).complete([asked])
    assert found.completion.startswith("Sure")
    assert len(requests_of(server)) == 2


def test_an_error_in_an_answer_of_status_200_that_will_not_pass_ends_the_call(server):
    with pytest.raises(ServerError, match="no such model"):
        Endpoint(f"{server}#m").complete(
            [json.dumps({"record": {"error": {"message": "no such model", "code": 404}}})]
        )
    assert len(requests_of(server)) == 1


def test_a_server_that_never_gives_an_answer_is_an_error(server):
    with pytest.raises(ServerError, match="no answer that can be read"):
        Endpoint(f"{server}#m").complete([_reply(3), json.dumps({"record": {"choices": []}})])


def test_fields_can_be_left_out_and_renamed(server):
    Endpoint(
        f"{server}#m", request={"max_tokens": None, "temperature": None, "max_completion_tokens": 9}
    ).complete(["one"])
    (request,) = requests_of(server)
    assert request["max_completion_tokens"] == 9
    assert not {"max_tokens", "temperature"} & request.keys()


@pytest.mark.parametrize(
    ("field", "new"), [("max_tokens", "max_completion_tokens"), ("temperature", None), ("seed", None)]
)
def test_a_field_that_the_server_names_as_unsupported_is_renamed_or_left_out_and_said(server, field, new):
    error = {"message": f"{field} is not supported", "code": "unsupported_parameter", "param": field}
    asked = json.dumps({"status": 400, "record": {"error": error}, "unless": field})
    model, notes = Endpoint(f"{server}#m"), []
    answers = model.complete(
        [f"{asked}{' ' * number}" for number in range(6)], max_new_tokens=7, notes=notes
    )  # at the same time
    assert all(one.completion.startswith("Sure") for one in answers)
    assert repr(field) in notes[0]
    model.complete(["one"])
    answered = [request for request in requests_of(server) if field not in request]
    assert len(answered) == 7
    assert all(request.get(new) in (7, 128) for request in answered) if new else True
