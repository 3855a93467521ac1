"""The probe pass: random tokens through a loaded model, with activations and module boundaries kept for the proof."""

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from safety_neurons.errors import NumericalError
from safety_neurons.model.hooks import Editor, around, editing, reading
from safety_neurons.model.parts import Anatomy, unwrapped

TOKENS = 6
"""Tokens of a probe row."""


@dataclass(frozen=True)
class Seen:
    """What one pass showed: activations by key, and by module what it was given and what it put out."""

    values: dict[str, Any]
    boundaries: dict[nn.Module, tuple[tuple[Any, ...], Any]]
    logits: Tensor


class Probe:
    """Random tokens and passes over them. Nothing global is seeded."""

    def __init__(self, model: nn.Module, seed: int) -> None:
        self.model = model
        body: Any = unwrapped(model)
        vocabulary = int(body.config.get_text_config().vocab_size)
        generator = torch.Generator().manual_seed(seed)
        self.ids = torch.randint(0, vocabulary, (2, TOKENS), generator=generator).to(body.get_input_embeddings().weight.device)

    def rows(self, n: int) -> Int[Tensor, "row token"]:
        """The first row of tokens `n` times."""
        return self.ids[:1].expand(n, -1).contiguous()

    def run(self, ids: Int[Tensor, "batch token"] | None = None) -> Float[Tensor, "batch token vocab"]:
        """Logits of a pass without cache.

        Raises:
            NumericalError: they are not finite.
        """
        ids = self.ids if ids is None else ids
        logits = self.model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
        if not bool(torch.isfinite(logits).all()):
            raise NumericalError("the model gives NaN or infinity on random tokens, finite logits were expected; check weights and dtype")
        return logits

    def step(self, anatomy: Anatomy, keys: Iterable[str]) -> None:
        """A decoding step behind a prefill, in which every site has to come by as in a whole pass; nothing where there is no cache."""
        with reading(anatomy, {key: lambda _: None for key in keys}):
            prefill = self.model(input_ids=self.ids[:, :-1], attention_mask=torch.ones_like(self.ids[:, :-1]), use_cache=True)
            cache = getattr(prefill, "past_key_values", None)
            if cache is not None:
                ids, mask = self.ids[:, -1:], torch.ones_like(self.ids)
                self.model(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True)

    def see(
        self,
        anatomy: Anatomy,
        keys: Iterable[str],
        modules: Iterable[nn.Module] = (),
        edits: Mapping[str, Editor] | None = None,
        ids: Int[Tensor, "batch token"] | None = None,
    ) -> Seen:
        """One pass; activations are kept after the edits acted."""
        values: dict[str, Any] = {}
        boundaries: dict[nn.Module, tuple[tuple[Any, ...], Any]] = {}
        with ExitStack() as stack:
            stack.enter_context(editing(anatomy, edits or {}))
            stack.enter_context(reading(anatomy, {key: _keep(values, key) for key in keys}))
            for module in dict.fromkeys(modules):
                before, after = _boundary(boundaries, module)
                stack.enter_context(around(module, before=before, after=after))
            logits = self.run(ids)
        return Seen(values, boundaries, logits)


def _keep(into: dict[str, Any], name: str) -> Callable[[Any], None]:
    def reader(values: Any) -> None:
        if isinstance(values, Tensor):
            into[name] = values.clone()
        else:
            into.setdefault(name, []).append(values)

    return reader


def _boundary(into: dict[nn.Module, tuple[tuple[Any, ...], Any]], module: nn.Module) -> tuple[Callable[..., None], Callable[..., None]]:
    given: list[tuple[Any, ...]] = []

    def before(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given.append(tuple(value.clone() if isinstance(value, Tensor) else value for value in (*args, *kwargs.values())))

    def after(output: Any) -> None:
        into[module] = (given[-1], output.clone() if isinstance(output, Tensor) else output)

    return before, after


def tolerance(dtype: torch.dtype) -> float:
    """How far two ways to the same numbers may be apart, relative to the largest of them."""
    return {torch.float64: 1e-6, torch.float32: 2e-4, torch.float16: 2e-2, torch.bfloat16: 8e-2}.get(dtype, 1e-1)


def same(found: Tensor, expected: Tensor) -> bool:
    """Whether two tensors agree within what their type can tell."""
    if found.shape != expected.shape:
        return False
    difference = (found.double() - expected.double()).abs().max()
    return bool(difference <= tolerance(expected.dtype) * expected.double().abs().max().clamp(min=1e-30))
