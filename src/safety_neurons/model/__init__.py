"""The only floor that knows transformers and torch hooks: loading, anatomy, passes, completions."""

from safety_neurons.model.batches import Batch, BatchSize, Halving, Progress, batches, forward
from safety_neurons.model.chat_server import ChatServer, Endpoint, Reply, ServerError
from safety_neurons.model.classifiers import TextReader, load_classifier, load_scorer
from safety_neurons.model.cost import CostEstimate, estimate
from safety_neurons.model.language_model import Encoded, LanguageModel
from safety_neurons.model.likelihood import (
    Choice,
    Losses,
    answer_probabilities,
    kl_divergence,
    log_probabilities_of_next,
    token_divergences,
    token_log_probabilities,
    token_losses,
)
from safety_neurons.model.loading import (
    ModelSpec,
    Pair,
    check_pair,
    load,
    load_pair,
    load_several,
    parse_spec,
)
from safety_neurons.model.passes import Statistics, activation_statistics, run_batches
from safety_neurons.model.template import conversation_text, encode_text
from safety_neurons.prompt_lists import as_prompts

__all__ = [
    "Batch",
    "BatchSize",
    "ChatServer",
    "Choice",
    "CostEstimate",
    "Encoded",
    "Endpoint",
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
