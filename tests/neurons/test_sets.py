import itertools
import json
import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from neuron_strategies import TABLE, members, table
from safetensors.numpy import save_file

from safety_neurons.errors import ForeignModelError, NeuronError, RunError, UsageError
from safety_neurons.neurons import HandMadeWarning, NeuronSet, Provenance, Scores, SiteInfo, SiteTable
from safety_neurons.neurons.sets import extra_variance


def pairs(neurons):
    return set(neurons)


@given(members(), members())
def test_set_algebra_is_that_of_sets_of_pairs(left, right):
    a, b = NeuronSet(left, TABLE), NeuronSet(right, TABLE)
    assert pairs(a & b) == pairs(a) & pairs(b)
    assert pairs(a | b) == pairs(a) | pairs(b)
    assert pairs(a - b) == pairs(a) - pairs(b)
    assert pairs(a ^ b) == pairs(a) ^ pairs(b)
    assert (a - a).keys() == []
    assert (a == b) == (pairs(a) == pairs(b))
    assert a != b or hash(a) == hash(b)
    assert len(a | b) + len(a & b) == len(a) + len(b)


@given(members())
def test_members_are_sorted_once_each_and_empty_keys_are_dropped(given_members):
    neurons = NeuronSet(given_members, TABLE)
    for key, indices in neurons.items():
        assert indices.dtype == np.int64
        assert indices.tolist() == sorted(set(given_members[key]))
        assert np.flatnonzero(neurons.mask(key)).tolist() == indices.tolist()
    assert len(neurons) == len(list(neurons)) == sum(neurons.counts().values())
    assert all(len(indices) for _, indices in neurons.items())


def test_a_set_cannot_be_changed():
    neurons = NeuronSet({"layers.0.q": [1, 2]})
    with pytest.raises(ValueError, match="read-only"):
        neurons["layers.0.q"][0] = 5
    with pytest.raises(ValueError, match="read-only"):
        neurons["layers.0.q"].sort()


def test_the_callers_arrays_stay_writable():
    mine = np.array([1, 2])
    neurons = NeuronSet({"layers.0.q": mine})
    mine[0] = 0
    assert list(neurons["layers.0.q"]) == [1, 2]


@pytest.mark.parametrize(
    "bad",
    [
        {"layers.0.q": [-1]},
        {"layers.0.q": [0.5]},
        {"layers.0.q": [[1]]},
        {"mlp.3": [1]},
        {"layers.0.q": [8]},
        {"layers.7.q": [0]},
    ],
)
def test_bad_members_are_refused_in_one_line(bad):
    with pytest.raises(NeuronError) as refused:
        NeuronSet(bad, TABLE)
    assert "\n" not in str(refused.value)


def test_counts_come_in_neurons_units_and_parameters():
    with_bias = table(bias=1)
    neurons = NeuronSet(
        {"layers.0.gate": [0, 1], "layers.0.down": [1], "layers.0.v": [0], "layers.0.o": [0, 2, 4]}, with_bias
    )
    assert neurons.n_neurons == 7
    assert neurons.n_parameters == 7 * 9
    assert (
        neurons.n_units == 2 + 1 + 1
    )  # Gate 0; gate and down 1; value row 0 with columns 0 and 2; column 4 (value row 2).
    assert neurons.share_of_all_neurons == 7 / with_bias.n_neurons
    assert neurons.share_of_parameters == 63 / 5000


def test_the_share_of_neurons_is_of_those_that_were_searched():
    found = Scores({"layers.1.down": np.arange(6.0)}, TABLE).top(0.5)
    assert found.share_of_neurons == 0.5
    assert NeuronSet(dict(found.items()), TABLE).share_of_neurons == 3 / TABLE.n_neurons


def test_numbers_that_need_a_table_say_so_without_one():
    with pytest.raises(NeuronError, match="site table"):
        _ = NeuronSet({"layers.0.q": [1]}).n_parameters


def test_only_keeps_the_named_sites_and_layers():
    neurons = NeuronSet.all(TABLE).only(["q", "down"], "1:")
    assert neurons.keys() == ["layers.1.q", "layers.1.down"]
    assert neurons.share_of_neurons == 1.0


@given(members(), st.integers(0, 2**40), st.integers(1, 3))
def test_random_sets_have_the_same_counts_and_keep_apart_where_they_can(chosen, seed, n):
    neurons = NeuronSet(chosen, TABLE)
    taken = parts_by_block(neurons)
    for control in neurons.random_like(seed, n=n):
        assert control.counts() == neurons.counts()
        assert control.n_units == neurons.n_units
        assert parts_by_block(control) == taken
        assert control.disjoint == (not len(control & neurons))
        if all(2 * len(indices) > TABLE[key].size for key, indices in neurons.items()):
            assert control.disjoint == (not len(neurons))
        if all(2 * sum(parts.values()) <= block_size(block) for block, parts in taken.items()):
            assert control.disjoint
            assert not units_of(control) & units_of(neurons)
        assert control.provenance.config["seed"] == seed
    assert neurons.random_like(seed, n=n) == neurons.random_like(seed, n=n)


def block_size(block, of=TABLE):
    """Units of a block, counted by hand: q and k rows, v rows with their o columns, feed-forward indices."""
    layer, part = block
    return of[f"{layer}.{ {'mlp': 'up', 'vo': 'v'}.get(part, part) }"].size


def unit_of(key, index, of=TABLE):
    """The unit of a neuron by the definition: a feed-forward index.

    A v row, and the o columns of every query head of its group.
    """
    layer, site = key.rsplit(".", 1)
    if site in ("gate", "up", "down"):
        return (layer, "mlp"), index
    if site == "o":
        info, value = of[key], of[f"{layer}.v"]
        head, place = divmod(index, info.head_dim)
        return (layer, "vo"), head // (info.n_heads // value.n_heads) * info.head_dim + place
    return (layer, "vo" if site == "v" else site), index


def units_of(neurons, of=TABLE):
    return {unit_of(key, index, of) for key, index in neurons}


def parts_by_block(neurons, of=TABLE):
    """For every block how often each make-up (neurons of one unit, by site) occurs."""
    units = {}
    for key, index in neurons:
        units.setdefault(unit_of(key, index, of), []).append(key.rsplit(".", 1)[1])
    found = {}
    for (block, _), sites in units.items():
        found.setdefault(block, Counter())[tuple(sorted(sites))] += 1
    return found


def everything_of(unit, of):
    (block, number) = unit
    return [(key, index) for key, index in NeuronSet.all(of) if unit_of(key, index, of) == (block, number)]


MOE = SiteTable(
    "MixtralForCausalLM",
    9000,
    (
        *(
            info
            for info in table(n_layers=1, heads=4, kv_heads=1).sites
            if info.key.rsplit(".", 1)[1] in "qkvo"
        ),
        *(
            SiteInfo(f"layers.0.experts.{e}.{site}", 9, 8, 0)
            for e in range(3)
            for site in ("gate", "up", "down")
        ),
        *(SiteInfo(f"layers.0.shared_expert.{site}", 7, 8, 0) for site in ("gate", "up", "down")),
    ),
)


@pytest.mark.parametrize(
    "of",
    [table(heads=8, kv_heads=2, mlp=40), table(heads=4, kv_heads=4, mlp=40), MOE],
    ids=["gqa", "mha", "experts"],
)
def test_a_control_of_whole_units_and_single_neurons_is_made_of_the_same(of):
    generator = np.random.default_rng(0)
    units = sorted(units_of(NeuronSet.all(of), of))
    for seed in range(12):
        shuffled = [units[place] for place in generator.permutation(len(units))]
        members = [pair for unit in shuffled[: len(units) // 6] for pair in everything_of(unit, of)]
        for unit in shuffled[len(units) // 6 : len(units) // 4]:
            whole = everything_of(unit, of)
            members.append(whole[generator.integers(len(whole))])
        planted = NeuronSet(
            {key: [index for name, index in members if name == key] for key, _ in members}, of
        )
        (control,) = planted.random_like(seed)
        assert control.counts() == planted.counts()
        assert control.n_units == planted.n_units == len(units) // 4
        assert parts_by_block(control, of) == parts_by_block(planted, of)
        assert control.disjoint == (not len(control & planted))
        assert control != planted


def test_neurons_are_kept_apart_wherever_that_can_be_done_with_the_units_whole():
    """Held against every way of moving the units of one small layer."""
    of = table(n_layers=1, mlp=4)
    sites = ("gate", "up", "down")
    generator = np.random.default_rng(1)
    found = Counter()
    for seed in range(150):
        held = generator.random((4, 3)) < generator.uniform(0.1, 0.9)
        neurons = NeuronSet(
            {f"layers.0.{site}": np.flatnonzero(held[:, place]) for place, site in enumerate(sites)}, of
        )
        possible = any(not (held & held[list(order)]).any() for order in itertools.permutations(range(4)))
        assert neurons.random_like(seed)[0].disjoint == possible
        found[possible] += 1
    assert min(found[True], found[False]) > 20


def test_every_unit_of_a_layer_is_as_likely_in_a_control():
    of = table(n_layers=1, heads=8, kv_heads=2, mlp=20)
    planted = NeuronSet(
        {f"layers.0.{site}": [0, 1] for site in ("gate", "up", "down")} | {"layers.0.o": [0, 9]}, of
    )
    controls = planted.random_like(0, n=1800)
    assert (of["layers.0.o"].n_heads, of["layers.0.v"].size) == (8, 4)
    for key, free in (("layers.0.down", 18), ("layers.0.o", 8)):
        counts = sum(control.mask(key).astype(int) for control in controls)
        likely = counts[counts > 0]
        assert len(likely) == free
        chance = 2 / free  # Five standard deviations either side.
        assert abs(likely - 1800 * chance).max() < 5 * np.sqrt(1800 * chance * (1 - chance))


def test_random_sets_differ_by_seed_and_number_and_cover_the_rest_evenly():
    wide = table(mlp=400)
    neurons = NeuronSet({"layers.0.down": range(100)}, wide)
    controls = [*neurons.random_like(0, n=50), *neurons.random_like(1, n=50)]
    assert len(set(controls)) == 100
    counts = sum(control.mask("layers.0.down").astype(int) for control in controls)
    assert counts[:100].sum() == 0
    assert (
        10 < counts[100:].min() <= counts.max() < 60
    )  # Binomial(100, 1/3): six standard deviations either side of 33.


def test_a_negative_seed_is_refused():
    with pytest.raises(UsageError, match="negative"):
        NeuronSet({"layers.0.q": [1]}, TABLE).random_like(-1)


@given(members())
def test_saving_and_loading_gives_the_same_set(tmp_path_factory, chosen):
    path = tmp_path_factory.mktemp("sets") / "neurons.safetensors"
    made = Provenance(
        "neurons",
        "contrast",
        ("base@1", "alïgned"),
        TABLE.fingerprint,
        "ab" * 32,
        {"top": 0.05, "layers": None},
    )
    neurons = NeuronSet(chosen, TABLE, made)
    neurons.save(path)
    for loaded in (NeuronSet.load(path), NeuronSet.load(path, TABLE), NeuronSet.load(path.parent)):
        assert loaded == neurons
        assert loaded.provenance == made
        assert loaded.table == TABLE
        assert loaded.notes == ()


def test_a_file_is_readable_by_plain_safetensors_with_a_header_of_strings(tmp_path):
    from safetensors import safe_open

    NeuronSet({"layers.0.down": [3, 1]}, TABLE).save(tmp_path / "n.safetensors")
    with safe_open(tmp_path / "n.safetensors", framework="numpy") as opened:
        assert opened.get_tensor("layers.0.down").tolist() == [1, 3]
        metadata = opened.metadata()
    wanted = {
        "schema",
        "kind",
        "method",
        "models",
        "model_fingerprint",
        "prompts_sha256",
        "config",
        "version",
        "created",
        "sites",
    }
    assert wanted <= set(metadata)
    assert metadata["kind"] == "neurons"
    assert metadata["model_fingerprint"] == TABLE.fingerprint


def test_another_architecture_is_refused(tmp_path):
    NeuronSet(
        {"layers.0.q": [1]}, TABLE, Provenance("neurons", models=("a",), model_fingerprint=TABLE.fingerprint)
    ).save(tmp_path / "n.safetensors")
    with pytest.raises(ForeignModelError, match="found on a"):
        NeuronSet.load(tmp_path / "n.safetensors", table(mlp=7))
    with pytest.raises(ForeignModelError):
        NeuronSet({"layers.0.q": [1]}, TABLE) | NeuronSet({"layers.0.q": [1]}, table(mlp=7))


def test_other_weights_of_the_same_architecture_are_noted(tmp_path):
    NeuronSet(
        {"layers.0.q": [1]}, TABLE, Provenance("neurons", models=("a",), model_fingerprint=TABLE.fingerprint)
    ).save(tmp_path / "n.safetensors")
    assert "other weights" in NeuronSet.load(tmp_path / "n.safetensors", TABLE, models=["b"]).notes[0]
    assert NeuronSet.load(tmp_path / "n.safetensors", TABLE, models=["a"]).notes == ()


def test_a_file_made_by_hand_warns_when_every_index_fits_and_is_refused_otherwise(tmp_path):
    save_file({"layers.0.q": np.array([3, 1, 3], np.int32)}, tmp_path / "fits.safetensors")
    save_file({"layers.0.q": np.array([8])}, tmp_path / "too_far.safetensors")
    with pytest.warns(HandMadeWarning, match="no fingerprint"):
        loaded = NeuronSet.load(tmp_path / "fits.safetensors", TABLE)
    assert loaded["layers.0.q"].tolist() == [1, 3]
    assert len(loaded.notes) == 1
    with pytest.raises(NeuronError, match="out of range"):
        NeuronSet.load(tmp_path / "too_far.safetensors", TABLE)
    assert len(NeuronSet.load(tmp_path / "too_far.safetensors")) == 1


def hand_made(path, arrays, **metadata):
    save_file(arrays, path, metadata=metadata)
    return path


@pytest.mark.parametrize(
    ("arrays", "metadata", "says"),
    [
        ({"layers.0.q": np.array([-2])}, {}, "negative"),
        ({"layers.0.q": np.array([1.0])}, {}, "integer"),
        ({"layers.0.q": np.array([0, 1, 1, 0, 1, 0, 0, 0])}, {}, "as a mask does"),
        ({"layers.0.q": np.array([[1]])}, {}, "one axis"),
        ({"model.layers.0.mlp": np.array([1])}, {}, "unknown key"),
        ({"layers.0.q": np.array([1])}, {"schema": "other/9"}, "schema"),
        ({"layers.0.q": np.array([1])}, {"kind": "scores"}, "expected 'neurons'"),
        ({"layers.0.q": np.array([1])}, {"config": "{"}, "damaged header"),
        ({"layers.0.q": np.array([1])}, {"models": '"a"'}, "damaged header"),
        ({"layers.0.q": np.array([1])}, {"sites": "{}"}, "damaged site table"),
        (
            {"layers.0.q": np.array([1])},
            {"sites": TABLE.to_json(), "model_fingerprint": "00"},
            "do not belong together",
        ),
        ({"layers.0.q": np.array([2**63], np.uint64)}, {}, "out of range"),
    ],
)
def test_a_bad_file_is_refused_in_one_line(tmp_path, arrays, metadata, says):
    path = hand_made(tmp_path / "n.safetensors", arrays, **metadata)
    with pytest.raises(NeuronError, match=says) as refused:
        NeuronSet.load(path)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"not a file of tensors",
        b"\xff" * 64,
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
    ],
)
def test_a_damaged_file_is_refused(tmp_path, content):
    (tmp_path / "n.safetensors").write_bytes(content)
    with pytest.raises(NeuronError, match="expected"):
        NeuronSet.load(tmp_path / "n.safetensors")


def test_every_truncation_of_a_file_is_refused(tmp_path):
    path = tmp_path / "n.safetensors"
    NeuronSet({"layers.0.q": [1, 2, 3]}, TABLE).save(path)
    whole = path.read_bytes()
    for end in [*range(0, len(whole) - 1, 97), len(whole) - 1]:
        path.write_bytes(whole[:end])
        with pytest.raises(NeuronError):
            NeuronSet.load(path)


def test_a_missing_file_and_a_folder_without_one_are_named(tmp_path):
    with pytest.raises(NeuronError, match="no file"):
        NeuronSet.load(tmp_path / "nowhere.safetensors")
    with pytest.raises(NeuronError, match="neurons.safetensors"):
        NeuronSet.load(tmp_path)


def test_a_place_that_cannot_be_written_is_named_and_the_old_file_stays(tmp_path, monkeypatch):
    path = tmp_path / "n.safetensors"
    NeuronSet({"layers.0.q": [1]}, TABLE).save(path)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(RunError, match="No space left"):
        NeuronSet({"layers.0.q": [2]}, TABLE).save(path)
    assert NeuronSet.load(path)["layers.0.q"].tolist() == [1]
    assert [entry.name for entry in tmp_path.iterdir()] == ["n.safetensors"]


def test_the_provenance_of_algebra_names_both_sides():
    a = Scores(
        {"layers.0.down": np.arange(6.0)}, TABLE, Provenance("scores", "contrast", ("m",), TABLE.fingerprint)
    ).top(0.5)
    b = NeuronSet(
        {"layers.0.down": [5]}, TABLE, Provenance("neurons", "importance", ("m",), TABLE.fingerprint)
    )
    made = (a - b).provenance
    assert made.method == "contrast - importance"
    assert made.config["left"]["n_neurons"] == 3
    assert json.loads(made.metadata()["config"])["operation"] == "-"


def test_the_notebook_table_is_escaped_and_fetches_nothing():
    hostile = Provenance(
        "neurons",
        "<script>alert(1)</script>",
        ("<img src=x>",),
        TABLE.fingerprint,
        "",
        {"sites": 7, "layers": "x"},
    )
    shown = NeuronSet({"layers.0.q": [1]}, TABLE, hostile)
    assert "<script" not in shown._repr_html_()
    assert "<img" not in shown._repr_html_()
    assert "http" not in shown._repr_html_()
    assert "q 1" in repr(shown)
    assert repr(NeuronSet({})) == "NeuronSet(0 neurons)"


@pytest.mark.parametrize("forced", [False, True])
@pytest.mark.parametrize("sizes", [(1,), (2,), (3,), (5,), (1, 3), (2, 5)])
def test_a_set_differs_from_random_ones_that_keep_clear_of_it_by_as_much_as_is_said(sizes, forced):
    """Over every set of so many of seven units in each layer and everything that may be drawn beside it."""
    weights, apart, among = np.random.default_rng(0).normal(size=7), 0.0, 0.0
    for size in sizes:
        every = [frozenset(one) for one in itertools.combinations(range(7), size)]
        for mine in every:
            if 2 * size <= 7:
                drawn = [one for one in every if not one & mine]
            else:
                drawn = [one for one in every if not forced or one | mine == set(range(7))]
            sums = [weights[list(one)].sum() for one in drawn]
            among += np.var(sums) / len(every)
            apart += (weights[list(mine)].sum() - np.mean(sums)) ** 2 / len(every)
    found = extra_variance([(size, 7) for size in sizes], forced=forced)
    assert found == pytest.approx(apart / among)


def test_a_random_set_says_how_much_the_set_may_differ_from_it():
    table = SiteTable("M", 1, tuple(SiteInfo(f"layers.{layer}.down", 10, 1, 0) for layer in range(2)))
    neurons = NeuronSet({"layers.0.down": range(3), "layers.1.down": range(4)}, table)
    assert neurons.random_like(0)[0].extra_variance == pytest.approx(extra_variance([(3, 10), (4, 10)]))
    assert neurons.extra_variance == 1.0


def test_random_sets_that_keep_clear_of_half_are_one_and_the_same(tmp_path):
    table = SiteTable("M", 1, (SiteInfo("layers.0.down", 10, 1, 0), SiteInfo("layers.1.down", 10, 1, 0)))
    half = NeuronSet({"layers.0.down": range(5)}, table)
    assert half.random_like(0)[0] == half.random_like(1)[0]
    assert half.random_like(0)[0].extra_variance == math.inf
    half.random_like(0)[0].save(tmp_path / "n.safetensors")
    assert NeuronSet.load(tmp_path / "n.safetensors").extra_variance == math.inf
    assert NeuronSet({"layers.0.down": range(10)}, table).random_like(0)[0].extra_variance == 1.0  # itself
