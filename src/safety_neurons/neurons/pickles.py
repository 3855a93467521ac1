"""Pickles of other projects: numbers, text, containers and arrays of numbers, and nothing that a file could build or change beside them."""

import io
import pathlib
import re
from collections.abc import Callable, Mapping
from pickle import Unpickler  # a subclass that builds nothing a file names
from pickletools import genops
from typing import Any

import numpy as np

from safety_neurons.errors import NeuronError


class Sealed:
    """A value that a pickle may pass around, and may not look into or change.

    What a pickle has in its hands it can give a new state. A real `numpy.dtype` told afterwards that it holds objects turns the bytes of
    every array that uses it into addresses; so nothing real is handed out.
    """

    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value

    def __setstate__(self, _: Any) -> None:
        raise NeuronError("the file changes what it may only use; nothing of it was run")


class _Maker(Sealed):
    """What a name in a file stands for."""

    __slots__ = ()

    def __call__(self, *args: Any) -> Any:
        return self.value(*args)


class _Primitives(Unpickler):
    """Builds numbers, text, containers and numpy arrays of numbers; every other name in the file is an error."""

    def __init__(self, stream: Any, admitted: Mapping[tuple[str, str], Callable[..., Any]]) -> None:
        super().__init__(stream)
        self._admitted = admitted

    def find_class(self, module: str, name: str) -> Any:
        """What a name in the file stands for; only names on the list stand for anything."""
        module = module.replace("numpy.core", "numpy._core")
        if (module, name) in self._admitted:
            return _Maker(self._admitted[module, name])
        raise NeuronError(f"the file asks for {module}.{name}, which is not an array, a number or a container; nothing of it was run")

    def persistent_load(self, _pid: Any) -> Any:
        """Nothing is stored beside the file."""
        raise NeuronError("the file refers to something stored beside it; expected a plain pickle")


class _Kind:
    """A kind of numbers, as a file names it; never a dtype that the file could change."""

    __slots__ = ("_code", "_order")

    def __init__(self, code: Any, *_: Any) -> None:
        if not isinstance(code, str) or not _NUMBERS.fullmatch(code):
            raise NeuronError(f"the file holds an array of {str(code)[:20]!r}; expected numbers")
        self._code, self._order = code, "="

    def __setstate__(self, state: Any) -> None:
        if not isinstance(state, tuple) or len(state) < 5 or state[1] not in _ORDERS or any(part is not None for part in state[2:5]):
            raise NeuronError("the file holds an array of records or objects; expected numbers")
        self._order = state[1]

    @property
    def dtype(self) -> "np.dtype[Any]":
        """A new dtype."""
        return np.dtype(self._code).newbyteorder(self._order)  # type: ignore[arg-type]


class _Array(np.ndarray):
    """An array that takes the state of an array of numbers, and no other."""

    def __setstate__(self, state: Any) -> None:
        _, shape, kind, fortran, content = state
        super().__setstate__((1, shape, _dtype(kind), bool(fortran), _bytes(content)))  # type: ignore[arg-type]


def _dtype(kind: Any) -> "np.dtype[Any]":
    if not isinstance(kind, _Kind):
        raise NeuronError("the file holds an array of unknown kind; expected numbers")
    return kind.dtype


def _bytes(content: Any) -> bytes:
    if not isinstance(content, bytes | bytearray):
        raise NeuronError(f"the file holds {type(content).__name__} in the place of an array's content; expected bytes")
    return bytes(content)


def _number(kind: Any, content: Any) -> Any:
    return np.frombuffer(_bytes(content), _dtype(kind))[0]


def _from_buffer(content: Any, kind: Any, shape: Any, order: Any = "C") -> np.ndarray:
    return np.frombuffer(_bytes(content), _dtype(kind)).reshape(shape, order=order).view(_Array)


def _latin(text: Any, coding: Any = "") -> bytes:
    """How old protocols write bytes."""
    if not isinstance(text, str) or coding != "latin1":
        raise NeuronError(f"the file encodes text as {str(coding)[:20]!r}; expected the bytes of an array")
    return text.encode("latin1")


def _never(*_: Any) -> Any:
    raise NeuronError("the file makes an array without content; expected numbers")


_ARRAYS: dict[tuple[str, str], Callable[..., Any]] = {
    ("numpy._core.multiarray", "_reconstruct"): lambda *_: _Array((0,), np.int8),
    ("numpy._core.multiarray", "scalar"): _number,
    ("numpy._core.numeric", "_frombuffer"): _from_buffer,
    ("numpy", "ndarray"): _never,
    ("numpy", "dtype"): _Kind,
    ("_codecs", "encode"): _latin,
    ("collections", "OrderedDict"): dict,
}
_NUMBERS = re.compile(r"[biuf][0-9]{1,2}")
_ORDERS = ("<", ">", "=", "|")
_BUILDING = frozenset({"INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4", "PERSID", "BINPERSID"})
"""Steps of a pickle that build objects of classes, or fetch them from elsewhere; arrays need none of them."""
_MOST_TUPLES = 20_000
"""Hashing tuples within one another needs a frame of the stack for each."""


def _look_over(content: bytes) -> None:
    """Goes through the steps of a pickle without doing any.

    Raises:
        NeuronError: a step that arrays do not need, or that claims memory which the file does not pay for.
    """
    tuples = 0
    for step, given, _ in genops(content):
        if step.name in _BUILDING:
            raise NeuronError(
                f"the file builds an object ({step.name}), which is not an array, a number or a container; nothing of it was run"
            )
        if step.name.endswith("PUT") and int(given or 0) > len(content):
            raise NeuronError("the file claims more memory than it is long; it is damaged")
        tuples += step.name.startswith("TUPLE")
    if tuples > _MOST_TUPLES:
        raise NeuronError(f"the file holds {tuples:,} tuples; expected arrays")


def read_pickle(path: str | pathlib.Path, admitted: Mapping[tuple[str, str], Callable[..., Any]] | None = None) -> Any:
    """A pickle of numbers, text, containers and numpy arrays; `admitted` adds (module, name) pairs and what they stand for.

    Raises:
        NeuronError: it asks for anything else, or is damaged. Nothing that the file names is imported or run.
    """
    try:
        content = pathlib.Path(path).read_bytes()
        _look_over(content)
        return _Primitives(io.BytesIO(content), {**_ARRAYS, **(admitted or {})}).load()
    except NeuronError as error:
        raise NeuronError(f"cannot read {str(path)!r}: {error}") from error
    except OSError as error:
        raise NeuronError(f"cannot read {str(path)!r} ({error.strerror or error})") from error
    except Exception as error:
        reason = " ".join(str(error).split())[:80]
        raise NeuronError(f"cannot read {str(path)!r} ({type(error).__name__}: {reason}); expected a pickle of arrays") from error
