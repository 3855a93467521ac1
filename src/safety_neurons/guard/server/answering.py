"""Answer what the guard lets through, by the local model or an upstream: chat completions, completions,
responses.
"""

import asyncio
import dataclasses
import functools
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from starlette.responses import JSONResponse, Response

from safety_neurons.guard.features import RequestReading
from safety_neurons.guard.server.door import Log, Settings
from safety_neurons.guard.server.engine import (
    Answering,
    Engine,
    Outcome,
    VerdictGate,
    asked_wrongly,
    outcome_of,
)
from safety_neurons.guard.server.envelopes import Answered, Envelope, Spent
from safety_neurons.guard.server.local import Admission, Decode, Ended, Piece
from safety_neurons.guard.server.routes import AnswerRoute
from safety_neurons.guard.server.shapes import Problem, Streamed, beside, unfinished
from safety_neurons.guard.server.upstream import STREAM, Upstream
from safety_neurons.guard.verdict import ASKED
from safety_neurons.prompt_lists import Prompt


@dataclass(frozen=True)
class Exchange:
    """One request that is to be answered.

    Attributes:
        route: It came by.
        request: Checked.
        body: The same as it arrived; this is what an upstream gets, written anew.
        noted: For the log line.
        name: Of the request, in the log.
        asked: The readings of each conversation or text.
        n: Answers to each of them.
    """

    route: AnswerRoute
    request: Any
    body: dict[str, Any]
    noted: dict[str, Any]
    name: str
    asked: Sequence[Sequence[RequestReading]]
    n: int

    @property
    def choices(self) -> int:
        """Answers in all."""
        return len(self.asked) * self.n

    @property
    def envelope(self) -> Envelope:
        """A new one for its answers."""
        options = self.request.stream_options
        counted = bool(options and options.include_usage)
        return self.route.envelope(self.request, self.choices, counted=counted)


class UnderWay:
    """Answers that the local model writes for one request, as one stream of what happens.

    Args:
        engine: Has them written.
        wanted: For each choice its number, what the model is fed, and how it decodes.

    Raises:
        Problem: As `Engine.answer`; none of them is written then.
    """

    def __init__(self, engine: Engine, wanted: Iterable[tuple[int, Prompt, Decode]]) -> None:
        self._events: asyncio.Queue[tuple[int, Any]] = asyncio.Queue()
        self._jobs: list[Answering] = []
        self._open: set[int] = set()
        try:
            for index, prompt, decode in wanted:
                self._jobs.append(engine.answer(prompt, decode, functools.partial(self._put, index)))
                self._open.add(index)
        except BaseException:
            self.give_up()
            raise

    def _put(self, index: int, event: Any) -> None:
        self._events.put_nowait((index, event))

    def give_up(self) -> None:
        """Ends what is still written: nobody waits for it any more."""
        for job in self._jobs:
            job.given_up = True

    async def first(self) -> Any:
        """What happens first."""
        return (await self._events.get())[1]

    async def pieces(self, refusal: str) -> AsyncIterator[tuple[int, Piece | Ended]]:
        """Texts and ends of all choices, in the order in which they come; a refusal for each that the guard
        flags in its own prefill.

        Raises:
            Problem: One of them failed.
        """
        while self._open:
            index, event = await self._events.get()
            if isinstance(event, BaseException):
                raise asked_wrongly(event) or Problem(
                    500, "the model failed while it answered", "model_error"
                )
            if isinstance(event, Admission) and event.held:
                yield index, Piece(refusal)
                event = Ended("content_filter", event.verdict.n_tokens or 0)
            if isinstance(event, (Piece, Ended)):
                yield index, event
            if isinstance(event, Ended):
                self._open.discard(index)


class Answerer:
    """Answers requests.

    Args:
        settings: What to do with flagged ones.
        gate: Judges.
        upstream: Answers; None for the local model.
        log: Told what shadow mode saw, which may be known after the answer.
    """

    def __init__(self, settings: Settings, gate: VerdictGate, upstream: Upstream | None, log: Log) -> None:
        self.settings, self.gate, self.upstream, self.log = settings, gate, upstream, log
        self._watching: set[asyncio.Task[Any]] = set()

    async def answer(
        self, route: AnswerRoute, request: Any, body: dict[str, Any], noted: dict[str, Any], name: str
    ) -> Response:
        """The answer to a request.

        Args:
            route: It came by.
            request: Checked.
            body: The same as it arrived.
            noted: For the log line.
            name: Of the request, in the log.

        Raises:
            Problem: Whatever speaks against an answer.
        """
        if self.settings.log_prompts:
            noted["prompt"] = body[route.about]
        limits, local = self.settings.limits, self.upstream is None
        try:
            asked = route.asked(request, limits.messages, local=local)
            exchange = Exchange(route, request, body, noted, name, asked, route.choices(request))
            if exchange.choices > limits.inputs:
                message = f"{exchange.choices} answers; expected at most {limits.inputs}"
                raise Problem(400, message, "too_many_inputs", param="n" if exchange.n > 1 else route.about)
            return await (self._local(exchange) if local else self._proxied(exchange))
        except Problem as problem:
            if problem.param == "messages":  # as every prompt is called where nobody knows the route
                problem.param = route.about
            raise

    async def _proxied(self, exchange: Exchange) -> Response:
        further = beside(exchange.body, self.settings.passed, exchange.route.fields)
        first, *others = exchange.asked
        asked = [[*first, *further], *others]
        if self.settings.shadow:
            self._watch(asked, exchange)
            return await self._forwarded(exchange)
        outcomes = await self.gate.judge(asked, exchange.route.path, exchange.noted)
        if any(outcome.held for outcome in outcomes):  # an upstream gets a request whole or not at all
            return self._held(exchange, outcomes)
        return await self._forwarded(exchange)

    def _watch(self, asked: Sequence[Sequence[RequestReading]], exchange: Exchange) -> None:
        """Shadow mode: judged beside the answer, which never waits for it."""

        async def look() -> None:
            noted: dict[str, Any] = {}
            try:
                await self.gate.judge(asked, exchange.route.path, noted)
            except Problem as problem:
                noted["guard"] = problem.code
            self.log({"event": "shadow", "id": exchange.name, **noted})

        task = asyncio.ensure_future(look())
        self._watching.add(task)
        task.add_done_callback(self._watching.discard)

    async def _forwarded(self, exchange: Exchange) -> Response:
        assert self.upstream is not None
        route = exchange.route
        if not exchange.request.stream:
            status, headers, content = await self.upstream.whole(route.upstream, exchange.body)
            return Response(content, status, headers, media_type="application/json")
        status, headers, pieces = await self.upstream.stream(
            route.upstream, exchange.body, route.ends, exchange.noted
        )
        return Streamed(pieces, status, headers, kind=headers.pop("content-type"))

    def _check_held(self, exchange: Exchange, outcomes: Sequence[Outcome]) -> None:
        """Whether those that are held may be answered with a refusal.

        Raises:
            Problem: The guard could not judge, or an error is wanted in the place of a refusal.
        """
        held = [outcome for outcome in outcomes if outcome.held]
        self.gate.check_length(held)
        for outcome in held:
            if outcome.status != "ok":
                raise unfinished(outcome.status)
        if held and self.settings.on_unsafe == "error":
            raise Problem(
                400,
                "the guard expects an unsafe answer to this conversation",
                "content_filter",
                param=exchange.route.about,
            )

    def _held(self, exchange: Exchange, outcomes: Sequence[Outcome]) -> Response:
        """A refusal in the place of every answer."""
        self._check_held(exchange, outcomes)
        # An upstream, whose tokens are counted, was asked nothing.
        read = [0 if self.upstream else outcome.tokens for outcome in outcomes for _ in range(exchange.n)]
        refused = [self._refused(tokens) for tokens in read]
        envelope, spent = exchange.envelope, _spent(exchange, refused)
        if not exchange.request.stream:
            return JSONResponse(envelope.whole(refused, spent))
        parts = [envelope.opening()]
        for index, one in enumerate(refused):
            parts += [envelope.piece(index, one.text), envelope.closing(index, one)]
        return Streamed(_each([*parts, envelope.ending(spent)]), kind=STREAM)

    def _refused(self, tokens: int) -> Answered:
        """A refusal of a prompt of so many tokens."""
        return Answered(self.settings.refusal, "content_filter", tokens)

    async def _local(self, exchange: Exchange) -> Response:
        """Answers of the local model where nothing is flagged.

        One answer to one conversation is judged in the prefill that it needs anyway, the other readings
        before; of several, every conversation is judged before, and every choice in its own prefill again.
        """
        if exchange.request.model != self.settings.name:
            raise Problem(
                404,
                f"there is no model of this name here; expected {self.settings.name!r}",
                "model_not_found",
                param="model",
            )
        route, path, noted = exchange.route, exchange.route.path, exchange.noted
        decode = route.decoding(exchange.request, exchange.body, self.settings)
        decodes = [
            dataclasses.replace(decode, begun=any(way.name == ASKED for way in ways))
            for ways in exchange.asked
        ]
        if exchange.choices > 1:
            outcomes = await self.gate.judge(exchange.asked, path, noted)
            if all(outcome.held for outcome in outcomes):
                return self._held(exchange, outcomes)
            self._check_held(exchange, outcomes)
            held = [outcome if outcome.held else None for outcome in outcomes for _ in range(exchange.n)]
            written = UnderWay(self.gate.engine, self._wanted(exchange, decodes, held))
            return await self._given(exchange, written, held)
        started = time.perf_counter()
        (ways,) = exchange.asked
        before = await self.gate.look(ways[1:])
        if any(outcome.held for outcome in before):
            self.gate.took(time.perf_counter() - started, path, noted)
            return self._held(exchange, self.gate.settled([before], path, noted))
        written = UnderWay(self.gate.engine, [(0, ways[0].prompt, decodes[0])])
        try:
            first = await self._first(written)
            if isinstance(first, Admission):
                self.gate.took(time.perf_counter() - started, path, noted)
                outcomes = self.gate.settled(
                    [[outcome_of(first.verdict, self.settings), *before]], path, noted
                )
                if outcomes[0].held:
                    return self._held(exchange, outcomes)
        except BaseException:
            written.give_up()
            raise
        return await self._given(exchange, written, [None])

    def _wanted(
        self, exchange: Exchange, decodes: Sequence[Decode], held: Sequence[Outcome | None]
    ) -> Iterable[tuple[int, Prompt, Decode]]:
        """The choices that are written, each with a seed of its own; the first one of a prompt has the
        request's.
        """
        for place, (ways, decode) in enumerate(zip(exchange.asked, decodes, strict=True)):
            for choice in range(exchange.n):
                index = place * exchange.n + choice
                seed = None if decode.seed is None else decode.seed + choice
                if held[index] is None:
                    yield index, ways[0].prompt, dataclasses.replace(decode, seed=seed)

    async def _first(self, written: UnderWay) -> Any:
        try:
            async with asyncio.timeout(self.settings.limits.seconds):
                first = await written.first()
        except TimeoutError:
            self.gate.metrics.errors.labels("timeout").inc()
            raise unfinished("timeout") from None
        if isinstance(first, BaseException):
            problem = asked_wrongly(first)
            if problem is None:
                self.gate.metrics.errors.labels("error").inc()
            raise problem or unfinished("error")
        return first

    async def _given(self, exchange: Exchange, written: UnderWay, held: Sequence[Outcome | None]) -> Response:
        """What is written, whole or as it comes, and refusals for choices that are held."""
        if exchange.request.stream:
            return Streamed(self._streamed(exchange, written, held), kind=STREAM)
        answers = self._started(held)
        try:
            async for index, event in written.pieces(self.settings.refusal):
                _take(answers[index], event)
        except BaseException:
            written.give_up()
            raise
        finally:
            self._note_flagged(exchange, answers)
        return JSONResponse(exchange.envelope.whole(answers, _spent(exchange, answers)))

    async def _streamed(
        self, exchange: Exchange, written: UnderWay, held: Sequence[Outcome | None]
    ) -> AsyncGenerator[bytes, None]:
        envelope, answers = exchange.envelope, self._started(held)
        try:
            yield envelope.opening()
            for index, answer in enumerate(answers):
                if held[index] is not None:
                    yield envelope.piece(index, answer.text) + envelope.closing(index, answer)
            async for index, event in written.pieces(self.settings.refusal):
                _take(answers[index], event)
                if isinstance(event, Piece):
                    yield envelope.piece(index, event.text)
                else:
                    yield envelope.closing(index, answers[index])
            yield envelope.ending(_spent(exchange, answers))
        except Problem as problem:
            exchange.noted["code"] = problem.code
            yield envelope.broken(problem)
        finally:
            written.give_up()
            self._note_flagged(exchange, answers)

    def _note_flagged(self, exchange: Exchange, answers: Sequence[Answered]) -> None:
        """Counts the answers that a check flagged while they were written."""
        if self.settings.recheck_every:
            flagged = sum(answer.flagged for answer in answers)
            self.gate.metrics.flagged_answers.labels(exchange.route.path).inc(flagged)
            exchange.noted["flagged_answers"] = flagged

    def _started(self, held: Sequence[Outcome | None]) -> list[Answered]:
        return [Answered() if one is None else self._refused(one.tokens) for one in held]


def _take(answer: Answered, event: Piece | Ended) -> None:
    """Adds what happened to an answer."""
    if isinstance(event, Piece):
        answer.text += event.text
    else:
        answer.reason, answer.tokens = event.reason, event.tokens
        answer.prompt_tokens, answer.flagged = event.prompt_tokens, event.flagged


def _spent(exchange: Exchange, answers: Sequence[Answered]) -> Spent:
    firsts = range(0, len(answers), exchange.n)
    prompts = [max(one.prompt_tokens for one in answers[place : place + exchange.n]) for place in firsts]
    return Spent(sum(prompts), sum(one.tokens for one in answers))


async def _each(events: Iterable[bytes]) -> AsyncGenerator[bytes, None]:
    for one in events:
        yield one
