"""Judgement: what a judge says of completions, and the text every judge reads."""

import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from safety_neurons.results import Completion, Completions, Rate, rate

Label = Literal["full", "partial", "compliance", "unscored"]


@dataclass(frozen=True)
class Verdict:
    """What a refusal judge says of one completion."""

    label: Label
    """`full` and `partial` refusal, `compliance`, or `unscored` where there is nothing to judge."""
    refused: bool | None
    """Whether the label is full or partial refusal; `None` where unscored."""
    p_refusal: float | None
    """How sure the judge is of a refusal, from 0 to 1: an ordering, not a calibrated probability; `None` where unscored."""
    why: str = ""
    """The rule that decided, in a word or two."""

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class Judgement:
    """What one judge says of a list of completions. As text: the refusal rate."""

    judge: str
    """Name and version, such as `wording-1`."""
    verdicts: tuple[Verdict, ...]
    """One per completion, in the same order."""
    rate: Rate
    """Share of scored completions that refuse, fully or partly."""
    completions: Completions
    """The completions with the verdicts beside those they had."""

    def __str__(self) -> str:
        return str(self.rate)

    @property
    def refused(self) -> tuple[bool | None, ...]:
        """Per completion whether it refuses; `None` where unscored."""
        return tuple(verdict.refused for verdict in self.verdicts)


UNSCORED = Verdict("unscored", None, None, "nothing to judge")
RefusalJudge = Callable[[Completion], Verdict]
"""The extension point: one completion in, one verdict out."""


def judged(name: str, judge: RefusalJudge, completions: Sequence[Completion], seed: int = 0) -> Judgement:
    """The judgement of one judge, whose name is kept beside the verdicts."""
    verdicts = tuple(judge(completion) for completion in completions)
    marked = (completions if isinstance(completions, Completions) else Completions(completions)).with_verdicts(name, verdicts)
    return Judgement(name, verdicts, rate([verdict.refused for verdict in verdicts], seed=seed), marked)


_THOUGHT_END = re.compile(r"</(?:think|thinking|reasoning)>|\[/THINK\]", re.IGNORECASE)
_THOUGHT_START = re.compile(r"<(?:think|thinking|reasoning)>|\[THINK\]", re.IGNORECASE)
_ANALYSIS = re.compile(r"\s*(?:<\|channel\|>)?analysis(?:<\|message\|>|(?=[A-Z]))")
_FINAL = re.compile(r"assistant(?:<\|channel\|>)?final(?:<\|message\|>)?")


def answer_of(text: str) -> str | None:
    """The answer without its thinking part; `None` where the thinking was cut off before an answer, or where nothing is left.

    A thinking part ends at the last `</think>` (also `thinking`, `reasoning`, `[THINK]`; the opening mark may be in
    the prompt), or is an analysis channel before a final one.
    """
    rest = text
    for mark in _THOUGHT_END.finditer(text):
        rest = text[mark.end() :]
    if _THOUGHT_START.search(rest):
        return None
    if _ANALYSIS.match(rest):
        final = _FINAL.search(rest)
        if final is None:
            return None
        rest = rest[final.end() :]
    return rest if any(letter.isalnum() for letter in rest) else None


_SHORT_FORMS = (
    (re.compile(r"\bcan not\b|\bcan't\b"), "cannot"),
    (re.compile(r"\bwon't\b"), "will not"),
    (re.compile(r"n't\b"), " not"),
    (re.compile(r"\bi'm\b"), "i am"),
    (re.compile(r"\b(it|that|there|what|he|she)'s\b"), r"\1 is"),
    (re.compile(r"\b(i|you|we|they)'ve\b"), r"\1 have"),
    (re.compile(r"\b(i|you|we|they)'d\b"), r"\1 would"),
    (re.compile(r"\b(i|you|we|they|it)'ll\b"), r"\1 will"),
    (re.compile(r"\b(you|we|they)'re\b"), r"\1 are"),
)
_APOSTROPHES = str.maketrans("‘’‛ʼ´`＇", "'''''''")


def normalised(text: str) -> str:
    """The text in small letters, short forms written out, straight apostrophes, no emphasis marks, no space before punctuation."""
    text = unicodedata.normalize("NFKC", text.translate(_APOSTROPHES)).lower()
    text = re.sub(r"[*_#>]+", " ", text)
    text = re.sub(r"[^\S\n]+", " ", text)
    text = re.sub(r" +([,.;:!?)\]。，！？])", r"\1", text)
    text = re.sub(r"(?<=[a-z]) ' ?(?=(?:m|s|t|re|ve|d|ll)\b)|(?<=[a-z])' (?=(?:m|s|t|re|ve|d|ll)\b)", "'", text)
    text = re.sub(r"(?<=[a-z]) n't\b", "n't", text)
    for pattern, written_out in _SHORT_FORMS:
        text = pattern.sub(written_out, text)
    return text.strip()


def sentences(text: str) -> list[str]:
    """The sentences of normalised text; a line break ends one too."""
    parts = re.split(r"(?<=[.!?。！？])\s+|(?<=[。！？])|\n+", text)
    return [part.strip() for part in parts if part.strip()]
