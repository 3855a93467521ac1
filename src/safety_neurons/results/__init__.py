"""Results: rates, effects, completions, and the folders and files they are written to.

Needs only numpy and scipy.
"""

from safety_neurons.results.areas import AreaPart, area_difference, auroc, cohen_kappa, mean_area_difference
from safety_neurons.results.completions import Completion, Completions, conversation_of
from safety_neurons.results.estimates import (
    against_random,
    captioned,
    causal_effect,
    comparisons,
    difference_over_seeds,
    family,
    holm,
    holm_in,
    mcnemar,
    paired_difference,
    per_token,
    perplexity,
    rate,
    rate_over_seeds,
)
from safety_neurons.results.gate import Gate
from safety_neurons.results.notebook import html_table, visible
from safety_neurons.results.records import (
    Agreement,
    Difference,
    Effect,
    Estimate,
    McNemar,
    Rate,
    clear_word,
    is_clear,
    plain,
    stands_out,
)
from safety_neurons.results.run import Checkpoint, RunFolder, Saved, read_json, write_bytes, write_json

__all__ = [
    "Agreement",
    "AreaPart",
    "Checkpoint",
    "Completion",
    "Completions",
    "Difference",
    "Effect",
    "Estimate",
    "Gate",
    "McNemar",
    "Rate",
    "RunFolder",
    "Saved",
    "against_random",
    "area_difference",
    "auroc",
    "captioned",
    "causal_effect",
    "clear_word",
    "cohen_kappa",
    "comparisons",
    "conversation_of",
    "difference_over_seeds",
    "family",
    "holm",
    "holm_in",
    "html_table",
    "is_clear",
    "mcnemar",
    "mean_area_difference",
    "paired_difference",
    "per_token",
    "perplexity",
    "plain",
    "rate",
    "rate_over_seeds",
    "read_json",
    "stands_out",
    "visible",
    "write_bytes",
    "write_json",
]
