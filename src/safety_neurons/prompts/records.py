"""Prompts as records: what every verb reads, with one hash for the list and one for each prompt."""

import hashlib
import unicodedata
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, overload


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
        text: The request as plain text, to the character as it was given; of a conversation the last user turn.
        messages: The turns up to the one the model is to answer; empty for a plain request.
        answer: The wanted answer, where the record has one (tuning data).
        category: Kind of request, where the record says.
        language: Language tag such as `de`, where the record says.
        meta: The record's remaining fields.
        group: What this prompt shares with others (deed, source, conversation); held-out means that no group is on both sides, and
            intervals resample groups. None where the record does not say: the prompt is a group of its own.
    """

    id: str
    text: str
    messages: tuple[Message, ...] = ()
    answer: str | None = None
    category: str | None = None
    language: str | None = None
    meta: Mapping[str, Any] = field(default_factory=dict)
    group: str | None = None

    @property
    def turns(self) -> tuple[Message, ...]:
        """What is put to a model: the messages, or the text as the one user turn."""
        return self.messages or (Message("user", self.text),)

    def asking(self, text: str) -> "Prompt":
        """The prompt with another request: its text, and the last user turn of its messages; where there is none, their last turn."""
        turns = list(self.messages)
        if turns:
            place = max((place for place, turn in enumerate(turns) if turn.role == "user"), default=len(turns) - 1)
            turns[place] = Message(turns[place].role, text)
        return replace(self, text=text, messages=tuple(turns))

    @property
    def sha256(self) -> str:
        """Hash of what is fed to a model: every character of the text, or of all turns with their roles."""
        whole = "\x1f".join(f"{turn.role}\x1e{turn.content}" for turn in self.turns)
        if any(mark in turn.content for turn in self.turns for mark in "\x1d\x1e\x1f"):  # no text may pass for a border between turns
            whole += "\x1d" + ",".join(str(len(turn.content)) for turn in self.turns)
        return _hash(whole)

    @property
    def digest(self) -> str:
        """Sixteen hex digits that are equal for requests which differ in case or spaces only; counts overlap."""
        return _hash(normalised(request_of(self.turns) or self.text).casefold())[:16]


def request_of(turns: Iterable[Message]) -> str:
    """What a conversation asks for: its last user turn; empty where there is none."""
    asked = ""
    for turn in turns:
        asked = turn.content if turn.role == "user" else asked
    return asked


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

    @property
    def groups(self) -> list[str | None]:
        """What every prompt shares with others, in order; None where it shares nothing. Intervals resample groups."""
        return [prompt.group for prompt in self._items]

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
        return Prompts((*self, *other), f"{self.name} + {other.name}", [*self.notes, *other.notes])

    def __repr__(self) -> str:
        return f"Prompts({self.name!r}, {len(self)} prompts)"

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
        """Hash of the list, every character and the order included; written into every file that was found on it."""
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


def normalised(text: str) -> str:
    """The text in Unicode form C with every run of white space as one space and none at its ends."""
    return " ".join(unicodedata.normalize("NFC", text).split())


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
