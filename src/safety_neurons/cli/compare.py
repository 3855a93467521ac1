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
    """One row a method."""
    known = any(row["recall"] is not None for row in result["methods"])
    wide = console.out().width >= 110
    cell = (lambda rate: rate) if wide else (lambda rate: rate["value"])
    rows = [
        [
            row["method"],
            row["n_neurons"],
            *([row["recall"]] if known else []),
            row["causal_effect"],
            cell(row["harmful_refused"]),
            cell(row["harmless_refused"]),
            *([row["seconds"]] if wide or not known else []),
        ]
        for row in result["methods"]
    ]
    names = ["harmful refused", "harmless refused"] if wide else ["harmful", "harmless"]
    console.print_table(
        f"{result['budget']:,} of {result['n_units']:,} units at {', '.join(result['sites'])}",
        ["method", "neurons", *(["recall"] if known else []), "causal effect", *names, *(["seconds"] if wide or not known else [])],
        rows,
        caption="units count once; [95 % interval]; harmful and harmless: share of the requests refused",
    )
    console.out().print(f"\nceiling {effect(result['ceiling_effect'])}", soft_wrap=True)
