"""What labels say of prompts and of answers, by their words and by the names of their columns."""

import functools
import re
from collections import Counter
from collections.abc import Iterable
from typing import Any

from safety_neurons.counting import numbered
from safety_neurons.prompt_lists.records import Prompt, label_word

UNSAFE_WORDS = frozenset({"1", "yes", "unsafe", "harmful", "toxic", "jailbreak", "attack", "malicious"})
SAFE_WORDS = frozenset({"0", "-1", "no", "safe", "harmless", "benign", "unharmful", "ok"})
TRUTH = {"1": True, "yes": True, "0": False, "no": False}
_GOOD_NAMES = SAFE_WORDS | {
    "acceptable",
    "allowed",
    "appropriate",
    "clean",
    "compliant",
    "ethical",
    "good",
    "innocent",
    "innocuous",
    "lawful",
    "legal",
    "legit",
    "legitimate",
    "permitted",
    "sfw",
}
"""Words in the name of a column whose truth says that a prompt is safe."""
_BAD_NAMES = UNSAFE_WORDS | {
    "toxicity",
    "abusive",
    "bad",
    "danger",
    "dangerous",
    "harm",
    "harmfulness",
    "hate",
    "hateful",
    "jailbreaking",
    "jailbroken",
    "nsfw",
    "offensive",
    "risk",
    "risky",
    "violates",
    "violating",
    "violation",
}
"""Words in the name of a column whose truth says that it is not."""
_USUAL_NAMES = frozenset({"label", "labels", "flag", "flagged"})
"""Words that alone say the same, since nobody means the other by them."""
_NEGATIONS = frozenset({"not", "non", "no", "un", "isnt", "free", "without"})
_ANSWERING = frozenset({"answer", "answered", "comply", "help", "respond"})
_REFUSING = frozenset({"refuse", "decline", "reject", "block"})
"""What should be done with a prompt that is safe, and with one that is not."""
_OF_ANSWERS = re.compile(r"response|answer|completion|output|generation|refus", re.IGNORECASE)
_OF_EITHER = frozenset({"is_safe", "issafe", "safe"})
"""Names that say something of the answer where a row has one."""
_KINDS = frozenset({"kind", "class", "category", "type"})
"""Names whose words may tell, and whose numbers do not."""


@functools.lru_cache(maxsize=1 << 12)
def asks_for(column: str) -> str:
    """What truth in a column of this name says a prompt is: `safe` (`is_safe`, `notHarmful`), `unsafe`;
    `both` for a name that asks for both, or for safety by degrees; empty for one that tells nothing.
    """
    safe = unsafe = negated = usual = should = False
    for part in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", column):
        word = part.casefold()
        word = word if word in _NEGATIONS else re.sub(r"^is(?=\w{4})", "", word)
        bare = re.sub("^(?:non|not|un|in|dis|il)", "", word)
        negated ^= word in _NEGATIONS
        usual |= word in _USUAL_NAMES
        should |= word == "should"
        if word in TRUTH:
            continue
        safe |= (
            word in _GOOD_NAMES or (bare != word and bare in _BAD_NAMES) or (should and word in _ANSWERING)
        )
        unsafe |= (
            word in _BAD_NAMES or (bare != word and bare in _GOOD_NAMES) or (should and word in _REFUSING)
        )
        if word == "safety":
            return "both"
    if safe == unsafe:
        return "both" if safe else ("safe" if negated else "unsafe") if usual else ""
    return "safe" if safe != negated else "unsafe"


def says_unsafe(value: Any, column: str) -> bool | None:
    """Whether a label calls what it is of unsafe; None for one that does not tell.

    Truth in a column of a name that tells nothing is unsafe.
    """
    word = label_word(value)
    if word in TRUTH:
        asks = asks_for(column)
        return None if asks == "both" else TRUTH[word] != (asks == "safe")
    return True if word in UNSAFE_WORDS else False if word in SAFE_WORDS else None


def labelled_otherwise(prompts: Iterable[Prompt], kind: str) -> list[str]:
    """A line for each column that calls some of the prompts, or all, the other of safe and unsafe.

    Args:
        prompts: which are taken as of one kind.
        kind: `safe` or `unsafe`; empty where they may be either, but not both.
    """
    said: dict[str, Counter[bool]] = {}
    for prompt in prompts:
        for column, value in (*prompt.meta.items(), ("category", prompt.category)):
            if _is_of_prompt(column, value, prompt) and (unsafe := says_unsafe(value, column)) is not None:
                said.setdefault(column, Counter())[unsafe] += 1
    lines = []
    for column, counts in said.items():
        others = counts[kind == "safe"] if kind else min(counts[True], counts[False])
        word = "safe" if kind == "unsafe" or (not kind and counts[False] <= counts[True]) else "unsafe"
        if others:
            shown = (
                f"{others} of {numbered(counts.total(), 'prompt')} {'is' if others == 1 else 'are'} {word}"
            )
            taken = f"taken as {kind}" if kind else "read"
            lines.append(f"{shown} by the column {column!r}; all are {taken}")
    return lines


def _is_of_prompt(column: str, value: Any, prompt: Prompt) -> bool:
    """Whether a field is a label of the request, and not of its answer."""
    name, truth = str(column).casefold(), label_word(value) in TRUTH
    if name in _KINDS:
        return not truth
    if _OF_ANSWERS.search(name) or (prompt.answer is not None and name in _OF_EITHER):
        return False
    told = not (truth and prompt.answer is not None and name in _USUAL_NAMES)
    return told and asks_for(str(column)) in ("safe", "unsafe")


def is_bad_answer(prompt: Prompt, answer_column: str | None = None) -> bool:
    """Whether a row says of its answer that it is not one to give, as public lists of both kinds do.

    Args:
        prompt: the row with its answer.
        answer_column: where the answer is from; labels of other answers of the row play no part.
    """
    return any(_calls_bad(str(name), value, answer_column) for name, value in prompt.meta.items())


def _calls_bad(name: str, value: Any, answer_column: str | None) -> bool:
    low = name.casefold()
    if low == "label":
        return value is False or str(value).strip().casefold() == "false"
    if low in _OF_EITHER:
        return label_word(value) == "0"
    if not _OF_ANSWERS.search(low) or "refus" in low or asks_for(name) not in ("safe", "unsafe"):
        return False
    numbers = [set(re.findall(r"\d+", one)) for one in (low, answer_column or "")]
    return numbers[0] == numbers[1] and says_unsafe(value, name) is True
