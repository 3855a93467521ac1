"""Declarations: every option of a verb or of a method, declared once, as a field of a frozen dataclass.

What is known of an option follows from its field: the type (with its choices or its range), the default, and
the string below it, which is its `--help`. Flags, keyword arguments of the Python call, the check before
anything is loaded, `run.json`, the resume key and the table of options in the docs are made from that.
"""

import ast
import dataclasses
import functools
import inspect
import math
import pathlib
import sys
import types
import typing
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, ClassVar, TypeVar

from safety_neurons.arguments import fits, in_words
from safety_neurons.errors import UsageError


@dataclasses.dataclass(frozen=True)
class Between:
    """The range of a number: both ends belong to it unless `above` leaves `low` out or `below` leaves `high`
    out.
    """

    low: float | int | None = None
    high: float | int | None = None
    above: bool = False
    below: bool = False

    def holds(self, value: float | int) -> bool:
        """Whether a number is in the range; NaN is in none."""
        over = self.low is None or value > self.low or (value == self.low and not self.above)
        under = self.high is None or value < self.high or (value == self.high and not self.below)
        return over and under and value == value

    def __str__(self) -> str:
        low = [] if self.low is None else [f"{'above' if self.above else 'at least'} {self.low:g}"]
        return " and ".join(
            low + ([] if self.high is None else [f"{'below' if self.below else 'at most'} {self.high:g}"])
        )


@dataclasses.dataclass(frozen=True, init=False)
class OneOf:
    """A few names, one of which the option is."""

    names: tuple[str, ...]

    def __init__(self, *names: str) -> None:
        object.__setattr__(self, "names", names)


@dataclasses.dataclass(frozen=True)
class Reads:
    """An option that names something a run reads; its content is then part of the run's identity.

    Attributes:
        kind: `model`, `neurons`, `scores`, `sets` (either), `prompts`, `files`, `suites`, `judges`,
            `organism` or `folder` (of suites).
        column: whether `--column` names the column of these prompts.
        answers: the option that names the column of their answers, such as `answer_column`; empty for none.
        words: values that name nothing to read, such as `none`.
        several: whether it is a comma-separated list of FILE, NAME=FILE and builtin:NAME.
    """

    kind: str
    column: bool = False
    answers: str = ""
    words: tuple[str, ...] = ()
    several: bool = False


@dataclasses.dataclass(frozen=True)
class Flag:
    """The flag of an option whose field has another name, such as one that is a word of Python."""

    text: str


class Emptiable:
    """Mark of a field whose empty text says something: that there is to be none."""


class Incidental:
    """Mark of a field that cannot change a result: two runs that differ only in it are the same run."""


@dataclasses.dataclass(frozen=True)
class Panel:
    """The heading of the help page under which a field stands, where it is not its class's."""

    heading: str


Declared = TypeVar("Declared", bound="Declaration")
Positive = Annotated[int, Between(1)]
Count = Annotated[int, Between(0)]
NotNegative = Annotated[float, Between(0)]
Share = Annotated[float | int, Between(0, 1, above=True)]
OpenShare = Annotated[float | int, Between(0, 1, above=True, below=True)]


@dataclasses.dataclass(frozen=True)
class Option:
    """What a field says of an option."""

    name: str
    flag: str
    """As it is typed on the command line."""
    type: Any
    """The type without `None` and without marks: `str`, `int`, `float`, `bool`, `pathlib.Path` or a `list` of
    one.
    """
    hint: Any
    """The type as it is annotated."""
    default: Any
    """`dataclasses.MISSING` where the option has to be given."""
    help: str
    panel: str | None
    choices: tuple[str, ...]
    between: Between | None
    reads: Reads | None
    positional: bool
    incidental: bool
    emptiable: bool

    def read(self, typed: Any) -> Any:
        """A value as it was typed, in the option's type.

        Raises:
            UsageError: an empty text, which is what a variable that was never set leaves. As a path it would
                be the current folder, as a list no name at all.
        """
        several = isinstance(typed, list)
        if not self.emptiable and "" in (typed if several else [typed]):
            shown = self.name.upper() if self.positional else self.flag
            raise UsageError(f"{shown} is empty; give it a value or leave it out")
        if typed is None or self.type not in (pathlib.Path, list[pathlib.Path]):
            return typed
        return [pathlib.Path(part) for part in typed] if several else pathlib.Path(typed)

    def check(self, value: Any) -> None:
        """Refuse a value that is none of the choices or outside of the range.

        None is taken where the field takes it.

        Raises:
            UsageError: what arrived, and what was expected.
        """
        if value is None:
            return
        if self.type in (int, float, bool) and not fits(value, self.hint):
            raise UsageError(f"{self.flag} {value!r}: expected {' or '.join(in_words(self.hint))}")
        if self.choices and value not in self.choices:
            raise UsageError(f"{self.flag} {value!r} is unknown; expected one of {', '.join(self.choices)}")
        if self.type is not str and isinstance(value, float) and math.isinf(value):
            raise UsageError(f"{self.flag} {value}: expected a finite number")
        if self.between is not None and not self.between.holds(value):
            raise UsageError(f"{self.flag} {value}: expected {self.between}")


class Positional:
    """Mark of a field that is an argument on the command line, not a flag."""


@dataclasses.dataclass(frozen=True)
class Declaration:
    """Options that belong together; a subclass is a frozen dataclass with a string below every field."""

    PANEL: ClassVar[str | None] = None
    """Heading of the help page under which the fields of this very class stand."""

    @classmethod
    def options(cls) -> tuple[Option, ...]:
        """Every option, those of the bases first."""
        return _options(cls)  # type: ignore[arg-type]

    @classmethod
    def of(cls: type[Declared], given: Declared | None = None, **changes: Any) -> Declared:
        """A declaration from keyword arguments, or a given one with some of its fields changed.

        Raises:
            UsageError: a name that is no option.
        """
        unknown = next((name for name in changes if name not in {one.name for one in cls.options()}), None)
        if unknown is not None:
            raise UsageError(
                f"unknown option {unknown!r}; expected some of {', '.join(one.name for one in cls.options())}"
            )
        return cls(**changes) if given is None else dataclasses.replace(given, **changes)

    def values(self) -> dict[str, Any]:
        """Every option with its value, by name."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    def check(self) -> None:
        """Refuse what is wrong whatever the models are.

        A subclass adds what several options together make wrong.

        Raises:
            UsageError: the first such option.
        """
        for one in self.options():
            one.check(getattr(self, one.name))

    def look(self) -> None:
        """Refuse files that are missing or damaged; asked once every option is known to be right.

        Raises:
            InputError: the first such file.
        """


@functools.cache
def _options(cls: type[Declaration]) -> tuple[Option, ...]:
    docs: dict[str, str] = {}
    panels: dict[str, str | None] = {}
    for owner in reversed(cls.__mro__):
        for name in getattr(owner, "__annotations__", {}):
            panels.setdefault(
                name, owner.__dict__.get("PANEL")
            )  # Where it was declared first: a subclass may change its default.
        docs |= (
            field_docs(owner.__module__).get(owner.__qualname__, {}) if issubclass(owner, Declaration) else {}
        )
    hints = typing.get_type_hints(cls, include_extras=True)
    return tuple(
        _option(field, hints[field.name], docs.get(field.name, ""), panels[field.name])
        for field in dataclasses.fields(cls)
    )


def _option(field: dataclasses.Field[Any], hint: Any, doc: str, panel: str | None) -> Option:
    marks: list[Any] = []
    bare = _bare(hint, marks)

    def mark(kind: type) -> Any:
        return next((one for one in marks if isinstance(one, kind) or one is kind), None)

    default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    return Option(
        field.name,
        getattr(mark(Flag), "text", f"--{field.name.replace('_', '-')}"),
        bare,
        hint,
        default,
        doc,
        getattr(mark(Panel), "heading", panel),
        getattr(mark(OneOf), "names", ()),
        mark(Between),
        mark(Reads),
        mark(Positional) is not None,
        mark(Incidental) is not None,
        mark(Emptiable) is not None,
    )


def _bare(hint: Any, marks: list[Any]) -> Any:
    """A type without `None` and `Annotated`; what was annotated is added to the marks."""
    while True:
        if typing.get_origin(hint) is Annotated:
            hint, *more = typing.get_args(hint)
            marks += more
        elif typing.get_origin(hint) in (typing.Union, types.UnionType):
            hint = next(one for one in typing.get_args(hint) if one is not type(None))
        else:
            return hint


@functools.cache
def field_docs(module: str) -> dict[str, dict[str, str]]:
    """By class and field, the string below each field of the classes of a module, on one line."""
    found: dict[str, dict[str, str]] = {}

    def read(body: list[ast.stmt], prefix: str) -> None:
        for node in body:
            if isinstance(node, ast.ClassDef):
                name = f"{prefix}{node.name}"
                found[name] = {}
                for field, below in zip(node.body, node.body[1:], strict=False):
                    if (
                        isinstance(field, ast.AnnAssign)
                        and isinstance(field.target, ast.Name)
                        and _is_text(below)
                    ):
                        found[name][field.target.id] = " ".join(str(below.value.value).split())  # type: ignore[attr-defined]
                read(node.body, f"{name}.")
            elif isinstance(node, ast.FunctionDef):
                read(node.body, f"{prefix}{node.name}.<locals>.")

    # The source is parsed once a module: reading each class by `inspect` takes longer than starting the
    # command line.
    read(ast.parse(inspect.getsource(sys.modules[module])).body, "")
    return found


def _is_text(node: ast.stmt) -> bool:
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )


def listed(value: str | Sequence[str] | None) -> tuple[str, ...] | None:
    """Names separated by commas, or a sequence of them, as a tuple; None stays None."""
    if value is None or not isinstance(value, str):
        if not fits(value, Iterable[str] | None):
            raise UsageError(f"{value!r} arrived; expected names, separated by commas or in a list")
        return None if value is None else tuple(value)
    return tuple(part.strip() for part in value.split(",") if part.strip())
