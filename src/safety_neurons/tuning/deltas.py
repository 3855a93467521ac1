"""Trainable rows and columns beside frozen projections: the only thing that tuning trains.

A delta is a small dense parameter per site: `[n, in]` for the selected rows of `q k v gate up`, `[out, n]` for the selected columns of
`o down`. The projection itself is called as it is (fused, transposed, quantised, adapted) and never needs a weight gradient; bias entries
stay frozen.

| what | in which type |
|---|---|
| the parameter, its gradient, its optimizer state | float32 (float64 on a float64 model) |
| its product with the input, the gradients of both | float32 (float64), autocast or not |
| the sum with the projection's output | float32 (float64), then one rounding to the type of that output |

So under bfloat16 an update of 1e-6 is kept in the parameter, however small it is beside the weight; the forward pass shows of it what one
rounding of the sum leaves.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class Part(NamedTuple):
    """One site of a projection: which of its features are trained."""

    site: str
    side: str
    """`output` for rows, `input` for columns."""
    positions: Int[Tensor, " neuron"]
    """Features of the projection on that side, in the order of the set's members."""


class Beside(nn.Module):
    """Trainable deltas beside frozen weights.

    Attributes:
        enabled: whether they act; off, what is beside them computes what it did before, bit for bit.
        trained_beside: says to the anatomy that parameters held here belong to no site.
    """

    trained_beside = True

    def __init__(self) -> None:
        super().__init__()
        self.enabled = True

    def deltas(self) -> dict[str, nn.Parameter]:
        """The parameters by the name of their part."""
        raise AssertionError("every kind of deltas has its own")


class NeuronDelta(Beside):
    """A projection with trainable deltas beside it; `base_layer` is the projection, untouched.

    Args:
        base_layer: what the model called before: a linear map, with its adapters or quantisation.
        in_features: of the linear map.
        out_features: of the linear map.
        parts: its sites that have members; one projection may hold several (`q k v`, `gate up`).
        dtype: of the parameters.
        device: of the parameters.
    """

    def __init__(
        self,
        base_layer: nn.Module,
        in_features: int,
        out_features: int,
        parts: Sequence[Part],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.in_features, self.out_features = in_features, out_features
        self.sites = {part.site: part.side for part in parts}
        for part in parts:
            n = len(part.positions)
            shape = (n, in_features) if part.side == "output" else (out_features, n)
            self.register_parameter(f"delta_{part.site}", nn.Parameter(torch.zeros(shape, dtype=dtype, device=device)))
            self.register_buffer(f"at_{part.site}", part.positions.to(device), persistent=False)
        self.train(base_layer.training)

    @property
    def weight(self) -> Any:
        """The projection's own weight, as models that look at it expect."""
        return self.base_layer.weight

    @property
    def bias(self) -> Any:
        """The projection's own bias."""
        return self.base_layer.bias

    def deltas(self) -> dict[str, nn.Parameter]:
        """The parameters by site."""
        return {site: self.delta(site) for site in self.sites}

    def delta(self, site: str) -> nn.Parameter:
        """The parameter of a site: `[n, in]` for rows, `[out, n]` for columns."""
        return self.get_parameter(f"delta_{site}")

    def positions(self, site: str) -> Int[Tensor, " neuron"]:
        """Features of the projection that a site's delta belongs to."""
        return self.get_buffer(f"at_{site}")

    def forward(self, x: Float[Tensor, "*rows in"], *args: Any, **kwargs: Any) -> Float[Tensor, "*rows out"]:
        """The projection's output with the deltas' share."""
        y = self.base_layer(x, *args, **kwargs)
        if not self.enabled:
            return y
        for site, side in self.sites.items():
            delta, positions = self.delta(site), self.positions(site)
            given = x if x.device == delta.device else x.to(delta.device)
            function = _Rows if side == "output" else _Columns
            y = function.apply(given, y, delta, positions)
        return y

    def added_to(self, weight: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        """A weight `[out, in]` with the deltas added, as a new tensor; the weight itself while the deltas are off."""
        if not self.enabled:
            return weight
        for site, side in self.sites.items():
            weight = add_at(weight, self.delta(site), self.positions(site), side)
        return weight

    def extra_repr(self) -> str:
        """Sites and members."""
        return ", ".join(f"{site}: {len(self.positions(site))}" for site in self.sites)


def add_at(weight: Float[Tensor, "out in"], delta: Tensor, positions: Int[Tensor, " neuron"], side: str) -> Float[Tensor, "out in"]:
    """A weight with a delta added to its rows (`output`) or columns (`input`): summed in the wider type, rounded once to the weight's."""
    axis = 0 if side == "output" else 1
    positions = positions.to(weight.device)
    return weight.index_copy(axis, positions, summed(weight.index_select(axis, positions), delta))


def summed(weights: Float[Tensor, "one other"], delta: Float[Tensor, "one other"], dtype: torch.dtype | None = None) -> Tensor:
    """Weights plus their change, in the wider of both types, rounded once to a type (that of the weights by default)."""
    wide = torch.promote_types(weights.dtype, delta.dtype)
    return (weights.to(wide) + delta.to(weights.device, wide)).to(dtype or weights.dtype)


def product(x: Float[Tensor, "row in"], delta: Float[Tensor, "out in"]) -> Float[Tensor, "row out"]:
    """`x @ delta.T` in the type of the delta or float32, whichever is wider, autocast or not."""
    result: Tensor = _Product.apply(x, delta)
    return result


class _Product(torch.autograd.Function):
    """Keeps `x` for the gradient in its own type."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, delta: Tensor) -> Tensor:
        ctx.save_for_backward(x, delta)
        with _full_precision(x):
            return x.to(_wide(delta)) @ delta.to(_wide(delta)).T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, delta = ctx.saved_tensors
        wide = _wide(delta)
        with _full_precision(x):
            for_x = (grad @ delta.to(wide)).to(x.dtype) if ctx.needs_input_grad[0] else None
            for_delta = (grad.T @ x.to(wide)).to(delta.dtype) if ctx.needs_input_grad[1] else None
        return for_x, for_delta


def _wide(delta: Tensor) -> torch.dtype:
    return torch.float64 if delta.dtype == torch.float64 else torch.float32


@contextlib.contextmanager
def _full_precision(values: Tensor) -> Iterator[None]:
    with torch.autocast(values.device.type, enabled=False):
        yield


class _Rows(torch.autograd.Function):
    """`y` with `x @ delta.T` added to the features at `positions`; of the activations, only `x` is kept, in its own type."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, delta: Tensor, positions: Tensor) -> Tensor:
        ctx.save_for_backward(x, delta, positions)
        with _full_precision(x):
            wide = _wide(delta)
            added = (x.to(wide) @ delta.to(wide).T).to(y.device)
            at = positions.to(y.device)
            if y.dtype == wide:
                return y.index_add(-1, at, added)
            return y.index_copy(-1, at, (y.index_select(-1, at).to(wide) + added).to(y.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, delta, positions = ctx.saved_tensors
        needs_x, needs_y, needs_delta, _ = ctx.needs_input_grad
        with _full_precision(x):
            wide = _wide(delta)
            rows = grad.index_select(-1, positions.to(grad.device)).to(delta.device, wide)
            for_x = (rows @ delta.to(wide)).to(x.dtype) if needs_x else None
            for_delta = (flat(rows).T @ flat(x).to(wide)).to(delta.dtype) if needs_delta else None
        return for_x, grad if needs_y else None, for_delta, None


class _Columns(torch.autograd.Function):
    """`y` with `x[..., positions] @ delta.T` added; of the activations, only those features of `x` are kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, delta: Tensor, positions: Tensor) -> Tensor:
        chosen = x.index_select(-1, positions)
        ctx.save_for_backward(chosen, delta, positions)
        ctx.width, ctx.type = x.shape[-1], x.dtype
        with _full_precision(x):
            wide = _wide(delta)
            if y.dtype == wide and y.device == chosen.device:
                added = y.clone(memory_format=torch.contiguous_format)  # never a view: models may add to what they get in place
                added.view(-1, y.shape[-1]).addmm_(flat(chosen).to(wide), delta.to(wide).T)
                return added
            return (y + (chosen.to(wide) @ delta.to(wide).T).to(y.device)).to(y.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        chosen, delta, positions = ctx.saved_tensors
        needs_x, needs_y, needs_delta, _ = ctx.needs_input_grad
        with _full_precision(chosen):
            wide = _wide(delta)
            outputs = grad.to(delta.device, wide)
            for_x = None
            if needs_x:
                for_x = grad.new_zeros((*grad.shape[:-1], ctx.width), dtype=ctx.type, device=chosen.device)
                for_x.index_copy_(-1, positions, (outputs @ delta.to(wide)).to(ctx.type))
            for_delta = (flat(outputs).T @ flat(chosen).to(wide)).to(delta.dtype) if needs_delta else None
        return for_x, grad if needs_y else None, for_delta, None


def flat(values: Float[Tensor, "*rows features"]) -> Float[Tensor, "row features"]:
    """All leading axes as one."""
    return values.reshape(-1, values.shape[-1])


def full(tensor: Tensor) -> Tensor:
    """A tensor that is sharded over processes as one whole tensor; any other as it is."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def total_norm(tensors: Mapping[str, Tensor]) -> float:
    """L2 norm over all entries."""
    return float(torch.stack([full(tensor).double().norm().cpu() for tensor in tensors.values()]).norm()) if tensors else 0.0
