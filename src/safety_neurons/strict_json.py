"""JSON as every reader of this package takes it: bounded in depth, size and numbers, nothing in it that two
readers understand differently.

Only `ValueError` leaves this module: `json.JSONDecodeError` for what is not JSON, `RefusedJSON` for what is
and is refused. Whoever calls knows the file and says it.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeAlias

Json: TypeAlias = None | bool | int | float | str | Sequence[object] | Mapping[str, object]
"""A JSON value; what lies within lists and objects is for the reader to find out."""
JsonObject: TypeAlias = dict[str, Json]
"""A JSON object whose keys no type of `results.records` names."""
DEPTH = 64
"""Lists and objects within one another at most."""
MOST_VALUES = 30_000_000
"""Values of one document at most, counted by its commas and brackets."""
_MOST_DIGITS = 64
_HALF = re.compile(r"\\u[dD][89a-fA-F]|[\ud800-\udfff]")
_LONG_NUMBER = re.compile(r"[0-9]{19}|[0-9.][eE]\+?[0-9]{3}")
_BLANK = re.compile(r"[ \t\r\n]*")


class RefusedJSON(ValueError):
    """JSON that is refused.

    Attributes:
        code: `nested_too_deeply`, `duplicate_name`, `number`, `surrogate` or `too_large`.
    """

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


def loads(
    text: str | bytes,
    *,
    depth: int = DEPTH,
    lenient: bool = False,
    constants: bool = False,
    doubled: bool = False,
) -> Any:
    """The value of a JSON text.

    Deep nesting is always refused.

    Args:
        text: The document; bytes are UTF-8, with or without a byte order mark.
        depth: Lists and objects within one another at most.
        lenient: For files of other tools: NaN and infinities are None, whole numbers may have 64 digits, half
            surrogate pairs stay. Otherwise these are refused, and whole numbers beyond 64 bits.
        doubled: Let an object in which a name comes twice pass, as the list of its pairs; otherwise it is
            refused.
        constants: For configurations of models, which may hold `Infinity`: it and NaN are the numbers they
            name.

    Raises:
        ValueError: Not UTF-8 or not JSON (`json.JSONDecodeError`), or refused (`RefusedJSON`).
    """
    text = text if isinstance(text, str) else bytes(text).decode("utf-8-sig")
    start = _after_blanks(text, 0)
    value, end = _Reader(text, depth, lenient, constants, doubled).read(start)
    if _after_blanks(text, end) != len(text):
        raise json.JSONDecodeError("Extra data", text, _after_blanks(text, end))
    return value


def each(text: str, *, depth: int = DEPTH, lenient: bool = False) -> Iterator[Any]:
    """The elements of a JSON list, or the values of a text that holds one after the other, each as soon as it
    is read.

    An element that is refused is given as its `RefusedJSON`, so that one of thousands does not cost the
    others. Between values that stand by themselves a comma is let pass.

    Raises:
        ValueError: Not JSON (`json.JSONDecodeError`), or larger than is read (`RefusedJSON`).
    """
    reader = _Reader(text, depth, lenient)
    at = _after_blanks(text, 0)
    listed = text.startswith("[", at)
    at = _after_blanks(text, at + listed)
    if listed and text.startswith("]", at):
        at += 1
    else:
        while True:
            value, at, refused = reader.element(at)
            yield refused if refused is not None else value
            at = _after_blanks(text, at)
            if listed and text.startswith("]", at):
                at += 1
                break
            if not listed and at == len(text):
                return
            if listed and not text.startswith(",", at):
                raise json.JSONDecodeError("Expecting ',' delimiter", text, at)
            at = _after_blanks(text, at + text.startswith(",", at))
            if not listed and at == len(text):
                return
    if _after_blanks(text, at) != len(text):
        raise json.JSONDecodeError("Extra data", text, _after_blanks(text, at))


def _after_blanks(text: str, at: int) -> int:
    found = _BLANK.match(text, at)
    return at if found is None else found.end()


class _Reader:
    """One text, read with the hooks that it needs: a look at it first spares most texts a Python call for
    each number.
    """

    def __init__(
        self, text: str, depth: int, lenient: bool, constants: bool = False, doubled: bool = False
    ) -> None:
        if len(text) > MOST_VALUES and sum(map(text.count, "[{,")) > MOST_VALUES:
            raise RefusedJSON("too_large", f"more than {MOST_VALUES:,} values")
        self._text, self._depth, self._lenient, self._pass_doubled = text, depth, lenient, doubled
        numbers: dict[str, Any] = (
            {"parse_int": self._whole, "parse_float": self._decimal} if _LONG_NUMBER.search(text) else {}
        )
        self._decoder = json.JSONDecoder(
            parse_constant=float if constants else self._constant, object_pairs_hook=self._object, **numbers
        )

    def read(self, at: int) -> tuple[Any, int]:
        """The value that begins there, and where it ends."""
        value, end, refused = self.element(at)
        if refused is not None:
            raise refused
        return value, end

    def element(self, at: int) -> tuple[Any, int, RefusedJSON | None]:
        """The same, and why the value is refused where it is whole JSON."""
        self._refused: RefusedJSON | None = None
        try:
            value, end = self._decoder.raw_decode(self._text, at)
        except RecursionError:
            raise self._too_deep() from None
        if (
            self._refused is None
            and self._text.count("[", at, end) + self._text.count("{", at, end) > self._depth
        ):
            self._refused = self._too_deep() if _deeper_than(value, self._depth) else None
        if (
            self._refused is None
            and not self._lenient
            and _HALF.search(self._text, at, end)
            and _has_half_a_pair(value)
        ):
            self._refused = RefusedJSON("surrogate", "half a surrogate pair")
        return value, end, self._refused

    def _too_deep(self) -> RefusedJSON:
        return RefusedJSON(
            "nested_too_deeply",
            f"nested too deeply, more than {self._depth} lists and objects within one another",
        )

    def _object(self, pairs: list[tuple[str, Any]]) -> Any:
        found = dict(pairs)
        if len(found) < len(pairs):
            if self._pass_doubled:
                return [list(pair) for pair in pairs]
            self._refused = RefusedJSON("duplicate_name", "an object with two values for one name")
        return found

    def _constant(self, name: str) -> None:
        if not self._lenient:
            self._refused = RefusedJSON("number", f"{name}, which is no number of JSON")

    def _decimal(self, text: str) -> float | None:
        number = float(text)
        if not self._lenient and (not math.isfinite(number) or len(text) > _MOST_DIGITS):
            self._refused = RefusedJSON("number", "a number that no float can hold")
        return number if math.isfinite(number) else None

    def _whole(self, text: str) -> int:
        digits = len(text.lstrip("-"))
        if digits <= _MOST_DIGITS and (self._lenient or -(2**63) <= int(text) < 2**64):
            return int(text)
        self._refused = RefusedJSON("number", f"a whole number of {digits} digits")
        return 0


def _deeper_than(value: Any, depth: int) -> bool:
    here, level = [value], 0
    while here := [one for one in here if isinstance(one, dict | list)]:
        level += 1
        if level > depth:
            return True
        here = [item for one in here for item in (one.values() if isinstance(one, dict) else one)]
    return False


def _has_half_a_pair(value: Any) -> bool:
    here = [value]
    while here:
        one = here.pop()
        if isinstance(one, str):
            try:
                one.encode()
            except UnicodeEncodeError:
                return True
        elif isinstance(one, dict):
            here += one
            here += one.values()
        elif isinstance(one, list):
            here += one
    return False
