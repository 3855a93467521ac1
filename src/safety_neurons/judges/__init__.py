"""Judges: completions in, verdicts and rates out. A judge cannot tell which treatment a completion comes from."""

from safety_neurons.judges.compliance import ComplianceJudgement, judge_compliance
from safety_neurons.judges.judgement import Judgement, RefusalJudge, Verdict, answer_of, judged
from safety_neurons.judges.refusal import JUDGES, judge_refusal

__all__ = [
    "JUDGES",
    "ComplianceJudgement",
    "Judgement",
    "RefusalJudge",
    "Verdict",
    "answer_of",
    "judge_compliance",
    "judge_refusal",
    "judged",
]
