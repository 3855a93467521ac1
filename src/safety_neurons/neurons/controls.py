"""Random controls: the units of a set moved to random units of the same matrices, so that a control is made of what the set is made of."""

from collections import deque
from collections.abc import Mapping

import numpy as np
from jaxtyping import Bool, Int64

from safety_neurons.neurons.table import SiteTable, UnitBlock, parse_key


def moved_units(members: Mapping[str, Int64[np.ndarray, " member"]], table: SiteTable, seed: tuple[int, ...]) -> dict[str, np.ndarray]:
    """The members with every unit moved to a random unit of its layer (and expert); counts per matrix and of units stay.

    Args:
        members: sorted indices by key, all of them in the table.
        table: the model's matrices.
        seed: not negative; the same numbers give the same members.
    """
    found: dict[str, np.ndarray] = {}
    for block in table.blocks:
        held = {key: members[key] for key in block.keys if key in members and len(members[key])}
        if held:
            found |= _moved(block, held, np.random.default_rng([*seed, *parse_key(block.keys[0]).order]))
    return found


def _moved(block: UnitBlock, held: Mapping[str, np.ndarray], generator: np.random.Generator) -> dict[str, np.ndarray]:
    """The block's members moved: to units without any where there are enough, else to free neurons, else to whatever there is."""
    slots = np.stack([block.slots(key) for key in held], axis=1)
    counts = np.stack([block.held(key, indices) for key, indices in held.items()], axis=1)
    touched = np.asarray(counts.any(axis=1))
    parts = counts[touched]
    crowded = 2 * counts.sum(axis=0) > slots.sum(axis=0)
    wide = np.where(crowded, slots, slots - counts)
    rooms = ([np.where(touched[:, None], 0, slots)] if 2 * touched.sum() <= len(touched) else []) + [slots - counts, wide, slots]
    for room in rooms:
        places = _placed(parts, room, generator)
        if places is not None:
            break
    assert places is not None, "a set fits at least where it is"
    wanted = np.zeros_like(counts)
    wanted[places] = parts
    return {
        key: _filled(block.unit_of[key], wanted[:, site], indices if (room[:, site] < slots[:, site]).any() else None, generator)
        for site, (key, indices) in enumerate(held.items())
    }


def _placed(
    parts: Int64[np.ndarray, "part site"], room: Int64[np.ndarray, "unit site"], generator: np.random.Generator
) -> Int64[np.ndarray, " part"] | None:
    """A random unit for each part that has room for it, no unit twice; None where there is no such choice.

    Parts with equal counts are one kind. The most demanding kinds choose first; a part that finds no unit left makes others move along
    the shortest chain of kinds, so that a choice is found wherever there is one.
    """
    kinds, kind_of = np.unique(parts, axis=0, return_inverse=True)
    kind_of = kind_of.reshape(-1)
    fits = [(room >= kind).all(axis=1) for kind in kinds]
    owner = np.full(len(room), -1, np.int64)
    """The part that has each unit."""
    for kind in np.argsort(-kinds.sum(axis=1), kind="stable"):
        waiting = np.flatnonzero(kind_of == kind)
        open_units = generator.permutation(np.flatnonzero(fits[kind] & (owner < 0)))
        owner[open_units[: len(waiting)]] = waiting[: len(open_units)]
        for part in waiting[len(open_units) :]:
            if not _made_room(int(part), kind_of, fits, owner, generator):
                return None
    places = np.empty(len(parts), np.int64)
    places[owner[owner >= 0]] = np.flatnonzero(owner >= 0)
    return places


def _made_room(
    part: int, kind_of: Int64[np.ndarray, " part"], fits: list[Bool[np.ndarray, " unit"]], owner: np.ndarray, generator: np.random.Generator
) -> bool:
    """Gives a part a unit by moving others, each to a unit that fits it; False where no chain of moves ends at a free unit."""
    came_from: dict[int, tuple[int, int]] = {}
    start = int(kind_of[part])
    waiting, seen = deque([start]), {start}
    while waiting:
        kind = waiting.popleft()
        free = np.flatnonzero(fits[kind] & (owner < 0))
        if len(free):
            unit = int(generator.choice(free))
            while kind != start:
                kind, left = came_from[kind]
                owner[unit], unit = owner[left], left
            owner[unit] = part
            return True
        for unit in generator.permutation(np.flatnonzero(fits[kind])):
            other = int(kind_of[owner[unit]])
            if other not in seen:
                seen.add(other)
                came_from[other] = (kind, int(unit))
                waiting.append(other)
    return False


def _filled(
    unit_of: Int64[np.ndarray, " neuron"], wanted: Int64[np.ndarray, " unit"], shunned: np.ndarray | None, generator: np.random.Generator
) -> Int64[np.ndarray, " member"]:
    """Random neurons of a matrix, as many of each unit as wanted, none of those to be shunned."""
    open_neurons = wanted[unit_of] > 0
    if shunned is not None:
        open_neurons[shunned] = False
    candidates = generator.permutation(np.flatnonzero(open_neurons))
    candidates = candidates[np.argsort(unit_of[candidates], kind="stable")]
    units = unit_of[candidates]
    rank = np.arange(len(units)) - np.searchsorted(units, units)
    return np.sort(candidates[rank < wanted[units]])
