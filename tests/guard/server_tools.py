"""Servers in threads for tests: a guard whose verdicts are known, and an upstream that does what it is
told.
"""

import asyncio
import contextlib
import dataclasses
import functools
import importlib
import json
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import httpx
import uvicorn

from safety_neurons.guard.server import Limits, Service, Settings, serving
from safety_neurons.guard.server.app import Service as _Service
from safety_neurons.guard.server.door import Drift, Metrics
from safety_neurons.guard.server.envelopes import Answered, ResponsesEnvelope, Spent
from safety_neurons.guard.server.serving import Server, bound
from waiting import HANG, until

TOKEN = "a-token-for-tests-only"
PATIENT = {"seconds": HANG, "body_seconds": HANG, "header_seconds": HANG}
"""Limits in the way of no slow machine; what a test is about it sets itself."""
for _part in ("connect", "read", "write", "pool"):
    setattr(httpx._config.DEFAULT_TIMEOUT_CONFIG, _part, HANG)  # 5 s, which a loaded machine exceeds
for _name in ("httpx", "httpx2"):  # The second is what newer versions of openai ask with.
    with contextlib.suppress(ImportError):
        # Each client would read the machine's certificates anew: that takes longer than what most tests ask.
        _clients = importlib.import_module(f"{_name}._transports.default")
        _clients.create_ssl_context = functools.cache(_clients.create_ssl_context)
UNSAFE = "attack"


class _Hasty:
    """What `asyncio` has, with short pauses: a server looks every tenth of a second whether it is to end, and
    waits as long for its connections, which is most of what a test with a server of its own takes.
    """

    def __getattr__(self, name: str) -> Any:
        return getattr(asyncio, name)

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(min(seconds, 0.005))


for _module in (uvicorn.server, serving):
    _module.asyncio = _Hasty()  # type: ignore[attr-defined]


@dataclasses.dataclass(frozen=True)
class Said:
    """A verdict as a guard gives it."""

    p_unsafe: float | None
    flagged: bool
    threshold: float = 0.5
    status: str = "ok"
    distance: float | None = 1.0


@dataclasses.dataclass(frozen=True)
class Fed:
    """A prompt as a model is fed it."""

    ids: list[str]
    truncated: bool = False


class Words:
    """Flags every conversation that holds the word `attack`; other words make it slow, long or broken.

    Keeps what it saw.
    """

    def __init__(self) -> None:
        self.batches: list[list[list[str]]] = []
        self.hold = threading.Event()
        self.hold.set()
        self.reached = threading.Event()

    def prepare(self, prompt: Any) -> Fed:
        from safety_neurons.errors import InputError

        text = " ".join(turn.content for turn in prompt.messages) or prompt.text
        if "unaskable" in text:
            raise InputError("the chat template refuses turns of secret")
        return Fed(text.split() or ["<empty>"], truncated="endless" in text)

    def score(self, prepared: Sequence[Fed]) -> list[Said]:
        self.reached.set()
        self.hold.wait()
        self.batches.append([fed.ids for fed in prepared])
        if any("poison" in fed.ids for fed in prepared):
            raise RuntimeError("poison in the batch")
        return [self._said(fed) for fed in prepared]

    def _said(self, fed: Fed) -> Said:
        if "nan" in fed.ids:
            return Said(float("nan"), False)
        unsafe = UNSAFE in fed.ids
        return Said(
            0.9 if unsafe else 0.1, unsafe or fed.truncated, status="truncated" if fed.truncated else "ok"
        )


def service(
    judge: Any = None, *, log: Callable[[Any], None] = lambda _: None, writer: Any = None, **settings: Any
) -> Service:
    """A service around a judge of words."""
    drift = Drift([0.25, 0.5, 0.75], [90, 5, 5, 0])
    return _Service(
        Settings(**{"name": "tiny", "limits": Limits(**PATIENT), **settings}),
        judge or Words(),
        Metrics({"score": drift}),
        writer,
        log=log,
    )


@contextlib.contextmanager
def running(served: Service, *, watched: bool = True) -> Iterator[str]:
    """A service that listens; gives its address. Not watched, it goes on where its engine failed."""
    sock = bound("127.0.0.1", 0)
    server = Server(served, sock)
    if not watched:
        server.watch = lambda: None  # type: ignore[method-assign]
    with _threaded(lambda: asyncio.run(server.serve_socket()), lambda: server.started, server):
        yield f"http://127.0.0.1:{sock.getsockname()[1]}"


class Upstream:
    """An OpenAI-compatible server that answers `echo: …` word by word, and keeps the bodies it got.

    Attributes:
        mode: `ok`, `error` (500 in plain text), `refuse` (401), `redirect`, `garbage`, `break` (ends in the
            middle of a stream), `slow`, `unstreamed` (knows no streams).
    """

    def __init__(self) -> None:
        self.mode = "ok"
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.port = 0
        self.cancelled = 0
        self._running: contextlib.ExitStack | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def start(self) -> None:
        """Listens, on the same port again after it died."""
        sock = bound("127.0.0.1", self.port)
        self.port = sock.getsockname()[1]
        config = uvicorn.Config(
            self,
            lifespan="off",
            log_config=None,
            log_level="critical",
            timeout_graceful_shutdown=1,
            ws="none",
        )
        server = uvicorn.Server(config)
        self._running = contextlib.ExitStack()
        self._running.enter_context(
            _threaded(lambda: asyncio.run(server.serve(sockets=[sock])), lambda: server.started, server)
        )

    def die(self) -> None:
        """Stops listening."""
        if self._running is not None:
            self._running.close()
            self._running = None

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        body = b""
        while True:
            message = await receive()
            body += message.get("body", b"")
            if not message.get("more_body"):
                break
        self.headers.append({name.decode(): value.decode() for name, value in scope["headers"]})
        if scope["path"] == "/v1/models":
            await _reply(
                send,
                200,
                {"object": "list", "data": [{"id": "far", "object": "model", "created": 1, "owned_by": "x"}]},
            )
            return
        request = json.loads(body)
        self.bodies.append(request)
        if self.mode == "slow":
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                self.cancelled += 1
                raise
        plain = {
            "error": (500, "boom"),
            "refuse": (401, "who"),
            "redirect": (302, ""),
            "garbage": (200, "<html>"),
        }
        if self.mode in plain:
            await _reply(send, plain[self.mode][0], plain[self.mode][1])
            return
        if scope["path"] == "/v1/responses":
            await self._respond(send, request)
            return
        asked = request.get("prompt") or [request["messages"][-1]["content"]]
        texts = [f"echo: {text}" for text in ([asked] if isinstance(asked, str) else asked)]
        await (
            self._stream(send, request, texts[0])
            if request.get("stream") and self.mode != "unstreamed"
            else _reply(send, 200, _whole(request, texts))
        )

    async def _respond(self, send: Any, request: Any) -> None:
        """Responses in the shapes of the server's own, which the client checks."""
        envelope = ResponsesEnvelope(request["model"], {})
        answer = Answered(f"echo: {request['input']}")
        if not request.get("stream"):
            await _reply(send, 200, envelope.whole([answer], Spent(1, 1)))
            return
        words = answer.text.split(" ")
        parts = [word if number == 0 else f" {word}" for number, word in enumerate(words)]
        events = [envelope.opening(), *(envelope.piece(0, part) for part in parts)]
        kind = [(b"content-type", b"text/event-stream")]
        await send({"type": "http.response.start", "status": 200, "headers": kind})
        for event in events:
            await send({"type": "http.response.body", "body": event, "more_body": True})
        if self.mode == "break":
            raise RuntimeError("gone")
        end = envelope.closing(0, answer) + envelope.ending(Spent(1, 1))
        await send({"type": "http.response.body", "body": end})

    async def _stream(self, send: Any, request: Any, text: str) -> None:
        await send(
            {
                "type": "http.response.start",
                "status": 200,
                "headers": [(b"content-type", b"text/event-stream")],
            }
        )
        for number, word in enumerate(text.split(" ")):
            piece = word if number == 0 else f" {word}"
            await _event(send, _chunk(request, piece, None))
            if self.mode == "break" and number == 1:
                raise RuntimeError("gone")
        await _event(send, _chunk(request, "", "stop"))
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})


def _whole(request: Any, texts: Sequence[str]) -> dict[str, Any]:
    several = [text for text in texts for _ in range(request.get("n") or 1)]
    chat = "messages" in request
    choices = [
        {
            "index": index,
            **({"message": {"role": "assistant", "content": text}} if chat else {"text": text}),
            "finish_reason": "stop",
        }
        for index, text in enumerate(several)
    ]
    usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion" if chat else "text_completion",
        "created": 1,
        "model": request["model"],
        "choices": choices,
        "usage": usage,
    }


def _chunk(request: Any, text: str, reason: Any) -> dict[str, Any]:
    said = {"delta": {"content": text} if text else {}} if "messages" in request else {"text": text}
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion.chunk" if "messages" in request else "text_completion",
        "created": 1,
        "model": request["model"],
        "choices": [{"index": 0, **said, "finish_reason": reason}],
    }


async def _event(send: Any, record: Any) -> None:
    await send(
        {
            "type": "http.response.body",
            "body": b"data: " + json.dumps(record).encode() + b"\n\n",
            "more_body": True,
        }
    )


async def _reply(send: Any, status: int, content: Any) -> None:
    kind, body = (
        (b"text/plain", content.encode())
        if isinstance(content, str)
        else (b"application/json", json.dumps(content).encode())
    )
    await send(
        {
            "type": "http.response.start",
            "status": status,
            "headers": [(b"content-type", kind), (b"location", b"http://elsewhere/")],
        }
    )
    await send({"type": "http.response.body", "body": body})


@contextlib.contextmanager
def _threaded(run: Callable[[], None], started: Callable[[], bool], server: Any) -> Iterator[None]:
    failed: list[BaseException] = []

    def target() -> None:
        try:
            run()
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=target, daemon=True)
    thread.start()
    until(lambda: started() or failed, "the start of a server")
    assert started(), failed
    try:
        yield
    finally:
        server.should_exit = True
        thread.join(HANG)
        assert not thread.is_alive()


def connected(address: str) -> socket.socket:
    """A connection to a server."""
    host, port = address.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=HANG)


def raw(address: str, sent: bytes) -> bytes:
    """What a server answers to bytes."""
    with connected(address) as connection:
        connection.sendall(sent)
        parts = []
        while part := connection.recv(65536):
            parts.append(part)
    return b"".join(parts)
