"""Classifiers and scalar heads: checkpoints that read a text and give scores instead of further text."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float64
from safetensors import safe_open
from torch import Tensor, nn

from safety_neurons.errors import InputError, MismatchError, ModelError
from safety_neurons.model.batches import BatchSize, Halving, Rows, plan, token_budget
from safety_neurons.model.files import (
    refuse_foreign_shards,
    shards_of,
)
from safety_neurons.model.hooks import evaluating
from safety_neurons.model.loading import load_as
from safety_neurons.model.template import untouched

Text = str | tuple[str, str]
"""One text, or two for a tokenizer that puts its own mark between them."""


@dataclass
class TextReader:
    """A model that gives numbers for a text.

    Attributes:
        model: A sequence classifier, or a `ScoreModel`.
        tokenizer: Its tokenizer.
        folder: Where it was loaded from.
        notes: A line for whatever had to be said.
    """

    model: Any
    tokenizer: Any
    folder: Path
    notes: list[str] = field(default_factory=list)

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the classes, in order."""
        names: Mapping[Any, str] = getattr(self.model.config, "id2label", None) or {}
        return tuple(str(names[index]) for index in sorted(names, key=int))

    @property
    def several(self) -> bool:
        """Whether a text may be of several classes at once (a sigmoid each), rather than of one (a softmax
        over them).
        """
        return getattr(self.model.config, "problem_type", None) == "multi_label_classification"

    @property
    def max_length(self) -> int | None:
        """Tokens that fit; None where neither model nor tokenizer sets a limit."""
        limits = (
            getattr(self.model.config, "max_position_embeddings", None),
            getattr(self.tokenizer, "model_max_length", None),
        )
        known = [int(limit) for limit in limits if limit and limit < 10**9]
        return min(known) if known else None

    def windows(self, text: Text) -> list[dict[str, list[int]]]:
        """The text as the model gets it, in as many pieces as its length asks for.

        The first of two texts is kept whole in each.

        Raises:
            InputError: The first of two texts alone does not fit.
        """
        first, second = (text, None) if isinstance(text, str) else text
        with untouched(self.tokenizer):
            whole = _lists(self.tokenizer(first, second, verbose=False))
            limit = self.max_length
            if limit is None or len(whole["input_ids"]) <= limit:
                return [whole]
            long = second if second is not None else first
            bare = list(self.tokenizer(long, add_special_tokens=False, verbose=False)["input_ids"])
            room = limit - (len(whole["input_ids"]) - len(bare))
            if room < min(16, len(bare)):
                raise InputError(
                    f"a prompt leaves {room} of {limit} tokens for the answer: expected a shorter prompt "
                    "for this judge"
                )
            pieces = [
                self.tokenizer.decode(bare[start : start + room - 2])
                for start in range(0, len(bare), max(1, room - 2))
            ]
            arguments: dict[str, Any] = {"truncation": True, "max_length": limit, "verbose": False}
            return [
                _lists(
                    self.tokenizer(*((first, piece) if second is not None else (piece, None)), **arguments)
                )
                for piece in pieces
            ]

    def read(
        self, encoded: Sequence[dict[str, list[int]]], batch_size: BatchSize = "auto"
    ) -> Float64[np.ndarray, "text label"]:
        """The head's numbers for encoded texts, in order; padding and batch size change none of them.

        Raises:
            ModelError: One text alone does not fit in memory.
        """
        device = next(self.model.parameters()).device
        pad = self.tokenizer.pad_token_id
        takes_padding = pad is not None and (
            isinstance(self.model, ScoreModel) or self.model.config.pad_token_id is not None
        )
        lengths = [len(row["input_ids"]) for row in encoded]
        groups = plan(lengths, batch_size if takes_padding else 1, token_budget(device))

        def rows_of(number: int) -> Rows:
            return Rows(lengths, groups[number])

        def work(rows: Rows) -> dict[int, Float64[np.ndarray, " label"]]:
            inputs = _padded([encoded[index] for index in rows.indices], 0 if pad is None else pad, device)
            values = self.model(**inputs).logits.double().cpu().numpy()
            return dict(zip(rows.indices, values, strict=True))

        halving = Halving()
        with evaluating(self.model), torch.no_grad():
            parts = [part for halves in halving.over(range(len(groups)), rows_of, work) for part in halves]
        self.notes += halving.notes
        outputs = {index: values for part in parts for index, values in part.items()}
        return np.stack([outputs[index] for index in range(len(encoded))])


@dataclass
class _Scores:
    logits: Float[Tensor, "batch score"]


class ScoreModel(nn.Module):
    """A decoder with a linear map from its last token's final hidden state to one number: the reward and cost
    models of Safe RLHF.

    Source: Dai et al., "Safe RLHF" (ICLR 2024), §3.2; the heads of `PKU-Alignment/beaver-7b-v1.0-cost`, which
    Chen et al. (arXiv 2406.14144) score completions with.
    """

    def __init__(
        self,
        decoder: nn.Module,
        config: Any,
        score_head: nn.Linear,
        *,
        scale: Tensor | None = None,
        mean: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.decoder = decoder
        self.config = config
        self.score_head = score_head
        self.register_buffer("scale", scale)
        self.register_buffer("mean", mean)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> _Scores:
        """The score at the last token that is no padding."""
        hidden = self.decoder(
            input_ids=input_ids, attention_mask=attention_mask, use_cache=False
        ).last_hidden_state
        last = hidden[torch.arange(len(hidden), device=hidden.device), attention_mask.sum(1) - 1]
        scores = self.score_head(last).float()
        if self.mean is not None:
            scores = scores - self.mean
        return _Scores(scores if self.scale is None else scores / self.scale)


def load_classifier(spec: str | Path, **options: Any) -> TextReader:
    """A sequence classifier from a folder or the hub.

    Args:
        spec: `ID[@REVISION]`.
        **options: As for `load`.

    Raises:
        ModelError: What cannot be found or loaded, in one line.
    """
    return TextReader(*load_as("AutoModelForSequenceClassification", spec, **options))


def load_scorer(spec: str | Path, **options: Any) -> TextReader:
    """A decoder with a scalar head (`score_head`), as Safe RLHF's reward and cost models are saved.

    Where the checkpoint says `do_normalize`, a cost is divided by the running standard deviation that was
    saved with it, and a reward is centred before.

    Args:
        spec: `ID[@REVISION]`.
        **options: As for `load`.

    Raises:
        ModelError: A checkpoint without such a head. MismatchError: A head that does not fit the decoder.
    """
    decoder, tokenizer, folder = load_as("AutoModel", spec, **options)
    tensors = _tensors(folder, ("score_head.", "normalizer."))
    weight = tensors.get("score_head.weight")
    if weight is None:
        raise ModelError(f"{folder}: no score_head.weight; expected a reward or cost model of Safe RLHF")
    config: Any = decoder.config
    if weight.ndim != 2 or weight.shape != (1, config.hidden_size):
        raise MismatchError(
            f"{folder}: a score head of shape {tuple(weight.shape)}; expected (1, {config.hidden_size})"
        )
    bias = tensors.get("score_head.bias")
    place = next(decoder.parameters())
    head = nn.Linear(config.hidden_size, 1, bias=bias is not None, device=place.device, dtype=place.dtype)
    with torch.no_grad():
        head.weight.copy_(weight)
        if bias is not None:
            head.bias.copy_(bias)
    model = ScoreModel(decoder, config, head, **_normaliser(config, tensors, place.device)).eval()
    return TextReader(model, tokenizer, folder)


def _normaliser(config: Any, tensors: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    if not getattr(config, "do_normalize", False) or "normalizer.var" not in tensors:
        return {}
    buffers = {"scale": (tensors["normalizer.var"].float() + 1e-8).sqrt().to(device)}
    if getattr(config, "score_type", "reward") == "reward" and "normalizer.mean" in tensors:
        buffers["mean"] = tensors["normalizer.mean"].float().to(device)
    return buffers


def _tensors(folder: Path, beginnings: tuple[str, ...]) -> dict[str, Tensor]:
    """Tensors of a checkpoint by the beginning of their names."""
    index = folder / "model.safetensors.index.json"
    files = sorted(folder.glob("*.safetensors"))
    if index.is_file():
        refuse_foreign_shards(folder)
        files = sorted(
            {folder / file for name, file in shards_of(index).items() if name.startswith(beginnings)}
        )
    tensors = {}
    for file in files:
        with safe_open(file, framework="pt") as stream:
            names = [name for name in stream.keys() if name.startswith(beginnings)]  # noqa: SIM118
            tensors.update({name: stream.get_tensor(name) for name in names})
    return tensors


def _lists(encoding: Mapping[str, Any]) -> dict[str, list[int]]:
    return {
        name: list(encoding[name])
        for name in ("input_ids", "attention_mask", "token_type_ids")
        if name in encoding
    }


def _padded(rows: Sequence[Mapping[str, list[int]]], pad: int, device: torch.device) -> dict[str, Tensor]:
    width = max(len(row["input_ids"]) for row in rows)
    padded: dict[str, Tensor] = {}
    for name in rows[0]:
        filling = pad if name == "input_ids" else 0
        lists = [row[name] + [filling] * (width - len(row[name])) for row in rows]
        padded[name] = torch.tensor(lists, dtype=torch.long, device=device)
    if "attention_mask" not in padded:
        lengths = torch.tensor([len(row["input_ids"]) for row in rows], device=device)
        padded["attention_mask"] = (torch.arange(width, device=device) < lengths[:, None]).long()
    return padded
