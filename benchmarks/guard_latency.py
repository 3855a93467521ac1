"""What a guard adds to the prefill that happens anyway: time to the first token with it and without it.

    python benchmarks/guard_latency.py --repetitions 31

Both arms are whole calls that generate one token (tokens of the text, prefill, first token, its text), so
that putting hooks on, gathering, judging and taking hooks off are all in the number. No prompt is flagged,
since one that is saves time. Two layers of a 1B model's shape stand for sixteen: what a guard costs per layer
is measured against a layer, and what it costs once against two layers instead of sixteen.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import transformers

from paired import CLOCKS, Row, finish, interleaved, median, medians, parser, ratio
from safety_neurons import NeuronSet, load
from safety_neurons.guard import Classifier, Guard, GuardedModel, Pooling, bindings_of
from safety_neurons.model import LanguageModel

TARGET, TARGET_MS = 1.02, 0.3
TOKENS = 256
NEURONS = 1500
PAIRS = 15
SHAPE: dict[str, Any] = {
    "vocab_size": 2048,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 2,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "max_position_embeddings": 1024,
}


def large(dtype: torch.dtype) -> LanguageModel:
    """Layers of the shape of a 1B Llama with random weights, and a tokenizer of numbers."""
    import tokenizers

    words = {str(number): number for number in range(2048)}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="0"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="0", pad_token="1", eos_token="2"
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(
            transformers.LlamaConfig(**SHAPE, pad_token_id=1, eos_token_id=2, bos_token_id=None)
        )
    return LanguageModel(model.to(dtype).eval(), tokenizer, template="none", name="1B shape")


def random_guard(
    model: LanguageModel, count: int, pooling: Pooling, sites: tuple[str, ...] = ("down",)
) -> Guard:
    """A guard on so many neurons, spread evenly, that flags nothing: its cost does not depend on what it was
    fit to.
    """
    table = model.table.select(sites)
    every = {info.key: info.size for info in table.sites}
    share = count / sum(every.values())
    members = {
        key: torch.randperm(size, generator=torch.Generator().manual_seed(0))[: round(size * share)].numpy()
        for key, size in every.items()
    }
    neurons = NeuronSet(members, model.table)
    vectors = [
        torch.randn(len(neurons), generator=torch.Generator().manual_seed(seed)) / 100 for seed in range(3)
    ]
    classifier = Classifier(vectors[0], vectors[1].abs() + 1, vectors[2], 0.0)
    return Guard(neurons, pooling, classifier, (), 1.0, "given", bindings_of(model, neurons), model=model)


def arms_of(model: LanguageModel, guard: Guard, text: str) -> dict[str, Callable[[], object]]:
    """The same call without and with the guard."""
    guarded = GuardedModel(model, guard)
    return {
        "plain": lambda: model.complete([text], max_new_tokens=1, batch_size=1),
        "guarded": lambda: guarded.generate([text], max_new_tokens=1, batch_size=1),
    }


def added_ms(arms: dict[str, Callable[[], object]], options: argparse.Namespace) -> list[float]:
    """Milliseconds that the guard adds: for each repetition the median difference of some pairs that take
    turns.
    """
    found = []
    for _ in range(options.repetitions):
        seconds = interleaved(arms, PAIRS, CLOCKS[options.clock], warm_up=1)
        found.append(
            1000 * statistics.median(b - a for a, b in zip(seconds["plain"], seconds["guarded"], strict=True))
        )
    return found


def parts_of(guard: Guard) -> dict[str, float]:
    """Microseconds of a verdict and of putting hooks on and off, alone, caches warm: the smallest of many,
    which load moves least.
    """
    features = torch.zeros(1, len(guard.neurons))

    def hooks_on_and_off() -> None:
        guard.collector.__enter__()
        guard.collector.off()

    parts: dict[str, Callable[[], object]] = {
        "verdict": lambda: guard.verdicts(features, [False], only_flagged=True, lengths=[20]),
        "hooks_on_and_off": hooks_on_and_off,
    }
    found = {}
    for name, work in parts.items():
        seconds = interleaved({name: work}, 2000, time.perf_counter)[name]
        found[name] = 1e6 * min(seconds)
    return found


def hash_seconds(model: LanguageModel, guard: Guard) -> float:
    """Gigabytes a second of the check that a guard belongs to a model, which loading it costs once."""
    size = sum(value.numel() * value.element_size() for value in model.inner.parameters())
    start = time.perf_counter()
    guard.bindings.check(model, guard.neurons)
    return size / 1e9 / (time.perf_counter() - start)


def main() -> None:
    """Measures and writes the record."""
    options = parser(__doc__).parse_args()
    load_before = os.getloadavg()[0]
    torch.set_num_threads(options.threads)
    model = large(torch.float32)
    text = " ".join(str(3 + number * 7 % 2000) for number in range(TOKENS))
    rows, detail = [], {}
    for pooling in (Pooling("last"), Pooling("mean"), Pooling("max", 8)):
        guard = random_guard(model, NEURONS, pooling)
        seconds = interleaved(arms_of(model, guard, text), options.repetitions, CLOCKS[options.clock])
        what = (
            f"time to the first token with a guard on {NEURONS} neurons ÷ without, {TOKENS} tokens, 1B "
            f"shape, {pooling}"
        )
        rows.append(Row(what, ratio(seconds, "guarded", "plain"), TARGET if pooling.kind == "last" else None))
        detail[str(pooling)] = medians(seconds)
    rate = hash_seconds(model, guard)
    organism = load("organism:planted/base")
    parts: dict[str, dict[str, float]] = {}
    prompt = organism.prompts("builtin:harmless-test").texts[0]
    for sites, target in ((("down",), TARGET_MS), (("q", "k", "v", "o", "gate", "up", "down"), None)):
        guard = random_guard(organism, 51, Pooling("last"), sites)
        words = "down neurons" if target else "neurons of all sites"
        added = median(added_ms(arms_of(organism, guard, prompt), options))
        rows.append(Row(f"a guard on {len(guard.neurons)} {words} of the organism adds", added, target, "ms"))
        parts[words] = parts_of(guard)
    detail |= {
        "shape": SHAPE,
        "tokens": TOKENS,
        "seconds": dict(detail),
        "microseconds": parts,
        "gigabytes_hashed_per_second": rate,
    }
    finish("guard", rows, options, detail, load_before)


if __name__ == "__main__":
    main()
