"""From weights to neurons: which share of a neuron's weights matters on one text and not on another."""

import numpy as np


def kept_share(safety: np.ndarray, utility: np.ndarray | None, size: int, safety_share: float, utility_share: float) -> np.ndarray:
    """Of each neuron, the share of weights among the largest of the matrix on safety and not among the largest on utility.

    Args:
        safety: one importance per weight, neuron after neuron.
        utility: the same on the other text; None where there is none.
        size: neurons of the matrix.
        safety_share: share of the matrix's weights that counts as important for safety, at least one weight.
        utility_share: the same for utility.

    Returns:
        One number from 0 to 1 per neuron.

    Source: the set difference of Wei et al. (ICML 2024, arXiv 2402.05162), section 3.3.
    Differs: they take single weights away; this counts them per row or column.
    """
    kept = _largest(safety, safety_share)
    if utility is not None:
        kept &= ~_largest(utility, utility_share)
    share: np.ndarray = kept.reshape(size, -1).mean(1)
    return share


def _largest(values: np.ndarray, share: float) -> np.ndarray:
    chosen = np.zeros(values.size, bool)
    chosen[np.argsort(-values.ravel(), kind="stable")[: max(1, round(share * values.size))]] = True
    return chosen
