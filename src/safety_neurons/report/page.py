"""The page: sections put together, written whole, and nothing in it that loads, runs or calls home."""

import base64
import hashlib
import importlib.resources
import os
import pathlib
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
from markupsafe import Markup

from safety_neurons.report import answers, explorer
from safety_neurons.report.cards import cards_of
from safety_neurons.report.contents import sections, sentences, sheet_name, short_answers
from safety_neurons.report.findings import asked
from safety_neurons.report.reading import Run, guarded, read_runs
from safety_neurons.report.text import NONE, duration, visible
from safety_neurons.results import write_bytes
from safety_neurons.results.files import now

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


def render(runs: Sequence[Run], *, title: str) -> str:
    """The page as text."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Hand-made files are noted in the page.
        said, everything = sentences(runs)
        sheets = [guarded(run, lambda run=run: answers.sheet(run, sheet_name(run, runs))) for run in runs]  # type: ignore[misc]
        made = [sheet for sheet in sheets if sheet is not None]
        holds = answers.packed(made)
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
            "neurons": explorer.block(runs, cards_of(runs)),
            "sheets": made,
            "first": [(sheet, answers.first_rows(sheet, holds.limit)) for sheet in made[:1]],
            "holds": holds,
            "provenance": [_provenance(run) for run in runs],
            "versions": _versions(runs),
            "n_runs": len(runs),
        }
        return _environment().get_template("page.html.jinja").render(context)


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
