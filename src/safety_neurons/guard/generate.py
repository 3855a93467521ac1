"""Generate behind a guard: answers whole or streamed, rows stopped one by one."""

import contextlib
import dataclasses
import queue
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal

from torch import Tensor
from transformers import StopStringCriteria

from safety_neurons.arguments import well_typed
from safety_neurons.errors import DecodeError, MismatchError, UsageError
from safety_neurons.guard.features import Request, as_request_prompts, model_lock, readings
from safety_neurons.guard.guard import Guard
from safety_neurons.guard.verdict import FlaggedError, Verdict
from safety_neurons.guard.watching import Rules, Watch
from safety_neurons.model import BatchSize, LanguageModel, Progress
from safety_neurons.model.decoding import Answer, Decoding, cache_in
from safety_neurons.model.language_model import PendingCompletions, Texts, end_ids, generate
from safety_neurons.prompt_lists import Prompt, Prompts, as_prompt
from safety_neurons.results import Completion, Completions

_REPLACEMENT = "�"
_END = object()


class GuardedStream:
    """Pieces of one answer, in order. Iterate.

    Or use it as a context manager, which ends the generation on the way out.

    Args:
        answer: generates with the channel as streamer, until its event cancels.
        model: decodes.
        every: tokens between re-checks, before which they are held back; 0 for none.
        ends: ids that end an answer.
    """

    def __init__(
        self,
        answer: Callable[["_Channel"], "GuardedAnswer"],
        model: LanguageModel,
        every: int = 0,
        ends: Sequence[int] = (),
    ) -> None:
        self._channel = _Channel(model, every, ends)
        self._thread = threading.Thread(
            target=_run, args=(answer, self._channel), name="guarded-stream", daemon=True
        )
        self._thread.start()

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        item = self._channel.pieces.get() if not self._channel.over else _END
        if isinstance(item, str):
            return item
        self._channel.over = True
        self._thread.join()
        if isinstance(item, BaseException):
            raise item
        raise StopIteration

    def __enter__(self) -> "GuardedStream":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        channel = getattr(self, "_channel", None)
        if channel is not None:
            channel.cancelled.set()

    def close(self) -> None:
        """End the generation at its next token and wait for that; may be called at any time, and again."""
        self._channel.cancelled.set()
        self._channel.over = True
        self._thread.join()

    @property
    def verdict(self) -> Verdict | None:
        """On the prompt; None until it is read."""
        watch = self._channel.watch
        return watch.verdicts[0] if watch is not None and watch.verdicts else None

    @property
    def answer(self) -> "GuardedAnswer | None":
        """The whole answer; None until the stream has ended, and after a failure."""
        return self._channel.answer

    @property
    def finish_reason(self) -> str | None:
        """`stop`, `length` or `guard`; None until the stream has ended, and where it was closed before."""
        return None if self.answer is None or self._channel.cancelled.is_set() else self.answer.finish_reason


class _Channel:
    """What the thread that generates and the one that reads share."""

    def __init__(self, model: LanguageModel, every: int, ends: Sequence[int]) -> None:
        self.every, self.ends = every, frozenset(ends)
        self.pieces: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.cancelled = threading.Event()
        self.watch: Watch | None = None
        self.answer: Any = None
        self.over = False
        self._text = Detokenizer(model.decode)
        self._held: list[int] = []
        self._passed = -1

    def put(self, token: int) -> None:
        """The next token: given out once the check behind it has passed, at once where there are none."""
        self._held.append(token)
        self._passed += 1  # the newest token is not read yet
        if self.watch is None or bool(self.watch.stopped.any()) or (self.every and self._passed % self.every):
            return
        held = 1 if self.every else 0
        fresh, self._held = self._held[: len(self._held) - held], self._held[len(self._held) - held :]
        for token in fresh:
            if token not in self.ends and (piece := self._text.add(token)):
                self.pieces.put(piece)

    def finish(self, answer: "GuardedAnswer") -> None:
        """Give out the rest: of the answer, or what takes its place."""
        self.answer = answer
        if answer.stopped:
            if answer.stopped_at == 0 and answer.text:
                self.pieces.put(answer.text)
            return
        for token in answer.token_ids[self._text.count :]:
            if piece := self._text.add(token):
                self.pieces.put(piece)
        if piece := self._text.rest():
            self.pieces.put(piece)


def _run(answer: Callable[["_Channel"], "GuardedAnswer"], channel: _Channel) -> None:
    try:
        channel.finish(answer(channel))
    except BaseException as error:
        channel.pieces.put(error)
    finally:
        channel.pieces.put(_END)


class Detokenizer:
    """Text of an answer as it grows: whole characters only, and nothing that could become a stop text.

    Each piece is what the text of a few tokens gains by the next one, so that tokenizers which look at their
    neighbours (spaces at the start of a word, joined bytes) give what they give for the whole.

    Args:
        decode: ids to text.
        stop: texts that end the answer.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], stop: Sequence[str] = ()) -> None:
        self._decode, self._stop = decode, stop
        self._ids: list[int] = []
        self._start = self._read = 0
        self._held = ""
        self.stopped = False

    @property
    def count(self) -> int:
        """Tokens so far."""
        return len(self._ids)

    def add(self, token: int) -> str:
        """Text that is certain once this token is there; empty while a character is not whole."""
        self._ids.append(token)
        return self._unstopped(self._gained(final=False))

    def rest(self) -> str:
        """What was held back, at the end of the answer: a character that stays incomplete, the beginning of a
        stop text.
        """
        text = self._unstopped(self._gained(final=True))
        held, self._held = ("", "") if self.stopped else (self._held, "")
        return text + held

    def _unstopped(self, text: str) -> str:
        whole = self._held + text
        places = [place for stop in self._stop if (place := whole.find(stop)) >= 0]
        if places:
            self.stopped, self._held = True, ""
            return whole[: min(places)]
        keep = max(
            (n for stop in self._stop for n in range(1, len(stop)) if whole.endswith(stop[:n])), default=0
        )
        self._held = whole[len(whole) - keep :]
        return whole[: len(whole) - keep]

    def _gained(self, *, final: bool) -> str:
        before = self._decode(self._ids[self._start : self._read])
        after = self._decode(self._ids[self._start :])
        if len(after) <= len(before) or (after.endswith(_REPLACEMENT) and not final):
            return ""
        self._start, self._read = self._read, len(self._ids)
        return after[len(before) :]


_SEVERAL_ROWS = ("num_beams", "num_beam_groups", "num_return_sequences", "penalty_alpha")
_OTHER_LOOPS = (
    "assistant_model",
    "prompt_lookup_num_tokens",
    "custom_generate",
    "assistant_early_exit",
    "use_mtp",
    "streamer",
)


@dataclass(frozen=True)
class GuardedAnswer:
    """One answer of a guarded model.

    Attributes:
        prompt_id: of which prompt.
        text: the answer, or what took its place.
        token_ids: generated ids, end of sequence excluded; of an answer that was stopped those before that.
        verdict: on the prompt.
        stopped: whether the guard stopped it.
        finish_reason: `stop`, `length`, `failed` (the model gave NaN), or `guard`.
        stopped_at: generated tokens when it was stopped: 0 before the first; None where it was not.
        recheck: the verdict that stopped it later.
    """

    prompt_id: str
    text: str
    token_ids: tuple[int, ...]
    verdict: Verdict
    stopped: bool
    finish_reason: Literal["stop", "length", "failed", "guard"]
    stopped_at: int | None = None
    recheck: Verdict | None = None


class GuardedModel:
    """A model that answers through its guard.

    The guard reads its neurons in the prefill that generation needs anyway, so its cost is a few copied
    numbers a layer; the other readings of a conversation (its turns by themselves; the conversation without
    the answer it ends in) are read before. Prompts it does not flag are answered token for token as without
    it, in the same batches. Greedy search and sampling; other loops are an error.

    Args:
        model: the model.
        guard: fit on it; a guard that is not bound to it is bound, which checks it.
        **rules: those of `Rules`: `action`, `refusal`, `recheck_every`, `recheck_threshold`, `shadow`,
            `fail_open`, `log`.

    Raises:
        ForeignModelError, MismatchError: the guard is not this model's. UsageError: arguments out of range,
            or re-checks that nothing was calibrated for.
    """

    @well_typed
    def __init__(self, model: LanguageModel, guard: Guard, **rules: Any) -> None:
        if guard.model is not None and guard.model.inner is not model.inner:
            raise MismatchError(
                f"the guard is bound to {guard.bound.name}, {model.name} arrived; load the guard on the "
                "model it guards"
            )
        self.model, self.rules = model, Rules(**rules)
        self.guard = guard if guard.model is model else guard.bind(model)
        self._threshold = self.rules.threshold_of(guard)

    def __repr__(self) -> str:
        modes = [
            word for word, on in (("shadow", self.rules.shadow), ("fail open", self.rules.fail_open)) if on
        ]
        modes += [f"re-check every {self.rules.recheck_every} tokens"] if self.rules.recheck_every else []
        return f"GuardedModel({self.model.name!r}, {self.guard!r}{', ' if modes else ''}{', '.join(modes)})"

    def generate(
        self,
        prompts: Sequence[Request] | Prompts | str,
        *,
        batch_size: BatchSize = "auto",
        progress: Progress | None = None,
        notes: list[str] | None = None,
        **decoding: Any,
    ) -> list[GuardedAnswer]:
        """Answers to prompts, in order.

        Arguments as for `LanguageModel.complete`, those of decoding too (`max_new_tokens`, …).

        A prompt is a text, a `Prompt`, or a list of turns (`[[{"role": "user", "content": "…"}]]`).

        Raises:
            FlaggedError: a prompt is flagged and the action is `error`; nothing of the call's answers is
            given then. InputError: turns that cannot be read. DecodeError: a decoding mode that cannot be
            guarded. UsageError: out of range.
        """
        requests, settings = as_request_prompts(prompts), self.decoding(**decoding)
        answers = self._answers(requests, settings, batch_size=batch_size, progress=progress, notes=notes)
        return [answers[index] for index in range(len(requests))]

    def complete(
        self,
        prompts: Texts,
        *,
        batch_size: BatchSize = "auto",
        arm: str = "guarded",
        progress: Progress | None = None,
        done: Completions | None = None,
        answered: Callable[[Completion], None] | None = None,
        notes: list[str] | None = None,
        **decoding: Any,
    ) -> Completions:
        """`LanguageModel.complete` behind the guard, with the same arguments: what is stopped is what takes
        its place.

        `meta["guard"]` of every completion holds the probability, whether it was flagged, and where it was
        stopped.
        """
        settings = self.decoding(**decoding)
        pending = PendingCompletions(prompts, arm, settings.seed, done, answered)

        def keep(index: int, answer: GuardedAnswer) -> None:
            reason: Literal["stop", "length", "failed"] = (
                "stop" if answer.finish_reason == "guard" else answer.finish_reason
            )
            verdict = {
                "p_unsafe": answer.verdict.p_unsafe,
                "flagged": answer.verdict.flagged,
                "status": answer.verdict.status,
            }
            meta = {"guard": {**verdict, "stopped_at": answer.stopped_at}}
            pending.add(index, answer.text, reason, answer.token_ids, meta)

        requests, skip = list(pending.prompts), sorted(pending.results)
        self._answers(
            requests,
            settings,
            batch_size=batch_size,
            progress=progress,
            notes=notes,
            skip=skip,
            answered=keep,
        )
        return pending.completions

    def stream(self, messages: Request, **decoding: Any) -> GuardedStream:
        """The answer to one request piece by piece.

        The pieces together are the text of `generate`, whose arguments it takes.

        Nothing is given before the verdict. With re-checks, tokens are held back until the check behind them
        has passed, the last ones of an answer, which no check reads, excepted; what was given cannot be taken
        back, so a stream that is stopped later just ends. Leaving the loop early and calling `close` (or
        leaving a `with` block) ends the generation at its next token.

        Raises:
            As `generate`; a `FlaggedError` comes from the iteration.
        """
        prompt, settings = as_prompt(messages), self.decoding(**decoding)
        return GuardedStream(
            lambda channel: self._answers([prompt], settings, channel, batch_size=1)[0],
            self.model,
            0 if self.rules.shadow else self.rules.recheck_every,
            end_ids(self.model, (settings.others or {}).get("eos_token_id")),
        )

    def decoding(self, **options: Any) -> Decoding:
        """How to decode, if that can be guarded.

        Raises:
            DecodeError: beams, several answers a prompt, an assistant model, a cache that holds tokens the
            guard has not read. UsageError: longer answers than the re-checks are calibrated for.
        """
        several = [name for name in _SEVERAL_ROWS if options.get(name) not in (None, 1, 0)]
        other = [name for name in _OTHER_LOOPS if options.get(name) is not None]
        if several or other:
            raise DecodeError(
                f"argument {(several + other)[0]!r}: a guarded model decodes by greedy search or "
                "sampling, one row a prompt"
            )
        if cache_in(options) is not None:
            raise DecodeError(
                "a cache arrived: the guard has not read the tokens in that cache; give the "
                "whole prompt instead"
            )
        if self.rules.recheck_every and options.get("use_cache") is False:
            raise DecodeError(
                "use_cache=False with re-checks: tokens would be read again at every step; leave one of "
                "them out"
            )
        if options.get("return_dict_in_generate"):
            raise DecodeError(
                "return_dict_in_generate: a guarded model gives answers; use the model itself for scores "
                "and states"
            )
        if (
            options.get("stop_strings") is not None
        ):  # a loop of one's own gets no tokenizer, so the criterion is made here
            strings = options.pop("stop_strings")
            criterion = StopStringCriteria(
                self.model.tokenizer, [strings] if isinstance(strings, str) else list(strings)
            )
            options["stopping_criteria"] = [*(options.get("stopping_criteria") or ()), criterion]
        measured, decoding = self.guard.recheck, Decoding.of(options)
        if (
            self.rules.recheck_every
            and self.rules.recheck_threshold is None
            and measured is not None
            and decoding.max_new_tokens > measured.max_new_tokens
        ):
            raise UsageError(
                f"{decoding.max_new_tokens} new tokens with re-checks calibrated on answers of at most "
                f"{measured.max_new_tokens}: their false-positive rate is not known there; ask for fewer "
                "tokens, or calibrate for longer answers"
            )
        return decoding

    def _answers(
        self,
        requests: Sequence[Prompt],
        decoding: Decoding,
        channel: "_Channel | None" = None,
        *,
        skip: Sequence[int] = (),
        answered: Callable[[int, GuardedAnswer], None] | None = None,
        batch_size: BatchSize = "auto",
        **generating: Any,
    ) -> dict[int, GuardedAnswer]:
        """The one loop behind `generate`, `complete` and `stream`: `generate` of the model, watched batch by
        batch.
        """
        watches: dict[int, tuple[Watch, int]] = {}
        answers: dict[int, GuardedAnswer] = {}
        encoded = [self.model.encode(prompt, reserve=decoding.max_new_tokens)[0] for prompt in requests]
        beside = self._beside(requests, set(skip), batch_size)

        @contextlib.contextmanager
        def watched(indices: list[int], mask: Tensor) -> Iterator[Mapping[str, Any]]:
            chosen = [encoded[index] for index in indices]
            truncated, lengths = [item.truncated for item in chosen], [len(item.ids) for item in chosen]
            watch = Watch(
                self.guard,
                self.rules,
                truncated,
                lengths,
                [beside[index] for index in indices],
                self._threshold,
                channel,
            )
            watches.update({index: (watch, row) for row, index in enumerate(indices)})
            if channel is not None:
                channel.watch = watch
            with watch.on(mask):
                yield {"custom_generate": watch}

        def read(index: int, answer: Answer) -> GuardedAnswer:
            watch, row = watches[index]
            return self._answer(requests[index], answer, watch, row)

        def keep(index: int, answer: Answer) -> None:
            answers[index] = answer.read
            if answered is not None:
                answered(index, answers[index])

        with model_lock(self.model):
            ids = [item.ids for item in encoded]
            watching = dataclasses.replace(decoding, watched=watched, read=read)
            generate(self.model, ids, watching, batch_size=batch_size, skip=skip, answered=keep, **generating)
        return answers

    def _beside(
        self, requests: Sequence[Prompt], skip: set[int], batch_size: BatchSize
    ) -> list[list[Verdict]]:
        """Verdicts on the readings of every request that its own prefill is not."""
        ways = [[] if place in skip else readings(prompt)[1:] for place, prompt in enumerate(requests)]
        return self.guard.score_readings(
            ways, fail_open=self.rules.fail_open, top=self.rules.top, batch_size=batch_size
        )

    def _answer(self, prompt: Prompt, answer: Answer, watch: Watch, row: int) -> GuardedAnswer:
        verdict = watch.verdicts[row]
        stop = watch.stopped_at(row, len(answer.token_ids))
        if stop is None:
            text = self.model.decode(answer.token_ids)
            result = GuardedAnswer(
                prompt.id, text, tuple(answer.token_ids), verdict, False, answer.finish_reason
            )
        else:
            count, why = stop
            kept = tuple(answer.token_ids[:count])
            result = GuardedAnswer(prompt.id, "", kept, verdict, True, "guard", count, why if count else None)
        if self.rules.log is not None:
            self.rules.log(_event(result, self.rules.shadow))
        return result if stop is None else dataclasses.replace(result, text=self._instead(prompt, stop[1]))

    def _instead(self, prompt: Prompt, verdict: Verdict) -> str:
        if callable(self.rules.action):
            return self.rules.action(prompt, verdict)
        if self.rules.action == "error":
            chance = "not scored" if verdict.p_unsafe is None else f"{verdict.p_unsafe:.3g}"
            why = (
                f"status {verdict.status}"
                if verdict.status != "ok"
                else f"probability {chance}, threshold {verdict.threshold:.3g}"
            )
            raise FlaggedError(
                f"prompt {prompt.id!r} is flagged by the guard ({why}); it was not answered", verdict
            )
        return self.rules.refusal


@well_typed
@contextlib.contextmanager
def guarding(model: LanguageModel, guard: Guard, **options: Any) -> Iterator[GuardedModel]:
    """A model that answers through its guard for a block: whoever calls its `complete` meanwhile gets guarded
    completions.

    Args:
        model: the model.
        guard: fit on it.
        **options: as for `GuardedModel`.

    Source: Chen et al., arXiv 2406.14144, section 6: only what the safeguard accepts is answered.
    """
    guarded = GuardedModel(model, guard, **options)
    before = vars(model).get("complete")
    vars(model)["complete"] = guarded.complete
    try:
        yield guarded
    finally:
        vars(model).pop("complete", None)
        if before is not None:
            vars(model)["complete"] = before


def _event(answer: GuardedAnswer, shadow: bool) -> dict[str, Any]:
    return {
        "prompt_id": answer.prompt_id,
        "verdict": answer.verdict.to_json(),
        "recheck": None if answer.recheck is None else answer.recheck.to_json(),
        "stopped": answer.stopped,
        "stopped_at": answer.stopped_at,
        "finish_reason": answer.finish_reason,
        "n_tokens": len(answer.token_ids),
        "shadow": shadow,
    }
