"""What a guard does with answers: what the model writes with and without it, and which of those that were
labelled before it stops.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import numpy as np
from jaxtyping import Float64

from safety_neurons.errors import InputError
from safety_neurons.guard import AnswerTokens, Guard, GuardedAnswer, GuardedModel, score_answers
from safety_neurons.guard.verdict import said_of_unread
from safety_neurons.judges import judge
from safety_neurons.judges.judgement import Judge
from safety_neurons.model import BatchSize, LanguageModel
from safety_neurons.prompt_lists import Prompt, Prompts, as_prompts
from safety_neurons.prompt_lists.readers import Source
from safety_neurons.results import (
    Completion,
    Completions,
    Difference,
    Rate,
    auroc,
    paired_difference,
    rate,
)
from safety_neurons.results.estimates import GroupLabels
from safety_neurons.results.records import (
    GuardAnswersRecord,
    GuardLanguageRecord,
    GuardOutputsRecord,
    GuardStoppedRecord,
)
from safety_neurons.studies.lengths import answer_length

Progress = Callable[[str], None]
UNGUARDED, GUARDED = "untreated", "guarded"


@dataclasses.dataclass(frozen=True)
class GuardedOutputs:
    """What was written with and without the guard.

    Attributes:
        judge: that said which outputs are unsafe.
        before: share of unsafe requests with an unsafe output, without the guard.
        after: the same with it.
        cut: by which share the guard reduces the unsafe outputs.
        blocked: share of safe requests it does not answer.
        changed: answers it let pass that differ from those without it; 0 unless something is wrong.
        asked: area under the ROC curve of the guard's score for what requests ask for (the labels given).
        written: the same for what the model writes: unsafe output or not, over all requests.
        refused_by_model: unsafe requests without an unsafe output before the guard: where the two labels
            differ.
        by: the same rates for each language, where requests have one.
        change: unsafe outputs with the guard minus those without it, paired.
        completions: both arms.
        notes: how many requests the guard could not read; they are in no number that is of it.
    """

    judge: str
    before: Rate
    after: Rate
    cut: Rate
    blocked: Rate
    changed: int
    asked: Rate
    written: Rate
    refused_by_model: int
    by: tuple[GuardLanguageRecord, ...]
    change: Difference
    completions: Completions
    notes: tuple[str, ...] = ()

    def record(self) -> GuardOutputsRecord:
        """The numbers as JSON values."""
        return {
            "judge": self.judge,
            "before": self.before.to_json(),
            "after": self.after.to_json(),
            "cut": self.cut.to_json(),
            "change": self.change.to_json(),
            "blocked": self.blocked.to_json(),
            "asked": self.asked.to_json(),
            "written": self.written.to_json(),
            "changed": self.changed,
            "refused_by_model": self.refused_by_model,
            "by": list(self.by),
        }


def guarded_outputs(
    model: LanguageModel,
    guard: Guard,
    unsafe: Source,
    safe: Source,
    *,
    by: str | Judge = "compliance",
    max_new_tokens: int | None = None,
    batch_size: BatchSize = "auto",
    progress: Progress | None = None,
) -> GuardedOutputs:
    """Answers without and with the guard, judged.

    An output is unsafe if the request is and the judge calls the answer harmful; an answer that the guard
    stopped before its first token is not. What the model would write to safe requests is not judged: it
    counts as safe, whether or not it is.

    Args:
        model: the guard's.
        guard: at the threshold in force.
        unsafe: requests, none of them from fitting.
        safe: likewise.
        by: a judge or its name; a judge of refusals calls unsafe what does not refuse.
        max_new_tokens: length of an answer, in tokens; None is what is usual for the model.
        batch_size: prompts a batch.
        progress: told the name of every step.

    Raises:
        InputError: no requests of a kind.

    Source: Chen et al., arXiv 2406.14144, section 6 (label: what the model would write; outputs of accepted
    prompts). Differs: any judge; the share of unsafe outputs that is cut and the safe requests that are lost,
    with intervals, instead of a mean cost.
    """
    unsafe, safe = as_prompts(unsafe), as_prompts(safe)
    if not len(unsafe) or not len(safe):
        raise InputError(f"{len(unsafe)} unsafe and {len(safe)} safe requests; expected some of both kinds")
    say = progress or (lambda _step: None)
    asked = unsafe + safe
    label = np.arange(len(asked)) < len(unsafe)
    longest = max_new_tokens or answer_length(model)
    say("answers without the guard")
    plain = model.complete(asked, max_new_tokens=longest, batch_size=batch_size, arm=UNGUARDED)
    say("answers with the guard")
    answers = GuardedModel(model, guard).generate(asked, max_new_tokens=longest, batch_size=batch_size)
    verdicts = [answer.verdict for answer in answers]
    stopped = np.array([np.nan if one.told is None else one.told for one in verdicts], float)
    changed = sum(
        not one.stopped and tuple(one.token_ids) != tuple(was.token_ids)
        for one, was in zip(answers, plain, strict=True)
    )
    say("judge")
    found = by if isinstance(by, Judge) else judge(by)
    harmful = found.judge(plain[: len(unsafe)]).harmful
    before = np.array([np.nan if one is None else float(one) for one in harmful])
    after = np.where(np.isnan(stopped[label]), np.nan, np.where(stopped[label] > 0, 0.0, before))
    chances = np.array([np.nan if one.p_unsafe is None else one.p_unsafe for one in verdicts])
    known = np.append(~np.isnan(before), np.ones(len(safe), bool))
    written = np.append(before, np.zeros(len(safe)))
    completions = Completions(
        [*plain, *(_completion(prompt, one) for prompt, one in zip(asked, answers, strict=True))]
    )
    return GuardedOutputs(
        found.name,
        rate(before, unsafe.groups),
        rate(after, unsafe.groups),
        cut_of(before, after, unsafe.groups),
        rate(stopped[~label], safe.groups),
        int(changed),
        auroc(chances, label, asked.groups),
        auroc(np.where(known, chances, np.nan), written > 0, asked.groups),
        int((before == 0).sum()),
        tuple(_by_language(asked, label, before, after, stopped)),
        paired_difference(after, before, unsafe.groups),
        completions,
        tuple(said_of_unread(verdicts)),
    )


def some(prompts: Prompts, count: int, seed: int = 0) -> Prompts:
    """So many of the prompts, drawn at random, in their order; all where there are no more."""
    if count >= len(prompts):
        return prompts
    drawn = np.sort(np.random.default_rng(seed).choice(len(prompts), count, replace=False))
    return Prompts([prompts[int(place)] for place in drawn], prompts.name, prompts.notes)


def cut_of(
    before: Float64[np.ndarray, " request"],
    after: Float64[np.ndarray, " request"],
    groups: GroupLabels = None,
) -> Rate:
    """1 − (unsafe outputs after) ÷ (unsafe outputs before); undefined where there were none.

    Only requests that both arms scored count. A guard only ever stops: this is a rate over the requests with
    an unsafe output before.
    """
    known = ~(np.isnan(before) | np.isnan(after))
    had = known & (before > 0)
    shared = None if groups is None else [group for group, kept in zip(groups, had, strict=True) if kept]
    cut = rate(1 - after[had] / before[had], shared)
    return dataclasses.replace(cut, n=int(known.sum()), unscored=int((~known).sum()))


def _by_language(
    asked: Prompts, label: np.ndarray, before: np.ndarray, after: np.ndarray, stopped: np.ndarray
) -> list[GuardLanguageRecord]:
    codes = np.array([prompt.language or "" for prompt in asked])
    groups = np.array(asked.groups, object)
    rows: list[GuardLanguageRecord] = []
    for code in dict.fromkeys(codes[codes != ""].tolist()):
        ours, safe = codes[label] == code, (codes == code) & ~label
        if ours.any() and safe.any():
            shared = groups[label & (codes == code)].tolist()
            rows.append(
                {
                    "language": code,
                    "before": rate(before[ours], shared).to_json(),
                    "after": rate(after[ours], shared).to_json(),
                    "cut": cut_of(before[ours], after[ours], shared).to_json(),
                    "blocked": rate(stopped[safe], groups[safe].tolist()).to_json(),
                }
            )
    return rows if len(rows) > 1 else []


def _completion(prompt: Prompt, answer: GuardedAnswer) -> Completion:
    reason: Literal["stop", "length", "failed"] = (
        "stop" if answer.finish_reason == "guard" else answer.finish_reason
    )
    meta = {"p_unsafe": answer.verdict.p_unsafe, "stopped": answer.stopped, "language": prompt.language}
    return Completion(prompt.id, prompt.text, answer.text, answer.token_ids, reason, GUARDED, meta=meta)


Labelled = Mapping[str, Sequence[AnswerTokens]]
"""Answers by the name of the data set they come from."""


def stopped_answers(
    guard: Guard, unsafe: Labelled, safe: Labelled, notes: list[str] | None = None
) -> GuardAnswersRecord:
    """How a guard's classifier for answers does on answers that were labelled before, each read as far as the
    guard was fit to and judged by its largest check.

    Args:
        guard: bound, with a classifier for answers.
        unsafe: answers that it should stop.
        safe: those that it should let pass.
        notes: gets how many could not be read, which are in no rate.

    Raises:
        UsageError: the guard has no classifier for answers. InputError: no answers of a kind.

    Source: none of the papers.
    """
    kinds = {True: unsafe, False: safe}
    told = [
        (name, label, one) for label, lists in kinds.items() for name, some in lists.items() for one in some
    ]
    labels = np.array([label for _, label, _ in told], bool)
    if labels.all() or not labels.any():
        raise InputError(
            f"{int(labels.sum())} unsafe and {int((~labels).sum())} safe answers; expected some of both kinds"
        )
    recheck = guard.recheck
    longest = recheck.max_new_tokens if recheck is not None else None
    verdicts = score_answers(
        guard, [dataclasses.replace(one, token_ids=one.token_ids[:longest]) for _, _, one in told]
    )
    assert recheck is not None  # or it would not have been scored
    stopped = np.array([np.nan if one.told is None else one.told for one in verdicts], float)
    if notes is not None:
        notes += said_of_unread(verdicts, "answers")
    chances = np.array([np.nan if one.p_unsafe is None else one.p_unsafe for one in verdicts])
    groups = Prompts([one.prompt for _, _, one in told]).groups
    names = np.array([name for name, _, _ in told])

    def row(name: str, rows: np.ndarray) -> GuardStoppedRecord:
        shared = [groups[place] for place in np.flatnonzero(rows)]
        parts = {
            label: rate(
                stopped[rows & (labels == label)],
                [groups[place] for place in np.flatnonzero(rows & (labels == label))],
            )
            for label in (True, False)
        }
        return {
            "source": name,
            "auroc": auroc(chances[rows], labels[rows], shared).to_json(),
            "stopped_unsafe": parts[True].to_json(),
            "stopped_safe": parts[False].to_json(),
        }

    return {
        **row("all", np.ones(len(told), bool)),
        "every": recheck.every,
        "threshold": recheck.threshold,
        "by": [row(name, names == name) for name in dict.fromkeys(names.tolist())],
    }
