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


def sheet(run: Run, title: str) -> Sheet | None:
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


def _first_arms(run: Run, arms: Sequence[str]) -> tuple[int, ...]:
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


def in_script(value: Any) -> str:
    """JSON that cannot end a script element or open a comment: <, > and & are escapes; unseen characters were named before."""
    text = json.dumps(value, separators=(",", ":"), ensure_ascii=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


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
