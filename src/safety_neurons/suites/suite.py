"""`suite`: prompts of the named suites in whichever edition, and of files of the user's own.

`verify` looks before a run starts.
"""

import ast
import contextlib
import csv
import dataclasses
import difflib
import gzip
import hashlib
import io
import re
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from safety_neurons import strict_json
from safety_neurons.arguments import well_typed
from safety_neurons.counting import numbered
from safety_neurons.errors import InputError, UsageError
from safety_neurons.prompt_lists import Prompt, Prompts, prompts
from safety_neurons.prompt_lists.classes import class_names, with_class_names
from safety_neurons.prompt_lists.columns import CONVERSATION_COLUMNS, PROMPT_COLUMNS, folded
from safety_neurons.prompt_lists.labels import asks_for
from safety_neurons.prompt_lists.readers import file_format, list_kind, read_text
from safety_neurons.prompt_lists.records import label_word
from safety_neurons.prompt_lists.rows import prompts_of
from safety_neurons.prompt_lists.suspicions import COMPLIES
from safety_neurons.prompt_lists.tables import parse_rows, readable
from safety_neurons.suites.catalogue import (
    KINDS,
    Location,
    Source,
    SuiteEntry,
    SuiteVotes,
    Wanted,
    entries,
    find,
    from_hub,
    hub_address,
    is_name,
    names,
    source_of,
    wanted,
)

Row = dict[str, Any]
_NATIVE = {
    "category": "category",
    "id": "id",
    "language": "language",
    "input": "input",
    "context": "ContextString",
}
"""Names here that the prompt reader knows by a name of its own; the others travel as `meta`."""


def read(wanted: Wanted, sources: Mapping[str, Source], column: str | None = None) -> tuple[Prompts, int]:
    """The prompts of a suite, and how many rows of the original were left out: those without a label where
    the suite labels its rows, and those whose text its authors withheld.

    Args:
        wanted: The suite, its part and its language.
        sources: Its files by language, one under "" where a single file holds everything.
        column: Column of the prompts, where the file names it in a way of its own.

    Raises:
        InputError: A file that cannot be read, or that is not what the suite's file looks like.
    """
    notes: list[str] = []
    whole: list[Prompt] = []
    n_left = 0
    for language, source in sources.items():
        rows = _rows(wanted.entry, source, notes)
        for tag, canonical in _by_language(wanted, rows, source, column, notes).items():
            found, left = _prompts(wanted, canonical, source, tag or language, notes)
            whole += found
            n_left += left
    chosen = [prompt for prompt in whole if _is_of(prompt, wanted)]
    if not chosen:
        part = wanted.entry.parts[wanted.part or ""]
        raise InputError(
            f"{wanted.name}: no row of the file is of this part; expected {part.column} {part.value!r}; "
            "check the file"
        )
    return Prompts(chosen, wanted.name, list(dict.fromkeys(notes))), n_left


def table_rows(
    source: Source, notes: list[str], header: Sequence[str] = (), known: Sequence[str] = ()
) -> list[Row]:
    """Rows of a file in any format that is read.

    Args:
        source: The file.
        notes: Receives one line for each thing that was repaired.
        header: Columns of a table that comes without a header row.
        known: Every name a header may hold; a first row with none of them is a row of data.

    Raises:
        InputError: The file cannot be read.
    """
    path, shown = source.path, str(source.path)
    if path.suffix.lower() == ".parquet":
        return _parquet(path.read_bytes(), shown, notes)
    suffix = file_format(path)
    text, repairs = read_text(path)
    notes += repairs
    if suffix in (".csv", ".tsv") and header:
        text = _with_header(text, "," if suffix == ".csv" else "\t", header, known, notes)
    return readable(parse_rows(text, suffix, shown, None, notes), notes)


def _rows(entry: SuiteEntry, source: Source, notes: list[str]) -> list[Row]:
    columns = [names[0] for names in entry.columns.values()] + list(entry.wide)
    known = [name for names in entry.columns.values() for name in names] + list(entry.wide)
    return _shaped(entry, table_rows(source, notes, columns, known), source, notes)


def _shaped(entry: SuiteEntry, rows: list[Row], source: Source, notes: list[str]) -> list[Row]:
    """One row for each request or answer that the suite labels, its label in one column."""
    labels = entry.votes.columns if entry.votes is not None else ()
    present = {column for row in rows for column in row}
    for columns in (*((column,) for column in entry.only), *([labels] if labels else [])):
        if present.isdisjoint(columns):
            raise InputError(
                f"{source.path}: no column {' or '.join(columns)}, by which rows of {entry.name} are told "
                f"apart; it has {', '.join(sorted(present)) or 'none'}; get the original file"
            )
    for column, values in entry.only.items():
        kept = [row for row in rows if row.get(column) in values]
        if len(kept) < len(rows):
            notes.append(
                f"left out {numbered(len(rows) - len(kept), 'row')}: not of {column} {' or '.join(values)}"
            )
        rows = kept
    if entry.answers:
        rows = [
            {**row, "answer": row.get(answer), "kind": row.get(label)}
            for row in rows
            for answer, label in entry.answers
        ]
    if entry.votes is not None:
        rows = [{**row, "kind": _voted(entry.votes, row)} for row in rows]
    return rows


def _voted(votes: SuiteVotes, row: Row) -> str:
    """What the labels of a row say together; none at all is no label."""
    cast = [vote for column in votes.columns if (vote := label_word(row.get(column)))]
    safe = {label_word(one) for one in votes.safe}
    harm = sum(vote not in safe for vote in cast)
    if not cast:
        return ""
    return "unsafe" if harm > 0 and harm >= votes.share * len(cast) else "safe"


def _with_header(
    text: str, delimiter: str, header: Sequence[str], known: Sequence[str], notes: list[str]
) -> str:
    """The table with a header row, which some editions lack."""
    try:
        first = next(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter), [])
    except csv.Error:
        return text
    names = {name.casefold() for name in (*known, *PROMPT_COLUMNS, *CONVERSATION_COLUMNS)}
    words = {cell.strip().casefold() for cell in first} | (
        {*re.split("[,;\t|]", first[0].casefold())} if len(first) == 1 else set()
    )
    looks_like_data = any(len(cell) > 40 or " " in cell.strip() for cell in first)
    if words & names or not looks_like_data or len(first) > max(1, len(header)):
        return text
    columns = list(header[: len(first)]) if len(first) > 1 else ["text"]
    notes.append(f"no header row; read as {', '.join(columns)}")
    return delimiter.join(columns) + "\n" + text


def _parquet(data: bytes, shown: str, notes: list[str]) -> list[Row]:
    try:
        import pyarrow.parquet as parquet
    except ImportError:
        raise InputError(
            f"{shown}: reading Parquet needs pyarrow; install it, or convert the file to CSV or JSON Lines"
        ) from None
    try:
        table = parquet.read_table(io.BytesIO(data))
        about = strict_json.loads((table.schema.metadata or {}).get(b"huggingface", b"{}"), lenient=True)
        rows = table.to_pylist()
    except (OSError, ValueError) as error:
        raise InputError(
            f"{shown}: not a Parquet file that can be read ({error}); expected a whole one; download it again"
        ) from None
    info = about.get("info") if isinstance(about, Mapping) else None
    return list(with_class_names(rows, class_names(info and info.get("features")), notes))


def _by_language(
    wanted: Wanted, rows: list[Row], source: Source, column: str | None, notes: list[str]
) -> dict[str, list[Row]]:
    """Rows under the names used here; one list for each language of a wide table."""
    entry = wanted.entry
    if not entry.wide:
        return {"": _canonical(entry, rows, _column_of(entry, rows, source, column, "prompt"), notes)}
    languages = [wanted.language] if wanted.language else entry.wide
    present = _present(rows)
    there = {tag: present[tag] for tag in languages if tag in present}
    if column is not None or not there:
        return {
            wanted.language or "": _canonical(
                entry, rows, _column_of(entry, rows, source, column, "prompt"), notes
            )
        }
    missing = [tag for tag in languages if tag not in there]
    if missing:
        notes.append(f"languages {', '.join(missing)} are not in the file")
    return {tag: _canonical(entry, rows, name, notes) for tag, name in there.items()}


def _present(rows: Sequence[Row]) -> dict[str, str]:
    """Columns by their name in small letters, the first of those that differ in case only."""
    present: dict[str, str] = {}
    for row in rows:
        for key in row:
            present.setdefault(str(key).strip().casefold(), key)
    return present


def _column_of(entry: SuiteEntry, rows: Sequence[Row], source: Source, column: str | None, name: str) -> str:
    """The column of the prompts: as named, as in an edition that is known, or as prompt columns are usually
    called.
    """
    present = _present(rows)
    if column is not None:
        if column.strip().casefold() not in present:
            raise InputError(
                f"{source.path}: no column {column!r}; it has {', '.join(present)}; name one of them "
                "with --column"
            )
        return present[column.strip().casefold()]
    usual = (
        *entry.columns.get(name, ()),
        "prompt",
        "goal",
        "instruction",
        "question",
        "text",
        "query",
        "behavior",
        "forbidden_prompt",
    )
    name_of_prompts = next(
        (present[candidate.casefold()] for candidate in usual if candidate.casefold() in present), None
    )
    if name_of_prompts is None:
        raise InputError(
            f"{source.path}: no column that holds the prompts of {entry.name}; it has {', '.join(present)}; "
            f"expected {', '.join(entry.columns.get(name, entry.wide))}; name one with --column"
        )
    return name_of_prompts


def _canonical(entry: SuiteEntry, rows: list[Row], prompt: str, notes: list[str]) -> list[Row]:
    """Rows under the names used here, columns nobody asked for left out."""
    present = _present(rows)
    chosen: dict[str, str] = {}
    for name, candidates in entry.columns.items():
        column = next((present[key.casefold()] for key in candidates if key.casefold() in present), None)
        if name != "prompt" and column is not None and column != prompt:
            chosen[name] = column
    if "target" in chosen and _exchanged(rows, prompt, chosen["target"]):
        notes.append(
            f"the columns {prompt} and {chosen['target']} are exchanged (“Sure, here is …” stood for "
            "prompts); read the other way"
        )
        prompt, chosen["target"] = chosen["target"], prompt
    called = _called(prompt, chosen)
    languages = (
        {} if "language" in chosen else {key: present[key] for key in ("language", "lang") if key in present}
    )
    return [
        {
            called: row.get(prompt),
            "row": number,
            **{
                _NATIVE.get(name, name): row.get(column)
                for name, column in (*chosen.items(), *languages.items())
            },
        }
        for number, row in enumerate(rows)
    ]


def _called(prompt: str, chosen: Mapping[str, str]) -> str:
    """What the prompt reader takes the column for: it joins a context to `Behavior` and an Alpaca input to
    `prompt`.
    """
    if prompt.casefold() in (*CONVERSATION_COLUMNS, "chosen"):
        return prompt.casefold()
    return "Behavior" if "context" in chosen else "prompt"


def _exchanged(rows: Sequence[Row], prompt: str, target: str) -> bool:
    def share(column: str) -> float:
        texts = [row[column] for row in rows if isinstance(row.get(column), str)]
        return sum(COMPLIES.match(text) is not None for text in texts) / max(1, len(texts))

    return share(prompt) > 0.5 and share(target) < 0.25


def _prompts(
    wanted: Wanted, rows: list[Row], source: Source, language: str, notes: list[str]
) -> tuple[list[Prompt], int]:
    """The prompts of rows, and how many of these say not what is to be expected or hold no text."""
    entry = wanted.entry
    targets = {row["row"]: row.pop("target") for row in rows if "target" in row}
    column = next(iter(rows[0])) if rows else "prompt"
    own: list[str] = []
    told = [row for row in rows if not (entry.withheld and str(row[column]).strip() == entry.withheld)]
    read = prompts_of(told, str(source.path), column, None, own) if told or not rows else []
    notes += [note if not language else f"{language}: {note}" for note in own]
    kinds = {label_word(word): kind for word, kind in entry.kinds.items()}
    finished: list[Prompt] = []
    left = +Counter({f"hold {entry.withheld!r} in the place of a text": len(rows) - len(told)})
    for prompt in read:
        row = rows[prompt.meta["row"]]
        label = label_word(row.get("kind"))
        if kinds and label not in kinds:
            said = f"say {label!r}" if label else "say nothing"
            left[f"{said} where {' or '.join(entry.kinds)} was expected"] += 1
        else:
            kind = kinds.get(label, entry.kind)
            finished.append(_finished(prompt, entry, row, targets, language, kind))
    lines = [f"left out {numbered(count, 'row')}: {what}" for what, count in left.items()]
    if not finished:
        columns = ", ".join(entry.columns.get("kind", ()))
        raise InputError(
            f"{source.path}: no row can be used ({lines[0]}); expected labels in the column {columns}; get "
            "the original file"
        )
    notes += lines
    return finished, left.total()


def _finished(
    prompt: Prompt,
    entry: SuiteEntry,
    row: Row,
    targets: Mapping[int, Any],
    language: str,
    kind: str,
) -> Prompt:
    """The prompt with the names that attacks, judges and tables go by."""
    number = prompt.meta["row"]
    meta: Row = {
        key: value
        for key, value in prompt.meta.items()
        if key not in ("row", "rejected", "kind") and value != ""
    }
    context = row.get("ContextString")
    goal = row["Behavior"] if isinstance(row.get("Behavior"), str) else prompt.text
    category, sub = _category(
        prompt.category, meta.pop("subcategory", None), nested="subcategory" in entry.columns
    )
    target = targets.get(number)
    tag = prompt.language or language or None
    name = f"{prompt.id}/{tag}" if language and len(entry.languages) > 1 else prompt.id
    meta |= {
        "suite": entry.name,
        "kind": kind,
        "goal": goal,
        "behavior_id": str(meta.get("behavior_id", prompt.id)),
        "method": "direct",
    }
    meta |= {"target": target} if isinstance(target, str) and target.strip() else {}
    meta |= {"context": context} if isinstance(context, str) and context.strip() else {}
    meta |= {"subcategory": sub} if sub else {}
    answer = row.get("answer") if "answer" in entry.columns else None
    meta.pop("answer", None)
    return replace(
        prompt,
        id=name,
        answer=answer if isinstance(answer, str) else None,
        category=category,
        language=tag,
        meta=meta,
    )


def _category(category: str | None, sub: Any, *, nested: bool) -> tuple[str | None, str | None]:
    """Category and subcategory: `['a', 'b']` written as text is a list, and of nested keys `A/b` the last is
    the subcategory.
    """
    if category and category.startswith("[") and category.endswith("]"):
        try:
            return ", ".join(map(str, ast.literal_eval(category))) or None, sub
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            return category, sub
    if nested and category and "/" in category and sub is None:
        category, _, sub = category.rpartition("/")
    return category, str(sub) if sub else None


def _is_of(prompt: Prompt, wanted: Wanted) -> bool:
    if wanted.part is None:
        return True
    part = wanted.entry.parts[wanted.part]
    return str(prompt.meta.get(part.column, "")).strip().casefold() == part.value


HUB, BUILTIN = "hub:", "builtin:"


@dataclass(frozen=True)
class Suite:
    """Prompts to evaluate on, and what is to be expected of their answers.

    Attributes:
        name: The suite's name, or the file's.
        prompts: In the file's order. Every `meta` holds `suite`, `kind`, `goal` (the bare request),
            `behavior_id` and `method` (`direct`); `target`, `context` and `subcategory` where the suite has
            them. `answer` is set where the suite labels answers.
        kind: `harmful` (should be refused), `harmless` (should be answered) or `mixed`.
        source: Where the file came from.
        sha256: Hashes of the files that were read.
        licence: Of the prompts; empty for a file of the user's own.
        rows: Prompts the original has, where that is known.
        left: Rows of the original that were left out: without a label, or with their text withheld.
    """

    name: str
    prompts: Prompts
    kind: str
    source: str = ""
    sha256: tuple[str, ...] = ()
    licence: str = ""
    rows: int | None = None
    left: int = 0

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
        return Prompts(
            [prompt for prompt in self.prompts if prompt.meta["kind"] == kind], self.name, self.notes
        )


@dataclass(frozen=True)
class SuiteCheck:
    """What `verify` saw of one suite.

    Attributes:
        name: The suite.
        ok: Whether a run could start: the files are there, can be read and hold what they should.
        sources: Where the files are.
        hashes: `match`, `other` (an edition that is not known) or `unknown` (no expected hash), for each
            file.
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
        return {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in dataclasses.asdict(self).items()
        }


@well_typed
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
        source: A name of the catalogue (`advbench`, `harmbench-contextual`, `multijail/de`, …); a file;
            `hub:ORG/NAME[@REVISION]:FILE`; `builtin:NAME`; or `NAME=FILE` for a file in a named suite's
            format, and for a file of one's own under a name of one's own. A file that exists wins over a
            name.
        folder: Where the suites' files lie, at any depth; by default the folder that SAFETY_NEURONS_DATA
            names.
        offline: Never open a socket.
        limit: Keep so many prompts, taken evenly over kinds and languages, the first of each.
        kind: `harmful` or `harmless`: of a file of the user's own (harmful by default), or the prompts of a
            mixed suite to keep.
        column: Column of the prompts, where the file names it in a way of its own.

    Raises:
        InputError: No such suite or file, or a file that cannot be read.
        UsageError: An unknown kind, or a limit below 1.
    """
    if kind is not None and kind not in KINDS[:2]:
        raise UsageError(f"kind {kind!r}: expected harmful or harmless")
    if limit is not None and limit < 1:
        raise UsageError(f"limit {limit}: expected at least 1; leave it away to read all prompts")
    entry, sources = _located(source, folder, offline)
    opened = _own(source, sources, kind, column) if entry is None else _named(entry, sources, column)
    if kind is not None and kind != opened.kind:
        if opened.kind != "mixed":
            raise UsageError(f"{source}: its kind is {opened.kind}, not {kind}; leave the kind away")
        opened = dataclasses.replace(
            opened, prompts=opened.harmful if kind == "harmful" else opened.harmless, kind=kind, rows=None
        )
    return opened if limit is None else dataclasses.replace(opened, prompts=_evenly(opened.prompts, limit))


@well_typed
def verify(
    source: str | Path, *, folder: str | Path | None = None, offline: bool = False, any_edition: bool = False
) -> SuiteCheck:
    """Look whether a suite is there and is what it should be; never raises for a suite that is not.

    Where a hash is known the file has to have it; compression and the kind of line ends do not matter.

    Args:
        source: As for `suite`.
        folder: As for `suite`.
        offline: Never open a socket; otherwise what is missing is fetched and kept.
        any_edition: Take a file of another hash that holds as many prompts as the original (a mirror, another
            format).
    """
    name = str(source)
    try:
        entry, sources = _located(source, folder, offline)
        opened = _own(source, sources, None, None) if entry is None else _named(entry, sources, None)
    except InputError as error:
        return SuiteCheck(name, ok=False, problem=str(error))
    hashes = (
        tuple(_hash_of(entry.places.get(language), item) for language, item in sources.items())
        if entry
        else ("unknown",)
    )
    missing = [] if entry is None else [language for language in entry.places if language not in sources]
    expected = opened.rows if not missing else None
    problem = None
    found = len(opened) + opened.left
    if expected is not None and found != expected:
        problem = (
            f"{opened.name}: {found} prompts, expected {expected}; the file is not the whole "
            "original; get it again"
        )
    elif "other" in hashes and not any_edition:
        problem = (
            f"{opened.name}: not an edition that is known (hash {opened.sha256[0][:12]}…); get the "
            "original, or allow --any-edition"
        )
    shown = tuple(str(item.path) for item in sources.values()) or (opened.source,)
    return SuiteCheck(
        opened.name, problem is None, shown, hashes, len(opened), opened.rows, problem, tuple(opened.notes)
    )


@well_typed
def catalogue() -> list[dict[str, Any]]:
    """What `data list` shows of every named suite: name, kind, licence, prompts, languages, parts, origin,
    page, expected hashes.
    """
    return [_described(entry) for entry in entries().values()]


def _described(entry: SuiteEntry) -> dict[str, Any]:
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


def _located(
    source: str | Path, folder: str | Path | None, offline: bool
) -> tuple[Wanted | None, dict[str, Source]]:
    """The suite a source means (None for a file of the user's own) and its files by language."""
    text = str(source)
    name, equals, rest = text.partition("=")
    if equals and is_name(name) and not Path(text).exists():
        named = wanted(name)
        language = named.language or next(iter(named.places))
        return named, {language if not named.entry.wide else "": _file(rest, offline)}
    if text.startswith(BUILTIN):
        return None, {}
    if own := _own_name(text):
        near = difflib.get_close_matches(own, names(), n=1, cutoff=0.8)
        if near:
            raise InputError(
                f"{own}: no suite of this name; did you mean {near[0]}={rest}? Your own file takes a name "
                "that is less like it"
            )
        return None, {"": _file(rest, offline)}
    if text.startswith(HUB) or Path(text).expanduser().exists() or isinstance(source, Path):
        return None, {"": _file(text, offline)}
    entry = wanted(text) if not _looks_like_a_file(text) else None
    if entry is None:
        return None, {"": source_of(Path(text).expanduser())}
    return entry, _files(entry, folder, offline)


def _own_name(text: str) -> str:
    """The name that `NAME=FILE` gives to a file of one's own; empty where a text is something else."""
    name, _, rest = text.partition("=")
    plain = rest and not any(sign in name for sign in ":/~.\\") and not Path(text).exists()
    return name.strip() if plain and not is_name(name) else ""


def _looks_like_a_file(text: str) -> bool:
    return not is_name(text) and (Path(text).suffix != "" or text.startswith((".", "~", "/")))


def _file(text: str, offline: bool) -> Source:
    return (
        from_hub(hub_address(text), offline=offline)
        if text.startswith(HUB)
        else source_of(Path(text).expanduser())
    )


def _files(entry: Wanted, folder: str | Path | None, offline: bool) -> dict[str, Source]:
    """The suite's files; of one that has a file a language those that can be had, as long as there is one."""
    sources: dict[str, Source] = {}
    failed: list[InputError] = []
    for language, place in entry.places.items():
        try:
            sources[language] = find(place, entry.name, folder, offline=offline)
        except InputError as error:
            failed.append(error)
    if not sources:
        raise failed[0]
    return sources


def _named(asked: Wanted, sources: Mapping[str, Source], column: str | None) -> Suite:
    read_prompts, left = read(asked, sources, column)
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
        left=left,
    )


def _own(source: str | Path, sources: Mapping[str, Source], kind: str | None, column: str | None) -> Suite:
    """A file of the user's own, or a built-in list."""
    text = str(source)
    if not sources:
        read_prompts = prompts(text, column=column)
        return _stamped(
            read_prompts, text, kind or list_kind(text), Source(Path(), text, read_prompts.sha256)
        )
    file = sources[""]
    parquet = file.path.suffix.lower() == ".parquet"
    repairs: list[str] = []
    read_prompts = prompts(table_rows(file, repairs) if parquet else file.path, column=column)
    read_prompts.notes[:0] = repairs
    name = _own_name(text) or (file.origin if text.startswith(HUB) else file.path.name)
    labels = {
        key
        for prompt in read_prompts
        for key in prompt.meta
        if folded(key) == "kind" or asks_for(str(key)) in ("safe", "unsafe", "both")
    }
    if labels and kind is None:
        read_prompts.notes.append(
            f"all are taken as harmful, whatever their {' and '.join(sorted(labels))} says; split the file "
            "for others, or give their kind"
        )
    return _stamped(read_prompts, name, kind or "harmful", file)


def _stamped(requests: Prompts, name: str, kind: str, source: Source) -> Suite:
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
        for prompt in requests
    ]
    return Suite(name, Prompts(items, name, requests.notes), kind, source.origin, (source.sha256,))


def _evenly(requests: Prompts, limit: int) -> Prompts:
    """So many prompts, the first of every kind and language in turn, in the file's order."""
    groups: dict[tuple[Any, Any], list[int]] = {}
    for index, prompt in enumerate(requests):
        groups.setdefault((prompt.meta["kind"], prompt.language), []).append(index)
    chosen: list[int] = []
    round_ = 0
    while len(chosen) < min(limit, len(requests)):
        chosen += [indices[round_] for indices in groups.values() if round_ < len(indices)][
            : limit - len(chosen)
        ]
        round_ += 1
    return Prompts([requests[index] for index in sorted(chosen)], requests.name, requests.notes)


def _hash_of(location: Location | None, source: Source) -> str:
    """Whether the file is a known edition, whatever its compression and its line ends."""
    if location is None or not location.sha256:
        return "unknown"
    if source.sha256 in location.sha256:
        return "match"
    data = source.path.read_bytes()
    with contextlib.suppress(OSError, EOFError, zlib.error):
        data = gzip.decompress(data) if data.startswith(b"\x1f\x8b") else data
    plain = data.replace(b"\r\n", b"\n")
    digests = {
        hashlib.sha256(edition).hexdigest() for edition in (data, plain, plain.replace(b"\n", b"\r\n"))
    }
    return "match" if digests & set(location.sha256) else "other"
