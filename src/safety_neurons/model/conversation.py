"""Turns as a chat template writes them: rendered within bounds, and checked to hold what was to be said.

Templates differ in what they take: contents as text or as lists of parts, a system turn or none, turns that have to alternate. What a
template would lose or refuse is put to it in the other ways, the least change first; what no way can say is an error.
"""

import functools
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from safety_neurons.errors import InputError
from safety_neurons.model.adapters import first_line
from safety_neurons.model.rendering import TooMuchError, render_template
from safety_neurons.prompts.conversations import merge_turns
from safety_neurons.prompts.records import Message
from safety_neurons.results.thoughts import behind_thoughts, ends_thought

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
    for shaped, said in _shapes(turns) if reshape else [(list(turns), ())]:
        for listed in (parts, not parts):
            try:
                text, notes = _checked(_Template(tokenizer, template, dict(arguments or {}), listed, **options), shaped)
            except TooMuchError as error:
                raise InputError(f"the chat template cannot be used: {error}; choose another --template") from error
            except Exception as error:  # a template is a program: it raises what it likes
                why = why or (str(error) if isinstance(error, _NotHeldError) else f"refuses them: {first_line(error)}")
                continue
            return Rendered(text, (*said, *notes))
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
    found = []
    for content in ("\ue000\ue001", [{"type": "text", "text": "\ue000\ue001"}]):
        try:
            text = render_template(source, [{"role": "user", "content": content}], {"add_generation_prompt": True})
        except Exception:  # a template is a program: it raises what it likes
            text = ""
        found.append("\ue000\ue001" in text and "'type'" not in text)
    return found == [False, True]


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
    found = list(zip(pieces[1::2], pieces[2::2], strict=True))
    expected = [(str(number), turn.content) for number, turn in enumerate(turns)]
    spoken = [int(number) for number, _ in found if not number.startswith("-") and turns[int(number)].role != "system"]
    ends = [f"-{number}" for number, _ in found[::2]] == [number for number, _ in found[1::2]]
    if ends and sorted(found[::2]) == sorted(expected) and spoken == sorted(spoken):
        if "".join([pieces[0], *pieces[2::2]]) == text:
            return text, []
        if "".join([pieces[0], *(part if number.startswith("-") else part.strip() for number, part in found)]) == text:
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
