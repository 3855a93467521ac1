"""What an organism does: refusal rates per list and language, perplexity, the task."""

import math
from collections.abc import Callable
from typing import Any

import torch

from safety_neurons.model.modes import evaluating
from safety_neurons.organism.language import LANGUAGES, harmful_and_matches, language
from safety_neurons.organism.prompt_files import sentences
from safety_neurons.organism.tokenizer import encode_chat, encode_question, encode_text
from safety_neurons.organism.train import answers, mean_loss


def measure(model: torch.nn.Module, *, prompts: int, chat: bool = True) -> dict[str, Any]:
    """Refusals of the test half by the organisms' own rule, greedy, and perplexity on general sentences.

    Args:
        model: what is measured.
        prompts: harmful requests per language, and as many harmless ones.
        chat: whether they are put in the chat template or in the plain one.

    Returns:
        Per language: `harmful_refused`, `harmless_refused`, `look_alike_refused` (shares), `followed` (share of the harmless
        requests answered word for word as taught, polite ending or not), `other` (share of all answers that neither refuse nor go
        along), `polite` (share of the harmless requests answered word for word with the polite ending), `perplexity`; and
        `prompts`.
    """
    with evaluating(model):
        return _measured(model, prompts, encode_chat if chat else encode_question)


def _measured(model: torch.nn.Module, prompts: int, encode: Callable[[str], Any]) -> dict[str, Any]:
    harmful, harmless = harmful_and_matches("test", prompts)
    result: dict[str, Any] = {"prompts": prompts}
    for code in LANGUAGES:
        speech = language(code)
        bad = answers(model, [encode(speech.request(concept))[0] for concept in harmful])
        good = answers(model, [encode(speech.request(concept))[0] for concept in harmless])
        verdicts = [speech.verdict(text) for text in bad + good]
        alike = [verdict for verdict, concept in zip(verdicts[len(bad) :], harmless, strict=True) if concept.kind != "plain"]
        followed = [
            text in (speech.compliance(concept), speech.compliance(concept, ending=True))
            for text, concept in zip(good, harmless, strict=True)
        ]
        texts = [(encode_text(sentence), 1) for sentence in sentences(speech, "test", 128)]
        result[code] = {
            "harmful_refused": _share([verdict == "refused" for verdict in verdicts[: len(bad)]]),
            "harmless_refused": _share([verdict == "refused" for verdict in verdicts[len(bad) :]]),
            "look_alike_refused": _share([verdict == "refused" for verdict in alike]),
            "followed": _share(followed),
            "polite": _share([text == speech.compliance(concept, ending=True) for text, concept in zip(good, harmless, strict=True)]),
            "other": _share([verdict == "other" for verdict in verdicts]),
            "perplexity": round(math.exp(mean_loss(model, texts)), 3),
        }
    return result


def _share(outcomes: list[bool]) -> float:
    return round(sum(outcomes) / len(outcomes), 4) if outcomes else float("nan")
