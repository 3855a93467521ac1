"""The page: finished runs read and checked, a section for each; nothing in it loads, runs or calls home."""

import base64
import functools
import hashlib
import importlib.resources
import os
import pathlib
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jinja2
from markupsafe import Markup

from safety_neurons.arguments import well_typed
from safety_neurons.display import DISPLAYS, DisplayPart, Finding, Tile, findings_of, part_of
from safety_neurons.display.analyses import cards_of
from safety_neurons.display.found import block, opened
from safety_neurons.display.parts import RECORD, ReportedRun, guarded, ranked_by
from safety_neurons.display.registry import display_of
from safety_neurons.display.text import NONE, duration, in_script, name, say, visible
from safety_neurons.display.verified import patch_parts, sweep_order
from safety_neurons.errors import InputError, UsageError
from safety_neurons.results import Completion, read_json, write_bytes
from safety_neurons.results.run import SCHEMA, now
from safety_neurons.strict_json import JsonObject


@well_typed
def read_runs(paths: Sequence[pathlib.Path | str]) -> list[ReportedRun]:
    """The runs, each once, in the order given.

    Raises:
        UsageError: no run was given. InputError: a folder without a run record, an unfinished run, or a
        damaged record; the message names it.
    """
    runs: dict[pathlib.Path, ReportedRun] = {}
    for path in map(pathlib.Path, paths):
        folder = path.parent if path.name == RECORD else path
        runs.setdefault(folder.resolve(), _read(folder))
    if not runs:
        raise UsageError(
            "no run was given, expected the folders of finished runs; give the --out folders of find, "
            "verify or compare"
        )
    return list(runs.values())


def _read(folder: pathlib.Path) -> ReportedRun:
    source = folder / RECORD
    if not source.is_file():
        what = (
            "has no run.json"
            if folder.is_dir()
            else "is not a folder"
            if folder.exists()
            else "does not exist"
        )
        raise InputError(
            f"{str(folder)!r} {what}, expected the folder of a finished run; give the --out folder of "
            "find, verify or compare"
        )
    record = read_json(source)
    shape = {"verb": str, "status": str, "arguments": dict}
    if not isinstance(record, dict) or not all(
        isinstance(record.get(part), kind) for part, kind in shape.items()
    ):
        raise InputError(
            f"{str(source)!r} is not a run record, expected verb, status and arguments; run the verb again"
        )
    if record.get("schema", SCHEMA) != SCHEMA or not isinstance(record.get("result", {}), dict):
        raise InputError(
            f"{str(source)!r} is not a run record of this version (schema "
            f"{str(record.get('schema'))[:40]!r}), expected {SCHEMA!r} and a result; repeat the run"
        )
    if record["status"] != "finished" or "result" not in record:
        status = " ".join(record["status"].split())[:40]
        raise InputError(
            f"the run in {str(folder)!r} is not finished (status {status!r}), expected a finished one;"
            " repeat its command to continue it, or leave it out"
        )
    return ReportedRun(folder, record)


BUDGET = 3_400_000
"""Bytes of completions in a page."""
LIMITS = (4000, 2000, 1000, 500, 250, 120)
"""Characters kept of a text; the first that fits the budget."""
MOST_JUDGES = 8
"""Judges whose verdicts a page holds, the last ones of a file."""
FIRST = 12
"""Rows that stand in the page without scripts."""
WORDS = ("refused", "partly refused", "complied", "harmful", "safe", "unscored")
"""What a judge can say, as the page writes it."""
_LABELS = {"full": "refused", "partial": "partly refused", "compliance": "complied"} | {
    word: word for word in WORDS[3:]
}


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
    if not display_of(run).completions or run.completions is None:
        return None
    arms: dict[str, int] = {}
    rows: dict[tuple[str, str], Row] = {}
    judges = list(dict.fromkeys(judge for item in run.completions for judge in item.verdicts))[-MOST_JUDGES:]
    for item in run.completions:
        arm, _, kind = item.arm.rpartition("/")
        arm, kind = (
            (arm, kind)
            if arm and kind in ("harmful", "harmless")
            else (item.arm, str(item.meta.get("kind", "")))
        )
        if run.verb == "evaluate" and not kind:
            continue  # An answer of a capability task.
        number = arms.setdefault(visible(arm, 60), len(arms))
        identifier = (
            item.prompt_id if run.verb != "evaluate" else f"{item.meta.get('suite')} {item.prompt_id}"
        )
        row = rows.setdefault((kind, identifier), (kind, identifier, item.prompt, {}))
        row[3][number] = (tuple(verdict(item, judge) for judge in judges), item.completion)
    made = Sheet(title, list(arms), [visible(judge, 60) for judge in judges], list(rows.values()))
    made.shown = _first_arms(run, made.arms)
    return made


_CONTROLS = ("untreated", "aligned", "random", "ceiling")
"""What arms beside the treated ones are called, or begin with."""


def _first_arms(run: ReportedRun, arms: Sequence[str]) -> tuple[int, ...]:
    named = run.result.get("patch", run.result).get("treated")
    treated = [
        "tuned" if run.verb == "tune" else "treated" if run.verb == "evaluate" else "guarded",
        str(named["name"]) if isinstance(named, Mapping) and "name" in named else "",
    ]
    treated += [arm for arm in arms if not arm.startswith(_CONTROLS)]
    first = next((arm for arm in treated if arm in arms), "")
    wanted = ["untreated", "unguarded", first, "aligned"]
    places = [arms.index(arm) for arm in dict.fromkeys(wanted) if arm in arms]
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
    """The sheets as one JSON block inside the budget: texts are cut first, then the last prompts of every
    sheet are left out.
    """
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
        named = {
            "title": visible(each.title, 80),
            "arms": each.arms,
            "judges": each.judges,
            "shown": list(each.shown),
        }
        record["sheets"].append(named | {"rows": rows})
    record["texts"] = list(texts)
    return in_script(record)


def first_rows(sheet: Sheet, limit: int, n: int = FIRST) -> list[JsonObject]:
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
                {
                    "verdict": (answers.get(arm, empty)[0] or ("",))[-1],
                    "text": visible(answers.get(arm, empty)[1], min(limit, 1000)),
                }
                for arm in sheet.shown
            ],
        }
        for kind, identifier, prompt, answers in chosen
    ]


HEAD = 4
"""Sentences that stand in the first screen."""
HEADINGS = (
    (
        "replicated",
        "Do published numbers replicate?",
        "What was published, beside the number of the same quantity that was measured here.",
    ),
    (
        "where",
        "Where the neurons are",
        "Rows are layers, columns the seven projections of a layer; empty places were not searched.",
    ),
    ("sufficient", "Are they sufficient? Causal effect against set size", ""),
    ("tuned", "Does tuning them make the model safer?", ""),
    (
        "guarded",
        "Can a guard tell in advance?",
        "A classifier reads neurons at the prompt, before the first token is written.",
    ),
    ("lasting", "Does tuned safety last?", ""),
    ("evaluated", "How safe, how helpful, how capable?", ""),
    ("methods", "Methods compared", ""),
    ("necessary", "Are they necessary?", "The neurons are switched off as if their parameters were zero."),
    (
        "dosed",
        "Does the behaviour follow the dose?",
        "The neurons' activations are multiplied by a factor; random sets beside them.",
    ),
    ("understood", "What do these neurons have in common?", ""),
    ("alone", "What do single neurons do?", ""),
    ("doctor", "Is the model understood?", "Every check is an experiment on the model itself."),
    ("others", "Other runs", ""),
)
"""Anchor, heading and introduction of every section."""
_FIRST = (
    "run",
    "tune",
    "verify-both",
    "verify-patch",
    "verify-deactivate",
    "verify-scale",
    "guard-evaluate",
    "evaluate",
    "compare",
    "analyze",
    "find",
    "guard",
    "doctor",
)
"""What answers the question comes first; what was measured on the way after it."""


_TILES = (
    "tune",
    "verify-both",
    "verify-patch",
    "verify-deactivate",
    "verify-scale",
    "guard-evaluate",
    "evaluate",
    "ranking",
    "compare",
    "doctor",
)
"""Whose answers stand on the first screen, the most telling first."""


@dataclass(frozen=True)
class Section:
    """One section of the page."""

    anchor: str
    heading: str
    introduction: str
    parts: Sequence[DisplayPart]


def sections(runs: Sequence[ReportedRun]) -> list[Section]:
    """Every section that has any part; sweeps of the same pair stand in one figure."""
    made: dict[str, list[DisplayPart]] = {}
    patched, maps = [run for run in runs if run.verb == "verify-patch"], opened(runs)
    if patched:
        made["sufficient"] = guarded(patched[0], lambda _: patch_parts(patched))
    for run in runs:
        if run.verb != "verify-patch":
            part = replace(part_of(run), opens=maps.index(run) if run in maps else None)
            made.setdefault(display_of(run).section, []).append(part)
    return [
        Section(anchor, heading, words, made[anchor])
        for anchor, heading, words in HEADINGS
        if made.get(anchor)
    ]


def sentences(runs: Sequence[ReportedRun]) -> tuple[list[Finding], list[Finding]]:
    """What the first screen says: the first sentence of the first run of every verb; and all sentences."""
    said = [(run, findings_of(run)) for run in sorted(runs, key=_rank)]
    head: dict[str, Finding] = {}
    for run, found in said:
        if found:
            head.setdefault(run.kind, found[0])
    everything = [finding for _, found in said for finding in found]
    return (everything, []) if len(everything) <= HEAD + 1 else (list(head.values())[:HEAD], everything)


def short_answers(runs: Sequence[ReportedRun]) -> list[Tile]:
    """The tiles of the first screen: one for a kind of run, two where pairs are compared or several models
    are examined.
    """
    tiles = []
    for kind in _TILES:
        ordered = sorted((run for run in runs if run.kind == kind), key=_rank)
        make = DISPLAYS[kind].tile
        assert make is not None
        tiles += [guarded(run, make) for run in ordered[: 2 if kind in ("compare", "doctor") else 1]]
    return tiles[:4]


def sheet_name(run: ReportedRun) -> str:
    """What the completions of a run are called."""
    words = display_of(run).completions
    return words.format(ranked_by(run)) + f" · {run.label}" if words else run.label


def _rank(run: ReportedRun) -> tuple[float | int, ...]:
    place = next((place for place, verb in enumerate(_FIRST) if run.verb.startswith(verb)), len(_FIRST))
    return (place, *(guarded(run, sweep_order) if run.verb == "verify-patch" else ()))


def asked(runs: Sequence[ReportedRun]) -> list[Markup]:
    """The questions these runs answer."""
    kinds = {run.verb for run in runs}
    questions = []
    pairs = list(dict.fromkeys(run.models for run in runs if len(run.models) == 2))
    single = list(dict.fromkeys(run.models for run in runs if len(run.models) == 1))
    if pairs:
        parts = [
            say("{} refuse harmful requests which {} answers", name(aligned), name(base))
            for base, aligned in pairs[:3]
        ]
        questions.append(say("Which neurons make {}?", Markup(", and ").join(parts)))
    elif single and any(kind.startswith(("find", "verify", "tune", "compare", "study")) for kind in kinds):
        questions.append(say("Which neurons make {} refuse harmful requests?", name(single[0][0])))
    if kinds & {"verify-patch", "verify-both"}:
        questions.append(Markup("Are they sufficient: does patching them alone carry the refusals over?"))
    if kinds & {"verify-deactivate", "verify-both"}:
        questions.append(Markup("Are they necessary: what is lost without them?"))
    if "compare" in kinds:
        questions.append(Markup("Which method finds them at equal budget?"))
    if "tune" in kinds:
        questions.append(Markup("Does tuning them alone make the model safer, and at what price?"))
    if "evaluate" in kinds:
        questions.append(
            Markup(
                "How much harm is left, how much is refused without need, and what can the model still do?"
            )
        )
    if kinds & {"guard-fit", "guard-evaluate", "guard-recalibrate"}:
        questions.append(Markup("Does a guard on them tell, before the first token, what will be unsafe?"))
    if any(kind.startswith("analyze") for kind in kinds):
        questions.append(Markup("What are these neurons, and what do sets of them share beyond chance?"))
    if "doctor" in kinds:
        questions.append(Markup("Can numbers found on this model be trusted?"))
    return questions


SCRIPTS = ("map.js", "completions.js")


@well_typed
def write_report(
    runs: Sequence[pathlib.Path | str], out: pathlib.Path | str, *, title: str = "Safety neurons"
) -> pathlib.Path:
    """One self-contained HTML page from the folders of finished runs.

    The page needs no network and no script to be read: figures are drawn into it, a script only searches the
    completions. Text from prompts, completions, names and notes is escaped wherever it stands; unseen
    characters are named.

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
    runs = [replace(run, beside=runs) for run in runs]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Hand-made files are noted in the page.
        said, everything = sentences(runs)
        sheets = [guarded(run, lambda run: sheet(run, sheet_name(run))) for run in runs]
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
            "neurons": block(runs, cards_of(runs)),
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
    pairs = lambda value: (  # noqa: E731
        [(visible(key, 80), visible(entry, 200)) for key, entry in value.items()]
        if isinstance(value, dict)
        else []
    )
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
        "notes": list(dict.fromkeys(visible(note, 300) for note in notes))[:50]
        if isinstance(notes, list)
        else [],
    }


def _versions(runs: Sequence[ReportedRun]) -> list[tuple[str, str]]:
    found: dict[str, dict[str, None]] = {}
    for run in runs:
        versions = run.record.get("versions")
        for package, version in versions.items() if isinstance(versions, dict) else []:
            found.setdefault(visible(package, 60), {})[visible(version, 80)] = None
    return [(package, ", ".join(versions)) for package, versions in found.items()]


@functools.cache  # It keeps the templates, which take longer to compile than a page to fill.
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_asset),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["visible"] = visible
    return environment


def _asset(file: str) -> str:
    return (
        importlib.resources.files("safety_neurons.report")
        .joinpath("assets", os.path.basename(file))
        .read_text(encoding="utf-8")
    )


def _policy(style: str, script: str) -> str:
    """Nothing is fetched; only this style and this script count, by their hashes.

    No script may write HTML.
    """

    def digest(text: str) -> str:
        return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()

    return (
        f"default-src 'none'; style-src 'sha256-{digest(style)}'; script-src 'sha256-{digest(script)}'; "
        "base-uri 'none'; form-action 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
    )
