"""Built-in prompts: package data of the project's own writing, or an organism's own under the same names."""

import re
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import TypedDict

from safety_neurons import strict_json
from safety_neurons.errors import InputError

PREFIX = "builtin:"
NAMES = tuple(name + half for name in ("harmful", "harmless", "refusals", "general") for half in ("", "-test"))
ENGLISH = ("look-alikes", "look-alikes-unsafe")
"""Lists in English only, of which there are no two halves: nothing is found or tuned on them."""
LOOK_ALIKES = (f"{PREFIX}look-alikes-unsafe", f"{PREFIX}look-alikes")
"""Requests from another source than any fit's own, unsafe and safe, which a guard is measured on where none are named."""
OF_ORGANISMS = ("task", "task-test", "polite", "polite-test")
"""Lists that only an organism brings."""
PARTS = {"look-alikes": ("harmless-test", "look_alike"), "look-alikes-unsafe": ("harmful-test", None)}
"""Lists that an organism has as a category of another of its lists (None: all of it)."""
DEFAULT_LANGUAGE = "en"

_FILE = re.compile(r"(?P<name>.+)\.(?P<language>[a-z]{2,3})\.jsonl")


class Entry(TypedDict):
    """One built-in list: its name as it is asked for, its language and its number of prompts."""

    name: str
    language: str
    prompts: int


def library() -> list[Entry]:
    """Every built-in list of the package, English first under each name."""
    entries = []
    for name in NAMES + ENGLISH:
        for language in languages(name):
            lines = _data(f"{name}.{language}.jsonl").read_text(encoding="utf-8").count("\n")
            address = f"{PREFIX}{name}" + ("" if language == DEFAULT_LANGUAGE else f"/{language}")
            entries.append(Entry(name=address, language=language, prompts=lines))
    return entries


def languages(name: str) -> list[str]:
    """Languages that the package has the list in, English first."""
    found = [match["language"] for entry in _data().iterdir() if (match := _FILE.fullmatch(entry.name)) and match["name"] == name]
    return sorted(found, key=lambda language: (language != DEFAULT_LANGUAGE, language))


def builtin_text(source: str, folder: Path | None) -> tuple[str, str | None, bool]:
    """Text of a built-in list, the language its rows are to be limited to (None: all), and whether it is the folder's own.

    Args:
        source: `builtin:NAME` or `builtin:NAME/LANG`.
        folder: A folder that may hold lists of its own: `NAME.jsonl`, `NAME.LANG.jsonl` or `NAME/LANG.jsonl`.
    """
    name, _, language = source.removeprefix(PREFIX).partition("/")
    if not re.fullmatch(r"[\w-]*", language):
        raise InputError(f"{source}: {language[:40]!r} is no language; expected a code such as {DEFAULT_LANGUAGE}")
    if name in OF_ORGANISMS and (folder is None or _own(name, language, folder) is None):
        raise InputError(f"{source}: only organisms bring a task; give a file with a column of questions and one of answers")
    if name not in NAMES + ENGLISH + OF_ORGANISMS:
        names = ", ".join(NAMES + ENGLISH)
        raise InputError(f"{source}: no built-in prompts of this name; expected one of {names}, each with /LANG after it if wanted")
    own = _own(name, language, folder) if folder is not None else None
    if own is not None:
        return own.read_text(encoding="utf-8"), (language or None) if own.name == f"{name}.jsonl" else None, True
    if folder is not None and name in PARTS and (whole := _own(PARTS[name][0], language, folder)) is not None:
        kept = [line for line in whole.read_text(encoding="utf-8").splitlines() if _is_of(line, PARTS[name][1])]
        if kept:
            return "\n".join(kept), (language or None) if whole.name == f"{PARTS[name][0]}.jsonl" else None, True
    known = languages(name)
    if (language or DEFAULT_LANGUAGE) not in known:
        raise InputError(f"{source}: not there in {language!r}; expected {name} in one of {', '.join(known)}; choose one of them")
    return _data(f"{name}.{language or DEFAULT_LANGUAGE}.jsonl").read_text(encoding="utf-8"), None, False


def _own(name: str, language: str, folder: Path) -> Path | None:
    candidates = [folder / f"{name}.{language}.jsonl", folder / name / f"{language}.jsonl"] if language else []
    return next((path for path in [*candidates, folder / f"{name}.jsonl"] if path.is_file()), None)


def _is_of(line: str, category: str | None) -> bool:
    return category is None or strict_json.loads(line).get("category") == category


def _data(*parts: str) -> Traversable:
    return resources.files("safety_neurons.prompts").joinpath("data", *parts)
