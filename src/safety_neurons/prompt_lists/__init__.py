"""Read prompts from files of every usual shape, from built-in lists and from memory into lists of records."""

from safety_neurons.prompt_lists.readers import (
    DEFAULT_LANGUAGE,
    NAMES,
    BuiltinList,
    as_prompt,
    as_prompts,
    languages,
    library,
    prompts,
)
from safety_neurons.prompt_lists.records import (
    Message,
    Prompt,
    Prompts,
    hanging_together,
    normalised,
    request_of,
    said_in,
)

__all__ = [
    "DEFAULT_LANGUAGE",
    "NAMES",
    "BuiltinList",
    "Message",
    "Prompt",
    "Prompts",
    "as_prompt",
    "as_prompts",
    "hanging_together",
    "languages",
    "library",
    "normalised",
    "prompts",
    "request_of",
    "said_in",
]
