"""Report: finished runs in, one self-contained HTML page out. Reads files only; never loads a model."""

from safety_neurons.display import ReportedRun
from safety_neurons.report.page import read_runs, write_report

__all__ = ["ReportedRun", "read_runs", "write_report"]
