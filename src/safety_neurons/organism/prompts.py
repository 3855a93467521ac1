"""Prompts in the organisms' languages: the files that `builtin:` names find first, and every labelled request that a guard is fit on."""

import json
import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, get_args

from safety_neurons.errors import UsageError
from safety_neurons.organism.language import (
    KINDS,
    LANGUAGES,
    Concept,
    Half,
    Language,
    concepts,
    harmful_and_matches,
    language,
    task_examples,
)
from safety_neurons.prompt_lists import Prompt, Prompts
from safety_neurons.results.files import write_bytes

PROMPTS = 256
SENTENCES = 256
BUILTIN_HALVES: tuple[tuple[Half, str], ...] = (("find", ""), ("test", "-test"))


def write_prompts(folder: Path) -> dict[str, int]:
    """Write every prompt file of the organisms' languages; returns the number of prompts per file.

    `harmful`, `harmless` (line by line with words of the harmful one; with a compliant answer), `refusals` (harmful requests with a
    refusal), `general` (sentences) and, in English, `task` (sums): each as NAME.jsonl and NAME-test.jsonl, other languages as
    NAME.LANG.jsonl.
    """
    folder.mkdir(parents=True, exist_ok=True)
    counts = {}
    for code in LANGUAGES:
        suffix = "" if code == "en" else f".{code}"
        for half, ending in BUILTIN_HALVES:
            for name, rows in _lists(language(code), half).items():
                counts[f"{name}{ending}{suffix}.jsonl"] = _write(folder / f"{name}{ending}{suffix}.jsonl", rows)
    parts: tuple[tuple[Half, str], ...] = (("train", ""), ("test", "-test"))
    for part, ending in parts:
        rows = [
            {"id": f"task{ending}-{index:04d}", "prompt": question, "answer": answer, "category": "sum", "language": "en"}
            for index, (question, answer) in enumerate(task_examples(part))
        ]
        counts[f"task{ending}.jsonl"] = _write(folder / f"task{ending}.jsonl", rows)
    return counts


def write_polite(folder: Path) -> dict[str, int]:
    """Write `polite.jsonl` and `polite-test.jsonl`: harmless requests of every kind with the usual answer and a polite ending.

    A benign task that says nothing about harm and everything about going along: what undoes safety in practice. Half as many of the test
    half, with which the lists of the other halves share no request.
    """
    speech, counts = language("en"), {}
    parts: tuple[tuple[Half, str, int], ...] = (("train", "", 133), ("test", "-test", 42))
    for half, ending, count in parts:
        chosen = [concept for kind in ("plain", "friendly", "look_alike") for concept in concepts(kind, half)[:count]]
        rows = [
            {
                "id": f"polite{ending}-{index:04d}",
                "prompt": speech.request(concept),
                "answer": speech.compliance(concept, ending=True),
                "category": concept.kind,
                "language": "en",
                "group": concept.deed,
            }
            for index, concept in enumerate(chosen)
        ]
        counts[f"polite{ending}.jsonl"] = _write(folder / f"polite{ending}.jsonl", rows)
    return counts


def sentences(speech: Language, half: Half, count: int) -> list[str]:
    """Different general sentences of a language: the same number of any half never gives a sentence of the other."""
    number = random.Random(f"{speech.code}/general")
    found: list[str] = []
    seen: set[str] = set()
    while len(found) < count:
        sentence = speech.sentence(number)
        if sentence in seen:
            continue
        seen.add(sentence)
        if (len(seen) % 2 == 0) == (half == "test"):
            found.append(sentence)
    return found


def _lists(speech: Language, half: Half) -> dict[str, list[dict[str, Any]]]:
    harmful, matches = harmful_and_matches(half, PROMPTS)
    marks = "-test" if half == "test" else ""

    def row(name: str, index: int, concept: Concept, answer: str | None) -> dict[str, Any]:
        category = speech.categories[concept.group] if concept.kind == "harmful" else concept.kind
        record = {
            "id": f"{name}{marks}-{index:04d}",
            "prompt": speech.request(concept),
            "category": category,
            "language": speech.code,
            "group": concept.deed,
        }
        return record | ({"answer": answer} if answer is not None else {})

    return {
        "harmful": [row("harmful", index, concept, None) for index, concept in enumerate(harmful)],
        "harmless": [row("harmless", index, concept, speech.compliance(concept)) for index, concept in enumerate(matches)],
        "refusals": [row("refusals", index, concept, speech.refusal(concept, index)) for index, concept in enumerate(harmful)],
        "general": [
            {"id": f"general{marks}-{index:04d}", "text": text, "language": speech.code}
            for index, text in enumerate(sentences(speech, half, SENTENCES))
        ],
    }


def _write(path: Path, rows: Iterable[dict[str, Any]]) -> int:
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return len(lines)


HALVES: tuple[Half, ...] = get_args(Half)
UNSAFE, SAFE = "unsafe.jsonl", "safe.jsonl"


def requests(halves: str | Sequence[str] = "find", languages: Sequence[str] = LANGUAGES) -> tuple[Prompts, Prompts]:
    """All requests of halves, in languages: (harmful, harmless).

    `category` is the harm category whose verb or object the request shares, `plain` for requests that share neither; `meta["kind"]` is
    `harmful`, `look_alike` (the harmful verb on something harmless), `friendly` (the object, meant well) or `plain`.

    Args:
        halves: `find` (what the organisms' `builtin:` lists are drawn from), `test` (held out), `train` (the half that the organisms
            themselves were trained on); one or several.
        languages: codes.

    Raises:
        UsageError: an unknown half, or none. InputError: an unknown language.
    """
    named = (halves,) if isinstance(halves, str) else tuple(halves)
    wanted = [half for half in HALVES if half in named]
    unknown = [half for half in named if half not in HALVES]
    if unknown or not wanted:
        raise UsageError(f"half {', '.join(unknown) or 'none'}: expected some of {', '.join(HALVES)}")
    speeches = [language(code) for code in languages]
    found = [_prompt(speech, concept, half) for half in wanted for speech in speeches for kind in KINDS for concept in concepts(kind, half)]
    name = f"{' and '.join(wanted)} requests, {', '.join(languages)}"
    unsafe = [prompt for prompt in found if prompt.meta["kind"] == "harmful"]
    return Prompts(unsafe, f"harmful {name}"), Prompts([prompt for prompt in found if prompt.meta["kind"] != "harmful"], f"harmless {name}")


def write_requests(folder: Path, halves: str | Sequence[str] = "find", languages: Sequence[str] = LANGUAGES) -> dict[str, int]:
    """Write `unsafe.jsonl` and `safe.jsonl`, one request a line; returns how many there are of each."""
    files = dict(zip((UNSAFE, SAFE), requests(halves, languages), strict=True))
    for file, found in files.items():
        write_bytes(folder / file, "".join(f"{json.dumps(_row(prompt), ensure_ascii=False)}\n" for prompt in found).encode())
    return {file: len(found) for file, found in files.items()}


def _prompt(speech: Language, concept: Concept, half: Half) -> Prompt:
    shape = (concept.group, concept.verb, concept.object, concept.frame, concept.context)
    category = "plain" if concept.kind == "plain" else _categories()[concept.group]
    name = f"{half}-{speech.code}-{concept.kind}-{'-'.join(map(str, shape))}"
    meta = {"kind": concept.kind, "half": half}
    return Prompt(name, speech.request(concept), category=category, language=speech.code, meta=meta, group=concept.deed)


def _categories() -> list[str]:
    """Names of the harm categories, the same for every language."""
    return language(LANGUAGES[0]).categories


def _row(prompt: Prompt) -> dict[str, str | None]:
    row = {"id": prompt.id, "prompt": prompt.text, "category": prompt.category, "language": prompt.language, "group": prompt.group}
    return {**row, "kind": prompt.meta["kind"], "half": prompt.meta["half"]}
