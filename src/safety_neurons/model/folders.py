"""Folders of checkpoints as they lie on disk: whether the files are the files, or stand in for them."""

from pathlib import Path

from safety_neurons.errors import ModelError

_POINTER = b"version https://git-lfs"
_KINDS = ("*.safetensors", "*.json", "*.model", "*.jinja")


def refuse_pointers(folder: Path) -> None:
    """Refuses a checkpoint that was cloned without its large files.

    Raises:
        ModelError: A file is a Git LFS pointer; the message names the first.
    """
    pointers = sorted(path.name for kind in _KINDS for path in folder.glob(kind) if _is_pointer(path))
    if pointers:
        others = f" and {len(pointers) - 1} more files are Git LFS pointers" if len(pointers) > 1 else " is a Git LFS pointer"
        raise ModelError(f"{folder}: {pointers[0]}{others}, expected the files themselves: run 'git lfs pull' in that folder")


def _is_pointer(path: Path) -> bool:
    if not path.is_file() or path.stat().st_size > 1024:
        return False
    with path.open("rb") as stream:
        return stream.read(len(_POINTER)) == _POINTER
