"""analyze tax: do safety and helpfulness need the same neurons, and what does one cost the other?"""

from typing import Annotated, Any

import typer

from safety_neurons.cli import console
from safety_neurons.cli.analyze import app
from safety_neurons.cli.options import (
    Base,
    Column,
    Common,
    Harmful,
    Harmless,
    Layers,
    Limit,
    MaxNewTokens,
    Positions,
    PromptSource,
    Sites,
    listed,
)
from safety_neurons.cli.session import Session
from safety_neurons.cli.verb import verb
from safety_neurons.errors import UsageError

SAFETY, HELPFUL = "safety", "helpful"


@verb(app, "tax")
def tax(
    common: Common,
    base: Base,
    safety: Annotated[str, typer.Option(help="The base model after a safety preference training.", rich_help_panel="Models")],
    helpful: Annotated[str, typer.Option(help="The base model after a helpfulness preference training.", rich_help_panel="Models")],
    control: Annotated[
        list[str] | None,
        typer.Option(help="NAME=MODEL after some other training, to hold the two against; may be repeated.", rich_help_panel="Models"),
    ] = None,
    prompts: PromptSource = "builtin:harmful",
    also: Annotated[str, typer.Option(help="Further requests to score on, or none.", rich_help_panel="Prompts")] = "builtin:harmless",
    find_limit: Annotated[
        int | None, typer.Option(min=1, help="Use the first N of each list to score on.", rich_help_panel="Prompts")
    ] = None,
    harmful: Harmful = "builtin:harmful-test",
    harmless: Harmless = "builtin:harmless-test",
    helpfulness: Annotated[str, typer.Option(help="answered, taught, ending:TEXT, or auto: taught for organisms, else answered.")] = "auto",
    column: Column = None,
    limit: Limit = None,
    sites: Sites = None,
    layers: Layers = None,
    positions: Positions = "completion",
    top: Annotated[float, typer.Option(help="Share of the neurons in a top set.")] = 0.05,
    random: Annotated[int, typer.Option(min=0, help="Random sets of the size of the shared one.")] = 5,
    max_new_tokens: MaxNewTokens = 64,
) -> dict[str, Any]:
    """The alignment tax: overlap of safety and helpfulness neurons, and what patching the shared ones costs and brings on both sides."""
    options = {name: value for name, value in locals().items() if name != "common"}
    if not 0 < top <= 1:
        raise UsageError(f"--top {top}: expected a share above 0 and at most 1")
    controls = named_controls(control or [])
    session = Session("analyze-tax", common, options)

    def work() -> dict[str, Any]:
        from safety_neurons import studies
        from safety_neurons.analysis.tax import relations
        from safety_neurons.analysis.tax_figure import tax_figure

        models = dict(zip(["", SAFETY, HELPFUL, *controls], session.several([base, safety, helpful, *controls.values()]), strict=True))
        before = models.pop("")
        measure = measure_of(helpfulness, before)
        scored, asked = scored_prompts(session, options, before), asked_prompts(session, options, before)
        searched: dict[str, Any] = {"sites": listed(sites) or ("down",), "layers": layers, "positions": positions}
        common_options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "batch_size": session.batch_size()}
        with session.status("tax") as tell:
            read = studies.read_trainings(before, models, scored, progress=tell, **searched, **common_options)
            shared = read.shared(SAFETY, HELPFUL, top)
            completions = session.folder.path("completions.jsonl")
            crossed = studies.cross_patch(
                {name: models[name] for name in (SAFETY, HELPFUL)},
                shared,
                *asked,
                measure=studies.helpfulness(measure),
                random=random,
                seed=common.seed,
                completions_file=completions,
                progress=tell,
                **common_options,
            )
            if tell is not None:
                tell("analyse")
            found = relations(read.changes, top=top, seed=common.seed)
        session.notes.extend([*read.notes, *crossed.bench.notes])
        record = {"top": top, "prompts": read.prompts, "helpfulness": measure, "relations": [each.record() for each in found]}
        record |= {**crossed.record(), "completions": str(completions)}
        files = keep(session, read, shared)
        place = session.folder.path("figure.svg")
        tax_figure(record, place)
        return {**record, "files": files, "figure": str(place)}

    return session.run(work, show)


def named_controls(texts: list[str]) -> dict[str, str]:
    """NAME=MODEL arguments by name."""
    found: dict[str, str] = {}
    for text in texts:
        name, sign, model = text.partition("=")
        if not (name and sign and model) or name in (SAFETY, HELPFUL, *found):
            raise UsageError(f"--control {text!r}: expected NAME=MODEL with a name that no other training has")
        found[name] = model
    return found


def measure_of(name: str, before: Any) -> str:
    """The measure of helpfulness; `auto` is `taught` where the prompts are an organism's own."""
    return name if name != "auto" else "answered" if before.prompt_folder is None else "taught"


def scored_prompts(session: Session, options: dict[str, Any], model: Any) -> Any:
    """What the trainings are scored on: one list, or two."""
    from safety_neurons.prompts import Prompts

    lists = [options["prompts"], *([] if options["also"] == "none" else [options["also"]])]
    return Prompts([prompt for source in lists for prompt in session.prompts(source, model, options["column"], options["find_limit"])])


def asked_prompts(session: Session, options: dict[str, Any], model: Any) -> list[Any]:
    """What is asked under patching."""
    return [session.prompts(options[name], model, options["column"], options["limit"]) for name in ("harmful", "harmless")]


def keep(session: Session, read: Any, shared: Any) -> dict[str, str]:
    """Write the scores of every training and the shared neurons; where they are."""
    files = {f"scores_{name}": session.folder.path(f"scores-{name}.safetensors") for name in read.scores}
    for name, scores in read.scores.items():
        scores.save(files[f"scores_{name}"])
    files["shared"] = session.folder.path("shared.safetensors")
    shared.save(files["shared"])
    return {name: str(path) for name, path in files.items()}


def show(result: dict[str, Any]) -> None:
    """Pairs of trainings, then the models under cross-patching, then the price in two sentences."""
    from safety_neurons.results import clear_word

    rows = []
    for pair in result["relations"]:
        overlap, ranks, chance = pair["overlap"], pair["spearman"], pair["chance"]
        rows.append(
            [
                " and ".join(pair["pair"]),
                f"{overlap['value']:.0f} of {pair['size']}",
                *(
                    f"{chance[name]['expected']:.1f} [{chance[name]['low']:.0f}, {chance[name]['high']:.0f}]"
                    for name in ("all", "in_activation")
                ),
                with_interval(ranks["all"]),
                with_interval(ranks["given_activation"]),
                with_interval(ranks["union"]),
                None if pair["shared"] is None else pair["shared"]["cosine"],
            ]
        )
    console.print_table(
        f"Top {console.share(result['top'])} of {result['relations'][0]['candidates']:,} neurons, {result['prompts']} prompts",
        ["trainings", "shared", "by chance", "as active", "Spearman", "given activation", "in the union", "cosine"],
        rows,
        caption="by chance: range of random sets; as active: of sets with as many in every layer and tenth of it by activation\n"
        "Spearman of change scores: over all neurons, with activation held fixed, over the union of the two sets (95 % over prompts)\n"
        "cosine: of the two changes of the shared neurons' activations (1 the same way, -1 opposite ways)",
    )
    rows = [[arm["arm"], arm["refused"], arm["helpful"], arm["over_refused"]] for arm in result["arms"]]
    console.print_table(
        f"\nCross-patching of {result['n_shared']} shared neurons ({result['helpfulness']})",
        ["model", "harmful refused", "helpful", "harmless refused"],
        rows,
        compared=result["cross_patching"],
    )
    for direction in result["cross_patching"]:
        receiver, donor = direction["receiver"], direction["donor"]
        told = []
        for name, word in (("refused", "refusals of harmful requests"), ("helpful", "helpful answers")):
            found = direction[name]
            against = found["against_random"]
            clear = "" if against is None else f" (against random neurons {console.shown(against)}, {clear_word(against)})"
            told.append(f"{word} {console.shown(found['change'])}{clear}")
        console.say(f"{receiver} from {donor}: {'; '.join(told)}")


def with_interval(number: dict[str, Any]) -> str | None:
    """A correlation with its interval over prompts."""
    low, high = number["interval"]
    return None if number["value"] is None else console.shown({"value": number["value"], "low": low, "high": high})
