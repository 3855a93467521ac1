"""The page: sections put together, written whole, and nothing in it that loads, runs or calls home."""

import base64
import datetime
import hashlib
import importlib.resources
import os
import pathlib
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
from markupsafe import Markup

from safety_neurons.report import answers
from safety_neurons.report.evaluated import evaluate_findings, evaluate_part, evaluate_tile
from safety_neurons.report.findings import Finding, asked, findings, ranked_by
from safety_neurons.report.reading import Run, guarded, read_runs
from safety_neurons.report.sections import Part, compare_part, deactivate_part, find_part, patch_parts
from safety_neurons.report.studies import rsn_part, stress_part
from safety_neurons.report.tables import Table, checks_table
from safety_neurons.report.text import NONE, duration, name, say, visible
from safety_neurons.report.tiles import Tile, tiles
from safety_neurons.report.tuning import tile as tune_tile
from safety_neurons.report.tuning import tune_part, tuned
from safety_neurons.results import write_bytes

_KNOWN = ("verify-patch", "verify-deactivate", "compare", "evaluate", "doctor", "tune", "study-rsn", "study-stress")


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


def render(runs: Sequence[Run], *, title: str) -> str:
    """The page as text."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Hand-made files are noted in the page.
        said = [finding for run in sorted(runs, key=_rank) for finding in _said(run, runs)]
        made = _sheets(runs)
        holds = answers.packed(made)
        style, script = _asset("style.css"), _asset("script.js")
        context = {
            "title": visible(title, 200),
            "csp": _policy(style, script),
            "style": Markup(style),  # noqa: S704 - our own file
            "script": Markup(script),  # noqa: S704 - our own file
            "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
            "asked": asked(runs),
            "tiles": _tiles(runs),
            "findings": said,
            "sections": _sections(runs),
            "sheets": made,
            "first": [(sheet, answers.first_rows(sheet, holds.limit)) for sheet in made[:1]],
            "holds": holds,
            "provenance": [_provenance(run) for run in runs],
            "versions": _versions(runs),
            "n_runs": len(runs),
        }
        return _environment().get_template("page.html.jinja").render(context)


def _said(run: Run, runs: Sequence[Run]) -> list[Finding]:
    """The sentences of one run."""
    own = {"tune": tuned, "evaluate": evaluate_findings}.get(run.verb)
    return guarded(run, lambda: own(run) if own else findings(run, runs))


def _rank(run: Run) -> int:
    """What answers the question comes first; what was measured on the way after it."""
    order = ("tune", "evaluate", "verify-patch", "verify-deactivate", "compare", "find", "doctor")
    return next((place for place, verb in enumerate(order) if run.verb.startswith(verb)), len(order))


def _tiles(runs: Sequence[Run]) -> list[Tile]:
    first = [guarded(run, lambda run=run: tune_tile(run)) for run in runs if run.verb == "tune"][:1]  # type: ignore[misc]
    first += [guarded(run, lambda run=run: evaluate_tile(run)) for run in runs if run.verb == "evaluate"][:1]  # type: ignore[misc]
    return [*first, *guarded(runs[0], lambda: tiles(runs))][:4]


def _sections(runs: Sequence[Run]) -> list[tuple[str, str, str, list[Part]]]:
    """Anchor, heading, introduction and parts of every section that has any."""

    def parts(verb: str, make: Any) -> list[Part]:
        chosen = [run for run in runs if run.verb == verb or (verb == "find-" and run.verb.startswith(verb))]
        return [guarded(run, lambda run=run: make(run)) for run in chosen]  # type: ignore[misc]

    patched = [run for run in runs if run.verb == "verify-patch"]
    causal = guarded(patched[0], lambda: patch_parts(patched, runs)) if patched else []
    others = [run for run in runs if run.verb not in _KNOWN and not run.verb.startswith("find-")]
    made = [
        (
            "where",
            "Where the neurons are",
            "Rows are layers, columns the seven projections of a layer; empty places were not searched.",
            parts("find-", find_part),
        ),
        ("sufficient", "Are they sufficient? Causal effect against set size", "", causal),
        ("tuned", "Does tuning them make the model safer?", "", parts("tune", tune_part)),
        ("lasting", "Does tuned safety last?", "", [*parts("study-rsn", rsn_part), *parts("study-stress", stress_part)]),
        ("evaluated", "How safe, how helpful, how capable?", "", parts("evaluate", evaluate_part)),
        ("methods", "Methods compared", "", parts("compare", compare_part)),
        (
            "necessary",
            "Are they necessary?",
            "The neurons are switched off as if their parameters were zero.",
            parts("verify-deactivate", lambda run: deactivate_part(run, runs)),
        ),
        ("doctor", "Is the model understood?", "Every check is an experiment on the model itself.", parts("doctor", _doctor)),
        ("others", "Other runs", "", [guarded(run, lambda run=run: _other(run)) for run in others]),  # type: ignore[misc]
    ]
    return [section for section in made if section[3]]


def _doctor(run: Run) -> Part:
    return Part(say("Checks on {}", name(run.result["model"])), tables=[checks_table(run)])


def _other(run: Run) -> Part:
    """A verb this version draws nothing for: its numbers as they are."""
    rows = [[visible(key, 60), visible(value, 300)] for key, value in run.result.items()]
    return Part(
        say("{} <span class=sub>{}</span>", visible(run.verb, 40), name(run.label)),
        tables=[Table("Result as recorded", ["entry", "value"], rows)],
    )


def _sheets(runs: Sequence[Run]) -> list[answers.Sheet]:
    names = {}
    for place, run in enumerate(runs):
        words = {
            "verify-patch": "patched, ranked by {}",
            "verify-deactivate": "deactivated, chosen by {}",
            "compare": "methods compared",
            "evaluate": "evaluated",
        }
        words["tune"] = "tuned, chosen by {}"
        if run.verb in words:
            names[place] = words[run.verb].format(ranked_by(run, runs)) + f" · {run.label}"
    return [sheet for run in runs for sheet in guarded(run, lambda run=run: answers.sheets([run], {0: names.get(runs.index(run), "")}))]  # type: ignore[misc]


def _provenance(run: Run) -> dict[str, Any]:
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


def _versions(runs: Sequence[Run]) -> list[tuple[str, str]]:
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
