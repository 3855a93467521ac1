"""From a place to bytes on this machine: a folder of the user's, the hub, or the web; nothing is opened when offline."""

import contextlib
import hashlib
import os
import re
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from safety_neurons.errors import InputError
from safety_neurons.prompts.archives import located, members, read_member
from safety_neurons.suites.catalogue import Hub, Place

FOLDER_VARIABLE = "SAFETY_NEURONS_DATA"
_DEPTH = 5
_HUB = re.compile(r"hub:(?P<id>[\w.-]+/[\w.-]+)(?:@(?P<revision>[^:]+))?:(?P<file>.+)")


@dataclass(frozen=True)
class Source:
    """A file that was found.

    Attributes:
        path: The file; of an archive the archive.
        member: The file inside the archive, None where there is no archive.
        origin: Where it came from: the path, a hub address or a web address.
        sha256: Hash of the file as it is, of an archive's member unpacked.
        revision: The hub's commit, where it came from there.
    """

    path: Path
    member: str | None
    origin: str
    sha256: str
    revision: str | None = None

    @property
    def shown(self) -> str:
        """What errors call the file."""
        return f"{self.path}:{self.member}" if self.member else str(self.path)


def data_folder(folder: str | Path | None) -> Path | None:
    """The folder to look into: the given one, else the one the environment names."""
    named = folder if folder is not None else os.environ.get(FOLDER_VARIABLE) or None
    return None if named is None else Path(named).expanduser()


def find(place: Place, suite: str, folder: str | Path | None, *, offline: bool) -> Source:
    """The file of a place: in the folder, else in what was fetched before, else fetched.

    Raises:
        InputError: It is nowhere, or cannot be fetched; the message says where it was looked for and where it can be had.
    """
    where = data_folder(folder)
    if where is not None and not where.is_dir():
        raise InputError(f"{where}: no such folder; expected the folder of the suites' files; check --folder or {FOLDER_VARIABLE}")
    found = None if where is None else in_folder(place, where)
    if found is not None:
        return found
    if place.hub is not None:
        return from_hub(place.hub, offline=offline)
    if place.url is not None:
        return _from_web(place, suite, offline=offline)
    looked = f"not in {where}" if where is not None else f"no folder given (--folder or {FOLDER_VARIABLE})"
    raise InputError(f"{suite}: {looked}; expected {place.files[0]}; get it from its page and give its folder with --folder")


def in_folder(place: Place, folder: Path) -> Source | None:
    """The place's file in a folder or below it: an edition of known hash before any other, then the least deep."""
    candidates = [_source(path, member) for path, member in _candidates(place, folder)]
    known = [source for source in candidates if source.sha256 in place.sha256]
    return next(iter([*known, *candidates]), None)


def hub_address(text: str) -> Hub:
    """The hub file that `hub:ORG/NAME[@REVISION]:FILE` names."""
    match = _HUB.fullmatch(text)
    if match is None:
        raise InputError(f"{text}: expected hub:ORG/NAME[@REVISION]:FILE, such as hub:bench-llm/or-bench:or-bench-toxic.csv")
    return Hub(match["id"], match["file"], match["revision"])


def from_hub(hub: Hub, *, offline: bool) -> Source:
    """A file of a data set on the hub, from the hub's own cache where it is there.

    Raises:
        InputError: Not in the cache and offline, gated, absent, or the hub cannot be reached.
    """
    try:
        import huggingface_hub
    except ImportError:
        raise InputError(f"{hub}: reading from the hub needs huggingface_hub; install it, or give the file's folder") from None
    try:
        path = huggingface_hub.hf_hub_download(hub.id, hub.file, repo_type="dataset", revision=hub.revision, local_files_only=offline)
    except Exception as error:  # the hub client raises its own, httpx's and the system's errors
        raise InputError(_hub_failure(hub, error, offline)) from None
    commit = re.search(r"/snapshots/([0-9a-f]{40})/", Path(path).as_posix())
    return _source(Path(path), None, str(hub), commit[1] if commit else hub.revision)


def local(path: Path) -> Source:
    """A file, a zip archive's only data file, or the member that `ARCHIVE.zip/MEMBER` names."""
    inside = located(path)
    return _source(path, None) if inside is None else _source(*inside)


def content(source: Source) -> bytes:
    """The bytes of a file that was found."""
    return source.path.read_bytes() if source.member is None else read_member(source.path, source.member)


def _candidates(place: Place, folder: Path) -> list[tuple[Path, str | None]]:
    """Files below a folder that go by one of the place's names, the original name first, the least deep first."""
    names = [name.casefold() for name in place.files]
    found: list[tuple[int, int, str, Path, str | None]] = []
    for path in _walk(folder):
        relative = path.relative_to(folder).as_posix()
        if path.suffix.lower() == ".zip":
            inside = ((member, _rank(f"{relative}/{member}", names)) for member in _members(path))
            found += [(rank, relative.count("/"), relative, path, member) for member, rank in inside if rank is not None]
            continue
        rank = _rank(relative, names)
        if rank is not None:
            found.append((rank, relative.count("/"), relative, path, None))
    return [(path, member) for *_, path, member in sorted(found, key=lambda item: item[:3])]


def _rank(relative: str, names: list[str]) -> int | None:
    """Which of the names a path ends with; `.gz` behind it does not matter."""
    text = relative.casefold()
    bare = text.removesuffix(".gz")
    for number, name in enumerate(names):
        wanted = name.removesuffix(".gz")
        if bare == wanted or bare.endswith(f"/{wanted}"):
            return number
    return None


def _members(archive: Path) -> list[str]:
    """Members of an archive that happens to be in the folder; none of one that cannot be read."""
    with contextlib.suppress(InputError):
        return members(archive)
    return []


def _walk(folder: Path) -> Iterator[Path]:
    for root, folders, files in os.walk(folder):
        depth = len(Path(root).relative_to(folder).parts)
        folders[:] = sorted(name for name in folders if not name.startswith(".")) if depth < _DEPTH else []
        yield from (Path(root) / name for name in sorted(files))


def _source(path: Path, member: str | None, origin: str | None = None, revision: str | None = None) -> Source:
    digest = hashlib.sha256()
    if member is not None:
        digest.update(read_member(path, member))
    elif path.is_file():
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    shown = f"{path}:{member}" if member else str(path)
    return Source(path, member, origin or shown, digest.hexdigest(), revision)


def _hub_failure(hub: Hub, error: Exception, offline: bool) -> str:
    kind = type(error).__name__
    if offline or kind in ("LocalEntryNotFoundError", "OfflineModeIsEnabled"):
        how = "and --offline forbids to fetch it" if offline else "and the hub cannot be reached"
        return f"{hub}: not in the hub's cache, {how}; fetch it once with `data verify`, or give its folder with --folder"
    reasons = {
        "GatedRepoError": "gated: accept its terms on the hub and log in",
        "RepositoryNotFoundError": "no such data set, or one that needs a login",
        "RevisionNotFoundError": "no such revision",
        "EntryNotFoundError": "no such file in it",
        "RemoteEntryNotFoundError": "no such file in it",
    }
    why = reasons.get(kind, f"{kind}: {' '.join(str(error).split())[:120]}")
    return f"{hub}: cannot be had from the hub ({why}); download the file and give its folder with --folder"


def _cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "safety-neurons" / "data"


def _from_web(place: Place, suite: str, *, offline: bool) -> Source:
    """A file of known hash from the web, kept; whatever arrives with another hash is refused."""
    assert place.url is not None
    assert place.sha256
    target = _cache() / place.sha256[0][:16] / place.files[0]
    if target.is_file():
        kept = _source(target, None, place.url)
        if kept.sha256 in place.sha256:
            return kept
    if offline:
        raise InputError(
            f"{suite}: {place.files[0]} is not on this machine and --offline forbids to fetch it; "
            f"fetch it once with `data verify {suite}`, or give its folder with --folder"
        )
    try:
        with urllib.request.urlopen(place.url, timeout=60) as answer:  # noqa: S310 - addresses of the registry, https
            data = answer.read()
    except (urllib.error.URLError, OSError, ValueError) as error:
        raise InputError(f"{suite}: {place.url} cannot be fetched ({error}); download it and give its folder with --folder") from None
    arrived = hashlib.sha256(data).hexdigest()
    if arrived not in place.sha256:
        raise InputError(
            f"{suite}: {place.url} gave a file of hash {arrived[:12]}…, expected {place.sha256[0][:12]}…; "
            "it was not kept; download it yourself and give its folder with --folder"
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f"{target.name}.{os.getpid()}.part")
    partial.write_bytes(data)
    partial.replace(target)
    return _source(target, None, place.url)
