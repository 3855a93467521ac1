"""Sets, examples and references for tests of deltas."""

import copy
import warnings
from collections.abc import Mapping

import peft
import torch
from torch import Tensor, nn

from families import build, random_ids
from safety_neurons.model import LanguageModel
from safety_neurons.model.sites import take
from safety_neurons.neurons import NeuronSet, parse_key
from safety_neurons.tuning.deltas import positions_of


def model_of(family: str, dtype: torch.dtype = torch.float64, **over: object) -> LanguageModel:
    return LanguageModel(build(family, dtype, **over))


def some(
    model: LanguageModel, share: float = 0.3, seed: int = 0, sites: tuple[str, ...] | None = None
) -> NeuronSet:
    """A random part of every matrix."""
    generator = torch.Generator().manual_seed(seed)
    members = {}
    for key, size in model.table.sizes.items():
        if sites is None or key.rsplit(".", 1)[1] in sites:
            members[key] = torch.randperm(size, generator=generator)[: max(1, int(share * size))].numpy()
    return NeuronSet(members, model.table)


def lora(model: nn.Module, **config: object) -> nn.Module:
    """The model with a fresh LoRA on all linear layers."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wanted = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **config}
        return peft.get_peft_model(model, peft.LoraConfig(**wanted))


def batches(n: int, rows: int = 3, tokens: int = 7) -> list[Tensor]:
    return [random_ids((rows, tokens), seed=number) for number in range(n)]


def loss_of(model: nn.Module, ids: Tensor) -> Tensor:
    return model(input_ids=ids, labels=ids).loss


def bits(model: nn.Module) -> dict[str, Tensor]:
    """A copy of everything the model holds, under the names of a model without wrappers."""
    held = [*model.named_parameters(), *model.named_buffers()]
    own = ("delta_", "at_")
    return {
        name.replace(".base_layer.", "."): tensor.detach().clone()
        for name, tensor in held
        if not name.rpartition(".")[2].startswith(own)
    }


def assert_same_bits(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


def randomised(parameters: list[nn.Parameter], size: float = 0.1, seed: int = 5) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in parameters:
            parameter.copy_(size * torch.randn(parameter.shape, generator=generator).to(parameter))


class Reference:
    """A plain copy of a model with all gradients, of which an optimizer is given the selected entries alone,
    as parameters of their own.
    """

    def __init__(self, model: LanguageModel, neurons: NeuronSet) -> None:
        self.model = LanguageModel(copy.deepcopy(model.model))
        self.model.model.requires_grad_(True)
        self.where = {
            key: self._located(model, key, positions) for key, positions in _positions(model, neurons).items()
        }
        self.parameters = {
            key: nn.Parameter(self.taken(key, where[0].detach())) for key, where in self.where.items()
        }
        self.start = {key: parameter.detach().clone() for key, parameter in self.parameters.items()}

    def _located(self, model: LanguageModel, key: str, positions: Tensor) -> tuple[Tensor, object, bool]:
        """The whole tensor, where in it the selected part is, and whether that is stored the other way
        round.
        """
        parsed = parse_key(key)
        if parsed.expert is None:
            place = model.anatomy.places[key]
            rows = (place.side == "output") != place.transposed
            index = (positions,) if rows else (slice(None), positions)
            return self.model.model.get_submodule(place.module_name).weight, index, place.transposed
        experts = model.anatomy.layers[parsed.layer].experts
        module = self.model.model.get_submodule(experts.module_name)
        rows = (parsed.site != "down") != experts.transposed
        index = (parsed.expert, positions) if rows else (parsed.expert, slice(None), positions)
        return module.down_proj if parsed.site == "down" else module.gate_up_proj, index, experts.transposed

    def taken(self, key: str, whole: Tensor) -> Tensor:
        """The selected part of something shaped like the weight, as the delta is laid out."""
        _, index, transposed = self.where[key]
        part = whole[index]
        return (part.T if transposed else part).clone()

    def step(self, ids: Tensor, optimizer: torch.optim.Optimizer) -> float:
        self.model.model.zero_grad()
        loss = loss_of(self.model.model, ids)
        loss.backward()
        for key, parameter in self.parameters.items():
            parameter.grad = self.taken(key, self.where[key][0].grad)
        optimizer.step()
        with torch.no_grad():
            for key, (weight, index, transposed) in self.where.items():
                values = self.parameters[key].detach()
                weight[index] = values.T if transposed else values
        return float(loss.detach())

    @property
    def moved(self) -> dict[str, Tensor]:
        return {key: parameter.detach() - self.start[key] for key, parameter in self.parameters.items()}


def _positions(model: LanguageModel, neurons: NeuronSet) -> dict[str, Tensor]:
    """Features of the stored tensor on the neurons' side, by key."""
    found = {}
    for key, members in neurons.items():
        index = torch.from_numpy(members.copy())
        parsed = parse_key(key)
        if parsed.expert is None:
            found[key] = positions_of(model.anatomy.places[key], neurons)
        elif parsed.site == "down":
            found[key] = index
        else:
            experts = model.anatomy.layers[parsed.layer].experts
            found[key] = take(torch.arange(2 * experts.width), experts.index[parsed.site])[index]
    return found
