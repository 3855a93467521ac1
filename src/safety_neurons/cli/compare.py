"""compare: detectors side by side at equal budget, against random sets and, where known, the truth."""

from typing import Annotated, Any

import typer

from safety_neurons.cli import console
from safety_neurons.cli.options import Aligned, Base, Column, Common, Harmful, Harmless, Limit, MaxNewTokens, PromptSource, Sites, listed
from safety_neurons.cli.session import Session
from safety_neurons.cli.verb import verb
from safety_neurons.cli.verify import effect


def register(app: typer.Typer) -> None:
    """Add the verb to the command line."""
    verb(app, "compare")(compare)


def compare(
    common: Common,
    base: Base,
    aligned: Aligned,
    prompts: PromptSource = "builtin:harmful",
    harmful: Harmful = "builtin:harmful-test",
    harmless: Harmless = "builtin:harmless-test",
    column: Column = None,
    limit: Limit = None,
    truth: Annotated[str | None, typer.Option(help="Neuron file of the planted truth; the budget is then its number of units.")] = None,
    sites: Sites = None,
    top: Annotated[float, typer.Option(help="Budget as a share of the units, without --truth.")] = 0.05,
    methods: Annotated[str | None, typer.Option(help="Comma-separated methods. [default: all]")] = None,
    random: Annotated[int, typer.Option(min=0, help="Random sets.")] = 3,
    max_new_tokens: MaxNewTokens = 64,
) -> dict[str, Any]:
    """Detectors side by side at equal budget, against random sets."""
    options = {name: value for name, value in locals().items() if name != "common"}
    session = Session("compare", common, options)

    def work() -> dict[str, Any]:
        from safety_neurons.studies import METHODS
        from safety_neurons.studies import compare as run

        pair = session.pair(base, aligned)
        completions = session.folder.path("completions.jsonl")
        with session.status("compare") as progress:
            comparison = run(
                pair.base,
                pair.aligned,
                session.prompts(harmful, pair.base, column, limit),
                session.prompts(harmless, pair.base, column, limit),
                find_prompts=session.prompts(prompts, pair.base, column, limit),
                truth=session.neurons(truth, pair.base) if truth else None,
                sites=listed(sites),
                top=top,
                methods=listed(methods) or tuple(METHODS),
                random=random,
                seed=common.seed,
                max_new_tokens=max_new_tokens,
                batch_size=session.batch_size(),
                completions_file=completions,
                place=session.folder.path,
                progress=progress,
            )
        session.notes.extend(comparison.bench.notes)
        return {**comparison.record(), "completions": str(completions)}

    return session.run(work, show)


def show(result: dict[str, Any]) -> None:
    """One row a method: recall where the truth is known, what the set restores when patched, what is lost while it is off."""
    known = any(row["recall"] is not None for row in result["methods"])
    wide = console.out().width >= 110
    columns = {
        "method": lambda row: row["method"],
        "neurons": lambda row: row["n_neurons"],
        **({"recall": lambda row: row["recall"]} if known else {}),
        "causal effect": lambda row: row["causal_effect"],
        "lost when off": lambda row: row["necessity"],
        **({"harmful refused": lambda row: row["harmful_refused"]} if wide else {}),
        "harmless": lambda row: row["harmless_refused"] if wide else row["harmless_refused"]["value"],
        **({"seconds": lambda row: row["seconds"]} if wide else {}),
    }
    console.print_table(
        f"{result['budget']:,} of {result['n_units']:,} units at {', '.join(result['sites'])}",
        list(columns),
        [[cell(row) for cell in columns.values()] for row in result["methods"]],
        caption="a unit counts once; causal effect: patched into the base; lost when off: share of harmful requests the aligned model\n"
        "no longer refuses; harmless: share of harmless requests refused under patching; [95 % interval]",
    )
    console.out().print(f"\nceiling {effect(result['ceiling_effect'])}", soft_wrap=True)
