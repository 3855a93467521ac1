"""Which rows of an activation belong to which view, while one pass carries the patched model and its donor at once."""

import contextlib
import weakref
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from safety_neurons.errors import UsageError
from safety_neurons.interventions.targets import Subject
from safety_neurons.model.experts import ExpertRows


@runtime_checkable
class Sharing(Protocol):
    """A running patch whose passes may carry rows that are not the caller's."""

    def rows(self, subject: Subject) -> tuple[int, int, int] | None:
        """First and last (excluded) row of the batch that belong to a view, and the tokens of each row; None where all do."""


_RUNNING: "weakref.WeakKeyDictionary[nn.Module, Sharing]" = weakref.WeakKeyDictionary()


def own_rows(subject: Subject, activation: Float[Tensor, "batch token neuron"] | ExpertRows) -> Bool[Tensor, "*rows 1"] | None:
    """Which rows of an activation belong to a view of the model; None stands for all of them."""
    running = _RUNNING.get(subject.body)
    span = None if running is None else running.rows(subject)
    if span is None:
        return None
    first, last, tokens = span
    if isinstance(activation, ExpertRows):
        token = activation.token_index[:, None]
        return (token >= first * tokens) & (token < last * tokens)
    row = torch.arange(activation.shape[0], device=activation.device)[:, None, None]
    return (row >= first) & (row < last)


def active(subject: Subject) -> contextlib.AbstractContextManager[Any]:
    """The context in which a view's own adapters act; nothing while a patch on the model decides which of them act where."""
    return contextlib.nullcontext() if subject.body in _RUNNING else subject.active()


def start(body: nn.Module, running: Sharing) -> None:
    """Announces a patch on a decoder stack.

    Raises:
        UsageError: One is running already.
    """
    if body in _RUNNING:
        raise UsageError("this model is being patched already; join the neuron sets (a | b) and patch once")
    _RUNNING[body] = running


def stop(body: nn.Module) -> None:
    """Takes the announcement back."""
    _RUNNING.pop(body, None)
