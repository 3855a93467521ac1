"""The learned mask: the set of units whose move from the base model to the aligned one makes refusals and
leaves harmless answers alone.

Detectors that score every unit by itself take two units that do the same twice, and miss units that only work
together. Here a set is searched as a set: the gradient of what the set is for, at the set that is there, says
which members to keep and which units to add.
"""

import collections
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from safety_neurons.counting import numbered
from safety_neurons.detectors.attribution import (
    TOKEN_BUDGET,
    ScoredRow,
    mask_gradients,
    midpoints_of,
    own_completions,
)
from safety_neurons.detectors.importance_contrast import SoftSwap, contested
from safety_neurons.detectors.methods import Mask
from safety_neurons.detectors.reading import donated
from safety_neurons.detectors.runner import Progress, Run, Scored, Stream
from safety_neurons.detectors.text import generate
from safety_neurons.errors import NumericalError, UnsupportedModelError, UsageError
from safety_neurons.model import LanguageModel, ranks
from safety_neurons.model.batches import Batch, BatchSize, collate, plan, token_budget
from safety_neurons.model.language_model import said_of_reading, takes_padding
from safety_neurons.neurons import Selection, parse_key
from safety_neurons.neurons.scores import number_of

USUAL = 0.05
"""Share of the refusals that must go on with a token for it to count as a refusal's for other prompts too."""


def different(told: Sequence[Sequence[ScoredRow]]) -> list[Sequence[ScoredRow]]:
    """The prompts that the two models complete differently."""
    return [pair for pair in told if pair[0].ids != pair[1].ids]


def beginnings(told: Sequence[Sequence[ScoredRow]]) -> list[ScoredRow]:
    """One row for every prompt that the two models complete differently: its score is log p(going on as
    refusals do) where they part.

    As refusals do: with its own refusal's token, or one with which at least a twentieth of the refusals go on
    after the same beginning and no compliance does.

    Args:
        told: of every prompt its refusal and its compliance.
    """
    pairs = different(told)
    rows = [contested(pair) for pair in pairs]
    starts = [row.ids[pair[0].start : -1] for row, pair in zip(rows, pairs, strict=True)]
    refusing, complying = (
        collections.defaultdict[tuple[int, ...], collections.Counter[int]](collections.Counter)
        for _ in range(2)
    )
    for start, row in zip(starts, rows, strict=True):
        refusing[start][row.ids[-1]] += 1
        complying[start][int(row.rival or 0)] += 1
    begun = []
    for start, row in zip(starts, rows, strict=True):
        least = USUAL * refusing[start].total()
        usual = {
            token
            for token, count in refusing[start].items()
            if count >= least and token not in complying[start]
        }
        begun.append(replace(row, rival=None, instead=tuple(sorted(usual | {row.ids[-1]}))))
    return begun


KEPT_DONORS = 2**28
"""Bytes of the aligned model's activations that are kept between rounds; what is beyond is computed again."""


@runtime_checkable
class Movable(Protocol):
    """Something with a mask."""

    @property
    def units(self) -> Mapping[str, Int[Tensor, " entry"]]:
        """By name of a part of the mask, the number (in the model's site table) of the unit that each of its
        entries moves.
        """
        ...

    def slopes(
        self, batch: Batch, rows: Sequence[ScoredRow], masks: Mapping[str, Tensor]
    ) -> tuple[dict[str, Float[Tensor, "batch entry"]], Float[Tensor, " batch"]]:
        """Derivative of each row's score with respect to each entry, and the scores.

        One forward and one backward pass.
        """
        ...


@dataclass
class Activations:
    """`base + m·(aligned − base)` for the activations of the searched neurons, at every token, in the running
    base model.

    Attributes:
        base, aligned: the models.
        sizes: neurons of every searched site key.
    """

    base: LanguageModel
    aligned: LanguageModel
    sizes: Mapping[str, int]
    _donors: dict[int, dict[str, Any]] = field(default_factory=dict)
    _bytes: int = 0

    @property
    def units(self) -> dict[str, Int[Tensor, " entry"]]:
        """One part of the mask a site."""
        numbers = self.base.table.units()
        return {key: torch.as_tensor(numbers[key]) for key in self.sizes}

    def slopes(
        self, batch: Batch, rows: Sequence[ScoredRow], masks: Mapping[str, Tensor]
    ) -> tuple[dict[str, Float[Tensor, "batch entry"]], Float[Tensor, " batch"]]:
        """As the protocol says; `batch.number` must be the same for the same rows."""
        return mask_gradients(self.base, batch, rows, self.sizes, mask=masks, donors=self._donated(batch))

    def _donated(self, batch: Batch) -> dict[str, Any]:
        if batch.number in self._donors:
            return self._donors[batch.number]
        donors = donated(self.aligned, batch, self.sizes)
        size = sum(_values(donor).nbytes for donor in donors.values())
        if self._bytes + size <= KEPT_DONORS:
            self._donors[batch.number] = donors
            self._bytes += size
        return donors


@dataclass
class Parameters:
    """`base + m·(aligned − base)` for the parameters of the searched units.

    Everything else is the aligned model's.
    """

    base: LanguageModel
    aligned: LanguageModel
    sizes: Mapping[str, int]

    def __post_init__(self) -> None:
        if experts := _experts_among(self.sizes):
            raise UnsupportedModelError(
                f"{experts[0]}: experts' parameters cannot be swapped; use --move activations, or --sites "
                "q,k,v,o for this model"
            )
        self._swap = SoftSwap(self.base, self.aligned, self.sizes)
        numbers = self.base.table.units()
        sites = {"mlp": "down"}
        parts = {name: name.rsplit(".", 1) for name in self._swap.sizes_of_masks}
        self.units = {
            name: torch.as_tensor(numbers[f"{layer}.{sites.get(site, site)}"])
            for name, (layer, site) in parts.items()
        }

    def slopes(
        self, batch: Batch, rows: Sequence[ScoredRow], masks: Mapping[str, Tensor]
    ) -> tuple[dict[str, Float[Tensor, "batch entry"]], Float[Tensor, " batch"]]:
        """As the protocol says."""
        return self._swap.slopes(batch, rows, masks)


def _experts_among(keys: Iterable[str]) -> list[str]:
    return [key for key in keys if parse_key(key).expert is not None or parse_key(key).shared]


def _values(donor: Any) -> Tensor:
    values: Tensor = donor if isinstance(donor, Tensor) else donor.values
    return values


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
        self,
        asked: Sequence[ScoredRow],
        answers: Sequence[ScoredRow],
        lm: LanguageModel,
        batch_size: BatchSize,
        first: int = 0,
    ) -> None:
        self.n_harmful, self.n_harmless = len(asked), len(answers)
        self.batches: list[tuple[Batch, list[ScoredRow], bool]] = []
        for rows, harmful in ((asked, True), (answers, False)):
            lengths = [len(row.ids) for row in rows]
            for group in plan(
                lengths, batch_size, token_budget(lm.device, TOKEN_BUDGET), padded=takes_padding(lm)
            ):
                batch = collate(
                    [row.ids for row in rows], group, number=first + len(self.batches), pad_id=lm.pad_id
                ).to(lm.device)
                self.batches.append((batch, [rows[index] for index in group], harmful))


class Search:
    """Iterated hard thresholding over the units of a mover."""

    def __init__(self, mover: Movable, course: Course, method: Mask, stream: Stream) -> None:
        self.mover, self.course, self.method, self.stream = mover, course, method, stream
        numbers, places = torch.unique(torch.cat(list(mover.units.values())), return_inverse=True)
        self.numbers = numbers
        self._places = dict(
            zip(mover.units, places.split([len(part) for part in mover.units.values()]), strict=True)
        )
        self._found: dict[str, Any] = {}

    def masks(self, mask: Float[Tensor, " unit"]) -> dict[str, Tensor]:
        """The mask as its mover wants it."""
        return {name: mask[places] for name, places in self._places.items()}

    def look(self, mask: Float[Tensor, " unit"]) -> Look:
        """What a mask is worth, and which way it should change.

        Goes on behind the last batch that the stream holds of this look.
        """
        masks, state = self.masks(mask), self.stream.state
        begun = {name: torch.from_numpy(values.copy()) for name, values in self.stream.named("look").items()}
        slope = begun.get("slope", torch.zeros(len(self.numbers), dtype=torch.float64))
        each = begun.get("each", torch.zeros(self.course.n_harmful, dtype=torch.float64))
        value = float(state.get("look value", 0.0))
        left = [
            number
            for number, (_, _, harmful) in enumerate(self.course.batches)
            if number >= int(state.get("looked", 0)) and (harmful or self.method.caution)
        ]

        def share(number: int) -> tuple[Tensor, float, dict[str, Tensor]]:
            batch, rows, harmful = self.course.batches[number]
            slopes, scores = self.mover.slopes(batch, rows, masks)
            scores = scores.double().cpu()
            if harmful:
                by_odds = self.method.aim == "odds"
                gained = -torch.nn.functional.softplus(-scores) if by_odds else scores
                weights = (
                    (-scores).sigmoid() if by_odds else torch.ones_like(scores)
                ) / self.course.n_harmful
            else:
                weights = torch.full_like(scores, self.method.caution / self.course.n_harmless)
                gained = scores * self.method.caution
            gain = float(gained.sum()) / (self.course.n_harmful if harmful else self.course.n_harmless)
            return (
                scores,
                gain,
                {name: weights @ gradients.double().cpu() for name, gradients in slopes.items()},
            )

        for number, (scores, gain, slopes) in zip(left, ranks.shared(left, share), strict=True):
            batch, _, harmful = self.course.batches[number]
            with self.stream.changing():
                if harmful:
                    each[batch.indices] = scores
                value += gain
                for name, added in slopes.items():
                    slope.index_add_(0, self._places[name], added)
                self.stream.put("look", {"slope": slope.numpy(), "each": each.numpy()})
                state |= {"looked": number + 1, "look value": value}
            self.stream.went_on()
        if not (math.isfinite(value) and bool(slope.isfinite().all())):
            raise NumericalError(
                "the value of a mask is NaN or infinity: check the models' weights, or use --dtype float32"
            )
        return Look(slope, value, each.float())

    def run(self, size: int, progress: Progress | None = None) -> tuple[np.ndarray, np.ndarray]:
        """The members of the best set, and the state at the end; both by unit."""
        with self.stream.kept():
            state = self._begin()
            best = (
                torch.from_numpy(self.stream.arrays["mask/best"].astype(bool))
                if "mask/best" in self.stream.arrays
                else None
            )
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
        total = (
            torch.zeros(len(self.numbers), dtype=torch.float64)
            if stored is None
            else torch.from_numpy(stored.copy())
        )
        for number in range(int(self.stream.state.get("begun", 0)), len(points)):
            slope = self.look(everywhere * points[number]).slope
            with self.stream.changing():
                total += slope
                self.stream.put("begin", {"slope": total.numpy()})
                self._looked(begun=number + 1)
            self.stream.went_on()
        return total / len(points)


KEPT_TOKENS = 8
"""Tokens of a harmless answer that are to stay as they are."""


def score(method: Mask, run: Run) -> Scored:
    """The search; a harmless prompt without an answer is left out and counted."""
    base = run.base
    pairs, counts = own_completions(run)
    answers, lost = _answers(run)
    run.notes += (
        [
            f"{numbered(lost, 'harmless prompt has', 'harmless prompts have')} no answer, or an "
            "empty one: left out"
        ]
        if lost
        else []
    )
    course = Course(_asked(pairs, method.aim), answers, base, run.batch_size)
    contest = Course(_asked(pairs, "odds"), [], base, run.batch_size, first=len(course.batches))
    mover, moved = _mover(run.stream.state.get("move", method.move), base, run.aligned, run.sizes, contest)
    run.stream.state["move"] = moved
    search = Search(mover, course, method, run.stream)
    size = _n_units(method.units, run.selection, len(search.numbers), sum(run.sizes.values()))
    members, state = search.run(size, run.progress)
    turned = share_turned(mover, contest, search.masks(torch.from_numpy(members).double()))
    if turned < 0.5:
        run.notes.append(
            f"the set turns {turned:.2f} of the prompts; a larger set, or other sites, may turn more"
        )
    values = {key: _of_neurons(base.table.units()[key], search.numbers, state, members) for key in run.sizes}
    config = {
        "move": moved,
        "units": size,
        "turned": turned,
        **{name: run.stream.state[name] for name in ("value", "round")},
    }
    # A set of a number of units is all that the search ended with; a share or count is taken from the scores.
    whole = (
        None
        if method.units is None
        else Selection(count=sum(int((part > 1).sum()) for part in values.values()))
    )
    return Scored(values, counts, config=config, selection=whole)


def _mover(
    move: str, base: LanguageModel, aligned: LanguageModel, sizes: Mapping[str, int], contest: Course
) -> tuple[Movable, str]:
    """What the mask moves; for `auto`, activations where all of them together turn at least half of the
    prompts, or where experts are among them, whose parameters cannot be swapped.
    """
    if move == "parameters":
        return Parameters(base, aligned, sizes), move
    activations = Activations(base, aligned, sizes)
    everything = {name: torch.ones(len(part)) for name, part in activations.units.items()}
    only = move == "activations" or _experts_among(sizes)
    if only or share_turned(activations, contest, everything) >= 0.5:
        return activations, "activations"
    return Parameters(base, aligned, sizes), "parameters"


def share_turned(mover: Movable, contest: Course, masks: Mapping[str, Tensor]) -> float:
    """Share of the prompts where refusal is likelier than compliance, where the two part."""

    def odds(number: int) -> Tensor:
        batch, rows, _ = contest.batches[number]
        return mover.slopes(batch, rows, masks)[1].cpu()

    every = torch.cat(list(ranks.shared(range(len(contest.batches)), odds)))
    return float((every > 0).double().mean())


def _asked(told: Sequence[Sequence[ScoredRow]], aim: str) -> list[ScoredRow]:
    """One row a prompt that the two models complete differently."""
    return [contested(pair) for pair in different(told)] if aim == "odds" else beginnings(told)


def _answers(run: Run) -> tuple[list[ScoredRow], int]:
    """The base model's own answers to harmless prompts, their first tokens scored by mean log-probability.

    And how many have none.
    """
    if run.harmless is None:
        return [], 0
    written = generate(run.base, run.harmless, "harmless", KEPT_TOKENS, run.stream, batch_size=run.batch_size)
    encoded = run.base.encode(run.harmless, reserve=KEPT_TOKENS)
    run.notes += said_of_reading(encoded, "harmless")
    rows = [
        ScoredRow((*row.ids, *answer), len(row.ids), 1.0)
        for row, answer in zip(encoded, written, strict=True)
        if answer
    ]
    return rows, len(encoded) - len(rows)


def _n_units(units: int | None, selection: Selection, n_units: int, n_neurons: int) -> int:
    """Units in the set: as asked, or so many that their neurons at the searched sites are about as many as
    the selection takes.
    """
    if units is None:
        wanted = (
            number_of(selection.top, n_neurons) if selection.top is not None else int(selection.count or 0)
        )
        units = max(1, math.ceil(wanted * n_units / n_neurons))
    if units > n_units:
        raise UsageError(f"{units} units asked, but the searched sites have {n_units}; ask for fewer")
    return units


def _of_neurons(of: np.ndarray, numbers: Tensor, state: np.ndarray, members: np.ndarray) -> np.ndarray:
    """Scores of one site's neurons from those of their units."""
    scaled = state / max(float(np.abs(state).max()), 1e-30) + 2.0 * members
    return scaled[np.searchsorted(numbers.numpy(), of)]
