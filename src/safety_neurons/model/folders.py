"""Folders of checkpoints as they lie on disk: whether the files are the files, or stand in for them; and what they hold."""

import re
from pathlib import Path, PurePosixPath

from safety_neurons import strict_json
from safety_neurons.errors import ModelError
from safety_neurons.results.content import Contents, contents_of, within

_POINTER = b"version https://git-lfs"
_KINDS = ("*.safetensors", "*.json", "*.model", "*.jinja")
READ = ("*.json", "*.safetensors", "*.jinja", "*.model", "*.txt", "*.tiktoken", "*.py", "additional_chat_templates/*", "prompts/*")
"""Files of a model's folder that can change what it computes or is asked."""


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
