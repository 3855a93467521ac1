"""The loop of `tune`: steps, checks, and a state that can be put down after any of them and taken up again bit for bit."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from safety_neurons.errors import InputError, NumericalError, RunError, UsageError
from safety_neurons.model import LanguageModel
from safety_neurons.model.likelihood import widened
from safety_neurons.model.measures import BatchSize
from safety_neurons.model.passes import Batch, Halving, collate, forward, plan, takes_padding
from safety_neurons.results.checkpoint import Checkpoint, Saved
from safety_neurons.results.files import plain
from safety_neurons.tuning.attach import Deltas
from safety_neurons.tuning.data import MAX_LENGTH, Example, label_rows
from safety_neurons.tuning.rates import checked, factor
from safety_neurons.tuning.stopping import FINISHED, Checked, Judge, StopCheck

BATCH = 8
"""Examples of a pass where nothing else is asked for."""
EXAMPLES = "examples/ids"
_KINDS = ("harmful", "harmless")
_MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclasses.dataclass(frozen=True)
class Settings:
    """How `tune` trains.

    Attributes:
        mix: harmless examples for each harmful one.
        learning_rate: a number, or `auto` (see `learning_rates`).
        epochs: passes over the examples.
        max_steps: end after so many steps.
        batch_size: examples of a pass; `auto` is 8; halved where memory runs out, without changing the step.
        accumulate: passes of a step.
        warmup: share of the steps over which the rate rises; the first step's rate is not zero.
        clip: largest norm of the selected entries' gradient.
        weight_decay: pull of the deltas towards zero, that is towards the base.
        max_length: tokens of an example.
        seed: of the order of the examples and the draw of the harmless ones.
    """

    mix: float = 1.0
    learning_rate: float | str = "auto"
    epochs: int = 6
    max_steps: int | None = None
    batch_size: BatchSize = "auto"
    accumulate: int = 1
    warmup: float = 0.1
    clip: float = 1.0
    weight_decay: float = 0.0
    max_length: int = MAX_LENGTH
    seed: int = 0

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> "Settings":
        """Settings of keyword arguments, each in its range.

        Raises:
            UsageError: an unknown one, or one with which nothing would be trained.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        if unknown := [name for name in given if name not in known]:
            raise UsageError(f"unknown setting {unknown[0]!r}; expected some of {', '.join(known)}")
        chosen = cls(**given)
        for name in ("epochs", "accumulate", "max_steps"):
            value = getattr(chosen, name)
            if value is not None and value < 1:
                raise UsageError(f"{name} {value}: expected at least 1; with less there would be no step")
        if chosen.batch_size != "auto" and chosen.batch_size < 1:
            raise UsageError(f"batch_size {chosen.batch_size}: expected 'auto' or at least 1")
        for name, high in (("warmup", 1.0), ("mix", math.inf), ("weight_decay", math.inf)):
            if not 0 <= getattr(chosen, name) <= high:
                raise UsageError(f"{name} {getattr(chosen, name)}: expected {'0 to 1' if high == 1 else '0 or more'}")
        if not chosen.clip > 0:
            raise UsageError(f"clip {chosen.clip}: expected a norm above 0; at 0 no step would change anything")
        if chosen.learning_rate != "auto":
            checked(chosen.learning_rate)
        return chosen


@dataclasses.dataclass(frozen=True)
class Step:
    """One optimizer step.

    Attributes:
        step: its number, from 1.
        loss: mean over the answer tokens, in nats, before the step.
        norm: of the selected entries' gradient, before clipping.
        factor: share of the full learning rate.
    """

    step: int
    loss: float
    norm: float
    factor: float


@dataclasses.dataclass(frozen=True)
class Status:
    """Where training is: told after every step and every check."""

    step: int
    steps: int
    loss: float | None
    checked: Checked | None


class Loop:
    """Steps over the examples with deltas attached to a model."""

    def __init__(
        self,
        model: LanguageModel,
        deltas: Deltas,
        rates: Mapping[str, float],
        settings: Settings,
        check: StopCheck | None,
        checkpoint: Checkpoint | None,
        identity: Mapping[str, Any],
        notes: list[str],
        progress: Callable[[Status], None] | None,
    ) -> None:
        self.model, self.deltas, self.settings = model, deltas, settings
        self.checkpoint, self.identity, self.notes = checkpoint, plain(dict(identity)), notes
        self.judge = None if check is None else Judge(check)
        self.named = deltas.named_parameters()
        groups = [{"params": [parameter], "lr": rates[key], "full": rates[key]} for key, parameter in self.named.items()]
        self.optimizer = torch.optim.AdamW(groups, weight_decay=settings.weight_decay, foreach=False)
        self.examples: list[Example] = []
        self.history: list[Step] = []
        self.step, self.kept_step, self.stopped = 0, 0, ""
        self.best: dict[str, Tensor] | None = None
        self.halving = Halving()
        self._progress = progress

    def _tell(self, loss: float | None, found: Checked | None) -> None:
        if self._progress is not None:
            self._progress(Status(self.step, self.steps, loss, found))

    # The plan

    @property
    def rows(self) -> int:
        """Examples of a pass."""
        return BATCH if self.settings.batch_size == "auto" else int(self.settings.batch_size)

    @property
    def steps(self) -> int:
        """Steps in all; the examples left over at the end of an epoch are a step of their own."""
        whole = self.settings.epochs * math.ceil(len(self.examples) / (self.rows * self.settings.accumulate))
        return whole if self.settings.max_steps is None else min(whole, self.settings.max_steps)

    def drawn(self, step: int) -> list[int]:
        """Indices of the examples of a step (from 0): every epoch in an order of its own that follows from the seed."""
        size = self.rows * self.settings.accumulate
        epoch, place = divmod(step, math.ceil(len(self.examples) / size))
        order = np.random.default_rng([self.settings.seed, 3, epoch]).permutation(len(self.examples))
        return [int(index) for index in order[place * size : (place + 1) * size]]

    # Running

    def run(self) -> str:
        """Steps and checks to the end; why it ended.

        Raises:
            InputError: nothing to learn. NumericalError: the loss or its gradient is not a number.
        """
        if not self.examples:
            raise InputError("no example to learn arrived, at least one was expected; give data with answers")
        steps = self.steps
        every = self.judge.check.interval(steps) if self.judge else max(1, round(steps / 10))
        if self.judge and self.judge.before is None:
            self.judge.before = self.judge.check.measure(self.model, self.deltas, 0)
            self._tell(None, self.judge.before)
        with self.model.running():
            while self.step < steps and not self.stopped:
                self._one_step(steps)
                checked = self.step % every == 0 or self.step == steps
                if checked:
                    self._look()
                if checked or (self.checkpoint is not None and self.checkpoint.due):
                    self._save()
        return self.stopped or FINISHED

    @property
    def kept(self) -> dict[str, Tensor]:
        """The state that was kept: the best of the checks, or the last one without a check."""
        return self.deltas.tensors() if self.best is None else self.best

    @property
    def sound(self) -> bool | None:
        """Whether the state that was kept is sound by the check; None without one."""
        return self.judge.sound(self.judge.best) if self.judge and self.judge.best else None

    def said(self) -> list[str]:
        """What has to be said about the run."""
        notes = list(self.halving.notes)
        if self.judge and self.judge.best and not self.judge.sound(self.judge.best):
            best = self.judge.best
            notes.append(
                f"no state kept harmless prompts as they were: the one kept refuses {best.harmless_refused.value:.0%} of the held-out "
                f"ones, {self.judge.before.harmless_refused.value or 0:.0%} before; use more harmless examples (--mix) or a lower rate"  # type: ignore[union-attr]
            )
        return notes

    def _look(self) -> None:
        """A check, where there is one; the best state is kept."""
        if self.judge is None:
            self.kept_step = self.step
            return
        now = self.judge.check.measure(self.model, self.deltas, self.step)
        if self.judge.look(now):
            self.best, self.kept_step = self.deltas.tensors(), self.step
        self.stopped = self.judge.verdict()
        self._tell(self.history[-1].loss, now)

    def _one_step(self, steps: int) -> None:
        indices, share = self.drawn(self.step), factor(self.step, steps, self.settings.warmup)
        loss, gradients = self._gradients(indices)
        norm = float(torch.stack([gradient.detach().double().norm().cpu() for gradient in gradients]).norm())
        if not math.isfinite(loss) or not math.isfinite(norm):
            what, value = ("loss", loss) if not math.isfinite(loss) else ("gradient's norm", norm)
            ids = ", ".join(self.examples[index].prompt_id for index in indices[:3])
            raise NumericalError(
                f"the {what} became {value} at step {self.step + 1} of {steps} (examples {ids}, …), a number was expected; nothing was "
                "changed by this step; lower the learning rate, or use --dtype bfloat16 or float32"
            )
        scale = min(1.0, self.settings.clip / (norm + 1e-12))
        for parameter, gradient in zip(self.named.values(), gradients, strict=True):
            parameter.grad = gradient * scale if scale < 1 else gradient
        for group in self.optimizer.param_groups:
            group["lr"] = group["full"] * share
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.history.append(Step(self.step, loss, norm, share))
        self._tell(loss, None)

    def _gradients(self, indices: Sequence[int]) -> tuple[float, list[Tensor]]:
        """Mean loss over the answer tokens of these examples and its gradient, over all passes (and processes, where there are several)."""
        sequences = [self.examples[index].ids for index in indices]
        starts = [self.examples[index].start for index in indices]
        total = sum(self.examples[index].n_answer for index in indices)
        parameters = list(self.named.values())
        world, rank = _processes()

        def work(batch: Batch) -> tuple[Tensor, tuple[Tensor, ...]]:
            with torch.enable_grad():
                logits = forward(self.model.model, batch, with_logits=True)
                assert logits is not None
                rows, targets = label_rows(batch, [starts[index] for index in batch.indices])
                scores = widened(logits.flatten(0, 1)[rows.to(logits.device)])
                loss = torch.nn.functional.cross_entropy(scores, targets.to(scores.device), reduction="sum") / total
                return loss.detach(), torch.autograd.grad(loss, parameters)

        groups = plan([len(ids) for ids in sequences], self.rows, padded=takes_padding(self.model))
        loss, sums = 0.0, [torch.zeros_like(parameter) for parameter in parameters]
        for group in groups[rank::world]:
            batch = collate(sequences, group, pad_id=self.model.pad_id).to(self.model.device)
            for part, gradients in self.halving.run(batch, work):
                loss += float(part)
                for whole, gradient in zip(sums, gradients, strict=True):
                    whole += gradient
        return (loss, sums) if world == 1 else _summed(loss, sums)

    # Checkpoints

    def _save(self) -> None:
        if self.checkpoint is None or _processes()[1]:
            return
        arrays: dict[str, np.ndarray] = {f"delta/{key}": tensor.numpy() for key, tensor in self.deltas.tensors().items()}
        for key, parameter in self.named.items():
            arrays |= {f"{moment}/{key}": self.optimizer.state[parameter][moment].cpu().numpy() for moment in _MOMENTS}
        arrays |= {f"best/{key}": tensor.numpy() for key, tensor in (self.best or {}).items()}
        arrays[EXAMPLES] = np.concatenate([np.asarray(example.ids, np.int64) for example in self.examples])
        rows = [[len(e.ids), e.start, _KINDS.index(e.kind), e.ended, e.truncated] for e in self.examples]
        arrays["examples/table"] = np.asarray(rows, np.int64)
        state = {
            "identity": self.identity,
            "step": self.step,
            "kept_step": self.kept_step,
            "stopped": self.stopped,
            "history": [dataclasses.asdict(step) for step in self.history],
            "judge": self.judge.state() if self.judge else None,
            "prompts": [example.prompt_id for example in self.examples],
            "notes": [*self.notes, *self.halving.notes],
        }
        self.checkpoint.save(arrays, state)

    def resume(self) -> bool:
        """Go on from the checkpoint, where there is one; whether there was."""
        saved = None if self.checkpoint is None else self.checkpoint.load()
        if saved is not None:
            self.restore(saved)
        return saved is not None

    def restore(self, saved: Saved) -> None:
        """Go on from a checkpoint.

        Raises:
            RunError: it is of another set, data or configuration.
        """
        arrays, state = saved
        if state.get("identity") != self.identity:
            theirs = state.get("identity") or {}
            name = next((name for name, value in self.identity.items() if theirs.get(name) != value), "configuration")
            raise RunError(f"the checkpoint was written with another {name}, this run's was expected; delete it or pass --overwrite")
        self.deltas.load_tensors({key: torch.from_numpy(arrays[f"delta/{key}"]) for key in self.named})
        for key, parameter in self.named.items():
            moments = {name: torch.from_numpy(arrays[f"{name}/{key}"]).to(parameter) for name in _MOMENTS}
            self.optimizer.state[parameter] = {"step": torch.tensor(float(state["step"])), **moments}
        if f"best/{next(iter(self.named))}" in arrays:
            self.best = {key: torch.from_numpy(arrays[f"best/{key}"]) for key in self.named}
        self.step, self.kept_step, self.stopped = state["step"], state["kept_step"], state["stopped"]
        self.history = [Step(**step) for step in state["history"]]
        if self.judge is not None:
            self.judge.restore(state["judge"])
        self.examples = _examples(arrays, state["prompts"])
        self.notes += [note for note in state["notes"] if note not in self.notes]


def _examples(arrays: Mapping[str, np.ndarray], prompt_ids: Sequence[str]) -> list[Example]:
    """The examples of a checkpoint."""
    flat, table = arrays[EXAMPLES].tolist(), arrays["examples/table"].tolist()
    examples, at = [], 0
    for prompt_id, (length, start, kind, ended, truncated) in zip(prompt_ids, table, strict=True):
        ids = tuple(flat[at : at + length])
        examples.append(Example(prompt_id, ids, start, "harmless" if kind else "harmful", bool(ended), bool(truncated)))
        at += length
    return examples


def _processes() -> tuple[int, int]:
    """Processes that train together, and which one this is."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_world_size(), torch.distributed.get_rank()
    return 1, 0


def _summed(loss: float, gradients: list[Tensor]) -> tuple[float, list[Tensor]]:
    """Sums over all processes."""
    for gradient in gradients:
        torch.distributed.all_reduce(gradient)
    total = torch.tensor(loss, dtype=torch.float64, device=gradients[0].device)
    torch.distributed.all_reduce(total)
    return float(total), gradients
