"""`suite`: one door to the named suites, to files in their formats and to files of the user's own; `verify` looks before a run starts."""

import contextlib
import dataclasses
import gzip
import hashlib
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from safety_neurons.errors import InputError, UsageError
from safety_neurons.prompts import Prompts, prompts
from safety_neurons.suites.catalogue import KINDS, Entry, Place, Wanted, entries, is_name, wanted
from safety_neurons.suites.reading import read, table_rows
from safety_neurons.suites.sources import Source, content, find, from_hub, hub_address, local

HUB, BUILTIN = "hub:", "builtin:"


@dataclass(frozen=True)
class Suite:
    """Prompts to evaluate on, and what is to be expected of their answers.

    Attributes:
        name: The suite's name, or the file's.
        prompts: In the file's order. Every `meta` holds `suite`, `kind`, `goal` (the bare request), `behavior_id` and `method`
            (`direct`); `target`, `context` and `subcategory` where the suite has them. `answer` is never set.
        kind: `harmful` (should be refused), `harmless` (should be answered) or `mixed`.
        source: Where the file came from.
        sha256: Hashes of the files that were read.
        licence: Of the prompts; empty for a file of the user's own.
        rows: Prompts the original has, where that is known.
    """

    name: str
    prompts: Prompts
    kind: str
    source: str = ""
    sha256: tuple[str, ...] = ()
    licence: str = ""
    rows: int | None = None

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def notes(self) -> list[str]:
        """One line for each thing that was repaired, dropped or looks wrong."""
        return self.prompts.notes

    @cached_property
    def harmful(self) -> Prompts:
        """The prompts that should be refused."""
        return self._of("harmful")

    @cached_property
    def harmless(self) -> Prompts:
        """The prompts that should be answered: over-refusal is measured on them."""
        return self._of("harmless")

    def _of(self, kind: str) -> Prompts:
        return Prompts([prompt for prompt in self.prompts if prompt.meta["kind"] == kind], self.name, self.notes)


@dataclass(frozen=True)
class Check:
    """What `verify` saw of one suite.

    Attributes:
        name: The suite.
        ok: Whether a run could start: the files are there, can be read and hold what they should.
        sources: Where the files are.
        hashes: `match`, `other` (an edition that is not known) or `unknown` (no expected hash), for each file.
        prompts: Prompts that were read; None where they could not be.
        expected: Prompts the original has, where that is known.
        problem: Why it is not ok, in one line.
        notes: One line for each thing that was repaired.
    """

    name: str
    ok: bool
    sources: tuple[str, ...] = ()
    hashes: tuple[str, ...] = ()
    prompts: int | None = None
    expected: int | None = None
    problem: str | None = None
    notes: tuple[str, ...] = field(default=())

    def to_json(self) -> dict[str, Any]:
        """The check as JSON values."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in dataclasses.asdict(self).items()}


def suite(
    source: str | Path,
    *,
    folder: str | Path | None = None,
    offline: bool = False,
    limit: int | None = None,
    kind: str | None = None,
    column: str | None = None,
) -> Suite:
    """A suite by name, or a file as a suite.

    Args:
        source: A name of the catalogue (`advbench`, `harmbench-contextual`, `multijail/de`, …); a file; `hub:ORG/NAME[@REVISION]:FILE`;
            `builtin:NAME`; or `NAME=FILE` for a file in a named suite's format. A file that exists wins over a name.
        folder: Where the suites' files lie, at any depth; by default the folder that SAFETY_NEURONS_DATA names.
        offline: Never open a socket.
        limit: Keep so many prompts, taken evenly over kinds and languages, the first of each.
        kind: `harmful` or `harmless`: of a file of the user's own (harmful by default), or the prompts of a mixed suite to keep.
        column: Column of the prompts, where the file names it in a way of its own.

    Raises:
        InputError: No such suite or file, or a file that cannot be read.
        UsageError: An unknown kind, or a limit below 1.
    """
    if kind is not None and kind not in KINDS[:2]:
        raise UsageError(f"kind {kind!r}: expected harmful or harmless")
    if limit is not None and limit < 1:
        raise UsageError(f"limit {limit}: expected at least 1; leave it away to read all prompts")
    asked, sources = _located(source, folder, offline)
    found = _own(source, sources, kind, column) if asked is None else _named(asked, sources, column)
    if kind is not None and kind != found.kind:
        if found.kind != "mixed":
            raise UsageError(f"{source}: its kind is {found.kind}, not {kind}; leave the kind away")
        found = dataclasses.replace(found, prompts=found.harmful if kind == "harmful" else found.harmless, kind=kind, rows=None)
    return found if limit is None else dataclasses.replace(found, prompts=_evenly(found.prompts, limit))


def verify(source: str | Path, *, folder: str | Path | None = None, offline: bool = False, any_edition: bool = False) -> Check:
    """Look whether a suite is there and is what it should be; never raises for a suite that is not.

    Where a hash is known the file has to have it; compression and the kind of line ends do not matter.

    Args:
        source: As for `suite`.
        folder: As for `suite`.
        offline: Never open a socket; otherwise what is missing is fetched and kept.
        any_edition: Take a file of another hash that holds as many prompts as the original (a mirror, another format).
    """
    name = str(source)
    try:
        asked, sources = _located(source, folder, offline)
        found = _own(source, sources, None, None) if asked is None else _named(asked, sources, None)
    except InputError as error:
        return Check(name, ok=False, problem=str(error))
    hashes = tuple(_hash_of(asked.places.get(language), item) for language, item in sources.items()) if asked else ("unknown",)
    missing = [] if asked is None else [language for language in asked.places if language not in sources]
    expected = found.rows if not missing else None
    problem = None
    if expected is not None and len(found) != expected:
        problem = f"{found.name}: {len(found)} prompts, expected {expected}; the file is not the whole original; get it again"
    elif "other" in hashes and not any_edition:
        problem = f"{found.name}: not an edition that is known (hash {found.sha256[0][:12]}…); get the original, or allow --any-edition"
    shown = tuple(item.shown for item in sources.values()) or (found.source,)
    return Check(found.name, problem is None, shown, hashes, len(found), found.rows, problem, tuple(found.notes))


def catalogue() -> list[dict[str, Any]]:
    """What `data list` shows of every named suite: name, kind, licence, prompts, languages, parts, origin, page, expected hashes."""
    return [_described(entry) for entry in entries().values()]


def _described(entry: Entry) -> dict[str, Any]:
    places = list(entry.places.values())
    return {
        "name": entry.name,
        "title": entry.title,
        "kind": entry.kind,
        "licence": entry.licence,
        "prompts": Wanted(entry).rows,
        "languages": list(entry.languages),
        "parts": [f"{entry.name}-{part}" for part in entry.parts],
        "file": places[0].files[0],
        "origin": places[0].origin,
        "home": entry.home,
        "sha256": [digest for place in places for digest in place.sha256],
    }


def _located(source: str | Path, folder: str | Path | None, offline: bool) -> tuple[Wanted | None, dict[str, Source]]:
    """The suite a source means (None for a file of the user's own) and its files by language."""
    text = str(source)
    name, equals, rest = text.partition("=")
    if equals and is_name(name) and not Path(text).exists():
        named = wanted(name)
        language = named.language or next(iter(named.places))
        return named, {language if not named.entry.wide else "": _file(rest, offline)}
    if text.startswith(BUILTIN):
        return None, {}
    if text.startswith(HUB) or Path(text).expanduser().exists() or (isinstance(source, Path)) or _is_member(text):
        return None, {"": _file(text, offline)}
    asked = wanted(text) if not _looks_like_a_file(text) else None
    if asked is None:
        return None, {"": local(Path(text).expanduser())}
    return asked, _files(asked, folder, offline)


def _looks_like_a_file(text: str) -> bool:
    return not is_name(text) and (Path(text).suffix != "" or text.startswith((".", "~", "/")))


def _is_member(text: str) -> bool:
    return any(part.suffix.lower() == ".zip" and part.is_file() for part in Path(text).expanduser().parents)


def _file(text: str, offline: bool) -> Source:
    return from_hub(hub_address(text), offline=offline) if text.startswith(HUB) else local(Path(text).expanduser())


def _files(asked: Wanted, folder: str | Path | None, offline: bool) -> dict[str, Source]:
    """The suite's files; of one that has a file a language those that can be had, as long as there is one."""
    found: dict[str, Source] = {}
    failed: list[InputError] = []
    for language, place in asked.places.items():
        try:
            found[language] = find(place, asked.name, folder, offline=offline)
        except InputError as error:
            failed.append(error)
    if not found:
        raise failed[0]
    return found


def _named(asked: Wanted, sources: Mapping[str, Source], column: str | None) -> Suite:
    read_prompts = read(asked, sources, column)
    missing = [language for language in asked.places if language not in sources]
    if missing:
        read_prompts.notes.append(f"languages {', '.join(missing)}: their files are not there")
    files = sources.values()
    return Suite(
        name=asked.name,
        prompts=read_prompts,
        kind=asked.kind,
        source=", ".join(source.origin for source in files),
        sha256=tuple(source.sha256 for source in files),
        licence=asked.entry.licence,
        rows=asked.rows,
    )


def _own(source: str | Path, sources: Mapping[str, Source], kind: str | None, column: str | None) -> Suite:
    """A file of the user's own, or a built-in list."""
    text = str(source)
    if not sources:
        found = prompts(text, column=column)
        guessed = "harmless" if text.removeprefix(BUILTIN).startswith(("harmless", "general")) else "harmful"
        return _stamped(found, text, kind or guessed, Source(Path(), None, text, found.sha256))
    file = sources[""]
    if file.path.suffix.lower() == ".parquet" or (file.member or "").lower().endswith(".parquet"):
        found = prompts(table_rows(file, []), column=column)
    else:
        found = prompts(file.path / file.member if file.member else file.path, column=column)
    name = file.origin if text.startswith(HUB) else Path(file.member or file.path).name
    return _stamped(found, name, kind or "harmful", file)


def _stamped(found: Prompts, name: str, kind: str, source: Source) -> Suite:
    """The prompts with the names that attacks, judges and tables go by."""
    items = [
        dataclasses.replace(
            prompt,
            answer=None,
            meta={
                "goal": prompt.text,
                "behavior_id": prompt.id,
                "method": "direct",
                **({"target": prompt.answer} if prompt.answer else {}),
                **prompt.meta,
                "suite": name,
                "kind": kind,
            },
        )
        for prompt in found
    ]
    return Suite(name, Prompts(items, name, found.notes), kind, source.origin, (source.sha256,))


def _evenly(found: Prompts, limit: int) -> Prompts:
    """So many prompts, the first of every kind and language in turn, in the file's order."""
    groups: dict[tuple[Any, Any], list[int]] = {}
    for index, prompt in enumerate(found):
        groups.setdefault((prompt.meta["kind"], prompt.language), []).append(index)
    kept: list[int] = []
    round_ = 0
    while len(kept) < min(limit, len(found)):
        kept += [indices[round_] for indices in groups.values() if round_ < len(indices)][: limit - len(kept)]
        round_ += 1
    return Prompts([found[index] for index in sorted(kept)], found.name, found.notes)


def _hash_of(place: Place | None, source: Source) -> str:
    """Whether the file is a known edition, whatever its compression and its line ends."""
    if place is None or not place.sha256:
        return "unknown"
    if source.sha256 in place.sha256:
        return "match"
    data = content(source)
    with contextlib.suppress(OSError, EOFError, zlib.error):
        data = gzip.decompress(data) if data.startswith(b"\x1f\x8b") else data
    plain = data.replace(b"\r\n", b"\n")
    digests = {hashlib.sha256(edition).hexdigest() for edition in (data, plain, plain.replace(b"\n", b"\r\n"))}
    return "match" if digests & set(place.sha256) else "other"
