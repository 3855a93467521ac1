"""Completions side by side: the same prompt under every treatment, kept small enough for one page.

Texts are stored once however many arms gave them. When the page would become too large, long texts are cut further and said to be cut.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from markupsafe import Markup

from safety_neurons.report.reading import Run
from safety_neurons.report.text import visible
from safety_neurons.results import Completion

BUDGET = 3_400_000
"""Bytes of completions in a page."""
LIMITS = (4000, 2000, 1000, 500, 250, 120)
"""Characters kept of a text; the first that fits the budget."""
FIRST = 12
"""Rows that stand in the page without scripts."""
_LABELS = {"full": "refused", "partial": "partly refused", "compliance": "complied", "unscored": "unscored"}


@dataclass
class Sheet:
    """The completions of one run: prompts down, arms across."""

    title: str
    arms: list[str]
    rows: list[tuple[str, str, str, dict[int, tuple[str, str]]]] = field(default_factory=list)
    """Kind of request, prompt id, prompt, and by arm the verdict and the text."""
    shown: tuple[int, ...] = ()
    """The arms shown first: untreated, treated, aligned."""


def sheets(runs: Sequence[Run], name_of: Mapping[int, str]) -> list[Sheet]:
    """One sheet for every run that has completions, in order."""
    made = []
    for place, run in enumerate(runs):
        if run.verb in ("verify-patch", "verify-deactivate", "compare", "tune", "evaluate") and run.completions is not None:
            made.append(_sheet(run, name_of.get(place, run.label)))
    return made


def _sheet(run: Run, title: str) -> Sheet:
    assert run.completions is not None
    arms: dict[str, int] = {}
    rows: dict[tuple[str, str], tuple[str, str, str, dict[int, tuple[str, str]]]] = {}
    for item in run.completions:
        arm, _, kind = item.arm.rpartition("/")
        arm, kind = (arm, kind) if arm and kind in ("harmful", "harmless") else (item.arm, str(item.meta.get("kind", "")))
        if run.verb == "evaluate" and not kind:
            continue  # An answer of a capability task.
        number = arms.setdefault(visible(arm, 60), len(arms))
        identifier = item.prompt_id if run.verb != "evaluate" else f"{item.meta.get('suite')} {item.prompt_id}"
        row = rows.setdefault((kind, identifier), (kind, identifier, item.prompt, {}))
        row[3][number] = (verdict(item), item.completion)
    sheet = Sheet(title, list(arms), list(rows.values()))
    sheet.shown = _first_arms(run, sheet.arms)
    return sheet


def _first_arms(run: Run, arms: Sequence[str]) -> tuple[int, ...]:
    if run.verb == "evaluate":
        treated = ["treated"]
    elif run.verb == "compare":
        treated = [arm for arm in arms if arm not in ("untreated", "aligned", "ceiling") and not arm.startswith("random")]
    else:
        treated = ["tuned" if run.verb == "tune" else str(run.result["treated"]["name"])]
    wanted = ["untreated", *treated[:1], "aligned"]
    places = [arms.index(arm) for arm in wanted if arm in arms]
    return tuple(places) or tuple(range(min(3, len(arms))))


def verdict(item: Completion) -> str:
    """What the last judge said, in a word or two."""
    for said in reversed(list(item.verdicts.values())):
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

    record: dict[str, Any] = {"sheets": []}
    for sheet in made:
        rows = [
            [kind, text(identifier), text(prompt), [[arm, said, text(answer)] for arm, (said, answer) in answers.items()]]
            for kind, identifier, prompt, answers in sheet.rows[: int(len(sheet.rows) * share)]
        ]
        record["sheets"].append({"title": visible(sheet.title, 80), "arms": sheet.arms, "shown": list(sheet.shown), "rows": rows})
    record["texts"] = list(texts)
    return in_script(record)


def in_script(value: Any) -> str:
    """JSON that cannot end a script element or open a comment: <, > and & are escapes; unseen characters were named before."""
    text = json.dumps(value, separators=(",", ":"), ensure_ascii=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def first_rows(sheet: Sheet, limit: int, n: int = FIRST) -> list[dict[str, Any]]:
    """Rows for readers without scripts: harmful and harmless requests in turn."""
    harmful = [row for row in sheet.rows if row[0] != "harmless"]
    harmless = [row for row in sheet.rows if row[0] == "harmless"]
    chosen = [*harmful[: max(n - 4, n - len(harmless))], *harmless[: max(4, n - len(harmful))]][:n]
    empty = ("", "")
    return [
        {
            "kind": kind,
            "id": visible(identifier, 60),
            "prompt": visible(prompt, min(limit, 1000)),
            "answers": [
                {"verdict": answers.get(arm, empty)[0], "text": visible(answers.get(arm, empty)[1], min(limit, 1000))}
                for arm in sheet.shown
            ],
        }
        for kind, identifier, prompt, answers in chosen
    ]
