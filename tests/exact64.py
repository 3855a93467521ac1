"""Stock transformers code in real float64: its internal casts to float32 (softmax, norms, rotary embeddings)
are lifted.
"""

from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_PRODUCTS = (torch.matmul, torch.bmm, torch.Tensor.matmul, torch.Tensor.__matmul__)


class Exact64(TorchFunctionMode):
    """While active, whatever would bring a float64 tensor down to float32 leaves it in float64."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if len(args) == 1 and not kwargs:  # most calls, since a tensor's every property is one
            stays = func is torch.Tensor.float and args[0].dtype is torch.float64
            return args[0] if stays else func(*args)
        kwargs = dict(kwargs or {})
        if any(isinstance(value, torch.Tensor) and value.dtype is torch.float64 for value in args):
            kwargs = {
                name: torch.float64 if value is torch.float32 else value for name, value in kwargs.items()
            }
            args = tuple(torch.float64 if value is torch.float32 else value for value in args)
            if (
                func in _PRODUCTS
            ):  # what was no floating number before, such as positions, came down to float32 all the same
                args = tuple(value.double() if isinstance(value, torch.Tensor) else value for value in args)
        return func(*args, **kwargs)
