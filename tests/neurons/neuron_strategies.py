"""Site tables, members and scores for the tests of this folder, plain and random."""

import numpy as np
from hypothesis import strategies as st

from safety_neurons.neurons import SITES, SiteInfo, SiteTable


def table(
    n_layers=2,
    heads=4,
    kv_heads=2,
    head_dim=2,
    mlp=6,
    n_parameters=5000,
    architecture="LlamaForCausalLM",
    bias=0,
):
    hidden = heads * head_dim
    sizes = {
        "q": hidden,
        "k": kv_heads * head_dim,
        "v": kv_heads * head_dim,
        "o": hidden,
        "gate": mlp,
        "up": mlp,
        "down": mlp,
    }
    of = {"q": heads, "o": heads, "k": kv_heads, "v": kv_heads}
    sites = [
        SiteInfo(
            f"layers.{layer}.{site}",
            sizes[site],
            hidden,
            bias,
            of.get(site, 0),
            head_dim if site in of else 0,
        )
        for layer in range(n_layers)
        for site in SITES
    ]
    return SiteTable(architecture, n_parameters, tuple(sites))


TABLE = table()


def members(of=TABLE):
    """Random members by key. The table is asked before drawing: the type checker that the suite runs with
    uses `random`.
    """
    return _members(dict(of.sizes))


@st.composite
def _members(draw, sizes):
    keys = draw(st.lists(st.sampled_from(sorted(sizes)), unique=True, max_size=6))
    return {key: draw(st.lists(st.integers(0, sizes[key] - 1), max_size=sizes[key])) for key in keys}


def values(of=TABLE, coarse=True):
    """Scores with many ties (few distinct values), so that tie-breaking matters."""
    return _values(dict(of.sizes), coarse)


@st.composite
def _values(draw, sizes, coarse):
    seed = draw(st.integers(0, 2**32 - 1))
    levels = draw(st.integers(1, 5)) if coarse else 10**6
    generator = np.random.default_rng(seed)
    return {key: generator.integers(0, levels, size).astype(np.float64) - 1 for key, size in sizes.items()}
