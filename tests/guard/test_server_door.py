"""Whom the server lets in, and how much: everything hostile is a 4xx in the shape of the OpenAI API, and
nothing of it reaches a log.
"""

import asyncio
import contextlib
import json
import socket
import threading

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from server_tools import PATIENT, TOKEN, Words, raw, running, service

from safety_neurons.errors import UsageError
from safety_neurons.guard.server import Limits, Problem, Settings
from safety_neurons.guard.server.serving import bound
from safety_neurons.guard.server.shapes import parse
from waiting import until

JSON = b"Content-Type: application/json\r\n"


@pytest.fixture(scope="module")
def events():
    return []


@pytest.fixture(scope="module")
def address(events):
    limits = Limits(**PATIENT, body_bytes=20_000, messages=5, inputs=4)
    with running(service(token=TOKEN, limits=limits, log=events.append)) as address:
        yield address


def post(address, content, path="/v1/moderations", token=TOKEN, **headers):
    shown = {"Authorization": f"Bearer {token}"} if token else {}
    return httpx.post(
        f"{address}{path}", content=content, headers={"Content-Type": "application/json", **shown, **headers}
    )


def code_of(said):
    error = said.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert "\n" not in error["message"]
    return error["code"]


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"", "invalid_json"),
        (b"{", "invalid_json"),
        (b'{"input": NaN}', "invalid_json"),
        (b'{"input": "x", "a": -Infinity}', "invalid_json"),
        (b'{"input": "x", "a": 1e999}', "invalid_json"),
        (b'{"input": "x", "a": ' + b"9" * 5000 + b"}", "invalid_json"),
        (b'{"input": "x", "a": 0.' + b"1" * 5000 + b"}", "invalid_json"),
        (b'{"input": "good", "input": "attack"}', "duplicate_name"),
        (b'{"input": "x", "a": {"b": 1, "b": 2}}', "duplicate_name"),
        (b'{"input": "\xff\xfe"}', "invalid_encoding"),
        (b'\xef\xbb\xbf{"input": "x"}', "invalid_json"),
        ('{"input": "x"}'.encode("utf-16"), "invalid_encoding"),
        (b'{"input": "\\ud800"}', "invalid_encoding"),
        (b'{"input": "x", "\\udfff": 1}', "invalid_encoding"),
        (b'{"input": ' + b"[" * 5000 + b"]" * 5000 + b"}", "nested_too_deeply"),
        (b'{"input": ' + b"[" * 40 + b"]" * 40 + b"}", "nested_too_deeply"),
        (b'{"a":' * 3000 + b"1" + b"}" * 3000, "nested_too_deeply"),
        (b"[]", "invalid_type"),
        (b'"attack"', "invalid_type"),
        (b"{}", "invalid_value"),
        (b'{"input": null}', "invalid_value"),
        (b'{"input": []}', "invalid_value"),
        (b'{"input": [1]}', "invalid_value"),
        (b'{"input": ["a", {"type": "text", "text": "b"}]}', "invalid_value"),
        (b'{"input": "x", "model": {"path": "/etc/passwd"}}', "invalid_value"),
        (
            b'{"input": [{"type": "image_url", "image_url": {"url": "http://example.org"}}]}',
            "unreadable_content",
        ),
        (b'{"input": ["a", "b", "c", "d", "e"]}', "too_many_inputs"),
    ],
)
def test_a_body_that_cannot_be_taken_is_400_in_one_shape(address, body, code):
    said = post(address, body)
    assert (said.status_code, code_of(said)) == (400, code)


@pytest.mark.parametrize(
    "messages",
    [
        [],
        [{"role": "user"}] * 6,
        [{"role": "root", "content": "x"}],
        [{"content": "x"}],
        [{"role": "user", "content": 5}],
        [
            {
                "role": "user",
                "content": [{"type": "input_audio", "input_audio": {"data": "", "format": "wav"}}],
            }
        ],
        [{"role": "user", "content": [{"type": "text"}]}],
        [{"role": "user", "content": "x", "name": "a name that holds an attack"}],
        [{"role": "user", "content": "x", "secret_content": "attack"}],
        [{"role": "user", "content": "unaskable"}],
        "attack",
        None,
        {"role": "user", "content": "x"},
    ],
)
def test_a_conversation_that_cannot_be_taken_is_400_in_one_shape(address, messages):
    said = post(address, json.dumps({"model": "tiny", "messages": messages}).encode(), "/v1/chat/completions")
    assert said.status_code == 400
    code_of(said)
    assert "attack" not in said.text


@pytest.mark.parametrize("token", [None, "wrong", TOKEN[:-1], TOKEN + "x", "Ünicode".encode()])
@pytest.mark.parametrize("path", ["/v1/moderations", "/v1/models", "/metrics", "/openapi.json", "/nothing"])
def test_without_the_token_nothing_is_answered(address, token, path):
    shown = (
        {}
        if token is None
        else {b"Authorization": b"Bearer " + (token if isinstance(token, bytes) else token.encode())}
    )
    said = httpx.request(
        "POST" if "moder" in path else "GET",
        f"{address}{path}",
        headers={b"Content-Type": b"application/json", **shown},
    )
    assert (said.status_code, code_of(said)) == (401, "invalid_api_key")
    assert said.headers["www-authenticate"] == "Bearer"


def test_two_tokens_are_none(address):
    pair = [("Authorization", f"Bearer {TOKEN}"), ("Authorization", "Bearer other")]
    assert httpx.get(f"{address}/v1/models", headers=pair).status_code == 401


def test_health_needs_no_token_and_is_not_logged(address, events):
    assert httpx.get(f"{address}/healthz").json() == {"status": "ok"}
    assert httpx.get(f"{address}/readyz").json() == {"status": "ready"}
    assert not [event for event in events if event.get("route") in ("/healthz", "/readyz")]


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Content-Type": "text/plain"}, 415),
        ({"Content-Type": "application/x-www-form-urlencoded"}, 415),
        ({"Content-Encoding": "gzip"}, 415),
        ({"Content-Type": "application/json; charset=utf-8"}, 200),
    ],
)
def test_only_plain_json_is_read(address, headers, status):
    said = post(address, b'{"input": "x"}', **headers)
    assert said.status_code == status


def test_a_large_body_is_413_with_and_without_its_length_told(address):
    large = b'{"input": "' + b"x" * 30_000 + b'"}'
    assert (post(address, large).status_code, code_of(post(address, large))) == (413, "body_too_large")

    def parts():
        for start in range(0, len(large), 1000):
            yield large[start : start + 1000]

    said = post(address, parts())
    assert (said.status_code, code_of(said)) == (413, "body_too_large")
    head = f"POST /classify HTTP/1.1\r\nHost: localhost\r\nX-Api-Key: {TOKEN}\r\n".encode() + JSON
    assert b" 413 " in raw(address, head + b"Content-Length: 99999999\r\n\r\n{").split(b"\r\n")[0]


def test_a_body_that_does_not_arrive_is_408():
    with running(service(limits=Limits(**PATIENT | {"body_seconds": 0.05}))) as address:
        said = raw(
            address,
            b"POST /classify HTTP/1.1\r\nHost: localhost\r\n" + JSON + b'Content-Length: 100\r\n\r\n{"in',
        )
    assert b" 408 " in said.split(b"\r\n")[0]
    assert b"body_timeout" in said


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/nothing", 404),
        ("GET", "/docs", 404),
        ("GET", "/v1/moderations", 405),
        ("DELETE", "/v1/models", 405),
        ("PUT", "/classify", 405),
    ],
)
def test_what_is_not_there_is_said_in_one_shape(address, method, path, status):
    said = httpx.request(method, f"{address}{path}", headers={"X-Api-Key": TOKEN})
    assert said.status_code == status
    code_of(said)


def test_no_page_of_elsewhere_gets_leave_to_ask(address):
    asked = {"Origin": "https://evil.example", "Access-Control-Request-Method": "POST", "X-Api-Key": TOKEN}
    said = httpx.options(f"{address}/v1/moderations", headers=asked)
    assert said.status_code == 204
    assert not [name for name in said.headers if name.startswith("access-control")]


def test_without_a_token_only_this_machine_by_its_name_is_answered():
    with running(service()) as address:
        assert httpx.get(f"{address}/v1/models").status_code == 200
        for host in (
            "evil.example",
            "evil.example:80",
            "localhost.evil.example",
            "[::2]",
            "127.0.0.1.evil.example",
            "",
        ):
            said = httpx.get(f"{address}/v1/models", headers={"Host": host})
            assert said.status_code in (400, 403), host
        for host in ("localhost:1", "[::1]:80", "127.0.0.1"):
            assert httpx.get(f"{address}/v1/models", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"host": "0.0.0.0"}, "SAFETY_NEURONS_TOKEN"),
        ({"host": "192.168.0.7"}, "SAFETY_NEURONS_TOKEN"),
        ({"token": "short"}, "at least 16"),
        ({"token": "ü" * 20}, "ASCII"),
        ({"upstream": "ftp://example.org/v1"}, "expected an address"),
        ({"upstream": "http://user:pass@example.org/v1"}, "no user or password"),
        ({"upstream": "http://example.org/v1", "upstream_key": "secret-key"}, "expected https"),
        ({"upstream": "http://[bad/v1"}, "expected an address"),
        ({"on_unsafe": "ignore"}, "^on_unsafe 'ignore': expected refuse or error"),
    ],
)
def test_settings_that_would_be_open_are_refused(settings, word):
    with pytest.raises(UsageError, match=word) as refused:
        Settings("tiny", **settings)
    assert "pass@" not in str(refused.value)
    assert "secret" not in str(refused.value)


def test_answers_go_out_without_nagles_delay():
    with contextlib.closing(bound("127.0.0.1", 0)) as sock, socket.create_connection(listening(sock)):
        accepted, _ = sock.accept()
        assert asyncio_would_turn_it_off(accepted)
        accepted.close()


def listening(sock):
    sock.listen()
    return sock.getsockname()


def asyncio_would_turn_it_off(sock):
    asyncio.base_events._set_nodelay(sock)
    return sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) != 0


def test_settings_never_show_their_secrets():
    shown = repr(
        Settings("tiny", token=TOKEN, upstream="https://example.org/v1", upstream_key="another-secret")
    )
    assert TOKEN not in shown
    assert "another-secret" not in shown


def test_neither_log_nor_metrics_hold_a_word_of_a_prompt(address, events):
    for body in (
        {"input": "a zebra and an attack"},
        {"input": "zebra poison"},
        {"input": ["zebra"], "model": "zebra"},
        {"zebra": 1},
    ):
        post(address, json.dumps(body).encode())
    post(
        address,
        json.dumps({"model": "zebra", "messages": [{"role": "user", "content": "zebra"}]}).encode(),
        "/v1/chat/completions",
    )
    httpx.get(f"{address}/zebra", headers={"X-Api-Key": TOKEN})
    page = httpx.get(f"{address}/metrics", headers={"X-Api-Key": TOKEN}).text
    assert "zebra" not in page
    assert "zebra" not in repr(events)
    assert TOKEN not in repr(events) + page


def test_prompts_are_logged_where_that_is_asked_for():
    events = []
    with running(service(log_prompts=True, log=events.append)) as address:
        httpx.post(f"{address}/v1/moderations", json={"input": "a zebra"})
    assert events[-1]["prompt"] == ["a zebra"]


def test_an_answer_that_is_judged_is_logged_behind_what_was_asked():
    class ReadsAnswers(Words):
        reads_answers = True

    events, asked = [], {"input_type": "response", "texts": ["a zebra", "a horse"]}
    turns = [{"role": "user", "content": "which animal?"}]
    with running(service(ReadsAnswers(), log_prompts=True, log=events.append)) as address:
        for more in ({}, {"structured_messages": turns}):
            httpx.post(f"{address}/beta/litellm_basic_guardrail_api", json={**asked, **more})
    assert [event["prompt"] for event in events] == [
        [["a zebra"], ["a horse"]],
        [["which animal?", "a zebra"], ["which animal?", "a horse"]],
    ]


def test_an_error_that_nobody_foresaw_is_a_500_without_its_words():
    class Broken(Words):
        def score(self, prepared):
            raise MemoryError("zebra")

    events = []
    served = service(Broken(), log=events.append)

    async def fails(*_):
        raise RuntimeError("zebra")

    with running(served) as address:
        said = httpx.post(f"{address}/classify", json={"input": "x"}).json()["data"][0]
        assert (said["label"], said["guard"]["status"]) == ("unsafe", "error")
        served.gate.judge = fails
        said = httpx.post(f"{address}/classify", json={"input": "x"})
        assert (said.status_code, code_of(said)) == (500, "internal_error")
        assert "zebra" not in said.text
        assert said.headers["x-request-id"] in said.text
    assert events[-1]["exception"] == "RuntimeError"


def test_more_requests_than_are_taken_get_429_and_what_is_judged_too_late_is_not_safe():
    judge = Words()
    limits = Limits(**PATIENT | {"seconds": 0.01}, requests=3, waiting=2)
    served = service(judge, limits=limits)
    with running(served) as address:
        judge.hold.clear()
        found = []

        def ask():
            found.append(httpx.post(f"{address}/v1/moderations", json={"input": "x"}, timeout=None))

        threads = [threading.Thread(target=ask) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        statuses = sorted(said.status_code for said in found)
        assert set(statuses) <= {200, 429}
        assert all(int(said.headers["retry-after"]) >= 1 for said in found if said.status_code == 429)
        late = [said.json()["results"][0] for said in found if said.status_code == 200]
        assert late
        assert all(result["flagged"] and result["guard"]["status"] == "timeout" for result in late)
        judge.hold.set()
        until(lambda: not served.engine.waiting)
    assert sum(map(len, judge.batches)) <= 2  # what timed out while it waited was never judged


def test_more_requests_than_are_taken_at_once_get_429():
    judge = Words()
    served = service(judge, limits=Limits(**PATIENT, requests=3, waiting=100))
    with running(served) as address:
        judge.hold.clear()
        found = []
        threads = [
            threading.Thread(
                target=lambda: found.append(
                    httpx.post(f"{address}/classify", json={"input": "x"}, timeout=None)
                )
            )
            for _ in range(3)
        ]
        for thread in threads:
            thread.start()
        until(lambda: served.asgi.in_flight == 3)
        said = httpx.post(f"{address}/classify", json={"input": "x"}, timeout=None)
        assert (said.status_code, code_of(said)) == (429, "guard_busy")
        assert int(said.headers["retry-after"]) >= 1
        judge.hold.set()
        for thread in threads:
            thread.join()
        assert [said.status_code for said in found] == [200] * 3
        assert httpx.post(f"{address}/classify", json={"input": "x"}, timeout=None).status_code == 200


def test_a_server_that_is_told_to_end_finishes_what_it_took_and_refuses_the_rest():
    judge = Words()
    served = service(judge)
    with running(served) as address, httpx.Client() as kept:
        assert kept.get(f"{address}/readyz").status_code == 200
        judge.hold.clear()
        found = []
        thread = threading.Thread(
            target=lambda: found.append(httpx.post(f"{address}/classify", json={"input": "attack"}).json())
        )
        thread.start()
        until(judge.reached.is_set)
        served.asgi.closing = True
        refused = kept.post(f"{address}/classify", json={"input": "x"})
        assert (refused.status_code, code_of(refused)) == (503, "shutting_down")
        assert kept.get(f"{address}/readyz").status_code == 503
        judge.hold.set()
        thread.join()
        assert found[0]["data"][0]["label"] == "unsafe"


values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**60), 2**60)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(codec="utf-8")),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(st.characters(codec="utf-8"), max_size=5), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(values)
def test_sound_json_is_read_as_python_reads_it(value):
    body = json.dumps(value).encode()
    assert parse(body, 32) == json.loads(body)


@given(st.binary(max_size=40) | st.text(max_size=40).map(lambda text: text.encode("utf-8", "surrogatepass")))
def test_any_bytes_are_a_value_or_a_400(body):
    refused, value = 0, None
    try:
        value = parse(body, 8)
    except Problem as problem:
        refused = problem.status
    assert refused == 400 or value == json.loads(body)
