"""What a person sees: results as small tables on standard output, progress and notes on standard error, and
nothing of anybody else's.

While a verb works, what other libraries print, log or warn goes nowhere (to standard error with --debug).
Every text passes `seen` on its way to the terminal: no text is markup, and what a terminal would obey instead
of show is named.
"""

import atexit
import contextlib
import dataclasses
import functools
import io
import json
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TextIO

from safety_neurons import strict_json

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

    from safety_neurons.display import ReportedRun

ACCENT = "cyan"
TONES = {
    "shown": "green",
    "pass": "green",
    "not shown": "red",
    "fail": "red",
    "in part": "yellow",
    "caution": "yellow",
}
"""Colours of what a finding came out as."""
SHORT = 24
"""Rows of a table that a page folds and a terminal still prints."""
FOLDED = 24
"""Width down to which words are folded where a table is too wide."""
SPARED = 8
"""Width down to which words are folded anywhere before a number is."""
Report = Callable[[int, int, int], None]
"""Told the prompts done, all prompts, and the tokens done so far."""
Part = str | tuple[str, object]
"""A text, or a style and a text in it."""
QUIET = {
    "TRANSFORMERS_VERBOSITY": "error",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "HF_HUB_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "DIFFUSERS_VERBOSITY": "error",
    "DATASETS_VERBOSITY": "error",
    "BITSANDBYTES_NOWELCOME": "1",
    "PYTHONWARNINGS": "ignore",
    "TQDM_DISABLE": "1",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    "TF_CPP_MIN_LOG_LEVEL": "3",
    "GLOG_minloglevel": "3",
}
"""What other libraries, and processes that they start, are asked in the environment to keep to themselves."""


# Whose streams they are


@dataclasses.dataclass
class Streams:
    """Where this package's own lines go."""

    out: Any  # Any text stream, and a notebook's or a test's are not `TextIO`.
    err: Any

    @property
    def text(self) -> str:
        """What was caught of standard output."""
        return self.out.getvalue() if isinstance(self.out, io.StringIO) else ""

    @property
    def result(self) -> Any:
        """The object that a command with `--json` printed, where it was caught; otherwise None."""
        return strict_json.loads(self.text) if self.text else None


_OURS: list[Streams] = []


def nested() -> bool:
    """Whether this command is a part of another one."""
    return bool(_OURS)


def streams() -> Streams:
    """The streams for this package's own lines."""
    return _OURS[-1] if _OURS else Streams(sys.stdout, sys.stderr)


@contextlib.contextmanager
def ours(*, debug: bool) -> Iterator[None]:
    """Keep standard output and error for this package's own lines for a block.

    Python's streams are exchanged and the files behind them are not, so that what a crash in native code
    writes is still seen.

    Args:
        debug: send what others write to standard error instead of nowhere.
    """
    own, nested = streams(), bool(_OURS)
    for stream in (own.out, own.err):
        if isinstance(
            stream, io.TextIOWrapper
        ):  # A terminal that knows few letters is no reason to lose a result.
            stream.reconfigure(errors="backslashreplace")
    foreign = own.err if debug else _nowhere()
    kept, hook = (sys.__stdout__, sys.__stderr__), threading.excepthook
    asked = (
        {} if debug or nested else {name: value for name, value in QUIET.items() if name not in os.environ}
    )
    os.environ.update(asked)
    _OURS.append(own)
    sys.__stdout__ = sys.__stderr__ = foreign  # type: ignore[misc, assignment]
    threading.excepthook = _thread_ended
    try:
        with contextlib.redirect_stdout(foreign), contextlib.redirect_stderr(foreign):
            yield
    finally:
        _OURS.pop()
        sys.__stdout__, sys.__stderr__ = kept  # type: ignore[misc]
        threading.excepthook = hook
        for name in asked:
            os.environ.pop(name, None)


def _thread_ended(ended: threading.ExceptHookArgs) -> None:
    """Say that a thread died: Python writes it to a stream that is nobody's now."""
    tell(f"safety-neurons: a thread ended: {ended.exc_type.__name__}: {line_of(ended.exc_value or '')}\n")


@contextlib.contextmanager
def caught() -> Iterator[Streams]:
    """Catch this package's own standard output for a block: of a command inside a command."""
    inside = Streams(io.StringIO(), streams().err)
    _OURS.append(inside)
    try:
        yield inside
    finally:
        _OURS.pop()


@contextlib.contextmanager
def shared() -> Iterator[Streams]:
    """The streams as they are, for a command inside a command that is to be seen."""
    yield streams()


@functools.cache
def _nowhere() -> TextIO:
    """Open for as long as the process lives, because loggers keep the stream that they were made with."""
    stream = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - closed at the end of the process
    atexit.register(stream.close)
    return stream


# Text


def seen(text: object, *, lines: bool = False) -> str:
    """A text of anybody's for the terminal: controls, escapes and direction marks named instead of sent.

    Args:
        text: the text.
        lines: leave line breaks and tabs as they are; otherwise they are named too.
    """
    from safety_neurons.results.notebook import visible

    shown = visible(text)
    return shown if lines else re.sub(r"[\n\t]", lambda match: f"⟨U+{ord(match[0]):04X}⟩", shown)


def line_of(text: object) -> str:
    """A message in one line."""
    return seen(" ".join(str(text).split()))


def json_line(value: Any) -> str:
    """JSON in one line, in which a terminal finds nothing to obey either; it is read back as the same."""
    from safety_neurons.results.notebook import UNSEEN

    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    return UNSEEN.sub(lambda match: json.dumps(match[0])[1:-1], text) + "\n"


def out() -> "Console":
    """The console of results."""
    from rich.console import Console

    return Console(file=streams().out, highlight=False, markup=False, emoji=False)


def err() -> "Console":
    """The console of progress and notes."""
    from rich.console import Console

    return Console(file=streams().err, highlight=False, markup=False, emoji=False)


def styled(*parts: Part) -> "Text":
    """Texts one behind another, each as it is or in a style."""
    from rich.text import Text

    text = Text()
    for part in parts:
        style, content = part if isinstance(part, tuple) else ("", part)
        text.append(seen(content, lines=True), style or None)
    return text


def say(*parts: Part) -> None:
    """A line of the result, or several."""
    out().print(styled(*parts), soft_wrap=True)


def rule(title: str = "") -> None:
    """A line across, with a title."""
    out().rule(styled(("bold", title)), align="left", style=ACCENT)


def tell(text: str) -> None:
    """Lines on standard error, at once."""
    stream = streams().err
    stream.write(text)
    stream.flush()


def sentence(*parts: Part) -> None:
    """A sentence of the result: broken between words on a terminal, in one line in a pipe."""
    console = out()
    console.print(styled(*parts), soft_wrap=not console.is_terminal)


def show(run: "ReportedRun") -> None:
    """A result as its display has it: what was not achieved, its tables, then what was found.

    Tables that a page folds are printed too where they are short, or where the first of them is all there is;
    the others are named.
    """
    from safety_neurons.display import findings_of, part_of
    from safety_neurons.display.parts import plain

    part, findings = part_of(run), findings_of(run)
    for missed in part.missed:
        sentence(("bold red", plain(missed)))
    sentence(("bold", plain(part.heading)))
    if part.lead:
        sentence(plain(part.lead))
    folded = []
    for number, table in enumerate([*part.tables, *part.details]):
        if number < max(len(part.tables), 1) or (part.tables and len(table.rows) <= SHORT):
            rows = [[plain(cell) for cell in row] for row in table.rows]
            print_table(
                f"\n{plain(table.caption)}",
                [plain(column) for column in table.columns],
                rows,
                quiet=table.quiet,
            )
        else:
            folded.append(plain(table.caption))
    if findings:
        say()
    for finding in findings:
        sentence((TONES.get(finding.verdict, "dim"), f"{finding.verdict}: "), plain(finding.text))
    if folded:
        sentence(("dim", f"\nin a report also: {'; '.join(folded)}"))


def print_table(
    title: str,
    columns: Sequence[str],
    rows: Iterable[Sequence[Any]],
    caption: str = "",
    quiet: Container[int] = (),
) -> None:
    """A table: columns of numbers stand at the right. No text in it is markup, and none is cut to fit.

    Where the terminal is too narrow, text is folded between words; columns that still have no room stand
    below, each time behind the first.

    Args:
        title: stands above it.
        columns: headers.
        rows: cells; None is a dash, and whole numbers get separators.
        caption: stands below it.
        quiet: numbers of the rows that stand back.
    """
    from rich.table import Table

    cells = [[_cell(cell) for cell in row] for row in rows]
    headers = [styled(column) for column in columns]
    words = [
        number == 0 or any(row[number].plain[:1].isalpha() for row in cells) for number in range(len(columns))
    ]
    room = _Room(
        [[header, *(row[number] for row in cells)] for number, header in enumerate(headers)],
        words,
        out().width,
    )
    sentence(("bold", title))
    for place, piece in enumerate(room.pieces()):
        if place:
            say()
        table = Table(box=None, pad_edge=False)
        for number, width in room.shared(piece).items():
            table.add_column(
                headers[number],
                justify="left" if words[number] else "right",
                header_style=f"bold {ACCENT}",
                overflow="fold",
                width=width,
            )
        for place, row in enumerate(cells):
            table.add_row(*(row[number] for number in piece), style="dim" if place in quiet else None)
        out().print(table)
    if caption:
        sentence(("dim", caption))


class _Room:
    """How wide the columns of a table are: numbers are never folded, words and headers between words.

    Widths are cells of the terminal; between two columns are `GAP`. All are set here, since a table that sets
    its own gives columns of names more than there is, and cuts off what then has no room.

    Args:
        columns: their texts, the header first.
        words: which of them hold words.
        width: of the terminal.
    """

    GAP = 2

    def __init__(self, columns: Sequence[Sequence["Text"]], words: Sequence[bool], width: int) -> None:
        self.words, self.width = words, width
        self.whole = [max(text.cell_len for text in texts) for texts in columns]
        self.least = []
        for (header, *cells), folds in zip(columns, words, strict=True):
            widest = max((cell.cell_len for cell in cells), default=0)
            if folds:
                # Names are copied from tables, but paths and hashes have no end.
                name = min(max(map(_longest_word, cells), default=0), width // 2)
                widest = max(min(widest, FOLDED), name)
            self.least.append(max(1, widest, _longest_word(header)))

    def pieces(self) -> list[list[int]]:
        """Numbers of the columns that stand side by side, the first of all in every piece."""
        pieces = [[0]]
        for number in range(1, len(self.least)):
            if len(pieces[-1]) > 1 and self._left([*pieces[-1], number]) < 0:
                pieces.append([0])
            pieces[-1].append(number)
        return pieces

    def shared(self, piece: Sequence[int]) -> dict[int, int]:
        """Width of every column of a piece: what it needs, then what makes most of them whole.

        Of two columns that are too wide side by side, the words are folded anywhere, then the numbers.
        """
        left = self._left(piece)
        widths = {number: self.least[number] for number in piece}
        for number in sorted(piece, key=lambda one: self.whole[one] - self.least[one]):
            more = min(max(left, 0), self.whole[number] - self.least[number])
            widths[number] += more
            left -= more
        while left < 0 and max(widths.values()) > 1:
            widest = max(piece, key=lambda one: (self.words[one] and widths[one] > SPARED, widths[one]))
            widths[widest] -= 1
            left += 1
        return widths

    def _left(self, piece: Sequence[int]) -> int:
        return self.width - self.GAP * (len(piece) - 1) - sum(self.least[number] for number in piece)


def _longest_word(text: "Text") -> int:
    from rich.cells import cell_len

    return max(map(cell_len, text.plain.split()), default=0)


def _cell(value: object) -> "Text":
    from rich.text import Text

    if isinstance(value, Text):
        return value
    return styled("–" if value is None else f"{value:,}" if type(value) is int else str(value))


@contextlib.contextmanager
def progress_bar(title: str, *, quiet: bool) -> Iterator[Report | None]:
    """A bar with tokens per second and the time left on a terminal; None in a pipe or when quiet."""
    if quiet or not streams().err.isatty():
        yield None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = [
        TextColumn("{task.description}", style=ACCENT, markup=False),
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
    if quiet or not streams().err.isatty():
        yield None
        return
    with err().status(styled((ACCENT, title))) as spinner:
        yield lambda step: spinner.update(styled((ACCENT, f"{title}: {seen(step)}")))


def print_notes(notes: Iterable[str]) -> None:
    """Warnings, one line each, on standard error."""
    for note in notes:
        err().print(styled(("yellow", f"note: {line_of(note)}")), soft_wrap=True)
