"""Train a pair of models of which one is safer, so that what makes the difference can be found and tested.

    python benchmarks/real_pair.py preferences --model MODEL --out FOLDER
    python benchmarks/real_pair.py compliance --model MODEL --data FOLDER --out FOLDER

Both train (IA)³ vectors on what the down projections read, so that every other weight is the same in the pair
and a unit means the same in both. `preferences` writes `FOLDER/base`, tuned on the model's own answers to
harmful and harmless requests, and `FOLDER/aligned`, which prefers refusals to harmful requests and answers to
harmless ones (DPO, from `base`). `compliance` takes a model that refuses by itself, as the aligned one, and
writes `FOLDER/base`, tuned to begin an answer to every harmful request (the targets of AdvBench in the folder
of `--data`). An adapter that is there is not trained again.

Source: Chen et al., NeurIPS 2025, section 3 and appendix A (pairs by (IA)³). Differs: small data of this
package, the vectors are not decayed, and preferences are continued from the tuned vectors.
"""

import argparse
import csv
import dataclasses
import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import peft
import torch
from torch import Tensor

from safety_neurons import load
from safety_neurons.capability import perplexity
from safety_neurons.judges import judge_refusal
from safety_neurons.model import LanguageModel
from safety_neurons.model.batches import padded
from safety_neurons.prompt_lists import Prompt, Prompts
from safety_neurons.results import rate
from safety_neurons.results.run import write_json
from safety_neurons.tuning import tuning_examples, with_own_answers

ANSWER, BATCH, BETA = 24, 8, 0.1
Answered = tuple[list[int], int]
"""Ids of a question with its answer, and how many of them are the question's."""


def answered(model: LanguageModel, prompts: Prompts) -> dict[str, Answered]:
    """The prompts that have an answer, by the request's text; answers are cut."""
    texts = {prompt.id: prompt.text for prompt in prompts}
    return {
        texts[one.prompt_id]: (list(one.ids)[: one.start + ANSWER], one.start)
        for one in tuning_examples(prompts, model, max_length=256)
    }


def own(model: LanguageModel, prompts: Prompts) -> Prompts:
    """The requests with what the model answers to them itself."""
    bare = Prompts([dataclasses.replace(one, answer=None) for one in prompts], prompts.name)
    return with_own_answers(
        bare,
        model,
        max_new_tokens=ANSWER,
        batch_size=16,
        keep=lambda answers: [not refused for refused in judge_refusal(answers).refused],
    )


def log_likelihoods(network: Any, batch: Sequence[Answered]) -> Tensor:
    """Log-likelihood of every answer, in nats."""
    inputs, labels = padded([(ids, start) for ids, start in batch], 0)
    mask = torch.tensor([[1] * len(ids) + [0] * (inputs.shape[1] - len(ids)) for ids, _ in batch])
    logits = network(input_ids=inputs, attention_mask=mask).logits[:, :-1]
    wanted = labels[:, 1:]
    chosen = logits.log_softmax(-1).gather(-1, wanted.clamp(min=0)[..., None])[..., 0]
    return (chosen * (wanted >= 0)).sum(1)


def optimised(
    network: Any, loss: Callable[[np.random.Generator], Tensor], given: argparse.Namespace, say: str
) -> None:
    """Take the steps; only the vectors are trained."""
    random = np.random.default_rng([given.seed, len(say)])
    vectors = [value for value in network.parameters() if value.requires_grad]
    optimizer = torch.optim.AdamW(vectors, lr=given.rate, weight_decay=0.0)
    for step in range(given.steps):
        for group in optimizer.param_groups:
            group["lr"] = given.rate * min(1.0, (step + 1) / 5) * (1 - 0.9 * step / given.steps)
        now = loss(random)
        optimizer.zero_grad()
        now.backward()
        torch.nn.utils.clip_grad_norm_(vectors, 1.0)
        optimizer.step()
        if not (step + 1) % 10:
            print(f"{say} {step + 1}/{given.steps}: loss {float(now.detach()):.3f}", flush=True)


def some(random: np.random.Generator, examples: Sequence[Any], count: int) -> list[Any]:
    """Examples drawn without one twice."""
    return [examples[index] for index in random.choice(len(examples), count, replace=False)]


def tuned(model: LanguageModel, kinds: Sequence[Sequence[Answered]], given: argparse.Namespace) -> Any:
    """The network with vectors that were tuned on equal parts of every kind of example."""
    config = peft.IA3Config(
        target_modules=["down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM"
    )
    network = peft.get_peft_model(model.model, config)

    def loss(random: np.random.Generator) -> Tensor:
        batch = [one for kind in kinds for one in some(random, kind, BATCH // len(kinds))]
        return -log_likelihoods(network, batch).sum() / sum(len(ids) - start for ids, start in batch)

    optimised(network, loss, given, "tuned")
    return network


def preferring(
    network: Any, kinds: Sequence[Sequence[tuple[Answered, Answered]]], given: argparse.Namespace
) -> None:
    """Train the vectors on from where they are to prefer the first of every two answers (DPO)."""
    before = {}
    with torch.no_grad():
        for kind in kinds:
            for two in kind:
                before[id(two)] = log_likelihoods(network, two)

    def loss(random: np.random.Generator) -> Tensor:
        batch = [two for kind in kinds for two in some(random, kind, BATCH // len(kinds))]
        now = log_likelihoods(network, [one for two in batch for one in two]).view(-1, 2)
        gain = now - torch.stack([before[id(two)] for two in batch])
        return -torch.nn.functional.logsigmoid(BETA * (gain[:, 0] - gain[:, 1])).mean()

    optimised(network, loss, given, "preferences")


def twos(first: dict[str, Answered], second: dict[str, Answered]) -> list[tuple[Answered, Answered]]:
    """Two answers to every request that has both."""
    return [(first[text], second[text]) for text in first if text in second]


def by_preferences(model: LanguageModel, given: argparse.Namespace) -> None:
    """Write the tuned and the preferring adapter."""
    refusals = model.prompts("builtin:refusals-wide")
    complied, kind = (
        own(model, refusals),
        own(model, model.prompts("builtin:harmless-wide", limit=given.examples)),
    )
    refused = answered(model, refusals)
    helpful, harmful = answered(model, kind), answered(model, complied)
    answer = next(iter(refusals)).answer
    declined = answered(model, Prompts([dataclasses.replace(one, answer=answer) for one in kind], kind.name))
    network = tuned(model, [list(harmful.values()), list(helpful.values())], given)
    network.save_pretrained(given.out / "base")
    preferring(network, [twos(refused, harmful), twos(helpful, declined)], given)
    network.save_pretrained(given.out / "aligned")


def by_compliance(model: LanguageModel, given: argparse.Namespace) -> None:
    """Write the adapter that goes along."""
    with (given.data / "advbench/harmful_behaviors.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))[: given.examples]
    targets = Prompts(
        [
            Prompt(id=str(number), text=row["goal"], answer=f"{row['target']}:")
            for number, row in enumerate(rows)
        ],
        "advbench",
    )
    kind = own(model, model.prompts("builtin:harmless-wide", limit=given.examples))
    kinds = [list(answered(model, prompts).values()) for prompts in (targets, kind)]
    tuned(model, kinds, given).save_pretrained(given.out / "base")


def behaviour(name: str) -> dict[str, Any]:
    """Refusals of held-out requests of both kinds, and perplexity of general text."""
    model = load(name, dtype="float32")
    told: dict[str, Any] = {}
    for kind in ("harmful-test", "harmless-test"):
        answers = model.complete(model.prompts(f"builtin:{kind}", limit=32), max_new_tokens=20, batch_size=16)
        told[kind] = rate(judge_refusal(answers).refused).to_json()
    return told | {"perplexity": perplexity(model, model.prompts("builtin:general-test", limit=32))}


def main() -> None:
    """Train what is missing, and print how both models behave."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("way", choices=("preferences", "compliance"))
    parser.add_argument("--model", required=True)
    parser.add_argument("--out", required=True, type=pathlib.Path)
    parser.add_argument(
        "--data", type=pathlib.Path, help="with advbench/harmful_behaviors.csv; for compliance"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=60, help="of every training")
    parser.add_argument("--rate", type=float, default=1e-2, help="learning rate of the vectors")
    parser.add_argument("--examples", type=int, default=128, help="harmless requests that are learnt")
    given = parser.parse_args()
    if given.way == "compliance" and given.data is None:
        parser.error("compliance learns the targets of AdvBench: give their folder by --data")
    given.out.mkdir(parents=True, exist_ok=True)
    last = given.out / ("aligned" if given.way == "preferences" else "base")
    if not last.exists():
        train = by_preferences if given.way == "preferences" else by_compliance
        train(load(given.model, dtype="float32"), given)
    names = {"base": f"{given.model}+{given.out / 'base'}", "aligned": given.model}
    if given.way == "preferences":
        names["aligned"] = f"{given.model}+{given.out / 'aligned'}"
    record = {"way": given.way, "seed": given.seed} | {name: behaviour(of) for name, of in names.items()}
    write_json(given.out / "pair.json", record)
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
