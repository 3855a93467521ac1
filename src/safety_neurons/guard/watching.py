"""Watching one batch while it is generated: verdicts at the end of its prefill, re-checks later, rows stopped one by one."""

import contextlib
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from safety_neurons.guard.guard import FAILURES, TOP, Guard
from safety_neurons.guard.verdicts import Verdict, largest


@dataclass(frozen=True)
class Rules:
    """When rows are stopped.

    Attributes:
        fail_open: whether a prompt that was truncated or could not be scored goes on.
        shadow: whether everything goes on.
        every: generated tokens between re-checks; 0 for none.
        threshold: of the re-checks.
        top: neurons to name in the verdict on a flagged row.
    """

    fail_open: bool = False
    shadow: bool = False
    every: int = 0
    threshold: float = 1.0
    top: int = TOP


@dataclass
class Watch:
    """Reads the guard's neurons in one batch and says which rows to stop.

    The verdicts are there before anyone sees a token. A flagged row ends with its first token, which is thrown away: the other rows of the
    batch go on, and nothing they see has changed.

    Attributes:
        guard: bound.
        rules: when to stop.
        truncated: per row whether its prompt was.
        lengths: tokens of each prompt.
        beside: per row the verdicts on the other readings of its request, which count as much as the one of the prefill.
        verdicts: per row, once the prompt is read.
        rechecks: per row the verdicts behind it, with the number of generated tokens each has read.
        cancelled: set from outside to end all rows at their next token; None where nothing will.
    """

    guard: Guard
    rules: Rules
    truncated: Sequence[bool]
    lengths: Sequence[int]
    beside: Sequence[Sequence[Verdict]]
    cancelled: threading.Event | None = None
    verdicts: list[Verdict] = field(default_factory=list)
    rechecks: list[list[tuple[int, Verdict]]] = field(default_factory=list)
    steps: int = 0
    _reading: bool = False

    @contextlib.contextmanager
    def on(self, mask: Int[Tensor, "batch token"]) -> Iterator[Mapping[str, Any]]:
        """Watch the batch that is generated inside the context; gives the arguments of `generate` that do it."""
        self.collector = self.guard.collector
        self.collector.start(mask if len(mask) > 1 else None, left=True)  # a row alone has no padding
        self.width = int(mask.shape[1])
        self.stopped = torch.zeros(len(mask), dtype=torch.bool)
        self.rechecks = [[] for _ in range(len(mask))]
        try:
            self._open()
            yield {"stopping_criteria": [self]}
        finally:
            self._close()

    def __call__(self, ids: Int[Tensor, "batch token"], *_: Any, **__: Any) -> Bool[Tensor, " batch"]:
        """Called by `generate` with every new token of all rows, before anyone has seen it: which rows end here."""
        self.advance(int(ids.shape[1]) - self.width)
        ends = self.stopped if self.cancelled is None or not self.cancelled.is_set() else torch.ones_like(self.stopped)
        return ends if ends.device == ids.device else ends.to(ids.device)

    def advance(self, n_tokens: int) -> None:
        """Judge what the passes before the newest of so many tokens have read: the prompt first, then every few tokens what was written."""
        while self.steps < n_tokens:
            if self.steps == 0:
                self.verdicts = [largest([own, *others]) for own, others in zip(self._judge(None), self.beside, strict=True)]
                self._stop([verdict.flagged for verdict in self.verdicts])
                self._rest()
            elif self._due(self.steps):
                found = self._judge(self.rules.threshold)
                for row, verdict in enumerate(found):
                    self.rechecks[row].append((self.steps, verdict))
                self._stop([verdict.flagged for verdict in found])
                self._rest()
            self.steps += 1
            if self._due(self.steps):
                self._open()

    def stopped_at(self, row: int, n_tokens: int) -> tuple[int, Verdict] | None:
        """Where a row that gave so many tokens was stopped: the number of tokens before that, and the verdict; None where it was not.

        A re-check behind the end of a row's answer, which only a longer row of its batch made happen, does not count.
        """
        if self.rules.shadow:
            return None
        checks = [(0, self.verdicts[row]), *self.rechecks[row]]
        return next(((count, verdict) for count, verdict in checks if verdict.flagged and count <= n_tokens), None)

    def _due(self, step: int) -> bool:
        return self.rules.every > 0 and step % self.rules.every == 0

    def _stop(self, flagged: Sequence[bool]) -> None:
        if any(flagged) and not self.rules.shadow:
            self.stopped |= torch.tensor(flagged)

    def _judge(self, threshold: float | None) -> list[Verdict]:
        started = time.perf_counter()
        options: dict[str, Any] = {"threshold": threshold, "fail_open": self.rules.fail_open}
        lengths = [length + self.steps for length in self.lengths]
        try:
            features = self.collector.result()[self.guard.pooling]
            return self.guard.verdicts(
                features, self.truncated, **options, top=self.rules.top, only_flagged=True, lengths=lengths, started=started
            )
        except FAILURES as error:
            return [self.guard.failed(error, **options, n_tokens=length) for length in lengths]

    def _open(self) -> None:
        """Read from now on, unless reading never ended: what pools over all tokens must see all of them."""
        if not self._reading:
            self._reading = True
            if self.steps:
                self.collector.start(left=True)
            self.collector.__enter__()

    def _rest(self) -> None:
        """Take the hooks off until the next check; a pooling over all tokens keeps them while there is one."""
        if self.rules.every and self.guard.pooling.kind != "last":
            return
        self._close()

    def _close(self) -> None:
        """Hooks off; a site that never came by is in the verdict already, as an error."""
        if self._reading:
            self._reading = False
            self.collector.off()
