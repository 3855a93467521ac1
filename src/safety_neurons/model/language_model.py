"""A causal language model with its tokenizer and template, and its completions."""

import contextlib
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Unpack

import torch
from torch import nn

from safety_neurons.arguments import well_typed
from safety_neurons.errors import InputError, MismatchError, ModelError, UnsupportedModelError
from safety_neurons.model import ranks
from safety_neurons.model.adapters import activated, is_adapted
from safety_neurons.model.anatomy import resolve
from safety_neurons.model.batches import BatchSize, Halving, Progress, Rows, plan, token_budget
from safety_neurons.model.decoding import (
    FEWEST,
    Answer,
    Decoding,
    Finite,
    cut,
    decoded,
    joined,
    neutral_defaults,
    roomy_cache,
    rows_can_leave,
    seeded,
)
from safety_neurons.model.hooks import evaluating
from safety_neurons.model.proof import BOTH_WAYS, prove, same
from safety_neurons.model.sites import Anatomy, unwrapped
from safety_neurons.model.template import Prompting, encode_text, require_tokenizer, template_for, untouched
from safety_neurons.neurons import SiteTable
from safety_neurons.prompt_lists import Prompt, Prompts, as_prompts, prompts
from safety_neurons.prompt_lists.readers import Source
from safety_neurons.results import Completion, Completions, conversation_of
from safety_neurons.results.completions import is_end_mark, is_mark

Texts = Source


@dataclass(frozen=True)
class Encoded:
    """One prompt as the model gets it.

    Attributes:
        prompt_id: Which prompt.
        ids: Token ids, template and generation prompt included.
        truncated: Whether the middle was left out because the whole did not fit the context.
        thinking: Whether the template has opened a thinking part behind which the model goes on.
        unknown: Whether the tokenizer has no token for some of the text.
    """

    prompt_id: str
    ids: list[int]
    truncated: bool = False
    thinking: bool = False
    unknown: bool = False


def context_of(config: Any, tokenizer: Any) -> int | None:
    """Tokens that fit the context; None where neither configuration nor tokenizer sets a limit."""
    named = (getattr(config, name, None) for name in ("max_position_embeddings", "seq_length"))
    limit = next(filter(None, named), None) or getattr(tokenizer, "model_max_length", None)
    return int(limit) if limit and limit < 10**9 else None


class LanguageModel:
    """A model already in memory (plain, PEFT or quantised), its tokenizer, and how prompts are put to it.

    Nothing of the model, tokenizer or configuration is changed; what has to change for a pass (active
    adapters, evaluation mode, generation defaults) is put back after it.

    Args:
        model: Any causal LM of transformers, or a PEFT model of one.
        tokenizer: Its tokenizer; None where only token ids are fed.
        name: What people call the model; by default the name in its configuration.
        adapters: Names of the adapters of a PEFT model that belong to this view, in order; none (`[]`) for
            the plain base, None for whatever is active.
        folder: The local folder it came from.
        **prompting: How prompts are put to it: `template`, `system`, `template_args`, `think_end` (see
            `Prompting`).

    Attributes:
        notes: One line for each thing that is worth knowing of how the model was loaded and of what its
            template makes of prompts.
    """

    @well_typed
    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any = None,
        *,
        name: str | None = None,
        adapters: Sequence[str] | None = None,
        folder: str | Path | None = None,
        **prompting: Unpack[Prompting],
    ) -> None:
        if not hasattr(unwrapped(model), "config") or not hasattr(model, "generate"):
            raise ModelError(
                f"{type(model).__name__}: expected a causal language model of transformers, with a "
                "config and generate()"
            )
        if tokenizer is not None and not hasattr(tokenizer, "decode"):
            raise ModelError(
                f"{type(tokenizer).__name__} as the tokenizer; expected one of transformers: load it with "
                "AutoTokenizer.from_pretrained(…)"
            )
        if adapters is not None and adapters and not is_adapted(model):
            raise ModelError(
                f"adapters {list(adapters)} of a {type(model).__name__}: expected a PEFT model that "
                "holds them"
            )
        require_weights(model)
        if getattr(unwrapped(model).config.get_text_config(), "use_bidirectional_attention", None) in (
            True,
            "all",
        ):
            raise UnsupportedModelError(BOTH_WAYS)
        self.model: Any = model
        self.tokenizer = tokenizer
        rendering: dict[str, Any] = {**prompting}
        self.think_end: str | None = rendering.pop("think_end", None) or None
        self.template = template_for(tokenizer, **rendering)
        self.name = name or str(getattr(self.config, "_name_or_path", "") or type(self.inner).__name__)
        self.adapters = None if adapters is None else tuple(adapters)
        self.folder = None if folder is None else Path(folder)
        self.notes: list[str] = []
        if self.template.kind == "none" and getattr(tokenizer, "chat_template", None):
            self.notes.append(
                "template 'none' feeds prompts as they are; the model has a chat template, which 'auto' "
                "would use"
            )

    def __repr__(self) -> str:
        adapters = "" if not self.adapters else f", adapters {list(self.adapters)}"
        return (
            f"LanguageModel({self.name!r}, {type(self.inner).__name__}, {self.dtype}, "
            f"{self.device}{adapters})"
        )

    @property
    def prompt_folder(self) -> Path | None:
        """Folder of an organism's own prompts, which go before the built-in ones.

        None for every other model.
        """
        if self.folder is None:
            return None
        folders = (
            folder for folder in (self.folder, self.folder.parent) if (folder / "organism.json").is_file()
        )
        return next((folder / "prompts" for folder in folders if (folder / "prompts").is_dir()), None)

    def prompts(self, source: Source, **options: Any) -> Prompts:
        """Prompts for this model: as `safety_neurons.prompt_lists`, where `builtin:` names mean an organism's
        own if the model is one.

        Args:
            source: `builtin:NAME[/LANG]`, a file, or a list.
            **options: column, answer_column, limit.

        Raises:
            InputError: As for `safety_neurons.prompt_lists`.
        """
        return prompts(source, folder=self.prompt_folder, **options)

    @property
    def inner(self) -> Any:
        """The transformers model, adapters still in its layers."""
        return unwrapped(self.model)

    @property
    def config(self) -> Any:
        """The configuration of the decoder (of the text part where a model has several)."""
        config: Any = self.inner.config
        return config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config

    @property
    def device(self) -> torch.device:
        """Where token ids have to be."""
        return self.inner.get_input_embeddings().weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Type the model computes in."""
        return self.inner.dtype

    @property
    def max_length(self) -> int | None:
        """Tokens that fit the context; None where neither model nor tokenizer sets a limit."""
        return context_of(self.config, self.tokenizer)

    @property
    def n_ids(self) -> int:
        """Rows of the token embedding."""
        return int(self.inner.get_input_embeddings().weight.shape[0])

    @cached_property
    def eos_ids(self) -> tuple[int, ...]:
        """Every id that ends an answer, by the generation configuration, the model's configuration and the
        tokenizer.
        """
        settings = getattr(self.inner, "generation_config", None)
        ids: list[int] = []
        for holder in (settings, self.config, self.tokenizer):
            value = getattr(holder, "eos_token_id", None)
            ids += [] if value is None else [value] if isinstance(value, int) else list(value)
        return tuple(dict.fromkeys(int(value) for value in ids if 0 <= int(value) < self.n_ids))

    @cached_property
    def pad_id(self) -> int:
        """An id for padding: the tokenizer's, else an EOS, else 0; the tokenizer is not given one."""
        pad = getattr(self.tokenizer, "pad_token_id", None)
        if pad is not None and pad < self.n_ids:
            return int(pad)
        return self.eos_ids[0] if self.eos_ids else 0

    @property
    def bos_id(self) -> int | None:
        """The id that starts a sequence, where there is one."""
        bos = getattr(self.tokenizer, "bos_token_id", None)
        return bos if bos is not None else getattr(self.config, "bos_token_id", None)

    @cached_property
    def anatomy(self) -> Anatomy:
        """Where the neurons are, proved on a probe pass the first time it is asked for.

        Raises:
            UnsupportedModelError: A layer or site that cannot be found or proved.
        """
        with self.running():
            return prove(resolve(self.model))

    @cached_property
    def pads_left(self) -> bool:
        """Whether padding before a prompt changes nothing of its answer; tried out on a short one."""
        return _padded_as_alone(self)

    @property
    def table(self) -> SiteTable:
        """Sites and sizes of all neurons."""
        return self.anatomy.table

    @property
    def fingerprint(self) -> str:
        """Hash of the architecture, which neuron sets and scores are bound to."""
        return self.table.fingerprint

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Makes this view's adapters the active ones of a shared PEFT model for a block.

        Nothing to do for any other model.
        """
        if self.adapters is None or not is_adapted(self.model):
            yield
            return
        with activated(self.model, self.adapters):
            yield

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """`active`, and in evaluation mode (no dropout) meanwhile.

        Raises:
            UnsupportedModelError: Weights that are not in memory.
        """
        require_weights(self.model)
        with self.active(), evaluating(self.model):
            yield

    @well_typed
    def encode(self, prompts: Texts, *, reserve: int = 0) -> list[Encoded]:
        """Token ids of prompts, template and generation prompt included, with exactly one BOS where one
        belongs.

        A prompt longer than the context keeps its beginning and its end (system prompt and what starts the
        answer) and loses tokens in the middle; it is marked as truncated.

        Args:
            prompts: A text, or whatever `safety_neurons.prompt_lists` takes in memory; nothing of it is left
                out.
            reserve: Tokens of the context to leave for an answer.

        Raises:
            InputError: A prompt without tokens, or a template that refuses the turns.
            MismatchError: The tokenizer gives ids that the model has no embedding for.
            ModelError: There is no tokenizer, or no room for a prompt.
        """
        tokenizer = require_tokenizer(self.tokenizer)
        templated = self.template.kind != "none"
        return [
            self._encoded(prompt, self.template.render(tokenizer, prompt, self.notes), templated, reserve)
            for prompt in as_prompts(prompts)
        ]

    def encode_raw(self, prompts: Texts) -> list[Encoded]:
        """Token ids of prompts' texts as they are, to be gone on with: no template, one BOS where the
        tokenizer adds one.

        Raises:
            As `encode`.
        """
        return [self._encoded(prompt, prompt.text, True, 0) for prompt in as_prompts(prompts)]

    def _encoded(self, prompt: Prompt, text: str, templated: bool, reserve: int) -> Encoded:
        ids = encode_text(require_tokenizer(self.tokenizer), text, templated=templated)
        if not ids:
            raise InputError(
                f"prompt {prompt.id!r} has no tokens: expected text; drop empty prompts or choose a template"
            )
        if max(ids) >= self.n_ids:
            raise MismatchError(
                f"the tokenizer gives id {max(ids)} and the model has {self.n_ids} embeddings: "
                "they do not belong together"
            )
        fitting = self._fit(ids, reserve)
        cut, thinking = len(fitting) < len(ids), self.template.opens_thinking(text)
        return Encoded(prompt.id, fitting, cut, thinking, self.unknown_in(ids))

    def unknown_in(self, ids: Sequence[int]) -> bool:
        """Whether the tokenizer wrote its mark of the unknown for some text, as those do that cannot fall
        back on bytes.
        """
        return self._unknown_id in ids

    @cached_property
    def _unknown_id(self) -> int | None:
        """None where the mark is an end or a beginning too: such a tokenizer spells every byte."""
        mark = getattr(self.tokenizer, "unk_token_id", None)
        others = (getattr(self.tokenizer, name, None) for name in ("bos_token_id", "eos_token_id"))
        return None if mark in others else mark

    def encode_answer(self, prompt: Prompt, answer: str) -> tuple[list[int], list[int], list[int]]:
        """Token ids of a prompt as `encode` gives them, of an answer behind it, and of what the template
        writes at the end of the answer's turn.

        Raises:
            As `encode`.
        """
        tokenizer = require_tokenizer(self.tokenizer)
        asked, behind, end = self.template.answered(tokenizer, prompt, answer)
        question = self.encode([prompt])[0].ids
        together = encode_text(tokenizer, asked + behind, templated=True)
        with untouched(tokenizer):
            if together[: len(question)] == question and len(together) > len(question):
                ids = together[len(question) :]
            else:
                ids = list(tokenizer(behind, add_special_tokens=False, verbose=False)["input_ids"])
            ending = list(tokenizer(end, add_special_tokens=False, verbose=False)["input_ids"]) if end else []
        return question, ids, ending

    def _fit(self, ids: list[int], reserve: int) -> list[int]:
        if self.max_length is None or len(ids) + reserve <= self.max_length:
            return ids
        room = self.max_length - reserve
        if room < 2:
            raise ModelError(
                f"{reserve} new tokens in a context of {self.max_length} leave no room for the prompt: "
                "ask for fewer"
            )
        return middle_out(ids, room)

    @well_typed
    def encode_texts(
        self, texts: Iterable[str], limit: int | None = None, notes: list[str] | None = None
    ) -> list[list[int]]:
        """Token ids of running text (perplexity, general corpora): no template, one BOS where the tokenizer
        adds one.

        Args:
            texts: The texts.
            limit: Tokens of each to keep at most, from its beginning; the context's length where none is
                given.
            notes: Gets a line for those that are longer, and one for those that hold unknown text.
        """
        tokenizer = require_tokenizer(self.tokenizer)
        most = min(value for value in (limit, self.max_length, 10**9) if value)
        whole = [encode_text(tokenizer, text, templated=True) for text in texts]
        longer = sum(len(ids) > most for ids in whole)
        if notes is not None and longer:
            notes.append(f"{longer} of {len(whole)} texts are longer than {most} tokens: their end {CUT}")
        unknown = sum(map(self.unknown_in, whole))
        if notes is not None and unknown:
            notes.append(f"{unknown} of {len(whole)} texts {UNKNOWN}")
        return [ids[:most] for ids in whole]

    @well_typed
    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of token ids, special tokens left out.

        But marks of a thinking part stay, or thoughts would be taken for the answer.
        """
        tokenizer = require_tokenizer(self.tokenizer)
        if not self._thought_ids.intersection(token_ids):
            return str(tokenizer.decode(list(token_ids), skip_special_tokens=True))
        dropped = set(tokenizer.all_special_ids) - self._thought_ids
        return str(
            tokenizer.decode(
                [token for token in token_ids if token not in dropped], skip_special_tokens=False
            )
        )

    @cached_property
    def _thought_ids(self) -> frozenset[int]:
        """Ids of the special tokens that start or end a thinking part."""
        tokenizer = self.tokenizer
        special = zip(
            getattr(tokenizer, "all_special_tokens", ()),
            getattr(tokenizer, "all_special_ids", ()),
            strict=False,
        )
        return frozenset(token for text, token in special if is_mark(str(text)) or text == self.think_end)

    @cached_property
    def thought_end_ids(self) -> frozenset[int]:
        """Ids of the tokens that end a thinking part by themselves; none where its end is several tokens."""
        added: dict[str, int] = getattr(self.tokenizer, "get_added_vocab", dict)()
        return frozenset(
            token for text, token in added.items() if is_end_mark(str(text)) or text == self.think_end
        )

    @well_typed
    def complete(
        self,
        prompts: Texts,
        *,
        arm: str = "untreated",
        batch_size: BatchSize = "auto",
        progress: Progress | None = None,
        done: Completions | None = None,
        answered: Callable[[Completion], None] | None = None,
        notes: list[str] | None = None,
        **decoding: Any,
    ) -> Completions:
        """Answers prompts through `self.model.generate`, so that interventions on the model act.

        Greedy unless `sample` is set; a checkpoint's own sampling defaults never count; batch size changes no
        greedy answer in float32 (draws of a sample are those of its batch).

        Args:
            prompts: A text, or whatever `safety_neurons.prompt_lists` takes in memory; nothing of it is left
                out.
            arm: Name of the treatment, recorded in every completion.
            batch_size: Rows, or `auto`; halved when memory runs out.
            progress: Called as `progress(prompts done, prompts in all, tokens generated)`.
            done: Completions of an earlier, interrupted call; their prompts are not asked again (by id and
                text).
            answered: Called with every completion as soon as it is there.
            notes: Gets a line for whatever had to be said (truncated prompts, halved batches).
            **decoding: Fields of `Decoding` (`max_new_tokens`, `sample`, `temperature`, `top_p`, `seed`), and
                further arguments of `generate`, such as `stop_strings` or `repetition_penalty`.

        Returns:
            One completion a prompt, in order; ids as generated, EOS excluded; `meta` holds the `messages` of
            a conversation, marks `truncated` prompts and an opened `thinking`, and says which text ends it
            where the model has a `think_end`.

        Raises:
            ModelError: No tokenizer, or one prompt alone does not fit in memory. UsageError: Arguments out of
            range.
        """
        how = Decoding.of(decoding)
        pending = PendingCompletions(prompts, arm, how.seed, done, answered)
        encoded = self.encode(pending.prompts, reserve=how.max_new_tokens)
        if notes is not None:
            notes += said_of_reading(encoded)

        def keep(index: int, answer: Answer) -> None:
            marks = {name: True for name in ("truncated", "thinking") if getattr(encoded[index], name)}
            meta = marks | ({"think_end": self.think_end} if self.think_end else {})
            pending.add(index, self.decode(answer.token_ids), answer.finish_reason, answer.token_ids, meta)

        sequences, skip = [item.ids for item in encoded], sorted(pending.results)
        generate(
            self,
            sequences,
            how,
            batch_size=batch_size,
            skip=skip,
            progress=progress,
            answered=keep,
            notes=notes,
        )
        return pending.completions


CUT = "was left out"
"""What notes on texts and prompts that are too long end with, whatever the model then makes of them."""
LEFT_OUT = f"prompts were longer than the context: their middle {CUT}"
"""What a note on such prompts ends with."""
UNKNOWN = "hold text that the tokenizer has no token for: the model reads one mark for all of it"
"""What a note on prompts and texts of which something is unread ends with."""


def said_of_reading(encoded: Sequence[Encoded], name: str = "") -> list[str]:
    """A line about the prompts of a list that did not fit the context, and one about those with unknown
    text, where there are some.
    """
    cut, unknown = (sum(getattr(one, what) for one in encoded) for what in ("truncated", "unknown"))
    said = ((cut, LEFT_OUT), (unknown, f"prompts {UNKNOWN}"))
    return [f"{name}{name and ': '}{some} of {len(encoded)} {what}" for some, what in said if some]


def middle_out(ids: list[int], room: int) -> list[int]:
    """The beginning and the end of ids, as many as there is room for."""
    tail = room // 2
    return ids[: room - tail] + ids[len(ids) - tail :]


class PendingCompletions:
    """Prompts that are being answered: completions of an earlier call that count, and new ones as they come.

    Args:
        prompts: As for `LanguageModel.complete`.
        arm: Name of the treatment.
        seed: Of sampling.
        done: Completions of an earlier call.
        answered: Called with every new completion.
        failed_again: Whether prompts whose earlier completion failed are asked again.

    Attributes:
        prompts: What is asked, in order.
        results: Completions by index of the prompt.
    """

    def __init__(
        self,
        prompts: Texts,
        arm: str,
        seed: int,
        done: Completions | None,
        answered: Callable[[Completion], None] | None,
        *,
        failed_again: bool = False,
    ) -> None:
        self.prompts = as_prompts(prompts)
        self._arm, self._seed, self._answered = arm, seed, answered
        before = {
            one.prompt_id: one for one in done or () if not (failed_again and one.finish_reason == "failed")
        }
        known = ((index, prompt, before.get(prompt.id)) for index, prompt in enumerate(self.prompts))
        self.results = {index: one for index, prompt, one in known if one is not None and one.answers(prompt)}

    def add(
        self,
        index: int,
        text: str,
        finish_reason: Literal["stop", "length", "failed"],
        token_ids: Sequence[int] = (),
        meta: Mapping[str, Any] | None = None,
    ) -> None:
        """The completion of the prompt at an index; its conversation goes before the rest of its `meta`."""
        prompt = self.prompts[index]
        meta = {**conversation_of(prompt), **(meta or {})}
        one = Completion(
            prompt.id, prompt.text, text, tuple(token_ids), finish_reason, self._arm, self._seed, {}, meta
        )
        self.results[index] = one
        if self._answered is not None:
            self._answered(one)

    @property
    def completions(self) -> Completions:
        """One for every prompt, in their order."""
        return Completions([self.results[index] for index in range(len(self.prompts))])


def require_weights(model: nn.Module) -> None:
    """Refuses a model whose weights accelerate keeps elsewhere and fetches for each layer: here weights are
    read, hashed and edited.

    Raises:
        UnsupportedModelError: The message names the first such weight.
    """
    names = [name for name, parameter in model.named_parameters() if parameter.is_meta] or [
        name
        for name, module in model.named_modules()
        if any(getattr(hook, "offload", False) for hook in _placed_by(module))
        and next(module.parameters(), None) is not None
    ]
    if names:
        count = sum(1 for _ in model.parameters())
        raise UnsupportedModelError(
            f"{len(names)} of {count} weights are off-loaded ({names[0]}), and all were expected in "
            "memory; load the model without cpu_offload or a --device-map that off-loads, with a larger "
            "--max-memory, --dtype bfloat16 or --quantize 4bit if it does not fit"
        )


def _placed_by(module: nn.Module) -> Sequence[Any]:
    """The hooks by which accelerate fetches the weights of a module: a tied one may be off-loaded in one
    place and in memory in another.
    """
    hook = getattr(module, "_hf_hook", None)
    return getattr(hook, "hooks", (hook,))


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
) -> dict[int, Answer]:
    """Continues every sequence with `lm.model.generate`, so that hooks on the model act.

    Args:
        lm: The model; its adapters are made the active ones meanwhile.
        sequences: Token ids of the prompts.
        decoding: How to decode.
        batch_size: Rows, or `auto` for a token budget that counts the new tokens.
        skip: Indices that have their answer already; the plan stays the same.
        progress: Called as `progress(sequences done, sequences in all, tokens generated)` after every batch.
        answered: Called with index and answer as soon as it is there, in all processes.
        notes: Gets a line for every batch that did not fit in memory, and one for sequences that failed.

    Returns:
        Answers by index, those in `skip` excluded.
    """
    prompts = [list(sequence) for sequence in sequences]
    lengths = [len(sequence) + decoding.max_new_tokens for sequence in prompts]
    groups = _groups(lm, lengths, decoding, batch_size)
    skipped, halving, tokens = set(skip), Halving(), 0
    answers: dict[int, Answer] = {}
    widths = list(map(len, prompts))
    wanted = [[index for index in group if index not in skipped] for group in groups]
    if decoding.sample:  # Draws depend on the batch: one of which a part is there is drawn whole again.
        wanted = [group if left else [] for group, left in zip(groups, wanted, strict=True)]

    def work(rows: Rows) -> dict[int, Answer]:
        written = _generate_rows(lm, prompts, rows, decoding)
        read = decoding.read
        return written if read is None else {i: replace(one, read=read(i, one)) for i, one in written.items()}

    left = [number for number, group in enumerate(wanted) if group]
    for parts in halving.over(left, lambda number: Rows(widths, wanted[number], number), work):
        for part in parts:
            new = {index: answer for index, answer in part.items() if index not in skipped}
            answers.update(new)
            for index, answer in new.items():
                tokens += len(answer.token_ids)
                if answered is not None:
                    answered(index, answer)
        if progress is not None:
            progress(len(answers) + len(skipped), len(prompts), tokens)
    if notes is not None:
        failed = sum(answer.finish_reason == "failed" for answer in answers.values())
        notes += halving.notes + (
            [f"{failed} of {len(prompts)} prompts gave NaN or infinity and have no answer"] if failed else []
        )
    return answers


CACHE_BYTES, WIDEST = 2**30, 24576
"""Bytes of keys and values, and tokens, of the rows that a processor answers in one batch."""


def _groups(
    lm: LanguageModel, lengths: Sequence[int], decoding: Decoding, batch_size: BatchSize
) -> list[list[int]]:
    """The batches: as few as there is room for, and of greedy answers at least one for each of the processes
    that share them, all of one size.

    Draws depend on the batch: sampled answers keep theirs, whatever the number of processes.
    """
    budget, padded, sharing = _budget(lm, decoding), takes_left_padding(lm), ranks.count()
    groups = plan(lengths, batch_size, budget, padded=padded)
    if batch_size != "auto" or sharing == 1 or not decoding.plain or not padded:
        return groups
    turns = math.ceil(len(groups) / sharing)
    while turns * sharing < len(lengths):
        even = plan(lengths, math.ceil(len(lengths) / (turns * sharing)))
        if all(len(group) * lengths[group[0]] <= budget for group in even):
            return even
        turns += 1
    return [[index] for group in groups for index in group]


def _budget(lm: LanguageModel, decoding: Decoding) -> int:
    """Padded tokens of a batch of `auto` size, new ones included.

    A decoding step reads all weights for one token of a row, so on a processor few rows cost nearly what many
    do: of greedy answers as many go together as their keys and values leave room for. Draws depend on the
    batch, and sampled answers keep theirs.
    """
    usual = token_budget(lm.device)
    names = ("num_hidden_layers", "num_attention_heads", "hidden_size")
    sizes = [size for name in names if isinstance(size := getattr(lm.config, name, None), int)]
    if decoding.sample or lm.device.type != "cpu" or len(sizes) < len(names):
        return usual
    layers, heads, hidden = sizes
    width = getattr(lm.config, "head_dim", None) or hidden // heads
    numbers = 2 * layers * (getattr(lm.config, "num_key_value_heads", None) or heads) * width
    return max(usual, min(WIDEST, CACHE_BYTES // (numbers * lm.dtype.itemsize)))


def _generate_rows(
    lm: LanguageModel, sequences: list[list[int]], rows: Rows, decoding: Decoding
) -> dict[int, Answer]:
    if decoding.treated is not None:
        rows = replace(rows, indices=sorted(rows.indices, key=decoding.treated.which.__getitem__))
    width = rows.width
    input_ids = torch.full((len(rows), width), lm.pad_id, dtype=torch.long)
    mask = torch.zeros((len(rows), width), dtype=torch.long)
    for row, index in enumerate(rows.indices):
        sequence = sequences[index]
        input_ids[row, width - len(sequence) :] = torch.tensor(sequence)
        mask[row, width - len(sequence) :] = 1
    others = dict(decoding.others or {})
    settings, passed, ends = _settings(lm, decoding, others)
    stopped_otherwise = bool({"stop_strings", "stopping_criteria"} & others.keys())
    with contextlib.ExitStack() as stack:
        if decoding.treated is not None:
            which = decoding.treated.which
            stack.enter_context(decoding.treated.begin([which[index] for index in rows.indices]))
        stack.enter_context(lm.running())
        stack.enter_context(torch.no_grad())
        stack.enter_context(neutral_defaults(lm.model))
        stack.enter_context(untouched(lm.tokenizer))
        if decoding.sample:
            stack.enter_context(seeded(lm.device, decoding.seed, rows.number))
        by_rows = not _carries_state(lm) and rows_can_leave(lm.model)
        if decoding.plain and len(rows) >= FEWEST and by_rows:
            given = (input_ids.to(lm.device), mask.to(lm.device))
            written, lost = decoded(lm.model, *given, settings, ends, lm.pad_id)
            return {
                index: Answer([], "failed") if lost[row] else cut(written[row], ends, lm.pad_id, 0)
                for row, index in enumerate(rows.indices)
            }
        if decoding.watched is not None:
            passed = joined(passed, stack.enter_context(decoding.watched(rows.indices, mask)))
        elif by_rows and not others:
            passed |= roomy_cache(lm.model, decoding.max_new_tokens)
        finite = Finite(min(ends, default=lm.pad_id))
        passed = joined(passed, {"logits_processor": [finite]})
        output = lm.model.generate(
            input_ids=input_ids.to(lm.device),
            attention_mask=mask.to(lm.device),
            generation_config=settings,
            **passed,
        )
    ids, failed = getattr(output, "sequences", output), finite.failed(len(rows))
    limit = decoding.max_new_tokens if stopped_otherwise else 0
    return {
        index: Answer([], "failed") if failed[row] else cut(ids[row, width:].tolist(), ends, lm.pad_id, limit)
        for row, index in enumerate(rows.indices)
    }


def end_ids(lm: LanguageModel, given: int | Sequence[int] | None = None) -> list[int]:
    """The ids that end an answer: those given, otherwise the model's own."""
    return list(lm.eos_ids) if given is None else [given] if isinstance(given, int) else list(given)


def _settings(
    lm: LanguageModel, decoding: Decoding, others: dict[str, Any]
) -> tuple[Any, dict[str, Any], set[int]]:
    """A generation configuration that names everything that matters, the arguments it has no field for, and
    the ids that end an answer.
    """
    from transformers import GenerationConfig

    ends = end_ids(lm, others.pop("eos_token_id", None))
    values: dict[str, Any] = {
        "max_new_tokens": decoding.max_new_tokens,
        "do_sample": decoding.sample,
        "use_cache": True,
        "num_beams": 1,
    }
    if decoding.sample:
        values |= {"temperature": decoding.temperature, "top_p": decoding.top_p, "top_k": 0}
    known = GenerationConfig().to_dict().keys()
    values |= {name: value for name, value in others.items() if name in known}
    passed = {name: value for name, value in others.items() if name not in known}
    if "stop_strings" in others:
        passed["tokenizer"] = lm.tokenizer
    settings = GenerationConfig(
        **values, eos_token_id=ends or None, pad_token_id=lm.pad_id, bos_token_id=lm.bos_id
    )
    return settings, passed, set(ends)


def stops(model: LanguageModel, strings: Sequence[str]) -> dict[str, Any]:
    """Arguments of `generate` that end an answer at one of the strings.

    Empty for a tokenizer whose tokens cannot be told apart as text, which transformers does not stop at
    strings: answers are then as long as they may be, and whoever reads them cuts them.
    """
    from transformers import StopStringCriteria

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            StopStringCriteria(tokenizer=model.tokenizer, stop_strings=list(strings))
    except (ValueError, KeyError, IndexError, TypeError, AttributeError):
        return {}
    return {"stop_strings": list(strings)}


_OF_TOKENS = ("attention", "moe", "mlp")
"""What ends the names of layers that keep no state from token to token."""


def _carries_state(lm: LanguageModel) -> bool:
    """Whether a layer hands a state from token to token, which padding on the left may move: a recurrent or
    convolutional one.
    """
    names = ("layer_types", "layers_block_type", "block_types", "attn_type_list")
    kinds = [str(kind) for name in names for kind in getattr(lm.config, name, None) or ()]
    return any("linear" in kind or not kind.endswith(_OF_TOKENS) for kind in kinds) or any(
        isinstance(module, nn.Conv1d) for module in lm.inner.modules()
    )


def _padded_as_alone(lm: LanguageModel) -> bool:
    """Whether a short generation behind padding has the logits that it has without, told by trying."""
    ids = torch.randint(0, lm.n_ids, (1, 4), generator=torch.Generator().manual_seed(0)).to(lm.device)
    behind = torch.cat([torch.full_like(ids[:, :3], lm.pad_id), ids], 1)
    settings, _, _ = _settings(lm, Decoding(max_new_tokens=3), {"eos_token_id": []})
    settings.update(output_logits=True, return_dict_in_generate=True)
    logits = []
    with lm.running(), torch.no_grad(), neutral_defaults(lm.model):
        for given, padding in ((ids, 0), (behind, 3)):
            mask = torch.ones_like(given)
            mask[:, :padding] = 0
            output = lm.model.generate(input_ids=given, attention_mask=mask, generation_config=settings)
            logits.append(torch.stack(output.logits))
    return same(logits[1], logits[0])


def takes_left_padding(lm: LanguageModel) -> bool:
    """Whether prompts of different lengths may be continued in one batch: `takes_padding`, and no state
    that padding moves.

    Tried out once for each model that carries one.
    """
    return takes_padding(lm) and (not _carries_state(lm) or lm.pads_left)


def takes_padding(lm: LanguageModel) -> bool:
    """Whether rows of a batch may be of different lengths, with padding behind the tokens.

    No later token reaches an earlier one, in attention as in a recurrent layer.

    transformers' eager attention casts its mask to float32, where the lowest float64 becomes −∞: a padding
    token that sees no key at all (left padding, a sliding window) turns into NaN there and spoils the tokens
    that follow, so float64 goes without padding.
    """
    return lm.dtype is not torch.float64 or getattr(lm.config, "_attn_implementation", None) in (
        "sdpa",
        "flex_attention",
    )
