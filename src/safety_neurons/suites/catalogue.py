"""The named suites: what each is, where it comes from, what its file looks like; the data are in `registry.json`."""

import difflib
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
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
class Place:
    """Where one file of a suite is found.

    Attributes:
        files: Names it goes by in a folder, the original one first; each may also be gzipped or inside a zip archive.
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
class Part:
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
class Entry:
    """One suite of the catalogue.

    Attributes:
        name: What it is asked for by.
        title: What it is.
        kind: `harmful`, `harmless` (should be answered: over-refusal) or `mixed`.
        licence: Of the prompts, as their authors state it.
        rows: Rows of the original file, of each language where there are several; None where it is not known.
        home: Its page.
        places: Its files by language; one under "" where a single file holds everything.
        columns: For each name used here the column's names in the editions that are about, in the original's order.
        wide: Languages that are columns of one table, the original's order.
        kinds: For a mixed suite, what the column `kind` says and which kind that is.
        parts: Selections that can be asked for as NAME-PART.
    """

    name: str
    title: str
    kind: str
    licence: str
    rows: int | None
    home: str
    places: Mapping[str, Place]
    columns: Mapping[str, tuple[str, ...]]
    wide: tuple[str, ...]
    kinds: Mapping[str, str]
    parts: Mapping[str, Part]

    @property
    def languages(self) -> tuple[str, ...]:
        """Language tags, where the suite says which."""
        return self.wide or tuple(language for language in self.places if language)


@dataclass(frozen=True)
class Wanted:
    """What a suite's name asks for: the entry, a part of it and a language of it, each None for all."""

    entry: Entry
    part: str | None = None
    language: str | None = None

    @property
    def name(self) -> str:
        """The name in its canonical spelling."""
        return self.entry.name + (f"-{self.part}" if self.part else "") + (f"/{self.language}" if self.language else "")

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
    def places(self) -> Mapping[str, Place]:
        """The files that have to be read."""
        places = self.entry.places
        return {self.language: places[self.language]} if self.language in places and self.language else places


@functools.cache
def entries() -> Mapping[str, Entry]:
    """Every suite of the catalogue by name."""
    raw = strict_json.loads(resources.files("safety_neurons.suites").joinpath("registry.json").read_text(encoding="utf-8"))["suites"]
    by_name = {item["name"]: item for item in raw}
    shared = ("columns", "kinds")
    whole = {
        name: {**{key: by_name[item["like"]].get(key) for key in shared}, **item} if "like" in item else item
        for name, item in by_name.items()
    }
    return {name: _entry(item) for name, item in whole.items()}


def names() -> list[str]:
    """Every name that can be asked for, parts included, languages left out."""
    return [name for entry in entries().values() for name in (entry.name, *(f"{entry.name}-{part}" for part in entry.parts))]


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
            raise InputError(f"{name}: no suite of this name and no such file; expected a name of `data list` or a file; {hint}")
    if language and language not in entry.languages:
        there = f"it has {', '.join(entry.languages)}" if entry.languages else "its language cannot be chosen"
        raise InputError(f"{name}: not there in {language!r}; {there}; leave the language away or choose another")
    return Wanted(entry, part, language or None)


def is_name(text: str) -> bool:
    """Whether a text asks for a suite of the catalogue."""
    try:
        wanted(text)
    except InputError:
        return False
    return True


def _entry(item: Mapping[str, Any]) -> Entry:
    places = {language: _place(place) for language, place in item.get("languages", {"": item}).items()}
    return Entry(
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
        parts={part: Part(rule["where"][0], rule["where"][1], rule.get("rows")) for part, rule in (item.get("parts") or {}).items()},
    )


def _place(item: Mapping[str, Any]) -> Place:
    hub = Hub(**item["hub"]) if item.get("hub") else None
    return Place(tuple(item["files"]), tuple(item.get("sha256") or ()), hub, item.get("url"))
