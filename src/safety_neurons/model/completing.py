"""Completions: `generate` driven in left-padded batches, with nothing of a checkpoint's sampling defaults leaking in."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from safety_neurons.errors import UsageError
from safety_neurons.model.language_model import LanguageModel
from safety_neurons.model.measures import BatchSize, Progress
from safety_neurons.model.parts import unwrapped
from safety_neurons.model.passes import Halving, plan, takes_padding, token_budget
from safety_neurons.model.template import untouched

_INSTEAD = {
    "do_sample": "sample=True, whose draws come from `seed`",
    "generation_config": "its fields as arguments",
    "input_ids": "prompts",
    "inputs_embeds": "prompts",
    "attention_mask": "prompts",
    "max_length": "max_new_tokens",
}
"""Arguments of `generate` that would undo what a completion promises, and what to give in their place."""


Watched = Callable[[list[int], Tensor], contextlib.AbstractContextManager[Mapping[str, Any]]]
"""Watches the batches of `generate`: gets the indices of the rows and the mask `[batch, token]`, gives further arguments of the model's
`generate` (`logits_processor` and `stopping_criteria` as lists, `streamer`)."""


@dataclass(frozen=True)
class Decoding:
    """How answers are decoded.

    Attributes:
        max_new_tokens: Longest answer.
        sample: Draw tokens rather than take the likeliest.
        temperature: Of sampling.
        top_p: Of sampling.
        seed: Of sampling; every batch of the plan draws from its own stream, so a continued run draws the same.
        others: Further arguments of `generate`, passed on as they are.
    """

    max_new_tokens: int = 128
    sample: bool = False
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0
    others: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        wrong = next((name for name in _INSTEAD if name in (self.others or {})), None)
        if wrong is not None:
            raise UsageError(f"argument {wrong!r} of generate() arrived: give {_INSTEAD[wrong]} instead")
        if self.max_new_tokens < 1:
            raise UsageError(f"max_new_tokens {self.max_new_tokens}: expected at least 1")
        if self.sample and self.temperature <= 0:
            raise UsageError(f"temperature {self.temperature}: expected more than 0; leave sampling out for greedy decoding")
        if self.sample and not 0 < self.top_p <= 1:
            raise UsageError(f"top_p {self.top_p}: expected more than 0 and at most 1")
        if int((self.others or {}).get("num_return_sequences", 1)) != 1:
            raise UsageError(
                "num_return_sequences: expected one answer a prompt; give the prompt several times, or call again with another seed"
            )


@dataclass(frozen=True)
class Answer:
    """Token ids generated for one sequence, EOS excluded, and why they end.

    `stop` or `length`; `failed` where the model gave NaN or infinity at any step, and then there are none.
    """

    token_ids: list[int]
    finish_reason: Literal["stop", "length", "failed"]


@dataclass(frozen=True)
class Rows:
    """Prompts that are completed together; can be halved."""

    sequences: list[list[int]]
    indices: list[int]

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def width(self) -> int:
        """Tokens of the longest row."""
        return max(len(self.sequences[index]) for index in self.indices)

    def split(self) -> tuple["Rows", "Rows"]:
        """Two halves."""
        middle = (len(self) + 1) // 2
        return Rows(self.sequences, self.indices[:middle]), Rows(self.sequences, self.indices[middle:])


def generate(
    lm: LanguageModel,
    sequences: Sequence[Sequence[int]],
    decoding: Decoding,
    *,
    batch_size: BatchSize = "auto",
    skip: Sequence[int] = (),
    progress: Progress | None = None,
    answered: Callable[[int, Answer], None] | None = None,
    notes: list[str] | None = None,
    watched: Watched | None = None,
) -> dict[int, Answer]:
    """Continues every sequence with `lm.model.generate`, so that hooks on the model act.

    Args:
        lm: The model; its adapters are made the active ones meanwhile.
        sequences: Token ids of the prompts.
        decoding: How to decode.
        batch_size: Rows, or `auto` for a token budget that counts the new tokens.
        skip: Indices that have their answer already; the plan stays the same.
        progress: Called as `progress(sequences done, sequences in all, tokens generated)` after every batch.
        answered: Called with index and answer as soon as it is there.
        notes: Gets a line for every batch that did not fit in memory, and one for sequences that failed.
        watched: Opened around every batch, and again around each half of one that did not fit, with the indices of its rows and its mask.

    Returns:
        Answers by index, those in `skip` excluded.
    """
    kept = [list(sequence) for sequence in sequences]
    lengths = [len(sequence) + decoding.max_new_tokens for sequence in kept]
    groups = plan(lengths, batch_size, token_budget(lm.device), padded=takes_padding(lm))
    skipped, halving, tokens = set(skip), Halving(), 0
    answers: dict[int, Answer] = {}
    for number, group in enumerate(groups):
        wanted = [index for index in group if index not in skipped]
        if not wanted:
            continue
        for part in halving.run(Rows(kept, wanted), lambda rows, number=number: _generate_rows(lm, rows, decoding, number, watched)):  # type: ignore[misc]
            answers.update(part)
            for index, answer in part.items():
                tokens += len(answer.token_ids)
                if answered is not None:
                    answered(index, answer)
        if progress is not None:
            progress(len(answers) + len(skipped), len(kept), tokens)
    if notes is not None:
        failed = sum(answer.finish_reason == "failed" for answer in answers.values())
        notes += halving.notes + ([f"{failed} of {len(kept)} prompts gave NaN or infinity and have no answer"] if failed else [])
    return answers


def _generate_rows(lm: LanguageModel, rows: Rows, decoding: Decoding, number: int, watched: Watched | None = None) -> dict[int, Answer]:
    sequences = [rows.sequences[index] for index in rows.indices]
    width = rows.width
    input_ids = torch.full((len(rows), width), lm.pad_id, dtype=torch.long)
    mask = torch.zeros((len(rows), width), dtype=torch.long)
    for row, sequence in enumerate(sequences):
        input_ids[row, width - len(sequence) :] = torch.tensor(sequence)
        mask[row, width - len(sequence) :] = 1
    others = dict(decoding.others or {})
    settings, passed, ends = _settings(lm, decoding, others)
    stopped_otherwise = bool({"stop_strings", "stopping_criteria"} & others.keys())
    with contextlib.ExitStack() as stack:
        stack.enter_context(lm.running())
        stack.enter_context(torch.no_grad())
        stack.enter_context(neutral_defaults(lm.model))
        stack.enter_context(untouched(lm.tokenizer))
        if decoding.sample:
            stack.enter_context(seeded(lm.device, decoding.seed, number))
        if watched is not None:
            passed = _joined(passed, stack.enter_context(watched(rows.indices, mask)))
        finite = _Finite(min(ends, default=lm.pad_id))
        passed = _joined(passed, {"logits_processor": [finite]})
        output = lm.model.generate(
            input_ids=input_ids.to(lm.device), attention_mask=mask.to(lm.device), generation_config=settings, **passed
        )
    ids, failed = getattr(output, "sequences", output), finite.failed(len(rows))
    limit = decoding.max_new_tokens if stopped_otherwise else 0
    return {
        index: Answer([], "failed") if failed[row] else _cut(ids[row, width:], ends, lm.pad_id, limit)
        for row, index in enumerate(rows.indices)
    }


class _Finite:
    """A logits processor that ends the sequences whose logits are not numbers, which `generate` would go on from with token 0."""

    def __init__(self, end: int) -> None:
        self._end = end
        self._failed: Tensor | None = None

    def __call__(self, _: Int[Tensor, "row token"], scores: Float[Tensor, "row vocab"]) -> Float[Tensor, "row vocab"]:
        bad = ~scores.amax(-1).isfinite()  # the largest is NaN where any is; −∞ may be a token that is forbidden
        self._failed = bad if self._failed is None or len(self._failed) != len(bad) else self._failed | bad
        ending = torch.full_like(scores[0], -torch.inf)
        ending[self._end] = 0
        return torch.where(bad[:, None], ending, scores)

    def failed(self, rows: int) -> list[bool]:
        """Which of the batch's rows failed; beams of a row count together."""
        return [False] * rows if self._failed is None else self._failed.view(rows, -1).any(1).tolist()


def _joined(given: dict[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `generate` with those of a watch, whose processors and criteria come behind the caller's."""
    from transformers import LogitsProcessorList, StoppingCriteriaList

    lists = {"logits_processor": LogitsProcessorList, "stopping_criteria": StoppingCriteriaList}
    joined = {name: lists[name]([*(given.get(name) or ()), *value]) if name in lists else value for name, value in more.items()}
    return {**given, **joined}


def end_ids(lm: LanguageModel, given: int | Sequence[int] | None = None) -> list[int]:
    """The ids that end an answer: those given, otherwise the model's own."""
    return list(lm.eos_ids) if given is None else [given] if isinstance(given, int) else list(given)


def _settings(lm: LanguageModel, decoding: Decoding, others: dict[str, Any]) -> tuple[Any, dict[str, Any], set[int]]:
    """A generation configuration that names everything that matters, the arguments it has no field for, and the ids that end an answer."""
    from transformers import GenerationConfig

    ends = end_ids(lm, others.pop("eos_token_id", None))
    values: dict[str, Any] = {"max_new_tokens": decoding.max_new_tokens, "do_sample": decoding.sample, "use_cache": True, "num_beams": 1}
    if decoding.sample:
        values |= {"temperature": decoding.temperature, "top_p": decoding.top_p, "top_k": 0}
    known = GenerationConfig().to_dict().keys()
    values |= {name: value for name, value in others.items() if name in known}
    passed = {name: value for name, value in others.items() if name not in known}
    if "stop_strings" in others:
        passed["tokenizer"] = lm.tokenizer
    settings = GenerationConfig(**values, eos_token_id=ends or None, pad_token_id=lm.pad_id, bos_token_id=lm.bos_id)
    return settings, passed, set(ends)


def _cut(ids: Int[Tensor, " token"], ends: set[int], pad_id: int, limit: int) -> Answer:
    """What was generated up to the first end of sequence.

    Args:
        ids: Generated ids of one row.
        ends: Ids that end an answer.
        pad_id: What follows an answer that ended before others of its batch.
        limit: Longest answer where something else than an end token may stop one, 0 where nothing else can.
    """
    tokens = [int(token) for token in ids.tolist()]
    for place, token in enumerate(tokens):
        if token in ends:
            return Answer(tokens[:place], "stop")
    kept = len(tokens)
    while limit and kept and tokens[kept - 1] == pad_id:
        kept -= 1
    return Answer(tokens[:kept], "stop" if kept < limit else "length")


@contextlib.contextmanager
def neutral_defaults(model: Any) -> Iterator[None]:
    """A model without generation defaults of its own for a block, so that only what is asked for counts.

    transformers fills whatever a call leaves open from the checkpoint's `generation_config` (temperature, repetition penalty, …).
    PEFT replaces two attributes while it generates; they are put back as well.
    """
    from transformers import GenerationConfig

    inner = unwrapped(model)
    holders = [holder for holder in {id(inner): inner, id(model): model}.values() if "generation_config" in vars(holder)]
    before = [(holder, holder.generation_config) for holder in holders]
    tuner = model.base_model if hasattr(model, "peft_config") else None
    prepared = vars(tuner).get("prepare_inputs_for_generation") if tuner is not None else None
    try:
        for holder in holders:
            holder.generation_config = GenerationConfig()
        yield
    finally:
        for holder, settings in before:
            holder.generation_config = settings
        if tuner is not None:
            vars(tuner).pop("prepare_inputs_for_generation", None)
            if prepared is not None:
                tuner.prepare_inputs_for_generation = prepared


@contextlib.contextmanager
def seeded(device: torch.device, seed: int, number: int) -> Iterator[None]:
    """Random numbers of one's own for a block; the global generators are afterwards where they were."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed((seed * 1_000_003 + number) % 2**63)
        yield
