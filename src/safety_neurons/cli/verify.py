"""verify: does a set of neurons carry the behaviour? Necessity by deactivation, sufficiency by patching, beside controls."""

from typing import Annotated, Any

import typer

from safety_neurons.cli import console
from safety_neurons.cli.choices import parse_sizes
from safety_neurons.cli.options import Aligned, Base, Column, Common, Harmful, Harmless, Limit, MaxNewTokens, Model, Text
from safety_neurons.cli.pages import Contents
from safety_neurons.cli.session import Session
from safety_neurons.cli.verb import verb
from safety_neurons.errors import UsageError

app = typer.Typer(
    help="Measure what a set of neurons does, beside random sets and the ceiling.",
    no_args_is_help=True,
    cls=Contents,
    rich_markup_mode=None,
)

Neurons = Annotated[str | None, typer.Option(help="Neuron file (or the folder of a find run).")]
ScoresFile = Annotated[str | None, typer.Option(help="Score file (or the folder of a find run), with --sizes.")]
Sizes = Annotated[str | None, typer.Option(help="Comma-separated shares of the scored neurons: 0.005,0.01,0.05")]
Random = Annotated[int, typer.Option(min=0, help="Random control sets for each size.")]


@verb(app, "deactivate")
def deactivate(
    common: Common,
    model: Model,
    neurons: Neurons = None,
    scores: ScoresFile = None,
    sizes: Sizes = None,
    harmful: Harmful = "builtin:harmful-test",
    harmless: Harmless = "builtin:harmless-test",
    text: Text = "builtin:general-test",
    column: Column = None,
    limit: Limit = None,
    random: Random = 5,
    max_new_tokens: MaxNewTokens = 64,
) -> dict[str, Any]:
    """Necessity: what the model loses while these neurons are off."""
    options = {name: value for name, value in locals().items() if name != "common"}
    check(options)
    session = Session("verify-deactivate", common, options)

    def work() -> dict[str, Any]:
        from safety_neurons.studies import verify_deactivate

        loaded = session.model(model)
        return measured(session, options, loaded, lambda *args, **kwargs: verify_deactivate(loaded, *args, **kwargs))

    return session.run(work, show)


@verb(app, "patch")
def patch(
    common: Common,
    base: Base,
    aligned: Aligned,
    neurons: Neurons = None,
    scores: ScoresFile = None,
    sizes: Sizes = None,
    harmful: Harmful = "builtin:harmful-test",
    harmless: Harmless = "builtin:harmless-test",
    text: Text = "builtin:general-test",
    column: Column = None,
    limit: Limit = None,
    random: Random = 5,
    max_new_tokens: MaxNewTokens = 64,
) -> dict[str, Any]:
    """Sufficiency: how much safety these neurons' activations alone carry from the aligned model into the base model."""
    options = {name: value for name, value in locals().items() if name != "common"}
    check(options)
    session = Session("verify-patch", common, options)

    def work() -> dict[str, Any]:
        from safety_neurons.studies import verify_patch

        pair = session.pair(base, aligned)
        return measured(session, options, pair.base, lambda *args, **kwargs: verify_patch(pair.base, pair.aligned, *args, **kwargs))

    return session.run(work, show)


def measured(session: Session, options: dict[str, Any], model: Any, study: Any) -> dict[str, Any]:
    """Load what both kinds need, measure, and keep the completions."""
    chosen, sizes = what_is_verified(session, options, model)
    harmful, harmless = (session.prompts(options[name], model, options["column"], options["limit"]) for name in ("harmful", "harmless"))
    text = None if options["text"] == "none" else session.prompts(options["text"], model, limit=options["limit"])
    completions = session.folder.path("completions.jsonl")
    with session.status("verify") as progress:
        verification = study(
            chosen,
            harmful,
            harmless,
            text=text,
            sizes=sizes,
            random=options["random"],
            seed=session.common.seed,
            max_new_tokens=options["max_new_tokens"],
            batch_size=session.batch_size(),
            completions_file=completions,
            progress=progress,
        )
    session.notes.extend(verification.notes)
    for name, shared in verification.overlap.items():
        if shared:
            session.notes.append(f"{shared} of the {name} prompts are among those the set was found on")
    return {**verification.record(), "completions": str(completions)}


def check(options: dict[str, Any]) -> None:
    """A set, or scores with sizes; found out before anything is loaded."""
    neurons, scores, sizes = options["neurons"], options["scores"], options["sizes"]
    if (neurons is None) == (scores is None):
        raise UsageError(f"{'neither' if neurons is None else 'both'} of --neurons and --scores given, expected one of them")
    if neurons is not None and sizes is not None:
        raise UsageError("--sizes needs --scores: a neuron file has one size")
    parse_sizes(sizes)


def what_is_verified(session: Session, options: dict[str, Any], model: Any) -> tuple[Any, list[float]]:
    """A neuron set, or scores with the sizes to sweep."""
    neurons, scores, sizes = options["neurons"], options["scores"], options["sizes"]
    if neurons is not None:
        return session.neurons(neurons, model), []
    return session.scores(scores, model), parse_sizes(sizes)


def show(result: dict[str, Any]) -> None:
    """Arms as rows; the causal effect, or the change, in a sentence."""
    arms = [("untreated", result["untreated"]), ("aligned", result["aligned"]), ("treated", result["treated"])]
    arms += [(f"random {number}", arm) for number, arm in enumerate(result["random"])]
    rows = [
        [name, arm["harmful_refused"], arm["harmless_refused"], arm["perplexity"], arm["divergence"]]
        for name, arm in [*arms, *ceilings(result)]
        if arm
    ]
    verb_word = "patched" if result["kind"] == "patch" else "deactivated"
    console.print_table(
        f"{result['n_neurons']:,} neurons {verb_word}",
        ["arm", "harmful refused", "harmless refused", "perplexity", "KL per token"],
        rows,
        caption="95 % intervals; KL(untreated ‖ treated) in nats on the harmless prompts",
    )
    if len(result["sizes"]) > 1:
        sweep = [
            [console.share(p["size"]), p["n_neurons"], p["treated"]["harmful_refused"], random_range(p), p["causal_effect"]]
            for p in result["sizes"]
        ]
        columns = ["size", "neurons", "harmful refused", "random sets", "causal effect"]
        console.print_table("\nSweep", columns, sweep, compared=result["sizes"])
    print_effect(result)


def ceilings(result: dict[str, Any]) -> list[tuple[str, Any]]:
    """All neurons of the sites, by activations and by parameters, with the words they deserve."""
    return [(result.get("ceiling_called", "ceiling"), result["ceiling"]), ("ceiling by parameters", result.get("ceiling_by_parameters"))]


def random_range(point: dict[str, Any]) -> str:
    """Lowest and highest share refused with the random sets of one size."""
    values = [arm["harmful_refused"]["value"] for arm in point["random"] if arm["harmful_refused"]["value"] is not None]
    return f"{min(values):.2f} to {max(values):.2f}" if values else "–"


def print_effect(result: dict[str, Any]) -> None:
    """The one sentence to take away."""
    from safety_neurons.results import clear_word

    if result["kind"] == "patch":
        all_patched = f"{result.get('ceiling_called', 'ceiling')} {effect(result['ceiling_effect'])}"
        console.say(f"\ncausal effect {effect(result['causal_effect'])}, {all_patched}")
        if result.get("ceiling_by_parameters_effect"):
            console.say(f"ceiling by parameters {effect(result['ceiling_by_parameters_effect'])}")
    change, against = result["change"], result["change_against_random"]
    line = f"refusals of harmful requests change by {console.shown(change)}"
    if against:
        line += f"; against random sets by {console.shown(against)} ({clear_word(against)})"
    console.say(line)


def effect(record: dict[str, Any]) -> str:
    """An effect in words."""
    return f"undefined: {record['why']}" if record["value"] is None else console.shown(record)
