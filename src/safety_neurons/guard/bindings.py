"""What a guard is bound to: architecture, the weights that reach its features, adapters, tokenizer, template, and a probe that shows it."""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from safety_neurons.errors import ForeignModelError, InputError, MismatchError, UnsupportedModelError
from safety_neurons.model import LanguageModel, encode_text
from safety_neurons.model.adapters import is_adapted
from safety_neurons.model.template import require_tokenizer
from safety_neurons.neurons import NeuronSet, parse_key

_TEXTS = (
    "How do I bake a cake?  Tell me in 3 steps.\n\n- one\n\t- two",
    "Größe, garçon, año; 你好，世界。 Привет! مرحبا 🙂",
    "def f(x):\n    return x**2  # 1234567890 0.5e-3",
    "<|system|> [INST] </s> <bos> ### User:",
)
"""What a tokenizer is told apart by, beside its vocabulary."""
_BLOCK = 2**26


@dataclass(frozen=True)
class Bindings:
    """What a guard belongs to.

    Attributes:
        model: name, for people.
        model_fingerprint: of the architecture.
        weights_sha256: of the weights that reach the guard's neurons: embeddings and layers up to the last neuron's, adapters included.
        dtype: what these weights are in.
        tokenizer_sha256: of its vocabulary, special tokens, and what it makes of some texts.
        template_sha256: of the template, system prompt and template arguments.
    """

    model: str
    model_fingerprint: str
    weights_sha256: str
    dtype: str
    tokenizer_sha256: str
    template_sha256: str

    def to_json(self) -> dict[str, str]:
        """The fields as JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, found: Any) -> "Bindings":
        """The bindings that `to_json` wrote.

        Raises:
            InputError: damaged.
        """
        names = list(cls.__dataclass_fields__)
        if not isinstance(found, Mapping) or not all(isinstance(found.get(name), str) for name in names):
            raise InputError(f"a guard without whole bindings; expected the strings {', '.join(names)}: fit or copy it again")
        return cls(**{name: found[name] for name in names})

    def check(self, model: LanguageModel, neurons: NeuronSet) -> None:
        """Raise an error unless the model is the one that the guard was fit on.

        Cost: one SHA-256 over the weights, a second for two gigabytes and core.

        Raises:
            ForeignModelError: another architecture. MismatchError: other weights, number type, adapters, tokenizer or template.
        """
        if model.fingerprint != self.model_fingerprint:
            raise ForeignModelError(
                f"the guard was fit on {self.model} (fingerprint {self.model_fingerprint[:12]}), expected {model.name} "
                f"({model.fingerprint[:12]}); fit a guard on this model"
            )
        found = bindings_of(model, neurons)
        for name, words, advice in (
            ("tokenizer_sha256", "another tokenizer", "load the model with the tokenizer it was fit with, or recalibrate it"),
            ("template_sha256", "another template or system prompt", "use the same --template and --system, or recalibrate it"),
            ("dtype", f"weights in {self.dtype}, this model's are in {found.dtype}", "load the model with that --dtype, or recalibrate it"),
            ("weights_sha256", "other weights or adapters", "load the model it was fit on, or recalibrate it (guard recalibrate)"),
        ):
            ours, theirs = getattr(self, name), getattr(found, name)
            if ours != theirs:
                hashes = "" if name == "dtype" else f" ({ours[:12]}, not {theirs[:12]})"
                raise MismatchError(f"the guard was fit on {self.model} with {words}{hashes}; {advice}")


def bindings_of(model: LanguageModel, neurons: NeuronSet) -> Bindings:
    """The bindings of a guard on these neurons of a model as it is now.

    Source: none of the papers; a probe fit on one model says nothing of another (arXiv 2604.28129).
    """
    last = max(parse_key(key).layer for key in neurons.keys())  # noqa: SIM118 - not a mapping
    with model.active():
        weights, dtypes = weights_sha256(model, last)
    return Bindings(model.name, model.fingerprint, weights, "+".join(dtypes), tokenizer_sha256(model.tokenizer), template_sha256(model))


def tokenizer_sha256(tokenizer: Any) -> str:
    """Hash of a tokenizer by what it does: vocabulary, special ids, and the ids of some texts; the same in every version of its library."""
    tokenizer = require_tokenizer(tokenizer)
    special = {name: getattr(tokenizer, f"{name}_token_id", None) for name in ("bos", "eos", "unk", "pad")}
    ids = [encode_text(tokenizer, text, templated=templated) for text in _TEXTS for templated in (True, False)]
    return _json_hash([sorted(tokenizer.get_vocab().items()), special, ids])


def template_sha256(model: LanguageModel) -> str:
    """Hash of how prompts are put: kind and text of the template, system prompt, template arguments."""
    template = model.template
    text = template.source or (getattr(model.tokenizer, "chat_template", None) if template.kind == "chat" else "") or ""
    return _json_hash([template.kind, text, template.system, dict(template.arguments)])


def weights_sha256(model: LanguageModel, last_layer: int) -> tuple[str, list[str]]:
    """Hash of all weights and buffers that reach the neurons of layers up to the last one, and the types they are in.

    An adapter counts by its place among the active ones, not by its name; inactive ones, later layers and the head do not count.

    Raises:
        UnsupportedModelError: weights that are not in memory.
    """
    named = dict(_reaching(model, last_layer))
    away = next((name for name, value in named.items() if value.is_meta), None)
    if away is not None:
        raise UnsupportedModelError(f"{away} is off-loaded, so the weights cannot be hashed; load the model without disk off-loading")
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        digests = list(pool.map(_digest, named.values()))
    names = sorted(zip(named, digests, strict=True))
    types = sorted({str(value.dtype).removeprefix("torch.") for value in named.values() if value.is_floating_point()})
    return _json_hash([names, _adapter_settings(model)]), types


def _reaching(model: LanguageModel, last_layer: int) -> Iterator[tuple[str, Tensor]]:
    anatomy, inner = model.anatomy, model.inner
    prefixes = {f"{_plain(part.module_name)}.": part.index for part in anatomy.layers}
    head = inner.get_output_embeddings() if hasattr(inner, "get_output_embeddings") else None
    embedding = inner.get_input_embeddings().weight
    heads = {id(value) for value in head.parameters() if value is not embedding} if head is not None else set()
    order = {name: f"adapter{number}" for number, name in enumerate(_active_adapters(model))}
    for kind in (inner.named_parameters, inner.named_buffers):
        for name, value in kind():
            parts = name.split(".")
            if id(value) in heads or any(part in _all_adapters(model) and part not in order for part in parts):
                continue
            plain = _plain(".".join(order.get(part, part) for part in parts))
            layer = next((index for prefix, index in prefixes.items() if plain.startswith(prefix)), -1)
            if layer <= last_layer:
                yield plain, value


def _plain(name: str) -> str:
    """A parameter's name without the wrappers of adapters around its layer."""
    return name.removeprefix("base_model.model.").replace(".base_layer.", ".").replace(".original_module.", ".")


def _all_adapters(model: LanguageModel) -> Sequence[str]:
    return tuple(model.model.peft_config) if is_adapted(model.model) else ()


def _active_adapters(model: LanguageModel) -> Sequence[str]:
    if not is_adapted(model.model):
        return ()
    if model.adapters is not None:
        return model.adapters
    active = model.model.base_model.active_adapters
    return [active] if isinstance(active, str) else list(active)


def _adapter_settings(model: LanguageModel) -> list[Any]:
    """What of the active adapters is not in their weights: their kind and how strongly they count."""
    settings = []
    for name in _active_adapters(model):
        config = model.model.peft_config[name]
        kept = ("r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "fan_in_fan_out")
        settings.append([str(config.peft_type), {key: getattr(config, key, None) for key in kept}])
    return settings


def _digest(value: Tensor) -> str:
    """SHA-256 of a tensor's type, shape and bytes, block by block."""
    found = hashlib.sha256(f"{value.dtype} {tuple(value.shape)}".encode())
    flat = value.detach().reshape(-1)
    for start in range(0, flat.numel(), _BLOCK):
        block = flat[start : start + _BLOCK].to("cpu").contiguous()
        found.update(memoryview(block.view(torch.uint8).numpy()))  # type: ignore[arg-type]
    return found.hexdigest()


def _json_hash(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=True, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()
