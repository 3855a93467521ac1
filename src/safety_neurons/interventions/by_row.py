"""Several sets of neurons at once: every row of a batch is treated with a set of its own.

A decoding step reads all weights however few rows it has, and multiplies few rows slowly: sets that are
deactivated, or patched, one after the other take as many generations, together one of more rows.
"""

import dataclasses
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from safety_neurons.errors import DecodeError
from safety_neurons.model.decoding import following
from safety_neurons.neurons import NeuronSet, parse_key


class ByRow:
    """Sets of neurons, of which every row of the passes under way has one.

    In a generation by `LanguageModel`, which tells it of rows that leave the batch.

    Args:
        sets: what rows are treated with.
        which: the number of each row's set, ascending.
    """

    def __init__(self, sets: Sequence[NeuronSet], which: Sequence[int]) -> None:
        self.sets = tuple(sets)
        self._which = torch.tensor(which, dtype=torch.long)
        self._spans: list[slice] = []

    def alike(self) -> Int[Tensor, " row"]:
        """The number of each row's set."""
        return self._which

    def keep(self, _: Any, rows: Int[Tensor, " row"]) -> None:
        """Goes on with some rows."""
        self._which, self._spans = self._which[rows], []

    def spans(self, rows: int) -> list[slice]:
        """The rows of every set.

        Raises:
            DecodeError: a pass of another number of rows.
        """
        if rows != len(self._which):
            raise DecodeError(
                f"{rows} rows arrived where {len(self._which)} have a set of neurons each; "
                "give every set a generation of its own"
            )
        if not self._spans:
            edges = torch.searchsorted(self._which, torch.arange(len(self.sets) + 1)).tolist()
            self._spans = [slice(*edge) for edge in zip(edges, edges[1:], strict=False)]
        return self._spans


def by_row(*given: Any) -> AbstractContextManager[Any]:
    """The context in which sets of rows among these follow the rows; nothing without such."""
    found = next((one for one in given if isinstance(one, ByRow)), None)
    return nullcontext() if found is None else following(found)


@dataclasses.dataclass(frozen=True)
class SetTreatment:
    """An intervention on a set of neurons that is yet to begin: called, it gives the context.

    Attributes:
        intervention: `deactivated` or `patched`.
        models: what it takes before the set.
        neurons: the set.
    """

    intervention: Callable[..., AbstractContextManager[Any]]
    models: tuple[Any, ...]
    neurons: NeuronSet

    def __call__(self) -> AbstractContextManager[Any]:
        """The model under the treatment."""
        return self.intervention(*self.models, self.neurons)

    def joins(self, other: Any) -> bool:
        """Whether rows under both can be answered in one batch.

        Routed experts read each token by itself, and know no rows.
        """
        return (
            isinstance(other, SetTreatment)
            and other.intervention is self.intervention
            and list(map(id, other.models)) == list(map(id, self.models))
            and all(parse_key(key).expert is None for one in (self, other) for key, _ in one.neurons.items())
        )

    def in_rows(self, others: Sequence["SetTreatment"], which: Sequence[int]) -> AbstractContextManager[Any]:
        """The model with rows under one of several treatments each, that join this one.

        Args:
            others: the treatments.
            which: the number of each row's treatment, ascending.
        """
        return self.intervention(*self.models, ByRow([one.neurons for one in others], which))
