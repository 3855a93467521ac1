"""Outlines: what is known of a model from its configuration alone, on the meta device, without weights."""

import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from safety_neurons.errors import InputError, ModelError
from safety_neurons.model.adapters import changes_base
from safety_neurons.model.anatomy import resolve
from safety_neurons.model.files import weight_files
from safety_neurons.model.language_model import LanguageModel, context_of
from safety_neurons.model.loading import without_weights
from safety_neurons.model.placement import Placement
from safety_neurons.model.sites import Anatomy, LayerAnatomy, count_parameters, unwrapped
from safety_neurons.model.template import Prompting, Template, encode_text, template_for
from safety_neurons.neurons import SiteTable
from safety_neurons.prompt_lists import Prompt, Prompts

BYTES_PER_TOKEN, TEMPLATE_TOKENS = 4, 16
"""What stands for a tokenizer where there is none: UTF-8 bytes of a token, and tokens of a template."""
TOKENIZER = 9
"""Bytes that a tokenizer keeps in memory for each of its file: 7.7 to 9.0 of three real ones."""

BLOCK = 64
"""Weights that share a float32 scale in bitsandbytes' 4 bits."""

_SIZES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
UNLIKE = ("A", "zebra")
"""Texts that begin unlike each other, by which a template's own tokens are told from a prompt's."""


@dataclass
class Outline:
    """A model's shape: layers, sites and parameters, and how long prompts are for it.

    Attributes:
        name: What people call it.
        model: Its modules, on the meta device or in memory; no number of them is read.
        dtype: Type it computes in, such as `bfloat16`.
        quantize: `none`, `8bit` or `4bit`.
        device: Where its first weights go.
        tokenizer: None where the folder has none; token counts are then told from bytes of text.
        template: How prompts are put to it.
        prompt_folder: Folder of an organism's own prompts; None for every other model.
        held_bytes: Bytes of its weights where they are known from files or memory; 0 where the shapes tell.
        adapter_bytes: Bytes of its adapters' files.
        tokenizer_bytes: What tokenizers take of the memory of a model on the processor; of outlines of one
            run, the first that shares a tokenizer has it. 0 where nothing is known of it.
        notes: One line for each thing that makes a number less certain.
    """

    name: str
    model: nn.Module
    dtype: str
    quantize: str = "none"
    device: torch.device = torch.device("cpu")
    tokenizer: Any = None
    template: Template | None = None
    prompt_folder: Path | None = None
    held_bytes: int = 0
    adapter_bytes: int = 0
    tokenizer_bytes: int = 0
    notes: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, lm: LanguageModel) -> "Outline":
        """Of a model in memory."""
        tensors = {id(one): one for one in (*lm.model.parameters(), *lm.model.buffers())}
        return cls(
            lm.name,
            lm.model,
            str(lm.dtype).removeprefix("torch."),
            device=lm.device,
            tokenizer=lm.tokenizer,
            template=lm.template,
            prompt_folder=lm.prompt_folder,
            held_bytes=sum(one.numel() * one.element_size() for one in tensors.values()),
        )

    @property
    def config(self) -> Any:
        """The configuration of the text decoder."""
        return unwrapped(self.model).config.get_text_config(decoder=True)

    @functools.cached_property
    def anatomy(self) -> Anatomy:
        """Where the neurons are, from the structure alone: nothing of it is proved."""
        return resolve(self.model)

    @property
    def table(self) -> SiteTable:
        """Sites and sizes of all neurons."""
        return self.anatomy.table

    @property
    def itemsize(self) -> int:
        """Bytes of an activation."""
        return _SIZES[self.dtype]

    @functools.cached_property
    def n_parameters(self) -> int:
        """Parameters, tied ones once."""
        return count_parameters(self.model)

    @property
    def n_ids(self) -> int:
        """Rows of the token embedding."""
        return int(unwrapped(self.model).get_input_embeddings().weight.shape[0])

    @property
    def hidden(self) -> int:
        """Width of the residual stream."""
        return int(self.config.hidden_size)

    @property
    def max_length(self) -> int | None:
        """Tokens of the context; None where no limit is told."""
        return context_of(self.config, self.tokenizer)

    @functools.cached_property
    def idle_parameters(self) -> int:
        """Parameters of routed experts that a token does not pass."""
        return sum(self._idle_in(layer) for layer in self.anatomy.layers)

    def _idle_in(self, layer: LayerAnatomy) -> int:
        if layer.experts is None:
            return 0
        held = sum(parameter.numel() for parameter in layer.experts.module.parameters())
        return round(
            held * (1 - min(1.0, self.anatomy.experts_per_token(layer.index) / layer.experts.n_experts))
        )

    def passed_in(self, layer: LayerAnatomy) -> int:
        """Parameters of a layer that a token passes."""
        return sum(parameter.numel() for parameter in layer.module.parameters()) - self._idle_in(layer)

    @property
    def active_parameters(self) -> int:
        """Parameters that a token passes, embeddings included."""
        return self.n_parameters - self.idle_parameters

    @functools.cached_property
    def decoder_parameters(self) -> int:
        """Parameters that a token is multiplied with below the head."""
        inner = unwrapped(self.model)
        ends = (inner.get_input_embeddings(), inner.get_output_embeddings())
        aside = {id(module.weight): module.weight.numel() for module in ends if module is not None}
        return self.active_parameters - sum(aside.values())

    @functools.cached_property
    def windows(self) -> tuple[int | None, ...]:
        """By layer, the tokens that its attention looks back on at most; None for all."""
        kinds = getattr(self.config, "layer_types", None)
        window = getattr(self.config, "sliding_window", None)
        layers = self.anatomy.layers
        if not window or getattr(self.config, "use_sliding_window", True) is False:
            return (None,) * len(layers)
        if kinds is None:
            return (int(window),) * len(layers)
        return tuple(int(window) if "sliding" in kinds[layer.index] else None for layer in layers)

    @functools.cached_property
    def weights_bytes(self) -> int:
        """Bytes of the weights in memory, adapters included: those of files or memory where these are there
        and kept as they are, otherwise by shape, type and bits.
        """
        if self.held_bytes and self.quantize == "none":
            return self.held_bytes + self.adapter_bytes
        linear = {
            id(module.weight): module.weight.shape
            for name, module in self.model.named_modules()
            if isinstance(module, nn.Linear) and module is not unwrapped(self.model).get_output_embeddings()
        }
        total = 0
        for parameter in self.model.parameters():
            size = parameter.numel() * self.itemsize
            if self.quantize != "none" and id(parameter) in linear:
                eight = parameter.numel() + 4 * parameter.shape[0]
                four = math.ceil(parameter.numel() / 2) + 4 * math.ceil(parameter.numel() / BLOCK)
                size = eight if self.quantize == "8bit" else four
            total += size
        buffers = sum(buffer.numel() * buffer.element_size() for buffer in self.model.buffers())
        return total + buffers + self.adapter_bytes

    def lengths(self, prompts: Prompts, reserve: int = 0) -> tuple[list[int], int]:
        """Tokens of every prompt, and how many prompts do not fit the context.

        Args:
            prompts: The prompts.
            reserve: Tokens of the context to leave for an answer.
        """
        counted = [self._tokens(prompt) for prompt in prompts]
        room = max(1, (self.max_length or 2**62) - reserve)
        return [min(count, room) for count in counted], sum(count > room for count in counted)

    def _tokens(self, prompt: Any) -> int:
        if self.tokenizer is None or self.template is None:
            return math.ceil(len(prompt.text.encode()) / BYTES_PER_TOKEN) + TEMPLATE_TOKENS
        try:
            return max(1, len(self._ids(prompt)))
        except InputError:  # the run leaves it out, and counts it
            return 1

    def _ids(self, prompt: Any) -> list[int]:
        assert self.template is not None
        text = self.template.render(self.tokenizer, prompt)
        return encode_text(self.tokenizer, text, templated=self.template.kind != "none")

    @functools.cached_property
    def common_start(self) -> int:
        """Tokens that a template begins every prompt with; 0 where that is not known."""
        if self.tokenizer is None or self.template is None:
            return 0
        try:
            pairs = zip(*(self._ids(Prompt("", text)) for text in UNLIKE), strict=False)
        except InputError:  # such as a template that must have a system prompt
            return 0
        return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


def outlines(specs: Sequence[str | Path], **options: Any) -> tuple[list[Outline], int]:
    """Outlines of models from their folders, with or without weights, and the bytes of all their weights in
    memory, a base that several share once.

    Args:
        specs: As for `load_several`.
        **options: As for `load`.

    Raises:
        ModelError: No folder, no configuration, or one of no known architecture. UsageError: As for `load`.
    """
    made: dict[Path, Outline] = {}
    found: list[Outline] = []
    alone = bool(options.get("merge_adapters"))
    for spec in specs:
        (base, *adapters), read = without_weights(spec, **options)
        alone = alone or any(map(changes_base, adapters))
        if base not in made:
            made[base] = _outline(base, read(), options)
        sizes = sum(file.stat().st_size for folder in adapters for file in folder.glob("*.safetensors"))
        shared = any(one.model is made[base].model for one in found)
        words = 0 if shared else made[base].tokenizer_bytes
        found.append(replace(made[base], name=str(spec), adapter_bytes=sizes, tokenizer_bytes=words))
    total = sum(outline.weights_bytes for outline in found)
    if len(made) == 1 and not alone:
        total -= (len(found) - 1) * (found[0].weights_bytes - found[0].adapter_bytes)
    return found, total


def _outline(folder: Path, read: tuple[nn.Module, Any, list[str]], options: Mapping[str, Any]) -> Outline:
    model, tokenizer, notes = read
    config: Any = unwrapped(model).config
    if tokenizer is None:
        notes.append(f"{folder.name} has no tokenizer: {BYTES_PER_TOKEN} bytes of text are taken for a token")
    kept = _name_of(getattr(config.get_text_config(decoder=True), "dtype", None)) or _name_of(
        getattr(config, "dtype", None)
    )
    dtype = _name_of(options.get("dtype")) or kept or "float32"
    own = getattr(config, "quantization_config", None)
    stored = _stored(folder)
    if own and not stored:
        notes.append(f"{folder.name} is quantised by rules of its own: its weights are counted as {dtype}")
    prompting: Any = {name: options[name] for name in Prompting.__annotations__ if options.get(name)}
    prompting.pop("think_end", None)
    places = (place for place in (folder, folder.parent) if (place / "organism.json").is_file())
    device, words = Placement.first(options.get("device")), folder / "tokenizer.json"
    return Outline(
        folder.name,
        model,
        dtype,
        quantize=str(options.get("quantize") or "none"),
        device=device,
        tokenizer=tokenizer,
        template=None if tokenizer is None else template_for(tokenizer, **prompting),
        prompt_folder=next((place / "prompts" for place in places if (place / "prompts").is_dir()), None),
        held_bytes=stored if own or dtype == (kept or "float32") else 0,
        tokenizer_bytes=TOKENIZER * words.stat().st_size if device.type == "cpu" and words.is_file() else 0,
        notes=notes,
    )


def _stored(folder: Path) -> int:
    """Bytes of the files that weights are read from; 0 where these are not there, or not whole."""
    try:
        return sum(file.stat().st_size for file in weight_files(folder))
    except ModelError:
        return 0


def _name_of(dtype: Any) -> str:
    """A type as `float32`; empty where none, or `auto`, is given."""
    name = str(dtype or "").removeprefix("torch.")
    return "" if name == "auto" else name
