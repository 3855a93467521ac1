"""How far two correct computations in one float type may lie apart: bounds from the number of terms and the
sum of magnitudes.
"""

import numpy as np
import torch


def unit(dtype: torch.dtype) -> float:
    """The largest relative error of one rounded operation."""
    return torch.finfo(dtype).eps / 2


def additions(model: torch.nn.Module) -> int:
    """The terms of all sums on the longest way through a model: as many roundings may stand between a token
    and an activation.
    """
    return sum(min(weight.shape) if weight.dim() > 1 else 0 for weight in model.parameters()) + 1


def of_a_sum(values: np.ndarray, dtype: torch.dtype, before: int = 0) -> float:
    """Bound of the error of sums over the first axis, in any order, of values that came out of `before`
    rounded operations.

    The error of a sum of n terms is at most n - 1 roundings of the sum of their magnitudes (Higham, Accuracy
    and Stability, 4.2). Values that are themselves small differences of large terms are off by roundings of
    those, so the largest column stands for all.
    """
    return 2 * (len(values) + before) * unit(dtype) * float(np.abs(values).sum(0).max(initial=0.0))
