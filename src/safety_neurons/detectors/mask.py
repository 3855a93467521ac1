"""The learned mask: the fewest units whose move from the base model to the aligned one makes refusals and leaves harmless answers alone.

Detectors that score every unit by itself take two units that do the same twice, and miss units that only work together. Here a set is
searched as a set: the gradient of what the set is for, at the set that is there, says which members to keep and which units to add.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from safety_neurons.detectors.attribution_patching import own_completions
from safety_neurons.detectors.beginnings import beginnings, different
from safety_neurons.detectors.gradients import ScoredRow
from safety_neurons.detectors.mask_search import Course, Search
from safety_neurons.detectors.methods import Mask
from safety_neurons.detectors.movable import Activations, Movable, Parameters
from safety_neurons.detectors.runner import Run, Scored
from safety_neurons.detectors.swap_attribution import contested
from safety_neurons.detectors.text import generate
from safety_neurons.errors import UsageError
from safety_neurons.model import LanguageModel
from safety_neurons.neurons import Selection
from safety_neurons.neurons.scores import number_of

KEPT_TOKENS = 8
"""Tokens of a harmless answer that are to stay as they are."""


def score(method: Mask, run: Run) -> Scored:
    """The search; a harmless prompt without an answer is left out and counted."""
    base = run.base
    pairs, counts = own_completions(run)
    answers, lost = _answers(run)
    run.notes += [f"{lost} harmless prompts have no answer, or an empty one, and were left out"] if lost else []
    course = Course(_asked(pairs, method.aim), answers, base, run.batch_size)
    contest = Course(_asked(pairs, "odds"), [], base, run.batch_size, first=len(course.batches))
    mover, moved = _mover(run.stream.state.get("move", method.move), base, run.aligned, run.sizes, contest)
    run.stream.state["move"] = moved
    search = Search(mover, course, method, run.stream)
    size = _n_units(method.units, run.selection, len(search.numbers), sum(run.sizes.values()))
    members, state = search.run(size, run.progress)
    turned = share_turned(mover, contest, search.masks(torch.from_numpy(members).double()))
    if turned < 0.5:
        run.notes.append(f"the set turns {turned:.2f} of the prompts; a larger set, or other sites, may turn more")
    values = {key: _of_neurons(base.table.units()[key], search.numbers, state, members) for key in run.sizes}
    config = {"move": moved, "units": size, "turned": turned, **{name: run.stream.state[name] for name in ("value", "round")}}
    # A set of a number of units is all that the search ended with; a share or count is taken from the scores.
    whole = None if method.units is None else Selection(count=sum(int((part > 1).sum()) for part in values.values()))
    return Scored(values, counts, config=config, selection=whole)


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


def _asked(told: Sequence[Sequence[ScoredRow]], aim: str) -> list[ScoredRow]:
    """One row a prompt that the two models complete differently."""
    return [contested(pair) for pair in different(told)] if aim == "odds" else beginnings(told)


def _answers(run: Run) -> tuple[list[ScoredRow], int]:
    """The base model's own answers to harmless prompts, their first tokens scored by mean log-probability; and how many have none."""
    if run.harmless is None:
        return [], 0
    written = generate(run.base, run.harmless, "harmless", KEPT_TOKENS, run.stream, batch_size=run.batch_size)
    encoded = run.base.encode(run.harmless, reserve=KEPT_TOKENS)
    rows = [ScoredRow((*row.ids, *answer), len(row.ids), 1.0) for row, answer in zip(encoded, written, strict=True) if answer]
    return rows, len(encoded) - len(rows)


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
