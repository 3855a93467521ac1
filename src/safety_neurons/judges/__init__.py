"""Judges: completions in, verdicts and rates out.

A judge cannot tell which treatment a completion comes from.
"""

from safety_neurons.judges.going_along import GoesAlongJudge, broken
from safety_neurons.judges.judgement import (
    Case,
    FunctionJudge,
    Judge,
    Judgement,
    JudgementCache,
    JudgeVerdict,
    RefusalJudge,
    answer_of,
    harm_verdict,
    judged,
    refusal_verdict,
    unscored,
)
from safety_neurons.judges.registry import (
    DEFAULT_JUDGES,
    HARM_JUDGE,
    JUDGES,
    agreement,
    judge,
    judge_names,
    judge_refusal,
)
from safety_neurons.judges.wording import (
    ComplianceJudgement,
    PhraseList,
    StringJudge,
    judge_compliance,
    string_judge,
)

__all__ = [
    "DEFAULT_JUDGES",
    "HARM_JUDGE",
    "JUDGES",
    "Case",
    "ComplianceJudgement",
    "FunctionJudge",
    "GoesAlongJudge",
    "Judge",
    "JudgeVerdict",
    "Judgement",
    "JudgementCache",
    "PhraseList",
    "RefusalJudge",
    "StringJudge",
    "agreement",
    "answer_of",
    "broken",
    "harm_verdict",
    "judge",
    "judge_compliance",
    "judge_names",
    "judge_refusal",
    "judged",
    "refusal_verdict",
    "string_judge",
    "unscored",
]
