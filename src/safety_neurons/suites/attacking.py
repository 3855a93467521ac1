"""`attack`: prompts under an attack by name."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safety_neurons.errors import UsageError
from safety_neurons.prompts import Prompts
from safety_neurons.suites.mechanical import MECHANICAL, translated, wrapped

if TYPE_CHECKING:
    from safety_neurons.model import LanguageModel

ATTACKS = (*MECHANICAL, "translation", "gcg")
"""Every attack by name; `direct` is none."""


def attack(
    prompts: Prompts,
    method: str,
    *,
    model: "LanguageModel | None" = None,
    pairs: Mapping[str, str] | str | Path | None = None,
    language: str | None = None,
    **options: Any,
) -> Prompts:
    """Prompts under an attack.

    Args:
        prompts: The requests; of a suite their `meta` already holds goal, behaviour and target.
        method: `direct`, `prefill`, `past-tense`, `aim`, `base64`, `translation` or `gcg`.
        model: The model under attack, which `gcg` needs.
        pairs: Translations of the requests, which `translation` needs: by request, or a table.
        language: Column of the translations in the table.
        **options: Options of `gcg`.

    Returns:
        Prompts whose `meta["method"]` names the attack and whose `meta["label"]` is `static-transfer` or `adaptive`.

    Raises:
        UsageError: An unknown attack, or one that lacks what it needs.
        InputError: No prompt has a translation.
    """
    if method == "gcg":
        if model is None:
            raise UsageError("attack 'gcg' is made on a model: expected one; pass model=")
        from safety_neurons.suites.gradient_search import gcg

        return gcg(model, prompts, **options).prompts
    if options:
        raise UsageError(f"attack {method!r} takes no {', '.join(options)}; leave them away")
    if method == "translation":
        if pairs is None:
            raise UsageError("attack 'translation' needs the translations: expected pairs of request and translation; pass pairs=")
        return translated(prompts, pairs, language)
    return wrapped(prompts, method)
