"""Labelled requests: those that a guard is fit on, and those that it is held against, wrapped in attacks and
perturbed.
"""

import dataclasses
import functools
import random
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
from jaxtyping import Bool, Int

from safety_neurons.counting import numbered
from safety_neurons.errors import InputError, UsageError
from safety_neurons.guard import AnswerTokens, answers_written
from safety_neurons.judges import Judge, judge
from safety_neurons.model import LanguageModel
from safety_neurons.prompt_lists import Message, Prompt, Prompts, as_prompts, request_of
from safety_neurons.prompt_lists.labels import TRUTH, asks_for, says_unsafe
from safety_neurons.prompt_lists.readers import Source
from safety_neurons.prompt_lists.records import label_word
from safety_neurons.results import Completion, Completions
from safety_neurons.suites import attack
from safety_neurons.suites.rewording import MECHANICAL

HARMLESS_ARM = "/harmless"


@dataclass(frozen=True)
class GuardData:
    """Prompts to fit a guard on.

    Attributes:
        unsafe: prompts whose answers would be unsafe.
        safe: the others.
        notes: warnings about how they were labelled.
        labels: where the labels come from, for the record.
    """

    unsafe: Prompts
    safe: Prompts
    notes: tuple[str, ...] = ()
    labels: Mapping[str, Any] = field(default_factory=dict)

    def __add__(self, other: "GuardData") -> "GuardData":
        return GuardData(
            joined(self.unsafe, other.unsafe),
            joined(self.safe, other.safe),
            (*self.notes, *other.notes),
            {**self.labels, **other.labels},
        )


def given(unsafe: Prompts | None, safe: Prompts | None) -> GuardData:
    """Prompts that come with their kind."""
    nothing = Prompts([])
    labels = {
        word: prompts.name for word, prompts in (("unsafe", unsafe), ("safe", safe)) if prompts is not None
    }
    return GuardData(unsafe or nothing, safe or nothing, (), labels)


def labelled_by_column(prompts: Prompts, column: str = "label") -> GuardData:
    """Prompts of one list, told apart by a field of their records.

    Args:
        prompts: records with the field.
        column: its name; values such as unsafe, harmful, 1, true and safe, harmless, 0, false, in any case.
            Of a column that asks by its name whether a prompt is safe (`is_safe`, `nonToxic`), 1 and true are
            safe.

    Raises:
        InputError: no record has the field, or a value that is neither, or 1 and 0 in a field whose name asks
            for both; the message names the first.
    """
    kinds: dict[bool, list[Prompt]] = {True: [], False: []}
    missing = 0
    for prompt in prompts:
        value = _field(prompt, column)
        if not label_word(value):
            missing += 1
            continue
        kinds[_is_unsafe(value, prompt, column)].append(prompt)
    if missing == len(prompts):
        raise InputError(
            f"{prompts.name}: no record has a field {column!r}; expected a label in each, name it with "
            "--label-column"
        )
    notes = [
        *prompts.notes,
        *([f"left out {numbered(missing, 'prompt')} without a label"] if missing else []),
    ]
    asks = asks_for(column)
    if asks != "unsafe" and any(label_word(_field(prompt, column)) in TRUTH for prompt in prompts):
        told = "safe, as its name says" if asks else "unsafe; its name does not tell, as is_safe would"
        notes.append(f"1 and true in {column!r} were read as {told}")
    return GuardData(
        Prompts(kinds[True], prompts.name),
        Prompts(kinds[False], prompts.name),
        tuple(notes),
        {"labelled": prompts.name, "column": column},
    )


def labelled_by_completions(
    completions: Completions,
    by: Judge | str,
    *,
    arm: str | None = None,
    judge_options: Mapping[str, Any] | None = None,
    cache: Any = None,
) -> GuardData:
    """Prompts told apart by what the model wrote to them, as a judge sees it: a prompt is unsafe if its
    answer does harm.

    Answers of an arm whose name ends in `/harmless` are to harmless requests and count as safe without being
    judged, since judges of refusals and of compliance say something of harmful requests only. Several answers
    to one prompt: unsafe if at least half of the scored ones do harm. Prompts without a scored answer are
    left out and counted.

    Args:
        completions: of the model that will be guarded.
        by: a judge, or the name of one.
        arm: the arm whose answers count (with `/harmful` and `/harmless` behind it where there are those);
            needed where there are several.
        judge_options: of a judge that is named.
        cache: verdicts kept from an earlier call.

    Raises:
        UsageError: several arms and none named. InputError: no such arm, or nothing could be scored.

    Source: Chen et al., arXiv 2406.14144, section 6: the label is whether the model's own greedy answer has a
    positive cost. Differs: any judge; unscored answers are left out rather than counted as safe.
    """
    chosen = _of_arm(completions, arm)
    asked_harm = Completions([one for one in chosen if not one.arm.endswith(HARMLESS_ARM)])
    found = by if isinstance(by, Judge) else judge(by, **dict(judge_options or {}))
    judgement = found.judge(asked_harm, cache=cache) if len(asked_harm) else None
    verdicts: dict[str, list[bool]] = defaultdict(list)
    prompts: dict[str, Prompt] = {}
    outcomes: Sequence[bool | None] = judgement.harmful if judgement is not None else ()
    scored = [
        *zip(asked_harm, outcomes, strict=True),
        *((one, False) for one in chosen if one.arm.endswith(HARMLESS_ARM)),
    ]
    for completion, outcome in scored:
        prompt = _prompt(completion)
        prompts.setdefault(prompt.sha256, prompt)
        if outcome is not None:
            verdicts[prompt.sha256].append(bool(outcome))
    unsafe = [prompts[key] for key, votes in verdicts.items() if 2 * sum(votes) >= len(votes)]
    safe = [prompts[key] for key, votes in verdicts.items() if 2 * sum(votes) < len(votes)]
    if not verdicts:
        raise InputError(
            f"{found.name} could score none of {len(chosen)} completions; expected answers it can judge"
        )
    return GuardData(
        Prompts(unsafe, "completions judged unsafe"),
        Prompts(safe, "completions judged safe"),
        tuple(_said(completions, len(chosen), prompts, verdicts)),
        {"judge": found.name, "judge_revision": found.revision, "arm": arm, "completions": len(chosen)},
    )


@dataclass(frozen=True)
class JudgedAnswers:
    """What a model writes to unsafe and to safe prompts, told apart by what it says.

    Attributes:
        unsafe: answers that do harm.
        safe: the others: answers to safe prompts, and refusals.
        notes: what was left out.
    """

    unsafe: Sequence[AnswerTokens]
    safe: Sequence[AnswerTokens]
    notes: tuple[str, ...] = ()


def own_answers(
    model: LanguageModel,
    data: GuardData,
    by: Judge | str,
    *,
    max_new_tokens: int = 64,
    judge_options: Mapping[str, Any] | None = None,
    **completing: Any,
) -> JudgedAnswers:
    """Greedy answers of a model to labelled prompts, for a classifier of answers.

    An answer to an unsafe prompt is unsafe if a judge calls it harmful, and safe if it does not (a refusal);
    one that the judge cannot score is left out. Answers to safe prompts are safe.

    Args:
        model: that answers.
        data: the prompts.
        by: a judge, or the name of one; a judge of refusals calls harmful what does not refuse.
        max_new_tokens: length of an answer.
        judge_options: of a judge that is named.
        **completing: as for `LanguageModel.complete`: `batch_size`, `progress`, ….
    """
    found = by if isinstance(by, Judge) else judge(by, **dict(judge_options or {}))
    completions = {
        label: model.complete(prompts, max_new_tokens=max_new_tokens, **completing)
        for label, prompts in ((True, data.unsafe), (False, data.safe))
    }
    asked, safe = (
        answers_written(model, prompts, completions[label])
        for label, prompts in ((True, data.unsafe), (False, data.safe))
    )
    outcomes = found.judge(completions[True]).harmful
    told = list(zip(asked, outcomes, strict=True))
    unscored = sum(outcome is None for outcome in outcomes)
    return JudgedAnswers(
        [one for one, outcome in told if outcome],
        [*safe, *(one for one, outcome in told if outcome is False)],
        (f"left out {numbered(unscored, 'answer')} that {found.name} could not score",) if unscored else (),
    )


def _said(
    completions: Completions,
    n_chosen: int,
    prompts: Mapping[str, Prompt],
    verdicts: Mapping[str, Sequence[bool]],
) -> list[str]:
    notes = []
    unscored, torn = (
        len(prompts) - len(verdicts),
        sum(0 < sum(votes) < len(votes) for votes in verdicts.values()),
    )
    if unscored:
        notes.append(f"left out {numbered(unscored, 'prompt')} without a scored answer")
    if torn:
        notes.append(
            f"{numbered(torn, 'prompt has', 'prompts have')} answers of both kinds: what most of them are "
            "counts"
        )
    if completions.dropped:
        notes.append(f"left out {numbered(completions.dropped, 'cut line')} of the completions file")
    if n_chosen < len(completions):
        notes.append(f"left aside {numbered(len(completions) - n_chosen, 'completion')} of other arms")
    return notes


def _of_arm(completions: Completions, arm: str | None) -> Completions:
    """The completions of one arm, both of its halves."""
    stems = tuple(dict.fromkeys(_stem(name) for name in completions.arms))
    if arm is None and len(stems) > 1:
        raise UsageError(
            f"completions of {len(stems)} arms ({', '.join(stems)[:120]}); name the one whose answers "
            "count with --arm"
        )
    wanted = arm or (stems[0] if stems else "")
    chosen = Completions([one for one in completions if wanted in (one.arm, _stem(one.arm))])
    if not len(chosen):
        raise InputError(
            f"no completions of arm {wanted!r}; there are {', '.join(completions.arms) or 'none'}"
        )
    return chosen


def _stem(arm: str) -> str:
    return arm.removesuffix(HARMLESS_ARM).removesuffix("/harmful")


def _prompt(completion: Completion) -> Prompt:
    return Prompt(
        completion.prompt_id,
        completion.prompt,
        language=completion.meta.get("language"),
        category=completion.meta.get("category"),
    )


def _field(prompt: Prompt, column: str) -> Any:
    own = {"category": prompt.category, "language": prompt.language}
    return prompt.meta.get(column, own.get(column))


def _is_unsafe(value: Any, prompt: Prompt, column: str) -> bool:
    unsafe = says_unsafe(value, column)
    if unsafe is not None:
        return unsafe
    said = f"prompt {prompt.id!r} has {column} {str(value)[:40]!r}"
    if label_word(value) in TRUTH:
        raise InputError(
            f"{said}, and the name does not tell whether that is safe; expected unsafe or safe, or a name "
            "such as is_unsafe or is_safe"
        )
    raise InputError(f"{said}; expected unsafe, harmful, 1 or true, or safe, harmless, 0 or false")


def joined(first: Prompts, second: Prompts) -> Prompts:
    """Both lists, without the name of an empty one."""
    return first + second if len(first) and len(second) else first if len(first) else second


AS_WRITTEN = "as written"
OVER_REFUSAL = "over-refusal"
_EXCHANGE = "Of course."

Change = Callable[[Prompt, Prompt, random.Random], Prompt]
"""Given a request, a safe request of the same language, and a source of chance: the changed request."""


@dataclasses.dataclass(frozen=True)
class GuardCase:
    """One request under one variant.

    Attributes:
        prompt: what the model is asked.
        unsafe: its label.
        source: the data set it comes from.
        variant: `as written`, an attack, a perturbation, or `over-refusal` for a safe request of a set of its
            own.
        origin: number of the case it was made of; its own number where it is as written.
    """

    prompt: Prompt
    unsafe: bool
    source: str
    variant: str = AS_WRITTEN
    origin: int = -1

    def column(self, name: str) -> str | None:
        """What the request has under a column: source, language, category, or any field of its record."""
        if name == "source":
            return self.source
        value = {"language": self.prompt.language, "category": self.prompt.category}.get(
            name
        ) or self.prompt.meta.get(name)
        return None if value is None else str(value)


@dataclasses.dataclass(frozen=True)
class Cases:
    """Cases in order: as written first, then each variant."""

    items: tuple[GuardCase, ...]
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.items)

    @property
    def unsafe(self) -> Bool[np.ndarray, " case"]:
        """The labels."""
        return np.array([case.unsafe for case in self.items], bool)

    @property
    def prompts(self) -> Prompts:
        """The requests as the model gets them."""
        return Prompts([case.prompt for case in self.items])

    @property
    def texts(self) -> list[str]:
        """All that a request says, every turn of it, for classifiers that read words."""
        return texts_of(self.prompts)

    def groups(self, rows: Int[np.ndarray, " row"]) -> list[str | None]:
        """What some cases share."""
        return [self._shared[row] for row in rows]

    @functools.cached_property
    def _shared(self) -> list[str | None]:
        return self.prompts.groups

    def where(self, variant: str) -> np.ndarray:
        """Indices of the cases of a variant."""
        return np.array([place for place, case in enumerate(self.items) if case.variant == variant], np.int64)

    def values(self, column: str) -> list[str]:
        """What the cases as written have under a column, the most frequent first."""
        found = [case.column(column) for case in self.items if case.variant == AS_WRITTEN]
        named = [value for value in found if value is not None]
        return sorted(set(named), key=lambda value: (-named.count(value), value))

    def having(self, column: str, value: str) -> Bool[np.ndarray, " case"]:
        """Which cases have a value under a column."""
        return np.array([case.column(column) == value for case in self.items], bool)


def texts_of(prompts: Prompts) -> list[str]:
    """All that each prompt says, every turn of it."""
    return [" ".join(turn.content for turn in one.messages) if one.messages else one.text for one in prompts]


Sources = Source
"""Prompts in whatever form they come, or a list of `Prompts`, one a data set."""


def cases_of(
    unsafe: Sources,
    safe: Sources,
    *,
    over_refusal: Sources = (),
    variants: Sequence[str] = (),
    seed: int = 0,
    limit: int | None = None,
) -> Cases:
    """All cases of an evaluation.

    A request that is in both lists, or repeated in one, case and spaces aside, is left out or counted once.
    Both classes get every
    variant: what wraps only unsafe requests would be found by its wrapper.

    Args:
        unsafe: requests that should be flagged, one list a data set.
        safe: requests that should pass.
        over_refusal: more safe requests, chosen to look unsafe; reported apart.
        variants: attacks and perturbations by name; see `VARIANTS`.
        seed: of perturbations.
        limit: of each variant and class, so many requests at most.

    Raises:
        InputError: nothing is left of a class. UsageError: an unknown variant.
    """
    unknown = [name for name in variants if name not in VARIANTS]
    if unknown:
        raise UsageError(f"attack or perturbation {unknown[0]!r}: expected some of {', '.join(VARIANTS)}")
    pools = {True: _pool(unsafe), False: _pool(safe)}
    both = {prompt.digest for prompt, _ in pools[True]} & {prompt.digest for prompt, _ in pools[False]}
    items: list[GuardCase] = []
    notes = [note for source in (*_lists(unsafe), *_lists(safe)) for note in source.notes]
    if both:
        notes.append(f"{numbered(len(both), 'request is', 'requests are')} both unsafe and safe: left out")
    for label, pool in pools.items():
        kept = [(prompt, source) for prompt, source in pool if prompt.digest not in both]
        if not kept:
            raise InputError(
                f"no {'unsafe' if label else 'safe'} requests; expected requests of both kinds to "
                "evaluate a guard on"
            )
        items += [
            GuardCase(prompt, label, source, origin=len(items) + place)
            for place, (prompt, source) in enumerate(kept)
        ]
    written = list(items)
    items += [GuardCase(prompt, False, source, OVER_REFUSAL, -1) for prompt, source in _pool(over_refusal)]
    for name in dict.fromkeys(variants):
        items += _varied(written, name, seed, limit)
    return Cases(tuple(items), tuple(dict.fromkeys(notes)))


def _lists(sources: Sources) -> Sequence[Prompts]:
    lists = isinstance(sources, list | tuple) and all(isinstance(one, Prompts) for one in sources)
    return list(cast("Sequence[Prompts]", sources)) if lists else [as_prompts(sources)]


def _pool(sources: Sources) -> list[tuple[Prompt, str]]:
    found: dict[str, tuple[Prompt, str]] = {}
    for source in _lists(sources):
        for prompt in source:
            found.setdefault(prompt.digest, (prompt, source.name))
    return list(found.values())


def _varied(written: Sequence[GuardCase], name: str, seed: int, limit: int | None) -> list[GuardCase]:
    chance = random.Random(f"{seed}/{name}")
    companions = _companions(written)
    made = []
    for label in (True, False):
        ours = [case for case in written if case.unsafe == label]
        if limit is not None and len(ours) > limit:
            ours = [ours[place] for place in sorted(random.Random(seed).sample(range(len(ours)), limit))]
        for case in ours:
            near = companions.get(case.prompt.language) or companions[None]
            other = next(
                (one for one in (chance.choice(near) for _ in range(8)) if one is not case.prompt),
                case.prompt,
            )
            prompt = VARIANTS[name](case.prompt, other, chance)
            made.append(GuardCase(prompt, label, case.source, name, case.origin))
    return made


def _companions(written: Sequence[GuardCase]) -> Mapping[str | None, list[Prompt]]:
    found: dict[str | None, list[Prompt]] = {None: []}
    for case in written:
        if not case.unsafe:
            found[None].append(case.prompt)
            found.setdefault(case.prompt.language, []).append(case.prompt)
    return found


def _asked(prompt: Prompt) -> str:
    """The request, which `Prompt.asking` exchanges."""
    return request_of(prompt.turns) or prompt.turns[-1].content


def _reworded(function: Callable[[str, str, random.Random], str]) -> Change:
    return lambda prompt, other, chance: prompt.asking(function(_asked(prompt), _asked(other), chance))


def _later_turn(prompt: Prompt, other: Prompt, _chance: random.Random) -> Prompt:
    """The request behind a safe exchange; system turns stay in front, where templates take them."""
    first = next(
        (place for place, turn in enumerate(prompt.turns) if turn.role != "system"), len(prompt.turns)
    )
    earlier = (Message("user", _asked(other)), Message("assistant", other.answer or _EXCHANGE))
    turns = (*prompt.turns[:first], *earlier, *prompt.turns[first:])
    return dataclasses.replace(prompt, text=_asked(prompt), messages=turns)


def _earlier_turn(prompt: Prompt, other: Prompt, _chance: random.Random) -> Prompt:
    """The request before a safe one; an answer that was begun for the model is the one between them."""
    answer = () if prompt.turns[-1].role == "assistant" else (Message("assistant", _EXCHANGE),)
    turns = (*prompt.turns, *answer, Message("user", _asked(other)))
    return dataclasses.replace(prompt, text=_asked(prompt), messages=turns)


def _mechanical(name: str) -> Change:
    return lambda prompt, _other, _chance: attack(Prompts([prompt]), name)[0]


def _typos(text: str, _other: str, chance: random.Random) -> str:
    """Two letters of every third word or so change places; the first letter stays."""
    words = text.split(" ")
    for place, word in enumerate(words):
        if len(word) > 3 and chance.random() < 1 / 3:
            at = chance.randrange(1, len(word) - 1)
            words[place] = word[:at] + word[at + 1] + word[at] + word[at + 2 :]
    return " ".join(words)


def _without_marks(text: str) -> str:
    return " ".join(text.rstrip(" .?!").split())


ATTACKS: Mapping[str, Change] = {
    "behind-safe": _reworded(lambda text, other, _: f"{other} {text}"),
    "before-safe": _reworded(lambda text, other, _: f"{text} {other}"),
    "between-safe": _reworded(lambda text, other, _: f"{other} {text} {other}"),
    "later-turn": _later_turn,
    "earlier-turn": _earlier_turn,
    "reversed": _reworded(lambda text, _other, _: " ".join(reversed(_without_marks(text).split()))),
    **{name: _mechanical(name) for name in MECHANICAL if name != "direct"},
}
"""Wrappers by name: those of `safety_neurons.suites`, and those made of the evaluation's own safe requests,
in any language.
"""

PERTURBATIONS: Mapping[str, Change] = {
    "typos": _reworded(_typos),
    "upper-case": _reworded(lambda text, _other, _: text.upper()),
    "no-punctuation": _reworded(lambda text, _other, _: _without_marks(text)),
    "twice": _reworded(lambda text, _other, _: f"{text} {text}"),
    "template-question": _reworded(lambda text, _other, _: f"I have a question. {text}"),
    "template-quoted": _reworded(lambda text, _other, _: f"Please answer this: “{text}” Thank you."),
}
"""Changes of the wording that leave the meaning."""

VARIANTS: Mapping[str, Change] = {**ATTACKS, **PERTURBATIONS}
