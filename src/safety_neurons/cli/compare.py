"""compare: detectors side by side at equal budget, against random sets and, where known, the truth."""

from typing import Annotated, Any

import typer

from safety_neurons.cli import console
from safety_neurons.cli.choices import parse_sizes
from safety_neurons.cli.options import Column, Common, Harmful, Harmless, Limit, MaxNewTokens, PromptSource, Sites, listed
from safety_neurons.cli.session import Session
from safety_neurons.cli.verb import verb
from safety_neurons.cli.verify import effect
from safety_neurons.errors import UsageError

OneBase = Annotated[str | None, typer.Option(help="The less safe model: ID[@REVISION][+ADAPTER…] or organism:NAME/base.")]
OneAligned = Annotated[str | None, typer.Option(help="The safer model of the same architecture.")]


def register(app: typer.Typer) -> None:
    """Add the verb to the command line."""
    verb(app, "compare")(compare)


def compare(
    common: Common,
    base: OneBase = None,
    aligned: OneAligned = None,
    organism: Annotated[list[str] | None, typer.Option(help="Instead of models: an organism, by name or folder; several rank methods.")] = (
        None
    ),
    prompts: PromptSource = "builtin:harmful",
    find_harmless: Annotated[str, typer.Option(help="Harmless prompts some methods look at: a file or builtin:NAME[/LANG].")] = (
        "builtin:harmless"
    ),
    harmful: Harmful = "builtin:harmful-test",
    harmless: Harmless = "builtin:harmless-test",
    column: Column = None,
    limit: Limit = None,
    truth: Annotated[str | None, typer.Option(help="Neuron file of the planted truth; the budget is then its number of units.")] = None,
    sites: Sites = None,
    top: Annotated[str, typer.Option(help="Budget as a share of the units, without --truth; with --organism several: 0.01,0.02.")] = "0.05",
    methods: Annotated[str | None, typer.Option(help="Comma-separated methods. [default: all]")] = None,
    random: Annotated[int, typer.Option(min=0, help="Random sets.")] = 5,
    find: Annotated[int, typer.Option(min=1, help="With --organism: prompts that methods look at, of each kind.")] = 100,
    max_new_tokens: MaxNewTokens = 64,
) -> dict[str, Any]:
    """Detectors side by side at equal budget, against random sets; on one pair of models, or over several organisms."""
    options = {name: value for name, value in locals().items() if name != "common"}
    shares = parse_sizes(top, "--top")
    options["top"] = shares[0] if len(shares) == 1 else top
    if organism:
        if base or aligned or truth or sites:
            raise UsageError("--organism brings its own models, truth and sites; leave --base, --aligned, --truth and --sites out")
        return _ranking(Session("compare", common, options), shares)
    if base is None or aligned is None or len(shares) != 1:
        raise UsageError("expected --base and --aligned with one --top, or --organism")
    session = Session("compare", common, options)

    def work() -> dict[str, Any]:
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
                find_harmless=session.prompts(find_harmless, pair.base, column, limit),
                truth=session.neurons(truth, pair.base) if truth else None,
                sites=listed(sites),
                top=shares[0],
                methods=listed(methods),
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


def _ranking(session: Session, shares: list[float]) -> dict[str, Any]:
    """All methods over several organisms, with a figure beside the table."""
    options = session.options

    def work() -> dict[str, Any]:
        from safety_neurons.report.ranking import ranking_figure
        from safety_neurons.results import write_bytes
        from safety_neurons.studies import rank

        with session.status("compare") as progress:
            ranking = rank(
                options["organism"],
                tops=shares,
                methods=listed(options["methods"]),
                random=options["random"],
                find=options["find"],
                measured=options["limit"] or 200,
                max_new_tokens=options["max_new_tokens"],
                seed=session.common.seed,
                batch_size=session.batch_size(),
                place=session.folder.path,
                progress=progress,
            )
        session.notes.extend(dict.fromkeys(note for entry in ranking.entries for note in entry.comparison.bench.notes))
        record = ranking.record()
        figure = session.folder.path("ranking.svg").absolute()
        write_bytes(figure, ranking_figure(record).encode())
        return {**record, "figure": str(figure), "methods": record["organisms"][0]["methods"]}

    return session.run(work, show_ranking)


def show_ranking(result: dict[str, Any]) -> None:
    """One table a group of organisms: mean over organisms and the worst of them."""
    for group in dict.fromkeys(row["group"] for row in result["ranking"]):
        here = [row for row in result["ranking"] if row["group"] == group]
        measures = list(dict.fromkeys(row["measure"] for row in here))
        cells = {(row["method"], row["measure"]): row for row in here}
        methods = list(dict.fromkeys(row["method"] for row in here))
        console.print_table(
            f"{group}: {len(here[0]['by_organism'])} organisms",
            ["method", *(measure.replace("_", " ") for measure in measures)],
            [[method, *(_mean(cells[method, measure]) for measure in measures)] for method in methods],
            caption="mean over organisms, in brackets the worst of them",
        )
    console.say(("dim", "\nfigure "), result["figure"])


def _mean(row: dict[str, Any]) -> str:
    if row["mean"] is None:
        return "–"
    return f"{row['mean']:.1f}" if row["measure"] == "seconds" else f"{row['mean']:.2f} ({row['worst']:.2f})"


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
        compared=result["methods"],
    )
    console.say(f"\n{result.get('ceiling_called', 'ceiling')} {effect(result['ceiling_effect'])}")
    console.say(f"ceiling by parameters {effect(result['ceiling_by_parameters_effect'])}")
    if result["ceiling_why"]:
        console.say(result["ceiling_why"])
