"""Options shared by several verbs. Each is declared once; its text is the `--help` text."""

import dataclasses
import pathlib
from typing import Annotated, Any, ClassVar, Literal

from safety_neurons import strict_json
from safety_neurons.declarations import Count, Declaration, Incidental, OneOf, Panel, Positive, Reads
from safety_neurons.detectors.methods import listed
from safety_neurons.errors import UsageError

TEMPLATES = ("auto", "none", "tulu")
NOT_A_FILE = ("builtin:", "organism:")


@dataclasses.dataclass(frozen=True)
class RunOptions(Declaration):
    """Where a run is kept and how it is shown."""

    PANEL: ClassVar[str | None] = "Running"

    out: Annotated[pathlib.Path | None, Incidental] = None
    """Folder of this run. [default: runs/VERB-TIME]"""
    json: Annotated[bool, Incidental] = False
    """Print one JSON object on stdout and nothing else."""
    seed: int = 0
    """Seed of everything that is random."""
    batch_size: str = "auto"
    """Prompts per forward pass: auto or a number."""
    overwrite: Annotated[bool, Incidental] = False
    """Start a finished run again."""
    debug: Annotated[bool, Incidental] = False
    """Show the traceback of an error."""


@dataclasses.dataclass(frozen=True)
class Common(RunOptions):
    """What every verb accepts."""

    PANEL: ClassVar[str | None] = "Model and template"

    device: Annotated[str | None, Incidental] = None
    """cpu, cuda, cuda:1, mps … [default: the fastest present]"""
    dtype: Annotated[str, OneOf("auto", "float32", "float64", "bfloat16", "float16")] = "auto"
    """auto, float32, float64, bfloat16 or float16."""
    offline: Annotated[bool, Incidental] = False
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


ModelName = Annotated[str, Reads("model")]
PromptFile = Annotated[str, Reads("prompts", column=True)]
OtherText = Annotated[str, Reads("prompts", words=("none",))]
"""Prompts that `--column` does not name a column of; `none` for none."""
NeuronFile = Annotated[str, Reads("neurons")]
ScoreFile = Annotated[str, Reads("scores")]


@dataclasses.dataclass(frozen=True, kw_only=True)
class OneModel(Declaration):
    """The model."""

    PANEL: ClassVar[str | None] = "Models"

    model: ModelName
    """ID[@REVISION][+ADAPTER…], a folder, or organism:NAME."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TwoModels(Declaration):
    """A base and an aligned model."""

    PANEL: ClassVar[str | None] = "Models"

    base: ModelName
    """The less safe model: ID[@REVISION][+ADAPTER…] or organism:NAME/base."""
    aligned: ModelName
    """The safer model of the same architecture."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Some(Declaration):
    """How prompts are taken from a file."""

    PANEL: ClassVar[str | None] = "Prompts"

    column: str | None = None
    """Column that holds the prompts."""
    limit: Positive | None = None
    """Use the first N prompts."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Requested(Declaration):
    """Requests that a model is measured on."""

    PANEL: ClassVar[str | None] = "Prompts"

    harmful: PromptFile = "builtin:harmful-test"
    """Harmful requests: a file or builtin:NAME[/LANG]."""
    harmless: PromptFile = "builtin:harmless-test"
    """Harmless requests: a file or builtin:NAME[/LANG]."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationPrompts(Requested):
    """What a model is measured on."""

    PANEL: ClassVar[str | None] = "Prompts"

    text: OtherText = "builtin:general-test"
    """General text for perplexity: a file or builtin:NAME[/LANG]."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Repeats(Declaration):
    """How often and how long."""

    random: Count = 5
    """Random control sets for each size."""
    max_new_tokens: Annotated[Positive, Panel("Prompts")] = 64
    """Length of a completion, in tokens."""


def parse_sizes(text: str | None, option: str = "--sizes") -> list[float]:
    """`--sizes`, or another option, as sorted, distinct shares."""
    try:
        shares = sorted({float(part) for part in ("0.005,0.01,0.02,0.05,0.1,0.2" if text is None else text).split(",")})
    except ValueError:
        raise UsageError(f"{option} {text!r}: expected comma-separated shares such as 0.01,0.05") from None
    if not all(0 < share <= 1 for share in shares):
        raise UsageError(f"{option} {text!r}: expected shares above 0 and at most 1")
    return shares


def named(text: str | None) -> list[tuple[str, str]]:
    """(name, file) of every part of a comma-separated list of FILE, NAME=FILE and builtin:NAME."""
    parts = []
    for part in listed(text) or ():
        name, sign, path = part.partition("=")
        if not sign or pathlib.Path(part).exists():
            name, path = (part if part.startswith(NOT_A_FILE) else pathlib.Path(part).name.partition(".")[0]), part
        parts.append((name, path))
    return parts


def batch_size(text: str) -> int | Literal["auto"]:
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
