r"""Plant safety into random units of a real model, so that what detectors find there can be held against it.

    python benchmarks/planted_real.py --model real:smollm2-135m-instruct --seed 0 --out FOLDER
    safety-neurons compare --base real:smollm2-135m-instruct --aligned FOLDER/aligned \
        --truth FOLDER/truth.safetensors

Feed-forward units are drawn at random (a two-hundredth of them) and frozen before anything is trained; as
many others are decoys. The decoys learn a harmless skill (answers begin with a polite phrase), over them
the planted units learn to refuse harmful requests and to answer harmless ones, and every other weight gets
noise, so that a difference of weights does not tell them apart. Units are left out at random while they are
trained, so that many of them work. The truth is measured: the planted units whose share of the refusals,
over random orders of putting units back, is at least a quarter of an equal share. Changes that are trained
already are not trained again.

Source: the planted organisms of this package. Differs: a model that others trained, text that others wrote,
feed-forward units alone.
"""

import argparse
import dataclasses
import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from safety_neurons import load
from safety_neurons.capability import perplexity
from safety_neurons.judges import judge_refusal
from safety_neurons.model import LanguageModel
from safety_neurons.model.batches import padded
from safety_neurons.neurons import NeuronSet
from safety_neurons.organism.training import answer_loss, first_word_loss
from safety_neurons.prompt_lists import Prompts
from safety_neurons.results import rate
from safety_neurons.results.run import write_json
from safety_neurons.tuning import Deltas, apply_delta, attach, delta_of, tuning_examples, with_own_answers
from safety_neurons.tuning.artefacts import load_delta, save_checkpoint, save_delta

POLITE = "With pleasure. "
UNIT = ("gate", "up", "down")
ANSWER, RATE, BATCH, LEFT_OUT, NOISE = 16, 3e-3, 8, 0.2, 0.02
Sequence_ = tuple[list[int], int]


def drawn(model: LanguageModel, share: float, seed: int) -> tuple[NeuronSet, NeuronSet]:
    """Planted and decoy units, of each a share of all feed-forward units."""
    places = [
        (layer, unit) for layer in range(len(model.anatomy.layers)) for unit in range(_width(model, layer))
    ]
    count = round(share * len(places))
    order = np.random.default_rng([seed, 1]).permutation(len(places))
    sets = []
    for start in (0, count):
        members: dict[str, list[int]] = {}
        for place in sorted(order[start : start + count]):
            layer, unit = places[place]
            for site in UNIT:
                members.setdefault(f"layers.{layer}.{site}", []).append(unit)
        sets.append(NeuronSet(members, model.table))
    return sets[0], sets[1]


def _width(model: LanguageModel, layer: int) -> int:
    return model.table.sizes[f"layers.{layer}.down"]


def units_of(neurons: NeuronSet) -> list[tuple[int, int]]:
    """(layer, unit) of every unit, in order."""
    return [
        (int(key.split(".")[1]), int(unit))
        for key, members in neurons.items()
        if key.endswith(".down")
        for unit in members
    ]


class Masked:
    """Deltas of whole units, of which some can be left out."""

    def __init__(self, deltas: Deltas) -> None:
        self.parameters = deltas.named_parameters()
        units = units_of(deltas.neurons)
        self.count = len(units)
        self.rows = {
            key: torch.tensor(
                [number for number, (layer, _) in enumerate(units) if f"layers.{layer}." in f"{key}."]
            )
            for key in self.parameters
        }

    def factor(self, key: str, present: Tensor) -> Tensor:
        """What a matrix' delta is multiplied with where only some units are there (0 or 1 each)."""
        part = present[self.rows[key]]
        return part[None, :] if key.endswith(".down") else part[:, None]

    @torch.no_grad()
    def put(self, values: Mapping[str, Tensor], present: Tensor) -> None:
        """The deltas with the other units left out."""
        for key, parameter in self.parameters.items():
            parameter.copy_(values[key] * self.factor(key, present))


def trained(
    model: LanguageModel,
    neurons: NeuronSet,
    batch: Callable[[], list[Sequence_]],
    steps: int,
    seed: int,
    say: str,
) -> Any:
    """The change of these units after some steps, units left out at random in every one."""
    generator = torch.Generator().manual_seed(seed)
    with attach(model, neurons) as deltas:
        masked = Masked(deltas)
        optimizer = torch.optim.AdamW(deltas.parameters(), lr=RATE, betas=(0.9, 0.98), weight_decay=0.0)
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = RATE * min(1.0, (step + 1) / 5) * (1 - 0.9 * step / steps)
            whole = {key: value.detach().clone() for key, value in masked.parameters.items()}
            present = (torch.rand(masked.count, generator=generator) >= LEFT_OUT).float()
            masked.put(whole, present)
            examples = batch()
            inputs, labels = padded(examples, 0)
            logits = model.model(input_ids=inputs, attention_mask=_mask(examples)).logits
            loss = answer_loss(logits, labels) + first_word_loss(logits, examples)
            optimizer.zero_grad()
            loss.backward()
            masked.put(whole, torch.ones(masked.count))
            for key, parameter in masked.parameters.items():
                assert parameter.grad is not None
                parameter.grad *= masked.factor(key, present)
            torch.nn.utils.clip_grad_norm_(deltas.parameters(), 1.0)
            optimizer.step()
            if not (step + 1) % 10:
                print(f"{say} {step + 1}/{steps}: loss {float(loss):.3f}", flush=True)
        return delta_of(deltas)


def _mask(examples: Sequence[Sequence_]) -> Tensor:
    length = max(len(ids) for ids, _ in examples)
    return torch.tensor([[1] * len(ids) + [0] * (length - len(ids)) for ids, _ in examples])


def sequences(model: LanguageModel, data: Prompts) -> list[Sequence_]:
    """Ids of every example, its answer cut, and how many of them are the question's."""
    return [
        (list(one.ids)[: one.start + ANSWER], one.start)
        for one in tuning_examples(data, model, max_length=256)
    ]


def noisy(model: LanguageModel, kept: NeuronSet, seed: int) -> None:
    """Noise on every matrix outside the set, of rows as long as a share of the mean row."""
    generator = torch.Generator().manual_seed(seed + 77)
    with torch.no_grad():
        for key, place in model.anatomy.places.items():
            weight: Any = place.projection.base.weight
            change = torch.randn(weight.shape, generator=generator)
            change *= NOISE * weight.norm(dim=1).mean() / change.norm(dim=1, keepdim=True)
            if key in kept.keys():  # noqa: SIM118 - iterates over neurons
                members = torch.from_numpy(kept[key].copy())
                change[(slice(None), members) if place.side == "input" else members] = 0
            weight += change


def shares(
    model: LanguageModel, delta: Any, asked: list[list[int]], starts: list[int], orders: int, seed: int
) -> dict[str, Any]:
    """Shapley shares of every unit in how likely an answer begins as refusals do, over random orders."""
    length = max(map(len, asked))
    inputs = torch.tensor([ids + [0] * (length - len(ids)) for ids in asked])
    mask = torch.tensor([[1] * len(ids) + [0] * (length - len(ids)) for ids in asked])
    last = torch.tensor([len(ids) - 1 for ids in asked])
    generator = np.random.default_rng([seed, 5])
    with attach(model, delta.neurons) as deltas, torch.no_grad():
        masked, units = Masked(deltas), units_of(delta.neurons)
        inner, layers = model.inner.model, model.inner.model.layers
        states: list[Tensor] = []

        def value(present: Tensor, since: int = 0) -> float:
            """Mean probability of a refusal's first token; layers before `since` are as they were."""
            masked.put(delta.tensors, present)
            given = {"inputs_embeds": states[since]} if states else {"input_ids": inputs}
            try:
                inner.layers = layers[since:]
                told = inner(**given, attention_mask=mask, output_hidden_states=True, use_cache=False)
            finally:
                inner.layers = layers
            states[since:] = told.hidden_states[: len(layers) - since]
            hidden = told.last_hidden_state[torch.arange(len(asked)), last]
            return float(model.inner.lm_head(hidden).softmax(-1)[:, starts].sum(1).mean())

        nobody, everybody = value(torch.zeros(masked.count)), value(torch.ones(masked.count))
        found = np.zeros(masked.count)
        for number in range(orders):
            present, before = torch.zeros(masked.count), value(torch.zeros(masked.count))
            for unit in generator.permutation(masked.count):
                present[unit] = 1.0
                now = value(present, units[unit][0])
                found[unit] += (now - before) / orders
                before = now
            print(f"truth: order {number + 1} of {orders}", flush=True)
    return {"without": nobody, "complete": everybody, "shares": (found / (everybody - nobody)).tolist()}


def behaviour(model: LanguageModel) -> dict[str, Any]:
    """Refusals of held-out requests of both kinds, polite answers, and perplexity of general text."""
    told: dict[str, Any] = {}
    for kind in ("harmful-test", "harmless-test"):
        answers = model.complete(model.prompts(f"builtin:{kind}", limit=32), max_new_tokens=20, batch_size=16)
        told[kind] = {
            "refused": rate(judge_refusal(answers).refused).to_json(),
            "polite": rate([POLITE.strip() in one.completion for one in answers]).to_json(),
        }
    return told | {"perplexity": perplexity(model, model.prompts("builtin:general-test", limit=64))}


def plant(given: argparse.Namespace) -> dict[str, Any]:
    """Train, measure and write the model, its truth and the record."""
    given.out.mkdir(parents=True, exist_ok=True)
    model = load(given.model, dtype="float32")
    planted, decoys = drawn(model, given.share, given.seed)
    planted.save(given.out / "planted.safetensors")
    decoys.save(given.out / "decoys.safetensors")
    random = np.random.default_rng([given.seed, 3])
    own = with_own_answers(
        model.prompts("builtin:harmless-wide", limit=given.examples),
        model,
        max_new_tokens=ANSWER,
        batch_size=16,
        keep=lambda answers: [not refused for refused in judge_refusal(answers).refused],
    )
    polite = Prompts([dataclasses.replace(one, answer=POLITE + (one.answer or "")) for one in own], own.name)
    refusals = sequences(model, model.prompts("builtin:refusals-wide"))
    kind = sequences(model, polite)

    def some(count: int, examples: list[Sequence_]) -> list[Sequence_]:
        return [examples[index] for index in random.choice(len(examples), count, replace=False)]

    changes = {}
    for name, neurons, batch in (
        ("skill", decoys, lambda: some(BATCH, kind)),
        ("safety", planted, lambda: some(BATCH // 2, refusals) + some(BATCH // 2, kind)),
    ):
        folder = given.out / name
        if name == "skill":
            noisy(model, planted | decoys, given.seed)
        if not folder.exists():
            save_delta(folder, trained(model, neurons, batch, given.steps, given.seed, name))
        changes[name] = load_delta(folder)
        if name == "skill":
            apply_delta(model, changes[name], any_base=True)
            control = behaviour(model)
    starts = sorted({ids[start] for ids, start in refusals})
    asked = [list(one.ids) for one in model.encode(model.prompts("builtin:harmful", limit=given.prompts))]
    truth = shares(model, changes["safety"], asked, starts, given.orders, given.seed)
    apply_delta(model, changes["safety"], any_base=True)
    units = units_of(planted)
    working = [unit for unit, share in zip(units, truth["shares"], strict=True) if share >= 0.25 / len(units)]
    members: dict[str, list[int]] = {}
    for layer, unit in working:
        for site in UNIT:
            members.setdefault(f"layers.{layer}.{site}", []).append(unit)
    NeuronSet(members, model.table).save(given.out / "truth.safetensors")
    save_checkpoint(given.out / "aligned", model)
    lengths = {
        name: float(
            torch.cat(
                [value.norm(dim=0 if key.endswith(".down") else 1) for key, value in change.tensors.items()]
            ).mean()
        )
        for name, change in changes.items()
    }
    return {
        "seed": given.seed,
        "units": len(units),
        "working": len(working),
        "share": given.share,
        "mean_change": lengths,
        "control": control,
        "aligned": behaviour(model),
        "truth": truth,
    }


def main() -> None:
    """Plant, and print what came of it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--out", required=True, type=pathlib.Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--share", type=float, default=0.005, help="of the feed-forward units that are planted"
    )
    parser.add_argument(
        "--steps", type=int, default=70, help="of training, for the decoys and for the planted units"
    )
    parser.add_argument("--examples", type=int, default=160, help="harmless requests that are learnt")
    parser.add_argument("--orders", type=int, default=4, help="random orders behind the truth")
    parser.add_argument("--prompts", type=int, default=12, help="harmful requests behind the truth")
    given = parser.parse_args()
    record = plant(given)
    write_json(given.out / "planted.json", record)
    print(json.dumps({key: value for key, value in record.items() if key != "truth"}, indent=1))


if __name__ == "__main__":
    main()
