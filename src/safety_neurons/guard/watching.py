"""Watch a model decode: verdicts during the prefill and while answers grow, for rows of a batch."""

import contextlib
import inspect
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor

from safety_neurons.arguments import well_typed
from safety_neurons.errors import UsageError
from safety_neurons.guard.calibration import check_probability
from safety_neurons.guard.features import Collector
from safety_neurons.guard.guard import FAILURES, TOP, Guard
from safety_neurons.guard.verdict import Verdict, largest
from safety_neurons.model.decoding import cache_in, cache_name, without_cache
from safety_neurons.model.sites import unwrapped
from safety_neurons.prompt_lists import Prompt

REFUSAL = "I'm sorry, but I can't help with that."
"""A refusal for every built-in judge: AdvBench's strings do not know `I can't`."""
Action = Literal["refuse", "error"] | Callable[[Prompt, Verdict], str]
"""What takes the place of a stopped answer: a refusal, a `FlaggedError`, or what a function of prompt and
verdict returns.
"""
Log = Callable[[Mapping[str, Any]], None]
"""Told of every verdict as JSON values: prompt id, verdict, tokens, whether it was stopped; never a text."""


@well_typed
@dataclass(frozen=True)
class Rules:
    """When a guarded model stops an answer, and what takes its place."""

    action: Action = "refuse"
    """`refuse`, `error`, or a function of prompt and verdict that gives the text."""
    refusal: str = REFUSAL
    """The text of `refuse`."""
    recheck_every: int = 0
    """Re-check answers under way each time they are so many tokens longer; 0 for never.

    The threshold is the one that `fit_answers`
    measured at such positions, for this distance."""
    recheck_threshold: float | None = None
    """A threshold for re-checks of one's own."""
    shadow: bool = False
    """Only log; stop nothing and change nothing."""
    fail_open: bool = False
    """Let prompts pass that were truncated or could not be scored."""
    log: Log | None = None
    """Told of every verdict, without any text."""
    top: int = TOP
    """Neurons to name in the verdict on a flagged row."""

    def __post_init__(self) -> None:
        if not callable(self.action) and self.action not in ("refuse", "error"):
            raise UsageError(
                f"action {self.action!r} is unknown; expected refuse, error or a function of prompt and "
                "verdict"
            )
        if self.recheck_every < 0:
            raise UsageError(f"re-checks every {self.recheck_every} tokens; expected 0 for none, or more")
        check_probability(1.0 if self.recheck_threshold is None else self.recheck_threshold, "threshold")

    def threshold_of(self, guard: Guard) -> float:
        """The threshold of re-checks by a guard.

        Raises:
            UsageError: none was measured for this distance, and none is given.
        """
        every, measured = self.recheck_every, guard.recheck
        if self.recheck_threshold is not None or not every:
            return 1.0 if self.recheck_threshold is None else self.recheck_threshold
        if measured is None or measured.every != every:
            has = "none" if measured is None else f"one for every {measured.every} tokens"
            raise UsageError(
                f"re-checks every {every} tokens: the guard's threshold was measured on prompts, and for "
                f"generated tokens it has {has}; fit it with --recheck-every (fit_answers), or give "
                "a recheck_threshold"
            )
        return measured.threshold


class RowListener(Protocol):
    """Reads along while one row is decoded."""

    cancelled: threading.Event
    """Set to end the row at its next token."""

    def put(self, token: int) -> None:
        """The token that was chosen."""


@dataclass
class Watch:
    """Reads the guard's neurons in one batch and says which rows to stop.

    The verdicts are there before anyone sees a token. A flagged row ends with its first token, which is
    thrown away: the other rows of the batch go on, and nothing they see has changed.

    Attributes:
        guard: bound.
        rules: when to stop.
        truncated: per row whether its prompt was.
        lengths: tokens of each prompt.
        threshold: of re-checks.
        beside: per row the verdicts on the other readings of its request, which count as much as the one of
            the prefill.
        verdicts: per row, once the prompt is read.
        rechecks: per row the verdicts behind it, with the number of generated tokens each has read.
        channel: takes the tokens of the only row as they are chosen, and may end it; None where nobody reads
            along.
    """

    guard: Guard
    rules: Rules
    truncated: Sequence[bool]
    lengths: Sequence[int]
    beside: Sequence[Sequence[Verdict]]
    threshold: float = 1.0
    channel: "RowListener | None" = None
    verdicts: list[Verdict] = field(default_factory=list)
    rechecks: list[list[tuple[int, Verdict]]] = field(default_factory=list)
    steps: int = 0

    def __post_init__(self) -> None:
        self.rechecks = [[] for _ in self.lengths]
        self.stopped = torch.zeros(len(self.lengths), dtype=torch.bool)
        self._ends = self.guard.bound.thought_end_ids if self.guard.answers is not None else frozenset()
        self._thought: list[bool] = []
        self._answers: Collector | None = None

    @contextlib.contextmanager
    def on(self, mask: Int[Tensor, "batch token"]) -> Iterator[None]:
        """Watch the batch that is decoded inside the context."""
        self.collector = self.guard.collector
        self.collector.start(mask if len(mask) > 1 else None, left=True)  # a row alone has no padding
        yield

    @contextlib.contextmanager
    def reading(self, tokens: Int[Tensor, "_ _"]) -> Iterator[None]:
        """Read the pass inside, which is fed these tokens, where it will be judged or its tokens are pooled.

        Hooks are off between passes: other prompts may be judged with the same model meanwhile.
        """
        collector = self._opened(tokens)
        if collector is None:
            yield
            return
        collector.__enter__()
        try:
            yield
        finally:
            collector.off()  # a site that never came by is in the verdict, as an error

    def _opened(self, tokens: Int[Tensor, "_ _"]) -> Collector | None:
        """What gathers the pass under way; None where nothing has to be."""
        if self.steps == 0:
            return self.collector
        if not self.rules.recheck_every:
            return None
        own = self.guard.answers
        self._thought = [token in self._ends for token in tokens[:, -1].tolist()] if self._ends else []
        if own is not None and self._answers is None:
            self._answers = own.new_collector()
            self._answers.start(left=True)
        collector, pooling = (
            (self.collector, self.guard.pooling)
            if self._answers is None or own is None
            else (self._answers, own.pooling)
        )
        if pooling.kind != "last":
            return collector
        if not self._due(self.steps) and not any(self._thought):
            return None
        collector.start(left=True)
        return collector

    def advance(self) -> None:
        """Judge what the pass under way has read, before a token is chosen: the prompt first, then every few
        tokens, and where a thought ends, what was written.
        """
        if self.steps == 0:
            self.verdicts = [
                largest(self.guard.counting([own, *others]))
                for own, others in zip(self._judge(self.guard, None), self.beside, strict=True)
            ]
            self._stop(self.verdicts, [True] * len(self.verdicts))
        elif self._due(self.steps) or any(self._thought):
            verdicts = self._judge(self.guard.answers or self.guard, self.threshold)
            due = [True] * len(verdicts) if self._due(self.steps) else self._thought
            for row, verdict, now in zip(self.rechecks, verdicts, due, strict=True):
                row += [(self.steps, verdict)] if now else []
            self._stop(verdicts, due)
        self.steps += 1

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with some of the rows only."""
        self.truncated = [self.truncated[row] for row in rows]
        self.lengths = [self.lengths[row] for row in rows]
        self.beside = [self.beside[row] for row in rows]
        self.verdicts = [self.verdicts[row] for row in rows]
        self.rechecks = [self.rechecks[row] for row in rows]
        self.stopped = self.stopped[list(rows)]
        if self._answers is not None:
            self._answers.keep(rows)

    def __call__(
        self,
        model: Any,
        ids: Int[Tensor, "row token"],
        *,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        **prepared: Any,
    ) -> Int[Tensor, "row whole"]:
        """Decode by greedy search or sampling, as the `custom_generate` of transformers' `generate`, with the
        arguments it prepares.
        """
        prepared.pop("position_ids", None)  # of the prompt alone; Feed has those of every pass
        mask, cache = prepared.pop("attention_mask", None), cache_in(prepared)
        prepared = without_cache(prepared)
        feed = Feed(model, mask, cache, chunk=generation_config.prefill_chunk_size, **prepared)
        going = torch.ones(len(ids), dtype=torch.bool, device=ids.device)
        ending = any(hasattr(one, "eos_token_id") for one in stopping_criteria)

        def take(logits: Float[Tensor, "row vocab"]) -> Int[Tensor, "kept 1"] | None:
            nonlocal ids, going
            scores = logits_processor(ids, logits)
            tokens = (
                torch.multinomial(scores.softmax(-1), 1)
                if generation_config.do_sample
                else scores.argmax(-1, keepdim=True)
            )
            if (
                ending
            ):  # as without a guard: where nothing but a stop text ends rows, they go on until all have ended
                tokens = torch.where(going[:, None], tokens, generation_config.pad_token_id)
            ids = torch.cat([ids, tokens], -1)
            going = going & ~stopping_criteria(ids, None) & ~self.stopped.to(ids.device)
            if self.channel is not None:
                self.channel.put(int(tokens[0]))
                going &= not self.channel.cancelled.is_set()
            return tokens if bool(going.any()) else None

        for _ in steps(feed, ids, self, take):
            pass
        return ids

    def stopped_at(self, row: int, n_tokens: int) -> tuple[int, Verdict] | None:
        """Where a row that gave so many tokens was stopped: the number of tokens before that, and the
        verdict; None where it was not.

        A re-check behind the end of a row's answer, which only a longer row of its batch made happen, does
        not count.
        """
        if self.rules.shadow:
            return None
        checks = [(0, self.verdicts[row]), *self.rechecks[row]]
        return next(
            ((count, verdict) for count, verdict in checks if verdict.flagged and count <= n_tokens), None
        )

    def _due(self, step: int) -> bool:
        return self.rules.recheck_every > 0 and step % self.rules.recheck_every == 0

    def _stop(self, verdicts: Sequence[Verdict], due: Sequence[bool]) -> None:
        """Note the rows that end here."""
        if not self.rules.shadow:
            flags = zip(verdicts, due, strict=True)
            self.stopped |= torch.tensor([verdict.flagged and now for verdict, now in flags])

    def _judge(self, guard: Guard, threshold: float | None) -> list[Verdict]:
        started = time.perf_counter()
        options: dict[str, Any] = {"threshold": threshold, "fail_open": self.rules.fail_open}
        lengths = [length + self.steps for length in self.lengths]
        collector = self.collector if self._answers is None else self._answers
        try:
            features = collector.result()[guard.pooling]
            return guard.verdicts(
                features,
                self.truncated,
                **options,
                top=self.rules.top,
                only_flagged=True,
                lengths=lengths,
                started=started,
            )
        except FAILURES as error:
            return [guard.failed(error, **options, n_tokens=length) for length in lengths]


class Feed:
    """Feeds a model the newest tokens of a batch, keeps what it remembers of the earlier ones, and gives the
    logits behind the last one.

    Args:
        model: of transformers, or of PEFT around one.
        mask: of the prompts, 1 for tokens, 0 for padding on the left; None where nothing is padding.
        cache: of earlier tokens, empty; None for the model's own.
        chunk: tokens of a pass at most, for long prompts.
        running: opened around every pass.
        **further: arguments of every pass.
    """

    def __init__(
        self,
        model: Any,
        mask: Int[Tensor, "row token"] | None,
        cache: Any = None,
        *,
        chunk: int | None = None,
        running: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
        **further: Any,
    ) -> None:
        accepted = inspect.signature(unwrapped(model).forward).parameters
        self._model, self._cache, self._chunk, self._running = model, cache, chunk, running
        # Without padding the model numbers the tokens itself, and needs no mask to look at in every layer.
        self._mask = None if mask is None or bool(mask.all()) else mask
        self._numbered, self._remembers = "position_ids" in accepted, cache_name(model)
        self._further = {
            "use_cache": True,
            **({"logits_to_keep": 1} if "logits_to_keep" in accepted else {}),
            **further,
        }
        self._fed: Tensor | None = None
        self._width = 0

    def __call__(self, ids: Int[Tensor, "row token"]) -> Float[Tensor, "row vocab"]:
        """Logits behind the last of some tokens that come next."""
        if not self._further["use_cache"]:
            self._fed = ids = ids if self._fed is None else torch.cat([self._fed, ids], -1)
            self._width = 0
        with self._running(), torch.no_grad():
            for part in ids.split(self._chunk or ids.shape[1], 1):
                output = self._pass(part)
        return output.logits[:, -1].to(ids.device, torch.float32)

    def _pass(self, ids: Int[Tensor, "row token"]) -> Any:
        self._width += ids.shape[1]
        given = dict(self._further)
        if self._mask is not None:
            new = self._width - self._mask.shape[1]
            self._mask = torch.nn.functional.pad(self._mask, (0, new), value=1) if new > 0 else self._mask
            given["attention_mask"] = seen = self._mask[:, : self._width]
            if self._numbered:
                given["position_ids"] = (seen.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        output = self._model(input_ids=ids, return_dict=True, **{self._remembers: self._cache}, **given)
        self._cache = cache_in(output) if given["use_cache"] else None
        return output

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with some of the rows only."""
        chosen = torch.tensor(rows)
        self._mask = None if self._mask is None else self._mask[chosen.to(self._mask.device)]
        self._cache.batch_select_indices(chosen.to(self._model.device))


def steps(
    feed: Feed,
    tokens: Int[Tensor, "row token"] | None,
    watch: Watch,
    take: Callable[[Float[Tensor, "row vocab"]], Int[Tensor, "kept 1"] | None],
) -> Iterator[None]:
    """Decode behind a guard, one token of every row a step: feed what is new, let the guard judge what was
    read, then choose and hand on.

    Args:
        feed: of the batch.
        tokens: prompts, padded on the left.
        watch: on the batch; its verdicts are there before `take` is called.
        take: chooses from the logits, hands on what may be seen, and gives the tokens to go on with; None at
            the end of the last row.
    """
    while tokens is not None:
        with watch.reading(tokens):
            logits = feed(tokens)
        watch.advance()
        tokens = take(logits)
        if tokens is not None:
            yield
