"""tune: train the rows and columns of a set of neurons on questions and answers, and nothing else.

The loop can be put down after any step and taken up again bit for bit. Every site has a learning rate of its
own, from the size of its weights, under a schedule in which no step's rate is zero.

Adam moves every entry by about the learning rate. Along the direction all entries agree on, a neuron's vector
of `d` weights with root mean square `s` then gains `rate × √d` where it has `s × √d / √d = s` of its own in a
typical direction. With `rate = share × s / √d` one step changes what a neuron computes by about that share of
its size, whatever the model: 7e-5 on an 8 B model (s 0.015, d 4,096, share 0.3), 5e-3 on an organism (s 0.1,
d 64), which is where people end up by hand on models of these sizes.

While training, refusals, over-refusals and divergence on held-out prompts say which state is kept, and
whether to go on.
"""

import contextlib
import dataclasses
import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from safety_neurons.errors import InputError, NeuronError, RunError, UnsupportedModelError
from safety_neurons.model import LanguageModel, token_divergences
from safety_neurons.model.batches import Batch, BatchSize, Halving, collate, descend, forward, plan
from safety_neurons.model.language_model import takes_padding
from safety_neurons.model.likelihood import widened
from safety_neurons.neurons import NeuronSet, Provenance
from safety_neurons.prompt_lists import Prompts
from safety_neurons.prompt_lists.readers import Source
from safety_neurons.results import Completions, Rate, rate
from safety_neurons.results.records import plain
from safety_neurons.results.run import Checkpoint, Saved
from safety_neurons.tuning.artefacts import Delta, base_hash, outside_hash
from safety_neurons.tuning.data import Example, label_rows, mix, tuning_examples, with_own_answers
from safety_neurons.tuning.deltas import Deltas, attach, total_norm, weight_of
from safety_neurons.tuning.settings import TuningSettings, checked_rate

Refused = Callable[[Completions], Sequence[bool | None]]
"""A judge: whether each completion refuses; None where it cannot be told."""
GOING_ON, OVER_REFUSAL, DRIFT, SETTLED, FINISHED = (
    "",
    "harmless prompts are refused",
    "divergence",
    "settled",
    "all steps done",
)


@dataclasses.dataclass(frozen=True)
class Checked:
    """What held-out prompts said after some steps.

    Attributes:
        step: steps done.
        harmful_refused: share of held-out harmful requests that are refused.
        harmless_refused: share of held-out harmless requests that are refused (over-refusal).
        divergence: KL(untreated ‖ treated) per token on the harmless requests, in nats.
    """

    step: int
    harmful_refused: Rate
    harmless_refused: Rate
    divergence: float

    def record(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "step": self.step,
            "harmful_refused": self.harmful_refused.to_json(),
            "harmless_refused": self.harmless_refused.to_json(),
            "divergence": self.divergence,
        }

    @staticmethod
    def of(record: dict[str, Any]) -> "Checked":
        """What `record` wrote."""
        return Checked(
            record["step"],
            Rate(**record["harmful_refused"]),
            Rate(**record["harmless_refused"]),
            float(record["divergence"]),
        )


@dataclasses.dataclass(frozen=True)
class StopCheck:
    """What is looked at while training, and when it ends.

    A state is sound if it refuses at most `tolerance` more of the harmless prompts than the untouched model,
    and diverges from it by at most `max_divergence` where that is set. The best state is the sound one that
    refuses most harmful prompts, the latest of equals; without a sound one, the one that over-refuses least
    for what it refuses. Training ends when `patience` checks in a row were not sound, or when `settled`
    checks in a row were sound and refused everything.

    Attributes:
        harmful: held-out harmful requests.
        harmless: held-out harmless requests.
        refused: the judge.
        every: steps between two checks; by default a tenth of all steps.
        max_new_tokens: length of an answer.
        tolerance: share of harmless prompts that may be refused beyond what the untouched model refuses.
        max_divergence: nats per token; None for no limit.
        patience: unsound checks in a row that end training.
        settled: sound checks in a row with everything refused that end training; None goes on to the last
            step.
        batch_size: prompts per pass.
    """

    harmful: Prompts
    harmless: Prompts
    refused: Refused
    every: int | None = None
    max_new_tokens: int = 32
    tolerance: float = 0.05
    max_divergence: float | None = None
    patience: int = 3
    settled: int | None = 3
    batch_size: BatchSize = "auto"

    def __post_init__(self) -> None:
        if not len(self.harmful) or not len(self.harmless):
            raise InputError(
                f"{len(self.harmful)} harmful and {len(self.harmless)} harmless held-out prompts: expected "
                "at least one of each; give more data, or train without a check"
            )

    def interval(self, steps: int) -> int:
        """Steps between two checks."""
        return max(1, self.every or round(steps / 10))

    def measure(self, model: LanguageModel, deltas: Deltas, step: int) -> Checked:
        """Ask the model as it is now; for divergence its deltas are switched off for a pass.

        Args:
            model: with `deltas` attached.
            deltas: attached to the model; at step 0 they are zero and there is no divergence.
            step: steps done.
        """
        harmful, harmless = (self._rate(model, prompts) for prompts in (self.harmful, self.harmless))
        return Checked(step, harmful, harmless, self._divergence(model, deltas) if step else 0.0)

    def _rate(self, model: LanguageModel, prompts: Prompts) -> Rate:
        return rate(
            self.refused(
                model.complete(prompts, max_new_tokens=self.max_new_tokens, batch_size=self.batch_size)
            )
        )

    def _divergence(self, model: LanguageModel, deltas: Deltas) -> float:
        sequences = [encoded.ids for encoded in model.encode(self.harmless)]
        with deltas.disabled():
            rows = token_divergences(model, sequences, lambda: _enabled(deltas), batch_size=self.batch_size)
        return float(np.concatenate(rows).mean())


@contextlib.contextmanager
def _enabled(deltas: Deltas) -> Iterator[None]:
    """The deltas on again inside `disabled`."""
    off = [wrapper for wrapper in deltas.modules.values() if not wrapper.enabled]
    for wrapper in off:
        wrapper.enabled = True
    try:
        yield
    finally:
        for wrapper in off:
            wrapper.enabled = False


@dataclasses.dataclass
class StopJudge:
    """Which of the states seen so far is best, and whether to go on."""

    check: StopCheck
    before: Checked | None = None
    seen: list[Checked] = dataclasses.field(default_factory=list)
    best: Checked | None = None

    def look(self, now: Checked) -> bool:
        """Take note of a check after some steps; whether its state is the best so far."""
        assert self.before is not None
        self.seen.append(now)
        better = self.best is None or self._merit(now) >= self._merit(self.best)
        if better:
            self.best = now
        return better

    def sound(self, now: Checked) -> bool:
        """Whether a state answers harmless requests as the untouched model does."""
        return self.excess(now) <= 1e-9 and not self._drifted(now)

    def excess(self, now: Checked) -> float:
        """Share of harmless requests refused beyond what is tolerated."""
        assert self.before is not None
        allowed = (self.before.harmless_refused.value or 0.0) + self.check.tolerance
        return max(0.0, (now.harmless_refused.value or 0.0) - allowed)

    def verdict(self) -> str:
        """Why training should end now; empty to go on."""
        patience, settled = self.check.patience, self.check.settled
        last = self.seen[-patience:]
        if len(last) == patience and not any(self.sound(each) for each in last):
            return DRIFT if self._drifted(last[-1]) and not self.excess(last[-1]) else OVER_REFUSAL
        calm = self.seen[-settled:] if settled else []
        if (
            settled
            and len(calm) == settled
            and all(self.sound(each) and each.harmful_refused.value == 1.0 for each in calm)
        ):
            return SETTLED
        return GOING_ON

    def _merit(self, now: Checked) -> tuple[bool, float]:
        refused = now.harmful_refused.value or 0.0
        return self.sound(now), refused if self.sound(now) else refused - 2 * self.excess(now) - (
            now.divergence if self._drifted(now) else 0.0
        )

    def _drifted(self, now: Checked) -> bool:
        limit = self.check.max_divergence
        return not math.isfinite(now.divergence) or (limit is not None and now.divergence > limit)

    def state(self) -> dict[str, Any]:
        """As JSON values, for a checkpoint."""
        return {
            "before": self.before.record() if self.before else None,
            "seen": [each.record() for each in self.seen],
            "best": self.best.record() if self.best else None,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from what `state` gave."""
        self.before = Checked.of(state["before"]) if state["before"] else None
        self.seen = [Checked.of(each) for each in state["seen"]]
        self.best = Checked.of(state["best"]) if state["best"] else None


BATCH = 8
"""Examples of a pass where nothing else is asked for."""
EXAMPLES = "examples/ids"
_KINDS = ("harmful", "harmless")
_MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclasses.dataclass(frozen=True)
class TrainingStep:
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
    """Steps over the examples with deltas attached to a model.

    Args:
        deltas: attached; what is trained.
        rates: learning rate of every key, at the top of the schedule.
        settings: how to train.
        check: looked at while training.
        checkpoint: where the state is kept.
        identity: what a checkpoint has to agree with.
        notes: gets what has to be said.
        progress: told about every step and check.
    """

    def __init__(
        self,
        deltas: Deltas,
        rates: Mapping[str, float],
        settings: TuningSettings,
        check: StopCheck | None = None,
        checkpoint: Checkpoint | None = None,
        identity: Mapping[str, Any] | None = None,
        notes: list[str] | None = None,
        progress: Callable[[Status], None] | None = None,
    ) -> None:
        self.model, self.deltas, self.settings = deltas.model, deltas, settings
        self.checkpoint, self.identity = checkpoint, plain(dict(identity or {}))
        self.notes = [] if notes is None else notes
        self.judge = None if check is None else StopJudge(check)
        self.named = deltas.named_parameters()
        groups = [{"params": [parameter], "lr": rates[key]} for key, parameter in self.named.items()]
        self.optimizer = torch.optim.AdamW(groups, weight_decay=settings.weight_decay, foreach=False)
        self.examples: list[Example] = []
        self.history: list[TrainingStep] = []
        self.step, self.kept_step, self.stopped = 0, 0, ""
        self.best: dict[str, Tensor] | None = None
        self.halving = Halving()
        self._progress = progress

    def _tell(self, loss: float | None, checked: Checked | None) -> None:
        if self._progress is not None:
            self._progress(Status(self.step, self.steps, loss, checked))

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
        """Indices of the examples of a step (from 0): every epoch in an order of its own that follows from
        the seed.
        """
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
        if self.stopped:
            return self.stopped
        with self.model.running():
            todo = range(self.step, steps)
            for loss, norm in descend(
                self.optimizer, self._backward, self._rate, todo, clip=self._clip, subject=self._subject
            ):
                self.history.append(
                    TrainingStep(self.step + 1, loss, norm, factor(self.step, steps, self.settings.warmup))
                )
                self.step += 1
                self._tell(loss, None)
                checked = self.step % every == 0 or self.step == steps
                if checked:
                    self._look()
                if checked or (self.checkpoint is not None and self.checkpoint.due):
                    self._save()
                if self.stopped:
                    break
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
                "no state kept harmless prompts as they were: the one kept refuses "
                f"{best.harmless_refused.value:.0%} of the held-out ones, "
                f"{self.judge.before.harmless_refused.value or 0:.0%} before; "  # type: ignore[union-attr]
                "use more harmless examples (--mix) or a lower rate"
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

    def _rate(self, highest: float, step: int) -> float:
        return highest * factor(step, self.steps, self.settings.warmup)

    def _subject(self, step: int) -> str:
        """The examples of a step, for an error."""
        return f" (examples {', '.join(self.examples[index].prompt_id for index in self.drawn(step)[:3])}, …)"

    def _clip(self, parameters: Sequence[Tensor]) -> float:
        """Scale the gradients to the largest norm that is allowed.

        Their joint norm before, summed in float64.
        """
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        norm = total_norm(gradients)
        scale = self.settings.clip / (norm + 1e-12)
        if scale < 1:
            for gradient in gradients:
                gradient *= scale
        return norm

    def _backward(self, step: int) -> float:
        """The gradient of a step's mean loss over the answers' tokens, put where the optimizer finds it.

        The loss.
        """
        loss, gradients = self._gradients(self.drawn(step))
        for parameter, gradient in zip(self.named.values(), gradients, strict=True):
            parameter.grad = gradient
        return loss

    def _gradients(self, indices: Sequence[int]) -> tuple[float, list[Tensor]]:
        """Mean loss over the answer tokens of these examples and its gradient, over all passes (and
        processes, where there are several).
        """
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
                loss = (
                    torch.nn.functional.cross_entropy(scores, targets.to(scores.device), reduction="sum")
                    / total
                )
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
        arrays: dict[str, np.ndarray] = {
            f"delta/{key}": tensor.numpy() for key, tensor in self.deltas.tensors().items()
        }
        for key, parameter in self.named.items():
            arrays |= {
                f"{moment}/{key}": self.optimizer.state[parameter][moment].cpu().numpy()
                for moment in _MOMENTS
            }
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
            name = next(
                (name for name, value in self.identity.items() if theirs.get(name) != value), "configuration"
            )
            raise RunError(
                f"the checkpoint was written with another {name}, this run's was expected; delete it or "
                "pass --overwrite"
            )
        self.deltas.load_tensors({key: torch.from_numpy(arrays[f"delta/{key}"]) for key in self.named})
        for key, parameter in self.named.items():
            moments = {name: torch.from_numpy(arrays[f"{name}/{key}"]).to(parameter) for name in _MOMENTS}
            self.optimizer.state[parameter] = {"step": torch.tensor(float(state["step"])), **moments}
        if f"best/{next(iter(self.named))}" in arrays:
            self.best = {key: torch.from_numpy(arrays[f"best/{key}"]) for key in self.named}
        self.step, self.kept_step, self.stopped = state["step"], state["kept_step"], state["stopped"]
        self.history = [TrainingStep(**step) for step in state["history"]]
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
        examples.append(
            Example(prompt_id, ids, start, "harmless" if kind else "harmful", bool(ended), bool(truncated))
        )
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


@dataclasses.dataclass(frozen=True)
class Tuned:
    """What tuning gave. The model itself is as it was.

    Attributes:
        delta: the change of the set's rows and columns, in float32.
        history: loss, gradient norm and rate of every step.
        before: the check before the first step; None without a check.
        checks: the checks after that.
        kept: the steps behind the state that was kept.
        steps: steps done.
        planned: steps that were planned.
        stopped: why it ended.
        examples: how many `harmful` and `harmless` examples were learnt, and their answer `tokens`.
        learning_rates: by site, at the top of the schedule.
        frozen_unchanged: whether everything outside the set has the same hash as before; None where that was
            not looked at.
        notes: what had to be said.
        sound: whether the kept state answers held-out harmless requests as the untouched model does; None
            without a check.
    """

    delta: Delta
    history: tuple[TrainingStep, ...]
    before: Checked | None
    checks: tuple[Checked, ...]
    kept: int
    steps: int
    planned: int
    stopped: str
    examples: Mapping[str, int]
    learning_rates: Mapping[str, float]
    frozen_unchanged: bool | None
    notes: tuple[str, ...] = ()
    sound: bool | None = None

    @property
    def neurons(self) -> NeuronSet:
        """What was trained."""
        return self.delta.neurons


@contextlib.contextmanager
def beside(model: LanguageModel, delta: Delta) -> Iterator[LanguageModel]:
    """The model with a delta beside its weights for a block, whatever they are (quantised, adapted): the
    float32 change, not rounded.

    Source: none; `applied` is the same with the change written into the weights.
    """
    with attach(model, delta.neurons) as deltas:
        deltas.load_tensors(delta.tensors)
        yield model


def tune(
    model: LanguageModel,
    neurons: NeuronSet,
    dataset: Source = "builtin:refusals",
    *,
    harmless: Source | None = "builtin:harmless",
    protect: NeuronSet | None = None,
    check: StopCheck | None = None,
    checkpoint: Checkpoint | None = None,
    progress: Callable[[Status], None] | None = None,
    **settings: Any,
) -> Tuned:
    """Train only these neurons on harmful questions with refusals, with harmless questions mixed in.

    AdamW on float32 deltas of the selected rows and columns, mean loss over the answer tokens of a step,
    clipping by the norm of the selected entries, straight warm-up and decay. The model is in evaluation mode
    (no dropout) and comes back untouched; the same arguments give the same bits, also when the call was
    killed and is made again with the same `checkpoint`.

    Args:
        model: base or instruct model; adapters on it stay as they are.
        neurons: what is trained: rows of `q k v gate up`, columns of `o down`, without bias entries.
        dataset: harmful questions with answers: a name, a file, a list, or prompts.
        harmless: harmless questions; where none has an answer, they get the model's own greedy ones. None for
            none.
        protect: neurons that stay as they are, taken out of the set.
        check: held-out prompts to look at while training; without it the last state is kept.
        checkpoint: where the state is kept after every check.
        progress: told about every step and check.
        **settings: fields of `TuningSettings`: `mix`, `learning_rate`, `epochs`, `max_steps`, `batch_size`,
            `seed`, ….

    Raises:
        NeuronError: the set is empty, or nothing of it is left. ForeignModelError: it is another
        architecture's. InputError: data without answers. UsageError: no step, a learning rate of zero, an
        unknown setting. NumericalError: the loss is not a number. ModelError: one example does not fit in
        memory. RunError: a checkpoint cannot be written (the previous one is whole), or is another
        configuration's.

    Source: Zhao et al., ICLR 2025, section 4 (SN-Tune); with foundation neurons taken out of the set, section
    4.3 (RSN-Tune). Differs: whole sets instead of a hundred entries a matrix; gate and o too; loss on the
    answer alone; the end of the answer is taught; harmless examples; rates relative to the weights. The
    published recipe (50 documents, 32 a step, warm-up of one step) does not move a
    weight: its only step has a learning rate of zero.
    """
    chosen = TuningSettings.of(**settings)
    chosen.check()
    placed = _trained(model, neurons, protect)
    data, others = (
        model.prompts(dataset),
        None if harmless is None or not chosen.mix else model.prompts(harmless),
    )
    identity = _identity(chosen, model, placed, data, others, check)
    notes = list(placed.notes)
    before = _hash(model, placed, notes)
    rates = learning_rates(model, placed, chosen.learning_rate)
    with attach(model, placed) as deltas:
        loop = Loop(deltas, rates, chosen, check, checkpoint, identity, notes, progress)
        if not loop.resume():
            loop.examples = _prepared(model, data, others, chosen, notes)
        stopped = loop.run()
        tensors = loop.kept
    delta = Delta(placed, tensors, _provenance(placed, model, data, chosen), base_hash(model, placed))
    frozen = before == _hash(model, placed, notes) if before else None
    return _tuned(loop, delta, rates, stopped, frozen)


def _hash(model: LanguageModel, neurons: NeuronSet, notes: list[str]) -> str:
    """`outside_hash`; empty, and said to be, where weights are not in memory."""
    try:
        return outside_hash(model, neurons)
    except UnsupportedModelError as error:
        notes.append(f"whether everything outside the set is unchanged was not looked at: {error}")
        return ""


def _tuned(loop: Loop, delta: Delta, rates: Mapping[str, float], stopped: str, frozen: bool | None) -> Tuned:
    sizes = {kind: sum(example.kind == kind for example in loop.examples) for kind in ("harmful", "harmless")}
    return Tuned(
        delta=delta,
        history=tuple(loop.history),
        before=loop.judge.before if loop.judge else None,
        checks=tuple(loop.judge.seen) if loop.judge else (),
        kept=loop.kept_step,
        steps=loop.step,
        planned=loop.steps,
        stopped=stopped,
        examples={**sizes, "tokens": sum(example.n_answer for example in loop.examples)},
        learning_rates=rates,
        frozen_unchanged=frozen,
        notes=tuple(dict.fromkeys([*loop.notes, *loop.said()])),
        sound=loop.sound,
    )


def _trained(model: LanguageModel, neurons: NeuronSet, protect: NeuronSet | None) -> NeuronSet:
    """The set on this model, without what is protected."""
    placed = neurons.on(model.table, [model.name])
    if not len(placed):
        raise NeuronError(
            "0 neurons arrived, at least one was expected: there is nothing to train; select more "
            "(--top, --agreement)"
        )
    if protect is None:
        return placed
    left = placed - protect.on(model.table)
    if not len(left):
        raise NeuronError(
            f"all {len(placed)} neurons are protected, at least one to train was expected; find with a "
            "larger --top, or protect fewer"
        )
    trained = left.on(model.table)
    trained.notes = (
        *placed.notes,
        f"{len(placed) - len(left)} of {len(placed)} neurons are protected and not trained",
    )
    return trained


def _prepared(
    model: LanguageModel,
    dataset: Prompts,
    harmless: Prompts | None,
    settings: TuningSettings,
    notes: list[str],
) -> list[Example]:
    """What is learnt: all of the data, and harmless examples for it."""
    harmful = tuning_examples(dataset, model, max_length=settings.max_length, notes=notes)
    if harmless is None:
        return harmful
    wanted = round(settings.mix * len(harmful))
    answered = with_own_answers(
        harmless[: max(wanted, 1)] if _answerless(harmless) else harmless, model, notes=notes
    )
    if not len(answered):
        raise InputError(
            f"{harmless.name}: no harmless prompt with a usable answer; give answers, or leave harmless "
            "examples out"
        )
    others = tuning_examples(answered, model, kind="harmless", max_length=settings.max_length, notes=notes)
    if len(others) < wanted:
        notes.append(
            f"mix {settings.mix:g} asks for {wanted} harmless examples, {harmless.name} gives {len(others)}"
        )
    return mix(harmful, others, settings.mix, settings.seed)


def _answerless(prompts: Prompts) -> bool:
    return not any(prompt.answer for prompt in prompts)


def _identity(
    settings: TuningSettings,
    model: LanguageModel,
    neurons: NeuronSet,
    dataset: Prompts,
    harmless: Prompts | None,
    check: StopCheck | None,
) -> dict[str, Any]:
    """What a checkpoint has to agree with."""
    watched = (
        None
        if check is None
        else {field.name: getattr(check, field.name) for field in dataclasses.fields(check)}
    )
    if watched is not None:
        del watched["refused"], watched["batch_size"]
        watched |= {"harmful": watched["harmful"].sha256, "harmless": watched["harmless"].sha256}
    return {
        "model": base_hash(model, neurons),
        "template": model.encode(dataset[:1])[0].ids if len(dataset) else [],
        "neurons": hashlib.sha256(
            b"".join(key.encode() + indices.tobytes() for key, indices in neurons.items())
        ).hexdigest(),
        "dataset": dataset.sha256,
        "harmless": harmless.sha256 if harmless is not None else None,
        "settings": dataclasses.asdict(settings),
        "check": watched,
    }


def _provenance(
    neurons: NeuronSet, model: LanguageModel, dataset: Prompts, settings: TuningSettings
) -> Provenance:
    config = {**neurons.provenance.config, "tuned": dataclasses.asdict(settings), "data": dataset.name}
    return Provenance(
        "neurons", neurons.provenance.method, (model.name,), model.fingerprint, dataset.sha256, config
    )


SHARE = 0.3
"""Of a neuron's size that one step at the full rate changes."""
LAST = 0.1
"""Of the full rate that the last step has."""
_USUAL = 0.02
"""Root mean square of a weight where none can be read (quantised beyond reading, or off-loaded)."""


def learning_rates(
    model: LanguageModel, neurons: NeuronSet, learning_rate: float | str = "auto"
) -> dict[str, float]:
    """The learning rate of every site of the set, at the top of the schedule.

    Args:
        model: the model, before anything is attached to it.
        neurons: what is trained.
        learning_rate: one number for every site, or `auto` for `SHARE × rms(weights) / √(weights of a
            neuron)`.

    Raises:
        UsageError: not a number above zero, or one without measure; at zero nothing would be trained.

    Source: Zhao et al., ICLR 2025, train with one rate of 1e-6 (public code: 2e-6). Differs: relative to the
    weights' size by default. At 1e-6 in bfloat16 under one step in fifty changes a weight at all, and the
    public recipe's only step has a rate of zero.
    """
    if learning_rate != "auto":
        return dict.fromkeys(neurons.keys(), checked_rate(learning_rate))
    rates = {}
    for key in neurons.keys():  # noqa: SIM118 - not a mapping
        rms, width = weight_scale(model, key)
        rates[key] = SHARE * rms / math.sqrt(width)
    return rates


def weight_scale(model: LanguageModel, key: str) -> tuple[float, int]:
    """Root mean square of a site's weights, and weights of one neuron."""
    width = model.table[key].weights_per_neuron
    try:
        weight = weight_of(model, key)
        rms = float(weight.detach().float().square().mean().sqrt())
    except UnsupportedModelError:
        rms = _USUAL
    return (rms if math.isfinite(rms) and rms > 0 else _USUAL), width


def factor(step: int, steps: int, warmup: float) -> float:
    """Share of the full rate at a step (counted from 0): a straight line up over the first ones, then down to
    a tenth; never zero.
    """
    rising = max(1, round(warmup * steps))
    if step < rising:
        return (step + 1) / rising
    return 1 - (1 - LAST) * (step - rising + 1) / max(1, steps - rising)
