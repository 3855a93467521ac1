"""Loading models by name, `organism:NAME[/STAGE]` included: what `safety_neurons.load` is."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safety_neurons import model
from safety_neurons.model import LanguageModel, Pair
from safety_neurons.organism.folder import spec

PREFIX = "organism:"


def load(name: str | Path, **options: Any) -> LanguageModel:
    """Loads a model argument: `ID[@REVISION][+ADAPTER…]`, a folder, or `organism:NAME[/STAGE]`.

    Args:
        name: The model argument.
        **options: As for `safety_neurons.model.load` (device, dtype, template, system, template_args, offline, …).

    Raises:
        UsageError: No such organism, or none of its stages.
        ModelError: As for `safety_neurons.model.load`.
    """
    loaded = model.load(_folders(name), **options)
    return _named(loaded, name)


def load_pair(base: str | Path, aligned: str | Path, **options: Any) -> Pair:
    """Loads the two models of a comparison; two adapters on one base share it in memory.

    Args:
        base: The less safe model, as for `load`.
        aligned: The safer one.
        **options: As for `load`.

    Raises:
        MismatchError: Models of different shapes, or tokenizers that disagree.
        UsageError: As for `load`.
        ModelError: As for `load`.
    """
    pair = model.load_pair(_folders(base), _folders(aligned), **options)
    _named(pair.base, base)
    _named(pair.aligned, aligned)
    return pair


def load_several(names: Sequence[str | Path], **options: Any) -> list[LanguageModel]:
    """Loads models that are compared with one another; adapters on one base share it in memory.

    Args and errors as for `load_pair`.
    """
    models, _ = model.load_several([_folders(name) for name in names], **options)
    return [_named(loaded, name) for loaded, name in zip(models, names, strict=True)]


def _folders(name: str | Path) -> str | Path:
    return spec(name.removeprefix(PREFIX)) if isinstance(name, str) and name.startswith(PREFIX) else name


def _named(loaded: LanguageModel, name: str | Path) -> LanguageModel:
    """Files call an organism by its short name, which means the same on every machine, and not by its folders."""
    if str(name).startswith(PREFIX):
        loaded.name = str(name)
    return loaded
