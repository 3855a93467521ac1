"""PEFT adapters: stacked, unmerged, switched for a block, with every missing or unknown weight an error."""

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor, nn

from safety_neurons import strict_json
from safety_neurons.errors import ModelError, UsageError

WEIGHTS = "adapter_model.safetensors"


def adapter_config(folder: Path) -> Any:
    """The PEFT configuration in an adapter's folder.

    Raises:
        ModelError: Not an adapter's folder, a pickle instead of safetensors, or a type without weights inside the model.
    """
    import peft

    if not (folder / "adapter_config.json").is_file():
        raise ModelError(f"{folder}: no adapter_config.json; expected the folder of a PEFT adapter")
    if not (folder / WEIGHTS).is_file():
        pickled = " (adapter_model.bin is a pickle, which can run code; save it with safe_serialization)"
        raise ModelError(
            f"{folder}: no {WEIGHTS}{pickled if (folder / 'adapter_model.bin').exists() else ''}; expected the adapter's weights"
        )
    try:
        strict_json.loads((folder / "adapter_config.json").read_bytes(), constants=True)
        config = peft.PeftConfig.from_pretrained(str(folder))
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise ModelError(f"{folder}: adapter_config.json cannot be read ({first_line(error)}); expected a PEFT configuration") from error
    if config.is_prompt_learning:
        raise ModelError(
            f"{folder}: a {kind_of(config)} adapter adds virtual tokens; expected one that changes weights, such as LoRA or (IA)³"
        )
    return config


def kind_of(config: Any) -> str:
    """An adapter's PEFT type as text, such as `LORA` or `IA3`."""
    return str(getattr(config.peft_type, "value", config.peft_type))


def check_one_kind(folders: Sequence[Path], configs: Sequence[Any]) -> None:
    """Refuses adapters of several PEFT types, which one model cannot hold unmerged.

    Raises:
        UsageError: More than one type; the message names `--merge-adapters`.
    """
    kinds = {kind_of(config): folder.name for folder, config in zip(folders, configs, strict=True)}
    if len(kinds) > 1:
        found = ", ".join(f"{name} is {kind}" for kind, name in kinds.items())
        raise UsageError(f"adapters of several types ({found}): one model holds one type unmerged; pass --merge-adapters to merge in order")


def attach(model: nn.Module, folders: Sequence[Path], configs: Sequence[Any]) -> nn.Module:
    """Puts adapters on a model, unmerged, and returns the PEFT model; their names are `a0`, `a1`, … in order.

    Which of them act is decided by `activate`.

    Raises:
        ModelError: An adapter that does not fit the model, or with weights missing or unknown.
    """
    import peft

    adapted: Any = None
    for number, (folder, config) in enumerate(zip(folders, configs, strict=True)):
        name = f"a{number}"
        config.inference_mode = True
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                if adapted is None:
                    adapted = peft.PeftModel(model, config, adapter_name=name)
                else:
                    adapted.add_adapter(name, config)
        except (ValueError, RuntimeError, TypeError, KeyError) as error:
            raise ModelError(f"{folder}: the adapter does not fit the model ({first_line(error)}); expected one made for it") from error
        _load_weights(adapted, name, folder)
    return adapted.eval() if adapted is not None else model


def merge(model: nn.Module, folders: Sequence[Path], configs: Sequence[Any]) -> nn.Module:
    """Merges adapters into the weights, one after the other, and returns the plain model.

    Raises:
        ModelError: An adapter that does not fit, or weights (quantised ones, say) that cannot take it up.
    """
    for folder, config in zip(folders, configs, strict=True):
        adapted: Any = attach(model, [folder], [config])
        activate(adapted, ["a0"])
        try:
            model = adapted.merge_and_unload()
        except (ValueError, RuntimeError, TypeError) as error:
            raise ModelError(f"{folder}: the adapter cannot be merged ({first_line(error)}); leave --merge-adapters out") from error
        if hasattr(model, "peft_config"):
            del model.peft_config
    return model


def is_adapted(model: Any) -> bool:
    """Whether the model is a PEFT model."""
    return hasattr(model, "peft_config") and hasattr(model, "get_base_model")


def activate(model: nn.Module, names: Sequence[str]) -> None:
    """Makes exactly these adapters of a PEFT model act; none of them gives the plain base model.

    Several at once are set on the inner tuner, since the PEFT model itself takes one name only. Which parameters require gradients is
    left as it was.
    """
    trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    tuner: Any = model.base_model
    if names:
        tuner.set_adapter(list(names))
    for layer in _tuned(model):
        layer._disable_adapters = not names
    for parameter, wanted in trainable:
        if parameter.requires_grad != wanted:
            parameter.requires_grad_(wanted)


@contextlib.contextmanager
def activated(model: nn.Module, names: Sequence[str]) -> Iterator[None]:
    """`activate` for a block; afterwards, also after an exception, what was active before is active again."""
    tuner: Any = model.base_model
    layers = _tuned(model)
    wanted = (list(names), not names)
    if all(layer._disable_adapters == wanted[1] and (not names or list(layer.active_adapters) == wanted[0]) for layer in layers):
        yield
        return
    before = [(layer, layer._active_adapter, layer._disable_adapters) for layer in layers]
    active = tuner.active_adapter
    try:
        activate(model, names)
        yield
    finally:
        tuner.active_adapter = active
        for layer, adapter, disabled in before:
            layer._active_adapter, layer._disable_adapters = adapter, disabled


def _tuned(model: nn.Module) -> list[Any]:
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import AuxiliaryTrainingWrapper

    return [module for module in model.modules() if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper))]


def _load_weights(adapted: Any, name: str, folder: Path) -> None:
    import peft

    try:
        weights: dict[str, Tensor] = safetensors.torch.load_file(folder / WEIGHTS)
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{folder / WEIGHTS}: cannot be read ({first_line(error)}); expected a safetensors file") from error
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        own = peft.get_peft_model_state_dict(adapted, adapter_name=name, save_embedding_layers=False)
    others = set(adapted.peft_config) - {name}  # PEFT before 0.19 hands out every (IA)³ adapter's vectors, the others' names in their keys
    expected = {key: value.shape for key, value in own.items() if not others.intersection(key.split("."))}
    weights = {key: value for key, value in weights.items() if key in expected or not _same_as_base(adapted, key, value)}
    missing, unknown = sorted(expected.keys() - weights.keys()), sorted(weights.keys() - expected.keys())
    if missing or unknown:
        what = [f"{len(keys)} {word} ({keys[0]})" for keys, word in ((missing, "missing"), (unknown, "unknown")) if keys]
        raise ModelError(
            f"{folder / WEIGHTS}: adapter weights do not fit the model: {' and '.join(what)}; expected the {len(expected)} it adapts"
        )
    for key, value in weights.items():
        if value.shape != expected[key]:
            raise ModelError(f"{folder / WEIGHTS}: {key} has shape {list(value.shape)}; expected {list(expected[key])} for this model")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft.set_peft_model_state_dict(adapted, weights, adapter_name=name)


def _same_as_base(adapted: Any, key: str, value: Tensor) -> bool:
    """Whether a weight in an adapter's file is only a copy of the base model's own, as PEFT adds embeddings at times."""
    wanted = key.removeprefix("base_model.model.").replace(".base_layer.", ".")
    for name, parameter in adapted.get_base_model().named_parameters():
        if name.replace(".base_layer.", ".") == wanted:
            return parameter.shape == value.shape and bool((parameter.detach().cpu() == value.to(parameter.dtype)).all())
    return False


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, short enough for one line of our own."""
    text = str(error).strip()
    return text.splitlines()[0][:200] if text else type(error).__name__
