"""Cost of training deltas of 0.5 % of the parameters ÷ PEFT LoRA of rank 16 on all linear layers, ÷ full
fine-tuning with gradient masks.

    python benchmarks/tuning_cost.py --repetitions 31

A random Llama (8 layers, hidden 512, intermediate 1408, 8 heads, 2 key-value heads, vocabulary 2,000) in
float32 takes steps of AdamW with clipping on batches of 8 × 64 tokens; every arm has a copy of its own and
the arms take turns. The masked arm is what the public code does: all weights trainable, gradients clipped and
then zeroed outside the set. Memory is every allocation of one step as the profiler sees it, counted from the
frozen weights up: parameters that are trained, optimizer state, gradients, activations and temporaries.
"""

import copy
import os
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import peft
import torch
import transformers
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from paired import CLOCKS, Median, Row, finish, interleaved, medians, parser, ratio
from safety_neurons.model import LanguageModel
from safety_neurons.neurons import NeuronSet
from safety_neurons.tuning import Delta, apply_delta, attach, delta_of
from safety_neurons.tuning.deltas import positions_of

VOCABULARY = 2000


def base_model() -> transformers.LlamaForCausalLM:
    """The random model."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=False,
    )
    return transformers.LlamaForCausalLM(config).train()


def some(lm: LanguageModel, share: float) -> NeuronSet:
    """Random neurons of every matrix: the smallest even share that reaches this share of the model's
    parameters.
    """
    generator = np.random.default_rng(0)
    orders = {key: generator.permutation(size) for key, size in lm.table.sizes.items()}
    part = share
    while True:
        chosen = NeuronSet(
            {key: order[: max(1, round(part * len(order)))] for key, order in orders.items()}, lm.table
        )
        if chosen.share_of_parameters >= share:
            return chosen
        part *= 1.02


@dataclass
class Arm:
    """A way of training."""

    model: nn.Module
    trained: list[nn.Parameter]
    mask: Callable[[], None] | None = None

    def __post_init__(self) -> None:
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-4, weight_decay=0.0)

    def step(self, ids: Tensor) -> None:
        """One step."""
        self.optimizer.zero_grad(set_to_none=True)
        self.model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        nn.utils.clip_grad_norm_(self.trained, 1.0)
        if self.mask is not None:
            self.mask()
        self.optimizer.step()

    @property
    def n_parameters(self) -> int:
        """Trained entries, as far as the optimizer knows."""
        return sum(parameter.numel() for parameter in self.trained)

    def state_bytes(self) -> int:
        """Optimizer state."""
        return sum(
            size(value)
            for state in self.optimizer.state.values()
            for value in state.values()
            if isinstance(value, Tensor)
        )

    def gradient_bytes(self) -> int:
        """Gradients after a step."""
        return sum(size(parameter.grad) for parameter in self.trained if parameter.grad is not None)

    def peak(self, ids: Tensor, own_parameters: bool) -> int:
        """Bytes beyond the frozen weights at the highest point of a step.

        The optimizer's state has to be there already.
        """
        self.optimizer.zero_grad(set_to_none=True)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
            self.step(ids)
        now = highest = 0
        for event in sorted(watched.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
            if event.name() == "[memory]":
                now += event.nbytes()
                highest = max(highest, now)
        return highest + self.state_bytes() + (sum(map(size, self.trained)) if own_parameters else 0)


def size(tensor: Tensor) -> int:
    """Bytes of a tensor."""
    return tensor.numel() * tensor.element_size()


def delta_arm(neurons: NeuronSet) -> tuple[Arm, LanguageModel, Callable[[], Delta]]:
    """Deltas of the set."""
    lm = LanguageModel(base_model())
    deltas = attach(lm, neurons)

    def taken() -> Delta:
        delta = delta_of(deltas)
        deltas.detach()
        return delta

    return Arm(lm.model, deltas.parameters()), lm, taken


LORA = peft.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
"""LoRA of rank 16 on all linear layers."""


def adapter_arm(config: peft.PeftConfig) -> Arm:
    """An adapter of PEFT."""
    adapted = peft.get_peft_model(base_model(), config)
    return Arm(adapted, [parameter for parameter in adapted.parameters() if parameter.requires_grad])


def masked_arm(neurons: NeuronSet) -> Arm:
    """All weights trainable, gradients zeroed outside the set after clipping."""
    lm = LanguageModel(base_model())
    masks: dict[nn.Parameter, Tensor] = {}
    for key, _ in neurons.items():
        place = lm.anatomy.places[key]
        weight = place.projection.base.weight
        mask = masks.setdefault(weight, torch.zeros_like(weight, requires_grad=False))
        mask.index_fill_(0 if place.side == "output" else 1, positions_of(place, neurons), 1.0)

    def apply() -> None:
        for parameter in lm.model.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(masks[parameter]) if parameter in masks else parameter.grad.zero_()

    return Arm(lm.model, list(lm.model.parameters()), apply)


def exactly(value: float) -> Median:
    """A number that is counted, not timed."""
    return Median(value, value, value, 1)


def main() -> None:
    """Measure, print and write the record."""
    load = os.getloadavg()[0]
    options_parser = parser(__doc__ or "")
    options_parser.add_argument("--share", type=float, default=0.005)
    options_parser.add_argument("--rows", type=int, default=8)
    options_parser.add_argument("--tokens", type=int, default=64)
    options = options_parser.parse_args()
    torch.set_num_threads(options.threads)
    clock = CLOCKS[options.clock]
    plain = LanguageModel(base_model())
    neurons = some(plain, options.share)
    ids = torch.randint(
        3, VOCABULARY, (options.rows, options.tokens), generator=torch.Generator().manual_seed(0)
    )
    ours, lm, taken = delta_arm(neurons)
    arms = {"delta": ours, "lora": adapter_arm(LORA), "masked": masked_arm(neurons)}
    seconds = interleaved(
        {name: lambda arm=arm: arm.step(ids) for name, arm in arms.items()}, options.repetitions, clock
    )
    peaks = {name: arm.peak(ids, own_parameters=name != "masked") for name, arm in arms.items()}
    held = {name: arm.state_bytes() + arm.gradient_bytes() for name, arm in arms.items()}
    delta = taken()
    merged = LanguageModel(copy.deepcopy(lm.model))
    apply_delta(merged, delta)

    def forward(model: nn.Module) -> Callable[[], object]:
        def run() -> None:
            with torch.no_grad():
                model(input_ids=ids, use_cache=False)

        return run

    forwards = {"base": forward(lm.model), "merged": forward(merged.model), "base again": forward(lm.model)}
    passes = interleaved(forwards, options.repetitions, clock)
    rows = [
        Row("step of deltas ÷ LoRA of rank 16 on all linear layers", ratio(seconds, "delta", "lora"), 1.0),
        Row(
            "peak memory beyond the frozen weights ÷ the same LoRA",
            exactly(peaks["delta"] / peaks["lora"]),
            1.0,
        ),
        Row("step of deltas ÷ full fine-tuning with gradient masks", ratio(seconds, "delta", "masked"), 0.7),
        Row(
            "optimizer and gradient memory ÷ full fine-tuning with masks",
            exactly(held["delta"] / held["masked"]),
            0.05,
        ),
        Row("forward of the merged model ÷ base", ratio(passes, "merged", "base"), 1.0),
        Row("forward of the base ÷ itself (what is noise)", ratio(passes, "base again", "base")),
        Row("optimizer and gradient memory ÷ the same LoRA", exactly(held["delta"] / held["lora"])),
    ]
    detail = {
        "share_of_parameters": neurons.share_of_parameters,
        "trained_parameters": {name: arm.n_parameters for name, arm in arms.items()},
        "seconds": medians(seconds),
        "peak_bytes": peaks,
        "optimizer_and_gradient_bytes": held,
    }
    finish("tuning", rows, options, detail, load)


if __name__ == "__main__":
    main()
