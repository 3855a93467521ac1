"""The named suites and where their files lie: what each is, in `registry.json`.

A folder of the user's, the hub, or the web.
"""

import difflib
import functools
import hashlib
import os
import re
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from safety_neurons import strict_json
from safety_neurons.errors import InputError

KINDS = ("harmful", "harmless", "mixed")


@dataclass(frozen=True)
class Hub:
    """A file of a data set on the Hugging Face hub."""

    id: str
    file: str
    revision: str | None = None

    def __str__(self) -> str:
        return f"hub:{self.id}{'@' + self.revision if self.revision else ''}:{self.file}"


@dataclass(frozen=True)
class Location:
    """Where one file of a suite is found.

    Attributes:
        files: Names it goes by in a folder, the original one first; each may also be gzipped.
        sha256: Hashes of the known editions; empty where none is known.
        hub: Where it is on the hub.
        url: Where it is on the web; only files of known hash are fetched from there.
    """

    files: tuple[str, ...]
    sha256: tuple[str, ...] = ()
    hub: Hub | None = None
    url: str | None = None

    @property
    def origin(self) -> str:
        """Where it can be fetched from, as people would say it."""
        return str(self.hub) if self.hub else self.url or "a file of your own"


@dataclass(frozen=True)
class SuitePart:
    """A named selection of a suite's rows.

    Attributes:
        column: The column, by its name here, that decides.
        value: What it has to hold.
        rows: How many there are in the original, where that is known.
    """

    column: str
    value: str
    rows: int | None = None


@dataclass(frozen=True)
class SuiteVotes:
    """Labels of several people, or for several kinds of harm, that make one.

    Attributes:
        columns: Where they stand; one that is empty is no vote.
        safe: What a vote says that finds no harm.
        share: Of the votes that have to find harm; 0 for any one of them.
    """

    columns: tuple[str, ...]
    safe: tuple[str, ...]
    share: float = 0.0


@dataclass(frozen=True)
class SuiteEntry:
    """One suite of the catalogue.

    Attributes:
        name: What it is asked for by.
        title: What it is.
        kind: `harmful`, `harmless` (should be answered: over-refusal) or `mixed`.
        licence: Of the prompts, as their authors state it.
        rows: Rows of the original file, of each language where there are several; None where it is not known.
        home: Its page.
        places: Its files by language; one under "" where a single file holds everything.
        columns: For each name used here the column's names in the editions that are about, in the original's
            order.
        wide: Languages that are columns of one table, the original's order.
        kinds: For a mixed suite, what the column `kind` says and which kind that is.
        parts: Selections that can be asked for as NAME-PART.
        votes: What the column `kind` (`safe`, `unsafe`) is made of, where the original has several labels.
        only: What columns of the original have to hold for a row to be taken.
        answers: Pairs of columns, an answer and its label, of which each makes a row of its own.
        withheld: What stands in the place of a text that the authors do not give.
        checked: Where names of columns and files were looked up, for suites without a known hash.
    """

    name: str
    title: str
    kind: str
    licence: str
    rows: int | None
    home: str
    places: Mapping[str, Location]
    columns: Mapping[str, tuple[str, ...]]
    wide: tuple[str, ...]
    kinds: Mapping[str, str]
    parts: Mapping[str, SuitePart]
    votes: SuiteVotes | None = None
    only: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    answers: tuple[tuple[str, str], ...] = ()
    withheld: str = ""
    checked: str = ""

    @property
    def languages(self) -> tuple[str, ...]:
        """Language tags, where the suite says which."""
        return self.wide or tuple(language for language in self.places if language)


@dataclass(frozen=True)
class Wanted:
    """What a suite's name asks for: the entry, a part of it and a language of it, each None for all."""

    entry: SuiteEntry
    part: str | None = None
    language: str | None = None

    @property
    def name(self) -> str:
        """The name in its canonical spelling."""
        return (
            self.entry.name
            + (f"-{self.part}" if self.part else "")
            + (f"/{self.language}" if self.language else "")
        )

    @property
    def rows(self) -> int | None:
        """Prompts that are to be there, where that is known."""
        if self.part is not None:
            return self.entry.parts[self.part].rows
        if self.entry.rows is None:
            return None
        return self.entry.rows * (1 if self.language else max(1, len(self.entry.languages)))

    @property
    def kind(self) -> str:
        """The kind of the part, else of the whole."""
        if self.part is not None and self.entry.parts[self.part].column == "kind":
            return self.entry.parts[self.part].value
        return self.entry.kind

    @property
    def places(self) -> Mapping[str, Location]:
        """The files that have to be read."""
        places = self.entry.places
        return {self.language: places[self.language]} if self.language in places and self.language else places


@functools.cache
def entries() -> Mapping[str, SuiteEntry]:
    """Every suite of the catalogue by name."""
    raw = strict_json.loads(
        resources.files("safety_neurons.suites").joinpath("registry.json").read_text(encoding="utf-8")
    )["suites"]
    by_name = {item["name"]: item for item in raw}
    shared = ("columns", "kinds")
    whole = {
        name: {**{key: by_name[item["like"]].get(key) for key in shared}, **item} if "like" in item else item
        for name, item in by_name.items()
    }
    return {name: _entry(item) for name, item in whole.items()}


def names() -> list[str]:
    """Every name that can be asked for, parts included, languages left out."""
    return [
        name
        for entry in entries().values()
        for name in (entry.name, *(f"{entry.name}-{part}" for part in entry.parts))
    ]


def wanted(name: str) -> Wanted:
    """What a name asks for.

    Args:
        name: `NAME`, `NAME-PART` or `NAME/LANGUAGE`; case and `_` for `-` do not matter.

    Raises:
        InputError: No suite, part or language of that name.
    """
    stem, _, language = name.strip().casefold().replace("_", "-").partition("/")
    known = entries()
    entry, part = known.get(stem), None
    if entry is None:
        before, _, part = stem.rpartition("-")
        entry = known.get(before)
        if entry is None or part not in entry.parts:
            near = difflib.get_close_matches(stem, names(), n=1, cutoff=0.5)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
            raise InputError(
                f"{name}: no suite of this name and no such file; expected a name of `data list` or a "
                f"file; {hint}"
            )
    if language and language not in entry.languages:
        there = f"it has {', '.join(entry.languages)}" if entry.languages else "its language cannot be chosen"
        raise InputError(
            f"{name}: not there in {language!r}; {there}; leave the language away or choose another"
        )
    return Wanted(entry, part, language or None)


def is_name(text: str) -> bool:
    """Whether a text asks for a suite of the catalogue."""
    try:
        wanted(text)
    except InputError:
        return False
    return True


def _entry(item: Mapping[str, Any]) -> SuiteEntry:
    places = {language: _place(place) for language, place in item.get("languages", {"": item}).items()}
    return SuiteEntry(
        name=item["name"],
        title=item["title"],
        kind=item["kind"],
        licence=item["licence"],
        rows=item.get("rows"),
        home=item["home"],
        places=places,
        columns={key: tuple(columns) for key, columns in item["columns"].items()},
        wide=tuple(item.get("wide") or ()),
        kinds=item.get("kinds") or {},
        parts={
            part: SuitePart(rule["where"][0], rule["where"][1], rule.get("rows"))
            for part, rule in (item.get("parts") or {}).items()
        },
        votes=_votes(item["votes"]) if "votes" in item else None,
        only={column: tuple(values) for column, values in (item.get("only") or {}).items()},
        answers=tuple((answer, label) for answer, label in item.get("answers") or ()),
        withheld=item.get("withheld", ""),
        checked=item.get("checked", ""),
    )


def _votes(item: Mapping[str, Any]) -> SuiteVotes:
    return SuiteVotes(tuple(item["columns"]), tuple(item["safe"]), item.get("share", 0.0))


def _place(item: Mapping[str, Any]) -> Location:
    hub = Hub(**item["hub"]) if item.get("hub") else None
    return Location(tuple(item["files"]), tuple(item.get("sha256") or ()), hub, item.get("url"))


FOLDER_VARIABLE = "SAFETY_NEURONS_DATA"
_DEPTH = 5
_HUB = re.compile(r"hub:(?P<id>[\w.-]+/[\w.-]+)(?:@(?P<revision>[^:]+))?:(?P<file>.+)")


@dataclass(frozen=True)
class Source:
    """A file that was found.

    Attributes:
        path: The file.
        origin: Where it came from: the path, a hub address or a web address.
        sha256: Hash of the file as it is.
        revision: The hub's commit, where it came from there.
    """

    path: Path
    origin: str
    sha256: str
    revision: str | None = None


def data_folder(folder: str | Path | None) -> Path | None:
    """The folder to look into: the given one, else the one the environment names."""
    named = folder if folder is not None else os.environ.get(FOLDER_VARIABLE) or None
    return None if named is None else Path(named).expanduser()


def find(location: Location, suite: str, folder: str | Path | None, *, offline: bool) -> Source:
    """The file of a place: in the folder, else in what was fetched before, else fetched.

    Raises:
        InputError: It is nowhere, or cannot be fetched; the message says where it was looked for and where it
        can be had.
    """
    where = data_folder(folder)
    if where is not None and not where.is_dir():
        raise InputError(
            f"{where}: no such folder; expected the folder of the suites' files; check --folder or "
            f"{FOLDER_VARIABLE}"
        )
    local = None if where is None else in_folder(location, where)
    if local is not None:
        return local
    if location.hub is not None:
        return from_hub(location.hub, offline=offline)
    if location.url is not None:
        return _from_web(location, suite, offline=offline)
    looked = f"not in {where}" if where is not None else f"no folder given (--folder or {FOLDER_VARIABLE})"
    raise InputError(
        f"{suite}: {looked}; expected {location.files[0]}; get it from its page and give its folder with "
        "--folder"
    )


def in_folder(location: Location, folder: Path) -> Source | None:
    """The place's file in a folder or below it: an edition of known hash before any other, then the least
    deep.
    """
    candidates = [source_of(path) for path in _candidates(location, folder)]
    known = [source for source in candidates if source.sha256 in location.sha256]
    return next(iter([*known, *candidates]), None)


def hub_address(text: str) -> Hub:
    """The hub file that `hub:ORG/NAME[@REVISION]:FILE` names."""
    match = _HUB.fullmatch(text)
    if match is None:
        raise InputError(
            f"{text}: expected hub:ORG/NAME[@REVISION]:FILE, such as "
            "hub:bench-llm/or-bench:or-bench-toxic.csv"
        )
    return Hub(match["id"], match["file"], match["revision"])


def from_hub(hub: Hub, *, offline: bool) -> Source:
    """A file of a data set on the hub, from the hub's own cache where it is there.

    Raises:
        InputError: Not in the cache and offline, gated, absent, or the hub cannot be reached.
    """
    try:
        import huggingface_hub
    except ImportError:
        raise InputError(
            f"{hub}: reading from the hub needs huggingface_hub; install it, or give the file's folder"
        ) from None
    try:
        path = huggingface_hub.hf_hub_download(
            hub.id, hub.file, repo_type="dataset", revision=hub.revision, local_files_only=offline
        )
    except Exception as error:  # the hub client raises its own, httpx's and the system's errors
        raise InputError(_hub_failure(hub, error, offline)) from None
    commit = re.search(r"/snapshots/([0-9a-f]{40})/", Path(path).as_posix())
    return source_of(Path(path), str(hub), commit[1] if commit else hub.revision)


def _candidates(location: Location, folder: Path) -> list[Path]:
    """Files below a folder that go by one of the place's names, the original name first, the least deep
    first.
    """
    names = [name.casefold() for name in location.files]
    ranked: list[tuple[int, int, str, Path]] = []
    for path in _walk(folder):
        relative = path.relative_to(folder).as_posix()
        rank = _rank(relative, names)
        if rank is not None:
            ranked.append((rank, relative.count("/"), relative, path))
    return [path for *_, path in sorted(ranked)]


def _rank(relative: str, names: list[str]) -> int | None:
    """Which of the names a path ends with; `.gz` behind it does not matter."""
    text = relative.casefold()
    bare = text.removesuffix(".gz")
    for number, name in enumerate(names):
        wanted = name.removesuffix(".gz")
        if bare == wanted or bare.endswith(f"/{wanted}"):
            return number
    return None


def _walk(folder: Path) -> Iterator[Path]:
    for root, folders, files in os.walk(folder):
        depth = len(Path(root).relative_to(folder).parts)
        folders[:] = sorted(name for name in folders if not name.startswith(".")) if depth < _DEPTH else []
        yield from (Path(root) / name for name in sorted(files))


def source_of(path: Path, origin: str | None = None, revision: str | None = None) -> Source:
    """A file that is there; of one that is not the hash is that of nothing, and its reader says what is
    wrong.
    """
    digest = hashlib.sha256()
    if path.is_file():
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256")
    return Source(path, origin or str(path), digest.hexdigest(), revision)


def _hub_failure(hub: Hub, error: Exception, offline: bool) -> str:
    kind = type(error).__name__
    if offline or kind in ("LocalEntryNotFoundError", "OfflineModeIsEnabled"):
        how = "and --offline forbids to fetch it" if offline else "and the hub cannot be reached"
        return (
            f"{hub}: not in the hub's cache, {how}; fetch it once with `data verify`, or give its folder "
            "with --folder"
        )
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


def _from_web(location: Location, suite: str, *, offline: bool) -> Source:
    """A file of known hash from the web, kept; whatever arrives with another hash is refused."""
    assert location.url is not None
    assert location.sha256
    target = _cache() / location.sha256[0][:16] / location.files[0]
    if target.is_file():
        cached = source_of(target, location.url)
        if cached.sha256 in location.sha256:
            return cached
    if offline:
        raise InputError(
            f"{suite}: {location.files[0]} is not on this machine and --offline forbids to fetch it; "
            f"fetch it once with `data verify {suite}`, or give its folder with --folder"
        )
    try:
        with urllib.request.urlopen(location.url, timeout=60) as answer:  # noqa: S310 - addresses of the registry, https
            data = answer.read()
    except (urllib.error.URLError, OSError, ValueError) as error:
        raise InputError(
            f"{suite}: {location.url} cannot be fetched ({error}); download it and give its folder with "
            "--folder"
        ) from None
    arrived = hashlib.sha256(data).hexdigest()
    if arrived not in location.sha256:
        raise InputError(
            f"{suite}: {location.url} gave a file of hash {arrived[:12]}…, expected "
            f"{location.sha256[0][:12]}…; it was not kept; download it yourself and give its folder with "
            "--folder"
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f"{target.name}.{os.getpid()}.part")
    partial.write_bytes(data)
    partial.replace(target)
    return source_of(target, location.url)
