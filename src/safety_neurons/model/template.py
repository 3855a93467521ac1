"""Prompts to token ids: chat templates rendered in a bounded sandbox, turns checked to be in the text, exactly one BOS.

Chat templates are programs of strangers, so loops, texts and results have an end. Templates differ in what
they take: contents as text or as lists of parts, a system turn or none, turns that have to alternate. What a
template would lose or refuse is put to it in the other ways, the least change first; what no way can say is
an error.
"""

import contextlib
import contextvars
import datetime
import functools
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypedDict

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from safety_neurons.errors import InputError, ModelError, UsageError, first_line
from safety_neurons.prompt_lists.records import Message, Prompt, merge_turns
from safety_neurons.results.completions import behind_thoughts, end_of_opened, ends_thought, without_start

STEPS, CHARACTERS, LONGEST = 50_000, 1 << 23, 1 << 20
"""Turns of loops and calls, characters of texts on the way, and characters of the result that any conversation may take."""

_EACH = 16
"""Of each of them, how many more a character of the conversation is worth."""

_SOURCE = 1 << 20

_ENTRY = 48
"""Characters that an entry of a list counts as: what it takes to look at one."""

_BITS = 4096

_WIDE = re.compile(r"[%{:][^a-zA-Z%}]*\d{5}|%[^a-zA-Z%]*\*|\{[^}]*:[^}]*\{")

_TIMES = frozenset({"replace", "wordwrap", "join", "format", "format_map", "translate"})

_WIDTHS = frozenset({"center", "ljust", "rjust", "zfill", "expandtabs", "indent", "batch", "slice", "tojson", "range"})

_TEXTS = frozenset({"string", "pprint", "safe", "escape", "e", "forceescape", "urlencode", "upper", "lower", "trim", "title", "capitalize"})

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
        """Characters and entries of a value, shared parts as often as they are written; an error where they are more than is left."""
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
    """Refuses an operation before it is done where its result would be too large; what the operation is given counts as written."""
    budget = _BUDGET.get()
    numbers = [abs(value) for value in values if isinstance(value, int)]
    if name in _TIMES:
        product = 1
        for value in values:
            product *= 1 + budget.size(value)
            if product > budget.characters * 64:  # of a text and what is put into it, the places for it are a small share
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
    if name in ("format", "format_map", "%") and any(isinstance(value, str) and _WIDE.search(value) for value in values[:1]):
        raise TooMuchError("it formats numbers to a width of their own")


def _filled(budget: _Budget, values: Sequence[Any]) -> int:
    """Characters of a text into which others are put, or of others with a text between them."""
    first, *others = values
    places = first.count("{") + first.count("%") if isinstance(first, str) else 0
    inside = sum(budget.size(value) for value in others)
    between = len(first) if isinstance(first, str) else sum(len(value) for value in others if isinstance(value, str))
    return budget.size(first) + max(1, places) * inside + between * inside * (not places)


def _counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter whose work counts; jinja hands some a context first, which is no value."""
    skipped = 1 if hasattr(function, "jinja_pass_arg") else 0

    @functools.wraps(function)
    def counted(*args: Any, **options: Any) -> Any:
        budget = _BUDGET.get()
        values = [*args[skipped:], *options.values()]
        budget.step(1 + (len(values[0]) if values and isinstance(values[0], Sized) and name not in _INSTANT else 0))
        _foreseen(name, values)
        result = function(*args, **options)
        if name not in _INSTANT:
            budget.write(budget.size(result))
        return result

    return counted


class _Counting(NodeTransformer):
    """Puts a count into every loop, and every list, mapping and joined text through a filter that measures it."""

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
        return node if all(isinstance(item, nodes.Const) for item in node.iter_child_nodes()) else _filter(node, _SIZED)

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
        super().__init__(trim_blocks=True, lstrip_blocks=True, optimized=False, extensions=[_Generation, jinja2.ext.loopcontrols])
        self.filters["tojson"] = _to_json
        self.filters = {name: _counted(name, function) for name, function in self.filters.items()}
        self.filters.update({_STEP: _step, _SIZED: _sized, _JOINED: _joined})
        del self.globals["lipsum"]
        self.globals.update(raise_exception=_raise, strftime_now=_now, dict=_Dict(), namespace=_Namespace)
        self.finalize = _written  # of the context, so that nothing is worked out while the template is compiled

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
    _foreseen("%", [pattern])
    return datetime.datetime.now().strftime(pattern)  # the template asks for the local day, as transformers gives it


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False) -> str:
    _sized(value)
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


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
        TooMuchError: It takes more work, or writes more, than a conversation of this length gives reason to. Whatever else a template
            raises, it raises: it is a program.
    """
    budget = _Budget(len(json.dumps([list(messages), dict(variables)], default=str)))
    token = _BUDGET.set(budget)
    try:
        return _compiled(source).render(messages=list(messages), **variables)
    finally:
        _BUDGET.reset(token)


Turns = Sequence[Message]

JOINED = "turns of one role that follow one another were joined by a blank line, since the chat template refuses or loses them"

FOLDED = "the system text was put before the user's turn, a blank line between, since the chat template has no place for a system turn"

TRIMMED = "the chat template takes white space off the ends of turns"

ESCAPED = "the chat template writes a turn as a JSON string"

THOUGHTS = "the chat template leaves the thoughts of earlier answers out"


@dataclass(frozen=True)
class Rendered:
    """A conversation as text.

    Attributes:
        text: What is fed.
        notes: One line for each thing the template made different.
    """

    text: str
    notes: tuple[str, ...] = ()


class _NotHeldError(Exception):
    """A template left something out; the message says what."""


def render_turns(
    tokenizer: Any,
    turns: Turns,
    *,
    template: str | None = None,
    arguments: Mapping[str, Any] | None = None,
    go_on: bool = False,
    answer_next: bool = True,
    parts: bool = False,
    reshape: bool = True,
) -> Rendered:
    """A conversation through a chat template, with every turn's text in it, in order.

    Args:
        tokenizer: Whose template it is, and whose special tokens.
        turns: At least one.
        template: Another template than the tokenizer's own.
        arguments: Variables for the template.
        go_on: End behind the last turn's text, which is an answer to be gone on with.
        answer_next: End in what starts an answer.
        parts: Try contents as lists of parts first.
        reshape: Where the template refuses or loses turns as they are, join those of one role, and put system text before the user's.

    Raises:
        InputError: No way of saying the turns keeps all of them; the message says what the template refuses or leaves out of the first.
    """
    why = ""
    parts = parts or _walks_parts(tokenizer, template)
    options = {"add_generation_prompt": answer_next and not go_on, "go_on": go_on}
    for shaped, changes in _shapes(turns) if reshape else [(list(turns), ())]:
        for listed in (parts, not parts):
            try:
                text, notes = _checked(_Template(tokenizer, template, dict(arguments or {}), listed, **options), shaped)
            except TooMuchError as error:
                raise InputError(f"the chat template cannot be used: {error}; choose another --template") from error
            except Exception as error:  # a template is a program: it raises what it likes
                why = why or (str(error) if isinstance(error, _NotHeldError) else f"refuses them: {first_line(error)}")
                continue
            return Rendered(text, (*changes, *notes))
    roles = ", ".join(turn.role for turn in turns)
    advice = "leave --system out or choose another --template" if turns[0].role == "system" else "choose another --template"
    raise InputError(f"the chat template cannot say turns of {roles} ({why}); {advice}")


def conversation_text(tokenizer: Any, turns: Sequence[tuple[str, str]], *, parts: bool = False, **arguments: Any) -> str:
    """The text a guard model is fed for a finished conversation, up to where its verdict starts: its own template around both turns.

    Args:
        tokenizer: With a chat template.
        turns: Roles and contents.
        parts: Try contents as lists of parts first (multimodal guards).
        **arguments: Variables for the template.

    Raises:
        InputError: The template refuses the turns or leaves one out.
    """
    messages = [Message(role, text) for role, text in turns]
    return render_turns(tokenizer, messages, arguments=arguments, parts=parts, reshape=False).text


def joined(turns: Turns) -> list[Message]:
    """The turns with those of one role that follow one another joined by a blank line."""
    return merge_turns(list(turns), Counter())


def folded(turns: Turns) -> list[Message]:
    """The turns with each system turn put before the user's turn behind it, a blank line between; its own turn where none follows."""
    result: list[Message] = []
    waiting: list[str] = []
    for turn in turns:
        if turn.role == "system":
            waiting.append(turn.content)
            continue
        if waiting and turn.role != "user":
            result.append(Message("user", "\n\n".join(waiting)))
            waiting = []
        result.append(Message(turn.role, "\n\n".join([*waiting, turn.content])))
        waiting = []
    return [*result, *([Message("user", "\n\n".join(waiting))] if waiting else [])]


def _shapes(turns: Turns) -> Iterator[tuple[list[Message], tuple[str, ...]]]:
    """The turns in the ways they can be said, the least changed first, with what is to be noted of each."""
    yield list(turns), ()
    seen = [list(turns)]
    for shaped, notes in (
        (joined(turns), (JOINED,)),
        (folded(turns), (FOLDED,)),
        (joined(folded(turns)), (FOLDED, JOINED)),
    ):
        if shaped not in seen:
            seen.append(shaped)
            yield shaped, notes


@dataclass(frozen=True)
class _Template:
    """A template with everything but the turns.

    Attributes:
        tokenizer: Its tokenizer.
        source: Its text where it is not the tokenizer's own.
        arguments: Its variables.
        listed: Contents are lists of one text part.
        add_generation_prompt: End in what starts an answer.
        go_on: End behind the last turn's text.
    """

    tokenizer: Any
    source: str | None
    arguments: Mapping[str, Any]
    listed: bool
    add_generation_prompt: bool
    go_on: bool

    def __call__(self, contents: Sequence[str], turns: Turns) -> str:
        """The text for these contents in the roles of these turns."""
        messages: list[dict[str, Any]] = [
            {"role": turn.role, "content": [{"type": "text", "text": content}] if self.listed else content}
            for turn, content in zip(turns, contents, strict=True)
        ]
        if _own_rendering(self.tokenizer):
            options = {"chat_template": self.source, "add_generation_prompt": self.add_generation_prompt, "tokenize": False}
            return str(self.tokenizer.apply_chat_template(messages, **options, **self.arguments))
        source = self.tokenizer.get_chat_template(self.source)
        fixed: dict[str, Any] = {"tools": None, "documents": None, "add_generation_prompt": self.add_generation_prompt}
        return render_template(source, messages, {**fixed, **self.tokenizer.special_tokens_map, **self.arguments})


def _walks_parts(tokenizer: Any, template: str | None) -> bool:
    """Whether a template reads contents as lists of parts: a text is found only if it is put so. Texts would be walked letter by letter."""
    return not _own_rendering(tokenizer) and _reads_parts_only(tokenizer.get_chat_template(template))


@functools.lru_cache(maxsize=64)
def _reads_parts_only(source: str) -> bool:
    rendered = []
    for content in ("\ue000\ue001", [{"type": "text", "text": "\ue000\ue001"}]):
        try:
            text = render_template(source, [{"role": "user", "content": content}], {"add_generation_prompt": True})
        except Exception:  # a template is a program: it raises what it likes
            text = ""
        rendered.append("\ue000\ue001" in text and "'type'" not in text)
    return rendered == [False, True]


def _own_rendering(tokenizer: Any) -> bool:
    """Whether the tokenizer brings code of its own in the place of a Jinja template."""
    from transformers import PreTrainedTokenizerBase

    return getattr(type(tokenizer), "apply_chat_template", None) is not PreTrainedTokenizerBase.apply_chat_template


def _checked(template: _Template, turns: list[Message]) -> tuple[str, list[str]]:
    """The text for turns, proved to hold each of them, and what the template changed about them.

    Every content is rendered a second time between marks that no text has. Marks that come out around their contents, in order, prove that
    a content stands where it was put and is not found by accident; without the marks, that text must be the one that is fed.
    """
    contents = [turn.content for turn in turns]
    mark = _unused("".join(contents))
    text = template([*contents[:-1], f"{contents[-1]}{mark} "] if template.go_on else contents, turns)
    if template.go_on:
        text = _cut(text, mark, turns)
    if template.listed and "'type': 'text'" in text and not any("'type': 'text'" in content for content in contents):
        raise _NotHeldError("writes the parts of a content as they are")
    notes = _found(text, turns, [False] * len(turns), go_on=template.go_on)
    around = [(f"{mark}{number}{mark}", f"{mark}-{number}{mark}") for number in range(len(turns))]
    marked = template([f"{start}{content}{end}" for content, (start, end) in zip(contents, around, strict=True)], turns)
    if template.go_on and around[-1][1] in marked:
        marked = marked[: marked.index(around[-1][1]) + len(around[-1][1])]
    pieces = re.split(f"{mark}(-?[0-9]+){mark}", marked)  # what the template writes, then a mark's number, then the text behind it, …
    blocks = list(zip(pieces[1::2], pieces[2::2], strict=True))
    expected = [(str(number), turn.content) for number, turn in enumerate(turns)]
    spoken = [int(number) for number, _ in blocks if not number.startswith("-") and turns[int(number)].role != "system"]
    ends = [f"-{number}" for number, _ in blocks[::2]] == [number for number, _ in blocks[1::2]]
    if ends and sorted(blocks[::2]) == sorted(expected) and spoken == sorted(spoken):
        if "".join([pieces[0], *pieces[2::2]]) == text:
            return text, []
        if "".join([pieces[0], *(part if number.startswith("-") else part.strip() for number, part in blocks)]) == text:
            return text, notes
    absent = [start not in marked and end not in marked for start, end in around]
    return text, _found(text, turns, absent, go_on=template.go_on)


def _unused(texts: str) -> str:
    """A character of the last private plane that is in none of the texts."""
    return next(mark for number in range(0x10F000, 0x10FFFE) if (mark := chr(number)) not in texts)


def _cut(text: str, mark: str, turns: Turns) -> str:
    """The text up to the mark at the end of the last turn; where the template took the space behind it, it takes it before it too."""
    place = text.rfind(mark)
    if place < 0:
        raise _NotHeldError(f"turn {len(turns)}, {turns[-1].role}, is lost in what it writes, or its end is")
    return text[:place] if text[place + 1 : place + 2] == " " else text[:place].rstrip()


def _found(text: str, turns: list[Message], absent: Sequence[bool], *, go_on: bool) -> list[str]:
    """What a template changed about turns, where it does more than to write them down; an error for a turn that is not in the text."""
    notes: dict[str, None] = {}
    place = 0
    for number, turn in enumerate(turns):
        forms = {turn.content: ""}
        forms.setdefault(turn.content.strip(), TRIMMED)
        forms.setdefault(json.dumps(turn.content, ensure_ascii=False)[1:-1], ESCAPED)
        if turn.role == "assistant" and ends_thought(turn.content) and not (go_on and number == len(turns) - 1):
            forms.setdefault(behind_thoughts(turn.content), THOUGHTS)
        start = 0 if turn.role == "system" else place
        form = next((form for form in forms if form in text[start:]), None)
        if form is None or (absent[number] and forms[form] != THOUGHTS and form):
            elsewhere = (
                "is out of order in what it writes" if form is None and turn.content.strip() in text else "is lost in what it writes"
            )
            raise _NotHeldError(f"turn {number + 1}, {turn.role}, {elsewhere}")
        if forms[form]:
            notes[forms[form]] = None
        if turn.role != "system":
            place = text.index(form, place) + len(form)
    return list(notes)


@dataclass(frozen=True)
class Template:
    """How a prompt becomes text.

    Attributes:
        kind: `chat` (the tokenizer's template), `file` (a template of the caller's), `plain`, `tulu` or `none`.
        source: Text of the caller's Jinja template; empty otherwise.
        system: System prompt put before prompts that bring none.
        arguments: Variables given to a Jinja template, such as `enable_thinking`.
    """

    kind: str
    source: str = ""
    system: str | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def render(self, tokenizer: Any, prompt: Prompt, notes: list[str] | None = None) -> str:
        """The text that is fed for a prompt, up to where the answer starts; every turn of the prompt stands in it.

        Args:
            tokenizer: Whose chat template and special tokens are used.
            prompt: Its turns, or its text as one.
            notes: Gets a line for what a Jinja template made different (white space it trims, a system text put into the user's turn).

        Raises:
            InputError: A Jinja template that refuses the turns, leaves something of them out, does not end, or is damaged.
        """
        turns = self._turns(prompt)
        if self.kind == "none":
            return "\n".join(turn.content for turn in turns)
        if self.kind == "plain":
            return _plain(turns)
        if self.kind == "tulu":
            return _tulu(turns, tokenizer.eos_token or "")
        return self._jinja(tokenizer, turns, notes=notes)

    def _turns(self, prompt: Prompt) -> list[Message]:
        """What is to be said: the prompt's own turns, behind the system prompt where they bring none."""
        turns = list(prompt.messages) or [Message("user", prompt.text)]
        if self.system is not None and turns[0].role != "system":
            turns.insert(0, Message("system", self.system))
        return turns

    @staticmethod
    def opens_thinking(text: str) -> bool:
        """Whether a rendered text ends in an opened thinking part: the first words behind it are thoughts without a mark of their own."""
        return end_of_opened(text) is not None

    def answered(self, tokenizer: Any, prompt: Prompt, answer: str) -> tuple[str, str, str]:
        """The texts of a prompt, of its answer behind it, and of what ends the answer's turn (empty where the template writes nothing).

        The first is what `render` gives, so that an answer is learnt behind exactly what is fed when one is asked for; a thinking part
        that the prompt's text opens is closed before the answer.

        Raises:
            InputError: A Jinja template that refuses the turns.
        """
        question = self.render(tokenizer, prompt)
        turns = list(prompt.messages) or [Message("user", prompt.text)]
        if turns[-1].role == "assistant":
            return question, answer, ""
        whole = Prompt(prompt.id, prompt.text, (*turns, Message("assistant", answer)))
        try:
            opened = self.render(tokenizer, whole)
        except InputError:  # some templates take the thoughts out of an answer; it is learnt whole all the same
            opened = ""
        behind = opened[len(question) :] if opened.startswith(question) and opened.rstrip().endswith(answer.rstrip()) else None
        if behind is not None and not behind.endswith(answer):  # templates cut white space at the end of an answer, which is part of it
            behind = behind.rstrip() + answer[len(answer.rstrip()) :]
        if behind is None:
            mark = end_of_opened(question)
            behind = without_start(answer).lstrip("\n") if mark and behind_thoughts(answer) else answer
            behind = f"{mark}\n\n{answer}" if mark and not behind_thoughts(answer) else behind
        return question, behind, self._end(tokenizer, (*turns, Message("assistant", behind_thoughts(answer) or answer)))

    def _end(self, tokenizer: Any, turns: Turns) -> str:
        """What the template writes behind an answer, the last of the turns."""
        if self.kind == "tulu":
            return tokenizer.eos_token or ""
        if self.kind in ("plain", "none"):
            return ""
        whole = self._turns(Prompt("", "", tuple(turns)))
        opened, closed = self._jinja(tokenizer, whole), self._jinja(tokenizer, whole, closed=True)
        return closed[len(opened) :] if closed.startswith(opened) else ""

    def _jinja(self, tokenizer: Any, turns: Turns, *, closed: bool = False, notes: list[str] | None = None) -> str:
        answering = turns[-1].role == "assistant"
        rendered = render_turns(
            tokenizer,
            turns,
            template=self.source or None,
            arguments=self.arguments,
            go_on=answering and not closed,
            answer_next=not answering,
        )
        if notes is not None:
            notes.extend(note for note in rendered.notes if note not in notes)
        return rendered.text


class Prompting(TypedDict, total=False):
    """How prompts are put to a model: keyword arguments of `LanguageModel` and of `load`."""

    template: str | Path
    """`auto` (the chat template, else `Question: … / Answer:`), `none`, `tulu`, or the path of a Jinja file."""
    system: str | None
    """System prompt for prompts that bring none."""
    template_args: Mapping[str, Any] | None
    """Variables for a chat template or a Jinja file, such as `{"enable_thinking": False}`."""
    think_end: str | None
    """Text that ends the model's thinking, where it is none of the marks that are known; judges read what follows it."""


def template_for(
    tokenizer: Any,
    template: str | Path = "auto",
    *,
    system: str | None = None,
    template_args: Mapping[str, Any] | None = None,
) -> Template:
    """The template that `--template` means for a tokenizer, which is not changed; arguments as in `Prompting`.

    Raises:
        UsageError: A system prompt or template arguments where nothing would use them.
        InputError: A file that cannot be read.
    """
    name = str(template)
    if name == "auto":
        kind = "chat" if getattr(tokenizer, "chat_template", None) else "plain"
    elif name in ("none", "tulu"):
        kind = name
    else:
        kind = "file"
    if kind == "none" and system is not None:
        raise UsageError("a system prompt with template 'none', which feeds the text as it is: leave --system out or choose a template")
    if template_args and kind not in ("chat", "file"):
        raise UsageError(f"template arguments {sorted(template_args)} with template {kind!r}: only a chat template takes any")
    source = _read(Path(name)) if kind == "file" else ""
    return Template(kind, source, system, dict(template_args or {}))


def encode_text(tokenizer: Any, text: str, *, templated: bool) -> list[int]:
    """Token ids of a text: exactly one BOS where the tokenizer adds or the text brings one.

    Args:
        tokenizer: Not changed, its truncation and padding state included.
        text: What `Template.render` gave.
        templated: Leave out what the tokenizer would put behind the text (an EOS); False takes the tokenizer's ids as they are.
    """
    bos = tokenizer.bos_token_id
    with untouched(tokenizer):
        ids = list(tokenizer(text, add_special_tokens=not templated, verbose=False)["input_ids"])
        added = list(tokenizer("", verbose=False)["input_ids"]) if templated else []  # the text may be long: it is read once
    if bos is not None and added[:1] == [bos]:
        ids = [bos, *ids]
    if bos is not None and ids[:2] == [bos, bos]:
        return ids[1:]
    return ids


@contextlib.contextmanager
def untouched(tokenizer: Any) -> Iterator[None]:
    """Puts a fast tokenizer's truncation and padding back as they were, since every call of it sets them."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or not hasattr(backend, "truncation"):
        yield
        return
    truncation, padding = backend.truncation, backend.padding
    try:
        yield
    finally:
        if backend.truncation != truncation and truncation is not None:
            backend.enable_truncation(**truncation)
        if backend.padding != padding and padding is not None:
            backend.enable_padding(**padding)


def _plain(turns: Turns) -> str:
    parts = []
    for turn in turns:
        word = {"user": "Question: ", "assistant": "Answer: "}.get(turn.role, "")
        parts.append(f"{word}{turn.content}" + ("\n" if turn.role == "user" else "\n\n"))
    if turns[-1].role == "assistant":
        return "".join(parts).removesuffix("\n\n")
    return "".join(parts) + "Answer:"


def _tulu(turns: Turns, eos: str) -> str:
    parts = [f"<|{turn.role}|>\n{turn.content}" + (f"{eos}\n" if turn.role == "assistant" else "\n") for turn in turns]
    if turns[-1].role == "assistant":
        return "".join(parts).removesuffix(f"{eos}\n")
    return "".join(parts) + "<|assistant|>\n"


def _read(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        expected = "'auto', 'none', 'tulu' or the path of a Jinja file in UTF-8"
        raise InputError(f"template {str(path)!r}: cannot be read ({type(error).__name__}); expected {expected}") from error
    if not text.strip():
        raise InputError(f"template {str(path)!r}: the file is empty; expected a Jinja chat template")
    return text


def require_tokenizer(tokenizer: Any) -> Any:
    """The tokenizer, or an error that says it is missing."""
    if tokenizer is None:
        raise ModelError("this model came without a tokenizer, and text was given: pass one to LanguageModel(model, tokenizer)")
    return tokenizer
