"""Judgements: what a judge sees of a completion and says of it, what all judges share, and the cache of their
verdicts.

Equal texts are judged once, verdicts are cached by content, and what could not be judged is counted.
"""

import abc
import contextlib
import dataclasses
import hashlib
import json
import pathlib
import re
import sqlite3
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, get_args

from safety_neurons import strict_json
from safety_neurons.arguments import well_typed
from safety_neurons.errors import InputError, RunError
from safety_neurons.results import Completion, Completions, Rate, notebook, rate
from safety_neurons.results.completions import after_thought, shared_by
from safety_neurons.results.run import PathLike

Label = Literal["full", "partial", "compliance", "harmful", "safe", "unscored"]
Measure = Literal["refused", "harmful"]


@dataclass(frozen=True)
class JudgeVerdict:
    """What a judge says of one completion."""

    label: Label
    """Of a judge of refusals: `full` and `partial` refusal or `compliance`.

    Of a judge of harm: `harmful` or `safe`; `unscored` where
    there is nothing to judge or the judge gave no answer."""
    refused: bool | None
    """Whether the label is full or partial refusal.

    `None` where unscored, and where a judge of harm does not say.
    """
    p_refusal: float | None
    """How sure the judge is of a refusal, from 0 to 1; `None` where it does not say."""
    why: str = ""
    """The rule that decided, in a word or two, or what had to be done to the text."""
    p_harmful: float | None = None
    """How sure the judge is of harm, from 0 to 1; `None` where it does not say."""
    categories: tuple[str, ...] = ()
    """Kinds of harm, by the judge's own names."""
    score: float | None = None
    """The number of a judge that gives one: the cost of a cost model."""
    raw: str = ""
    """What the judge answered, where it answers in text."""
    judge: str = ""
    """Name of the judge."""
    revision: str = ""
    """Which version of the judge's rules or weights."""
    error: str | None = None
    """Why there is no verdict: an answer that cannot be read, a judge that refused, a server that failed."""

    @property
    def harmful(self) -> bool | None:
        """Whether the judge calls the completion harmful; `None` where it does not say.

        A judge of both kinds labels a refusal as one: its probability of harm says the rest, so that a
        partial refusal can do harm.
        """
        if self.p_harmful is None or self.label == "unscored":
            return None
        return self.label == "harmful" if self.label in ("harmful", "safe") else self.p_harmful >= 0.5

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class Judgement:
    """What one judge says of a list of completions. As text: the rate of its measure."""

    judge: str
    """Name and version, such as `wording-3`."""
    verdicts: tuple[JudgeVerdict, ...]
    """One per completion, in the same order."""
    rate: Rate
    """Share of the scored completions that refuse, fully or partly; of a judge of harm, that are harmful."""
    completions: Completions
    """The completions with the verdicts beside those they had."""
    measure: Measure = "refused"
    """What `rate` is a rate of."""

    def __str__(self) -> str:
        return str(self.rate)

    def _repr_html_(self) -> str:
        unscored = ", ".join(f"{why}: {count}" for why, count in self.errors.items())
        columns = ["judge", "measure", "rate, 95 % interval", "n", "unscored", "why unscored"]
        shown = notebook.interval(self.rate.to_json())
        row = [self.judge, self.measure, shown, self.rate.n, self.rate.unscored, unscored]
        return notebook.html_table("Judgement", columns, [row])

    @property
    def refused(self) -> tuple[bool | None, ...]:
        """Per completion whether it refuses.

        `None` where unscored, and where a judge of harm does not say.
        """
        return tuple(verdict.refused for verdict in self.verdicts)

    @property
    def harmful(self) -> tuple[bool | None, ...]:
        """Per completion whether it does harm, given that the prompt asks for harm: by a judge of refusals,
        whether it does not refuse.
        """
        if self.measure == "harmful":
            return tuple(verdict.harmful for verdict in self.verdicts)
        return tuple(None if verdict.refused is None else not verdict.refused for verdict in self.verdicts)

    @property
    def errors(self) -> dict[str, int]:
        """Why completions are unscored, and how many."""
        return dict(
            Counter(verdict.error or verdict.why for verdict in self.verdicts if verdict.label == "unscored")
        )

    def harm(self) -> Rate:
        """Share of the scored completions of harmful requests that do harm.

        The harmful score is 100 times that.
        """
        return rate(self.harmful, shared_by(self.completions))

    def refusal(self) -> Rate:
        """Share of the scored completions that refuse; undefined where the judge does not say."""
        return rate(self.refused, shared_by(self.completions))

    def mean_score(self) -> Rate:
        """Mean of the judge's numbers (the cost of a cost model)."""
        return rate([verdict.score for verdict in self.verdicts], shared_by(self.completions))


UNSCORED = JudgeVerdict("unscored", None, None, "nothing to judge")
RefusalJudge = Callable[[Completion], JudgeVerdict]
"""The simplest extension point: one completion in, one verdict out."""


@well_typed
def unscored(error: str, *, raw: str = "") -> JudgeVerdict:
    """The verdict on a completion that the judge could not score: counted, and neither safe nor harmful."""
    return JudgeVerdict("unscored", None, None, "", raw=raw, error=error)


@well_typed
def harm_verdict(p_harmful: float, *, p_refusal: float | None = None, **others: Any) -> JudgeVerdict:
    """A verdict of a judge of harm from its probabilities; harmful from one half on."""
    refused = None if p_refusal is None else p_refusal >= 0.5
    return JudgeVerdict(
        "harmful" if p_harmful >= 0.5 else "safe", refused, p_refusal, p_harmful=p_harmful, **others
    )


@well_typed
def refusal_verdict(p_refusal: float, **others: Any) -> JudgeVerdict:
    """A verdict of a judge of refusals from its probability.

    Full refusal from one half on, for it knows no partial one.
    """
    return JudgeVerdict("full" if p_refusal >= 0.5 else "compliance", p_refusal >= 0.5, p_refusal, **others)


def judgement_of(
    name: str,
    verdicts: Sequence[JudgeVerdict],
    completions: Sequence[Completion],
    measure: Measure = "refused",
) -> Judgement:
    """The judgement that these verdicts of one judge make."""
    marked = (
        completions if isinstance(completions, Completions) else Completions(completions)
    ).with_verdicts(name, verdicts)
    outcomes = [verdict.refused if measure == "refused" else verdict.harmful for verdict in verdicts]
    return Judgement(name, tuple(verdicts), rate(outcomes, shared_by(marked)), marked, measure)


@well_typed
def judged(name: str, judge: RefusalJudge, completions: Sequence[Completion]) -> Judgement:
    """The judgement of a function on completions, whose name is kept beside the verdicts."""
    return judgement_of(name, [judge(completion) for completion in completions], completions, "refused")


@well_typed
def answer_of(text: str, *, thinking: bool = False, think_end: str | None = None) -> str | None:
    """The answer without its thinking part.

    `None` where the thinking was cut off before an answer, or where nothing is left.

    Args:
        text: What the model wrote.
        thinking: Whether the prompt opened a thinking part: without an end mark all of the text is a thought
            that was cut off.
        think_end: The text that ends a thought, in the place of the marks that are known (see
            `safety_neurons.results.completions`).
    """
    rest = after_thought(text, opened=thinking, end=think_end)
    return rest if rest is not None and any(letter.isalnum() for letter in rest) else None


def answer_in(completion: Completion) -> str | None:
    """The answer of a completion.

    That its prompt opened a thinking part, and which text ends it, stand in its `meta`.
    """
    end = completion.meta.get("think_end")
    return answer_of(
        completion.completion,
        thinking=bool(completion.meta.get("thinking")),
        think_end=str(end) if end else None,
    )


def conversation_in(completion: Completion) -> tuple[tuple[str, str], ...]:
    """Role and content of the turns that a completion answers, where its `meta` has several under
    `messages`.
    """
    turns = completion.meta.get("messages")
    if not isinstance(turns, Sequence) or isinstance(turns, str):
        return ()
    known = [turn for turn in turns if isinstance(turn, Mapping) and isinstance(turn.get("content"), str)]
    return tuple((str(turn.get("role", "user")), str(turn["content"])) for turn in known)


def request_in(completion: Completion) -> str:
    """The request that a completion answers: of a conversation the last user turn, otherwise the prompt."""
    requests = [text for role, text in conversation_in(completion) if role == "user"]
    return requests[-1] if requests else completion.prompt


def ending(completions: Sequence[Completion], think_end: str | None) -> Completions:
    """The completions, with the text that ends their thoughts noted in each where one is given."""
    known = completions if isinstance(completions, Completions) else Completions(completions)
    if think_end is None:
        return known
    return Completions(
        (replace(one, meta={**one.meta, "think_end": think_end}) for one in known), known.dropped
    )


_SHORT_FORMS = (
    (re.compile(r"\bcan not\b|\bcan't\b"), "cannot"),
    (re.compile(r"\bwon't\b"), "will not"),
    (re.compile(r"n't\b"), " not"),
    (re.compile(r"\bi'm\b"), "i am"),
    (re.compile(r"\b(it|that|there|here|what|he|she)'s\b"), r"\1 is"),
    (re.compile(r"\b(i|you|we|they)'ve\b"), r"\1 have"),
    (re.compile(r"\b(i|you|we|they)'d\b"), r"\1 would"),
    (re.compile(r"\b(i|you|we|they|it)'ll\b"), r"\1 will"),
    (re.compile(r"\b(you|we|they)'re\b"), r"\1 are"),
)
_APOSTROPHES = str.maketrans("‘’‛ʼ´`＇", "'''''''")


def normalised(text: str) -> str:
    """The text in small letters, short forms written out, straight apostrophes, no emphasis marks, no space
    before punctuation.
    """
    text = unicodedata.normalize("NFKC", text.translate(_APOSTROPHES)).lower()
    text = re.sub(r"[*_#>~`]+", " ", text)
    text = re.sub(r"[^\S\n]+", " ", text)
    text = re.sub(r" +([,.;:!?)\]。，！？])", r"\1", text)
    text = re.sub(
        r"(?<=[a-z]) ' ?(?=(?:m|s|t|re|ve|d|ll)\b)|(?<=[a-z])' (?=(?:m|s|t|re|ve|d|ll)\b)", "'", text
    )
    text = re.sub(r"(?<=[a-z]) n't\b", "n't", text)
    for pattern, written_out in _SHORT_FORMS:
        text = pattern.sub(written_out, text)
    return text.strip()


def sentences(text: str) -> list[str]:
    """The sentences of normalised text; a line break ends one too."""
    parts = re.split(
        r"(?<=[.!?。！？؟।])\s+|(?<=[。！？।])|(?<=[!?])(?=[\u3040-\u9fff\uac00-\ud7af])|\n+", text
    )
    return [part.strip() for part in parts if part.strip()]


class JudgementCache:
    """Verdicts in a file, under a hash of the judge, its revision and settings, and the text judged.

    A context manager.

    Raises:
        RunError: the place cannot be written.
        InputError: the file is something else.
    """

    def __init__(self, path: PathLike) -> None:
        self.path = pathlib.Path(path)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._store = sqlite3.connect(self.path, timeout=60, isolation_level=None)
        except (OSError, sqlite3.OperationalError) as error:
            raise RunError(
                f"cannot write {str(path)!r} ({error}); choose a writable place for the judgements"
            ) from error
        try:
            self._store.execute(
                "CREATE TABLE IF NOT EXISTS judgements (key TEXT PRIMARY KEY, verdict TEXT NOT NULL)"
            )
            self._store.execute("SELECT key, verdict FROM judgements LIMIT 1")
        except sqlite3.OperationalError as error:
            self._store.close()
            raise RunError(
                f"cannot write {str(path)!r} ({error}); choose a writable place for the judgements"
            ) from error
        except sqlite3.DatabaseError as error:
            self._store.close()
            raise InputError(
                f"{str(path)!r} is no file of judgements ({error}); expected one this package wrote, "
                "or a new name"
            ) from error

    def __enter__(self) -> "JudgementCache":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __len__(self) -> int:
        return int(self._store.execute("SELECT count(*) FROM judgements").fetchone()[0])

    def close(self) -> None:
        """Closes the file."""
        self._store.close()

    def get(self, key: str) -> JudgeVerdict | None:
        """The verdict under a key; None where there is none, or where it cannot be read."""
        try:
            row = self._store.execute("SELECT verdict FROM judgements WHERE key = ?", (key,)).fetchone()
        except sqlite3.DatabaseError as error:
            raise InputError(
                f"{str(self.path)!r} cannot be read ({error}); expected the judgements that were kept: "
                "delete it, and they are made again"
            ) from error
        return None if row is None else verdict_of(row[0])

    def put(self, verdicts: Mapping[str, JudgeVerdict]) -> None:
        """Keeps verdicts, all in one step.

        Raises:
            RunError: the file cannot be written.
        """
        rows = [(key, json.dumps(verdict.to_json(), ensure_ascii=True)) for key, verdict in verdicts.items()]
        try:
            self._store.execute("BEGIN IMMEDIATE")
            self._store.executemany("INSERT OR REPLACE INTO judgements VALUES (?, ?)", rows)
            self._store.execute("COMMIT")
        except sqlite3.Error as error:
            if self._store.in_transaction:
                self._store.execute("ROLLBACK")
            raise RunError(
                f"cannot write {str(self.path)!r} ({error}); choose a writable place with free space"
            ) from error


def verdict_of(text: str) -> JudgeVerdict | None:
    """A verdict from its JSON; None where it is not one."""
    try:
        record: dict[str, Any] = strict_json.loads(text)
        found = JudgeVerdict(**{**record, "categories": tuple(record.get("categories") or ())})
    except (ValueError, TypeError):
        return None
    numbers = (found.p_refusal, found.p_harmful, found.score)
    whole = (
        found.label in get_args(Label)
        and isinstance(found.refused, bool | None)
        and all(isinstance(one, int | float | None) and not isinstance(one, bool) for one in numbers)
        and all(one is None or 0 <= one <= 1 for one in numbers[:2])
    )
    return found if whole else None


Progress = Callable[[int, int], None]
"""Called as `progress(completions judged, completions in all)`."""


@dataclass(frozen=True)
class Case:
    """What a judge sees of a completion: never the arm, the seed or another judge's verdict."""

    prompt: str
    """What the model was asked, an attack around the request included.

    Of a conversation the last user turn.
    """
    answer: str
    """The answer without its thinking part, behind what was begun for the model where its `meta` has an
    `opening`.
    """
    behavior: str
    """The request itself, where the completion's `meta` has it under `behavior` or `goal`.

    Otherwise the prompt.
    """
    context: str = ""
    """Text the request refers to (`meta["context"]`)."""
    before: tuple[tuple[str, str], ...] = ()
    """Role and content of the turns before the last user turn, where there are any."""

    @property
    def turns(self) -> list[tuple[str, str]]:
        """Role and content of the turns up to the answer in alternation, from a user on, as guards' templates
        take them.

        Turns of other roles than user and assistant are left out, and neighbours of one role are joined by a
        blank line.
        """
        turns: list[tuple[str, str]] = []
        for role, text in (*self.before, ("user", self.prompt), ("assistant", self.answer)):
            if role not in ("user", "assistant") or (not turns and role == "assistant"):
                continue
            if turns and turns[-1][0] == role:
                turns[-1] = (role, f"{turns[-1][1]}\n\n{text}")
            else:
                turns.append((role, text))
        return turns

    @property
    def transcript(self) -> str:
        """The turns before the last user turn as lines `role: content`, every role among them.

        Empty where there are none.
        """
        return "\n".join(f"{role}: {text}" for role, text in self.before)

    def put_into(self, words: str) -> str:
        """The words with the texts in `{prompt}`, `{behavior}`, `{answer}`, `{context}` and `{conversation}`.

        All at once: what stands in a text is never taken for a place.
        """
        texts = {name: getattr(self, name) for name in ("prompt", "behavior", "answer", "context")} | {
            "conversation": self.transcript
        }
        return re.sub(rf"\{{({'|'.join(texts)})\}}", lambda match: texts[match[1]], words)


class Judge(abc.ABC):
    """A judge of refusals or of harm.

    A new one sets `name`, `measure` and `revision` and writes `verdicts`.
    """

    name: str
    """Kept beside the verdicts; another judge has another name."""
    measure: Measure
    """`refused` or `harmful`."""
    chunk: int = 1 << 30
    """Completions after which verdicts are written to the cache."""

    @property
    @abc.abstractmethod
    def revision(self) -> str:
        """Which version of the judge's rules or weights."""

    @property
    def settings(self) -> Mapping[str, Any]:
        """What else changes verdicts, as JSON values."""
        return {}

    @abc.abstractmethod
    def verdicts(self, cases: Sequence[Case]) -> list[JudgeVerdict]:
        """One verdict for each case, in the same order. Cases have an answer."""

    def judge(
        self,
        completions: Sequence[Completion],
        *,
        cache: JudgementCache | PathLike | None = None,
        progress: Progress | None = None,
        think_end: str | None = None,
    ) -> Judgement:
        """The verdicts on completions and their rate.

        A thinking part is not read. An empty completion, or one whose thinking was cut off, is unscored, and
        so is one the judge gave no readable answer on: counted, and never safe.

        Args:
            completions: what to judge.
            cache: a cache, or the path of one; verdicts without an error are kept there after every chunk.
            progress: told how far it is.
            think_end: the text that ends a thought, in the place of what the completions say of it
                (`meta["think_end"]`).
        """
        completions = ending(completions, think_end)
        cases = [case_of(completion) for completion in completions]
        with _opened(cache) as store:
            known = self._judged({case for case in cases if case is not None}, cases, store, progress)
        verdicts = [
            dataclasses.replace(
                UNSCORED if case is None else known[case], judge=self.name, revision=self.revision
            )
            for case in cases
        ]
        return judgement_of(self.name, verdicts, completions, self.measure)

    def key(self, case: Case) -> str:
        """Hash of everything a verdict depends on."""
        facts = [self.name, self.revision, dict(self.settings), dataclasses.astuple(case)]
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    def _judged(
        self,
        wanted: set[Case],
        order: Sequence[Case | None],
        store: JudgementCache | None,
        progress: Progress | None,
    ) -> dict[Case, JudgeVerdict]:
        known: dict[Case, JudgeVerdict] = {}
        if store is not None:
            known = {case: found for case in wanted if (found := store.get(self.key(case))) is not None}
        left = [case for case in dict.fromkeys(order) if case is not None and case not in known]
        for first in range(0, len(left), self.chunk):
            chunk = left[first : first + self.chunk]
            fresh = dict(zip(chunk, self.verdicts(chunk), strict=True))
            known |= fresh
            if store is not None:
                store.put(
                    {self.key(case): verdict for case, verdict in fresh.items() if verdict.error is None}
                )
            if progress is not None:
                progress(len(known), len(wanted))
        return known


class FunctionJudge(Judge):
    """A judge of refusals from a function of one completion.

    Args:
        name: Name and version.
        function: One completion in, one verdict out.
        revision: Which version of the rules.
    """

    measure: Measure = "refused"

    def __init__(self, name: str, function: RefusalJudge, revision: str = "") -> None:
        self.name = name
        self._function = function
        self._revision = revision

    @property
    def revision(self) -> str:
        """The version given."""
        return self._revision

    def verdicts(self, cases: Sequence[Case]) -> list[JudgeVerdict]:
        """What the function says of each."""
        return [self._function(Completion("", case.prompt, case.answer)) for case in cases]


def case_of(completion: Completion) -> Case | None:
    """What a judge sees of a completion; None where there is no answer."""
    answer = answer_in(completion)
    if answer is None:
        return None
    meta = completion.meta
    request, turns = request_in(completion), conversation_in(completion)
    behavior = meta.get("behavior") or meta.get("goal") or request
    last = max((place for place, (role, _) in enumerate(turns) if role == "user"), default=0)
    opening = str(meta.get("opening") or "")
    gap = "" if not opening or opening[-1:].isspace() or answer[:1].isspace() else " "
    return Case(
        request, f"{opening}{gap}{answer}", str(behavior), str(meta.get("context") or ""), turns[:last]
    )


@contextlib.contextmanager
def _opened(cache: JudgementCache | PathLike | None) -> Iterator[JudgementCache | None]:
    if cache is None or isinstance(cache, JudgementCache):
        yield cache
        return
    with JudgementCache(cache) as store:
        yield store
