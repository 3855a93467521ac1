"""Whether JSON values have the shape that a type of `safety_neurons.results.records` says, to the last
key.
"""

import types
import typing
from typing import Any, NotRequired, Union


def misfits(value: Any, hint: Any, place: str = "result") -> list[str]:
    """One line for every value of another type, and for every key too many or too few."""
    origin, inside = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return []
    if origin is NotRequired:
        return misfits(value, inside[0], place)
    if origin in (Union, types.UnionType):
        tried = [misfits(value, one, place) for one in inside]
        return [] if [] in tried else max(tried, key=lambda lines: lines[0].count("."))
    if typing.is_typeddict(hint):
        if not isinstance(value, dict):
            return [f"{place} is a {type(value).__name__}"]
        hints = typing.get_type_hints(hint, include_extras=True)
        wrong = [f"{place}.{key} is missing" for key in hint.__required_keys__ if key not in value]
        wrong += [f"{place}.{key} is not declared" for key in value if key not in hints]
        return wrong + [
            line
            for key in value
            if key in hints
            for line in misfits(value[key], hints[key], f"{place}.{key}")
        ]
    if origin is list and isinstance(value, list):
        return [
            line
            for number, item in enumerate(value)
            for line in misfits(item, inside[0], f"{place}.{number}")
        ]
    if origin is dict and isinstance(value, dict):
        return [line for key, item in value.items() for line in misfits(item, inside[1], f"{place}.{key}")]
    kind = (int, float) if hint is float else origin or hint
    fits = isinstance(value, kind) and (hint is bool or not isinstance(value, bool) or hint is object)
    return [] if fits else [f"{place} is {str(value)[:40]!r}, not {hint}"]
