"""Files of other projects: read right, and never run."""

import numpy as np
import pytest

from safety_neurons.errors import ForeignModelError, NeuronError
from safety_neurons.neurons import NeuronSet, SiteInfo, SiteTable, foreign

HEAD, GROUP = 8, 2
TABLE = SiteTable(
    "Tiny",
    10_000,
    tuple(
        SiteInfo(f"layers.{layer}.{site}", size, 32, 0, heads, HEAD if heads else 0)
        for layer in range(2)
        for site, size, heads in (
            ("q", 32, 4),
            ("k", 16, 2),
            ("v", 16, 2),
            ("o", 32, 4),
            ("gate", 48, 0),
            ("up", 48, 0),
            ("down", 48, 0),
        )
    ),
)


def five(tmp_path, up="{0: {1, 2}}", down="{0: {1, 2}}", q="{}", k="{}", v="{}"):
    path = tmp_path / "neurons.txt"
    path.write_text("\n".join((up, down, q, k, v)) + "\n", encoding="utf-8")
    return path


def test_both_spellings_of_integers_give_the_same_set(tmp_path):
    plain = foreign.read_sn_tune(five(tmp_path, up="{0: {3, 1}, 1: set()}", q="{1: {31}}"), TABLE)
    other = foreign.read_sn_tune(
        five(tmp_path, up="{0: {np.int64(3), np.int64(1)}, 1: set()}", q="{ 1 : [ numpy.int64(31) , ] }"),
        TABLE,
    )
    assert plain == other
    assert plain["layers.0.up"].tolist() == [1, 3]
    assert plain["layers.0.down"].tolist() == [1, 2]
    assert plain["layers.1.q"].tolist() == [31]
    assert plain.provenance.method == "sn-tune"


def test_indices_over_query_heads_become_the_row_their_head_reads(tmp_path):
    path = five(tmp_path, v="{0: {" + ", ".join(str(index) for index in range(32)) + "}}", k="{1: {9}}")
    heads = foreign.read_sn_tune(path, TABLE)
    assert heads["layers.1.k"].tolist() == [1]  # head 1, feature 1: reads key-value head 0
    for index in range(32):
        head, feature = divmod(index, HEAD)
        row = foreign.read_sn_tune(five(tmp_path, v=f"{{0: {{{index}}}}}"), TABLE)["layers.0.v"].tolist()
        assert row == [head // GROUP * HEAD + feature]
    published = [
        foreign.read_sn_tune(five(tmp_path, v=f"{{0: {{{i}}}}}"), TABLE, kv="published")["layers.0.v"][0]
        for i in range(32)
    ]
    assert published == [index // GROUP for index in range(32)]
    right = [published[index] == index // HEAD // GROUP * HEAD + index % HEAD for index in range(32)]
    assert sum(right) < 8  # the public mapping hits few of the rows
    with pytest.raises(ForeignModelError, match="another model"):
        foreign.read_sn_tune(path, TABLE, kv="rows")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{0: {__import__('os').system('touch hit')}}", "not a number"),
        ("{0: {1, 2}} or exec('1')", "not a number"),
        ("{0: {1}, 0: {2}}", "appears twice"),
        ("{0: {1", "ends in the middle"),
        ("{0: 1}", "where a set of indices"),
        ("{0: {-1}}", "not a number"),
        ("{0: {1}} {1: {2}}", "more behind"),
        ("[1, 2]", "was expected"),
    ],
)
def test_text_that_is_not_a_printed_dictionary_is_refused_in_one_line(tmp_path, line, said):
    with pytest.raises(NeuronError, match=said) as caught:
        foreign.read_sn_tune(five(tmp_path, up=line), TABLE)
    assert "\n" not in str(caught.value)


def test_other_models_and_other_files_are_refused(tmp_path):
    for options in ({"up": "{0: {48}}"}, {"q": "{5: {1}}"}, {"k": "{0: {32}}"}):
        with pytest.raises(ForeignModelError, match="another model"):
            foreign.read_sn_tune(five(tmp_path, **options), TABLE)
    short = tmp_path / "short.txt"
    short.write_text("{}\n{}\n")
    with pytest.raises(NeuronError, match="has 2 lines, expected five"):
        foreign.read_sn_tune(short, TABLE)
    with pytest.raises(NeuronError, match="cannot read"):
        foreign.read_sn_tune(tmp_path / "nowhere.txt", TABLE)
    binary = tmp_path / "binary.txt"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(NeuronError, match="expected a text file"):
        foreign.read_sn_tune(binary, TABLE)


def test_change_scores_keep_their_order_and_damaged_ranks_are_found():
    values = np.random.default_rng(0).random((2, 48)).astype(np.float32)
    order = np.argsort(-values.ravel())
    ranks = np.stack(np.unravel_index(order, values.shape), 1)
    scores = foreign.change_scores((values, ranks, None, None, None, None), TABLE)
    chosen = scores.count(5)
    assert {(f"layers.{layer}.down", int(index)) for layer, index in ranks[:5]} == set(chosen)
    with pytest.raises(NeuronError, match="do not go down"):
        foreign.change_scores((values, ranks[::-1]), TABLE)
    with pytest.raises(NeuronError, match="points outside"):
        foreign.change_scores((values, ranks + 48), TABLE)
    with pytest.raises(ForeignModelError, match="another model"):
        foreign.change_scores((values[:, :40], ranks[:0]), TABLE)
    with pytest.raises(NeuronError, match="not a tuple"):
        foreign.change_scores({"a": 1}, TABLE)


def test_probe_weights_become_signed_z_scores():
    draws = np.random.default_rng(0)
    content = {
        "model.layers.0.mlp.gate_proj": draws.normal(size=48).astype(np.float32),
        "model.layers.1.mlp.gate_up_proj": draws.normal(size=96),
        "vision_tower.layers.0.mlp.up_proj": draws.normal(size=7),
        "model.upper": [1.0],
    }
    scores = foreign.probe_scores(content, TABLE)
    assert set(scores.keys()) == {"layers.0.gate", "layers.1.gate", "layers.1.up"}
    weights = content["model.layers.0.mlp.gate_proj"].astype(np.float64)
    expected = np.sign(weights) * np.abs((weights - weights.mean()) / weights.std())
    np.testing.assert_allclose(scores["layers.0.gate"], expected, rtol=1e-5)
    fused = content["model.layers.1.mlp.gate_up_proj"]
    assert np.sign(scores["layers.1.up"]).tolist() == np.sign(fused[48:]).tolist()
    taken = scores.threshold(2.0)["layers.0.gate"]
    assert (
        taken.tolist()
        == np.flatnonzero((np.abs((weights - weights.mean()) / weights.std()) > 2) & (weights > 0)).tolist()
    )


def test_probe_weights_of_another_form_are_refused():
    nested = [1.0]
    for _ in range(60):
        nested = [nested, nested]  # a small file can nest lists without end; they are not walked
    for name, weights in (
        ("mlp.gate_up_proj", np.ones(95)),
        ("mlp.up_proj", ["a"]),
        ("mlp.up_proj", nested),
        ("mlp.up_proj", [10**400]),
        ("mlp.up_proj", np.ones(())),
    ):
        with pytest.raises((NeuronError, ForeignModelError)):
            foreign.probe_scores({f"model.layers.0.{name}": weights}, TABLE)
    with pytest.raises(NeuronError, match="twice"):
        foreign.probe_scores(
            {f"{model}.layers.0.mlp.up_proj": np.ones(48) for model in ("one", "two")}, TABLE
        )
    with pytest.raises(NeuronError, match="not a mapping"):
        foreign.probe_scores([1], TABLE)
    with pytest.raises(NeuronError, match="names no projection"):
        foreign.probe_scores({"lm_head": np.zeros(3)}, TABLE)
    assert set(foreign.probe_scores({"model.layers.0.self_attn.q_proj": np.arange(32.0)}, TABLE).keys()) == {
        "layers.0.q"
    }


@pytest.mark.parametrize(
    "line",
    [
        "{0: {0000000001}}",
        "{0: {1,000}}",
        "{0: {1,024}}",
        "{0: {np.int64(01)}}",
        "{00: {1}}",
        "{0: {1 2}}",
        "{0: {1} 1: {2}}",
        "{0: {٣}}",
        "{0: {1,,2}}",
    ],
)
def test_numbers_that_another_reader_would_not_read_so_are_refused(tmp_path, line):
    with pytest.raises(NeuronError):
        foreign.read_sn_tune(five(tmp_path, up=line), TABLE)


def test_weights_become_shares_of_rows_and_columns_and_masks_are_taken_as_they_are():
    draws = np.random.default_rng(0)
    safety = {
        "model.layers.0.mlp.down_proj": draws.random((32, 48)),
        "model.layers.1.self_attn.q_proj": draws.random((32, 32)),
    }
    utility = {name: draws.random(values.shape) for name, values in safety.items()}
    scores = foreign.weight_scores(safety, utility, TABLE, shares=(0.25, 0.1))
    for name, key, flip in zip(safety, ("layers.0.down", "layers.1.q"), (True, False), strict=True):
        cut = np.sort(safety[name].ravel())[-round(0.25 * safety[name].size)]
        other = np.sort(utility[name].ravel())[-round(0.1 * utility[name].size)]
        kept = (safety[name] >= cut) & (utility[name] < other)
        np.testing.assert_allclose(scores[key], kept.mean(0 if flip else 1), atol=1e-6)
    mask = {name: values > 0.5 for name, values in safety.items()}
    np.testing.assert_allclose(
        foreign.weight_scores(mask, None, TABLE)["layers.0.down"],
        mask["model.layers.0.mlp.down_proj"].mean(0),
        atol=1e-6,
    )
    for kind in (np.float32, np.int8):  # as most tools store them
        stored = {name: values.astype(kind) for name, values in mask.items()}
        assert foreign.weight_scores(stored, stored, TABLE)["layers.0.down"].max() == 0
        assert foreign.weight_scores(stored, None, TABLE) == foreign.weight_scores(mask, None, TABLE)
    nothing = {name: np.zeros_like(values) for name, values in safety.items()}  # as of layers that are pruned
    assert foreign.weight_scores(safety, nothing, TABLE) == foreign.weight_scores(safety, None, TABLE)
    assert foreign.weight_scores(nothing, utility, TABLE) == foreign.weight_scores(nothing, None, TABLE)
    with pytest.raises(NeuronError, match="a mask in one of the files"):
        foreign.weight_scores(mask, utility, TABLE)
    with pytest.raises(NeuronError, match="in each of the two"):
        foreign.weight_scores(safety, {}, TABLE)
    with pytest.raises(ForeignModelError, match="another model"):
        foreign.weight_scores({"model.layers.0.mlp.up_proj": np.zeros((40, 32))}, None, TABLE)


@pytest.mark.parametrize("site", ["q", "k", "o", "up", "down"])
def test_matrices_that_are_transposed_doubled_or_not_finite_are_refused(site):
    part = "mlp" if site in ("up", "down") else "self_attn"
    info = TABLE[f"layers.0.{site}"]
    name, shape = f"model.layers.0.{part}.{site}_proj", (info.size, info.weights_per_neuron)
    right = np.random.default_rng(0).random(shape[::-1] if site in ("o", "down") else shape)
    assert len(foreign.weight_scores({name: right}, None, TABLE)) == info.size
    for wrong in (
        np.ones((info.size, 31)),
        np.ones((31, info.size)),
        *([] if shape[0] == shape[1] else [right.T]),
    ):
        with pytest.raises(ForeignModelError, match="another model's, or transposed"):
            foreign.weight_scores({name: wrong}, None, TABLE)
    with pytest.raises(NeuronError, match="two matrices"):
        foreign.weight_scores({name: right, f"{name}.weight": right}, None, TABLE)
    with pytest.raises(NeuronError, match="NaN"):
        foreign.weight_scores({name: np.where(right > 0.5, np.nan, right)}, None, TABLE)
    seen = f"vision_tower.encoder.layers.0.{part}.{site}_proj"
    both = foreign.weight_scores({name: right, seen: right[:3, :3]}, None, TABLE)
    assert both == foreign.weight_scores({name: right}, None, TABLE)


def test_change_scores_of_fewer_layers_are_another_models():
    values = np.sort(np.random.default_rng(0).random((1, 48)))[:, ::-1]
    ranks = np.stack([np.zeros(48, int), np.arange(48)], 1)
    with pytest.raises(ForeignModelError, match="change scores of 1 layer, and the model has 2"):
        foreign.change_scores((values, ranks), TABLE)


def test_transformer_lens_hooks_hold_the_neurons_where_they_are_in_its_activations():
    neurons = NeuronSet(
        {
            "layers.0.down": [3],
            "layers.0.up": [4],
            "layers.1.gate": [5],
            "layers.1.q": [0, 17],
            "layers.1.o": [31],
        },
        TABLE,
    )
    assert foreign.transformer_lens_names(neurons) == {
        "blocks.0.mlp.hook_post": [3],
        "blocks.0.mlp.hook_pre_linear": [4],
        "blocks.1.mlp.hook_pre": [5],
        "blocks.1.attn.hook_q": [[0, 0], [2, 1]],
        "blocks.1.attn.hook_z": [[3, 7]],
    }
    plain = SiteTable("Plain", 10, (SiteInfo("layers.0.up", 48, 32, 0, 0, 0),))
    assert list(foreign.transformer_lens_names(NeuronSet({"layers.0.up": [1]}, plain))) == [
        "blocks.0.mlp.hook_pre"
    ]
    with pytest.raises(NeuronError, match="no site table"):
        foreign.transformer_lens_names(NeuronSet({"layers.0.q": [1]}))


def test_a_byte_order_mark_is_no_part_of_a_printed_dictionary(tmp_path):
    path = five(tmp_path, up="{0: {1}}", down="{}")
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert foreign.read_sn_tune(path, TABLE).counts() == {"layers.0.up": 1}


UP = "model.layers.0.mlp.up_proj"


def test_matrices_of_two_numbers_are_masks_or_refused():
    draws = np.random.default_rng(0).random((48, 32))
    mask = draws > 0.95
    wanted = foreign.weight_scores({UP: mask}, None, TABLE)
    for other in (mask * 0.5, (mask * 255).astype(np.uint8), mask * -1.0):
        assert foreign.weight_scores({UP: other}, None, TABLE) == wanted
        assert not foreign.weight_scores({UP: mask}, {UP: other}, TABLE)["layers.0.up"].any()
    for wrong in (np.where(mask, 1, -1), np.full(mask.shape, 0.3)):
        with pytest.raises(NeuronError, match="holds"):
            foreign.weight_scores({UP: wrong}, None, TABLE)
    assert wanted.notes == ("the file names 1 layer of 2",)
    assert "marks 95% of the weights" in foreign.weight_scores({UP: ~mask}, None, TABLE).notes[-1]


def test_among_equal_numbers_their_place_chooses_none():
    draws = np.random.default_rng(0).random((48, 32))
    few = np.where(draws > 0.99, draws, 0.0)  # fewer than the share: what is 0 is never among the largest
    found = foreign.weight_scores({UP: few}, None, TABLE)["layers.0.up"]
    np.testing.assert_allclose(found, (few > 0).mean(1), atol=1e-6)
    with pytest.raises(NeuronError, match="holds 3 .* times, and the 5.00% that count are 77"):
        foreign.weight_scores({UP: np.floor(draws * 4)}, None, TABLE)
    rounded = draws.astype(np.float16)  # a few equal numbers at the cut are no matter
    assert foreign.weight_scores({UP: rounded}, None, TABLE)["layers.0.up"].any()


def test_what_is_left_out_of_a_file_is_said():
    draws = np.random.default_rng(0).random((48, 32))
    others = {
        "model.layers.0.self_attn.qkv_proj": draws,
        "mtp.layers.0.mlp.up_proj": draws,
        "model.norm": draws[0],
    }
    found = foreign.weight_scores({UP: draws, **others}, {UP: draws, "lm_head": draws}, TABLE)
    assert found.notes[0].startswith("left out 4 tensors of other kinds (lm_head, ")
    with pytest.raises(NeuronError, match="expected one matrix"):
        foreign.weight_scores({UP: draws.ravel()}, None, TABLE)
    probe = foreign.probe_scores({UP: draws[:, 0], "audio_tower.layers.0.self_attn.q_proj": draws[0]}, TABLE)
    assert list(probe) == ["layers.0.up"]
    assert probe.notes[0].startswith("left out 1 tensor of other kinds (audio_tower")


def test_masks_in_the_place_of_indices_or_weights_are_refused(tmp_path):
    mask = np.arange(48) % 5 == 0
    with pytest.raises(NeuronError, match="48 numbers that are all 0 or 1, as a mask"):
        foreign.read_sn_tune(five(tmp_path, up=f"{{0: {mask.astype(int).tolist()}}}"), TABLE)
    for weights in (mask, mask.tolist(), np.where(mask, 1.0, -1.0)):
        with pytest.raises(NeuronError, match="two numbers alone"):
            foreign.probe_scores({UP: weights}, TABLE)


def test_counting_from_one_is_named_where_it_shows(tmp_path):
    from_one = {"up": "{1: {3}, 2: {5}}", "down": "{2: {4}}"}
    with pytest.raises(ForeignModelError, match="or counts layers from 1"):
        foreign.read_sn_tune(five(tmp_path, **from_one), TABLE)
    with pytest.raises(ForeignModelError, match="or counts indices from 1"):
        foreign.read_sn_tune(five(tmp_path, up="{0: {1, 48}}"), TABLE)
    with pytest.raises(ForeignModelError, match="another model's$"):
        foreign.read_sn_tune(five(tmp_path, up="{0: {0, 48}}"), TABLE)
