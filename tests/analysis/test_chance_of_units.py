"""Unrelated sets are called more or fewer than chance as rarely as the 95 % range says, whatever they are made of."""

import importlib

import numpy as np
import pytest

from safety_neurons.analysis import Named, languages, layers, overlap
from safety_neurons.analysis.chance import Clumps, simulated
from safety_neurons.neurons import Provenance, Scores, SiteInfo, SiteTable

NOMINAL, ALLOWED = 0.05, 0.07


def model(n_layers=4, heads=4, kv_heads=2, head_dim=4, mlp=40):
    """Grouped query attention, and more feed-forward neurons than others, as in most models."""
    sizes = {"q": (heads, heads), "k": (kv_heads, kv_heads), "v": (kv_heads, kv_heads), "o": (heads, heads)}
    sites = []
    for layer in range(n_layers):
        sites += [SiteInfo(f"layers.{layer}.{site}", n * head_dim, 16, 0, h, head_dim) for site, (n, h) in sizes.items()]
        sites += [SiteInfo(f"layers.{layer}.{site}", mlp, 16, 0) for site in ("gate", "up", "down")]
    return SiteTable("WideForCausalLM", 10**5, tuple(sites))


TABLE = model()


def alone(generator, sites):
    """Every neuron has a score of its own, as under attribution."""
    return {key: generator.normal(size=size) for key, size in TABLE.select(sites).sizes.items()}


def as_units(generator, sites):
    """A unit has one score, as under importance: gate, up and down; a v row and the o columns it feeds."""
    numbers = TABLE.units()
    values = generator.normal(size=1 + max(int(part.max()) for part in numbers.values()))
    return {key: values[numbers[key]] for key in TABLE.select(sites).keys}


def in_part(generator, sites):
    """Feed-forward units have one score, attention neurons one each: importance under grouped query attention."""
    whole, single = as_units(generator, sites), alone(generator, sites)
    return {key: (whole if key.rsplit(".", 1)[1] in ("gate", "up", "down") else single)[key] for key in whole}


def mixed(generator, sites):
    """Half of the units have one score, the neurons of the others one each."""
    whole, single, numbers = as_units(generator, sites), alone(generator, sites), TABLE.units()
    together = generator.random(1 + max(int(part.max()) for part in numbers.values())) < 0.5
    return {key: np.where(together[numbers[key]], whole[key], single[key]) for key in whole}


MADE = (alone, as_units, in_part, mixed)


def drawn(made, seed, sites=None, count=60):
    scores = Scores(made(np.random.default_rng(seed), sites), TABLE, Provenance("scores", "drawn", model_fingerprint=TABLE.fingerprint))
    return Named(f"set {seed}", scores.count(count), scores)


def verdicts(record):
    """Every verdict in a record, by the path of the names that lead to it."""
    found = {}

    def look(value, path):
        if isinstance(value, dict):
            if "verdict" in value:
                found.setdefault(path, []).append(value["verdict"] != "as chance")
            for name, part in value.items():
                look(part, f"{path}.{name}")
        elif isinstance(value, list | tuple):
            for part in value:
                look(part, path)

    look(record, "")
    return found


def flagged(records):
    pooled = {}
    for record in records:
        for path, found in verdicts(record).items():
            pooled.setdefault(path, []).extend(found)
    return {path: (float(np.mean(found)), len(found)) for path, found in pooled.items()}


def held(shares, runs):
    """The family of each kind of verdict stays below what is allowed, three standard errors of a simulation of this size granted."""
    for path, (share, _) in shares.items():
        assert share <= ALLOWED + 3 * np.sqrt(NOMINAL * (1 - NOMINAL) / runs), (path, shares)
    everything = sum(share * number for share, number in shares.values()) / sum(number for _, number in shares.values())
    assert everything <= ALLOWED, shares


@pytest.fixture(autouse=True)
def fewer_draws(monkeypatch):
    monkeypatch.setattr(importlib.import_module("safety_neurons.analysis.overlap"), "DRAWS", 500)
    monkeypatch.setattr(importlib.import_module("safety_neurons.analysis.overlap"), "RANK_DRAWS", 40)


CASES = [*((made, None) for made in MADE), (as_units, ("gate", "up", "down")), (as_units, ("v", "o"))]


def test_layers_calls_random_sets_as_chance():
    held(flagged([layers(drawn(made, seed, sites)).record() for made, sites in CASES for seed in range(15)]), 15 * len(CASES))


def test_overlap_calls_unrelated_sets_as_chance():
    pairs = [[drawn(made, 2 * seed + one, sites) for one in (0, 1)] for made, sites in CASES for seed in range(10)]
    held(flagged([overlap(pair).record() for pair in pairs]), 10 * len(CASES))


def test_languages_calls_unrelated_sets_as_chance():
    def three(made, seed):
        return {f"{one}": drawn(made, 3 * seed + one, count=150).neurons for one in range(3)}

    held(flagged([languages(three(made, seed)).record() for made in (alone, as_units) for seed in range(12)]), 24)


@pytest.mark.parametrize("made", [as_units, mixed, alone])
def test_simulated_sets_share_what_sets_moved_by_hand_share(made):
    """The units of every layer are moved at random, unit by unit, without the code under test."""
    sites = ("gate", "up", "down")
    sets = [drawn(made, seed, sites, count=200).neurons for seed in (1, 2, 3)]
    table, generator = TABLE.select(sites), np.random.default_rng(0)
    first, second, third = (np.array([[part.mask(f"layers.{n}.{site}") for site in sites] for n in range(4)]) for part in sets)
    by_hand = {True: [], False: []}
    for _ in range(800):
        one, other = (np.stack([layer[:, generator.permutation(40)] for layer in part]) for part in (second, third))
        by_hand[True].append((first & one & other).sum())
        by_hand[False].append((first & ~one & ~other).sum())
    for shared, found in by_hand.items():
        sizes = simulated(sets, table, 0, 4000, shared=shared)
        assert sizes.mean() == pytest.approx(np.mean(found), abs=5 * np.std(found) / np.sqrt(800))
        assert sizes.std() == pytest.approx(np.std(found), rel=0.15)


def test_what_a_set_is_made_of_is_read_off_the_set():
    sites = ("gate", "up", "down")
    for made, together in ((as_units, 1.0), (alone, 0.0)):
        shares = Clumps(drawn(made, 1, sites, count=90).neurons, TABLE.select(sites)).shares
        assert shares[sites] == pytest.approx(together, abs=0.05)
