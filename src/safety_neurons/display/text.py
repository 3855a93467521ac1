"""Words of a display: numbers, shares, intervals and durations in words, and foreign text made harmless and
visible.
"""

import json
from typing import Any

from markupsafe import Markup

from safety_neurons.counting import numbered
from safety_neurons.results.notebook import HOLD, KEYBOARD, MINUS, NONE, SPACE, interval, number, visible

__all__ = [
    "HOLD",
    "KEYBOARD",
    "MINUS",
    "NONE",
    "SPACE",
    "count",
    "duration",
    "in_script",
    "interval",
    "name",
    "number",
]
__all__ += ["plural", "say", "share", "visible"]


def name(text: object, limit: int = 80) -> Markup:
    """A name from a file or a command, isolated so that its writing direction stays its own."""
    return Markup('<bdi class="name">{}</bdi>').format(visible(text, limit))


def say(pattern: str, *values: object, **named: object) -> Markup:
    """A sentence; everything put into it is escaped unless it is markup of our own."""
    return Markup(pattern).format(*values, **named)  # noqa: S704 - the patterns are literals of this package


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
    return numbered(quantity, word).replace(" ", SPACE, 1)


def first_of(shown: int, whole: int, word: str) -> str:
    """What a list holds that begins with the largest scores: `All 3 heads`, or how many of how many."""
    if shown == whole:
        return f"All {plural(whole, word)}, largest scores first"
    return f"The {shown:,} of {plural(whole, word)} with the largest scores"


def in_script(value: Any) -> str:
    """JSON that cannot end a script element or open a comment: <, > and & are escapes.

    Unseen characters were named before.
    """
    text = json.dumps(value, separators=(",", ":"), ensure_ascii=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
