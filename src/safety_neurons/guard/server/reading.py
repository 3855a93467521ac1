"""A request's body as a value: strict JSON, and nothing in it that two readers could understand differently."""

import json
import math
from typing import Any, TypeVar

import pydantic

from safety_neurons.guard.server.problems import Problem

Shape = TypeVar("Shape", bound=pydantic.BaseModel)
_LONGEST_NUMBER = 64


def parse(body: bytes, depth: int) -> Any:
    """The JSON value of a body.

    Refused are what Python's reader would let pass and another one understands otherwise or not at all: names that come twice, NaN and
    infinities (a number such as 1e999 included), lone surrogates, deep nesting, numbers of many digits.

    Args:
        body: As it arrived.
        depth: Lists and objects within one another at most.

    Raises:
        Problem: 400.
    """
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError:
        raise Problem(400, "the body is not UTF-8; expected a JSON object in UTF-8", "invalid_encoding") from None
    try:
        value = json.loads(text, parse_constant=_no_constant, parse_float=_finite, parse_int=_short_integer, object_pairs_hook=_once_each)
    except RecursionError:
        raise _too_deep(depth) from None
    except json.JSONDecodeError as error:
        what = f"line {error.lineno}, column {error.colno}"
        raise Problem(400, f"the body is not JSON ({what}); expected a JSON object", "invalid_json") from None
    _check_strings_and_depth(value, depth)
    return value


def validated(value: Any, shape: type[Shape]) -> Shape:
    """A value as one of the shapes.

    Raises:
        Problem: 400, with the path of the first field that is wrong and without what it holds.
    """
    if not isinstance(value, dict):
        raise Problem(400, f"the body is a JSON {_kind(value)}; expected an object", "invalid_type")
    try:
        return shape.model_validate(value)
    except pydantic.ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        place = _place(first["loc"])
        raise Problem(400, f"{place or 'the request'}: {first['msg'][:200]}", "invalid_value", param=place or None) from None


def _place(location: tuple[int | str, ...]) -> str:
    """A path such as `messages[0].content`; names of union members are left out, long names cut."""
    path = ""
    for part in location:
        if isinstance(part, int):
            path += f"[{part}]"
        elif part.isidentifier() and part[0].islower() and part not in ("str", "list", "dict"):
            path += f".{part[:64]}" if path else part[:64]
    return path[:200]


def _kind(value: Any) -> str:
    names = {list: "list", str: "string", bool: "boolean", int: "number", float: "number", type(None): "null"}
    return names.get(type(value), "value")


def _no_constant(name: str) -> None:
    raise Problem(400, f"the body holds {name}, which is not JSON; expected finite numbers", "invalid_json")


def _finite(text: str) -> float:
    if len(text) > _LONGEST_NUMBER or not math.isfinite(number := float(text)):
        raise Problem(400, "the body holds a number that no float can hold; expected finite numbers", "invalid_json")
    return number


def _short_integer(text: str) -> int:
    if len(text) > _LONGEST_NUMBER:
        raise Problem(400, f"the body holds a whole number of {len(text)} digits; expected at most {_LONGEST_NUMBER}", "invalid_json")
    return int(text)


def _once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise Problem(400, "an object of the body has two values for one name; expected every name once", "duplicate_name")
    return found


def _too_deep(depth: int) -> Problem:
    return Problem(
        400, f"the body is nested too deeply; expected at most {depth} lists and objects within one another", "nested_too_deeply"
    )


def _check_strings_and_depth(value: Any, depth: int) -> None:
    level, here = 0, [value]
    while here:
        below: list[Any] = []
        for item in here:
            if isinstance(item, str):
                _check_text(item)
            elif isinstance(item, dict):
                for name in item:
                    _check_text(name)
                below += item.values()
            elif isinstance(item, list):
                below += item
        level += 1
        if level > depth + 1:
            raise _too_deep(depth)
        here = below


def _check_text(text: str) -> None:
    if text.isascii():
        return
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise Problem(400, "a string of the body has half a surrogate pair; expected Unicode text", "invalid_encoding") from None
