"""Report: finished runs in, one self-contained HTML page out. Reads files only; never loads a model."""

from safety_neurons.display import ReportedRun
from safety_neurons.report.page import write_report
from safety_neurons.report.reading import read_runs

__all__ = ["ReportedRun", "read_runs", "write_report"]
