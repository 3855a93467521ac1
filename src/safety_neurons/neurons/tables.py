"""How neuron sets and scores look: one line for a terminal, a small table for a notebook."""

from typing import Protocol, runtime_checkable

import numpy as np

from safety_neurons.neurons.keys import SITES, parse_key
from safety_neurons.neurons.provenance import Provenance
from safety_neurons.neurons.site_table import SiteTable
from safety_neurons.results import html_table


@runtime_checkable
class Described(Protocol):
    """What a neuron set and scores have in common here."""

    table: SiteTable | None
    provenance: Provenance

    def items(self) -> list[tuple[str, np.ndarray]]:
        """Pairs of a key and its vector."""

    def __len__(self) -> int:
        """Entries."""


def line_of(neurons: Described) -> str:
    """`120 neurons (0.50 % of those searched) in 4 layers: down 120; contrast on base, aligned`."""
    parts = [f"{len(neurons):,} neurons"]
    share = getattr(neurons, "share_of_neurons", None) if neurons.table is not None else None
    if share is not None:
        parts[0] += (
            f" ({100 * share:.2f} % of those searched, {100 * getattr(neurons, 'share_of_parameters', 0.0):.3f} % of all parameters)"
        )
    rows = _per_site(neurons)
    if rows:
        layers = len({parse_key(key).layer for key, _ in neurons.items()})
        parts[0] += f" in {layers} layer{'s' * (layers != 1)}: " + ", ".join(f"{site} {number:,}" for site, number, _, _ in rows)
    made = " on ".join(text for text in (neurons.provenance.method, ", ".join(neurons.provenance.models)) if text)
    return "; ".join([*parts, *([made] if made else [])])


def html_of(neurons: Described) -> str:
    """A table with one row per site; every text is escaped and nothing is fetched."""
    rows = [[site, f"{number:,}", share, layers] for site, number, share, layers in _per_site(neurons)]
    return html_table(line_of(neurons), ["site", "neurons", "of the site", "layers"], rows)


def _per_site(neurons: Described) -> list[tuple[str, int, str, str]]:
    """Site, members, share of the site's neurons, layers, for the sites that have members."""
    rows = []
    for site in SITES:
        found = {key: len(vector) for key, vector in neurons.items() if parse_key(key).site == site}
        number = sum(found.values())
        if not number:
            continue
        size = sum(info.size for info in neurons.table.sites if parse_key(info.key).site == site) if neurons.table else 0
        layers = sorted({parse_key(key).layer for key in found})
        rows.append((site, number, f"{100 * number / size:.2f} %" if size else "", _spans(layers)))
    return rows


def _spans(layers: list[int]) -> str:
    """`0-3, 7` for 0, 1, 2, 3, 7."""
    spans: list[list[int]] = []
    for layer in layers:
        if spans and layer == spans[-1][1] + 1:
            spans[-1][1] = layer
        else:
            spans.append([layer, layer])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in spans)
