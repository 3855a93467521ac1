"""Cost of the exact importance of every neuron, in layers of Llama-3-8B's shape: one prompt, importance ÷
plain forward.

Plain forward and importance are interleaved; the ratio is taken pair by pair. Norms and factors of the
weights are computed once per search, before the clock starts; `first_seconds` is what the first prompt of a
search takes with them.

    python benchmarks/importance_cost.py --tokens 64 --layers 1 --repetitions 31 [--device cpu] [--dtype
    float32]
"""

import argparse
import json
import platform
import statistics
import time

import numpy as np
import torch
import transformers

from safety_neurons.detectors.importance import ImportanceReaders
from safety_neurons.model import LanguageModel
from safety_neurons.model.batches import collate, forward


def build(layers: int, dtype: torch.dtype, device: str) -> LanguageModel:
    """A random model of some layers of Llama-3-8B's shape, with a small vocabulary."""
    config = transformers.LlamaConfig(
        vocab_size=512,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
    )
    with torch.device(device):
        model = transformers.LlamaForCausalLM(config).to(dtype).eval()
    return LanguageModel(model, None)


def measure(lm: LanguageModel, n_tokens: int, repetitions: int) -> dict[str, object]:
    """Pairs of a plain forward and one with importance."""
    ids = torch.randint(0, 512, (n_tokens,), generator=torch.Generator().manual_seed(0)).tolist()
    batch = collate([ids], [0]).to(lm.device)
    readers = ImportanceReaders(lm, tuple(lm.table.keys))

    def seconds(work: object) -> float:
        if lm.device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        work()  # type: ignore[operator]
        if lm.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    def importance() -> float:
        with readers.on():
            readers.start(batch)
            return seconds(lambda: (forward(lm.model, batch), readers.take()))

    with torch.no_grad():
        forward(lm.model, batch)
        first = seconds(importance)
        importance()
        pairs = [(seconds(lambda: forward(lm.model, batch)), importance()) for _ in range(repetitions)]
    ratios = np.array([with_scores / plain for plain, with_scores in pairs])
    drawn = np.random.default_rng(0).choice(ratios, (2000, len(ratios)))
    low, high = np.quantile(np.median(drawn, axis=1), [0.025, 0.975])
    return {
        "tokens": n_tokens,
        "ratio": {
            "value": float(np.median(ratios)),
            "low": float(low),
            "high": float(high),
            "n": len(ratios),
        },
        "plain_seconds": statistics.median(plain for plain, _ in pairs),
        "importance_seconds": statistics.median(taken for _, taken in pairs),
        "first_seconds": first,
    }


def main() -> None:
    """Measure and print JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--repetitions", type=int, default=31)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    options = parser.parse_args()
    lm = build(options.layers, getattr(torch, options.dtype), options.device)
    record = {
        "what": "exact importance of every neuron / plain forward",
        "shape": "Llama-3-8B layers",
        "layers": options.layers,
        "dtype": options.dtype,
        "device": options.device,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "machine": platform.processor() or platform.machine(),
        "measured": [measure(lm, tokens, options.repetitions) for tokens in options.tokens],
    }
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()
