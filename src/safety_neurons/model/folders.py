"""Folders of checkpoints as they lie on disk: whether the files are whole and could hold what config.json claims; and what they hold."""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from safetensors import SafetensorError, safe_open

from safety_neurons import strict_json
from safety_neurons.errors import ModelError
from safety_neurons.results.content import Contents, contents_of, within

_POINTER = b"version https://git-lfs"
_KINDS = ("*.safetensors", "*.json", "*.model", "*.jinja")
READ = ("*.json", "*.safetensors", "*.jinja", "*.model", "*.txt", "*.tiktoken", "*.py", "additional_chat_templates/*", "prompts/*")
"""Files of a model's folder that can change what it computes or is asked."""
_CONFIG_SIZE = 1 << 22
_COUNTED = re.compile(r"layer|expert|depth|block|label|stage|codebook|^n?_?num|^n_")
"""Names in a configuration that say of how many parts a model is built, one after the other."""
_FEW = 4096
"""Parts that any configuration may claim: building so many takes seconds."""
_UNTOLD = 1_000_000
_BUFFERS = 1 << 28
WHOLE = "expected whole safetensors files: copy or download the folder again"


@dataclass(frozen=True)
class Weights:
    """The tensors of a checkpoint's files, from their headers.

    Attributes:
        shapes: Shape of each tensor by its name.
        size: Bytes of all files.
    """

    shapes: Mapping[str, tuple[int, ...]]
    size: int

    @property
    def widest(self) -> int:
        """The largest dimension of any tensor."""
        return max((max(shape, default=1) for shape in self.shapes.values()), default=0)


def refuse_pointers(folder: Path) -> None:
    """Refuses a checkpoint that was cloned without its large files.

    Raises:
        ModelError: A file is a Git LFS pointer; the message names the first.
    """
    pointers = sorted(path.name for kind in _KINDS for path in folder.glob(kind) if _is_pointer(path))
    if pointers:
        others = f" and {len(pointers) - 1} more files are Git LFS pointers" if len(pointers) > 1 else " is a Git LFS pointer"
        raise ModelError(f"{folder}: {pointers[0]}{others}, expected the files themselves: run 'git lfs pull' in that folder")


def refuse_foreign_shards(folder: Path) -> None:
    """Refuses an index of shards that names anything but safetensors files within the folder.

    Raises:
        ModelError: An index that cannot be read, or a shard that is elsewhere or of another format.
    """
    for index in sorted(folder.glob("*.safetensors.index.json")):
        for name in sorted(set(shards_of(index).values())):
            place = PurePosixPath(name.replace("\\", "/"))
            if place.is_absolute() or ".." in place.parts or not name.endswith(".safetensors"):
                raise ModelError(
                    f"{index}: names the shard {name[:80]!r}; expected .safetensors files in the same folder; download the model again"
                )


def shards_of(index: Path) -> dict[str, str]:
    """Which file an index says each tensor is in.

    Raises:
        ModelError: The index cannot be read or is none.
    """
    try:
        named = strict_json.loads(index.read_bytes())["weight_map"]
        if not isinstance(named, dict) or not all(isinstance(name, str) for name in named.values()):
            raise TypeError("weight_map is no object of file names")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{index}: cannot be read ({str(error)[:80]}); expected an index of shards; download the model again") from error
    return named


def model_contents(folder: Path) -> Contents:
    """What a model's folder holds, weights, configuration, tokenizer, template, adapter: by hash; a snapshot of the hub by its commit.

    An organism's prompts, which lie in its folder or the one above, are part of it.

    Raises:
        InputError: a file that cannot be read.
    """
    if re.fullmatch(r"[0-9a-f]{40}", folder.name) and folder.parent.name == "snapshots":
        return {"commit": folder.name}
    above = folder.parent / "prompts"
    prompts = {} if (folder / "prompts").is_dir() or not above.is_dir() else within("prompts", contents_of(above))
    return {**contents_of(folder, READ), **prompts}


def _is_pointer(path: Path) -> bool:
    if not path.is_file() or path.stat().st_size > 1024:
        return False
    with path.open("rb") as stream:
        return stream.read(len(_POINTER)) == _POINTER


def read_config(path: Path) -> dict[str, Any]:
    """A JSON object that describes a model or adapter.

    Raises:
        ModelError: It cannot be read, or is no object.
    """
    try:
        if path.stat().st_size > _CONFIG_SIZE:
            raise ModelError(f"{path}: {path.stat().st_size:,} bytes; expected a configuration of some thousand")
        found = strict_json.loads(path.read_bytes(), constants=True)
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: cannot be read ({str(error)[:80]}); expected a JSON object") from error
    if not isinstance(found, dict):
        raise ModelError(f"{path}: holds a {type(found).__name__}; expected a JSON object")
    return found


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files a model's weights are in: `model.safetensors`, or those that its index names.

    Raises:
        ModelError: There are none, or the index names something else than safetensors files of the folder.
    """
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(shards_of(index).values()))
        if absent := [name for name in names if not (folder / name).is_file()]:
            raise ModelError(f"{folder}: {absent[0]} is missing, which the index names; copy or download the folder again")
        return [folder / name for name in names]
    others = sorted(path.name for path in folder.glob("*.safetensors"))
    pickled = any(path for kind in ("*.bin", "*.pt", "*.pth") for path in folder.glob(kind))
    why = "its weights are a pickle, which can run code: convert them to safetensors" if pickled else "expected model.safetensors"
    raise ModelError(f"{folder}: no {'model.safetensors' if others else 'safetensors file'}{f' ({others[0]} is)' if others else ''}; {why}")


def read_headers(files: list[Path]) -> Weights:
    """Names and shapes of the tensors in files.

    Raises:
        ModelError: A file that is no whole safetensors file.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118 - not a mapping
                    shapes[name] = tuple(opened.get_slice(name).get_shape())
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{file}: cannot be read ({str(error).splitlines()[0][:200]}); {WHOLE}") from error
    return Weights(shapes, sum(file.stat().st_size for file in files))


def refuse_claims(path: Path, weights: Weights | None = None) -> dict[str, Any]:
    """A configuration, unless it claims more parts than its files have tensors for, before anything is built of it.

    Args:
        path: The configuration's file.
        weights: The tensors it describes; None where it describes none of its own, and only what would fill the memory is refused.

    Raises:
        ModelError: Names the first claim.
    """
    config = read_config(path)
    most = _UNTOLD if weights is None else max(_FEW, 4 * len(weights.shapes), 4 * weights.widest)
    held = "" if weights is None else f", and its files hold {len(weights.shapes)} tensors"
    for name, value in _counts(config):
        if value > most:
            raise ModelError(f"{path}: {name} is {value:,}{held}; expected as many as there are")
    layers = config.get("num_hidden_layers")
    if weights is not None and isinstance(layers, int) and layers > len(weights.shapes):
        raise ModelError(f"{path}: claims {layers:,} layers{held}; expected weights for each layer")
    return config


def _counts(config: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    """Numbers of parts in a configuration and those inside it."""
    waiting: list[Any] = [config]
    while waiting:
        item = waiting.pop()
        for name, value in item.items() if isinstance(item, Mapping) else ():
            if isinstance(value, int) and _COUNTED.search(str(name)):
                yield str(name), value
            elif isinstance(value, (list, Mapping)):
                waiting.extend(value if isinstance(value, list) else [value])


def refuse_sizes(folder: Path, model: Any, weights: Weights, *, quantised: bool) -> None:
    """Refuses an architecture larger than its files, which would fill the memory before a weight is missed.

    Args:
        folder: For the message.
        model: The architecture on the meta device.
        weights: What its files hold.
        quantised: Whether several parameters may share a byte.

    Raises:
        ModelError: It has more parameters than the files have room for, or buffers beyond any reason.
    """
    claimed = sum(math.prod(parameter.shape) for parameter in model.parameters())
    room = weights.size * (8 if quantised else 1) + (1 << 20)
    buffers = sum(math.prod(buffer.shape) for buffer in model.buffers())
    if claimed > room:
        raise ModelError(
            f"{folder}: config.json describes {claimed:,} parameters, and its files have {weights.size:,} bytes; expected whole files"
        )
    if buffers > max(_BUFFERS, room):
        raise ModelError(f"{folder}: config.json describes tables of {buffers:,} numbers beside the weights; expected at most {_BUFFERS:,}")
