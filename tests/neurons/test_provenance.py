import pathlib

import pytest

from safety_neurons.errors import NeuronError
from safety_neurons.neurons import Provenance


def test_the_header_holds_strings_only_and_gives_the_provenance_back():
    made = Provenance("scores", "importance", ("org/model@abc", "b+c"), "f" * 64, "0" * 64, {"sites": ["q"], "top": 0.1, "note": "ü"})
    header = made.metadata()
    assert all(isinstance(value, str) for value in header.values())
    assert Provenance.from_metadata(header, "scores") == made


def test_what_a_hand_made_header_leaves_out_stays_empty():
    made = Provenance.from_metadata({}, "neurons")
    assert (made.method, made.models, made.model_fingerprint, made.config) == ("", (), "", {})


def test_version_and_time_are_filled_in():
    made = Provenance("neurons")
    assert made.version
    assert made.created.endswith("+00:00")


@pytest.mark.parametrize("header", [{"schema": "safety-neurons/2"}, {"kind": "guard"}, {"models": "x"}, {"config": "[]"}])
def test_other_schemas_kinds_and_damage_are_refused(header):
    with pytest.raises(NeuronError, match="expected|damaged"):
        Provenance.from_metadata(header, "neurons")


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
        Provenance.from_metadata({entry: text}, "neurons")


def test_a_configuration_with_a_nan_is_written_so_that_it_can_be_read():
    told = Provenance("neurons", config={"threshold": float("nan"), "folder": pathlib.Path("a")})
    assert Provenance.from_metadata(told.metadata(), "neurons").config == {"threshold": None, "folder": "a"}
