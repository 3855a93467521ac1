"""Results: rates, effects, completions, and the folders and files they are written to. Needs only numpy."""

from safety_neurons.results.agreement import Agreement, cohen_kappa
from safety_neurons.results.changes import Changes
from safety_neurons.results.checkpoint import Checkpoint, Saved
from safety_neurons.results.completions import Completion, Completions, conversation_of
from safety_neurons.results.effects import Difference, Effect, causal_effect, paired_difference
from safety_neurons.results.files import plain, read_json, write_bytes, write_json
from safety_neurons.results.gate import Gate
from safety_neurons.results.notebook import html_table, visible
from safety_neurons.results.paired import McNemar, mcnemar
from safety_neurons.results.rates import Rate, per_token, perplexity, rate
from safety_neurons.results.run_folder import RunFolder

__all__ = [
    "Agreement",
    "Changes",
    "Checkpoint",
    "Completion",
    "Completions",
    "Difference",
    "Effect",
    "Gate",
    "McNemar",
    "Rate",
    "RunFolder",
    "Saved",
    "causal_effect",
    "cohen_kappa",
    "conversation_of",
    "html_table",
    "mcnemar",
    "paired_difference",
    "per_token",
    "perplexity",
    "plain",
    "rate",
    "read_json",
    "visible",
    "write_bytes",
    "write_json",
]
