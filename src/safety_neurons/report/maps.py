"""Where neurons are: layers down, sites across; every cell opens into its neurons."""

from markupsafe import Markup

from safety_neurons.report.charts import site_map
from safety_neurons.report.explorer import Cells, cells_of, is_signed, place_of
from safety_neurons.report.reading import Run
from safety_neurons.report.sections import Figure, Part
from safety_neurons.report.tables import cells_table, neurons_table
from safety_neurons.report.text import name, plural, say, share, visible

TALL = 12
"""Layers beyond which two maps stand side by side."""


def find_part(run: Run, opens: int | None = None) -> Part:
    """Where the neurons of a find run are."""
    heading = say("{} <span class=sub>on {}</span>", visible(run.method, 40), Markup(" → ").join(name(model) for model in run.models))
    used = run.result["prompts"]
    lead = say(
        "{} kept, {} of those searched and {} of all parameters, from {}.",
        plural(run.result["n_neurons"], "neuron"),
        share(run.result["share_of_neurons"]),
        share(run.result["share_of_parameters"], 2),
        plural(used["used"], "prompt"),
    )
    cells = cells_of(run)
    if not cells:
        return Part(heading, lead + Markup(" The score and neuron files are no longer in the folder, so there is no map."))
    top = neurons_table(run)
    tall = len({layer for layer, _ in cells}) > TALL
    return Part(heading, lead, _maps(run, cells), (), [*([top] if top else []), cells_table(cells)], opens, tall)


def _maps(run: Run, cells: Cells) -> list[Figure]:
    shares = {place: members / size for place, (members, size, _) in cells.items() if size}
    places = {place: place_of(*place) for place in cells}
    figures = []
    if shares:
        tips = {
            place: f"layer {place[0]}, {place[1]}: {cells[place][0]:,} of {cells[place][1]:,} neurons ({share(shares[place])})"
            for place in shares
        }
        labels = {place: _short(100 * value) for place, value in shares.items()}
        most = sorted(shares, key=lambda place: -shares[place])[:3]
        text = "Largest: " + "; ".join(tips[place] for place in most)
        caption = Markup("<b>Found</b>: neurons kept ÷ neurons of the matrix, in %.")
        drawn = site_map(shares, labels, tips, places)
        figures.append(Figure(drawn, f"Heat map of the share of each matrix kept. {text}.", caption))
    means = {place: mean for place, (_, _, mean) in cells.items() if mean is not None}
    if means:
        largest = max(abs(value) for value in means.values()) or 1.0
        tips = {place: f"layer {place[0]}, {place[1]}: mean score {value:.3g}" for place, value in means.items()}
        labels = {place: _short(100 * value / largest) for place, value in means.items()}
        most = sorted(means, key=lambda place: -means[place])[:3]
        what = "mean size of the score (signs left out)" if is_signed(run.scores) else "mean score"
        caption = say("<b>Score</b>: {} of all neurons of the matrix; 100 = {}.", what, f"{largest:.3g}")
        text = "Largest: " + "; ".join(tips[place] for place in most)
        figures.append(Figure(site_map(means, labels, tips, places), f"Heat map of the {what} of each matrix. {text}.", caption))
    return figures


def _short(value: float) -> str:
    return "0" if value == 0 else "<1" if abs(value) < 0.95 else f"{value:.0f}"
