"""The engine: one thread owns the model.

What waits is judged together, and answers are written between the judging.

Requests come from an event loop and go back to it. A turn of the thread is one batch of verdicts, then one
token of every answer under way, so a long answer delays a verdict by one token at most. Nothing waits to fill
a batch: what came while the model was busy is the next.

Whatever a request raises is that request's error, a panic of a native library included, which is no
`Exception`. What escapes all the same ends the thread: then everybody who waits is told, nothing more is
taken, and `failed` says why.
"""

import asyncio
import dataclasses
import hashlib
import itertools
import json
import math
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from safety_neurons.errors import InputError
from safety_neurons.guard.features import RequestReading
from safety_neurons.guard.server.door import Metrics, Settings
from safety_neurons.guard.server.shapes import Problem, busy, closing, too_long, too_many_characters
from safety_neurons.guard.verdict import WHOLE, counting, largest
from safety_neurons.prompt_lists import Prompt

_SMOOTHING = 0.2
_CHARACTERS_A_TURN = 1 << 16
"""Of the prompts that are tokenised between two batches, the one that waits longest not counted."""


@runtime_checkable
class PromptJudge(Protocol):
    """What judges: a bound guard."""

    def prepare(self, prompt: Any) -> Any:
        """A prompt as the model is fed it, with its `ids`.

        Raises InputError or Problem for one that cannot be.
        """

    def score(self, prepared: Sequence[Any]) -> Sequence[Any]:
        """A verdict for each of them, read together."""


@runtime_checkable
class Writer(Protocol):
    """What answers conversations with the local model."""

    def start(self, jobs: Sequence["Answering"]) -> Iterator[None]:
        """Answers together; every `next` is one step, which calls `tell` of the jobs.

        A job whose `given_up` is set is left out.
        """

    def fits(self, job: "Answering", others: Sequence["Answering"]) -> bool:
        """Whether a job can be answered together with others."""


@dataclass(eq=False, kw_only=True)
class Waiting:
    """A prompt that waits for the model.

    Attributes:
        fed: The prompt as the model is fed it; None until it is encoded.
    """

    prompt: Any = field(kw_only=False)
    fed: Any = None

    @property
    def characters(self) -> int:
        """Characters of what the prompt says, its turns or its text, and of its answer."""
        asked = sum(len(message.content) for message in self.prompt.messages) or len(self.prompt.text)
        return asked + len(self.prompt.answer or "")

    @property
    def length(self) -> int:
        """Tokens."""
        return len(self.fed.ids) if self.fed is not None else 0


@dataclass(eq=False)
class Item(Waiting):
    """One prompt that waits for its verdict."""

    request: "Judging"
    place: int

    @property
    def given_up(self) -> bool:
        """Whether nobody waits for it any more."""
        return self.request.given_up


@dataclass(eq=False)
class Judging:
    """The prompts of one request, and where their verdicts go."""

    future: "asyncio.Future[list[Any]]"
    verdicts: list[Any]
    missing: int
    given_up: bool = False


@dataclass(eq=False)
class Answering(Waiting):
    """One conversation that the local model answers.

    Attributes:
        settings: How to decode.
        send: Takes what happens, in the event loop.
        given_up: Set when nobody waits for it any more.
        ended: Set when everything is told.
    """

    settings: Any
    send: Callable[[Any], None]
    given_up: bool = False
    ended: bool = False

    def tell(self, event: Any) -> None:
        """Hands on what happened; an exception ends it."""
        if isinstance(event, BaseException):
            self.ended = True
        self.send(event)


@dataclass
class EngineCounts:
    """What the engine has done, for metrics and tests."""

    batches: int = 0
    judged: int = 0
    answered: int = 0
    dropped: int = 0
    largest: int = 0
    seconds: float = 0.0
    sizes: "deque[int]" = field(default_factory=lambda: deque(maxlen=1024))


class Engine:
    """Judges and answers on one thread.

    Attributes:
        failed: What ended the thread; None while it runs, and where it was closed.

    Args:
        judge: A bound guard.
        writer: Answers conversations; None where an upstream does.
        batch: Prompts of a forward pass, or answers under way, at most.
        batch_tokens: Padded tokens of a forward pass.
        waiting: Prompts that may wait.
        characters: Of a prompt at most; a longer one is refused at once. None for any number.
        observe: Told the size and the seconds of every batch, on the engine's thread.
    """

    def __init__(
        self,
        judge: PromptJudge,
        writer: Writer | None = None,
        *,
        batch: int = 32,
        batch_tokens: int = 2048,
        waiting: int = 256,
        characters: int | None = None,
        observe: Callable[[int, float], None] | None = None,
    ) -> None:
        self.judge, self.writer = judge, writer
        self.counts = EngineCounts()
        self._batch, self._batch_tokens, self._most, self._characters = (
            batch,
            batch_tokens,
            waiting,
            characters,
        )
        self._observe = observe
        self._changed = threading.Condition()
        self._arrived: deque[Item | Answering] = deque()
        self._ready: list[Item] = []
        self._asked: deque[Answering] = deque()
        self._under_way: list[tuple[Iterator[None], list[Answering]]] = []
        self._n_waiting, self._closing, self._per_item = 0, False, 0.02
        self.failed: BaseException | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None

    @property
    def waiting(self) -> int:
        """Prompts that wait, those of answers included."""
        return self._n_waiting

    @property
    def alive(self) -> bool:
        """Whether the thread runs and takes work."""
        return (
            self._thread is not None and self._thread.is_alive() and not self._closing and self.failed is None
        )

    def start(self) -> None:
        """Starts the thread; call it in the event loop that asks."""
        self._loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=self._work, name="guard-engine", daemon=True)
        self._thread.start()

    async def close(self, seconds: float = 60.0) -> bool:
        """Takes nothing new, finishes what was accepted, ends the thread.

        False where that takes longer than `seconds`.
        """
        with self._changed:
            self._closing = True
            self._changed.notify()
        if self._thread is None:
            return True
        end = time.monotonic() + seconds
        while self._thread.is_alive() and time.monotonic() < end:
            await asyncio.sleep(0.01)
        return not self._thread.is_alive()

    async def verdicts(self, prompts: Sequence[Any], seconds: float) -> list[Any]:
        """The verdict on each prompt, in order.

        A prompt the model cannot be asked has the error in its place.

        Raises:
            Problem: 400 for one that is too long, 429 where too much waits, 503 while closing.
            TimeoutError: It took too long; the prompts are given up.
        """
        request = Judging(asyncio.get_running_loop().create_future(), [None] * len(prompts), len(prompts))
        if not prompts:
            return []
        self._accept([Item(prompt, request, place) for place, prompt in enumerate(prompts)])
        try:
            async with asyncio.timeout(seconds):
                return await request.future
        finally:
            request.given_up = True

    def answer(self, prompt: Any, settings: Any, send: Callable[[Any], None]) -> Answering:
        """Has a conversation answered; `send` is called in the event loop with every event, in order.

        Raises:
            Problem: 400 for one that is too long, 429 where too much waits, 503 while closing.
        """
        loop = asyncio.get_running_loop()
        job = Answering(prompt, settings, lambda event: _post(loop, send, event))
        self._accept([job])
        return job

    def _accept(self, items: Sequence[Item | Answering]) -> None:
        most = self._characters
        for item in items:
            if most is not None and item.characters > most:
                raise too_many_characters(item.characters, most)
        with self._changed:
            if self._closing or self.failed is not None or self._thread is None:
                raise closing()
            if self._n_waiting + len(items) > self._most:
                raise busy(self._wait())
            self._n_waiting += len(items)
            self._arrived.extend(items)
            self._changed.notify()

    def _wait(self) -> int:
        return max(1, min(60, math.ceil(self._n_waiting * self._per_item)))

    # The engine's thread

    def _work(self) -> None:
        try:
            self._run()
        except BaseException as error:  # nobody above would hear of it
            with self._changed:
                self.failed = error
                left = [*self._arrived, *self._ready, *self._asked]
                self._n_waiting = 0
            for item in left:
                self._refuse(item, error)
            for _, jobs in self._under_way:
                self._end(jobs, error)

    def _run(self) -> None:
        while True:
            with self._changed:
                while not (self._arrived or self._ready or self._asked or self._under_way or self._closing):
                    self._changed.wait()
                if self._closing and not (self._arrived or self._ready or self._asked or self._under_way):
                    return
                arrived = self._some_arrived()
            for item in arrived:
                self._prepare(item)
            self._forget_given_up()
            self._judge_some()
            self._start_answers()
            self._step_answers()

    def _some_arrived(self) -> list["Item | Answering"]:
        """The one that waits longest, and the shortest ones as long as they are tokenised soon: long ones
        come one a turn.
        """
        taken, total = {id(item) for item in itertools.islice(self._arrived, 1)}, 0
        for item in sorted(itertools.islice(self._arrived, 1, None), key=lambda item: item.characters):
            total += item.characters
            if total > _CHARACTERS_A_TURN:
                break
            taken.add(id(item))
        chosen = [item for item in self._arrived if id(item) in taken]
        self._arrived = deque(item for item in self._arrived if id(item) not in taken)
        return chosen

    def _left(self, count: int) -> None:
        with self._changed:
            self._n_waiting -= count

    def _prepare(self, item: "Item | Answering") -> None:
        """Encodes a prompt and puts it where it waits.

        One that cannot be put to the model is answered at once.
        """
        try:
            item.fed = None if item.given_up else self.judge.prepare(item.prompt)
        except (
            BaseException
        ) as error:  # a template is a program, and a tokenizer meets hostile text: neither may end the thread
            self._left(1)
            self._refuse(item, error)
            return
        if isinstance(item, Item):
            self._ready.append(item)
        else:
            self._asked.append(item)

    def _refuse(self, item: "Item | Answering", error: BaseException) -> None:
        if isinstance(item, Item):
            self._deliver([item], [error])
        else:
            item.tell(error)

    def _end(self, jobs: Iterable[Answering], error: BaseException) -> None:
        for job in jobs:
            if not job.ended and not job.given_up:
                job.tell(error)

    def _forget_given_up(self) -> None:
        kept = [item for item in self._ready if not item.given_up]
        asked = [job for job in self._asked if not job.given_up]
        gone = len(self._ready) - len(kept) + len(self._asked) - len(asked)
        if gone:
            self._ready, self._asked = kept, deque(asked)
            self.counts.dropped += gone
            self._left(gone)

    def _next_batch(self) -> list[Item]:
        """The one that waits longest, and those nearest to it in length as long as rows and padded tokens
        last.
        """
        first = self._ready[0]
        near = sorted(self._ready[1:], key=lambda item: abs(item.length - first.length))
        chosen, widest = [first], first.length
        for item in near:
            width = max(widest, item.length)
            if len(chosen) == self._batch:
                break
            if width * (len(chosen) + 1) > self._batch_tokens:
                continue
            chosen.append(item)
            widest = width
        taken = set(map(id, chosen))
        self._ready = [item for item in self._ready if id(item) not in taken]
        return chosen

    def _judge_some(self) -> None:
        if not self._ready:
            return
        batch = self._next_batch()
        self._left(len(batch))
        started = time.perf_counter()
        verdicts = self._scored(batch)
        seconds = time.perf_counter() - started
        self._per_item += _SMOOTHING * (seconds / len(batch) - self._per_item)
        self.counts.batches += 1
        self.counts.judged += len(batch)
        self.counts.largest = max(self.counts.largest, len(batch))
        self.counts.seconds += seconds
        self.counts.sizes.append(len(batch))
        self._deliver(batch, verdicts)
        if self._observe is not None:
            self._observe(len(batch), seconds)

    def _scored(self, batch: list[Item]) -> list[Any]:
        """Verdicts, or errors in their place.

        A prompt that fails is judged alone so that it takes no other with it.
        """
        try:
            verdicts = list(self.judge.score([item.fed for item in batch]))
            if len(verdicts) != len(batch):
                raise RuntimeError(f"{len(verdicts)} verdicts on {len(batch)} prompts")
            return verdicts
        except (
            BaseException
        ) as error:  # whatever a model raises is this request's error and never the thread's end
            if len(batch) == 1:
                return [error]
        return [self._scored([item])[0] for item in batch]

    def _deliver(self, batch: Sequence[Item], verdicts: Sequence[Any]) -> None:
        finished: list[Judging] = []
        for item, verdict in zip(batch, verdicts, strict=True):
            request = item.request
            request.verdicts[item.place] = verdict
            request.missing -= 1
            if request.missing == 0:
                finished.append(request)
        assert self._loop is not None
        if finished:
            _post(self._loop, _resolve, finished)

    def _start_answers(self) -> None:
        rows = sum(len(jobs) for _, jobs in self._under_way)
        if not self._asked or self.writer is None or rows >= self._batch:
            return
        jobs = [self._asked[0]]
        for job in list(self._asked)[1:]:
            if rows + len(jobs) < self._batch and self.writer.fits(job, jobs):
                jobs.append(job)
        for job in jobs:
            self._asked.remove(job)
        self._left(len(jobs))
        self.counts.answered += len(jobs)
        self._under_way.append((self.writer.start(jobs), jobs))

    def _step_answers(self) -> None:
        for steps, jobs in list(self._under_way):
            try:
                next(steps)
                continue
            except StopIteration:
                pass
            except BaseException as error:  # of this group alone
                self._end(jobs, error)
            self._under_way.remove((steps, jobs))


def _resolve(requests: Iterable[Judging]) -> None:
    for request in requests:
        if not request.future.done():
            request.future.set_result(request.verdicts)


def _post(loop: asyncio.AbstractEventLoop, call: Callable[[Any], None], value: Any) -> None:
    """Calls a function in the event loop; nothing where the loop has ended."""
    try:
        loop.call_soon_threadsafe(call, value)
    except RuntimeError:
        return


def asked_wrongly(error: BaseException) -> Problem | None:
    """The answer to a prompt that cannot be put to the model; None for errors of another kind."""
    if isinstance(error, Problem):
        return error
    if isinstance(error, InputError):
        return Problem(
            400,
            "the guard's chat template or tokenizer cannot take this conversation",
            "unprocessable_prompt",
            param="messages",
        )
    return None


_REMEMBERED = 8192
"""Readings whose outcomes are kept, so that a conversation that grows has only its new turns judged.

No text of them is kept.
"""


@dataclass(frozen=True)
class Outcome:
    """The verdict on one prompt, and what is done about it.

    Attributes:
        status: `ok`, or why there is no sound verdict: `truncated`, `error`, `timeout`.
        p_unsafe: Calibrated probability; None where there is none.
        threshold: From which on it is flagged.
        flagged: What the guard says; a prompt without a sound verdict is flagged unless the server fails
            open.
        held: Whether the caller has to hold it back: flagged, and not in shadow mode.
        distance: How far the prompt is from those of the fit; None where that is not known.
        reading: Which reading of the request it is about.
        tokens: Of that reading that the model was fed; of a request, of the whole, or else of its longest
            reading. 0 where none was read.
    """

    status: str
    p_unsafe: float | None
    threshold: float | None
    flagged: bool
    held: bool
    distance: float | None = None
    reading: str = WHOLE
    tokens: int = 0

    @property
    def record(self) -> dict[str, Any]:
        """As answers show it."""
        return {
            "status": self.status,
            "p_unsafe": self.p_unsafe,
            "threshold": self.threshold,
            "would_flag": self.flagged,
        }


class VerdictGate:
    """Asks the engine for verdicts and applies the server's rules to them.

    Args:
        engine: Judges.
        settings: What to do where it cannot.
        metrics: Told everything.
        reads_ends: Whether the guard reads the last tokens of a prompt only.
    """

    def __init__(
        self, engine: Engine, settings: Settings, metrics: Metrics, *, reads_ends: bool = False
    ) -> None:
        self.engine, self.settings, self.metrics = engine, settings, metrics
        self.reads_ends = reads_ends
        self._known: OrderedDict[bytes, Outcome] = OrderedDict()

    async def judge(
        self, asked: Sequence[Sequence[RequestReading]], route: str, noted: dict[str, Any]
    ) -> list[Outcome]:
        """The outcome for each request, in order: the largest of those of its readings.

        Args:
            asked: The readings of each conversation or text.
            route: The route's name, for metrics.
            noted: Gets what the log line shows.

        Raises:
            Problem: A prompt that is refused as such (4xx), too much waiting (429), or a server that closes
            (503).
        """
        started = time.perf_counter()
        try:
            found = iter(await self.look([way for ways in asked for way in ways]))
        finally:
            self.took(time.perf_counter() - started, route, noted)
        return self.settled([[next(found) for _ in ways] for ways in asked], route, noted)

    async def look(self, ways: Sequence[RequestReading]) -> list[Outcome]:
        """The outcome of each reading, in order; nothing is counted.

        What is no whole conversation and was judged before is not again.

        Half of what may wait is asked at a time, so that a long conversation neither fills the queue nor is
        refused for its length.

        Raises:
            Problem: As for `judge`.
        """
        keys = [_key(way.prompt) for way in ways]
        found = {
            place: self._known[key]
            for place, key in enumerate(keys)
            if ways[place].name != WHOLE and key in self._known
        }
        for place in found:
            self._known.move_to_end(keys[place])
        missing = [place for place in range(len(ways)) if place not in found]
        at_once = max(1, self.settings.limits.waiting // 2)
        end = time.monotonic() + self.settings.limits.seconds
        for start in range(0, len(missing), at_once):
            places = missing[start : start + at_once]
            try:
                verdicts: Sequence[Any] = await self.engine.verdicts(
                    [ways[place].prompt for place in places], end - time.monotonic()
                )
            except TimeoutError:
                break
            for place, verdict in zip(places, verdicts, strict=True):
                problem = asked_wrongly(verdict) if isinstance(verdict, BaseException) else None
                if problem is not None:
                    raise problem
                found[place] = outcome_of(verdict, self.settings)
                if found[place].status == "ok":
                    self._known[keys[place]] = found[place]
        while len(self._known) > _REMEMBERED:
            self._known.popitem(last=False)
        late = outcome_of(None, self.settings)
        return [
            dataclasses.replace(found.get(place, late), reading=way.name) for place, way in enumerate(ways)
        ]

    def took(self, seconds: float, route: str, noted: dict[str, Any]) -> None:
        """Notes how long verdicts took, the wait included."""
        noted["guard_ms"] = round(1000 * seconds, 1)
        self.metrics.guard_seconds.labels(route).observe(seconds)

    def settled(self, found: Sequence[Sequence[Outcome]], route: str, noted: dict[str, Any]) -> list[Outcome]:
        """One outcome for each request, from those of its readings that decide, counted once."""
        outcomes = [
            dataclasses.replace(
                largest(counting(several, reads_ends=self.reads_ends)), tokens=_tokens_of(several)
            )
            for several in found
        ]
        for outcome in outcomes:
            self.metrics.seen(outcome.p_unsafe, outcome.distance)
            if outcome.status != "ok":
                self.metrics.errors.labels(outcome.status).inc()
            if outcome.flagged:
                self.metrics.flagged.labels(route).inc()
            if outcome.held:
                self.metrics.blocked.labels(route).inc()
        noted |= summary(outcomes)
        return outcomes

    def check_length(self, outcomes: Sequence[Outcome]) -> None:
        """Refuses a conversation longer than the guard reads, where that is not let through.

        Raises:
            Problem: 400.
        """
        for outcome in outcomes:
            if outcome.status == "truncated" and outcome.held:
                raise too_long(None, outcome.tokens - (self.engine.writer is not None))  # room for an answer


def _key(prompt: Prompt) -> bytes:
    """Stands for what the model is fed of a prompt; its class says whether a template is put around it."""
    fed = [type(prompt).__name__, *((turn.role, turn.content) for turn in prompt.turns), prompt.answer]
    return hashlib.sha256(json.dumps(fed).encode()).digest()


def outcome_of(verdict: Any, settings: Settings) -> Outcome:
    """What follows from a verdict, from an error in its place, or from none in time (None)."""
    score, threshold, distance, flagged = None, None, None, False
    if verdict is None or isinstance(verdict, BaseException):
        status = "timeout" if verdict is None else "error"
    else:
        status, threshold, flagged = str(verdict.status), _finite(verdict.threshold), bool(verdict.flagged)
        score, distance = _finite(verdict.p_unsafe), _finite(getattr(verdict, "distance", None))
        if score is None and status == "ok":
            status = "error"
    if status == "truncated" and settings.fail_open and score is not None and threshold is not None:
        flagged = score >= threshold
    elif status != "ok":
        flagged = not settings.fail_open
    tokens = getattr(verdict, "n_tokens", None) or 0
    return Outcome(
        status, score, threshold, flagged, flagged and not settings.shadow, distance, tokens=tokens
    )


def _tokens_of(readings: Sequence[Outcome]) -> int:
    """Tokens of the whole of a request, or of its longest reading where the whole was not read."""
    whole = (one.tokens for one in readings if one.reading == WHOLE)
    return next(whole, max(one.tokens for one in readings))


def summary(outcomes: Sequence[Outcome]) -> Mapping[str, Any]:
    """What of outcomes a log line shows."""
    if not outcomes:
        return {}
    scores = [outcome.p_unsafe for outcome in outcomes if outcome.p_unsafe is not None]
    said: dict[str, Any] = {"flagged": sum(outcome.flagged for outcome in outcomes), "of": len(outcomes)}
    if scores:
        said["p_unsafe"] = round(max(scores), 4)
    worst = next((outcome.status for outcome in outcomes if outcome.status != "ok"), None)
    return {**said, "guard": worst} if worst else said


def _finite(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None
