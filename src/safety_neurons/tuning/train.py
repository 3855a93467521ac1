"""tune: train the rows and columns of a set of neurons on questions and answers, and nothing else.

The loop can be put down after any step and taken up again bit for bit. Every site has a learning rate of its
own, from the size of its weights, under a schedule in which no step's rate is zero.

Adam moves every entry by about the learning rate. Along the direction all entries agree on, a neuron's vector
of `d` weights with root mean square `s` then gains `rate × √d` where it has `s × √d / √d = s` of its own in a
typical direction. With `rate = share × s / √d` one step changes what a neuron computes by about that share of
its size, whatever the model: 2e-5 on an 8 B model (s 0.015, d 4,096, share 0.1), 1e-3 on an organism (s 0.1,
d 64), from where the step size is adapted.

The model is anchored to itself: on harmless examples and general text its divergence from the untouched model
is part of the loss. While training, refusals, over-refusals, divergence and perplexity on held-out prompts
say which state is kept, whether to go on, and (`auto`) how far a step may go.
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
from torch.nn.functional import cross_entropy, kl_div, log_softmax

from safety_neurons.arguments import well_typed
from safety_neurons.counting import numbered
from safety_neurons.errors import InputError, NeuronError, RunError, UnsupportedModelError
from safety_neurons.model import LanguageModel, ranks
from safety_neurons.model.batches import Batch, Halving, collate, descend, forward, plan
from safety_neurons.model.identity import identity
from safety_neurons.model.language_model import takes_padding
from safety_neurons.model.likelihood import widened
from safety_neurons.neurons import NeuronSet, Provenance
from safety_neurons.prompt_lists import Prompts
from safety_neurons.prompt_lists.readers import Source
from safety_neurons.results import rate
from safety_neurons.results.records import plain
from safety_neurons.results.run import Checkpoint, Saved
from safety_neurons.tuning.artefacts import Delta, base_hash, outside_hash
from safety_neurons.tuning.data import (
    ANSWER,
    KINDS,
    Example,
    label_rows,
    mix,
    shuffled,
    text_examples,
    tuning_examples,
    with_own_answers,
)
from safety_neurons.tuning.deltas import Deltas, attach, total_norm, weight_of
from safety_neurons.tuning.settings import Anchored, TuningSettings, checked_rate
from safety_neurons.tuning.stopping import BACK, FINISHED, Checked, StopCheck, StopJudge, TrustRegion

BATCH = 8
"""Examples of a pass where nothing else is asked for."""
TEXT = 0.5
"""Texts the model is anchored on, for each harmless example."""
EXAMPLES = "examples/ids"
LEARNT = "learnt"
"""The part of a step whose tokens are learnt."""
_MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclasses.dataclass(frozen=True)
class TrainingStep:
    """One optimizer step.

    Attributes:
        step: its number, from 1.
        loss: mean over the examples that are learnt, in nats, before the step; the first token of an answer
            weighs as much as all others together.
        norm: of the selected entries' gradient, before clipping.
        factor: share of the full learning rate.
        divergence: the same mean of KL from the untouched model, by kind of example it is anchored on.
        anchor: weight of that.
    """

    step: int
    loss: float
    norm: float
    factor: float
    divergence: Mapping[str, float] = dataclasses.field(default_factory=dict)
    anchor: float = 0.0


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
        self.region = TrustRegion.of(check, settings.anchor, adapts=settings.learning_rate == "auto")
        self.named = deltas.named_parameters()
        groups = [{"params": [parameter], "lr": rates[key]} for key, parameter in self.named.items()]
        self.optimizer = torch.optim.AdamW(groups, weight_decay=settings.weight_decay, foreach=False)
        self.examples: list[Example] = []
        self.history: list[TrainingStep] = []
        self.step, self.kept_step, self.stopped = 0, 0, ""
        self.best: dict[str, Tensor] | None = None
        self.halving = Halving()
        self._divergence: dict[str, float] = {}
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
        order = shuffled([example.kind for example in self.examples], [self.settings.seed, 3, epoch])
        return order[place * size : (place + 1) * size]

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
                share = factor(self.step, steps, self.settings.warmup) * self.region.scale
                anchored, weight = self._divergence, self.region.weight
                self.history.append(TrainingStep(self.step + 1, loss, norm, share, anchored, weight))
                self.region.stepped(anchored, rising=self.step < rising(steps, self.settings.warmup))
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
        start = self._best_sound()
        if self.judge.look(now):
            self.best, self.kept_step = self.deltas.tensors(), self.step
        if self.judge.too_far(now):
            self._go_back(self.judge, start)
        self.stopped = self.judge.verdict()
        if self.region.checked(self.judge, now):  # too far: on from the best sound state, in smaller steps
            self.deltas.load_tensors(self._best_sound())
        self._tell(self.history[-1].loss, now)

    def _best_sound(self) -> dict[str, Tensor]:
        """The best sound state, or the untouched model."""
        if self.best is not None and self.sound:
            return self.best
        return {key: torch.zeros_like(value) for key, value in self.deltas.tensors().items()}

    def _go_back(self, judge: StopJudge, start: Mapping[str, Tensor]) -> None:
        """Look for the largest sound share of the way from the best sound state to one that went too far, by
        halving, and keep what is better; training goes on from where it was.

        Source: Wortsman et al., CVPR 2022 (weights between a model and its fine-tuned self trade what both
        are good at). Differs: between two states of one training, and the share is found on held-out prompts.
        """
        end, low, high = self.deltas.tensors(), 0.0, 1.0
        for _ in range(BACK):
            share = (low + high) / 2
            self.deltas.load_tensors({key: start[key] + share * (end[key] - start[key]) for key in end})
            answers = judge.check.answers(self.model)
            if judge.over_refuses(rate(judge.check.refused(answers))):  # nothing else has to be asked
                high = share
                continue
            between = judge.check.measure(self.model, self.deltas, self.step, answers)
            between = dataclasses.replace(between, share=share)
            low, high = (share, high) if judge.sound(between) else (low, share)
            if judge.improves(between):
                judge.look(between)
                self.best, self.kept_step = self.deltas.tensors(), self.step
        self.deltas.load_tensors(end)

    def _rate(self, highest: float, step: int) -> float:
        return highest * self.region.scale * factor(step, self.steps, self.settings.warmup)

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
        """The gradient of a step's loss, put where the optimizer finds it.

        The mean loss of the examples that are learnt.
        """
        examples = [self.examples[index] for index in self.drawn(step)]
        parts = {LEARNT: [at for at, each in enumerate(examples) if not self._anchored(each)]}
        for kind in KINDS:
            held = [at for at, each in enumerate(examples) if each.kind == kind and self._anchored(each)]
            if held:
                parts[kind] = held
        losses, sums = self._gradients(examples, parts)
        for parameter, *gradients in zip(self.named.values(), *sums.values(), strict=True):
            parameter.grad = gradients[0]
            for gradient in gradients[1:]:
                parameter.grad += gradient
        self._divergence = {kind: loss for kind, loss in losses.items() if kind != LEARNT}
        return losses[LEARNT]

    def _anchored(self, example: Example) -> bool:
        """Whether the model is held to itself on an example, whose tokens are learnt otherwise."""
        return self.settings.anchor > 0 and example.kind != "harmful"

    def _gradients(
        self, examples: Sequence[Example], parts: Mapping[str, Sequence[int]]
    ) -> tuple[dict[str, float], dict[str, list[Tensor]]]:
        """Of every part of a step the mean over its examples and, within each, over its tokens that carry
        loss, and the gradient. Several processes share the passes of a step.

        The first token of an answer weighs as much as all others together: there it is decided whether the
        model refuses.

        Args:
            examples: of the step.
            parts: which of them are learnt by the tokens' own loss, and which, by kind, are held to the
                untouched model: the gradient of their divergence is multiplied by what that weighs.
        """
        sequences = [example.ids for example in examples]
        weights = {at: token_weights(examples[at]) / len(part) for part in parts.values() for at in part}
        parameters, padded = list(self.named.values()), takes_padding(self.model)

        def work(batch: Batch) -> tuple[float, list[Tensor]]:
            rows, targets = label_rows(batch, [examples[at].start for at in batch.indices])
            anchored = self._anchored(examples[batch.indices[0]])
            untouched = self._untouched(batch, rows) if anchored else None
            with torch.enable_grad():
                logits = forward(self.model.model, batch, with_logits=True)
                assert logits is not None
                scores = widened(logits.flatten(0, 1)[rows.to(logits.device)])
                if untouched is None:
                    each = cross_entropy(scores, targets.to(scores.device), reduction="none")
                else:
                    new = log_softmax(scores, -1)
                    each = kl_div(new, untouched, reduction="none", log_target=True).sum(-1)
                loss = each @ torch.cat([weights[at] for at in batch.indices]).to(each)
                weight = self.region.weight if anchored else 1.0
                gradients = torch.autograd.grad(loss * weight, parameters)
            return float(loss.detach()), [ranks.told(gradient) for gradient in gradients]

        passes = [
            (name, [part[at] for at in group])
            for name, part in parts.items()
            for group in plan([len(sequences[at]) for at in part], self.rows, padded=padded)
        ]

        def batch_of(number: int) -> Batch:
            return collate(sequences, passes[number][1], pad_id=self.model.pad_id).to(self.model.device)

        losses = dict.fromkeys(parts, 0.0)
        sums = {name: [torch.zeros_like(parameter) for parameter in parameters] for name in parts}
        done = self.halving.over(range(len(passes)), batch_of, work)
        for (name, _), results in zip(passes, done, strict=True):
            for loss, gradients in results:
                losses[name] += loss
                for whole, gradient in zip(sums[name], gradients, strict=True):
                    whole += gradient.to(whole.device)
        return losses, sums

    def _untouched(self, batch: Batch, rows: Tensor) -> Tensor:
        """Log probabilities of the untouched model at these places of a batch."""
        with torch.no_grad(), self.deltas.disabled():
            logits = forward(self.model.model, batch, with_logits=True)
            assert logits is not None
            return log_softmax(widened(logits.flatten(0, 1)[rows.to(logits.device)]), -1)

    # Checkpoints

    def _save(self) -> None:
        if self.checkpoint is None:
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
        rows = [[len(e.ids), e.start, KINDS.index(e.kind), e.ended, e.truncated] for e in self.examples]
        arrays["examples/table"] = np.asarray(rows, np.int64)
        state = {
            "identity": self.identity,
            "step": self.step,
            "kept_step": self.kept_step,
            "stopped": self.stopped,
            "history": [dataclasses.asdict(step) for step in self.history],
            "judge": self.judge.state() if self.judge else None,
            "region": dataclasses.asdict(self.region),
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
        self.region = dataclasses.replace(self.region, **state["region"])
        if self.judge is not None:
            self.judge.restore(state["judge"])
        self.examples = _examples(arrays, state["prompts"])
        self.notes += [note for note in state["notes"] if note not in self.notes]


def token_weights(example: Example) -> Tensor:
    """The weight of every token of an example that carries loss; together one.

    In an answer half of it is the first token's; general text has none that decides more than the others.
    """
    count = example.n_answer
    weights = torch.full((count,), 1.0 / count, dtype=torch.float64)
    if example.kind != "general" and count > 1:
        weights[:] = 0.5 / (count - 1)
        weights[0] = 0.5
    return weights


def _examples(arrays: Mapping[str, np.ndarray], prompt_ids: Sequence[str]) -> list[Example]:
    """The examples of a checkpoint."""
    flat, table = arrays[EXAMPLES].tolist(), arrays["examples/table"].tolist()
    examples, at = [], 0
    for prompt_id, (length, start, kind, ended, truncated) in zip(prompt_ids, table, strict=True):
        ids = tuple(flat[at : at + length])
        examples.append(Example(prompt_id, ids, start, KINDS[kind], bool(ended), bool(truncated)))
        at += length
    return examples


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
        examples: how many `harmful`, `harmless` and `general` examples there were, and their `tokens` with
            loss.
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


@well_typed
@contextlib.contextmanager
def beside(model: LanguageModel, delta: Delta) -> Iterator[LanguageModel]:
    """The model with a delta beside its weights for a block, whatever they are (quantised, adapted): the
    float32 change, not rounded.

    Source: none; `applied` is the same with the change written into the weights.
    """
    with attach(model, delta.neurons) as deltas:
        deltas.load_tensors(delta.tensors)
        yield model


@well_typed
def tune(
    model: LanguageModel,
    neurons: NeuronSet,
    dataset: Source = "builtin:refusals-wide",
    *,
    harmless: Source | None = "builtin:harmless-wide",
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
        **settings: `general`, text the model is anchored on too (None for none), and fields of
            `TuningSettings`: `mix`, `learning_rate`, `epochs`, `max_steps`, `batch_size`,
            `seed`, ….

    Raises:
        NeuronError: the set is empty, or nothing of it is left. ForeignModelError: it is another
        architecture's. InputError: data without answers. UsageError: no step, a learning rate of zero, an
        unknown setting. NumericalError: the loss is not a number. ModelError: one example does not fit in
        memory. RunError: a checkpoint cannot be written (the previous one is whole), or is another
        configuration's.

    Source: Zhao et al., ICLR 2025, section 4 (SN-Tune); with foundation neurons taken out of the set, section
    4.3 (RSN-Tune). Differs: whole sets instead of a hundred entries a matrix; gate and o too; loss on the
    answer alone, half of it on its first token; the end of the answer is taught; the model is anchored to
    itself on harmless examples and text; rates relative to the weights and adapted. The
    published recipe (50 documents, 32 a step, warm-up of one step) does not move a
    weight: its only step has a learning rate of zero.
    """
    general = settings.pop("general", Anchored().general)
    chosen = TuningSettings.of(**settings)
    chosen.check()
    placed = to_train(model, neurons, protect)
    data, others = (
        model.prompts(dataset),
        None if harmless is None or not chosen.mix else model.prompts(harmless),
    )
    text = None if general is None or not chosen.mix * chosen.anchor else model.prompts(general)
    own = _identity(chosen, model, placed, (data, others, text), check)
    notes = list(placed.notes)
    before = _hash(model, placed, notes)
    rates = learning_rates(model, placed, chosen.learning_rate)
    with attach(model, placed) as deltas:
        loop = Loop(deltas, rates, chosen, check, checkpoint, own, notes, progress)
        if not loop.resume():
            loop.examples = prepared_examples(model, data, others, text, chosen, notes)
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
    sizes: dict[str, int] = {kind: sum(example.kind == kind for example in loop.examples) for kind in KINDS}
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


def to_train(model: LanguageModel, neurons: NeuronSet, protect: NeuronSet | None) -> NeuronSet:
    """The set on this model, without what is protected.

    Raises:
        NeuronError: the set is empty, or nothing of it is left.
    """
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


def prepared_examples(
    model: LanguageModel,
    dataset: Prompts,
    harmless: Prompts | None,
    general: Prompts | None,
    settings: TuningSettings,
    notes: list[str],
) -> list[Example]:
    """What is learnt: all of the data, and harmless examples and text for it."""
    harmful = tuning_examples(dataset, model, max_length=settings.max_length, notes=notes)
    drawn = [] if general is None else text_examples(general, model, max_length=settings.max_length)
    texts = mix(harmful, drawn, TEXT * settings.mix, settings.seed)[len(harmful) :]
    if harmless is None:
        return [*harmful, *texts]
    wanted = round(settings.mix * len(harmful))
    answered = with_own_answers(
        harmless[: max(wanted, 1)] if _answerless(harmless) else harmless,
        model,
        max_new_tokens=ANSWER,
        notes=notes,
    )
    if not len(answered):
        raise InputError(
            f"{harmless.name}: no harmless prompt with a usable answer; give answers, or leave harmless "
            "examples out"
        )
    others = tuning_examples(answered, model, kind="harmless", max_length=settings.max_length, notes=notes)
    if len(others) < wanted:
        notes.append(
            f"mix {settings.mix:g} asks for {numbered(wanted, 'harmless example')}, "
            f"{harmless.name} gives {len(others)}"
        )
    return [*mix(harmful, others, settings.mix, settings.seed), *texts]


def _answerless(prompts: Prompts) -> bool:
    return not any(prompt.answer for prompt in prompts)


def _identity(
    settings: TuningSettings,
    model: LanguageModel,
    neurons: NeuronSet,
    prompts: tuple[Prompts, Prompts | None, Prompts | None],
    check: StopCheck | None,
) -> dict[str, Any]:
    """What a checkpoint has to agree with; all of the model, since its other weights and their type decide
    what the set learns.
    """
    watched = (
        None
        if check is None
        else {field.name: getattr(check, field.name) for field in dataclasses.fields(check) if field.init}
    )
    if watched is not None:
        del watched["refused"], watched["batch_size"]
        watched |= {
            name: None if watched[name] is None else watched[name].sha256
            for name in ("harmful", "harmless", "text")
        }
    dataset, harmless, general = prompts
    of_model = identity(model)
    return {
        "dtype": of_model.pop("dtype"),
        **of_model,
        "neurons": hashlib.sha256(
            b"".join(key.encode() + indices.tobytes() for key, indices in neurons.items())
        ).hexdigest(),
        "dataset": dataset.sha256,
        "harmless": harmless.sha256 if harmless is not None else None,
        "general": general.sha256 if general is not None else None,
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


SHARE = 0.1
"""Of a neuron's size that one step at the full rate changes."""
LAST = 0.1
"""Of the full rate that the last step has."""
_USUAL = 0.02
"""Root mean square of a weight where none can be read (quantised beyond reading, or off-loaded)."""


@well_typed
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
    first = rising(steps, warmup)
    if step < first:
        return (step + 1) / first
    return 1 - (1 - LAST) * (step - first + 1) / max(1, steps - first)


def rising(steps: int, warmup: float) -> int:
    """Steps over which the rate rises."""
    return max(1, round(warmup * steps))
