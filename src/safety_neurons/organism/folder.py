"""Organisms by name: the frozen recipes they are made by, their folders on disk, and loading their models (`organism:NAME[/STAGE]`)."""

import dataclasses
import functools
import importlib.resources
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from safety_neurons import model, strict_json
from safety_neurons.errors import InputError
from safety_neurons.model import LanguageModel, Pair
from safety_neurons.neurons import NeuronSet
from safety_neurons.organism.language import vocabulary
from safety_neurons.results.files import plain_name, read_json


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
    source = importlib.resources.files("safety_neurons.organism") / "data" / "recipes.json"
    entries = strict_json.loads(source.read_text(encoding="utf-8"))
    found = {}
    for name, fields in entries.items():
        fields = {key: tuple(value) if isinstance(value, list) else value for key, value in fields.items()}
        found[name] = Recipe(name=name, **fields)
    return found


def recipe(name: str) -> Recipe:
    """The recipe of that name.

    Raises:
        InputError: there is none.
    """
    if name not in recipes():
        raise InputError(f"no organism is called {name!r}; the recipes are {', '.join(recipes())}")
    return recipes()[name]


RECORD, CARD, PROMPTS, TRUTH = "organism.json", "README.md", "prompts", "truth"


@dataclasses.dataclass(frozen=True)
class OrganismFolder:
    """An organism on disk.

    Attributes:
        path: its folder.
        record: what `organism.json` says: recipe, seed, stages, what was measured, truth.
    """

    path: Path
    record: dict[str, Any]

    @property
    def stages(self) -> list[str]:
        """Names of its models, from the least to the most trained."""
        return list(self.record["stages"])

    def spec(self, stage: str) -> str:
        """The model argument of a stage, or the path of one of its neuron files (`truth`, `decoys`, …).

        Raises:
            InputError: it has neither of that name.
        """
        if stage in self.record["stages"]:
            return "+".join(str(self.path / plain_name(part, "folder of a stage")) for part in self.record["stages"][stage])
        plain_name(stage, "stage")
        file = self.path / f"{stage}.safetensors"
        if file.is_file():
            return str(file)
        sets = sorted(path.stem for path in self.path.glob("*.safetensors"))
        raise InputError(f"organism {self.record['name']} has no {stage!r}; it has {', '.join([*self.stages, *sets])}")

    @property
    def base(self) -> str:
        """The model argument of the less safe model of its pair."""
        return self.spec(self.record["base"])

    @property
    def aligned(self) -> str:
        """The model argument of the safer model of its pair; for an organism without one, its only model."""
        return self.spec(self.record["aligned"])

    @property
    def prompts(self) -> Path:
        """The folder of its own prompts; pass it as `folder` where `builtin:` names are read."""
        return self.path / PROMPTS

    @property
    def truth(self) -> NeuronSet | None:
        """The neurons that carry its safety, where they are known: those that work in English."""
        file = self.path / f"{TRUTH}.safetensors"
        return NeuronSet.load(file) if file.is_file() else None

    @property
    def card(self) -> Path:
        """The model card."""
        return self.path / CARD


def shipped_folder(name: str) -> Path:
    """Where the package keeps the organism of that name, whether or not it is there."""
    return Path(str(importlib.resources.files("safety_neurons.organism"))) / "data" / "organisms" / name


def names() -> list[str]:
    """Names of all recipes; those of `shipped()` open at once, the others are built first."""
    return list(recipes())


def shipped() -> list[str]:
    """Names of the organisms that are part of the package."""
    return [name for name in recipes() if (shipped_folder(name) / RECORD).is_file()]


def open_organism(name: str | Path) -> OrganismFolder:
    """Open an organism by its name or by the folder it was built in.

    Raises:
        InputError: there is no such organism, or it has to be built first.
    """
    folder = Path(name)
    if not (folder / RECORD).is_file():
        if isinstance(name, Path):
            raise InputError(f"{name}: no {RECORD}; expected the folder of an organism; write one with `organism build`")
        recipe(name)
        folder = shipped_folder(name)
        if not (folder / RECORD).is_file():
            raise InputError(f"organism {name!r} is not in the package; `safety-neurons organism build --name {name} --out DIR` makes it")
    record = read_json(folder / RECORD)
    if not isinstance(record, dict) or "stages" not in record:
        raise InputError(f"{folder / RECORD} has no stages; expected the record of an organism; build it again")
    plain_name(record.get("name"), f"{folder / RECORD}: the organism")
    return OrganismFolder(folder.absolute(), record)


def spec(address: str) -> str:
    """The model argument or neuron file of `NAME[/STAGE]`; without a stage, the aligned model."""
    name, _, stage = address.partition("/")
    folder = open_organism(name)
    return folder.spec(stage) if stage else folder.aligned


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


PREFIX = "organism:"


def load(name: str | Path, **options: Any) -> LanguageModel:
    """Loads a model argument: `ID[@REVISION][+ADAPTER…]`, a folder, or `organism:NAME[/STAGE]`.

    Args:
        name: The model argument.
        **options: As for `safety_neurons.model.load` (device, dtype, template, system, template_args, offline, …).

    Raises:
        UsageError: No such organism, or none of its stages.
        ModelError: As for `safety_neurons.model.load`.
    """
    loaded = model.load(_folders(name), **options)
    return _named(loaded, name)


def load_pair(base: str | Path, aligned: str | Path, **options: Any) -> Pair:
    """Loads the two models of a comparison; two adapters on one base share it in memory.

    Args:
        base: The less safe model, as for `load`.
        aligned: The safer one.
        **options: As for `load`.

    Raises:
        MismatchError: Models of different shapes, or tokenizers that disagree.
        UsageError: As for `load`.
        ModelError: As for `load`.
    """
    pair = model.load_pair(_folders(base), _folders(aligned), **options)
    _named(pair.base, base)
    _named(pair.aligned, aligned)
    return pair


def load_several(names: Sequence[str | Path], **options: Any) -> list[LanguageModel]:
    """Loads models that are compared with one another; adapters on one base share it in memory.

    Args and errors as for `load_pair`.
    """
    models, _ = model.load_several([_folders(name) for name in names], **options)
    return [_named(loaded, name) for loaded, name in zip(models, names, strict=True)]


def _folders(name: str | Path) -> str | Path:
    return spec(name.removeprefix(PREFIX)) if isinstance(name, str) and name.startswith(PREFIX) else name


def _named(loaded: LanguageModel, name: str | Path) -> LanguageModel:
    """Files call an organism by its short name, which means the same on every machine, and not by its folders."""
    if str(name).startswith(PREFIX):
        loaded.name = str(name)
    return loaded
