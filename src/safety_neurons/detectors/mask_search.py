"""The search of a learned mask: a set of units is looked at, and the gradient there says which units should be in it instead."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from safety_neurons.detectors.gradients import TOKEN_BUDGET, ScoredRow, midpoints_of
from safety_neurons.detectors.methods import Mask
from safety_neurons.detectors.movable import Movable
from safety_neurons.detectors.streaming import Progress, Stream
from safety_neurons.errors import NumericalError
from safety_neurons.model import LanguageModel
from safety_neurons.model.passes import Batch, BatchSize, collate, plan, takes_padding, token_budget

MIDPOINTS = 8
"""Points of the straight path whose mean gradient the search starts from."""


@dataclass(frozen=True)
class Look:
    """What a mask is worth.

    Attributes:
        slope: derivative of the value with respect to every unit's entry.
        value: what is made large.
        scores: per prompt: log-odds, or log-probability.
    """

    slope: Float[Tensor, " unit"]
    value: float
    scores: Float[Tensor, " prompt"]


class Course:
    """The rows that masks are judged on, in batches that stay the same from round to round."""

    def __init__(
        self, asked: Sequence[ScoredRow], answers: Sequence[ScoredRow], lm: LanguageModel, batch_size: BatchSize, first: int = 0
    ) -> None:
        self.n_harmful, self.n_harmless = len(asked), len(answers)
        self.batches: list[tuple[Batch, list[ScoredRow], bool]] = []
        for rows, harmful in ((asked, True), (answers, False)):
            lengths = [len(row.ids) for row in rows]
            for group in plan(lengths, batch_size, token_budget(lm.device, TOKEN_BUDGET), padded=takes_padding(lm)):
                batch = collate([row.ids for row in rows], group, number=first + len(self.batches), pad_id=lm.pad_id).to(lm.device)
                self.batches.append((batch, [rows[index] for index in group], harmful))


class Search:
    """Iterated hard thresholding over the units of a mover."""

    def __init__(self, mover: Movable, course: Course, method: Mask, stream: Stream) -> None:
        self.mover, self.course, self.method, self.stream = mover, course, method, stream
        numbers, places = torch.unique(torch.cat(list(mover.units.values())), return_inverse=True)
        self.numbers = numbers
        self._places = dict(zip(mover.units, places.split([len(part) for part in mover.units.values()]), strict=True))
        self._found: dict[str, Any] = {}

    def masks(self, mask: Float[Tensor, " unit"]) -> dict[str, Tensor]:
        """The mask as its mover wants it."""
        return {name: mask[places] for name, places in self._places.items()}

    def look(self, mask: Float[Tensor, " unit"]) -> Look:
        """What a mask is worth, and which way it should change; goes on behind the last batch that the stream holds of this look."""
        masks, state = self.masks(mask), self.stream.state
        begun = {name: torch.from_numpy(values.copy()) for name, values in self.stream.named("look").items()}
        slope = begun.get("slope", torch.zeros(len(self.numbers), dtype=torch.float64))
        each = begun.get("each", torch.zeros(self.course.n_harmful, dtype=torch.float64))
        value = float(state.get("look value", 0.0))
        for number, (batch, rows, harmful) in enumerate(self.course.batches):
            if number < int(state.get("looked", 0)) or (not harmful and not self.method.caution):
                continue
            found, scores = self.mover.slopes(batch, rows, masks)
            scores = scores.double().cpu()
            if harmful:
                by_odds = self.method.aim == "odds"
                gained = -torch.nn.functional.softplus(-scores) if by_odds else scores
                weights = ((-scores).sigmoid() if by_odds else torch.ones_like(scores)) / self.course.n_harmful
            else:
                weights = torch.full_like(scores, self.method.caution / self.course.n_harmless)
                gained = scores * self.method.caution
            with self.stream.changing():
                if harmful:
                    each[batch.indices] = scores
                value += float(gained.sum()) / (self.course.n_harmful if harmful else self.course.n_harmless)
                for name, gradients in found.items():
                    slope.index_add_(0, self._places[name], weights @ gradients.double().cpu())
                self.stream.put("look", {"slope": slope.numpy(), "each": each.numpy()})
                state |= {"looked": number + 1, "look value": value}
            self.stream.went_on()
        if not (math.isfinite(value) and bool(slope.isfinite().all())):
            raise NumericalError("the value of a mask is NaN or infinity: check the models' weights, or use --dtype float32")
        return Look(slope, value, each.float())

    def run(self, size: int, progress: Progress | None = None) -> tuple[np.ndarray, np.ndarray]:
        """The members of the best set, and the state at the end; both by unit."""
        with self.stream.kept():
            state = self._begin()
            best = torch.from_numpy(self.stream.arrays["mask/best"].astype(bool)) if "mask/best" in self.stream.arrays else None
            for number in range(int(self.stream.state.get("rounds", 0)), self.method.rounds):
                chosen = torch.zeros(len(state), dtype=torch.float64)
                chosen[torch.argsort(-state, stable=True)[:size]] = 1.0
                look = self.look(chosen)
                with self.stream.changing():
                    if best is None or look.value > self.stream.state["value"]:
                        best = chosen.bool()
                        self.stream.state |= {"value": look.value, "round": number + 1}
                    state = self.method.keep * state + (1 - self.method.keep) * look.slope
                    self.stream.put("mask", {"state": state.numpy(), "best": best.numpy().astype(np.int64)})
                    self._looked(rounds=number + 1)
                self.stream.went_on()
                if progress is not None:
                    progress(number + 1, self.method.rounds, size)
        assert best is not None
        self.stream.save()
        return best.numpy(), state.numpy()

    def _looked(self, **done: int) -> None:
        """A look is over and in the state: the next one begins at its first batch."""
        self.stream.drop("look")
        self.stream.state |= {"looked": 0, "look value": 0.0, **done}

    def _begin(self) -> Tensor:
        """The state to go on from: the stored one, or the mean gradient along the straight path."""
        if "mask/state" in self.stream.arrays:
            return torch.from_numpy(self.stream.arrays["mask/state"].copy())
        everywhere = torch.ones(len(self.numbers), dtype=torch.float64)
        points = midpoints_of(MIDPOINTS)
        stored = self.stream.arrays.get("begin/slope")
        total = torch.zeros(len(self.numbers), dtype=torch.float64) if stored is None else torch.from_numpy(stored.copy())
        for number in range(int(self.stream.state.get("begun", 0)), len(points)):
            slope = self.look(everywhere * points[number]).slope
            with self.stream.changing():
                total += slope
                self.stream.put("begin", {"slope": total.numpy()})
                self._looked(begun=number + 1)
            self.stream.went_on()
        return total / len(points)
