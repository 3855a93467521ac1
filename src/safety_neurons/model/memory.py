"""What a run will need, before it is started: memory, time and disk, from sizes and two short trial passes."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from safety_neurons.model.language_model import LanguageModel
from safety_neurons.model.measures import BatchSize
from safety_neurons.model.passes import collate, forward, plan, token_budget
from safety_neurons.prompts import Prompts

_TRIAL_TOKENS = 256


@dataclass(frozen=True)
class Estimate:
    """Needs of a run; bytes and seconds.

    Attributes:
        weights_bytes: Weights of the models, a shared base once.
        activations_bytes: Largest batch while it is fed (a rough upper figure: attention, feed-forward and readers of one layer).
        cache_bytes: Keys and values of the largest batch while it is completed; 0 where nothing is generated.
        statistics_bytes: Sums over all neurons, in float64.
        disk_bytes: Scores and neuron sets, and completions where some are written.
        seconds: Passes over all prompts (and generation), measured on a short trial.
        prompts: Number of prompts.
        tokens: Tokens that are fed.
        new_tokens: Tokens that are generated at most.
        batches: Batches of one sweep.
        truncated: Prompts that do not fit the context.
        device: Where the first model is.
        dtype: What it computes in.
    """

    weights_bytes: int
    activations_bytes: int
    cache_bytes: int
    statistics_bytes: int
    disk_bytes: int
    seconds: float
    prompts: int
    tokens: int
    new_tokens: int
    batches: int
    truncated: int
    device: str
    dtype: str

    @property
    def memory_bytes(self) -> int:
        """All that is in memory at once."""
        return self.weights_bytes + self.activations_bytes + self.cache_bytes + self.statistics_bytes

    def __str__(self) -> str:
        parts = [
            f"weights {_size(self.weights_bytes)}",
            f"activations {_size(self.activations_bytes)}",
            f"cache {_size(self.cache_bytes)}",
            f"statistics {_size(self.statistics_bytes)}",
        ]
        text = f"{self.prompts:,} prompts, {self.tokens:,} tokens to feed, up to {self.new_tokens:,} to generate, {self.batches:,} batches"
        cut = f"; {self.truncated:,} prompts longer than the context" if self.truncated else ""
        memory = f"memory about {_size(self.memory_bytes)} on {self.device} in {self.dtype} ({', '.join(parts)})"
        return f"{text}{cut}\n{memory}\ntime about {_duration(self.seconds)}\ndisk about {_size(self.disk_bytes)}"


def estimate(models: Sequence[LanguageModel], prompts: Prompts, *, max_new_tokens: int = 0, batch_size: BatchSize = "auto") -> Estimate:
    """Estimates a `find` over prompts without running it; only two short passes are fed, to measure the time.

    Args:
        models: The models of the run, one or a pair.
        prompts: The prompts.
        max_new_tokens: Longest completion, 0 where nothing is generated.
        batch_size: Rows of a batch, or `auto`.
    """
    first = models[0]
    encoded = first.encode(prompts, reserve=max_new_tokens)
    lengths = [len(item.ids) + max_new_tokens for item in encoded]
    groups = plan(lengths, batch_size, token_budget(first.device))
    widest = max((len(group) * lengths[group[0]] for group in groups), default=0)
    neurons = first.table.n_neurons
    fed, written = sum(lengths), max_new_tokens * len(lengths)
    per_token, per_step = _trial(first, [item.ids for item in encoded])
    steps = len(groups) * max_new_tokens
    return Estimate(
        weights_bytes=_weights(models),
        activations_bytes=widest * _width(first) * first.dtype.itemsize,
        cache_bytes=widest * _cache_width(first) * first.dtype.itemsize if max_new_tokens else 0,
        statistics_bytes=neurons * 8 * 3 * len(models),
        disk_bytes=neurons * 4 * 2 + written * 16,
        seconds=fed * per_token * len(models) + steps * per_step,
        prompts=len(lengths),
        tokens=fed,
        new_tokens=written,
        batches=len(groups),
        truncated=sum(item.truncated for item in encoded),
        device=str(first.device),
        dtype=str(first.dtype).removeprefix("torch."),
    )


def _weights(models: Sequence[LanguageModel]) -> int:
    tensors = {id(tensor): tensor for lm in models for tensor in (*lm.model.parameters(), *lm.model.buffers())}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def _width(lm: LanguageModel) -> int:
    """Numbers a token needs at the widest point of a pass: residual streams, and inputs and outputs of all sites of one layer."""
    sizes = [sum(info.size for info in lm.table.sites if info.key.startswith(f"layers.{number}.")) for number in range(lm.table.n_layers)]
    return 4 * int(lm.config.hidden_size) + 2 * max(sizes, default=0)


def _cache_width(lm: LanguageModel) -> int:
    return sum(info.size for info in lm.table.sites if info.key.endswith((".k", ".v")))


def _trial(lm: LanguageModel, sequences: Sequence[Sequence[int]]) -> tuple[float, float]:
    """Seconds a token of a long pass, and seconds a pass of one token."""
    if not sequences:
        return 0.0, 0.0
    ids = [token for sequence in sequences for token in sequence]
    limit = min(_TRIAL_TOKENS, lm.max_length or _TRIAL_TOKENS)
    long = (ids * (limit // len(ids) + 1))[:limit]
    seconds = []
    with lm.running(), torch.no_grad():
        for sequence in (long, long[:1]):
            batch = collate([sequence], [0]).to(lm.device)
            taken = []
            for _ in range(3):
                start = time.perf_counter()
                forward(lm.model, batch)
                if lm.device.type == "cuda":
                    torch.cuda.synchronize(lm.device)
                taken.append(time.perf_counter() - start)
            seconds.append(min(taken))
    return seconds[0] / len(long), seconds[1]


def _size(count: int) -> str:
    value = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
