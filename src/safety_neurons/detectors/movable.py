"""What a mask over units moves from the base model to the aligned one: activations while the base runs, or parameters.

Every searched unit has one entry m of the mask: 0 is the base's, 1 the aligned model's, and what lies between is a mixture of both.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from safety_neurons.detectors.gradients import ScoredRow, mask_gradients
from safety_neurons.detectors.pairs import donated
from safety_neurons.detectors.swap_attribution import SoftSwap
from safety_neurons.errors import UnsupportedModelError
from safety_neurons.model import LanguageModel
from safety_neurons.model.passes import Batch
from safety_neurons.neurons import parse_key

KEPT_DONORS = 2**28
"""Bytes of the aligned model's activations that are kept between rounds; what is beyond is computed again."""


@runtime_checkable
class Movable(Protocol):
    """Something with a mask."""

    @property
    def units(self) -> Mapping[str, Int[Tensor, " entry"]]:
        """By name of a part of the mask, the number (in the model's site table) of the unit that each of its entries moves."""
        ...

    def slopes(
        self, batch: Batch, rows: Sequence[ScoredRow], masks: Mapping[str, Tensor]
    ) -> tuple[dict[str, Float[Tensor, "batch entry"]], Float[Tensor, " batch"]]:
        """Derivative of each row's score with respect to each entry, and the scores; one forward and one backward pass."""
        ...


@dataclass
class Activations:
    """`base + m·(aligned − base)` for the activations of the searched neurons, at every token, in the running base model.

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
    """`base + m·(aligned − base)` for the parameters of the searched units; everything else is the aligned model's."""

    base: LanguageModel
    aligned: LanguageModel
    sizes: Mapping[str, int]

    def __post_init__(self) -> None:
        routed = [key for key in self.sizes if parse_key(key).expert is not None or parse_key(key).shared]
        if routed:
            raise UnsupportedModelError(
                f"{routed[0]}: experts' parameters cannot be swapped; use --move activations, or --sites q,k,v,o for this model"
            )
        self._swap = SoftSwap(self.base, self.aligned, self.sizes)
        numbers = self.base.table.units()
        sites = {"mlp": "down"}
        parts = {name: name.rsplit(".", 1) for name in self._swap.sizes_of_masks}
        self.units = {name: torch.as_tensor(numbers[f"{layer}.{sites.get(site, site)}"]) for name, (layer, site) in parts.items()}

    def slopes(
        self, batch: Batch, rows: Sequence[ScoredRow], masks: Mapping[str, Tensor]
    ) -> tuple[dict[str, Float[Tensor, "batch entry"]], Float[Tensor, " batch"]]:
        """As the protocol says."""
        return self._swap.slopes(batch, rows, masks)


def _values(donor: Any) -> Tensor:
    values: Tensor = donor if isinstance(donor, Tensor) else donor.values
    return values
