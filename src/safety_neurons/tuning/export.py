"""Ordinary Hugging Face artefacts of a trained change: a PEFT LoRA folder, or a merged checkpoint.

A change of rows is a LoRA whose B is one-hot (which rows) and whose A is the change; a change of columns is one whose A is one-hot and
whose B is the change. With alpha = rank the product is the change itself, so merging it adds the same numbers as `apply_delta`.
"""

import contextlib
import copy
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from safety_neurons.errors import RunError, UnsupportedModelError, UsageError
from safety_neurons.model import LanguageModel
from safety_neurons.model.adapters import activate, is_adapted, merged
from safety_neurons.model.loading import quiet
from safety_neurons.model.places import SitePlace
from safety_neurons.neurons import parse_key
from safety_neurons.results.files import PathLike, read_json, whole_folder, write_bytes, write_json
from safety_neurons.tuning.artefacts import Delta, applied, check_base, check_plain, survival
from safety_neurons.tuning.attach import positions_of
from safety_neurons.tuning.companions import copy_companions
from safety_neurons.tuning.deltas import Beside

VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Ranks that vLLM can be started with (`--max-lora-rank`)."""


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        folder: where.
        base: the model that an adapter belongs to; empty for a merged checkpoint.
        rank: the largest rank of an adapter; 0 for a merged checkpoint.
        survived: share of the changed weights that are other numbers than before in the saved type; None for an adapter.
        notes: what has to be said.
    """

    folder: Path
    base: str = ""
    rank: int = 0
    survived: float | None = None
    notes: list[str] = field(default_factory=list)


def export_lora(folder: PathLike, model: LanguageModel, delta: Delta, *, vllm: bool = False, any_base: bool = False) -> Exported:
    """Writes the change as an ordinary PEFT LoRA folder, which PEFT, TRL, lm-eval and vLLM load.

    Every projection has the rank of its trained rows or columns. Merging it (`merge_and_unload()`, the sum rounded once) gives the weights
    of `apply_delta`, bit for bit. A model with adapters is merged first, into `folder/base`, and the LoRA belongs to that.

    Args:
        folder: to write; files in it of the same names are replaced.
        model: that the change was trained on, quantised or not.
        delta: the change.
        vllm: give all projections one rank that vLLM allows, padded with zeros.
        any_base: also where the weights are not those that the change was trained on.

    Raises:
        UnsupportedModelError: the set has routed experts, or more rows of a projection than vLLM allows; export it merged.
        UsageError: deltas are attached. MismatchError: another base. RunError: the folder cannot be written; an earlier adapter is whole.

    Source: Hu et al., ICLR 2022 (LoRA), section 4.1, W + BA, with one factor a selection of rows or columns.
    Differs: that factor is frozen one-hot, so the product is exact.
    """
    notes: list[str] = []
    _refuse_attached(model)
    target, base = Path(folder), str(getattr(model.config, "_name_or_path", "") or model.name)
    factors = _factors(model, delta)
    if not any_base:
        check_base(model, delta)
    if is_adapted(model.model):
        plain = merged_base(model)
        base = str((target / "base").resolve())
        save_checkpoint(target / "base", plain)
        notes.append(f"the model's adapters were merged into its weights first; the LoRA belongs to {base}")
    ranks = {name: down.shape[0] for name, (down, _) in factors.items()}
    rank = max(ranks.values())
    if vllm:
        rank = _allowed(rank)
        factors = {name: _padded(down, up, rank) for name, (down, up) in factors.items()}
        ranks = dict.fromkeys(ranks, rank)
    weights = {}
    for name, (down, up) in factors.items():
        weights[f"base_model.model.{name}.lora_A.weight"], weights[f"base_model.model.{name}.lora_B.weight"] = down, up
    settings = _config(model, delta, ranks, rank, base)
    write_bytes(target / "adapter_model.safetensors", safetensors.torch.save(weights, metadata={"format": "pt"}))  # large: fails first
    write_json(target / "adapter_config.json", settings)
    return Exported(target, base, rank, None, notes)


def export_merged(
    folder: PathLike, model: LanguageModel, delta: Delta, *, dtype: torch.dtype | None = None, any_base: bool = False
) -> Exported:
    """Writes the tuned model as an ordinary checkpoint (safetensors, configuration, tokenizer); the model in memory stays as it is.

    Args:
        folder: to write; it appears whole, what was there before is replaced at the end.
        model: that the change was trained on; its adapters are merged first, in a copy.
        delta: the change.
        dtype: of the saved weights; the model's own by default.
        any_base: also where the weights are not those that the change was trained on.

    Raises:
        UnsupportedModelError: quantised or off-loaded weights. MismatchError: another base. RunError: the folder cannot be written.

    Source: Zhao et al., ICLR 2025, section 4: a tuned model is an ordinary checkpoint.
    """
    notes: list[str] = []
    _refuse_attached(model)
    if is_adapted(model.model):
        if not any_base:
            check_base(model, delta)
        model, any_base = merged_base(model), True
        notes.append("the model's adapters were merged into its weights first")
    kept = survival(model, delta, dtype or model.dtype)
    notes.append(f"{100 * kept:.4g} % of the changed weights survive the cast to {str(dtype or model.dtype).removeprefix('torch.')}")
    with applied(model, delta, any_base=any_base):
        save_checkpoint(Path(folder), model, dtype)
    return Exported(Path(folder), "", 0, kept, notes)


def merged_base(model: LanguageModel) -> LanguageModel:
    """A copy of a model with the adapters of this view merged into its weights; the model itself is left alone.

    Raises:
        UnsupportedModelError: quantised weights, which cannot take up an adapter exactly.
        ModelError: weights that two layers share, such as those of a tied embedding with an adapter.

    Source: PEFT's `merge_and_unload`.
    """
    if any(place.projection.quantised for place in model.anatomy.places.values()):
        raise UnsupportedModelError(
            f"{model.name} is quantised, plain weights were expected: its adapters cannot be merged exactly; load it unquantised"
        )
    adapted: Any = copy.deepcopy(model.model)
    if model.adapters is not None:
        activate(adapted, model.adapters)
    other = LanguageModel(merged(adapted, f"{model.name}: its adapter"), model.tokenizer, name=model.name, folder=model.folder)
    other.template = model.template
    return other


def _refuse_attached(model: LanguageModel) -> None:
    if any(isinstance(module, Beside) for module in model.model.modules()):
        raise UsageError(f"{model.name} has deltas attached, a model without was expected; detach() them first")


def _factors(model: LanguageModel, delta: Delta) -> dict[str, tuple[Tensor, Tensor]]:
    """A and B by path of the projection, sites that share one stacked."""
    delta.neurons.check(model.table)
    model.anatomy.check(delta.neurons.keys())
    by_module: dict[str, list[SitePlace]] = {}
    for key, _ in delta.neurons.items():
        if parse_key(key).expert is not None:
            raise UnsupportedModelError(
                f"{key} is a routed expert, whose weights no LoRA module holds, neurons of dense sites were expected; export it merged"
            )
        place = model.anatomy.place(key)
        by_module.setdefault(place.module_name, []).append(place)
    return {_plain_name(name): _factors_of(places, delta) for name, places in by_module.items()}


def _plain_name(name: str) -> str:
    return name.removeprefix("base_model.model.").replace(".base_layer", "")


def _factors_of(places: list[SitePlace], delta: Delta) -> tuple[Tensor, Tensor]:
    one_hots, changes = [], []
    for place in places:
        positions = positions_of(place, delta.neurons)
        one_hot = torch.zeros(len(positions), place.features)
        one_hot[torch.arange(len(positions)), positions] = 1.0
        one_hots.append(one_hot)
        changes.append(delta.tensors[place.key].to("cpu", torch.float32))
    if places[0].side == "output":
        return torch.cat(changes).contiguous(), torch.cat(one_hots).T.contiguous()
    return torch.cat(one_hots).contiguous(), torch.cat(changes, 1).contiguous()


def _allowed(rank: int) -> int:
    for allowed in VLLM_RANKS:
        if rank <= allowed:
            return allowed
    raise UnsupportedModelError(
        f"a projection has {rank} trained rows or columns, vLLM's largest rank is {VLLM_RANKS[-1]}; export a merged checkpoint instead"
    )


def _padded(down: Tensor, up: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    missing = rank - down.shape[0]
    return torch.cat([down, down.new_zeros(missing, down.shape[1])]), torch.cat([up, up.new_zeros(up.shape[0], missing)], 1)


def _config(model: LanguageModel, delta: Delta, ranks: dict[str, int], rank: int, base: str) -> dict[str, Any]:
    import peft

    others = {name: value for name, value in ranks.items() if value != rank}
    places = [model.anatomy.place(key) for key, _ in delta.neurons.items()]
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=rank,
        lora_dropout=0.0,
        bias="none",
        target_modules=sorted(ranks),
        rank_pattern=others,
        alpha_pattern=dict(others),
        fan_in_fan_out=any(place.transposed for place in places),
        task_type="CAUSAL_LM",
        base_model_name_or_path=base,
        inference_mode=True,
    )
    settings = config.to_dict()
    return {**settings, "target_modules": sorted(ranks)}


def save_checkpoint(folder: Path, model: LanguageModel, dtype: torch.dtype | None = None) -> None:
    """Writes a whole model as an ordinary checkpoint, with its tokenizer and whatever else the folder it came from holds.

    Args:
        folder: to write; it appears whole, what was there before is replaced at the end.
        model: without adapters and attached deltas.
        dtype: of the saved weights; None for the model's own.

    Raises:
        UsageError: adapters or attached deltas. RunError: the folder cannot be written.

    Source: none; the ordinary form of a Hugging Face checkpoint.
    """
    check_plain(model)
    with quiet(), _whole(folder) as partial:
        inner = model.inner
        state = inner.state_dict()
        if dtype is not None:
            state = {name: value.to(dtype) if value.is_floating_point() else value for name, value in state.items()}
        inner.save_pretrained(partial, state_dict=state)
        if dtype is not None:
            config = read_json(partial / "config.json", constants=True)
            name = str(dtype).removeprefix("torch.")
            write_json(partial / "config.json", {**config, **{key: name for key in ("dtype", "torch_dtype") if key in config}})
        if model.tokenizer is not None:
            model.tokenizer.save_pretrained(partial)
        copy_companions(model, partial)


@contextlib.contextmanager
def _whole(folder: Path) -> Iterator[Path]:
    """A folder beside the wanted one that takes its place at the end; after an exception, what was there before is as it was."""
    if folder.exists() and not (folder.is_dir() and ((folder / "config.json").is_file() or not any(folder.iterdir()))):
        raise RunError(f"{str(folder)!r} holds other things than a checkpoint, which would be replaced; choose an empty folder")
    try:
        with whole_folder(folder) as partial:
            yield partial
    except SafetensorError as error:  # an error of its own for a full disk
        raise RunError(f"cannot write {str(folder)!r} ({str(error)[:120]}); choose a writable place with free space") from error
