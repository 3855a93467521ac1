"""What others do so that safety lasts through a fine-tune: the change is extrapolated, the update is
projected onto what the change spans, layers are frozen.

All of it is stated on the change of some rows and columns: as a matrix, a change is zero elsewhere, so its
singular vectors and its Gram matrix are those of the trained part.
"""

import dataclasses
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from safety_neurons.errors import UsageError
from safety_neurons.model import LanguageModel
from safety_neurons.neurons import NeuronSet, parse_key
from safety_neurons.tuning.artefacts import Delta
from safety_neurons.tuning.protect import weights_of

Axis = Literal[0, 1]
"""Of a matrix `[out, in]`, along which neurons lie: 0 for rows, 1 for columns."""


def extrapolated(delta: Delta, rank: int = 6, factor: float = 1.25) -> Delta:
    """The change with its part of low rank added once more, times a factor: Δ + α · U_k U_kᵀ Δ.

    Args:
        delta: from safety tuning.
        rank: k, left singular vectors of every matrix.
        factor: α.

    Raises:
        UsageError: a rank below one, or a factor below zero.

    Source: Perin et al., COLM 2025 (LoX), equation 3. Differs: the change of a set of rows and columns rather
    than that of all weights, so that a rank above the neurons of a matrix takes the whole change.
    """
    if rank < 1 or factor < 0:
        raise UsageError(f"rank {rank} and factor {factor}: expected a rank above 0 and a factor from 0 on")
    tensors = {}
    for key, change in delta.tensors.items():
        left, values, right = torch.linalg.svd(change.double(), full_matrices=False)
        low = (left[:, :rank] * values[:rank]) @ right[:rank]
        tensors[key] = (change.double() + factor * low).to(change.dtype)
    return dataclasses.replace(delta, tensors=tensors)


def aligned_part(
    update: Float[Tensor, "out in"], change: Tensor, positions: Tensor, axis: Axis
) -> Float[Tensor, "out in"]:
    """V Vᵀ ΔW / ‖V‖, where V is the change put into a matrix of zeros.

    Args:
        update: ΔW of the fine-tune.
        change: of some rows `[n, in]` or columns `[out, n]`.
        positions: which.
        axis: along which the neurons lie.

    Source: Hsu et al., NeurIPS 2024 (Safe LoRA), section 3.2, the fast version.
    """
    wide = change.to(update)
    norm = wide.norm().clamp(min=torch.finfo(update.dtype).tiny)
    if axis == 1:
        return wide @ (wide.T @ update) / norm
    part = torch.zeros_like(update)
    part[positions] = wide @ (wide.T @ update[positions]) / norm
    return part


@dataclasses.dataclass(frozen=True)
class Projected:
    """What a projection did: matrices whose update was replaced, and matrices that the change is in."""

    replaced: int
    matrices: int


def project_update(
    model: LanguageModel, start: LanguageModel, delta: Delta, threshold: float = 0.5
) -> Projected:
    """Replace the update of every matrix that the safety tuning changed by its part along that change, where
    both point apart: their cosine is below a threshold.

    Args:
        model: fine-tuned, adapters merged; it is changed.
        start: what the fine-tune began with.
        delta: of the safety tuning that `start` has in its weights.
        threshold: τ.

    Source: Hsu et al., NeurIPS 2024 (Safe LoRA), equation 2. Differs: any update, not only that of a LoRA; an
    aligned and an unaligned model differ in the tuned rows and columns alone, so that matrices without any
    stay as they were fine-tuned.
    """
    replaced = 0
    with torch.no_grad():
        for key, members in delta.neurons.items():
            everything = NeuronSet({key: range(model.table.sizes[key])}, model.table)
            now, before = (next(weights_of(one, everything)) for one in (model, start))
            axis: Axis = 1 if parse_key(key).site in ("o", "down") else 0
            wide = torch.promote_types(now.tensor.dtype, torch.float32)
            old, new = (
                (each.read().T if each.transposed else each.read()).to(wide) for each in (before, now)
            )
            update = new - old
            positions = torch.from_numpy(members.copy()).to(update.device)
            part = aligned_part(update, delta.tensors[key].to(update.device), positions, axis)
            product = float(update.norm() * part.norm())
            if not product or float((update * part).sum()) / product < threshold:
                changed = (old + part).to(now.tensor.dtype)
                now.write(changed.T if now.transposed else changed)
                replaced += 1
    return Projected(replaced, len(delta.tensors))


def layers_to_freeze(
    model: LanguageModel, neurons: NeuronSet, share: float, *, first: bool
) -> tuple[int, ...]:
    """The first layers, or those that hold most of a set's parameters; at least one.

    Args:
        model: whose layers.
        neurons: of the set.
        share: of the layers.
        first: the first ones.

    Raises:
        UsageError: a share that is none.

    Source: Li et al., ICLR 2025 (safety layers), section 4. Differs: the layers are those of the safety
    neurons, not the ones between which the angles of normal and harmful pairs grow.
    """
    if not 0 < share <= 1:
        raise UsageError(f"share {share} of the layers: expected one above 0 and at most 1")
    n_layers = len(model.anatomy.layers)
    wanted = max(1, round(share * n_layers))
    if first:
        return tuple(range(wanted))
    held = dict.fromkeys(range(n_layers), 0)
    for key, members in neurons.items():
        held[parse_key(key).layer] += len(members) * model.table[key].weights_per_neuron
    return tuple(sorted(sorted(held, key=lambda layer: (-held[layer], layer))[:wanted]))
