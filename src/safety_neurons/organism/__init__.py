"""Organisms: small models of the project's own whose safety behaviour is known, for demo, tests and benchmarks."""

from safety_neurons.organism.build import build
from safety_neurons.organism.folder import OrganismFolder, listing, names, shipped, spec
from safety_neurons.organism.folder import open_organism as open  # noqa: A004 - read as organism.open
from safety_neurons.organism.language import LANGUAGES, language
from safety_neurons.organism.recipes import Recipe, recipe, recipes

__all__ = [
    "LANGUAGES",
    "OrganismFolder",
    "Recipe",
    "build",
    "language",
    "listing",
    "names",
    "open",
    "recipe",
    "recipes",
    "shipped",
    "spec",
]
