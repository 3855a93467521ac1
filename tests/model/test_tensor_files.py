"""Tensor files of other projects: the same numbers, nothing run; and nnsight paths that lead to the neurons."""

import os
import pickle
import re
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from families import build
from safety_neurons.errors import NeuronError
from safety_neurons.model import LanguageModel
from safety_neurons.model.tensor_files import nnsight_paths, read_torch, read_weights
from safety_neurons.neurons import NeuronSet
from tiny import tiny_llama, tiny_tokenizer


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
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Hostile(hit)))
    folder = tmp_path / "wanda_score"
    folder.mkdir()
    (folder / "W_metric_layer_0_name_mlp.up_proj_weight.pkl").write_bytes(pickle.dumps(Hostile(hit)))
    for read in (lambda: read_torch(tmp_path / "bad.pt"), lambda: read_torch(tmp_path / "plain.pt"), lambda: read_weights(folder)):
        with pytest.raises(NeuronError) as caught:
            read()
        assert "\n" not in str(caught.value)
    assert not hit.exists()


def test_a_folder_of_pickled_importances_is_read_by_projection(tmp_path):
    made = {"model.layers.0.mlp.up_proj": torch.rand(6, 4), "model.layers.1.self_attn.q_proj": torch.rand(4, 4).T}
    for name, values in made.items():
        layer = name.split(".")[2]
        with (tmp_path / f"W_metric_layer_{layer}_name_{name}_weight.pkl").open("wb") as stream:
            pickle.dump(values, stream)
    (tmp_path / "W_metric_layer_0_name_mlp.down_proj_weight.pkl").write_bytes(pickle.dumps(np.ones((2, 3))))
    found = read_weights(tmp_path)
    assert found["model.layers.0.mlp.down_proj"].shape == (2, 3)
    for name, values in made.items():
        np.testing.assert_array_equal(found[name], values.numpy())
    torch.save(made, tmp_path / "masks.pt")
    assert set(read_weights(tmp_path / "masks.pt")) == set(made)
    with pytest.raises(NeuronError, match="no W_metric"):
        read_weights(tmp_path / "nowhere") if (tmp_path / "nowhere").mkdir() is None else None


def test_a_tensor_that_claims_more_than_is_stored_is_refused(tmp_path):
    storage = torch.ones(4).untyped_storage()

    class Grown:
        def __reduce__(self):
            return (torch._utils._rebuild_tensor_v2, (torch.storage.TypedStorage(wrap_storage=storage, dtype=torch.float32, _internal=True),
                                                      0, (1 << 30,), (1,), False, {}))  # fmt: skip

    file = tmp_path / "W_metric_layer_0_name_mlp.up_proj_weight.pkl"
    file.write_bytes(pickle.dumps(Grown()))
    with pytest.raises(NeuronError, match="larger than what is stored"):
        read_weights(tmp_path)


def test_small_files_that_claim_much_memory_are_refused(tmp_path):
    torch.save(torch.zeros(1 << 16), tmp_path / "plain.pt")
    with zipfile.ZipFile(tmp_path / "plain.pt") as plain, zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as packed:
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
    save_file({"model.layers.0.mlp.up_proj": torch.ones(2, 3, dtype=torch.bfloat16)}, tmp_path / "fine.safetensors")
    assert read_weights(tmp_path / "fine.safetensors")["model.layers.0.mlp.up_proj"].dtype == np.float32


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_the_path_leads_to_the_neurons_values(family):
    model = tiny_llama(0) if family == "llama" else build(family)
    lm = LanguageModel(model, tiny_tokenizer())
    keys = ["layers.1.q", "layers.1.v", "layers.0.down"]
    neurons = NeuronSet({key: [1, 5] for key in keys}, lm.table)
    paths = nnsight_paths(lm, neurons)
    from safety_neurons.model.hooks import reading

    seen, outside = {}, {}
    ids = torch.tensor([[4, 5, 6]])
    handles = []
    for path in paths:
        name, side = re.sub(r"\[(\d+)\]", r".\1", path).rsplit(".", 1)

        def keep(_, args, output, path=path, side=side):
            outside[path] = args[0] if side == "input" else output

        handles.append(model.get_submodule(name).register_forward_hook(keep))
    with torch.no_grad(), reading(lm.anatomy, {key: lambda values, key=key: seen.__setitem__(key, values.clone()) for key in keys}):
        model(input_ids=ids)
    for handle in handles:
        handle.remove()
    ours = torch.cat([seen[key][..., [1, 5]] for key in keys], -1).sort().values
    theirs = torch.cat([outside[path][..., features] for path, features in paths.items()], -1).sort().values
    torch.testing.assert_close(ours, theirs)
