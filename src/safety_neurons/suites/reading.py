"""From a suite's file, in whichever edition it is, to prompts under one set of names."""

import ast
import csv
import io
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from safety_neurons.errors import InputError
from safety_neurons.prompts.columns import CONVERSATION_COLUMNS, PROMPT_COLUMNS
from safety_neurons.prompts.files import file_format, text_of
from safety_neurons.prompts.records import Prompt, Prompts
from safety_neurons.prompts.records_from_rows import prompts_of
from safety_neurons.prompts.tables import parse_rows, readable
from safety_neurons.suites.catalogue import Entry, Wanted
from safety_neurons.suites.sources import Source, content

Row = dict[str, Any]
_COMPLIES = re.compile(r"\s*(sure|of course|certainly|absolutely)\b[^.\n]{0,20}\bhere\b", re.IGNORECASE)
_NATIVE = {"category": "category", "id": "id", "language": "language", "input": "input", "context": "ContextString"}
"""Names here that the prompt reader knows by a name of its own; the others travel as `meta`."""


def read(wanted: Wanted, sources: Mapping[str, Source], column: str | None = None) -> Prompts:
    """The prompts of a suite.

    Args:
        wanted: The suite, its part and its language.
        sources: Its files by language, one under "" where a single file holds everything.
        column: Column of the prompts, where the file names it in a way of its own.

    Raises:
        InputError: A file that cannot be read, or that is not what the suite's file looks like.
    """
    notes: list[str] = []
    found: list[Prompt] = []
    for language, source in sources.items():
        rows = _rows(wanted.entry, source, notes)
        for tag, canonical in _by_language(wanted, rows, source, column, notes).items():
            found += _prompts(wanted, canonical, source, tag or language, notes)
    kept = [prompt for prompt in found if _is_of(prompt, wanted)]
    if not kept:
        part = wanted.entry.parts[wanted.part or ""]
        raise InputError(f"{wanted.name}: no row of the file is of this part; expected {part.column} {part.value!r}; check the file")
    return Prompts(kept, wanted.name, list(dict.fromkeys(notes)))


def table_rows(source: Source, notes: list[str], header: Sequence[str] = (), known: Sequence[str] = ()) -> list[Row]:
    """Rows of a file in any format that is read.

    Args:
        source: The file.
        notes: Receives one line for each thing that was repaired.
        header: Columns of a table that comes without a header row.
        known: Every name a header may hold; a first row with none of them is a row of data.

    Raises:
        InputError: The file cannot be read.
    """
    path = source.path / source.member if source.member else source.path
    if path.suffix.lower() == ".parquet":
        return _parquet(content(source), source.shown)
    suffix = file_format(path)
    text, found = text_of(content(source), path)
    notes += found
    if suffix in (".csv", ".tsv") and header:
        text = _with_header(text, "," if suffix == ".csv" else "\t", header, known, notes)
    return readable(parse_rows(text, suffix, source.shown, None, notes), notes)


def _rows(entry: Entry, source: Source, notes: list[str]) -> list[Row]:
    columns = [names[0] for names in entry.columns.values()] + list(entry.wide)
    known = [name for names in entry.columns.values() for name in names] + list(entry.wide)
    return table_rows(source, notes, columns, known)


def _with_header(text: str, delimiter: str, header: Sequence[str], known: Sequence[str], notes: list[str]) -> str:
    """The table with a header row, which some editions lack."""
    try:
        first = next(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter), [])
    except csv.Error:
        return text
    names = {name.casefold() for name in (*known, *PROMPT_COLUMNS, *CONVERSATION_COLUMNS)}
    words = {cell.strip().casefold() for cell in first} | ({*re.split("[,;\t|]", first[0].casefold())} if len(first) == 1 else set())
    looks_like_data = any(len(cell) > 40 or " " in cell.strip() for cell in first)
    if words & names or not looks_like_data or len(first) > max(1, len(header)):
        return text
    columns = list(header[: len(first)]) if len(first) > 1 else ["text"]
    notes.append(f"no header row; read as {', '.join(columns)}")
    return delimiter.join(columns) + "\n" + text


def _parquet(data: bytes, shown: str) -> list[Row]:
    try:
        import pyarrow.parquet as parquet
    except ImportError:
        raise InputError(f"{shown}: reading Parquet needs pyarrow; install it, or convert the file to CSV or JSON Lines") from None
    try:
        return parquet.read_table(io.BytesIO(data)).to_pylist()
    except (OSError, ValueError) as error:
        raise InputError(f"{shown}: not a Parquet file that can be read ({error}); expected a whole one; download it again") from None


def _by_language(wanted: Wanted, rows: list[Row], source: Source, column: str | None, notes: list[str]) -> dict[str, list[Row]]:
    """Rows under the names used here; one list for each language of a wide table."""
    entry = wanted.entry
    if not entry.wide:
        return {"": _canonical(entry, rows, _column_of(entry, rows, source, column, "prompt"), notes)}
    languages = [wanted.language] if wanted.language else entry.wide
    present = _present(rows)
    there = {tag: present[tag] for tag in languages if tag in present}
    if column is not None or not there:
        return {wanted.language or "": _canonical(entry, rows, _column_of(entry, rows, source, column, "prompt"), notes)}
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


def _column_of(entry: Entry, rows: Sequence[Row], source: Source, column: str | None, name: str) -> str:
    """The column of the prompts: as named, as in an edition that is known, or as prompt columns are usually called."""
    present = _present(rows)
    if column is not None:
        if column.strip().casefold() not in present:
            raise InputError(f"{source.shown}: no column {column!r}; it has {', '.join(present)}; name one of them with --column")
        return present[column.strip().casefold()]
    usual = (*entry.columns.get(name, ()), "prompt", "goal", "instruction", "question", "text", "query", "behavior", "forbidden_prompt")
    found = next((present[candidate.casefold()] for candidate in usual if candidate.casefold() in present), None)
    if found is None:
        raise InputError(
            f"{source.shown}: no column that holds the prompts of {entry.name}; it has {', '.join(present)}; "
            f"expected {', '.join(entry.columns.get(name, entry.wide))}; name one with --column"
        )
    return found


def _canonical(entry: Entry, rows: list[Row], prompt: str, notes: list[str]) -> list[Row]:
    """Rows under the names used here, columns nobody asked for left out."""
    present = _present(rows)
    chosen: dict[str, str] = {}
    for name, candidates in entry.columns.items():
        column = next((present[key.casefold()] for key in candidates if key.casefold() in present), None)
        if name != "prompt" and column is not None and column != prompt:
            chosen[name] = column
    if "target" in chosen and _exchanged(rows, prompt, chosen["target"]):
        notes.append(f"the columns {prompt} and {chosen['target']} are exchanged (“Sure, here is …” stood for prompts); read the other way")
        prompt, chosen["target"] = chosen["target"], prompt
    called = _called(prompt, chosen)
    languages = {} if "language" in chosen else {key: present[key] for key in ("language", "lang") if key in present}
    return [
        {
            called: row.get(prompt),
            "row": number,
            **{_NATIVE.get(name, name): row.get(column) for name, column in (*chosen.items(), *languages.items())},
        }
        for number, row in enumerate(rows)
    ]


def _called(prompt: str, chosen: Mapping[str, str]) -> str:
    """What the prompt reader takes the column for: it joins a context to `Behavior` and an Alpaca input to `prompt`."""
    if prompt.casefold() in (*CONVERSATION_COLUMNS, "chosen"):
        return prompt.casefold()
    return "Behavior" if "context" in chosen else "prompt"


def _exchanged(rows: Sequence[Row], prompt: str, target: str) -> bool:
    def share(column: str) -> float:
        texts = [row[column] for row in rows if isinstance(row.get(column), str)]
        return sum(_COMPLIES.match(text) is not None for text in texts) / max(1, len(texts))

    return share(prompt) > 0.5 and share(target) < 0.25


def _prompts(wanted: Wanted, rows: list[Row], source: Source, language: str, notes: list[str]) -> list[Prompt]:
    entry = wanted.entry
    targets = {row["row"]: row.pop("target") for row in rows if "target" in row}
    column = next(iter(rows[0])) if rows else "prompt"
    own: list[str] = []
    read = prompts_of(rows, source.shown, column, None, own)
    notes += [note if not language else f"{language}: {note}" for note in own]
    unknown: Counter[str] = Counter()
    found = [_finished(prompt, entry, rows[prompt.meta["row"]], targets, language, unknown) for prompt in read]
    for word, count in unknown.items():
        notes.append(f"{count} rows say {word!r} where {' or '.join(entry.kinds)} was expected; taken as harmful")
    return found


def _finished(prompt: Prompt, entry: Entry, row: Row, targets: Mapping[int, Any], language: str, unknown: Counter[str]) -> Prompt:
    """The prompt with the names that attacks, judges and tables go by."""
    number = prompt.meta["row"]
    meta: Row = {key: value for key, value in prompt.meta.items() if key not in ("row", "rejected", "kind") and value != ""}
    kind = entry.kind
    if entry.kinds:
        word = str(row.get("kind", "")).strip().casefold()
        kind = entry.kinds.get(word, "harmful")
        if word not in entry.kinds:
            unknown[word] += 1
    context = row.get("ContextString")
    goal = row["Behavior"] if isinstance(row.get("Behavior"), str) else prompt.text
    category, sub = _category(prompt.category, meta.pop("subcategory", None), nested="subcategory" in entry.columns)
    target = targets.get(number)
    tag = prompt.language or language or None
    name = f"{prompt.id}/{tag}" if language and len(entry.languages) > 1 else prompt.id
    meta |= {"suite": entry.name, "kind": kind, "goal": goal, "behavior_id": str(meta.get("behavior_id", prompt.id)), "method": "direct"}
    meta |= {"target": target} if isinstance(target, str) and target.strip() else {}
    meta |= {"context": context} if isinstance(context, str) and context.strip() else {}
    meta |= {"subcategory": sub} if sub else {}
    return replace(prompt, id=name, answer=None, category=category, language=tag, meta=meta)


def _category(category: str | None, sub: Any, *, nested: bool) -> tuple[str | None, str | None]:
    """Category and subcategory: `['a', 'b']` written as text is a list, and of nested keys `A/b` the last is the subcategory."""
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
