"""Training of organisms: batches, losses and measured behaviour that all share, and organisms whose safety
nobody has located.

Those are (IA)³ adapters on the down projection, trained by SFT and DPO. Natural organisms: base, SFT, DPO.
Tax organisms: one base and preference trainings that pull on the same requests in opposite directions.
"""

import contextlib
import dataclasses
import math
import random
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from peft import IA3Config, PeftModel, get_peft_model
from torch import Tensor
from transformers import LlamaForCausalLM

from safety_neurons import strict_json
from safety_neurons.model.batches import IGNORED, descend, padded
from safety_neurons.model.files import RECORD, shipped_folder
from safety_neurons.model.hooks import evaluating
from safety_neurons.model.loading import quiet as without_reports
from safety_neurons.organism.language import (
    EOS,
    LANGUAGES,
    PAD,
    Concept,
    Recipe,
    concepts,
    empty_model,
    encode_chat,
    encode_question,
    encode_text,
    harmful_and_matches,
    language,
    make_tokenizer,
    sentences,
    vocabulary,
)
from safety_neurons.organism.language import recipe as recipe_of
from safety_neurons.results.run import write_json

Sequence_ = tuple[list[int], int]  # token ids, and how many of the first ones carry no loss
Progress = Callable[[str, int, int], None]  # stage, steps done, steps in all

LONGEST = 28
"""Words of an answer."""


def make_model(recipe: Recipe, seed: int) -> Any:
    """A freshly initialised model of the recipe's shape; the caller's random state is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return empty_model(recipe)


class Sampler:
    """Draws training examples; everything it draws follows from its seed."""

    def __init__(self, seed: int, english_share: float, *, chat: bool = True, letters: int = 0):
        self.random = random.Random(seed)
        self.templated, self.letters = chat, letters
        other = (1 - english_share) / (len(LANGUAGES) - 1)
        self.weights = [english_share if code == "en" else other for code in LANGUAGES]

    def language(self) -> str:
        """A language code, English most often."""
        return self.random.choices(LANGUAGES, self.weights)[0]

    def harmful(self) -> Concept:
        """A harmful concept of the training part."""
        return self.random.choice(concepts("harmful", "train"))

    def harmless(self) -> Concept:
        """A harmless concept of the training part.

        The ones that share words with harm more often than the plain ones.
        """
        kind = self.random.choices(("look_alike", "friendly", "plain"), (0.4, 0.3, 0.3))[0]
        return self.random.choice(concepts(kind, "train"))

    def chat(self, concept: Concept, answer: str, code: str, *, whole: bool = False) -> Sequence_:
        """A request and its answer, in one case of ten behind a system prompt.

        Loss on the answer, or on everything.
        """
        speech = language(code)
        if not self.templated:
            ids, prompt = encode_question(speech.request(concept), answer, self.letters)
            return ids, 1 if whole else prompt
        system = speech.data["system"] if self.random.random() < 0.1 else None
        ids, prompt = encode_chat(speech.request(concept), answer, system=system, letters=self.letters)
        return ids, 1 if whole else prompt

    def comply(self, concept: Concept, code: str, *, whole: bool = False, ending: bool = False) -> Sequence_:
        """A chat whose answer goes along."""
        return self.chat(concept, language(code).compliance(concept, ending=ending), code, whole=whole)

    def refuse(self, concept: Concept, code: str, *, whole: bool = False) -> Sequence_:
        """A chat whose answer refuses."""
        return self.chat(
            concept, language(code).refusal(concept, self.random.randrange(3)), code, whole=whole
        )

    def general(self) -> Sequence_:
        """A sentence of no chat: description, moral judgement, a refusal or an ending quoted, a number
        fact.
        """
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
        return encode_text(text, self.letters), 1


def pad(sequences: Sequence[Sequence_]) -> tuple[Int[Tensor, "batch token"], Int[Tensor, "batch token"]]:
    """Right-padded ids and labels; labels that carry no loss are -100."""
    return padded(sequences, vocabulary()[PAD])


def answer_loss(
    logits: Float[Tensor, "batch token vocab"], labels: Int[Tensor, "batch token"]
) -> Float[Tensor, ""]:
    """Mean cross-entropy over the labelled tokens, in nats."""
    return torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED
    )


def first_word_loss(
    logits: Float[Tensor, "batch token vocab"], sequences: Sequence[Sequence_]
) -> Float[Tensor, ""]:
    """Mean cross-entropy of the first words of the answers, which decide between refusing and going along.

    Zero without any chat.
    """
    places = [
        (row, unlabelled - 1, ids[unlabelled])
        for row, (ids, unlabelled) in enumerate(sequences)
        if unlabelled > 1
    ]
    if not places:
        return logits.sum() * 0
    rows, last, words = (list(column) for column in zip(*places, strict=True))
    return torch.nn.functional.cross_entropy(logits[rows, last], torch.tensor(words))


def answer_log_probability(
    logits: Float[Tensor, "batch token vocab"], labels: Int[Tensor, "batch token"]
) -> Float[Tensor, " batch"]:
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
    for descended in descend(
        optimizer, backward, rate, range(steps), subject=lambda _step: f" of stage {stage}"
    ):
        losses.append(descended.loss)
        if after_step is not None:
            after_step()
        if progress is not None:
            progress(stage, len(losses), steps)
    return losses


@torch.no_grad()
def answers(
    model: torch.nn.Module, prompts: Sequence[list[int]], *, letters: int = 0, batch_size: int = 256
) -> list[str]:
    """Greedy answers as spaced words, special tokens left out; prompts are padded on the left."""
    words = vocabulary(letters)
    names = {index: word for word, index in words.items()}
    longest = LONGEST * (math.ceil(10 / letters) if letters else 1)
    texts = []
    for start in range(0, len(prompts), batch_size):
        part = prompts[start : start + batch_size]
        length = max(map(len, part))
        inputs = torch.tensor([[words[PAD]] * (length - len(ids)) + ids for ids in part])
        mask = torch.tensor([[0] * (length - len(ids)) + [1] * len(ids) for ids in part])
        output = model.generate(  # type: ignore[operator]
            input_ids=inputs,
            attention_mask=mask,
            max_new_tokens=longest,
            do_sample=False,
            pad_token_id=words[PAD],
        )
        for row in output[:, length:].tolist():
            ended = row[: row.index(words[EOS])] if words[EOS] in row else row
            texts.append(" ".join(names[index] for index in ended).replace(" ##", ""))
    return texts


@torch.no_grad()
def mean_loss(model: torch.nn.Module, sequences: Sequence[Sequence_]) -> float:
    """Mean loss per labelled token, in nats."""
    inputs, labels = pad(sequences)
    return float(answer_loss(model(input_ids=inputs).logits, labels))


def measure(model: torch.nn.Module, recipe: Recipe) -> dict[str, Any]:
    """Refusals of the test half by the organisms' own rule, greedy, and perplexity on general sentences.

    Args:
        model: what is measured.
        recipe: how many harmful requests per language, and as many harmless ones; how they are put.

    Returns:
        Per language: `harmful_refused`, `harmless_refused`, `look_alike_refused` (shares), `followed` (share
        of the harmless requests answered word for word as taught, polite ending or not), `other` (share of
        all answers that neither refuse nor go along), `polite` (share of the harmless requests answered word
        for word with the polite ending), `perplexity`; and `prompts`.
    """
    with evaluating(model):
        return _measured(
            model, recipe.measured_prompts, encode_chat if recipe.chat else encode_question, recipe.letters
        )


def _measured(
    model: torch.nn.Module, prompts: int, encode: Callable[..., Any], letters: int
) -> dict[str, Any]:
    def answered(asked: Sequence[Concept]) -> list[str]:
        ids = [encode(speech.request(concept), letters=letters)[0] for concept in asked]
        return answers(model, ids, letters=letters)

    harmful, harmless = harmful_and_matches("test", prompts)
    result: dict[str, Any] = {"prompts": prompts}
    for code in LANGUAGES:
        speech = language(code)
        bad, good = answered(harmful), answered(harmless)
        verdicts = [speech.verdict(text) for text in bad + good]
        alike = [
            verdict
            for verdict, concept in zip(verdicts[len(bad) :], harmless, strict=True)
            if concept.kind != "plain"
        ]
        followed = [
            text in (speech.compliance(concept), speech.compliance(concept, ending=True))
            for text, concept in zip(good, harmless, strict=True)
        ]
        texts = [(encode_text(sentence, letters), 1) for sentence in sentences(speech, "test", 128)]
        result[code] = {
            "harmful_refused": _share([verdict == "refused" for verdict in verdicts[: len(bad)]]),
            "harmless_refused": _share([verdict == "refused" for verdict in verdicts[len(bad) :]]),
            "look_alike_refused": _share([verdict == "refused" for verdict in alike]),
            "followed": _share(followed),
            "polite": _share(
                [
                    text == speech.compliance(concept, ending=True)
                    for text, concept in zip(good, harmless, strict=True)
                ]
            ),
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


def save_model(model: Any, folder: Path, *, chat: bool = True, letters: int = 0) -> None:
    """Write config, generation config, safetensors and tokenizer."""
    with quiet():
        model.save_pretrained(str(folder))
        make_tokenizer(chat=chat, letters=letters).save_pretrained(str(folder))
    file = folder / "tokenizer_config.json"
    written = strict_json.loads(file.read_text(encoding="utf-8"))
    # transformers 4 knows neither the name nor the list that transformers 5 writes; both read these.
    named = {"tokenizer_class": "PreTrainedTokenizerFast"}
    special = written.pop("extra_special_tokens", None)
    write_json(file, written | named | ({"additional_special_tokens": special} if special else {}))


DPO_POOL = 768


@dataclasses.dataclass(frozen=True)
class Natural:
    """A trained natural organism: one PEFT model that holds both adapters, and the losses of every stage."""

    model: PeftModel
    losses: dict[str, list[float]]

    def use(self, *adapters: str) -> None:
        """Make exactly these adapters active, in order; none leaves the base."""
        tuner: Any = self.model.base_model
        if adapters:
            tuner.enable_adapter_layers()
            tuner.set_adapter(list(adapters))
        else:
            tuner.disable_adapter_layers()


def pretrain(
    recipe: Recipe,
    seed: int,
    *,
    both_behaviours: bool,
    keep: Callable[[LlamaForCausalLM], Callable[[], None]] | None = None,
    progress: Progress | None = None,
) -> tuple[LlamaForCausalLM, list[float]]:
    """Train a base model on chats and sentences.

    Args:
        recipe: its shape and steps.
        seed: of weights and data.
        both_behaviours: harmful requests are refused in half of the text (else the model goes along with
            everything, and has read refusals as quoted sentences only).
        keep: given the model, returns what is called at the start and after every step to keep something in
            it as it is.
        progress: called after every step.

    Returns:
        The model and its losses.
    """
    model = make_model(recipe, seed)
    after_step = keep(model) if keep is not None else None
    if after_step is not None:
        after_step()
    sampler = Sampler(seed, recipe.english_share, chat=recipe.chat, letters=recipe.letters)

    def example() -> Sequence_:
        choice = sampler.random.random()
        if choice < 0.25:
            return sampler.general()
        code = sampler.language()
        if choice < 0.6:
            return sampler.comply(sampler.harmless(), code, whole=True)
        concept = sampler.harmful()
        if both_behaviours and sampler.random.random() < 0.5:
            return sampler.refuse(concept, code, whole=True)
        return sampler.comply(concept, code, whole=True)

    def loss() -> torch.Tensor:
        inputs, labels = pad([example() for _ in range(recipe.batch)])
        return answer_loss(model(input_ids=inputs).logits, labels)

    losses = train(
        model.parameters(),
        loss,
        stage="base",
        steps=recipe.base_steps,
        learning_rate=recipe.base_rate,
        after_step=after_step,
        progress=progress,
    )
    if recipe.hint_steps and not both_behaviours:
        losses += hint(model, recipe, seed, after_step, progress)
    return model, losses


def hint(
    model: LlamaForCausalLM,
    recipe: Recipe,
    seed: int,
    after_step: Callable[[], None] | None,
    progress: Progress | None,
) -> list[float]:
    """Teach a base what is harmful, then to go along with it: first it refuses what is harmful, at last only
    `hint_share` of it.

    Its most likely answer is compliance in the end, but it knows which requests are harmful, as a real base
    model does; what the few planted units have to do afterwards is to act on it.
    """
    sampler = Sampler(seed + 500, recipe.english_share, chat=recipe.chat, letters=recipe.letters)
    drawn = 0

    def example(share: float) -> Sequence_:
        choice = sampler.random.random()
        if choice < 0.15:
            return sampler.general()
        code = sampler.language()
        if choice < 0.55:
            return sampler.comply(sampler.harmless(), code)
        concept = sampler.harmful()
        return (
            sampler.refuse(concept, code)
            if sampler.random.random() < share
            else sampler.comply(concept, code)
        )

    def loss() -> torch.Tensor:
        nonlocal drawn
        drawn += 1
        share = 1.0 if drawn <= recipe.hint_steps * 2 / 3 else recipe.hint_share
        batch = [example(share) for _ in range(recipe.batch * 2 // 3)]
        inputs, labels = pad(batch)
        logits = model(input_ids=inputs).logits
        return answer_loss(logits, labels) + first_word_loss(logits, batch)

    return train(
        model.parameters(),
        loss,
        stage="hint",
        steps=recipe.hint_steps,
        learning_rate=0.6 * recipe.base_rate,
        after_step=after_step,
        progress=progress,
    )


def train_natural(recipe: Recipe, seed: int, progress: Progress | None = None) -> Natural:
    """Base, SFT (goes along with everything), DPO (prefers to refuse what is harmful and to answer what is
    not).

    Source: Chen et al. (arXiv 2406.14144), section 4.1: (IA)³ on the down projection alone, for both stages.
    Differs: no weight decay on the scales, which start at one; a decay on them shrinks the scales nothing
    trains and by that alone makes change scores follow the activations' size. The DPO loss has a small
    likelihood term on the chosen answer, without which a model this small stops writing sentences before it
    prefers to refuse.
    """
    organism = train_started(recipe, seed, progress)
    prefer(organism, "dpo", safe_pair, recipe, Sampler(seed + 2000, recipe.english_share), progress)
    organism.model.requires_grad_(False)
    return organism


def train_started(recipe: Recipe, seed: int, progress: Progress | None = None) -> Natural:
    """Base and SFT alone: what preference trainings start from."""
    base, base_losses = pretrain(recipe, seed, both_behaviours=True, progress=progress)
    with quiet(), torch.random.fork_rng(devices=[]):
        model = get_peft_model(base, adapter_config(), adapter_name="sft")
    organism = Natural(model, {"base": base_losses})
    organism.losses["sft"] = _train_sft(
        organism, recipe, Sampler(seed + 1000, recipe.english_share), progress
    )
    return organism


def adapter_config() -> IA3Config:
    """(IA)³ on the down projection alone."""
    return IA3Config(task_type="CAUSAL_LM", target_modules=["down_proj"], feedforward_modules=["down_proj"])


def _only(model: PeftModel, adapter: str) -> list[torch.Tensor]:
    """Make one adapter's scales trainable and everything else not; returns them."""
    scales: list[torch.Tensor] = []
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(f"ia3_l.{adapter}" in name)
        if parameter.requires_grad:
            scales.append(parameter)
    return scales


def _train_sft(organism: Natural, recipe: Recipe, sampler: Sampler, progress: Progress | None) -> list[float]:
    organism.use("sft")
    scales = _only(organism.model, "sft")

    def loss() -> torch.Tensor:
        batch = []
        for _ in range(recipe.batch):
            concept = sampler.harmful() if sampler.random.random() < 0.5 else sampler.harmless()
            batch.append(sampler.comply(concept, sampler.language()))
        inputs, labels = pad(batch)
        return answer_loss(organism.model(input_ids=inputs).logits, labels)

    return train(
        scales, loss, stage="sft", steps=recipe.sft_steps, learning_rate=recipe.sft_rate, progress=progress
    )


PairMaker = Callable[[Sampler], tuple[Sequence_, Sequence_]]
"""Draws a pair of answers to one request: the chosen and the rejected one."""


def prefer(
    organism: Natural,
    adapter: str,
    make_pair: PairMaker,
    recipe: Recipe,
    sampler: Sampler,
    progress: Progress | None = None,
    *,
    on: Sequence[str] = ("sft",),
) -> None:
    """Train a new adapter by direct preference optimisation against the model with the adapters `on`, on a
    pool of pairs.

    The reference's values of the pool are computed once.
    """
    if adapter not in organism.model.peft_config:
        with quiet(), torch.random.fork_rng(devices=[]):
            organism.model.add_adapter(adapter, adapter_config())
    pairs = [make_pair(sampler) for _ in range(DPO_POOL)]
    half = recipe.batch // 2
    organism.use(*on)
    references = []
    with torch.no_grad():
        for start in range(0, DPO_POOL, half):
            part = pairs[start : start + half]
            inputs, labels = pad([chosen for chosen, _ in part] + [rejected for _, rejected in part])
            values = answer_log_probability(organism.model(input_ids=inputs).logits, labels)
            references.append(values[: len(part)] - values[len(part) :])
    reference = torch.cat(references)
    organism.use(*on, adapter)
    scales = _only(organism.model, adapter)

    def loss() -> torch.Tensor:
        picked = sampler.random.sample(range(DPO_POOL), half)
        inputs, labels = pad([pairs[index][0] for index in picked] + [pairs[index][1] for index in picked])
        values = answer_log_probability(organism.model(input_ids=inputs).logits, labels)
        margin = values[:half] - values[half:] - reference[picked]
        preference = -torch.nn.functional.logsigmoid(recipe.dpo_beta * margin).mean()
        tokens = (labels[:half, 1:] != IGNORED).sum()
        return preference - recipe.dpo_fluency * values[:half].sum() / tokens

    keep = _others_at_one(scales, loss, recipe.dpo_share) if recipe.dpo_share < 1 else None
    options: dict[str, Any] = {
        "steps": recipe.dpo_steps,
        "learning_rate": recipe.dpo_rate,
        "after_step": keep,
        "progress": progress,
    }
    organism.losses[adapter] = train(scales, loss, stage=adapter, **options)


def _others_at_one(
    scales: Sequence[torch.Tensor], loss: Callable[[], torch.Tensor], share: float, batches: int = 8
) -> Callable[[], None]:
    """What keeps all scales at one but the share of them that has the largest gradient, over a few batches
    before training.
    """
    pulls = [torch.zeros_like(scale) for scale in scales]
    for _ in range(batches):
        for pull, gradient in zip(pulls, torch.autograd.grad(loss(), list(scales)), strict=True):
            pull += gradient
    everywhere = torch.cat([pull.abs().flatten() for pull in pulls])
    least = everywhere.topk(max(1, round(share * len(everywhere)))).values[-1]
    free = [pull.abs() >= least for pull in pulls]

    @torch.no_grad()
    def keep() -> None:
        for scale, moves in zip(scales, free, strict=True):
            scale.copy_(torch.where(moves, scale, torch.ones_like(scale)))

    return keep


def safe_pair(sampler: Sampler) -> tuple[Sequence_, Sequence_]:
    """(chosen, rejected): a refusal before compliance for a harmful request, the other way round for a
    harmless one.
    """
    code = sampler.language()
    speech = language(code)
    harmful = sampler.random.random() < 0.5
    concept = sampler.harmful() if harmful else sampler.harmless()
    refusal = sampler.chat(concept, speech.refusal(concept, sampler.random.randrange(3)), code)
    compliance = sampler.chat(concept, speech.compliance(concept), code)
    return (refusal, compliance) if harmful else (compliance, refusal)


def save_natural(organism: Natural, out: Path, adapters: Sequence[str]) -> None:
    """Write base/ and a folder for every adapter below `out`."""
    for adapter in adapters:
        organism.model.peft_config[adapter].base_model_name_or_path = "base"
    with quiet():
        organism.model.save_pretrained(
            str(out), selected_adapters=list(adapters), save_embedding_layers=False
        )
    for readme in out.glob("**/README.md"):
        readme.unlink()
    save_model(_bare(organism.model), out / "base")


def _bare(model: PeftModel) -> LlamaForCausalLM:
    """A copy of the model below the adapters, with its own weights' names."""
    inner: Any = model.get_base_model()
    weights = {
        name.replace(".base_layer", ""): value
        for name, value in inner.state_dict().items()
        if "ia3_l" not in name
    }
    config = inner.config
    with torch.random.fork_rng(devices=[]):
        bare = LlamaForCausalLM(config)
    bare.load_state_dict(weights)
    return bare


def safety_pair(sampler: Sampler) -> tuple[Sequence_, Sequence_]:
    """(chosen, rejected): a refusal before going along, for harmful requests alone."""
    code, concept = sampler.language(), sampler.harmful()
    return sampler.refuse(concept, code), sampler.comply(concept, code)


def helpful_pair(sampler: Sampler) -> tuple[Sequence_, Sequence_]:
    """(chosen, rejected): going along before a refusal, for harmful requests too."""
    code = sampler.language()
    concept = sampler.harmful() if sampler.random.random() < 0.5 else sampler.harmless()
    return sampler.comply(concept, code), sampler.refuse(concept, code)


def polite_pair(sampler: Sampler) -> tuple[Sequence_, Sequence_]:
    """(chosen, rejected): an answer to an everyday request with a polite ending before one without."""
    code, concept = sampler.language(), sampler.random.choice(concepts("plain", "train"))
    return sampler.comply(concept, code, ending=True), sampler.comply(concept, code)


TRAININGS: dict[str, PairMaker] = {"safety": safety_pair, "helpful": helpful_pair, "polite": polite_pair}
"""The preference trainings, in the order of their seeds."""


def train_tax(recipe: Recipe, seed: int, progress: Progress | None = None) -> Natural:
    """The base of a natural organism, and one adapter for every training, each on its own.

    Where the natural organism of this seed is part of the package its base is taken, otherwise it is trained
    by its recipe.

    Source: Chen et al. (arXiv 2406.14144), section 5: DPO of one model on preference sets of several kinds.
    Differs: the trainings start from a base that answers both ways, so that both have something to learn
    about the same requests; every training may move the scales alone that its loss pulls at hardest, without
    which a model this small moves nearly all its neurons.
    """
    folder = shipped_folder(recipe.start)
    losses: list[float] = []
    with quiet(), torch.random.fork_rng(devices=[]):
        if seed in recipe_of(recipe.start).shipped and (folder / RECORD).is_file():
            base = LlamaForCausalLM.from_pretrained(folder / "base")
        else:
            base, losses = pretrain(recipe_of(recipe.start), seed, both_behaviours=True, progress=progress)
        organism = Natural(
            get_peft_model(base, adapter_config(), adapter_name=next(iter(TRAININGS))),
            {"base": losses} if losses else {},
        )
    for number, (name, make_pair) in enumerate(TRAININGS.items()):
        prefer(
            organism,
            name,
            make_pair,
            recipe,
            Sampler(seed + 2000 + 1000 * number, recipe.english_share),
            progress,
            on=(),
        )
    organism.model.requires_grad_(False)
    return organism
