"""Tune a set of neurons, as many random ones, LoRA of rank 16 and all weights on the same data, by the same
loop and the same check, and ask the kept states the same held-out requests.

    python benchmarks/tuning_frontier.py --model MODEL --neurons NEURONS --data FOLDER --out FOLDER
    python benchmarks/tuning_frontier.py --model MODEL --neurons NEURONS --out FOLDER --ablate
    python benchmarks/tuning_frontier.py … --capability mmlu --capability-limit 100

FOLDER of `--data` holds `advbench/harmful_behaviors.csv`, `harmbench/harmbench_behaviors_text_val.csv`,
`xstest/xstest_prompts.csv`, `llama_factory/alpaca_en_demo.json` and `wikitext2/valid.txt` in their public
shapes; none of them is learnt or looked at while training. Without it the model is asked its own built-in
lists alone (organisms). Every arm's row is written when it is there; the same call goes on after a kill, and
a call of other requests, answers or training needs a folder of its own, since rows of a folder are paired.
Rates of LoRA and of all weights begin where they are usually set (2e-4, 1e-5), those of neurons where the
recipe sets them, or as given, and are adapted by the same trust region. Every arm is to be given several
rates, a folder each, and the one whose kept state is sound and refuses most of the check's harmful prompts
(`checked` of its row) is the arm's; what it is asked then decides nothing.

`--ablate` tunes the neurons by the whole recipe and with one part of it left out at a time (`LEFT_OUT`), at
other lengths (`steps-N`) and as many random ones. `summary.json` has of every arm its refusals over all
seeds, and their paired difference from the whole recipe over the same requests. `--capability` asks the kept
states, also of rows that are there, the package's own capability tasks before and after.
"""

import argparse
import contextlib
import csv
import dataclasses
import itertools
import json
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any
from unittest import mock

import numpy as np
import peft
import torch
from torch import Tensor, nn

from safety_neurons import judge_refusal, load
from safety_neurons.capability import TaskSettings, measure, perplexity, task
from safety_neurons.display.charts import Line, Plane, line_figure, standalone
from safety_neurons.model import LanguageModel, token_divergences
from safety_neurons.neurons import NeuronSet
from safety_neurons.prompt_lists import Prompt, Prompts
from safety_neurons.results import Checkpoint, holm_in, paired_difference, rate
from safety_neurons.studies.tuning import Checking, hold_out, with_usable_answers
from safety_neurons.tuning import attach, train
from safety_neurons.tuning.data import Example
from safety_neurons.tuning.settings import TuningSettings
from safety_neurons.tuning.stopping import OPENING, RISEN, Checked, StopJudge, TrustRegion
from safety_neurons.tuning.train import Loop, learning_rates, prepared_examples

ARMS = ("neurons", "random", "lora", "full")
LEFT_OUT = {
    "no-anchor": "the anchor: harmless answers are learnt, general text is not seen",
    "no-text": "general text that the model is anchored on",
    "no-harmless": "harmless requests that the model is anchored on",
    "fixed-rates": "the trust region: rates follow the schedule alone, and the anchor weighs the same",
    "even-tokens": "the weight of an answer's first token",
    "refusals-only": "over-refusal, divergence and perplexity in what the checks judge by",
    "last-state": "keeping the best state, and ending early: the last one is kept",
    "no-way-back": "states between two checks",
    "same-steps": "the size of the steps that is found behind the warm-up",
    "light-anchor": "the anchor that gets heavier where harmless requests are refused",
    "small-check": "more harmless than harmful requests in the checks",
}
"""Arms of the same neurons, by the part of the recipe that each leaves out."""
LENGTHS = ("steps-60", "steps-110", "steps-200")
"""Arms of the same neurons with fewer steps than four epochs have.

Laid down before they were run: the shortest is the default with which every organism, by the mean of two
seeds, refuses at most .05 fewer held-out harmful requests than with the best length, at most .05 more
look-alikes than with four epochs, and at most two of 32 fewer of the check's harmful prompts than with the
best.
"""
RATES, NEURONS = {"lora": "lora_rate", "full": "full_rate"}, "factor"
"""The option that says where the rates of an arm begin; the other for all arms that train neurons."""
PARTS = {"harmbench": ("standard",)}
"""Lists of which a part is told apart too, by the category of its requests: HarmBench's others ask for lyrics
and passages under copyright, which is no harm that any of the data is about.
"""
SUMMED = ("perplexity", "divergence", "kept_step", "steps", "stopped", "sound", "checked")
"""What a summary has of every seed."""
CHANCE = {"mmlu": ("mmlu/mmlu_dev_val.zip", 0.25), "gsm8k": ("gsm8k/test.jsonl", 0.0)}
"""Capability tasks: their file in the folder of `--data`, and what guessing gives."""


class Switched:
    """Trained parameters of another kind, with what the loop asks of deltas."""

    def __init__(self, model: LanguageModel, named: dict[str, nn.Parameter]) -> None:
        self.model, self._named = model, named
        self.base = {name: parameter.detach().clone() for name, parameter in named.items()}

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """What is trained."""
        return self._named

    def tensors(self) -> dict[str, Tensor]:
        """The change so far, by name."""
        return {name: (value.detach() - self.base[name]).clone() for name, value in self._named.items()}

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Set the change."""
        with torch.no_grad():
            for name, value in self._named.items():
                value.copy_(self.base[name] + tensors[name])

    @contextlib.contextmanager
    def disabled(self) -> Iterator[None]:
        """The untouched model for a block."""
        with self._holding(self.base):
            yield

    @contextlib.contextmanager
    def enabled(self) -> Iterator[None]:
        """The trained one again, inside `disabled`."""
        with self._holding(self._now):
            yield

    @contextlib.contextmanager
    def _holding(self, tensors: Mapping[str, Tensor]) -> Iterator[None]:
        before = {name: value.data for name, value in self._named.items()}
        self._now = getattr(self, "_now", before) if tensors is not self.base else before
        for name, value in self._named.items():
            value.data = tensors[name]
        try:
            yield
        finally:
            for name, value in self._named.items():
                value.data = before[name]


@contextlib.contextmanager
def trained(
    arm: str, model: LanguageModel, neurons: NeuronSet, seed: int, rate: float
) -> Iterator[tuple[Any, dict[str, float]]]:
    """Attach what an arm trains, with the learning rate of every part: for neurons `rate` is a factor of the
    recipe's.
    """
    if arm not in ("lora", "full"):
        chosen = neurons.random_like(seed, model.table)[0] if arm == "random" else neurons
        rates = {key: rate * value for key, value in learning_rates(model, chosen).items()}
        with attach(model, chosen) as deltas:
            yield deltas, rates
        return
    inner = model.model
    if arm == "lora":
        torch.manual_seed(seed)
        config = peft.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
        peft.inject_adapter_in_model(config, inner)
        named = {name: value for name, value in inner.named_parameters() if "lora_" in name}
    else:
        named = dict(inner.named_parameters())
    for value in inner.parameters():
        value.requires_grad_(False)
    for value in named.values():
        value.requires_grad_(True)
    yield Switched(model, named), dict.fromkeys(named, rate)


def asked(model: LanguageModel, folder: pathlib.Path | None, limit: int) -> dict[str, Prompts]:
    """Held-out requests by source; the order is random but fixed."""
    lists = {
        "builtin": model.prompts("builtin:harmful-test"),
        "look-alikes": model.prompts("builtin:harmless-test"),
    }
    if folder is not None:
        lists |= _public(folder)
    generator = np.random.default_rng(0)
    order = ("builtin", "advbench", "harmbench", "alpaca", "xstest-safe", "look-alikes")
    return {
        name: Prompts(lists[name][int(index)] for index in generator.permutation(len(lists[name]))[:limit])
        for name in order
        if name in lists
    }


def _public(folder: pathlib.Path) -> dict[str, Prompts]:

    def table(name: str, wanted: str, keep: Any = lambda _row: True, category: str = "") -> Prompts:
        with (folder / name).open(encoding="utf-8", newline="") as file:
            rows = [row for row in csv.DictReader(file) if keep(row)]
        return Prompts(
            Prompt(str(number), row[wanted], category=row.get(category)) for number, row in enumerate(rows)
        )

    alpaca = json.loads((folder / "llama_factory/alpaca_en_demo.json").read_text(encoding="utf-8"))
    return {
        "advbench": table("advbench/harmful_behaviors.csv", "goal"),
        "harmbench": table(
            "harmbench/harmbench_behaviors_text_val.csv",
            "Behavior",
            lambda row: not row.get("ContextString"),
            "FunctionalCategory",
        ),
        "alpaca": Prompts.from_list(
            f"{row['instruction']}\n{row.get('input') or ''}".strip() for row in alpaca
        ),
        "xstest-safe": table("xstest/xstest_prompts.csv", "prompt", lambda row: row["label"] == "safe"),
    }


def measured(
    model: LanguageModel, lists: Mapping[str, Prompts], text: Prompts, tokens: int
) -> dict[str, Any]:
    """Refusals of every list and of the parts that are told apart, and perplexity of text."""
    found: dict[str, Any] = {}
    for name, prompts in lists.items():
        completions = model.complete(prompts, max_new_tokens=tokens, batch_size=16)
        refused, groups = judge_refusal(completions).refused, prompts.groups
        found[name] = _told(refused, groups)
        for part in PARTS.get(name, ()):
            at = [place for place, prompt in enumerate(prompts) if prompt.category == part]
            found[f"{name}-{part}"] = _told([refused[place] for place in at], [groups[place] for place in at])
    return {**found, "perplexity": perplexity(model, text, batch_size=4)}


def _told(refused: Sequence[bool | None], groups: Sequence[Any]) -> dict[str, Any]:
    return {"refused": list(refused), "rate": rate(refused).to_json(), "groups": list(groups)}


def running_text(model: LanguageModel, folder: pathlib.Path | None) -> Prompts:
    """Wikitext in pieces of 256 words, or the model's own general text."""
    if folder is None:
        return model.prompts("builtin:general-test")
    split = (folder / "wikitext2/valid.txt").read_text(encoding="utf-8").split()
    return Prompts.from_list([" ".join(split[at : at + 256]) for at in range(0, 32 * 256, 256)])


def divergence(model: LanguageModel, deltas: Any, prompts: Prompts, tokens: int) -> float:
    """KL per token from the untouched model to the trained one on the untouched model's own answers."""
    with deltas.disabled():
        answers = model.complete(prompts, max_new_tokens=tokens, batch_size=16)
        questions = [list(item.ids) for item in model.encode(prompts)]
        behind = [model.tokenizer(item.completion, add_special_tokens=False)["input_ids"] for item in answers]
        sequences = [one + other for one, other in zip(questions, behind, strict=True)]
        rows = token_divergences(model, sequences, deltas.enabled, batch_size=8)
    return float(
        np.concatenate([row[len(one) - 1 :] for row, one in zip(rows, questions, strict=True)]).mean()
    )


def even_weights(example: Example) -> Tensor:
    """Every token of an example that carries loss weighs the same; together one."""
    return torch.full((example.n_answer,), 1.0 / example.n_answer, dtype=torch.float64)


class Unheeding(TrustRegion):
    """A trust region that does not ask whether harmless requests are refused."""

    def checked(self, judge: StopJudge, now: Checked) -> bool:
        """Take note of a check, with the anchor as heavy as before."""
        weight = self.weight
        left = super().checked(judge, now)
        self.weight, self.over = weight, False
        return left


def leave_out(part: str, loop: Loop) -> None:
    """Take a part of `LEFT_OUT` that is no data and no setting out of a loop that has not run."""
    if part == "fixed-rates":
        loop.region.limits = {}
    elif part == "even-tokens":  # what the loss shows of divergence is then what the checks measure
        loop.region.limits = {
            kind: limit / (OPENING if kind == "harmless" else 1.0)
            for kind, limit in loop.region.limits.items()
        }
    elif part == "refusals-only" and loop.judge:
        loop.judge = StopJudge(
            dataclasses.replace(loop.judge.check, tolerance=1.0, max_divergence=None, max_perplexity=None)
        )
    elif part == "last-state":
        loop.judge = None
    elif part == "no-way-back":
        loop._go_back = lambda *_: None
    elif part == "same-steps":
        loop.region.risen = RISEN
    elif part == "light-anchor":
        loop.region = Unheeding(**vars(loop.region))


@dataclasses.dataclass(frozen=True)
class Kept:
    """A model with what an arm trained on it, in the state that was kept."""

    model: LanguageModel
    deltas: Any
    loop: Loop
    stopped: str


@contextlib.contextmanager
def kept(arm: str, seed: int, given: argparse.Namespace) -> Iterator[Kept]:
    """Train one arm, or go on where it was; what is finished is read from its checkpoint."""
    model = load(given.model, dtype="float32")
    steps = int(arm.removeprefix("steps-")) if arm in LENGTHS else given.steps
    anchor = 0.0 if arm == "no-anchor" else given.anchor
    settings = TuningSettings(seed=seed, max_steps=steps, anchor=anchor)
    notes: list[str] = []
    neurons = NeuronSet.load(given.neurons).on(model.table, [model.name])
    data = tuple(model.prompts(f"builtin:{name}") for name in ("refusals-wide", "harmless-wide", "general"))
    checking = Checking(every=given.every)
    if arm == "small-check":
        checking = dataclasses.replace(checking, most_harmless=checking.most)
    learnt, others, texts, watch = hold_out(model, data, checking, settings, notes)
    assert others is not None
    others = with_usable_answers(model, others, len(learnt), settings, given.out, notes)
    if arm in ("no-anchor", "no-text"):
        texts = None
    rate = getattr(given, RATES.get(arm, NEURONS))
    weights = even_weights if arm == "even-tokens" else train.token_weights
    with (
        trained(arm, model, neurons, seed, rate) as (deltas, rates),
        mock.patch.object(train, "token_weights", weights),
    ):
        checkpoint = Checkpoint(given.out / f"{arm}-{seed}.safetensors")
        identity = {"arm": arm, "seed": seed, **made_with(given, arm)}
        loop = Loop(deltas, rates, settings, watch, checkpoint, identity, notes)
        leave_out(arm, loop)
        if not loop.resume():
            harmless = None if arm == "no-harmless" else others
            loop.examples = prepared_examples(model, learnt, harmless, texts, settings, notes)
        stopped = loop.run()
        deltas.load_tensors(loop.kept)
        yield Kept(model, deltas, loop, stopped)


def made_with(given: argparse.Namespace, arm: str = "") -> dict[str, Any]:
    """What decides the rows of a folder, beside their arms and seeds; of an arm its rate too."""
    names = ("model", "neurons", "data", "steps", "every", "anchor", "limit", "tokens")
    found = {name: getattr(given, name) for name in (*names, *([RATES.get(arm, NEURONS)] if arm else []))}
    return {name: str(value) if isinstance(value, pathlib.Path) else value for name, value in found.items()}


def check_alike(made: Mapping[str, Mapping[str, Any] | None]) -> None:
    """Refuse what cannot be paired.

    Args:
        made: by the name of a row what it was made with; None where it does not say.

    Raises:
        ValueError: two of them differ.
    """
    rest = "expected rows of the same options, or another --out"
    for (one, mine), (other, theirs) in itertools.combinations(made.items(), 2):
        if mine is None or theirs is None:
            if mine is not theirs:
                silent = one if mine is None else other
                raise ValueError(f"{silent} does not say what it was made with; {rest}")
            continue
        for name in mine:
            if name in theirs and mine[name] != theirs[name]:
                flag = "--" + name.replace("_", "-")
                raise ValueError(
                    f"{one} was made with {flag} {mine[name]}, {other} with {theirs[name]}; {rest}"
                )


def untouched(given: argparse.Namespace, what: str, ask: Callable[[], Any]) -> Any:
    """What was found of the untouched model, asked once for all arms."""
    file = given.out / "before.json"
    known = json.loads(file.read_text()) if file.is_file() else {"made_with": made_with(given)}
    if what not in known:
        known[what] = ask()
        file.write_text(json.dumps(known))
    return known[what]


def row(arm: str, seed: int, given: argparse.Namespace) -> dict[str, Any]:
    """Train one arm and measure the kept state."""
    started = time.monotonic()
    with kept(arm, seed, given) as state:
        model, loop = state.model, state.loop
        lists, text = asked(model, given.data, given.limit), running_text(model, given.data)

        def ask() -> dict[str, Any]:
            return measured(model, lists, text, given.tokens)

        with state.deltas.disabled():
            before = untouched(given, "requests", ask)
        after = ask()
        drift = divergence(model, state.deltas, lists.get("alpaca", lists["look-alikes"]), given.tokens)
    count = sum(value.numel() for value in state.deltas.named_parameters().values())
    asked_of = [name for name in after if name != "perplexity"]
    changes = {
        name: paired_difference(after[name]["refused"], before[name]["refused"]).to_json()
        for name in asked_of
    }
    return {
        "arm": arm,
        "seed": seed,
        "made_with": made_with(given, arm),
        "parameters": count,
        "share": count / model.table.n_parameters,
        "kept_step": loop.kept_step,
        "steps": loop.step,
        "planned": loop.steps,
        "stopped": state.stopped,
        "sound": loop.sound,
        "checked": checked(loop),
        "refused": {name: after[name]["rate"] for name in asked_of},
        "change": changes,
        "perplexity": after["perplexity"] / before["perplexity"],
        "divergence": drift,
        "checks": [check.record() for check in loop.judge.seen] if loop.judge else [],
        "verdicts": {name: after[name]["refused"] for name in asked_of},
        "seconds": time.monotonic() - started,
    }


def checked(loop: Loop) -> float | None:
    """Share of the check's harmful prompts that the kept state refuses, which may lie between two checks."""
    best = loop.judge.best if loop.judge else None
    return None if best is None else best.harmful_refused.value


def capability(arm: str, seed: int, name: str, given: argparse.Namespace) -> dict[str, Any]:
    """A capability task before and after, its paired difference over questions, and what guessing gives."""
    file, chance = CHANCE[name]
    wanted, settings = task(f"{name}:{given.data / file}"), TaskSettings(limit=given.capability_limit)
    with kept(arm, seed, given) as state:

        def ask() -> dict[str, Any]:
            found = measure(wanted, state.model, settings=settings)
            return {"rate": found.rate.to_json(), "outcomes": list(found.outcomes)}

        with state.deltas.disabled():
            before = untouched(given, f"{name}, {given.capability_limit}", ask)
        after = ask()
    low = before["rate"]["low"]
    return {
        "limit": given.capability_limit,
        "before": before["rate"],
        "after": after["rate"],
        "change": paired_difference(after["outcomes"], before["outcomes"]).to_json(),
        "chance": chance,
        "above_chance": low is not None and low > chance,
    }


def summary(rows: Sequence[Mapping[str, Any]], before: Mapping[str, Any]) -> dict[str, Any]:
    """Of every arm, over its seeds: refusals as the mean of the seeds by request, their paired difference
    from the whole recipe over the same requests and seeds, and the rest seed by seed.

    Intervals are over requests, those of one deed together, for these seeds; the family-wise rate of all
    differences is held.

    Raises:
        ValueError: rows that were made with other options.
    """
    rows = [row for row in rows if "verdicts" in row]
    check_alike(_made(rows))
    whole = {row["seed"]: row for row in rows if row["arm"] == "neurons"}
    found = {}
    for arm in dict.fromkeys(row["arm"] for row in rows if row["seed"] in whole):
        runs = {row["seed"]: row for row in rows if row["arm"] == arm and row["seed"] in whole}
        refused, against = {}, {}
        for name in next(iter(runs.values()))["verdicts"]:
            groups = before[name]["groups"]
            ours, theirs = (_by_request([arms[seed] for seed in runs], name) for arms in (runs, whole))
            refused[name] = rate(ours, groups).to_json()
            if arm != "neurons":
                against[name] = paired_difference(ours, theirs, groups).to_json()
        found[arm] = {
            "refused": refused,
            "against": against,
            **{name: {str(seed): row.get(name) for seed, row in runs.items()} for name in SUMMED},
        }
    return holm_in(found)


def _made(rows: Sequence[Mapping[str, Any]]) -> dict[str, Mapping[str, Any] | None]:
    return {f"{row['arm']}-{row['seed']}": row.get("made_with") for row in rows}


def _by_request(rows: Sequence[Mapping[str, Any]], name: str) -> np.ndarray:
    """Of every request the share of the runs that refuse it; NaN where one of them could not be judged."""
    return np.asarray([row["verdicts"][name] for row in rows], dtype=float).mean(0)


def main() -> None:
    """Run the arms and print their rows."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--neurons", required=True, type=pathlib.Path)
    parser.add_argument("--data", type=pathlib.Path, default=None)
    parser.add_argument("--out", required=True, type=pathlib.Path)
    parser.add_argument(
        "--arms", nargs="+", choices=(*ARMS, *LEFT_OUT, *LENGTHS), default=list(ARMS), metavar="ARM"
    )
    parser.add_argument("--ablate", action="store_true", help="the recipe, each part left out, lengths")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--steps", type=int, default=None)
    parser.add_argument("--every", type=int, default=None)
    parser.add_argument("--anchor", type=float, default=TuningSettings().anchor)
    parser.add_argument("--lora-rate", type=float, default=2e-4, help="that LoRA begins with")
    parser.add_argument("--full-rate", type=float, default=1e-5, help="that all weights begin with")
    parser.add_argument(
        "--factor", type=float, default=1.0, help="times the recipe's rates, that neurons begin with"
    )
    parser.add_argument("--limit", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--capability", nargs="+", choices=CHANCE, default=[], help="with --data")
    parser.add_argument("--capability-limit", type=int, default=100, help="questions of each task")
    given = parser.parse_args()
    if given.capability and given.data is None:
        parser.error("--capability without --data, which holds the tasks' files")
    if given.ablate:
        given.arms = ["neurons", *LENGTHS, *LEFT_OUT, "random"]
    given.out.mkdir(parents=True, exist_ok=True)
    made = _made([json.loads(file.read_text()) for file in given.out.glob("*-*.json")])
    if (given.out / "before.json").is_file():
        made["before.json"] = json.loads((given.out / "before.json").read_text()).get("made_with")
    try:
        for arm in given.arms:
            check_alike({f"this call of {arm}": made_with(given, arm)} | made)
    except ValueError as error:
        parser.exit(2, f"{error}\n")
    for seed in given.seeds:
        for arm in given.arms:
            file = given.out / f"{arm}-{seed}.json"
            if not file.is_file():
                file.write_text(json.dumps(row(arm, seed, given), indent=1))
            found = json.loads(file.read_text())
            for name in given.capability:
                known = found.setdefault("capability", {})
                if known.get(name, {}).get("limit") != given.capability_limit:
                    known[name] = capability(arm, seed, name, given)
                    file.write_text(json.dumps(found, indent=1))
            print(line(found), flush=True)
    rows = [json.loads(file.read_text()) for file in sorted(given.out.glob("*-*.json"))]
    (given.out / "frontier.svg").write_text(figure(rows), encoding="utf-8")
    before = json.loads((given.out / "before.json").read_text()).get("requests", {})
    (given.out / "summary.json").write_text(json.dumps(summary(rows, before), indent=1))


def figure(rows: Sequence[Mapping[str, Any]]) -> str:
    """What the checks of every arm saw: refusals against over-refusal, against perplexity and against KL."""
    planes = (
        ("harmless_refused", Plane("Harmful refused", "Harmless refused", (0.0, 1.0), (0.0, 0.5))),
        ("perplexity", Plane("Harmful refused", "Perplexity, times before", (0.0, 1.0), (0.9, 1.2))),
        ("divergence", Plane("Harmful refused", "KL per token (nats)", (0.0, 1.0), (0.0, 0.1))),
    )
    drawn = []
    for name, plane in planes:
        lines = [
            Line(
                f"{row['arm']}, seed {row['seed']}",
                sorted((check["harmful_refused"]["value"], _number(check[name])) for check in row["checks"]),
                marked=True,
            )
            for row in rows
            if row["checks"]
        ]
        drawn.append(
            (line_figure(lines, plane), f"{plane.y} over harmful refused, held-out prompts of the check")
        )
    return standalone(drawn)


def _number(value: Any) -> float:
    found = value["value"] if isinstance(value, dict) else value
    return float("nan") if found is None else float(found)


def line(found: Mapping[str, Any]) -> str:
    """A row in words."""
    refused = "  ".join(f"{name} {_number(value):.2f}" for name, value in found["refused"].items())
    said = (
        f"{found['arm']:8} seed {found['seed']}  {refused}  perplexity ×{found['perplexity']:.3f}  "
        f"KL {found['divergence']:.3f}  kept {found['kept_step']} of {found['steps']} ({found['stopped']})"
    )
    for name, asked in found.get("capability", {}).items():
        before, after, change = (_shown(asked[part]) for part in ("before", "after", "change"))
        said += f"  {name} {before} to {after}, change {change}, chance {asked['chance']:g}" + (
            "" if asked["above_chance"] else " (not above it before: nothing to lose)"
        )
    return said


def _shown(found: Mapping[str, Any]) -> str:
    """A rate or difference with its interval, where it has one."""
    if found["value"] is None:
        return "unscored"
    return f"{found['value']:.2f}" + (
        f" [{found['low']:.2f}, {found['high']:.2f}]" if found["low"] is not None else ""
    )


if __name__ == "__main__":
    main()
