"""What a guard is fit on: unsafe and safe prompts as given, prompts with a label, or prompts labelled by what a model wrote to them."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from safety_neurons.errors import InputError, UsageError
from safety_neurons.judges import Judge, judge
from safety_neurons.prompts import Prompt, Prompts
from safety_neurons.results import Completion, Completions

UNSAFE_WORDS = frozenset({"1", "1.0", "true", "yes", "unsafe", "harmful", "toxic", "jailbreak", "attack", "malicious"})
SAFE_WORDS = frozenset({"0", "0.0", "-1", "false", "no", "safe", "harmless", "benign", "unharmful", "ok"})
HARMLESS_ARM = "/harmless"


@dataclass(frozen=True)
class GuardData:
    """Prompts to fit a guard on.

    Attributes:
        unsafe: prompts whose answers would be unsafe.
        safe: the others.
        notes: what had to be said of how they were labelled.
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
    labels = {word: prompts.name for word, prompts in (("unsafe", unsafe), ("safe", safe)) if prompts is not None}
    return GuardData(unsafe or nothing, safe or nothing, (), labels)


def labelled_by_column(prompts: Prompts, column: str = "label") -> GuardData:
    """Prompts of one list, told apart by a field of their records.

    Args:
        prompts: records with the field.
        column: its name; values such as unsafe, harmful, 1, true and safe, harmless, 0, false, in any case.

    Raises:
        InputError: no record has the field, or a value that is neither; the message names the first.
    """
    kinds: dict[bool, list[Prompt]] = {True: [], False: []}
    missing = 0
    for prompt in prompts:
        value = _field(prompt, column)
        if value is None or value == "":
            missing += 1
            continue
        kinds[_is_unsafe(value, prompt, column)].append(prompt)
    if missing == len(prompts):
        raise InputError(f"{prompts.name}: no record has a field {column!r}; expected a label in each, name it with --label-column")
    notes = [*prompts.notes, *([f"{missing} prompts without a label were left out"] if missing else [])]
    return GuardData(
        Prompts(kinds[True], prompts.name), Prompts(kinds[False], prompts.name), tuple(notes), {"labelled": prompts.name, "column": column}
    )


def labelled_by_completions(
    completions: Completions,
    by: Judge | str,
    *,
    arm: str | None = None,
    judge_options: Mapping[str, Any] | None = None,
    cache: Any = None,
) -> GuardData:
    """Prompts told apart by what the model wrote to them, as a judge sees it: a prompt is unsafe if its answer does harm.

    Answers of an arm whose name ends in `/harmless` are to harmless requests and count as safe without being judged, since judges of
    refusals and of compliance say something of harmful requests only. Several answers to one prompt: unsafe if at least half of the scored
    ones do harm. Prompts without a scored answer are left out and counted.

    Args:
        completions: of the model that will be guarded.
        by: a judge, or the name of one.
        arm: the arm whose answers count (with `/harmful` and `/harmless` behind it where there are those); needed where there are several.
        judge_options: of a judge that is named.
        cache: verdicts kept from an earlier call.

    Raises:
        UsageError: several arms and none named. InputError: no such arm, or nothing could be scored.

    Source: Chen et al., arXiv 2406.14144, section 6: the label is whether the model's own greedy answer has a positive cost.
    Differs: any judge; unscored answers are left out rather than counted as safe.
    """
    chosen = _of_arm(completions, arm)
    asked_harm = Completions([one for one in chosen if not one.arm.endswith(HARMLESS_ARM)])
    found = by if isinstance(by, Judge) else judge(by, **dict(judge_options or {}))
    judgement = found.judge(asked_harm, cache=cache) if len(asked_harm) else None
    verdicts: dict[str, list[bool]] = defaultdict(list)
    prompts: dict[str, Prompt] = {}
    outcomes: Sequence[bool | None] = judgement.harmful if judgement is not None else ()
    scored = [*zip(asked_harm, outcomes, strict=True), *((one, False) for one in chosen if one.arm.endswith(HARMLESS_ARM))]
    for completion, outcome in scored:
        prompt = _prompt(completion)
        prompts.setdefault(prompt.sha256, prompt)
        if outcome is not None:
            verdicts[prompt.sha256].append(bool(outcome))
    unsafe = [prompts[key] for key, votes in verdicts.items() if 2 * sum(votes) >= len(votes)]
    safe = [prompts[key] for key, votes in verdicts.items() if 2 * sum(votes) < len(votes)]
    if not verdicts:
        raise InputError(f"{found.name} could score none of {len(chosen)} completions; expected answers it can judge")
    return GuardData(
        Prompts(unsafe, "completions judged unsafe"),
        Prompts(safe, "completions judged safe"),
        tuple(_said(completions, len(chosen), prompts, verdicts)),
        {"judge": found.name, "judge_revision": found.revision, "arm": arm, "completions": len(chosen)},
    )


def _said(completions: Completions, n_chosen: int, prompts: Mapping[str, Prompt], verdicts: Mapping[str, Sequence[bool]]) -> list[str]:
    notes = []
    unscored, torn = len(prompts) - len(verdicts), sum(0 < sum(votes) < len(votes) for votes in verdicts.values())
    if unscored:
        notes.append(f"{unscored} prompts without a scored answer were left out")
    if torn:
        notes.append(f"{torn} prompts have answers of both kinds: they count as what most of them are")
    if completions.dropped:
        notes.append(f"{completions.dropped} cut lines of the completions file were left out")
    if n_chosen < len(completions):
        notes.append(f"{len(completions) - n_chosen} completions of other arms were left aside")
    return notes


def _of_arm(completions: Completions, arm: str | None) -> Completions:
    """The completions of one arm, both of its halves."""
    stems = tuple(dict.fromkeys(_stem(name) for name in completions.arms))
    if arm is None and len(stems) > 1:
        raise UsageError(f"completions of {len(stems)} arms ({', '.join(stems)[:120]}); name the one whose answers count with --arm")
    wanted = arm or (stems[0] if stems else "")
    chosen = Completions([one for one in completions if wanted in (one.arm, _stem(one.arm))])
    if not len(chosen):
        raise InputError(f"no completions of arm {wanted!r}; there are {', '.join(completions.arms) or 'none'}")
    return chosen


def _stem(arm: str) -> str:
    return arm.removesuffix(HARMLESS_ARM).removesuffix("/harmful")


def _prompt(completion: Completion) -> Prompt:
    return Prompt(
        completion.prompt_id, completion.prompt, language=completion.meta.get("language"), category=completion.meta.get("category")
    )


def _field(prompt: Prompt, column: str) -> Any:
    own = {"category": prompt.category, "language": prompt.language}
    return prompt.meta.get(column, own.get(column))


def _is_unsafe(value: Any, prompt: Prompt, column: str) -> bool:
    word = str(value).strip().casefold()
    if word in UNSAFE_WORDS:
        return True
    if word in SAFE_WORDS:
        return False
    raise InputError(
        f"prompt {prompt.id!r} has {column} {str(value)[:40]!r}; expected unsafe, harmful, 1 or true, or safe, harmless, 0 or false"
    )


def joined(first: Prompts, second: Prompts) -> Prompts:
    """Both lists, without the name of an empty one."""
    return first + second if len(first) and len(second) else first if len(first) else second
