"""`prompts`: one door for files, built-in lists and lists in memory."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safety_neurons.errors import InputError, UsageError
from safety_neurons.prompts.archives import located, read_member
from safety_neurons.prompts.builtin import PREFIX, builtin_text
from safety_neurons.prompts.files import file_format, read_text, text_of
from safety_neurons.prompts.records import Prompt, Prompts
from safety_neurons.prompts.records_from_rows import prompts_of
from safety_neurons.prompts.tables import parse_rows, rows_of

Source = str | Path | Prompts | Sequence[Any] | Mapping[str, Any]


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
            also inside a zip archive (`FILE.zip/MEMBER`); or a list of
            texts, of records or of `Prompt`; or columns, `{"goal": [...]}`.
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
    found = _read(source, column, answer_column, None if folder is None else Path(folder))
    return found if limit is None else found[:limit]


def _read(source: Source, column: str | None, answer_column: str | None, folder: Path | None) -> Prompts:
    if isinstance(source, Prompts):
        return source
    if isinstance(source, str) and source.startswith(PREFIX):
        return _builtin(source, column, answer_column, folder)
    if isinstance(source, str | Path):
        path = Path(source).expanduser()
        text, notes, path = _file(path, source)
        rows = parse_rows(text, file_format(path), str(path), column, notes)
        return Prompts(prompts_of(rows, str(path), column, answer_column, notes), path.name, notes)
    return _in_memory(source, column, answer_column)


def _file(path: Path, source: str | Path) -> tuple[str, list[str], Path]:
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


def _in_memory(source: Sequence[Any] | Mapping[str, Any], column: str | None, answer_column: str | None) -> Prompts:
    if isinstance(source, bytes | bytearray) or not isinstance(source, Sequence | Mapping):
        raise InputError(f"a {type(source).__name__} as prompts; expected a path, a builtin: name or a list; wrap it in a list")
    if isinstance(source, Sequence) and source and all(isinstance(item, Prompt) for item in source):
        return Prompts(source)
    notes: list[str] = []
    rows = rows_of(list(source) if isinstance(source, Sequence) else source, "the list", column)
    return Prompts(prompts_of(rows, "the list", column, answer_column, notes), "list", notes)
