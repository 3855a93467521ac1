"""Deactivate neurons: act as if their parameters were zero."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from safety_neurons.interventions.rows import active, own_rows
from safety_neurons.interventions.targets import PerDevice, Subject, indices
from safety_neurons.model.experts import ExpertRows
from safety_neurons.model.hooks import editing
from safety_neurons.model.modes import evaluating
from safety_neurons.neurons import NeuronSet


@contextlib.contextmanager
def deactivated(model: Any, *neuron_sets: NeuronSet | Mapping[str, Any]) -> Iterator[Any]:
    """Runs the model as if the parameters of some neurons were zero, inside a ``with`` block.

    The activation of every chosen neuron is set to zero at every token, which gives the logits of a model whose weight row (``q k v gate
    up``, with its bias entry) or weight column (``o down``) is zero; the share that an applied adapter adds to it is zero as well. Values
    are filled in by index and never multiplied by a mask, so an infinite or undefined activation is silenced too. ``generate`` with its
    key-value cache, plain forward passes and `LanguageModel.complete` all act this way, in evaluation mode (no dropout); leaving the block
    restores the model bit for bit, modes included.

    Source: Zhao et al., ICLR 2025, section 2 (deactivation of a neuron).
    Differs: weights are not written; activations are masked, so quantised and shared weights work and nothing has to be restored.

    Args:
        model: A `LanguageModel` or a Hugging Face model.
        *neuron_sets: Sets to deactivate together (their union). Contexts may be nested.

    Yields:
        The model that was passed in.

    Raises:
        ForeignModelError: A set was found on another architecture.
        NeuronError: An index outside the model's sites.
    """
    subject = Subject.of(model)
    chosen = indices(subject.anatomy, *neuron_sets)
    with evaluating(subject.model), active(subject), contextlib.ExitStack() as stack:
        if chosen:
            sizes = subject.anatomy.table.sizes
            editors = {key: _silencer(PerDevice(index, sizes[key]), subject) for key, index in chosen.items()}
            stack.enter_context(editing(subject.anatomy, editors))
        yield model


def _silencer(index: PerDevice, subject: Subject) -> Callable[[Any], Tensor]:
    def silence(activation: Float[Tensor, "batch token neuron"] | ExpertRows) -> Float[Tensor, "*rows neuron"]:
        values = activation.values if isinstance(activation, ExpertRows) else activation
        silenced = values.index_fill(-1, index.on(values.device), 0)
        own = own_rows(subject, activation)
        return silenced if own is None else torch.where(own, silenced, values)

    return silence
