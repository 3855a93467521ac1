"""Stopping at strings, where the tokenizer allows it."""

import warnings
from collections.abc import Sequence
from typing import Any

from safety_neurons.model.language_model import LanguageModel


def stops(model: LanguageModel, strings: Sequence[str]) -> dict[str, Any]:
    """Arguments of `generate` that end an answer at one of the strings.

    Empty for a tokenizer whose tokens cannot be told apart as text, which transformers does not stop at strings: answers are then as long
    as they may be, and whoever reads them cuts them.
    """
    from transformers import StopStringCriteria

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            StopStringCriteria(tokenizer=model.tokenizer, stop_strings=list(strings))
    except (ValueError, KeyError, IndexError, TypeError, AttributeError):
        return {}
    return {"stop_strings": list(strings)}
