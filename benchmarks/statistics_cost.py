"""Cost of count, Σx and Σx² of every neuron over a corpus ÷ plain forward passes over the same batches.

    python benchmarks/statistics_cost.py --repetitions 31

A random Llama (8 layers, hidden 512, intermediate 1408, 8 heads, 2 key-value heads, vocabulary 2,000) reads
ragged sequences of 64 to 128 tokens in right-padded batches of 16. The floor is the same package's forward
pass without a reader and without the head, so that leaving out the head hides nothing; a pass with the head
stands beside it. Hooks written by hand run in the same turns, which select by a boolean mask and reduce or
store everything; peers.py has other tools beside them.
"""

import os
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import transformers

from paired import CLOCKS, Row, finish, interleaved, medians, parser, ratio
from safety_neurons.model import LanguageModel, activation_statistics, run_batches
from safety_neurons.model.batches import Batch, batches
from safety_neurons.model.passes import Statistics

MLP = ["down"]
PLACES = {
    "q": ("self_attn.q_proj", "output"),
    "k": ("self_attn.k_proj", "output"),
    "v": ("self_attn.v_proj", "output"),
    "o": ("self_attn.o_proj", "input"),
    "gate": ("mlp.gate_proj", "output"),
    "up": ("mlp.up_proj", "output"),
    "down": ("mlp.down_proj", "input"),
}
"""Where a Llama's sites are, in the order in which they come by: a projection of a layer, and its side."""
Sums = Mapping[str, torch.Tensor]
"""Σx and Σx² of a site, `[2, neuron]`, by key."""


def model_of(vocabulary: int = 2000) -> LanguageModel:
    """The random model."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=False,
    )
    return LanguageModel(transformers.LlamaForCausalLM(config).eval())


def corpus(n: int, vocabulary: int = 2000) -> list[list[int]]:
    """Ragged random sequences of 64 to 128 tokens."""
    drawn = random.Random(0)
    return [[drawn.randrange(3, vocabulary) for _ in range(drawn.randint(64, 128))] for _ in range(n)]


class ByHand:
    """What people write: a hook per projection that selects real tokens by a boolean mask, then adds up (or
    stores) what is left.
    """

    def __init__(self, lm: LanguageModel, store: bool, sites: Sequence[str] = MLP) -> None:
        self.lm, self.store, self.sites = lm, store, sites
        self.mask = torch.empty(0)

    def hooked(self, layer: torch.nn.Module, site: str, kept: list[torch.Tensor]) -> Any:
        """A hook on a side of a projection."""
        path, side = PLACES[site]
        module = layer.get_submodule(path)

        def act(activation: torch.Tensor) -> None:
            rows = activation[self.mask]
            kept.append(rows if self.store else sums_of(rows))

        if side == "input":
            return module.register_forward_pre_hook(lambda _, args: act(args[0]))
        return module.register_forward_hook(lambda _, __, output: act(output))

    @torch.no_grad()
    def run(self, prepared: list[Batch]) -> Sums:
        """Σx and Σx² of the neurons of every layer, by key."""
        kept: dict[str, list[torch.Tensor]] = {}
        handles = [
            self.hooked(layer, site, kept.setdefault(f"layers.{index}.{site}", []))
            for index, layer in enumerate(self.lm.model.model.layers)
            for site in self.sites
        ]
        try:
            for batch in prepared:
                self.mask = batch.attention_mask.bool()
                self.lm.model.model(
                    input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False
                )
        finally:
            for handle in handles:
                handle.remove()
        return {
            key: sums_of(torch.cat(mine)) if self.store else torch.stack(mine).sum(0)
            for key, mine in kept.items()
        }


def sums_of(rows: torch.Tensor) -> torch.Tensor:
    """Σx and Σx² over rows."""
    return torch.stack([rows.sum(0), (rows * rows).sum(0)])


def arms_of(
    lm: LanguageModel, sequences: list[list[int]], batch_size: int
) -> dict[str, Callable[[], object]]:
    """What takes turns."""
    prepared = batches(sequences, batch_size)

    @torch.no_grad()
    def with_head() -> None:
        for batch in prepared:
            lm.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)

    return {
        "plain": lambda: run_batches(lm, sequences, lambda _: None, batch_size),
        "mlp": lambda: activation_statistics(lm, sequences, sites=MLP, batch_size=batch_size),
        "seven": lambda: activation_statistics(lm, sequences, batch_size=batch_size),
        "plain again": lambda: run_batches(lm, sequences, lambda _: None, batch_size),
        "with head": with_head,
        "by hand": lambda: ByHand(lm, store=False).run(prepared),
        "by hand, storing": lambda: ByHand(lm, store=True).run(prepared),
    }


def agreement(ours: Statistics, theirs: Sums) -> float:
    """Largest relative difference of Σx² from a peer's: the arms do the same work."""
    if set(theirs) - set(ours.sums_of_squares):
        raise ValueError(f"the peer gave {sorted(theirs)[:3]} …, expected keys of {len(ours.sums)} sites")
    pairs = [(ours.sums_of_squares[key], other[1].double().numpy()) for key, other in theirs.items()]
    return max(float(abs(mine - other).max() / other.max()) for mine, other in pairs)


def main() -> None:
    """Measure, print and write the record."""
    load = os.getloadavg()[0]
    options_parser = parser(__doc__ or "")
    options_parser.add_argument("--sequences", type=int, default=32)
    options_parser.add_argument("--batch-size", type=int, default=16)
    options = options_parser.parse_args()
    torch.set_num_threads(options.threads)
    lm = model_of()
    sequences = corpus(options.sequences)
    difference = agreement(
        activation_statistics(lm, sequences, sites=MLP, batch_size=options.batch_size),
        ByHand(lm, store=False).run(batches(sequences, options.batch_size)),
    )
    assert difference < 1e-4, f"the arms disagree by {difference}"
    seconds = interleaved(
        arms_of(lm, sequences, options.batch_size), options.repetitions, CLOCKS[options.clock]
    )
    rows = [
        Row("statistics of all MLP neurons ÷ plain forward", ratio(seconds, "mlp", "plain"), 1.05),
        Row("statistics of all seven sites ÷ plain forward", ratio(seconds, "seven", "plain"), 1.15),
        Row("plain forward ÷ itself (what is noise)", ratio(seconds, "plain again", "plain")),
        Row("plain forward with the head ÷ without", ratio(seconds, "with head", "plain")),
        Row("MLP neurons, hooks by hand, reducing ÷ plain forward", ratio(seconds, "by hand", "plain")),
        Row(
            "MLP neurons, hooks by hand, storing ÷ plain forward", ratio(seconds, "by hand, storing", "plain")
        ),
    ]
    tokens = sum(map(len, sequences))
    finish(
        "statistics",
        rows,
        options,
        {"tokens": tokens, "seconds": medians(seconds), "largest_difference": difference},
        load,
    )


if __name__ == "__main__":
    main()
