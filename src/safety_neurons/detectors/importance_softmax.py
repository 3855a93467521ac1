"""What many small changes of attention logits do, each on its own: the change of the probabilities, and of what they pass on.

The causal triangle is walked in blocks of rows, so that hidden keys cost little. As exp(l + e) = exp(l) · exp(e), a change e needs no
second pass over the logits l: new probabilities are P · exp(e) / Σ P · exp(e), as long as e is small enough not to overflow.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

SAFE_CHANGE = 25.0
"""Changes of a logit up to this size cannot overflow the ratio form, in float32 either."""
FLOOR = -60.0
"""Logarithm of a probability that counts as none."""
CPU_CHUNK = 2**22
"""Bytes of a chunk of neurons that a processor's caches hold."""


@dataclass(frozen=True)
class LogitChange:
    """Changes of the logits of some heads, one per neuron, as products of small factors.

    The change of neuron c at query m, head r and key n is `left[c, m, r] · right[c, :, n]` for the heads in `own`, plus
    `along[c, m, n] · base[m, r, n]` and `uniform[c, m, n] · flat[m, r, n]` for all heads (axes of `along` and `uniform` may be 1).
    """

    left: Float[Tensor, "neuron token own term"]
    right: Float[Tensor, "neuron term token"]
    own: slice | None = None
    along: Float[Tensor, "neuron query one key"] | None = None
    base: Float[Tensor, "token head token"] | None = None
    uniform: Float[Tensor, "neuron query one key"] | None = None
    flat: Float[Tensor, "token head token"] | None = None

    def block(self, chunk: slice, rows: slice, width: int, start: Tensor | None = None) -> Float[Tensor, "neuron token head key"]:
        """The changes of some neurons at some queries and the first `width` keys, added to `start` where it is given."""
        left, right = self.left[chunk, rows], self.right[chunk, :, :width]
        flat = left.flatten(1, 2)
        if self.base is None:
            single = torch.bmm(flat, right) if start is None else torch.baddbmm(start.flatten(0, 1), flat, right)
            return single.unflatten(1, left.shape[1:3])
        assert self.along is not None
        change = _cut(self.along[chunk], rows, width) * self.base[rows, :, :width]
        change[:, :, slice(None) if self.own is None else self.own] += torch.bmm(flat, right).unflatten(1, left.shape[1:3])
        if self.uniform is not None and self.flat is not None:
            change += _cut(self.uniform[chunk], rows, width) * self.flat[rows, :, :width]
        return change if start is None else change + start

    def bound(self) -> float:
        """No change is larger than this."""
        total = (self.left.abs().amax((1, 2)) * self.right.abs().amax(2)).sum(1)
        for factor, base in ((self.along, self.base), (self.uniform, self.flat)):
            if factor is not None and base is not None:
                total = total + factor.abs().amax((1, 2, 3)) * base.abs().amax()
        return float(total.max())


@dataclass(frozen=True)
class Attended:
    """The heads that change, as they were.

    Attributes:
        logits: scaled logits before the soft-cap.
        log_probabilities: −∞ where a key is hidden.
        softcap: of the layer; None for none.
        sink: share of the attention that a sink takes; None where the layer has none.
    """

    logits: Float[Tensor, "token head token"]
    log_probabilities: Float[Tensor, "token head token"]
    softcap: float | None = None
    sink: Float[Tensor, "token head one"] | None = None

    @cached_property
    def probabilities(self) -> Float[Tensor, "token head token"]:
        """Exactly 0 where a key is hidden."""
        return self.log_probabilities.exp()

    @cached_property
    def floored(self) -> tuple[Float[Tensor, "token head token"], Float[Tensor, "token head token"]]:
        """Logarithms that are nowhere below `FLOOR`, where vectorised exponentials are several times slower, and their exponentials."""
        logarithms = self.log_probabilities.clamp(min=FLOOR)
        return logarithms, logarithms.exp()

    def difference(
        self, change: LogitChange, chunk: slice, rows: slice, width: int, safe: bool, general: bool = False
    ) -> Float[Tensor, "neuron token head key"]:
        """New minus old probabilities of a block; exactly 0 where nothing changes or one key alone is seen."""
        sink = None if self.sink is None else self.sink[rows]
        still: Tensor | None = None
        if safe and self.softcap is None:
            before, old = (part[rows, :, :width] for part in self.floored)
            weights = change.block(chunk, rows, width, before).exp_()
        else:
            before, old = self.log_probabilities[rows, :, :width], self.probabilities[rows, :, :width]
            weights = self._step(change, chunk, rows, width)
            still = (weights == 0).all(-1, keepdim=True) if general else None
            weights = weights.add_(before)
            top = weights.amax(-1, keepdim=True)
            top = (top if sink is None else torch.maximum(top, sink.log())).clamp(min=torch.finfo(top.dtype).min)
            weights = weights.sub_(top).exp_()
            sink = None if sink is None else sink * (-top).exp()
        total, whole = weights.sum(-1, keepdim=True), old.sum(-1, keepdim=True)
        if sink is not None and self.sink is not None:
            total, whole = total + sink, whole + self.sink[rows]
        if still is not None:  # a row that does not change has no change at all, whatever its quotients round to
            return torch.where(still, 0.0, weights.mul_(whole / total).sub_(old))
        return torch.addcdiv(-old, weights, total / whole, out=weights)

    def _step(self, change: LogitChange, chunk: slice, rows: slice, width: int) -> Tensor:
        step = change.block(chunk, rows, width)
        if self.softcap is None:
            return step
        before = self.logits[rows, :, :width]
        return self.softcap * (torch.tanh((before + step) / self.softcap) - torch.tanh(before / self.softcap))


def squared_norms(
    attended: Attended,
    change: LogitChange,
    passed: Float[Tensor, "head token rank"] | None,
    budget: int,
    general: bool = False,
) -> Float[Tensor, " neuron"]:
    """‖Σ over heads of dP · passed‖² for every neuron; ‖dP‖² where `passed` is None.

    Args:
        attended: the heads that change.
        change: one change per neuron.
        passed: value states through a factor of the output projection.
        budget: bytes that a chunk of neurons may take.
        general: whether to use the form for any change without looking how large this one is.
    """
    n_tokens, n_heads = attended.logits.shape[:2]
    n_neurons = change.left.shape[0]
    safe = not general and change.bound() <= SAFE_CHANGE
    result = change.left.new_zeros(n_neurons)
    triangle = None if passed is None else _triangle(passed)
    for rows, width in row_blocks(n_tokens):
        factor = None if triangle is None else _leading(triangle, width, n_heads)
        size = (rows.stop - rows.start) * (n_heads * width * 4 + (0 if factor is None else factor.shape[1]))
        step = chunk_size(size * result.element_size(), budget, result.device)
        for start in range(0, n_neurons, step):
            chunk = slice(start, min(start + step, n_neurons))
            moved = attended.difference(change, chunk, rows, width, safe, general)
            if factor is not None:
                moved = moved.reshape(-1, factor.shape[0]) @ factor
            result[chunk] += torch.linalg.vector_norm(moved.reshape(chunk.stop - start, -1), dim=1).square()
    return result


def _triangle(passed: Float[Tensor, "head token rank"]) -> Float[Tensor, "small token_head"]:
    """R with Rᵀ R = X Xᵀ for the rows X of `passed` in the order (token, head): its first columns serve the first tokens alone."""
    return torch.linalg.qr(passed.transpose(0, 1).flatten(0, 1).T, mode="r").R


def _leading(triangle: Float[Tensor, "small token_head"], width: int, n_heads: int) -> Float[Tensor, "head_token rank"]:
    """The factor for the first `width` tokens, rows in the order (head, token)."""
    part = triangle[: width * n_heads, : width * n_heads].T
    return part.unflatten(0, (width, n_heads)).transpose(0, 1).flatten(0, 1)


def row_blocks(n_tokens: int) -> list[tuple[slice, int]]:
    """Blocks of queries, each with the number of keys that any of them sees."""
    count = max(1, min(8, n_tokens // 16))
    ends = [n_tokens * (number + 1) // count for number in range(count)]
    return [(slice(start, end), end) for start, end in zip([0, *ends[:-1]], ends, strict=True)]


def chunk_size(bytes_per_neuron: int, budget: int, device: torch.device) -> int:
    """Neurons per chunk: as many as the budget holds, on a CPU not more than its caches like."""
    room = min(budget, CPU_CHUNK) if device.type == "cpu" else budget
    return max(1, room // max(1, bytes_per_neuron))


def _cut(factor: Tensor, rows: slice, width: int) -> Tensor:
    factor = factor if factor.shape[1] == 1 else factor[:, rows]
    return factor if factor.shape[3] == 1 else factor[..., :width]
