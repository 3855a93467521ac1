"""How results look: numbers and intervals everywhere.

In a notebook small tables in its own colours, every text escaped and visible.
"""

import html
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

# Controls, direction marks, invisible fillers, tags, line separators and halves of surrogate pairs: they are
# named, never drawn.
UNSEEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\u3164\ufeff\uffa0"
    "\ufff0-\ufffb\ufffe\uffff\U0001d173-\U0001d17a\U000e0000-\U000e0fff\ud800-\udfff]"
)
MINUS, HOLD, NONE = "\N{MINUS SIGN}", "\N{NO-BREAK SPACE}", "\N{EN DASH}"
SPACE = "\N{NARROW NO-BREAK SPACE}"
KEYBOARD = str.maketrans({SPACE: " ", HOLD: " ", MINUS: "-"})
"""The blanks and signs of a keyboard, for text that is searched and copied."""
LONG = 300
"""Characters shown of one cell."""


def visible(text: object, limit: int | None = None) -> str:
    """The text with every unseen character named as ⟨U+202E⟩, and what is beyond `limit` characters cut and
    counted, unless the count would be longer than what it counts.
    """
    whole = str(text)
    kept = whole if limit is None else whole[:limit]
    if len(_more(len(whole) - len(kept))) > len(whole) - len(kept):
        kept = whole
    shown = UNSEEN.sub(lambda match: f"⟨U+{ord(match[0]):04X}⟩", kept.replace("\r\n", "\n"))
    return shown + _more(cut) if (cut := len(whole) - len(kept)) else shown


def _more(cut: int) -> str:
    return f"… ({cut:,} characters more)"


def html_table(caption: object, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table for a notebook: nothing in it is fetched or runs, and it has no colour of its own.

    Args:
        caption: what it shows, in a line.
        columns: headers; the first column's cells are headers of their rows.
        rows: anything; shown as text, an empty cell where it is None.
    """
    head = "".join(f'<th scope="col">{_cell(column)}</th>' for column in columns)
    body = "".join(f"<tr>{_row(row)}</tr>" for row in rows)
    titled = f"<caption>{_cell(caption)}</caption><thead><tr>{head}</tr></thead>"
    return f"<table>{titled}<tbody>{body}</tbody></table>"


def _row(row: Sequence[object]) -> str:
    first, *others = row
    return f'<th scope="row">{_cell(first)}</th>' + "".join(f"<td>{_cell(cell)}</td>" for cell in others)


def _cell(value: object) -> str:
    return "" if value is None else f"<bdi>{html.escape(visible(value, LONG))}</bdi>"


def number(value: float | int | None, digits: int = 2, *, signed: bool = False) -> str:
    """A number with a true minus sign; a dash where there is none."""
    if value is None:
        return NONE
    text = f"{value:+.{digits}f}" if signed else f"{value:.{digits}f}"
    return ("0" + text[2:] if float(text) == 0 and text[0] in "+-" and not signed else text).replace(
        "-", MINUS
    )


def interval(found: Mapping[str, Any] | None, *, signed: bool = False, digits: int = 2) -> str:
    """An estimate as JSON values: `0.87 [0.80, 0.94]`, or that it is undefined."""
    if found is None:
        return NONE
    if found["value"] is None:
        return "undefined"
    value, low, high = (number(found[end], digits, signed=signed) for end in ("value", "low", "high"))
    return value if NONE in (low, high) else f"{value}{HOLD}[{low},{HOLD}{high}]"
