"""Results: rates, effects, completions, and the folders and files they are written to. Needs only numpy and scipy."""

from safety_neurons.results.agreement import Agreement, cohen_kappa
from safety_neurons.results.areas import AreaPart, area_difference, auroc, mean_area_difference
from safety_neurons.results.changes import Changes
from safety_neurons.results.checkpoint import Checkpoint, Saved
from safety_neurons.results.completions import Completion, Completions, conversation_of
from safety_neurons.results.estimates import (
    Difference,
    Effect,
    Estimate,
    McNemar,
    Rate,
    against_random,
    captioned,
    causal_effect,
    clear_word,
    comparisons,
    difference_over_seeds,
    family,
    holm,
    holm_in,
    is_clear,
    mcnemar,
    paired_difference,
    per_token,
    perplexity,
    rate,
    rate_over_seeds,
    stands_out,
)
from safety_neurons.results.files import plain, read_json, write_bytes, write_json
from safety_neurons.results.gate import Gate
from safety_neurons.results.notebook import html_table, visible
from safety_neurons.results.run_folder import RunFolder

__all__ = [
    "Agreement",
    "AreaPart",
    "Changes",
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
