"""A guard in memory as the engine and the writer use it."""

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from jaxtyping import Int
from torch import Tensor

from safety_neurons.errors import InputError
from safety_neurons.guard.features import model_lock
from safety_neurons.guard.guard import Guard
from safety_neurons.guard.server.app import Service
from safety_neurons.guard.server.door import Log
from safety_neurons.guard.server.drift import drifts_of
from safety_neurons.guard.server.gate import outcome_of
from safety_neurons.guard.server.metrics import Metrics
from safety_neurons.guard.server.problems import too_long
from safety_neurons.guard.server.settings import Settings
from safety_neurons.guard.server.writing import LocalWriter
from safety_neurons.model import Encoded
from safety_neurons.model.batches import token_budget

_CHARACTERS_A_TOKEN = 16
"""Texts have about four characters a token, and what has four times as many throughout is no text: it is refused unread."""


class Bound:
    """A guard bound to its model: judges batches, and looks on during a prefill.

    Args:
        guard: Bound.
        most: Tokens of a prompt at most; None for what fits the model.
    """

    def __init__(self, guard: Guard, most: int | None = None) -> None:
        self.guard, self.model = guard, guard.bound
        self._most = most

    def prepare(self, prompt: Any) -> Encoded:
        """Token ids of a prompt.

        Raises:
            InputError: The template or the tokenizer cannot take it. Problem: More tokens than are taken.
        """
        try:
            encoded = self.guard.encode(prompt)
        except (TypeError, ValueError, KeyError) as error:
            raise InputError(f"the tokenizer cannot take the prompt ({type(error).__name__})") from error
        if self._most is not None and len(encoded.ids) > self._most:
            raise too_long(len(encoded.ids), self._most)
        return encoded

    def score(self, prepared: Sequence[Encoded]) -> Sequence[Any]:
        """Verdicts, in one batch."""
        return self.guard.score_encoded(prepared, batch_size=len(prepared), top=0)

    @contextlib.contextmanager
    def during(self, mask: Int[Tensor, "batch token"]) -> Iterator[None]:
        """Reads the left-padded pass inside the context."""
        collector = self.guard.collector
        with model_lock(self.model), collector:
            collector.start(mask, left=True)
            yield
            self._features = collector.result()[self.guard.pooling]

    def verdicts(self, truncated: Sequence[bool]) -> Sequence[Any]:
        """Verdicts on the rows of that pass."""
        return self.guard.verdicts(self._features, truncated, top=0)


def serve_guard(guard: Guard, settings: Settings, log: Log = lambda _: None, **further: Any) -> Service:
    """A service around a guard that is bound to its model.

    Args:
        guard: Bound.
        settings: How the service behaves.
        log: Told one event a request.
        **further: As `Service` takes them.
    """
    metrics = Metrics(drifts_of(guard.reference))
    limits = settings.limits
    tokens = min((most for most in (limits.prompt_tokens, guard.bound.max_length) if most), default=None)
    if limits.characters is None and tokens is not None:
        limits = dataclasses.replace(limits, characters=_CHARACTERS_A_TOKEN * tokens)
        settings = dataclasses.replace(settings, limits=limits)
    budget = limits.batch_tokens or token_budget(guard.bound.device)
    bound = Bound(guard, limits.prompt_tokens)
    writer = LocalWriter(guard.bound, bound, lambda verdict: outcome_of(verdict, settings).held, batch_tokens=budget)
    return Service(settings, bound, metrics, writer, log=log, batch_tokens=budget, standing=guard.standing, **further)
