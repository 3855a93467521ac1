"""Perplexity and divergence: what a treatment costs on text that has nothing to do with safety."""

import contextlib
import math
from collections.abc import Callable
from typing import Any

from safety_neurons.model import LanguageModel, kl_divergence, token_losses
from safety_neurons.model.measures import BatchSize
from safety_neurons.prompts import Prompts

Treatment = Callable[[], contextlib.AbstractContextManager[Any]]


def perplexity(
    model: LanguageModel, text: Prompts, treatment: Treatment = contextlib.nullcontext, *, batch_size: BatchSize = "auto"
) -> float | None:
    """exp(mean negative log-likelihood per token) of the text, each record fed as it stands, without a template.

    None where no record has a token to predict.
    """
    with treatment():
        losses = token_losses(model, text.texts, batch_size=batch_size)
    return math.exp(losses.total / losses.n_tokens) if losses.n_tokens else None


def divergence(model: LanguageModel, prompts: Prompts, treatment: Treatment, *, batch_size: BatchSize = "auto") -> float | None:
    """Mean KL(untreated ‖ treated) per prompt token, in nats, over templated prompts. None where there is no token."""
    return kl_divergence(model, [encoded.ids for encoded in model.encode(prompts)], treatment, batch_size=batch_size)
