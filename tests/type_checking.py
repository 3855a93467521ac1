"""The checker of annotations that the whole suite runs under: shapes and types of every function of the package.

A function inside another is made anew at every call of the outer one, and checking it means compiling its check every time: four fifths of
the suite's time went there. Those are checked where an array is annotated, which is what the annotations are for, and left alone elsewhere.
"""

from collections.abc import Callable
from typing import Any, get_args

from beartype import beartype
from jaxtyping import AbstractArray


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with its annotations checked at every call; an inner one only if it is about arrays."""
    if "<locals>" in function.__qualname__ and not any(map(_mentions_array, function.__annotations__.values())):
        return function
    return beartype(function)


def _mentions_array(annotation: Any) -> bool:
    if isinstance(annotation, type) and issubclass(annotation, AbstractArray):
        return True
    return any(_mentions_array(part) for part in get_args(annotation))
