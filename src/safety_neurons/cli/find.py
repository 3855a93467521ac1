"""find: score neurons by one method and keep the ones that a selection takes."""

import dataclasses
from collections.abc import Callable
from typing import Annotated, Any

import typer

from safety_neurons.cli import console
from safety_neurons.cli.options import (
    Agreement,
    Aligned,
    Base,
    Column,
    Common,
    Count,
    DryRun,
    GenerateWith,
    Layers,
    Limit,
    MaxNewTokens,
    Model,
    Positions,
    PromptSource,
    Sites,
    Subtract,
    Threshold,
    Top,
    TopPerMatrix,
    listed,
)
from safety_neurons.cli.pages import Contents
from safety_neurons.cli.session import Session
from safety_neurons.cli.verb import verb

app = typer.Typer(
    help="Score neurons by one method and keep the ones a selection takes.", no_args_is_help=True, cls=Contents, rich_markup_mode=None
)

Foundation = Annotated[str, typer.Option(help="General text of --subtract foundation: a file or builtin:NAME[/LANG].")]
Steps = Annotated[int, typer.Option(min=0, help="Points at which the gradient is averaged; 0 takes it at the model itself.")]


@verb(app, "importance")
def importance(
    common: Common,
    model: Model,
    prompts: PromptSource = "builtin:harmful",
    column: Column = None,
    limit: Limit = None,
    top: Top = None,
    count: Count = None,
    top_per_matrix: TopPerMatrix = None,
    threshold: Threshold = None,
    agreement: Agreement = None,
    sites: Sites = None,
    layers: Layers = None,
    subtract: Subtract = None,
    foundation: Foundation = "builtin:general",
    space: Annotated[str, typer.Option(help="output, or probability for the paper's literal Q and K scores.")] = "output",
    as_published: Annotated[bool, typer.Option("--as-published", help="Compute what the public code computes.")] = False,
    memory_budget: Annotated[int, typer.Option(min=1, help="Memory of one chunk of neurons, in MiB.")] = 256,
    dry_run: DryRun = False,
) -> dict[str, Any] | None:
    """Paper 1: how much each row or column changes its sub-layer's output on harmful requests."""
    options = {name: value for name, value in locals().items() if name not in ("common", "dry_run")}
    session = Session("find-importance", common, options)

    def work(own: dict[str, Any]) -> Any:
        from safety_neurons.detectors import find_importance

        return find_importance(
            own.pop("model"), own.pop("prompts"), space=space, as_published=as_published, memory_budget=memory_budget * 2**20, **own
        )

    return find(session, options, {"model": model}, work, dry_run=dry_run)


@verb(app, "attribution")
def attribution(
    common: Common,
    model: Model,
    prompts: PromptSource = "builtin:harmful",
    column: Column = None,
    limit: Limit = None,
    top: Top = None,
    count: Count = None,
    top_per_matrix: TopPerMatrix = None,
    threshold: Threshold = None,
    agreement: Agreement = None,
    sites: Sites = None,
    layers: Layers = None,
    subtract: Subtract = None,
    foundation: Foundation = "builtin:general",
    refusal: Annotated[str | None, typer.Option(help="Text of a refusal. [default: built in]")] = None,
    compliance: Annotated[str | None, typer.Option(help="Text of a compliance. [default: built in]")] = None,
    integrated: Steps = 0,
    dry_run: DryRun = False,
) -> dict[str, Any] | None:
    """First-order effect of each neuron on the log-odds of refusing: activation times gradient."""
    options = {name: value for name, value in locals().items() if name not in ("common", "dry_run")}
    session = Session("find-attribution", common, options)

    def work(own: dict[str, Any]) -> Any:
        from safety_neurons.detectors import find_attribution

        return find_attribution(own.pop("model"), own.pop("prompts"), refusal=refusal, compliance=compliance, integrated=integrated, **own)

    return find(session, options, {"model": model}, work, dry_run=dry_run)


@verb(app, "contrast")
def contrast(
    common: Common,
    base: Base,
    aligned: Aligned,
    prompts: PromptSource = "builtin:harmful",
    column: Column = None,
    limit: Limit = None,
    top: Top = None,
    count: Count = None,
    top_per_matrix: TopPerMatrix = None,
    threshold: Threshold = None,
    agreement: Agreement = None,
    sites: Sites = None,
    layers: Layers = None,
    subtract: Subtract = None,
    positions: Positions = "completion",
    generate_with: GenerateWith = "base",
    max_new_tokens: MaxNewTokens = 128,
    completions: Annotated[str | None, typer.Option(help="Completions file to use instead of generating.")] = None,
    dry_run: DryRun = False,
) -> dict[str, Any] | None:
    """Paper 2: root mean square difference of each activation between two models on the same text."""
    options = {name: value for name, value in locals().items() if name not in ("common", "dry_run")}
    session = Session("find-contrast", common, options)

    def work(own: dict[str, Any]) -> Any:
        from safety_neurons.detectors import find_contrast
        from safety_neurons.results import Completions

        return find_contrast(
            own.pop("base"),
            own.pop("aligned"),
            own.pop("prompts"),
            positions=positions,
            generate_with=generate_with,
            max_new_tokens=max_new_tokens,
            **{"completions": Completions.load(completions) if completions else None, **own},
        )

    return find(session, options, {"base": base, "aligned": aligned}, work, dry_run=dry_run)


@verb(app, "importance-contrast")
def importance_contrast(
    common: Common,
    base: Base,
    aligned: Aligned,
    prompts: PromptSource = "builtin:harmful",
    column: Column = None,
    limit: Limit = None,
    top: Top = None,
    count: Count = None,
    top_per_matrix: TopPerMatrix = None,
    threshold: Threshold = None,
    agreement: Agreement = None,
    sites: Sites = None,
    layers: Layers = None,
    subtract: Subtract = None,
    compare: Annotated[str, typer.Option(help="swap, swap-attribution, absolute, relative or same-input.")] = "swap",
    positions: Positions = "prompt",
    generate_with: GenerateWith = "base",
    max_new_tokens: MaxNewTokens = 128,
    dry_run: DryRun = False,
) -> dict[str, Any] | None:
    """Exact importance against the base model's parameters instead of against zero."""
    options = {name: value for name, value in locals().items() if name not in ("common", "dry_run")}
    session = Session("find-importance-contrast", common, options)

    def work(own: dict[str, Any]) -> Any:
        from safety_neurons.detectors import find_importance_contrast

        return find_importance_contrast(
            own.pop("base"),
            own.pop("aligned"),
            own.pop("prompts"),
            compare=compare,
            positions=positions,
            generate_with=generate_with,
            max_new_tokens=max_new_tokens,
            **own,
        )

    return find(session, options, {"base": base, "aligned": aligned}, work, dry_run=dry_run)


@verb(app, "attribution-patching")
def attribution_patching(
    common: Common,
    base: Base,
    aligned: Aligned,
    prompts: PromptSource = "builtin:harmful",
    column: Column = None,
    limit: Limit = None,
    top: Top = None,
    count: Count = None,
    top_per_matrix: TopPerMatrix = None,
    threshold: Threshold = None,
    agreement: Agreement = None,
    sites: Sites = None,
    layers: Layers = None,
    subtract: Subtract = None,
    at: Annotated[str, typer.Option(help="path: averaged from base to aligned; base: at the base model alone.")] = "path",
    midpoints: Annotated[int, typer.Option(min=1, help="Midpoints of the path.")] = 8,
    dry_run: DryRun = False,
) -> dict[str, Any] | None:
    """First-order estimate of what patching each neuron from the aligned model would do."""
    options = {name: value for name, value in locals().items() if name not in ("common", "dry_run")}
    session = Session("find-attribution-patching", common, options)

    def work(own: dict[str, Any]) -> Any:
        from safety_neurons.detectors import find_attribution_patching

        return find_attribution_patching(own.pop("base"), own.pop("aligned"), own.pop("prompts"), at=at, midpoints=midpoints, **own)

    return find(session, options, {"base": base, "aligned": aligned}, work, dry_run=dry_run)


@verb(app, "mask")
def mask(
    common: Common,
    base: Base,
    aligned: Aligned,
    prompts: PromptSource = "builtin:harmful",
    harmless: Annotated[str, typer.Option(help="Prompts whose answers are to stay: a file or builtin:NAME[/LANG]; none for none.")] = (
        "builtin:harmless"
    ),
    column: Column = None,
    limit: Limit = None,
    top: Top = None,
    count: Count = None,
    sites: Sites = None,
    layers: Layers = None,
    subtract: Subtract = None,
    move: Annotated[str, typer.Option(help="activations (patching), parameters (swapping), or auto.")] = "auto",
    rounds: Annotated[int, typer.Option(min=1, help="How often the set is looked at.")] = 30,
    caution: Annotated[float, typer.Option(min=0, help="Weight of the harmless answers.")] = 0.5,
    dry_run: DryRun = False,
) -> dict[str, Any] | None:
    """Learned mask: the set of a given size that refuses the most when it is moved from base to aligned."""
    options = {name: value for name, value in locals().items() if name not in ("common", "dry_run")}
    options |= dict.fromkeys(("top_per_matrix", "threshold", "agreement"))
    session = Session("find-mask", common, options)

    def work(own: dict[str, Any]) -> Any:
        from safety_neurons.detectors import find_mask

        kept = session.prompts(harmless, own["base"], column, limit) if harmless != "none" else None
        models = (own.pop("base"), own.pop("aligned"), own.pop("prompts"))
        return find_mask(*models, harmless=kept, move=move, rounds=rounds, caution=caution, **own)

    return find(session, options, {"base": base, "aligned": aligned}, work, dry_run=dry_run)


def find(
    session: Session, options: dict[str, Any], specs: dict[str, str], work: Callable[[dict[str, Any]], Any], *, dry_run: bool
) -> dict[str, Any] | None:
    """Load what a detector needs, run it, write scores and neurons, show them."""

    def run() -> dict[str, Any]:
        models = load(session, specs)
        first = next(iter(models.values()))
        own: dict[str, Any] = dict(models)
        own["prompts"] = session.prompts(options["prompts"], first, options["column"], options["limit"])
        if options["sites"] is not None:
            own["sites"] = listed(options["sites"])
        own |= {name: options[name] for name in ("top", "count", "top_per_matrix", "threshold", "agreement", "layers")}
        own["batch_size"] = session.batch_size()
        own["checkpoint"] = session.folder.checkpoint("find")
        own["subtract"] = subtracted(session, options, first, work, own)
        with session.progress("find") as progress:
            found = work({**own, "progress": progress})
        session.notes.extend(found.notes)
        return keep(session, found)

    if dry_run:
        return estimate(session, options, specs)
    return session.run(run, show)


def load(session: Session, specs: dict[str, str]) -> dict[str, Any]:
    """One model, or a pair that shares its base where it can."""
    if "model" in specs:
        return {"model": session.model(specs["model"])}
    pair = session.pair(specs["base"], specs["aligned"])
    return {"base": pair.base, "aligned": pair.aligned}


def subtracted(session: Session, options: dict[str, Any], model: Any, work: Callable[[dict[str, Any]], Any], own: dict[str, Any]) -> Any:
    """The set to subtract: a file, or the foundation neurons found by the same method and selection on general text."""
    if options["subtract"] is None:
        return None
    if options["subtract"] != "foundation":
        return session.neurons(options["subtract"], model)
    general = session.prompts(options.get("foundation", "builtin:general"), model)
    own = {**own, "prompts": general, "checkpoint": session.folder.checkpoint("foundation")}
    if "completions" in options:
        own["completions"] = None
    with session.progress("find foundation neurons") as progress:
        found = work({**own, "progress": progress})
    found.neurons.save(session.folder.path("foundation.safetensors"))
    session.notes.extend(found.notes)
    return found.neurons


def keep(session: Session, found: Any) -> dict[str, Any]:
    """Write scores, then neurons; an empty set is an error that leaves the scores."""
    from safety_neurons.errors import NeuronError

    scores, neurons = session.folder.path("scores.safetensors").absolute(), session.folder.path("neurons.safetensors").absolute()
    found.scores.save(scores)
    if not len(found.neurons):
        raise NeuronError(f"no neuron was chosen ({'; '.join(found.notes) or 'the selection takes none'}); the scores are in {scores}")
    found.neurons.save(neurons)
    return {
        "neurons": str(neurons),
        "scores": str(scores),
        "n_neurons": found.neurons.n_neurons,
        "n_units": found.neurons.n_units,
        "n_parameters": found.neurons.n_parameters,
        "share_of_neurons": found.neurons.share_of_neurons,
        "share_of_all_neurons": found.neurons.share_of_all_neurons,
        "share_of_parameters": found.neurons.share_of_parameters,
        "prompts": dataclasses.asdict(found.prompts),
        "method": found.scores.provenance.method,
        "notes": list(found.notes),
    }


def show(result: dict[str, Any]) -> None:
    """What was found: counts, where it sits, and the files."""
    from safety_neurons.neurons import SITES, NeuronSet, parse_key

    neurons = NeuronSet.load(result["neurons"])
    used = result["prompts"]
    searched, all_of_it = console.share(result["share_of_neurons"]), console.share(result["share_of_parameters"])
    shares = f"{searched} of the neurons searched, {all_of_it} of all parameters"
    counts = f"prompts {used['used']:,} used, {used['failed']:,} failed, {used['truncated']:,} truncated"
    console.say(("bold", f"{result['n_neurons']:,} neurons"), f" by {result['method']}: {shares}; {counts}\n")
    by_layer: dict[int, dict[str, int]] = {}
    for key, indices in neurons.items():
        parsed = parse_key(key)
        row = by_layer.setdefault(parsed.layer, {})
        row[parsed.site] = row.get(parsed.site, 0) + len(indices)
    sites = [site for site in SITES if any(site in row for row in by_layer.values())]
    rows = [[f"layer {layer}", *(row.get(site, 0) for site in sites), sum(row.values())] for layer, row in sorted(by_layer.items())]
    totals = ["all", *(sum(row.get(site, 0) for row in by_layer.values()) for site in sites), len(neurons)]
    console.print_table("Where they are", ["", *sites, "together"], [*rows, totals])
    console.say(("dim", "\nneurons "), result["neurons"], ("dim", "\nscores  "), result["scores"])


def estimate(session: Session, options: dict[str, Any], specs: dict[str, str]) -> dict[str, Any]:
    """Memory, time and disk of a run that is not started."""
    from safety_neurons.model import estimate as estimate_run

    models = load(session, specs)
    first = next(iter(models.values()))
    chosen = session.prompts(options["prompts"], first, options["column"], options["limit"])
    plan = estimate_run(list(models.values()), chosen, max_new_tokens=options.get("max_new_tokens", 0), batch_size=session.batch_size())
    if not session.common.json:
        console.say(str(plan))
    return dataclasses.asdict(plan)
