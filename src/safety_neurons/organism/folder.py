"""Organisms on disk: which there are, and what is in a folder."""

import dataclasses
from importlib import resources
from pathlib import Path
from typing import Any

from safety_neurons.errors import InputError
from safety_neurons.neurons import NeuronSet
from safety_neurons.organism.recipes import recipe, recipes
from safety_neurons.results.files import plain_name, read_json

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
    return Path(str(resources.files("safety_neurons.organism"))) / "data" / "organisms" / name


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
