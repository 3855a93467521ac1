"""tune: train the rows and columns of a set of neurons on questions and answers, and nothing else."""

import contextlib
import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from safety_neurons.errors import InputError, NeuronError, UnsupportedModelError
from safety_neurons.model import LanguageModel
from safety_neurons.neurons import NeuronSet, Provenance
from safety_neurons.prompts import Prompts
from safety_neurons.prompts.readers import Source
from safety_neurons.results.checkpoint import Checkpoint
from safety_neurons.tuning.artefacts import Delta, base_hash, outside_hash
from safety_neurons.tuning.attach import attach
from safety_neurons.tuning.data import Example, mix, read, tuning_examples, with_own_answers
from safety_neurons.tuning.loop import Loop, Settings, Status, Step
from safety_neurons.tuning.rates import learning_rates
from safety_neurons.tuning.stopping import Checked, StopCheck


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
        frozen_unchanged: whether everything outside the set has the same hash as before; None where that was not looked at.
        notes: what had to be said.
        sound: whether the kept state answers held-out harmless requests as the untouched model does; None without a check.
    """

    delta: Delta
    history: tuple[Step, ...]
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
    """The model with a delta beside its weights for a block, whatever they are (quantised, adapted): the float32 change, not rounded.

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
    verify_frozen: bool = True,
    progress: Callable[[Status], None] | None = None,
    **settings: Any,
) -> Tuned:
    """Train only these neurons on harmful questions with refusals, with harmless questions mixed in.

    AdamW on float32 deltas of the selected rows and columns, mean loss over the answer tokens of a step, clipping by the norm of the
    selected entries, straight warm-up and decay. The model is in evaluation mode (no dropout) and comes back untouched; the same
    arguments give the same bits, also when the call was killed and is made again with the same `checkpoint`.

    Args:
        model: base or instruct model; adapters on it stay as they are.
        neurons: what is trained: rows of `q k v gate up`, columns of `o down`, without bias entries.
        dataset: harmful questions with answers: a name, a file, a list, or prompts.
        harmless: harmless questions; where none has an answer, they get the model's own greedy ones. None for none.
        protect: neurons that stay as they are, taken out of the set.
        check: held-out prompts to look at while training; without it the last state is kept.
        checkpoint: where the state is kept after every check.
        verify_frozen: hash everything outside the set before and after.
        progress: told about every step and check.
        **settings: any field of `Settings`: `mix`, `learning_rate`, `epochs`, `max_steps`, `batch_size`, `accumulate`, `warmup`,
            `clip`, `weight_decay`, `max_length`, `seed`.

    Raises:
        NeuronError: the set is empty, or nothing of it is left. ForeignModelError: it is another architecture's.
        InputError: data without answers. UsageError: no step, a learning rate of zero, an unknown setting.
        NumericalError: the loss is not a number. ModelError: one example does not fit in memory.
        RunError: a checkpoint cannot be written (the previous one is whole), or is another configuration's.

    Source: Zhao et al., ICLR 2025, section 4 (SN-Tune); with foundation neurons taken out of the set, section 4.3 (RSN-Tune).
    Differs: whole sets instead of a hundred entries a matrix; gate and o too; loss on the answer alone; the end of the answer is taught;
    harmless examples; rates relative to the weights. The published recipe (50 documents, 32 a step, warm-up of one step) does not move a
    weight: its only step has a learning rate of zero.
    """
    chosen = Settings.of(settings)
    placed = _trained(model, neurons, protect)
    data, others = read(dataset, model), None if harmless is None or not chosen.mix else read(harmless, model)
    identity = _identity(chosen, model, placed, data, others, check)
    notes = list(placed.notes)
    before = _hash(model, placed, notes) if verify_frozen else ""
    rates = learning_rates(model, placed, chosen.learning_rate)
    with attach(model, placed) as deltas:
        loop = Loop(model, deltas, rates, chosen, check, checkpoint, identity, notes, progress)
        if not loop.resume():
            loop.examples = _examples(model, data, others, chosen, notes)
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
        raise NeuronError("0 neurons arrived, at least one was expected: there is nothing to train; select more (--top, --agreement)")
    if protect is None:
        return placed
    left = placed - protect.on(model.table)
    if not len(left):
        raise NeuronError(
            f"all {len(placed)} neurons are protected, at least one to train was expected; find with a larger --top, or protect fewer"
        )
    kept = left.on(model.table)
    kept.notes = (*placed.notes, f"{len(placed) - len(left)} of {len(placed)} neurons are protected and not trained")
    return kept


def _examples(model: LanguageModel, dataset: Prompts, harmless: Prompts | None, settings: Settings, notes: list[str]) -> list[Example]:
    """What is learnt: all of the data, and harmless examples for it."""
    harmful = tuning_examples(dataset, model, max_length=settings.max_length, notes=notes)
    if harmless is None:
        return harmful
    wanted = round(settings.mix * len(harmful))
    answered = with_own_answers(harmless[: max(wanted, 1)] if _answerless(harmless) else harmless, model, notes=notes)
    if not len(answered):
        raise InputError(f"{harmless.name}: no harmless prompt with a usable answer; give answers, or leave harmless examples out")
    others = tuning_examples(answered, model, kind="harmless", max_length=settings.max_length, notes=notes)
    if len(others) < wanted:
        notes.append(f"mix {settings.mix:g} asks for {wanted} harmless examples, {harmless.name} gives {len(others)}")
    return mix(harmful, others, settings.mix, settings.seed)


def _answerless(prompts: Prompts) -> bool:
    return not any(prompt.answer for prompt in prompts)


def _identity(
    settings: Settings, model: LanguageModel, neurons: NeuronSet, dataset: Prompts, harmless: Prompts | None, check: StopCheck | None
) -> dict[str, Any]:
    """What a checkpoint has to agree with."""
    told = None if check is None else {field.name: getattr(check, field.name) for field in dataclasses.fields(check)}
    if told is not None:
        del told["refused"], told["batch_size"]
        told |= {"harmful": told["harmful"].sha256, "harmless": told["harmless"].sha256}
    return {
        "model": base_hash(model, neurons),
        "template": model.encode(dataset[:1])[0].ids if len(dataset) else [],
        "neurons": hashlib.sha256(b"".join(key.encode() + indices.tobytes() for key, indices in neurons.items())).hexdigest(),
        "dataset": dataset.sha256,
        "harmless": harmless.sha256 if harmless is not None else None,
        "settings": dataclasses.asdict(settings),
        "check": told,
    }


def _provenance(neurons: NeuronSet, model: LanguageModel, dataset: Prompts, settings: Settings) -> Provenance:
    config = {**neurons.provenance.config, "tuned": dataclasses.asdict(settings), "data": dataset.name}
    return Provenance("neurons", neurons.provenance.method, (model.name,), model.fingerprint, dataset.sha256, config)
