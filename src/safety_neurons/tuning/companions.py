"""Companions: whatever a model's folder holds beside weights (processors, templates, licences, code), copied to where it is written."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from safety_neurons.errors import RunError
from safety_neurons.model import LanguageModel

WEIGHTS = (
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".ggml", ".onnx", ".onnx_data", ".npz", ".npy"),
    *(".tflite", ".ot"),
)
"""Endings of files that hold weights or states of a training."""
INDEX = ".index.json"
"""Ending of a file that says in which shard a weight is."""
ASIDE = ("__pycache__", "prompts", "runs", "checkpoints")
"""Folders that belong to a machine, a run or an organism and not to the model."""


def copy_companions(model: LanguageModel, target: Path) -> list[str]:
    """Copy what the folder of a model holds beside weights; nothing that is in the target is overwritten.

    Left out are weights and their indices, hidden files and folders (`.git`, caches), folders of runs, and links that lead out of the
    folder; a snapshot of the hub's cache, whose files are all links to its own blobs, is followed.

    Args:
        model: as it was loaded; of one made in memory nothing is copied.
        target: a folder that holds the model as it was written.

    Returns:
        Names of the copied files, relative to the folder.

    Raises:
        RunError: a file cannot be copied.

    Source: none; `save_pretrained` writes what transformers knows of, and processors, templates and code of a checkpoint are not among it.
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
            raise RunError(f"cannot copy {str(path)!r} ({error.strerror or error}); choose a writable place with free space") from error
        copied.append(str(name))
    return copied


def _beside_weights(source: Path, target: Path) -> Iterator[Path]:
    within = source.resolve()
    blobs = within.parent.parent / "blobs" if within.parent.name == "snapshots" else None
    for folder, folders, files in os.walk(source):
        here = Path(folder)
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name not in ASIDE and not _is(here / name, target))
        folders[:] = [name for name in folders if not (here / name).is_symlink() and not _is_model(here / name)]
        for name in sorted(files):
            real = (here / name).resolve()
            if name.startswith(".") or name.lower().endswith((*WEIGHTS, INDEX)) or not real.is_file():
                continue
            if real.is_relative_to(within) or (blobs is not None and real.is_relative_to(blobs)):
                yield here / name


def _is_model(folder: Path) -> bool:
    """Whether a folder inside is a model or an adapter of its own (another stage, a checkpoint of the training)."""
    return any((folder / name).is_file() for name in ("config.json", "adapter_config.json"))


def _is(folder: Path, target: Path) -> bool:
    return folder.resolve() == target.resolve() or target.resolve().is_relative_to(folder.resolve())
