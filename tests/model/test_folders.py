"""What an index of shards may name."""

import json

import pytest

from safety_neurons.errors import ModelError
from safety_neurons.model import load
from safety_neurons.model.files import refuse_foreign_shards

DEEP = "[" * 5000 + "]" * 5000

BAD = [
    "../other/model.safetensors",
    "/etc/model.safetensors",
    "a/../../model.safetensors",
    "..\\model.safetensors",
    "model-00001.bin",
    "x.pt",
]


@pytest.mark.parametrize("name", BAD)
def test_a_shard_elsewhere_or_of_another_format_is_refused(tmp_path, name):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model-00001.safetensors", "b": name}}))
    with pytest.raises(ModelError, match="names the shard"):
        refuse_foreign_shards(tmp_path)
    with pytest.raises(ModelError, match="names the shard"):
        load(str(tmp_path))


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}', DEEP], ids=lambda text: text[:16])
def test_an_index_that_is_none_is_refused(tmp_path, text):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ModelError, match="cannot be read"):
        refuse_foreign_shards(tmp_path)


def test_shards_of_the_folder_pass(tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors"}}))
    refuse_foreign_shards(tmp_path)
