"""Which language a sentence is in, by its script and its function words, and the rules of refusing in the languages beside English.

A short sentence says little about its language, so the answer as a whole is asked next, and the prompt after that; where none of them
says anything, every language of the script counts.
"""

import functools
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

ENGLISH = "en"
FEW = 6
"""Words of a sentence that are too few to tell its language."""
_SCRIPTS = (
    ("ja", re.compile(r"[\u3040-\u30ff]")),
    ("ko", re.compile(r"[\uac00-\ud7af]")),
    ("zh", re.compile(r"[\u4e00-\u9fff]")),
    ("ru", re.compile(r"[\u0400-\u04ff]")),
    ("ar", re.compile(r"[\u0600-\u06ff]")),
    ("hi", re.compile(r"[\u0900-\u097f]")),
)
_LATIN = re.compile(r"[a-z\u00df-\u024f\u1ea0-\u1ef9]")
_SIMPLIFIED = str.maketrans(
    "無協幫對會這個說請違為給寫讓絕關見範圍過問題教訴釋編參與辦沒當應該決譯導權準則規錯誤議尋變換話談別點樣與難從傷罰禮貌",
    "无协帮对会这个说请违为给写让绝关见范围过问题教诉释编参与办没当应该决译导权准则规错误议寻变换话谈别点样与难从伤罚礼貌",
)
_COMMA = r"[,.!:;、，。…-]*\s*"


@dataclass(frozen=True)
class Tongue:
    """How one language refuses.

    Attributes:
        refuses: First person, unable or unwilling, and a verb of answering.
        excuse: What only looks alike: praise, the limits of what is known.
        alone: A refusal that is a sentence of its own, words of being sorry among them.
        no: A no; whether it refuses depends on what was asked.
        wrong: A deed called wrong.
        advice: Turning elsewhere.
        how: What a question that is not answered by yes or no, or a request, begins with.
    """

    refuses: re.Pattern[str]
    excuse: re.Pattern[str]
    alone: re.Pattern[str]
    no: re.Pattern[str]
    wrong: re.Pattern[str]
    advice: re.Pattern[str]
    how: re.Pattern[str]


def tongue_of(lists: dict[str, Any], *, spaced: bool) -> Tongue:
    """A language's rules from its lists of patterns; `spaced` where words stand apart."""
    lead = rf"(?:(?:{'|'.join(lists['lead'])})(?:{_COMMA}|\s+))*"
    joined = {name: "|".join(lists[name]) for name in ("refuses", "excuse", "alone", "no", "wrong", "advice")}
    edge = r"\b" if spaced else ""
    return Tongue(
        re.compile(joined["refuses"]),
        re.compile(joined["excuse"]),
        re.compile(rf"{lead}(?:{joined['alone']})"),
        re.compile(rf"{lead}(?:{joined['no']})"),
        re.compile(joined["wrong"]),
        re.compile(joined["advice"]),
        re.compile(rf"{edge}(?:{lists['how']}){edge}"),
    )


class Languages:
    """Finds the languages that a sentence may be in.

    Args:
        words: Function words by language, of those whose script does not tell.
    """

    def __init__(self, words: dict[str, Sequence[str]]) -> None:
        self._of: dict[str, list[str]] = {}
        for language, own in words.items():
            for word in own:
                self._of.setdefault(word, []).append(language)
        self._all = tuple(words)

    def candidates(self, *texts: str) -> tuple[str, ...]:
        """The languages of the first of these texts that says something about them; all of Latin script where none does.

        Where the first has hardly a word, the next one's languages count as well: `no` is a word of many.
        """
        few = len(texts[0].split()) <= FEW
        known = [found for text in dict.fromkeys(texts) if (found := self._found(text))]
        if not known:
            return self._all
        return tuple(dict.fromkeys(language for found in known for language in found)) if few else known[0]

    @functools.lru_cache(maxsize=512)  # noqa: B019 - one object for each version of the rules
    def _found(self, text: str) -> tuple[str, ...]:
        letters = len(_LATIN.findall(text))
        for language, script in _SCRIPTS:
            count = len(script.findall(text))
            if count and count * 2 >= letters:
                # Kana or not decides between Japanese and Chinese: Han characters alone are Chinese.
                return (language,)
        counts = dict.fromkeys(self._all, 0)
        for word in re.findall(r"[^\W\d_]+", text):
            for language in self._of.get(word, ()):
                counts[language] += 1
        most = max(counts.values(), default=0)
        return tuple(language for language, count in counts.items() if count == most) if most else ()


def simplified(text: str) -> str:
    """Chinese text with the traditional characters that refusals are written with as simplified ones."""
    return text.translate(_SIMPLIFIED)


def plain_start(text: str) -> str:
    """A sentence without what stands before its first letter or number: marks, quotes, pictographs."""
    for place, letter in enumerate(text):
        if unicodedata.category(letter)[0] in "LN":
            return text[place:]
    return ""


def length(text: str) -> int:
    """Words of a text; where they do not stand apart, two characters are taken for one."""
    together = sum("\u3040" <= letter <= "\u9fff" for letter in text)
    return len(text.split()) + together // 2
