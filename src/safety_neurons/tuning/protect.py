"""Protect a set of neurons while someone else's loop trains the model, and put them back after someone else has.

Full fine-tuning: the set's rows, columns and bias entries get no gradient and are written back after every optimizer step, through torch's
hooks on optimizers (this is the only file that registers them). Weight decay, momentum, a resumed optimizer state or a fused optimizer
change nothing about that: what they moved is moved back before the next forward pass.

LoRA: an adapter adds B·A to a weight. Its row i is zero while row i of B is, its column j while column j of A is, whatever the other factor
holds; so those rows and columns are held at zero. The share is then exactly zero, before and after merging.
"""

import contextlib
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from safety_neurons.errors import MismatchError, NeuronError
from safety_neurons.model import LanguageModel
from safety_neurons.neurons import NeuronSet, parse_key
from safety_neurons.tuning.entries import LORA, WEIGHT, Entries, adapted, current_projection, entries_of


@dataclass
class Protection:
    """What is being kept, and what was seen of the training.

    Attributes:
        neurons: the set.
        steps: optimizer steps seen so far.
        moved_outside: entries that had changed without an optimizer step that could be seen, and were put back at the end.
    """

    model: LanguageModel
    neurons: NeuronSet
    steps: int = 0
    moved_outside: int = 0
    _kept: dict[tuple[str, str, int], tuple[Entries, Tensor]] = field(default_factory=dict, repr=False)
    _adapted: tuple[int, ...] = field(default=(), repr=False)
    _effective: dict[tuple[str, str], Tensor] = field(default_factory=dict, repr=False)

    def start(self) -> None:
        """Remember every entry as it is; hold the set's share of an adapter, which must be zero, at zero."""
        self._adapted = adapted(self.model, self.neurons)
        for entries in entries_of(self.model, self.neurons):
            place = (entries.key, entries.name, id(entries.holder))
            if place in self._kept:
                continue
            values = entries.read()
            if entries.kind == LORA:
                _check_idle(entries, values)
                values = torch.zeros_like(values)
                entries.write(values)
            self._kept[place] = (entries, values)
        self._effective = self._effective or effective(self.model, self.neurons)

    def changed(self) -> int:
        """How many entries of the set differ now from what they are kept at.

        Both are looked at: the tensors that are held, bit for bit, and what the model computes with, adapters, copies and whatever else is
        around a projection by now counted in. The larger number is told.
        """
        held = sum(int((_bits(entries.read()) != _bits(values)).sum()) for entries, values in self._kept.values())
        return max(held, self._changed_in_effect())

    def _changed_in_effect(self) -> int:
        now = effective(self.model, self.neurons)
        return sum(int((now[place] != values.to(now[place].device)).sum()) for place, values in self._effective.items())

    def before_step(self, *_: Any) -> None:
        """Keep the gradient of the set out of the optimizer; see adapters that were put on meanwhile."""
        if adapted(self.model, self.neurons) != self._adapted:
            self.start()
        for entries, _values in self._kept.values():
            entries.clear_gradient()

    def after_step(self, *_: Any) -> None:
        """Put the set back."""
        self.steps += 1
        self.restore()

    def restore(self) -> None:
        """Write every entry back."""
        for entries, values in self._kept.values():
            entries.write(values.to(entries.tensor.device))


@contextlib.contextmanager
def protected(model: LanguageModel, neurons: NeuronSet) -> Iterator[Protection]:
    """Train everything but these neurons: inside the context the set stays bit-for-bit as it is, whatever loop trains the model.

    Works with every optimizer that derives from `torch.optim.Optimizer`, thus with plain loops, Hugging Face's Trainer, TRL and accelerate
    (gradient accumulation, clipping, mixed precision and DDP included), for full fine-tuning and for LoRA and (IA)³ adapters, put on
    before or inside the context. Bias entries of the neurons are protected too. The norm that gradients are clipped at still counts the
    set's own gradient, as the loop computes it before the optimizer is reached.

    Args:
        model: the model that is trained; its wrappers (DDP, a PEFT model around it) may be made inside the context.
        neurons: what stays.

    Yields:
        The protection: how many steps it saw, and `changed()`.

    Raises:
        NeuronError: an empty set, or one of another model.
        MismatchError: a LoRA adapter that has already changed the neurons; `repair` it first.
            At the end: entries of the set that differ and could not be put back.
        UnsupportedModelError: parameters shared out over processes (FSDP, ZeRO-3), weights computed from other tensors (parametrisations),
            or an adapter whose share of a neuron cannot be told apart (DoRA, LoRA on the parameters of experts).

    Source: the aim of RSN-Tune (Zhao et al., ICLR 2025): safety that outlives downstream fine-tuning.
    Differs: held by construction, where RSN-Tune chooses neurons that the task is unlikely to move.
    """
    _check(model, neurons)
    protection = Protection(model, neurons)
    with contextlib.ExitStack() as stack:
        protection.start()
        stack.callback(register_optimizer_step_pre_hook(protection.before_step).remove)
        stack.callback(register_optimizer_step_post_hook(protection.after_step).remove)
        stack.callback(protection.restore)  # also where training fails between an optimizer's step and what follows it
        yield protection
        if adapted(model, neurons) != protection._adapted:
            protection.start()
        protection.moved_outside = protection.changed()
        protection.restore()
        left = protection.changed()
        if left:
            raise MismatchError(
                f"{left} entries of the set differ from what they were and cannot be put back: something that is not held reaches them; "
                "train without what was added to the model, or repair(model, reference, neurons)"
            )


@dataclass(frozen=True)
class Repair:
    """What was put back.

    Attributes:
        n_neurons: neurons of the set.
        n_entries: weights and bias entries they are made of.
        changed: entries that differed from the reference.
        adapter_changed: entries of adapters that were cleared.
        rounded: entries whose reference does not fit the model's type exactly.
    """

    n_neurons: int
    n_entries: int
    changed: int
    adapter_changed: int
    rounded: int


def repair(model: LanguageModel, reference: LanguageModel, neurons: NeuronSet) -> Repair:
    """Put the set's rows, columns and bias entries back to what they are in the reference, in the model in memory.

    A LoRA adapter on the model loses its share of the set, so that adapter and base together are the reference there; the reference's own
    adapters are counted in. Everything outside the set stays as it is.

    Args:
        model: what was fine-tuned; it is changed.
        reference: a model of the same architecture that still has the neurons as they should be.
        neurons: what is put back.

    Raises:
        NeuronError: an empty set, or one of another model.
        MismatchError: two architectures, or two views of one base in memory whose rows would have to differ.
        UnsupportedModelError: quantised weights, or an adapter that cannot be told apart.

    Source: the aim of RSN-Tune (Zhao et al., ICLR 2025).
    Differs: after the fine-tune instead of before it.
    """
    _check(model, neurons)
    if reference.fingerprint != model.fingerprint:
        raise MismatchError(
            f"{model.name} and the reference {reference.name} are of different architectures; expected the model before its fine-tuning"
        )
    with reference.active():
        wanted = effective(reference, neurons)
    mine = list(entries_of(model, neurons))
    weights = [entries for entries in mine if entries.kind == WEIGHT]
    if {entries.key for entries in weights if entries.name != "bias"} != set(neurons.keys()):
        raise MismatchError(f"{model.name} is quantised and its rows cannot be written; repair the unquantised model, then quantise it")
    changed = rounded = total = 0
    shared = _bases(reference, neurons)
    for entries in weights:
        target, now = wanted[entries.key, "bias" if entries.name.endswith("bias") else "weight"], entries.read()
        target = target.T if entries.transposed else target
        values = target.to(now.dtype).to(now.device)
        total += values.numel()
        differs = int((_bits(now) != _bits(values)).sum())
        changed += differs
        rounded += int((values.to(target.dtype).cpu() != target.cpu()).sum())
        if differs and entries.holder in shared:
            raise MismatchError(f"{entries.key}: model and reference share one base in memory; load the reference by itself")
        if differs:
            entries.write(values)
    return Repair(len(neurons), total, changed, sum(_cleared(entries) for entries in mine if entries.kind != WEIGHT), rounded)


def effective(model: LanguageModel, neurons: NeuronSet) -> dict[tuple[str, str], Tensor]:
    """What the model computes with at the neurons, active adapters counted in: rows or columns, and bias entries, by key.

    Weights that can be neither read nor trained (quantised ones of other packages) are left out.
    """
    found: dict[tuple[str, str], Tensor] = {}
    with torch.no_grad():
        for key, indices in neurons.items():
            members = torch.from_numpy(indices.copy())
            site = parse_key(key)
            if site.expert is not None:
                experts = model.anatomy.layers[site.layer].experts
                assert experts is not None
                whole, bias = experts.weight(site.expert, site.site), experts.bias(site.expert, site.site)
                rows = site.site != "down"
            else:
                part = current_projection(model, key)
                place = dataclasses.replace(model.anatomy.places[key], projection=part)
                rows = place.side == "output"
                if part.quantised and not hasattr(part.base.weight, "quant_state"):
                    continue
                whole, bias = place.weight(), place.bias()
            found[key, "weight"] = (whole[members] if rows else whole[:, members]).clone()
            if bias is not None:
                found[key, "bias"] = bias[members].clone()
    return found


def _bases(reference: LanguageModel, neurons: NeuronSet) -> set[Any]:
    return {entries.holder for entries in entries_of(reference, neurons) if entries.kind == WEIGHT}


def _cleared(entries: Entries) -> int:
    """Zero an adapter's factor (one in a scale); how many entries that changed."""
    values = entries.read()
    idle = torch.zeros_like(values) if entries.kind == LORA else torch.ones_like(values)
    differs = int((values != idle).sum())
    if differs:
        entries.write(idle)
    return differs


def _check(model: LanguageModel, neurons: NeuronSet) -> None:
    if not len(neurons):
        raise NeuronError("an empty set was given, expected at least one neuron; find with a larger --top or a smaller --agreement")
    neurons.check(model.table, [model.name])


def _check_idle(entries: Entries, values: Tensor) -> None:
    """A LoRA factor that already acts on the set cannot be held at zero without changing what the model does."""
    partner = getattr(entries.partner, "weight", None)
    if bool((values != 0).any()) and (partner is None or bool((partner != 0).any())):
        raise MismatchError(
            f"{entries.key}: a LoRA adapter has already changed neurons of the set; repair(model, reference, neurons) first, then train on"
        )


def _bits(values: Tensor) -> Tensor:
    """The values as integers, so that -0 differs from 0 and a NaN equals itself."""
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return values.contiguous().view(kinds[values.element_size()])
