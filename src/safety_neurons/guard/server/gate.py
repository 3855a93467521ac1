"""The gate: verdicts on what a request holds, and what follows from them where the guard cannot judge."""

import hashlib
import json
import math
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from safety_neurons.guard.requests import WHOLE, Reading
from safety_neurons.guard.server.engine import Engine, asked_wrongly
from safety_neurons.guard.server.metrics import Metrics
from safety_neurons.guard.server.problems import too_long
from safety_neurons.guard.server.settings import Settings
from safety_neurons.guard.verdicts import largest

_REMEMBERED = 8192
"""Readings whose outcomes are kept, so that a conversation that grows has only its new turns judged. No text of them is kept."""


@dataclass(frozen=True)
class Outcome:
    """The verdict on one prompt, and what is done about it.

    Attributes:
        status: `ok`, or why there is no sound verdict: `truncated`, `error`, `timeout`.
        p_unsafe: Calibrated probability; None where there is none.
        threshold: From which on it is flagged.
        flagged: What the guard says; a prompt without a sound verdict is flagged unless the server fails open.
        held: Whether the caller has to hold it back: flagged, and not in shadow mode.
        distance: How far the prompt is from those of the fit; None where that is not known.
    """

    status: str
    p_unsafe: float | None
    threshold: float | None
    flagged: bool
    held: bool
    distance: float | None = None

    @property
    def record(self) -> dict[str, Any]:
        """As answers show it."""
        return {"status": self.status, "p_unsafe": self.p_unsafe, "threshold": self.threshold, "would_flag": self.flagged}


class Gate:
    """Asks the engine for verdicts and applies the server's rules to them.

    Args:
        engine: Judges.
        settings: What to do where it cannot.
        metrics: Told everything.
    """

    def __init__(self, engine: Engine, settings: Settings, metrics: Metrics) -> None:
        self.engine, self.settings, self.metrics = engine, settings, metrics
        self._known: OrderedDict[bytes, Outcome] = OrderedDict()

    async def judge(self, asked: Sequence[Sequence[Reading]], route: str, noted: dict[str, Any]) -> list[Outcome]:
        """The outcome for each request, in order: the largest of those of its readings.

        Args:
            asked: The readings of each conversation or text.
            route: The route's name, for metrics.
            noted: Gets what the log line shows.

        Raises:
            Problem: A prompt that is refused as such (4xx), too much waiting (429), or a server that closes (503).
        """
        started = time.perf_counter()
        try:
            found = iter(await self.look([way for ways in asked for way in ways]))
        finally:
            self.took(time.perf_counter() - started, route, noted)
        return self.settled([[next(found) for _ in ways] for ways in asked], route, noted)

    async def look(self, ways: Sequence[Reading]) -> list[Outcome]:
        """The outcome of each reading, in order; nothing is counted. What is no whole conversation and was judged before is not again.

        Half of what may wait is asked at a time, so that a long conversation neither fills the queue nor is refused for its length.

        Raises:
            Problem: As for `judge`.
        """
        keys = [hashlib.sha256(json.dumps([(turn.role, turn.content) for turn in way.prompt.turns]).encode()).digest() for way in ways]
        found = {place: self._known[key] for place, key in enumerate(keys) if ways[place].name != WHOLE and key in self._known}
        for place in found:
            self._known.move_to_end(keys[place])
        missing = [place for place in range(len(ways)) if place not in found]
        at_once = max(1, self.settings.limits.waiting // 2)
        end = time.monotonic() + self.settings.limits.seconds
        for start in range(0, len(missing), at_once):
            places = missing[start : start + at_once]
            try:
                verdicts: Sequence[Any] = await self.engine.verdicts([ways[place].prompt for place in places], end - time.monotonic())
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
        return [found.get(place, late) for place in range(len(ways))]

    def took(self, seconds: float, route: str, noted: dict[str, Any]) -> None:
        """Notes how long verdicts took, the wait included."""
        noted["guard_ms"] = round(1000 * seconds, 1)
        self.metrics.guard_seconds.labels(route).observe(seconds)

    def settled(self, found: Sequence[Sequence[Outcome]], route: str, noted: dict[str, Any]) -> list[Outcome]:
        """One outcome for each request, from those of its readings, counted once."""
        outcomes = [largest(outcomes) for outcomes in found]
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
        if any(outcome.status == "truncated" and outcome.held for outcome in outcomes):
            raise too_long(None, None)


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
    return Outcome(status, score, threshold, flagged, flagged and not settings.shadow, distance)


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
