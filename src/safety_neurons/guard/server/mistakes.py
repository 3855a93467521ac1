"""What is wrong in the body of a request, in one line: where, what arrived, what was expected. Never what a
text in it says.
"""

from collections.abc import Sequence
from typing import Any

import pydantic

from safety_neurons.counting import numbered

_KINDS = {
    "string_type": "a string",
    "int_type": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "list_type": "a list",
    "dict_type": "an object",
    "model_type": "an object",
}
"""By the type of an error of pydantic, the kind of value that was expected."""
_BOUNDS = {
    "greater_than_equal": "at least {ge}",
    "greater_than": "more than {gt}",
    "less_than_equal": "at most {le}",
    "less_than": "less than {lt}",
    "string_too_long": "at most {max_length} characters",
    "too_long": "at most {max_length} of them",
    "too_short": "at least {min_length} of them",
    "literal_error": "{expected}",
    "string_pattern_mismatch": "at most 128 characters without spaces, slashes and brackets",
}
"""Likewise, what was expected of a value of the right kind."""


def first_mistake(error: pydantic.ValidationError) -> tuple[str, str]:
    """The path of the first field that is wrong, and what to say of it.

    A field that may be of several kinds has errors for each of them: those count that got furthest into the
    value, and of these what is wrong with a value of the right kind.
    """
    found = error.errors(include_url=False)
    first = [one for one in found if one["loc"][:1] == found[0]["loc"][:1]]
    deepest = max(first, key=lambda one: (len(_steps(one["loc"])), one["type"] != "missing"))
    place = path_of(deepest["loc"])
    here = [one for one in first if path_of(one["loc"]) == place]
    one = next((other for other in here if other["type"] not in _KINDS), here[0])
    if one["type"] == "missing":
        return place, f"{place} is missing; give it"
    if one["type"] in _KINDS:
        expected = " or ".join(dict.fromkeys(_KINDS[other["type"]] for other in here))
    elif one["type"] in _BOUNDS:
        expected = _BOUNDS[one["type"]].format(**one.get("ctx", {}))
    else:
        return place, f"{place or 'the request'}: {one['msg'][:200]}"
    return place, f"{place or 'the request'}: {arrived(one['input'])} arrived; expected {expected}"


def arrived(value: Any) -> str:
    """What a JSON value is, in words that do not say what is in it; numbers are shown."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, int | float):
        return f"{value:g}" if isinstance(value, float) else str(value)
    if isinstance(value, str):
        return f"a string of {numbered(len(value), 'character')}"
    return f"a list of {len(value)}" if isinstance(value, list) else "an object"


def path_of(location: Sequence[int | str]) -> str:
    """A path such as `messages[0].content`; long names are cut."""
    path = ""
    for part in _steps(location):
        if isinstance(part, int):
            path += f"[{part}]"
        else:
            path += f".{part[:64]}" if path else part[:64]
    return path[:200]


def _steps(location: Sequence[int | str]) -> list[int | str]:
    """The location without the names of members of unions."""
    return [
        part
        for part in location
        if isinstance(part, int)
        or (part.isidentifier() and part[0].islower() and part not in ("str", "list", "dict"))
    ]
