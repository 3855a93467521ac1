"""Tensors in files of other projects, as numpy arrays, without running anything that is in them."""

import io
import pathlib
import re
import warnings
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
from torch import Tensor

from safety_neurons.errors import NeuronError
from safety_neurons.model.language_model import LanguageModel
from safety_neurons.neurons import NeuronSet
from safety_neurons.neurons.foreign import read_pickle

_WEIGHTS_FILE = re.compile(r"W_metric_layer_(\d+)_name_(.+?)_weight.*\.pkl")


def read_torch(path: str | pathlib.Path) -> Any:
    """What `torch.save` wrote, tensors as arrays; anything but tensors, numbers, text and containers is refused.

    Raises:
        NeuronError: it cannot be read that way. Nothing that the file names is imported or run.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of protocols that it may not know, which then are an error
            return as_arrays(torch.load(path, map_location="cpu", weights_only=True))
    except (UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        reason = str(error).strip().splitlines()[0][:100] if str(error).strip() else type(error).__name__
        raise NeuronError(f"cannot read {str(path)!r} safely ({reason}); expected tensors in plain containers") from error


def read_weights(folder: str | pathlib.Path) -> dict[str, np.ndarray]:
    """Importances or masks of weights by projection: a folder of `W_metric_layer_….pkl`, or one file of named matrices.

    Raises:
        NeuronError: there are none, or one cannot be read safely.
    """
    source = pathlib.Path(folder)
    if not source.is_dir():
        content = _named(source)
        return {name: values for name, values in content.items() if isinstance(values, np.ndarray) and values.ndim == 2}
    found: dict[str, np.ndarray] = {}
    for file in sorted(source.glob("W_metric_layer_*.pkl")):
        match = _WEIGHTS_FILE.fullmatch(file.name)
        if match is None:
            continue
        name = match[2] if ".layers." in match[2] else f"model.layers.{int(match[1])}.{match[2]}"
        if name in found:
            raise NeuronError(f"{str(source)!r} holds two files for {name}; leave one")
        values = as_arrays(read_pickle(file, admitted=_TENSORS))
        if not isinstance(values, np.ndarray):
            raise NeuronError(f"{file.name} holds no tensor; expected the importances of one projection's weights")
        found[name] = values
    if not found:
        raise NeuronError(f"no W_metric_layer_….pkl in {str(source)!r}; expected what the public code writes into its wanda_score folder")
    return found


def as_arrays(content: Any) -> Any:
    """The same containers with arrays in place of tensors (bfloat16 as float32)."""
    if isinstance(content, Tensor):
        content = content.detach().cpu()
        return np.array((content.float() if content.dtype == torch.bfloat16 else content).numpy())
    if isinstance(content, dict):
        return {name: as_arrays(value) for name, value in content.items()}
    if isinstance(content, list | tuple):
        return type(content)(as_arrays(value) for value in content) if type(content) in (list, tuple) else content
    return content


def nnsight_paths(lm: LanguageModel, neurons: NeuronSet) -> dict[str, list[int]]:
    """The same neurons by nnsight path: a projection's `.input` or `.output` and the features of it.

    Raises:
        NeuronError: experts.
    """
    found: dict[str, list[int]] = {}
    for key, indices in neurons.items():
        if ".experts." in key:
            raise NeuronError(f"{key} is an expert's, whose projection is no module of its own; leave experts out")
        place = lm.anatomy.place(key)
        path = re.sub(r"\.(\d+)(?=\.|$)", r"[\1]", place.module_name)
        features = np.arange(place.projection.out_features if place.side == "output" else place.projection.in_features)
        if place.index is not None:
            features = features[place.index if isinstance(place.index, slice) else np.asarray(place.index)]
        name = f"{path}.{place.side}"
        found[name] = sorted([*found.get(name, []), *features[indices].tolist()])
    return found


def _named(path: pathlib.Path) -> dict[str, Any]:
    if path.suffix == ".safetensors":
        from safetensors.numpy import load_file

        return dict(load_file(path))
    content = read_torch(path)
    if not isinstance(content, dict):
        raise NeuronError(f"{str(path)!r} holds no mapping of names to matrices")
    return content


def _storage(content: Any) -> Any:
    return torch.load(io.BytesIO(bytes(content)), map_location="cpu", weights_only=True)


def _tensor(storage: Any, offset: int, size: Any, stride: Any, *_: Any) -> Tensor:
    kept: Any = getattr(storage, "_untyped_storage", storage)
    kind = getattr(storage, "dtype", torch.float32)
    reached = offset + sum((one - 1) * step for one, step in zip(size, stride, strict=True)) + 1
    if min((offset, *size, *stride), default=0) < 0 or reached * kind.itemsize > kept.nbytes():
        raise NeuronError(f"a tensor of shape {tuple(size)} is larger than what is stored of it")
    return torch.empty(0, dtype=kind).set_(kept, offset, tuple(size), tuple(stride))


_TENSORS: dict[tuple[str, str], Any] = {("torch.storage", "_load_from_bytes"): _storage, ("torch._utils", "_rebuild_tensor_v2"): _tensor}
