"""Help pages: options in the sections they belong to, coloured on a terminal and plain in a pipe.

Written out here because importing typer's own rich pages takes longer than starting everything else on the command line.
"""

from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

SETTINGS = {"max_content_width": 110}
"""Context settings of the command line: pages may be wider than click's 80 columns."""
REST = "Options"


class Page(TyperCommand):
    """The help page of one verb."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the options, section by section."""
        write_options(self, ctx, formatter)


class Contents(TyperGroup):
    """The help page of a group of verbs."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the verbs, then the options."""
        self.format_commands(ctx, formatter)
        write_options(self, ctx, formatter)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write every verb with the whole sentence that it is described by."""
        write_section("Commands", self.described(ctx), formatter)

    def described(self, ctx: Any) -> list[tuple[str, str]]:
        """Every verb with its sentence."""
        verbs = [(name, self.get_command(ctx, name)) for name in self.list_commands(ctx)]
        return [(name, sentence(verb)) for name, verb in verbs if verb is not None and not verb.hidden]


def sentence(command: Any) -> str:
    """The first paragraph of a command's help, in one line."""
    return " ".join((command.help or "").split("\n\n")[0].split())


def write_options(command: Any, ctx: Any, formatter: Any) -> None:
    """The options of a command under the headings they were declared with, in the order of first mention; the others come last."""
    sections: dict[str, list[tuple[str, str]]] = {}
    for option in command.get_params(ctx):
        record = option.get_help_record(ctx)
        if record is not None:
            sections.setdefault(getattr(option, "rich_help_panel", None) or REST, []).append(record)
    for heading, records in sorted(sections.items(), key=lambda section: section[0] == REST):
        write_section(heading, records, formatter)


def write_section(heading: str, records: list[tuple[str, str]], formatter: Any) -> None:
    """A heading with a list of terms and what they mean."""
    with formatter.section(typer.style(heading, bold=True)):
        formatter.write_dl([(typer.style(term, fg=typer.colors.CYAN), text) for term, text in records])
