"""Options shared by several verbs. Each is declared once; its text is the `--help` text."""

import dataclasses
import pathlib
from typing import Annotated, Any

import typer

from safety_neurons import strict_json
from safety_neurons.declarations import Declaration, OneOf, Positive, Reads
from safety_neurons.errors import UsageError

RUNNING = "Running"
TEMPLATES = ("auto", "none", "tulu")


@dataclasses.dataclass(frozen=True)
class Run(Declaration):
    """Where a run is kept and how it is shown."""

    PANEL = "Running"

    out: pathlib.Path | None = None
    """Folder of this run. [default: runs/VERB-TIME]"""
    json: bool = False
    """Print one JSON object on stdout and nothing else."""
    seed: int = 0
    """Seed of everything that is random."""
    batch_size: str = "auto"
    """Prompts per forward pass: auto or a number."""
    overwrite: bool = False
    """Start a finished run again."""
    debug: bool = False
    """Show the traceback of an error."""


@dataclasses.dataclass(frozen=True)
class Common(Run):
    """What every verb accepts."""

    PANEL = "Model and template"

    device: str | None = None
    """cpu, cuda, cuda:1, mps … [default: the fastest present]"""
    dtype: Annotated[str, OneOf("auto", "float32", "float64", "bfloat16", "float16")] = "auto"
    """auto, float32, float64, bfloat16 or float16."""
    offline: bool = False
    """Never open a socket."""
    template: str = "auto"
    """auto, none, tulu or a Jinja file."""
    system: str | None = None
    """System prompt put before every prompt."""
    template_args: str | None = None
    """JSON object for the chat template."""
    think_end: str | None = None
    """Text that ends the model's thinking; what follows is judged."""
    merge_adapters: bool = False
    """Merge adapters into the weights."""
    trust_remote_code: bool = False
    """Run code that comes with the model."""

    def check(self) -> None:
        """Also seed, batch size, template and its arguments."""
        super().check()
        if self.seed < 0:
            raise UsageError(f"--seed {self.seed} is negative; expected 0 or more")
        batch_size(self.batch_size)
        parse_object("--template-args", self.template_args)
        if self.template not in TEMPLATES and not pathlib.Path(self.template).expanduser().is_file():
            raise UsageError(f"--template {self.template!r} is no file; expected {', '.join(TEMPLATES)} or the path of a Jinja template")


HOW_A_RUN_IS_SHOWN = ("out", "json", "overwrite", "debug", "device", "offline", "dry_run")
"""Options that cannot change a result: two runs that differ only in these are the same run."""


ModelName = Annotated[str, Reads("model")]
PromptFile = Annotated[str, Reads("prompts", column=True)]
OtherText = Annotated[str, Reads("prompts", words=("none",))]
"""Prompts that `--column` does not name a column of; `none` for none."""
NeuronFile = Annotated[str, Reads("neurons")]
ScoreFile = Annotated[str, Reads("scores")]


@dataclasses.dataclass(frozen=True, kw_only=True)
class OneModel(Declaration):
    """The model."""

    PANEL = "Models"

    model: ModelName
    """ID[@REVISION][+ADAPTER…], a folder, or organism:NAME."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TwoModels(Declaration):
    """A base and an aligned model."""

    PANEL = "Models"

    base: ModelName
    """The less safe model: ID[@REVISION][+ADAPTER…] or organism:NAME/base."""
    aligned: ModelName
    """The safer model of the same architecture."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Some(Declaration):
    """How prompts are taken from a file."""

    PANEL = "Prompts"

    column: str | None = None
    """Column that holds the prompts."""
    limit: Positive | None = None
    """Use the first N prompts."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measured(Declaration):
    """What a model is measured on."""

    PANEL = "Prompts"

    harmful: PromptFile = "builtin:harmful-test"
    """Harmful requests: a file or builtin:NAME[/LANG]."""
    harmless: PromptFile = "builtin:harmless-test"
    """Harmless requests: a file or builtin:NAME[/LANG]."""
    text: OtherText = "builtin:general-test"
    """General text for perplexity: a file or builtin:NAME[/LANG]."""


PROMPTS, SELECTION = "Prompts", "Which neurons are kept"
Model = Annotated[str, typer.Option(help="ID[@REVISION][+ADAPTER…], a folder, or organism:NAME.", rich_help_panel="Models")]
Base = Annotated[str, typer.Option(help="The less safe model: ID[@REVISION][+ADAPTER…] or organism:NAME/base.", rich_help_panel="Models")]
Aligned = Annotated[str, typer.Option(help="The safer model of the same architecture.", rich_help_panel="Models")]
PromptSource = Annotated[str, typer.Option(help="A file or builtin:NAME[/LANG].", rich_help_panel=PROMPTS)]
Harmful = Annotated[str, typer.Option(help="Harmful requests: a file or builtin:NAME[/LANG].", rich_help_panel=PROMPTS)]
Harmless = Annotated[str, typer.Option(help="Harmless requests: a file or builtin:NAME[/LANG].", rich_help_panel=PROMPTS)]
Text = Annotated[str, typer.Option(help="General text for perplexity: a file or builtin:NAME[/LANG].", rich_help_panel=PROMPTS)]
Column = Annotated[str | None, typer.Option(help="Column that holds the prompts.", rich_help_panel=PROMPTS)]
Limit = Annotated[int | None, typer.Option(min=1, help="Use the first N prompts.", rich_help_panel=PROMPTS)]
Top = Annotated[float | None, typer.Option(help="Keep this fraction of the neurons searched.", rich_help_panel=SELECTION)]
Count = Annotated[int | None, typer.Option(min=1, help="Keep this many neurons.", rich_help_panel=SELECTION)]
TopPerMatrix = Annotated[int | None, typer.Option(min=1, help="Keep this many of every matrix.", rich_help_panel=SELECTION)]
Threshold = Annotated[float | None, typer.Option(help="Keep scores of at least this.", rich_help_panel=SELECTION)]
Agreement = Annotated[
    float | None, typer.Option(help="Choose on every prompt and keep what this share of prompts chose.", rich_help_panel=SELECTION)
]
Subtract = Annotated[str | None, typer.Option(help="Neuron file, or foundation, to subtract afterwards.", rich_help_panel=SELECTION)]
Sites = Annotated[str | None, typer.Option(help="Comma-separated sites: q,k,v,o,gate,up,down.", rich_help_panel=SELECTION)]
Layers = Annotated[str | None, typer.Option(help="Layers A:B, B excluded.", rich_help_panel=SELECTION)]
Positions = Annotated[str, typer.Option(help="completion, completion-predicting, prompt or prompt-last.", rich_help_panel=PROMPTS)]
GenerateWith = Annotated[str, typer.Option(help="Which model writes the completions: base or aligned.", rich_help_panel=PROMPTS)]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="Length of a completion, in tokens.", rich_help_panel=PROMPTS)]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print memory, time and disk, then stop.", rich_help_panel=RUNNING)]


def listed(text: str | None) -> tuple[str, ...] | None:
    """A comma-separated option as a tuple; None stays None."""
    return None if text is None else tuple(part.strip() for part in text.split(",") if part.strip())


def batch_size(text: str) -> int | Annotated[str, OneOf("auto")]:
    """`auto`, or a positive number."""
    if text == "auto":
        return "auto"
    if not (text.isascii() and text.isdigit()) or int(text) < 1:
        raise UsageError(f"--batch-size {text}: expected auto or a number of at least 1")
    return int(text)


def parse_object(option: str, text: str | None) -> dict[str, Any] | None:
    """An option that holds a JSON object."""
    if text is None:
        return None
    try:
        value = strict_json.loads(text)
    except ValueError as error:
        raise UsageError(f"{option} {text[:200]!r} is not JSON ({str(error)[:100]}); expected an object such as {{}}") from None
    if not isinstance(value, dict):
        raise UsageError(f"{option} {text!r} is a {type(value).__name__}, expected a JSON object such as {{}}")
    return value
