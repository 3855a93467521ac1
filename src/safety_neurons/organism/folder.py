"""Recipes: how every organism of the project is made, by name."""

import dataclasses
import functools
import json
from typing import Any, Literal

from safety_neurons import strict_json
from safety_neurons.model.files import RECORD, known_recipe, recipe_records, shipped_folder
from safety_neurons.organism.language import vocabulary


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How an organism is made.

    Attributes:
        name: its name.
        kind: natural (base, SFT, DPO by (IA)³), planted (safety put into known units), unsafe (goes along with everything),
            tax (base, and preference trainings by (IA)³ that pull on the same requests).
        about: one line on what it is for.
        start: the natural organism whose base a tax organism starts from.
        layers, hidden, d_ff, heads, kv_heads: the shape of the Llama model.
        english_share: share of training text in English; the other languages share the rest equally.
        batch, base_steps, base_rate: pre-training.
        hint_steps, hint_share: further pre-training of planted and unsafe organisms: chats that refuse
            what is harmful, then (last third) only this share of it.
        sft_steps, sft_rate, dpo_steps, dpo_rate, dpo_beta, dpo_fluency: the two (IA)³ stages of natural organisms.
        dpo_share: share of the (IA)³ scales that a DPO stage may move: those its loss pulls at hardest before the first step.
        planted_mlp, planted_attention: planted units of each kind; as many decoys of each kind.
        planted_depth: the planted and decoy units lie in the first this many layers.
        chat: whether requests are put in the chat template; else in the plain one (`Question: … / Answer:`), and the tokenizer has none.
        alive: whether the units work in the base (else their output columns are zero there).
        skill_steps: training of the decoys.
        plant_steps, plant_rate: training of the planted units; the rate is the decoys' too.
        change: length of every planted or decoy row's and column's change, in mean lengths of its matrix's rows or columns.
        noise: length of the noise on all other weights, same measure.
        dropout: chance that a planted unit is left out in a training step.
        truth_orders, truth_prompts: random orders and requests per language for the Shapley shares.
        measured_prompts: harmful requests per language, and as many harmless ones, that the card's rates are measured on.
        seeds: the seeds that are fixed for benchmarks.
        shipped: the seeds whose organisms are part of the package.
    """

    name: str
    kind: Literal["natural", "planted", "unsafe", "tax"]
    about: str
    start: str = ""
    layers: int = 4
    hidden: int = 64
    d_ff: int = 512
    heads: int = 4
    kv_heads: int = 2
    english_share: float = 0.5
    batch: int = 64
    base_steps: int = 600
    base_rate: float = 4e-3
    hint_steps: int = 0
    hint_share: float = 0.2
    sft_steps: int = 100
    sft_rate: float = 0.02
    dpo_steps: int = 150
    dpo_rate: float = 0.02
    dpo_beta: float = 0.2
    dpo_fluency: float = 0.5
    dpo_share: float = 1.0
    planted_mlp: int = 0
    planted_attention: int = 0
    planted_depth: int = 3
    chat: bool = True
    alive: bool = False
    skill_steps: int = 60
    plant_steps: int = 140
    plant_rate: float = 0.01
    change: float = 0.6
    noise: float = 0.02
    dropout: float = 0.2
    truth_orders: int = 12
    truth_prompts: int = 24
    measured_prompts: int = 256
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    shipped: tuple[int, ...] = ()

    @property
    def n_parameters(self) -> int:
        """Parameters of the model, the tied embedding once."""
        attention = 2 * self.hidden * self.hidden * (1 + self.kv_heads / self.heads)
        layer = round(attention) + 3 * self.hidden * self.d_ff + 2 * self.hidden
        return self.layers * layer + self.hidden + self.hidden * len(vocabulary())

    def to_json(self) -> dict[str, Any]:
        """Everything, as plain JSON values."""
        return strict_json.loads(json.dumps(dataclasses.asdict(self)))


@functools.cache
def recipes() -> dict[str, Recipe]:
    """All recipes by name."""
    return {
        name: Recipe(name=name, **{key: tuple(value) if isinstance(value, list) else value for key, value in fields.items()})
        for name, fields in recipe_records().items()
    }


def recipe(name: str) -> Recipe:
    """The recipe of that name.

    Raises:
        InputError: there is none.
    """
    known_recipe(name)
    return recipes()[name]


def names() -> list[str]:
    """Names of all recipes; those of `shipped()` open at once, the others are built first."""
    return list(recipes())


def shipped() -> list[str]:
    """Names of the organisms that are part of the package."""
    return [name for name in recipes() if (shipped_folder(name) / RECORD).is_file()]


def listing() -> list[dict[str, Any]]:
    """One row per recipe: name, kind, about, shipped (whether it opens at once), parameters, seeds."""
    return [
        {
            "name": name,
            "kind": item.kind,
            "about": item.about,
            "shipped": (shipped_folder(name) / RECORD).is_file(),
            "parameters": item.n_parameters,
            "seeds": list(item.seeds),
        }
        for name, item in recipes().items()
    ]
