"""A small table and sets on it, for tests of analyses."""

import numpy as np

from safety_neurons.neurons import NeuronSet, Provenance, Scores, SiteInfo, SiteTable


def small_table(layers: int = 3) -> SiteTable:
    """Llama-like: hidden 8, two query heads on one key-value head of 4, feed-forward 12."""
    sites = []
    for layer in range(layers):
        attention = {"q": (8, 8, 2), "k": (4, 8, 1), "v": (4, 8, 1), "o": (8, 8, 2)}
        sites += [
            SiteInfo(f"layers.{layer}.{site}", size, width, 0, heads, 4)
            for site, (size, width, heads) in attention.items()
        ]
        sites += [SiteInfo(f"layers.{layer}.{site}", 12, 8, 0) for site in ("gate", "up", "down")]
    return SiteTable("SmallForCausalLM", 5000, tuple(sites))


def random_set(table: SiteTable, share: float, seed: int, sites: tuple[str, ...] | None = None) -> NeuronSet:
    """Members drawn one by one; the provenance says what was searched."""
    generator = np.random.default_rng(seed)
    searched = table.select(sites=sites)
    members = {key: np.flatnonzero(generator.random(size) < share) for key, size in searched.sizes.items()}
    config = {} if sites is None else {"sites": list(sites)}
    return NeuronSet(
        members, table, Provenance("neurons", "drawn", model_fingerprint=table.fingerprint, config=config)
    )


def random_scores(table: SiteTable, seed: int, sites: tuple[str, ...] | None = None) -> Scores:
    generator = np.random.default_rng(seed)
    sizes = table.select(sites=sites).sizes
    provenance = Provenance("scores", "drawn", model_fingerprint=table.fingerprint)
    return Scores({key: generator.normal(size=size) for key, size in sizes.items()}, table, provenance)
