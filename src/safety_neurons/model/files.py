"""Folders of checkpoints and organisms, and foreign tensor files: checked and read without running anything
in them.
"""

import functools
import importlib.resources
import io
import math
import pathlib
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from safety_neurons import strict_json
from safety_neurons.counting import numbered
from safety_neurons.errors import InputError, ModelError, NeuronError, first_line
from safety_neurons.neurons import NeuronSet
from safety_neurons.results.records import plain_name
from safety_neurons.results.run import Contents, contents_of, read_json, within

_POINTER = b"version https://git-lfs"

_KINDS = ("*.safetensors", "*.json", "*.model", "*.jinja")

READ = (
    "*.json",
    "*.safetensors",
    "*.jinja",
    "*.model",
    "*.txt",
    "*.tiktoken",
    "*.py",
    "additional_chat_templates/*",
    "prompts/*",
)
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
        whole: Names of those that hold no fractions: whole numbers, truth values.
    """

    shapes: Mapping[str, tuple[int, ...]]
    size: int
    whole: frozenset[str] = frozenset()

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
        others = (
            f" and {numbered(len(pointers) - 1, 'more file')} are Git LFS pointers"
            if len(pointers) > 1
            else " is a Git LFS pointer"
        )
        raise ModelError(
            f"{folder}: {pointers[0]}{others}, expected the files themselves: run 'git lfs pull' in that "
            "folder"
        )


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
                    f"{index}: names the shard {name[:80]!r}; expected .safetensors files in the same "
                    "folder; download the model again"
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
        raise ModelError(
            f"{index}: cannot be read ({str(error)[:80]}); expected an index of shards; download the "
            "model again"
        ) from error
    return named


def model_contents(folder: Path) -> Contents:
    """What a model's folder holds, weights, configuration, tokenizer, template, adapter: by hash.

    A snapshot of the hub by its commit.

    An organism's prompts, which lie in its folder or the one above, are part of it.

    Raises:
        InputError: a file that cannot be read.
    """
    if re.fullmatch(r"[0-9a-f]{40}", folder.name) and folder.parent.name == "snapshots":
        return {"commit": folder.name}
    above = folder.parent / "prompts"
    prompts = (
        {} if (folder / "prompts").is_dir() or not above.is_dir() else within("prompts", contents_of(above))
    )
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
            raise ModelError(
                f"{path}: {path.stat().st_size:,} bytes; expected a configuration of some thousand"
            )
        config = strict_json.loads(path.read_bytes(), constants=True)
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: cannot be read ({str(error)[:80]}); expected a JSON object") from error
    if not isinstance(config, dict):
        raise ModelError(f"{path}: holds a {type(config).__name__}; expected a JSON object")
    return config


_SHARD = re.compile(r"model-\d+-of-\d+\.safetensors")


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
            raise ModelError(
                f"{folder}: {absent[0]} is missing, which the index names; copy or download the folder again"
            )
        return [folder / name for name in names]
    others = sorted(path.name for path in folder.glob("*.safetensors"))
    if any(_SHARD.fullmatch(name) for name in others):
        raise ModelError(
            f"{folder}: {len(others)} shards ({others[0]}, …) and no {index.name}, which says what is in "
            "which; copy or download the folder again"
        )
    pickled = any(path for kind in ("*.bin", "*.pt", "*.pth") for path in folder.glob(kind))
    why = (
        "its weights are a pickle, which can run code: convert them to safetensors"
        if pickled
        else "expected model.safetensors"
    )
    raise ModelError(
        f"{folder}: no "
        f"{'model.safetensors' if others else 'safetensors file'}{f' ({others[0]} is)' if others else ''}; "
        f"{why}"
    )


def read_headers(files: list[Path]) -> Weights:
    """Names and shapes of the tensors in files.

    Raises:
        ModelError: A file that is no whole safetensors file, or two that hold a tensor of one name.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    whole: set[str] = set()
    holders: dict[str, str] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118 - not a mapping
                    if holders.setdefault(name, file.name) != file.name:
                        raise ModelError(
                            f"{file}: holds {name}, which {holders[name]} holds too, and which is meant "
                            "cannot be told; expected each tensor once: copy or download the folder again"
                        )
                    part = opened.get_slice(name)
                    shapes[name] = tuple(part.get_shape())
                    if not part.get_dtype().startswith(("F", "BF")):
                        whole.add(name)
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{file}: cannot be read ({first_line(error)}); {WHOLE}") from error
    return Weights(shapes, sum(file.stat().st_size for file in files), frozenset(whole))


def refuse_claims(path: Path, weights: Weights | None = None) -> dict[str, Any]:
    """A configuration, unless it claims more parts than its files have tensors for, before anything is built
    of it.

    Args:
        path: The configuration's file.
        weights: The tensors it describes; None where it describes none of its own, and only what would fill
            the memory is refused.

    Raises:
        ModelError: Names the first claim.
    """
    config = read_config(path)
    most = _UNTOLD if weights is None else max(_FEW, 4 * len(weights.shapes), 4 * weights.widest)
    held = "" if weights is None else f", and its files hold {len(weights.shapes)} tensors"
    for name, value in _numbers(config):
        if math.isnan(value):
            raise ModelError(f"{path}: {name} is NaN; expected a number: correct it, or download it again")
        if value > most and isinstance(value, int) and _COUNTED.search(name):
            raise ModelError(f"{path}: {name} is {value:,}{held}; expected as many as there are")
    layers = config.get("num_hidden_layers")
    if weights is not None and isinstance(layers, int) and layers > len(weights.shapes):
        raise ModelError(f"{path}: claims {layers:,} layers{held}; expected weights for each layer")
    return config


def _numbers(config: Mapping[str, Any]) -> Iterator[tuple[str, int | float]]:
    """The numbers in a configuration and those inside it, by their names."""
    waiting: list[Any] = [config]
    while waiting:
        item = waiting.pop()
        for name, value in item.items() if isinstance(item, Mapping) else ():
            if isinstance(value, int | float):
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
            f"{folder}: config.json describes {claimed:,} parameters, and its files have "
            f"{weights.size:,} bytes; expected whole files"
        )
    if buffers > max(_BUFFERS, room):
        raise ModelError(
            f"{folder}: config.json describes tables of {buffers:,} numbers beside the weights; expected "
            f"at most {_BUFFERS:,}"
        )


_DEEPEST = 32

CONVERTED = "docs/exchange.md says how to convert pickles that you trust"

_OF_TORCH = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19"
"""First bytes of what `torch.save` wrote before it wrote archives."""


def read_torch(path: str | pathlib.Path) -> Any:
    """What `torch.save` wrote, tensors as arrays.

    Anything but tensors, numbers, text and containers is refused.

    Raises:
        NeuronError: it cannot be read that way, or claims more than the file holds. Nothing that the file
        names is imported or run.
    """
    try:
        with pathlib.Path(path).open("rb") as stream:
            return _Arrays(pathlib.Path(path).stat().st_size).of(_loaded(stream))
    except NeuronError as error:
        raise NeuronError(f"cannot read {str(path)!r} safely: {error}") from error
    except Exception as error:  # torch's reader raises whatever damaged bytes lead it into
        raise NeuronError(
            f"cannot read {str(path)!r} safely ({first_line(error)[:100]}); expected tensors in plain "
            "containers"
        ) from error


def _loaded(stream: Any) -> Any:
    """What torch reads from a stream without building objects.

    Raises:
        NeuronError: a plain pickle; an archive whose parts are compressed: a small file would fill the
        memory.
    """
    start = stream.read(len(_OF_TORCH))
    if not start.startswith(b"PK") and start != _OF_TORCH:
        raise NeuronError(
            "it is not what torch.save writes, and may be a pickle, which can run code as it is read; "
            f"{CONVERTED}"
        )
    if zipfile.is_zipfile(stream):
        stream.seek(0)
        with zipfile.ZipFile(stream) as archive:
            parts = archive.infolist()
        stream.seek(0, io.SEEK_END)
        if (
            any(part.compress_type != zipfile.ZIP_STORED for part in parts)
            or sum(part.file_size for part in parts) > stream.tell()
        ):
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
            return {
                name: _Arrays(source.stat().st_size).of(tensor) for name, tensor in load_file(source).items()
            }
        except NeuronError:
            raise
        except Exception as error:  # as above, also of numpy and safetensors
            raise NeuronError(
                f"cannot read {str(source)!r} ({str(error)[:100]}); expected named tensors"
            ) from error
    if source.is_dir():
        raise NeuronError(f"{str(source)!r} is a folder; expected one file of named tensors; {CONVERTED}")
    content = read_torch(source)
    if not isinstance(content, dict):
        raise NeuronError(f"{str(source)!r} holds no mapping of names to tensors")
    return {name: values for name, values in content.items() if isinstance(name, str)}


def read_weights(path: str | pathlib.Path) -> dict[str, np.ndarray]:
    """Importances or masks of single weights by projection, from a file of named tensors.

    Errors as for `read_named`.
    """
    return {name: values for name, values in read_named(path).items() if isinstance(values, np.ndarray)}


class _Arrays:
    """The same containers with arrays in place of tensors (bfloat16 as float32), each converted once however
    often it is named.

    Args:
        stored: bytes of the file; tensors that hold more are not from it, or are one number spread over many
            places.
    """

    def __init__(self, stored: int) -> None:
        self._left = stored
        self._known: dict[int, tuple[Any, Any]] = {}

    def of(self, content: Any, depth: int = 0) -> Any:
        """The content with arrays in it."""
        if depth > _DEEPEST:
            raise NeuronError(
                f"its containers are nested more than {_DEEPEST} deep; expected tensors in plain containers"
            )
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
        return (
            type(content)(self.of(value, depth) for value in content)
            if type(content) in (list, tuple)
            else content
        )

    def _array(self, tensor: Tensor) -> np.ndarray:
        self._left -= tensor.numel() * tensor.element_size()
        if self._left < 0:
            raise NeuronError(
                f"its tensors (one of shape {tuple(tensor.shape)}) are larger than what is stored of them"
            )
        tensor = tensor.detach().cpu()
        array = np.array((tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy())
        if array.dtype.kind not in "biuf":
            raise NeuronError(f"a tensor of {tensor.dtype}; expected real numbers")
        return array


ORGANISM = "organism:"
"""What the address of an organism's model or neuron file begins with."""

RECORD, CARD, PROMPTS, TRUTH = "organism.json", "README.md", "prompts", "truth"


@dataclass(frozen=True)
class OrganismFolder:
    """An organism on disk.

    Attributes:
        path: its folder.
        record: what `organism.json` says: recipe, seed, stages, what was measured, truth.
    """

    path: Path
    record: dict[str, Any]

    @property
    def stages(self) -> list[str]:
        """Names of its models, from the least to the most trained."""
        return list(self.record["stages"])

    def spec(self, stage: str) -> str:
        """The model argument of a stage, or the path of one of its neuron files (`truth`, `decoys`, …).

        Raises:
            InputError: it has neither of that name.
        """
        if stage in self.record["stages"]:
            return "+".join(
                str(self.path / plain_name(part, "folder of a stage"))
                for part in self.record["stages"][stage]
            )
        plain_name(stage, "stage")
        file = self.path / f"{stage}.safetensors"
        if file.is_file():
            return str(file)
        sets = sorted(path.stem for path in self.path.glob("*.safetensors"))
        raise InputError(
            f"organism {self.record['name']} has no {stage!r}; it has {', '.join([*self.stages, *sets])}"
        )

    @property
    def base(self) -> str:
        """The model argument of the less safe model of its pair."""
        return self.spec(self.record["base"])

    @property
    def aligned(self) -> str:
        """The model argument of the safer model of its pair; for an organism without one, its only model."""
        return self.spec(self.record["aligned"])

    @property
    def prompts(self) -> Path:
        """The folder of its own prompts; pass it as `folder` where `builtin:` names are read."""
        return self.path / PROMPTS

    @property
    def truth(self) -> NeuronSet | None:
        """The neurons that carry its safety, where they are known: those that work in English."""
        file = self.path / f"{TRUTH}.safetensors"
        return NeuronSet.load(file) if file.is_file() else None

    @property
    def card(self) -> Path:
        """The model card."""
        return self.path / CARD


def _organism_data() -> Path:
    return Path(str(importlib.resources.files("safety_neurons"))) / "organism" / "data"


@functools.cache
def recipe_records() -> dict[str, dict[str, Any]]:
    """The recipes of all organisms, by name, as JSON values."""
    return strict_json.loads((_organism_data() / "recipes.json").read_text(encoding="utf-8"))


def known_recipe(name: str) -> None:
    """Refuses a name that no recipe has.

    Raises:
        InputError: there is no recipe of that name.
    """
    if name not in recipe_records():
        raise InputError(f"no organism is called {name!r}; the recipes are {', '.join(recipe_records())}")


def shipped_folder(name: str) -> Path:
    """Where the package keeps the organism of that name, whether or not it is there."""
    return _organism_data() / "organisms" / name


def open_organism(name: str | Path) -> OrganismFolder:
    """Open an organism by its name or by the folder it was built in.

    Raises:
        InputError: there is no such organism, or it has to be built first.
    """
    folder = Path(name)
    if not (folder / RECORD).is_file():
        if isinstance(name, Path):
            raise InputError(
                f"{name}: no {RECORD}; expected the folder of an organism; write one with `organism build`"
            )
        known_recipe(name)
        folder = shipped_folder(name)
        if not (folder / RECORD).is_file():
            raise InputError(
                f"organism {name!r} is not in the package; `safety-neurons organism build --name {name} "
                "--out DIR` makes it"
            )
    record = read_json(folder / RECORD)
    if not isinstance(record, dict) or "stages" not in record:
        raise InputError(
            f"{folder / RECORD} has no stages; expected the record of an organism; build it again"
        )
    plain_name(record.get("name"), f"{folder / RECORD}: the organism")
    return OrganismFolder(folder.absolute(), record)


def organism_spec(address: str) -> str:
    """The model argument or neuron file of `NAME[/STAGE]`; without a stage, the aligned model."""
    name, _, stage = address.partition("/")
    folder = open_organism(name)
    return folder.spec(stage) if stage else folder.aligned
