"""Outermost ASGI layer and its settings: authentication, sizes and rates of requests, the client's presence,
errors, logs and metrics.

Without a framework. Whatever raises inside leaves as an error in the shape of the OpenAI API.
"""

import asyncio
import bisect
import contextlib
import hmac
import math
import secrets
import time
from collections import deque
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from safety_neurons.errors import UsageError
from safety_neurons.guard.server.shapes import Problem, busy, closing, unforeseen
from safety_neurons.guard.watching import REFUSAL
from safety_neurons.model.chat_server import is_local

TOKEN_VARIABLE = "SAFETY_NEURONS_TOKEN"
UPSTREAM_KEY_VARIABLE = "SAFETY_NEURONS_UPSTREAM_KEY"
_SHORTEST_TOKEN = 16


@dataclass(frozen=True)
class Limits:
    """How much one request, and all requests together, may ask for.

    Attributes:
        body_bytes: Of one request.
        depth: Of nested lists and objects in a body.
        messages: Turns of a conversation.
        inputs: Texts that one request may have judged.
        prompt_tokens: Of one conversation or text; None for what fits the guard's model.
        characters: Of one conversation or text; None for 16 a token that it may have. What is longer is
            refused before it is tokenised.
        bytes_under_way: Of the bodies of all requests that are not yet answered; what would make them more
            gets 429.
        new_tokens: Of one answer of the local model.
        requests: Accepted and not yet answered; the next one gets 429.
        waiting: Conversations and texts that wait for the model; a request that would make them more gets
            429.
        batch: Conversations judged, or answered, together.
        batch_tokens: Padded tokens of a forward pass; None for what suits the device.
        seconds: Longest wait for a verdict; what takes longer is not safe.
        body_seconds: Longest time for a body to arrive.
        header_seconds: Longest time for a request's head to arrive, from the connection's first moment or the
            head's first byte.
        idle_seconds: Longest time between two requests of a connection.
        write_seconds: Longest time in which a client reads nothing of an answer.
        connections: At the same time; None for what the process's limit of descriptors leaves room for.
        upstream_seconds: Longest silence of the upstream.
        drain_seconds: Longest time for accepted requests to finish when the server is told to end.
    """

    body_bytes: int = 1 << 20
    depth: int = 32
    messages: int = 256
    inputs: int = 64
    prompt_tokens: int | None = None
    characters: int | None = None
    bytes_under_way: int = 1 << 25
    new_tokens: int = 1024
    requests: int = 512
    waiting: int = 256
    batch: int = 32
    batch_tokens: int | None = None
    seconds: float = 30.0
    body_seconds: float = 10.0
    header_seconds: float = 10.0
    idle_seconds: float = 75.0
    write_seconds: float = 30.0
    connections: int | None = None
    upstream_seconds: float = 120.0
    drain_seconds: float = 60.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value is not None and not value > 0:
                raise UsageError(f"limit {name} {value}: expected more than 0")


@dataclass(frozen=True)
class Settings:
    """How a server behaves. Secrets are never shown.

    Attributes:
        name: What clients call the local model, and what the guard answers as.
        host: Address to listen on.
        port: Port to listen on; 0 for any that is free.
        token: What clients show as `Authorization: Bearer …`; None lets everybody on this machine in.
        upstream: An OpenAI-compatible server, up to and with `/v1`, that answers what is not flagged; None
            for the local model.
        upstream_key: What the upstream is shown.
        on_unsafe: `refuse` or `error`: what a flagged conversation is answered with.
        refusal: Text of the refusal.
        fail_open: Let through what the guard could not judge. Off: what it could not judge is not safe.
        shadow: Judge, count and log, and never hold anything back.
        recheck_every: Check answers of the local model each time they are so many tokens longer; 0 for never.
        log_prompts: Put prompts into the log.
        docs: Serve interactive pages about the routes (they load scripts from elsewhere).
        passed: Further fields of a chat request that go to the upstream although the guard does not read
            them.
        limits: How much is taken.
    """

    name: str
    host: str = "127.0.0.1"
    port: int = 8600
    token: str | None = field(default=None, repr=False)
    upstream: str | None = None
    upstream_key: str | None = field(default=None, repr=False)
    on_unsafe: str = "refuse"
    refusal: str = REFUSAL
    fail_open: bool = False
    shadow: bool = False
    recheck_every: int = 0
    log_prompts: bool = False
    docs: bool = False
    passed: Sequence[str] = ()
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        if self.token is None and not is_local(self.host):
            raise UsageError(
                f"--host {self.host!r} without a token: others can reach it; set the variable "
                f"{TOKEN_VARIABLE} or bind to 127.0.0.1"
            )
        if self.token is not None and (
            len(self.token) < _SHORTEST_TOKEN or not self.token.isascii() or not self.token.isprintable()
        ):
            raise UsageError(
                f"the token in {TOKEN_VARIABLE}: expected at least {_SHORTEST_TOKEN} printable ASCII "
                "characters"
            )
        if self.upstream_key is not None and not (
            self.upstream_key.isascii() and self.upstream_key.isprintable()
        ):
            raise UsageError(f"the key in {UPSTREAM_KEY_VARIABLE}: expected printable ASCII characters")
        if self.on_unsafe not in ("refuse", "error"):
            raise UsageError(f"--on-unsafe {self.on_unsafe!r}: expected refuse or error")
        if self.upstream is not None:
            _check_upstream(self.upstream, self.upstream_key)


def _check_upstream(url: str, key: str | None) -> None:
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError as error:
        raise UsageError(
            f"--upstream {url!r}: {error}; expected an address such as http://localhost:8000/v1"
        ) from None
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
        raise UsageError(f"--upstream {url!r}: expected an address such as http://localhost:8000/v1")
    if parts.username or parts.password:
        raise UsageError(
            f"upstream at {parts.hostname}: expected no user or password in the address; put the key "
            f"into {UPSTREAM_KEY_VARIABLE}"
        )
    if key is not None and parts.scheme == "http" and not is_local(parts.hostname):
        raise UsageError(
            f"upstream at {parts.hostname} over http with a key: it would travel in the open; expected https"
        )


FEWEST = 100
"""Scores below which a comparison says more about chance than about drift."""
_SMALLEST_SHARE = 1e-4
Numbers = Sequence[int | float]


def population_stability(counts: Numbers, reference: Numbers) -> float:
    """Population stability index, Σ (p − q) ln(p ÷ q) over the bins of two histograms.

    0 where they are alike.

    Below 0.1 is commonly read as no change, above 0.25 as a change to look into. Shares are at least 1e-4, so
    an empty bin is finite.

    Args:
        counts: Of recent scores.
        reference: Of validation, over the same bins.

    Raises:
        ValueError: Histograms of different lengths, or without any count.
    """
    if len(counts) != len(reference) or sum(counts) <= 0 or sum(reference) <= 0:
        raise ValueError(
            f"histograms of {len(counts)} and {len(reference)} bins: expected two of the same bins with "
            "counts"
        )
    total = 0.0
    for found, known in zip(counts, reference, strict=True):
        p = max(found / sum(counts), _SMALLEST_SHARE)
        q = max(known / sum(reference), _SMALLEST_SHARE)
        total += (p - q) * math.log(p / q)
    return total


class Drift:
    """Values of late, against a histogram of validation.

    Args:
        bounds: Between the bins, rising; the first and the last bin are open.
        reference: Counts of validation, one more than bounds.
        window: Values that are remembered.
    """

    def __init__(self, bounds: Numbers, reference: Numbers, window: int = 2000) -> None:
        self._bounds, self._reference = list(bounds), list(reference)
        self._recent: deque[int] = deque(maxlen=window)
        self._counts = [0] * len(self._reference)

    def add(self, value: int | float) -> None:
        """Takes a value in; the oldest falls out."""
        if len(self._recent) == self._recent.maxlen:
            self._counts[self._recent[0]] -= 1
        place = bisect.bisect_right(self._bounds, value)
        self._recent.append(place)
        self._counts[place] += 1

    @property
    def index(self) -> float:
        """The population stability index.

        NaN as long as there are fewer than 100 values, or none of validation.
        """
        if len(self._recent) < FEWEST or sum(self._reference) <= 0:
            return math.nan
        return population_stability(self._counts, self._reference)


def drifts_of(reference: Mapping[str, Any]) -> dict[str, Drift]:
    """What a guard's traffic is compared with, by name; what the guard has no histogram of is left out.

    `score`: all scores of validation. `score_of_safe`: those of safe prompts, for traffic is mostly safe.
    `distance`: how far validation's prompts were from the mean of the fit.
    """
    found: dict[str, Drift] = {}
    scores, distances = reference.get("p_unsafe"), reference.get("distance")
    if scores:
        bounds = scores["edges"][1:-1]
        found["score"] = Drift(
            bounds, [safe + unsafe for safe, unsafe in zip(scores["safe"], scores["unsafe"], strict=True)]
        )
        found["score_of_safe"] = Drift(bounds, scores["safe"])
    if distances:
        found["distance"] = Drift(distances["edges"], distances["counts"])
    return found


SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
SCORES = (0.001, 0.005, 0.01, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 0.995, 0.999)
ROWS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0)
_PREFIX = "safety_neurons_guard"


class Metrics:
    """Counts and histograms of one server, in a registry of their own.

    Args:
        drifts: Recent values against those of validation, by name.
    """

    def __init__(self, drifts: Mapping[str, Drift] | None = None) -> None:
        self.registry = CollectorRegistry()
        self.drifts = dict(drifts or {})
        self.requests = self._counter("requests", "Requests, by route and status.", "route", "status")
        self.seconds = self._histogram(
            "request_seconds", "From the request's first byte to the answer's last.", SECONDS, "route"
        )
        self.guard_seconds = self._histogram(
            "verdict_seconds", "From a prompt's arrival to its verdict, the wait included.", SECONDS, "route"
        )
        self.scores = self._histogram(
            "score", "Calibrated probability that the answer would be unsafe.", SCORES
        )
        self.flagged = self._counter("flagged", "Prompts the guard flagged, by route.", "route")
        self.blocked = self._counter(
            "blocked", "Prompts that were held back, by route; none in shadow mode.", "route"
        )
        self.flagged_answers = self._counter(
            "flagged_answers",
            "Answers a check flagged while they were written, by route; stopped, but in shadow mode.",
            "route",
        )
        self.errors = self._counter(
            "errors", "Prompts without a sound verdict, by kind: truncated, error, timeout.", "kind"
        )
        self.rejected = self._counter("rejected", "Requests answered with an error, by its code.", "code")
        self.upstream = self._counter("upstream_errors", "Requests the upstream failed, by kind.", "kind")
        self.disconnected = self._counter(
            "disconnected", "Requests whose client went away before the answer."
        )
        self.batches = self._histogram("batch_rows", "Prompts judged together.", ROWS)
        self.batch_seconds = self._histogram("batch_seconds", "Seconds of the model for a batch.", SECONDS)
        self.waiting = Gauge(f"{_PREFIX}_waiting", "Prompts that wait for the model.", registry=self.registry)
        self.in_flight = Gauge(
            f"{_PREFIX}_in_flight", "Requests accepted and not yet answered.", registry=self.registry
        )
        psi = Gauge(
            f"{_PREFIX}_drift_psi",
            "Population stability index against validation; NaN below 100.",
            ["of"],
            registry=self.registry,
        )
        for name, drift in self.drifts.items():
            psi.labels(name).set_function(lambda drift=drift: drift.index)  # type: ignore[misc]

    def seen(self, score: float | None, distance: float | None) -> None:
        """Takes a verdict's numbers in."""
        if score is not None:
            self.scores.observe(score)
        for name, drift in self.drifts.items():
            value = distance if name == "distance" else score
            if value is not None:
                drift.add(value)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"{_PREFIX}_{name}", text, labels, registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
        return Histogram(f"{_PREFIX}_{name}", text, labels, buckets=buckets, registry=self.registry)

    def text(self) -> bytes:
        """The page that is scraped."""
        return generate_latest(self.registry)


Log = Callable[[Mapping[str, Any]], None]
OPEN = frozenset({"/healthz", "/readyz"})
"""Paths that need no token, are answered while the server closes, and say nothing about it but that."""
ROUTES = frozenset(
    [
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/responses",
        "/v1/moderations",
        "/v1/models",
        "/classify",
        "/beta/litellm_basic_guardrail_api",
        "/healthz",
        "/readyz",
        "/metrics",
        "/openapi.json",
        "/docs",
    ]
)
_SAFE_HEADERS = [(b"x-content-type-options", b"nosniff"), (b"cache-control", b"no-store")]


class Left(Exception):
    """The client went away."""


class Door:
    """Lets requests in.

    Args:
        app: Everything behind it.
        settings: Whom to let in, and how much.
        metrics: Counts.
        log: Told one event a request.
    """

    def __init__(self, app: ASGIApp, settings: Settings, metrics: Metrics, log: Log) -> None:
        self.app, self.settings, self.metrics, self.log = app, settings, metrics, log
        self._token = None if settings.token is None else settings.token.encode()
        self.closing = False
        self.in_flight = 0
        self.bytes_under_way = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one request."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            await self._serve(scope, receive, Outgoing(send, f"req-{secrets.token_hex(12)}"))

    async def _serve(self, scope: Scope, receive: Receive, answer: "Outgoing") -> None:
        started = time.perf_counter()
        route = (
            scope["path"]
            if scope["path"] in ROUTES
            else "/v1/models"
            if scope["path"].startswith("/v1/models/")
            else "other"
        )
        noted: dict[str, Any] = {}
        scope["noted"], scope["request_id"] = noted, answer.id
        self.in_flight += 1
        self.metrics.in_flight.inc()
        try:
            self._check(scope)
            body = await self._body(scope, receive)
            await self._watched(scope, body, receive, answer)
        except Left:
            noted["code"] = "client_left"
            self.metrics.disconnected.inc()
        except Problem as problem:
            noted["code"] = problem.code
            self.metrics.rejected.labels(problem.code).inc()
            await answer.problem(problem)
        except Exception as error:  # nothing that raises may reach a client as a traceback
            noted |= {"code": "internal_error", "exception": type(error).__name__}
            self.metrics.rejected.labels("internal_error").inc()
            self.log({"event": "exception", "id": answer.id, "error": error})
            await answer.problem(unforeseen(answer.id))
        finally:
            self.in_flight -= 1
            self.bytes_under_way -= scope.pop("taken", 0)
            self.metrics.in_flight.dec()
            self._note(scope, answer, route, noted, time.perf_counter() - started)

    def _note(
        self, scope: Scope, answer: "Outgoing", route: str, noted: Mapping[str, Any], seconds: float
    ) -> None:
        status = answer.status or 499
        self.metrics.requests.labels(route, str(status)).inc()
        self.metrics.seconds.labels(route).observe(seconds)
        if route in OPEN or (route == "/metrics" and status == 200):
            return  # asked every few seconds by machines
        event = {
            "event": "request",
            "id": answer.id,
            "method": scope["method"][:16],
            "route": route,
            "status": status,
        }
        self.log({**event, "ms": round(1000 * seconds, 1), **noted})

    def _check(self, scope: Scope) -> None:
        """Who asks, and how.

        Raises:
            Problem: Whatever speaks against it.
        """
        path = scope["path"]
        headers = _headers(scope)
        if {
            "content-length",
            "transfer-encoding",
        } <= headers.keys():  # two readers could see two requests in it
            message = "Content-Length and Transfer-Encoding in one request; expected one of them"
            raise Problem(400, message, "two_lengths", headers={"Connection": "close"})
        if path in OPEN:
            return
        self._check_host(headers)
        self._check_token(headers)
        if self.closing:
            raise closing()
        if self.in_flight > self.settings.limits.requests and path != "/metrics":
            raise busy(1)
        if "content-encoding" in headers and headers["content-encoding"].lower() != "identity":
            raise Problem(
                415,
                "the body is compressed; expected it as it is",
                "unsupported_encoding",
                headers={"Connection": "close"},
            )
        if (
            scope["method"] == "POST"
            and headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json"
        ):
            raise Problem(415, "expected a body of Content-Type application/json", "unsupported_media_type")
        length = headers.get("content-length", "0")
        if not length.isdigit() or int(length) > self.settings.limits.body_bytes:
            raise self._too_large()

    def _check_host(self, headers: Mapping[str, str]) -> None:
        """Without a token, the name the client asked for must be this machine's: a page of elsewhere may not
        reach in through a browser.
        """
        if self._token is None and not is_local(host_of(headers.get("host", ""))):
            raise Problem(
                403, "this server has no token, so it answers requests to localhost only", "host_not_allowed"
            )

    def _check_token(self, headers: Mapping[str, str]) -> None:
        if self._token is None:
            return
        scheme, _, shown = headers.get("authorization", "").partition(" ")
        given = shown.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")
        if not hmac.compare_digest(given.encode("utf-8", "surrogateescape"), self._token):
            raise Problem(
                401,
                "the token is missing or wrong; expected Authorization: Bearer",
                "invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )

    def _too_large(self) -> Problem:
        limit = self.settings.limits.body_bytes
        return Problem(
            413,
            f"the body is too large; expected at most {limit} bytes",
            "body_too_large",
            headers={"Connection": "close"},
        )

    async def _body(self, scope: Scope, receive: Receive) -> bytes:
        """The whole body, its size counted as it arrives.

        Raises:
            Problem: 413, 408 or 429. Left: The client went away.
        """
        if scope["path"] in OPEN:
            return b""  # nobody has shown a token, so nothing is waited for
        headers = _headers(scope)
        if scope["method"] in ("GET", "HEAD", "OPTIONS") and not headers.keys() & {
            "content-length",
            "transfer-encoding",
        }:
            return b""
        parts: list[bytes] = []
        size = 0
        try:
            async with asyncio.timeout(self.settings.limits.body_seconds):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise Left
                    parts.append(message.get("body", b""))
                    size += len(parts[-1])
                    scope["taken"] = size
                    self.bytes_under_way += len(parts[-1])
                    if size > self.settings.limits.body_bytes:
                        raise self._too_large()
                    if self.bytes_under_way > self.settings.limits.bytes_under_way:
                        raise busy(1, hang_up=True)
                    if not message.get("more_body", False):
                        return b"".join(parts)
        except TimeoutError:
            raise Problem(
                408, "the body did not arrive in time", "body_timeout", headers={"Connection": "close"}
            ) from None

    async def _watched(self, scope: Scope, body: bytes, receive: Receive, answer: "Outgoing") -> None:
        """Runs the application, and ends it where the client goes away: its place in the queue is free
        again.
        """
        gone = asyncio.Event()
        given = False

        async def replay() -> Message:
            nonlocal given
            if not given:
                given = True
                return {"type": "http.request", "body": body, "more_body": False}
            await gone.wait()
            return {"type": "http.disconnect"}

        async def watch() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            gone.set()

        inner = (
            {**scope, "method": "GET"} if scope["method"] == "HEAD" else scope
        )  # the server leaves the body of the answer out
        work = asyncio.ensure_future(self.app(inner, replay, answer.send))
        watcher = asyncio.ensure_future(watch())
        try:
            await asyncio.wait({work, watcher}, return_when=asyncio.FIRST_COMPLETED)
            if not work.done() and not answer.complete:
                work.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await work
                raise Left
            await work
        finally:
            for task in (work, watcher):
                task.cancel()
            await asyncio.gather(work, watcher, return_exceptions=True)


class Outgoing:
    """What goes out: the status, whether it is complete, and the headers that every answer has."""

    def __init__(self, send: Send, name: str) -> None:
        self._send, self.id = send, name
        self.status: int | None = None
        self.complete = False

    async def send(self, message: MutableMapping[str, Any]) -> None:
        """Passes a message on."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = [*message.get("headers", []), (b"x-request-id", self.id.encode()), *_SAFE_HEADERS]
            message = {**message, "headers": headers}
        elif message["type"] == "http.response.body" and not message.get("more_body", False):
            self.complete = True
        await self._send(message)

    async def problem(self, problem: Problem) -> None:
        """Answers with an error, unless an answer is under way already."""
        if self.status is not None:
            return
        headers = {
            "content-type": "application/json",
            "content-length": str(len(problem.body)),
            **problem.headers,
        }
        pairs = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
        await self.send({"type": "http.response.start", "status": problem.status, "headers": pairs})
        await self.send({"type": "http.response.body", "body": problem.body, "more_body": False})


def host_of(value: str) -> str:
    """The name in a Host header, port and brackets left out."""
    if value.startswith("["):
        return value[1:].partition("]")[0]
    return value.partition(":")[0]


def _headers(scope: Scope) -> dict[str, str]:
    """Headers by name; a name that comes twice keeps both values, so that neither counts alone."""
    found: dict[str, str] = {}
    for name, value in scope["headers"]:
        key = name.decode("latin-1").lower()
        text = value.decode("latin-1")
        found[key] = f"{found[key]},{text}" if key in found else text
    return found
