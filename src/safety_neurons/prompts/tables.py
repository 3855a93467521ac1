"""From text to rows: JSON Lines, JSON in its many shapes, CSV, TSV and plain lines."""

import csv
import io
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from safety_neurons.errors import InputError
from safety_neurons.prompts.columns import is_known_column

Row = dict[str, Any]
_FIELD_LIMIT = threading.Lock()


def parse_rows(text: str, suffix: str, name: str, column: str | None, notes: list[str]) -> list[Row]:
    """The rows of a file's text; a row of a plain list or of lines has the one column `text`.

    Args:
        text: The file's content.
        suffix: One of `files.SUFFIXES`.
        name: What errors call the file.
        column: The prompt column the user named, which helps to tell shapes apart.
        notes: Receives one line for each thing that was repaired.
    """
    if suffix == ".txt":
        return [{"text": line.rstrip("\r")} for line in text.split("\n")[: -1 if text.endswith("\n") else None]]
    if suffix in (".csv", ".tsv"):
        return _table(text, "," if suffix == ".csv" else "\t", name, column, notes)
    return _json_lines(text, name, column, notes) if suffix == ".jsonl" else _json(text, name, column, notes)


def _json_lines(text: str, name: str, column: str | None, notes: list[str]) -> list[Row]:
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if text.lstrip().startswith("["):
        try:
            whole = json.loads(text)
        except (ValueError, RecursionError):
            pass
        else:
            notes.append("named .jsonl but holds one JSON array; read as such")
            return rows_of(whole, name, column)
    rows: list[Any] = []
    for number, line in lines:
        try:
            rows.append(json.loads(line))
        except (ValueError, RecursionError) as error:
            raise InputError(_bad_line(name, number, line, error, last=number == lines[-1][0])) from None
    return _as_rows(rows, name)


def _json(text: str, name: str, column: str | None, notes: list[str]) -> list[Row]:
    try:
        return rows_of(json.loads(text), name, column)
    except json.JSONDecodeError as error:
        if error.msg != "Extra data":
            raise InputError(
                f"{name}: not JSON at line {error.lineno}, column {error.colno} ({error.msg}); "
                "expected a JSON list of records; repair the file"
            ) from None
    except (ValueError, RecursionError) as error:
        why = "a number of too many digits" if isinstance(error, ValueError) else "nested too deeply"
        raise InputError(f"{name}: JSON that cannot be read ({why}); expected a list of records; repair the file") from None
    notes.append("named .json but holds JSON Lines; read as such")
    return _json_lines(text, name, column, [])


def _bad_line(name: str, number: int, line: str, error: Exception, last: bool) -> str:
    why = "; the last line may be cut off" if last and number > 1 else ""
    shown = line.strip()[:40]
    return f"{name}: line {number} is not JSON ({error}){why}: {shown!r}; expected one JSON object a line; repair or remove the line"


def rows_of(whole: Any, name: str, column: str | None) -> list[Row]:
    """Rows of a parsed JSON document, whatever its shape."""
    if isinstance(whole, list):
        return _as_rows(whole, name)
    if not isinstance(whole, Mapping):
        raise InputError(f"{name}: the JSON document is a {type(whole).__name__}; expected a list of records; put the prompts in a list")
    named = {key for key in whole if key == column or is_known_column(key)}
    if named and not isinstance(whole[next(iter(named))], list | dict):
        return [dict(whole)]
    if "messages" in whole or "conversations" in whole:
        shape = whole.get("messages", whole.get("conversations"))
        if isinstance(shape, list) and shape and isinstance(shape[0], dict):
            return [dict(whole)]
    if named:
        return _by_column(whole, name)
    inner = list(whole.values())
    if len(whole) == 1 and isinstance(inner[0], list) and inner[0] and isinstance(inner[0][0], dict):
        return _as_rows(inner[0], name)
    return _by_category(whole, name)


def _as_rows(items: list[Any], name: str) -> list[Row]:
    rows: list[Row] = []
    for number, item in enumerate(items, 1):
        if isinstance(item, Mapping):
            rows.append(dict(item))
        elif isinstance(item, str) or item is None:
            rows.append({"text": item})
        elif isinstance(item, list) and item and all(isinstance(turn, Mapping) for turn in item):
            rows.append({"messages": item})
        else:
            raise InputError(f"{name}: record {number} is a {type(item).__name__}; expected an object or a string; repair the record")
    return rows


def _by_column(whole: Mapping[str, Any], name: str) -> list[Row]:
    """Rows of `{"goal": [...], "target": [...]}` or of `{"goal": {"0": ..., "1": ...}}`."""
    columns = {key: list(value.values()) if isinstance(value, dict) else value for key, value in whole.items()}
    columns = {key: value for key, value in columns.items() if isinstance(value, list)}
    lengths = {key: len(value) for key, value in columns.items()}
    if len(set(lengths.values())) > 1:
        listed = ", ".join(f"{key} {length}" for key, length in lengths.items())
        raise InputError(f"{name}: columns of different lengths ({listed}); expected one value a row in each; repair the file")
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def _by_category(whole: Mapping[str, Any], name: str, above: str = "") -> list[Row]:
    """Rows of `{"fraud": ["…"], "weapons": {"guns": ["…"]}}`; the path of keys is the category."""
    rows: list[Row] = []
    for key, value in whole.items():
        category = f"{above}/{key}" if above else str(key)
        if isinstance(value, list):
            rows += [{"category": category, **row} for row in _as_rows(value, name)]
        elif isinstance(value, dict) and any(is_known_column(inner) for inner in value):
            rows.append({"id": category, **value})
        elif isinstance(value, dict):
            rows += _by_category(value, name, category)
        elif isinstance(value, str):
            rows.append({"id": category, "text": value})
        else:
            raise InputError(
                f"{name}: the key {category!r} holds a {type(value).__name__}; expected lists of prompts by category; repair the file"
            )
    return rows


def _table(text: str, delimiter: str, name: str, column: str | None, notes: list[str]) -> list[Row]:
    cells = _cells(text, delimiter, name, notes)
    header = [cell.strip() for cell in cells[0]] if cells else []
    if len(header) == 1:
        for other in ("\t", ";", ",", "|"):
            if other != delimiter and other in header[0]:
                tried = _cells(text, other, name, [])
                if any(is_known_column(cell.strip()) or cell.strip() == column for cell in tried[0]):
                    notes.append(f"cells are separated by {other!r}; read so")
                    cells, header = tried, [cell.strip() for cell in tried[0]]
                    break
    if column is not None and column not in header and column.isdecimal() and not any(is_known_column(cell) for cell in header):
        notes.append("no header row; columns taken by their number, counted from 1")
        header = [str(number) for number in range(1, len(header) + 1)]
    else:
        cells = cells[1:]
    return _dicts(header, cells, name, notes)


def _dicts(header: list[str], cells: list[list[str]], name: str, notes: list[str]) -> list[Row]:
    doubled = sorted({cell for cell in header if header.count(cell) > 1 and cell})
    if doubled:
        raise InputError(f"{name}: the header names {', '.join(doubled)} more than once; expected different columns; rename one")
    rows, short = [], 0
    for number, row in enumerate(cells, 2):
        if not any(cell.strip() for cell in row) and len(row) < 2:
            continue
        if any(cell.strip() for cell in row[len(header) :]):
            raise InputError(
                f"{name}: row {number} has {len(row)} cells but the header {len(header)}; expected as many; "
                "put quotes around cells that contain the separator"
            )
        short += len(row) < len(header)
        rows.append(dict(zip(header, row + [""] * (len(header) - len(row)), strict=False)))
    if short:
        notes.append(f"{short} rows have fewer cells than the header; the missing ones are empty")
    return rows


def _cells(text: str, delimiter: str, name: str, notes: list[str]) -> list[list[str]]:
    with _unlimited_cells(len(text)):
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        cells: list[list[str]] = []
        try:
            cells.extend(reader)
            return cells
        except csv.Error as error:
            if "unexpected end" in str(error):
                raise InputError(
                    f"{name}: a quotation mark opened in row {len(cells) + 1} is never closed; "
                    "expected closed quotes; write a quotation mark inside a cell twice"
                ) from None
            notes.append(f"loose quotation marks from line {reader.line_num} on; read as they stand")
        return list(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter))


@contextmanager
def _unlimited_cells(length: int) -> Iterator[None]:
    """The csv module's limit on the size of a cell is one for the whole process: raised for a moment, then put back."""
    with _FIELD_LIMIT:
        before = csv.field_size_limit(max(length + 1, csv.field_size_limit()))
        try:
            yield
        finally:
            csv.field_size_limit(before)
