"""The only floor that knows transformers and torch hooks: loading, anatomy, passes, completions."""

from safety_neurons.model.chat_server import ChatServer, Reply, ServerError
from safety_neurons.model.choices import Choice, answer_probabilities
from safety_neurons.model.conversation import conversation_text
from safety_neurons.model.heads import TextReader, load_classifier, load_scorer
from safety_neurons.model.language_model import Encoded, LanguageModel
from safety_neurons.model.likelihood import (
    kl_divergence,
    log_probabilities_of_next,
    token_divergences,
    token_log_probabilities,
    token_losses,
)
from safety_neurons.model.loading import ModelSpec, Pair, check_pair, load, load_pair, load_several, parse_spec
from safety_neurons.model.measures import BatchSize, Losses, Progress
from safety_neurons.model.memory import Estimate, estimate
from safety_neurons.model.passes import Batch, Halving, batches, forward, run_batches
from safety_neurons.model.statistics import Statistics, activation_statistics
from safety_neurons.model.template import encode_text
from safety_neurons.prompts import as_prompts

__all__ = [
    "Batch",
    "BatchSize",
    "ChatServer",
    "Choice",
    "Encoded",
    "Estimate",
    "Halving",
    "LanguageModel",
    "Losses",
    "ModelSpec",
    "Pair",
    "Progress",
    "Reply",
    "ServerError",
    "Statistics",
    "TextReader",
    "activation_statistics",
    "answer_probabilities",
    "as_prompts",
    "batches",
    "check_pair",
    "conversation_text",
    "encode_text",
    "estimate",
    "forward",
    "kl_divergence",
    "load",
    "load_classifier",
    "load_pair",
    "load_scorer",
    "load_several",
    "log_probabilities_of_next",
    "parse_spec",
    "run_batches",
    "token_divergences",
    "token_log_probabilities",
    "token_losses",
]
