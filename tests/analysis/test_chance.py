"""Chance: draws against enumeration and simulation, units that count once, and sets under names."""

import importlib
import itertools

import numpy as np
import pytest
import scipy.stats
from analysed_sets import random_scores, random_set, small_table

from safety_neurons.analysis import Named, languages, layers, name_sets, overlap, read_named
from safety_neurons.analysis.chance import (
    Clumps,
    Counts,
    Expectation,
    beside,
    hypergeometric,
    mean_of_draw,
    of_draws,
    simulated,
    total,
)
from safety_neurons.errors import ForeignModelError, NeuronError, UsageError
from safety_neurons.neurons import NeuronSet, Provenance, Scores, SiteInfo, SiteTable


@pytest.mark.parametrize(
    ("population", "marked", "drawn"),
    [(10, 4, 3), (500, 40, 25), (1_700_000, 17_000, 85_000), (7, 7, 5), (9, 5, 8)],
)
def test_the_distribution_is_the_hypergeometric_one(population, marked, drawn):
    found = hypergeometric(population, marked, drawn)
    exact = scipy.stats.hypergeom(population, marked, drawn)
    assert found.weights == pytest.approx(exact.pmf(found.values), rel=1e-6, abs=1e-14)
    assert found.mean == pytest.approx(marked * drawn / population)
    expected = found.expectation()
    assert (expected.low, expected.high) == tuple(exact.ppf([0.025, 0.975]))
    middle = int(found.mean)
    assert found.at_least(middle) == pytest.approx(exact.sf(middle - 1))
    assert found.at_least(found.start) == pytest.approx(1)


def test_more_marked_than_there_are_is_refused():
    with pytest.raises(UsageError, match="at most as many"):
        hypergeometric(5, 6, 1)


def test_a_sum_of_counts_is_that_of_every_pair_of_draws():
    parts = [(5, 2, 3), (6, 3, 2)]
    tally: dict[int, float] = {}
    draws = [list(itertools.combinations(range(population), drawn)) for population, _, drawn in parts]
    for first, second in itertools.product(*draws):
        shared = sum(place < parts[0][1] for place in first) + sum(place < parts[1][1] for place in second)
        tally[shared] = tally.get(shared, 0) + 1 / (len(draws[0]) * len(draws[1]))
    found = total(hypergeometric(*part) for part in parts)
    assert dict(zip(found.values.tolist(), found.weights, strict=True)) == pytest.approx(tally)
    assert total([]).mean == 0


def test_expectations_go_through_functions_that_rise():
    counts = Counts(2, np.array([0.25, 0.5, 0.25]))
    found = counts.expectation(lambda values: values / 10)
    assert (found.expected, found.low, found.high) == pytest.approx((0.3, 0.2, 0.4))
    assert [found.verdict(value) for value in (0.1, 0.2, 0.4, 0.41)] == [
        "fewer",
        "as chance",
        "as chance",
        "more",
    ]
    assert beside(0.5, found) == {
        "value": 0.5,
        "expected": found.expected,
        "low": 0.2,
        "high": 0.4,
        "verdict": "more",
    }


def test_the_mean_of_a_draw_has_the_spread_of_draws_without_replacement():
    values, counts, drawn = np.array([0.0, 0.5, 1.0]), np.array([30.0, 10.0, 20.0]), 15
    found = mean_of_draw(values, counts, drawn)
    generator = np.random.default_rng(0)
    urn = np.repeat(values, counts.astype(int))
    simulated = of_draws(np.array([generator.choice(urn, drawn, replace=False).mean() for _ in range(4000)]))
    assert found.expected == pytest.approx(simulated.expected, abs=0.01)
    assert (found.low, found.high) == pytest.approx((simulated.low, simulated.high), abs=0.03)
    everything = mean_of_draw(values, counts, 60)
    assert everything.low == everything.high == pytest.approx(urn.mean())


def test_of_draws_keeps_the_middle_ninety_five_per_cent():
    assert of_draws(np.arange(1001.0)) == Expectation(500.0, 25.0, 975.0)


NOMINAL, ALLOWED = 0.05, 0.07


def model(n_layers=4, heads=4, kv_heads=2, head_dim=4, mlp=40):
    """Grouped query attention, and more feed-forward neurons than others, as in most models."""
    sizes = {"q": (heads, heads), "k": (kv_heads, kv_heads), "v": (kv_heads, kv_heads), "o": (heads, heads)}
    sites = []
    for layer in range(n_layers):
        sites += [
            SiteInfo(f"layers.{layer}.{site}", n * head_dim, 16, 0, h, head_dim)
            for site, (n, h) in sizes.items()
        ]
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
    """Feed-forward units have one score, attention neurons one each: importance under grouped query
    attention.
    """
    whole, single = as_units(generator, sites), alone(generator, sites)
    return {key: (whole if key.rsplit(".", 1)[1] in ("gate", "up", "down") else single)[key] for key in whole}


def mixed(generator, sites):
    """Half of the units have one score, the neurons of the others one each."""
    whole, single, numbers = as_units(generator, sites), alone(generator, sites), TABLE.units()
    together = generator.random(1 + max(int(part.max()) for part in numbers.values())) < 0.5
    return {key: np.where(together[numbers[key]], whole[key], single[key]) for key in whole}


MADE = (alone, as_units, in_part, mixed)


def drawn(made, seed, sites=None, count=60):
    scores = Scores(
        made(np.random.default_rng(seed), sites),
        TABLE,
        Provenance("scores", "drawn", model_fingerprint=TABLE.fingerprint),
    )
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
    """The family of each kind of verdict stays below what is allowed, three standard errors of a simulation
    of this size granted.
    """
    for path, (share, _) in shares.items():
        assert share <= ALLOWED + 3 * np.sqrt(NOMINAL * (1 - NOMINAL) / runs), (path, shares)
    everything = sum(share * number for share, number in shares.values()) / sum(
        number for _, number in shares.values()
    )
    assert everything <= ALLOWED, shares


@pytest.fixture(autouse=True)
def fewer_draws(monkeypatch):
    for name, draws in (("DRAWS", 500), ("LANGUAGE_DRAWS", 500), ("RANK_DRAWS", 40)):
        monkeypatch.setattr(importlib.import_module("safety_neurons.analysis.overlap"), name, draws)


CASES = [*((made, None) for made in MADE), (as_units, ("gate", "up", "down")), (as_units, ("v", "o"))]


def test_layers_calls_random_sets_as_chance():
    held(
        flagged([layers(drawn(made, seed, sites)).record() for made, sites in CASES for seed in range(15)]),
        15 * len(CASES),
    )


def test_overlap_calls_unrelated_sets_as_chance():
    pairs = [
        [drawn(made, 2 * seed + one, sites) for one in (0, 1)] for made, sites in CASES for seed in range(10)
    ]
    held(flagged([overlap(pair).record() for pair in pairs]), 10 * len(CASES))


def test_languages_calls_unrelated_sets_as_chance():
    def three(made, seed):
        return {f"{one}": drawn(made, 3 * seed + one, count=150).neurons for one in range(3)}

    held(
        flagged([languages(three(made, seed)).record() for made in (alone, as_units) for seed in range(12)]),
        24,
    )


@pytest.mark.parametrize("made", [as_units, mixed, alone])
def test_simulated_sets_share_what_sets_moved_by_hand_share(made):
    """The units of every layer are moved at random, unit by unit, without the code under test."""
    sites = ("gate", "up", "down")
    sets = [drawn(made, seed, sites, count=200).neurons for seed in (1, 2, 3)]
    table, generator = TABLE.select(sites), np.random.default_rng(0)
    first, second, third = (
        np.array([[part.mask(f"layers.{n}.{site}") for site in sites] for n in range(4)]) for part in sets
    )
    by_hand = {True: [], False: []}
    for _ in range(800):
        one, other = (
            np.stack([layer[:, generator.permutation(40)] for layer in part]) for part in (second, third)
        )
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


SMALL = small_table()


@pytest.fixture
def runs(tmp_path):
    scores = random_scores(SMALL, 1)
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        scores.count(9).save(tmp_path / name / "neurons.safetensors")
        scores.save(tmp_path / name / "scores.safetensors")
    return tmp_path


def test_a_find_run_brings_set_and_scores_and_its_folder_is_its_name(runs):
    items = read_named(
        [str(runs / "first"), f"other={runs / 'second'}", str(runs / "second" / "neurons.safetensors")]
    )
    assert [item.name for item in items] == ["first", "other", "second"]
    assert [len(item.neurons) for item in items] == [9, 9, 9]
    assert [item.scores is None for item in items] == [False, False, True]


def test_runs_of_one_name_are_called_by_their_paths(runs):
    items = read_named([str(runs / "first"), str(runs / "first" / "scores.safetensors")], count=3)
    assert [item.name for item in items] == [str(runs / "first"), str(runs / "first" / "scores.safetensors")]


def test_scores_give_sets_of_any_size(runs):
    (item,) = read_named([str(runs / "first" / "scores.safetensors")], count=4)
    assert len(item.neurons) == 4
    assert item.neurons == random_scores(SMALL, 1).count(4)
    (item,) = read_named([str(runs / "first")], top=0.1)
    assert len(item.neurons) == round(0.1 * SMALL.n_neurons)
    with pytest.raises(UsageError, match="top or count"):
        read_named([str(runs / "first" / "scores.safetensors")])


def test_what_does_not_belong_together_is_refused(runs, tmp_path):
    with pytest.raises(UsageError, match="called 'a'"):
        name_sets([("a", random_set(SMALL, 0.1, 1)), ("a", random_set(SMALL, 0.1, 2))])
    with pytest.raises(ForeignModelError, match="one architecture"):
        name_sets([("a", random_set(SMALL, 0.1, 1)), ("b", random_set(small_table(2), 0.1, 2))])
    with pytest.raises(NeuronError, match="no file or folder"):
        read_named([str(tmp_path / "nowhere")])
    with pytest.raises(UsageError, match="both|together"):
        read_named([str(runs / "first")], top=0.1, count=3)
    with pytest.raises(UsageError, match="at least one"):
        read_named([])
    (tmp_path / "text.safetensors").write_text("not a file of neurons")
    with pytest.raises(NeuronError, match="cannot read"):
        read_named([str(tmp_path / "text.safetensors")])


def test_sets_that_are_looked_at_one_by_one_may_be_of_any_architecture(runs):
    random_set(small_table(2), 0.1, 2).save(runs / "shallow.safetensors")
    specs = [str(runs / "first"), str(runs / "shallow.safetensors")]
    with pytest.raises(ForeignModelError):
        read_named(specs)
    assert [item.table.n_layers for item in read_named(specs, together=False)] == [3, 2]


def test_a_set_made_by_hand_is_put_on_the_table_of_the_others():
    by_hand = NeuronSet({"layers.0.down": [1]})
    items = name_sets([("hand", by_hand), ("found", random_set(SMALL, 0.1, 1))])
    assert items[0].table.fingerprint == SMALL.fingerprint
    with pytest.raises(NeuronError, match="no set knows"):
        name_sets([("hand", by_hand)])
    with pytest.raises(NeuronError, match="out of range"):
        name_sets([("hand", NeuronSet({"layers.0.down": [99]})), ("found", random_set(SMALL, 0.1, 1))])
