"""The upstream: any OpenAI-compatible server that answers what the guard let through."""

import json
from collections.abc import AsyncGenerator, Mapping, MutableMapping
from typing import Any

import httpx

from safety_neurons import strict_json
from safety_neurons.guard.server.door import Metrics, Settings
from safety_neurons.guard.server.shapes import TYPES, Problem
from safety_neurons.model.chat_server import is_local

LARGEST = 1 << 26
"""Bytes of an answer that are passed on; a longer one is cut off with an error."""
STREAM = "text/event-stream; charset=utf-8"
_CONNECT_SECONDS = 5.0
_LONGEST = 40
"""Bytes of a line that tell whether it is `data: [DONE]`, or the name of an event that ends an answer."""
_PASSED_ON = ("retry-after", "openai-processing-ms")


class Upstream:
    """A client of the upstream. Nothing is sent twice, no redirect is followed, and the clients' own headers
    stay here.

    Args:
        settings: Where it is, and its key.
        metrics: Counts what it fails.
        transport: In the place of the network, for tests.
    """

    def __init__(
        self, settings: Settings, metrics: Metrics, transport: httpx.AsyncBaseTransport | None = None
    ) -> None:
        assert settings.upstream is not None
        self.url = settings.upstream.rstrip("/")
        self.metrics = metrics
        headers = {"accept-encoding": "identity", "user-agent": "safety-neurons-guard"}
        if settings.upstream_key:
            headers["authorization"] = f"Bearer {settings.upstream_key}"
        silence = settings.limits.upstream_seconds
        self._client = httpx.AsyncClient(
            headers=headers,
            timeout=httpx.Timeout(silence, connect=_CONNECT_SECONDS, pool=silence),
            limits=httpx.Limits(
                max_connections=settings.limits.requests, max_keepalive_connections=64, keepalive_expiry=30.0
            ),
            follow_redirects=False,
            trust_env=not is_local(httpx.URL(self.url).host),
            transport=transport,
        )

    async def close(self) -> None:
        """Closes the connections."""
        await self._client.aclose()

    async def models(self) -> tuple[int, dict[str, str], bytes]:
        """Its list of models."""
        return await self._whole("GET", "/models", None)

    async def whole(self, path: str, body: Mapping[str, Any]) -> tuple[int, dict[str, str], bytes]:
        """Its answer to a request: status, headers, body. Errors come in the shape of the OpenAI API.

        Raises:
            Problem: 502 where it cannot be reached or answers something else, 504 where it is silent.
        """
        return await self._whole("POST", path, body)

    async def stream(
        self, path: str, body: Mapping[str, Any], ends: frozenset[bytes], noted: MutableMapping[str, Any]
    ) -> tuple[int, dict[str, str], AsyncGenerator[bytes, None]]:
        """Its answer to a request as it comes; an error, and an answer that is no stream, come whole, as
        `content-type` among the headers says.

        Where it breaks off, the last event is an error and none of those that end an answer, so nobody takes
        a part for the whole.

        Args:
            path: Behind its address.
            body: Of the request.
            ends: Names of events that end an answer, beside `[DONE]`.
            noted: Gets why it broke off, for the log line.

        Raises:
            Problem: As for `whole`.
        """
        response = await self._sent("POST", path, body)
        streamed = response.headers.get("content-type", "").startswith("text/event-stream")
        if response.status_code != 200 or not streamed:
            try:
                status, headers, whole = self._checked(response, await self._read(response))
            finally:
                await response.aclose()
            return status, {**headers, "content-type": "application/json"}, _once(whole)
        return 200, {**_kept(response), "content-type": STREAM}, self._pieces(response, ends, noted)

    async def _whole(
        self, method: str, path: str, body: Mapping[str, Any] | None
    ) -> tuple[int, dict[str, str], bytes]:
        response = await self._sent(method, path, body)
        try:
            return self._checked(response, await self._read(response))
        finally:
            await response.aclose()

    async def _sent(self, method: str, path: str, body: Mapping[str, Any] | None) -> httpx.Response:
        content = None if body is None else json.dumps(body, ensure_ascii=False, allow_nan=False).encode()
        headers = {} if content is None else {"content-type": "application/json"}
        request = self._client.build_request(method, f"{self.url}{path}", content=content, headers=headers)
        try:
            return await self._client.send(request, stream=True)
        except httpx.HTTPError as error:
            raise self._problem(error) from None

    async def _read(self, response: httpx.Response) -> bytes:
        parts: list[bytes] = []
        size = 0
        try:
            async for part in response.aiter_raw():
                parts.append(part)
                size += len(part)
                if size > LARGEST:
                    raise self._failed("too_large", 502, "the upstream's answer is too large")
        except httpx.HTTPError as error:
            raise self._problem(error) from None
        return b"".join(parts)

    async def _pieces(
        self, response: httpx.Response, ends: frozenset[bytes], noted: MutableMapping[str, Any]
    ) -> AsyncGenerator[bytes, None]:
        size, events = 0, Events(ends)
        problem: Problem | None = None
        try:
            async for part in response.aiter_raw():
                size += len(part)
                events.feed(part)
                yield part
                if size > LARGEST:
                    break
            if not events.finished():
                problem = self._failed("broken_off", 502, "the upstream broke off its answer")
        except httpx.HTTPError as error:
            problem = self._problem(error)
        finally:
            await response.aclose()
        if problem is not None:
            noted["code"] = problem.code
            yield (b"" if events.between else b"\n\n") + b"data: " + problem.body + b"\n\n"

    def _checked(self, response: httpx.Response, content: bytes) -> tuple[int, dict[str, str], bytes]:
        """An answer as it is passed on: JSON objects as they are, other errors in the shape of the OpenAI
        API.
        """
        status = response.status_code
        try:
            record = strict_json.loads(content, lenient=True)
        except (ValueError, RecursionError):
            record = None
        if status in (401, 403):
            raise self._failed(
                "refused", 502, f"the upstream refused this server's key ({status})", "upstream_refused"
            )
        if 300 <= status < 400 or status < 200:
            raise self._failed("redirect", 502, f"the upstream answered {status}; redirects are not followed")
        if isinstance(record, dict) and (status == 200) == ("error" not in record or record["error"] is None):
            if status >= 500:
                self.metrics.upstream.labels("status").inc()
            return status, _kept(response), content
        if status < 300:
            raise self._failed("malformed", 502, "the upstream answered something that is not a JSON object")
        self.metrics.upstream.labels("status").inc()
        problem = Problem(status, f"the upstream answered {status}", "upstream_error")
        if status not in TYPES and status < 500:
            problem = Problem(status, f"the upstream refused the request ({status})", "upstream_error")
        return status, _kept(response), problem.body

    def _problem(self, error: httpx.HTTPError) -> Problem:
        if isinstance(error, httpx.TimeoutException) and not isinstance(error, httpx.ConnectTimeout):
            return self._failed("timeout", 504, "the upstream did not answer in time", "upstream_timeout")
        return self._failed(
            "unreachable", 502, f"the upstream cannot be reached or broke off ({type(error).__name__})"
        )

    def _failed(self, kind: str, status: int, message: str, code: str = "upstream_unavailable") -> Problem:
        self.metrics.upstream.labels(kind).inc()
        return Problem(status, message, code, headers={"Retry-After": "2"})


class Events:
    """Finds the end of a stream of server-sent events: an event whose data is `[DONE]`, not these letters
    inside a text; or one of a name that is an end.

    Attributes:
        between: Whether the last event is complete.

    Args:
        ends: Names of events that end an answer.
    """

    def __init__(self, ends: frozenset[bytes] = frozenset()) -> None:
        self.between = True
        self._ends = ends
        self._ending = False
        self._line = b""
        self._data: list[bytes] = []
        self._done = self._half_break = False

    def feed(self, part: bytes) -> None:
        """Reads on. Of long lines only the beginning is kept."""
        if not part:
            return
        if self._half_break:
            part = part.removeprefix(b"\n")
        self._half_break = part.endswith(b"\r")
        *lines, rest = part.replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")
        for line in lines:
            self._end_line((self._line + line)[:_LONGEST])
        self._line = (self._line + rest)[:_LONGEST]
        self.between = self.between and not self._line

    def finished(self) -> bool:
        """Whether the end was there, the last line breaks left out or not."""
        return self._done or [*self._data, *_value_of(b"data", self._line)] == [b"[DONE]"]

    def _end_line(self, line: bytes) -> None:
        self._line, self.between = b"", not line
        self._ending = self._ending or any(name in self._ends for name in _value_of(b"event", line))
        if not line:
            self._done = self._done or self._data == [b"[DONE]"] or self._ending
            self._data = []
        self._data = [*self._data, *_value_of(b"data", line)][:2]


def _value_of(field: bytes, line: bytes) -> list[bytes]:
    """What a line gives a field; the space behind the colon may be missing, as the colon may."""
    name, _, value = line.partition(b":")
    return [value.removeprefix(b" ")] if name == field else []


async def _once(content: bytes) -> AsyncGenerator[bytes, None]:
    yield content


def _kept(response: httpx.Response) -> dict[str, str]:
    return {name: response.headers[name] for name in _PASSED_ON if name in response.headers}
