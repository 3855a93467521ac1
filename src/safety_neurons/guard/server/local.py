"""A guard in memory as a service: verdicts in batches, and answers of the local model written step by step.

One step is one forward pass of all rows of a group, so the engine can judge others in between. Rows end for
themselves: at an end token, at their own length, at a stop text, when their client goes away; what remains of
the group goes on without them.
"""

import secrets
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from safety_neurons.errors import InputError
from safety_neurons.guard.answers import AnswerTokens, score_answers
from safety_neurons.guard.features import model_lock
from safety_neurons.guard.generate import Detokenizer
from safety_neurons.guard.guard import Guard
from safety_neurons.guard.server.engine import Answering
from safety_neurons.guard.server.shapes import Problem, too_long
from safety_neurons.guard.verdict import Verdict
from safety_neurons.guard.watching import Feed, Rules, Watch, steps
from safety_neurons.model import Encoded, LanguageModel
from safety_neurons.model.language_model import takes_padding
from safety_neurons.prompt_lists import Prompt

_COLDEST = 1e-6
_NO_RECHECKS = Rules(top=0)


@dataclass(frozen=True)
class Decode:
    """How one answer is decoded.

    Attributes:
        new_tokens: Longest answer.
        temperature: 0 is greedy.
        top_p: Of sampling.
        seed: Of sampling; None for one that nobody knows.
        stop: Texts that end the answer; they are not part of it.
        begun: Whether the prompt ends in an answer that was begun, and has been judged without it too.
    """

    new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    begun: bool = False


@dataclass(frozen=True)
class Admission:
    """The guard's verdict, before the first token, and whether it holds the answer back."""

    verdict: Verdict
    held: bool = False


@dataclass(frozen=True)
class Piece:
    """Text of an answer."""

    text: str


@dataclass(frozen=True)
class Ended:
    """The end of an answer, and why: `stop`, `length`, `content_filter`."""

    reason: str
    prompt_tokens: int = 0
    tokens: int = 0
    flagged: bool = False
    """By a check while it was written; in shadow mode it goes on all the same."""


@dataclass(frozen=True, slots=True)
class RawPrompt(Prompt):
    """A text that is fed as it is, without a template."""


class LocalAnswer:
    """One answer under way."""

    def __init__(self, job: Answering, ids: list[int], limit: int, lm: LanguageModel) -> None:
        decode: Decode = job.settings
        self.job, self.n_prompt, self.limit = job, len(ids), min(limit, decode.new_tokens)
        self.ids, self.begun = ids, decode.begun
        self.n_new = 0
        self.flagged = False
        self.text = Detokenizer(lm.decode, decode.stop)
        self.held: list[str] | None = None
        self._settings = decode
        self._ends = set(lm.eos_ids)
        self._random = None
        if decode.temperature > 0:
            self._random = torch.Generator().manual_seed(
                secrets.randbits(63) if decode.seed is None else decode.seed % 2**63
            )

    def choose(self, logits: Float[Tensor, " vocab"]) -> int:
        """The next token."""
        if self._random is None:
            return int(logits.argmax())
        scores = logits.double().cpu()
        scores = ((scores - scores.max()) / max(self._settings.temperature, _COLDEST)).softmax(
            0
        )  # colder, quotients are no numbers
        if self._settings.top_p < 1:
            order = scores.sort(descending=True)
            outside = order.values.cumsum(0) - order.values >= self._settings.top_p
            scores = scores.index_fill(0, order.indices[outside], 0.0)
        return int(torch.multinomial(scores, 1, generator=self._random))

    def take(self, token: int) -> bool:
        """Tells the job about a token; True where the answer goes on."""
        if self.job.given_up:
            return False
        if token in self._ends:
            return self.end("stop")
        self.n_new += 1
        piece = self.text.add(token)
        if piece:
            self._give(piece)
        if self.text.stopped:
            return self.end("stop")
        return self.n_new < self.limit or self.end("length")

    def _give(self, piece: str) -> None:
        """Hands text on, or keeps it until the check behind it has passed."""
        if self.held is None:
            self.job.tell(Piece(piece))
        else:
            self.held.append(piece)

    def release(self) -> None:
        """Hands on what was kept."""
        if self.held:
            self.job.tell(Piece("".join(self.held)))
            self.held = []

    def fail(self) -> bool:
        """Tells the job that there is no next token: the likeliest of what are no numbers would be token
        0.
        """
        self.job.tell(Problem(500, "the model gave NaN or infinity, so the answer ends here", "model_error"))
        return False

    def end(self, reason: str) -> bool:
        """Tells the job that the answer is complete."""
        if reason != "content_filter":  # what a check has not passed is not given where one has failed
            self.release()
            rest = self.text.rest()
            if rest:
                self.job.tell(Piece(rest))
        self.job.ended = True
        ended = "stop" if self.text.stopped else reason
        self.job.tell(Ended(ended, self.n_prompt, self.n_new, self.flagged))
        return False


class LocalWriter:
    """Answers with a model in memory.

    Args:
        guard: Looks on during the prefill, bound to the model.
        holds: Whether a verdict ends an answer before it begins.
        rules: When answers under way are checked again.
        batch_tokens: Padded tokens of a prefill.
    """

    def __init__(
        self,
        guard: Guard,
        holds: Callable[[Verdict], bool],
        *,
        rules: Rules = _NO_RECHECKS,
        batch_tokens: int = 2048,
    ) -> None:
        self.lm, self.guard, self.holds, self._batch_tokens = guard.bound, guard, holds, batch_tokens
        self._rules, self._threshold = rules, rules.threshold_of(guard)

    def fits(self, job: Answering, others: Sequence[Answering]) -> bool:
        """Whether a prompt goes with others into one prefill."""
        lengths = [job.length, *(other.length for other in others)]
        return (takes_padding(self.lm) or len(set(lengths)) == 1) and max(lengths) * len(
            lengths
        ) <= self._batch_tokens

    def start(self, jobs: Sequence[Answering]) -> Iterator[None]:
        """Writes answers together, a token a step."""
        encoded = [job.fed for job in jobs]
        room = [self.lm.max_length - len(one.ids) if self.lm.max_length else 1 << 30 for one in encoded]
        rows = [
            LocalAnswer(job, one.ids, left, self.lm)
            for job, one, left in zip(jobs, encoded, room, strict=True)
        ]
        width = max(row.n_prompt for row in rows)
        ids = torch.full((len(rows), width), self.lm.pad_id)
        mask = torch.zeros((len(rows), width), dtype=torch.long)
        for place, row in enumerate(rows):
            ids[place, width - row.n_prompt :] = torch.tensor(row.ids)
            mask[place, width - row.n_prompt :] = 1
        watch = Watch(
            self.guard,
            self._rules,
            [one.truncated for one in encoded],
            [row.n_prompt for row in rows],
            [()] * len(rows),
            self._threshold,
        )
        every = self._rules.recheck_every
        if every and not self._rules.shadow:
            for row in rows:
                row.held = []
        feed = self.feed(mask)

        def take(logits: Float[Tensor, "row vocab"]) -> Int[Tensor, "kept 1"] | None:
            nonlocal rows
            going = [True] * len(rows)
            if watch.steps == 1:
                going = [
                    self._admitted(row, verdict) for row, verdict in zip(rows, watch.verdicts, strict=True)
                ]
                watch.stopped[:] = False  # whoever goes on is admitted, whatever this one reading said
            elif every:
                for row, checks in zip(rows, watch.rechecks, strict=True):
                    row.flagged = any(verdict.flagged for _, verdict in checks)
                going = [
                    not stop or row.end("content_filter")
                    for row, stop in zip(rows, watch.stopped.tolist(), strict=True)
                ]
                if (watch.steps - 1) % every == 0:
                    for row, on in zip(rows, going, strict=True):
                        if on:
                            row.release()
            numbers = (
                logits.amax(-1).isfinite().tolist()
            )  # the largest is NaN where any is; −∞ may be a token that is forbidden
            going = [
                on and (sound or row.fail()) for row, on, sound in zip(rows, going, numbers, strict=True)
            ]
            chosen = [
                row.choose(scores) if on else 0 for row, scores, on in zip(rows, logits, going, strict=True)
            ]
            going = [on and row.take(token) for row, token, on in zip(rows, chosen, going, strict=True)]
            kept = [place for place, on in enumerate(going) if on]
            if 0 < len(kept) < len(rows):
                feed.keep(kept)
                watch.keep(kept)
                rows = [rows[place] for place in kept]
            return torch.tensor([[chosen[place]] for place in kept], device=self.lm.device) if kept else None

        flow = steps(feed, ids.to(self.lm.device), watch, take)
        with model_lock(self.lm), watch.on(mask):
            first = next(flow, StopIteration)
        if first is None:
            yield
            yield from flow

    def feed(self, mask: Int[Tensor, "row token"]) -> Feed:
        """What feeds the model the rows of a mask."""
        return Feed(self.lm.model, mask.to(self.lm.device), running=self.lm.running)

    def _admitted(self, row: LocalAnswer, verdict: Verdict) -> bool:
        """Hands the verdict on; True where the answer may begin."""
        decides = self.guard.counting([verdict], begun=row.begun)
        held = any(self.holds(one) for one in decides)
        if row.limit < 1 and not held:
            row.job.tell(too_long(row.n_prompt, row.n_prompt - 1))
            return False
        row.job.tell(Admission(verdict, held))
        row.job.ended = held
        return not held


class Bound:
    """A guard bound to its model, as the engine asks it.

    Args:
        guard: Bound.
        most: Tokens of a prompt at most; None for what fits the model.
    """

    def __init__(self, guard: Guard, most: int | None = None) -> None:
        self.guard, self._most = guard, most

    @property
    def reads_ends(self) -> bool:
        """Whether it reads the last tokens of a prompt only."""
        return self.guard.reads_ends

    @property
    def reads_answers(self) -> bool:
        """Whether it has a classifier for answers: a prompt that has one is judged by it."""
        return self.guard.answers is not None

    def prepare(self, prompt: Prompt) -> Encoded | AnswerTokens:
        """Token ids of a prompt, and of the answer it has.

        Raises:
            InputError: The template or the tokenizer cannot take it. Problem: More tokens than are taken.
        """
        try:
            if prompt.answer is not None:
                question, ids, _ = self.guard.bound.encode_answer(prompt, prompt.answer)
                return AnswerTokens(prompt, tuple(question), tuple(ids))
            raw = isinstance(prompt, RawPrompt)
            encoded = self.guard.bound.encode_raw([prompt])[0] if raw else self.guard.encode(prompt)
        except (TypeError, ValueError, KeyError) as error:
            raise InputError(f"the tokenizer cannot take the prompt ({type(error).__name__})") from error
        if self._most is not None and len(encoded.ids) > self._most:
            raise too_long(len(encoded.ids), self._most)
        return encoded

    def score(self, prepared: Sequence[Encoded | AnswerTokens]) -> Sequence[Any]:
        """Verdicts: on prompts in one batch, on answers one after the other."""
        prompts = [one for one in prepared if isinstance(one, Encoded)]
        answers = [one for one in prepared if isinstance(one, AnswerTokens)]
        found = iter(self.guard.score_encoded(prompts, batch_size=max(1, len(prompts)), top=0))
        written = iter(score_answers(self.guard, answers) if answers else ())
        return [next(found if isinstance(one, Encoded) else written) for one in prepared]
