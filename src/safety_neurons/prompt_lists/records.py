"""Prompts as records, with one hash for the list and one for each prompt, and the public shapes of
conversations.

What a turn says is read here for files and for the guard's server alike: lists of turns, lists of texts,
turns written as text, transcripts of “Human: …” paragraphs.
"""

import ast
import hashlib
import json
import re
import unicodedata
import warnings
from collections import Counter
from collections.abc import Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, overload

from safety_neurons import strict_json
from safety_neurons.counting import numbered
from safety_neurons.errors import InputError


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation.

    Attributes:
        role: `system`, `user` or `assistant` (or `tool`).
        content: What was said.
    """

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Prompt:
    """One request to a model.

    Attributes:
        id: Unique within its list.
        text: The request as plain text, to the character as it was given; of a conversation the last user
            turn.
        messages: The turns up to the one the model is to answer; empty for a plain request.
        answer: The wanted answer, where the record has one (tuning data).
        category: Kind of request, where the record says.
        language: Language tag such as `de`, where the record says.
        meta: The record's remaining fields.
        group: What this prompt shares with others (deed, source, conversation); held-out means that no group
            is on both sides, and intervals resample groups. None where the record does not say: the prompt is
            a group of its own.
    """

    id: str
    text: str
    messages: tuple[Message, ...] = ()
    answer: str | None = None
    category: str | None = None
    language: str | None = None
    meta: Mapping[str, Any] = field(default_factory=dict, hash=False)
    group: str | None = None

    @property
    def turns(self) -> tuple[Message, ...]:
        """What is put to a model: the messages, or the text as the one user turn."""
        return self.messages or (Message("user", self.text),)

    def asking(self, text: str) -> "Prompt":
        """The prompt with another request: its text, and the last user turn of its messages.

        Where there is none, their last turn.
        """
        turns = list(self.messages)
        if turns:
            position = max(
                (position for position, turn in enumerate(turns) if turn.role == "user"),
                default=len(turns) - 1,
            )
            turns[position] = Message(turns[position].role, text)
        return replace(self, text=text, messages=tuple(turns))

    @property
    def sha256(self) -> str:
        """Hash of what is fed to a model: every character of the text, or of all turns with their roles."""
        whole = "\x1f".join(f"{turn.role}\x1e{turn.content}" for turn in self.turns)
        if any(
            mark in turn.content for turn in self.turns for mark in "\x1d\x1e\x1f"
        ):  # no text may pass for a border between turns
            whole += "\x1d" + ",".join(str(len(turn.content)) for turn in self.turns)
        return _hash(whole)

    @property
    def digest(self) -> str:
        """Sixteen hex digits that are equal for requests which differ in case or spaces only.

        Counts overlap.
        """
        return _hash(normalised(request_of(self.turns) or self.text).casefold())[:16]


def said_in(turns: Sequence[Message]) -> Hashable:
    """All that is put to a model, to be compared: a single user turn is its text."""
    return turns[0].content if len(turns) == 1 and turns[0].role == "user" else tuple(turns)


def hanging_together(bonds: Iterable[Iterable[Hashable]]) -> list[int]:
    """For every item the place of the first that it hangs together with, by a bond that both have or through
    others.
    """
    first: list[int] = []
    known: dict[Hashable, int] = {}

    def root(place: int) -> int:
        while first[place] != place:
            first[place] = place = first[first[place]]
        return place

    for place, own in enumerate(bonds):
        first.append(place)
        for bond in own:
            here, there = root(place), root(known.setdefault(bond, place))
            first[max(here, there)] = min(here, there)
    return [root(place) for place in range(len(first))]


def _bonds(prompt: Prompt) -> Iterator[Hashable]:
    """What a prompt may have in common with others that then tell less than as many prompts: its group, what
    it says, and of an attack or a translation the request that it is made of.
    """
    yield "says", said_in(prompt.turns)
    if prompt.group is not None:
        yield "group", prompt.group
    request, suite = prompt.meta.get("behavior_id"), prompt.meta.get("suite")
    if request is not None and suite is not None:  # Ids are told apart within a suite alone.
        yield "request", str(suite), str(prompt.meta.get("kind")), str(request)
    elif request is not None:
        yield "says", prompt.meta.get("goal") or prompt.text


def request_of(turns: Iterable[Message]) -> str:
    """What a conversation asks for: its last user turn; empty where there is none."""
    request = ""
    for turn in turns:
        request = turn.content if turn.role == "user" else request
    return request


class Prompts(Sequence[Prompt]):
    """A named, immutable list of prompts.

    Args:
        items: The prompts, in order.
        name: Where they came from, as people would say it.
        notes: One line for each thing that was repaired, dropped or looks wrong, with its count.
    """

    def __init__(self, items: Iterable[Prompt], name: str = "list", notes: Iterable[str] = ()) -> None:
        self._items = tuple(items)
        self.name = name
        self.notes = list(notes)

    @cached_property
    def groups(self) -> list[str | None]:
        """What every prompt shares with others, in order; None where it shares nothing.

        Intervals resample groups. Those with one `Prompt.group` are a group, and so are copies, attacks on
        one request and its translations; groups that have such a prompt in common are one, under the first
        name among them.
        """
        places = hanging_together(map(_bonds, self))
        many, names = Counter(places), dict[int, str]()
        for place, prompt in zip(places, self, strict=True):
            if prompt.group is not None:
                names.setdefault(place, prompt.group)
        return [
            names.get(place, f"copies of {self[place].sha256[:16]}") if many[place] > 1 else prompt.group
            for place, prompt in zip(places, self, strict=True)
        ]

    @classmethod
    def from_list(cls, texts: Iterable[str], name: str = "list") -> "Prompts":
        """Prompts of plain texts, with ids `0`, `1`, …; nothing is dropped."""
        return cls((Prompt(id=str(number), text=text) for number, text in enumerate(texts)), name)

    def __len__(self) -> int:
        return len(self._items)

    def __iter__(self) -> Iterator[Prompt]:
        return iter(self._items)

    @overload
    def __getitem__(self, index: int) -> Prompt: ...
    @overload
    def __getitem__(self, index: slice) -> "Prompts": ...
    def __getitem__(self, index: int | slice) -> "Prompt | Prompts":
        if isinstance(index, slice):
            return Prompts(self._items[index], self.name, self.notes)
        return self._items[index]

    def __eq__(self, other: object) -> bool:
        return self._items == other._items if isinstance(other, Prompts) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.sha256)

    def __add__(self, other: "Prompts") -> "Prompts":
        if not isinstance(other, Prompts):
            return NotImplemented
        both, notes = with_unique_ids((*self, *other)), [*self.notes, *other.notes]
        return Prompts(both, f"{self.name} + {other.name}", notes)

    def __repr__(self) -> str:
        return f"Prompts({self.name!r}, {numbered(len(self), 'prompt')})"

    @property
    def texts(self) -> list[str]:
        """The plain text of every prompt, in order."""
        return [prompt.text for prompt in self]

    @property
    def answers(self) -> list[str | None]:
        """The answer of every prompt, None where its record has none."""
        return [prompt.answer for prompt in self]

    @cached_property
    def sha256(self) -> str:
        """Hash of the list, every character and the order included.

        Written into every file that was found on it.
        """
        return _hash("\n".join(prompt.sha256 for prompt in self))

    @property
    def digests(self) -> list[str]:
        """One short hash a prompt, to be stored where overlap is to be counted later."""
        return [prompt.digest for prompt in self]

    def overlap(self, other: "Prompts | Collection[str]") -> int:
        """Number of prompts here that are in the other list too, whatever their case and spaces.

        Args:
            other: Prompts, or the stored `digests` of some.
        """
        known = set(other.digests if isinstance(other, Prompts) else other)
        return sum(prompt.digest in known for prompt in self)


def with_unique_ids(read: Sequence[Prompt]) -> list[Prompt]:
    """The prompts, of those with one id all but the first numbered with #2, #3 and so on."""
    given, seen = {prompt.id for prompt in read}, Counter[str]()
    result = []
    for prompt in read:
        seen[prompt.id] += 1
        if seen[prompt.id] > 1:
            while (numbered_id := f"{prompt.id}#{seen[prompt.id]}") in given:
                seen[prompt.id] += 1
            prompt = replace(prompt, id=numbered_id)
        result.append(prompt)
    return result


def normalised(text: str) -> str:
    """The text in Unicode form C with every run of white space as one space and none at its ends."""
    return " ".join(unicodedata.normalize("NFC", text).split())


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "bot": "assistant",
    "chatbot": "assistant",
    "model": "assistant",
    "ai": "assistant",
    "agent": "assistant",
    "function_call": "assistant",
    "tool_call": "assistant",
    "tool": "tool",
    "tool_response": "tool",
    "function": "tool",
    "function_response": "tool",
    "ipython": "tool",
    "observation": "tool",
    "environment": "tool",
}
"""What turns are called, and which of the four roles each is."""
_ROLE_KEYS = ("role", "from", "author", "speaker", "sender", "type")
_TEXT_KEYS = ("content", "value", "text", "message", "parts")
_CALLS = ("tool_calls", "function_call")
_TURN = re.compile(r"(?:^|\n\n)(Human|Assistant): ?")
_HUMAN_FIRST = re.compile(r"\s*Human:")
_WRITTEN = re.compile(r"\s*\[\s*\{")
_WRITTEN_TEXTS = re.compile(r"\s*\[\s*[\[{'\"]")
_BETWEEN_RECORDS = re.compile(r"\}\s*\n\s*\{")
_DEEPEST_CALL = 400
"""Lists and objects within one another in the arguments of a call."""
_LONGEST_LITERAL = 1 << 18
"""Characters of a Python literal that are parsed: its syntax tree takes a hundred times as much memory."""


class UnreadableTurnError(InputError):
    """A turn without a role or a text that anybody knows."""


def read_turn(turn: Mapping[str, Any], unread: list[str] | None = None, joint: str = "") -> Message:
    """One turn of any public shape.

    Text parts are joined, calls of tools and what the assistant refused count as said; a turn without any
    text is empty.

    Args:
        turn: `{role, content}`, `{from, value}` and their kin; the content is text, a part, a list of either,
            or null.
        unread: Receives what in it is no text (`a part of type 'image_url'`).
        joint: What stands between two parts: nothing, as chat templates write them, unless the reader joins
            them otherwise.

    Raises:
        UnreadableTurnError: A role that nobody knows, or no field for the text.
    """
    role = role_of(turn)
    if role is None:
        name = str(_role_name(turn))[:40]
        raise UnreadableTurnError(f"role {name!r}; expected system, user, assistant or tool")
    fields = [key for key in _TEXT_KEYS if key in turn]
    if not fields and not any(turn.get(key) for key in (*_CALLS, "refusal")):
        raise UnreadableTurnError(f"no text; it has {', '.join(map(str, list(turn)[:6]))}; expected content")
    left: list[str] = [] if unread is None else unread
    content = next((turn[key] for key in fields if turn[key] is not None), None)
    texts = list(texts_of(content, left))
    texts += [turn["refusal"]] if isinstance(turn.get("refusal"), str) else []
    texts += [as_text(turn[key]) for key in _CALLS if turn.get(key)]
    return Message(role, joint.join(texts))


def role_of(turn: Mapping[str, Any]) -> str | None:
    """Which of the roles a turn of any public shape has; None for one that nobody knows."""
    name = _role_name(turn)
    return ROLES.get(name.strip().casefold()) if isinstance(name, str) else None


def _role_name(turn: Mapping[str, Any]) -> Any:
    value = next((turn[key] for key in _ROLE_KEYS if turn.get(key) is not None), None)
    return value.get("role", value.get("name")) if isinstance(value, Mapping) else value


def texts_of(content: Any, unread: list[str]) -> Iterator[str]:
    """The texts of a turn's content, in order; what is no text goes into `unread`."""
    if content is None:
        return
    if isinstance(content, str):
        yield content
    elif isinstance(content, Mapping):
        yield from _texts_of_part(content, unread)
    elif isinstance(content, Sequence) and not isinstance(content, bytes | bytearray):
        for part in content:
            yield from texts_of(part, unread)
    else:
        unread.append(f"content of type {type(content).__name__}")


def _texts_of_part(part: Mapping[str, Any], unread: list[str]) -> Iterator[str]:
    kind = part.get("type", part.get("content_type"))
    if kind == "tool_use":
        yield as_text({key: part.get(key) for key in ("name", "input")})
        return
    for name in ("text", "refusal", "content", "parts"):
        if part.get(name) is not None and (
            name == "text" or kind in (None, "text", "refusal", "tool_result", "multimodal_text")
        ):
            yield from texts_of(part[name], unread)
            return
    if kind != "text":
        unread.append(f"a part of type {str(kind)[:40]!r}" if kind is not None else "a part without text")


def as_text(value: Any) -> str:
    """A value as a model would see it: text as it is, anything else as JSON."""
    return value if isinstance(value, str) else json.dumps(opened(value), ensure_ascii=False, default=str)


def label_word(value: Any) -> str:
    """What a label says, however an edition writes it: `True`, `1`, `1.0` and `true` are one word; of none
    and of what tables put in its place nothing is left.
    """
    word = "" if value is None else str(value).strip().casefold()
    word = word.removesuffix(".0") if re.fullmatch(r"-?\d+\.0", word) else word
    return "" if word in ("none", "null", "nan", "<na>") else {"true": "1", "false": "0"}.get(word, word)


def opened(value: Any, name: str = "") -> Any:
    """The value with the arguments of calls, JSON within a string, in the open: templates read them, and so
    escapes in them.
    """
    if isinstance(value, Mapping):
        return {key: opened(one, key) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [opened(one) for one in value]
    if name == "arguments" and isinstance(value, str):
        try:
            return strict_json.loads(value, depth=_DEEPEST_CALL, lenient=True, doubled=True)
        except ValueError:
            return value
    return value


def is_transcript(value: object) -> bool:
    """Whether a cell is a conversation as one string, in paragraphs that begin with “Human:” and
    “Assistant:”.
    """
    return isinstance(value, str) and _HUMAN_FIRST.match(value) is not None and "\n\nAssistant:" in value


def is_conversation(value: object) -> bool:
    """Whether a cell is a list of turns."""
    return (
        isinstance(value, Sequence)
        and not isinstance(value, str)
        and bool(value)
        and all(isinstance(turn, Mapping | Message) for turn in value)
    )


def written_list(value: object, *, texts: bool) -> list[Any] | None:
    """The turns of a list that was written as text, as JSON or as Python prints it.

    None for every other value.

    Args:
        value: A cell.
        texts: Whether a list of texts, or of pairs of them, counts too.
    """
    if (
        not isinstance(value, str)
        or (_WRITTEN_TEXTS if texts else _WRITTEN).match(value) is None
        or not value.rstrip().endswith("]")
    ):
        return None
    try:
        turns = strict_json.loads(value, lenient=True)
    except ValueError:
        turns = _literal(value)
    if not isinstance(turns, list) or not turns:
        return None
    if all(isinstance(turn, Mapping) and _role_name(turn) is not None for turn in turns):
        return turns if all(any(key in turn for key in (*_TEXT_KEYS, *_CALLS)) for turn in turns) else None
    return (
        turns if texts and (all(isinstance(one, str) for one in turns) or all(map(is_pair, turns))) else None
    )


def is_pair(value: object) -> bool:
    """Whether a value is two texts, such as a request and its answer."""
    return isinstance(value, list | tuple) and len(value) == 2 and all(isinstance(one, str) for one in value)


def _literal(text: str) -> Any:
    if len(text) > _LONGEST_LITERAL:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Python warns of escapes in the text that it does not know.
        for candidate in (
            text,
            _BETWEEN_RECORDS.sub("},\n{", text),
        ):  # numpy prints records without commas between them
            try:
                return ast.literal_eval(candidate.strip())
            except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
                continue
    return None


def read_transcript(text: str, repairs: Counter[str]) -> list[Message]:
    """Turns of a transcript string; irregular ones are repaired and counted in `repairs`."""
    parts = _TURN.split("\n\n" + text.lstrip() if not text.startswith("\n\n") else text)
    roles, contents = parts[1::2], parts[2::2]
    turns = [
        Message("user" if role == "Human" else "assistant", content)
        for role, content in zip(roles, contents, strict=True)
    ]
    return merge_turns(turns, repairs)


def merge_turns(turns: list[Message], repairs: Counter[str]) -> list[Message]:
    """Joins turns of one role that follow one another; a chat template would refuse them."""
    merged: list[Message] = []
    for turn in turns:
        if merged and merged[-1].role == turn.role and turn.role in ("system", "user", "assistant"):
            merged[-1] = Message(
                turn.role, "\n\n".join(part for part in (merged[-1].content, turn.content) if part)
            )
            repairs["joined"] += 1
        else:
            merged.append(turn)
    return merged


def read_turns(
    turns: Sequence[Mapping[str, Any] | Message], unread: list[str] | None = None
) -> list[Message]:
    """The turns of a list of records or of `Message`.

    Raises:
        UnreadableTurnError: A turn that cannot be read, with its number.
    """
    read = []
    for number, turn in enumerate(turns, 1):
        try:
            read.append(turn if isinstance(turn, Message) else read_turn(turn, unread))
        except UnreadableTurnError as error:
            raise UnreadableTurnError(f"turn {number} has {error}") from None
    return read
