"""From activations at every token to one number a neuron: at the last token, their mean, or their windowed maximum, pass by pass."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from safety_neurons.errors import UsageError

KINDS = ("last", "mean", "max")
WINDOW = 8


@dataclass(frozen=True, order=True)
class Pooling:
    """How the activations of a neuron at the tokens of a text become one number.

    Attributes:
        kind: `last`: at the last token. `mean`: over all tokens, special ones and those of the template included. `max`: the largest mean
            over `window` consecutive tokens; of a text that is shorter, the mean over all its tokens.
        window: tokens of a window of `max`; 0 for the others.
    """

    kind: str = "last"
    window: int = 0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UsageError(f"pooling {self.kind!r} is unknown; expected one of {', '.join(KINDS)}")
        if self.kind == "max" and self.window < 1:
            raise UsageError(f"a window of {self.window} tokens; expected at least 1")
        if self.kind != "max" and self.window:
            raise UsageError(f"a window of {self.window} tokens with pooling {self.kind!r}; only max has windows")

    @classmethod
    def of(cls, pooling: "Pooling | str", window: int | None = None) -> "Pooling":
        """The pooling that a word means, with a window where it is `max` (8 tokens where none is named)."""
        if isinstance(pooling, Pooling):
            return pooling
        return cls(pooling, (window or WINDOW) if pooling == "max" else 0)

    def __str__(self) -> str:
        return f"max over windows of {self.window}" if self.kind == "max" else self.kind


class Pool:
    """Pools activations that arrive pass by pass: a whole prompt, its chunks, or one token after another.

    Args:
        pooling: how.
    """

    def __init__(self, pooling: Pooling) -> None:
        self.pooling = pooling
        self._last: Tensor | None = None
        self._sum: Tensor | None = None
        self._count: Tensor | None = None
        self._largest: Tensor | None = None
        self._tail: tuple[Tensor, Tensor] | None = None

    def add(self, values: Float[Tensor, "batch token neuron"], real: Bool[Tensor, "batch token"] | None) -> None:
        """The activations of the tokens that came next.

        Args:
            values: padding may hold anything, NaN too.
            real: which tokens are no padding; None where all are.
        """
        if self.pooling.kind == "last":
            self._last = values[:, -1] if real is None else _last_real(values, real, self._last)
            return
        if real is not None:
            values = torch.where(real[:, :, None], values, 0)
        count = values.new_full((len(values),), values.shape[1]) if real is None else real.sum(1).to(values.dtype)
        total = values.sum(1)
        self._sum = total if self._sum is None else self._sum + total
        self._count = count if self._count is None else self._count + count
        if self.pooling.kind == "max":
            self._add_windows(values, real)

    def _add_windows(self, values: Tensor, real: Tensor | None) -> None:
        window = self.pooling.window
        here = torch.ones(values.shape[:2], dtype=torch.bool, device=values.device) if real is None else real
        if self._tail is not None:
            values, here = torch.cat([self._tail[0], values], 1), torch.cat([self._tail[1], here], 1)
        if window > 1:
            self._tail = (values[:, 1 - window :], here[:, 1 - window :])
        if values.shape[1] < window:
            return
        means = values.unfold(1, window, 1).mean(-1)
        whole = here.unfold(1, window, 1).all(-1)
        largest = torch.where(whole[:, :, None], means, -torch.inf).amax(1)
        # A NaN inside a whole window has to come through: amax keeps it.
        self._largest = largest if self._largest is None else torch.maximum(self._largest, largest)

    def result(self) -> Float[Tensor, "batch neuron"]:
        """One number a row and neuron, over all tokens so far; more may be added afterwards."""
        if self.pooling.kind == "last":
            assert self._last is not None
            return self._last
        assert self._sum is not None
        assert self._count is not None
        mean = self._sum / self._count[:, None]
        if self._largest is None:
            return mean
        return torch.where((self._count >= self.pooling.window)[:, None], self._largest, mean)


def _last_real(values: Tensor, real: Tensor, before: Tensor | None) -> Tensor:
    """The values at each row's last real token; those of an earlier pass where this one holds none."""
    places = torch.arange(1, real.shape[1] + 1, device=real.device)
    last = (real * places).amax(1) - 1
    found = values[torch.arange(len(values), device=values.device), last.clamp(min=0)]
    return found if before is None else torch.where((last >= 0)[:, None], found, before)
