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
from torch import Tensor

from safety_neurons.detectors.attribution_patching import own_completions
from safety_neurons.detectors.beginnings import beginnings, different
from safety_neurons.detectors.finishing import Choice, finish, searched
from safety_neurons.detectors.found import Found, PromptCounts
from safety_neurons.detectors.gradients import Scored
from safety_neurons.detectors.mask_search import Course, Plan, Search
from safety_neurons.detectors.movable import Activations, Movable, Parameters
from safety_neurons.detectors.pairs import comparing
from safety_neurons.detectors.streaming import Progress, Stream, stream_key
from safety_neurons.detectors.swap_attribution import contested
from safety_neurons.detectors.text import generate
from safety_neurons.errors import UsageError
from safety_neurons.model import LanguageModel, as_prompts, check_pair
from safety_neurons.model.language_model import Texts as Asked
from safety_neurons.model.passes import BatchSize
from safety_neurons.neurons import NeuronSet, Selection
from safety_neurons.neurons.selection import number_of
from safety_neurons.prompts import Prompts
from safety_neurons.results import Checkpoint

KEPT_TOKENS = 8
"""Tokens of a harmless answer that are to stay as they are."""


def find_mask(
    base: LanguageModel,
    aligned: LanguageModel,
    prompts: Asked,
    *,
    harmless: Asked | None = None,
    move: str = "auto",
    aim: str = "refusal",
    units: int | None = None,
    rounds: int = 30,
    keep: float = 0.8,
    caution: float = 0.5,
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
    whole, the value is differentiated there, and s ← keep·s + (1 − keep)·gradient. The set of the highest value met is the result. The
    value: `aim`, mean over prompts, plus `caution` times the mean log-probability of the base's own answers to harmless prompts.

    Args:
        base: the less safe model.
        aligned: the safer one.
        prompts: usually harmful requests.
        harmless: prompts whose answers are to stay; None leaves them out.
        move: `activations` patches (the base model runs, as in `patched`); `parameters` swaps (the aligned model runs, searched units
            outside the mask have the base's parameters); `auto` patches where patching everything turns at least half of the prompts.
        aim: what is made large where the models' own completions part. `refusal`: the log-probability of going on as refusals usually do
            there, so that neither wording nor a third way out is paid for. `odds`: −softplus(−log-odds) of the two tokens.
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
        NumericalError: a value is not a number. UsageError: a selection that names no size, or numbers out of range.

    Source: iterative hard thresholding (Blumensath and Davies 2009) on the mask of attribution patching (Nanda 2023).
    Differs: the mask is a set in every round, so that nothing has to be rounded at the end; no relaxation or penalty is tuned.
    """
    asked, plan_ = as_prompts(prompts), Plan(move, aim, rounds, keep, caution)
    kept = as_prompts(harmless) if harmless is not None else None
    check_pair(base, aligned)
    sizes = base.table.select(sites=sites, layers=layers).sizes
    selection = _sized(units, choice)
    config = plan_.config() | {"harmless_sha256": kept.sha256 if kept is not None else ""} | searched(sites, layers)
    key = stream_key("mask", (base, aligned), asked, config | {"units": units, **selection.config()}, selection, batch_size)
    made = _Made(base, aligned, sizes, plan_, Stream(checkpoint, key), batch_size, progress)
    with comparing(base, aligned):
        values, counts, notes, told = made.search(asked, kept, units, selection)
    selection = selection if units is None else Selection(count=sum(int((part > 1).sum()) for part in values.values()))
    named: dict[str, Any] = {"table": base.table, "models": (base.name, aligned.name), "prompts": asked, "selection": selection}
    return finish("mask", values, config=config | told, counts=counts, notes=notes, subtract=subtract, **named)


@dataclass(frozen=True)
class _Made:
    """What a mask is made with."""

    base: LanguageModel
    aligned: LanguageModel
    sizes: Mapping[str, int]
    plan: Plan
    stream: Stream
    batch_size: BatchSize
    progress: Progress | None

    def search(
        self, prompts: Prompts, harmless: Prompts | None, units: int | None, selection: Selection
    ) -> tuple[dict[str, np.ndarray], PromptCounts, list[str], dict[str, Any]]:
        """Scores by site key, what became of the prompts, notes, and what goes into the provenance."""
        base = self.base
        options: dict[str, Any] = {"stream": self.stream, "batch_size": self.batch_size}
        pairs, counts, notes = own_completions(base, self.aligned, prompts, **options)
        answers, lost = _answers(base, harmless, **options)
        notes += [f"{lost} harmless prompts have no answer, or an empty one, and were left out"] if lost else []
        course = Course(_asked(pairs, self.plan.aim), answers, base, self.batch_size)
        contest = Course(_asked(pairs, "odds"), [], base, self.batch_size, first=len(course.batches))
        mover, moved = _mover(self.stream.state.get("move", self.plan.move), base, self.aligned, self.sizes, contest)
        self.stream.state["move"] = moved
        search = Search(mover, course, self.plan, self.stream)
        size = _n_units(units, selection, len(search.numbers), sum(self.sizes.values()))
        members, state = search.run(size, self.progress)
        turned = share_turned(mover, contest, search.masks(torch.from_numpy(members).double()))
        if turned < 0.5:
            notes.append(f"the set turns {turned:.2f} of the prompts; a larger set, or other sites, may turn more")
        values = {key: _of_neurons(base.table.units()[key], search.numbers, state, members) for key in self.sizes}
        told = {"move": moved, "units": size, "turned": turned, **{name: self.stream.state[name] for name in ("value", "round")}}
        return values, counts, notes, told


def _mover(move: str, base: LanguageModel, aligned: LanguageModel, sizes: Mapping[str, int], contest: Course) -> tuple[Movable, str]:
    """What the mask moves; for `auto`, activations where all of them together turn at least half of the prompts."""
    if move == "parameters":
        return Parameters(base, aligned, sizes), move
    activations = Activations(base, aligned, sizes)
    everything = {name: torch.ones(len(part)) for name, part in activations.units.items()}
    if move == "activations" or share_turned(activations, contest, everything) >= 0.5:
        return activations, "activations"
    return Parameters(base, aligned, sizes), "parameters"


def share_turned(mover: Movable, contest: Course, masks: Mapping[str, Tensor]) -> float:
    """Share of the prompts where refusal is likelier than compliance, where the two part."""
    odds = torch.cat([mover.slopes(batch, rows, masks)[1] for batch, rows, _ in contest.batches])
    return float((odds > 0).double().mean())


def _asked(told: Sequence[Sequence[Scored]], aim: str) -> list[Scored]:
    """One row a prompt that the two models complete differently."""
    return [contested(pair) for pair in different(told)] if aim == "odds" else beginnings(told)


def _answers(base: LanguageModel, harmless: Any, **options: Any) -> tuple[list[Scored], int]:
    """The base model's own answers to harmless prompts, their first tokens scored by mean log-probability; and how many have none."""
    if harmless is None:
        return [], 0
    written = generate(base, harmless, "harmless", KEPT_TOKENS, options["stream"], batch_size=options["batch_size"])
    encoded = base.encode(harmless, reserve=KEPT_TOKENS)
    rows = [Scored((*row.ids, *answer), len(row.ids), 1.0) for row, answer in zip(encoded, written, strict=True) if answer]
    return rows, len(encoded) - len(rows)


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
