"""Fit a classifier on answers under way: what a guard's neurons do at the tokens of safe and unsafe
answers.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float32, Int

from safety_neurons.arguments import well_typed
from safety_neurons.counting import numbered
from safety_neurons.errors import InputError, RunError, UsageError
from safety_neurons.guard.calibration import Recheck, rates_at, unsupported
from safety_neurons.guard.features import Pool, Pooling, read_tokens
from safety_neurons.guard.fit import (
    AgreedFit,
    FitSettings,
    Fitted,
    Split,
    best_penalty,
    check_classes,
    counted,
    fit_agreeing,
    fit_on_features,
    histograms,
    stratified_split,
    varying,
)
from safety_neurons.guard.guard import FAILURES, PROVISIONAL, Guard
from safety_neurons.guard.verdict import Verdict, largest
from safety_neurons.model import BatchSize, Encoded, LanguageModel, Progress
from safety_neurons.prompt_lists import Prompt, Prompts
from safety_neurons.results import Completions, plain

Tokens = Float32[np.ndarray, "token neuron"]
Checks = tuple[int, ...]
_LEFT = "empty, repeated, in both lists, or too long"
_MORE = (
    "give answers that were labelled before (--answers-harmful, --answers-harmless); the guard for prompts "
    "is fit and stays as it is"
)


@dataclass(frozen=True)
class AnswerTokens:
    """An answer to a prompt, as token ids.

    Attributes:
        prompt: what was asked.
        question: ids that the model was fed.
        token_ids: of the answer, its end left out.
        finished: whether it came to its end, so that its last token was read before the end was chosen.
    """

    prompt: Prompt
    question: tuple[int, ...]
    token_ids: tuple[int, ...]
    finished: bool = True

    @property
    def ids(self) -> list[int]:
        """Question and answer, as a model reads them."""
        return [*self.question, *self.token_ids]


@well_typed
def answers_in(model: LanguageModel, prompts: Prompts) -> list[AnswerTokens]:
    """The answers that records bring with them; those without one are left out.

    Raises:
        InputError: none has an answer.

    Source: none of the papers.
    """
    found = []
    for prompt in prompts:
        if prompt.answer and prompt.answer.strip():
            question, ids, _ = model.encode_answer(prompt, prompt.answer)
            found.append(AnswerTokens(prompt, tuple(question), tuple(ids)))
    if not found:
        raise InputError(
            f"{prompts.name}: none of {len(prompts)} records has an answer; expected a column response, "
            "output, answer, completion or chosen, or messages that end with the assistant's turn; name one "
            "with --harmful-answer-column, --harmless-answer-column"
        )
    return found


@well_typed
def answers_written(model: LanguageModel, prompts: Prompts, completions: Completions) -> list[AnswerTokens]:
    """The answers that a model wrote to prompts, in order.

    Source: none of the papers.
    """
    return [
        AnswerTokens(
            prompt,
            tuple(model.encode(prompt)[0].ids),
            tuple(answer.token_ids),
            answer.finish_reason == "stop",
        )
        for prompt, answer in zip(prompts, completions, strict=True)
    ]


def checks_of(answer: AnswerTokens, every: int, longest: int, ends: frozenset[int] = frozenset()) -> Checks:
    """After how many tokens of an answer it is read: every few, behind each thought, and at its end.

    The last token of an answer that is cut off is fed to no model, so it is never read.
    """
    ids = answer.token_ids[:longest]
    n_read = len(ids) if answer.finished or len(answer.token_ids) > longest else len(ids) - 1
    places = {*range(every, n_read + 1, every), n_read}
    places |= {place + 1 for place, token in enumerate(ids) if token in ends and place < n_read}
    return tuple(sorted(place for place in places if place > 0))


@well_typed
def score_answers(
    guard: Guard,
    answers: Sequence[AnswerTokens],
    *,
    fail_open: bool = False,
) -> list[Verdict]:
    """What the classifier for answers says of whole answers, each by its largest check.

    Args:
        guard: bound, with such a classifier; its threshold for re-checks counts.
        answers: to judge; one without tokens is safe.
        fail_open: let answers pass that are longer than the model reads, or could not be scored.

    Raises:
        UsageError: the guard has no classifier for answers.

    Source: as `fit_answers`.
    """
    own, recheck, model = guard.answers, guard.recheck, guard.bound
    if own is None or recheck is None:
        raise UsageError(
            "this guard has no classifier for answers; fit it with --recheck-every (fit_answers)"
        )
    options: dict[str, Any] = {"threshold": recheck.threshold, "fail_open": fail_open}
    most = model.max_length or max(len(one.ids) for one in answers)
    found: list[Verdict] = []
    for one in answers:
        room = max(0, most - len(one.question))
        read = one.token_ids[:room]
        part = dataclasses.replace(one, token_ids=read, finished=True)
        checks = checks_of(part, recheck.every, len(read) or 1, model.thought_end_ids)
        if not checks:
            short = not one.token_ids
            found.append(
                Verdict(0.0, False, recheck.threshold)
                if short
                else own.failed("there is no room for the answer in the model's context", **options)
            )
            continue
        cut = len(read) < len(one.token_ids)
        tokens: list[np.ndarray] = []
        encoded = [Encoded(one.prompt.id, part.ids)]
        try:
            read_tokens(
                model,
                encoded,
                own.neurons,
                len(read),
                lambda _, values: tokens.append(values),  # noqa: B023 - called before the next round
            )
            features = torch.from_numpy(_pooled(tokens[0], checks, own.pooling, own.classifier.direction))
            found.append(largest(own.verdicts(features, [cut] * len(checks), top=0, **options)))
        except RunError:  # of all processes that share the reading, and of no answer
            raise
        except FAILURES as error:
            found.append(own.failed(error, **options))
    return found


@well_typed
def fit_answers(
    guard: Guard,
    unsafe: Sequence[AnswerTokens],
    safe: Sequence[AnswerTokens],
    *,
    every: int = 16,
    max_new_tokens: int = 64,
    batch_size: BatchSize = "auto",
    progress: Progress | None = None,
    **settings: Any,
) -> Guard:
    """The guard with a classifier of its own for answers, fit on what its neurons do at their tokens.

    Every answer is read after each `every` tokens, behind each thought, and at its end; all of these are
    examples with the label of the answer. Answers to one prompt are split together into train, validation and
    calibration. The threshold is set on the largest of an answer's checks, so that at most the wanted share
    of safe *answers* is stopped over all of them together. A model that checks an answer at fewer of these
    places (one that is under way has no end yet) stops fewer.

    Args:
        guard: bound to its model.
        unsafe: answers that are to be stopped.
        safe: answers that are to be let pass; refusals of harmful requests belong here.
        every: tokens between checks.
        max_new_tokens: tokens of an answer that are read.
        batch_size: rows, or `auto`.
        progress: called with (batches done, in all, tokens) while answers are read.
        **settings: those of `FitSettings`; `pooling` is over the tokens of the answer.

    Raises:
        UsageError: numbers out of range. InputError: fewer than ten answers of either kind that can be read,
        or features that are the same for all.

    Source: none of the papers re-checks; arXiv 2406.14144, section 6 for the classifier. Differs: read at
    positions of the answer; a threshold for the answer instead of the token.
    """
    if every < 1 or max_new_tokens < every:
        raise UsageError(
            f"re-checks every {every} of at most {max_new_tokens} tokens; expected at least 1 and no "
            "longer than the answer"
        )
    how = FitSettings(**settings)
    data = _Answers.read(guard, unsafe, safe, every, max_new_tokens, batch_size, progress)
    split = stratified_split(data.labels, seed=how.seed, shares=how.shares, groups=data.groups)
    tried = {pooling: data.examples(pooling, split, how) for pooling in how.poolings}
    chosen = min(tried, key=lambda pooling: (tried[pooling].rank(how), how.poolings.index(pooling)))
    fitted = tried[chosen].fitted(settings)
    values, held = tried[chosen].values[tried[chosen].split.calibration], data.labels[split.calibration]
    held_groups = [data.groups[int(answer)] for answer in split.calibration]
    report = {
        "auroc": fitted.auroc,
        "validation_auroc": fitted.validation_auroc,
        "expected_calibration_error": fitted.calibration_error,
        "penalty": fitted.penalty,
        "fpr": fitted.fpr,
        "poolings": [str(pooling) for pooling in tried],
        "answers": counted(data.labels),
        "split": {
            name: counted(data.labels[getattr(split, name)])
            for name in ("train", "validation", "calibration")
        },
        "seed": how.seed,
    }
    answers = Guard(
        neurons=guard.neurons,
        pooling=chosen,
        classifier=fitted.classifier,
        operating_points=fitted.operating_points,
        threshold=fitted.threshold,
        in_force=f"{PROVISIONAL}fpr {fitted.fpr:g}",
        bindings=guard.bindings,
        reference=histograms(fitted.classifier, values, fitted.probabilities, held, held_groups),
        report=plain(report),
        notes=fitted.notes,
        model=guard.model,
    )
    recheck = data.measured(answers, tried[chosen], fitted, every, max_new_tokens)
    notes = [f"the threshold of re-checks is provisional: {recheck.why}"] if recheck.why else []
    return guard.noted([*data.notes, *notes], recheck=recheck, answers=answers)


@dataclass(frozen=True, eq=False)
class _Examples:
    """The checks of answers under one pooling.

    Attributes:
        values: one row a check.
        labels: of the rows.
        split: of the rows; of a calibration answer the first check alone.
        further: of these the other checks, by row.
        groups: of the rows.
        agreed: the classifier that chose the tokens, where several have to agree.
    """

    values: Float32[np.ndarray, "check neuron"]
    labels: Bool[np.ndarray, " check"]
    split: Split
    further: Mapping[int, Float32[np.ndarray, "_ neuron"]]
    groups: Sequence[str | None]
    agreed: AgreedFit | None

    def rank(self, how: FitSettings) -> tuple[float, float]:
        """Sorts better poolings first."""
        shared = np.array(self.groups, object)
        choice = self.agreed.choice if self.agreed else None
        choice = choice or best_penalty(self.values, self.labels, self.split, how.penalties, shared)
        return choice.rank

    def fitted(self, settings: Mapping[str, Any]) -> Fitted:
        """The classifier, calibrated on the largest check of each answer."""
        return fit_on_features(
            self.values,
            self.labels,
            split=self.split,
            readings=self.further,
            groups=self.groups,
            agreed=self.agreed,
            **settings,
        )


@dataclass(frozen=True, eq=False)
class _Answers:
    """Answers as they were read: activations at each of their tokens, and where they are checked."""

    tokens: Sequence[Tokens]
    checks: Sequence[Checks]
    labels: Bool[np.ndarray, " answer"]
    groups: Sequence[str | None]
    finished: Sequence[bool]
    notes: Sequence[str]

    @classmethod
    def read(
        cls,
        guard: Guard,
        unsafe: Sequence[AnswerTokens],
        safe: Sequence[AnswerTokens],
        every: int,
        longest: int,
        batch_size: BatchSize,
        progress: Progress | None,
    ) -> "_Answers":
        """Read the answers, each once; those that cannot be read are left out and counted."""
        model = guard.bound
        labelled = [(_key(one), label) for label, some in ((True, unsafe), (False, safe)) for one in some]
        told = dict(labelled)
        both = {key for key, label in labelled if label != told[key]}
        unique = {_key(one): one for one in (*unsafe, *safe)}
        kept, checks = [], []
        for key, one in unique.items():
            places = checks_of(one, every, longest, model.thought_end_ids)
            fits = model.max_length is None or len(one.question) + max(places, default=0) <= model.max_length
            if key not in both and places and fits:
                kept.append(one)
                checks.append(places)
        labels = np.array([told[_key(one)] for one in kept], bool)
        left = len(unsafe) + len(safe) - len(kept)
        check_classes(labels, "answers", f"{left} were left out, {_LEFT}; {_MORE}" if left else _MORE)
        encoded = [
            Encoded(one.prompt.id, [*one.question, *one.token_ids[: places[-1]]])
            for one, places in zip(kept, checks, strict=True)
        ]
        tokens: dict[int, Tokens] = {}

        def keep(number: int, values: Tokens) -> None:
            tokens[number] = values[-checks[number][-1] :]

        read_tokens(model, encoded, guard.neurons, longest, keep, batch_size=batch_size, progress=progress)
        sound = [number for number in range(len(kept)) if np.isfinite(tokens[number]).all()]
        lost = len(unsafe) + len(safe) - len(sound)
        notes = [f"left out of the fit: {numbered(lost, 'answer')}, {_LEFT}, or NaN"]
        check_classes(labels[sound], "answers", _MORE)
        if not varying(np.concatenate([tokens[number] for number in sound])):
            raise InputError(
                f"these neurons of {model.name} do the same at every token of the answers, so nothing can be "
                "learned; take other neurons"
            )
        return cls(
            [tokens[number] for number in sound],
            [checks[number] for number in sound],
            labels[sound],
            Prompts([kept[number].prompt for number in sound]).groups,
            [kept[number].finished for number in sound],
            notes if lost else [],
        )

    def examples(self, pooling: Pooling, split: Split, how: FitSettings) -> _Examples:
        """The checks of all answers, pooled over the tokens before them."""
        agreed = None
        if pooling.agree:
            agreed = fit_agreeing(self.tokens, self.labels, split, pooling.agree, how.penalties, self.groups)
        direction = agreed.classifier.direction if agreed else None
        found = [
            _pooled(tokens, checks, pooling, direction)
            for tokens, checks in zip(self.tokens, self.checks, strict=True)
        ]
        starts = np.cumsum([0, *map(len, found)])
        owner = np.repeat(np.arange(len(found)), [len(rows) for rows in found])
        first = starts[split.calibration]
        return _Examples(
            np.concatenate(found),
            self.labels[owner],
            Split(_rows(owner, split.train), _rows(owner, split.validation), first),
            {int(starts[answer]): found[answer][1:] for answer in split.calibration},
            [self.groups[int(answer)] for answer in owner],
            agreed,
        )

    def measured(
        self, answers: Guard, examples: _Examples, fitted: Fitted, every: int, longest: int
    ) -> Recheck:
        """What the threshold stops of the answers that calibrated it."""
        held, labels = examples.split.calibration, examples.labels[examples.split.calibration]
        shared = [examples.groups[int(row)] for row in held]
        fpr, tpr = rates_at(fitted.probabilities, labels, answers.threshold, shared)
        why = unsupported(labels, fitted.fpr, shared, "safe answer")
        assert len(held) == len(fitted.probabilities)
        return Recheck(
            every,
            longest,
            answers.threshold,
            fitted.fpr,
            fpr,
            tpr,
            not why,
            why,
            own=True,
            auroc=fitted.auroc,
        )


def _key(answer: AnswerTokens) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return answer.question, answer.token_ids


def _rows(owner: Int[np.ndarray, " check"], answers: Int[np.ndarray, " _"]) -> Int[np.ndarray, " _"]:
    return np.flatnonzero(np.isin(owner, answers))


def _pooled(
    tokens: Tokens, checks: Checks, pooling: Pooling, direction: torch.Tensor | None
) -> Float32[np.ndarray, "check neuron"]:
    """The features of an answer at its checks, as a collector gives them while the answer grows."""
    pool, values, start, rows = Pool(pooling, direction), torch.from_numpy(tokens), 0, []
    for check in checks:
        pool.add(values[None, start:check], None)
        rows.append(pool.result()[0])
        start = check
    return torch.stack(rows).numpy()
