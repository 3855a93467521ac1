"""Shards that an index may name; tensor files of other projects: the same numbers, nothing run.

Nnsight paths.
"""

import contextlib
import json
import os
import pathlib
import pickle
import re
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from families import build
from safety_neurons.errors import ModelError, NeuronError
from safety_neurons.model import LanguageModel, load
from safety_neurons.model.anatomy import nnsight_paths
from safety_neurons.model.files import read_named, read_torch, read_weights, refuse_foreign_shards
from safety_neurons.neurons import NeuronSet
from tiny import tiny_llama, tiny_tokenizer

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


@pytest.mark.parametrize(
    "text",
    ["{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}', DEEP],
    ids=lambda text: text[:16],
)
def test_an_index_that_is_none_is_refused(tmp_path, text):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ModelError, match="cannot be read"):
        refuse_foreign_shards(tmp_path)


def test_shards_of_the_folder_pass(tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors"}})
    )
    assert refuse_foreign_shards(tmp_path) is None


class Hostile:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.system, (f"touch {self.path}",))


def test_a_tuple_of_tensors_comes_as_arrays(tmp_path):
    values = torch.randn(2, 5, dtype=torch.bfloat16)
    torch.save((values, torch.arange(6).reshape(3, 2), {"mean": torch.ones(2)}), tmp_path / "scores.pt")
    first, ranks, rest = read_torch(tmp_path / "scores.pt")
    np.testing.assert_array_equal(first, values.float().numpy())
    assert ranks.dtype == np.int64
    assert rest["mean"].tolist() == [1.0, 1.0]


def test_files_that_would_run_code_do_nothing_but_fail(tmp_path):
    hit = tmp_path / "hit"
    torch.save((torch.ones(2), Hostile(hit)), tmp_path / "bad.pt")
    torch.save((torch.ones(2), Hostile(hit)), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    for number, content in enumerate((Hostile(hit), {"model.layers.0.mlp.up_proj": np.ones(4)}, "x")):
        for protocol in (0, 2, 5):
            (tmp_path / f"{number}{protocol}.p").write_bytes(pickle.dumps(content, protocol=protocol))
    for file in tmp_path.iterdir():
        for read in (read_torch, read_named, read_weights):
            with pytest.raises(NeuronError, match="cannot read") as caught:
                read(file)
            assert "\n" not in str(caught.value)
            assert file.suffix == ".pt" or "docs/exchange.md" in str(caught.value)
    with pytest.raises(NeuronError, match=r"a folder.*docs/exchange.md"):
        read_weights(tmp_path)
    assert not hit.exists()


def test_the_converters_of_the_documentation_give_files_that_are_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = pathlib.Path(__file__).parents[2] / "docs" / "exchange.md"
    probes, folder = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    pathlib.Path("weights_M.p").write_bytes(pickle.dumps({"model.layers.0.mlp.up_proj": [0.5, -1.0]}))
    exec(probes, {})
    assert read_named("probe.safetensors")["model.layers.0.mlp.up_proj"].tolist() == [0.5, -1.0]
    pathlib.Path("wanda_score").mkdir()
    expected = {
        "model.layers.0.mlp.up_proj": torch.rand(6, 4),
        "model.layers.11.self_attn.q_proj": torch.rand(4, 4).T > 0.5,
    }
    names = ("layer_0_name_mlp.up_proj", "layer_11_name_model.layers.11.self_attn.q_proj")
    for name, values in zip(names, expected.values(), strict=True):
        pathlib.Path(f"wanda_score/W_metric_{name}_weight.pkl").write_bytes(pickle.dumps(values))
    exec(folder, {})
    found = read_weights("wanda.pt")
    assert found.keys() == expected.keys()
    assert all(np.array_equal(found[name], values.numpy()) for name, values in expected.items())


def test_any_damage_of_what_torch_saved_is_one_error(tmp_path):
    torch.save({"a": torch.ones(2)}, tmp_path / "whole.pt")
    whole = (tmp_path / "whole.pt").read_bytes()
    start = whole.index(b"\x80\x02")  # of the pickle in the archive
    refused = 0
    for place in range(start, start + 160, 2):
        for byte in (b"u", b"R", b"."):  # SETITEMS, REDUCE, STOP
            (tmp_path / "a.pt").write_bytes(whole[:place] + byte + whole[place + 1 :])
            with contextlib.suppress(NeuronError):
                read_torch(tmp_path / "a.pt")
                refused -= 1
            refused += 1
    assert refused > 50


def test_small_files_that_claim_much_memory_are_refused(tmp_path):
    torch.save(torch.zeros(1 << 16), tmp_path / "plain.pt")
    with (
        zipfile.ZipFile(tmp_path / "plain.pt") as plain,
        zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for part in plain.infolist():
            packed.writestr(part.filename, plain.read(part))
    torch.save(torch.ones(1).expand(1 << 12, 1 << 12), tmp_path / "spread.pt")
    one = torch.ones(1 << 12)
    torch.save([one[i:] for i in range(99)], tmp_path / "often.pt")
    nested = [1.0]
    for _ in range(60):
        nested = [nested, nested]
    torch.save(nested, tmp_path / "nested.pt")
    torch.save(torch.ones(2, dtype=torch.complex64), tmp_path / "complex.pt")
    for name in ("bomb", "spread", "often", "nested", "complex"):
        with pytest.raises(NeuronError) as caught:
            read_torch(tmp_path / f"{name}.pt")
        assert "\n" not in str(caught.value)
    (tmp_path / "damaged.safetensors").write_bytes(b"\xff" * 64)
    with pytest.raises(NeuronError, match="cannot read"):
        read_weights(tmp_path / "damaged.safetensors")
    save_file(
        {"model.layers.0.mlp.up_proj": torch.ones(2, 3, dtype=torch.bfloat16)}, tmp_path / "fine.safetensors"
    )
    assert read_weights(tmp_path / "fine.safetensors")["model.layers.0.mlp.up_proj"].dtype == np.float32


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_the_path_leads_to_the_neurons_values(family):
    model = tiny_llama(0) if family == "llama" else build(family)
    lm = LanguageModel(model, tiny_tokenizer())
    keys = ["layers.1.q", "layers.1.v", "layers.0.down"]
    neurons = NeuronSet({key: [1, 5] for key in keys}, lm.table)
    paths = nnsight_paths(lm.anatomy, neurons)
    from safety_neurons.model.hooks import reading

    seen, outside = {}, {}
    ids = torch.tensor([[4, 5, 6]])
    handles = []
    for path in paths:
        name, side = re.sub(r"\[(\d+)\]", r".\1", path).rsplit(".", 1)

        def keep(_, args, output, path=path, side=side):
            outside[path] = args[0] if side == "input" else output

        handles.append(model.get_submodule(name).register_forward_hook(keep))
    with (
        torch.no_grad(),
        reading(
            lm.anatomy, {key: lambda values, key=key: seen.__setitem__(key, values.clone()) for key in keys}
        ),
    ):
        model(input_ids=ids)
    for handle in handles:
        handle.remove()
    ours = torch.cat([seen[key][..., [1, 5]] for key in keys], -1).sort().values
    theirs = torch.cat([outside[path][..., features] for path, features in paths.items()], -1).sort().values
    torch.testing.assert_close(ours, theirs)
