"""Gradient descent that every training of the project shares: optimizer steps under a schedule, and padded examples with labels."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from safety_neurons.errors import NumericalError

IGNORED = -100
"""Label of a token that carries no loss."""


class Descended(NamedTuple):
    """One optimizer step: the loss before it, and the norm of its gradient before clipping."""

    loss: float
    norm: float


def clip_to_one(parameters: Sequence[Tensor]) -> float:
    """Clip the gradients at a joint L2 norm of 1; the norm before."""
    return float(torch.nn.utils.clip_grad_norm_(parameters, 1.0))


def descend(
    optimizer: torch.optim.Optimizer,
    backward: Callable[[int], float],
    rate: Callable[[float, int], float],
    steps: range,
    *,
    clip: Callable[[Sequence[Tensor]], float] = clip_to_one,
    subject: Callable[[int], str] = lambda _step: "",
) -> Iterator[Descended]:
    """Take one optimizer step for every item that is asked for, so that the caller may look, save or end between two.

    Args:
        optimizer: its groups' learning rates are those at the top of the schedule.
        backward: called with the step (from 0), leaves gradients in the parameters and returns the loss.
        rate: the learning rate of a step, from the one at the top of the schedule and the step.
        steps: which steps are taken; the last one's number is what messages count to.
        clip: scales the gradients in place and returns their norm before.
        subject: what an error says of a step's examples.

    Raises:
        NumericalError: the loss or its gradient is not a number; the parameters are those before this step.
    """
    full = [group["lr"] for group in optimizer.param_groups]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for step in steps:
        loss = backward(step)
        norm = clip(parameters)
        for name, value in (("loss", loss), ("gradient's norm", norm)):
            if not math.isfinite(value):
                raise NumericalError(
                    f"the {name} became {value} at step {step + 1} of {steps.stop}{subject(step)}, a number was expected; nothing "
                    "was changed by this step; lower the learning rate, or use --dtype bfloat16 or float32"
                )
        for group, highest in zip(optimizer.param_groups, full, strict=True):
            group["lr"] = rate(highest, step)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        yield Descended(loss, norm)


def padded(examples: Sequence[tuple[Sequence[int], int]], pad_id: int) -> tuple[Int[Tensor, "batch token"], Int[Tensor, "batch token"]]:
    """Right-padded ids and labels of examples, each with the number of first ids that carry no loss; those labels are -100."""
    length = max(len(ids) for ids, _ in examples)
    inputs = torch.full((len(examples), length), pad_id)
    labels = torch.full((len(examples), length), IGNORED)
    for row, (ids, unlabelled) in enumerate(examples):
        inputs[row, : len(ids)] = torch.tensor(ids)
        labels[row, unlabelled : len(ids)] = inputs[row, unlabelled : len(ids)]
    return inputs, labels
