import pytest

from safety_neurons.errors import NeuronError, UsageError
from safety_neurons.neurons import check_sites, parse_key, parse_layers, sort_keys


@pytest.mark.parametrize("key", ["layers.0.q", "layers.31.down", "layers.2.experts.17.gate", "layers.5.shared_expert.up"])
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
    [("1:3", (1, 2)), (":2", (0, 1)), ("4:", (4, 5)), ("-2:", (4, 5)), ("3", (3,)), ("-1", (5,)), (":", (0, 1, 2, 3, 4, 5))],
)
def test_a_range_of_layers_leaves_its_end_out(text, layers):
    assert parse_layers(text, 6) == layers


@pytest.mark.parametrize("layers", ["a:b", "", "3:3", "9", "6:", range(4, 8), [7], "1:2:3"])
def test_layers_that_the_model_lacks_or_that_are_no_range_are_refused(layers):
    with pytest.raises(UsageError):
        parse_layers(layers, 6)


def test_sites_come_back_in_their_own_order_and_unknown_ones_are_refused():
    assert check_sites(["down", "q", "down"]) == ("q", "down")
    with pytest.raises(UsageError, match="unknown site 'mlp'"):
        check_sites(["mlp"])
