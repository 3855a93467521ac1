"""Prompts: records, readers of every usual file shape, and built-in lists of the project's own writing.

The package itself can be called like its function: `safety_neurons.prompts("builtin:harmful")` works
whether the name was bound to the function or, by an import, to this module.
"""

import sys
import types
from typing import Any

from safety_neurons.prompts.readers import DEFAULT_LANGUAGE, NAMES, BuiltinList, as_prompt, as_prompts, languages, library, prompts
from safety_neurons.prompts.records import Message, Prompt, Prompts, normalised, request_of

__all__ = [
    "DEFAULT_LANGUAGE",
    "NAMES",
    "BuiltinList",
    "Message",
    "Prompt",
    "Prompts",
    "as_prompt",
    "as_prompts",
    "languages",
    "library",
    "normalised",
    "prompts",
    "request_of",
]


class _CallableModule(types.ModuleType):
    """A module that answers a call with `prompts`: importing a submodule rebinds the name in the parent package."""

    def __call__(self, *args: Any, **options: Any) -> Prompts:
        return prompts(*args, **options)


sys.modules[__name__].__class__ = _CallableModule
