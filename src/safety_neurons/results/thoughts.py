"""Thinking parts: where a model's thoughts end and its answer begins, by the marks of the model families, or by a text that is named.

Known are tags (`<think>`, `<thinking>`, `<thought>`, `<reasoning>`, `<seed:think>`, …), `[THINK]`, `◁think▷`, `<|begin_of_thought|>`,
`<|START_THINKING|>`, and channels (`<|channel|>analysis<|message|>…<|channel|>final<|message|>`), also where a tokenizer left their special
tokens out (`analysis…assistantfinal…`). A mark that stands in quotes or in code is spoken about and is none.
"""

import re

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
_PAIRS = (("<|begin", "<|end"), ("<|START", "<|END"), ("<|channel>thought", "<channel|>"), ("<", "</"), ("[", "[/"), ("◁", "◁/"))
"""How a start is made an end; the first that fits."""


def end_of_opened(text: str) -> str | None:
    """The mark that ends the thinking part which a prompt opens with its last words; None where it opens none."""
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


def behind_thoughts(text: str) -> str:
    """What stands behind the last end of a thinking part, as chat templates cut it out: marks in quotes count; empty where none ends."""
    *_, end = (None, *_ENDED.finditer(text))
    return "" if end is None else text[end.end() :].strip()


def ends_thought(text: str) -> bool:
    """Whether a thinking part ends in a text."""
    return _ENDED.search(text) is not None


def after_thought(text: str, *, opened: bool = False, end: str | None = None) -> str | None:
    """What a model wrote beside its thoughts; `None` where a thought was cut off before the answer.

    Args:
        text: What the model wrote.
        opened: Whether the prompt opened a thinking part: without an end mark all of the text is a thought that was cut off.
        end: The text that ends a thought, in the place of the known marks; a text without it is a thought that was cut off.
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
    """The text outside of pairs of marks; an end without a start closes all that stands before it, as where the prompt has the start."""
    kept: list[str] = []
    rest = text
    while end := _END.search(rest):
        start = _START.search(rest, 0, end.start())
        kept = [*kept, rest[: start.start()]] if start else []
        rest = rest[end.end() :]
    return None if _START.search(rest) else "".join((*kept, rest))
