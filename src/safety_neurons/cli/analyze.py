"""analyze: what sets of neurons are, where they lie, how far they agree, and what each of their parts does."""

import importlib
from typing import Annotated, Any

import typer

from safety_neurons.cli import console
from safety_neurons.cli.options import Common
from safety_neurons.cli.pages import Contents
from safety_neurons.cli.session import Session, resolve
from safety_neurons.cli.verb import verb

app = typer.Typer(
    help="Understand sets of neurons: layers, overlap, languages, tax, transfer, vocabulary, progressive.",
    no_args_is_help=True,
    cls=Contents,
    rich_markup_mode=None,
)

SetFiles = Annotated[
    list[str],
    typer.Argument(help="[NAME=]PATH: neuron files, score files, folders of find runs, or organism:NAME/SET.", show_default=False),
]
Top = Annotated[float | None, typer.Option(help="Take this fraction of every list of scores, whatever set lies beside it.")]
Count = Annotated[int | None, typer.Option(min=1, help="Take this many of every list of scores.")]


@verb(app, "layers")
def layers(common: Common, sets: SetFiles, top: Top = None, count: Count = None) -> dict[str, Any]:
    """Where neurons lie: layers, sites, heads, and the papers' claims, beside a random set of the same size."""
    options = {name: value for name, value in locals().items() if name != "common"}
    session = Session("analyze-layers", common, options)

    def work() -> dict[str, Any]:
        from safety_neurons import analysis

        items = analysis.read_named(paths(sets), top=top, count=count, together=False)
        found = [analysis.layers(item) for item in items]
        return {"sets": [each.record() for each in found], **figure(session, "layers_figure", found)}

    return session.run(work, show_layers)


@verb(app, "overlap")
def overlap(common: Common, sets: SetFiles, top: Top = None, count: Count = None) -> dict[str, Any]:
    """How far sets and scores agree: methods, seeds, data sets, checkpoints, before and after tuning."""
    options = {name: value for name, value in locals().items() if name != "common"}
    session = Session("analyze-overlap", common, options)

    def work() -> dict[str, Any]:
        from safety_neurons import analysis

        found = analysis.overlap(analysis.read_named(paths(sets), top=top, count=count), seed=common.seed)
        return {**found.record(), **figure(session, "overlap_figure", found)}

    return session.run(work, show_overlap)


def paths(sets: list[str]) -> list[str]:
    """The arguments with `organism:NAME/SET` replaced by the file it stands for; a run folder keeps its own name."""
    found = []
    for text in sets:
        name, sign, path = text.partition("=")
        if sign and path.startswith("organism:"):
            found.append(f"{name}={resolve(path)}")
        else:
            found.append(resolve(text))
    return found


def figure(session: Session, name: str, *values: Any) -> dict[str, str]:
    """Draw the analysis's figure into the run folder; where it is."""
    from safety_neurons.analysis import figures, study_figures

    place = session.folder.path("figure.svg")
    (getattr(figures, name, None) or getattr(study_figures, name))(*values, place)
    return {"figure": str(place)}


def show_layers(result: dict[str, Any]) -> None:
    """One table of claims over all sets, then layers and sites of each."""
    claims: dict[str, list[str]] = {}
    for found in result["sets"]:
        for claim in found["claims"]:
            claims.setdefault(claim["claim"], []).append(answer(claim))
    names = [found["name"] for found in result["sets"]]
    rows = [[claim, *cells] for claim, cells in claims.items()]
    console.print_table("What the papers say", ["claim", *names], rows, caption="in brackets: the range of random sets of the same size")
    for found in result["sets"]:
        title = (
            f"\n{found['name']}: {found['n_neurons']:,} of {found['n_candidates']:,} neurons searched "
            f"({console.share(found['share_of_parameters'])} of all parameters)"
        )
        rows = [
            [place["name"], place["members"], chance(place), console.share(place["share_of_population"]), place["verdict"]]
            for group in ("by_part", "by_site", "by_layer")
            for place in found[group]
        ]
        console.print_table(title, ["place", "neurons", "random set", "of its population", "against chance"], rows)


def show_overlap(result: dict[str, Any]) -> None:
    """One row a pair; every number beside what unrelated sets would give."""
    rows = []
    for pair in result["pairs"]:
        jaccard, ranks, union = pair["jaccard"], pair["spearman"], pair["spearman_union"]
        rows.append(
            [
                ", ".join(pair["names"]),
                f"{jaccard['value']:.3f}",
                span(jaccard),
                span(jaccard["matched"]),
                "–" if ranks["value"] is None else f"{ranks['value']:.2f}",
                "–" if union["value"] is None else f"{union['value']:.2f} ({union['expected']:.2f})",
            ]
        )
    mean = result["mean_jaccard"]
    console.print_table(
        f"{len(result['sets'])} sets, mean Jaccard index {mean['value']:.3f} ({mean['lowest']:.3f} to {mean['highest']:.3f})",
        ["sets", "Jaccard", "by chance", "matched", "Spearman", "in the union"],
        rows,
        caption="by chance, matched: range of unrelated sets of the same sizes, anywhere or with as many in every matrix;\n"
        "Spearman over all candidates, and over neurons in at least one set (in brackets what unrelated scores give)",
    )
    for pair in result["pairs"]:
        if any(pair["outside"]):
            left = " and ".join(f"{number:,} of {name}" for number, name in zip(pair["outside"], pair["names"], strict=True) if number)
            line = f"{', '.join(pair['names'])}: {left} left out, where the other search did not look"
            console.say(line)


def span(number: dict[str, Any]) -> str:
    """The range that chance gives."""
    return f"{number['low']:.3f} to {number['high']:.3f}"


def chance(place: dict[str, Any]) -> str:
    """What a random set would have there."""
    return f"{place['expected']:.1f} [{place['low']:.0f}, {place['high']:.0f}]"


def answer(claim: dict[str, Any]) -> str:
    """Yes or no with the number, and what a random set gives."""
    if claim["holds"] is None:
        return f"– ({claim['note']})"
    value = f"{'yes' if claim['holds'] else 'no'}, {claim['value']:.3f}"
    found = claim["chance"]
    return value if found is None else f"{value} [{found['low']:.2f}, {found['high']:.2f}]"


for _name in ("analyze_groups", "analyze_cards", "analyze_tax"):
    importlib.import_module(f"safety_neurons.cli.{_name}")  # Commands of this group in files of their own; each registers itself.
