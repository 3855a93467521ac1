"""What columns are called in files that are about, and which columns of a row serve for what."""

import functools
import re
from collections.abc import Iterable
from dataclasses import dataclass

PROMPT_COLUMNS = (
    "prompt",
    "goal",
    "instruction",
    "question",
    "forbidden_prompt",
    "test_case",
    "Behavior",
    "text",
    "query",
    "request",
    "user_prompt",
    "adversarial",
    "vanilla",
    "jailbreak_query",
    "redteam_query",
    "user_input",
    "prompts_final",
    "problem",
    "sentence",
    "input",
    "inputs",
    "content",
    "user",
    "human",
    "behaviour",
)
"""Columns of the request, the first one first, whatever their case."""
ANSWER_COLUMNS = (
    "response",
    "output",
    "answer",
    "completion",
    "target",
    "chosen",
    "assistant",
    "generation",
    "model_output",
    "outputs",
    "responses",
    "generations",
    "completions",
    "answers",
    "best_answer",
    "targets",
)
CONVERSATION_COLUMNS = (
    "messages",
    "conversations",
    "conversation",
    "conversation_a",
    "turns",
    "dialog",
    "dialogue",
    "contents",
    "data",
)
PAIR_COLUMNS = ("chosen", "rejected")
"""Columns of preference pairs: whole conversations, where no other column holds the request."""
REQUESTS_ONLY = "turns"
"""A list of texts in a column of this name is requests, one after the other.

In the others requests and answers take turns.
"""
SYSTEM_COLUMNS = (
    "system",
    "system_prompt",
    "system_message",
    "system_instruction",
    "systemInstruction",
    "instructions",
    "preamble",
)
INPUT_COLUMNS = ("input", "context")
CONTEXT_COLUMNS = ("ContextString", "context_string")
HISTORY_COLUMNS = ("history", "chat_history", "conversation_history")
"""What was said before the request: pairs of request and answer, or turns."""
ID_COLUMNS = ("id", "prompt_id", "BehaviorID", "behavior_id", "uid", "custom_id", "question_id")
CATEGORY_COLUMNS = (
    "category",
    "categories",
    "SemanticCategory",
    "semantic_category",
    "harm_category",
    "type",
)
LANGUAGE_COLUMNS = ("language", "lang")
GROUP_COLUMNS = (
    "group",
    "group_id",
    "conversation_id",
    "conversation_hash",
    "dialogue_id",
    "dialog_id",
    "thread_id",
    "cluster_id",
)
METADATA = frozenset(
    [
        "name",
        "title",
        "description",
        "version",
        "license",
        "licence",
        "author",
        "authors",
        "source",
        "sources",
        "url",
        "homepage",
        "citation",
        "created",
        "created_at",
        "date",
        "updated",
        "language",
        "languages",
        "tags",
        "keywords",
        "columns",
        "features",
        "schema",
        "metadata",
        "meta",
        "info",
        "readme",
        "note",
        "notes",
        "comment",
        "model",
        "format",
        "split",
        "dataset",
    ]
)
"""Names of what is said about a list of prompts and is none itself."""
LISTS = (
    "prompts",
    "examples",
    "rows",
    "data",
    "samples",
    "records",
    "items",
    "instances",
    "questions",
    "entries",
    "behaviors",
    "goals",
    "queries",
    "requests",
    "instructions",
    "problems",
    "texts",
    "sentences",
    "test_cases",
    "results",
)
"""Names under which a JSON object keeps its rows."""
SPLITS = ("train", "test", "validation", "valid", "val", "dev", "eval")
"""What the parts of a data set are called."""
SPLIT = re.compile(rf"(?:{'|'.join(SPLITS)})(?:[_\d].*)?")
"""One of them, also with more behind it: `train_sft`."""

_KNOWN = frozenset(name.casefold() for name in PROMPT_COLUMNS)


@functools.lru_cache(maxsize=1 << 12)
def folded(name: object) -> str:
    """A name without case, with `_` for spaces and hyphens."""
    return re.sub(r"[\s-]+", "_", str(name).strip()).casefold()


ABOUT = frozenset(
    map(
        folded,
        (*ID_COLUMNS, *CATEGORY_COLUMNS, *LANGUAGE_COLUMNS, *GROUP_COLUMNS, *SYSTEM_COLUMNS)
        + ("ids", "label", "labels"),
    )
)
"""Lists under these names, or those of answers, say something about the texts of the list beside them."""


def is_known_column(name: object) -> bool:
    """Whether a column of this name is taken for the prompt without being named by the user."""
    return isinstance(name, str) and folded(name) in _KNOWN


def is_conversation_column(name: object) -> bool:
    """Whether a column of this name may hold turns."""
    return isinstance(name, str) and folded(name) in CONVERSATION_COLUMNS


def columns_of(columns: Iterable[str], wanted: Iterable[str]) -> list[str]:
    """Columns under the wanted names, in the order of the names.

    Of those that differ in case only the exact one, else the first.
    """
    by_case: dict[str, str] = {}
    present = list(columns)
    for column in present:
        by_case.setdefault(folded(column), column)
    exact = set(present)
    names = (name if name in exact else by_case.get(folded(name)) for name in wanted)
    return [column for column in names if column is not None]


def find_column(columns: Iterable[str], wanted: Iterable[str]) -> str | None:
    """The first wanted name that is a column, in any case."""
    return next(iter(columns_of(columns, wanted)), None)


def listed(columns: Iterable[str]) -> str:
    """Column names for an error message: quoted, cut to a readable length."""
    shown = [repr(column if len(column) <= 40 else column[:37] + "…") for column in columns]
    return (
        ", ".join(shown[:12]) + (f" and {len(shown) - 12} more" if len(shown) > 12 else "")
        if shown
        else "no columns"
    )


@dataclass(frozen=True)
class ColumnPlan:
    """The columns of rows that have the same columns: for each use those that may serve, the first one
    first.
    """

    prompt: tuple[str, ...]
    conversation: tuple[str, ...]
    pair: tuple[str, ...]
    history: tuple[str, ...]
    answer: tuple[str, ...]
    input: tuple[str, ...]
    context: tuple[str, ...]
    system: tuple[str, ...]
    id: tuple[str, ...]
    category: tuple[str, ...]
    language: tuple[str, ...]
    group: tuple[str, ...]


def plan_for(present: tuple[str, ...], column: str | None, answer_column: str | None) -> ColumnPlan:
    """The plan for rows of these columns.

    Args:
        present: The columns.
        column: The prompt's column as the user named it; no other is looked at then.
        answer_column: The answer's, likewise.
    """

    def of(*wanted: str) -> tuple[str, ...]:
        return tuple(columns_of(present, wanted))

    prompt = of(column) if column is not None else of(*PROMPT_COLUMNS)
    if column is None and of("goal"):  # beside a goal, `Behavior` is its label
        prompt = tuple(name for name in prompt if folded(name) != "behavior")
    asks = {folded(name) for name in prompt}
    joined = tuple(
        name for name in of(*INPUT_COLUMNS) if folded(name) != "input" or asks & {"instruction", "prompt"}
    )
    return ColumnPlan(
        prompt=prompt,
        conversation=of(*CONVERSATION_COLUMNS) if column is None else (),
        pair=of(*PAIR_COLUMNS) if column is None else (),
        history=of(*HISTORY_COLUMNS) if column not in HISTORY_COLUMNS else (),
        answer=of(answer_column) if answer_column is not None else of(*ANSWER_COLUMNS),
        input=joined,
        context=of(*CONTEXT_COLUMNS) if asks & {"behavior"} else (),
        system=of(*SYSTEM_COLUMNS),
        id=of(*ID_COLUMNS),
        category=of(*CATEGORY_COLUMNS),
        language=of(*LANGUAGE_COLUMNS),
        group=of(*GROUP_COLUMNS),
    )
