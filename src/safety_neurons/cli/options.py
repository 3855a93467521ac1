"""Options shared by several verbs. Each is declared once; its text is the `--help` text."""

import dataclasses
import pathlib
from typing import Annotated

import typer

RUNNING, MODEL = "Running", "Model and template"


@dataclasses.dataclass(frozen=True)
class Common:
    """What every verb accepts."""

    out: Annotated[pathlib.Path | None, typer.Option(help="Folder of this run. [default: runs/VERB-TIME]", rich_help_panel=RUNNING)] = None
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else.", rich_help_panel=RUNNING)] = False
    seed: Annotated[int, typer.Option(help="Seed of everything that is random.", rich_help_panel=RUNNING)] = 0
    batch_size: Annotated[str, typer.Option(help="Prompts per forward pass: auto or a number.", rich_help_panel=RUNNING)] = "auto"
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Start a finished run again.", rich_help_panel=RUNNING)] = False
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.", rich_help_panel=RUNNING)] = False
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, mps … [default: the fastest present]", rich_help_panel=MODEL)] = (
        None
    )
    dtype: Annotated[str, typer.Option(help="auto, float32, float64, bfloat16 or float16.", rich_help_panel=MODEL)] = "auto"
    offline: Annotated[bool, typer.Option("--offline", help="Never open a socket.", rich_help_panel=MODEL)] = False
    template: Annotated[str, typer.Option(help="auto, none, tulu or a Jinja file.", rich_help_panel=MODEL)] = "auto"
    system: Annotated[str | None, typer.Option(help="System prompt put before every prompt.", rich_help_panel=MODEL)] = None
    template_args: Annotated[str | None, typer.Option(help="JSON object for the chat template.", rich_help_panel=MODEL)] = None
    think_end: Annotated[
        str | None, typer.Option(help="Text that ends the model's thinking; what follows is judged.", rich_help_panel=MODEL)
    ] = None
    merge_adapters: Annotated[bool, typer.Option("--merge-adapters", help="Merge adapters into the weights.", rich_help_panel=MODEL)] = (
        False
    )
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that comes with the model.", rich_help_panel=MODEL)
    ] = False


HOW_A_RUN_IS_SHOWN = ("out", "json", "overwrite", "debug", "device", "offline")
"""Options that cannot change a result: two runs that differ only in these are the same run."""

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
