"""Arguments of public calls, held to their annotations before anything runs."""

import collections.abc
import functools
import inspect
import os
import pathlib
import types
import typing
from collections.abc import Callable
from typing import Annotated, Any, Literal, TypeVar

from safety_neurons.errors import UsageError

Made = TypeVar("Made", bound=Callable[..., Any])
ADVICE = {
    "Completions": "give what `complete` returns, or sn.Completions.load(…)",
    "Found": "give what a finder returns",
    "Guard": "give what sn.fit_guard returns, or sn.Guard.load(…)",
    "LanguageModel": "load one with sn.load(…), or wrap yours: sn.LanguageModel(model, tokenizer)",
    "Named": "give a set its name with sn.analysis.name_sets(…)",
    "NeuronSet": "give `.neurons` of what a finder returns, or sn.NeuronSet.load(…)",
    "Prompts": "make them with sn.prompts(…)",
    "Scores": "give `.scores` of what a finder returns, or sn.Scores.load(…)",
    "SiteTable": "give `.table` of a model",
}
"""How to come by an object of a class, where another thing arrived."""
_UNFIT = object()
_OTHERS = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
_BY_NAME = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.VAR_KEYWORD)


def well_typed(made: Made) -> Made:
    """A function whose arguments are held to their annotations whenever it is called, or a class that is
    made so.

    Numbers of other libraries become Python's, and text becomes a path where only a path is expected. Prompts
    in any form are left to their reader, which knows more than their kind, and so is what is annotated with a
    name that only type checkers import. Elements of a sequence are looked at where they have to be of
    one class.

    The call raises `UsageError` where an argument is of another kind, or where there is none of its name.
    """
    if isinstance(made, type):
        made.__init__ = well_typed(made.__init__)  # type: ignore[misc]
        return made
    function: Any = made
    parameters = inspect.signature(function).parameters
    named = [name for name, one in parameters.items() if one.kind not in _OTHERS and name != "self"]
    places = [name for name, one in parameters.items() if one.kind not in _BY_NAME]
    takes_any = any(one.kind is inspect.Parameter.VAR_KEYWORD for one in parameters.values())

    @functools.cache
    def hints() -> dict[str, Any]:
        return {name: _resolved(one.annotation, function) for name, one in parameters.items()}

    @functools.wraps(function)
    def call(*args: Any, **options: Any) -> Any:
        if args and not places:
            return function(*args, **options)  # Python says that it takes none.
        unknown = next((name for name in options if name not in parameters), None)
        if unknown is not None and not takes_any:
            name = function.__qualname__.removesuffix(".__init__").rpartition(".")[2]
            raise UsageError(f"{name} has no option {unknown!r}; expected some of {', '.join(named)}")
        known = hints()
        return function(
            *(_held(places[min(place, len(places) - 1)], value, known) for place, value in enumerate(args)),
            **{name: _held(name, value, known) for name, value in options.items()},
        )

    return typing.cast(Made, call)


def _held(name: str, value: Any, hints: dict[str, Any]) -> Any:
    hint = hints.get(name, Any)
    taken = fitted(value, hint)
    if taken is not _UNFIT or _is_any_list(hint):
        return value if taken is _UNFIT else taken
    words, advice = in_words(hint), next((ADVICE[word] for word in _classes(hint) if word in ADVICE), "")
    raise UsageError(
        f"{name} is {_shown(value)}; expected {' or '.join(words)}" + (f": {advice}" if advice else "")
    )


def fits(value: Any, hint: Any) -> bool:
    """Whether a value is of the kind that an annotation names."""
    return fitted(value, hint) is not _UNFIT


def fitted(value: Any, hint: Any) -> Any:
    """The value as the annotation has it, a number or a path perhaps made into Python's; a mark of this
    module's own where it is of another kind.
    """
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return fitted(value, parts[0])
    if origin in (typing.Union, types.UnionType):
        taken = [one for one in (fitted(value, part) for part in parts) if one is not _UNFIT]
        return next((one for one in taken if one is value), taken[0] if taken else _UNFIT)
    if origin is Literal:
        return value if value in parts else _UNFIT
    if hint is None or hint is types.NoneType:
        return value if value is None else _UNFIT
    if hint in (bool, int, float):
        return _number(value, hint)
    if hint is pathlib.Path:
        return pathlib.Path(value) if isinstance(value, str | os.PathLike) else _UNFIT
    if hasattr(hint, "array_type"):  # of jaxtyping, whose axes are those of the call that is under way
        return value if hasattr(value, "__len__") and not isinstance(value, str) else _UNFIT
    kind = origin or hint
    if not isinstance(kind, type):
        return value
    if kind is collections.abc.Iterable:
        return value if hasattr(value, "__iter__") or hasattr(value, "__getitem__") else _UNFIT
    if kind is collections.abc.Sequence:
        return value if _is_sequence(value, parts) else _UNFIT
    if kind is collections.abc.Mapping:
        return value if hasattr(value, "keys") and hasattr(value, "__getitem__") else _UNFIT
    try:
        return value if isinstance(value, kind) else _UNFIT
    except TypeError:  # A protocol that is not for the running program.
        return value


def _number(value: Any, kind: type) -> Any:
    """A number of numpy or torch as Python's; yes and no are no numbers."""
    if getattr(value, "shape", None) == () and hasattr(value, "item"):
        value = value.item()
    if kind is bool:
        return value if isinstance(value, bool) else _UNFIT
    taken = int if kind is int else (int, float)
    return value if isinstance(value, taken) and not isinstance(value, bool) else _UNFIT


def _is_sequence(value: Any, parts: tuple[Any, ...]) -> bool:
    if not (hasattr(value, "__len__") and hasattr(value, "__getitem__")) or hasattr(value, "keys"):
        return False
    [element] = parts or (Any,)
    whole = typing.get_origin(element) or element
    if whole in (bool, int, float):
        return not isinstance(value, str)
    if not isinstance(whole, type) or whole in (str, types.UnionType):  # Of numbers there may be many.
        return True
    return all(fits(value[place], element) for place in range(len(value)))


def _is_any_list(hint: Any) -> bool:
    """Whether an annotation takes whatever holds things in order, as that of prompts does."""
    return any(typing.get_origin(part) is collections.abc.Iterable for part in typing.get_args(hint))


def _resolved(annotation: Any, function: Any) -> Any:
    if annotation is inspect.Parameter.empty:
        return Any
    if not isinstance(annotation, str):
        return annotation
    try:
        # The text is this package's own source. One by one: of a name that only type checkers import
        # `inspect.get_annotations(eval_str=True)` gives up all.
        return eval(annotation, inspect.unwrap(function).__globals__)
    except NameError:  # Only type checkers import it.
        return Any


def _classes(hint: Any) -> list[str]:
    parts = [] if typing.get_origin(hint) is Literal else typing.get_args(hint)
    return [hint.__name__] if isinstance(hint, type) and not parts else sum(map(_classes, parts), [])


def in_words(hint: Any) -> list[str]:
    """What an annotation takes, in words."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return in_words(parts[0])
    if origin in (typing.Union, types.UnionType):
        return list(dict.fromkeys(word for part in parts for word in in_words(part)))
    if origin is Literal:
        return [repr(part) for part in parts]
    if hint is None or hint is types.NoneType:
        return ["None"]
    if hasattr(hint, "array_type"):
        return ["an array"]
    words: dict[Any, str] = {bool: "True or False", int: "a whole number", float: "a number", str: "text"}
    words |= dict.fromkeys((pathlib.Path, os.PathLike), "a path")
    kind: Any = origin or hint
    if kind is collections.abc.Sequence:
        return [f"a list of {' or '.join(in_words(parts[0]))}" if parts else "a list"]
    if kind in (collections.abc.Mapping, collections.abc.Callable):
        return ["a mapping" if kind is collections.abc.Mapping else "a function"]
    return [words.get(kind) or str(getattr(kind, "__name__", kind))]


def _shown(value: Any) -> str:
    """What arrived, in a few words."""
    if value is None or isinstance(value, bool | int | float | str | os.PathLike):
        return repr(value) if len(repr(value)) <= 80 else f"{repr(value)[:80]}…"
    return f"a {type(value).__name__}"
