"""Models from `ID[@REVISION][+ADAPTER…]`: causal language models, and pairs that share a base in memory."""

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from logging import getLogger
from pathlib import Path
from typing import Any

import torch
from torch import nn

from safety_neurons.arguments import well_typed
from safety_neurons.counting import numbered
from safety_neurons.errors import MismatchError, ModelError, NumericalError, UsageError, first_line
from safety_neurons.model.adapters import (
    adapter_config,
    attach,
    changes_base,
    check_one_kind,
    foreign_base,
    kind_of,
    merge,
    not_done,
    resized_rows,
    resized_vocabulary,
    untrained,
)
from safety_neurons.model.fewer_bits import refuse_unpackable
from safety_neurons.model.files import (
    ORGANISM,
    Weights,
    organism_spec,
    read_headers,
    refuse_claims,
    refuse_foreign_shards,
    refuse_pointers,
    refuse_sizes,
    weight_files,
)
from safety_neurons.model.gguf import REAL, converted, is_gguf, left_out, packaged
from safety_neurons.model.language_model import LanguageModel
from safety_neurons.model.placement import Placement
from safety_neurons.model.template import Prompting

DTYPES = ("auto", "float32", "float64", "bfloat16", "float16")

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "tekken.json",
    "sentencepiece.bpe.model",
)

_WANTED = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt", "*.tiktoken", "prompts/*"]

_UNWANTED = ["consolidated*", "original/*", "onnx/*", "openvino/*"]


@dataclass(frozen=True)
class ModelSpec:
    """A parsed model argument.

    Attributes:
        base: Path or hub name of the model.
        revision: Revision on the hub; None for the default one and for paths.
        adapters: Paths or hub names of the adapters, each with its own revision, in the order they are
            applied.
    """

    base: str
    revision: str | None = None
    adapters: tuple[tuple[str, str | None], ...] = ()

    def __str__(self) -> str:
        parts = ((self.base, self.revision), *self.adapters)
        return "+".join(name if revision is None else f"{name}@{revision}" for name, revision in parts)


@dataclass(frozen=True)
class Pair:
    """The less safe and the safer of two models.

    Attributes:
        base: The less safe one.
        aligned: The safer one.
        shared: Whether both are views of one model in memory that differ in their adapters only.
    """

    base: LanguageModel
    aligned: LanguageModel
    shared: bool

    def __iter__(self) -> Iterator[LanguageModel]:
        """Both, the base first: `base, aligned = load_pair(…)`."""
        return iter((self.base, self.aligned))


@dataclass(frozen=True)
class _Loading:
    """The keyword arguments of `load`, taken apart."""

    device: str | torch.device | None = None
    dtype: str | torch.dtype | None = None
    offline: bool = False
    trust_remote_code: bool = False
    merge_adapters: bool = False
    weights: bool = True
    prompting: Prompting = field(default_factory=Prompting)
    others: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> "_Loading":
        own = {name: options[name] for name in _NAMED if name in options}
        prompting: Any = {name: options[name] for name in Prompting.__annotations__ if name in options}
        return cls(
            **own,
            prompting=prompting,
            others={name: options[name] for name in options if name not in own | prompting},
        )


_NAMED = ("device", "dtype", "offline", "trust_remote_code", "merge_adapters")


def parse_spec(spec: str | Path) -> ModelSpec:
    """Takes `ID[@REVISION][+ADAPTER…]` apart: an existing path wins, otherwise it is split at `+`, then each
    part at `@`.

    `organism:NAME[/STAGE]` is what the organism's record says of that stage, before adapters as elsewhere;
    `real:NAME` a checkpoint that ordinary packages carry (`data models`).

    Raises:
        UsageError: An empty part. InputError: No such organism, or none of its stages.
    """
    text = str(spec)
    if text.startswith(ORGANISM):
        stage, plus, adapters = text.removeprefix(ORGANISM).partition("+")
        return parse_spec(f"{organism_spec(stage)}{plus}{adapters}")
    if text and Path(text).expanduser().exists():
        return ModelSpec(str(Path(text).expanduser()))
    parts = _parts(text)
    if not all(parts):
        raise UsageError(f"model {text!r}: expected ID[@REVISION][+ADAPTER…] without empty parts")
    named = [_with_revision(part) for part in parts]
    return ModelSpec(*named[0], tuple(named[1:]))


@well_typed
def load(name: str | Path, **options: Any) -> LanguageModel:
    """Loads a model, with adapters unmerged, from a folder or the hub.

    Args:
        name: `ID[@REVISION][+ADAPTER…]`, or `organism:NAME[/STAGE]`.
        **options: `device` (by default a GPU if there is one), `dtype` (`auto`, the checkpoint's, or
            `float32`, `float64`, `bfloat16`, `float16`), `offline` (open no connection), `trust_remote_code`
            (run code that comes with the checkpoint), `merge_adapters` (into the weights, in order; needed
            for adapters of several types), `quantize` (`8bit`, `4bit`), `device_map` and `max_memory` (see
            `safety_neurons.model.placement`), `template`, `system`, `template_args` and `think_end` (see
            `Prompting`), and further arguments of transformers' `from_pretrained` (`quantization_config`,
            `attn_implementation`, …).

    Raises:
        ModelError: What cannot be found or loaded, in one line.
        MismatchError: Weights that do not fit the configuration.
        NumericalError: NaN or infinity in the weights.
        UsageError: A malformed spec, an unknown dtype, or adapters of several types.
        InputError: No such organism, or none of its stages.
    """
    return load_several([name], **options)[0]


@well_typed
def load_pair(base: str | Path, aligned: str | Path, **options: Any) -> Pair:
    """Loads the two models of a comparison; adapters of one type on one base share that base in memory.

    Args:
        base: The less safe model.
        aligned: The safer model.
        **options: As for `load`.

    Raises:
        MismatchError: Models of different shapes, or tokenizers that disagree.
        ModelError: As for `load`.
    """
    first, second = load_several((base, aligned), **options)
    return Pair(first, second, first.model is second.model)


@well_typed
def load_several(specs: Sequence[str | Path], **options: Any) -> list[LanguageModel]:
    """Loads models that are compared with one another; adapters of one type on one base share it.

    All else as for `load_pair`.
    """
    loading = _Loading.of(options)
    folders = [_folders(parse_spec(spec), loading) for spec in specs]
    if len(specs) == 1 or (_one_base(folders) and not loading.merge_adapters):
        return _views(specs, folders, loading)
    models = [_views([spec], [each], loading)[0] for spec, each in zip(specs, folders, strict=True)]
    for other in models[1:]:
        check_pair(models[0], other)
    return models


def _one_base(models: Sequence[Sequence[Path]]) -> bool:
    """Whether one model in memory can hold all: one base, which no adapter changes, one type of adapter, one
    size of vocabulary.
    """
    adapters = [folder for folders in models for folder in folders[1:]]
    kinds = {kind_of(adapter_config(folder)) for folder in adapters}
    if any(map(changes_base, adapters)):
        return False
    rows = {
        tuple(rows for folder in folders[1:] if (rows := resized_rows(folder, folders[0])))
        for folders in models
    }
    return len({folders[0] for folders in models}) == 1 and len(kinds) <= 1 and len(rows) == 1


def _views(
    specs: Sequence[str | Path], models: Sequence[Sequence[Path]], loading: _Loading
) -> list[LanguageModel]:
    """Models that share one base in memory, each with its own adapters.

    With `merge_adapters` there is one of them.
    """
    base = models[0][0]
    # An adapter that one model names twice counts twice there, and is shared between models all the same.
    named = [
        [(folder, folders[:place].count(folder)) for place, folder in enumerate(folders)][1:]
        for folders in models
    ]
    needed = list(dict.fromkeys(entry for each in named for entry in each))
    adapters = [folder for folder, _ in needed]
    configs = [adapter_config(folder) for folder in adapters]
    if not loading.merge_adapters:
        check_one_kind(adapters, configs)
    model, tokenizer, notes = _base(base, loading)
    if is_gguf(Path(named_base := parse_spec(specs[0]).base)):
        notes.append(f"{named_base} was dequantised to float32, once, into {base}")
        notes += left_out(base)
    notes += foreign_base(named_base, base, adapters, configs) + untrained(adapters, configs)
    notes += not_done(adapters, configs)
    notes += [note for folder in adapters if (note := resized_vocabulary(model, folder))]
    model = (merge if loading.merge_adapters else attach)(model, adapters, configs)
    check_finite(model)
    plain = loading.merge_adapters or not needed
    folder = base.parent if not (base / "prompts").is_dir() and (base.parent / "prompts").is_dir() else base
    views = []
    for spec, folders, own in zip(specs, models, named, strict=True):
        own_notes = list(notes)
        own_tokenizer = _adapted_tokenizer(tokenizer, folders[1:], loading, own_notes)
        # Files call an organism by its short name, which means the same on every machine, and not by its
        # folders.
        name = str(spec) if str(spec).startswith(ORGANISM) else str(parse_spec(spec))
        active = None if plain else [f"a{needed.index(entry)}" for entry in own]
        view = LanguageModel(
            model, own_tokenizer, name=name, adapters=active, folder=folder, **loading.prompting
        )
        view.notes[:0] = own_notes
        views.append(view)
    return views


def check_pair(base: LanguageModel, aligned: LanguageModel) -> None:
    """Refuses two models that cannot be fed the same token ids or do not have the same neurons.

    Raises:
        MismatchError: The first difference, in one line.
    """
    shapes = [_shapes(lm) for lm in (base, aligned)]
    for name in dict.fromkeys((*shapes[0], *shapes[1])):
        here, there = shapes[0].get(name), shapes[1].get(name)
        if here != there:
            what = f"{name} is {here or 'absent'} in {base.name} and {there or 'absent'} in {aligned.name}"
            raise MismatchError(
                f"the two models have different shapes: {what}; expected two versions of one architecture"
            )
    if base.tokenizer is None or aligned.tokenizer is None or base.tokenizer is aligned.tokenizer:
        return
    words = [lm.tokenizer.get_vocab() for lm in (base, aligned)]
    if words[0] != words[1]:
        different = sorted(
            word for word in words[0].keys() | words[1].keys() if words[0].get(word) != words[1].get(word)
        )
        word = different[0]
        what = (
            f"{numbered(len(different), 'token differs', 'tokens differ')}, {word!r} is "
            f"{words[0].get(word, 'absent')} and {words[1].get(word, 'absent')}"
        )
        raise MismatchError(
            f"the two models have different tokenizers ({what}): expected one vocabulary, as token ids "
            "are fed to both"
        )


def check_finite(model: nn.Module) -> None:
    """Looks for NaN and infinity in the weights, one sum for each.

    Raises:
        NumericalError: Names the first such parameter.
    """
    for name, parameter in model.named_parameters():
        if not parameter.is_floating_point() or parameter.is_meta or parameter.element_size() < 2:
            continue
        values = parameter.detach()
        total = values.sum(dtype=torch.float32 if values.element_size() < 4 else values.dtype)
        if not bool(torch.isfinite(total)) and not bool(torch.isfinite(values).all()):
            count = int((~torch.isfinite(values)).sum())
            raise NumericalError(
                f"parameter {name} holds {count} NaN or infinite values: expected finite weights; check "
                "the checkpoint or --dtype"
            )


def _parts(text: str) -> list[str]:
    """The parts between `+` signs, where neighbours that together are an existing path stay together."""
    pieces = text.split("+")
    parts: list[str] = []
    while pieces:
        for length in range(len(pieces), 0, -1):
            joined = "+".join(pieces[:length])
            if length == 1 or (joined and Path(joined).expanduser().exists()):
                parts.append(joined)
                pieces = pieces[length:]
                break
    return parts


def _with_revision(part: str) -> tuple[str, str | None]:
    if Path(part).expanduser().exists() or "@" not in part:
        return (str(Path(part).expanduser()) if part.startswith("~") else part), None
    name, revision = part.rsplit("@", 1)
    if not name or not revision:
        raise UsageError(f"model {part!r}: expected ID@REVISION")
    return name, revision


def _folders(spec: ModelSpec, options: _Loading) -> list[Path]:
    """Local folders of the base and its adapters, downloaded from the hub where they are not paths."""
    folders = [
        _folder(name, revision, options) for name, revision in ((spec.base, spec.revision), *spec.adapters)
    ]
    for folder in folders:
        refuse_pointers(folder)
        refuse_foreign_shards(folder)
    return folders


def folders_of(spec: str | Path, *, offline: bool = False, trust_remote_code: bool = False) -> list[Path]:
    """Local folders of a model's base and its adapters, as `load` would read them.

    Raises:
        ModelError: One that cannot be found. UsageError: A malformed spec.
    """
    return _folders(parse_spec(spec), _Loading(offline=offline, trust_remote_code=trust_remote_code))


def _folder(name: str, revision: str | None, options: _Loading) -> Path:
    path = Path(name)
    if path.is_dir() and revision is not None:
        raise ModelError(
            f"{name}@{revision}: a folder has no revisions; expected one only for a name on the hub"
        )
    if path.is_dir():
        return path.resolve()
    if is_gguf(path):
        with quiet():
            return converted(path)
    if name.startswith(REAL) and not path.exists():
        with quiet():
            return packaged(name.removeprefix(REAL), offline=options.offline)
    if path.exists():
        raise ModelError(
            f"{name} is a file: expected the folder of a model in Hugging Face layout, a GGUF file, or a "
            "name on the hub"
        )
    if name.startswith((".", "/", "~")) or not _HUB_ID.fullmatch(name):
        raise ModelError(
            f"{name}: no such folder; expected a model's folder, or a name on the hub such as org/model"
        )
    import huggingface_hub

    patterns = [*_WANTED, "*.py"] if options.trust_remote_code else _WANTED
    if not options.weights:
        patterns = [pattern for pattern in patterns if pattern != "*.safetensors"]
    arguments: dict[str, Any] = {
        "revision": revision,
        "allow_patterns": patterns,
        "ignore_patterns": _UNWANTED,
    }
    try:
        return Path(huggingface_hub.snapshot_download(name, local_files_only=options.offline, **arguments))
    except Exception as error:  # the hub's client raises errors of several libraries
        where = "in the local cache (--offline)" if options.offline else "on the hub or in the local cache"
        at = f" at revision {revision}" if revision else ""
        problem = f"{name}{at}: no such folder, and not found {where} ({type(error).__name__})"
        raise ModelError(f"{problem}; check the name, or download the model first") from error


def load_as(
    kind: str, spec: str | Path, *, trust_remote_code: bool = False, **options: Any
) -> tuple[nn.Module, Any, Path]:
    """A model of another kind than a causal language model, such as a classifier, with its tokenizer and
    local folder.

    Args:
        kind: Name of a class of transformers, such as `AutoModelForSequenceClassification`.
        spec: `ID[@REVISION]`, without adapters.
        trust_remote_code: Run code that comes with the checkpoint.
        **options: `device`, `dtype`, `offline` and arguments of `from_pretrained`, as for `load`.

    Raises:
        ModelError: What cannot be found or loaded, in one line. UsageError: A spec with adapters.
    """
    settings = _Loading.of({**options, "trust_remote_code": trust_remote_code})
    parsed = parse_spec(spec)
    if parsed.adapters:
        raise UsageError(
            f"model {str(parsed)!r}: expected one without adapters here; merge them into a folder first"
        )
    folder = _folders(parsed, settings)[0]
    model, tokenizer, _ = _base(folder, settings, kind)
    check_finite(model)
    return model, tokenizer, folder


def _base(
    folder: Path, options: _Loading, kind: str = "AutoModelForCausalLM"
) -> tuple[nn.Module, Any, list[str]]:
    """A model without adapters, its tokenizer, and what is to be noted of its files."""
    _check_folder(folder)
    weights = read_headers(weight_files(folder))
    config = refuse_claims(folder / "config.json", weights)
    quantised = "quantization_config" in config
    if not quantised:
        _refuse_whole_numbers(folder, weights)
    tokenizer = _tokenizer(folder, options)
    import transformers

    placement, dtype = Placement.of(options.device, options.others), _dtype(options.dtype)
    causal = kind == "AutoModelForCausalLM"
    what = "a causal language model" if causal else kind.removeprefix("AutoModelFor").removeprefix("Auto")
    shared = {"local_files_only": True, "trust_remote_code": options.trust_remote_code}
    try:
        with quiet():
            planned, kind, notes = _described(folder, kind, options.trust_remote_code)
            refuse_sizes(folder, planned, weights, quantised=quantised)
            loaded: Any = getattr(transformers, kind).from_pretrained(
                str(folder),
                dtype=dtype,
                use_safetensors=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are an error here, in a line that names them
                **shared,
                **placement.arguments,
            )
    except ModelError:
        raise
    except Exception as error:  # a checkpoint's own code, or any of several libraries
        if re.search("off-?load|meta device", str(error)):
            raise ModelError(
                f"{folder}: does not fit the memory it may take, and off-loaded weights are not read here; "
                "expected room for all of them: a larger --max-memory, --dtype bfloat16, or --quantize 4bit"
            ) from error
        raise ModelError(
            f"{folder}: cannot be loaded as {what} ({_said(error)}); {_advice(error, _WHOLE)}"
        ) from error
    model, info = loaded
    refuse_unpackable(model)
    if model.dtype is torch.float64 and _experts_of(model) == "grouped_mm":
        model.set_experts_implementation("batched_mm")  # the grouped product takes no float64
    part = model if causal and model.config.model_type != config.get("model_type") else None
    prefix = "" if causal else getattr(model, "base_model_prefix", "")
    notes += _check_read(folder, info, weights, prefix, part)
    notes += _ambiguous(folder, model if causal else None)
    if placement.device is not None:
        try:
            model = model.to(placement.device)
        except RuntimeError as error:
            raise ModelError(
                f"{folder}: cannot be put on {placement.device} ({first_line(error)})"
            ) from error
    return model.eval(), tokenizer, notes


def _experts_of(model: Any) -> str | None:
    """The implementation by which routed experts are multiplied; None of a model that has none."""
    return getattr(model.config.get_text_config(decoder=True), "_experts_implementation", None)


def _described(folder: Path, kind: str, trust_remote_code: bool) -> tuple[Any, str, list[str]]:
    """The architecture that a configuration describes, on the meta device, the class that reads it, and what
    is to be noted of it.
    """
    import transformers

    notes: list[str] = []
    with torch.device("meta"):
        config = transformers.AutoConfig.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=trust_remote_code
        )
        if kind == "AutoModelForCausalLM" and _reads_images(config):
            kind, parts = _text_part(config)
            notes.append(
                f"{folder.name}: a {type(config).__name__.removesuffix('Config')} model of text "
                f"and more is read by its text decoder; {parts}"
            )
        model = getattr(transformers, kind).from_config(config, trust_remote_code=trust_remote_code)
    return model, kind, notes


def without_weights(
    name: str | Path, **options: Any
) -> tuple[list[Path], Callable[[], tuple[nn.Module, Any, list[str]]]]:
    """The folders of a model and its adapters, whose weights need not be there (and are not downloaded), and
    how to read the first of them: its architecture on the meta device, its tokenizer (None where there is
    none) and notes.

    Args:
        name: As for `load`.
        **options: As for `load`.

    Raises:
        ModelError: What cannot be found, or is of no known architecture.
    """
    loading = replace(_Loading.of(options), weights=False)
    folders = _folders(parse_spec(name), loading)

    def read() -> tuple[nn.Module, Any, list[str]]:
        folder = folders[0]
        if not (folder / "config.json").is_file():
            raise ModelError(
                f"{folder}: no config.json; expected the folder of a model in Hugging Face layout, with or "
                "without its weights"
            )
        refuse_claims(folder / "config.json")
        try:
            with quiet():
                model, _, notes = _described(folder, "AutoModelForCausalLM", loading.trust_remote_code)
        except Exception as error:  # a checkpoint's own code, or any of several libraries
            raise ModelError(
                f"{folder}: config.json describes no causal language model ({_said(error)}); "
                f"{_advice(error, _WHOLE)}"
            ) from error
        return model, _tokenizer(folder, loading) if _has_tokenizer(folder) else None, notes

    return folders, read


def _reads_images(config: Any) -> bool:
    """Whether a configuration describes a text decoder among other parts."""
    return config.get_text_config(decoder=True) is not config


def _text_part(config: Any) -> tuple[str, str]:
    """The class that reads such a checkpoint, and what becomes of its other parts."""
    import transformers

    known = transformers.AutoModelForCausalLM._model_mapping
    if type(config) not in known and type(config) in transformers.AutoModelForImageTextToText._model_mapping:
        return "AutoModelForImageTextToText", "its other parts are in memory and stay as they are"
    whole = type(config) in known and (getattr(known[type(config)], "config_class", None) is type(config))
    rest = "are in memory and stay as they are" if whole else "are left out"
    return "AutoModelForCausalLM", f"its other parts {rest}"


_HARMLESS = re.compile(r"(^|\.)(rotary_emb\.inv_freq|masked_bias|position_ids|embed_positions\.weights)$")

_VALUE_HEAD = re.compile(r"^v_head\.")


def _check_read(
    folder: Path, info: Mapping[str, Any], weights: Weights, prefix: str, part: Any | None
) -> list[str]:
    """Refuses weights that are missing, of another shape, or in the files and not in the model.

    What is harmless there is a note.

    Args:
        folder: For the message.
        info: What transformers says of them.
        weights: The tensors of the files.
        prefix: Of models that are no language models: where the decoder's weights begin; heads for other uses
            lie outside it.
        part: The model, where it is a part of what config.json describes.

    Raises:
        MismatchError: Another shape. ModelError: Missing or unread ones; the message names the first.
    """
    missing, unread = (
        sorted(info["missing_keys"]),
        sorted(key for key in info["unexpected_keys"] if not _is_mask(key, weights)),
    )
    if wrong := sorted(info.get("mismatched_keys") or ()):
        name, shape, expected = wrong[0]
        what = f"{name} is {list(shape)} in the files and {list(expected)} by config.json"
        raise MismatchError(
            f"{folder}: {numbered(len(wrong), 'weight does', 'weights do')} not fit config.json ({what}); "
            "expected the shapes it states"
        )
    if missing:
        also = f", and {len(unread)} are there that it does not have ({unread[0]})" if unread else ""
        raise ModelError(
            f"{folder}: {numbered(len(missing), 'weight is', 'weights are')} missing from the checkpoint "
            f"({missing[0]}){also}; expected all of them"
        )
    heads = [key for key in unread if _VALUE_HEAD.match(key) or (prefix and not key.startswith(f"{prefix}."))]
    lost = [key for key in unread if key not in heads]
    if lost:
        adapter = any("lora_" in key or "ia3_" in key for key in lost)
        if part is not None and not adapter:
            raise ModelError(
                f"{folder}: {type(part).__name__} reads the text decoder of this checkpoint of text and "
                f"more, and of its other parts {numbered(len(lost), 'weight is', 'weights are')} not in it "
                f"({lost[0]}); such "
                "checkpoints are not supported: use one of the text decoder alone, or another model"
            )
        advice = (
            "they are an adapter's: merge it, or keep it in a folder of its own and write MODEL+ADAPTER"
            if adapter
            else (
                "expected a config.json that describes every weight (layers, biases); correct it, or take "
                "them out of the files"
            )
        )
        raise ModelError(
            f"{folder}: {numbered(len(lost), 'weight of the files is', 'weights of the files are')} not in "
            f"the model that config.json describes ({lost[0]}); {advice}"
        )
    return (
        [f"{folder.name}: left out {numbered(len(heads), 'weight')} of a head for another use ({heads[0]})"]
        if heads
        else []
    )


def _refuse_whole_numbers(folder: Path, weights: Weights) -> None:
    """Refuses weights that a file's header says are whole numbers, which the library takes for fractions.

    Raises:
        ModelError: Names the first of them.
    """
    named = sorted(
        name
        for name in weights.whole
        if name.endswith(("weight", "bias", "proj")) and not _is_mask(name, weights)
    )
    if named:
        raise ModelError(
            f"{folder}: {numbered(len(named), 'weight holds', 'weights hold')} whole numbers by the files "
            f"({named[0]}), and config.json names no quantization_config that says what they stand for; "
            "expected numbers with fractions: download the folder again"
        )


def _ambiguous(folder: Path, model: Any | None) -> list[str]:
    """What is to be noted of a folder that says two things of one weight: which of them is read.

    Args:
        folder: Of the model.
        model: A language model, of whose head and embedding the same is noted.
    """
    notes = []
    whole, index = "model.safetensors", "model.safetensors.index.json"
    if (folder / whole).is_file() and (folder / index).is_file():
        notes.append(f"{folder.name}: {whole} is read, and the shards that {index} names are not")
    if model is None:
        return notes
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    tied = getattr(model.config.get_text_config(decoder=True), "tie_word_embeddings", False)
    if tied and head is not None and head.weight is not embedding.weight:
        own = head.weight.shape != embedding.weight.shape
        if own or not torch.equal(head.weight.to(embedding.weight.device), embedding.weight):
            notes.append(
                f"{folder.name}: config.json ties the head to the embedding, and the files hold another "
                "head: that one is used"
            )
    return notes


def _is_mask(key: str, weights: Weights) -> bool:
    """Whether a tensor that a model does not have is a constant which older checkpoints hold: a causal mask,
    frequencies, positions.
    """
    shape = weights.shapes.get(key) or next(
        (other for name, other in weights.shapes.items() if key.endswith(f".{name}")), ()
    )
    square = len(shape) == 4 and shape[:2] == (1, 1) and shape[2] == shape[3]
    return _HARMLESS.search(key) is not None or (square and key.endswith((".bias", "attn.mask")))


def _said(error: Exception) -> str:
    """What another library says, without its advice where that is not for here."""
    return "it brings code of its own" if "trust_remote_code" in str(error) else first_line(error)


def _advice(error: Exception, otherwise: str) -> str:
    if "trust_remote_code" not in str(error):
        return otherwise
    return "that code is run only where it is asked for: read it, then pass --trust-remote-code"


_WHOLE = (
    "expected whole safetensors files of an architecture this transformers knows: copy or download the "
    "folder again, or update it"
)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """The library without progress bars and reports for a block.

    What it would report is checked and raised here.
    """
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    placing = getLogger("accelerate")
    placed_at = placing.level
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    placing.setLevel("ERROR")
    try:
        yield
    finally:
        logging.set_verbosity(level)
        placing.setLevel(placed_at)
        if bars:
            logging.enable_progress_bar()


def _check_folder(folder: Path) -> None:
    if not (folder / "config.json").is_file():
        adapter = (folder / "adapter_config.json").is_file()
        advice = (
            f"this is an adapter: write BASE+{folder}"
            if adapter
            else "expected the folder of a model in Hugging Face layout"
        )
        raise ModelError(f"{folder}: no config.json; {advice}")
    if (folder / "adapter_config.json").is_file():
        raise ModelError(
            f"{folder}: holds an adapter beside a model, and which is meant cannot be told; expected two "
            "folders, written MODEL+ADAPTER"
        )
    weight_files(folder)


def _has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in _TOKENIZER_FILES) or any(folder.glob("*.tiktoken"))


def _adapted_tokenizer(tokenizer: Any, adapters: Sequence[Path], options: _Loading, notes: list[str]) -> Any:
    """The tokenizer to use with adapters: the last one that lies in an adapter's folder, since the adapter
    was trained with it.

    Notes get a line where it differs from the base model's in its words or its chat template.
    """
    for folder in adapters:
        template = next((path for path in (folder / "chat_template.jinja",) if path.is_file()), None)
        if not _has_tokenizer(folder):
            if template is not None:
                notes.append(
                    f"{folder.name}: its chat template is not used, since no tokenizer lies beside it; "
                    "pass it with --template"
                )
            continue
        if (folder / "config.json").is_file():
            refuse_claims(folder / "config.json")  # transformers reads it to learn of the tokenizer's kind
        own = _tokenizer(folder, options)
        differs = [
            *(["its words"] if own.get_vocab() != tokenizer.get_vocab() else []),
            *(
                ["its chat template"]
                if (own.chat_template or None) != (tokenizer.chat_template or None)
                else []
            ),
        ]
        if differs and own.chat_template is None and tokenizer.chat_template is not None:
            own.chat_template = tokenizer.chat_template
            differs.remove("its chat template")
        if differs:
            notes.append(
                f"{folder.name}: the tokenizer in the adapter's folder is used, which differs in "
                f"{' and '.join(differs)}"
            )
            tokenizer = own
    return tokenizer


def _tokenizer(folder: Path, options: _Loading) -> Any:
    if not _has_tokenizer(folder):
        raise ModelError(
            f"{folder}: no tokenizer; expected tokenizer.json or tokenizer.model beside the weights"
        )
    import transformers

    try:
        return transformers.AutoTokenizer.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=options.trust_remote_code
        )
    except Exception as error:  # tokenizers raises plain Exception
        expected = "expected the tokenizer's whole files: copy or download the folder again"
        raise ModelError(
            f"{folder}: the tokenizer cannot be loaded ({_said(error)}); {_advice(error, expected)}"
        ) from error


def _dtype(dtype: str | torch.dtype | None) -> str | torch.dtype:
    if isinstance(dtype, torch.dtype):
        return dtype
    name = (dtype or "auto").removeprefix("torch.")
    if name not in DTYPES:
        raise UsageError(f"dtype {dtype!r}: expected one of {', '.join(DTYPES)}")
    return name if name == "auto" else getattr(torch, name)


def _shapes(lm: LanguageModel) -> dict[str, tuple[int, ...]]:
    """Shapes of the decoder's own weights, adapters, embeddings and head aside."""
    inner = lm.inner
    aside = [
        module.weight
        for module in (inner.get_input_embeddings(), inner.get_output_embeddings())
        if module is not None
    ]
    shapes = {}
    for name, parameter in inner.named_parameters():
        if not any(parameter is weight for weight in aside) and not re.search(
            r"\.(ia3_|lora_|modules_to_save)", name
        ):
            shapes[name.replace(".base_layer.", ".")] = tuple(parameter.shape)
    return shapes
