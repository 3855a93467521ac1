"""What fails below a request: a native library panics, an engine ends, logits are no numbers, a stream only
looks ended.
"""

import asyncio
import threading

import httpx
import pytest
import torch
from guarded import tiny_guard
from server_tools import Words, raw, running, service

from safety_neurons.errors import RunError
from safety_neurons.guard.server import Engine, Problem
from safety_neurons.guard.server.engine import Answering
from safety_neurons.guard.server.local import Admission, Decode, LocalWriter, Piece
from safety_neurons.guard.server.serving import bound, run
from safety_neurons.guard.server.upstream import Events
from safety_neurons.guard.watching import Feed
from safety_neurons.model import LanguageModel
from safety_neurons.prompt_lists import Prompt
from tiny import tiny_llama, tiny_tokenizer
from waiting import until


class PanicException(BaseException):
    """As libraries in Rust raise it: no `Exception`."""


class Panicking(Words):
    """Panics at a word, where it encodes or where it judges."""

    def prepare(self, prompt):
        if "overflow" in prompt.text:
            raise PanicException("index out of bounds")
        return super().prepare(prompt)

    def score(self, prepared):
        if any("panic" in fed.ids for fed in prepared):
            raise PanicException("unwrap on None")
        return super().score(prepared)


def ask(address, text):
    return httpx.post(f"{address}/classify", json={"input": text}, timeout=None).json()["data"][0]


@pytest.mark.parametrize("word", ["overflow", "panic"])
def test_a_panic_of_a_native_library_is_its_requests_error_and_others_are_served(word):
    with running(service(Panicking())) as address:
        said = ask(address, word)
        assert (said["label"], said["guard"]["status"]) == ("unsafe", "error")
        assert ask(address, "bread")["label"] == "safe"
        assert httpx.get(f"{address}/readyz", timeout=None).status_code == 200


def test_a_panic_while_an_answer_is_written_ends_that_answer_alone():
    class Writer:
        def fits(self, job, others):
            return False

        def start(self, jobs):
            yield
            if "panic" in jobs[0].fed.ids:
                raise PanicException("unwrap on None")
            jobs[0].tell("done")

    async def work():
        engine = Engine(Words(), Writer())
        engine.start()
        heard: asyncio.Queue = asyncio.Queue()
        for text in ("panic", "bread"):
            engine.answer(Prompt(text, text), None, lambda event, text=text: heard.put_nowait((text, event)))
        found = dict([await heard.get(), await heard.get()])
        assert await engine.close(600)
        return found

    found = asyncio.run(work())
    assert isinstance(found["panic"], PanicException)
    assert found["bread"] == "done"


def broken(served):
    """Ends the engine's thread outside any request."""

    def observe(*_):
        raise PanicException("poisoned")

    served.engine._observe = observe
    return served


def test_an_engine_that_ends_is_no_longer_healthy_and_tells_who_waits():
    judge = Words()
    served = broken(service(judge))
    with running(served, watched=False) as address:
        judge.hold.clear()
        found = []
        threads = [
            threading.Thread(target=lambda text=text: found.append(ask(address, text)))
            for text in ("bread", "water")
        ]
        threads[0].start()
        until(lambda: served.engine.waiting == 0 and served.asgi.in_flight == 1)
        threads[1].start()
        until(lambda: served.engine.waiting == 1)
        judge.hold.set()
        for thread in threads:
            thread.join()
        assert sorted(said["guard"]["status"] for said in found) == ["error", "ok"]
        assert isinstance(served.engine.failed, PanicException)
        for path in ("/healthz", "/readyz"):
            assert httpx.get(f"{address}{path}", timeout=None).status_code == 503
        refused = httpx.post(f"{address}/classify", json={"input": "x"}, timeout=None)
        assert (refused.status_code, int(refused.headers["retry-after"]) > 0) == (503, True)


def test_a_server_whose_engine_ends_ends_with_an_error():
    served = broken(service())
    sock = bound("127.0.0.1", 0)
    port = sock.getsockname()[1]
    asked = []

    def ask_it():
        with httpx.Client(timeout=None) as client:
            asked.append(client.post(f"http://127.0.0.1:{port}/classify", json={"input": "x"}).status_code)

    thread = threading.Thread(target=ask_it)
    with pytest.raises(RunError, match="engine failed .PanicException."):
        run(served, sock, thread.start)
    thread.join()
    assert asked == [200]


@pytest.mark.parametrize("decode", [Decode(8), Decode(8, temperature=1.0, seed=1)])
@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
@pytest.mark.parametrize("step", [0, 2])
def test_an_answer_ends_with_an_error_where_the_model_gives_no_numbers(decode, wrong, step):
    lm = LanguageModel(tiny_llama(), tiny_tokenizer(), name="tiny")

    class Broken(Feed):
        passes = 0

        def __call__(self, ids):
            logits = super().__call__(ids)
            logits[:, list(lm.eos_ids)] = -torch.inf  # forbidden, and no fault
            if self.passes == step:
                logits[0, 5] = wrong
            self.passes += 1
            return logits

    class Writer(LocalWriter):
        def feed(self, mask):
            return Broken(lm.model, mask)

    heard = {"bad": [], "good": []}
    fed = lm.encode(["the cake"])[0]
    jobs = [Answering(name, decode, said.append, fed=fed) for name, said in heard.items()]
    for _ in Writer(tiny_guard(lm), lambda _: False).start(jobs):
        pass
    assert isinstance(heard["bad"][0], Admission)
    assert len([event for event in heard["bad"] if isinstance(event, Piece)]) <= step
    assert isinstance(heard["bad"][-1], Problem)
    assert heard["bad"][-1].code == "model_error"
    assert heard["good"][-1].tokens == 8


@pytest.mark.parametrize(
    ("sent", "ended"),
    [
        (b"data: {}\n\ndata: [DONE]\n\n", True),
        (b"data: {}\r\n\r\ndata:[DONE]\r\n\r\n", True),
        (b"data: {}\r\rdata: [DONE]\r\r", True),
        (b"event: end\ndata: [DONE]\n\n: bye\n\n", True),
        (b"data: {}\n\ndata: [DONE]", True),
        (b'data: {"text": "data: [DONE]"}\n\n', False),
        (b'data: {"text": "\\n\\ndata: [DONE]\\n\\n', False),
        (b"event: response.completed\ndata: {}\n\n", True),
        (b"event:response.completed\r\ndata:{}\r\n\r\n", True),
        (b"event: response.completed\ndata: {}\n", False),
        (b"event: response.completed.soon\ndata: {}\n\n", False),
        (b"data: event:response.completed\n\n", False),
        (b"data: x\ndata: [DONE]\n\n", False),
        (b"data: [DONE] not yet\n\n", False),
        (b": data: [DONE]\n\n", False),
        (b" data: [DONE]\n\n", False),
        (b"", False),
    ],
)
@pytest.mark.parametrize("size", [1, 3, 1000])
def test_a_stream_has_ended_where_an_event_says_so_and_not_a_text(sent, ended, size):
    events = Events(frozenset({b"response.completed"}))
    for start in range(0, len(sent), size):
        events.feed(sent[start : start + size])
    assert events.finished() == ended


@pytest.mark.parametrize("path", ["/healthz", "/readyz", "/v1/models", "/classify", "/nothing"])
def test_a_request_with_two_lengths_is_refused_and_its_connection_closed(path):
    with running(service()) as address:
        head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        said = raw(
            address,
            head.encode()
            + b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"
            + b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n",
        )
    assert b" 400 " in said.split(b"\r\n")[0]
    assert b"connection: close" in said.lower()
    assert said.count(b"HTTP/1.1") == 1
