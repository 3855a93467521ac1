"""Prints the page of all options, one table a verb, from their declarations.

`make format` puts it into `options.md`.
"""

import dataclasses
import pathlib
import re
import sys
from collections.abc import Iterable

from safety_neurons.cli.session import Common
from safety_neurons.cli.verb import DECLARED, build, sentence
from safety_neurons.declarations import Option

PAGE = pathlib.Path(__file__).with_suffix(".md")
HEAD = """# Options of every verb

Made from the declarations of the verbs by `docs/options.py`; edit those, not this page. Each option is
also a key of `arguments` in a recipe or `run.json`, with `_` in place of `-`, and where a verb is a Python
call, its argument.
"""


STATED = re.compile(r"\s*\[default: ([^\]]*)\]")
"""What is taken without an option, where that is no fixed value."""


def default_of(option: Option) -> str:
    """What is taken where an option is not given."""
    if stated := STATED.search(option.help):
        return stated[1]
    if option.default is dataclasses.MISSING:
        return "required"
    if option.default is None:
        return ""
    return "off" if option.default is False else f"`{option.default}`"


def meaning_of(option: Option) -> str:
    """The text of an option, with its range."""
    limits = "" if option.between is None else f" ({option.between})"
    return (STATED.sub("", option.help).rstrip(".") + limits).replace("|", "\\|")


def table(options: Iterable[Option]) -> list[str]:
    """A row an option."""
    lines = ["| option | default | meaning |", "|---|---|---|"]
    for option in options:
        name = option.name.upper() if option.positional else option.flag
        lines.append(f"| `{name}` | {default_of(option)} | {meaning_of(option)} |")
    return lines


def page() -> str:
    """The whole page."""
    lines = [HEAD, "## Every verb", "", *table(Common.options())]
    for words, command in commands(build()):
        lines += ["", f"## {words}", "", sentence(command)]
        options = [option for kind in DECLARED[words] for option in kind.options()]
        lines += ["", *table(options)] if options else []
    return "\n".join(lines) + "\n"


def commands(group: object, before: str = "") -> Iterable[tuple[str, object]]:
    """Every verb with its words, in the order of the help pages."""
    for name, command in ((name, group.commands[name]) for name in group.list_commands(None)):
        words = f"{before} {name}".strip()
        yield from commands(command, words) if hasattr(command, "commands") else [(words, command)]


if __name__ == "__main__":
    if "--write" in sys.argv:
        PAGE.write_text(page(), encoding="utf-8")
    else:
        sys.stdout.write(page())
