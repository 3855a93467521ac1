"""Norms on queries and keys as formulas: what a layer's own norm module does to a head, and what removing one entry does to it."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn


@dataclass(frozen=True)
class NormChange:
    """How the normed state moves when raw entry d of a head moves by −δ: α · (normed − bias) + ω · weight + β · e_d, per token and d."""

    along: Float[Tensor, "token head dim"] | None
    """α: the rescaling of what was there; None where there is no norm."""
    uniform: Float[Tensor, "token head dim"] | None
    """ω: what the moved mean adds along the norm's weight; None unless the norm subtracts a mean."""
    single: Float[Tensor, "token head dim"]
    """β: the entry itself."""


@dataclass(frozen=True)
class NormFormula:
    """A root-mean-square or layer norm over each head, or over all heads together."""

    weight: Float[Tensor, "head dim"]
    bias: Float[Tensor, "head dim"] | None
    eps: float
    centred: bool
    across_heads: bool

    def _moments(self, raw: Float[Tensor, "token head dim"]) -> tuple[Tensor, Tensor]:
        """Mean (0 when not centred) and mean square about it plus eps, per token and head (one head where the norm spans all)."""
        axes = (-2, -1) if self.across_heads else (-1,)
        mean = raw.mean(axes, keepdim=True) if self.centred else torch.zeros_like(raw[..., :1, :1])
        return mean, (raw - mean).square().mean(axes, keepdim=True) + self.eps

    def without_bias(self, raw: Float[Tensor, "token head dim"]) -> Float[Tensor, "token head dim"]:
        """The normed state before the norm's bias is added."""
        mean, square = self._moments(raw)
        return (raw - mean) * square.rsqrt() * self.weight.to(raw)

    def __call__(self, raw: Float[Tensor, "token head dim"]) -> Float[Tensor, "token head dim"]:
        """The normed state."""
        normed = self.without_bias(raw)
        return normed if self.bias is None else normed + self.bias.to(raw)

    def change(self, raw: Float[Tensor, "token head dim"], delta: Float[Tensor, "token head dim"]) -> NormChange:
        """What taking `delta` off one raw entry does, for every entry on its own."""
        mean, square = self._moments(raw)
        size = raw.shape[-1] * (raw.shape[-2] if self.across_heads else 1)
        moved = (delta.square() - 2 * (raw - mean) * delta) / size
        if self.centred:
            moved = moved - (delta / size).square()
        after = square + moved
        ratio = (square / after).sqrt()
        step = ratio * delta * square.rsqrt()
        return NormChange(
            along=-moved / after / (ratio + 1),
            uniform=step / size if self.centred else None,
            single=-step * self.weight.to(raw),
        )


def norm_candidates(module: nn.Module, n_heads: int, head_dim: int) -> Iterator[NormFormula]:
    """Formulas that agree with the module on random input, most likely first; none when it is no norm of that many heads."""
    weight, bias, eps = _parameters(module)
    if eps is None:
        return
    shape = (n_heads, head_dim)
    across = weight is not None and weight.numel() == n_heads * head_dim and n_heads > 1 and weight.ndim == 1
    base = torch.ones(shape) if weight is None else _per_head(weight, shape)
    if base is None:
        return
    shift = None if bias is None else _per_head(bias, shape)
    for scale in (base, base + 1):
        for centred in (False, True):
            formula = NormFormula(scale, shift, eps, centred, across)
            if _agrees(module, formula, shape):
                yield formula


def _parameters(module: nn.Module) -> tuple[Tensor | None, Tensor | None, float | None]:
    """Weight, bias and eps of a norm, those of a list of norms (one per head) stacked."""
    weights = [value.detach() for name, value in module.named_parameters() if name.endswith("weight")]
    biases = [value.detach() for name, value in module.named_parameters() if name.endswith("bias")]
    eps = next(
        (
            float(value)
            for part in module.modules()
            for name in ("variance_epsilon", "eps", "epsilon")
            if (value := getattr(part, name, None))
        ),
        None,
    )
    join = lambda parts: None if not parts else parts[0] if len(parts) == 1 else torch.stack(parts)  # noqa: E731
    return join(weights), join(biases), eps


def _per_head(values: Tensor, shape: tuple[int, int]) -> Tensor | None:
    if values.numel() == shape[0] * shape[1]:
        return values.reshape(shape)
    return values.expand(shape) if values.shape == shape[1:] else None


def _agrees(module: nn.Module, formula: NormFormula, shape: tuple[int, int]) -> bool:
    parameter = next(module.parameters(), formula.weight)
    noise = torch.randn((5, *shape), generator=torch.Generator().manual_seed(0)).to(parameter)
    expected = formula(noise if noise.dtype is torch.float64 else noise.float())
    for layout in ((5, -1),) if formula.across_heads else ((5, *shape), (1, shape[0], 5, shape[1])):
        fed = noise.transpose(0, 1)[None] if len(layout) == 4 else noise.reshape(layout)
        try:
            with torch.no_grad():
                got = module(fed)
        except (RuntimeError, ValueError, IndexError):
            continue
        if got.numel() != expected.numel():
            continue
        got = got[0].transpose(0, 1) if len(layout) == 4 else got.reshape(expected.shape)
        tolerance = 1e-4 if parameter.dtype in (torch.float32, torch.float64) else 5e-2
        if bool(((got.to(expected) - expected).abs().max() <= tolerance * expected.abs().max()).item()):
            return True
    return False
