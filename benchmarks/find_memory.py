"""Peak memory of `find` on 1,000 prompts ÷ on 10 prompts of the same lengths, at a fixed batch size.

    python benchmarks/find_memory.py --repetitions 5
    python benchmarks/find_memory.py --few 1000 --many 100000 --methods importance guard --batch-size 64 \
        --repetitions 1 --name hundred_thousand

Every search runs in a process of its own. The ratio is of whole peaks, as a user sees them in `top`; since
most of such a peak is Python, PyTorch and the model, the growth in MiB stands beside it, and the memory that
a search takes above the loaded model. `guard` is `guard evaluate` with one random set, of a guard that was
fitted on 128 other requests.
"""

import argparse
import json
import os
import pathlib
import random
import resource
import subprocess
import sys
import time
from typing import Any

from paired import Row, finish, median, parser

METHODS = ("importance", "contrast", "guard")
LENGTHS = (12, 14, 16, 18, 20, 22, 24, 26, 28, 30)
WORDS = tuple(f"word{number}" for number in range(500))
MIB = 2**20


def prompts_of(number: int) -> list[str]:
    """Random texts; every ten in a row have the ten lengths."""
    drawn = random.Random(0)
    return [" ".join(drawn.choices(WORDS, k=LENGTHS[index % len(LENGTHS)])) for index in range(number)]


def model_of(seed: int, layers: int = 4, width: int = 128, context: int = 256) -> Any:
    """A random Llama of heads of 32 with a tokenizer of whole words."""
    import tokenizers
    import torch
    import transformers

    from safety_neurons.model import LanguageModel

    vocabulary = {word: index for index, word in enumerate(("<pad>", "<s>", "</s>", "<unk>", *WORDS))}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=width,
        intermediate_size=width * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=width // 32,
        num_key_value_heads=width // 64,
        max_position_embeddings=context,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LanguageModel(
        transformers.LlamaForCausalLM(config).eval(), tokenizer, template="none", name=f"random{seed}"
    )


def peak() -> int:
    """Largest resident size of this process so far, in bytes."""
    value = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return value if sys.platform == "darwin" else value * 1024


def child(method: str, number: int, batch_size: int) -> dict[str, float]:
    """One search in this process: bytes before it and at its peak, and seconds."""
    import torch
    import transformers

    from safety_neurons import detectors
    from safety_neurons.prompt_lists import Prompts

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    models = [model_of(seed) for seed in ((0, 1) if method == "contrast" else (0,))]
    guard = fitted(models[0]) if method == "guard" else None
    loaded, start = peak(), time.perf_counter()
    if guard is not None:
        evaluate_guarded(models[0], guard, number, batch_size)
        return {"loaded": loaded, "peak": peak(), "seconds": time.perf_counter() - start}
    if method == "importance":
        found = detectors.find_importance(
            models[0], Prompts.from_list(prompts_of(number)), batch_size=batch_size, top=0.01
        )
    else:
        found = detectors.find_contrast(
            *models, Prompts.from_list(prompts_of(number)), batch_size=batch_size, max_new_tokens=16
        )
    assert found.prompts.used == number, found.prompts
    return {"loaded": loaded, "peak": peak(), "seconds": time.perf_counter() - start}


def labelled(number: int, name: str) -> tuple[Any, Any]:
    """As many requests of either kind, told apart by a word."""
    from safety_neurons.prompt_lists import Prompts

    texts = prompts_of(number)
    halves = [f"word1 {text} {name}{at}" for at, text in enumerate(texts[::2])], texts[1::2]
    unsafe, safe = halves
    return Prompts.from_list(unsafe, f"{name} unsafe"), Prompts.from_list(safe, f"{name} safe")


def fitted(model: Any) -> Any:
    """A guard on a few neurons."""
    from safety_neurons.guard import fit_guard
    from safety_neurons.neurons import NeuronSet

    neurons = NeuronSet({"layers.1.down": range(20)}, model.table)
    return fit_guard(model, neurons, *labelled(128, "fit"), other=None, pooling="mean")


def evaluate_guarded(model: Any, guard: Any, number: int, batch_size: int) -> None:
    """`guard evaluate` on so many requests."""
    from safety_neurons.studies.guard_evaluation import evaluate_guard

    unsafe, safe = labelled(number, "test")
    done = evaluate_guard(
        model, guard, [unsafe], [safe], batch_size=batch_size, random=1, perturbations=(), over_refusal=()
    )
    assert len(done.scored.cases) == number, len(done.scored.cases)


def search(method: str, number: int, batch_size: int) -> dict[str, float]:
    """The same in a fresh process."""
    words = [
        sys.executable,
        str(pathlib.Path(__file__).resolve()),
        "--child",
        method,
        "--prompts",
        str(number),
        "--batch-size",
        str(batch_size),
    ]
    done = subprocess.run(
        words, capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def rows_of(
    method: str, few: list[dict[str, float]], many: list[dict[str, float]], options: argparse.Namespace
) -> list[Row]:
    """The table's lines of one method."""
    pairs = list(zip(few, many, strict=True))
    name = "guard evaluate" if method == "guard" else f"find {method}"
    what = f"{name}, {options.many:,} ÷ {options.few:,} prompts"
    return [
        Row(f"{what}: peak memory", median([b["peak"] / a["peak"] for a, b in pairs]), 1.05),
        Row(f"{what}: growth", median([(b["peak"] - a["peak"]) / MIB for a, b in pairs]), unit="MiB"),
        Row(
            f"{name}, {options.few:,} prompts: above the loaded model",
            median([(a["peak"] - a["loaded"]) / MIB for a in few]),
            unit="MiB",
        ),
    ]


def main() -> None:
    """Measure, print and write the record; or be one of the measured processes."""
    load = os.getloadavg()[0]
    options_parser = parser(__doc__ or "")
    options_parser.set_defaults(repetitions=5)
    options_parser.add_argument("--few", type=int, default=10)
    options_parser.add_argument("--many", type=int, default=1000)
    options_parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS[:2])
    options_parser.add_argument("--batch-size", type=int, default=8)
    options_parser.add_argument("--name", default="find_memory", help="of the record")
    options_parser.add_argument("--child", choices=METHODS, help=argparse.SUPPRESS)
    options_parser.add_argument("--prompts", type=int, help=argparse.SUPPRESS)
    options = options_parser.parse_args()
    if options.child:
        print(json.dumps(child(options.child, options.prompts, options.batch_size)))
        return
    rows: list[Row] = []
    runs: dict[str, Any] = {}
    for method in options.methods:
        both: dict[int, list[dict[str, float]]] = {options.few: [], options.many: []}
        for repetition in range(options.repetitions):
            for number in list(both)[:: 1 if repetition % 2 == 0 else -1]:
                both[number].append(search(method, number, options.batch_size))
        rows += rows_of(method, both[options.few], both[options.many], options)
        runs[method] = {str(number): measured for number, measured in both.items()}
    finish(options.name, rows, options, {"runs": runs, "prompt_words": LENGTHS}, load)


if __name__ == "__main__":
    main()
