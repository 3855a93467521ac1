"""A causal language model with its tokenizer and template: what every worker is given."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float64
from torch import nn

from safety_neurons.errors import InputError, MismatchError, ModelError, UnsupportedModelError
from safety_neurons.model.adapters import activated, is_adapted
from safety_neurons.model.measures import BatchSize, Losses, Progress, Span
from safety_neurons.model.modes import evaluating
from safety_neurons.model.parts import Anatomy, unwrapped
from safety_neurons.model.template import encode_text, require_tokenizer, template_for
from safety_neurons.neurons import SiteTable
from safety_neurons.prompts import Prompts, as_prompts, prompts
from safety_neurons.prompts.readers import Source
from safety_neurons.results import Completion, Completions, conversation_of
from safety_neurons.results.thoughts import is_mark

Texts = Source


@dataclass(frozen=True)
class Encoded:
    """One prompt as the model gets it.

    Attributes:
        prompt_id: Which prompt.
        ids: Token ids, template and generation prompt included.
        truncated: Whether the middle was left out because the whole did not fit the context.
        thinking: Whether the template has opened a thinking part behind which the model goes on.
    """

    prompt_id: str
    ids: list[int]
    truncated: bool = False
    thinking: bool = False


class LanguageModel:
    """A model already in memory (plain, PEFT or quantised), its tokenizer, and how prompts are put to it.

    Nothing of the model, tokenizer or configuration is changed; what has to change for a pass (active adapters, evaluation mode,
    generation defaults) is put back after it.

    Args:
        model: Any causal LM of transformers, or a PEFT model of one.
        tokenizer: Its tokenizer; None where only token ids are fed.
        template: `auto`, `none`, `tulu` or the path of a Jinja file.
        system: System prompt for prompts that bring none.
        template_args: Variables for a chat template, such as `{"enable_thinking": False}`.
        think_end: Text that ends the model's thinking, where it is none of the marks that are known; judges read what follows it.
        name: What people call the model; by default the name in its configuration.
        adapters: Names of the adapters of a PEFT model that belong to this view, in order; none (`[]`) for the plain base, None for
            whatever is active.
        folder: The local folder it came from.

    Attributes:
        notes: One line for each thing that is worth knowing of how the model was loaded and of what its template makes of prompts.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any = None,
        *,
        template: str | Path = "auto",
        system: str | None = None,
        template_args: Mapping[str, Any] | None = None,
        think_end: str | None = None,
        name: str | None = None,
        adapters: Sequence[str] | None = None,
        folder: str | Path | None = None,
    ) -> None:
        if not hasattr(unwrapped(model), "config") or not hasattr(model, "generate"):
            raise ModelError(f"{type(model).__name__}: expected a causal language model of transformers, with a config and generate()")
        if adapters is not None and adapters and not is_adapted(model):
            raise ModelError(f"adapters {list(adapters)} of a {type(model).__name__}: expected a PEFT model that holds them")
        require_weights(model)
        self.model: Any = model
        self.tokenizer = tokenizer
        self.template = template_for(tokenizer, template, system=system, arguments=template_args)
        self.name = name or str(getattr(self.config, "_name_or_path", "") or type(self.inner).__name__)
        self.think_end = think_end or None
        self.adapters = None if adapters is None else tuple(adapters)
        self.folder = None if folder is None else Path(folder)
        self.notes: list[str] = []
        if self.template.kind == "none" and getattr(tokenizer, "chat_template", None):
            self.notes.append("template 'none' feeds prompts as they are; the model has a chat template, which 'auto' would use")

    def __repr__(self) -> str:
        adapters = "" if not self.adapters else f", adapters {list(self.adapters)}"
        return f"LanguageModel({self.name!r}, {type(self.inner).__name__}, {self.dtype}, {self.device}{adapters})"

    @property
    def prompt_folder(self) -> Path | None:
        """Folder of an organism's own prompts, which go before the built-in ones; None for every other model."""
        if self.folder is None:
            return None
        places = (self.folder, self.folder.parent)
        return next((place / "prompts" for place in places if (place / "organism.json").is_file() and (place / "prompts").is_dir()), None)

    def prompts(self, source: Source, **options: Any) -> Prompts:
        """Prompts for this model: as `safety_neurons.prompts`, where `builtin:` names mean an organism's own if the model is one.

        Args:
            source: `builtin:NAME[/LANG]`, a file, or a list.
            **options: column, answer_column, limit.

        Raises:
            InputError: As for `safety_neurons.prompts`.
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
        limit = getattr(self.config, "max_position_embeddings", None) or getattr(self.config, "seq_length", None)
        limit = limit or getattr(self.tokenizer, "model_max_length", None)
        return int(limit) if limit and limit < 10**9 else None

    @property
    def n_ids(self) -> int:
        """Rows of the token embedding."""
        return int(self.inner.get_input_embeddings().weight.shape[0])

    @cached_property
    def eos_ids(self) -> tuple[int, ...]:
        """Every id that ends an answer, by the generation configuration, the model's configuration and the tokenizer."""
        settings = getattr(self.inner, "generation_config", None)
        found: list[int] = []
        for holder in (settings, self.config, self.tokenizer):
            value = getattr(holder, "eos_token_id", None)
            found += [] if value is None else [value] if isinstance(value, int) else list(value)
        return tuple(dict.fromkeys(int(value) for value in found if 0 <= int(value) < self.n_ids))

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
        from safety_neurons.model.anatomy import resolve
        from safety_neurons.model.proof import prove

        with self.running():
            return prove(resolve(self.model))

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
        """Makes this view's adapters the active ones of a shared PEFT model for a block; nothing to do for any other model."""
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

    def encode(self, prompts: Texts, *, reserve: int = 0) -> list[Encoded]:
        """Token ids of prompts, template and generation prompt included, with exactly one BOS where one belongs.

        A prompt longer than the context keeps its beginning and its end (system prompt and what starts the answer) and loses tokens in
        the middle; it is marked as truncated.

        Args:
            prompts: A text, or whatever `safety_neurons.prompts` takes in memory; nothing of it is left out.
            reserve: Tokens of the context to leave for an answer.

        Raises:
            InputError: A prompt without tokens, or a template that refuses the turns.
            MismatchError: The tokenizer gives ids that the model has no embedding for.
            ModelError: There is no tokenizer, or no room for a prompt.
        """
        tokenizer = require_tokenizer(self.tokenizer)
        encoded = []
        for prompt in as_prompts(prompts):
            text = self.template.render(tokenizer, prompt, self.notes)
            ids = encode_text(tokenizer, text, templated=self.template.kind != "none")
            if not ids:
                raise InputError(f"prompt {prompt.id!r} has no tokens: expected text; drop empty prompts or choose a template")
            if max(ids) >= self.n_ids:
                raise MismatchError(
                    f"the tokenizer gives id {max(ids)} and the model has {self.n_ids} embeddings: they do not belong together"
                )
            kept = self._fit(ids, reserve)
            encoded.append(Encoded(prompt.id, kept, truncated=len(kept) < len(ids), thinking=self.template.opens_thinking(text)))
        return encoded

    def _fit(self, ids: list[int], reserve: int) -> list[int]:
        if self.max_length is None or len(ids) + reserve <= self.max_length:
            return ids
        room = self.max_length - reserve
        if room < 2:
            raise ModelError(f"{reserve} new tokens in a context of {self.max_length} leave no room for the prompt: ask for fewer")
        tail = room // 2
        return ids[: room - tail] + ids[len(ids) - tail :]

    def encode_texts(self, texts: Iterable[str], limit: int | None = None) -> list[list[int]]:
        """Token ids of running text (perplexity, general corpora): no template, one BOS where the tokenizer adds one.

        Args:
            texts: The texts.
            limit: Tokens of each to keep at most, from its beginning; the context's length where none is given.
        """
        tokenizer = require_tokenizer(self.tokenizer)
        most = min(value for value in (limit, self.max_length, 10**9) if value)
        return [encode_text(tokenizer, text, templated=True)[:most] for text in texts]

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of token ids, special tokens left out; but marks of a thinking part stay, or thoughts would be taken for the answer."""
        tokenizer = require_tokenizer(self.tokenizer)
        if not self._thought_ids.intersection(token_ids):
            return str(tokenizer.decode(list(token_ids), skip_special_tokens=True))
        dropped = set(tokenizer.all_special_ids) - self._thought_ids
        return str(tokenizer.decode([token for token in token_ids if token not in dropped], skip_special_tokens=False))

    @cached_property
    def _thought_ids(self) -> frozenset[int]:
        """Ids of the special tokens that start or end a thinking part."""
        tokenizer = self.tokenizer
        special = zip(getattr(tokenizer, "all_special_tokens", ()), getattr(tokenizer, "all_special_ids", ()), strict=False)
        return frozenset(token for text, token in special if is_mark(str(text)) or text == self.think_end)

    def complete(
        self,
        prompts: Texts,
        *,
        max_new_tokens: int = 128,
        sample: bool = False,
        temperature: float = 1.0,
        top_p: float = 1.0,
        seed: int = 0,
        batch_size: BatchSize = "auto",
        arm: str = "untreated",
        progress: Progress | None = None,
        done: Completions | None = None,
        answered: Callable[[Completion], None] | None = None,
        notes: list[str] | None = None,
        **generate_kwargs: Any,
    ) -> Completions:
        """Answers prompts through `self.model.generate`, so that interventions on the model act.

        Greedy unless `sample` is set; a checkpoint's own sampling defaults never count; batch size changes no answer in float32.

        Args:
            prompts: A text, or whatever `safety_neurons.prompts` takes in memory; nothing of it is left out.
            max_new_tokens: Longest answer.
            sample: Draw tokens.
            temperature: Of sampling.
            top_p: Of sampling.
            seed: Of sampling; the global random state is left as it was.
            batch_size: Rows, or `auto`; halved when memory runs out.
            arm: Name of the treatment, recorded in every completion.
            progress: Called as `progress(prompts done, prompts in all, tokens generated)`.
            done: Completions of an earlier, interrupted call; their prompts are not asked again (by id and text).
            answered: Called with every completion as soon as it is there.
            notes: Gets a line for whatever had to be said (truncated prompts, halved batches).
            **generate_kwargs: Further arguments of `generate`, such as `stop_strings` or `repetition_penalty`.

        Returns:
            One completion a prompt, in order; ids as generated, EOS excluded; `meta` holds the `messages` of a conversation, marks
            `truncated` prompts and an opened `thinking`, and says which text ends it where the model has a `think_end`.

        Raises:
            ModelError: No tokenizer, or one prompt alone does not fit in memory. UsageError: Arguments out of range.
        """
        from safety_neurons.model.completing import Answer, Decoding, generate

        decoding = Decoding(max_new_tokens, sample, temperature, top_p, seed, generate_kwargs)
        asked = as_prompts(prompts)
        encoded = self.encode(asked, reserve=max_new_tokens)
        cut = sum(item.truncated for item in encoded)
        if notes is not None and cut:
            notes.append(f"{cut} of {len(encoded)} prompts were longer than the context: their middle was left out")
        before = {completion.prompt_id: completion for completion in done or ()}
        answers = [before.get(prompt.id) for prompt in asked]
        results = {index: one for index, one in enumerate(answers) if one is not None and one.answers(asked[index])}

        def keep(index: int, answer: Answer) -> None:
            results[index] = Completion(
                prompt_id=asked[index].id,
                prompt=asked[index].text,
                completion=self.decode(answer.token_ids),
                token_ids=tuple(answer.token_ids),
                finish_reason=answer.finish_reason,
                arm=arm,
                seed=seed,
                meta={
                    **conversation_of(asked[index]),
                    **{name: True for name in ("truncated", "thinking") if getattr(encoded[index], name)},
                    **({"think_end": self.think_end} if self.think_end else {}),
                },
            )
            if answered is not None:
                answered(results[index])

        sequences = [item.ids for item in encoded]
        generate(self, sequences, decoding, batch_size=batch_size, skip=sorted(results), progress=progress, answered=keep, notes=notes)
        return Completions([results[index] for index in range(len(asked))])

    def token_losses(self, texts: Sequence[str] | Sequence[Sequence[int]], *, batch_size: BatchSize = "auto") -> Losses:
        """Negative log likelihood of running text; see `safety_neurons.model.token_losses`."""
        from safety_neurons.model.likelihood import token_losses

        return token_losses(self, texts, batch_size=batch_size)

    def token_log_probabilities(
        self, sequences: Sequence[Sequence[int]], spans: Sequence[Span] | None = None, *, batch_size: BatchSize = "auto"
    ) -> list[Float64[np.ndarray, " token"]]:
        """Log probability of given tokens; see `safety_neurons.model.token_log_probabilities`."""
        from safety_neurons.model.likelihood import token_log_probabilities

        return token_log_probabilities(self, sequences, spans, batch_size=batch_size)


def require_weights(model: nn.Module) -> None:
    """Refuses a model whose weights accelerate keeps elsewhere and fetches for each layer: here weights are read, hashed and edited.

    Raises:
        UnsupportedModelError: The message names the first such weight.
    """
    names = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if names:
        count = sum(1 for _ in model.parameters())
        raise UnsupportedModelError(
            f"{len(names)} of {count} weights are off-loaded ({names[0]}), and all were expected in memory; load the model without "
            "cpu_offload or a device_map that off-loads, in a smaller dtype or in 4 bits if it does not fit"
        )
