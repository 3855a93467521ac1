"""Abliteration: directions of the residual stream taken out of every weight that writes into it.

A direction is the difference of the mean residual streams of harmful and harmless prompts at their last
token. What `o`, `down`, the experts' `down` and the embeddings of tokens and positions write is projected
onto the complement of the directions, or projected and stretched to its norm before.
"""

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from safety_neurons.arguments import well_typed
from safety_neurons.errors import InputError, UnsupportedModelError, UsageError
from safety_neurons.interventions.targets import Subject
from safety_neurons.model import LanguageModel
from safety_neurons.model.adapters import is_adapted
from safety_neurons.model.batches import BatchSize
from safety_neurons.model.language_model import Texts as Asked
from safety_neurons.model.passes import read_residual
from safety_neurons.model.sites import DOWN, stored_weight
from safety_neurons.prompt_lists import Prompts


@well_typed
def refusal_directions(
    model: LanguageModel, harmful: Asked, harmless: Asked, *, batch_size: BatchSize = "auto"
) -> Float[Tensor, "layer hidden"]:
    """The mean residual stream of harmful prompts minus that of harmless ones, after every layer, at the last
    token of the templated prompt, in float64.

    Raises:
        InputError: no prompts of a kind.

    Source: Arditi et al., NeurIPS 2024, section 2.3. Differs: at the last token alone.
    """
    means = []
    for name, prompts in (("harmful", harmful), ("harmless", harmless)):
        ids = [encoded.ids for encoded in model.encode(prompts)]
        if not ids:
            raise InputError(f"no {name} prompts arrived; a difference of means needs one or more")
        means.append(torch.from_numpy(read_residual(model, ids, batch_size)).double().mean(0))
    return means[0] - means[1]


def basis_of(
    directions: Float[Tensor, "layer hidden"], layer: int, count: int
) -> Float[Tensor, "direction hidden"]:
    """An orthonormal basis that begins with the direction of one layer.

    What follows are the strongest right singular vectors of all layers' unit directions, once the first is
    taken out of them; so that the basis of a smaller count is the beginning of that of a larger one.

    Raises:
        UsageError: more directions than layers, or a layer without any difference.

    Source: Arditi et al., NeurIPS 2024, section 2.3, for one direction. Differs: further ones by singular
    value decomposition.
    """
    n_layers, hidden = directions.shape
    if not 1 <= count <= min(n_layers, hidden):
        raise UsageError(
            f"{count} directions of {n_layers} layers in {hidden} dimensions: expected from 1 to "
            f"{min(n_layers, hidden)}"
        )
    norms = directions.norm(dim=1, keepdim=True)
    if not float(norms[layer]):
        raise UsageError(
            f"harmful and harmless prompts have one mean after layer {layer}, two were expected; "
            "give other prompts"
        )
    first = directions[layer : layer + 1] / norms[layer]
    units = directions / norms.clamp(min=torch.finfo(directions.dtype).tiny)
    rest = torch.linalg.svd(units - (units @ first.T) @ first, full_matrices=False).Vh
    # A second pass takes out what rounding left along the vectors before.
    return torch.linalg.qr(torch.cat([first, rest[: count - 1]]).T).Q.T


@dataclasses.dataclass(frozen=True)
class StreamWriter:
    """A tensor that writes the residual stream."""

    name: str
    tensor: Tensor
    axis: int
    """Of the residual stream."""
    bias: bool = False


def writers(model: LanguageModel) -> list[StreamWriter]:
    """Every tensor that writes the residual stream: `o` and `down` with their biases, the experts' `down`,
    the token embedding unless the output head is the same tensor, and learned position embeddings.

    Raises:
        UsageError: adapters are on the model. UnsupportedModelError: quantised, off-loaded or
            computed weights.
    """
    if is_adapted(model.model):
        raise UsageError(
            f"{model.name} has adapters, plain weights were expected; merge them first (--merge-adapters)"
        )
    found: dict[int, StreamWriter] = {}

    def add(name: str, holder: Any, attribute: str, axis: int) -> None:
        bias = attribute.endswith("bias")
        if not bias or getattr(holder, attribute, None) is not None:
            tensor = stored_weight(holder, attribute, name)
            found.setdefault(id(tensor), StreamWriter(name, tensor.detach(), axis, bias))

    for key, place in model.anatomy.places.items():
        if place.side == "input":
            part = place.projection
            if not part.readable:
                raise UnsupportedModelError(
                    f"{key}: quantised or off-loaded weights cannot be projected, plain ones were expected; "
                    "load the model unquantised"
                )
            add(key, part.base, "weight", 1 if part.transposed else 0)
            add(f"{key} bias", part.base, "bias", 0)
    for layer in model.anatomy.layers:
        if layer.experts is not None:
            name = f"layers.{layer.index}.experts.down"
            module: Any = layer.experts.module
            add(name, module, DOWN, 2 if layer.experts.transposed else 1)
            add(f"{name} bias", module, f"{DOWN}_bias", 1)
    embedding, head = model.model.get_input_embeddings(), model.model.get_output_embeddings()
    if head is None or head.weight is not embedding.weight:
        add("embedding", embedding, "weight", 1)
    for name, child in Subject.of(model).body.named_children():
        other = isinstance(child, nn.Embedding) and child is not embedding
        if other and child.embedding_dim == model.config.hidden_size:
            add(name, child, "weight", 1)
    return list(found.values())


def without(
    written: Float[Tensor, "*vectors hidden"],
    basis: Float[Tensor, "direction hidden"],
    *,
    keep_norms: bool = False,
) -> Float[Tensor, "*vectors hidden"]:
    """Vectors projected onto the complement of a basis, in the basis' type.

    Args:
        written: along the last axis.
        basis: orthonormal.
        keep_norms: stretch every vector to its norm before; one that lay in the basis stays zero.
    """
    vectors = written.to(basis)
    rest = vectors - (vectors @ basis.T) @ basis
    if keep_norms:
        norm, left = (values.norm(dim=-1, keepdim=True) for values in (vectors, rest))
        # What rounding leaves of a vector in the basis has any direction, and would be stretched along it.
        is_rounding = left <= torch.finfo(basis.dtype).eps ** 0.5 * norm
        rest = torch.where(is_rounding, 0.0, rest * (norm / left))
    return rest


@well_typed
@contextlib.contextmanager
def abliterated(
    model: LanguageModel, directions: Float[Tensor, "direction hidden"], *, keep_norms: bool = False
) -> Iterator[LanguageModel]:
    """The model with directions taken out of every weight that writes the residual stream; afterwards every
    bit is back.

    Norms behind a sub-layer (Gemma 2 and 3) and a tied embedding still write along the directions.

    Args:
        model: without adapters.
        directions: what is taken out, as from `refusal_directions` or `basis_of`.
        keep_norms: what a neuron (a column of `o` or `down`, a token's embedding) writes keeps its norm.

    Raises:
        As `writers`.

    Source: Arditi et al., NeurIPS 2024, section 2.4 (weight orthogonalisation). Differs: a tied embedding
    stays as it is, since its projection would also change the output head; several directions; norms kept by
    the column, so that nothing is put back along a direction.
    """
    if directions.shape[1] != model.config.hidden_size:
        raise UsageError(
            f"directions of {directions.shape[1]} numbers; expected {model.config.hidden_size}, as many as "
            "the residual stream has"
        )
    basis = torch.linalg.qr(directions.double().T).Q.T
    before = [(writer, writer.tensor.clone()) for writer in writers(model)]
    try:
        for writer, values in before:
            moved = values.movedim(writer.axis, -1)
            new = without(moved, basis.to(values.device), keep_norms=keep_norms and not writer.bias)
            writer.tensor.copy_(new.movedim(-1, writer.axis))
        yield model
    finally:
        for writer, values in before:
            writer.tensor.copy_(values)


def share_along(
    model: LanguageModel,
    prompts: Prompts,
    basis: Float[Tensor, "direction hidden"],
    *,
    batch_size: BatchSize = "auto",
) -> float:
    """Norm of the residual stream's part along a basis as a share of its norm: the mean over prompts and
    layers, at the last token.

    Source: none; it says how much of the directions an abliteration left.
    """
    ids = [encoded.ids for encoded in model.encode(prompts)]
    streams = torch.from_numpy(read_residual(model, ids, batch_size)).to(basis)
    return float(((streams @ basis.T).norm(dim=-1) / streams.norm(dim=-1)).mean())
