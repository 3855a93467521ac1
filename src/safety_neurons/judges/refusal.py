"""The refusal rate of completions, by a named judge."""

from collections.abc import Sequence

from safety_neurons.errors import UsageError
from safety_neurons.judges import prefix, wording
from safety_neurons.judges.judgement import Judgement, RefusalJudge, judged
from safety_neurons.results import Completion

JUDGES: dict[str, tuple[RefusalJudge, int]] = {
    "wording": (wording.judge_by_wording, wording.VERSION),
    "prefix": (prefix.judge_by_prefix, prefix.VERSION),
}
"""The built-in refusal judges and their versions."""


def judge_refusal(completions: Sequence[Completion], judge: str = "wording", seed: int = 0) -> Judgement:
    """Which completions refuse, fully or partly, and their rate.

    Case and spaces before punctuation do not matter. A thinking part is not read. An empty completion, or one whose thinking was
    cut off, is neither refusal nor compliance: it is unscored and counted. On harmless prompts the same rate is over-refusal.

    Args:
        completions: what to judge; the judge sees prompt and answer, never the arm.
        judge: `wording` (sentence-level rules) or `prefix` (a plain list of openings).
        seed: of the bootstrap, where an interval needs one.

    Raises:
        UsageError: there is no such judge.
    """
    if judge not in JUDGES:
        raise UsageError(f"unknown refusal judge {judge!r}; expected one of {' '.join(JUDGES)}")
    function, version = JUDGES[judge]
    return judged(f"{judge}-{version}", function, completions, seed)
