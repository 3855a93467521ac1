"""PEFT adapters: stacked, unmerged, switched for a block, with every missing or unknown weight an error."""

import contextlib
import dataclasses
import math
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from safety_neurons.errors import MismatchError, ModelError, UsageError, first_line
from safety_neurons.model.files import read_config, read_headers, weight_files

WEIGHTS = "adapter_model.safetensors"
_EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight")
_HEADS = ("lm_head.weight", "embed_out.weight", "output_layer.weight")
_SIZES = (
    "r",
    "rank_pattern",
    "init_r",
    "target_r",
    "hybrid_r",
    "n_frequency",
    "n_frequency_pattern",
    "num_vectors",
    "vector_length",
)
_ROUTED = ("POLY", "XLORA", "ADAPTION_PROMPT")
"""Adapters whose share depends on the text or on a task: they are neither a change of weights nor can they be
merged.
"""


def adapter_config(folder: Path) -> Any:
    """The PEFT configuration in an adapter's folder.

    Raises:
        ModelError: Not an adapter's folder, a pickle instead of safetensors, or a type without weights inside
        the model.
    """
    import peft

    if not (folder / "adapter_config.json").is_file():
        raise ModelError(f"{folder}: no adapter_config.json; expected the folder of a PEFT adapter")
    if not (folder / WEIGHTS).is_file():
        pickled = " (adapter_model.bin is a pickle, which can run code; save it with safe_serialization)"
        raise ModelError(
            f"{folder}: no {WEIGHTS}{pickled if (folder / 'adapter_model.bin').exists() else ''}; "
            "expected the adapter's weights"
        )
    path = folder / "adapter_config.json"
    found = read_config(path)
    refuse_patterns(path, found)
    _refuse_values(path, found)
    try:
        config = peft.PeftConfig.from_pretrained(str(folder))
    except Exception as error:  # of several libraries
        raise ModelError(
            f"{folder}: adapter_config.json cannot be read ({first_line(error)}); expected a PEFT "
            "configuration"
        ) from error
    if config.is_prompt_learning:
        raise ModelError(
            f"{folder}: a {kind_of(config)} adapter adds virtual tokens; expected one that changes "
            "weights, such as LoRA or (IA)³"
        )
    if kind_of(config) in _ROUTED:
        raise ModelError(
            f"{folder}: a {kind_of(config)} adapter is no change of weights; expected one that is, "
            "such as LoRA or (IA)³"
        )
    _refuse_beginnings(folder, config)
    held = read_headers([folder / WEIGHTS])
    # VB-LoRA keeps the places of its vectors beside them.
    if named := sorted(name for name in held.whole if "indices" not in name):
        raise ModelError(
            f"{folder}: {WEIGHTS} says that {named[0]} holds whole numbers; expected numbers with fractions: "
            "download the adapter again"
        )
    widest = max(1, held.widest)
    name, size = max(_sizes(config), key=lambda entry: entry[1], default=("", 0))
    if size > widest:
        raise ModelError(
            f"{folder}: adapter_config.json says {name} {size:,}, and no weight of it is wider than "
            f"{widest}; expected its"
        )
    return config


def _refuse_values(path: Path, found: Mapping[str, Any]) -> None:
    """Refuses what PEFT would compute with as something else than what the file says: it looks into no value,
    so that the text "false" is true to it, and NaN is a scale.

    Raises:
        ModelError: Names the entry.
    """
    import peft
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    kind = found.get("peft_type")
    if not isinstance(kind, str) or kind not in PEFT_TYPE_TO_CONFIG_MAPPING:
        raise ModelError(
            f"{path}: says peft_type {str(kind)[:40]!r}; expected one that peft {peft.__version__} knows, "
            "such as LORA or IA3: save the adapter with PEFT, or update it"
        )
    for entry in dataclasses.fields(PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType(kind)]):
        value = found.get(entry.name)
        truth, number = entry.type in (bool, "bool"), entry.type in (int, float, "int", "float")
        if value is not None and (
            (truth and not isinstance(value, bool))
            or (number and (isinstance(value, bool) or not isinstance(value, int | float)))
        ):
            what = "true or false" if truth else "a number"
            raise ModelError(f"{path}: {entry.name} is {str(value)[:40]!r}; expected {what}: correct it")
    for name in ("rank_pattern", "alpha_pattern"):
        if not isinstance(value := found.get(name) or {}, dict):
            raise ModelError(
                f"{path}: {name} is {str(value)[:40]!r}; expected an object of numbers by modules: correct it"
            )
    for name, value in found.items():
        for number in value.values() if isinstance(value, dict) else (value,):
            if isinstance(number, float) and not math.isfinite(number):
                raise ModelError(f"{path}: {name} holds {number}; expected finite numbers: correct it")


_BEGINNINGS = ("pissa_niter_", "corda", "lora_ga", "loftq")
"""Ways in which adapters begin with a part of the base model's weights, taken out of these, that cannot be
computed again: from random numbers, data or gradients.
"""


def _refuse_beginnings(folder: Path, config: Any) -> None:
    begins = str(getattr(config, "init_lora_weights", "")).lower()
    if begins.startswith(_BEGINNINGS):
        raise ModelError(
            f"{folder}: adapter_config.json says init_lora_weights {begins[:40]!r}: a part of the base's "
            "weights that cannot be computed again is to be taken out of them; expected an adapter that was "
            "converted (save_pretrained with path_initial_model_for_weight_conversion), or true there and "
            "the residual model as the base"
        )
    if getattr(config, "alora_invocation_tokens", None):
        raise ModelError(
            f"{folder}: adapter_config.json says alora_invocation_tokens, from which on alone the adapter "
            "acts; expected one that is a change of weights, such as LoRA"
        )


def changes_base(folder: Path) -> bool:
    """Whether an adapter takes a part out of the base model's own weights when it is put on: PiSSA, OLoRA and
    KaSA do, so that the base is another model from then on, with the adapter off too.
    """
    found = read_config(folder / "adapter_config.json")
    begins = str(found.get("init_lora_weights")).lower()
    return begins in ("pissa", "olora") or found.get("kasa_config") is not None


def _sizes(config: Any) -> Iterator[tuple[str, int]]:
    """The numbers of a configuration that PEFT makes parts of weights by, of which each is as wide as some
    weight of the adapter.
    """
    for name in _SIZES:
        value = getattr(config, name, None)
        if kind_of(config) == "LOKR" and name in (
            "r",
            "rank_pattern",
        ):  # a rank beyond half the matrix means the whole matrix there
            continue
        for one in value.values() if isinstance(value, dict) else (value,):
            if isinstance(one, int):
                yield name, one


def refuse_patterns(path: Path, config: Mapping[str, Any]) -> None:
    """Refuses expressions in an adapter's configuration that can take longer than any name of a module is
    worth.

    PEFT matches them against the name of every module, and Python's matching goes back over repetitions
    inside repetitions without end.

    Raises:
        ModelError: Names the expression.
    """
    named = [config.get(name) for name in ("target_modules", "exclude_modules")]
    patterns = [value for value in named if isinstance(value, str)]
    for name in ("layers_pattern", "modules_to_save", "rank_pattern", "alpha_pattern"):
        value = config.get(name)
        patterns += (
            [value]
            if isinstance(value, str)
            else [part for part in (value if isinstance(value, list | dict) else ()) if isinstance(part, str)]
        )
    for pattern in patterns:
        if not _comes_to_an_end(pattern):
            raise ModelError(
                f"{path}: matching the expression {pattern[:80]!r} can take for ever; expected names of "
                "modules, or no nested repetitions"
            )


def _comes_to_an_end(pattern: str) -> bool:
    """Whether an expression repeats nothing that itself repeats or branches, and little one after the
    other.
    """
    parser = re._parser  # type: ignore[attr-defined]
    if len(pattern) > 4096:
        return False
    try:
        parsed = parser.parse(pattern)
    except (re.error, RecursionError, OverflowError):
        return False

    def repeats(item: Any, *, inside: bool) -> int:
        """Open-ended repetitions that a match may have to combine.

        A large number where they lie in one another.
        """
        total = 0
        for operation, argument in item:
            name = str(operation)
            if name in ("MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT"):
                low, high, body = argument
                wide = high == parser.MAXREPEAT or high > 8
                if inside:
                    return 1000
                total += (
                    repeats(body, inside=True) + 1
                    if wide
                    else repeats(body, inside=False) * max(1, int(high)) + (low != high)
                )
            elif name == "BRANCH":
                if inside:
                    return 1000
                total += max((repeats(branch, inside=False) for branch in argument[1]), default=0)
            elif name == "SUBPATTERN":
                total += repeats(argument[3], inside=inside)
            elif name in ("ASSERT", "ASSERT_NOT"):
                total += repeats(argument[1], inside=inside)
            elif name == "ATOMIC_GROUP":
                total += repeats(argument, inside=inside)
            elif name.startswith("GROUPREF"):
                return 1000
        return total

    return repeats(parsed, inside=False) <= 4


def foreign_base(base: str, folder: Path, adapters: Sequence[Path], configs: Sequence[Any]) -> list[str]:
    """A line for each adapter that says it was made for a model of another name than the one it is put on."""
    names = {part for part in (Path(base).name, folder.name, folder.parent.name) if part}
    notes = []
    for adapter, config in zip(adapters, configs, strict=True):
        made_for = str(config.base_model_name_or_path or "").rstrip("/")
        if made_for and Path(made_for).name.casefold() not in {name.casefold() for name in names}:
            notes.append(f"{adapter.name}: says it was made for {made_for!r} and is put on {base!r}")
    return notes


def not_done(adapters: Sequence[Path], configs: Sequence[Any]) -> list[str]:
    """A line for whatever an adapter's configuration says that PEFT passes over, or leaves to PEFT to say."""
    notes = []
    for adapter, config in zip(adapters, configs, strict=True):
        found = read_config(adapter / "adapter_config.json")
        known = {entry.name for entry in dataclasses.fields(config)}
        if asked := sorted(name for name in found if name not in known and found[name]):
            notes.append(
                f"{adapter.name}: adapter_config.json says {', '.join(asked)[:200]}, which the PEFT that is "
                "installed does not know and does not do"
            )
        if kind_of(config) != "LORA":
            continue
        if found.get("lora_alpha") is None:
            notes.append(
                f"{adapter.name}: adapter_config.json says no lora_alpha; PEFT's {config.lora_alpha} is taken"
            )
        modules = {name.partition(".lora_")[0] for name in read_headers([adapter / WEIGHTS]).shapes}
        for part in ("rank_pattern", "alpha_pattern"):
            idle = [
                pattern
                for pattern in getattr(config, part) or ()
                if not any(re.match(rf"(.*\.)?({pattern})$", module) for module in modules)
            ]
            if idle:
                notes.append(
                    f"{adapter.name}: the {part} names {idle[0][:80]!r}, which no weight of the adapter is of"
                )
    return notes


def resized_rows(folder: Path, base: Path) -> int:
    """Rows of the embedding that lies among an adapter's weights, where they are more or fewer than the base
    model's; else 0.
    """
    own, others = (_embedding_rows(files, 0) for files in ([folder / WEIGHTS], weight_files(base)))
    return own if own != others else 0


def _embedding_rows(files: list[Path], otherwise: int) -> int:
    shapes = read_headers(files).shapes.items()
    return next(
        (shape[0] for key, shape in shapes if key.endswith(_EMBEDDINGS) and len(shape) == 2), otherwise
    )


def resized_vocabulary(model: Any, folder: Path) -> str:
    """Gives a model the vocabulary an adapter was saved with, where it has another size than the model's: its
    embedding and head.

    Returns:
        A line that says so; empty where there is nothing to do.

    Raises:
        MismatchError: The saved embedding does not fit, or the head that belongs to it is missing.
    """
    embedding = model.get_input_embeddings()
    before = int(embedding.weight.shape[0])
    rows = _embedding_rows([folder / WEIGHTS], before)
    if rows == before:
        return ""
    weights = safetensors.torch.load_file(folder / WEIGHTS)
    saved = next(value for key, value in weights.items() if key.endswith(_EMBEDDINGS) and value.ndim == 2)
    head = next((value for key, value in weights.items() if key.endswith(_HEADS) and value.ndim == 2), None)
    output = model.get_output_embeddings()
    tied = output is None or output.weight is embedding.weight
    if (
        saved.shape[1] != embedding.weight.shape[1]
        or (head is None and not tied)
        or (head is not None and head.shape[0] != rows)
    ):
        raise MismatchError(
            f"{folder}: brings an embedding of {list(saved.shape)} for a model with "
            f"{list(embedding.weight.shape)}"
            f"{'' if head is not None or tied else ' and no head of as many tokens'}; "
            "expected both for its own vocabulary"
        )
    model.resize_token_embeddings(rows, mean_resizing=False)
    with torch.no_grad():
        model.get_input_embeddings().weight.copy_(saved)
        if head is not None:
            model.get_output_embeddings().weight.copy_(head)
    return (
        f"{folder.name}: brings an embedding of {rows:,} tokens, which is used in the place of the model's "
        f"{before:,}"
    )


_NEUTRAL = {"LORA": ("lora_B.", 0.0), "IA3": ("ia3_l", 1.0)}
"""By kind, which weights of an adapter change nothing at which value, as they are before any training."""


def untrained(adapters: Sequence[Path], configs: Sequence[Any]) -> list[str]:
    """A line for each adapter that changes nothing: its weights are what they begin as, or its scale is 0."""
    notes = []
    for adapter, config in zip(adapters, configs, strict=True):
        part, neutral = _NEUTRAL.get(kind_of(config), ("", 0.0))
        with safe_open(adapter / WEIGHTS, framework="pt") as opened:
            names = [name for name in opened.keys() if "lora_A." not in name]  # noqa: SIM118 - not a mapping
            weightless = getattr(config, "lora_alpha", None) == 0 and not config.alpha_pattern
            idle = all(
                part in name and (weightless or bool((opened.get_tensor(name).float() == neutral).all()))
                for name in names
            )
        if part and names and idle:
            why = "its lora_alpha is 0" if weightless else "its weights are what they begin as"
            notes.append(f"{adapter.name}: the adapter changes nothing ({why}); was it trained and saved?")
    return notes


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
        types = ", ".join(f"{name} is {kind}" for kind, name in kinds.items())
        raise UsageError(
            f"adapters of several types ({types}): one model holds one type unmerged; pass "
            "--merge-adapters to merge in order"
        )


def attach(model: nn.Module, folders: Sequence[Path], configs: Sequence[Any]) -> nn.Module:
    """Puts adapters on a model, unmerged, and returns the PEFT model; their names are `a0`, `a1`, … in order.

    Which of them act is decided by `activate`. Without any, the model itself, and PEFT, whose import takes
    seconds and a hundred megabytes, is left alone.

    Raises:
        ModelError: An adapter that does not fit the model, or with weights missing or unknown.
    """
    if not folders:
        return model
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
        except Exception as error:  # each kind of adapter fails in its own way
            raise ModelError(
                f"{folder}: the adapter does not fit the model ({first_line(error)}); expected one made "
                "for it"
            ) from error
        _load_weights(adapted, name, folder)
    return adapted.eval()


def merge(model: nn.Module, folders: Sequence[Path], configs: Sequence[Any]) -> nn.Module:
    """Merges adapters into the weights, one after the other, and returns the plain model.

    Raises:
        ModelError: An adapter that does not fit, or weights (quantised ones, say) that cannot take it up.
    """
    for folder, config in zip(folders, configs, strict=True):
        adapted: Any = attach(model, [folder], [config])
        activate(adapted, ["a0"])
        model = merged(adapted, f"{folder}: the adapter")
    return model


def merged(adapted: Any, what: str) -> nn.Module:
    """The plain model of a PEFT model, with the adapters that act merged into its own weights.

    Args:
        adapted: The PEFT model, which is used up.
        what: What is merged, as an error calls it.

    Raises:
        ModelError: Weights that two layers share, as where an adapter repeats layers, or that cannot take up
        an adapter.
    """
    if shared := _shared(adapted):
        raise ModelError(
            f"{what} cannot be merged, since it would change two layers: {' and '.join(shared)} share "
            "their weights; keep it unmerged (without --merge-adapters)"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            plain: Any = adapted.merge_and_unload()
    except Exception as error:  # each kind of adapter fails in its own way
        raise ModelError(
            f"{what} cannot be merged ({first_line(error)}); keep it unmerged (without --merge-adapters)"
        ) from error
    if hasattr(plain, "peft_config"):
        del plain.peft_config
    return plain


def _shared(adapted: Any) -> tuple[str, str] | None:
    """A layer that adapters add to, and another one that has the same weights, such as an embedding and the
    head that is tied to it.
    """
    from peft.tuners.trainable_tokens import (
        TrainableTokensLayer,
    )  # it changes both where both are one, merged or not
    from peft.tuners.tuners_utils import BaseTunerLayer

    changed = {
        id(value): (name, layer.get_base_layer())
        for name, layer in adapted.get_base_model().named_modules()
        if isinstance(layer, BaseTunerLayer) and not isinstance(layer, TrainableTokensLayer)
        for value in layer.get_base_layer().parameters(recurse=False)
    }
    for name, module in adapted.get_base_model().named_modules():
        for value in module.parameters(recurse=False):
            if id(value) in changed and changed[id(value)][1] is not module:
                return changed[id(value)][0], name.removesuffix(".base_layer")
    return None


def is_adapted(model: Any) -> bool:
    """Whether the model is a PEFT model."""
    return hasattr(model, "peft_config") and hasattr(model, "get_base_model")


def activate(model: nn.Module, names: Sequence[str]) -> None:
    """Makes exactly these adapters of a PEFT model act; none of them gives the plain base model.

    Several at once are set on the inner tuner, since the PEFT model itself takes one name only. Which
    parameters require gradients is left as it was.
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
    if all(
        layer._disable_adapters == wanted[1] and (not names or list(layer.active_adapters) == wanted[0])
        for layer in layers
    ):
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

    return [
        module for module in model.modules() if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper))
    ]


def _load_weights(adapted: Any, name: str, folder: Path) -> None:
    import peft

    try:
        weights: dict[str, Tensor] = safetensors.torch.load_file(folder / WEIGHTS)
    except (SafetensorError, OSError) as error:
        raise ModelError(
            f"{folder / WEIGHTS}: cannot be read ({first_line(error)}); expected a safetensors file"
        ) from error
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        own = peft.get_peft_model_state_dict(adapted, adapter_name=name, save_embedding_layers=False)
    others = set(adapted.peft_config) - {
        name
    }  # PEFT before 0.19 hands out every (IA)³ adapter's vectors, the others' names in their keys
    expected = {key: value.shape for key, value in own.items() if not others.intersection(key.split("."))}
    weights = {
        key: value
        for key, value in weights.items()
        if key in expected or not _same_as_base(adapted, key, value)
    }
    missing, unknown = sorted(expected.keys() - weights.keys()), sorted(weights.keys() - expected.keys())
    if missing or unknown:
        what = [
            f"{len(keys)} {word} ({keys[0]})"
            for keys, word in ((missing, "missing"), (unknown, "unknown"))
            if keys
        ]
        raise ModelError(
            f"{folder / WEIGHTS}: adapter weights do not fit the model: {' and '.join(what)}; expected "
            f"the {len(expected)} it adapts"
        )
    for key, value in weights.items():
        if value.shape != expected[key]:
            raise ModelError(
                f"{folder / WEIGHTS}: {key} has shape {list(value.shape)}; expected "
                f"{list(expected[key])} for this model"
            )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft.set_peft_model_state_dict(adapted, weights, adapter_name=name)


def _same_as_base(adapted: Any, key: str, value: Tensor) -> bool:
    """Whether a weight in an adapter's file is only a copy of the base model's own, as PEFT adds embeddings
    at times.
    """
    wanted = key.removeprefix("base_model.model.").replace(".base_layer.", ".")
    for name, parameter in adapted.get_base_model().named_parameters(remove_duplicate=False):
        if name.replace(".base_layer.", ".") == wanted:
            return parameter.shape == value.shape and bool(
                (parameter.detach().cpu() == value.to(parameter.dtype)).all()
            )
    return False
