"""Judge: what all judges share. Equal texts are judged once, verdicts are cached by content, and what could not be judged is counted."""

import abc
import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from safety_neurons.judges.cache import JudgementCache
from safety_neurons.judges.judgement import (
    UNSCORED,
    Judgement,
    Measure,
    RefusalJudge,
    Verdict,
    answer_in,
    conversation_in,
    ending,
    judgement_of,
    request_in,
)
from safety_neurons.results import Completion
from safety_neurons.results.files import PathLike

Progress = Callable[[int, int], None]
"""Called as `progress(completions judged, completions in all)`."""


@dataclass(frozen=True)
class Case:
    """What a judge sees of a completion: never the arm, the seed or another judge's verdict."""

    prompt: str
    """What the model was asked, an attack around the request included; of a conversation the last user turn."""
    answer: str
    """The answer without its thinking part, behind what was begun for the model where its `meta` has an `opening`."""
    behavior: str
    """The request itself, where the completion's `meta` has it under `behavior` or `goal`; otherwise the prompt."""
    context: str = ""
    """Text the request refers to (`meta["context"]`)."""
    before: tuple[tuple[str, str], ...] = ()
    """Role and content of the turns before the last user turn, where there are any."""

    @property
    def turns(self) -> list[tuple[str, str]]:
        """Role and content of the turns up to the answer in alternation, from a user on, as guards' templates take them.

        Turns of other roles than user and assistant are left out, and neighbours of one role are joined by a blank line.
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
        """The turns before the last user turn as lines `role: content`, every role among them; empty where there are none."""
        return "\n".join(f"{role}: {text}" for role, text in self.before)


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
    def verdicts(self, cases: Sequence[Case]) -> list[Verdict]:
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

        A thinking part is not read. An empty completion, or one whose thinking was cut off, is unscored, and so is one the judge gave no
        readable answer on: counted, and never safe.

        Args:
            completions: what to judge.
            cache: a cache, or the path of one; verdicts without an error are kept there after every chunk.
            progress: told how far it is.
            think_end: the text that ends a thought, in the place of what the completions say of it (`meta["think_end"]`).
        """
        completions = ending(completions, think_end)
        cases = [case_of(completion) for completion in completions]
        with _opened(cache) as store:
            known = self._judged({case for case in cases if case is not None}, cases, store, progress)
        verdicts = [
            dataclasses.replace(UNSCORED if case is None else known[case], judge=self.name, revision=self.revision) for case in cases
        ]
        return judgement_of(self.name, verdicts, completions, self.measure)

    def key(self, case: Case) -> str:
        """Hash of everything a verdict depends on."""
        facts = [self.name, self.revision, dict(self.settings), dataclasses.astuple(case)]
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    def _judged(
        self, wanted: set[Case], order: Sequence[Case | None], store: JudgementCache | None, progress: Progress | None
    ) -> dict[Case, Verdict]:
        known: dict[Case, Verdict] = {}
        if store is not None:
            known = {case: found for case in wanted if (found := store.get(self.key(case))) is not None}
        left = [case for case in dict.fromkeys(order) if case is not None and case not in known]
        for first in range(0, len(left), self.chunk):
            part = left[first : first + self.chunk]
            fresh = dict(zip(part, self.verdicts(part), strict=True))
            known |= fresh
            if store is not None:
                store.put({self.key(case): verdict for case, verdict in fresh.items() if verdict.error is None})
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

    def verdicts(self, cases: Sequence[Case]) -> list[Verdict]:
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
    asked = max((place for place, (role, _) in enumerate(turns) if role == "user"), default=0)
    opening = str(meta.get("opening") or "")
    gap = "" if not opening or opening[-1:].isspace() or answer[:1].isspace() else " "
    return Case(request, f"{opening}{gap}{answer}", str(behavior), str(meta.get("context") or ""), turns[:asked])


@contextlib.contextmanager
def _opened(cache: JudgementCache | PathLike | None) -> Iterator[JudgementCache | None]:
    if cache is None or isinstance(cache, JudgementCache):
        yield cache
        return
    with JudgementCache(cache) as store:
        yield store
