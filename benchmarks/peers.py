"""Speed beside other tools: the same work on the same weights, in turns, in one process.

    python benchmarks/peers.py [--only statistics patching tokens importance tuning]

The environment is benchmarks/peers-requirements.txt. Every arm first does its work once, and an arm whose
numbers are not those of this package is refused. Model: SmolLM2-135M-Instruct with its real weights, a copy
for every tool; decoding steps of a tiny model, where calls are all there is; importance in a random layer of
Llama-3-8B's shape; training of the random model of tuning_cost.py.

The public code of paper 2 (Chen et al.) needs transformers 4.39 and so runs in a process of its own, which
does its turn when it is asked: `--paper2 PYTHON CHECKOUT` (see peers_paper2.py).
"""

import argparse
import contextlib
import copy
import functools
import operator
import os
import pathlib
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any

import interp_engine
import nnsight
import numpy as np
import peft
import pyvene
import torch
import transformers
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

import hook_cost
import importance_cost
import patching_cost
import statistics_cost
import tuning_cost
from paired import CLOCKS, Clock, Row, finish, interleaved, median, medians, parser, ratio
from peers_paper2 import Paper2
from safety_neurons.detectors.importance import ImportanceReaders
from safety_neurons.interventions import patched
from safety_neurons.interventions.columns import columns
from safety_neurons.interventions.patch import StackedPass
from safety_neurons.interventions.targets import Subject
from safety_neurons.model import LanguageModel, activation_statistics, load
from safety_neurons.model.batches import Batch, batches, collate, forward
from statistics_cost import MLP, PLACES, ByHand, Sums, sums_of

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "tests"))
from brute_force import brute_force

MODEL = "real:smollm2-135m-instruct"
PINNED = ("torch", "transformers", "peft", "nnsight", "transformer-lens", "pyvene", "interp-engine")
TOLERANCE = 1e-4
Arms = dict[str, Callable[[], Any]]


@dataclass
class Part:
    """What one comparison found.

    Attributes:
        rows: for the table.
        detail: seconds of the arms, how far their numbers were apart, what arithmetic and bytes allow.
    """

    rows: list[Row] = field(default_factory=list)
    detail: dict[str, Any] = field(default_factory=dict)


def agree(name: str, difference: float, tolerance: float = TOLERANCE) -> float:
    """The difference; an error where an arm does other work than this package does."""
    if not difference <= tolerance:
        raise ValueError(
            f"{name} differs from this package by {difference:.2g}, expected at most {tolerance:g}; not timed"
        )
    return difference


def rates(clock: Clock) -> dict[str, float]:
    """FLOP and bytes a second of this machine, by a product of matrices and a sum, the best of five each."""
    square, long = torch.randn(1024, 1024), torch.randn(2**26)

    def best(work: Callable[[], object]) -> float:
        taken = []
        for _ in range(5):
            start = clock()
            work()
            taken.append(clock() - start)
        return min(taken)

    return {
        "flop_a_second": 2 * 1024**3 / best(lambda: square @ square),
        "bytes_a_second": 4 * 2**26 / best(long.sum),
    }


Key = tuple[str, int, str]
"""A site's key, its layer and its name."""
SumsOf = Callable[[Batch], list[Tensor]]
"""Σx and Σx² of a batch's real tokens, site by site."""


def keys_of(model: Any, sites: Sequence[str]) -> list[Key]:
    """The sites in the order in which they come by."""
    layers = range(model.config.num_hidden_layers)
    return [(f"layers.{layer}.{site}", layer, site) for layer in layers for site in PLACES if site in sites]


def over(sums: SumsOf, keys: Sequence[Key], prepared: Sequence[Batch]) -> Sums:
    """Σx and Σx² of all batches, by key."""
    with torch.no_grad():
        totals = [torch.stack(each).sum(0) for each in zip(*map(sums, prepared), strict=True)]
    return {key: total for (key, _, _), total in zip(keys, totals, strict=True)}


def inputs_of(batch: Batch) -> dict[str, Any]:
    """What a model is given."""
    return {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "use_cache": False}


def by_nnsight(model: Any, keys: Sequence[Key], _: Any) -> SumsOf:
    """Code in a trace, around the model without its head."""
    traced = nnsight.NNsight(model.model)

    def sums(batch: Batch) -> list[Tensor]:
        mask, found = batch.attention_mask.bool(), []
        with traced.trace(**inputs_of(batch)):
            for _, layer, site in keys:
                path, side = PLACES[site]
                module = operator.attrgetter(path)(traced.layers[layer])
                found.append(sums_of((module.input if side == "input" else module.output)[mask]))
            nnsight.save(found)
        return found

    return sums


LENS = {
    "q": "attn.q.hook_out",
    "k": "attn.k.hook_out",
    "v": "attn.v.hook_out",
    "o": "attn.o.hook_in",
    "gate": "mlp.gate.hook_out",
    "up": "mlp.in.hook_out",
    "down": "mlp.out.hook_in",
}
"""The same places as TransformerLens names them."""


def by_lens(model: Any, keys: Sequence[Key], tokenizer: Any) -> SumsOf:
    """TransformerLens's bridge, which runs eager attention and the head."""
    lens = bridge(model, tokenizer)

    def sums(batch: Batch) -> list[Tensor]:
        mask, found = batch.attention_mask.bool(), []
        hooks = [
            (f"blocks.{layer}.{LENS[site]}", lambda x, hook: found.append(sums_of(x.flatten(2)[mask])))  # noqa: ARG005
            for _, layer, site in keys
        ]
        lens.run_with_hooks(batch.input_ids, attention_mask=batch.attention_mask, fwd_hooks=hooks)
        return found

    return sums


def by_pyvene(model: Any, keys: Sequence[Key], _: Any) -> SumsOf:
    """Functions as interventions that leave the activation as it is."""
    masks: list[Tensor] = []
    found: list[Tensor] = []

    def keep(activation: Tensor, *_: Any, **__: Any) -> Tensor:
        found.append(sums_of(activation[masks[-1]]))
        return activation

    names = [f"layers[{layer}].{'.'.join(PLACES[site])}" for _, layer, site in keys]
    around = intervenable(model.model, dict.fromkeys(names, keep))

    def sums(batch: Batch) -> list[Tensor]:
        masks[:] = [batch.attention_mask.bool()]
        found.clear()
        around(inputs_of(batch))
        return list(found)

    return sums


def by_interp_engine(model: Any, keys: Sequence[Key], tokenizer: Any) -> SumsOf:
    """Capture of whole activations, then sums. It names MLP neurons, and q, k and v of some models only."""
    engine = interp_engine.EagerModel("model", hf_model=model, tokenizer=tokenizer)
    points = [f"mlp_act.{layer}" for _, layer, _ in keys]

    def sums(batch: Batch) -> list[Tensor]:
        mask = batch.attention_mask.bool()
        cache = interp_engine.capture(engine, batch.input_ids, points, attention_mask=batch.attention_mask)
        return [sums_of(cache[point][mask]) for point in points]

    return sums


def bridge(model: Any, tokenizer: Any) -> Any:
    """TransformerLens around a model in memory."""
    with contextlib.redirect_stdout(sys.stderr):
        return TransformerBridge.boot_transformers(MODEL, hf_model=model, tokenizer=tokenizer, device="cpu")


def intervenable(model: Any, functions: Mapping[str, Callable[..., Tensor]]) -> Any:
    """Puts pyvene around a model in memory."""
    parts = [{"component": name, "intervention": function} for name, function in functions.items()]
    return pyvene.IntervenableModel(parts, model=model)


def statistics(lm: LanguageModel, options: argparse.Namespace) -> Part:
    """Σx and Σx² of every neuron of MLPs, and of all seven sites."""
    sequences = statistics_cost.corpus(options.sequences, lm.model.config.vocab_size)
    small = [sequence[:9] for sequence in sequences[:3]]
    small[0] = small[0][:5]
    tools = {
        "nnsight": by_nnsight,
        "TransformerLens": by_lens,
        "pyvene": by_pyvene,
        "interp-engine": by_interp_engine,
    }
    peers: dict[str, Callable[[Sequence[Batch]], Sums]] = {
        "hooks by hand, seven": ByHand(lm, store=False, sites=tuple(PLACES)).run
    }
    for name, tool in tools.items():
        for label, sites in ((name, MLP), (f"{name}, seven", tuple(PLACES))):
            if label != "interp-engine, seven":
                keys = keys_of(lm.model, sites)
                # A copy for each, since tools change what they wrap.
                sums = tool(copy.deepcopy(lm.model), keys, lm.tokenizer)
                peers[label] = functools.partial(over, sums, keys)
    truth = activation_statistics(lm, small)
    differences = {
        name: agree(name, statistics_cost.agreement(truth, peer(batches(small, len(small)))))
        for name, peer in peers.items()
    }
    prepared = batches(sequences, options.batch_size)
    arms = statistics_cost.arms_of(lm, sequences, options.batch_size)
    arms.pop("by hand, storing")
    arms.update({name: lambda peer=peer: peer(prepared) for name, peer in peers.items()})
    seconds = interleaved(arms, options.repetitions, CLOCKS[options.clock])
    rows = [
        Row("statistics of all MLP neurons ÷ plain forward", ratio(seconds, "mlp", "plain"), 1.05),
        Row("the same, hooks by hand", ratio(seconds, "by hand", "plain")),
        *(Row(f"the same, {name}", ratio(seconds, name, "plain")) for name in ("nnsight", "pyvene")),
        *(
            Row(f"the same, {name} ÷ plain forward with the head", ratio(seconds, name, "with head"))
            for name in ("TransformerLens", "interp-engine")
        ),
        Row("statistics of all seven sites ÷ plain forward", ratio(seconds, "seven", "plain"), 1.12),
        *(
            Row(f"the same, {name}", ratio(seconds, f"{name}, seven", "plain"))
            for name in ("hooks by hand", "nnsight", "pyvene")
        ),
        Row(
            "the same, TransformerLens ÷ plain forward with the head",
            ratio(seconds, "TransformerLens, seven", "with head"),
        ),
        Row("plain forward ÷ itself (what is noise)", ratio(seconds, "plain again", "plain")),
    ]
    tokens = sum(map(len, sequences))
    machine, plain = rates(CLOCKS[options.clock]), medians(seconds)["plain"]
    read = {
        "mlp": 4 * tokens * sum(size for key, size in lm.table.sizes.items() if key.endswith(".down")),
        "seven": 4 * tokens * sum(lm.table.sizes.values()),
    }
    body = sum(p.numel() for p in lm.model.model.layers.parameters())
    floor = {
        "plain_flop": 2 * body * tokens,
        "plain_seconds": 2 * body * tokens / machine["flop_a_second"],
        "bytes": read,
        "predicted": {name: 1 + 2 * size / machine["bytes_a_second"] / plain for name, size in read.items()},
        "why": "each activation is read twice, for its sum and for its square, at the rate of a sum",
    }
    detail = {"tokens": tokens, "seconds": medians(seconds), "differences": differences, "floor": floor}
    return Part(rows, {**detail, "rates": machine})


Read = Callable[[Mapping[str, Any]], list[Tensor]]
"""The chosen neurons of the donor in a pass, layer by layer."""
Write = Callable[[Mapping[str, Any], list[Tensor]], Tensor]
"""Logits of the patched model, given the donor's neurons."""


@torch.no_grad()
def lockstep(read: Read, write: Write, ids: Tensor, new: int) -> Tensor:
    """Dynamic activation patching as one writes it with a tool that hooks one pass: at every step the donor
    reads what the patched model reads, then the patched model goes on with the donor's neurons.
    """
    own, theirs = transformers.DynamicCache(), transformers.DynamicCache()
    written = [ids]
    for _ in range(new):
        values = read({"input_ids": written[-1], "past_key_values": theirs, "use_cache": True})
        given = {"input_ids": written[-1], "past_key_values": own, "use_cache": True, "logits_to_keep": 1}
        written.append(write(given, values)[:, -1].argmax(-1, keepdim=True))
    return torch.cat(written, 1)


def hand_lockstep(base: Any, donor: Any, chosen: Sequence[Tensor]) -> tuple[Read, Write]:
    """Hooks by hand."""
    values: list[Tensor] = []
    for source, target, index in zip(donor.model.layers, base.model.layers, chosen, strict=True):
        source.mlp.down_proj.register_forward_pre_hook(
            lambda _, args, index=index: values.append(args[0][..., index])
        )
        target.mlp.down_proj.register_forward_pre_hook(
            lambda _, args, index=index: (args[0].index_copy(-1, index, values.pop(0)),)
        )

    def read(given: Mapping[str, Any]) -> list[Tensor]:
        donor.model(**given)
        return values

    return read, lambda given, _: base(**given).logits


def nnsight_lockstep(base: Any, donor: Any, chosen: Sequence[Tensor]) -> tuple[Read, Write]:
    """Two traces a token."""
    traced, source = nnsight.NNsight(base), nnsight.NNsight(donor.model)

    def read(given: Mapping[str, Any]) -> list[Tensor]:
        values = []
        with source.trace(**given):
            for layer, index in zip(source.layers, chosen, strict=True):
                values.append(layer.mlp.down_proj.input[..., index])  # noqa: PERF401 - a trace reads statements
            nnsight.save(values)
        return values

    def write(given: Mapping[str, Any], values: list[Tensor]) -> Tensor:
        with traced.trace(**given):
            for layer, index, value in zip(traced.model.layers, chosen, values, strict=True):
                layer.mlp.down_proj.input[..., index] = value
            logits = nnsight.save(traced.output.logits)
        return logits  # noqa: RET504 - bound when the trace ends

    return read, write


def pyvene_lockstep(base: Any, donor: Any, chosen: Sequence[Tensor]) -> tuple[Read, Write]:
    """Functions as interventions, two passes a token."""
    values: list[Tensor] = []

    def reading(index: Tensor) -> Callable[..., Tensor]:
        def keep(activation: Tensor, *_: Any, **__: Any) -> Tensor:
            values.append(activation[..., index])
            return activation

        return keep

    def writing(index: Tensor) -> Callable[..., Tensor]:
        return lambda activation, *_, **__: activation.index_copy(-1, index, values.pop(0))

    names = [f"layers[{layer}].mlp.down_proj.input" for layer in range(len(chosen))]
    source = intervenable(
        donor.model, {name: reading(index) for name, index in zip(names, chosen, strict=True)}
    )
    target = intervenable(
        base, {f"model.{name}": writing(index) for name, index in zip(names, chosen, strict=True)}
    )

    def read(given: Mapping[str, Any]) -> list[Tensor]:
        source(dict(given))
        return values

    return read, lambda given, _: target(dict(given))[1].logits


def shape_of(options: argparse.Namespace) -> argparse.Namespace:
    """What patching_cost.py is asked for."""
    return argparse.Namespace(
        model=MODEL,
        dtype="float32",
        device="cpu",
        share=0.05,
        apart=0.01,
        new=options.new,
        prompt=options.prompt,
        batch=8,
    )


def patching(lm: LanguageModel, options: argparse.Namespace) -> Part:
    """Patched generation of a shared base and of two models, and the same by other tools."""
    shape = shape_of(options)
    ids = torch.randint(
        3, lm.model.config.vocab_size, (shape.batch, shape.prompt), generator=torch.Generator().manual_seed(1)
    )
    pairs = {kind: patching_cost.pair_of(kind, shape) for kind in ("ia3", "separate")}
    neurons = patching_cost.chosen_neurons(pairs["separate"][0], shape.share)
    arms: Arms = {}
    for kind, pair in pairs.items():
        chosen = patching_cost.chosen_neurons(pair[0], shape.share)
        for name, action in patching_cost.actions_of(pair, chosen, shape, ids).items():
            arms[f"{kind} {name}"] = action
    chosen = [torch.as_tensor(values) for _, values in neurons.items()]
    tools = {"hooks by hand": hand_lockstep, "nnsight": nnsight_lockstep, "pyvene": pyvene_lockstep}
    for name, tool in tools.items():
        read, write = tool(*(copy.deepcopy(one.model) for one in pairs["separate"]), chosen)
        arms[name] = functools.partial(lockstep, read, write, ids, shape.new)
    clock = CLOCKS[options.clock]
    with contextlib.ExitStack() as stack:
        if options.paper2:
            folder = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory()))
            other = stack.enter_context(
                Paper2.started(options.paper2, folder, pairs["separate"], chosen, ids, shape.new)
            )
            arms["public code, plain"] = lambda: other.ask("plain")
            arms["public code, patched"] = lambda: other.ask("patched")
            clock = other.beside(clock)
        written = arms["separate patched"]()
        plain = arms["separate plain"]()
        if torch.equal(written, plain):
            raise ValueError("patching changed no token, expected other answers; nothing would be compared")
        differences = {
            name: agree(name, float((arms[name]() != written).float().mean()), 0.0)
            for name in arms
            if name in tools or name == "public code, patched"
        }
        seconds = interleaved(arms, options.repetitions, clock)
    rows = [
        Row(
            "patched generation ÷ plain, shared base, (IA)³",
            ratio(seconds, "ia3 patched", "ia3 plain"),
            1.15,
        ),
        Row(
            "patched generation ÷ plain, two models",
            ratio(seconds, "separate patched", "separate plain"),
            1.6,
        ),
        *(Row(f"the same, {name}", ratio(seconds, name, "separate plain")) for name in tools),
    ]
    if options.paper2:
        rows += [
            Row(
                "the same, public code of paper 2 ÷ its own plain",
                ratio(seconds, "public code, patched", "public code, plain"),
            ),
            Row(
                "public code of paper 2, patched ÷ ours, two models",
                ratio(seconds, "public code, patched", "separate patched"),
            ),
            Row(
                "public code of paper 2, patched ÷ ours, shared base",
                ratio(seconds, "public code, patched", "ia3 patched"),
            ),
        ]
    return Part(rows, {"seconds": medians(seconds), "differences": differences})


def tiny(layers: int) -> LanguageModel:
    """A Llama whose passes cost next to nothing but calls."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=512,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        architectures=["LlamaForCausalLM"],
    )
    return LanguageModel(transformers.LlamaForCausalLM(config).eval())


def zeroed(activation: Tensor, index: Tensor) -> Tensor:
    """The activation with some neurons set to zero in place."""
    activation[..., index] = 0.0
    return activation


def decoding_step(call: Callable[..., Any], ids: Tensor) -> Callable[[], Tensor]:
    """The logits of one more token behind a cache of the prompts, which is as long again afterwards."""
    cache = transformers.DynamicCache()
    with torch.no_grad():
        call(input_ids=ids, past_key_values=cache, use_cache=True)

    def run() -> Tensor:
        with torch.no_grad():
            output = call(input_ids=ids[:, -1:], past_key_values=cache, use_cache=True)
        cache.crop(-1)
        return output if isinstance(output, Tensor) else output.logits

    return run


def zeroing(
    stack: contextlib.ExitStack, model: Any, chosen: Sequence[Tensor], tokenizer: Any
) -> dict[str, Callable[..., Any]]:
    """Every tool's call of a copy of the model with some neurons of every layer at zero."""
    models = {
        name: copy.deepcopy(model) for name in ("hooks by hand", "nnsight", "TransformerLens", "pyvene")
    }
    for layer, index in zip(models["hooks by hand"].model.layers, chosen, strict=True):
        layer.mlp.down_proj.register_forward_pre_hook(lambda _, args, index=index: (zeroed(args[0], index),))
    traced = nnsight.NNsight(models["nnsight"])

    def call_nnsight(**given: Any) -> Any:
        with traced.trace(**given):
            for layer, index in zip(traced.model.layers, chosen, strict=True):
                layer.mlp.down_proj.input[..., index] = 0.0
            logits = nnsight.save(traced.output.logits)
        return logits  # noqa: RET504 - bound when the trace ends

    lens = bridge(models["TransformerLens"], tokenizer)
    hooks = [
        (
            f"blocks.{layer}.mlp.out.hook_in",
            lambda activation, hook, index=index: zeroed(activation, index),  # noqa: ARG005
        )
        for layer, index in enumerate(chosen)
    ]
    stack.enter_context(lens.hooks(fwd_hooks=hooks))
    interventions = intervenable(
        models["pyvene"],
        {
            f"model.layers[{layer}].mlp.down_proj.input": lambda activation, *_, index=index, **__: zeroed(
                activation, index
            )
            for layer, index in enumerate(chosen)
        },
    )
    return {
        "hooks by hand": models["hooks by hand"],
        "nnsight": call_nnsight,
        "TransformerLens": lambda input_ids, **given: lens(input_ids, **given),
        "pyvene": lambda **given: interventions(given)[1],
    }


def step_inside(options: argparse.Namespace) -> list[float]:
    """Milliseconds a token and layer that hooks take within a patched step of SmolLM2."""
    base, _ = patching_cost.pair_of("ia3", shape_of(options))
    subject = Subject.of(base)
    state = StackedPass(subject, subject, columns(subject.anatomy, patching_cost.chosen_neurons(base, 0.05)))
    ids = torch.randint(3, 1000, (8, options.prompt), generator=torch.Generator().manual_seed(1))
    with base.active():
        return hook_cost.step_times(subject, state.editors(), ids, options.repetitions, CLOCKS[options.clock])


def tokens(lm: LanguageModel, options: argparse.Namespace) -> Part:
    """What a decoding step pays for hooks that set 5 % of the MLP neurons of every layer to zero."""
    small = tiny(lm.model.config.num_hidden_layers)
    neurons = patching_cost.chosen_neurons(small, 0.05)
    chosen = [torch.as_tensor(values) for _, values in neurons.items()]
    ids = torch.randint(3, 512, (8, 16), generator=torch.Generator().manual_seed(0))
    plain = copy.deepcopy(small.model)
    arms: Arms = {"plain": decoding_step(plain, ids), "plain again": decoding_step(plain, ids)}
    with contextlib.ExitStack() as stack:
        tools = zeroing(stack, small.model, chosen, lm.tokenizer)
        stack.enter_context(patched(small, None, neurons, mode="zero"))
        arms["ours"] = decoding_step(small.model, ids)
        arms |= {name: decoding_step(call, ids) for name, call in tools.items()}
        truth = arms["ours"]()
        differences = {
            name: agree(name, float((arms[name]() - truth).abs().max() / truth.abs().max())) for name in tools
        }
        if torch.equal(truth, arms["plain"]()):
            raise ValueError("the edit changed no logit, expected other ones; nothing would be compared")
        seconds = interleaved(arms, 20 * options.repetitions, CLOCKS[options.clock], warm_up=10)
    rows = [
        Row(
            f"per decoded token and layer, {name}, step of a tiny model − plain",
            median(
                [1000 * (b - a) / len(chosen) for a, b in zip(seconds["plain"], seconds[name], strict=True)]
            ),
            0.05 if name == "ours" else None,
            "ms",
        )
        for name in ("ours", *tools, "plain again")
    ]
    inside = median(step_inside(options))
    rows.append(
        Row("per decoded token and layer, ours, inside a patched step of SmolLM2", inside, 0.05, "ms")
    )
    return Part(rows, {"seconds": medians(seconds), "differences": differences})


def published(lm: LanguageModel, batch: Batch) -> dict[str, list[list[float]]]:
    """What the public code of paper 1 (Zhao et al.) computes a prompt, rebuilt from a description of it: its
    own approximations, not the exact importance, and the lists that it makes of them.

    Attention: the squared change of all probabilities when a dimension of queries and keys (after rotation)
    is left out, unscaled, with an array of neuron × token × token for every layer. MLP: Σ|up|, with `up`
    computed three times in all. Values: Σ|input of o|. Not done here: its output head on every layer, which
    at a vocabulary of 128,256 takes more than the layer.
    """
    model, ids = lm.model.model, batch.input_ids
    scores: dict[str, list[list[float]]] = {"q": [], "v": [], "up": []}
    seen: dict[str, Tensor] = {}

    def note(name: str) -> Callable[..., None]:
        return lambda _, args, output: seen.update({name: args[0] if name in ("o", "up") else output})

    with contextlib.ExitStack() as stack, torch.no_grad():
        for layer in model.layers:
            for name in ("q", "k", "o", "up"):
                module = layer.get_submodule(PLACES[name][0])
                stack.callback(module.register_forward_hook(note(name)).remove)
            stack.callback(
                layer.register_forward_hook(
                    lambda one, *_: add_published(one, model, ids.shape[1], seen, scores)
                ).remove
            )
        forward(lm.model, batch)
    for lists in scores.values():
        for values in lists:
            np.argsort(values)
    return scores


def add_published(
    layer: Any, model: Any, length: int, seen: Mapping[str, Tensor], scores: dict[str, list[list[float]]]
) -> None:
    """The lists of one layer."""
    width = layer.self_attn.head_dim
    queries, keys = (seen[name].view(1, length, -1, width).transpose(1, 2) for name in ("q", "k"))
    turned = model.rotary_emb(queries, torch.arange(length)[None])
    queries, keys = apply_rotary_pos_emb(queries, keys, *turned)
    queries, keys = queries[0], keys[0].repeat_interleave(queries.shape[1] // keys.shape[1], 0)
    future = torch.full((length, length), -torch.inf).triu(1)
    logits = queries @ keys.transpose(-1, -2) / width**0.5 + future
    left_out = queries.transpose(-1, -2)[..., None] * keys.transpose(-1, -2)[..., None, :]
    changed = (logits[:, None] - left_out).softmax(-1)
    scores["q"].append((changed - logits.softmax(-1)[:, None]).square().sum((-1, -2)).flatten().tolist())
    scores["v"].append(seen["o"][0].abs().sum(0).tolist())
    for _ in range(2):
        up = layer.mlp.up_proj(seen["up"])
    scores["up"].append(up[0].abs().sum(0).tolist())


def importance(_: LanguageModel, options: argparse.Namespace) -> Part:
    """Exact importance of every neuron of a layer of Llama-3-8B's shape."""
    one = importance_cost.build(1, torch.float32, "cpu")
    readers = ImportanceReaders(one, tuple(one.table.keys))
    part = Part()
    for length, target in ((64, 1.5), (128, 1.9)):
        ids = torch.randint(0, 512, (length,), generator=torch.Generator().manual_seed(0)).tolist()
        batch = collate([ids], [0])

        def exact(batch: Batch = batch) -> Mapping[str, Any]:
            with torch.no_grad(), readers.on():
                readers.start(batch)
                forward(one.model, batch)
                return {key: values[0] for key, values in readers.take().items()}

        def plain(batch: Batch = batch) -> None:
            with torch.no_grad():
                forward(one.model, batch)

        truth, ablated, alone, worst = exact(), 0.0, 0, 0.0
        for key, size in one.table.sizes.items():
            stride = size // 2
            start = CLOCKS[options.clock]()
            found = brute_force(one, ids, [key], stride)[key]
            # One pass to see what goes in, one sub-layer untouched, then one a neuron.
            ablated += (CLOCKS[options.clock]() - start) / (len(found) + 2) * size
            expected = torch.as_tensor(truth[key])
            worst = max(worst, float((found - expected[::stride]).abs().max() / expected.max()))
            alone += len(found)
        agree(f"ablation one by one, {length} tokens", worst)
        arms: Arms = {"plain": plain, "exact": exact, "published": lambda batch=batch: published(one, batch)}
        seconds = interleaved(arms, options.repetitions, CLOCKS[options.clock])
        what = f"exact importance, a Llama-3-8B layer, {length} tokens"
        part.rows += [
            Row(f"{what} ÷ plain forward", ratio(seconds, "exact", "plain"), target),
            Row(
                f"public code of paper 1 as described (other numbers), {length} tokens ÷ plain forward",
                ratio(seconds, "published", "plain"),
            ),
            Row(
                f"public code of paper 1 as described, {length} tokens ÷ ours",
                ratio(seconds, "published", "exact"),
            ),
            Row(
                f"neurons ablated one by one (extrapolated), {length} tokens ÷ ours",
                median([ablated / taken for taken in seconds["exact"]]),
            ),
        ]
        part.detail[str(length)] = {
            "seconds": medians(seconds),
            "ablated_one_by_one_seconds": ablated,
            "ablated_neurons": alone,
            "difference": worst,
            "floor": importance_floor(one, length),
        }
    return part


def importance_floor(lm: LanguageModel, length: int) -> dict[str, float]:
    """Operations of a layer's forward pass, and of what queries and keys need beside it."""
    config = lm.model.config
    width = config.num_attention_heads * config.head_dim
    body = sum(p.numel() for p in lm.model.model.layers.parameters())
    plain = 2 * body * length + 2 * width * length**2
    # A key of a group changes all of its heads at once, and passes through the factors of them all.
    heads = config.num_attention_heads // config.num_key_value_heads
    forms, changed = (1 + heads) * width * length**3, width * length**2
    return {
        "plain_flop": plain,
        "quadratic_forms_flop": forms,
        "changed_probabilities": changed,
        "predicted_by_flop_alone": 1 + forms / plain,
    }


def tuning(_: LanguageModel, options: argparse.Namespace) -> Part:
    """A training step and its memory on the random model of tuning_cost.py."""
    neurons = tuning_cost.some(LanguageModel(tuning_cost.base_model()), 0.005)
    ids = torch.randint(3, tuning_cost.VOCABULARY, (8, 64), generator=torch.Generator().manual_seed(0))
    sparse = peft.ShiraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")
    arms = {
        "delta": tuning_cost.delta_arm(neurons)[0],
        "lora": tuning_cost.adapter_arm(tuning_cost.LORA),
        "shira": tuning_cost.adapter_arm(sparse),
    }
    losses = {name: float(arm.model(input_ids=ids, labels=ids).loss.detach()) for name, arm in arms.items()}
    for name, loss in losses.items():
        agree(name, abs(loss / losses["delta"] - 1))
    seconds = interleaved(
        {name: lambda arm=arm: arm.step(ids) for name, arm in arms.items()},
        options.repetitions,
        CLOCKS[options.clock],
    )
    peaks = {name: arm.peak(ids, own_parameters=True) for name, arm in arms.items()}
    trained = {name: arm.n_parameters for name, arm in arms.items()}
    rows = [
        Row("training step of deltas ÷ PEFT LoRA of rank 16", ratio(seconds, "delta", "lora"), 0.9),
        Row("the same, PEFT SHiRA with as many entries as LoRA", ratio(seconds, "shira", "lora")),
        Row(
            "peak memory of a step of deltas ÷ PEFT LoRA of rank 16",
            tuning_cost.exactly(peaks["delta"] / peaks["lora"]),
            0.8,
        ),
        Row("the same, PEFT SHiRA", tuning_cost.exactly(peaks["shira"] / peaks["lora"])),
    ]
    detail = {
        "seconds": medians(seconds),
        "peak_bytes": peaks,
        "trained_parameters": trained,
        "first_loss": losses,
    }
    return Part(rows, detail)


PARTS: dict[str, Callable[[LanguageModel, argparse.Namespace], Part]] = {
    "statistics": statistics,
    "patching": patching,
    "tokens": tokens,
    "importance": importance,
    "tuning": tuning,
}


def main() -> None:
    """Measure, print and write a record for each part."""
    asked = parser(__doc__ or "")
    asked.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS))
    asked.add_argument("--sequences", type=int, default=8)
    asked.add_argument("--batch-size", type=int, default=8)
    asked.add_argument("--prompt", type=int, default=32)
    asked.add_argument("--new", type=int, default=32)
    asked.add_argument(
        "--paper2",
        nargs=2,
        metavar=("PYTHON", "CHECKOUT"),
        help="interpreter and folder of the public code of paper 2",
    )
    options = asked.parse_args()
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    lm = load(MODEL, dtype="float32", offline=True)
    options.out /= "peers"
    for name in options.only:
        load_before, start = os.getloadavg()[0], time.monotonic()
        part = PARTS[name](lm, options)
        detail = {**part.detail, "versions": {package: metadata.version(package) for package in PINNED}}
        # A record names no folder of the machine.
        settings = argparse.Namespace(**{**vars(options), "paper2": bool(options.paper2)})
        finish(name, part.rows, settings, detail, load_before)
        print(f"{name} took {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
