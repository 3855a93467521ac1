"""Completions and their thinking parts: what a model answered, one JSON line each, readable also after a kill
in the middle of a line.
"""

import dataclasses
import json
import os
import pathlib
import re
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, cast, overload

from safety_neurons import strict_json
from safety_neurons.arguments import well_typed
from safety_neurons.counting import numbered
from safety_neurons.errors import InputError, RunError
from safety_neurons.prompt_lists import Message, Prompt, hanging_together, said_in
from safety_neurons.results import notebook
from safety_neurons.results.records import CompletionRecord, plain
from safety_neurons.results.run import PathLike, write_bytes

_REASONS = ("stop", "length", "failed")
SHOWN = 20
"""Completions that a notebook shows."""


@dataclass(frozen=True)
class Completion:
    """One answer of one model to one prompt."""

    prompt_id: str
    prompt: str
    """The request; of a conversation its last user turn (`turns` has all of it)."""
    completion: str
    """The text, special tokens left out."""
    token_ids: tuple[int, ...] = ()
    """The generated ids, as generated, up to the end token, which is left out (`finish_reason` says that
    there was one).
    """
    finish_reason: Literal["stop", "length", "failed"] = "stop"
    """`stop`: the model ended its answer; `length`: it was cut at the token limit.

    `failed`: it gave NaN, and there is none.
    """
    arm: str = "untreated"
    """Which treatment the model was under."""
    seed: int = 0
    verdicts: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """By judge, its verdict as JSON values."""
    meta: Mapping[str, Any] = field(default_factory=dict, hash=False)

    @property
    def turns(self) -> tuple[Message, ...]:
        """The conversation that was put to the model, up to the answer: what a judge that reads conversations
        is given.
        """
        said = self.meta.get("messages")
        if not isinstance(said, list) or not said:
            return (Message("user", self.prompt),)
        return tuple(Message(str(turn["role"]), str(turn["content"])) for turn in said)

    def answers(self, prompt: Prompt) -> bool:
        """Whether this is an answer to exactly this prompt, earlier turns included."""
        return self.prompt_id == prompt.id and self.prompt == prompt.text and self.turns == prompt.turns

    def to_json(self) -> CompletionRecord:
        """The record of one line; `meta` only where there is any."""
        record = {entry.name: plain(getattr(self, entry.name)) for entry in dataclasses.fields(self)}
        if not record["meta"]:
            del record["meta"]
        return cast(CompletionRecord, record)


REPEATED = 4
"""Words of the sequences that `repetition` looks for."""


def repetition(words: Sequence[str], size: int = REPEATED) -> float:
    """Share of the sequences of `size` neighbouring words that occurred before in the same text: 1 − distinct
    sequences ÷ sequences; 0 where there are none.

    Source: Welleck et al., ICLR 2020, section 6 (seq-rep-n). Differs: over words, so that tokenizers do not
    matter.
    """
    runs = [tuple(words[place : place + size]) for place in range(len(words) - size + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


def conversation_of(prompt: Prompt) -> dict[str, list[dict[str, str]]]:
    """What the `meta` of an answer says of a prompt of several turns: its conversation.

    Nothing for a plain request.
    """
    return (
        {"messages": [{"role": turn.role, "content": turn.content} for turn in prompt.messages]}
        if prompt.messages
        else {}
    )


def shared_by(completions: Iterable[Completion]) -> list[str | None]:
    """What answers share: the group of their prompt, and the prompt, which several arms and samples answer.

    None where the prompt is not known.
    """
    known = list(completions)

    def bonds(one: Completion) -> Iterator[Hashable]:
        if one.prompt:
            yield "says", said_in(one.turns)
            if (group := one.meta.get("group")) is not None:
                yield "group", str(group)

    places = hanging_together(map(bonds, known))
    return [str(place) if one.prompt else None for place, one in zip(places, known, strict=True)]


class Completions(Sequence[Completion]):
    """A sequence of completions. Slices are completions too."""

    def __init__(self, items: Iterable[Completion] = (), dropped: int = 0) -> None:
        """Takes the completions in order; `dropped` counts cut last lines of the file they come from."""
        self._items = tuple(items)
        self.dropped = dropped

    @overload
    def __getitem__(self, index: int) -> Completion: ...
    @overload
    def __getitem__(self, index: slice) -> "Completions": ...
    def __getitem__(self, index: int | slice) -> "Completion | Completions":
        return Completions(self._items[index]) if isinstance(index, slice) else self._items[index]

    def __len__(self) -> int:
        return len(self._items)

    def __iter__(self) -> Iterator[Completion]:
        return iter(self._items)

    def __eq__(self, other: object) -> bool:
        return self._items == other._items if isinstance(other, Completions) else NotImplemented

    __hash__ = None  # type: ignore[assignment]  # verdicts are mappings, so completions are compared but not hashed

    def __add__(self, other: "Completions") -> "Completions":
        return Completions((*self, *other), self.dropped + other.dropped)

    def __repr__(self) -> str:
        return f"Completions({len(self)} in {', '.join(self.arms) or 'no arm'})"

    def _repr_html_(self) -> str:
        def said(item: Completion) -> str:
            labels = {
                judge: verdict.get("label") if isinstance(verdict, Mapping) else verdict
                for judge, verdict in item.verdicts.items()
            }
            return "; ".join(f"{judge}: {label}" for judge, label in labels.items())

        rows = [[item.prompt_id, item.arm, item.prompt, item.completion, said(item)] for item in self[:SHOWN]]
        more = f", the first {SHOWN}" if len(self) > SHOWN else ""
        caption = f"{numbered(len(self), 'completion')} in {', '.join(self.arms) or 'no arm'}{more}"
        return notebook.html_table(caption, ["prompt id", "arm", "prompt", "completion", "verdicts"], rows)

    @property
    def arms(self) -> tuple[str, ...]:
        """The arms that occur, in order of appearance."""
        return tuple(dict.fromkeys(item.arm for item in self))

    def arm(self, name: str) -> "Completions":
        """The completions of one arm, none where there is no such arm (`arms` lists them)."""
        return Completions(item for item in self if item.arm == name)

    def by_id(self, prompt_id: str) -> "Completions":
        """The completions of one prompt, in every arm and seed; empty where there is none."""
        return Completions(item for item in self if item.prompt_id == prompt_id)

    def with_verdicts(self, judge: str, verdicts: Sequence[Any]) -> "Completions":
        """The same completions, each with a judge's verdict beside those it has.

        Raises:
            InputError: not one verdict per completion.
        """
        if len(verdicts) != len(self):
            raise InputError(
                f"{len(verdicts)} verdicts for {len(self)} completions; expected one each, in the same order"
            )
        pairs = zip(self, verdicts, strict=True)
        return Completions(
            (
                dataclasses.replace(item, verdicts={**item.verdicts, judge: plain(verdict)})
                for item, verdict in pairs
            ),
            self.dropped,
        )

    @well_typed
    def save(self, path: PathLike) -> None:
        """Writes the file in one step.

        Raises:
            RunError: the place cannot be written.
        """
        write_bytes(path, _lines(self))

    @well_typed
    def append(self, path: PathLike) -> None:
        """Adds these completions to a file, after cutting off a last line that a kill left unfinished.

        Raises:
            RunError: the place cannot be written.
        """
        target = pathlib.Path(path)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with target.open("a+b") as stream:
                stream.truncate(_end_of_last_line(stream))
                stream.seek(0, os.SEEK_END)
                stream.write(_lines(self))
                stream.flush()
                os.fsync(stream.fileno())
        except OSError as error:
            raise RunError(
                f"cannot write {str(target)!r} ({error.strerror or error}); choose a writable place with "
                "free space"
            ) from error

    @staticmethod
    @well_typed
    def load(path: PathLike) -> "Completions":
        """The completions in a JSON Lines file.

        A last line that was cut in the middle is left out and counted in `dropped`.

        Files made by hand need `prompt` and `completion` only.

        Raises:
            InputError: missing, not UTF-8, empty, or a line that is not such a record; the message names the
            line.
        """
        source = pathlib.Path(path)
        try:
            lines = source.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
        except OSError as error:
            raise InputError(
                f"cannot read {str(source)!r} ({error.strerror or error}); expected a completions file: "
                "check the path"
            ) from error
        if lines[0].startswith(b"version https://git-"):
            raise InputError(
                f"{str(source)!r} is a Git LFS pointer, expected the file itself: run 'git lfs pull'"
            )
        items, dropped = [], 0
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                items.append(_completion(line, number))
            except (ValueError, KeyError, TypeError) as error:
                if number == len(lines) and _is_cut(line, error):
                    dropped += 1
                    continue
                raise InputError(
                    f"line {number} of {str(source)!r} is not a completion ({type(error).__name__}: "
                    f"{str(error)[:80]}); expected a JSON object with 'prompt' and 'completion'"
                ) from error
        if not items and not dropped:
            raise InputError(
                f"{str(source)!r} is empty; expected one JSON object per line with 'prompt' and 'completion'"
            )
        return Completions(items, dropped)


def _lines(completions: Iterable[Completion]) -> bytes:
    return b"".join(_line(item.to_json()) for item in completions)


def _line(record: CompletionRecord) -> bytes:
    text = json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n"
    try:
        return text.encode()
    except (
        UnicodeEncodeError
    ):  # Half of a surrogate pair, as byte-level tokenizers can give: no text, so U+FFFD stands for it.
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode()


def _end_of_last_line(stream: Any) -> int:
    """Where the last finished line ends, in bytes.

    A last line without its line break that is a whole record is kept by finishing it.
    """
    end = stream.seek(0, os.SEEK_END)
    if end == 0:
        return 0
    stream.seek(0)
    content = stream.read()
    if content.endswith(b"\n"):
        return int(end)
    start = content.rfind(b"\n") + 1
    try:
        strict_json.loads(content[start:])
    except ValueError as error:
        if _is_cut(content[start:], error):
            return start  # what else there may be is not this function's to judge
    stream.write(b"\n")
    return int(end) + 1


def _is_cut(line: bytes, error: Exception) -> bool:
    """Whether a line that cannot be read is the beginning of a record; not what is something else, or two."""
    if isinstance(error, UnicodeDecodeError):
        return error.reason == "unexpected end of data"
    if not line.strip(b"\0"):
        return True  # a machine that lost its power may leave zeros in the place of what was written last
    return isinstance(error, json.JSONDecodeError) and error.msg != "Extra data" and line.lstrip()[:1] == b"{"


_FIELDS: dict[str, tuple[Any, str]] = {
    "prompt": (str, "text"),
    "completion": (str, "text"),
    "prompt_id": (str | int | None, "text or a whole number"),
    "token_ids": (list | None, "a list"),
    "arm": (str | None, "text"),
    "seed": (int | None, "a whole number"),
    "verdicts": (dict | None, "an object"),
    "meta": (dict | None, "an object"),
}
_TURN = {"role": str, "content": str}
_MOST_IDS = 2**31


def _completion(line: bytes, number: int) -> Completion:
    record = strict_json.loads(line.decode("utf-8"))
    if not isinstance(record, dict):
        raise TypeError(f"a {type(record).__name__}")
    for name, (kinds, what) in _FIELDS.items():
        if not isinstance(record[name] if name in ("prompt", "completion") else record.get(name), kinds):
            raise TypeError(f"{name!r} must be {what}, not a {type(record[name]).__name__}")
    if any(type(record.get(name)) is bool for name in ("prompt_id", "seed")):
        raise TypeError("'prompt_id' and 'seed' must not be true or false")
    if not all(type(token) is int and 0 <= token < _MOST_IDS for token in record.get("token_ids") or ()):
        raise TypeError("'token_ids' must be whole numbers from 0")
    meta = record.get("meta") or {}
    if not isinstance(meta.get("thinking"), bool | None):
        raise TypeError(f"'thinking' in 'meta' must be true or false, not {str(meta['thinking'])[:20]!r}")
    said = meta.get("messages", [])
    if not isinstance(said, list) or not all(
        isinstance(turn, dict) and _TURN.items() <= {key: type(value) for key, value in turn.items()}.items()
        for turn in said
    ):
        raise TypeError("'messages' in 'meta' must be turns, each with 'role' and 'content' as text")
    reason = record.get("finish_reason", "stop")
    if reason not in _REASONS:
        raise TypeError(f"finish_reason {str(reason)[:20]!r} is none of {', '.join(_REASONS)}")
    return Completion(
        prompt_id=str(number - 1 if record.get("prompt_id") is None else record["prompt_id"]),
        prompt=record["prompt"],
        completion=record["completion"],
        token_ids=tuple(record.get("token_ids") or ()),
        finish_reason=reason,
        arm="untreated" if record.get("arm") is None else record["arm"],
        seed=record.get("seed") or 0,
        verdicts=dict(record.get("verdicts") or {}),
        meta=dict(meta),
    )


_NAME = r"(?:[a-z]{2,12}:)?(?:think(?:ing)?|thoughts?|reason(?:ing)?|reflection|scratchpad|analysis)"
_STARTS = rf"<{_NAME}>|\[THINK\]|◁think▷|<\|begin_of_thought\|>|<\|START_THINKING\|>|<\|channel>thought\b"
_ENDS = rf"</{_NAME}>|\[/THINK\]|◁/think▷|<\|end_of_thought\|>|<\|END_THINKING\|>|<channel\|>"


def _unless_quoted(marks: str) -> re.Pattern[str]:
    """The marks, but where one stands between two quotation marks or backticks."""
    return re.compile(rf"(?!(?<=[`\"'“‘])(?:{marks})[`\"'”’])(?:{marks})", re.IGNORECASE)


_ENDED = re.compile(rf"{_ENDS}|<\|channel\|>final<\|message\|>", re.IGNORECASE)
_START, _END = _unless_quoted(_STARTS), _unless_quoted(_ENDS)
_CHANNEL = re.compile(r"<\|channel\|>\s*(\w+)[^<]{0,80}<\|message\|>")
_CHANNEL_ENDS = re.compile(r"<\|(?:end|return|start|call)\|>")
_ANALYSIS = re.compile(r"\s*(?:analysis|commentary)(?=[^\W_])")
_FINAL = re.compile(r"assistantfinal")
_OPENED = re.compile(rf"({_STARTS})\s*$", re.IGNORECASE)
_PAIRS = (
    ("<|begin", "<|end"),
    ("<|START", "<|END"),
    ("<|channel>thought", "<channel|>"),
    ("<", "</"),
    ("[", "[/"),
    ("◁", "◁/"),
)
"""How a start is made an end; the first that fits."""


def end_of_opened(text: str) -> str | None:
    """The mark that ends the thinking part which a prompt opens with its last words.

    None where it opens none.
    """
    opened = _OPENED.search(text)
    if opened is None:
        return None
    start, end = next(pair for pair in _PAIRS if opened[1].lower().startswith(pair[0].lower()))
    return end if end == "<channel|>" else end + opened[1][len(start) :]


def without_start(text: str) -> str:
    """A text without the mark of a thinking part that it begins with."""
    return re.sub(rf"^\s*(?:{_STARTS})", "", text, count=1, flags=re.IGNORECASE)


def is_mark(text: str) -> bool:
    """Whether a text is a mark that starts or ends a thinking part, and nothing else."""
    return re.fullmatch(f"{_STARTS}|{_ENDS}", text, re.IGNORECASE) is not None


def is_end_mark(text: str) -> bool:
    """Whether a text is a mark that ends a thinking part, and nothing else."""
    return _ENDED.fullmatch(text) is not None


def behind_thoughts(text: str) -> str:
    """What stands behind the last end of a thinking part, as chat templates cut it out: marks in quotes
    count; empty where none ends.
    """
    *_, end = (None, *_ENDED.finditer(text))
    return "" if end is None else text[end.end() :].strip()


def ends_thought(text: str) -> bool:
    """Whether a thinking part ends in a text."""
    return _ENDED.search(text) is not None


def after_thought(text: str, *, opened: bool = False, end: str | None = None) -> str | None:
    """What a model wrote beside its thoughts; `None` where a thought was cut off before the answer.

    Args:
        text: What the model wrote.
        opened: Whether the prompt opened a thinking part: without an end mark all of the text is a thought
            that was cut off.
        end: The text that ends a thought, in the place of the known marks; a text without it is a thought
            that was cut off.
    """
    if end:
        _, found, rest = text.rpartition(end)
        return rest if found else None
    if _CHANNEL.search(text):
        return _final_channel(text)
    if _ANALYSIS.match(text):
        final = _FINAL.search(text)
        return None if final is None else text[final.end() :]
    if opened and _END.search(text) is None:
        return None
    return _outside(text)


def _final_channel(text: str) -> str | None:
    finals = [mark for mark in _CHANNEL.finditer(text) if mark[1] == "final"]
    if not finals:
        return None
    rest = text[finals[-1].end() :]
    ends = _CHANNEL_ENDS.search(rest)
    return rest if ends is None else rest[: ends.start()]


def _outside(text: str) -> str | None:
    """The text outside of pairs of marks.

    An end without a start closes all that stands before it, as where the prompt has the start.
    """
    kept: list[str] = []
    rest = text
    while end := _END.search(rest):
        start = _START.search(rest, 0, end.start())
        kept = [*kept, rest[: start.start()]] if start else []
        rest = rest[end.end() :]
    return None if _START.search(rest) else "".join((*kept, rest))
