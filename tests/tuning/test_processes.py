import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from trained import assert_same_bits, batches, bits, loss_of, model_of, some

from safety_neurons.model import LanguageModel
from safety_neurons.tuning import Deltas, attach

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
DTYPES = (torch.float64, torch.bfloat16)


def steps(model: torch.nn.Module, deltas: Deltas, rank: int | None) -> None:
    optimizer = torch.optim.AdamW(deltas.parameters(), lr=1e-3, weight_decay=0.1)
    for ids in batches(3, rows=4):
        optimizer.zero_grad()
        loss_of(model, ids if rank is None else ids[2 * rank : 2 * rank + 2]).backward()
        optimizer.step()


def with_ddp(rank: int) -> dict[str, torch.Tensor]:
    model = model_of("phi3")
    deltas = attach(model, some(model))
    steps(DistributedDataParallel(model.model), deltas, rank)
    return deltas.tensors()


def with_fsdp(rank: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    model = model_of("llama", dtype)
    before = bits(model.model)
    deltas = attach(model, some(model, 0.1))
    mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
    for layer in model.model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model.model, mesh=mesh)
    local = sum(parameter.to_local().numel() for parameter in deltas.parameters())
    assert local < deltas.n_parameters
    steps(model.model, deltas, rank)
    tensors = deltas.tensors()
    deltas.load_tensors(tensors)
    assert_same_bits(tensors, deltas.tensors())
    whole = {
        name.replace(".base_layer.", "."): parameter.full_tensor().detach()
        for name, parameter in model.model.named_parameters()
    }
    for name, tensor in before.items():
        assert name not in whole or torch.equal(whole[name], tensor), name
    return tensors


def trained(rank: int, folder: str) -> None:
    torch.set_num_threads(1)  # First: threads of the process that was forked are not in this one.
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    torch.save(
        {"ddp": with_ddp(rank), **{str(dtype): with_fsdp(rank, dtype) for dtype in DTYPES}},
        f"{folder}/{rank}.pt",
    )
    dist.destroy_process_group()


def alone(model: LanguageModel, share: float) -> dict[str, torch.Tensor]:
    with attach(model, some(model, share)) as deltas:
        steps(model.model, deltas, None)
        return deltas.tensors()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, torch.Tensor]]]:
    """What each of two processes has trained, one group of them for every way; they are forked, since a new
    one takes longer to import than to train.
    """
    folder = tmp_path_factory.mktemp("processes")
    torch.multiprocessing.start_processes(trained, (str(folder),), nprocs=2, start_method="fork")
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


def test_two_processes_with_half_a_batch_each_train_as_one_with_all_of_it(
    ranks: list[dict[str, dict[str, torch.Tensor]]],
) -> None:
    results = [rank["ddp"] for rank in ranks]
    expected = alone(model_of("phi3"), 0.3)
    assert_same_bits(*results)
    for key, tensor in expected.items():
        assert (results[0][key] - tensor).abs().max() <= 1e-10, key


@pytest.mark.parametrize("dtype", DTYPES)
def test_sharded_over_two_processes_the_deltas_train_as_in_one(
    dtype: torch.dtype, ranks: list[dict[str, dict[str, torch.Tensor]]]
) -> None:
    results = [rank[str(dtype)] for rank in ranks]
    assert_same_bits(*results)
    expected = alone(model_of("llama", dtype), 0.1)
    for key, tensor in expected.items():
        assert results[0][key].dtype == tensor.dtype
        if dtype == torch.float64:
            assert (results[0][key] - tensor).abs().max() <= 1e-10, key
