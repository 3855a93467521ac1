"""Results: rates, effects, completions, and the folders and files they are written to. Needs only numpy."""

from safety_neurons.results.checkpoint import Checkpoint, Saved
from safety_neurons.results.completions import Completion, Completions
from safety_neurons.results.effects import Difference, Effect, causal_effect, paired_difference
from safety_neurons.results.files import plain, read_json, write_bytes, write_json
from safety_neurons.results.rates import Rate, perplexity, rate
from safety_neurons.results.run_folder import RunFolder

__all__ = [
    "Checkpoint",
    "Completion",
    "Completions",
    "Difference",
    "Effect",
    "Rate",
    "RunFolder",
    "Saved",
    "causal_effect",
    "paired_difference",
    "perplexity",
    "plain",
    "rate",
    "read_json",
    "write_bytes",
    "write_json",
]
