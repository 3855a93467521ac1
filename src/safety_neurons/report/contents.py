"""What a page holds, in its order: for every verb the section it belongs to, its part, its sentences and its tile."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from safety_neurons.report import analyses, cards, explorer, guards, rankings, transfers
from safety_neurons.report.evaluated import evaluate_findings, evaluate_part, evaluate_tile
from safety_neurons.report.findings import Finding, findings, ranked_by
from safety_neurons.report.maps import find_part
from safety_neurons.report.reading import Run, guarded
from safety_neurons.report.sections import Part, compare_part, deactivate_part, patch_parts
from safety_neurons.report.studies import rsn_part, stress_part
from safety_neurons.report.tables import Table, checks_table
from safety_neurons.report.text import name, say, visible
from safety_neurons.report.tiles import Tile, sweep_order, tiles
from safety_neurons.report.tuning import tile as tune_tile
from safety_neurons.report.tuning import tune_part, tuned

HEAD = 4
"""Sentences that stand in the first screen."""
HEADINGS = (
    ("where", "Where the neurons are", "Rows are layers, columns the seven projections of a layer; empty places were not searched."),
    ("sufficient", "Are they sufficient? Causal effect against set size", ""),
    ("tuned", "Does tuning them make the model safer?", ""),
    ("guarded", "Can a guard tell in advance?", "A classifier reads neurons at the prompt, before the first token is written."),
    ("lasting", "Does tuned safety last?", ""),
    ("evaluated", "How safe, how helpful, how capable?", ""),
    ("methods", "Methods compared", ""),
    ("necessary", "Are they necessary?", "The neurons are switched off as if their parameters were zero."),
    ("understood", "What do these neurons have in common?", ""),
    ("alone", "What do single neurons do?", ""),
    ("doctor", "Is the model understood?", "Every check is an experiment on the model itself."),
    ("others", "Other runs", ""),
)
"""Anchor, heading and introduction of every section."""
_FIRST = ("tune", "verify-patch", "verify-deactivate", "guard-evaluate", "evaluate", "compare", "analyze", "find", "guard", "doctor")
"""What answers the question comes first; what was measured on the way after it."""


@dataclass(frozen=True)
class Section:
    """One section of the page."""

    anchor: str
    heading: str
    introduction: str
    parts: Sequence[Part]


Make = Callable[[Run, Sequence[Run]], Part]


def _find(run: Run, runs: Sequence[Run]) -> Part:
    opened = explorer.opened(runs)
    return find_part(run, opened.index(run) if run in opened else None)


def _doctor(run: Run, _: Sequence[Run]) -> Part:
    return Part(say("Checks on {}", name(run.result["model"])), tables=[checks_table(run)])


_PARTS: Mapping[str, tuple[str, Make]] = {
    "find": ("where", _find),
    "tune": ("tuned", lambda run, _: tune_part(run)),
    "study-rsn": ("lasting", lambda run, _: rsn_part(run)),
    "study-stress": ("lasting", lambda run, _: stress_part(run)),
    "evaluate": ("evaluated", lambda run, _: evaluate_part(run)),
    "ranking": ("methods", lambda run, _: rankings.ranking_part(run)),
    "compare": ("methods", lambda run, _: compare_part(run)),
    "verify-deactivate": ("necessary", deactivate_part),
    "doctor": ("doctor", _doctor),
    "guard-evaluate": ("guarded", lambda run, _: guards.evaluate_part(run)),
    "guard-fit": ("guarded", lambda run, _: guards.fit_part(run)),
    "guard-recalibrate": ("guarded", lambda run, _: guards.fit_part(run)),
    "analyze-layers": ("understood", lambda run, _: analyses.layers_part(run)),
    "analyze-overlap": ("understood", lambda run, _: analyses.overlap_part(run)),
    "analyze-languages": ("understood", lambda run, _: transfers.languages_part(run)),
    "analyze-transfer": ("understood", lambda run, _: transfers.transfer_part(run)),
    "analyze-tax": ("understood", lambda run, _: transfers.tax_part(run)),
    "analyze-progressive": ("alone", lambda run, _: transfers.progressive_part(run)),
    "analyze-vocabulary": ("alone", lambda run, _: cards.cards_part(run)),
}
_FINDINGS: Mapping[str, Callable[[Run], list[Finding]]] = {
    "tune": tuned,
    "evaluate": evaluate_findings,
    "guard-evaluate": guards.evaluate_findings,
    "guard-fit": guards.fit_findings,
    "guard-recalibrate": guards.fit_findings,
    "ranking": rankings.ranking_findings,
    "analyze-layers": analyses.layers_findings,
    "analyze-overlap": analyses.overlap_findings,
    "analyze-languages": transfers.matrix_findings,
    "analyze-transfer": transfers.matrix_findings,
    "analyze-tax": transfers.tax_findings,
    "analyze-progressive": transfers.progressive_findings,
    "analyze-vocabulary": cards.cards_findings,
}
_TILES: Mapping[str, Callable[[Run], Tile]] = {
    "tune": tune_tile,
    "guard-evaluate": guards.evaluate_tile,
    "evaluate": evaluate_tile,
    "ranking": rankings.ranking_tile,
}


def sections(runs: Sequence[Run]) -> list[Section]:
    """Every section that has any part."""
    made: dict[str, list[Part]] = {}
    patched = [run for run in runs if run.verb == "verify-patch"]
    if patched:
        made["sufficient"] = guarded(patched[0], lambda: patch_parts(patched, runs))
    for run in runs:
        if run.verb != "verify-patch":
            anchor, make = _PARTS.get(run.kind, ("others", lambda run, _: _other(run)))
            made.setdefault(anchor, []).append(guarded(run, lambda run=run, make=make: make(run, runs)))  # type: ignore[misc]
    return [Section(anchor, heading, words, made[anchor]) for anchor, heading, words in HEADINGS if made.get(anchor)]


def sentences(runs: Sequence[Run]) -> tuple[list[Finding], list[Finding]]:
    """What the first screen says: the first sentence of the first run of every verb; and all sentences."""
    ordered = sorted(runs, key=_rank)
    said = [(run, guarded(run, lambda run=run: _said(run, runs))) for run in ordered]  # type: ignore[misc]
    head: dict[str, Finding] = {}
    for run, found in said:
        if found:
            head.setdefault(run.kind, found[0])
    everything = [finding for _, found in said for finding in found]
    return (everything, []) if len(everything) <= HEAD + 1 else (list(head.values())[:HEAD], everything)


def short_answers(runs: Sequence[Run]) -> list[Tile]:
    """The tiles of the first screen: what tuning did, whether the neurons matter, what a guard or an evaluation says, then the rest."""
    first = {run.kind: run for run in reversed(runs) if run.kind in _TILES}
    own = {kind: guarded(run, lambda kind=kind: _TILES[kind](first[kind])) for kind, run in first.items()}  # type: ignore[misc]
    others = guarded(runs[0], lambda: tiles(runs))
    verified = len({run.verb for run in runs} & {"verify-patch", "verify-deactivate"})
    leading = [own[kind] for kind in ("tune",) if kind in own] + others[:verified]
    return [*leading, *(own[kind] for kind in _TILES if kind in own and kind != "tune"), *others[verified:]][:4]


def sheet_name(run: Run, runs: Sequence[Run]) -> str:
    """What the completions of a run are called."""
    words = {
        "verify-patch": "patched, ranked by {}",
        "verify-deactivate": "deactivated, chosen by {}",
        "compare": "methods compared",
        "evaluate": "evaluated",
        "tune": "tuned, chosen by {}",
        "guard-evaluate": "without and with the guard",
    }
    return words[run.verb].format(ranked_by(run, runs)) + f" · {run.label}" if run.verb in words else run.label


def _rank(run: Run) -> tuple[float | int, ...]:
    place = next((place for place, verb in enumerate(_FIRST) if run.verb.startswith(verb)), len(_FIRST))
    return (place, *(guarded(run, lambda: sweep_order(run)) if run.verb == "verify-patch" else ()))


def _said(run: Run, runs: Sequence[Run]) -> list[Finding]:
    own = _FINDINGS.get(run.kind)
    return own(run) if own else findings(run, runs)


def _other(run: Run) -> Part:
    """A verb this version draws nothing for: its numbers as they are."""
    rows: list[list[Any]] = [[visible(key, 60), visible(value, 300)] for key, value in run.result.items()]
    return Part(
        say("{} <span class=sub>{}</span>", visible(run.verb, 40), name(run.label)),
        tables=[Table("Result as recorded", ["entry", "value"], rows)],
    )
