"""Verdicts of a guard on a prompt or an answer, and the error that a flagged one raises."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeVar, runtime_checkable

from safety_neurons.errors import SafetyNeuronsError
from safety_neurons.results import html_table

LONGEST_WORDS = 200
WHOLE, ASKED = "conversation", "conversation without the last answer"
"""Names of the readings of a request that `counting` tells apart."""


Status = Literal["ok", "truncated", "error"]


class FlaggedError(SafetyNeuronsError):
    """A guarded model was asked something its guard flags, and told to raise an error on that.

    Attributes:
        verdict: on the first such prompt.
    """

    def __init__(self, message: str, verdict: "Verdict") -> None:
        super().__init__(message)
        self.verdict = verdict


@dataclass(frozen=True)
class TopNeuron:
    """A neuron with what it adds to the log odds of one prompt, against the mean prompt of the fit, before
    calibration.
    """

    key: str
    index: int
    contribution: float


@dataclass(frozen=True)
class Verdict:
    """What a guard says of one prompt. No text of the prompt is in it."""

    p_unsafe: float | None
    """Calibrated probability of an unsafe answer; None where there is none (`status` is "error")."""
    flagged: bool
    """Whether to stop: the probability reaches the threshold, or the status is not "ok" and nothing said to
    fail open.
    """
    threshold: float
    """That flagged is about."""
    status: Status = "ok"
    """`truncated`: the middle of the prompt was not read, so that a low probability says nothing.

    `error`: see `error`.
    """
    latency_ms: float = 0.0
    """Wall time from the start of the batch that the prompt was read in to this verdict.

    In guarded generation what the guard itself took
    behind the prefill."""
    top_neurons: tuple[TopNeuron, ...] = ()
    """Neurons that raise the log odds most, largest first."""
    log_odds: float | None = None
    """The probability as calibrated log odds."""
    distance: float | None = None
    """Root mean square of the standardised features: about 1 for prompts like those of the fit."""
    n_tokens: int | None = None
    """Tokens that were read, template included."""
    error: str | None = None
    """What went wrong, in one line."""
    reading: str = WHOLE
    """Which reading of the request this is about: the whole conversation, the one without the last answer, or
    one turn by itself.
    """

    @property
    def told(self) -> bool | None:
        """Whether it is flagged, for rates of what a guard tells apart; None where it could not be read.

        That is flagged so that nothing passes unseen, and says nothing of the guard.
        """
        return None if self.status == "error" else self.flagged

    def _repr_html_(self) -> str:
        probability = "none" if self.p_unsafe is None else f"{self.p_unsafe:.3f}"
        rows = [
            ["flagged", "yes" if self.flagged else "no"],
            ["probability of an unsafe answer", f"{probability} (threshold {self.threshold:.3f})"],
            ["decided by", self.reading],
            ["status", self.status if self.error is None else f"{self.status}: {self.error}"],
            ["time", f"{self.latency_ms:.1f} ms"],
            *(
                [f"{each.key}[{each.index}]", f"{each.contribution:+.2f} log odds"]
                for each in self.top_neurons
            ),
        ]
        return html_table("Verdict of a guard", ["what", "value"], rows)

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON values."""
        return dataclasses.asdict(self)


def said_of_unread(verdicts: Sequence[Verdict], what: str = "requests") -> list[str]:
    """How many could not be read and are in no rate, with the first reason; nothing where all could."""
    unread = [verdict for verdict in verdicts if verdict.told is None]
    if not unread:
        return []
    return [
        f"{len(unread)} of {len(verdicts)} {what} could not be read: they are in no rate, and flagged where "
        f"a guard serves; the first: {unread[0].error}"
    ]


@runtime_checkable
class Comparable(Protocol):
    """What `largest` compares."""

    @property
    def flagged(self) -> bool:
        """Whether to stop."""

    @property
    def status(self) -> str:
        """`ok`, or why there is no sound verdict."""

    @property
    def p_unsafe(self) -> float | None:
        """Calibrated probability of an unsafe answer."""

    @property
    def reading(self) -> str:
        """Which reading of the request it is about."""


Found = TypeVar("Found", bound=Comparable)


def counting(verdicts: Sequence[Found], *, reads_ends: bool, begun: bool | None = None) -> Sequence[Found]:
    """Those of the verdicts on a request's readings that decide.

    A guard that reads the end of a prompt was fit where an answer is to begin. The end of an answer that
    was begun for the model is no such place: what is read there hardly tells requests apart, and drowns
    the reading of the same conversation without that answer, which counts in its place.

    Args:
        verdicts: on readings of one request.
        reads_ends: whether the guard reads the last tokens of a prompt only.
        begun: whether the request is also read without the answer it ends in; None where that is to be seen
            among the verdicts.
    """
    if begun is None:
        begun = any(verdict.reading == ASKED for verdict in verdicts)
    left_out = reads_ends and begun
    return [
        verdict for verdict in verdicts if not left_out or verdict.reading != WHOLE or verdict.status != "ok"
    ]


def largest(verdicts: Sequence[Found]) -> Found:
    """The verdict on a request from those on its readings, the whole conversation first.

    A sound one that flags goes first, then one that is not sound, then the largest probability: a reading
    that could not be judged is never covered by one that could.
    """
    return max(
        verdicts,
        key=lambda verdict: (
            verdict.flagged and verdict.status == "ok",
            verdict.status != "ok",
            verdict.p_unsafe or 0.0,
        ),
    )
