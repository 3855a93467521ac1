"""Pickles that would change, claim or build more than numbers: each fails, and the process is as it was."""

import pickle

import numpy as np
import pytest
from test_foreign import TABLE, five

from safety_neurons.errors import ForeignModelError, NeuronError
from safety_neurons.neurons import foreign, pickles

INT64 = b"cnumpy\ndtype\n(X\x02\x00\x00\x00i8\x89\x88tR"
ARRAY = b"cnumpy.core.multiarray\n_reconstruct\n)R(K\x01K\x01\x85h\x01\x89C\x08AAAAAAAAtb"
OBJECTS_NOW = b"h\x01(K\x03X\x01\x00\x00\x00<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK?tb"


def read(tmp_path, content):
    path = tmp_path / "file.p"
    path.write_bytes(content)
    return pickles.read_pickle(path)


def test_a_dtype_that_is_told_later_to_hold_objects_does_not_turn_bytes_into_addresses(tmp_path):
    found = read(tmp_path, b"\x80\x04]" + INT64 + b"q\x01a" + ARRAY + b"a" + OBJECTS_NOW + b"a.")
    assert not found[1].dtype.hasobject  # a dtype of numpy's own would be told, and reading found[1] would end the process
    assert found[1].tolist() == [0x4141414141414141]


@pytest.mark.parametrize(
    "content",
    [
        b"\x80\x04" + INT64 + b"(K\x03X\x01\x00\x00\x00<NX\x01\x00\x00\x00a\x85}J\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb.",  # fields
        b"\x80\x04cnumpy\ndtype\n(X\x01\x00\x00\x00OtR.",
        b"\x80\x02cnumpy._core.numeric\n_frombuffer\n(J\xff\xff\xff\x7f" + INT64 + b"K\x01\x85tR.",  # bytes(n) are n zeros
        b"\x80\x02c_codecs\nencode\nN}X\x0c\x00\x00\x00__defaults__N\x85s\x86b.",  # a function's defaults
        b"\x80\x02ccollections\nOrderedDict\n)\x81.",  # NEWOBJ
        b"\x80\x02(ccollections\nOrderedDict\no.",  # OBJ
        b"(icollections\nOrderedDict\n.",  # INST
        b"\x80\x02\x82\x01.",  # EXT1
        b"\x80\x04X\x02\x00\x00\x00os X\x06\x00\x00\x00system\x93.",
        b"Pname\n.",  # PERSID
        b"\x80\x02]r\x00\x00\x00\x01.",  # a place in the memory that needs 256 MB
        b"\x80\x02})" + b"\x85" * 300_000 + b"Ns.",  # a tuple whose hash needs a deep stack
    ],
)
def test_steps_that_arrays_do_not_need_are_refused_in_one_line(tmp_path, content):
    with pytest.raises(NeuronError, match="cannot read") as caught:
        read(tmp_path, content)
    assert "\n" not in str(caught.value)


def test_arrays_of_either_byte_order_and_single_numbers_come_as_they_are(tmp_path):
    content = {"a": np.arange(6, dtype=">i4").reshape(2, 3), "b": np.float32(1.5), "c": np.asfortranarray(np.eye(3)), "d": np.ones(2, bool)}
    for protocol in range(6):
        found = read(tmp_path, pickle.dumps(content, protocol=protocol))
        for name, values in content.items():
            np.testing.assert_array_equal(found[name], values)


def test_lists_within_lists_without_end_are_not_walked():
    nested = [1.0]
    for _ in range(60):
        nested = [nested, nested]
    with pytest.raises(NeuronError, match="one weight a neuron"):
        foreign.probe_scores({"model.layers.0.mlp.up_proj": nested}, TABLE)


def test_weights_of_a_wrong_kind_or_number_are_refused():
    for name, weights in (
        ("mlp.gate_up_proj", np.ones(95)),
        ("mlp.up_proj", ["a"]),
        ("mlp.up_proj", [10**400]),
        ("mlp.up_proj", np.ones(())),
    ):
        with pytest.raises((NeuronError, ForeignModelError)):
            foreign.probe_scores({f"model.layers.0.{name}": weights}, TABLE)
    with pytest.raises(NeuronError, match="twice"):
        foreign.probe_scores({f"{model}.layers.0.mlp.up_proj": np.ones(48) for model in ("one", "two")}, TABLE)
    assert set(foreign.probe_scores({"model.layers.0.self_attn.q_proj": np.arange(32.0)}, TABLE).keys()) == {"layers.0.q"}


@pytest.mark.parametrize("line", ["{0: {0000000001}}", "{0: {1 2}}", "{0: {1} 1: {2}}", "{0: {٣}}", "{0: {1,,2}}"])
def test_numbers_that_another_reader_would_not_read_so_are_refused(tmp_path, line):
    with pytest.raises(NeuronError):
        foreign.read_sn_tune(five(tmp_path, up=line), TABLE)
