"""A request's body as a value: strict JSON, and nothing in it that two readers could understand differently."""

import json
from typing import Any, TypeVar

import pydantic

from safety_neurons import strict_json
from safety_neurons.guard.server.problems import Problem

Shape = TypeVar("Shape", bound=pydantic.BaseModel)


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
        return strict_json.loads(body.decode("utf-8"), depth=depth)
    except UnicodeDecodeError:
        raise Problem(400, "the body is not UTF-8; expected a JSON object in UTF-8", "invalid_encoding") from None
    except json.JSONDecodeError as error:
        what = f"line {error.lineno}, column {error.colno}"
        raise Problem(400, f"the body is not JSON ({what}); expected a JSON object", "invalid_json") from None
    except strict_json.RefusedJSON as error:
        code = {"number": "invalid_json", "surrogate": "invalid_encoding"}.get(error.code, error.code)
        raise Problem(400, f"the body holds {error}; expected a JSON object that every reader understands alike", code) from None


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
