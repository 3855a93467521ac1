"""Text of the page: numbers with their intervals, and foreign text made harmless and visible."""

import json
from collections.abc import Mapping
from typing import Any

from markupsafe import Markup

from safety_neurons.results import visible

__all__ = ["HOLD", "MINUS", "NONE", "SPACE", "count", "duration", "in_script", "interval", "name", "number", "plural", "say", "share"]
__all__ += ["visible"]
SPACE = "\N{NARROW NO-BREAK SPACE}"
HOLD = "\N{NO-BREAK SPACE}"
MINUS = "\N{MINUS SIGN}"
NONE = "\N{EN DASH}"


def name(text: object, limit: int = 80) -> Markup:
    """A name from a file or a command, isolated so that its writing direction stays its own."""
    return Markup('<bdi class="name">{}</bdi>').format(visible(text, limit))


def say(pattern: str, *values: object, **named: object) -> Markup:
    """A sentence; everything put into it is escaped unless it is markup of our own."""
    return Markup(pattern).format(*values, **named)  # noqa: S704 - the patterns are literals of this package


def number(value: float | int | None, digits: int = 2, *, signed: bool = False) -> str:
    """A number with a true minus sign; a dash where there is none."""
    if value is None:
        return NONE
    text = f"{value:+.{digits}f}" if signed else f"{value:.{digits}f}"
    return ("0" + text[2:] if float(text) == 0 and text[0] in "+-" and not signed else text).replace("-", MINUS)


def interval(record: Mapping[str, Any] | None, *, signed: bool = False, digits: int = 2) -> str:
    """`0.87 [0.80, 0.94]`, or that it is undefined."""
    if record is None:
        return NONE
    if record["value"] is None:
        return "undefined"
    value = number(record["value"], digits, signed=signed)
    if record["low"] is None or record["high"] is None:
        return value
    return f"{value}{HOLD}[{number(record['low'], digits, signed=signed)},{HOLD}{number(record['high'], digits, signed=signed)}]"


def share(value: float | int | None, digits: int = 1) -> str:
    """A share as a percentage; small ones keep two significant digits."""
    if value is None:
        return NONE
    percent = 100 * value
    if percent and abs(percent) < 10**-digits:
        return f"{percent:.1g}{SPACE}%".replace("-", MINUS)
    return f"{percent:.{digits}f}".removesuffix(".0") + f"{SPACE}%"


def count(value: int | None) -> str:
    """A whole number with separators."""
    return NONE if value is None else f"{value:,}"


def duration(seconds: float | int | None) -> str:
    """Seconds, minutes or hours."""
    if seconds is None:
        return NONE
    if seconds < 120:
        return f"{seconds:.{1 if seconds < 10 else 0}f}{SPACE}s"
    return f"{seconds / 60:.1f}{SPACE}min" if seconds < 7200 else f"{seconds / 3600:.1f}{SPACE}h"


def plural(quantity: int, word: str) -> str:
    """`1 layer`, `3 layers`."""
    return f"{quantity:,}{SPACE}{word}{'' if quantity == 1 else 's'}"


def in_script(value: Any) -> str:
    """JSON that cannot end a script element or open a comment: <, > and & are escapes; unseen characters were named before."""
    text = json.dumps(value, separators=(",", ":"), ensure_ascii=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
