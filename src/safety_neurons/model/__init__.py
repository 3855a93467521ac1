"""The only floor that knows transformers and torch hooks: loading, anatomy, passes, completions."""

from safety_neurons.model.language_model import Encoded, LanguageModel, as_prompts
from safety_neurons.model.loading import ModelSpec, Pair, check_pair, load, load_pair, parse_spec
from safety_neurons.model.passes import Batch, Halving, batches, run_batches

__all__ = [
    "Batch",
    "Encoded",
    "Halving",
    "LanguageModel",
    "ModelSpec",
    "Pair",
    "as_prompts",
    "batches",
    "check_pair",
    "load",
    "load_pair",
    "parse_spec",
    "run_batches",
]
