"""`/v1/chat/completions`: a conversation is judged first, and answered by the local model or the upstream where it is not flagged."""

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from typing import Any

from starlette.responses import JSONResponse, Response

from safety_neurons.guard.requests import Reading
from safety_neurons.guard.server.answers import DONE, Envelope, Streamed, usage
from safety_neurons.guard.server.conversation import KNOWN, beside, conversation, strange_options
from safety_neurons.guard.server.door import Log
from safety_neurons.guard.server.engine import Answering, asked_wrongly
from safety_neurons.guard.server.gate import Gate, Outcome, outcome_of
from safety_neurons.guard.server.problems import Problem, unfinished
from safety_neurons.guard.server.settings import Settings
from safety_neurons.guard.server.shapes import ChatRequest
from safety_neurons.guard.server.upstream import Upstream
from safety_neurons.guard.server.writing import Decode, Ended, Judged, Piece

ROUTE = "/v1/chat/completions"
_STREAM = "text/event-stream; charset=utf-8"
_WITHOUT_EFFECT = {
    "n": (1,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "logit_bias": ({},),
    "tools": ([],),
    "functions": ([],),
    "tool_choice": ("none", "auto"),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "top_k": (0, -1),
    "min_p": (0,),
    "min_tokens": (0,),
    "repetition_penalty": (1,),
    "ignore_eos": (False,),
    "chat_template_kwargs": ({},),
}
"""Fields the local model does not know, and the values that ask nothing of it."""
_IGNORED = {"user", "metadata", "store", "service_tier", "parallel_tool_calls", "safety_identifier", "prompt_cache_key"}
_TAKEN = {"model", "messages", "stream", "stream_options", "max_tokens", "max_completion_tokens", "temperature", "top_p", "seed", "stop"}


class Chat:
    """Answers conversations.

    Args:
        settings: What to do with flagged ones.
        gate: Judges.
        upstream: Answers; None for the local model.
        log: Told what shadow mode saw, which may be known after the answer.
    """

    def __init__(self, settings: Settings, gate: Gate, upstream: Upstream | None, log: Log) -> None:
        self.settings, self.gate, self.upstream, self.log = settings, gate, upstream, log
        self._watching: set[asyncio.Task[Any]] = set()

    async def answer(self, request: ChatRequest, body: dict[str, Any], noted: dict[str, Any], name: str) -> Response:
        """The answer to a request.

        Args:
            request: Checked.
            body: The same as it arrived; this is what an upstream gets, written anew.
            noted: For the log line.
            name: Of the request, in the log.

        Raises:
            Problem: Whatever speaks against an answer.
        """
        if self.settings.log_prompts:
            noted["prompt"] = body["messages"]
        ways = conversation(request.messages, self.settings.limits.messages)
        if self.upstream is None:
            return await self._local(request, ways, body, noted)
        ways += beside(body, self.settings.passed)
        if self.settings.shadow:
            self._watch(ways, name)
            return await self._forwarded(request, body)
        (outcome,) = await self.gate.judge([ways], ROUTE, noted)
        if outcome.held:
            return self._held(request, outcome)
        return await self._forwarded(request, body)

    def _watch(self, ways: list[Reading], name: str) -> None:
        """Shadow mode: judged beside the answer, which never waits for it."""

        async def look() -> None:
            noted: dict[str, Any] = {}
            try:
                await self.gate.judge([ways], ROUTE, noted)
            except Problem as problem:
                noted["guard"] = problem.code
            self.log({"event": "shadow", "id": name, **noted})

        task = asyncio.ensure_future(look())
        self._watching.add(task)
        task.add_done_callback(self._watching.discard)

    def _held(self, request: ChatRequest, outcome: Outcome) -> Response:
        """What is answered in the place of an answer."""
        self.gate.check_length([outcome])
        if outcome.status != "ok":
            raise unfinished(outcome.status)
        return refusal(self.settings, request)

    async def _forwarded(self, request: ChatRequest, body: dict[str, Any]) -> Response:
        assert self.upstream is not None
        if not request.stream:
            status, headers, content = await self.upstream.chat(body)
            return Response(content, status, headers, media_type="application/json")
        status, headers, pieces = await self.upstream.stream(body)
        return Streamed(pieces, status, headers, kind=_STREAM if status == 200 else "application/json")

    async def _local(self, request: ChatRequest, ways: list[Reading], body: Mapping[str, Any], noted: dict[str, Any]) -> Response:
        """Answers where nothing is flagged: the whole conversation is judged in the prefill of its answer, the other readings before."""
        if request.model != self.settings.name:
            raise Problem(404, f"there is no model of this name here; expected {self.settings.name!r}", "model_not_found", param="model")
        decode = decoding(request, body, self.settings)
        events: asyncio.Queue[Any] = asyncio.Queue()
        started = time.perf_counter()
        before = await self.gate.look(ways[1:])
        if any(outcome.held for outcome in before):
            self.gate.took(time.perf_counter() - started, ROUTE, noted)
            return self._held(request, self.gate.settled([before], ROUTE, noted)[0])
        job = self.gate.engine.answer(ways[0].prompt, decode, events.put_nowait)
        try:
            first = await self._first(events)
            if isinstance(first, Judged):
                self.gate.took(time.perf_counter() - started, ROUTE, noted)
                (outcome,) = self.gate.settled([[outcome_of(first.verdict, self.settings), *before]], ROUTE, noted)
                if outcome.held:
                    return self._held(request, outcome)
            written = self._pieces(events)
            if not request.stream:
                return await self._whole(request, written)
        except BaseException:
            job.given_up = True
            raise
        return Streamed(self._streamed(request, written, job), kind=_STREAM)

    async def _first(self, events: "asyncio.Queue[Any]") -> Any:
        try:
            async with asyncio.timeout(self.settings.limits.seconds):
                first = await events.get()
        except TimeoutError:
            self.gate.metrics.errors.labels("timeout").inc()
            raise unfinished("timeout") from None
        if isinstance(first, BaseException):
            problem = asked_wrongly(first)
            if problem is None:
                self.gate.metrics.errors.labels("error").inc()
            raise problem or unfinished("error")
        return first

    async def _pieces(self, events: "asyncio.Queue[Any]") -> AsyncIterator[Piece | Ended]:
        while True:
            event = await events.get()
            if isinstance(event, BaseException):
                raise asked_wrongly(event) or Problem(500, "the model failed while it answered", "model_error")
            if isinstance(event, (Piece, Ended)):
                yield event
            if isinstance(event, Ended):
                return

    async def _whole(self, request: ChatRequest, written: AsyncIterator[Piece | Ended]) -> Response:
        text, ended = "", Ended("stop")
        async for event in written:
            if isinstance(event, Piece):
                text += event.text
            else:
                ended = event
        return JSONResponse(Envelope(request.model).whole(text, ended.reason, usage(ended.prompt_tokens, ended.tokens)))

    async def _streamed(self, request: ChatRequest, written: AsyncIterator[Piece | Ended], job: Answering) -> AsyncGenerator[bytes, None]:
        counted = wants_usage(request)
        envelope = Envelope(request.model)
        try:
            yield envelope.piece({"role": "assistant", "content": "", "refusal": None}, with_usage=counted)
            async for event in written:
                if isinstance(event, Piece):
                    yield envelope.piece({"content": event.text}, with_usage=counted)
                    continue
                yield envelope.piece({}, event.reason, with_usage=counted)
                if counted:
                    yield envelope.usage(usage(event.prompt_tokens, event.tokens))
                yield DONE
        except Problem as problem:
            yield b"data: " + problem.body + b"\n\n"
        finally:
            job.given_up = True


def refusal(settings: Settings, request: ChatRequest) -> Response:
    """What a flagged conversation is answered with.

    Raises:
        Problem: 400, where that is what is wanted.
    """
    if settings.on_unsafe == "error":
        raise Problem(400, "the guard expects an unsafe answer to this conversation", "content_filter", param="messages")
    envelope = Envelope(request.model)
    if request.stream:
        return Streamed(_each(envelope.refused(settings.refusal, usage() if wants_usage(request) else None)), kind=_STREAM)
    return JSONResponse(envelope.whole(settings.refusal, "content_filter", usage()))


async def _each(events: Any) -> AsyncGenerator[bytes, None]:
    for one in events:
        yield one


def wants_usage(request: ChatRequest) -> bool:
    """Whether a stream ends with counts of tokens."""
    return bool(request.stream_options and request.stream_options.include_usage)


def decoding(request: ChatRequest, body: Mapping[str, Any], settings: Settings) -> Decode:
    """How the local model decodes an answer: greedily unless the request names a temperature above zero.

    Raises:
        Problem: 400 for what the local model cannot do.
    """
    for name, value in body.items():
        if value is None or name in _TAKEN or name in _IGNORED or value in _WITHOUT_EFFECT.get(name, ()):
            continue
        why = "is not supported by the local model" if name in KNOWN else "is not known"
        raise Problem(400, f"field {name[:64]!r} {why}; leave it out", "unsupported_parameter", param=name[:64])
    for name in strange_options(body):
        raise Problem(400, f"field {name[:64]!r} is not known; leave it out", "unknown_parameter", param=name[:64])
    wanted = request.max_completion_tokens or request.max_tokens or min(256, settings.limits.new_tokens)
    if wanted > settings.limits.new_tokens:
        raise Problem(400, f"{wanted} new tokens; expected at most {settings.limits.new_tokens}", "too_many_tokens", param="max_tokens")
    stop = [request.stop] if isinstance(request.stop, str) else list(request.stop or ())
    if any(not text or len(text) > 256 for text in stop):
        raise Problem(400, "stop: expected texts of 1 to 256 characters", "invalid_value", param="stop")
    temperature = request.temperature or 0.0
    return Decode(wanted, temperature, request.top_p if request.top_p is not None else 1.0, request.seed, tuple(stop))
