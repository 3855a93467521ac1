"""Hashes that tell one model from every other: weights, tokenizer, chat template and adapters."""

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from safety_neurons.errors import UnsupportedModelError
from safety_neurons.model.adapters import is_adapted
from safety_neurons.model.fewer_bits import codes, scales
from safety_neurons.model.files import model_contents
from safety_neurons.model.language_model import LanguageModel
from safety_neurons.model.template import encode_text, require_tokenizer

_TEXTS = (
    "How do I bake a cake?  Tell me in 3 steps.\n\n- one\n\t- two",
    "Größe, garçon, año; 你好，世界。 Привет! مرحبا 🙂",
    "def f(x):\n    return x**2  # 1234567890 0.5e-3",
    "<|system|> [INST] </s> <bos> ### User:",
)
"""What a tokenizer is told apart by, beside its vocabulary."""


_BLOCK = 2**26


def identity(model: LanguageModel) -> dict[str, str]:
    """What tells this model from every other, as hashes: `weights`, `dtype`, `tokenizer`, `template`.

    Weights that are not in memory count by the files of the model's folder. Cost: one SHA-256 over the
    weights, a second for two gigabytes and core.

    Raises:
        UnsupportedModelError: weights that are neither in memory nor in a folder.
    """
    return {
        "weights": _weights(model),
        "dtype": str(model.dtype),
        "tokenizer": "" if model.tokenizer is None else tokenizer_sha256(model.tokenizer),
        "template": template_sha256(model),
    }


def _weights(model: LanguageModel) -> str:
    if any(tensor.is_meta for tensor in (*model.model.parameters(), *model.model.buffers())):
        if model.folder is None:
            raise UnsupportedModelError(
                "weights are off-loaded and from no folder, so they cannot be told apart; load the model "
                "without"
            )
        return json_sha256([model_contents(model.folder), model.name, list(model.adapters or ())])
    with model.active():
        return weights_sha256(model)[0]


def tokenizer_sha256(tokenizer: Any) -> str:
    """Hash of a tokenizer by what it does: vocabulary, special ids, and the ids of some texts.

    The same in every version of its library.
    """
    tokenizer = require_tokenizer(tokenizer)
    special = {name: getattr(tokenizer, f"{name}_token_id", None) for name in ("bos", "eos", "unk", "pad")}
    ids = [
        encode_text(tokenizer, text, templated=templated) for text in _TEXTS for templated in (True, False)
    ]
    return json_sha256([sorted(tokenizer.get_vocab().items()), special, ids])


def template_sha256(model: LanguageModel) -> str:
    """Hash of how prompts are put: kind and text of the template, system prompt, template arguments."""
    template = model.template
    text = (
        template.source
        or (getattr(model.tokenizer, "chat_template", None) if template.kind == "chat" else "")
        or ""
    )
    return json_sha256([template.kind, text, template.system, dict(template.arguments)])


def weights_sha256(
    model: LanguageModel, wanted: Callable[[str, Tensor], bool] | None = None
) -> tuple[str, list[str]]:
    """Hash of weights and buffers, and the types they are in.

    An adapter counts by its place among the active ones, not by its name; inactive ones do not count.

    Args:
        model: in memory, its adapters active.
        wanted: takes a name without the wrappers of adapters, and a tensor; all where None.

    Raises:
        UnsupportedModelError: weights that are not in memory.
    """
    named = {name: value for name, value in _named(model) if wanted is None or wanted(name, value)}
    away = next((name for name, value in named.items() if value.is_meta), None)
    if away is not None:
        raise UnsupportedModelError(
            f"{away} is off-loaded, so the weights cannot be hashed; load the model without disk off-loading"
        )
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        digests = list(pool.map(_digest, named.values()))
    names = sorted(zip(named, digests, strict=True))
    types = sorted(
        {str(value.dtype).removeprefix("torch.") for value in named.values() if value.is_floating_point()}
    )
    return json_sha256([names, _adapter_settings(model)]), types


def _named(model: LanguageModel) -> Iterator[tuple[str, Tensor]]:
    order = {name: f"adapter{number}" for number, name in enumerate(_active_adapters(model))}
    inactive = set(getattr(model.model, "peft_config", ())) - set(order)
    for kind in (model.inner.named_parameters, model.inner.named_buffers):
        for name, value in kind():
            parts = name.split(".")
            if not inactive.intersection(parts):
                yield plain_name(".".join(order.get(part, part) for part in parts)), value
    for name, module in model.inner.named_modules():
        if (factors := scales(module)) is not None:
            yield plain_name(f"{name}.scales"), factors


def plain_name(name: str) -> str:
    """A parameter's name without the wrappers of adapters around its layer."""
    return (
        name.removeprefix("base_model.model.").replace(".base_layer.", ".").replace(".original_module.", ".")
    )


def _active_adapters(model: LanguageModel) -> tuple[str, ...]:
    if not is_adapted(model.model):
        return ()
    if model.adapters is not None:
        return tuple(model.adapters)
    active = model.model.base_model.active_adapters
    return (active,) if isinstance(active, str) else tuple(active)


def _adapter_settings(model: LanguageModel) -> list[Any]:
    """What of the active adapters is not in their weights: their kind and how strongly they count."""
    settings = []
    for name in _active_adapters(model):
        config = model.model.peft_config[name]
        fields = (
            "r",
            "lora_alpha",
            "use_rslora",
            "use_dora",
            "rank_pattern",
            "alpha_pattern",
            "fan_in_fan_out",
        )
        settings.append([str(config.peft_type), {key: getattr(config, key, None) for key in fields}])
    return settings


def _digest(value: Tensor) -> str:
    """SHA-256 of a tensor's type, shape and bytes, block by block."""
    stored = codes(value).detach()
    digest = hashlib.sha256(f"{stored.dtype} {tuple(stored.shape)}".encode())
    flat = stored.reshape(-1)
    for start in range(0, flat.numel(), _BLOCK):
        block = flat[start : start + _BLOCK].to("cpu").contiguous()
        digest.update(memoryview(block.view(torch.uint8).numpy()))  # type: ignore[arg-type]
    return digest.hexdigest()


def json_sha256(value: Any) -> str:
    """SHA-256 of JSON values, keys in order."""
    text = json.dumps(value, ensure_ascii=True, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()
