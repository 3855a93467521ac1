"""From text to rows, one after the other: JSON Lines, JSON in its many shapes, CSV, TSV and plain lines."""

import csv
import json
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from safety_neurons import strict_json
from safety_neurons.counting import numbered
from safety_neurons.errors import InputError
from safety_neurons.prompt_lists.classes import is_viewed, viewed_rows
from safety_neurons.prompt_lists.columns import (
    ABOUT,
    ANSWER_COLUMNS,
    LISTS,
    METADATA,
    SPLITS,
    folded,
    is_conversation_column,
    is_known_column,
)
from safety_neurons.prompt_lists.records import ROLES, Message

MOST_ROWS = 1_000_000
"""Rows that are read at most, unless fewer are asked for: each takes a third of a kilobyte of memory beside
its text.
"""
_FIELD_LIMIT = threading.Lock()
_LINE = re.compile(r"[^\r\n]*(?:\r\n|\r|\n)|[^\r\n]+\Z")
_COLUMN_NAME = re.compile(r"[A-Za-z_][\w-]{0,39}")
_ESCAPED_QUOTE = re.compile(r'(?<!\\)((?:\\\\)*)\\"')


class Unread(NamedTuple):
    """A row that is there and cannot be read, and why."""

    why: str


Row = dict[str, Any] | Unread


def parse_rows(text: str, suffix: str, name: str, column: str | None, notes: list[str]) -> Iterator[Row]:
    """The rows of a file's text, each as soon as it is read.

    A row of a plain list or of lines has the one column `text`.

    Args:
        text: The file's content.
        suffix: One of `readers.SUFFIXES`.
        name: What errors call the file.
        column: The prompt column the user named, which helps to tell shapes apart.
        notes: Receives one line for each thing that was repaired, once the last row was read.
    """
    if suffix == ".txt":
        return _plain_lines(text, name, column, notes)
    if suffix in (".csv", ".tsv"):
        return _table(text, "," if suffix == ".csv" else "\t", name, column, notes)
    return _json_lines(text, name, column, notes) if suffix == ".jsonl" else _json(text, name, column, notes)


def _plain_lines(text: str, name: str, column: str | None, notes: list[str]) -> Iterator[Row]:
    """One row a line; what is plainly a file of another kind is read as that, or refused."""
    if _is_json(text):
        notes.append("named .txt but holds JSON; read as such")
        return (_json_lines if _holds_lines(text) else _json)(text, name, column, notes)
    text = text if "\n" in text else text.replace("\r", "\n")  # line ends of old Macs
    first = next(_lines(text), "").strip()
    for delimiter in "\t;,|":
        cells = first.split(delimiter)
        if len(cells) > 1 and any(map(is_known_column, cells)) and all(map(_COLUMN_NAME.fullmatch, cells)):
            raise InputError(
                f"{name}: line 1, {first[:40]!r}, is the header of a table; expected a prompt a line; name "
                "the file .csv or .tsv"
            )
    if is_known_column(first) and first.count(" ") == 0:
        notes.append(f"line 1, {first!r}, looks like the name of a column; it is read as a prompt")
    return ({"text": line.removesuffix("\n").removesuffix("\r")} for line in _lines(text))


def _is_json(text: str) -> bool:
    """Whether a text is JSON: an object, a list of objects or texts, or an object a line."""
    if text.lstrip()[:1] not in ("{", "["):
        return False
    try:
        whole = [_line_value(line) for line in _lines(text) if line.strip()] if _holds_lines(text) else None
        whole = strict_json.loads(text, lenient=True) if whole is None else whole
    except strict_json.RefusedJSON:
        return True
    except ValueError:
        return False
    kinds = (dict,) if isinstance(whole, dict) or _holds_lines(text) else (dict, str)
    return bool(whole) and all(
        isinstance(one, kinds) for one in ([whole] if isinstance(whole, dict) else whole)
    )


def _lines(text: str) -> Iterator[str]:
    """Lines with their line feeds, without a second copy of them all."""
    start = 0
    while start < len(text):
        end = text.find("\n", start) + 1 or len(text)
        yield text[start:end]
        start = end


def _rows_of_text(text: str) -> Iterator[str]:
    """Lines with their ends, whichever of the three these are."""
    return (found[0] for found in _LINE.finditer(text)) if "\r" in text else _lines(text)


def looks_like_data(header: Iterable[str]) -> bool:
    """Whether names of columns are cells of a first row of data: long, or of several words."""
    return any(len(cell) > 40 or " " in cell.strip() for cell in header)


def too_many(source: str) -> InputError:
    """What is said of more rows than are read."""
    return InputError(
        f"{source}: more than {MOST_ROWS:,} rows; expected a list of prompts; read its first ones by a "
        "limit, or split it"
    )


def readable(rows: Iterator[Row], notes: list[str]) -> list[dict[str, Any]]:
    """The rows that could be read, in one list; the others are counted in `notes`."""
    read: list[dict[str, Any]] = []
    left = 0
    first = ""
    for number, row in enumerate(rows):
        if number >= MOST_ROWS:
            raise too_many("the suite")
        if isinstance(row, Unread):
            left, first = left + 1, first or f"{row.why} (first: row {number})"
        else:
            read.append(row)
    notes += [f"left out {numbered(left, 'row')}: {first}"] if left else []
    return read


# JSON


def _json_lines(text: str, name: str, column: str | None, notes: list[str]) -> Iterator[Row]:
    if text.lstrip().startswith("[") and not _holds_lines(text):
        yield from _listed(strict_json.each(text, lenient=True), name, column)
        notes.append("named .jsonl but holds one JSON array; read as such")
        return
    commas = 0
    values: list[Any] = []
    for number, line in enumerate(_lines(text), 1):
        if not line.strip():
            continue
        try:
            value = _line_value(line)
        except strict_json.RefusedJSON as error:
            if error.code == "nested_too_deeply" and not line.rstrip().endswith("}"):
                raise InputError(_bad_line(name, number, line, error, last=_is_last(text, line))) from None
            value = error
        except ValueError as error:
            if not values and number <= 2 and _is_spread(text):
                notes.append("records spread over several lines; read as such")
                yield from _as_rows(strict_json.each(text, lenient=True))
                return
            if not line.rstrip().endswith("},"):
                raise InputError(_bad_line(name, number, line, error, last=_is_last(text, line))) from None
            try:
                value = _line_value(line.rstrip()[:-1])
            except ValueError:
                raise InputError(_bad_line(name, number, line, error, last=False)) from None
            commas += 1
        values = values or [value]
        yield from _as_rows([value], number)
    if commas:
        notes.append(f"{commas} lines end with a comma; read without it")


def _holds_lines(text: str) -> bool:
    """Whether the first line is a JSON value by itself, with others after it."""
    start = len(text) - len(text.lstrip())
    end = text.find("\n", start)
    if end < 0 or not text[end:].strip():
        return False
    try:
        _line_value(text[start:end])
    except strict_json.RefusedJSON:
        return True
    except ValueError:
        return False
    return True


def _line_value(line: str) -> Any:
    return strict_json.loads(line, lenient=True)


def _is_last(text: str, line: str) -> bool:
    return text.rstrip().endswith(line.strip())


def _is_spread(text: str) -> bool:
    """Whether a text is JSON values one after the other, the first of them over several lines."""
    try:
        for _ in strict_json.each(text, lenient=True):
            pass
    except ValueError:
        return False
    return True


def _json(text: str, name: str, column: str | None, notes: list[str]) -> Iterator[Row]:
    try:
        if text.lstrip().startswith("[") and not _holds_lines(text):
            return _listed(strict_json.each(text, lenient=True), name, column)
        return rows_of(strict_json.loads(text, lenient=True), name, column, notes)
    except json.JSONDecodeError as error:
        if error.msg != "Extra data":
            raise _not_json(name, error) from None
    except strict_json.RefusedJSON as error:
        raise InputError(
            f"{name}: JSON that cannot be read ({error}); expected a list of records; repair the file"
        ) from None
    notes.append("named .json but holds JSON Lines; read as such")
    return _json_lines(text, name, column, [])


def _not_json(name: str, error: json.JSONDecodeError) -> InputError:
    return InputError(
        f"{name}: not JSON at line {error.lineno}, column {error.colno} ({error.msg}); expected a JSON "
        "list of records; repair the file"
    )


def _listed(values: Iterator[Any], name: str, column: str | None) -> Iterator[Row]:
    """Rows of the elements of a JSON list, read as they come."""
    try:
        first = [value for _, value in zip(range(2), values, strict=False)]
        if first and all(map(_role_of, first)):
            yield from rows_of([*first, *values], name, column)
            return
        yield from _as_rows(first)
        yield from _as_rows(values, len(first) + 1)
    except json.JSONDecodeError as error:
        raise _not_json(name, error) from None
    except strict_json.RefusedJSON as error:
        raise InputError(
            f"{name}: JSON that cannot be read ({error}); expected a list of records; repair the file"
        ) from None


def _bad_line(name: str, number: int, line: str, error: Exception, last: bool) -> str:
    why = "; the last line may be cut off" if last and number > 1 else ""
    shown = line.strip()[:40]
    return (
        f"{name}: line {number} is not JSON ({error}){why}: {shown!r}; expected one JSON object a line; "
        "repair or remove the line"
    )


def _role_of(turn: Any) -> str | None:
    """Which of the roles a turn by itself has; None for what is no turn."""
    if isinstance(turn, Message):
        return turn.role
    names = (("role", "content"), ("from", "value"))
    said = next((turn.get(role) for role, text in names if isinstance(turn, Mapping) and text in turn), None)
    return ROLES.get(str(said).casefold())


def is_one_conversation(items: list[Any]) -> bool:
    """Whether a list is the turns of one conversation; turns of the user alone are requests of their own."""
    roles = set(map(_role_of, items))
    return bool(roles) and None not in roles and (len(items) == 1 or roles != {"user"})


def rows_of(whole: Any, name: str, column: str | None, notes: list[str] | None = None) -> Iterator[Row]:
    """Rows of a parsed JSON document or of an object in memory, whatever its shape."""
    if isinstance(whole, list):
        return iter([{"messages": whole}]) if is_one_conversation(whole) else _as_rows(whole)
    if not isinstance(whole, Mapping):
        raise InputError(
            f"{name}: the JSON document is a {type(whole).__name__}; expected a list of records; put the "
            "prompts in a list"
        )
    return iter(_of_object(whole, name, column, notes if notes is not None else []))


def _of_object(whole: Mapping[str, Any], name: str, column: str | None, notes: list[str]) -> Iterable[Row]:
    header, data = whole.get("columns"), whole.get("data")
    if isinstance(header, list) and isinstance(data, list) and all(isinstance(row, list) for row in data):
        return _split(_distinct(list(map(str, header)), name, column, notes), data)
    if _role_of(whole):
        return [{"messages": [whole]}]
    if is_viewed(whole):
        return (Unread(row) if isinstance(row, str) else row for row in viewed_rows(whole, notes))
    named = [key for key in whole if key == column or is_known_column(key)]
    if any(not isinstance(whole[key], list | dict) for key in named):
        _refuse_list_beside(whole, name, column, named)
        return [dict(whole)]
    turns = [
        value[0]
        for key, value in whole.items()
        if is_conversation_column(key) and isinstance(value, list) and value
    ]
    if any(isinstance(turn, dict) and not turn.keys().isdisjoint(("role", "from")) for turn in turns):
        return [dict(whole)]
    if named and all(
        isinstance(whole[key], list) or set(map(type, whole[key].values())) <= {str, type(None)}
        for key in named
    ):
        return _by_column(whole, named, name, notes)
    _refuse_parts(whole, name)
    inner = next(
        (
            key
            for wanted in LISTS
            for key in whole
            if folded(key) == wanted and isinstance(whole[key], list) and whole[key]
        ),
        None,
    )
    beside = [
        key
        for key, value in whole.items()
        if key != inner and folded(key) not in METADATA and isinstance(value, list | dict)
    ]
    about = any(
        folded(key) in ANSWER_COLUMNS
        or (folded(key) in ABOUT and len(whole[key]) == len(whole[inner or key]))
        for key in beside
    )
    if inner is not None and about and all(isinstance(value, str) for value in whole[inner]):
        renamed = {"prompt" if key == inner else key: value for key, value in whole.items()}
        return _by_column(renamed, ["prompt"], name, notes)
    if inner is not None and (
        not beside or folded(inner) in ("prompts", "examples", "rows", "data", "samples")
    ):
        notes += [f"left out what stands beside the prompts: {_shown(beside)}"] if beside else []
        return _as_rows(whole[inner])
    records = [
        value for value in whole.values() if isinstance(value, list) and value and isinstance(value[0], dict)
    ]
    if len(records) == 1 and len(beside) <= 1:
        return _as_rows(records[0])
    return _by_category(whole, name, notes)


def _refuse_list_beside(
    whole: Mapping[str, Any], name: str, column: str | None, named: Sequence[str]
) -> None:
    """A text under the name of a prompt may be said about a list of prompts beside it, or be the prompt."""
    beside = [
        key
        for key, value in whole.items()
        if folded(key) in LISTS and isinstance(value, list) and value and all(map(_is_row, value))
    ]
    if beside and column is None:
        raise InputError(
            f"{name}: a text under {named[0]!r} and a list under {beside[0]!r}; expected the prompts in "
            "one of them; keep that one, or name the column of the text with --column"
        )


def _is_row(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, Mapping) and any(map(is_known_column, value)))


def _refuse_parts(whole: Mapping[str, Any], name: str) -> None:
    """The splits of a data set are not one list of prompts."""
    parts = [
        key for key, value in whole.items() if isinstance(value, list | dict) and folded(key) not in METADATA
    ]
    if len(parts) > 1 and all(folded(part) in SPLITS for part in parts):
        raise parts_of(name, parts)


def parts_of(name: str, parts: Sequence[str]) -> InputError:
    """What is said of a data set of several splits."""
    return InputError(
        f"{name}: a data set of {len(parts)} parts ({', '.join(map(repr, parts[:5]))}); expected one; choose "
        "one by its name"
    )


def _as_rows(items: Iterable[Any], start: int = 1) -> Iterator[Row]:
    for number, item in enumerate(items, start):
        if isinstance(item, Mapping):
            yield dict(item)
        elif isinstance(item, str) or item is None:
            yield {"text": item}
        elif isinstance(item, list) and item and all(isinstance(turn, Mapping) for turn in item):
            yield {"messages": item}
        elif isinstance(item, strict_json.RefusedJSON):
            yield Unread(f"record {number} is JSON that cannot be read ({item})")
        else:
            yield Unread(f"record {number} is a {type(item).__name__}; expected an object or a string")


def _split(header: list[str], data: list[list[Any]]) -> Iterator[Row]:
    """Rows of pandas' orient="split"."""
    for number, row in enumerate(data, 1):
        if len(row) == len(header):
            yield dict(zip(header, row, strict=True))
        else:
            yield Unread(f"record {number} has {len(row)} values but there are {len(header)} columns")


def _by_column(whole: Mapping[str, Any], named: list[str], name: str, notes: list[str]) -> Iterable[Row]:
    """Rows of `{"goal": [...], "target": [...]}` or of `{"goal": {"0": ..., "1": ...}}`."""
    index = whole[named[0]]
    index = list(index) if isinstance(index, dict) else list(map(str, range(len(index))))
    columns = {
        key: [value[row] for row in index] if isinstance(value, dict) and value.keys() == {*index} else value
        for key, value in whole.items()
    }
    columns = {key: value for key, value in columns.items() if isinstance(value, list | dict)}
    lengths = {key: len(value) for key, value in columns.items()}
    other = [key for key, value in columns.items() if isinstance(value, dict) or len(value) != len(index)]
    if any(folded(key) not in METADATA for key in other):
        listed = ", ".join(f"{key} {length}" for key, length in lengths.items())
        raise InputError(
            f"{name}: columns of different rows ({listed}); expected one value a row in each; repair the file"
        )
    left = [key for key in whole if key not in columns or key in other]
    notes += [f"left out what stands beside the columns: {_shown(left)}"] if left else []
    columns = {key: value for key, value in columns.items() if key not in other}
    return (dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True))


def _by_category(whole: Mapping[str, Any], name: str, notes: list[str], above: str = "") -> list[Row]:
    """Rows of `{"fraud": ["…"], "weapons": {"guns": ["…"]}}`; the path of keys is the category.

    Texts are prompts where the object holds nothing but texts; beside lists they say something about the
    lists.
    """
    rows: list[Row] = []
    left: list[str] = []
    lists = any(isinstance(value, list | dict) for value in whole.values())
    for key, value in whole.items():
        category = f"{above}/{key}" if above else str(key)
        if folded(key) in METADATA or (lists and not isinstance(value, list | dict)):
            left.append(str(key))
        elif isinstance(value, list):
            rows += [
                row if isinstance(row, Unread) else {"category": category, **row} for row in _as_rows(value)
            ]
        elif isinstance(value, dict) and any(
            is_known_column(inner) or is_conversation_column(inner) for inner in value
        ):
            rows.append({"id": category, **value})
        elif isinstance(value, dict):
            rows += _by_category(value, name, notes, category)
        elif isinstance(value, str):
            rows.append({"id": category, "text": value})
        else:
            raise InputError(
                f"{name}: the key {category!r} holds a {type(value).__name__}; expected lists of prompts "
                "by category; repair the file"
            )
    if not rows and not above:
        raise InputError(
            f"{name}: a JSON object without a list of prompts; it has {_shown(list(map(str, whole)))}; "
            "expected a list of records; put the prompts in a list"
        )
    notes += [f"left out what stands beside the prompts: {_shown(left)}"] if left else []
    if keys := [str(key) for key, value in whole.items() if isinstance(value, str) and str(key) not in left]:
        said = numbered(len(keys), "text is read as a prompt", "texts are read as prompts")
        notes.append(f"{said}, by the keys {_shown(keys)}, which are taken for ids")
    return rows


def _shown(keys: list[str]) -> str:
    return ", ".join(key[:40] for key in keys[:6]) + (f" and {len(keys) - 6} more" if len(keys) > 6 else "")


# Tables


def _table(text: str, delimiter: str, name: str, column: str | None, notes: list[str]) -> Iterator[Row]:
    first = next(_rows_of_text(text), "").rstrip("\r\n")
    if named := re.fullmatch(r'"?sep=([^"]);?"?', first):
        delimiter = named[1]
        notes.append(f"cells are separated by {delimiter!r}, as the first line says")
        text = text[len(first) :].removeprefix("\r").removeprefix("\n")
    cells = Cells(text, delimiter, name)
    header = cells.header()
    if len(header) == 1:
        for other in ("\t", ";", ",", "|"):
            if other != delimiter and other in header[0]:
                tried = Cells(text, other, name)
                names = tried.header()
                if any(
                    is_known_column(cell) or is_conversation_column(cell) or cell == column for cell in names
                ):
                    notes.append(f"cells are separated by {other!r}; read so")
                    cells, header = tried, names
                    break
    if (
        column is not None
        and column.isdecimal()
        and (column not in header or looks_like_data(header))
        and not any(is_known_column(cell) for cell in header)
    ):
        notes.append("no header row; columns taken by their number, counted from 1")
        cells = Cells(text, cells.delimiter, name)
        header = [str(number) for number in range(1, len(header) + 1)]
    header = _distinct(header, name, column, notes)
    yield from _dicts(header, cells, notes)


def _distinct(header: list[str], name: str, column: str | None, notes: list[str]) -> list[str]:
    counts = Counter(header)
    doubled = sorted(cell for cell, count in counts.items() if count > 1)
    bad = [
        cell for cell in doubled if is_known_column(cell) or is_conversation_column(cell) or cell == column
    ]
    if bad:
        raise InputError(
            f"{name}: the header names {', '.join(bad)} more than once; expected different columns; "
            "rename one"
        )
    if not doubled:
        return header
    if any(doubled):
        named = _shown(list(filter(None, doubled)))
        notes.append(f"the header names {named} more than once; the later ones are numbered")
    seen: Counter[str] = Counter()
    distinct = []
    for cell in header:
        seen[cell] += 1
        distinct.append(cell if seen[cell] == 1 else f"{cell} ({seen[cell]})")
    return distinct


def _dicts(header: list[str], cells: "Cells", notes: list[str]) -> Iterator[Row]:
    short = whole = again = 0
    for row in cells:
        if len(row) == len(header) and [cell.strip() for cell in row] == cells.names:
            again += 1
            continue
        if len(row) < 2 and not any(cell.strip() for cell in row):
            continue
        if len(row) > len(header) and any(cell.strip() for cell in row[len(header) :]):
            if len(header) > 1 or not cells.plain:
                yield Unread(
                    f"row {cells.row} has {len(row)} cells but the header {len(header)}; expected as many; "
                    "put quotes around cells that contain the separator"
                )
                continue
            row, whole = [cells.delimiter.join(row)], whole + 1
        short += len(row) < len(header)
        yield dict(zip(header, row, strict=False))
    notes += cells.notes()
    if again:
        notes.append(f"left out {numbered(again, 'row that repeats', 'rows that repeat')} the header")
    if short:
        notes.append(
            f"{numbered(short, 'row has', 'rows have')} fewer cells than the header; the missing ones are "
            "empty"
        )
    if whole:
        notes.append(
            f"{numbered(whole, 'row holds', 'rows hold')} the separator, and there is one column: taken whole"
        )


class Cells:
    """The rows of a table as lists of cells, read one by one.

    Quotation marks around a cell are taken off; a row whose marks do not fit is read as it stands, marks
    included, or, where they are escaped by backslashes, with those read as marks.

    Attributes:
        delimiter: What separates cells.
        row: Number of the last row, counted from 1.
        names: Cells of the header, once it was read.
        plain: Whether the last row held no quotation marks around its cells.
    """

    def __init__(self, text: str, delimiter: str, name: str) -> None:
        self.delimiter, self._name, self._size = delimiter, name, len(text)
        self._lines = _rows_of_text(text)
        self._back: list[str] = []
        self._taken: list[str] = []
        self.row, self._line, self._width = 0, 0, 0
        self._loose = self._escaped = self._swallowed = 0
        self._spaced = False
        self.names: list[str] = []
        self._quotes_behind_spaces = f'{delimiter} "' in text
        self.plain = True

    def header(self) -> list[str]:
        """The first row that is not blank, its cells without outer spaces."""
        row = next((row for row in self if any(cell.strip() for cell in row)), [])
        self._width, self.names = len(row), [cell.strip() for cell in row]
        self._spaced = self._quotes_behind_spaces and all(cell.startswith(" ") for cell in row[1:])
        return self.names

    def notes(self) -> list[str]:
        """A line for each thing that was repaired."""
        return [
            line
            for line, said in (
                (f"loose quotation marks from line {self._loose} on; read as they stand", self._loose),
                (
                    f"quotation marks are escaped by backslashes from line {self._escaped} on; read so",
                    self._escaped,
                ),
                (
                    f"a cell from line {self._swallowed} on holds lines that look like rows; look whether a "
                    "quotation mark is missing",
                    self._swallowed,
                ),
                ("spaces behind the separators, before quotation marks too, are left out", self._spaced),
            )
            if said
        ]

    def __iter__(self) -> Iterator[list[str]]:
        while True:
            self.row += 1
            self._taken = []
            row = self._read(self._pulled)
            if row is None:
                return
            if len(self._taken) > 1 and not self._swallowed and self._width > 1:
                like_rows = all(line.count(self.delimiter) == self._width - 1 for line in self._taken)
                self._swallowed = self._line - len(self._taken) + 1 if like_rows else 0
            self.plain = len(self._taken) == 1 and '"' not in self._taken[0]
            yield row

    def _pulled(self) -> Iterator[str]:
        """Lines for one row, remembered so that they can be given again."""
        while True:
            line = self._back.pop() if self._back else next(self._lines, None)
            if line is None:
                return
            self._line += 1
            self._taken.append(line)
            yield line

    def _read(self, lines: Callable[[], Iterator[str]]) -> list[str] | None:
        try:
            return self._next(self._reader(lines()))
        except csv.Error as error:
            unclosed = "unexpected end" in str(error)
        first, at = self._taken[0], self._line - len(self._taken) + 1
        if '\\"' in first:
            mended = _ESCAPED_QUOTE.sub(r'\1""', first)
            try:
                row = self._next(self._reader([mended]))
            except csv.Error:
                pass
            else:
                self._give_back()
                self._escaped = self._escaped or at
                return row
        if unclosed:
            raise InputError(
                f"{self._name}: a quotation mark opened in row {self.row} is never closed; "
                "expected closed quotes; write a quotation mark inside a cell twice"
            ) from None
        self._give_back()
        self._loose = self._loose or at
        return self._next(
            csv.reader(iter([first.rstrip("\r\n")]), delimiter=self.delimiter, quoting=csv.QUOTE_NONE)
        )

    def _reader(self, lines: Iterable[str]) -> Iterator[list[str]]:
        return csv.reader(lines, delimiter=self.delimiter, strict=True, skipinitialspace=self._spaced)

    def _give_back(self) -> None:
        """Puts back every line of the row but its first."""
        self._back += reversed(self._taken[1:])
        self._line -= len(self._taken) - 1
        self._taken = self._taken[:1]

    def _next(self, reader: Iterator[list[str]]) -> list[str] | None:
        """The csv module's limit on the size of a cell is one for the whole process: raised for a moment,
        then put back.
        """
        with _FIELD_LIMIT:
            before = csv.field_size_limit(max(self._size + 1, csv.field_size_limit()))
            try:
                return next(reader, None)
            finally:
                csv.field_size_limit(before)
