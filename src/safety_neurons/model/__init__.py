"""The only floor that knows transformers and torch hooks: loading, anatomy, passes, completions."""

from safety_neurons.model.language_model import Encoded, LanguageModel, as_prompts
from safety_neurons.model.likelihood import (
    kl_divergence,
    log_probabilities_of_next,
    token_divergences,
    token_log_probabilities,
    token_losses,
)
from safety_neurons.model.loading import ModelSpec, Pair, check_pair, load, load_pair, parse_spec
from safety_neurons.model.measures import BatchSize, Losses, Progress
from safety_neurons.model.memory import Estimate, estimate
from safety_neurons.model.passes import Batch, Halving, batches, forward, run_batches
from safety_neurons.model.statistics import Statistics, activation_statistics

__all__ = [
    "Batch",
    "BatchSize",
    "Encoded",
    "Estimate",
    "Halving",
    "LanguageModel",
    "Losses",
    "ModelSpec",
    "Pair",
    "Progress",
    "Statistics",
    "activation_statistics",
    "as_prompts",
    "batches",
    "check_pair",
    "estimate",
    "forward",
    "kl_divergence",
    "load",
    "load_pair",
    "log_probabilities_of_next",
    "parse_spec",
    "run_batches",
    "token_divergences",
    "token_log_probabilities",
    "token_losses",
]
