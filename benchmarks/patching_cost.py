"""Time of patched generation over plain generation of the same batch, interleaved in one run.

    python benchmarks/patching_cost.py --repetitions 31 --out benchmarks/results/patching_cost.json

Three pairs of a random Llama: (IA)³ adapters on one base, LoRA adapters on one base, two separate models.
Every repetition runs plain and patched generation of each pair, in an order that turns from one repetition to
the next; the ratio of a repetition is paired. Plain generation is the base view's own (its adapters active,
by PEFT). What the hooks alone take is measured by hook_cost.py. On a shared base every row has the donor's
beside it, so plain generation of twice the rows stands in the same turns: what it costs is arithmetic and no
hook's (it has the head's for the donor's rows too, which a patched pass leaves out).
"""

import argparse
import copy
import json
import os
import pathlib
import platform
import random
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import peft
import torch
import transformers

from safety_neurons.interventions import patched
from safety_neurons.model import LanguageModel, load
from safety_neurons.neurons import NeuronSet

TARGETS = {"ia3": 1.15, "lora": 1.15, "separate": 1.6}
TWICE = "ia3"
"""The pair whose rows are generated twice as many at once, too."""


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repetitions", type=int, default=31)
    parser.add_argument("--model", default="", help="a checkpoint (real:NAME) in place of a random Llama")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--intermediate", type=int, default=1376)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--apart", type=float, default=0.01, help="noise that makes the second model")
    parser.add_argument("--share", type=float, default=0.05, help="share of the down neurons that is patched")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument(
        "--clock",
        choices=["wall", "cpu"],
        default="wall",
        help="cpu: this process's own time, for a machine that is shared",
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--pairs", nargs="+", default=list(TARGETS), choices=list(TARGETS))
    parser.add_argument("--out", type=pathlib.Path, default=None)
    return parser.parse_args()


def base_model(options: argparse.Namespace) -> Any:
    """A random Llama of the asked shape, or a checkpoint."""
    torch.manual_seed(0)
    if options.model:
        return load(options.model, dtype=options.dtype, device=options.device, offline=True).model
    config = transformers.LlamaConfig(
        vocab_size=options.vocabulary,
        hidden_size=options.hidden,
        intermediate_size=options.intermediate,
        num_hidden_layers=options.layers,
        num_attention_heads=max(1, options.hidden // 64),
        num_key_value_heads=max(1, options.hidden // 128),
        max_position_embeddings=options.prompt + options.new,
        tie_word_embeddings=False,
    )
    return transformers.LlamaForCausalLM(config).to(options.device, getattr(torch, options.dtype)).eval()


def adapted_pair(kind: str, model: Any) -> tuple[LanguageModel, LanguageModel]:
    """Two views of one model: the base has one adapter, the aligned model a second one on top of it."""
    if kind == "ia3":
        config: Any = peft.IA3Config(
            target_modules=["down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM"
        )
    else:
        config = peft.LoraConfig(
            r=8, lora_alpha=16, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM"
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted: Any = peft.PeftModel(model, config, adapter_name="first")
    adapted.add_adapter("second", config)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "ia3_l" in name:
                parameter.copy_(1 + 0.3 * torch.randn_like(parameter))
            elif "lora_" in name:
                parameter.copy_(0.05 * torch.randn_like(parameter))
    adapted.eval()
    return LanguageModel(adapted, adapters=["first"]), LanguageModel(adapted, adapters=["first", "second"])


def pair_of(kind: str, options: argparse.Namespace) -> tuple[LanguageModel, LanguageModel]:
    """The base and the aligned model of one kind."""
    model = base_model(options)
    if kind != "separate":
        return adapted_pair(kind, model)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(options.apart * torch.randn_like(parameter))
    return LanguageModel(model), LanguageModel(other)


def chosen_neurons(base: LanguageModel, share: float) -> NeuronSet:
    """A random share of the down neurons of every layer."""
    generator = np.random.default_rng(0)
    sizes = {key: size for key, size in base.table.sizes.items() if key.endswith(".down")}
    return NeuronSet(
        {key: generator.permutation(size)[: max(1, int(share * size))] for key, size in sizes.items()},
        base.table,
    )


def timed(action: Callable[[], object], options: argparse.Namespace) -> float:
    """Seconds that an action takes."""
    clock = time.process_time if options.clock == "cpu" else time.perf_counter
    if options.device.startswith("cuda"):
        torch.cuda.synchronize()
    start = clock()
    action()
    if options.device.startswith("cuda"):
        torch.cuda.synchronize()
    return clock() - start


def actions_of(
    pair: tuple[LanguageModel, LanguageModel],
    neurons: NeuronSet,
    options: argparse.Namespace,
    ids: torch.Tensor,
    floor: bool = False,
) -> dict[str, Callable[[], Any]]:
    """Plain and patched generation of one pair; with a floor, plain generation of twice the rows."""
    base, aligned = pair

    def run(rows: torch.Tensor = ids) -> Any:
        with torch.no_grad():
            return base.model.generate(
                input_ids=rows,
                attention_mask=torch.ones_like(rows),
                max_new_tokens=options.new,
                min_new_tokens=options.new,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )

    def plain() -> Any:
        with base.active():
            return run()

    def with_patch() -> Any:
        with patched(base, aligned, neurons):
            return run()

    def twice() -> Any:
        with base.active():
            return run(ids.repeat(2, 1))

    return {"plain": plain, "patched": with_patch, **({"twice the rows": twice} if floor else {})}


def interval(values: list[float], seed: int = 0) -> dict[str, float]:
    """Median with the 95 % bootstrap interval."""
    generator = random.Random(seed)
    medians = sorted(statistics.median(generator.choices(values, k=len(values))) for _ in range(2000))
    return {"median": statistics.median(values), "low": medians[50], "high": medians[1949], "n": len(values)}


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Runs everything and returns the record."""
    ids = torch.randint(
        3, options.vocabulary, (options.batch, options.prompt), generator=torch.Generator().manual_seed(1)
    ).to(options.device)
    pairs = {kind: pair_of(kind, options) for kind in options.pairs}
    actions = {
        kind: actions_of(pair, chosen_neurons(pair[0], options.share), options, ids, floor=kind == TWICE)
        for kind, pair in pairs.items()
    }
    for kind in actions.values():
        for action in kind.values():
            action()
    seconds: dict[str, dict[str, list[float]]] = {
        kind: {name: [] for name in named} for kind, named in actions.items()
    }
    for repetition in range(options.repetitions):
        for kind, named in actions.items():
            names = list(named)
            turn = repetition % len(names)
            for name in names[turn:] + names[:turn]:
                seconds[kind][name].append(timed(named[name], options))
    results: dict[str, Any] = {}
    for kind, took in seconds.items():
        ratio = interval([b / a for a, b in zip(took["plain"], took["patched"], strict=True)])
        results[kind] = {
            "ratio": ratio,
            "target": TARGETS[kind],
            "met": ratio["median"] <= TARGETS[kind] + 0.02 and ratio["low"] <= TARGETS[kind],
            "seconds": {name: statistics.median(values) for name, values in took.items()},
        }
        for name in took.keys() - {"plain", "patched"}:
            rows = [b / a for a, b in zip(took["plain"], took[name], strict=True)]
            results[kind][name] = interval(rows)
    return {"setting": setting(options), "results": results}


def setting(options: argparse.Namespace) -> dict[str, Any]:
    """What was run, and on what."""
    shape = {name: value for name, value in vars(options).items() if name != "out"}
    versions = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
    }
    machine = {
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "processor": platform.machine(),
        "load": os.getloadavg()[0],
    }
    return {**shape, **versions, **machine}


def main() -> None:
    """Measures, prints a table, and writes the record where asked."""
    options = arguments()
    if options.threads:
        torch.set_num_threads(options.threads)
    transformers.logging.set_verbosity_error()
    record = measure(options)
    for kind, result in record["results"].items():
        ratio = result["ratio"]
        print(
            f"{kind:9} patched ÷ plain {ratio['median']:.3f} [{ratio['low']:.3f}, {ratio['high']:.3f}] "
            f"(≤ {result['target']})"
            + "".join(
                f"; {name} {found['median']:.3f} [{found['low']:.3f}, {found['high']:.3f}]"
                for name, found in result.items()
                if name == "twice the rows"
            )
        )
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
