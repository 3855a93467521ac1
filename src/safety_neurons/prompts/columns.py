"""Names of columns: which one holds the prompt, the answer, the id, the category."""

from collections.abc import Iterable

from safety_neurons.errors import InputError

PROMPT_COLUMNS = (
    "prompt",
    "goal",
    "instruction",
    "question",
    "forbidden_prompt",
    "Behavior",
    "text",
    "query",
    "request",
    "user_prompt",
    "adversarial",
    "sentence",
    "input",
)
ANSWER_COLUMNS = ("response", "output", "answer", "completion", "target", "chosen")
CONVERSATION_COLUMNS = ("messages", "conversations", "conversation")
INPUT_COLUMN = "input"
CONTEXT_COLUMNS = ("ContextString", "context_string")
ID_COLUMNS = ("id", "prompt_id", "BehaviorID", "behavior_id", "uid")
CATEGORY_COLUMNS = ("category", "categories", "SemanticCategory", "semantic_category", "harm_category", "type")
LANGUAGE_COLUMNS = ("language", "lang")

_KNOWN = {name.casefold() for name in PROMPT_COLUMNS}


def is_known_column(name: object) -> bool:
    """Whether a column of this name is taken for the prompt without being named by the user."""
    return isinstance(name, str) and name.strip().casefold() in _KNOWN


def find_column(columns: Iterable[str], wanted: Iterable[str]) -> str | None:
    """The first wanted name that is a column, in exact spelling before any other case."""
    present = list(columns)
    for name in wanted:
        if name in present:
            return name
    by_case = {column.strip().casefold(): column for column in reversed(present)}
    return next((by_case[name.casefold()] for name in wanted if name.casefold() in by_case), None)


def named_column(columns: Iterable[str], name: str, source: str, option: str) -> str:
    """The column the user named, in any case, or an error that lists those there are."""
    present = list(columns)
    found = find_column(present, [name])
    if found is None:
        raise InputError(f"{source}: no column {name!r}; it has {listed(present)}; name one of them with {option}")
    return found


def listed(columns: Iterable[str]) -> str:
    """Column names for an error message: quoted, cut to a readable length."""
    shown = [repr(column if len(column) <= 40 else column[:37] + "…") for column in columns]
    return ", ".join(shown[:12]) + (f" and {len(shown) - 12} more" if len(shown) > 12 else "") if shown else "no columns"
