"""Right-padded batches sorted by length: planned, fed in one forward pass, halved when memory runs out.

And optimizer steps over them.
"""

import contextlib
import gc
import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from safety_neurons.errors import InputError, ModelError, NumericalError
from safety_neurons.model import ranks
from safety_neurons.model.sites import unwrapped

BatchSize = int | Literal["auto"]
"""Rows of a batch; `auto` for as many as a token budget allows."""

Progress = Callable[[int, int, int], None]
"""Called with what is done, what there is in all, and the tokens so far."""

T = TypeVar("T")

CPU_TOKEN_BUDGET = 2048

GPU_TOKEN_BUDGET = 16384


@dataclass
class Batch:
    """Sequences of similar length, padded on the right.

    Attributes:
        input_ids: Token ids; padding holds some valid id that nothing may read.
        attention_mask: 1 for tokens, 0 for padding.
        position_ids: 0, 1, 2, … in every row.
        lengths: Number of tokens of every row.
        indices: Which of the caller's sequences each row is.
        number: Place of the (unsplit) batch in its plan.
        output: What the forward pass gave: final hidden states `[batch, token, hidden]`, or logits `[batch,
            token, vocab]`; None where the pass stopped early or hooks on the whole model made it run as a
            whole.
    """

    input_ids: Int[Tensor, "batch token"]
    attention_mask: Int[Tensor, "batch token"]
    position_ids: Int[Tensor, "batch token"]
    lengths: list[int]
    indices: list[int]
    number: int = 0
    output: Tensor | None = field(default=None, repr=False)

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def width(self) -> int:
        """Tokens of the longest row."""
        return int(self.input_ids.shape[1])

    @property
    def n_tokens(self) -> int:
        """Real tokens, padding excluded."""
        return sum(self.lengths)

    @property
    def rows(self) -> Int[Tensor, " row"]:
        """Indices of the real tokens in the flattened `batch × token` axis, sequence by sequence.

        Select with these (`values.flatten(0, 1)[batch.rows]`) and never multiply by the mask: padding may
        hold NaN.
        """
        return self.attention_mask.flatten().nonzero().squeeze(1)

    @property
    def row_lengths(self) -> Int[Tensor, " batch"]:
        """Lengths as a tensor on the batch's device, to split what `rows` selected."""
        return torch.tensor(self.lengths, device=self.input_ids.device)

    def to(self, device: torch.device | str) -> "Batch":
        """The batch with its tensors on another device."""
        tensors = (self.input_ids.to(device), self.attention_mask.to(device), self.position_ids.to(device))
        return Batch(*tensors, self.lengths, self.indices, self.number)

    def split(self) -> tuple["Batch", "Batch"]:
        """Two halves of the rows, each no wider than its longest row."""
        middle = (len(self) + 1) // 2
        return self._part(slice(None, middle)), self._part(slice(middle, None))

    def _part(self, rows: slice) -> "Batch":
        lengths = self.lengths[rows]
        width = slice(0, max(lengths))
        tensors = (
            self.input_ids[rows, width],
            self.attention_mask[rows, width],
            self.position_ids[rows, width],
        )
        return Batch(*tensors, lengths, self.indices[rows], self.number)


@dataclass(frozen=True)
class Rows:
    """Some of the caller's sequences, by index, where `Batch` does not fit; can be halved.

    Attributes:
        lengths: Tokens of every sequence, of those of other rows too.
        indices: Which of them these rows are.
        number: Place of the (unsplit) rows in their plan.
    """

    lengths: Sequence[int]
    indices: list[int]
    number: int = 0

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def width(self) -> int:
        """Tokens of the longest row."""
        return max(self.lengths[index] for index in self.indices)

    def split(self) -> tuple["Rows", "Rows"]:
        """Two halves."""
        middle = (len(self) + 1) // 2
        one, other = self.indices[:middle], self.indices[middle:]
        return Rows(self.lengths, one, self.number), Rows(self.lengths, other, self.number)


def token_budget(device: torch.device, budget: int | None = None) -> int:
    """Padded tokens that one batch may hold when its size is left to the package."""
    return budget or (CPU_TOKEN_BUDGET if device.type == "cpu" else GPU_TOKEN_BUDGET)


def plan(
    lengths: Sequence[int],
    batch_size: BatchSize = "auto",
    budget: int = CPU_TOKEN_BUDGET,
    *,
    padded: bool = True,
) -> list[list[int]]:
    """Indices of every batch: longest sequences first (what does not fit shows at once), ties by index.

    Args:
        lengths: Tokens of every sequence.
        batch_size: Rows of a batch, or `auto` for as many as `budget` padded tokens allow.
        budget: Padded tokens of a batch where the size is `auto`.
        padded: Whether a batch may hold sequences of different lengths.

    Raises:
        InputError: A batch size below one.
    """
    if batch_size != "auto" and batch_size < 1:
        raise InputError(f"batch size {batch_size}: expected a number of at least 1, or 'auto'")
    groups: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        limit = (
            max(1, budget // max(1, lengths[groups[-1][0]]))
            if groups and batch_size == "auto"
            else batch_size
        )
        fits = padded or not groups or lengths[groups[-1][0]] == lengths[index]
        if groups and fits and len(groups[-1]) < int(limit):
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups


def collate(
    sequences: Sequence[Sequence[int]], indices: Sequence[int], *, number: int = 0, pad_id: int = 0
) -> Batch:
    """One right-padded batch of the sequences at `indices`."""
    lengths = [len(sequences[index]) for index in indices]
    if not lengths or min(lengths) == 0:
        raise InputError(
            "a sequence without tokens: expected at least one token in each; drop empty prompts first"
        )
    shape = (len(lengths), max(lengths))
    input_ids = torch.full(shape, pad_id, dtype=torch.long)
    for row, index in enumerate(indices):
        input_ids[row, : lengths[row]] = torch.tensor(list(sequences[index]), dtype=torch.long)
    positions = torch.arange(shape[1]).expand(shape).contiguous()
    mask = (positions < torch.tensor(lengths)[:, None]).long()
    return Batch(input_ids, mask, positions, lengths, list(indices), number)


def batches(
    sequences: Sequence[Sequence[int]], batch_size: BatchSize = "auto", *, pad_id: int = 0
) -> list[Batch]:
    """All sequences as right-padded batches, sorted by length; the same input always gives the same batches.

    Raises:
        InputError: An empty sequence, or a batch size below one.
    """
    groups = plan([len(sequence) for sequence in sequences], batch_size)
    return [collate(sequences, group, number=number, pad_id=pad_id) for number, group in enumerate(groups)]


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out, on any device."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and ("out of memory" in text or "can't allocate memory" in text)


class Halving:
    """Runs work on batches and halves those that do not fit in memory, and all larger ones after them.

    Args:
        failed: Gets, by its index, the reason why a sequence is left out: it alone does not fit in memory, or
            gives numbers that are not finite (then `work` raises a `NumericalError`, and the batch is halved
            until the sequence is alone). None: both end the run.

    Attributes:
        notes: One line for each time a batch was halved because it did not fit.
    """

    def __init__(self, failed: dict[int, str] | None = None) -> None:
        self.notes: list[str] = []
        self._failed = failed
        self._largest: int | None = None

    def over(
        self, numbers: Sequence[int], batch_of: Callable[[int], Any], work: Callable[[Any], T]
    ) -> Iterator[list[T]]:
        """What `run` gives for every batch of a plan, in order; several processes share the batches out.

        Args:
            numbers: Of batches in the plan.
            batch_of: Makes a batch.
            work: As for `run`; where processes share, all that stays of a batch is what it returns.
        """

        def done(number: int) -> tuple[list[T], list[str], dict[int, str]]:
            said, left_out = len(self.notes), set(self._failed or ())
            results = self.run(batch_of(number), work)
            new = {index: why for index, why in (self._failed or {}).items() if index not in left_out}
            notes = self.notes[said:]
            del self.notes[said:]
            return results, notes, new

        for results, notes, failed in ranks.shared(numbers, done):
            self.notes += notes
            if self._failed is not None:
                self._failed.update(failed)
            yield results

    def run(self, batch: Any, work: Callable[[Any], T]) -> list[T]:
        """Results of `work` for the batch, or for its parts in order.

        Args:
            batch: Anything with `len`, `width`, `indices` and `split()`.
            work: Must leave nothing behind when it raises, for it is called again on each half.

        Raises:
            ModelError: One row alone does not fit. NumericalError: One gives numbers that are not finite.
        """
        if self._largest is not None and len(batch) > 1 and len(batch) * batch.width > self._largest:
            return self._halves(batch, work)
        try:
            return [work(batch)]
        except NumericalError as error:
            if self._failed is None:
                raise
            reason = str(error)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            reason = (
                f"out of memory on one sequence of {batch.width} tokens: use a shorter text, --dtype "
                "bfloat16 or a larger device"
            )
            release_memory()
            if len(batch) > 1:
                self._halve(len(batch), batch.width)
        if len(batch) > 1:
            return self._halves(batch, work)
        if self._failed is None:
            raise ModelError(reason)
        self._failed[batch.indices[0]] = reason
        return []

    def _halve(self, rows: int, width: int) -> None:
        self._largest = rows * width // 2
        self.notes.append(
            f"out of memory on a batch of {rows} × {width} tokens: halved, going on with at most "
            f"{self._largest} tokens"
        )

    def _halves(self, batch: Any, work: Callable[[Any], T]) -> list[T]:
        return [result for part in batch.split() for result in self.run(part, work)]


def said_of_failed(failed: Mapping[int, str], n: int, what: str = "prompts") -> list[str]:
    """A line about the sequences that were left out, where there are some.

    Args:
        failed: The reason by index.
        n: How many there were.
        what: What they are.
    """
    first = next(iter(failed.values()), "")
    return (
        [
            (
                f"{len(failed)} of {n} {what} failed (not-a-number or out of memory) and are left out; the "
                f"first: {first}"
            )
        ]
        if failed
        else []
    )


def release_memory() -> None:
    """Gives unused memory back after a failed allocation."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def decoder_of(model: nn.Module) -> nn.Module:
    """The causal LM's decoder without its head, adapters included; the model itself where it has no head."""
    inner = unwrapped(model)
    decoder = getattr(inner, "base_model", inner)
    if decoder is inner and callable(
        getattr(inner, "get_decoder", None)
    ):  # a prefix that names no attribute, as some text models have
        decoder = inner.get_decoder()
    return decoder if isinstance(decoder, nn.Module) else inner


def forward(
    model: nn.Module, batch: Batch, *, with_logits: bool = False
) -> Float[Tensor, "batch token width"] | None:
    """One forward pass without cache: final hidden states, or logits where they are asked for.

    The head is left out where logits are not needed, unless something is hooked on the whole model: an
    intervention that drives another model from there must see the pass, and None is returned then. Gradients
    flow if the caller enabled them.
    """
    inner = unwrapped(model)
    whole = with_logits or any(has_hooks(module) for module in (model, inner))
    module = model if whole else decoder_of(model)
    accepted = inspect.signature(inner.forward if whole else module.forward).parameters
    arguments: dict[str, Any] = {
        "input_ids": batch.input_ids,
        "attention_mask": batch.attention_mask,
        "use_cache": False,
    }
    if "position_ids" in accepted:
        arguments["position_ids"] = batch.position_ids
    if whole and not with_logits and "logits_to_keep" in accepted:
        arguments["logits_to_keep"] = 1
    output = module(**arguments, return_dict=True)
    if with_logits:
        return output.logits
    return None if whole else output.last_hidden_state


def next_token_rows(batch: Batch) -> tuple[Int[Tensor, " row"], Int[Tensor, " row"]]:
    """Flat indices of the tokens that predict another one, and the ids they are to predict, sequence by
    sequence.
    """
    width = batch.width
    predicts: Bool[Tensor, "batch token"] = batch.position_ids + 1 < batch.row_lengths[:, None]
    rows = predicts.flatten().nonzero().squeeze(1)
    return rows, batch.input_ids.flatten()[rows + 1] if width > 1 else batch.input_ids.new_empty(0)


def has_hooks(module: nn.Module) -> bool:
    """Whether something acts at the boundary of a module, or in its place."""
    replaced = "forward" in vars(module) and not hasattr(
        module, "_hf_hook"
    )  # accelerate replaces every forward, harmlessly
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    return replaced or any(
        not getattr(getattr(hook, "__self__", None), "ONLY_COUNTS", False) for hook in hooks
    )


def hooked_by_others(model: nn.Module) -> bool:
    """Whether a part of the model has a hook that neither this package nor transformers put there."""
    ours = ("safety_neurons.", "transformers.")
    return any(
        not str(getattr(hook, "__module__", "")).startswith(ours)
        for module in model.modules()
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    )


IGNORED = -100
"""Label of a token that carries no loss."""


@contextlib.contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """No parameter requires gradients for a block; each is as it was afterwards."""
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in wanted:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in wanted:
            parameter.requires_grad_(True)


class Descended(NamedTuple):
    """One optimizer step: the loss before it, and the norm of its gradient before clipping."""

    loss: float
    norm: float


def clip_to_one(parameters: Sequence[Tensor]) -> float:
    """Clip the gradients at a joint L2 norm of 1; the norm before."""
    return float(torch.nn.utils.clip_grad_norm_(parameters, 1.0))


def descend(
    optimizer: torch.optim.Optimizer,
    backward: Callable[[int], float],
    rate: Callable[[float, int], float],
    steps: range,
    *,
    clip: Callable[[Sequence[Tensor]], float] = clip_to_one,
    subject: Callable[[int], str] = lambda _step: "",
) -> Iterator[Descended]:
    """Take one optimizer step for every item that is asked for, so that the caller may look, save or end
    between two.

    Args:
        optimizer: its groups' learning rates are those at the top of the schedule.
        backward: called with the step (from 0), leaves gradients in the parameters and returns the loss.
        rate: the learning rate of a step, from the one at the top of the schedule and the step.
        steps: which steps are taken; the last one's number is what messages count to.
        clip: scales the gradients in place and returns their norm before.
        subject: what an error says of a step's examples.

    Raises:
        NumericalError: the loss or its gradient is not a number; the parameters are those before this step.
    """
    full = [group["lr"] for group in optimizer.param_groups]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for step in steps:
        loss = backward(step)
        norm = clip(parameters)
        for name, value in (("loss", loss), ("gradient's norm", norm)):
            if not math.isfinite(value):
                raise NumericalError(
                    f"the {name} became {value} at step {step + 1} of {steps.stop}{subject(step)}, a "
                    "number was expected; nothing was changed by this step; lower the learning rate, or "
                    "use --dtype bfloat16 or float32"
                )
        for group, highest in zip(optimizer.param_groups, full, strict=True):
            group["lr"] = rate(highest, step)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        yield Descended(loss, norm)


def padded(
    examples: Sequence[tuple[Sequence[int], int]], pad_id: int
) -> tuple[Int[Tensor, "batch token"], Int[Tensor, "batch token"]]:
    """Right-padded ids and labels of examples, each with the number of first ids that carry no loss.

    Those labels are -100.
    """
    length = max(len(ids) for ids, _ in examples)
    inputs = torch.full((len(examples), length), pad_id)
    labels = torch.full((len(examples), length), IGNORED)
    for row, (ids, unlabelled) in enumerate(examples):
        inputs[row, : len(ids)] = torch.tensor(ids)
        labels[row, unlabelled : len(ids)] = inputs[row, unlabelled : len(ids)]
    return inputs, labels
