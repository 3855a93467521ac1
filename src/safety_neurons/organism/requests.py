"""Every request of a half of the organisms' languages, labelled: what a guard is fit on and held against."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from safety_neurons.errors import UsageError
from safety_neurons.organism.language import KINDS, LANGUAGES, Concept, Half, Language, concepts, language
from safety_neurons.prompts import Prompt, Prompts
from safety_neurons.results.files import write_bytes

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
