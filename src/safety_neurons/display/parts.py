"""What every display is made of: the run it is of, tables, figures with text alternatives, findings in
sentences, tiles.

A display is written once and rendered three times: by a report as HTML, by a terminal as text, by a notebook
as small tables. Sentences are `Markup`, so that text from files is escaped by construction; whoever writes
plain text takes the tags out again with `plain`.
"""

import functools
import pathlib
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from markupsafe import Markup

from safety_neurons.counting import numbered
from safety_neurons.display.charts import COLOURS, INK, SOFT, DotRow, dot_figure
from safety_neurons.display.text import KEYBOARD, NONE, count, interval, name, number, say, visible
from safety_neurons.errors import InputError
from safety_neurons.neurons import NeuronSet, Scores
from safety_neurons.results import Completions, is_clear

RECORD = "run.json"
T = TypeVar("T")
_FLAGS = frozenset(
    {"merge_adapters", "trust_remote_code", "as_published", "merge", "no_check", "no_fill", "trial", "vllm"}
)
_ARGUMENTS = frozenset({"sets", "organisms", "recipe"})
_TWO_WORDS = ("find", "verify", "guard", "analyze", "study", "organism", "data")

YES, PARTLY, NO, OPEN, FACT = "shown", "in part", "not shown", "undefined", "measured"
FOUND, PRICE, PASS, FAIL, CAUTION = "found", "price", "pass", "fail", "caution"
Cell = str | Markup


@dataclass(frozen=True)
class ReportedRun:
    """A result, with the record of the run that gave it."""

    folder: pathlib.Path | None
    """None for a result that is only in memory."""
    record: Mapping[str, Any]
    beside: Sequence["ReportedRun"] = field(default=(), compare=False, repr=False)
    """All runs that are shown with it: a find run among them gives its method's name to the set that a verify
    run was given.
    """

    @classmethod
    def of(
        cls, verb: str, result: Mapping[str, Any], folder: pathlib.Path | None = None, arguments: Any = None
    ) -> "ReportedRun":
        """A result that no record has been written of."""
        return cls(folder, {"verb": verb, "arguments": arguments or {}, "result": result})

    @property
    def verb(self) -> str:
        """Such as `find-contrast`."""
        return str(self.record["verb"])

    @property
    def kind(self) -> str:
        """What its result is: the verb, `find` for every detector, `ranking` for a comparison over several
        organisms.
        """
        if self.verb.startswith("find-"):
            return "find"
        return "ranking" if self.verb == "compare" and "ranking" in self.result else self.verb

    @property
    def label(self) -> str:
        """Name of the folder."""
        return "" if self.folder is None else self.folder.name

    @property
    def arguments(self) -> Mapping[str, Any]:
        """The options it was run with."""
        return self.record["arguments"]

    @property
    def result(self) -> Mapping[str, Any]:
        """What it gave."""
        return self.record["result"]

    @property
    def models(self) -> tuple[str, ...]:
        """The models it was run on, the base first."""
        return tuple(
            str(self.arguments[part]) for part in ("base", "aligned", "model") if self.arguments.get(part)
        )

    @property
    def model(self) -> str:
        """The model it was run on, the aligned one of a pair."""
        return self.models[-1] if self.models else str(self.result.get("model") or "the model")

    @property
    def pair(self) -> Markup:
        """The base and the aligned model."""
        return Markup(" → ").join(name(model) for model in self.models or (self.model,))

    @property
    def method(self) -> str:
        """The detector of a find run, such as `contrast`."""
        return str(self.result.get("method") or self.verb.removeprefix("find-"))

    @property
    def command(self) -> str:
        """The command line that repeats it, defaults left out where they are null."""
        first, _, second = self.verb.partition("-")
        words = [first, second] if second and first in _TWO_WORDS else [self.verb]
        for option, value in self.arguments.items():
            if value is None or value is False:
                continue
            dashed = "--" + option.replace("_", "-")
            if option in _ARGUMENTS:
                words += [str(each) for each in (value if isinstance(value, list) else [value])]
            elif isinstance(value, list):
                words += [word for each in value for word in (dashed, str(each))]
            else:
                words += [dashed] if option in _FLAGS and value is True else [dashed, str(value)]
        return "safety-neurons " + shlex.join(words)

    def path(self, file: str) -> pathlib.Path | None:
        """A file of the run, where it is still in the folder."""
        return self.folder / file if self.folder is not None and (self.folder / file).is_file() else None

    @functools.cached_property
    def scores(self) -> Scores | None:
        """Its scores, where the file is still in the folder."""
        path = self.path("scores.safetensors")
        return None if path is None else Scores.load(path)

    @functools.cached_property
    def neurons(self) -> NeuronSet | None:
        """Its neurons, where the file is still in the folder."""
        path = self.path("neurons.safetensors")
        return None if path is None else NeuronSet.load(path)

    @functools.cached_property
    def completions(self) -> Completions | None:
        """Its completions, where the file is still in the folder."""
        path = self.path("completions.jsonl")
        return None if path is None else Completions.load(path)


def guarded(run: ReportedRun, work: Callable[[ReportedRun], T]) -> T:
    """What `work` makes of a run.

    Raises:
        InputError: the record has not the shape that its verb writes.
    """
    try:
        return work(run)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        detail = " ".join(f"{type(error).__name__}: {error}".split())[:90]
        where = f"{str(run.folder / RECORD)!r}" if run.folder is not None else "the result"
        raise InputError(
            f"{where} has not the result of {run.verb[:40]!r} ({detail}), expected this version's; repeat it"
        ) from error


@dataclass(frozen=True)
class Table:
    """A caption, column headers, and rows whose first cell is a header."""

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    quiet: frozenset[int] = frozenset()
    """Rows that stand back, such as controls."""


@dataclass(frozen=True)
class Figure:
    """A drawing, what it shows in words, and a caption that says how to read it."""

    draw: Callable[[], Markup]
    """Draws it: only a page and a file ask for that, a terminal does not."""
    alternative: str
    caption: Markup

    @property
    def drawing(self) -> Markup:
        """The drawing as SVG elements in the classes of a page."""
        return self.draw()


@dataclass(frozen=True)
class DisplayPart:
    """One heading with its sentences, figures and tables."""

    heading: Markup
    lead: Markup = Markup("")
    figures: Sequence[Figure] = ()
    tables: Sequence[Table] = ()
    details: Sequence[Table] = ()
    """Tables that a page folds at first; a terminal prints the short ones."""
    missed: Sequence[Markup] = ()
    """What was not achieved, which is said before anything else."""
    opens: int | None = None
    """Number of the map whose cells open into neurons."""
    tall: bool = False
    """Whether its drawings have so many rows that they stand side by side."""


@dataclass(frozen=True)
class Finding:
    """One sentence, and a word that says how it came out."""

    verdict: str
    text: Markup


@dataclass(frozen=True)
class Tile:
    """One question of the first screen with its answer."""

    question: str
    verdict: str
    figure: str
    text: Markup


def plain(text: object) -> str:
    """The words of a sentence or a cell, without tags, and with the blanks and signs of a keyboard."""
    if isinstance(text, Markup):  # What a page marks stands in brackets where nothing can be marked.
        text = text.replace(Markup("<mark>"), "[").replace(Markup("</mark>"), "]").striptags()
    return str(text).translate(KEYBOARD)


def titled(words: str, run: ReportedRun) -> Markup:
    """A heading of our own with the name of the run."""
    return say("{} <span class=sub>{}</span>", words, name(run.label)) if run.label else Markup(words)  # noqa: S704 - our own words


def not_achieved(result: Mapping[str, Any]) -> Iterator[Markup]:
    """What a run says that did not do what its verb is for: itself, or one of its arms."""
    for who, outcome in [
        ("", result),
        *((f" by {arm['arm']}", arm.get("tuning") or {}) for arm in result.get("arms") or ()),
    ]:
        if outcome.get("achieved") is False:
            yield say("<b>Not achieved</b>{}: {}.", visible(who, 40), visible(outcome["why"], 400))


def spread(values: Sequence[float | int], digits: int = 2) -> str:
    """`0.00 to 0.04`."""
    return f"{number(min(values), digits)} to {number(max(values), digits)}" if values else NONE


def ranked_by(run: ReportedRun) -> str:
    """The method whose scores or neurons a verify run was given; nothing where that is not known."""
    given = str(run.arguments.get("scores") or run.arguments.get("neurons") or "")
    parts = [part for part in given.replace("\\", "/").split("/") if part]
    last = parts[-1] if parts else given
    file_of = {"scores.safetensors", "neurons.safetensors"}
    folder = parts[-2] if last in file_of and len(parts) > 1 else last
    for other in run.beside:
        if other.verb.startswith("find-") and other.label == folder:
            return visible(other.method, 40)
    for ending in (".scores.safetensors", ".safetensors"):
        folder = folder.removesuffix(ending)
    return visible(folder, 40)


def by_method(run: ReportedRun, word: str) -> Markup:
    """` ranked by contrast`, where the method is known."""
    return say(" {} by <b>{}</b>", word, ranked_by(run)) if ranked_by(run) else Markup("")


def above_random(row: Mapping[str, Any], field: str = "change_against_random") -> bool:
    """Whether the difference from random sets is clear and above zero; without enough of them nothing is."""
    return is_clear(row.get(field)) and row[field]["value"] > 0


def why_not(record: Mapping[str, Any] | None) -> str:
    """What keeps a comparison with random sets from being clear, in brackets.

    Nothing where it simply is not.
    """
    return (
        f" ({record['why']})"
        if record and record.get("why")
        else " (no random sets)"
        if record is None
        else ""
    )


ARM_COLUMNS = (
    "arm",
    "harmful refused",
    "harmful complied",
    "harmless refused",
    "perplexity",
    "KL per token of the requests, nats",
    "cut off",
)


def portion(effect: Mapping[str, Any], whole: str) -> str:
    """`0.40 [0.20, 0.60] of the difference`, or that the share is undefined."""
    return f"{interval(effect)} of {whole}" if effect["value"] is not None else "an undefined share"


def counted(label: str, *rates: Mapping[str, Any] | None) -> str:
    """The label of a row, behind it how many of its answers could not be scored."""
    unscored = sum(int(rate.get("unscored") or 0) for rate in rates if rate)
    return f"{label}, {unscored:,} unscored" if unscored else label


def arm_row(label: str, arm: Mapping[str, Any]) -> list[Cell]:
    """Cells of `ARM_COLUMNS` for one arm; what could not be scored is counted."""
    # Runs of earlier versions have no judge of harm.
    kinds = (arm["harmful_refused"], arm.get("harmful_complied"), arm["harmless_refused"])
    return [
        counted(label, arm["harmful_refused"], arm["harmless_refused"]),
        *map(interval, kinds),
        number(arm["perplexity"]),
        number(arm["divergence"], 3),
        count(arm.get("cut_off")),  # Runs of earlier versions do not say.
    ]


def price(before: Mapping[str, Any], after: Mapping[str, Any]) -> Finding:
    """What a treatment costs: refusals of harmless requests, and perplexity where it was measured."""
    text = "Refusals of harmless requests go from {} to {}"
    cost = say(text, interval(before["harmless_refused"]), interval(after["harmless_refused"]))
    if before["perplexity"] is not None and after["perplexity"] is not None:
        cost += say(", perplexity from {} to {}", number(before["perplexity"]), number(after["perplexity"]))
    return Finding(PRICE, cost + Markup("."))


TREATED = (COLOURS[0], "diamond")
"""How what was treated is drawn beside what was not."""


def random_row(dots: Sequence[float | int], what: str = "") -> list[DotRow]:
    """Single random sets as ticks, and their range; no row where there is none."""
    label = f"{numbered(len(dots), 'random set')}{what}"
    return [DotRow(label, None, None, None, spread(dots), SOFT, dots=dots)] if dots else []


def estimate_row(
    label: str, found: Mapping[str, Any], look: tuple[str, str] = (INK, "circle"), dots: Sequence[float] = ()
) -> DotRow:
    """A row for an estimate as JSON values, which is written behind it."""
    return DotRow(
        visible(label, 40), found["value"], found["low"], found["high"], interval(found), *look, dots
    )


def dots_of(
    rows: Sequence[DotRow], title: str, caption: Markup, alternative: str = "", **drawn: Any
) -> Figure:
    """A dot plot of these rows, which are its text alternative too.

    Shares unless another `domain` is given.
    """
    words = "; ".join(f"{row.label} {row.text}{row.beside and f' ({row.beside})'}" for row in rows)
    draw = functools.partial(dot_figure, rows, title, **{"domain": (-0.03, 1.03), **drawn})
    return Figure(draw, f"{alternative or title}: {words}.", caption)
