"""Tensors in files of other projects, as numpy arrays, without running anything that is in them."""

import io
import pathlib
import re
import warnings
import zipfile
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from safety_neurons.errors import NeuronError
from safety_neurons.model.language_model import LanguageModel
from safety_neurons.neurons import NeuronSet

_DEEPEST = 32
CONVERTED = "docs/exchange.md says how to convert pickles that you trust"
_OF_TORCH = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19"
"""First bytes of what `torch.save` wrote before it wrote archives."""
_UNREADABLE = (
    UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError, AttributeError, TypeError, MemoryError, zipfile.BadZipFile
)  # fmt: skip


def read_torch(path: str | pathlib.Path) -> Any:
    """What `torch.save` wrote, tensors as arrays; anything but tensors, numbers, text and containers is refused.

    Raises:
        NeuronError: it cannot be read that way, or claims more than the file holds. Nothing that the file names is imported or run.
    """
    try:
        with pathlib.Path(path).open("rb") as stream:
            return _Arrays(pathlib.Path(path).stat().st_size).of(_loaded(stream))
    except NeuronError as error:
        raise NeuronError(f"cannot read {str(path)!r} safely: {error}") from error
    except _UNREADABLE as error:
        reason = str(error).strip().splitlines()[0][:100] if str(error).strip() else type(error).__name__
        raise NeuronError(f"cannot read {str(path)!r} safely ({reason}); expected tensors in plain containers") from error


def _loaded(stream: Any) -> Any:
    """What torch reads from a stream without building objects.

    Raises:
        NeuronError: a plain pickle; an archive whose parts are compressed: a small file would fill the memory.
    """
    start = stream.read(len(_OF_TORCH))
    if not start.startswith(b"PK") and start != _OF_TORCH:
        raise NeuronError(f"it is not what torch.save writes, and may be a pickle, which can run code as it is read; {CONVERTED}")
    if zipfile.is_zipfile(stream):
        stream.seek(0)
        with zipfile.ZipFile(stream) as archive:
            parts = archive.infolist()
        stream.seek(0, io.SEEK_END)
        if any(part.compress_type != zipfile.ZIP_STORED for part in parts) or sum(part.file_size for part in parts) > stream.tell():
            raise NeuronError("its parts are compressed, which torch.save never does")
    stream.seek(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of protocols that it may not know, which then are an error
        return torch.load(stream, map_location="cpu", weights_only=True)


def read_named(path: str | pathlib.Path) -> dict[str, Any]:
    """What a safetensors file, or one that `torch.save` wrote, holds by name, tensors as arrays.

    Raises:
        NeuronError: it is neither, or cannot be read safely.
    """
    source = pathlib.Path(path)
    if source.suffix == ".safetensors":
        try:
            return {name: _Arrays(source.stat().st_size).of(tensor) for name, tensor in load_file(source).items()}
        except (SafetensorError, *_UNREADABLE) as error:
            raise NeuronError(f"cannot read {str(source)!r} ({str(error)[:100]}); expected named tensors") from error
    if source.is_dir():
        raise NeuronError(f"{str(source)!r} is a folder; expected one file of named tensors; {CONVERTED}")
    content = read_torch(source)
    if not isinstance(content, dict):
        raise NeuronError(f"{str(source)!r} holds no mapping of names to tensors")
    return {name: values for name, values in content.items() if isinstance(name, str)}


def read_weights(path: str | pathlib.Path) -> dict[str, np.ndarray]:
    """Importances or masks of single weights by projection, from a file of named matrices; errors as for `read_named`."""
    return {name: values for name, values in read_named(path).items() if isinstance(values, np.ndarray) and values.ndim == 2}


class _Arrays:
    """The same containers with arrays in place of tensors (bfloat16 as float32), each converted once however often it is named.

    Args:
        stored: bytes of the file; tensors that hold more are not from it, or are one number spread over many places.
    """

    def __init__(self, stored: int) -> None:
        self._left = stored
        self._held: dict[int, Tensor] = {}
        self._known: dict[int, tuple[Any, Any]] = {}

    def of(self, content: Any, depth: int = 0) -> Any:
        """The content with arrays in it."""
        if depth > _DEEPEST:
            raise NeuronError(f"its containers are nested more than {_DEEPEST} deep; expected tensors in plain containers")
        if not isinstance(content, Tensor | dict | list | tuple):
            return content
        if id(content) not in self._known:
            self._known[id(content)] = (content, self._made(content, depth + 1))
        return self._known[id(content)][1]

    def _made(self, content: Any, depth: int) -> Any:
        if isinstance(content, Tensor):
            return self._array(content)
        if isinstance(content, dict):
            return {name: self.of(value, depth) for name, value in content.items()}
        return type(content)(self.of(value, depth) for value in content) if type(content) in (list, tuple) else content

    def _array(self, tensor: Tensor) -> np.ndarray:
        self._left -= tensor.numel() * tensor.element_size()
        if self._left < 0:
            raise NeuronError(f"its tensors (one of shape {tuple(tensor.shape)}) are larger than what is stored of them")
        tensor = tensor.detach().cpu()
        made = np.array((tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy())
        if made.dtype.kind not in "biuf":
            raise NeuronError(f"a tensor of {tensor.dtype}; expected real numbers")
        return made


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
