"""Names of matrices, the table of a model's, and files with their provenance."""

import dataclasses
import pathlib

import numpy as np
import pytest
from neuron_strategies import TABLE, table

from safety_neurons.errors import NeuronError, UsageError
from safety_neurons.neurons import (
    NeuronSet,
    Provenance,
    SiteInfo,
    SiteTable,
    check_sites,
    parse_key,
    parse_layers,
    sort_keys,
)


def test_the_fingerprint_knows_the_class_and_every_size_but_not_the_number_of_parameters():
    assert table().fingerprint == table(n_parameters=1).fingerprint
    others = [table(architecture="Other"), table(mlp=7), table(kv_heads=1), table(n_layers=3), table(bias=1)]
    assert len({TABLE.fingerprint, *(other.fingerprint for other in others)}) == 6


def test_the_order_in_which_sites_are_given_does_not_matter():
    assert SiteTable("LlamaForCausalLM", 5000, tuple(reversed(TABLE.sites))) == TABLE


def test_a_key_named_twice_is_refused():
    with pytest.raises(NeuronError, match="twice"):
        SiteTable("L", 1, (TABLE.sites[0], TABLE.sites[0]))


def test_json_and_back_gives_the_same_table():
    assert SiteTable.from_json(TABLE.to_json()) == TABLE


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}",
        "[]",
        '{"architecture": "L", "n_parameters": 1, "fields": ["size"], "sites": {"layers.0.q": [3]}}',
        "nul",
    ],
)
def test_a_damaged_table_is_refused(text):
    with pytest.raises(NeuronError):
        SiteTable.from_json(text)


def test_selecting_keeps_the_named_sites_and_layers():
    assert TABLE.select(["down", "q"], "1:").keys == ("layers.1.q", "layers.1.down")
    assert TABLE.select().keys == TABLE.keys


def test_selecting_nothing_is_an_error():
    with pytest.raises(NeuronError, match="choose others"):
        TABLE.select(["down"]).select(["q"])


def test_gate_up_and_down_of_one_index_are_one_unit():
    units = TABLE.units()
    assert np.array_equal(units["layers.1.gate"], units["layers.1.down"])
    assert np.array_equal(units["layers.1.gate"], units["layers.1.up"])
    assert not set(units["layers.0.gate"]) & set(units["layers.1.gate"])


def test_a_value_row_and_the_output_columns_of_its_group_are_one_unit():
    units = (
        TABLE.units()
    )  # 4 query heads and 2 key-value heads of size 2: output columns 0 to 3 read value rows 0 and 1, twice.
    value, output = units["layers.0.v"], units["layers.0.o"]
    assert output.tolist() == [value[row] for row in (0, 1, 0, 1, 2, 3, 2, 3)]


def test_queries_and_keys_are_units_of_their_own():
    units = TABLE.units()
    everything = np.concatenate([units[key] for key in TABLE.keys])
    assert len(set(units["layers.0.q"]) | set(units["layers.0.k"])) == 12
    assert len(np.unique(everything)) == 2 * (8 + 4 + 4 + 6)
    assert everything.max() == len(np.unique(everything)) - 1


def test_experts_have_units_of_their_own():
    sites = tuple(
        SiteInfo(f"layers.0.experts.{expert}.{site}", 3, 4, 0)
        for expert in range(2)
        for site in ("gate", "up", "down")
    )
    units = SiteTable("M", 1, sites).units()
    assert units["layers.0.experts.0.up"].tolist() == [0, 1, 2]
    assert units["layers.0.experts.1.down"].tolist() == [3, 4, 5]


def test_an_unknown_key_is_named():
    with pytest.raises(NeuronError, match=r"layers\.9\.q"):
        TABLE["layers.9.q"]
    assert "layers.0.q" in TABLE
    assert dataclasses.is_dataclass(TABLE["layers.0.q"])


DEEP = "[" * 5000 + "]" * 5000


@pytest.mark.parametrize(
    "size",
    ["1e400", "9" * 5000, str(2**63), str(2**40), "-1", '"8"', "1.5", "true", "null", "NaN", "[1]", DEEP],
    ids=lambda text: text[:12],
)
@pytest.mark.parametrize("where", ["size", "n_parameters"])
def test_a_header_with_other_than_sizes_is_a_neuron_error(size, where):
    row, total = (size, "100") if where == "size" else ("8", size)
    text = (
        f'{{"architecture": "A", "n_parameters": {total}, "fields": ["size", "weights_per_neuron", '
        f'"biases_per_neuron", "n_heads", "head_dim"], "sites": {{"layers.0.down": [{row}, 4, 0, 0, 0]}}}}'
    )
    if where == "n_parameters" and size == str(2**40):
        assert SiteTable.from_json(text).n_parameters == 2**40
        return
    with pytest.raises(NeuronError, match="damaged site table"):
        SiteTable.from_json(text)


@pytest.mark.parametrize(
    "key", ["layers.0.q", "layers.31.down", "layers.2.experts.17.gate", "layers.5.shared_expert.up"]
)
def test_a_key_and_its_parts_say_the_same(key):
    assert str(parse_key(key)) == key


@pytest.mark.parametrize(
    "key",
    [
        "",
        "q",
        "layers.1",
        "layers.-1.q",
        "layers.01.q",
        "layers.1.Q",
        "layers.1.mlp",
        "layers.1.experts.0.q",
        "layers.1.q ",
        "layers.1.q\n",
    ],
)
def test_what_is_not_a_key_is_refused_in_one_line(key):
    with pytest.raises(NeuronError) as refused:
        parse_key(key)
    assert "expected" in str(refused.value)
    assert "\n" not in str(refused.value)


def test_keys_are_ordered_by_layer_then_site_then_expert_number():
    ordered = [
        "layers.2.q",
        "layers.2.o",
        "layers.2.gate",
        "layers.2.experts.2.gate",
        "layers.2.experts.10.gate",
        "layers.2.shared_expert.gate",
    ]
    ordered += ["layers.2.up", "layers.10.q"]
    assert sort_keys(reversed(ordered)) == ordered


@pytest.mark.parametrize(
    ("text", "layers"),
    [
        ("1:3", (1, 2)),
        (":2", (0, 1)),
        ("4:", (4, 5)),
        ("-2:", (4, 5)),
        ("3", (3,)),
        ("-1", (5,)),
        (":", (0, 1, 2, 3, 4, 5)),
    ],
)
def test_a_range_of_layers_leaves_its_end_out(text, layers):
    assert parse_layers(text, 6) == layers


@pytest.mark.parametrize("layers", ["a:b", "", "3:3", "9", "6:", "-7:2", range(4, 8), [7], "1:2:3"])
def test_layers_that_the_model_lacks_or_that_are_no_range_are_refused(layers):
    with pytest.raises(UsageError):
        parse_layers(layers, 6)


@pytest.mark.parametrize("layers", ["3:9", "0:7", ":7", "-7:", "8:9"])
def test_a_range_that_reaches_past_the_model_is_refused_and_not_cut(layers):
    with pytest.raises(UsageError, match="outside of the 6 layers, 0 to 5"):
        parse_layers(layers, 6)


def test_a_set_that_does_not_know_its_model_takes_layers_behind_its_last_member():
    found = NeuronSet({"layers.1.down": [4], "layers.3.down": [2]}).only(layers="2:8")
    assert found.keys() == ["layers.3.down"]
    assert found.provenance.config["layers"] == [2, 3, 4, 5, 6, 7]


def test_sites_come_back_in_their_own_order_and_unknown_ones_are_refused():
    assert check_sites(["down", "q", "down"]) == ("q", "down")
    with pytest.raises(UsageError, match="unknown site 'mlp'"):
        check_sites(["mlp"])


def test_the_header_holds_strings_only_and_gives_the_provenance_back():
    made = Provenance(
        "scores",
        "importance",
        ("org/model@abc", "b+c"),
        "f" * 64,
        "0" * 64,
        {"sites": ["q"], "top": 0.1, "note": "ü"},
    )
    header = made.metadata()
    assert all(isinstance(value, str) for value in header.values())
    assert Provenance.from_metadata(header, "scores", "a-file") == made


def test_what_a_hand_made_header_leaves_out_stays_empty():
    made = Provenance.from_metadata({}, "neurons", "a-file")
    assert (made.method, made.models, made.model_fingerprint, made.config) == ("", (), "", {})


def test_version_and_time_are_filled_in():
    made = Provenance("neurons")
    assert made.version
    assert made.created.endswith("+00:00")


@pytest.mark.parametrize(
    "header", [{"schema": "safety-neurons/2"}, {"kind": "guard"}, {"models": "x"}, {"config": "[]"}]
)
def test_other_schemas_kinds_and_damage_are_refused(header):
    with pytest.raises(NeuronError, match="expected|damaged"):
        Provenance.from_metadata(header, "neurons", "a-file")


def test_a_file_of_another_kind_is_named():
    with pytest.raises(NeuronError, match="'a-file' is a file of 'scores', expected 'neurons'"):
        Provenance.from_metadata({"kind": "scores"}, "neurons", "a-file")


def test_an_unknown_kind_cannot_be_made():
    with pytest.raises(NeuronError, match="unknown kind"):
        Provenance("guard")


@pytest.mark.parametrize(
    "text",
    ["[" * 5000 + "]" * 5000, '{"a":' * 5000 + "1" + "}" * 5000, "9" * 5000, '{"a": 1, "a": 2}', "NaN", "{"],
    ids=lambda text: text[:8],
)
@pytest.mark.parametrize("entry", ["models", "config"])
def test_a_header_that_cannot_be_read_is_a_neuron_error(entry, text):
    with pytest.raises(NeuronError, match="damaged header"):
        Provenance.from_metadata({entry: text}, "neurons", "a-file")


def test_a_configuration_with_a_nan_is_written_so_that_it_can_be_read():
    told = Provenance("neurons", config={"threshold": float("nan"), "folder": pathlib.Path("a")})
    assert Provenance.from_metadata(told.metadata(), "neurons", "a-file").config == {
        "threshold": None,
        "folder": "a",
    }
