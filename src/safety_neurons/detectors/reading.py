"""Two models that are compared: reading both on the same batch, at the positions that count."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from safety_neurons.errors import UsageError
from safety_neurons.model import LanguageModel, hooks
from safety_neurons.model.batches import Batch, forward
from safety_neurons.model.hooks import evaluating


@dataclass(frozen=True)
class PositionRows:
    """A site's activations at the positions that count.

    Attributes:
        values: one row per position, in float32 or wider.
        at: number of the position each row is of, ascending (an expert has rows only for the tokens routed to it).
    """

    values: Float[Tensor, "row neuron"]
    at: Int[Tensor, " row"]


def rows_at(values: Any, positions: Int[Tensor, " position"]) -> PositionRows:
    """What a reader got, at flat positions (batch × token): selected by index, never multiplied by a mask."""
    if isinstance(values, Tensor):
        taken = values.flatten(0, 1)[positions.to(values.device)]
        return PositionRows(_widened(taken), torch.arange(len(positions), device=values.device))
    order = torch.searchsorted(positions.to(values.token_index.device), values.token_index).clamp(max=len(positions) - 1)
    counted = (positions.to(order.device)[order] == values.token_index).nonzero().squeeze(1)
    at, place = order[counted].sort()
    return PositionRows(_widened(values.values[counted[place]]), at)


def in_both(first: PositionRows, second: PositionRows) -> tuple[PositionRows, PositionRows]:
    """The rows of positions that both have, on the second's device (two models may route a token to different experts)."""
    first = PositionRows(first.values.to(second.values.device), first.at.to(second.at.device))
    if torch.equal(first.at, second.at):
        return first, second
    left = torch.isin(first.at, second.at).nonzero().squeeze(1)
    right = torch.isin(second.at, first.at).nonzero().squeeze(1)
    return PositionRows(first.values[left], first.at[left]), PositionRows(second.values[right], second.at[right])


def _widened(values: Tensor) -> Tensor:
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values.clone()


def writer_of(base: LanguageModel, aligned: LanguageModel, generate_with: str) -> LanguageModel:
    """The model that writes the completions."""
    if generate_with not in ("base", "aligned"):
        raise UsageError(f"generate-with {generate_with!r} is unknown: use base or aligned")
    return base if generate_with == "base" else aligned


@contextlib.contextmanager
def comparing(base: LanguageModel, aligned: LanguageModel) -> Iterator[None]:
    """Both models in evaluation mode for a block."""
    with evaluating(base.model), evaluating(aligned.model):
        yield


def read(lm: LanguageModel, batch: Batch, readers: Mapping[str, Callable[..., None]]) -> None:
    """One forward pass of one model over the batch, with its adapters active, its head left out and no gradients."""
    with lm.active(), hooks.reading(lm.anatomy, readers) as firings, torch.no_grad():
        forward(lm.model, batch.to(lm.device))
        firings.check(ran=True)


def donated(lm: LanguageModel, batch: Batch, keys: Iterable[str]) -> dict[str, Any]:
    """The activations of these sites in a model that reads the batch, as `hooks.reading` gives them, in memory of their own."""
    donors: dict[str, Any] = {}

    def keep(key: str) -> Callable[[Any], None]:
        def reader(values: Any) -> None:
            donors[key] = values.detach().clone() if isinstance(values, Tensor) else replace(values, values=values.values.clone())

        return reader

    read(lm, batch, {key: keep(key) for key in keys})
    return donors


def chosen_rows(batch: Batch, starts: Sequence[int], stops: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Flat indices (into batch × token) of the positions that count, sequence by sequence, and which row of the batch each is of."""
    device = batch.input_ids.device
    rows = [
        torch.arange(start, stop, device=device) + row * batch.width for row, (start, stop) in enumerate(zip(starts, stops, strict=True))
    ]
    lengths = torch.tensor([len(part) for part in rows], device=device)
    return torch.cat(rows), torch.repeat_interleave(torch.arange(len(rows), device=device), lengths)
