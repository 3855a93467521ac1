"""Displays: what is shown of a result, once for the terminal, notebooks and reports.

Functions of its JSON record; no model is loaded.
"""

from safety_neurons.display.parts import DisplayPart, Figure, Finding, ReportedRun, Table, Tile
from safety_neurons.display.registry import DISPLAYS, Display, Displayed, findings_of, part_of

__all__ = [
    "DISPLAYS",
    "Display",
    "DisplayPart",
    "Displayed",
    "Figure",
    "Finding",
    "ReportedRun",
    "Table",
    "Tile",
    "findings_of",
    "part_of",
]
