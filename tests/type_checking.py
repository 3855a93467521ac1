"""The checker of annotations that the whole suite runs under: shapes and types of every function of the
package.

The wrapper of jaxtyping's import hook binds a call's arguments and checks them twice, which took up to half
of a test's time. Here beartype checks once, within jaxtyping's context where an array is annotated, so that
axes of one name have one size in a call. A function inside another is made anew at every call of the outer
one, and checking it means compiling its check every time: it is left alone unless it is about arrays.
"""

import contextlib
import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any, ForwardRef, get_args

import jaxtyping
from beartype import BeartypeConf, beartype

CALLS = 16
"""Calls of a function that are checked in a test: those of a loop are of the same kinds."""
_test = 0
_check = beartype(conf=BeartypeConf(violation_type=TypeError))
_context = functools.partial(jaxtyping.jaxtyped, "context")


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with its annotations checked at its first calls in every test; an inner one only if it is
    about arrays. The check is compiled at the first of all: a process calls a part of the package, and
    compiling the checks of all of it takes half a minute. What is no plain function is compiled at once,
    because others ask what it is.
    """
    of_arrays = any(map(_mentions_array, inspect.get_annotations(function).values()))
    if not of_arrays and "<locals>" in function.__qualname__:
        return function
    context = _context if of_arrays else contextlib.nullcontext
    if inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(function):
        return _compiled(function)
    check, test, left = None, -1, 0

    @functools.wraps(function)
    def checks(*args: Any, **options: Any) -> Any:
        nonlocal check, test, left
        if test != _test:
            test, left = _test, CALLS
        if not left:
            return function(*args, **options)
        left -= 1
        if check is None:
            check = _compiled(function)
        with context():
            return check(*args, **options)

    return checks


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Checks all but annotations in quotes: they name what only type checkers import, or a class that is
    still being made.
    """
    written = function.__annotations__
    function.__annotations__ = {
        name: Any if _quoted(annotation) else annotation for name, annotation in written.items()
    }
    check = _check(function)
    function.__annotations__ = check.__annotations__ = written
    return check


def _quoted(annotation: Any) -> bool:
    return isinstance(annotation, str | ForwardRef) or any(map(_quoted, get_args(annotation)))


def _checked(made: Any) -> Any:
    if not inspect.isclass(made):
        return checked(made)
    if dataclasses.is_dataclass(made) and "__init__" in vars(made):
        made.__init__ = checked(made.__init__)
    return made


def install() -> None:
    """Put this checker in the place of the hook's own, which is looked up at every definition of a function
    or class.
    """
    jaxtyping.jaxtyped = lambda **_: _checked


def begin_test() -> None:
    """Check every function's first calls again."""
    global _test
    _test += 1


def _mentions_array(annotation: Any) -> bool:
    if isinstance(annotation, type) and issubclass(annotation, jaxtyping.AbstractArray):
        return True
    return any(_mentions_array(part) for part in get_args(annotation))
