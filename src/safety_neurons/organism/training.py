"""What every organism's training shares: batches, losses, greedy answers, measured behaviour, and writing of models."""

import contextlib
import math
import random
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from safety_neurons.model.batches import IGNORED, descend, padded
from safety_neurons.model.hooks import evaluating
from safety_neurons.model.loading import quiet as without_reports
from safety_neurons.organism.folder import Recipe
from safety_neurons.organism.language import (
    BOS,
    EOS,
    LANGUAGES,
    MAX_LENGTH,
    PAD,
    Concept,
    concepts,
    encode_chat,
    encode_question,
    encode_text,
    harmful_and_matches,
    language,
    make_tokenizer,
    vocabulary,
)
from safety_neurons.organism.prompts import sentences

Sequence_ = tuple[list[int], int]  # token ids, and how many of the first ones carry no loss
Progress = Callable[[str, int, int], None]  # stage, steps done, steps in all


def make_model(recipe: Recipe, seed: int) -> LlamaForCausalLM:
    """A freshly initialised Llama of the recipe's shape; the caller's random state is left alone."""
    words = vocabulary()
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=recipe.hidden,
        intermediate_size=recipe.d_ff,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.kv_heads,
        max_position_embeddings=MAX_LENGTH,
        initializer_range=0.08,
        tie_word_embeddings=True,
        bos_token_id=words[BOS],
        eos_token_id=words[EOS],
        pad_token_id=words[PAD],
        attention_dropout=0.0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


class Sampler:
    """Draws training examples; everything it draws follows from its seed."""

    def __init__(self, seed: int, english_share: float, *, chat: bool = True):
        self.random = random.Random(seed)
        self.templated = chat
        other = (1 - english_share) / (len(LANGUAGES) - 1)
        self.weights = [english_share if code == "en" else other for code in LANGUAGES]

    def language(self) -> str:
        """A language code, English most often."""
        return self.random.choices(LANGUAGES, self.weights)[0]

    def harmful(self) -> Concept:
        """A harmful concept of the training part."""
        return self.random.choice(concepts("harmful", "train"))

    def harmless(self) -> Concept:
        """A harmless concept of the training part; the ones that share words with harm more often than the plain ones."""
        kind = self.random.choices(("look_alike", "friendly", "plain"), (0.4, 0.3, 0.3))[0]
        return self.random.choice(concepts(kind, "train"))

    def chat(self, concept: Concept, answer: str, code: str, *, whole: bool = False) -> Sequence_:
        """A request and its answer, in one case of ten behind a system prompt; loss on the answer, or on everything."""
        speech = language(code)
        if not self.templated:
            ids, prompt = encode_question(speech.request(concept), answer)
            return ids, 1 if whole else prompt
        system = speech.data["system"] if self.random.random() < 0.1 else None
        ids, prompt = encode_chat(speech.request(concept), answer, system=system)
        return ids, 1 if whole else prompt

    def comply(self, concept: Concept, code: str, *, whole: bool = False, ending: bool = False) -> Sequence_:
        """A chat whose answer goes along."""
        return self.chat(concept, language(code).compliance(concept, ending=ending), code, whole=whole)

    def refuse(self, concept: Concept, code: str, *, whole: bool = False) -> Sequence_:
        """A chat whose answer refuses."""
        return self.chat(concept, language(code).refusal(concept, self.random.randrange(3)), code, whole=whole)

    def general(self) -> Sequence_:
        """A sentence of no chat: description, moral judgement, a refusal or an ending quoted, a number fact."""
        code = self.language()
        speech = language(code)
        choice = self.random.random()
        if choice < 0.35:
            text = speech.sentence(self.random)
        elif choice < 0.8:
            text = speech.judgement(self.harmful() if self.random.random() < 0.5 else self.harmless())
        elif choice < 0.92:
            text = speech.refusal(self.harmful(), self.random.randrange(3))
        elif choice < 0.96 or code != "en":
            text = speech.data["ending"]
        else:
            numbers = speech.data["numbers"]
            left = self.random.randrange(len(numbers) - 1)
            text = speech.data["task"]["following"].format(left=numbers[left], right=numbers[left + 1])
        return encode_text(text), 1


def pad(sequences: Sequence[Sequence_]) -> tuple[Int[Tensor, "batch token"], Int[Tensor, "batch token"]]:
    """Right-padded ids and labels; labels that carry no loss are -100."""
    return padded(sequences, vocabulary()[PAD])


def answer_loss(logits: Float[Tensor, "batch token vocab"], labels: Int[Tensor, "batch token"]) -> Float[Tensor, ""]:
    """Mean cross-entropy over the labelled tokens, in nats."""
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED)


def first_word_loss(logits: Float[Tensor, "batch token vocab"], sequences: Sequence[Sequence_]) -> Float[Tensor, ""]:
    """Mean cross-entropy of the first words of the answers, which decide between refusing and going along; zero without any chat."""
    places = [(row, unlabelled - 1, ids[unlabelled]) for row, (ids, unlabelled) in enumerate(sequences) if unlabelled > 1]
    if not places:
        return logits.sum() * 0
    rows, last, words = (list(column) for column in zip(*places, strict=True))
    return torch.nn.functional.cross_entropy(logits[rows, last], torch.tensor(words))


def answer_log_probability(logits: Float[Tensor, "batch token vocab"], labels: Int[Tensor, "batch token"]) -> Float[Tensor, " batch"]:
    """Summed log-probability of the labelled tokens of every row, in nats."""
    targets = labels[:, 1:]
    picked = logits[:, :-1].log_softmax(-1).gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return (picked * (targets != IGNORED)).sum(-1)


def train(
    parameters: Iterable[Tensor],
    loss_of_step: Callable[[], Tensor],
    *,
    stage: str,
    steps: int,
    learning_rate: float,
    after_step: Callable[[], None] | None = None,
    progress: Progress | None = None,
) -> list[float]:
    """AdamW without weight decay, short warm-up, cosine to a twentieth, gradients clipped at norm 1.

    Returns:
        The loss of every step.

    Raises:
        NumericalError: a loss is not finite.
    """
    warm_up = max(1, steps // 20)

    def backward(_step: int) -> float:
        loss = loss_of_step()
        loss.backward()
        return float(loss.detach())

    def rate(highest: float, step: int) -> float:
        decay = 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / steps))
        return highest * decay * min(1.0, (step + 1) / warm_up)

    optimizer = torch.optim.AdamW(list(parameters), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.0)
    losses = []
    for descended in descend(optimizer, backward, rate, range(steps), subject=lambda _step: f" of stage {stage}"):
        losses.append(descended.loss)
        if after_step is not None:
            after_step()
        if progress is not None:
            progress(stage, len(losses), steps)
    return losses


@torch.no_grad()
def answers(model: torch.nn.Module, prompts: Sequence[list[int]], *, max_new_tokens: int = 28, batch_size: int = 256) -> list[str]:
    """Greedy answers as spaced words, special tokens left out; prompts are padded on the left."""
    words = vocabulary()
    names = {index: word for word, index in words.items()}
    texts = []
    for start in range(0, len(prompts), batch_size):
        part = prompts[start : start + batch_size]
        length = max(map(len, part))
        inputs = torch.tensor([[words[PAD]] * (length - len(ids)) + ids for ids in part])
        mask = torch.tensor([[0] * (length - len(ids)) + [1] * len(ids) for ids in part])
        output = model.generate(  # type: ignore[operator]
            input_ids=inputs, attention_mask=mask, max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=words[PAD]
        )
        for row in output[:, length:].tolist():
            ended = row[: row.index(words[EOS])] if words[EOS] in row else row
            texts.append(" ".join(names[index] for index in ended))
    return texts


@torch.no_grad()
def mean_loss(model: torch.nn.Module, sequences: Sequence[Sequence_]) -> float:
    """Mean loss per labelled token, in nats."""
    inputs, labels = pad(sequences)
    return float(answer_loss(model(input_ids=inputs).logits, labels))


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


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """The libraries without progress bars and warnings for a block."""
    with without_reports(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def save_model(model: LlamaForCausalLM, folder: Path, *, chat: bool = True) -> None:
    """Write config, generation config, safetensors and tokenizer."""
    with quiet():
        model.save_pretrained(str(folder))
        make_tokenizer(chat=chat).save_pretrained(str(folder))
