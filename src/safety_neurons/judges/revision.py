"""Which version of a judge's weights is judging: the hub's commit, or a hash of a local folder's files."""

import hashlib
import pathlib

_PART = 1 << 20


def revision_of(folder: pathlib.Path | None) -> str:
    """The commit of a snapshot of the hub; for other folders a hash of names, sizes, and the first and last MiB of every file."""
    if folder is None:
        return "in memory"
    if folder.parent.name == "snapshots":
        return folder.name
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.suffix in (".safetensors", ".json", ".jinja", ".model", ".txt") and path.is_file():
            size = path.stat().st_size
            digest.update(f"{path.name}\0{size}\0".encode())
            with path.open("rb") as stream:
                digest.update(stream.read(_PART))
                stream.seek(max(0, size - _PART))
                digest.update(stream.read(_PART))
    return digest.hexdigest()[:16]
