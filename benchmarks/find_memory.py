"""Peak memory of `find` on 1,000 prompts ÷ on 10 prompts of the same lengths, at a fixed batch size.

    python benchmarks/find_memory.py --repetitions 5

Every search runs in a process of its own. The ratio is of whole peaks, as a user sees them in `top`; since
most of such a peak is Python, PyTorch and the model, the growth in MiB stands beside it, and the memory that
a search takes above the loaded model.
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

METHODS = ("importance", "contrast")
LENGTHS = (12, 14, 16, 18, 20, 22, 24, 26, 28, 30)
BATCH_SIZE = 8
WORDS = tuple(f"word{number}" for number in range(500))
MIB = 2**20


def prompts_of(number: int) -> list[str]:
    """Random texts; every ten in a row have the ten lengths."""
    drawn = random.Random(0)
    return [" ".join(drawn.choices(WORDS, k=LENGTHS[index % len(LENGTHS)])) for index in range(number)]


def model_of(seed: int) -> Any:
    """A random Llama of 4 layers, hidden 128, with a tokenizer of whole words."""
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
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
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


def child(method: str, number: int) -> dict[str, float]:
    """One search in this process: bytes before it and at its peak."""
    import torch
    import transformers

    from safety_neurons import detectors
    from safety_neurons.prompt_lists import Prompts

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    models = [model_of(seed) for seed in ((0,) if method == "importance" else (0, 1))]
    loaded, start = peak(), time.perf_counter()
    if method == "importance":
        found = detectors.find_importance(
            models[0], Prompts.from_list(prompts_of(number)), batch_size=BATCH_SIZE, top=0.01
        )
    else:
        found = detectors.find_contrast(
            *models, Prompts.from_list(prompts_of(number)), batch_size=BATCH_SIZE, max_new_tokens=16
        )
    assert found.prompts.used == number, found.prompts
    return {"loaded": loaded, "peak": peak(), "seconds": time.perf_counter() - start}


def search(method: str, number: int) -> dict[str, float]:
    """The same in a fresh process."""
    words = [
        sys.executable,
        str(pathlib.Path(__file__).resolve()),
        "--child",
        method,
        "--prompts",
        str(number),
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
    what = f"find {method}, {options.many:,} ÷ {options.few} prompts"
    return [
        Row(f"{what}: peak memory", median([b["peak"] / a["peak"] for a, b in pairs]), 1.05),
        Row(f"{what}: growth", median([(b["peak"] - a["peak"]) / MIB for a, b in pairs]), unit="MiB"),
        Row(
            f"find {method}, {options.few} prompts: above the loaded model",
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
    options_parser.add_argument("--child", choices=METHODS, help=argparse.SUPPRESS)
    options_parser.add_argument("--prompts", type=int, help=argparse.SUPPRESS)
    options = options_parser.parse_args()
    if options.child:
        print(json.dumps(child(options.child, options.prompts)))
        return
    rows: list[Row] = []
    runs: dict[str, Any] = {}
    for method in METHODS:
        both: dict[int, list[dict[str, float]]] = {options.few: [], options.many: []}
        for repetition in range(options.repetitions):
            for number in list(both)[:: 1 if repetition % 2 == 0 else -1]:
                both[number].append(search(method, number))
        rows += rows_of(method, both[options.few], both[options.many], options)
        runs[method] = {str(number): measured for number, measured in both.items()}
    finish(
        "find_memory", rows, options, {"runs": runs, "batch_size": BATCH_SIZE, "prompt_words": LENGTHS}, load
    )


if __name__ == "__main__":
    main()
