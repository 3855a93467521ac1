"""Chosen columns of activations: the neurons of a set as one sorted index tensor a site, on every device."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from safety_neurons.errors import DecodeError, UsageError
from safety_neurons.interventions.by_row import ByRow
from safety_neurons.model.sites import Anatomy
from safety_neurons.neurons import NeuronSet


def indices(
    anatomy: Anatomy, *neuron_sets: NeuronSet | Mapping[str, Any]
) -> dict[str, Int[Tensor, " neuron"]]:
    """The union of neuron sets as one sorted index tensor per key, checked against the model.

    Raises:
        ForeignModelError: A set was found on another architecture.
        NeuronError: A key or an index that the model does not have.
    """
    union: NeuronSet | None = None
    for given in neuron_sets:
        one = given if isinstance(given, NeuronSet) else NeuronSet(given)
        one.check(anatomy.table)
        union = one if union is None else union | one
    if union is None:
        return {}
    members = {key: torch.tensor(union[key], dtype=torch.int64) for key in union.keys()}  # noqa: SIM118
    return {key: member for key, member in members.items() if len(member)}


SMALL = 2**16
"""Numbers of an activation up to which one selection over all of it is cheaper than taking columns and
putting them back.
"""


class PerDevice:
    """One index tensor, copied once to every device it is asked for on."""

    def __init__(self, index: Int[Tensor, " neuron"], size: int) -> None:
        self.whole = len(index) == size
        self._size = size
        self._copies: dict[torch.device, Tensor] = {index.device: index}
        self._masks: dict[torch.device, Tensor] = {}

    def on(self, device: torch.device) -> Int[Tensor, " neuron"]:
        """The index tensor on a device."""
        copy = self._copies.get(device)
        if copy is None:
            copy = self._copies[device] = next(iter(self._copies.values())).to(device)
        return copy

    def mask_on(self, device: torch.device) -> Bool[Tensor, " site"]:
        """Which columns are chosen, on a device."""
        mask = self._masks.get(device)
        if mask is None:
            mask = torch.zeros(self._size, dtype=torch.bool, device=device)
            mask[self.on(device)] = True
            self._masks[device] = mask
        return mask

    def move_(self, target: Float[Tensor, "*rows neuron"], source: Float[Tensor, "*rows neuron"]) -> None:
        """Overwrites the chosen columns of `target` with those of `source`, in place."""
        if self.whole or target.numel() > SMALL:
            self.copied_(target, self.taken(source))
        else:
            torch.where(self.mask_on(target.device), source, target, out=target)

    def taken(self, source: Float[Tensor, "*rows neuron"]) -> Float[Tensor, "*rows chosen"]:
        """The chosen columns."""
        return source if self.whole else source.index_select(-1, self.on(source.device))

    def copied(
        self, target: Float[Tensor, "*rows neuron"], values: Float[Tensor, "*rows chosen"]
    ) -> Float[Tensor, "*rows neuron"]:
        """`target` with its chosen columns replaced."""
        return values if self.whole else target.index_copy(-1, self.on(target.device), values)

    def copied_(self, target: Float[Tensor, "*rows neuron"], values: Float[Tensor, "*rows chosen"]) -> None:
        """Replaces the chosen columns in place."""
        if self.whole:
            target.copy_(values)
        else:
            target.index_copy_(-1, self.on(target.device), values)


class ChosenColumns:
    """The chosen columns of a site: the same in all rows, or in every row those of its own set."""

    def __init__(self, parts: Sequence[tuple[int, PerDevice]], by_row: ByRow | None = None) -> None:
        self.parts, self.by_row = parts, by_row

    @property
    def of_all_rows(self) -> PerDevice:
        """The columns that are the same in all rows.

        Raises:
            DecodeError: rows have their own.
        """
        if self.by_row is not None:
            raise DecodeError(
                "every row has neurons of its own, which acts on plain passes without gradients alone; give "
                "every set a pass of its own"
            )
        return self.parts[0][1]

    def of(self, activation: Float[Tensor, "row token neuron"]) -> Iterator[tuple[Tensor, PerDevice]]:
        """The rows of each set that has some, as a view, with its columns."""
        if self.by_row is None:
            yield activation, self.of_all_rows
            return
        spans = self.by_row.spans(len(activation))
        for number, index in self.parts:
            if spans[number].start < spans[number].stop:
                yield activation[spans[number]], index


def columns(anatomy: Anatomy, *given: NeuronSet | Mapping[str, Any] | ByRow) -> dict[str, ChosenColumns]:
    """The columns of every site that any of the sets has neurons at; of several sets that are no `ByRow`
    those of their union.
    """
    sizes = anatomy.table.sizes
    by_row = next((one for one in given if isinstance(one, ByRow)), None)
    if by_row is not None and len(given) > 1:
        raise UsageError(
            f"{len(given) - 1} more arrived beside sets of every row; expected those alone: join what is to "
            "act in all rows to each set"
        )
    if by_row is None:
        chosen = indices(anatomy, *(one for one in given if not isinstance(one, ByRow)))
        return {key: ChosenColumns([(0, PerDevice(index, sizes[key]))]) for key, index in chosen.items()}
    parts: dict[str, list[tuple[int, PerDevice]]] = {}
    for number, members in enumerate(by_row.sets):
        for key, index in indices(anatomy, members).items():
            parts.setdefault(key, []).append((number, PerDevice(index, sizes[key])))
    return {key: ChosenColumns(each, by_row) for key, each in parts.items()}
