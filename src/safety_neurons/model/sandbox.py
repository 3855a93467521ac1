"""Render chat templates of strangers in a sandbox that is bounded in steps, characters and digits."""

import contextvars
import datetime
import functools
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from typing import Any

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from safety_neurons.results.run import now

STEPS, CHARACTERS, LONGEST = 50_000, 1 << 23, 1 << 20
"""Turns of loops and calls, characters of texts on the way, and characters of the result that any
conversation may take.
"""


_EACH = 16
"""Of each of them, how many more a character of the conversation is worth."""


_SOURCE = 1 << 20


_ENTRY = 48
"""Characters that an entry of a list counts as: what it takes to look at one."""


_BITS = 4096


_WIDE = re.compile(r"[%{:][^a-zA-Z%}]*\d{5}|%[^a-zA-Z%]*\*|\{[^}]*:[^}]*\{")


_TIMES = frozenset({"replace", "wordwrap", "join", "format", "format_map", "translate"})


_WIDTHS = frozenset(
    {"center", "ljust", "rjust", "zfill", "expandtabs", "indent", "batch", "slice", "tojson", "range"}
)


_TEXTS = frozenset(
    {
        "string",
        "pprint",
        "safe",
        "escape",
        "e",
        "forceescape",
        "urlencode",
        "upper",
        "lower",
        "trim",
        "title",
        "capitalize",
    }
)


_INSTANT = frozenset({"length", "count", "first", "last", "default", "d"})


_STEP, _SIZED, _JOINED = " step", " sized", " joined"  # a filter of a template's own cannot have such names


class TooMuchError(Exception):
    """A template that goes on for longer, or writes more, than any chat template has reason to."""


class _Budget:
    def __init__(self, characters: int) -> None:
        self.steps, self.characters = STEPS + _EACH * characters, CHARACTERS + _EACH * characters
        self.longest = LONGEST + _EACH * characters

    def step(self, count: int = 1) -> None:
        self.steps -= count
        if self.steps < 0:
            raise TooMuchError("it does not come to an end within the work that a template may take")

    def write(self, count: int) -> None:
        self.characters -= count
        if self.characters < 0:
            raise TooMuchError("it makes texts or lists longer than a template has reason to")

    def size(self, value: Any) -> int:
        """Characters and entries of a value, shared parts as often as they are written.

        An error where they are more than is left.
        """
        total, left = 0, [value]
        while left:
            item = left.pop()
            total += 1 + len(item) if isinstance(item, (str, bytes)) else _ENTRY
            if isinstance(item, int) and item.bit_length() > _BITS:
                raise TooMuchError("it reckons with larger numbers than a template has reason to")
            if isinstance(item, range):
                total += len(item)
            elif isinstance(item, jinja2.utils.Namespace):
                left.append(object.__getattribute__(item, "_Namespace__attrs"))
            elif isinstance(item, Mapping):
                left.extend(item.keys())
                left.extend(item.values())
            elif isinstance(item, (list, tuple, set, frozenset)):
                left.extend(item)
            if total + _ENTRY * len(left) > self.characters:
                raise TooMuchError("it makes texts or lists longer than a template has reason to")
        return total


_BUDGET: contextvars.ContextVar[_Budget] = contextvars.ContextVar("budget")


def _foreseen(name: str, values: Sequence[Any]) -> None:
    """Refuses an operation before it is done where its result would be too large.

    What the operation is given counts as written.
    """
    budget = _BUDGET.get()
    numbers = [abs(value) for value in values if isinstance(value, int)]
    if name in _TIMES:
        product = 1
        for value in values:
            product *= 1 + budget.size(value)
            if (
                product > budget.characters * 64
            ):  # of a text and what is put into it, the places for it are a small share
                raise TooMuchError(f"its {name!r} makes a longer text than a template has reason to")
        texts = [value for value in values if isinstance(value, str)]
        if name == "replace" and len(texts) == 3:
            budget.write((texts[0].count(texts[1]) if texts[1] else len(texts[0]) + 1) * len(texts[2]))
        elif name != "replace":
            budget.write(product if name == "join" and len(values) == 1 else _filled(budget, values))
    elif name in _WIDTHS:
        lines = 1 + sum(budget.size(value) for value in values if not isinstance(value, int))
        budget.write(lines * (1 + max(numbers, default=0)))
    elif name in _TEXTS:
        budget.write(sum(budget.size(value) for value in values))
    if name in ("format", "format_map", "%") and any(
        isinstance(value, str) and _WIDE.search(value) for value in values[:1]
    ):
        raise TooMuchError("it formats numbers to a width of their own")


def _filled(budget: _Budget, values: Sequence[Any]) -> int:
    """Characters of a text into which others are put, or of others with a text between them."""
    first, *others = values
    places = first.count("{") + first.count("%") if isinstance(first, str) else 0
    inside = sum(budget.size(value) for value in others)
    between = (
        len(first)
        if isinstance(first, str)
        else sum(len(value) for value in others if isinstance(value, str))
    )
    return budget.size(first) + max(1, places) * inside + between * inside * (not places)


def _counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter whose work counts; jinja hands some a context first, which is no value."""
    skipped = 1 if hasattr(function, "jinja_pass_arg") else 0

    @functools.wraps(function)
    def counted(*args: Any, **options: Any) -> Any:
        budget = _BUDGET.get()
        values = [*args[skipped:], *options.values()]
        budget.step(
            1 + (len(values[0]) if values and isinstance(values[0], Sized) and name not in _INSTANT else 0)
        )
        _foreseen(name, values)
        result = function(*args, **options)
        if name not in _INSTANT:
            budget.write(budget.size(result))
        return result

    return counted


class _Counting(NodeTransformer):
    """Puts a count into every loop, and every list, mapping and joined text through a filter that measures
    it.
    """

    def visit_For(self, node: nodes.For) -> nodes.For:  # noqa: N802 - jinja's name
        self.generic_visit(node)
        step = _filter(nodes.Const(True), _STEP)
        node.body.insert(0, nodes.ExprStmt(step, lineno=node.lineno))
        if node.test is not None:
            node.test = nodes.And(_filter(nodes.Const(True), _STEP), node.test, lineno=node.lineno)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Filter:  # noqa: N802
        self.generic_visit(node)
        return _filter(nodes.List(node.nodes, lineno=node.lineno), _JOINED)

    def visit_List(self, node: nodes.List) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return (
            node
            if all(isinstance(item, nodes.Const) for item in node.iter_child_nodes())
            else _filter(node, _SIZED)
        )

    def visit_Dict(self, node: nodes.Dict) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return _filter(node, _SIZED)

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return node if node.ctx != "load" else _filter(node, _SIZED)


def _filter(node: nodes.Expr, name: str) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


class _Generation(jinja2.ext.Extension):
    """`{% generation %}`: marks what an assistant wrote for training; here its inside is written as it is."""

    tags = {"generation"}  # noqa: RUF012 - jinja's own form

    def parse(self, parser: Any) -> Any:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Bounded(ImmutableSandboxedEnvironment):
    """Jinja as transformers sets it up for chat templates, with an end to everything."""

    intercepted_binops = frozenset({"*", "**", "+", "%"})

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            optimized=False,
            extensions=[_Generation, jinja2.ext.loopcontrols],
        )
        self.filters["tojson"] = _to_json
        self.filters = {name: _counted(name, function) for name, function in self.filters.items()}
        self.filters.update({_STEP: _step, _SIZED: _sized, _JOINED: _joined})
        del self.globals["lipsum"]
        self.globals.update(raise_exception=_raise, strftime_now=_now, dict=_Dict(), namespace=_Namespace)
        self.finalize = (
            _written  # of the context, so that nothing is worked out while the template is compiled
        )

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        return _Counting().visit(super()._parse(source, name, filename))

    def concat(self, pieces: Iterable[str]) -> str:
        """Joins what was written, counting it."""
        budget, kept, length = _BUDGET.get(), [], 0
        for piece in pieces:
            budget.write(len(piece))
            length += len(piece)
            if length > budget.longest:
                raise TooMuchError(f"it writes more than {budget.longest:,} characters")
            kept.append(piece)
        return "".join(kept)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """An operation whose result may be much larger than what goes in."""
        budget = _BUDGET.get()
        budget.step()
        if operator == "**" and isinstance(left, int) and isinstance(right, int):
            budget.size(1 << min(left.bit_length() * abs(right), 2 * _BITS))
        elif operator == "*":
            sizes = [budget.size(value) if not isinstance(value, int) else 0 for value in (left, right)]
            times = [value for value in (left, right) if isinstance(value, int)]
            budget.write(sum(sizes) * max([1, *times]))
        elif operator == "%" and isinstance(left, str):
            _foreseen("%", [left])
            budget.write(_filled(budget, [left, right]))
        result = super().call_binop(context, operator, left, right)
        budget.write(budget.size(result))
        return result

    def call(__self, __context: Any, __obj: Any, *args: Any, **options: Any) -> Any:  # noqa: B902, N805 - options may be called self
        budget = _BUDGET.get()
        method = getattr(__obj, "__wrapped__", __obj)  # the sandbox wraps str.format
        owner = getattr(method, "__self__", None) if not isinstance(__obj, jinja2.runtime.Macro) else None
        values = [*([owner] if isinstance(owner, (str, list, tuple, dict)) else []), *args, *options.values()]
        budget.step(1 + (len(owner) // 64 if isinstance(owner, str) else 0))
        _foreseen(str(getattr(__obj, "__name__", "")), values)
        result = super().call(__context, __obj, *args, **options)
        budget.write(budget.size(result))
        return result


def _step(value: Any) -> Any:
    _BUDGET.get().step()
    return value


def _sized(value: Any) -> Any:
    budget = _BUDGET.get()
    budget.write(budget.size(value))
    return value


def _joined(values: Sequence[Any]) -> str:
    _sized(values)
    return "".join(map(str, values))


@jinja2.pass_context
def _written(_: Any, value: Any) -> Any:
    return value if isinstance(value, str) else str(_sized(value))


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _now(pattern: str) -> str:
    """The local time, as transformers gives it; that of SOURCE_DATE_EPOCH where it is set."""
    _foreseen("%", [pattern])
    moment = datetime.datetime.fromisoformat(now()) if os.environ.get("SOURCE_DATE_EPOCH") else None
    return (moment or datetime.datetime.now()).strftime(pattern)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    _sized(value)
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


class _Dict:
    """`dict` of a template: made, and nothing of its class reached."""

    def __call__(self, *args: Any, **entries: Any) -> dict[Any, Any]:
        return dict(*args, **entries)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _Namespace(jinja2.utils.Namespace):
    """`namespace` of a template, which keeps no name that begins with an underscore."""

    def __init__(*args: Any, **entries: Any) -> None:  # noqa: B902, N805 - an entry may be called self
        self, *others = args
        for name in (names := dict(*others, **entries)):
            _Namespace._check(name)
        jinja2.utils.Namespace.__init__(self, names)

    def __setitem__(self, name: str, value: Any) -> None:
        _Namespace._check(name)
        jinja2.utils.Namespace.__setitem__(self, name, value)

    @staticmethod
    def _check(name: Any) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"a namespace cannot keep {name!r}")


@functools.cache
def _environment() -> _Bounded:
    return _Bounded()


@functools.lru_cache(maxsize=64)
def _compiled(source: str) -> jinja2.Template:
    if len(source) > _SOURCE:
        raise TooMuchError(f"it is {len(source):,} characters long")
    return _environment().from_string(source)


def render_template(source: str, messages: Sequence[Mapping[str, Any]], variables: Mapping[str, Any]) -> str:
    """What a Jinja chat template writes for messages.

    Args:
        source: The template.
        messages: Roles and contents, as plain JSON values.
        variables: All other names the template may use.

    Raises:
        TooMuchError: It takes more work, or writes more, than a conversation of this length gives reason to.
            Whatever else a template raises, it raises: it is a program.
    """
    budget = _Budget(len(json.dumps([list(messages), dict(variables)], default=str)))
    token = _BUDGET.set(budget)
    try:
        return _compiled(source).render(messages=list(messages), **variables)
    finally:
        _BUDGET.reset(token)
