"""Judges by name, and the refusal rate of completions."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

from safety_neurons.arguments import well_typed
from safety_neurons.errors import UsageError
from safety_neurons.judges.going_along import GoesAlongJudge
from safety_neurons.judges.judgement import FunctionJudge, Judge, Judgement, RefusalJudge, ending, judged
from safety_neurons.judges.wording import (
    PREFIX_VERSION,
    ComplianceJudge,
    judge_by_prefix,
    judge_by_wording,
    string_judge,
)
from safety_neurons.judges.wording import VERSION as WORDING_VERSION
from safety_neurons.results import Agreement, Completion, cohen_kappa
from safety_neurons.results.completions import shared_by

JUDGES: dict[str, tuple[RefusalJudge, int]] = {
    "wording": (judge_by_wording, WORDING_VERSION),
    "prefix": (judge_by_prefix, PREFIX_VERSION),
}
"""The built-in refusal judges that need no model, and their versions."""
HARM_JUDGE = "goes-along"
"""The judge of harm that needs no model and no connection."""
DEFAULT_JUDGES = ("refusal", "strings:advbench", HARM_JUDGE)
"""Two judges of refusals and one of harm, of different kind, that need no model and no connection."""
ALIASES = {
    "refusal": "wording",
    "strings": "strings:openings",
    "garak-refusal": "hf-classifier:garak-llm/garak-refusal-detector",
}
"""Short names of judges."""


@well_typed
def judge_refusal(
    completions: Sequence[Completion], judge: str = "wording", *, think_end: str | None = None
) -> Judgement:
    """Which completions refuse, fully or partly, and their rate.

    Case and spaces before punctuation do not matter. A thinking part is not read. An empty completion, or one
    whose thinking was cut off, is neither refusal nor compliance: it is unscored and counted. On harmless
    prompts the same rate is over-refusal.

    Args:
        completions: what to judge; the judge sees prompt and answer, never the arm.
        judge: `wording` (sentence-level rules) or `prefix` (a plain list of openings).
        think_end: the text that ends a thought, in the place of what the completions say of it
            (`meta["think_end"]`).

    Raises:
        UsageError: there is no such judge.
    """
    if judge not in JUDGES:
        raise UsageError(f"unknown refusal judge {judge!r}; expected one of {' '.join(JUDGES)}")
    function, version = JUDGES[judge]
    return judged(f"{judge}-{version}", function, ending(completions, think_end))


@well_typed
def judge(name: str, **options: Any) -> Judge:
    """The judge of a name. Models are loaded when it first judges.

    Args:
        name: `refusal` (the project's own, the same as `wording`), `prefix`; `goes-along` (harm, of any
            model); `compliance` (for the templates of organisms alone); `strings[:LIST[/LANGUAGE]]`, where
            LIST is `openings`, `phrases`, `advbench` or a JSON file; `garak-refusal`; `hf-classifier:ID`; a
            guard: `harmbench`, `llama-guard-3`, `llama-guard-4`, `wildguard`, `shieldgemma`,
            `granite-guardian`, `granite-guardian-3.0`, `qwen3guard`, `strongreject`, each alone or with
            `:ID`; `cost[:ID]`; `openai:URL#MODEL`.
        **options: As the judge's class takes them: `device`, `dtype`, `offline`, `template`, `harmful`,
            `refusal`, `format`, …; what a judge without a model has no use for among `device`, `dtype`,
            `offline` and `batch_size` is left out.

    Raises:
        UsageError: No such judge, or an option it does not know.
    """
    full = ALIASES.get(name, name)
    kind, _, rest = full.partition(":")
    if kind in JUDGES and not rest:
        function, version = JUDGES[kind]
        return _made(name, lambda: FunctionJudge(f"{kind}-{version}", function, str(version)), options)
    if kind == "compliance":
        return _made(name, ComplianceJudge, options)
    if kind == HARM_JUDGE and not rest:
        return _made(name, GoesAlongJudge, options)
    if kind == "strings":
        return _made(name, lambda: string_judge(rest or "openings"), options)
    maker = _MODEL_JUDGES.get(kind) or _guard_maker(kind)
    return maker(kind, rest, options)


def model_behind(name: str) -> str | None:
    """The model argument that a judge's name stands for.

    None for a judge without weights of its own here, and for no judge.
    """
    from safety_neurons.judges.guards import FORMS

    kind, _, rest = ALIASES.get(name, name).partition(":")
    if kind == "cost":
        from safety_neurons.judges.heads import COST_MODEL

        return rest or COST_MODEL
    if kind == "hf-classifier":
        return rest or None
    return rest or FORMS[kind].model if kind in FORMS else None


@well_typed
def judge_names() -> tuple[str, ...]:
    """The names that `judge` knows, those that take an `:ID` without it."""
    from safety_neurons.judges.guards import FORMS

    return tuple(dict.fromkeys((*ALIASES, *JUDGES, HARM_JUDGE, "compliance", *FORMS, *_MODEL_JUDGES)))


@well_typed
def agreement(first: Judgement, second: Judgement) -> Agreement:
    """How far two judges agree on the same completions: on refusal where both say so, otherwise on harm.

    A judge of refusals says of harm that what does not refuse is harmful, which holds on harmful requests
    only.

    Raises:
        InputError: Judgements of different completions.
    """
    both = all(any(value is not None for value in judgement.refused) for judgement in (first, second))
    pair = (first.refused, second.refused) if both else (first.harmful, second.harmful)
    return cohen_kappa(*pair, shared_by(first.completions), names=(first.judge, second.judge))


def _made(name: str, maker: Callable[[], Judge], options: dict[str, Any]) -> Judge:
    """A judge without options of its own."""
    unknown = sorted(options.keys() - {"device", "dtype", "offline", "batch_size"})
    if unknown:
        raise UsageError(f"judge {name!r} knows no option {unknown[0]!r}; expected none")
    return maker()


def _called(kind: str, make: Callable[..., Any], arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
    try:
        inspect.signature(make).bind(*arguments, **options)
    except TypeError as error:
        raise UsageError(
            f"judge {kind!r}: {error}; expected the options of {getattr(make, '__name__', kind)}"
        ) from error
    return make(*arguments, **options)


def _classifier(kind: str, rest: str, options: dict[str, Any]) -> Judge:
    from safety_neurons.judges.heads import ClassifierJudge

    if not rest:
        raise UsageError(f"judge {kind!r}: expected {kind}:ID, the name or folder of a sequence classifier")
    return _called(kind, ClassifierJudge, (rest,), options)


def _cost(kind: str, rest: str, options: dict[str, Any]) -> Judge:
    from safety_neurons.judges.heads import CostJudge

    return _called(kind, CostJudge, (rest,) if rest else (), options)


def _endpoint(kind: str, rest: str, options: dict[str, Any]) -> Judge:
    from safety_neurons.judges.guards import EndpointJudge
    from safety_neurons.model import ChatServer

    url, _, model = rest.rpartition("#")
    if not url or not model:
        raise UsageError(
            f"judge {kind}:{rest}: expected {kind}:URL#MODEL, such as {kind}:http://localhost:8000/v1#judge"
        )
    given = {key: value for key, value in options.items() if key not in ("device", "dtype", "batch_size")}
    own = ("rubric", "measure", "parallel", "settings", "think_end")
    server = {key: value for key, value in given.items() if key not in own}
    endpoint = _called(kind, ChatServer, (url, model), server)
    return _called(
        kind, EndpointJudge, (endpoint,), {key: value for key, value in given.items() if key in own}
    )


_MODEL_JUDGES: dict[str, Callable[[str, str, dict[str, Any]], Judge]] = {
    "hf-classifier": _classifier,
    "cost": _cost,
    "openai": _endpoint,
}


def _guard_maker(kind: str) -> Callable[[str, str, dict[str, Any]], Judge]:
    from safety_neurons.judges.guards import FORMS

    if kind not in FORMS:
        raise UsageError(f"unknown judge {kind!r}; expected one of {' '.join(judge_names())}")

    def make(family: str, rest: str, options: dict[str, Any]) -> Judge:
        from safety_neurons.judges.guards import GuardJudge

        return _called(family, GuardJudge, (family, rest or None), options)

    return make
