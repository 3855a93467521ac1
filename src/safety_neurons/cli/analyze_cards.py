"""analyze vocabulary and progressive: single neurons one by one, and a set switched off bit by bit."""

import pathlib
from typing import Annotated, Any

import typer

from safety_neurons.cli import console
from safety_neurons.cli.analyze import app, figure
from safety_neurons.cli.analyze_groups import MEASURE, OptionalBase, models
from safety_neurons.cli.options import Column, Common, Harmful, Harmless, Limit, MaxNewTokens, Model, Text, listed
from safety_neurons.cli.session import Session, resolve
from safety_neurons.cli.verb import verb
from safety_neurons.errors import UsageError

Neurons = Annotated[str | None, typer.Option(help="Neuron file, or the folder of a find run (its scores give the order).")]
Scores = Annotated[str | None, typer.Option(help="Score file, where it is not beside the neurons.")]
SCORES_FILE = "scores.safetensors"


@verb(app, "vocabulary")
def vocabulary(
    common: Common,
    model: Model,
    base: OptionalBase = None,
    neurons: Neurons = None,
    scores: Scores = None,
    at: Annotated[str | None, typer.Option(help="KEY:INDEX,… instead of a file: layers.3.down:17")] = None,
    cards: Annotated[int, typer.Option(min=1, help="How many neurons of the file, largest scores first.")] = 8,
    harmful: Harmful = "builtin:harmful-test",
    harmless: Harmless = "builtin:harmless-test",
    column: Column = None,
    limit: Limit = 32,
    refusal: Annotated[str | None, typer.Option(help="Text of a refusal, without --base.", rich_help_panel=MEASURE)] = None,
    compliance: Annotated[str | None, typer.Option(help="Text of a compliance, without --base.", rich_help_panel=MEASURE)] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens shown at either end.", rich_help_panel=MEASURE)] = 10,
    random: Annotated[int, typer.Option(min=0, help="Random neurons of the same matrices.", rich_help_panel=MEASURE)] = 20,
) -> dict[str, Any]:
    """Neuron cards: what a neuron writes, where it is active, and what it alone does to the refusal's log-odds."""
    options = {name: value for name, value in locals().items() if name != "common"}
    if (neurons is None) == (at is None):
        raise UsageError(f"{'neither' if at is None else 'both'} of --neurons and --at given, expected one of them")
    named = [read_neuron(part) for part in listed(at) or ()]
    session = Session("analyze-vocabulary", common, options)

    def work() -> dict[str, Any]:
        from safety_neurons import studies

        less, loaded = models(session, base, model)
        ranks = scores_of(session, options, loaded)
        chosen = named
        if neurons:
            found, notes = studies.with_cards(loaded, session.neurons(neurons, loaded))
            chosen = studies.strongest(found, ranks, cards, common.seed)
            random_ones = [] if ranks is not None else ["no scores beside the neurons: the cards are of members drawn at random"]
            session.notes.extend([*notes, *random_ones])
        with session.status("analyze vocabulary") as tell:
            made = studies.vocabulary(
                loaded,
                chosen,
                session.prompts(harmful, loaded, column, limit),
                session.prompts(harmless, loaded, column, limit),
                base=less,
                scores=ranks,
                refusal=refusal,
                compliance=compliance,
                tokens=tokens,
                random=random,
                seed=common.seed,
                batch_size=session.batch_size(),
                progress=tell,
            )
        session.notes.extend(made.notes)
        result = made.record()
        return {**result, **figure(session, "cards_figure", result)}

    return session.run(work, show_cards)


@verb(app, "progressive")
def progressive(
    common: Common,
    model: Model,
    neurons: Neurons = None,
    scores: Scores = None,
    harmful: Harmful = "builtin:harmful-test",
    harmless: Harmless = "builtin:harmless-test",
    text: Text = "builtin:general-test",
    column: Column = None,
    limit: Limit = None,
    random: Annotated[int, typer.Option(min=0, help="Random orders and random sets.", rich_help_panel=MEASURE)] = 3,
    points: Annotated[int, typer.Option(min=1, help="Most steps of a curve.", rich_help_panel=MEASURE)] = 8,
    max_new_tokens: MaxNewTokens = 64,
) -> dict[str, Any]:
    """Switch a set off layer by layer and neuron by neuron: curves of safety and capability, with bands of random orders."""
    options = {name: value for name, value in locals().items() if name != "common"}
    if neurons is None:
        raise UsageError("--neurons is missing; expected a neuron file or the folder of a find run")
    session = Session("analyze-progressive", common, options)

    def work() -> dict[str, Any]:
        from safety_neurons import studies

        loaded = session.model(model)
        with session.status("analyze progressive") as tell:
            found = studies.progressive(
                loaded,
                session.neurons(neurons, loaded),
                session.prompts(harmful, loaded, column, limit),
                session.prompts(harmless, loaded, column, limit),
                scores=scores_of(session, options, loaded),
                text=None if text == "none" else session.prompts(text, loaded, limit=limit),
                random=random,
                points=points,
                seed=common.seed,
                max_new_tokens=max_new_tokens,
                batch_size=session.batch_size(),
                completions_file=session.folder.path("completions.jsonl"),
                progress=tell,
            )
        session.notes.extend(found.notes)
        result = found.record()
        return {**result, **figure(session, "progressive_figure", result)}

    return session.run(work, show_progressive)


def read_neuron(text: str) -> tuple[str, int]:
    """`layers.3.down:17` as a key and an index."""
    from safety_neurons.neurons import parse_key

    key, sign, index = text.rpartition(":")
    if not sign or not index.isascii() or not index.isdigit():
        raise UsageError(f"--at {text!r}: expected KEY:INDEX, such as layers.3.down:17")
    parse_key(key)
    return key, int(index)


def scores_of(session: Session, options: dict[str, Any], model: Any) -> Any:
    """The scores of `--scores`, or those beside the neurons; None where there are none."""
    if options["scores"] is not None:
        return session.scores(options["scores"], model)
    path = pathlib.Path(resolve(options["neurons"])) if options["neurons"] else pathlib.Path()
    folder = path if path.is_dir() else path.parent
    return session.scores(str(folder), model) if options["neurons"] and (folder / SCORES_FILE).is_file() else None


def show_cards(result: dict[str, Any]) -> None:
    """One row a neuron: what it writes and what it alone does."""
    from safety_neurons.analysis.study_figures import words

    kinds = list(result["log_odds"])
    rows = []
    for card in result["cards"]:
        writes = card["writes"]
        likelier, against = (words(writes[side][:4]) if writes["defined"] else "–" for side in ("top", "bottom"))
        effects = [with_star(card["effects"][kind], result["random"][kind]) for kind in kinds]
        rows.append([card["neuron"].removeprefix("layers."), likelier, against, *effects])
    columns = ["neuron", "makes likelier", "makes less likely", *kinds]
    caption = "change of the refusal's log-odds by this neuron alone; * clear, and the interval lies outside 95 % of random neurons"
    console.print_table("Neuron cards", columns, rows, caption, result["cards"])
    for kind in kinds:
        alone, odds = result["random"][kind], result["log_odds"][kind]
        spread = f"random neurons {alone['low']:+.3f} to {alone['high']:+.3f}" if alone["n"] else "no random neurons"
        together = odds["change_together"]["value"]
        console.say(f"{kind}: untreated {odds['untreated']:+.2f}, all cards together {together:+.2f}, {spread}")


def with_star(number: dict[str, Any], alone: dict[str, Any]) -> str:
    """A signed number, marked where it stands out among random neurons."""
    from safety_neurons.results import stands_out

    if number["value"] is None:
        return "undefined"
    if number["low"] is None:
        return f"{number['value']:+.3f}"
    return f"{number['value']:+.3f}{'*' if stands_out(number, alone) else ''}"


def show_progressive(result: dict[str, Any]) -> None:
    """Every curve as rows, the bands behind them."""
    untreated = result["untreated"]
    rows = [["untreated", "", 0, *measured(untreated)]]
    for curve in result["curves"]:
        for place, point in enumerate(curve["points"]):
            rows.append([curve["order"] if place == 0 else "", point["step"], point["n_neurons"], *measured(point)])
    columns = ["order", "off last", "off", "harmful refused", "harmless", "perplexity", "KL"]
    caption = "off: neurons switched off so far; harmless: harmless requests refused; KL: per token on harmless requests, in nats"
    console.print_table(f"{result['n_neurons']:,} neurons switched off bit by bit", columns, rows, caption, result["curves"])
    for kind, band in result["random"].items():
        line = ", ".join(
            f"{from_to(point['n_neurons'])} off {point['harmful_refused']['low']:.2f} to {point['harmful_refused']['high']:.2f}"
            for point in band
            if point["harmful_refused"]["low"] is not None
        )
        console.say(f"{kind}, harmful refused: {line}")


def from_to(numbers: list[int]) -> str:
    """Numbers of neurons at one step, which differ where orders of layers do."""
    return f"{max(numbers)}" if min(numbers) == max(numbers) else f"{min(numbers)}–{max(numbers)}"


def measured(arm: dict[str, Any]) -> list[Any]:
    """The numbers of one point."""
    return [arm["harmful_refused"], arm["harmless_refused"]["value"], arm["perplexity"], arm["divergence"]]
