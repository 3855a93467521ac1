"""Sensible stopping: refusals, over-refusals and divergence on held-out prompts while training, and which state is kept."""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from safety_neurons.errors import InputError
from safety_neurons.model import LanguageModel, token_divergences
from safety_neurons.model.batches import BatchSize
from safety_neurons.prompt_lists import Prompts
from safety_neurons.results import Completions, Rate, rate
from safety_neurons.tuning.deltas import Deltas

Refused = Callable[[Completions], Sequence[bool | None]]
"""A judge: whether each completion refuses; None where it cannot be told."""
GOING_ON, OVER_REFUSAL, DRIFT, SETTLED, FINISHED = "", "harmless prompts are refused", "divergence", "settled", "all steps done"


@dataclasses.dataclass(frozen=True)
class Checked:
    """What held-out prompts said after some steps.

    Attributes:
        step: steps done.
        harmful_refused: share of held-out harmful requests that are refused.
        harmless_refused: share of held-out harmless requests that are refused (over-refusal).
        divergence: KL(untreated ‖ treated) per token on the harmless requests, in nats.
    """

    step: int
    harmful_refused: Rate
    harmless_refused: Rate
    divergence: float

    def record(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "step": self.step,
            "harmful_refused": self.harmful_refused.to_json(),
            "harmless_refused": self.harmless_refused.to_json(),
            "divergence": self.divergence,
        }

    @staticmethod
    def of(record: dict[str, Any]) -> "Checked":
        """What `record` wrote."""
        return Checked(record["step"], Rate(**record["harmful_refused"]), Rate(**record["harmless_refused"]), float(record["divergence"]))


@dataclasses.dataclass(frozen=True)
class StopCheck:
    """What is looked at while training, and when it ends.

    A state is sound if it refuses at most `tolerance` more of the harmless prompts than the untouched model, and diverges from it by at
    most `max_divergence` where that is set. The best state is the sound one that refuses most harmful prompts, the latest of equals;
    without a sound one, the one that over-refuses least for what it refuses. Training ends when `patience` checks in a row were not
    sound, or when `settled` checks in a row were sound and refused everything.

    Attributes:
        harmful: held-out harmful requests.
        harmless: held-out harmless requests.
        refused: the judge.
        every: steps between two checks; by default a tenth of all steps.
        max_new_tokens: length of an answer.
        tolerance: share of harmless prompts that may be refused beyond what the untouched model refuses.
        max_divergence: nats per token; None for no limit.
        patience: unsound checks in a row that end training.
        settled: sound checks in a row with everything refused that end training; None goes on to the last step.
        batch_size: prompts per pass.
    """

    harmful: Prompts
    harmless: Prompts
    refused: Refused
    every: int | None = None
    max_new_tokens: int = 32
    tolerance: float = 0.05
    max_divergence: float | None = None
    patience: int = 3
    settled: int | None = 3
    batch_size: BatchSize = "auto"

    def __post_init__(self) -> None:
        if not len(self.harmful) or not len(self.harmless):
            raise InputError(
                f"{len(self.harmful)} harmful and {len(self.harmless)} harmless held-out prompts: expected at least one of each; "
                "give more data, or train without a check"
            )

    def interval(self, steps: int) -> int:
        """Steps between two checks."""
        return max(1, self.every or round(steps / 10))

    def measure(self, model: LanguageModel, deltas: Deltas, step: int) -> Checked:
        """Ask the model as it is now; for divergence its deltas are switched off for a pass.

        Args:
            model: with `deltas` attached.
            deltas: attached to the model; at step 0 they are zero and there is no divergence.
            step: steps done.
        """
        harmful, harmless = (self._rate(model, prompts) for prompts in (self.harmful, self.harmless))
        return Checked(step, harmful, harmless, self._divergence(model, deltas) if step else 0.0)

    def _rate(self, model: LanguageModel, prompts: Prompts) -> Rate:
        return rate(self.refused(model.complete(prompts, max_new_tokens=self.max_new_tokens, batch_size=self.batch_size)))

    def _divergence(self, model: LanguageModel, deltas: Deltas) -> float:
        sequences = [encoded.ids for encoded in model.encode(self.harmless)]
        with deltas.disabled():
            rows = token_divergences(model, sequences, lambda: _enabled(deltas), batch_size=self.batch_size)
        return float(np.concatenate(rows).mean())


@contextlib.contextmanager
def _enabled(deltas: Deltas) -> Iterator[None]:
    """The deltas on again inside `disabled`."""
    off = [wrapper for wrapper in deltas.modules.values() if not wrapper.enabled]
    for wrapper in off:
        wrapper.enabled = True
    try:
        yield
    finally:
        for wrapper in off:
            wrapper.enabled = False


@dataclasses.dataclass
class StopJudge:
    """Which of the states seen so far is best, and whether to go on."""

    check: StopCheck
    before: Checked | None = None
    seen: list[Checked] = dataclasses.field(default_factory=list)
    best: Checked | None = None

    def look(self, now: Checked) -> bool:
        """Take note of a check after some steps; whether its state is the best so far."""
        assert self.before is not None
        self.seen.append(now)
        better = self.best is None or self._merit(now) >= self._merit(self.best)
        if better:
            self.best = now
        return better

    def sound(self, now: Checked) -> bool:
        """Whether a state answers harmless requests as the untouched model does."""
        return self.excess(now) <= 1e-9 and not self._drifted(now)

    def excess(self, now: Checked) -> float:
        """Share of harmless requests refused beyond what is tolerated."""
        assert self.before is not None
        allowed = (self.before.harmless_refused.value or 0.0) + self.check.tolerance
        return max(0.0, (now.harmless_refused.value or 0.0) - allowed)

    def verdict(self) -> str:
        """Why training should end now; empty to go on."""
        patience, settled = self.check.patience, self.check.settled
        last = self.seen[-patience:]
        if len(last) == patience and not any(self.sound(each) for each in last):
            return DRIFT if self._drifted(last[-1]) and not self.excess(last[-1]) else OVER_REFUSAL
        calm = self.seen[-settled:] if settled else []
        if settled and len(calm) == settled and all(self.sound(each) and each.harmful_refused.value == 1.0 for each in calm):
            return SETTLED
        return GOING_ON

    def _merit(self, now: Checked) -> tuple[bool, float]:
        refused = now.harmful_refused.value or 0.0
        return self.sound(now), refused if self.sound(now) else refused - 2 * self.excess(now) - (
            now.divergence if self._drifted(now) else 0.0
        )

    def _drifted(self, now: Checked) -> bool:
        limit = self.check.max_divergence
        return not math.isfinite(now.divergence) or (limit is not None and now.divergence > limit)

    def state(self) -> dict[str, Any]:
        """As JSON values, for a checkpoint."""
        return {
            "before": self.before.record() if self.before else None,
            "seen": [each.record() for each in self.seen],
            "best": self.best.record() if self.best else None,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from what `state` gave."""
        self.before = Checked.of(state["before"]) if state["before"] else None
        self.seen = [Checked.of(each) for each in state["seen"]]
        self.best = Checked.of(state["best"]) if state["best"] else None
