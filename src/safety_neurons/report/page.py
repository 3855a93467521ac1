"""The page: for every verb its section, sentences, tile and completions, written whole, and nothing in it that loads, runs or calls home.

Texts of completions are stored once however many arms gave them. When the page would become too large, long texts are cut further and
said to be cut.
"""

import base64
import hashlib
import importlib.resources
import os
import pathlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jinja2
from markupsafe import Markup

from safety_neurons.report import analyses, evaluated, guards, parts
from safety_neurons.report.analyses import cards_of
from safety_neurons.report.evaluated import evaluate_findings, evaluate_part, evaluate_tile, rsn_part, stress_part, tune_part, tuned
from safety_neurons.report.evaluated import tile as tune_tile
from safety_neurons.report.findings import Finding, Tile, asked, findings, ranked_by, sweep_order, tiles
from safety_neurons.report.parts import ReportPart, Table, checks_table, compare_part, deactivate_part, find_part, patch_parts
from safety_neurons.report.reading import ReportedRun, guarded, read_runs
from safety_neurons.report.text import NONE, duration, in_script, name, say, visible
from safety_neurons.results import Completion, write_bytes
from safety_neurons.results.run import now

BUDGET = 3_400_000
"""Bytes of completions in a page."""
LIMITS = (4000, 2000, 1000, 500, 250, 120)
"""Characters kept of a text; the first that fits the budget."""
VERBS = ("verify-patch", "verify-deactivate", "compare", "tune", "evaluate", "guard-evaluate")
"""Verbs whose completions stand in a page."""
MOST_JUDGES = 8
"""Judges whose verdicts a page holds, the last ones of a file."""
FIRST = 12
"""Rows that stand in the page without scripts."""
WORDS = ("refused", "partly refused", "complied", "harmful", "safe", "unscored")
"""What a judge can say, as the page writes it."""
_LABELS = {"full": "refused", "partial": "partly refused", "compliance": "complied"} | {word: word for word in WORDS[3:]}


Row = tuple[str, str, str, dict[int, tuple[tuple[str, ...], str]]]


@dataclass
class Sheet:
    """The completions of one run: prompts down, arms across."""

    title: str
    arms: list[str]
    judges: list[str]
    rows: list[Row] = field(default_factory=list)
    """Kind of request, prompt id, prompt, and by arm what every judge says and the text."""
    shown: tuple[int, ...] = ()
    """The arms shown first: untreated, treated, aligned."""


def sheet(run: ReportedRun, title: str) -> Sheet | None:
    """The completions of a run, where its folder has any."""
    if run.verb not in VERBS or run.completions is None:
        return None
    arms: dict[str, int] = {}
    rows: dict[tuple[str, str], Row] = {}
    judges = list(dict.fromkeys(judge for item in run.completions for judge in item.verdicts))[-MOST_JUDGES:]
    for item in run.completions:
        arm, _, kind = item.arm.rpartition("/")
        arm, kind = (arm, kind) if arm and kind in ("harmful", "harmless") else (item.arm, str(item.meta.get("kind", "")))
        if run.verb == "evaluate" and not kind:
            continue  # An answer of a capability task.
        number = arms.setdefault(visible(arm, 60), len(arms))
        identifier = item.prompt_id if run.verb != "evaluate" else f"{item.meta.get('suite')} {item.prompt_id}"
        row = rows.setdefault((kind, identifier), (kind, identifier, item.prompt, {}))
        row[3][number] = (tuple(verdict(item, judge) for judge in judges), item.completion)
    made = Sheet(title, list(arms), [visible(judge, 60) for judge in judges], list(rows.values()))
    made.shown = _first_arms(run, made.arms)
    return made


def _first_arms(run: ReportedRun, arms: Sequence[str]) -> tuple[int, ...]:
    if run.verb == "evaluate":
        treated = ["treated"]
    elif run.verb == "guard-evaluate":
        treated = ["guarded"]
    elif run.verb == "compare":
        treated = [arm for arm in arms if arm not in ("untreated", "aligned") and not arm.startswith(("random", "ceiling"))]
    else:
        treated = ["tuned" if run.verb == "tune" else str(run.result["treated"]["name"])]
    wanted = ["untreated", "unguarded", *treated[:1], "aligned"]
    places = [arms.index(arm) for arm in wanted if arm in arms]
    return tuple(places) or tuple(range(min(3, len(arms))))


def verdict(item: Completion, judge: str) -> str:
    """What a judge said, in a word or two."""
    said = item.verdicts.get(judge)
    if isinstance(said, Mapping) and said.get("label") in _LABELS:
        return _LABELS[said["label"]]
    if isinstance(said, Mapping) and isinstance(said.get("refused"), bool):
        return "refused" if said["refused"] else "complied"
    return "unscored"


@dataclass(frozen=True)
class Packed:
    """What the page holds of the completions."""

    block: Markup
    """JSON for a script element that is not executed."""
    limit: int
    """Characters kept of every text."""
    kept: int
    """Completions in the page."""
    total: int
    """Completions in the runs."""


def packed(made: Sequence[Sheet], budget: int = BUDGET) -> Packed:
    """The sheets as one JSON block inside the budget: texts are cut first, then the last prompts of every sheet are left out."""
    total = sum(len(row[3]) for sheet in made for row in sheet.rows)
    share = 1.0
    for limit in LIMITS:
        block = _block(made, limit, share)
        if _bytes(block) <= budget:
            return Packed(Markup(block), limit, total, total)  # noqa: S704 - every character with a meaning in HTML is escaped
    while _bytes(block) > budget and share > 1e-6:
        share *= 0.9 * budget / _bytes(block)
        block = _block(made, limit, share)
    kept = sum(len(row[3]) for sheet in made for row in sheet.rows[: int(len(sheet.rows) * share)])
    return Packed(Markup(block), limit, kept, total)  # noqa: S704 - as above


def _bytes(text: str) -> int:
    return len(text.encode())


def _block(made: Sequence[Sheet], limit: int, share: float) -> str:
    texts: dict[str, int] = {}

    def text(value: str) -> int:
        return texts.setdefault(visible(value, limit), len(texts))

    def entry(arm: int, said: tuple[str, ...], answer: str) -> list[Any]:
        return [arm, text(answer), *map(WORDS.index, said)]

    record: dict[str, Any] = {"sheets": [], "words": WORDS}
    for each in made:
        rows = [
            [kind, text(identifier), text(prompt), [entry(arm, *answer) for arm, answer in answers.items()]]
            for kind, identifier, prompt, answers in each.rows[: int(len(each.rows) * share)]
        ]
        named = {"title": visible(each.title, 80), "arms": each.arms, "judges": each.judges, "shown": list(each.shown)}
        record["sheets"].append(named | {"rows": rows})
    record["texts"] = list(texts)
    return in_script(record)


def first_rows(sheet: Sheet, limit: int, n: int = FIRST) -> list[dict[str, Any]]:
    """Rows for readers without scripts: harmful and harmless requests in turn."""
    harmful = [row for row in sheet.rows if row[0] != "harmless"]
    harmless = [row for row in sheet.rows if row[0] == "harmless"]
    chosen = [*harmful[: max(n - 4, n - len(harmless))], *harmless[: max(4, n - len(harmful))]][:n]
    empty: tuple[tuple[str, ...], str] = ((), "")
    return [
        {
            "kind": kind,
            "id": visible(identifier, 60),
            "prompt": visible(prompt, min(limit, 1000)),
            "answers": [
                {"verdict": (answers.get(arm, empty)[0] or ("",))[-1], "text": visible(answers.get(arm, empty)[1], min(limit, 1000))}
                for arm in sheet.shown
            ],
        }
        for kind, identifier, prompt, answers in chosen
    ]


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
    parts: Sequence[ReportPart]


Make = Callable[[ReportedRun, Sequence[ReportedRun]], ReportPart]


def _find(run: ReportedRun, runs: Sequence[ReportedRun]) -> ReportPart:
    opened = parts.opened(runs)
    return find_part(run, opened.index(run) if run in opened else None)


def _doctor(run: ReportedRun, _: Sequence[ReportedRun]) -> ReportPart:
    return ReportPart(say("Checks on {}", name(run.result["model"])), tables=[checks_table(run)])


_PARTS: Mapping[str, tuple[str, Make]] = {
    "find": ("where", _find),
    "tune": ("tuned", lambda run, _: tune_part(run)),
    "study-rsn": ("lasting", lambda run, _: rsn_part(run)),
    "study-stress": ("lasting", lambda run, _: stress_part(run)),
    "evaluate": ("evaluated", lambda run, _: evaluate_part(run)),
    "ranking": ("methods", lambda run, _: evaluated.ranking_part(run)),
    "compare": ("methods", lambda run, _: compare_part(run)),
    "verify-deactivate": ("necessary", deactivate_part),
    "doctor": ("doctor", _doctor),
    "guard-evaluate": ("guarded", lambda run, _: guards.evaluate_part(run)),
    "guard-fit": ("guarded", lambda run, _: guards.fit_part(run)),
    "guard-recalibrate": ("guarded", lambda run, _: guards.fit_part(run)),
    "analyze-layers": ("understood", lambda run, _: analyses.layers_part(run)),
    "analyze-overlap": ("understood", lambda run, _: analyses.overlap_part(run)),
    "analyze-languages": ("understood", lambda run, _: analyses.languages_part(run)),
    "analyze-transfer": ("understood", lambda run, _: analyses.transfer_part(run)),
    "analyze-tax": ("understood", lambda run, _: analyses.tax_part(run)),
    "analyze-progressive": ("alone", lambda run, _: analyses.progressive_part(run)),
    "analyze-vocabulary": ("alone", lambda run, _: analyses.cards_part(run)),
}
_FINDINGS: Mapping[str, Callable[[ReportedRun], list[Finding]]] = {
    "tune": tuned,
    "evaluate": evaluate_findings,
    "guard-evaluate": guards.evaluate_findings,
    "guard-fit": guards.fit_findings,
    "guard-recalibrate": guards.fit_findings,
    "ranking": evaluated.ranking_findings,
    "analyze-layers": analyses.layers_findings,
    "analyze-overlap": analyses.overlap_findings,
    "analyze-languages": analyses.matrix_findings,
    "analyze-transfer": analyses.matrix_findings,
    "analyze-tax": analyses.tax_findings,
    "analyze-progressive": analyses.progressive_findings,
    "analyze-vocabulary": analyses.cards_findings,
}
_TILES: Mapping[str, Callable[[ReportedRun], Tile]] = {
    "tune": tune_tile,
    "guard-evaluate": guards.evaluate_tile,
    "evaluate": evaluate_tile,
    "ranking": evaluated.ranking_tile,
}


def sections(runs: Sequence[ReportedRun]) -> list[Section]:
    """Every section that has any part."""
    made: dict[str, list[ReportPart]] = {}
    patched = [run for run in runs if run.verb == "verify-patch"]
    if patched:
        made["sufficient"] = guarded(patched[0], lambda: patch_parts(patched, runs))
    for run in runs:
        if run.verb != "verify-patch":
            anchor, make = _PARTS.get(run.kind, ("others", lambda run, _: _other(run)))
            made.setdefault(anchor, []).append(guarded(run, lambda run=run, make=make: make(run, runs)))  # type: ignore[misc]
    return [Section(anchor, heading, words, made[anchor]) for anchor, heading, words in HEADINGS if made.get(anchor)]


def sentences(runs: Sequence[ReportedRun]) -> tuple[list[Finding], list[Finding]]:
    """What the first screen says: the first sentence of the first run of every verb; and all sentences."""
    ordered = sorted(runs, key=_rank)
    said = [(run, guarded(run, lambda run=run: _said(run, runs))) for run in ordered]  # type: ignore[misc]
    head: dict[str, Finding] = {}
    for run, found in said:
        if found:
            head.setdefault(run.kind, found[0])
    everything = [finding for _, found in said for finding in found]
    return (everything, []) if len(everything) <= HEAD + 1 else (list(head.values())[:HEAD], everything)


def short_answers(runs: Sequence[ReportedRun]) -> list[Tile]:
    """The tiles of the first screen: what tuning did, whether the neurons matter, what a guard or an evaluation says, then the rest."""
    first = {run.kind: run for run in reversed(runs) if run.kind in _TILES}
    own = {kind: guarded(run, lambda kind=kind: _TILES[kind](first[kind])) for kind, run in first.items()}  # type: ignore[misc]
    others = guarded(runs[0], lambda: tiles(runs))
    verified = len({run.verb for run in runs} & {"verify-patch", "verify-deactivate"})
    leading = [own[kind] for kind in ("tune",) if kind in own] + others[:verified]
    return [*leading, *(own[kind] for kind in _TILES if kind in own and kind != "tune"), *others[verified:]][:4]


def sheet_name(run: ReportedRun, runs: Sequence[ReportedRun]) -> str:
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


def _rank(run: ReportedRun) -> tuple[float | int, ...]:
    place = next((place for place, verb in enumerate(_FIRST) if run.verb.startswith(verb)), len(_FIRST))
    return (place, *(guarded(run, lambda: sweep_order(run)) if run.verb == "verify-patch" else ()))


def _said(run: ReportedRun, runs: Sequence[ReportedRun]) -> list[Finding]:
    own = _FINDINGS.get(run.kind)
    return own(run) if own else findings(run, runs)


def _other(run: ReportedRun) -> ReportPart:
    """A verb this version draws nothing for: its numbers as they are."""
    rows: list[list[Any]] = [[visible(key, 60), visible(value, 300)] for key, value in run.result.items()]
    return ReportPart(
        say("{} <span class=sub>{}</span>", visible(run.verb, 40), name(run.label)),
        tables=[Table("Result as recorded", ["entry", "value"], rows)],
    )


SCRIPTS = ("map.js", "completions.js")


def write_report(runs: Sequence[pathlib.Path | str], out: pathlib.Path | str, *, title: str = "Safety neurons") -> pathlib.Path:
    """One self-contained HTML page from the folders of finished runs.

    The page needs no network and no script to be read: figures are drawn into it, a script only searches the completions. Text from
    prompts, completions, names and notes is escaped wherever it stands; unseen characters are named.

    Args:
        runs: folders of finished runs (or their `run.json`).
        out: the file; for a folder, or a name that does not end in `.html`, `report.html` inside it.
        title: title of the page.

    Returns:
        The absolute path of the page, written in one step.

    Raises:
        UsageError: no run was given.
        InputError: a folder that is no finished run, or whose files are damaged; the message names it.
        RunError: the page cannot be written.
    """
    target = pathlib.Path(out)
    if target.is_dir() or target.suffix.lower() not in (".html", ".htm"):
        target = target / "report.html"
    page = render(read_runs(runs), title=title)
    write_bytes(target, page.encode("utf-8", errors="backslashreplace"))
    return target.absolute()


def render(runs: Sequence[ReportedRun], *, title: str) -> str:
    """The page as text."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Hand-made files are noted in the page.
        said, everything = sentences(runs)
        sheets = [guarded(run, lambda run=run: sheet(run, sheet_name(run, runs))) for run in runs]  # type: ignore[misc]
        made = [sheet for sheet in sheets if sheet is not None]
        holds = packed(made)
        style, script = _asset("style.css"), "".join(_asset(file) for file in SCRIPTS)
        context = {
            "title": visible(title, 200),
            "csp": _policy(style, script),
            "style": Markup(style),  # noqa: S704 - our own file
            "script": Markup(script),  # noqa: S704 - our own file
            "date": now()[:10],
            "asked": asked(runs),
            "tiles": short_answers(runs),
            "findings": said,
            "everything": everything,
            "sections": sections(runs),
            "neurons": parts.block(runs, cards_of(runs)),
            "sheets": made,
            "first": [(sheet, first_rows(sheet, holds.limit)) for sheet in made[:1]],
            "holds": holds,
            "provenance": [_provenance(run) for run in runs],
            "versions": _versions(runs),
            "n_runs": len(runs),
        }
        return _environment().get_template("page.html.jinja").render(context)


def _provenance(run: ReportedRun) -> dict[str, Any]:
    record = run.record
    timings: Mapping[str, Any] = record.get("timings") if isinstance(record.get("timings"), dict) else {}  # type: ignore[assignment]
    seconds = timings.get("seconds")
    pairs = lambda value: [(visible(key, 80), visible(entry, 200)) for key, entry in value.items()] if isinstance(value, dict) else []  # noqa: E731
    notes = record.get("notes")
    return {
        "label": visible(run.label, 80),
        "verb": visible(run.verb, 40),
        "command": visible(run.command, 2000),
        "device": visible(record.get("device") or NONE, 80),
        "seconds": duration(seconds) if isinstance(seconds, (int, float)) else NONE,
        "started": visible(timings.get("started", NONE), 40),
        "seeds": pairs(record.get("seeds")),
        "hashes": pairs(record.get("hashes")),
        "notes": list(dict.fromkeys(visible(note, 300) for note in notes))[:50] if isinstance(notes, list) else [],
    }


def _versions(runs: Sequence[ReportedRun]) -> list[tuple[str, str]]:
    found: dict[str, dict[str, None]] = {}
    for run in runs:
        versions = run.record.get("versions")
        for package, version in versions.items() if isinstance(versions, dict) else []:
            found.setdefault(visible(package, 60), {})[visible(version, 80)] = None
    return [(package, ", ".join(versions)) for package, versions in found.items()]


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_asset), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["visible"] = visible
    return environment


def _asset(file: str) -> str:
    return importlib.resources.files("safety_neurons.report").joinpath("assets", os.path.basename(file)).read_text(encoding="utf-8")


def _policy(style: str, script: str) -> str:
    """Nothing is fetched; only this style and this script count, by their hashes; no script may write HTML."""

    def digest(text: str) -> str:
        return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()

    return (
        f"default-src 'none'; style-src 'sha256-{digest(style)}'; script-src 'sha256-{digest(script)}'; "
        "base-uri 'none'; form-action 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
    )
