"""Prompts to token ids: chat templates rendered in a bounded sandbox, turns checked to be in the text,
exactly one BOS.

Chat templates are programs of strangers, so loops, texts and results have an end. Templates differ in what
they take: contents as text or as lists of parts, a system turn or none, turns that have to alternate. What a
template would lose or refuse is put to it in the other ways, the least change first; what no way can say is
an error.
"""

import contextlib
import functools
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypedDict

from safety_neurons.arguments import well_typed
from safety_neurons.errors import InputError, ModelError, UsageError, first_line
from safety_neurons.model.sandbox import TooMuchError, render_template
from safety_neurons.prompt_lists.records import Message, Prompt, merge_turns
from safety_neurons.results.completions import behind_thoughts, end_of_opened, ends_thought, without_start

Turns = Sequence[Message]

JOINED = (
    "turns of one role that follow one another were joined by a blank line, since the chat template "
    "refuses or loses them"
)

FOLDED = (
    "the system text was put before the user's turn, a blank line between, since the chat template has no "
    "place for a system turn"
)

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
        reshape: Where the template refuses or loses turns as they are, join those of one role, and put system
            text before the user's.

    Raises:
        InputError: No way of saying the turns keeps all of them; the message says what the template refuses
        or leaves out of the first.
    """
    why = ""
    parts = parts or _walks_parts(tokenizer, template)
    options = {"add_generation_prompt": answer_next and not go_on, "go_on": go_on}
    for shaped, changes in _shapes(turns) if reshape else [(list(turns), ())]:
        for listed in (parts, not parts):
            try:
                text, notes = _checked(
                    _Template(tokenizer, template, dict(arguments or {}), listed, **options), shaped
                )
            except TooMuchError as error:
                raise InputError(
                    f"the chat template cannot be used: {error}; choose another --template"
                ) from error
            except Exception as error:  # a template is a program: it raises what it likes
                why = why or (
                    str(error) if isinstance(error, _NotHeldError) else f"refuses them: {first_line(error)}"
                )
                continue
            return Rendered(text, (*changes, *notes))
    roles = ", ".join(turn.role for turn in turns)
    advice = (
        "leave --system out or choose another --template"
        if turns[0].role == "system"
        else "choose another --template"
    )
    raise InputError(f"the chat template cannot say turns of {roles} ({why}); {advice}")


def conversation_text(
    tokenizer: Any, turns: Sequence[tuple[str, str]], *, parts: bool = False, **arguments: Any
) -> str:
    """The text a guard model is fed for a finished conversation, up to where its verdict starts: its own
    template around both turns.

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
    """The turns with each system turn put before the user's turn behind it, a blank line between.

    Its own turn where none follows.
    """
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
            options = {
                "chat_template": self.source,
                "add_generation_prompt": self.add_generation_prompt,
                "tokenize": False,
            }
            return str(self.tokenizer.apply_chat_template(messages, **options, **self.arguments))
        source = self.tokenizer.get_chat_template(self.source)
        fixed: dict[str, Any] = {
            "tools": None,
            "documents": None,
            "add_generation_prompt": self.add_generation_prompt,
        }
        return render_template(
            source, messages, {**fixed, **self.tokenizer.special_tokens_map, **self.arguments}
        )


def _walks_parts(tokenizer: Any, template: str | None) -> bool:
    """Whether a template reads contents as lists of parts: a text is found only if it is put so.

    Texts would be walked letter by letter.
    """
    return not _own_rendering(tokenizer) and _reads_parts_only(tokenizer.get_chat_template(template))


@functools.lru_cache(maxsize=64)
def _reads_parts_only(source: str) -> bool:
    rendered = []
    for content in ("\ue000\ue001", [{"type": "text", "text": "\ue000\ue001"}]):
        try:
            text = render_template(
                source, [{"role": "user", "content": content}], {"add_generation_prompt": True}
            )
        except Exception:  # a template is a program: it raises what it likes
            text = ""
        rendered.append("\ue000\ue001" in text and "'type'" not in text)
    return rendered == [False, True]


def _own_rendering(tokenizer: Any) -> bool:
    """Whether the tokenizer brings code of its own in the place of a Jinja template."""
    from transformers import PreTrainedTokenizerBase

    return (
        getattr(type(tokenizer), "apply_chat_template", None)
        is not PreTrainedTokenizerBase.apply_chat_template
    )


def _checked(template: _Template, turns: list[Message]) -> tuple[str, list[str]]:
    """The text for turns, proved to hold each of them, and what the template changed about them.

    Every content is rendered a second time between marks that no text has. Marks that come out around their
    contents, in order, prove that a content stands where it was put and is not found by accident; without the
    marks, that text must be the one that is fed.
    """
    contents = [turn.content for turn in turns]
    mark = _unused("".join(contents))
    text = template([*contents[:-1], f"{contents[-1]}{mark} "] if template.go_on else contents, turns)
    if template.go_on:
        text = _cut(text, mark, turns)
    if (
        template.listed
        and "'type': 'text'" in text
        and not any("'type': 'text'" in content for content in contents)
    ):
        raise _NotHeldError("writes the parts of a content as they are")
    notes = _found(text, turns, [False] * len(turns), go_on=template.go_on)
    around = [(f"{mark}{number}{mark}", f"{mark}-{number}{mark}") for number in range(len(turns))]
    marked = template(
        [f"{start}{content}{end}" for content, (start, end) in zip(contents, around, strict=True)], turns
    )
    if template.go_on and around[-1][1] in marked:
        marked = marked[: marked.index(around[-1][1]) + len(around[-1][1])]
    pieces = re.split(
        f"{mark}(-?[0-9]+){mark}", marked
    )  # what the template writes, then a mark's number, then the text behind it, …
    blocks = list(zip(pieces[1::2], pieces[2::2], strict=True))
    expected = [(str(number), turn.content) for number, turn in enumerate(turns)]
    spoken = [
        int(number)
        for number, _ in blocks
        if not number.startswith("-") and turns[int(number)].role != "system"
    ]
    ends = [f"-{number}" for number, _ in blocks[::2]] == [number for number, _ in blocks[1::2]]
    if ends and sorted(blocks[::2]) == sorted(expected) and spoken == sorted(spoken):
        if "".join([pieces[0], *pieces[2::2]]) == text:
            return text, []
        if (
            "".join(
                [pieces[0], *(part if number.startswith("-") else part.strip() for number, part in blocks)]
            )
            == text
        ):
            return text, notes
    absent = [start not in marked and end not in marked for start, end in around]
    return text, _found(text, turns, absent, go_on=template.go_on)


def _unused(texts: str) -> str:
    """A character of the last private plane that is in none of the texts."""
    return next(mark for number in range(0x10F000, 0x10FFFE) if (mark := chr(number)) not in texts)


def _cut(text: str, mark: str, turns: Turns) -> str:
    """The text up to the mark at the end of the last turn.

    Where the template took the space behind it, it takes it before it too.
    """
    place = text.rfind(mark)
    if place < 0:
        raise _NotHeldError(f"turn {len(turns)}, {turns[-1].role}, is lost in what it writes, or its end is")
    return text[:place] if text[place + 1 : place + 2] == " " else text[:place].rstrip()


def _found(text: str, turns: list[Message], absent: Sequence[bool], *, go_on: bool) -> list[str]:
    """What a template changed about turns, where it does more than to write them down.

    An error for a turn that is not in the text.
    """
    notes: dict[str, None] = {}
    place = 0
    for number, turn in enumerate(turns):
        forms = {turn.content: ""}
        forms.setdefault(turn.content.strip(), TRIMMED)
        forms.setdefault(json.dumps(turn.content, ensure_ascii=False)[1:-1], ESCAPED)
        if (
            turn.role == "assistant"
            and ends_thought(turn.content)
            and not (go_on and number == len(turns) - 1)
        ):
            forms.setdefault(behind_thoughts(turn.content), THOUGHTS)
        start = 0 if turn.role == "system" else place
        form = next((form for form in forms if form in text[start:]), None)
        if form is None or (absent[number] and forms[form] != THOUGHTS and form):
            elsewhere = (
                "is out of order in what it writes"
                if form is None and turn.content.strip() in text
                else "is lost in what it writes"
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
        kind: `chat` (the tokenizer's template), `file` (a template of the caller's), `plain`, `tulu` or
            `none`.
        source: Text of the caller's Jinja template; empty otherwise.
        system: System prompt put before prompts that bring none.
        arguments: Variables given to a Jinja template, such as `enable_thinking`.
    """

    kind: str
    source: str = ""
    system: str | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def render(self, tokenizer: Any, prompt: Prompt, notes: list[str] | None = None) -> str:
        """The text that is fed for a prompt, up to where the answer starts.

        Every turn of the prompt stands in it.

        Args:
            tokenizer: Whose chat template and special tokens are used.
            prompt: Its turns, or its text as one.
            notes: Gets a line for what a Jinja template made different (white space it trims, a system text
                put into the user's turn).

        Raises:
            InputError: A Jinja template that refuses the turns, leaves something of them out, does not end,
            or is damaged.
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
        """Whether a rendered text ends in an opened thinking part: the first words behind it are thoughts
        without a mark of their own.
        """
        return end_of_opened(text) is not None

    def answered(self, tokenizer: Any, prompt: Prompt, answer: str) -> tuple[str, str, str]:
        """The texts of a prompt, of its answer behind it, and of what ends the answer's turn (empty where the
        template writes nothing).

        The first is what `render` gives, so that an answer is learnt behind exactly what is fed when one is
        asked for; a thinking part that the prompt's text opens is closed before the answer.

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
        except (
            InputError
        ):  # some templates take the thoughts out of an answer; it is learnt whole all the same
            opened = ""
        behind = (
            opened[len(question) :]
            if opened.startswith(question) and opened.rstrip().endswith(answer.rstrip())
            else None
        )
        if behind is not None and not behind.endswith(
            answer
        ):  # templates cut white space at the end of an answer, which is part of it
            behind = behind.rstrip() + answer[len(answer.rstrip()) :]
        if behind is None:
            mark = end_of_opened(question)
            behind = without_start(answer).lstrip("\n") if mark and behind_thoughts(answer) else answer
            behind = f"{mark}\n\n{answer}" if mark and not behind_thoughts(answer) else behind
        return (
            question,
            behind,
            self._end(tokenizer, (*turns, Message("assistant", behind_thoughts(answer) or answer))),
        )

    def _end(self, tokenizer: Any, turns: Turns) -> str:
        """What the template writes behind an answer, the last of the turns."""
        if self.kind == "tulu":
            return tokenizer.eos_token or ""
        if self.kind in ("plain", "none"):
            return ""
        whole = self._turns(Prompt("", "", tuple(turns)))
        opened, closed = self._jinja(tokenizer, whole), self._jinja(tokenizer, whole, closed=True)
        return closed[len(opened) :] if closed.startswith(opened) else ""

    def _jinja(
        self, tokenizer: Any, turns: Turns, *, closed: bool = False, notes: list[str] | None = None
    ) -> str:
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
    """`auto` (the chat template, else `Question: … / Answer:`), `none`, `tulu`, or the path of a Jinja
    file.
    """
    system: str | None
    """System prompt for prompts that bring none."""
    template_args: Mapping[str, Any] | None
    """Variables for a chat template or a Jinja file, such as `{"enable_thinking": False}`."""
    think_end: str | None
    """Text that ends the model's thinking, where it is none of the marks that are known.

    Judges read what follows it.
    """


@well_typed
def template_for(
    tokenizer: Any,
    template: str | Path = "auto",
    *,
    system: str | None = None,
    template_args: Mapping[str, Any] | None = None,
) -> Template:
    """The template that `--template` means for a tokenizer, which is not changed.

    Arguments as in `Prompting`.

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
        raise UsageError(
            "a system prompt with template 'none', which feeds the text as it is: leave --system out or "
            "choose a template"
        )
    if template_args and kind not in ("chat", "file"):
        raise UsageError(
            f"template arguments {sorted(template_args)} with template {kind!r}: only a chat template "
            "takes any"
        )
    source = _read(Path(name)) if kind == "file" else ""
    return Template(kind, source, system, dict(template_args or {}))


def encode_text(tokenizer: Any, text: str, *, templated: bool) -> list[int]:
    """Token ids of a text: exactly one BOS where the tokenizer adds or the text brings one.

    Args:
        tokenizer: Not changed, its truncation and padding state included.
        text: What `Template.render` gave.
        templated: Leave out what the tokenizer would put behind the text (an EOS); False takes the
            tokenizer's ids as they are.
    """
    bos = tokenizer.bos_token_id
    with untouched(tokenizer):
        ids = list(tokenizer(text, add_special_tokens=not templated, verbose=False)["input_ids"])
        added = (
            list(tokenizer("", verbose=False)["input_ids"]) if templated else []
        )  # the text may be long: it is read once
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
    parts = [
        f"<|{turn.role}|>\n{turn.content}" + (f"{eos}\n" if turn.role == "assistant" else "\n")
        for turn in turns
    ]
    if turns[-1].role == "assistant":
        return "".join(parts).removesuffix(f"{eos}\n")
    return "".join(parts) + "<|assistant|>\n"


def _read(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        expected = "'auto', 'none', 'tulu' or the path of a Jinja file in UTF-8"
        raise InputError(
            f"template {str(path)!r}: cannot be read ({type(error).__name__}); expected {expected}"
        ) from error
    if not text.strip():
        raise InputError(f"template {str(path)!r}: the file is empty; expected a Jinja chat template")
    return text


def require_tokenizer(tokenizer: Any) -> Any:
    """The tokenizer, or an error that says it is missing."""
    if tokenizer is None:
        raise ModelError(
            "this model came without a tokenizer, and text was given: pass one to LanguageModel(model, "
            "tokenizer)"
        )
    return tokenizer
