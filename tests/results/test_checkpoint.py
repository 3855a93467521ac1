import numpy as np
import pytest
from safetensors.numpy import save

from safety_neurons.errors import RunError
from safety_neurons.results import Checkpoint

ARRAYS = {"sum.layers.0.q": np.arange(3.0), "count": np.array([7]), "none": np.zeros((0, 2)), "mask": np.array([True, False])}


def test_a_checkpoint_gives_back_arrays_and_state(tmp_path):
    checkpoint = Checkpoint(tmp_path / "deep" / "c.safetensors")
    assert checkpoint.load() is None
    checkpoint.save(ARRAYS, {"batch": 3, "notes": ["ü"]})
    loaded = checkpoint.load()
    assert loaded.state == {"batch": 3, "notes": ["ü"]}
    assert loaded.arrays.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        assert np.array_equal(loaded.arrays[name], array)
        assert loaded.arrays[name].dtype == array.dtype
    checkpoint.delete()
    checkpoint.delete()
    assert checkpoint.load() is None


def test_a_strided_array_is_saved_as_it_reads(tmp_path):
    Checkpoint(tmp_path / "c").save({"a": np.arange(6).reshape(2, 3).T}, {})
    assert Checkpoint(tmp_path / "c").load().arrays["a"].tolist() == [[0, 3], [1, 4], [2, 5]]


def test_a_failed_save_leaves_the_previous_state(tmp_path, monkeypatch):
    checkpoint = Checkpoint(tmp_path / "c")
    checkpoint.save(ARRAYS, {"batch": 1})

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(RunError, match="No space left"):
        checkpoint.save(ARRAYS, {"batch": 2})
    assert checkpoint.load().state == {"batch": 1}


def test_a_damaged_checkpoint_is_an_error_that_says_what_to_do(tmp_path):
    checkpoint = Checkpoint(tmp_path / "c")
    checkpoint.save(ARRAYS, {})
    whole = (tmp_path / "c").read_bytes()
    for content in (b"", whole[:-1], whole[: len(whole) // 2], b"\x00" * 40):
        (tmp_path / "c").write_bytes(content)
        with pytest.raises(RunError, match="overwrite"):
            checkpoint.load()


@pytest.mark.parametrize(
    "state", ["[" * 5000 + "]" * 5000, "9" * 5000, "[1]", '"text"', "{", '{"a": 1, "a": 2}'], ids=lambda text: text[:8]
)
def test_a_state_that_cannot_be_read_is_a_run_error(tmp_path, state):
    path = tmp_path / "c.safetensors"
    path.write_bytes(save({"a": np.zeros(1, np.float32)}, metadata={"state": state}))
    with pytest.raises(RunError, match="cannot read checkpoint"):
        Checkpoint(path).load()
