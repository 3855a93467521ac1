"""The gate: verdicts on what a request holds, and what follows from them where the guard cannot judge."""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from safety_neurons.guard.server.engine import Engine, asked_wrongly
from safety_neurons.guard.server.metrics import Metrics
from safety_neurons.guard.server.problems import too_long
from safety_neurons.guard.server.settings import Settings


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

    async def judge(self, prompts: Sequence[Any], route: str, noted: dict[str, Any]) -> list[Outcome]:
        """The outcome for each prompt, in order.

        Args:
            prompts: Conversations and texts.
            route: The route's name, for metrics.
            noted: Gets what the log line shows.

        Raises:
            Problem: A prompt that is refused as such (4xx), too much waiting (429), or a server that closes (503).
        """
        started = time.perf_counter()
        try:
            verdicts: Sequence[Any] = await self.engine.verdicts(prompts, self.settings.limits.seconds)
        except TimeoutError:
            verdicts = [None] * len(prompts)
        finally:
            self.took(time.perf_counter() - started, route, noted)
        for verdict in verdicts:
            problem = asked_wrongly(verdict) if isinstance(verdict, BaseException) else None
            if problem is not None:
                raise problem
        outcomes = [outcome_of(verdict, self.settings) for verdict in verdicts]
        self._count(outcomes, route, noted)
        return outcomes

    def took(self, seconds: float, route: str, noted: dict[str, Any]) -> None:
        """Notes how long verdicts took, the wait included."""
        noted["guard_ms"] = round(1000 * seconds, 1)
        self.metrics.guard_seconds.labels(route).observe(seconds)

    def outcome(self, verdict: Any, route: str, noted: dict[str, Any]) -> Outcome:
        """The outcome of a verdict that came from elsewhere (an answer's own prefill), counted like any other."""
        outcome = outcome_of(verdict, self.settings)
        self._count([outcome], route, noted)
        return outcome

    def _count(self, outcomes: Sequence[Outcome], route: str, noted: dict[str, Any]) -> None:
        for outcome in outcomes:
            self.metrics.seen(outcome.p_unsafe, outcome.distance)
            if outcome.status != "ok":
                self.metrics.errors.labels(outcome.status).inc()
            if outcome.flagged:
                self.metrics.flagged.labels(route).inc()
            if outcome.held:
                self.metrics.blocked.labels(route).inc()
        noted |= summary(outcomes)

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
