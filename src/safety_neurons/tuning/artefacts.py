"""A trained change of rows and columns: saved, loaded, applied to weights, exported as PEFT LoRA or merged
checkpoint; weights' hashes.

A change of rows is a LoRA whose B is one-hot (which rows) and whose A is the change; a change of columns is
one whose A is one-hot and whose B is the change. With alpha = rank the product is the change itself, so
merging it adds the same numbers as `apply_delta`. A checkpoint is written with its companions: whatever the
model's folder holds beside weights (processors, templates, licences, code).
"""

import contextlib
import copy
import hashlib
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from safety_neurons.arguments import well_typed
from safety_neurons.counting import numbered
from safety_neurons.errors import (
    MismatchError,
    NeuronError,
    NumericalError,
    RunError,
    UnsupportedModelError,
    UsageError,
)
from safety_neurons.model import LanguageModel
from safety_neurons.model.adapters import activate, is_adapted, merged
from safety_neurons.model.fewer_bits import put_in_order
from safety_neurons.model.loading import quiet
from safety_neurons.model.sites import SitePlace
from safety_neurons.neurons import INPUT_SITES, NeuronSet, Provenance, parse_key
from safety_neurons.neurons.sets import FILE_NAME, header, stored_table
from safety_neurons.results.run import (
    PathLike,
    ordered_header,
    read_json,
    whole_folder,
    write_bytes,
    write_json,
)
from safety_neurons.tuning.deltas import (
    Deltas,
    NeuronDelta,
    full,
    positions_of,
    refuse_attached,
    summed,
    weight_of,
)
from safety_neurons.tuning.protect import Entries, Where, weights_of

DELTA_FILE = "delta.safetensors"
_MEMBERS, _TENSOR = "members/", "delta/"


@dataclass(frozen=True, eq=False, repr=False)
class Delta:
    """A trained change of some rows and columns.

    Attributes:
        neurons: whose rows (`q k v gate up`) and columns (`o down`).
        tensors: by key, `[n, in]` for rows and `[out, n]` for columns, members in the set's order; float32
            (float64 from a float64 model).
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
            raise NeuronError(
                f"deltas for {len(self.tensors)} matrices arrived, the {len(keys)} matrices of the set "
                "were expected"
            )
        for key, members in self.neurons.items():
            axis = 0 if _side(key) == "output" else 1
            if self.tensors[key].ndim != 2 or self.tensors[key].shape[axis] != len(members):
                raise NeuronError(
                    f"{key}: a delta {list(self.tensors[key].shape)} arrived, {len(members)} on axis "
                    f"{axis} were expected"
                )

    def __repr__(self) -> str:
        return f"Delta({numbered(self.n_parameters, 'parameter')} of {self.neurons})"

    @property
    def n_parameters(self) -> int:
        """Trained entries."""
        return sum(tensor.numel() for tensor in self.tensors.values())


@well_typed
def delta_of(deltas: Deltas, method: str = "", config: Mapping[str, Any] | None = None) -> Delta:
    """The deltas of a model as they are now, to be kept after `detach`.

    Source: Zhao et al., ICLR 2025, section 4.
    Differs: whole checkpoints are published there; here only the change is kept.
    """
    model, neurons = deltas.model, deltas.neurons
    provenance = Provenance(
        "neurons",
        method or neurons.provenance.method,
        (model.name,),
        model.fingerprint,
        "",
        dict(config or {}),
    )
    return Delta(neurons, deltas.tensors(), provenance, base_hash(model, neurons))


# Files


@well_typed
def save_delta(folder: PathLike, delta: Delta) -> None:
    """Writes `delta.safetensors` (the change and its members, one whole file) and `neurons.safetensors` (the
    set, for other verbs).

    Raises:
        RunError: the folder cannot be written; what was there before is whole.

    Source: the files of this package; safetensors, float32.
    """
    arrays = {_TENSOR + key: tensor.detach().to("cpu").contiguous() for key, tensor in delta.tensors.items()}
    arrays = {
        key: tensor if tensor.dtype == torch.float64 else tensor.float() for key, tensor in arrays.items()
    }
    arrays |= {_MEMBERS + key: torch.from_numpy(members.copy()) for key, members in delta.neurons.items()}
    metadata = header(replace(delta.provenance, kind="delta"), delta.neurons.table)
    write_bytes(
        Path(folder) / DELTA_FILE,
        ordered_header(safetensors.torch.save(arrays, metadata={**metadata, "base": delta.base})),
    )
    delta.neurons.save(Path(folder) / FILE_NAME)


@well_typed
def load_delta(folder: PathLike) -> Delta:
    """The change in a folder (or in the file itself).

    Raises:
        NeuronError: missing, damaged, not a delta, or deltas that do not fit their members.

    Source: the files of this package.
    """
    path = Path(folder) / DELTA_FILE if Path(folder).is_dir() else Path(folder)
    if not path.is_file():
        raise NeuronError(
            f"no file {str(path)!r}; expected the {DELTA_FILE} that tuning wrote: check the path"
        )
    try:
        with safe_open(path, framework="pt") as opened:
            metadata = dict(opened.metadata() or {})
            arrays = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - not a mapping
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise NeuronError(
            f"cannot read {str(path)!r} ({str(error)[:120]}); expected a whole safetensors file: copy it "
            "again"
        ) from error
    provenance = Provenance.from_metadata(metadata, "delta", path)
    members = {
        name.removeprefix(_MEMBERS): array.numpy()
        for name, array in arrays.items()
        if name.startswith(_MEMBERS)
    }
    tensors = {
        name.removeprefix(_TENSOR): array for name, array in arrays.items() if name.startswith(_TENSOR)
    }
    neurons = NeuronSet(members, stored_table(metadata, provenance), replace(provenance, kind="neurons"))
    if not all(bool(tensor.isfinite().all()) for tensor in tensors.values()):
        raise NumericalError(
            f"{str(path)!r} holds NaN or infinity, finite numbers were expected; tune again with a lower "
            "learning rate"
        )
    return Delta(neurons, tensors, replace(provenance, kind="neurons"), metadata.get("base", ""))


# Into the weights


@well_typed
def apply_delta(model: LanguageModel, delta: Delta, *, any_base: bool = False) -> None:
    """Adds the change to the weights of the model, in place: summed in float32 (or wider), rounded once to
    the weight's type.

    Args:
        model: without adapters and unquantised.
        delta: found on this architecture.
        any_base: also where the weights are not those that the change was trained on.

    Raises:
        ForeignModelError: another architecture. MismatchError: the same with other weights. UsageError:
        deltas are attached, or adapters are on the model. UnsupportedModelError: quantised or off-loaded
        weights.

    Source: Zhao et al., ICLR 2025, section 4: tuned weights are ordinary weights.
    """
    _check_fits(model, delta, any_base)
    with torch.no_grad():
        for entries in _writable(model, delta.neurons):
            entries.write(summed(entries.read(), _change(delta, entries)))


@well_typed
@contextlib.contextmanager
def applied(model: LanguageModel, delta: Delta, *, any_base: bool = False) -> Iterator[LanguageModel]:
    """`apply_delta` for a block; afterwards the rows and columns are what they were, bit for bit.

    Source: as `apply_delta`.
    """
    _check_fits(model, delta, any_base)
    before = [(entries, entries.read()) for entries in _writable(model, delta.neurons)]
    try:
        apply_delta(model, delta, any_base=True)
        yield model
    finally:
        for entries, values in before:
            entries.write(values)


@well_typed
def survival(model: LanguageModel, delta: Delta, dtype: torch.dtype) -> float:
    """Share of the changed weights that are still other numbers than before once both are cast to a type.

    Args:
        model: that the change belongs to; its weights are not written to.
        delta: the change.
        dtype: of the weights to be saved.

    Source: the rounding of small updates, which the published training (learning rate 2e-6, bfloat16) runs
    into.
    """
    changed = survived = 0
    with torch.no_grad():
        for entries in _writable(model, delta.neurons):
            before, change = entries.read(), _change(delta, entries)
            moved = change.to(before.device) != 0
            after = summed(before, change, dtype)
            changed += int(moved.sum())
            survived += int((moved & (after != before.to(dtype))).sum())
    return survived / changed if changed else 0.0


# Hashes


@well_typed
def base_hash(model: LanguageModel, neurons: NeuronSet) -> str:
    """Hash of the set's own rows and columns, as bfloat16, so that a copy of the same weights in another type
    has the same.

    Empty where the weights cannot be read (off-loaded, or quantised in an unknown way).

    Source: the check that an adapter is put on the weights it was trained on.
    """
    digest = hashlib.sha256()
    with torch.no_grad(), model.active():
        try:
            for key, members in neurons.items():
                axis = 0 if _side(key) == "output" else 1
                values = full(weight_of(model, key))
                values = values.index_select(axis, torch.from_numpy(members.copy()).to(values.device))
                digest.update(key.encode())
                _feed(digest, values.to(torch.bfloat16))
        except UnsupportedModelError:
            return ""
    return digest.hexdigest()


@well_typed
def outside_hash(model: LanguageModel, neurons: NeuronSet) -> str:
    """Hash of every bit of the model outside the set: all parameters and stored buffers, without the set's
    rows and columns.

    Biases are outside. Attached deltas are not part of it, and their wrappers do not change it. Equal before
    and after means that nothing else moved.

    Source: the check that users of masked training asked for (is the rest really unchanged?).
    """
    holes: dict[int, list[Where]] = {}
    for entries in weights_of(model, neurons):
        holes.setdefault(id(entries.stored), []).append(entries.where)
    digest = hashlib.sha256()
    trained = {
        id(parameter)
        for module in model.model.modules()
        if isinstance(module, NeuronDelta)
        for parameter in module.deltas().values()
    }
    for name, tensor in _state(model.model):
        if id(tensor) in trained:
            continue
        values = full(tensor.detach())
        if id(tensor) in holes:
            values = values.clone()
            for where in holes[id(tensor)]:
                values[where] = 0
        digest.update(f"{name.replace('.base_layer.', '.')} {values.dtype} {list(values.shape)}".encode())
        _feed(digest, values)
    return digest.hexdigest()


def _state(model: Any) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    stored = set(model.state_dict(keep_vars=True)) if hasattr(model, "state_dict") else set()
    yield from ((name, buffer) for name, buffer in model.named_buffers() if name in stored)


def _feed(digest: Any, values: Tensor) -> None:
    if values.is_meta:
        raise UnsupportedModelError(
            "a weight is off-loaded, weights in memory were expected; load the model without off-loading"
        )
    plain = values.detach().to("cpu").contiguous().flatten()
    digest.update(plain.view(torch.uint8).numpy() if plain.numel() else b"")


def _side(key: str) -> str:
    return "input" if parse_key(key).site in INPUT_SITES else "output"


def _writable(model: LanguageModel, neurons: NeuronSet) -> list[Entries]:
    """The set's rows and columns in plain weights in memory; all of them, or an error."""
    writable = list(weights_of(model, neurons))
    missing = [key for key in neurons.keys() if key not in {entries.key for entries in writable}]  # noqa: SIM118 - iterates over neurons
    if missing:
        raise UnsupportedModelError(
            f"{missing[0]}: quantised weights cannot take up a change exactly, plain ones were expected; "
            "export a LoRA (export_lora), or load the model unquantised"
        )
    for entries in writable:
        entries.tensor  # noqa: B018 - raises where the tensor is not a whole one in memory
    return writable


def _change(delta: Delta, entries: Entries) -> Tensor:
    """The delta of some entries, in the order of axes that they are stored in."""
    change = delta.tensors[entries.key]
    return change.T if entries.transposed else change


def _check_fits(model: LanguageModel, delta: Delta, any_base: bool) -> None:
    delta.neurons.check(model.table)
    check_plain(model)
    _writable(model, delta.neurons)
    for key, members in delta.neurons.items():
        n, length = len(members), model.table[key].weights_per_neuron
        wanted = (n, length) if _side(key) == "output" else (length, n)
        if tuple(delta.tensors[key].shape) != wanted:
            raise NeuronError(
                f"{key}: a delta {list(delta.tensors[key].shape)} arrived, {list(wanted)} was expected "
                "for this model"
            )
    if not any_base:
        check_base(model, delta)


def check_base(model: LanguageModel, delta: Delta) -> None:
    """Refuses a change on other weights than those it was trained on, where they are known.

    Raises:
        MismatchError: the set's own rows and columns are others here.

    Source: none; a delta fits every model of its architecture and means something on one.
    """
    if delta.base and (actual := base_hash(model, delta.neurons)) != delta.base:
        raise MismatchError(
            f"the change was trained on other weights of this architecture (hash {delta.base[:12]}, here "
            f"{actual[:12]}); use the base it was trained on, or pass any_base=True"
        )


def check_plain(model: LanguageModel) -> None:
    """Refuses a model into whose weights nothing can be written: with deltas attached, or with adapters.

    Source: Zhao et al., ICLR 2025, tune plain checkpoints only.
    """
    refuse_attached(model)
    if is_adapted(model.model):
        raise UsageError(
            f"{model.name} has adapters, plain weights were expected; merge them first "
            "(--merge-adapters, or merged_base())"
        )


VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Ranks that vLLM can be started with (`--max-lora-rank`)."""


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        folder: where.
        base: the model that an adapter belongs to; empty for a merged checkpoint.
        rank: the largest rank of an adapter; 0 for a merged checkpoint.
        survived: share of the changed weights that are other numbers than before in the saved type; None for
            an adapter.
        notes: what has to be said.
    """

    folder: Path
    base: str = ""
    rank: int = 0
    survived: float | None = None
    notes: list[str] = field(default_factory=list)


@well_typed
def export_lora(
    folder: PathLike, model: LanguageModel, delta: Delta, *, vllm: bool = False, any_base: bool = False
) -> Exported:
    """Writes the change as an ordinary PEFT LoRA folder, which PEFT, TRL, lm-eval and vLLM load.

    Every projection has the rank of its trained rows or columns. Merging it (`merge_and_unload()`, the sum
    rounded once) gives the weights of `apply_delta`, bit for bit. A model with adapters is merged first, into
    `folder/base`, and the LoRA belongs to that.

    Args:
        folder: to write; files in it of the same names are replaced.
        model: that the change was trained on, quantised or not.
        delta: the change.
        vllm: give all projections one rank that vLLM allows, padded with zeros.
        any_base: also where the weights are not those that the change was trained on.

    Raises:
        UnsupportedModelError: the set has routed experts, or more rows of a projection than vLLM allows;
        export it merged. UsageError: deltas are attached. MismatchError: another base. RunError: the folder
        cannot be written; an earlier adapter is whole.

    Source: Hu et al., ICLR 2022 (LoRA), section 4.1, W + BA, with one factor a selection of rows or columns.
    Differs: that factor is frozen one-hot, so the product is exact.
    """
    notes: list[str] = []
    refuse_attached(model)
    target, base = Path(folder), str(getattr(model.config, "_name_or_path", "") or model.name)
    factors = _factors(model, delta)
    if not any_base:
        check_base(model, delta)
    if is_adapted(model.model):
        plain = merged_base(model)
        base = str((target / "base").resolve())
        notes += save_checkpoint(target / "base", plain)
        notes.append(f"the model's adapters were merged into its weights first; the LoRA belongs to {base}")
    ranks = {name: down.shape[0] for name, (down, _) in factors.items()}
    rank = max(ranks.values())
    if vllm:
        rank = _allowed(rank)
        factors = {name: _padded(down, up, rank) for name, (down, up) in factors.items()}
        ranks = dict.fromkeys(ranks, rank)
    weights = {}
    for name, (down, up) in factors.items():
        (
            weights[f"base_model.model.{name}.lora_A.weight"],
            weights[f"base_model.model.{name}.lora_B.weight"],
        ) = down, up
    settings = _config(model, delta, ranks, rank, base)
    write_bytes(
        target / "adapter_model.safetensors", safetensors.torch.save(weights, metadata={"format": "pt"})
    )  # large: fails first
    write_json(target / "adapter_config.json", settings)
    return Exported(target, base, rank, None, notes)


@well_typed
def export_merged(
    folder: PathLike,
    model: LanguageModel,
    delta: Delta,
    *,
    dtype: torch.dtype | None = None,
    any_base: bool = False,
) -> Exported:
    """Writes the tuned model as an ordinary checkpoint (safetensors, configuration, tokenizer).

    The model in memory stays as it is.

    Args:
        folder: to write; it appears whole, what was there before is replaced at the end.
        model: that the change was trained on; its adapters are merged first, in a copy.
        delta: the change.
        dtype: of the saved weights; the model's own by default.
        any_base: also where the weights are not those that the change was trained on.

    Raises:
        UnsupportedModelError: quantised or off-loaded weights. MismatchError: another base. RunError: the
        folder cannot be written.

    Source: Zhao et al., ICLR 2025, section 4: a tuned model is an ordinary checkpoint.
    """
    notes: list[str] = []
    refuse_attached(model)
    if is_adapted(model.model):
        if not any_base:
            check_base(model, delta)
        model, any_base = merged_base(model), True
        notes.append("the model's adapters were merged into its weights first")
    survived = survival(model, delta, dtype or model.dtype)
    notes.append(
        f"{100 * survived:.4g} % of the changed weights survive the cast to "
        f"{str(dtype or model.dtype).removeprefix('torch.')}"
    )
    with applied(model, delta, any_base=any_base):
        notes += save_checkpoint(Path(folder), model, dtype)
    return Exported(Path(folder), "", 0, survived, notes)


@well_typed
def merged_base(model: LanguageModel) -> LanguageModel:
    """A copy of a model with the adapters of this view merged into its weights.

    The model itself is left alone.

    Raises:
        UnsupportedModelError: quantised weights, which cannot take up an adapter exactly.
        ModelError: weights that two layers share, such as those of a tied embedding with an adapter.

    Source: PEFT's `merge_and_unload`.
    """
    if any(place.projection.quantised for place in model.anatomy.places.values()):
        raise UnsupportedModelError(
            f"{model.name} is quantised, plain weights were expected: its adapters cannot be merged "
            "exactly; load it unquantised"
        )
    adapted: Any = copy.deepcopy(model.model)
    if model.adapters is not None:
        activate(adapted, model.adapters)
    other = LanguageModel(
        merged(adapted, f"{model.name}: its adapter"), model.tokenizer, name=model.name, folder=model.folder
    )
    other.template = model.template
    return other


def _factors(model: LanguageModel, delta: Delta) -> dict[str, tuple[Tensor, Tensor]]:
    """A and B by path of the projection, sites that share one stacked."""
    delta.neurons.check(model.table)
    model.anatomy.check(delta.neurons.keys())
    by_module: dict[str, list[SitePlace]] = {}
    for key, _ in delta.neurons.items():
        if parse_key(key).expert is not None:
            raise UnsupportedModelError(
                f"{key} is a routed expert, whose weights no LoRA module holds, neurons of dense sites "
                "were expected; export it merged"
            )
        place = model.anatomy.place(key)
        by_module.setdefault(place.module_name, []).append(place)
    return {_plain_name(name): _factors_of(places, delta) for name, places in by_module.items()}


def _plain_name(name: str) -> str:
    return name.removeprefix("base_model.model.").replace(".base_layer", "")


def _factors_of(places: list[SitePlace], delta: Delta) -> tuple[Tensor, Tensor]:
    one_hots, changes = [], []
    for place in places:
        positions = positions_of(place, delta.neurons)
        one_hot = torch.zeros(len(positions), place.features)
        one_hot[torch.arange(len(positions)), positions] = 1.0
        one_hots.append(one_hot)
        changes.append(delta.tensors[place.key].to("cpu", torch.float32))
    if places[0].side == "output":
        return torch.cat(changes).contiguous(), torch.cat(one_hots).T.contiguous()
    return torch.cat(one_hots).contiguous(), torch.cat(changes, 1).contiguous()


def _allowed(rank: int) -> int:
    for allowed in VLLM_RANKS:
        if rank <= allowed:
            return allowed
    raise UnsupportedModelError(
        f"a projection has {rank} trained rows or columns, vLLM's largest rank is {VLLM_RANKS[-1]}; "
        "export a merged checkpoint instead"
    )


def _padded(down: Tensor, up: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    missing = rank - down.shape[0]
    return torch.cat([down, down.new_zeros(missing, down.shape[1])]), torch.cat(
        [up, up.new_zeros(up.shape[0], missing)], 1
    )


def _config(
    model: LanguageModel, delta: Delta, ranks: dict[str, int], rank: int, base: str
) -> dict[str, Any]:
    import peft

    others = {name: value for name, value in ranks.items() if value != rank}
    places = [model.anatomy.place(key) for key, _ in delta.neurons.items()]
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=rank,
        lora_dropout=0.0,
        bias="none",
        target_modules=sorted(ranks),
        rank_pattern=others,
        alpha_pattern=dict(others),
        fan_in_fan_out=any(place.transposed for place in places),
        task_type="CAUSAL_LM",
        base_model_name_or_path=base,
        inference_mode=True,
    )
    settings = config.to_dict()
    return {**settings, "target_modules": sorted(ranks)}


def save_checkpoint(folder: Path, model: LanguageModel, dtype: torch.dtype | None = None) -> list[str]:
    """Writes a whole model as an ordinary checkpoint, with its tokenizer and whatever else the folder it came
    from holds.

    Args:
        folder: to write; it appears whole, what was there before is replaced at the end.
        model: without adapters and attached deltas.
        dtype: of the saved weights; None for the model's own.

    Returns:
        A note where the checkpoint that the model came from has parts that are not in memory, and so not in
        the new one.

    Raises:
        UsageError: adapters or attached deltas. RunError: the folder cannot be written.

    Source: none; the ordinary form of a Hugging Face checkpoint.
    """
    check_plain(model)
    with quiet(), _whole(folder) as partial:
        inner = model.inner
        put_in_order(inner)
        state = inner.state_dict()
        if dtype is not None:
            state = {
                name: value.to(dtype) if value.is_floating_point() else value for name, value in state.items()
            }
        inner.save_pretrained(partial, state_dict=state)
        if dtype is not None:
            config = read_json(partial / "config.json", constants=True)
            name = str(dtype).removeprefix("torch.")
            write_json(
                partial / "config.json",
                {**config, **{key: name for key in ("dtype", "torch_dtype") if key in config}},
            )
        if model.tokenizer is not None:
            model.tokenizer.save_pretrained(partial)
        copy_companions(model, partial)
    source = None if model.folder is None else Path(model.folder) / "config.json"
    if source is None or not source.is_file():
        return []
    described = read_json(source, constants=True).get("model_type")
    if described == model.inner.config.model_type:
        return []
    return [
        f"{folder.name} holds the text decoder alone ({type(model.inner).__name__}): the other parts of the "
        f"{described} checkpoint it came from were not read, and are not in it"
    ]


@contextlib.contextmanager
def _whole(folder: Path) -> Iterator[Path]:
    """A folder beside the wanted one that takes its place at the end.

    After an exception, what was there before is as it was.
    """
    if folder.exists() and not (
        folder.is_dir() and ((folder / "config.json").is_file() or not any(folder.iterdir()))
    ):
        raise RunError(
            f"{str(folder)!r} holds other things than a checkpoint, which would be replaced; choose an "
            "empty folder"
        )
    try:
        with whole_folder(folder) as partial:
            yield partial
    except SafetensorError as error:  # an error of its own for a full disk
        raise RunError(
            f"cannot write {str(folder)!r} ({str(error)[:120]}); choose a writable place with free space"
        ) from error


WEIGHTS = (
    *(
        ".safetensors",
        ".bin",
        ".pt",
        ".pth",
        ".ckpt",
        ".h5",
        ".msgpack",
        ".gguf",
        ".ggml",
        ".onnx",
        ".onnx_data",
        ".npz",
        ".npy",
    ),
    *(".tflite", ".ot"),
)
"""Endings of files that hold weights or states of a training."""
INDEX = ".index.json"
"""Ending of a file that says in which shard a weight is."""
ASIDE = ("__pycache__", "prompts", "runs", "checkpoints")
"""Folders that belong to a machine, a run or an organism and not to the model."""


def copy_companions(model: LanguageModel, target: Path) -> list[str]:
    """Copy what the folder of a model holds beside weights; nothing that is in the target is overwritten.

    Left out are weights and their indices, hidden files and folders (`.git`, caches), folders of runs, and
    links that lead out of the folder; a snapshot of the hub's cache, whose files are all links to its own
    blobs, is followed.

    Args:
        model: as it was loaded; of one made in memory nothing is copied.
        target: a folder that holds the model as it was written.

    Returns:
        Names of the copied files, relative to the folder.

    Raises:
        RunError: a file cannot be copied.

    Source: none; `save_pretrained` writes what transformers knows of, and processors, templates and code of a
    checkpoint are not among it.
    """
    named = str(getattr(model.config, "_name_or_path", "") or "")
    source = Path(named) if named and Path(named).is_dir() else model.folder
    if source is None or not source.is_dir() or source.resolve() == target.resolve():
        return []
    copied = []
    for path in _beside_weights(source, target):
        name = path.relative_to(source)
        place = target / name
        if os.path.lexists(place):
            continue
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, place)
        except OSError as error:
            raise RunError(
                f"cannot copy {str(path)!r} ({error.strerror or error}); choose a writable place with "
                "free space"
            ) from error
        copied.append(str(name))
    return copied


def _beside_weights(source: Path, target: Path) -> Iterator[Path]:
    within = source.resolve()
    blobs = within.parent.parent / "blobs" if within.parent.name == "snapshots" else None
    for folder, folders, files in os.walk(source):
        here = Path(folder)
        folders[:] = sorted(
            name
            for name in folders
            if not name.startswith(".") and name not in ASIDE and not _is(here / name, target)
        )
        folders[:] = [
            name for name in folders if not (here / name).is_symlink() and not _is_model(here / name)
        ]
        for name in sorted(files):
            real = (here / name).resolve()
            if name.startswith(".") or name.lower().endswith((*WEIGHTS, INDEX)) or not real.is_file():
                continue
            if real.is_relative_to(within) or (blobs is not None and real.is_relative_to(blobs)):
                yield here / name


def _is_model(folder: Path) -> bool:
    """Whether a folder inside is a model or an adapter of its own (another stage, a checkpoint of the
    training).
    """
    return any((folder / name).is_file() for name in ("config.json", "adapter_config.json"))


def _is(folder: Path, target: Path) -> bool:
    return folder.resolve() == target.resolve() or target.resolve().is_relative_to(folder.resolve())
