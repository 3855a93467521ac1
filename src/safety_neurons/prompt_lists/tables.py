"""From text to rows, one after the other: JSON Lines, JSON, CSV, TSV and plain lines."""

import csv
import json
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from safety_neurons import strict_json
from safety_neurons.counting import numbered
from safety_neurons.errors import InputError
from safety_neurons.prompt_lists.columns import (
    is_conversation_column,
    is_known_column,
)
from safety_neurons.prompt_lists.objects import Row, Unread, as_rows, distinct, role_by_itself, rows_of

MOST_ROWS = 1_000_000
"""Rows that are read at most, unless fewer are asked for: each takes a third of a kilobyte of memory beside
its text.
"""
_FIELD_LIMIT = threading.Lock()
_LINE = re.compile(r"[^\r\n]*(?:\r\n|\r|\n)|[^\r\n]+\Z")
_COLUMN_NAME = re.compile(r"[A-Za-z_][\w-]{0,39}")
_ESCAPED_QUOTE = re.compile(r'(?<!\\)((?:\\\\)*)\\"')


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
    if is_json(text):
        notes.append("named .txt but holds JSON; read as such")
        return (_json_lines if _holds_lines(text) else _json)(text, name, column, notes)
    text = text if "\n" in text else text.replace("\r", "\n")  # line ends of old Macs
    first = next(_lines(text), "").strip()
    if has_header(text):
        raise InputError(
            f"{name}: line 1, {first[:40]!r}, is the header of a table; expected a prompt a line; name "
            "the file .csv or .tsv"
        )
    if is_known_column(first) and first.count(" ") == 0:
        notes.append(f"line 1, {first!r}, looks like the name of a column; it is read as a prompt")
    lines = [line for _, line in zip(range(1000), _lines(text), strict=False) if line.strip()]
    if first.startswith("#") and not all(line.lstrip().startswith("#") for line in lines):
        notes.append(f"line 1, {first[:40]!r}, looks like a comment; it is read as a prompt")
    for delimiter in "\t;|":
        width = lines[0].count(delimiter) if len(lines) > 1 else 0
        if width and all(line.count(delimiter) == width for line in lines):
            notes.append(
                f"{delimiter!r} stands in every line {numbered(width, 'time')}, as in a table; each line is "
                "read as a prompt: name a table .csv or .tsv"
            )
    return ({"text": line.removesuffix("\n").removesuffix("\r")} for line in _lines(text))


def has_header(text: str) -> bool:
    """Whether the first line of a text names the columns of a table, one of them the prompt's."""
    first = next(_lines(text), "").strip().strip("|")
    return any(
        len(cells) > 1 and _may_be_header(cells) and all(map(_COLUMN_NAME.fullmatch, cells))
        for cells in (_stripped(first.split(delimiter)) for delimiter in "\t;,|")
    )


def is_json(text: str) -> bool:
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
                yield from as_rows(strict_json.each(text, lenient=True))
                return
            if not line.rstrip().endswith("},"):
                raise InputError(_bad_line(name, number, line, error, last=_is_last(text, line))) from None
            try:
                value = _line_value(line.rstrip()[:-1])
            except ValueError:
                raise InputError(_bad_line(name, number, line, error, last=False)) from None
            commas += 1
        values = values or [value]
        yield from as_rows([value], number)
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
        if first and all(map(role_by_itself, first)):
            yield from rows_of([*first, *values], name, column)
            return
        yield from as_rows(first)
        yield from as_rows(values, len(first) + 1)
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
                if _may_be_header(names) or column in names:
                    notes.append(f"cells are separated by {other!r}; read so")
                    cells, header = tried, names
                    break
    if not _may_be_header(header) and column not in header:
        cells, header = _below_preface(text, cells, name, column, notes) or (cells, header)
    if (
        column is not None
        and column.isdecimal()
        and (column not in header or looks_like_data(header))
        and not any(is_known_column(cell) for cell in header)
    ):
        notes.append("no header row; columns taken by their number, counted from 1")
        cells = Cells(text, cells.delimiter, name)
        header = [str(number) for number in range(1, len(header) + 1)]
    yield from _dicts(distinct(header, name, column, notes), cells, name, column, notes)


def _below_preface(
    text: str, cells: "Cells", name: str, column: str | None, notes: list[str]
) -> tuple["Cells", list[str]] | None:
    """The table whose header stands below a title or comments; None where no row near the top is a header."""
    if column is not None and column.isdecimal():
        return None
    for delimiter in dict.fromkeys((cells.delimiter, "\t", ";", ",", "|")):
        tried = Cells(text, delimiter, name)
        for _ in range(_PREFACE):
            header, above = tried.header(), tried.row - 1
            if not header:
                break
            if above and _is_header(header, column):
                notes.append(f"left out {numbered(above, 'row')} above the header ({', '.join(header)[:80]})")
                return tried, header
    return None


_PREFACE = 20
"""Rows in which a header is looked for."""


def _may_be_header(names: Sequence[str]) -> bool:
    return any(is_known_column(cell) or is_conversation_column(cell) for cell in names)


def _is_header(names: Sequence[str], column: str | None) -> bool:
    """Whether a row can be nothing but names of columns, the prompt's among them."""
    named = [cell for cell in names if cell]
    return (
        (_may_be_header(named) or column in named)
        and all(map(_COLUMN_NAME.fullmatch, named))
        and len(set(named)) == len(named)
    )


_RULE = re.compile(r"[\s|:+=-]*--[\s|:+=-]*")
"""A line under the header of a table as text."""


def _stripped(row: Iterable[str]) -> list[str]:
    return [cell.strip() for cell in row]


def _has_row_numbers(row: list[str], header: list[str]) -> bool:
    """Whether a first row has a cell more than the header, a number before its prompt, as R writes it."""
    beyond = len(row) == len(header) + 1 and bool(row[-1].strip())
    return beyond and is_known_column(header[0]) and row[0].strip() in ("0", "1")


def _dicts(
    header: list[str], cells: "Cells", name: str, column: str | None, notes: list[str]
) -> Iterator[Row]:
    short = whole = again = 0
    ruled, known = False, set(cells.names)
    for row in cells:
        if _RULE.fullmatch("".join(row)) and (ruled or cells.is_first):
            ruled = True
            continue
        row = _stripped(row) if ruled else row
        if len(row) == len(header) and _stripped(row) == cells.names:
            again += 1
            continue
        if len(row) > 1 and not known.isdisjoint(row) and _is_header(names := _stripped(row), column):
            notes.append(
                f"row {cells.row} is a header of its own ({', '.join(names)[:80]}), as where tables were "
                "joined; read so"
            )
            cells.rename(names)
            header, known = distinct(names, name, column, notes), set(names)
            continue
        if len(row) < 2 and not any(cell.strip() for cell in row):
            continue
        if cells.is_first and _has_row_numbers(row, header):
            header = ["", *header]
            notes.append("rows begin with a number that the header does not name; read so")
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
    if ruled:
        notes.append("lines that rule the table, and spaces around its cells, are left out")
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
        swallowed: Number of the first line of a cell that holds lines which look like rows; 0 for none.
    """

    def __init__(self, text: str, delimiter: str, name: str) -> None:
        self.delimiter, self._name, self._size = delimiter, name, len(text)
        self._lines = _rows_of_text(text)
        self._back: list[str] = []
        self._taken: list[str] = []
        self.row, self._line, self._width, self._first = 0, 0, 0, 0
        self._loose = self._escaped = self.swallowed = 0
        self._spaced = False
        self.names: list[str] = []
        self._quotes_behind_spaces = f'{delimiter} "' in text
        self.plain = True

    def header(self) -> list[str]:
        """The first row that is not blank, its cells without outer spaces."""
        row = next((row for row in self if any(cell.strip() for cell in row)), [])
        self.rename(_stripped(row))
        self._first = self.row + 1
        self._spaced = self._quotes_behind_spaces and all(cell.startswith(" ") for cell in row[1:])
        return self.names

    def rename(self, names: list[str]) -> None:
        """The cells of another header."""
        self._width, self.names = len(names), names

    @property
    def is_first(self) -> bool:
        """Whether the last row is the one below the header."""
        return self.row == self._first

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
                    f"a cell from line {self.swallowed} on holds lines that look like rows; look whether a "
                    "quotation mark is missing",
                    self.swallowed,
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
            if len(self._taken) > 1 and not self.swallowed and self._width > 1:
                like_rows = all(line.count(self.delimiter) == self._width - 1 for line in self._taken)
                self.swallowed = self._line - len(self._taken) + 1 if like_rows else 0
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
