"""Waiting for something that will happen: tests wait for events, never for an amount of time."""

import time
from collections.abc import Callable
from typing import TypeVar

HANG = 600.0
"""Seconds after which a wait is a hang: far beyond what the slowest machine needs, so that only a fault ends
here.
"""

Value = TypeVar("Value")


def until(happened: Callable[[], Value], what: object = "what was waited for") -> Value:
    """The first true value of `happened`; asked again and again."""
    end = time.monotonic() + HANG
    while not (value := happened()):
        assert time.monotonic() < end, f"{what() if callable(what) else what} never happened"
        time.sleep(0.005)
    return value
