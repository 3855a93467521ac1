"""References that share nothing with the package's patching: both models re-run the whole text at every step,
one hook per site.
"""

import contextlib
import copy
import warnings
from collections.abc import Callable, Iterator, Mapping

import peft
import torch
from torch import Tensor, nn

from families import build
from safety_neurons.model import LanguageModel
from safety_neurons.neurons import NeuronSet


def lm(model: nn.Module, adapters: list[str] | None = None) -> LanguageModel:
    return LanguageModel(model, None, adapters=adapters)


def shared_pair(
    kind: str, seed: int = 0, family: str = "llama", **over: object
) -> tuple[LanguageModel, LanguageModel]:
    """Two views of one PEFT model: base has adapter `first`, aligned `first` and then `second`."""
    model = build(family, **over)
    targets = ["down_proj", "q_proj", "v_proj"]
    if kind == "ia3":
        config = peft.IA3Config(
            target_modules=targets, feedforward_modules=["down_proj"], task_type="CAUSAL_LM"
        )
    elif kind == "ia3-down":
        config = peft.IA3Config(
            target_modules=["down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM"
        )
    else:
        config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=targets, task_type="CAUSAL_LM")
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", FutureWarning
        )  # PEFT asks transformers for a property by its old name
        adapted = peft.PeftModel(model, config, adapter_name="first")
    second = (
        config
        if kind != "lora"
        else peft.LoraConfig(r=2, lora_alpha=8, target_modules=[*targets, "up_proj"], task_type="CAUSAL_LM")
    )
    adapted.add_adapter("second", second)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "ia3_l" in name:
                parameter.copy_(1 + 0.4 * torch.randn(parameter.shape, generator=generator))
            elif "lora_" in name:
                parameter.copy_(
                    torch.randn(parameter.shape, generator=generator) * (0.3 if "lora_A" in name else 0.5)
                )
    adapted.eval()
    return lm(adapted, ["first"]), lm(adapted, ["first", "second"])


def alone(view: LanguageModel) -> LanguageModel:
    """A copy of a view in memory of its own, its adapters made active by PEFT itself."""
    model = copy.deepcopy(view.model)
    model.base_model.set_adapter(list(view.adapters))
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return lm(model)


def some(
    model: LanguageModel, share: float = 0.4, seed: int = 0, sites: tuple[str, ...] | None = None
) -> NeuronSet:
    """A random part of every matrix."""
    generator = torch.Generator().manual_seed(seed)
    members = {}
    for key, size in model.table.sizes.items():
        if sites is None or key.rsplit(".", 1)[1] in sites:
            members[key] = (
                torch.randperm(size, generator=generator)[: max(1, int(share * size))].sort().values.numpy()
            )
    return NeuronSet(members, model.table)


def columns(place: object) -> Tensor:
    index = place.index
    return torch.arange(place.features)[slice(None) if index is None else index]


@contextlib.contextmanager
def on_sites(
    model: LanguageModel, neurons: NeuronSet, act: Callable[[str, Tensor, Tensor], Tensor | None]
) -> Iterator[None]:
    """Calls `act(key, tensor, feature columns)` at the boundary of every chosen projection."""
    handles = []
    for key, index in neurons.items():
        place = model.anatomy.places[key]
        where = columns(place)[torch.tensor(index)]

        def after(
            module: nn.Module, args: tuple, output: Tensor, key: str = key, where: Tensor = where
        ) -> Tensor | None:
            return act(key, output, where)

        def before(module: nn.Module, args: tuple, key: str = key, where: Tensor = where) -> tuple | None:
            changed = act(key, args[0], where)
            return None if changed is None else (changed, *args[1:])

        hook = (
            place.hooked.register_forward_hook(after)
            if place.side == "output"
            else place.hooked.register_forward_pre_hook(before)
        )
        handles.append(hook)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def positions(mask: Tensor) -> Tensor:
    return (mask.cumsum(-1) - 1).clamp(min=0)


def full(model: LanguageModel, ids: Tensor, mask: Tensor) -> Tensor:
    """Logits of the whole text, without any cache."""
    extra = {} if model.config.model_type == "bloom" else {"position_ids": positions(mask)}
    with torch.no_grad():
        return model.model(input_ids=ids, attention_mask=mask, use_cache=False, **extra).logits


def patched_logits(
    base: LanguageModel, donor: LanguageModel, neurons: NeuronSet, ids: Tensor, mask: Tensor
) -> Tensor:
    held: dict[str, Tensor] = {}

    def record(key: str, tensor: Tensor, where: Tensor) -> None:
        held[key] = tensor[..., where].clone()

    def overwrite(key: str, tensor: Tensor, where: Tensor) -> Tensor:
        changed = tensor.clone()
        changed[..., where] = held[key]
        return changed

    with on_sites(donor, neurons, record):
        full(donor, ids, mask)
    with on_sites(base, neurons, overwrite):
        return full(base, ids, mask)


def greedy(
    logits: Callable[[Tensor, Tensor], Tensor], ids: Tensor, mask: Tensor, steps: int
) -> tuple[Tensor, Tensor]:
    """Token ids and per-step scores of greedy search that never stops early."""
    scores = []
    for _ in range(steps):
        last = logits(ids, mask)[:, -1]
        scores.append(last)
        ids = torch.cat([ids, last.argmax(-1, keepdim=True)], dim=-1)
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=-1)
    return ids, torch.stack(scores)


def generated(
    model: LanguageModel, ids: Tensor, mask: Tensor, steps: int, **arguments: object
) -> Mapping[str, object]:
    """What `generate` gives for exactly this many tokens, with raw logits."""
    settings = {
        "do_sample": False,
        "max_new_tokens": steps,
        "min_new_tokens": steps,
        "return_dict_in_generate": True,
        "output_logits": True,
    }
    settings |= {"pad_token_id": 0, "eos_token_id": None}
    with torch.no_grad():
        return model.model.generate(input_ids=ids, attention_mask=mask, **{**settings, **arguments})


def no_hooks(model: nn.Module) -> bool:
    """Whether no module has a forward hook or an override of its own."""
    return not any(
        module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module)
        for module in model.modules()
    )
