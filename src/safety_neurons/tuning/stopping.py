"""When training ends, which state is kept and how far a step may go: what held-out prompts say of a state."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from safety_neurons.errors import InputError
from safety_neurons.model import LanguageModel, token_divergences, token_losses
from safety_neurons.model.batches import BatchSize
from safety_neurons.model.template import require_tokenizer, untouched
from safety_neurons.prompt_lists import Prompts
from safety_neurons.results import Completions, Rate, rate
from safety_neurons.tuning.deltas import Deltas

Refused = Callable[[Completions], Sequence[bool | None]]
"""A judge: whether each completion refuses; None where it cannot be told."""
GOING_ON, OVER_REFUSAL, DRIFT, STRAYED, SETTLED, STILL, FINISHED = (
    "",
    "harmless prompts are refused",
    "divergence",
    "perplexity of general text",
    "settled",
    "no better state for a while",
    "all steps done",
)


@dataclasses.dataclass(frozen=True)
class Checked:
    """What held-out prompts said after some steps.

    Attributes:
        step: steps done.
        harmful_refused: share of held-out harmful requests that are refused.
        harmless_refused: share of held-out harmless requests that are refused (over-refusal).
        divergence: KL(untreated ‖ treated) per token of the untouched model's answers to the harmless
            requests, in nats.
        perplexity: of held-out general text, times the untouched model's; 1 without such text.
        share: of the way from the best sound state before it to that of this step; below 1 where the whole
            way was too far.
    """

    step: int
    harmful_refused: Rate
    harmless_refused: Rate
    divergence: float
    perplexity: float = 1.0
    share: float = 1.0

    def record(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "step": self.step,
            "harmful_refused": self.harmful_refused.to_json(),
            "harmless_refused": self.harmless_refused.to_json(),
            "divergence": self.divergence,
            "perplexity": self.perplexity,
            "share": self.share,
        }

    @staticmethod
    def of(record: dict[str, Any]) -> "Checked":
        """What `record` wrote."""
        return Checked(
            record["step"],
            Rate(**record["harmful_refused"]),
            Rate(**record["harmless_refused"]),
            float(record["divergence"]),
            float(record["perplexity"]),
            float(record.get("share", 1.0)),
        )


@dataclasses.dataclass(frozen=True)
class StopCheck:
    """What is looked at while training, and when it ends.

    A state is sound if it refuses at most `tolerance` more of the harmless prompts than the untouched
    model, diverges from it by at most `max_divergence`, and gives general text at most `max_perplexity`
    times its perplexity, where those are set. The best state is the sound one that refuses most harmful
    prompts, the latest of equals; without a sound one, the one that over-refuses and strays least for
    what it refuses. Where a state refuses more than the best sound one but is not sound, states between
    the two are looked at. Training ends when `patience` checks in a row were not sound, when `settled`
    checks in a row were sound and refused everything, or when `still` checks in a row brought no state
    that refuses more than the best before them, which refused something.

    Attributes:
        harmful: held-out harmful requests.
        harmless: held-out harmless requests.
        refused: the judge.
        text: held-out general text, for perplexity; None for none.
        every: steps between two checks; by default a tenth of all steps.
        max_new_tokens: length of an answer.
        tolerance: share of harmless prompts that may be refused beyond what the untouched model refuses.
        max_divergence: nats per token; None for no limit.
        max_perplexity: times the untouched model's; None for no limit.
        patience: unsound checks in a row that end training.
        settled: sound checks in a row with everything refused that end training; None goes on to the last
            step.
        still: checks in a row without a better state that end training; None goes on.
        batch_size: prompts per pass.
    """

    harmful: Prompts
    harmless: Prompts
    refused: Refused
    text: Prompts | None = None
    every: int | None = None
    max_new_tokens: int = 32
    tolerance: float = 0.05
    max_divergence: float | None = None
    max_perplexity: float | None = None
    patience: int = 3
    settled: int | None = 3
    still: int | None = None
    batch_size: BatchSize = "auto"
    _untouched: dict[str, Any] = dataclasses.field(
        default_factory=dict, init=False, repr=False, compare=False
    )
    """The untouched model's answers to the harmless prompts and losses of the text, once computed."""

    def __post_init__(self) -> None:
        if not len(self.harmful) or not len(self.harmless):
            raise InputError(
                f"{len(self.harmful)} harmful and {len(self.harmless)} harmless held-out prompts: expected "
                "at least one of each; give more data, or train without a check"
            )

    def interval(self, steps: int) -> int:
        """Steps between two checks."""
        return max(1, self.every or round(steps / 10))

    def measure(
        self, model: LanguageModel, deltas: Deltas, step: int, answers: Completions | None = None
    ) -> Checked:
        """Ask the model as it is now; for what it is compared with, its deltas are switched off.

        Args:
            model: with `deltas` attached.
            deltas: attached to the model; at step 0 they are zero and there is no divergence.
            step: steps done.
            answers: the model's to the harmless requests, where it was asked them already.
        """
        if answers is None:
            answers = self.answers(model)
        if not step:
            self._untouched.setdefault("answers", answers)
        harmful = rate(self.refused(self._complete(model, self.harmful)), self.harmful.groups)
        harmless = rate(self.refused(answers), self.harmless.groups)
        if not step:
            return Checked(step, harmful, harmless, 0.0)
        return Checked(
            step, harmful, harmless, self._divergence(model, deltas), self._perplexity(model, deltas)
        )

    def answers(self, model: LanguageModel) -> Completions:
        """Of the model as it is now, to the harmless requests."""
        return self._complete(model, self.harmless)

    def _complete(self, model: LanguageModel, prompts: Prompts) -> Completions:
        return model.complete(prompts, max_new_tokens=self.max_new_tokens, batch_size=self.batch_size)

    def _divergence(self, model: LanguageModel, deltas: Deltas) -> float:
        """Per token of the untouched model's own answers, and of what it says first behind a question."""
        with deltas.disabled():
            if "answers" not in self._untouched:  # a call that was killed goes on
                self._untouched["answers"] = self.answers(model)
            asked = model.encode(self.harmless, reserve=self.max_new_tokens)
            questions = [list(encoded.ids) for encoded in asked]
            tokenizer = require_tokenizer(model.tokenizer)
            with untouched(tokenizer):
                sequences = [
                    question
                    + list(tokenizer(answer.completion, add_special_tokens=False, verbose=False)["input_ids"])
                    for question, answer in zip(questions, self._untouched["answers"], strict=True)
                ]
            rows = token_divergences(model, sequences, deltas.enabled, batch_size=self.batch_size)
        if not all(map(len, rows)):
            return math.nan
        behind = [row[len(question) - 1 :] for row, question in zip(rows, questions, strict=True)]
        return float(np.concatenate(behind).mean())

    def _perplexity(self, model: LanguageModel, deltas: Deltas) -> float:
        """Of the text, times the untouched model's."""
        if self.text is None:
            return 1.0
        if "losses" not in self._untouched:
            with deltas.disabled():
                self._untouched["losses"] = token_losses(model, self.text.texts, batch_size=self.batch_size)
        before, now = (
            self._untouched["losses"],
            token_losses(model, self.text.texts, batch_size=self.batch_size),
        )
        if now.failed > before.failed:
            return math.inf
        return math.exp(min(700.0, (now.total - before.total) / max(1, before.n_tokens)))


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

    def too_far(self, now: Checked) -> bool:
        """Whether a state is not sound but refuses more than the best sound one, so that something between
        the two may be better than both.
        """
        assert self.before is not None
        best = self.best if self.best is not None and self.sound(self.best) else self.before
        return not self.sound(now) and (now.harmful_refused.value or 0.0) > (
            best.harmful_refused.value or 0.0
        )

    def improves(self, now: Checked) -> bool:
        """Whether a state is sound and no worse than the best so far."""
        return self.sound(now) and (self.best is None or self._merit(now) >= self._merit(self.best))

    def sound(self, now: Checked) -> bool:
        """Whether a state answers harmless requests as the untouched model does."""
        return not (self.over_refuses(now.harmless_refused) or self._drifted(now) or self._strayed(now))

    def excess(self, harmless_refused: Rate) -> float:
        """Share of harmless requests refused beyond what is tolerated."""
        assert self.before is not None
        allowed = (self.before.harmless_refused.value or 0.0) + self.check.tolerance
        return max(0.0, (harmless_refused.value or 0.0) - allowed)

    def over_refuses(self, harmless_refused: Rate) -> bool:
        """Whether that is more than is tolerated."""
        return self.excess(harmless_refused) > 1e-9

    def moved(self, now: Checked) -> bool:
        """Whether a state refuses more harmful requests than the untouched model, by more than a few."""
        assert self.before is not None
        return (now.harmful_refused.value or 0.0) > (self.before.harmful_refused.value or 0.0) + 0.05

    def strayed(self, now: Checked) -> float:
        """Divergence or log perplexity of a state, as a multiple of what is allowed: the larger of both."""
        limits = self.check.max_divergence, self.check.max_perplexity
        far = [now.divergence / limits[0]] if limits[0] else []
        far += (
            [math.log(max(now.perplexity, 1e-9)) / math.log(limits[1])] if limits[1] and limits[1] > 1 else []
        )
        return max([math.inf if math.isnan(each) else each for each in far], default=0.0)

    def verdict(self) -> str:
        """Why training should end now; empty to go on."""
        patience, settled = self.check.patience, self.check.settled
        last = self.seen[-patience:]
        if len(last) == patience and not any(self.sound(each) for each in last):
            if self.over_refuses(last[-1].harmless_refused):
                return OVER_REFUSAL
            return DRIFT if self._drifted(last[-1]) else STRAYED
        calm = self.seen[-settled:] if settled else []
        if (
            settled
            and len(calm) == settled
            and all(self.sound(each) and each.harmful_refused.value == 1.0 for each in calm)
        ):
            return SETTLED
        return STILL if self._still() else GOING_ON

    def _still(self) -> bool:
        """Whether the last checks brought nothing better than what was there before them."""
        still = self.check.still
        if not still or len(self.seen) <= still:
            return False
        earlier, late = (
            [self._merit(each) for each in part] for part in (self.seen[:-still], self.seen[-still:])
        )
        sound, refused = max(earlier)
        assert self.before is not None
        return (
            sound and refused > (self.before.harmful_refused.value or 0.0) and max(late) <= (sound, refused)
        )

    def _merit(self, now: Checked) -> tuple[bool, float]:
        refused = now.harmful_refused.value or 0.0
        if self.sound(now):
            return True, refused
        strayed = math.log(now.perplexity) if self._strayed(now) else 0.0
        drifted = now.divergence if self._drifted(now) else 0.0
        return False, _finite(refused - 2 * self.excess(now.harmless_refused) - drifted - strayed)

    def _drifted(self, now: Checked) -> bool:
        limit = self.check.max_divergence
        return not math.isfinite(now.divergence) or (limit is not None and now.divergence > limit)

    def _strayed(self, now: Checked) -> bool:
        limit = self.check.max_perplexity
        return not math.isfinite(now.perplexity) or (limit is not None and now.perplexity > limit)

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


def _finite(value: float) -> float:
    """A number that can be compared: one that is none comes last."""
    return value if math.isfinite(value) else -math.inf


@dataclasses.dataclass
class TrustRegion:
    """How far a step may go and how strongly the model is held to itself, adapted to how far it has moved.

    Of every step: where the divergence on the anchored examples is above what the checks allow, the anchor
    gets heavier, where it is far below lighter. Once, a few steps behind the warm-up: where the divergence is
    below half of what the checks allow, the steps become as much larger as it is too small, at most four
    times. Of every check: a state that is too far from the untouched model is left for the best sound one,
    and the steps are halved; where too many harmless requests are refused, the anchor gets twice as heavy,
    and no lighter until a check finds that they are answered; where sound states do not yet refuse and have
    hardly moved, the steps are doubled.

    Attributes:
        weight: of the divergence in the loss, now.
        scale: of the learning rates, now.
        limits: nats per token that the checks allow, by kind of example; empty where nothing is adapted.
        strain: divergence by these limits, the larger of both, averaged over about ten steps.
        anchor: the weight it began with.
        risen: steps behind the warm-up.
        over: whether the last check found too many harmless requests refused.

    Source: Schulman et al., 2017 (PPO), section 4 (a penalty on KL whose weight follows the divergence).
    Differs: divergence from the untouched model on harmless text, not from the last policy; the step's size
    is adapted too.
    """

    weight: float
    scale: float = 1.0
    limits: dict[str, float] = dataclasses.field(default_factory=dict)
    strain: float = 0.0
    anchor: float = 0.0
    risen: int = 0
    over: bool = False

    @classmethod
    def of(cls, check: StopCheck | None, anchor: float, *, adapts: bool) -> "TrustRegion":
        """One that begins with this weight.

        Args:
            check: what is allowed.
            anchor: weight of the divergence.
            adapts: whether the learning rate is `auto`.
        """
        limits = {}
        if check is not None and adapts:
            if check.max_divergence:
                limits["harmless"] = OPENING * check.max_divergence
            if check.max_perplexity and check.max_perplexity > 1:
                limits["general"] = 2 * math.log(check.max_perplexity)
        return cls(anchor, 1.0, limits, 0.0, anchor)

    def stepped(self, divergence: Mapping[str, float], *, rising: bool = False) -> None:
        """Take note of a step's divergence by kind of example.

        Args:
            divergence: nats, weighted as in the loss.
            rising: whether the rate was still on its way up.
        """
        strains = [divergence[kind] / limit for kind, limit in self.limits.items() if kind in divergence]
        if not strains or not math.isfinite(max(strains)):
            return
        self.strain += (max(strains) - self.strain) / AVERAGED
        self.risen += not rising
        if self.risen == RISEN and self.strain < 0.5:
            self.scale = min(self.scale * min(AIMED / max(self.strain, 1e-9), FARTHEST), MOST)
        if self.strain > 1:
            self.weight = min(self.weight * HEAVIER, self.anchor * HEAVIEST)
        elif self.strain < 0.5 and not self.over:
            self.weight = max(self.weight * LIGHTER, self.anchor / HEAVIEST)

    def checked(self, judge: StopJudge, now: Checked) -> bool:
        """Take note of a check; whether its state is to be left for the best sound one."""
        if not self.limits:
            return False
        self.over = judge.over_refuses(now.harmless_refused)
        if self.over:  # the mean divergence can be small where a few requests are refused outright
            self.weight = min(self.weight * 2, self.anchor * HEAVIEST)
        if judge.strayed(now) >= LEFT:
            self.scale, self.strain = max(self.scale / 2, 1 / MOST), 0.5
            return True
        if judge.sound(now) and not judge.moved(now) and self.strain < 0.5:
            self.scale = min(self.scale * 2, MOST)
        return False


BACK = 3
"""Checks between the best sound state and one that went too far."""
OPENING = 4.0
"""Times the divergence per token that the loss may show on answers: half of its weight is on their first
token, where nearly all of the divergence is.
"""
AVERAGED, HEAVIER, LIGHTER, HEAVIEST, MOST, LEFT = 8, 1.05, 0.95, 4.0, 16.0, 3.0
"""Steps the strain is averaged over; factors of the anchor's weight after a step; how far the weight, and how
far the scale, may go from where they began; times its limit at which a state is left.
"""
RISEN, AIMED, FARTHEST = 4, 0.8, 4.0
"""Steps behind the warm-up at which the size of a step is looked at; the strain it should have there; times
that it may become larger for it.
"""
