"""Displays: what is shown of a result, once for the terminal, notebooks and reports. Functions of its JSON record; no model is loaded."""

from safety_neurons.display.parts import Figure, Finding, Part, ReportedRun, Table, Tile
from safety_neurons.display.registry import DISPLAYS, Display, Shown, findings_of, part_of

__all__ = ["DISPLAYS", "Display", "Figure", "Finding", "Part", "ReportedRun", "Shown", "Table", "Tile", "findings_of", "part_of"]
