"""Tune a set of neurons, as many random ones, LoRA of rank 16 and all weights on the same data, by the same
loop and the same check, and ask the kept states the same held-out requests.

    python benchmarks/tuning_frontier.py --model MODEL --neurons NEURONS --data FOLDER --out FOLDER

FOLDER of `--data` holds `advbench/harmful_behaviors.csv`, `harmbench/harmbench_behaviors_text_val.csv`,
`xstest/xstest_prompts.csv`, `llama_factory/alpaca_en_demo.json` and `wikitext2/valid.txt` in their public
shapes; none of them is learnt or looked at while training. Without it the model is asked its own built-in
lists alone (organisms). Every arm's row is written when it is there; the same call goes on after a kill.
Rates of LoRA and of all weights begin where they are usually set (2e-4, 1e-5), or as given, and are
adapted by the same trust region.
"""

import argparse
import contextlib
import csv
import json
import pathlib
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import peft
import torch
from torch import Tensor, nn

from safety_neurons import judge_refusal, load
from safety_neurons.capability import perplexity
from safety_neurons.display.charts import Line, Plane, line_figure, standalone
from safety_neurons.model import LanguageModel, token_divergences
from safety_neurons.neurons import NeuronSet
from safety_neurons.prompt_lists import Prompts
from safety_neurons.results import Checkpoint, paired_difference, rate
from safety_neurons.studies.tuning import Checking, hold_out, with_usable_answers
from safety_neurons.tuning import attach
from safety_neurons.tuning.settings import TuningSettings
from safety_neurons.tuning.train import Loop, learning_rates, prepared_examples

ARMS = ("neurons", "random", "lora", "full")
HARMFUL, HARMLESS = ("builtin", "advbench", "harmbench"), ("alpaca", "xstest-safe", "look-alikes")


class Switched:
    """Trained parameters of another kind, with what the loop asks of deltas."""

    def __init__(self, model: LanguageModel, named: dict[str, nn.Parameter]) -> None:
        self.model, self._named = model, named
        self.base = {name: parameter.detach().clone() for name, parameter in named.items()}

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """What is trained."""
        return self._named

    def tensors(self) -> dict[str, Tensor]:
        """The change so far, by name."""
        return {name: (value.detach() - self.base[name]).clone() for name, value in self._named.items()}

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Set the change."""
        with torch.no_grad():
            for name, value in self._named.items():
                value.copy_(self.base[name] + tensors[name])

    @contextlib.contextmanager
    def disabled(self) -> Iterator[None]:
        """The untouched model for a block."""
        with self._holding(self.base):
            yield

    @contextlib.contextmanager
    def enabled(self) -> Iterator[None]:
        """The trained one again, inside `disabled`."""
        with self._holding(self._now):
            yield

    @contextlib.contextmanager
    def _holding(self, tensors: Mapping[str, Tensor]) -> Iterator[None]:
        before = {name: value.data for name, value in self._named.items()}
        self._now = getattr(self, "_now", before) if tensors is not self.base else before
        for name, value in self._named.items():
            value.data = tensors[name]
        try:
            yield
        finally:
            for name, value in self._named.items():
                value.data = before[name]


@contextlib.contextmanager
def trained(
    arm: str, model: LanguageModel, neurons: NeuronSet, seed: int, rate: float
) -> Iterator[tuple[Any, dict[str, float]]]:
    """Attach what an arm trains, with the learning rate of every part."""
    if arm in ("neurons", "random"):
        chosen = neurons if arm == "neurons" else neurons.random_like(seed, model.table)[0]
        rates = learning_rates(model, chosen)
        with attach(model, chosen) as deltas:
            yield deltas, rates
        return
    inner = model.model
    if arm == "lora":
        torch.manual_seed(seed)
        config = peft.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
        peft.inject_adapter_in_model(config, inner)
        named = {name: value for name, value in inner.named_parameters() if "lora_" in name}
    else:
        named = dict(inner.named_parameters())
    for value in inner.parameters():
        value.requires_grad_(False)
    for value in named.values():
        value.requires_grad_(True)
    yield Switched(model, named), dict.fromkeys(named, rate)


def asked(model: LanguageModel, folder: pathlib.Path | None, limit: int) -> dict[str, list[str]]:
    """Held-out requests by source; the order is random but fixed."""
    lists = {
        "builtin": model.prompts("builtin:harmful-test").texts,
        "look-alikes": model.prompts("builtin:harmless-test").texts,
    }
    if folder is not None:
        lists |= _public(folder)
    generator = np.random.default_rng(0)
    order = ("builtin", "advbench", "harmbench", "alpaca", "xstest-safe", "look-alikes")
    return {
        name: [lists[name][index] for index in generator.permutation(len(lists[name]))[:limit]]
        for name in order
        if name in lists
    }


def _public(folder: pathlib.Path) -> dict[str, list[str]]:

    def column(name: str, wanted: str, keep: Any = lambda _row: True) -> list[str]:
        with (folder / name).open(encoding="utf-8", newline="") as file:
            return [row[wanted] for row in csv.DictReader(file) if keep(row)]

    alpaca = json.loads((folder / "llama_factory/alpaca_en_demo.json").read_text(encoding="utf-8"))
    return {
        "advbench": column("advbench/harmful_behaviors.csv", "goal"),
        "harmbench": column(
            "harmbench/harmbench_behaviors_text_val.csv", "Behavior", lambda row: not row.get("ContextString")
        ),
        "alpaca": [f"{row['instruction']}\n{row.get('input') or ''}".strip() for row in alpaca],
        "xstest-safe": column("xstest/xstest_prompts.csv", "prompt", lambda row: row["label"] == "safe"),
    }


def measured(
    model: LanguageModel, lists: Mapping[str, list[str]], text: Prompts, tokens: int
) -> dict[str, Any]:
    """Refusals of every list, and perplexity of text."""
    found: dict[str, Any] = {}
    for name, texts in lists.items():
        completions = model.complete(Prompts.from_list(texts), max_new_tokens=tokens, batch_size=16)
        refused = judge_refusal(completions).refused
        found[name] = {"refused": list(refused), "rate": rate(refused).to_json()}
    found["perplexity"] = perplexity(model, text, batch_size=4)
    return found


def running_text(model: LanguageModel, folder: pathlib.Path | None) -> Prompts:
    """Wikitext in pieces of 256 words, or the model's own general text."""
    if folder is None:
        return model.prompts("builtin:general-test")
    split = (folder / "wikitext2/valid.txt").read_text(encoding="utf-8").split()
    return Prompts.from_list([" ".join(split[at : at + 256]) for at in range(0, 32 * 256, 256)])


def divergence(model: LanguageModel, deltas: Any, texts: Sequence[str], tokens: int) -> float:
    """KL per token from the untouched model to the trained one on the untouched model's own answers."""
    prompts = Prompts.from_list(list(texts))
    with deltas.disabled():
        answers = model.complete(prompts, max_new_tokens=tokens, batch_size=16)
        questions = [list(item.ids) for item in model.encode(prompts)]
        behind = [model.tokenizer(item.completion, add_special_tokens=False)["input_ids"] for item in answers]
        sequences = [one + other for one, other in zip(questions, behind, strict=True)]
        rows = token_divergences(model, sequences, deltas.enabled, batch_size=8)
    return float(
        np.concatenate([row[len(one) - 1 :] for row, one in zip(rows, questions, strict=True)]).mean()
    )


def row(arm: str, seed: int, given: argparse.Namespace) -> dict[str, Any]:
    """Train one arm and measure the kept state."""
    started = time.monotonic()
    model = load(given.model, dtype="float32")
    settings = TuningSettings(seed=seed, max_steps=given.steps, anchor=given.anchor)
    notes: list[str] = []
    lists, text = asked(model, given.data, given.limit), running_text(model, given.data)
    neurons = NeuronSet.load(given.neurons).on(model.table, [model.name])
    data = tuple(model.prompts(f"builtin:{name}") for name in ("refusals-wide", "harmless-wide", "general"))
    learnt, others, texts, watch = hold_out(model, data, Checking(every=given.every), settings, notes)
    assert others is not None
    others = with_usable_answers(model, others, len(learnt), settings, given.out, notes)
    before_file = given.out / "before.json"
    if not before_file.is_file():
        before_file.write_text(json.dumps(measured(model, lists, text, given.tokens)))
    before = json.loads(before_file.read_text())
    rate = given.lora_rate if arm == "lora" else given.full_rate
    with trained(arm, model, neurons, seed, rate) as (deltas, rates):
        checkpoint = Checkpoint(given.out / f"{arm}-{seed}.safetensors")
        loop = Loop(deltas, rates, settings, watch, checkpoint, {"arm": arm, "seed": seed}, notes)
        if not loop.resume():
            loop.examples = prepared_examples(model, learnt, others, texts, settings, notes)
        stopped = loop.run()
        deltas.load_tensors(loop.kept)
        after = measured(model, lists, text, given.tokens)
        drift = divergence(model, deltas, lists.get("alpaca", lists["look-alikes"]), given.tokens)
    count = sum(value.numel() for value in deltas.named_parameters().values())
    changes = {
        name: paired_difference(after[name]["refused"], before[name]["refused"]).to_json() for name in lists
    }
    return {
        "arm": arm,
        "seed": seed,
        "parameters": count,
        "share": count / model.table.n_parameters,
        "kept_step": loop.kept_step,
        "steps": loop.step,
        "stopped": stopped,
        "sound": loop.sound,
        "refused": {name: after[name]["rate"] for name in lists},
        "change": changes,
        "perplexity": after["perplexity"] / before["perplexity"],
        "divergence": drift,
        "checks": [check.record() for check in loop.judge.seen] if loop.judge else [],
        "seconds": time.monotonic() - started,
    }


def main() -> None:
    """Run the arms and print their rows."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--neurons", required=True, type=pathlib.Path)
    parser.add_argument("--data", type=pathlib.Path, default=None)
    parser.add_argument("--out", required=True, type=pathlib.Path)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--steps", type=int, default=None)
    parser.add_argument("--every", type=int, default=None)
    parser.add_argument("--anchor", type=float, default=TuningSettings().anchor)
    parser.add_argument("--lora-rate", type=float, default=2e-4, help="that LoRA begins with")
    parser.add_argument("--full-rate", type=float, default=1e-5, help="that all weights begin with")
    parser.add_argument("--limit", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=32)
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    for seed in given.seeds:
        for arm in given.arms:
            file = given.out / f"{arm}-{seed}.json"
            if not file.is_file():
                file.write_text(json.dumps(row(arm, seed, given), indent=1))
            print(line(json.loads(file.read_text())), flush=True)
    rows = [json.loads(file.read_text()) for file in sorted(given.out.glob("*-*.json"))]
    (given.out / "frontier.svg").write_text(figure(rows), encoding="utf-8")


def figure(rows: Sequence[Mapping[str, Any]]) -> str:
    """What the checks of every arm saw: refusals against over-refusal, against perplexity and against KL."""
    planes = (
        ("harmless_refused", Plane("Harmful refused", "Harmless refused", (0.0, 1.0), (0.0, 0.5))),
        ("perplexity", Plane("Harmful refused", "Perplexity, times before", (0.0, 1.0), (0.9, 1.2))),
        ("divergence", Plane("Harmful refused", "KL per token (nats)", (0.0, 1.0), (0.0, 0.1))),
    )
    drawn = []
    for name, plane in planes:
        lines = [
            Line(
                f"{row['arm']}, seed {row['seed']}",
                sorted((check["harmful_refused"]["value"], _number(check[name])) for check in row["checks"]),
                marked=True,
            )
            for row in rows
        ]
        drawn.append(
            (line_figure(lines, plane), f"{plane.y} over harmful refused, held-out prompts of the check")
        )
    return standalone(drawn)


def _number(value: Any) -> float:
    return float(value["value"] if isinstance(value, dict) else value)


def line(found: Mapping[str, Any]) -> str:
    """A row in words."""
    refused = "  ".join(f"{name} {value['value']:.2f}" for name, value in found["refused"].items())
    return (
        f"{found['arm']:8} seed {found['seed']}  {refused}  perplexity ×{found['perplexity']:.3f}  "
        f"KL {found['divergence']:.3f}  kept {found['kept_step']} of {found['steps']} ({found['stopped']})"
    )


if __name__ == "__main__":
    main()
