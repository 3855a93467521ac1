"""`prompts`: one door for files, built-in lists and lists in memory."""

import dataclasses
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from safety_neurons.errors import InputError, UsageError
from safety_neurons.prompts.archives import located, read_member
from safety_neurons.prompts.builtin import PREFIX, builtin_text
from safety_neurons.prompts.conversations import UnreadableTurnError, is_conversation, read_turns
from safety_neurons.prompts.files import SUFFIXES, file_format, read_text, text_of
from safety_neurons.prompts.records import Message, Prompt, Prompts, request_of
from safety_neurons.prompts.records_from_rows import Row, prompts_of
from safety_neurons.prompts.tables import MOST_ROWS, Unread, is_one_conversation, parse_rows, rows_of, too_many

Source = str | os.PathLike[str] | Prompt | Prompts | Mapping[str, Any] | Iterable[Any]
"""Whatever names prompts: a name or path, prompts, one record or columns, or texts, records and conversations one after the other."""


def prompts(
    source: Source,
    *,
    column: str | None = None,
    answer_column: str | None = None,
    limit: int | None = None,
    folder: str | Path | None = None,
) -> Prompts:
    """Prompts of a file, of a built-in list or of a list in memory.

    Args:
        source: `builtin:NAME[/LANG]`; a path of `.jsonl/.json/.csv/.tsv/.txt`, also `.gz`,
            also inside a zip archive (`FILE.zip/MEMBER`); or, in memory, texts, records, conversations (lists of `Message` or
            `{role, content}`) or `Prompt` in a list, tuple, generator, array, data frame or `datasets.Dataset`; or columns,
            `{"goal": [...]}`; or one record.
        column: Column of the prompt; by default the first of the known names. In a table without a
            header its number, counted from 1.
        answer_column: Column of the answer; by default the first of the known names, if any.
        limit: Keep the first so many prompts.
        folder: Looked into for built-in names before the package (an organism's own prompts).

    Returns:
        The prompts; `.notes` says what was dropped, repaired or looks wrong, with counts.

    Raises:
        InputError: The source cannot be read; the message says what arrived, what was expected, what to do.
        UsageError: `limit` is below 1.
    """
    if limit is not None and limit < 1:
        raise UsageError(f"limit {limit}: expected at least 1; leave it away to read all prompts")
    found = _read(source, column, answer_column, limit, None if folder is None else Path(folder))
    return found if limit is None else found[:limit]


def as_prompts(source: Source) -> Prompts:
    """What is put to a model by a call in Python: one text is one prompt, and nothing is left out.

    Args:
        source: A text, or whatever `prompts` takes in memory.

    Raises:
        InputError: Something in it that is no prompt, with its place; or a text that names a list or a file.
    """
    if isinstance(source, Prompts):
        return source
    if isinstance(source, Prompt):
        return Prompts([source])
    if isinstance(source, str):
        _refuse_name(source)
        return _of_texts([source])
    if isinstance(source, os.PathLike):
        return prompts(source)
    if not isinstance(source, Mapping) and not hasattr(source, "columns"):
        items: list[Any] = _listed(source)
        if all(isinstance(item, str) for item in items):
            return _of_texts(items)
        source = items
    return _in_memory(source, None, None, None, whole=True)


def _refuse_name(text: str) -> None:
    if text.startswith(PREFIX):
        raise InputError(f"{text!r} names a list, expected prompts: pass model.prompts({text!r}) or safety_neurons.prompts({text!r})")
    if len(text) < 300 and text.lower().endswith((*SUFFIXES, ".gz", ".zip")) and "\n" not in text and Path(text).is_file():
        raise InputError(f"{text!r} is a file, expected prompts: pass safety_neurons.prompts({text!r})")


def _of_texts(texts: list[str]) -> Prompts:
    return Prompts.from_list(_whole_text(str(text), f"text {number}") for number, text in enumerate(texts))


def as_prompt(source: Source, name: str = "0") -> Prompt:
    """One request as a prompt: a text, a record, or the turns of one conversation, a last one of the assistant included.

    Args:
        source: What is asked.
        name: Id, where it brings none.

    Raises:
        InputError: Not exactly one request, or one without text.
    """
    if isinstance(source, Prompt):
        return source
    if is_conversation(source):
        return _asked(source, name, "the request")
    found = as_prompts(source)
    if len(found) != 1:
        raise InputError(f"{len(found)} requests arrived; expected a text, a Prompt or the turns of one conversation")
    if not found[0].text.strip():
        raise InputError("an empty text arrived; expected a request")
    return dataclasses.replace(found[0], id=name)


def _asked(turns: Any, name: str, where: str) -> Prompt:
    """A conversation that is put to a model as it stands."""
    unread: list[str] = []
    try:
        read = read_turns(turns, unread)
    except UnreadableTurnError as error:
        raise InputError(f"{where}: {error}") from None
    if unread:
        raise InputError(f"{where} holds {unread[0]}; expected text; leave it out")
    if not any(turn.content.strip() for turn in read):
        raise InputError(f"{where} holds no text; expected turns with content")
    messages = tuple(Message(turn.role, _whole_text(turn.content, where)) for turn in read)
    plain = len(messages) == 1 and messages[0].role == "user"
    return Prompt(name, request_of(messages) or messages[-1].content, () if plain else messages)


def _whole_text(text: str, where: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InputError(f"{where} holds half a surrogate pair, expected Unicode text; replace it first") from None
    return text


def _read(source: Source, column: str | None, answer_column: str | None, limit: int | None, folder: Path | None) -> Prompts:
    if isinstance(source, Prompts):
        return source
    if isinstance(source, str) and source.startswith(PREFIX):
        return _builtin(source, column, answer_column, folder)
    if isinstance(source, str | os.PathLike):
        path = Path(source).expanduser()
        text, notes, path = _file(path, source)
        rows = parse_rows(text, file_format(path), str(path), column, notes)
        if (
            limit is None
            and file_format(path) in (".txt", ".jsonl")
            and text.count("\n{" if file_format(path) == ".jsonl" else "\n") > MOST_ROWS
        ):
            raise too_many(str(path))  # before minutes are spent on it
        return Prompts(prompts_of(rows, str(path), column, answer_column, notes, limit=limit), path.name, notes)
    return _in_memory(source, column, answer_column, limit)


def _file(path: Path, source: str | os.PathLike[str]) -> tuple[str, list[str], Path]:
    """The text of a file, notes, and the path whose ending says its format (of an archive the member's)."""
    if isinstance(source, str) and ("\n" in source or len(source) > 1000):
        raise InputError(f"{source[:40]!r}…: a text, expected a path or a builtin: name; for prompts in memory pass a list, [text]")
    inside = located(path)
    if inside is not None:
        path = inside[0] / inside[1]
        file_format(path)
        return (*text_of(read_member(*inside), path), path)
    if path.is_file():
        file_format(path)
    return (*read_text(path), path)


def _builtin(source: str, column: str | None, answer_column: str | None, folder: Path | None) -> Prompts:
    text, language, own = builtin_text(source, folder)
    notes: list[str] = []
    found = prompts_of(parse_rows(text, ".jsonl", source, column, notes), source, column, answer_column, notes)
    if language is not None:
        known = sorted({prompt.language or "" for prompt in found} - {""})
        found = [prompt for prompt in found if prompt.language == language]
        if not found:
            raise InputError(
                f"{source}: not there in {language!r}; expected one of {', '.join(known) or 'no language at all'}; choose one of them"
            )
    return Prompts(found, f"{source} (of {folder.name or folder})" if own and folder is not None else source, notes)


def _in_memory(source: Any, column: str | None, answer_column: str | None, limit: int | None, whole: bool = False) -> Prompts:
    if isinstance(source, Prompt):
        return Prompts([source])
    notes: list[str] = []
    rows = _rows_in_memory(source, column, notes, whole)
    return Prompts(prompts_of(rows, "the list", column, answer_column, notes, limit=limit, whole=whole), "list", notes)


def _rows_in_memory(source: Any, column: str | None, notes: list[str], asked: bool) -> Iterator[Row]:
    if isinstance(source, Mapping):
        if source and all(hasattr(value, "column_names") for value in source.values()):
            parts = ", ".join(map(repr, list(source)[:5]))
            raise InputError(f"a data set of {len(source)} parts ({parts}); expected one; choose one by its name")
        return rows_of({str(key): _listed_value(value) for key, value in source.items()}, "the object", column, notes)
    for method, arguments in (("to_dicts", ()), ("to_pylist", ()), ("to_dict", ("records",))):  # polars, pyarrow, pandas
        if hasattr(source, method) and hasattr(source, "columns"):
            return _items(getattr(source, method)(*arguments), asked)
    if is_conversation(source) and is_one_conversation(list(source)):
        return iter([_asked(source, "0", "the conversation") if asked else {"messages": list(source)}])
    return _items(source, asked)


def _listed_value(value: Any) -> Any:
    """A column as a list; a value as it is."""
    return list(value) if isinstance(value, tuple) else value.tolist() if hasattr(value, "tolist") else value


def _items(source: Any, asked: bool) -> Iterator[Row]:
    """Rows of the items, one by one, each of its own kind."""
    for number, item in enumerate(_listed(source, lazily=True)):
        if isinstance(item, Prompt):
            yield item
        elif isinstance(item, Mapping):
            yield {"messages": [item]} if item.keys() == {"role", "content"} else dict(item)
        elif isinstance(item, str) and asked:
            yield Prompt(str(number), _whole_text(str(item), f"text {number}"))
        elif isinstance(item, str) or item is None:
            yield {"text": item}
        elif is_conversation(item := _listed_value(item)):
            yield _asked(item, str(number), f"item {number}") if asked else {"messages": list(item)}
        else:
            yield Unread(f"item {number} is a {type(item).__name__}; expected a text, a record, a conversation or a Prompt")


def _listed(source: Any, lazily: bool = False) -> Any:
    """The items of whatever has an order and an end."""
    if isinstance(source, str | bytes | bytearray | memoryview | set | frozenset) or not isinstance(source, Iterable):
        advice = "pass sorted(…)" if isinstance(source, set | frozenset) else "pass a list"
        raise InputError(f"a {type(source).__name__} as prompts; expected a path, a builtin: name, or texts or records in order; {advice}")
    items = source.tolist() if hasattr(source, "tolist") and getattr(source, "ndim", 1) == 1 else source
    return iter(items) if lazily else list(items)
