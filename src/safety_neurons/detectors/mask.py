"""The learned mask: the fewest units whose move from the base model to the aligned one makes refusals and leaves harmless answers alone.

Detectors that score every unit by itself take two units that do the same twice, and miss units that only work together. Here a set is
searched as a set: the gradient of what the set is for, at the set that is there, says which members to keep and which units to add.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Unpack

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from safety_neurons.detectors.attribution_patching import own_completions
from safety_neurons.detectors.finishing import Choice, finish, searched
from safety_neurons.detectors.found import Found
from safety_neurons.detectors.gradients import SCORED_TOKENS, TOKEN_BUDGET, Scored, midpoints_of
from safety_neurons.detectors.movable import Activations, Movable, Parameters
from safety_neurons.detectors.pairs import comparing
from safety_neurons.detectors.streaming import Progress, Stream, stream_key
from safety_neurons.detectors.swap_attribution import contested
from safety_neurons.detectors.text import generate
from safety_neurons.errors import NumericalError, UsageError
from safety_neurons.model import LanguageModel, as_prompts, check_pair
from safety_neurons.model.language_model import Texts as Asked
from safety_neurons.model.passes import Batch, BatchSize, collate, plan, takes_padding, token_budget
from safety_neurons.neurons import NeuronSet, Selection
from safety_neurons.neurons.selection import number_of
from safety_neurons.results import Checkpoint

MOVES = ("auto", "activations", "parameters")
MIDPOINTS = 8
"""Points of the straight path whose mean gradient the search starts from."""


def find_mask(
    base: LanguageModel,
    aligned: LanguageModel,
    prompts: Asked,
    *,
    harmless: Asked | None = None,
    move: str = "auto",
    units: int | None = None,
    rounds: int = 40,
    keep: float = 0.8,
    caution: float = 1.0,
    sites: Sequence[str] = ("down",),
    layers: range | str | None = None,
    batch_size: BatchSize = "auto",
    checkpoint: Checkpoint | None = None,
    progress: Progress | None = None,
    subtract: NeuronSet | None = None,
    **choice: Unpack[Choice],
) -> Found:
    """Search the set of a given size whose move from base to aligned refuses the most and changes harmless answers least.

    The state s starts as the mean gradient along the straight path (attribution). In every round the units of the largest s are moved
    whole, the value is differentiated with respect to the mask there, and s ← keep·s + (1 − keep)·gradient. The set of the highest value
    met on the prompts is the result. The value is the mean over prompts of −softplus(−log-odds), which stops rewarding a prompt that is
    refused already, plus `caution` times the mean log-probability of the base's own answers to harmless prompts. The log-odds are
    log p(refusal) − log p(compliance) at the first token where the aligned and the base model's own greedy completions part.

    Args:
        base: the less safe model.
        aligned: the safer one.
        prompts: usually harmful requests.
        harmless: prompts whose answers are to stay; None leaves them out.
        move: `activations` patches (the base model runs, as in `patched`); `parameters` swaps (the aligned model runs, searched units
            outside the mask have the base's parameters); `auto` patches where patching everything turns at least half of the prompts.
        units: size of the set, a unit counted once; else `top` or `count` say it.
        rounds: how often the set is looked at.
        keep: share of the state that a round leaves.
        caution: weight of the harmless answers.
        sites: any of `q k v o gate up down`.
        layers: a range or "A:B"; None for all.
        batch_size: prompts a batch, or "auto".
        checkpoint: partial state; a killed run continues behind its last finished round.
        progress: called with (rounds done, in all, units in the set).
        subtract: neurons taken away after selection.
        **choice: `top` or `count`; the largest 2 % by default.

    Returns:
        Scores: s, scaled into [−1, 1], and 2 added for the members of the set found.

    Raises:
        InputError: both models complete every prompt with the same text, or with none.
        MismatchError: the models have other shapes or tokenizers.
        NumericalError: a value is not a number.
        UsageError: a selection that names no size, or numbers out of range.

    Source: iterative hard thresholding (Blumensath and Davies 2009) on the mask of attribution patching (Nanda 2023); what is asked of the
    set is that of Chen et al. (arXiv 2406.14144, eq. 4). Learned masks over units: Louizos et al. (2018), Cao et al. (2021).
    Differs: the mask is a set in every round, so that nothing has to be rounded at the end; no relaxation or penalty is tuned.
    """
    prompts, plan_ = as_prompts(prompts), _Plan(move, rounds, keep, caution)
    kept = as_prompts(harmless) if harmless is not None else None
    check_pair(base, aligned)
    sizes = base.table.select(sites=sites, layers=layers).sizes
    selection = _sized(units, choice)
    config = plan_.config() | {"harmless_sha256": kept.sha256 if kept is not None else ""} | searched(sites, layers)
    key = stream_key("mask", (base, aligned), prompts, config | {"units": units, **selection.config()}, selection, batch_size)
    stream = Stream(checkpoint, key)
    options: dict[str, Any] = {"stream": stream, "batch_size": batch_size}
    with comparing(base, aligned):
        told, counts, notes = own_completions(base, aligned, prompts, **options)
        course = _Course([contested(rows) for rows in told], _answers(base, kept, **options), base, batch_size)
        mover, said = _mover(plan_.move, base, aligned, sizes, course)
        search = _Search(mover, course, plan_, stream)
        size = _n_units(units, selection, len(search.numbers), sum(sizes.values()))
        members, state = search.run(size, progress)
    values = {key: _of_neurons(base.table.units()[key], search.numbers, state, members) for key in sizes}
    selection = selection if units is None else Selection(count=sum(int((part > 1).sum()) for part in values.values()))
    made: dict[str, Any] = {"table": base.table, "models": (base.name, aligned.name), "prompts": prompts, "selection": selection}
    config |= {"move": said, "units": size}
    return finish("mask", values, config=config, counts=counts, notes=[*notes, *search.notes()], subtract=subtract, **made)


@dataclass(frozen=True)
class _Plan:
    """The options of the search."""

    move: str
    rounds: int
    keep: float
    caution: float

    def __post_init__(self) -> None:
        if self.move not in MOVES:
            raise UsageError(f"move {self.move!r} is unknown: use one of {', '.join(MOVES)}")
        if self.rounds < 1 or not 0 <= self.keep < 1 or not 0 <= self.caution < math.inf:
            raise UsageError(
                f"rounds {self.rounds}, keep {self.keep}, caution {self.caution}: expected at least 1 round, a keep from 0 to below 1 "
                "and a caution of at least 0"
            )

    def config(self) -> dict[str, Any]:
        """As written to the provenance."""
        return {"move": self.move, "rounds": self.rounds, "keep": self.keep, "caution": self.caution}


@dataclass(frozen=True)
class _Look:
    """What a mask is worth.

    Attributes:
        slope: derivative of the value with respect to every unit's entry.
        value: what is made large.
        odds: log-odds of refusing, per prompt.
    """

    slope: Float[Tensor, " unit"]
    value: float
    odds: Float[Tensor, " prompt"]


class _Course:
    """The rows that masks are judged on, in batches that stay the same from round to round."""

    def __init__(self, contested_rows: Sequence[Scored], answers: Sequence[Scored], lm: LanguageModel, batch_size: BatchSize) -> None:
        self.n_harmful, self.n_harmless = len(contested_rows), len(answers)
        self.batches: list[tuple[Batch, list[Scored], bool]] = []
        for rows, harmful in ((contested_rows, True), (answers, False)):
            lengths = [len(row.ids) for row in rows]
            for group in plan(lengths, batch_size, token_budget(lm.device, TOKEN_BUDGET), padded=takes_padding(lm)):
                batch = collate([row.ids for row in rows], group, number=len(self.batches), pad_id=lm.pad_id).to(lm.device)
                self.batches.append((batch, [rows[index] for index in group], harmful))


class _Search:
    """Iterated hard thresholding over the units of a mover."""

    def __init__(self, mover: Movable, course: _Course, plan_: _Plan, stream: Stream) -> None:
        self.mover, self.course, self.plan, self.stream = mover, course, plan_, stream
        numbers, places = torch.unique(torch.cat(list(mover.units.values())), return_inverse=True)
        self.numbers = numbers
        self._places = dict(zip(mover.units, places.split([len(part) for part in mover.units.values()]), strict=True))
        self._found: dict[str, Any] = {}

    def look(self, mask: Float[Tensor, " unit"]) -> _Look:
        """What a mask is worth, and which way it should change."""
        masks = {name: mask[places] for name, places in self._places.items()}
        slope, value, odds = torch.zeros(len(self.numbers), dtype=torch.float64), 0.0, torch.zeros(self.course.n_harmful)
        for batch, rows, harmful in self.course.batches:
            if not harmful and not self.plan.caution:
                continue
            found, scores = self.mover.slopes(batch, rows, masks)
            scores = scores.double().cpu()
            if harmful:
                odds[batch.indices] = scores.float()
                weights, gained = (-scores).sigmoid() / self.course.n_harmful, -torch.nn.functional.softplus(-scores)
            else:
                weights = torch.full_like(scores, self.plan.caution / self.course.n_harmless)
                gained = scores * self.plan.caution
            value += float(gained.sum()) / (self.course.n_harmful if harmful else self.course.n_harmless)
            for name, gradients in found.items():
                slope.index_add_(0, self._places[name], weights @ gradients.double().cpu())
        if not (math.isfinite(value) and bool(slope.isfinite().all())):
            raise NumericalError("the value of a mask is NaN or infinity: check the models' weights, or use --dtype float32")
        return _Look(slope, value, odds)

    def run(self, size: int, progress: Progress | None = None) -> tuple[np.ndarray, np.ndarray]:
        """The members of the best set, and the state at the end; both by unit."""
        state = self._begin()
        best = torch.from_numpy(self.stream.arrays["mask/best"].astype(bool)) if "mask/best" in self.stream.arrays else None
        for number in range(int(self.stream.state.get("rounds", 0)), self.plan.rounds):
            chosen = torch.zeros(len(state), dtype=torch.float64)
            chosen[torch.argsort(-state, stable=True)[:size]] = 1.0
            look = self.look(chosen)
            if best is None or look.value > self.stream.state["value"]:
                best = chosen.bool()
                self.stream.state |= {"value": look.value, "refused": float((look.odds > 0).double().mean()), "round": number + 1}
            state = self.plan.keep * state + (1 - self.plan.keep) * look.slope
            self.stream.put("mask", {"state": state.numpy(), "best": best.numpy().astype(np.int64)})
            self.stream.state["rounds"] = number + 1
            self.stream.save()
            if progress is not None:
                progress(number + 1, self.plan.rounds, size)
        assert best is not None
        return best.numpy(), state.numpy()

    def _begin(self) -> Tensor:
        """The state to go on from: the stored one, or the mean gradient along the straight path."""
        if "mask/state" in self.stream.arrays:
            return torch.from_numpy(self.stream.arrays["mask/state"].copy())
        everywhere = torch.ones(len(self.numbers), dtype=torch.float64)
        return torch.stack([self.look(everywhere * point).slope for point in midpoints_of(MIDPOINTS)]).mean(0)

    def notes(self) -> list[str]:
        """What has to be said about the set."""
        told = self.stream.state
        if told["refused"] >= 0.5:
            return []
        return [f"the set turns {told['refused']:.2f} of the prompts; a larger set, or other sites, may turn more"]


def _mover(move: str, base: LanguageModel, aligned: LanguageModel, sizes: Mapping[str, int], course: _Course) -> tuple[Movable, str]:
    """What the mask moves; for `auto`, activations where all of them together turn at least half of the prompts."""
    if move == "parameters":
        return Parameters(base, aligned, sizes), move
    activations = Activations(base, aligned, sizes)
    if move == "activations":
        return activations, move
    odds = []
    for batch, rows, harmful in course.batches:
        if harmful:
            masks = {name: torch.ones(len(part)) for name, part in activations.units.items()}
            odds.append(activations.slopes(batch, rows, masks)[1])
    if float((torch.cat(odds) > 0).double().mean()) >= 0.5:
        return activations, "activations"
    return Parameters(base, aligned, sizes), "parameters"


def _answers(base: LanguageModel, harmless: Any, **options: Any) -> list[Scored]:
    """The base model's own answers to harmless prompts, scored by their mean log-probability."""
    if harmless is None:
        return []
    written = generate(base, harmless, "harmless", SCORED_TOKENS, options["stream"], batch_size=options["batch_size"])
    encoded = base.encode(harmless, reserve=SCORED_TOKENS)
    return [Scored((*row.ids, *answer), len(row.ids), 1.0) for row, answer in zip(encoded, written, strict=True) if answer]


def _sized(units: int | None, choice: Choice) -> Selection:
    """The selection; only a size can be searched for."""
    if any(choice.get(name) is not None for name in ("threshold", "top_per_matrix", "agreement")):
        raise UsageError(
            "a mask is searched as one set of a given size: use top or count (or units), not threshold, top-per-matrix or agreement"
        )
    if units is not None and (units < 1 or any(value is not None for value in choice.values())):
        raise UsageError(f"units {units}: expected at least 1, and neither top nor count beside it")
    return Selection.of(**choice, default_top=0.02)


def _n_units(units: int | None, selection: Selection, n_units: int, n_neurons: int) -> int:
    """Units in the set: as asked, or so many that their neurons at the searched sites are about as many as the selection takes."""
    if units is None:
        wanted = number_of(selection.top, n_neurons) if selection.top is not None else int(selection.count or 0)
        units = max(1, math.ceil(wanted * n_units / n_neurons))
    if units > n_units:
        raise UsageError(f"{units} units asked, but the searched sites have {n_units}; ask for fewer")
    return units


def _of_neurons(of: np.ndarray, numbers: Tensor, state: np.ndarray, members: np.ndarray) -> np.ndarray:
    """Scores of one site's neurons from those of their units."""
    scaled = state / max(float(np.abs(state).max()), 1e-30) + 2.0 * members
    return scaled[np.searchsorted(numbers.numpy(), of)]
