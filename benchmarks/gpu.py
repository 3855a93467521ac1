"""Statistics, patched generation and exact importance at Llama-3-8B's shape with random bfloat16 weights, and
statistics of a routed model.

    python benchmarks/gpu.py --repetitions 31
    python benchmarks/gpu.py --device cpu --tiny --repetitions 2     # the same code at toy size

Needs CUDA unless another device is named; says so in one line and ends where there is none. Beside the ratios
stand tokens per second and the share of a peak given with --peak-tflops (dense bfloat16, from the maker's
table), from 2 · parameters · tokens.
"""

import argparse
import dataclasses
import os
import random
import time
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import peft
import torch
import transformers

import importance_cost
from paired import Median, Row, finish, interleaved, medians, parser, ratio
from safety_neurons.interventions import patched
from safety_neurons.model import LanguageModel, activation_statistics, run_batches
from safety_neurons.neurons import NeuronSet

SHAPES: dict[str, dict[str, Any]] = {
    "dense": {
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "routed": {
        "vocab_size": 151936,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "num_experts": 128,
        "num_experts_per_tok": 8,
    },
}
TINY: dict[str, Any] = {
    "vocab_size": 600,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_experts": 4,
    "num_experts_per_tok": 2,
}


def model_of(shape: str, options: argparse.Namespace) -> Any:
    """A random model: Llama's classes for the dense shape, Qwen3-MoE's for the routed one."""
    sizes = {name: TINY[name] if options.tiny else value for name, value in SHAPES[shape].items()}
    settings = {**sizes, "max_position_embeddings": 4096, "tie_word_embeddings": False}
    torch.manual_seed(0)
    with torch.device(options.device):
        if shape == "dense":
            model: Any = transformers.LlamaForCausalLM(
                transformers.LlamaConfig(**settings, dtype=options.dtype)
            )
        else:
            model = transformers.Qwen3MoeForCausalLM(
                transformers.Qwen3MoeConfig(**settings, dtype=options.dtype)
            )
    return model.to(getattr(torch, options.dtype)).eval()


def waited(work: Callable[[], object], device: str) -> Callable[[], object]:
    """Work that has ended on the device when it returns."""

    def run() -> None:
        work()
        if device.startswith("cuda"):
            torch.cuda.synchronize()

    return run


def speed(tokens: int, seconds: float, lm: LanguageModel, options: argparse.Namespace) -> dict[str, float]:
    """Tokens per second and, for a dense model, the share of the peak."""
    result = {"tokens_per_second": tokens / seconds}
    if options.peak_tflops:
        result["share_of_peak"] = 2 * lm.table.n_parameters * tokens / seconds / (options.peak_tflops * 1e12)
    return result


def statistics(shape: str, options: argparse.Namespace) -> tuple[list[Row], dict[str, Any]]:
    """Statistics ÷ plain forward passes."""
    lm = LanguageModel(model_of(shape, options))
    drawn = random.Random(0)
    batch, length = (4, 32) if options.tiny else (options.batch, options.tokens)
    sequences = [
        [drawn.randrange(3, 500) for _ in range(drawn.randint(length // 2, length))] for _ in range(2 * batch)
    ]
    arms: dict[str, Callable[[], object]] = {
        "plain": lambda: run_batches(lm, sequences, lambda _: None, batch),
        "mlp": lambda: activation_statistics(lm, sequences, sites=["down"], batch_size=batch),
        "seven": lambda: activation_statistics(lm, sequences, batch_size=batch),
    }
    seconds = interleaved(
        {name: waited(work, options.device) for name, work in arms.items()}, options.repetitions
    )
    tokens = sum(map(len, sequences))
    name = f"{shape}, batches of {batch} × {length}"
    rows = [
        Row(
            f"{name}: statistics of all MLP neurons ÷ plain forward",
            ratio(seconds, "mlp", "plain"),
            1.05 if shape == "dense" else None,
        ),
        Row(f"{name}: statistics of all seven sites ÷ plain forward", ratio(seconds, "seven", "plain")),
    ]
    plain = medians(seconds)["plain"]
    return rows, {"seconds": medians(seconds), "tokens": tokens, "plain": speed(tokens, plain, lm, options)}


def patching(options: argparse.Namespace) -> tuple[list[Row], dict[str, Any]]:
    """Patched generation ÷ plain generation, two (IA)³ adapters on one base."""
    base, aligned = adapters_on(model_of("dense", options))
    chosen = np.random.default_rng(0)
    sizes = {key: size for key, size in base.table.sizes.items() if key.endswith(".down")}
    neurons = NeuronSet(
        {key: chosen.permutation(size)[: max(1, size // 20)] for key, size in sizes.items()}, base.table
    )
    rows, prompt, new = (2, 8, 4) if options.tiny else (options.batch, 64, 128)
    ids = torch.randint(3, 500, (rows, prompt), generator=torch.Generator().manual_seed(1)).to(options.device)
    settings = {
        "max_new_tokens": new,
        "min_new_tokens": new,
        "do_sample": False,
        "eos_token_id": None,
        "pad_token_id": 0,
    }

    @torch.no_grad()
    def generate() -> None:
        base.model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **settings)

    def plain() -> None:
        with base.active():
            generate()

    def with_patch() -> None:
        with patched(base, aligned, neurons):
            generate()

    arms = {"plain": waited(plain, options.device), "patched": waited(with_patch, options.device)}
    seconds = interleaved(arms, options.repetitions)
    name = f"patched generation ÷ plain, shared base, {rows} × ({prompt} + {new})"
    detail = {
        "seconds": medians(seconds),
        "plain": speed(rows * new, medians(seconds)["plain"], base, options),
    }
    return [Row(name, ratio(seconds, "patched", "plain"), 1.25)], detail


def adapters_on(model: Any) -> tuple[LanguageModel, LanguageModel]:
    """Two views of one model: one adapter, and that with a second one on top."""
    config = peft.IA3Config(
        target_modules=["down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        both: Any = peft.PeftModel(model, config, adapter_name="first")
        both.add_adapter("second", config)
    with torch.no_grad():
        for name, parameter in both.named_parameters():
            if "ia3_l" in name:
                parameter.copy_(1 + 0.1 * torch.randn_like(parameter))
    both.eval()
    return LanguageModel(both, adapters=["first"]), LanguageModel(both, adapters=["first", "second"])


def importance(options: argparse.Namespace) -> tuple[list[Row], dict[str, Any]]:
    """Exact importance of every neuron ÷ plain forward, one prompt.

    No target: it is plain PyTorch, as it comes.
    """
    lm = LanguageModel(model_of("dense", options), None)
    rows, details = [], []
    for tokens in (16,) if options.tiny else (64, 128, 256):
        measured = importance_cost.measure(lm, tokens, options.repetitions)
        value: Any = measured["ratio"]
        rows.append(
            Row(
                f"exact importance, {tokens} tokens ÷ plain forward",
                Median(value["value"], value["low"], value["high"], value["n"]),
            )
        )
        details.append(measured)
    return rows, {"measured": details}


def main() -> None:
    """Measure, print and write the record."""
    load = os.getloadavg()[0]
    options_parser = parser(__doc__ or "")
    options_parser.add_argument("--device", default="cuda")
    options_parser.add_argument("--dtype", default="bfloat16")
    options_parser.add_argument("--tiny", action="store_true", help="toy sizes: to see that the code runs")
    options_parser.add_argument("--batch", type=int, default=32)
    options_parser.add_argument("--tokens", type=int, default=512)
    options_parser.add_argument("--peak-tflops", type=float, default=None, help="of the chip, dense bfloat16")
    options = options_parser.parse_args()
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        print("no GPU is present: the GPU rows were not measured")
        return
    transformers.logging.set_verbosity_error()
    parts: dict[str, Callable[[], tuple[list[Row], dict[str, Any]]]] = {
        "statistics": lambda: statistics("dense", options),
        "statistics, routed": lambda: statistics("routed", options),
        "patching": lambda: patching(options),
        "importance": lambda: importance(options),
    }
    rows: list[Row] = []  # toy sizes have no targets
    detail: dict[str, Any] = {
        "gpu": torch.cuda.get_device_name() if options.device.startswith("cuda") else None
    }
    for name, part in parts.items():
        start = time.monotonic()
        found, detail[name] = part()
        rows += [dataclasses.replace(row, target=None) for row in found] if options.tiny else found
        detail[name]["took"] = time.monotonic() - start
        if options.device.startswith("cuda"):
            torch.cuda.empty_cache()
    finish("gpu", rows, options, detail, load)


if __name__ == "__main__":
    main()
