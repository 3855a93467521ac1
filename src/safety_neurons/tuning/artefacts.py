"""The trained change as a thing of its own: saved, loaded, written into weights, counted after a cast; and the hash of all the rest."""

import contextlib
import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError, safe_open
from torch import Tensor

from safety_neurons.errors import MismatchError, NeuronError, NumericalError, UnsupportedModelError, UsageError
from safety_neurons.model import LanguageModel
from safety_neurons.model.adapters import is_adapted
from safety_neurons.model.experts import DOWN, FUSED
from safety_neurons.model.layouts import take
from safety_neurons.neurons import NeuronSet, Provenance, parse_key
from safety_neurons.neurons.sets import FILE_NAME, header, stored_table
from safety_neurons.results.files import PathLike, ordered_header, write_bytes
from safety_neurons.tuning.attach import Deltas, positions_of
from safety_neurons.tuning.deltas import Beside, NeuronDelta, full, summed

DELTA_FILE = "delta.safetensors"
_MEMBERS, _TENSOR = "members/", "delta/"


@dataclass(frozen=True)
class Delta:
    """A trained change of some rows and columns.

    Attributes:
        neurons: whose rows (`q k v gate up`) and columns (`o down`).
        tensors: by key, `[n, in]` for rows and `[out, n]` for columns, members in the set's order; float32 (float64 from a float64 model).
        provenance: where the change comes from.
        base: hash of the weights that it belongs to, from `base_hash`; empty where nothing is known.
    """

    neurons: NeuronSet
    tensors: Mapping[str, Tensor]
    provenance: Provenance
    base: str = ""

    def __post_init__(self) -> None:
        keys = self.neurons.keys()
        if set(keys) != set(self.tensors):
            raise NeuronError(f"deltas for {len(self.tensors)} matrices arrived, the {len(keys)} matrices of the set were expected")
        for key, members in self.neurons.items():
            axis = 0 if _side(key) == "output" else 1
            if self.tensors[key].ndim != 2 or self.tensors[key].shape[axis] != len(members):
                raise NeuronError(f"{key}: a delta {list(self.tensors[key].shape)} arrived, {len(members)} on axis {axis} were expected")

    @property
    def n_parameters(self) -> int:
        """Trained entries."""
        return sum(tensor.numel() for tensor in self.tensors.values())


def delta_of(deltas: Deltas, method: str = "", config: Mapping[str, Any] | None = None) -> Delta:
    """The deltas of a model as they are now, to be kept after `detach`.

    Source: Zhao et al., ICLR 2025, section 4.
    Differs: whole checkpoints are published there; here only the change is kept.
    """
    model, neurons = deltas.model, deltas.neurons
    told = Provenance("neurons", method or neurons.provenance.method, (model.name,), model.fingerprint, "", dict(config or {}))
    return Delta(neurons, deltas.tensors(), told, base_hash(model, neurons))


# Files


def save_delta(folder: PathLike, delta: Delta) -> None:
    """Writes `delta.safetensors` (the change and its members, one whole file) and `neurons.safetensors` (the set, for other verbs).

    Raises:
        RunError: the folder cannot be written; what was there before is whole.

    Source: the files of this package; safetensors, float32.
    """
    arrays = {_TENSOR + key: tensor.detach().to("cpu").contiguous() for key, tensor in delta.tensors.items()}
    arrays = {key: tensor if tensor.dtype == torch.float64 else tensor.float() for key, tensor in arrays.items()}
    arrays |= {_MEMBERS + key: torch.from_numpy(members.copy()) for key, members in delta.neurons.items()}
    told = header(replace(delta.provenance, kind="delta"), delta.neurons.table)
    write_bytes(Path(folder) / DELTA_FILE, ordered_header(safetensors.torch.save(arrays, metadata={**told, "base": delta.base})))
    delta.neurons.save(Path(folder) / FILE_NAME)


def load_delta(folder: PathLike) -> Delta:
    """The change in a folder (or in the file itself).

    Raises:
        NeuronError: missing, damaged, not a delta, or deltas that do not fit their members.

    Source: the files of this package.
    """
    path = Path(folder) / DELTA_FILE if Path(folder).is_dir() else Path(folder)
    if not path.is_file():
        raise NeuronError(f"no file {str(path)!r}; expected the {DELTA_FILE} that tuning wrote: check the path")
    try:
        with safe_open(path, framework="pt") as opened:
            metadata = dict(opened.metadata() or {})
            arrays = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - not a mapping
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise NeuronError(f"cannot read {str(path)!r} ({str(error)[:120]}); expected a whole safetensors file: copy it again") from error
    told = Provenance.from_metadata(metadata, "delta")
    members = {name.removeprefix(_MEMBERS): array.numpy() for name, array in arrays.items() if name.startswith(_MEMBERS)}
    tensors = {name.removeprefix(_TENSOR): array for name, array in arrays.items() if name.startswith(_TENSOR)}
    neurons = NeuronSet(members, stored_table(metadata, told), replace(told, kind="neurons"))
    if not all(bool(tensor.isfinite().all()) for tensor in tensors.values()):
        raise NumericalError(f"{str(path)!r} holds NaN or infinity, finite numbers were expected; tune again with a lower learning rate")
    return Delta(neurons, tensors, replace(told, kind="neurons"), metadata.get("base", ""))


# Into the weights


def apply_delta(model: LanguageModel, delta: Delta, *, any_base: bool = False) -> None:
    """Adds the change to the weights of the model, in place: summed in float32 (or wider), rounded once to the weight's type.

    Args:
        model: without adapters and unquantised.
        delta: found on this architecture.
        any_base: also where the weights are not those that the change was trained on.

    Raises:
        ForeignModelError: another architecture. MismatchError: the same with other weights.
        UsageError: deltas are attached, or adapters are on the model. UnsupportedModelError: quantised or off-loaded weights.

    Source: Zhao et al., ICLR 2025, section 4: tuned weights are ordinary weights.
    """
    _check_fits(model, delta, any_base)
    with torch.no_grad():
        for place in _stored(model, delta.neurons):
            place.weight.index_copy_(place.axis, place.positions, summed(_taken(place), delta.tensors[place.key]))


@contextlib.contextmanager
def applied(model: LanguageModel, delta: Delta, *, any_base: bool = False) -> Iterator[LanguageModel]:
    """`apply_delta` for a block; afterwards the rows and columns are what they were, bit for bit.

    Source: as `apply_delta`.
    """
    _check_fits(model, delta, any_base)
    before = [(place, _taken(place)) for place in _stored(model, delta.neurons)]
    try:
        apply_delta(model, delta, any_base=True)
        yield model
    finally:
        with torch.no_grad():
            for place, values in before:
                place.weight.index_copy_(place.axis, place.positions, values)


def survival(model: LanguageModel, delta: Delta, dtype: torch.dtype) -> float:
    """Share of the changed weights that are still other numbers than before once both are cast to a type.

    Args:
        model: that the change belongs to; its weights are not written to.
        delta: the change.
        dtype: of the weights to be saved.

    Source: the rounding of small updates, which the published training (learning rate 2e-6, bfloat16) runs into.
    """
    changed = survived = 0
    with torch.no_grad():
        for place in _stored(model, delta.neurons):
            before = _taken(place)
            moved = delta.tensors[place.key].to(before.device) != 0
            after = summed(before, delta.tensors[place.key], dtype)
            changed += int(moved.sum())
            survived += int((moved & (after != before.to(dtype))).sum())
    return survived / changed if changed else 0.0


# Hashes


def base_hash(model: LanguageModel, neurons: NeuronSet) -> str:
    """Hash of the set's own rows and columns, as bfloat16, so that a copy of the same weights in another type has the same.

    Empty where the weights cannot be read (off-loaded, or quantised in an unknown way).

    Source: the check that an adapter is put on the weights it was trained on.
    """
    digest = hashlib.sha256()
    with torch.no_grad(), model.active():
        try:
            for key, members in neurons.items():
                axis = 0 if _side(key) == "output" else 1
                values = full(_readable(model, key)).index_select(axis, torch.from_numpy(members.copy()).to(_readable(model, key).device))
                digest.update(key.encode())
                _feed(digest, values.to(torch.bfloat16))
        except UnsupportedModelError:
            return ""
    return digest.hexdigest()


def outside_hash(model: LanguageModel, neurons: NeuronSet) -> str:
    """Hash of every bit of the model outside the set: all parameters and stored buffers, without the set's rows and columns.

    Biases are outside. Attached deltas are not part of it, and their wrappers do not change it. Equal before and after means that nothing
    else moved.

    Source: the check that users of masked training asked for (is the rest really unchanged?).
    """
    holes: dict[int, list[tuple[int, Int[Tensor, " neuron"]]]] = {}
    expert_holes: dict[int, list[tuple[int, int, Tensor]]] = {}
    for place in _located(model, neurons):
        if place.expert is None:
            holes.setdefault(id(place.tensor), []).append((place.stored_axis, place.positions))
        else:
            expert_holes.setdefault(id(place.tensor), []).append((place.expert, place.stored_axis, place.positions))
    digest = hashlib.sha256()
    trained = {
        id(parameter) for module in model.model.modules() if isinstance(module, NeuronDelta) for parameter in module.deltas().values()
    }
    for name, tensor in _state(model.model):
        if id(tensor) in trained:
            continue
        values = full(tensor.detach())
        for axis, positions in holes.get(id(tensor), []):
            values = values.index_fill(axis, positions.to(values.device), 0)
        for expert, axis, positions in expert_holes.get(id(tensor), []):
            values = values.clone()
            values[expert].index_fill_(axis, positions.to(values.device), 0)
        digest.update(f"{name.replace('.base_layer.', '.')} {values.dtype} {list(values.shape)}".encode())
        _feed(digest, values)
    return digest.hexdigest()


def _state(model: Any) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    stored = set(model.state_dict(keep_vars=True)) if hasattr(model, "state_dict") else set()
    yield from ((name, buffer) for name, buffer in model.named_buffers() if name in stored)


def _feed(digest: Any, values: Tensor) -> None:
    if values.is_meta:
        raise UnsupportedModelError("a weight is off-loaded, weights in memory were expected; load the model without off-loading")
    plain = values.detach().to("cpu").contiguous().flatten()
    digest.update(plain.view(torch.uint8).numpy() if plain.numel() else b"")


# Where the weights are


class _Place(NamedTuple):
    """Some rows or columns of a weight as the model stores it."""

    key: str
    weight: Float[Tensor, "out in"]
    """A view as `[out, in]`; writing into it writes into the model."""
    positions: Int[Tensor, " neuron"]
    side: str
    tensor: Tensor
    """The stored parameter."""
    expert: int | None
    stored_axis: int

    @property
    def axis(self) -> int:
        """Of the view."""
        return 0 if self.side == "output" else 1


def _side(key: str) -> str:
    return "input" if parse_key(key).site in ("o", "down") else "output"


def _located(model: LanguageModel, neurons: NeuronSet) -> Iterator[_Place]:
    """Places of the set without reading a weight."""
    model.anatomy.check(neurons.keys())
    for key, members in neurons.items():
        parsed, side = parse_key(key), _side(key)
        index = torch.from_numpy(members.copy())
        if parsed.expert is not None:
            experts = model.anatomy.layers[parsed.layer].experts
            assert experts is not None
            tensor = getattr(experts.module, DOWN if side == "input" else FUSED)
            positions = index if side == "input" else take(torch.arange(2 * experts.width), experts.index[parsed.site])[index]
            transposed = experts.transposed
        else:
            place = model.anatomy.places[key]
            tensor, positions, transposed = getattr(place.projection.base, "weight", None), positions_of(place, neurons), place.transposed
            if tensor is None or place.projection.quantised:
                continue
        axis = (0 if side == "output" else 1) ^ int(transposed)
        whole = tensor.detach() if parsed.expert is None else tensor.detach()[parsed.expert]
        yield _Place(key, whole.T if transposed else whole, positions.to(tensor.device), side, tensor, parsed.expert, axis)


def _stored(model: LanguageModel, neurons: NeuronSet) -> list[_Place]:
    """Places of the set whose weights can be written to; all of them, or an error."""
    found = list(_located(model, neurons))
    missing = [key for key in neurons.keys() if key not in {place.key for place in found}]  # noqa: SIM118 - iterates over neurons
    if missing:
        raise UnsupportedModelError(
            f"{missing[0]}: quantised weights cannot take up a change exactly, plain ones were expected; export a LoRA (export_lora), "
            "or load the model unquantised"
        )
    for place in found:
        if place.tensor.is_meta or hasattr(place.tensor, "full_tensor"):
            raise UnsupportedModelError(f"{place.key}: its weight is off-loaded or sharded, a whole weight in memory was expected")
    return found


def _taken(place: _Place) -> Tensor:
    return place.weight.index_select(place.axis, place.positions)


def _readable(model: LanguageModel, key: str) -> Tensor:
    parsed = parse_key(key)
    if parsed.expert is not None:
        experts = model.anatomy.layers[parsed.layer].experts
        assert experts is not None
        return experts.weight(parsed.expert, parsed.site)
    place = model.anatomy.place(key)
    if isinstance(place.module, NeuronDelta):
        place = replace(place, projection=replace(place.projection, module=place.module.base_layer))
    return place.weight()


def _check_fits(model: LanguageModel, delta: Delta, any_base: bool) -> None:
    delta.neurons.check(model.table)
    check_plain(model)
    _stored(model, delta.neurons)
    for key, members in delta.neurons.items():
        n, length = len(members), model.table[key].weights_per_neuron
        wanted = (n, length) if _side(key) == "output" else (length, n)
        if tuple(delta.tensors[key].shape) != wanted:
            raise NeuronError(f"{key}: a delta {list(delta.tensors[key].shape)} arrived, {list(wanted)} was expected for this model")
    if not any_base:
        check_base(model, delta)


def check_base(model: LanguageModel, delta: Delta) -> None:
    """Refuses a change on other weights than those it was trained on, where they are known.

    Raises:
        MismatchError: the set's own rows and columns are others here.

    Source: none; a delta fits every model of its architecture and means something on one.
    """
    if delta.base and (found := base_hash(model, delta.neurons)) != delta.base:
        raise MismatchError(
            f"the change was trained on other weights of this architecture (hash {delta.base[:12]}, here {found[:12]}); "
            "use the base it was trained on, or pass any_base=True"
        )


def check_plain(model: LanguageModel) -> None:
    """Refuses a model into whose weights nothing can be written: with deltas attached, or with adapters.

    Source: Zhao et al., ICLR 2025, tune plain checkpoints only.
    """
    if any(isinstance(module, Beside) for module in model.model.modules()):
        raise UsageError(f"{model.name} has deltas attached, a model without was expected; detach() them first")
    if is_adapted(model.model):
        raise UsageError(f"{model.name} has adapters, plain weights were expected; merge them first (--merge-adapters, or merged_base())")
