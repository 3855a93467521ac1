"""What a person sees: progress on standard error, results as small tables on standard output."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from rich.console import Console

ACCENT = "cyan"
Report = Callable[[int, int, int], None]
"""Told the prompts done, all prompts, and the tokens done so far."""


def out() -> "Console":
    """The console of results."""
    from rich.console import Console

    return Console(highlight=False)


def err() -> "Console":
    """The console of progress and notes."""
    from rich.console import Console

    return Console(stderr=True, highlight=False)


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]], caption: str | None = None) -> None:
    """A table: the first column is words, the others are numbers. No text in it is markup, and none is cut to fit."""
    from rich.table import Table

    title, caption = plain(title), None if caption is None else plain(caption)
    table = Table(title=title, title_justify="left", title_style="bold", caption=caption, caption_justify="left", box=None, pad_edge=False)
    for number, column in enumerate(columns):
        justify: Literal["left", "right"] = "left" if number == 0 else "right"
        table.add_column(plain(column), justify=justify, header_style=f"bold {ACCENT}", style=None, overflow="fold")
    for row in rows:
        table.add_row(*(shown(cell) for cell in row))
    out().print(table)


def shown(value: Any) -> str:
    """A cell: numbers with the digits that matter, rates with their interval, nothing for None."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.3f}" if 0.001 <= abs(value) < 1000 or value == 0 else f"{value:.3g}"
    if isinstance(value, dict) and "low" in value:
        return f"{value['value']:.2f} [{value['low']:.2f}, {value['high']:.2f}]" if value["value"] is not None else "undefined"
    return plain(value)


def plain(text: object) -> str:
    """A text of someone's (a name, a token) for the terminal: no markup, and control characters named instead of sent."""
    from rich.markup import escape

    from safety_neurons.results.notebook import visible

    return escape(visible(text))


def share(value: float) -> str:
    """A share as per cent with two significant digits below ten per cent, and one decimal where there is one above."""
    return f"{100 * value:.2g} %" if value < 0.1 else f"{100 * value:.1f} %".replace(".0 %", " %")


@contextlib.contextmanager
def progress_bar(title: str, *, quiet: bool) -> Iterator[Report | None]:
    """A bar with tokens per second and the time left on a terminal; None in a pipe or when quiet."""
    if quiet or not sys.stderr.isatty():
        yield None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = [
        TextColumn(f"[{ACCENT}]{{task.description}}"),
        BarColumn(bar_width=28),
        MofNCompleteColumn(),
        TextColumn("{task.fields[speed]}"),
        TimeRemainingColumn(),
    ]
    started = time.monotonic()
    with Progress(*columns, console=err(), transient=True) as bars:
        task = bars.add_task(title, total=None, speed="")

        def report(done: int, total: int, tokens: int) -> None:
            speed = tokens / max(time.monotonic() - started, 1e-9)
            bars.update(task, completed=done, total=total, speed=f"{speed:,.0f} tokens/s" if tokens else "")

        yield report


@contextlib.contextmanager
def status(title: str, *, quiet: bool) -> Iterator[Callable[[str], None] | None]:
    """A spinner that names the step at work on a terminal; None in a pipe or when quiet."""
    if quiet or not sys.stderr.isatty():
        yield None
        return
    with err().status(f"[{ACCENT}]{title}") as spinner:
        yield lambda step: spinner.update(f"[{ACCENT}]{title}: {step}")


def print_notes(notes: Iterable[str]) -> None:
    """Warnings, one line each, on standard error."""
    console = err()
    for note in notes:
        console.print(f"note: {note}", style="yellow", markup=False, soft_wrap=True)
