"""Judges: completions in, verdicts and rates out. A judge cannot tell which treatment a completion comes from."""

from safety_neurons.judges.cache import JudgementCache
from safety_neurons.judges.compliance import ComplianceJudgement, judge_compliance
from safety_neurons.judges.judgement import (
    Judgement,
    RefusalJudge,
    Verdict,
    answer_of,
    harm_verdict,
    judged,
    refusal_verdict,
    unscored,
)
from safety_neurons.judges.judging import Case, FunctionJudge, Judge
from safety_neurons.judges.refusal import DEFAULT_JUDGES, JUDGES, agreement, judge, judge_names, judge_refusal
from safety_neurons.judges.strings import PhraseList, StringJudge, string_judge

__all__ = [
    "DEFAULT_JUDGES",
    "JUDGES",
    "Case",
    "ComplianceJudgement",
    "FunctionJudge",
    "Judge",
    "Judgement",
    "JudgementCache",
    "PhraseList",
    "RefusalJudge",
    "StringJudge",
    "Verdict",
    "agreement",
    "answer_of",
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
