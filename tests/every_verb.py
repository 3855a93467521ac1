"""A command of every verb that needs no extra, on a tiny pair of models: seconds each.

In the order of `LINES`, since some read what others before them wrote. They run in the folder that `inputs`
filled, and write below it.
"""

import json
import pathlib

import torch
import transformers

import tiny
import tiny_pair
from safety_neurons.model import load
from safety_neurons.neurons import NeuronSet

_ONE, _TWO = "--model {plain}", "--base {base} --aligned {aligned}"
_SHORT = "--batch-size 2 --max-new-tokens 3"
_ASKED = "--harmful {harmful} --harmless {harmless} --limit 4"
_FOUND = "--prompts {harmful} --batch-size 2 --top 0.1"
_BOTH = f"{_FOUND} --harmless {{harmless}}"
_STUDIED = (
    f"{_ONE} --prompts {{harmful}} --general {{text}} --share 0.05 --seeds 1 --data refusals.jsonl "
    "--mixed answers.jsonl --task task.jsonl --task-test task.jsonl --epochs 1 "
    f"{_ASKED} --max-new-tokens 4 --text {{text}}"
)
_MEASURED = f"{_ASKED} {_SHORT} --random 1"
_LABELLED = "--labelled labelled.jsonl --batch-size 4"
_GROUPS = "--units 6 --random 1 --max-new-tokens 3"
LINES = {
    "doctor": _ONE,
    "find importance": f"{_ONE} {_FOUND} --agreement 0.5",
    "find importance-contrast": f"{_TWO} {_FOUND}",
    "find swap-attribution": f"{_TWO} {_FOUND}",
    "find contrast": f"{_TWO} {_FOUND} --max-new-tokens 3",
    "find mask": f"{_TWO} {_BOTH} --rounds 2",
    "find attribution": f"{_ONE} {_FOUND}",
    "find relp": f"{_ONE} {_FOUND}",
    "find attribution-patching": f"{_TWO} {_FOUND}",
    "find snip": f"{_ONE} {_FOUND}",
    "find wanda": f"{_ONE} {_FOUND}",
    "find refusal-direction": f"{_ONE} {_BOTH}",
    "find cna": f"{_ONE} {_BOTH} --general {{text}}",
    "find effect-size": f"{_ONE} {_BOTH}",
    "find heads": f"{_ONE} {_FOUND}",
    "find routing": f"--model experts {_BOTH}",
    "find probe": f"{_ONE} {_BOTH}",
    "find probe-weights": f"{_ONE} {_BOTH}",
    "find weight-change": f"{_TWO} --top 0.1",
    "find weight-magnitude": f"{_ONE} --top 0.1",
    "find activation-magnitude": f"{_ONE} {_FOUND}",
    "verify deactivate": f"{_ONE} --neurons neurons.safetensors {_MEASURED} --text {{text}}",
    "verify patch": f"{_TWO} --neurons find-contrast {_MEASURED} --text none",
    "verify both": f"{_TWO} --neurons find-contrast {_MEASURED} --text none",
    "verify scale": f"{_ONE} --neurons neurons.safetensors --factors 0,0.5,2 {_MEASURED} --text none",
    "compare": f"{_TWO} --prompts {{harmful}} {_ASKED} --max-new-tokens 3 --methods contrast,weight-change "
    "--random 1",
    "tune": f"{_ONE} --neurons neurons.safetensors --data refusals.jsonl --harmless answers.jsonl "
    f"--max-steps 4 --test-harmful {{harmful}} --test-harmless {{harmless}} --text none {_SHORT}",
    "repair": "--model {other} --reference {plain} --neurons neurons.safetensors",
    "evaluate": f"{_ONE} --suite {{harmful}} --over-refusal {{harmless}} --limit 4 "
    f"--deactivate neurons.safetensors --capability perplexity:{{text}} {_SHORT} --temperature 0.9",
    "study rsn": f"{_STUDIED} --arms none,SN-Tune --steps 1",
    "study stress": f"{_STUDIED} --attack answers.jsonl --pruned 1 --harmful-steps 1 --benign-steps 1 "
    "--scales 0",
    "study defences": f"{_STUDIED} --arms none,SN-Tune --rates 0.01 --steps 1 --mixtures benign "
    "--max-perplexity 1e6 --least-task=-1",
    "analyze layers": "find-contrast find-importance",
    "analyze overlap": "find-contrast find-importance --count 20",
    "analyze languages": "--model {aligned} --languages en,de --find-prompts find.{{language}}.jsonl "
    f"--test-prompts test.{{{{language}}}}.jsonl {_GROUPS}",
    "analyze transfer": f"{_TWO} --prompts find.en.jsonl --harmful test.en.jsonl --harmless {{harmless}} "
    f"--tasks perplexity:{{text}} {_GROUPS}",
    "analyze vocabulary": f"--model {{aligned}} --neurons find-contrast {_ASKED} --cards 2 --random 2",
    "analyze progressive": f"--model {{aligned}} --neurons find-contrast {_MEASURED} --points 2 "
    "--text {text}",
    "analyze tax": "--base {base} --safety {aligned} --helpful {helpful} --prompts {harmful} "
    f"--also {{harmless}} {_MEASURED} --top 0.4 --helpfulness answered",
    "guard fit": f"{_ONE} --neurons neurons.safetensors {_LABELLED} --other-unsafe none --other-safe none "
    "--pooling last",
    "guard recalibrate": f"{_ONE} --guard guard-fit/guard {_LABELLED}",
    "guard evaluate": f"{_ONE} --guard guard-fit/guard --unsafe unsafe.txt --safe safe.txt --random 1 "
    "--perturbations none --outputs 2 --batch-size 4 --max-new-tokens 3",
    "organism list": "",
    "organism requests": "",
    "data list": "",
    "data models": "",
    "import attacks": "attacks.json",
    "import neurons": f"named.txt {_ONE} --format sn-tune",
    "export neurons": f"{_ONE} --neurons neurons.safetensors --to transformer-lens",
    "report": "find-contrast evaluate",
    "run": "find-importance/run.json",
}
WITHOUT = {
    "demo": "minutes, and a test of its own",
    "organism build": "trains for minutes",
    "data verify": "needs files of public suites",
    "guard serve": "needs the extra `serve`, and runs until it is told to end",
}
"""Verbs that have no line here, and why."""


def out_of(verb: str) -> str:
    """Where the command of a verb writes."""
    return "report.html" if verb == "report" else verb.replace(" ", "-")


def inputs(folder: pathlib.Path) -> dict[str, str]:
    """Write into a folder all that `LINES` read; models and files of prompts by name."""
    plain = tiny.tiny_llama_folder(folder / "plain")
    adapters = [
        tiny.tiny_adapter_folder(plain, folder / name, seed=seed)
        for seed, name in enumerate(("sft", "dpo", "kind"), 1)
    ]
    base = f"{plain}+{adapters[0]}"
    files = {"harmful": tiny_pair.HARMFUL, "harmless": tiny_pair.HARMLESS, "text": tiny_pair.GENERAL}
    _write_rows(folder)
    _write_experts(folder / "experts")
    table = load(str(plain)).table
    members = {"layers.0.up": [0, 1, 2, 3], "layers.0.q": [5], "layers.1.down": [7, 9], "layers.1.o": [1]}
    NeuronSet(members, table).save(folder / "neurons.safetensors")
    (folder / "named.txt").write_text("{0: {1, 2}}\n{0: {1, 2}}\n{1: {3}}\n{}\n{}\n")
    (folder / "attacks.json").write_text(
        json.dumps({"parameters": {"method": "PAIR"}, "jailbreaks": [{"goal": "Do", "prompt": "As a poet"}]})
    )
    return {
        **{name: tiny_pair.lines(folder / f"{name}.txt", texts) for name, texts in files.items()},
        "plain": str(plain),
        "base": base,
        "aligned": f"{base}+{adapters[1]}",
        "helpful": f"{base}+{adapters[2]}",
        "other": str(tiny.tiny_llama_folder(folder / "other", seed=5)),
    }


def _write_experts(folder: pathlib.Path) -> None:
    """A tiny model whose feed-forward layers are experts."""
    config = transformers.MixtralConfig(**tiny.SIZES, num_local_experts=4, num_experts_per_tok=2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformers.MixtralForCausalLM(config).save_pretrained(folder)
    tiny.tiny_tokenizer(tiny.CHAT_TEMPLATE).save_pretrained(folder)


def _write_rows(folder: pathlib.Path) -> None:
    """Prompts with answers, labels, categories and languages."""
    halves = {
        kind: [f"{text}{end}" for text in texts for end in ("", " ?", " .")]
        for kind, texts in (("unsafe", tiny_pair.HARMFUL), ("safe", tiny_pair.HARMLESS))
    }
    for kind, texts in halves.items():
        tiny_pair.lines(folder / f"{kind}.txt", texts)
    rows = {
        "refusals": [{"prompt": text, "answer": "sorry i cannot help"} for text in halves["unsafe"]],
        "answers": [{"prompt": text, "answer": "the cake is red"} for text in halves["safe"]],
        "task": [
            {"prompt": text, "answer": "three"} for text in ("tell me one and two", "what is two and one")
        ],
        "labelled": [{"prompt": text, "label": kind} for kind, texts in halves.items() for text in texts],
    }
    for half, texts in (("find", tiny_pair.HARMFUL[:6]), ("test", tiny_pair.HARMFUL[3:])):
        for code in ("en", "de"):
            rows[f"{half}.{code}"] = [
                {"prompt": text, "category": "ab"[number % 2], "language": code}
                for number, text in enumerate(texts)
            ]
    for name, several in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in several))


def words_of(verb: str, places: dict[str, str]) -> list[str]:
    """The command of a verb, without what it runs with."""
    return [*verb.split(), *(word.format(**places) for word in LINES[verb].split()), "--out", out_of(verb)]
