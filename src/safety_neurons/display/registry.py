"""The display of every kind of result, by the verb that gives it, and the base class of results that can be
looked at in a notebook.
"""

import abc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from markupsafe import Markup

from safety_neurons.display import (
    analyses,
    compared,
    defended,
    doses,
    evaluated,
    found,
    guards,
    replicated,
    verified,
)
from safety_neurons.display.parts import (
    DisplayPart,
    Figure,
    Finding,
    ReportedRun,
    Table,
    Tile,
    guarded,
    not_achieved,
    plain,
)
from safety_neurons.display.text import name, say, visible
from safety_neurons.results import html_table


@dataclass(frozen=True)
class Display:
    """What is shown of one kind of result."""

    section: str
    """The section of a report that it stands in."""
    part: Callable[[ReportedRun], DisplayPart]
    """Heading, sentences, figures and tables."""
    findings: Callable[[ReportedRun], list[Finding]] = lambda _: []
    tile: Callable[[ReportedRun], Tile] | None = None
    """Its answer on the first screen of a report."""
    completions: str = ""
    """What its completions are called; `{}` is the method that chose the neurons."""


def _as_recorded(run: ReportedRun) -> DisplayPart:
    """The numbers of a verb that this version draws nothing for."""
    rows = [[visible(key, 60), visible(value, 300)] for key, value in run.result.items()]
    heading = say("{} <span class=sub>{}</span>", visible(run.verb, 40), name(run.label))
    return DisplayPart(heading, tables=[Table("Result as recorded", ["entry", "value"], rows)])


_GUARD_FIT = Display("guarded", guards.fit_part, guards.fit_findings)
DISPLAYS: Mapping[str, Display] = {
    "run": Display("replicated", replicated.recipe_part, replicated.recipe_findings),
    "find": Display("where", found.find_part, found.find_findings),
    "import-neurons": Display("where", found.foreign_part),
    "export-neurons": Display("others", found.named_part),
    "verify-patch": Display(
        "sufficient",
        verified.patch_part,
        verified.patch_findings,
        verified.patch_tile,
        "patched, ranked by {}",
    ),
    "verify-deactivate": Display(
        "necessary",
        verified.deactivate_part,
        verified.deactivate_findings,
        verified.deactivate_tile,
        "deactivated, chosen by {}",
    ),
    "verify-both": Display(
        "sufficient",
        verified.both_part,
        verified.both_findings,
        verified.both_tile,
        "patched, ranked by {}",
    ),
    "verify-scale": Display("dosed", doses.scale_part, doses.scale_findings, doses.scale_tile, "scaled"),
    "compare": Display(
        "methods", compared.compare_part, compared.compare_findings, compared.compare_tile, "methods compared"
    ),
    "ranking": Display("methods", compared.ranking_part, compared.ranking_findings, compared.ranking_tile),
    "tune": Display(
        "tuned", evaluated.tune_part, evaluated.tune_findings, evaluated.tune_tile, "tuned, chosen by {}"
    ),
    "repair": Display("tuned", evaluated.repair_part),
    "study-rsn": Display("lasting", evaluated.rsn_part),
    "study-stress": Display("lasting", evaluated.stress_part),
    "study-defences": Display("lasting", defended.defences_part, defended.defences_findings),
    "evaluate": Display(
        "evaluated",
        evaluated.evaluate_part,
        evaluated.evaluate_findings,
        evaluated.evaluate_tile,
        "evaluated",
    ),
    "doctor": Display("doctor", evaluated.doctor_part, evaluated.doctor_findings, evaluated.doctor_tile),
    "guard-fit": _GUARD_FIT,
    "guard-recalibrate": _GUARD_FIT,
    "guard-evaluate": Display(
        "guarded", guards.worth_part, guards.worth_findings, guards.worth_tile, "without and with the guard"
    ),
    "analyze-layers": Display("understood", analyses.layers_part, analyses.layers_findings),
    "analyze-overlap": Display("understood", analyses.overlap_part, analyses.overlap_findings),
    "analyze-languages": Display("understood", analyses.languages_part, analyses.matrix_findings),
    "analyze-transfer": Display("understood", analyses.transfer_part, analyses.matrix_findings),
    "analyze-tax": Display("understood", analyses.tax_part, analyses.tax_findings),
    "analyze-progressive": Display("alone", verified.progressive_part, verified.progressive_findings),
    "analyze-vocabulary": Display("alone", analyses.cards_part, analyses.cards_findings),
}
"""By kind (`ReportedRun.kind`)."""
_OTHER = Display("others", _as_recorded)


def display_of(run: ReportedRun) -> Display:
    """How a run is shown; one of a verb unknown to this version as it was recorded."""
    return DISPLAYS.get(run.kind, _OTHER)


def part_of(run: ReportedRun) -> DisplayPart:
    """Heading, sentences, figures and tables of a run.

    Raises:
        InputError: the record has not the shape that its verb writes.
    """
    return guarded(run, lambda run: replace(display_of(run).part(run), missed=list(not_achieved(run.result))))


def findings_of(run: ReportedRun) -> list[Finding]:
    """What a run found, in sentences.

    Raises:
        InputError: as for `part_of`.
    """
    return guarded(run, display_of(run).findings)


def html_of(run: ReportedRun) -> str:
    """A run for a notebook: what was not achieved, the tables, the findings.

    Nothing in it is fetched or runs.
    """
    part = part_of(run)
    tables = [
        html_table(plain(each.caption), each.columns, [[plain(cell) for cell in row] for row in each.rows])
        for each in part.tables
    ]
    lines = [*(say("<p>{}</p>", each) for each in (*part.missed, part.lead) if each), *map(Markup, tables)]  # noqa: S704 - escaped above
    said = Markup("").join(
        say("<li>{}: {}</li>", finding.verdict, finding.text) for finding in findings_of(run)
    )
    return str(say("<p><b>{}</b></p>{}<ul>{}</ul>", part.heading, Markup("").join(lines), said))


class Displayed(abc.ABC):
    """A result that shows itself: its tables, findings and figures are those of a report and of the command
    line.
    """

    def __init_subclass__(cls) -> None:
        """Every dataclass below prints what was found: one of its own would print all it holds."""
        super().__init_subclass__()
        cls.__repr__ = Displayed.__repr__  # type: ignore[method-assign]  # A dataclass keeps what is there.

    def __repr__(self) -> str:
        return "\n".join([f"{type(self).__name__}:", *(plain(said.text) for said in self.findings())])

    @property
    @abc.abstractmethod
    def verb(self) -> str:
        """The verb that gives such a result, such as `verify-patch`."""

    @abc.abstractmethod
    def record(self) -> Mapping[str, Any]:
        """The result as JSON values."""

    def tables(self) -> Sequence[Table]:
        """Captions, columns and rows of text."""
        return part_of(self._run).tables

    def findings(self) -> Sequence[Finding]:
        """What was found, in sentences."""
        return findings_of(self._run)

    def figures(self) -> Sequence[Figure]:
        """Drawings with their text alternatives and captions."""
        return part_of(self._run).figures

    def _repr_html_(self) -> str:
        return html_of(self._run)

    @property
    def _run(self) -> ReportedRun:
        return ReportedRun.of(self.verb, self._result())

    def _result(self) -> Mapping[str, Any]:
        """What the verb writes of this object; its record, where the verb adds nothing."""
        return self.record()
