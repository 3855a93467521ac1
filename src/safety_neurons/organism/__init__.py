"""Organisms: small models of the project's own whose safety behaviour is known, for demo, tests and
benchmarks.
"""

import importlib
from typing import TYPE_CHECKING, Any

from safety_neurons.model.files import OrganismFolder
from safety_neurons.model.files import open_organism as open  # noqa: A004 - read as organism.open
from safety_neurons.model.files import organism_spec as spec
from safety_neurons.model.loading import load, load_pair, load_several
from safety_neurons.organism.language import (
    LANGUAGES,
    Recipe,
    language,
    listing,
    names,
    recipe,
    recipes,
    shipped,
)

if TYPE_CHECKING:
    from safety_neurons.organism.building import build

__all__ = [
    "LANGUAGES",
    "OrganismFolder",
    "Recipe",
    "build",
    "language",
    "listing",
    "load",
    "load_pair",
    "load_several",
    "names",
    "open",
    "recipe",
    "recipes",
    "shipped",
    "spec",
]


def __getattr__(name: str) -> Any:
    """Building trains, and what trains takes seconds to import: opening an organism does without."""
    if name == "build":
        return importlib.import_module("safety_neurons.organism.building").build
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
