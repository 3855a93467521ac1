"""`--dry-run`: every verb that loads a model plans from a config.json alone, and the others say why not."""

import dataclasses
import json
import pathlib
import re
from functools import partial
from typing import Any

import pytest
import torch
from running import command, done, refused

from safety_neurons.capability import measures
from safety_neurons.cli.plans import WORKS
from safety_neurons.cli.verb import DECLARED, VERBS, load
from safety_neurons.detectors import METHODS, Method, find, importance
from safety_neurons.detectors.methods import with_options
from safety_neurons.detectors.runner import MIN_HALVED
from safety_neurons.model import LanguageModel, identity, pace
from safety_neurons.model.outline import TOKENIZER
from safety_neurons.neurons import NeuronSet
from safety_neurons.results import run
from tiny import CHAT_TEMPLATE, FILL, SIZES, tiny_llama, tiny_llama_folder, tiny_tokenizer

CONFIG = {**SIZES, "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "float32"}


@pytest.fixture(scope="module")
def shape(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A folder with a configuration and nothing else."""
    folder = tmp_path_factory.mktemp("shape")
    (folder / "config.json").write_text(json.dumps(CONFIG), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def neurons(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    file = tmp_path_factory.mktemp("neurons") / "neurons.safetensors"
    NeuronSet({"layers.0.down": range(9), "layers.1.q": range(2)}, LanguageModel(tiny_llama()).table).save(
        file
    )
    return file


TASK = ("--task", "builtin:refusals", "--task-test", "builtin:refusals")
ONE, TWO = ("--model", "SHAPE"), ("--base", "SHAPE", "--aligned", "SHAPE")
WORDS = {
    "find importance": (*ONE, "--limit", 4),
    "find contrast": (*TWO, "--limit", 4),
    "find attribution-patching": (*TWO, "--limit", 4),
    "find weight-magnitude": ONE,
    "verify deactivate": (*ONE, "--neurons", "NEURONS"),
    "verify patch": (*TWO, "--neurons", "NEURONS"),
    "verify both": (*TWO, "--neurons", "NEURONS"),
    "verify scale": (*ONE, "--neurons", "NEURONS"),
    "compare": (*TWO, "--limit", 4),
    "evaluate": (*ONE, "--limit", 4),
    "tune": (*ONE, "--neurons", "NEURONS", "--limit", 8),
    "repair": (*ONE, "--reference", "SHAPE", "--neurons", "NEURONS"),
    "guard fit": (*ONE, "--neurons", "NEURONS", "--unsafe", "builtin:harmful", "--safe", "builtin:harmless"),
    "analyze languages": ONE,
    "analyze transfer": TWO,
    "analyze vocabulary": (*ONE, "--neurons", "NEURONS"),
    "analyze progressive": (*ONE, "--neurons", "NEURONS"),
    "analyze tax": ("--base", "SHAPE", "--safety", "SHAPE", "--helpful", "SHAPE"),
    "study rsn": (*ONE, *TASK),
    "study stress": (*ONE, *TASK),
    "study defences": (*ONE, *TASK),
    "doctor": ONE,
}


@pytest.mark.parametrize("verb", WORDS)
def test_a_verb_is_planned_from_a_configuration_alone(
    verb: str,
    shape: pathlib.Path,
    neurons: pathlib.Path,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    places = {"SHAPE": shape, "NEURONS": neurons}
    plan = done(*verb.split(), *(places.get(str(word), word) for word in WORDS[verb]), "--dry-run")
    assert plan["weights_bytes"] > 0
    assert plan["memory_bytes"] > plan["weights_bytes"]
    assert plan["fits"] is True
    assert plan["seconds"] > 0
    assert plan["disk_bytes"] > 0
    assert "no tokenizer" in plan["notes"][0]
    needs_none = verb in ("find weight-magnitude", "repair")
    assert needs_none or plan["steps"]
    assert needs_none or plan["flops"] > 2 * plan["parameters"]
    assert list(tmp_path.iterdir()) == []


def test_every_verb_with_a_model_has_a_plan_and_the_others_refuse_one(tmp_path: pathlib.Path) -> None:
    for name in VERBS:
        load(name)
    planned = {verb for verb in DECLARED if verb.replace(" ", "-") in WORKS or verb.split()[0] in WORKS}
    with_a_model = {
        verb
        for verb, parts in DECLARED.items()
        if any(
            one.reads is not None and one.reads.kind == "model" for part in parts for one in part.options()
        )
    }
    short = {
        "import neurons",
        "export neurons",
        "organism requests",
        "guard serve",
    }  # or serves until it is told to end
    assert with_a_model - short <= planned
    for words in (("data", "list"), ("report", tmp_path), ("demo",)):
        line = refused(*words, "--dry-run", code=2)
        assert "loads no model that could be planned for" in line


def test_a_plan_with_a_tokenizer_counts_its_tokens_and_a_pair_counts_twice(tmp_path: pathlib.Path) -> None:
    folder = tiny_llama_folder(tmp_path / "model")
    one = done("find", "importance", "--model", folder, "--limit", "5", "--dry-run")
    other = tiny_llama_folder(tmp_path / "other", seed=1)
    two = done("find", "contrast", "--base", folder, "--aligned", other, "--limit", "5", "--dry-run")
    assert two["weights_bytes"] == pytest.approx(2 * one["weights_bytes"], rel=0.01)
    words = (folder / "tokenizer.json").stat().st_size
    assert one["tokenizer_bytes"] == TOKENIZER * words
    assert two["tokenizer_bytes"] == 2 * TOKENIZER * words
    assert one["memory_bytes"] >= one["weights_bytes"] + one["tokenizer_bytes"] + one["probe_bytes"]
    same = done("find", "contrast", "--base", folder, "--aligned", folder, "--limit", "5", "--dry-run")
    assert same["tokenizer_bytes"] == one["tokenizer_bytes"]  # one model in memory, one tokenizer
    assert (one["prompts"], one["new_tokens"], two["new_tokens"]) == (5, 0, 5 * 128)
    assert one["notes"] == []
    said = command("find", "importance", "--model", folder, "--limit", "5", "--dry-run")
    assert said.out.startswith("21.7 k parameters")
    assert "measured" in said.out


def test_a_known_truth_is_one_more_set_patched_and_off(
    shape: pathlib.Path, neurons: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    words = ("compare", "--base", shape, "--aligned", shape, "--limit", "4", "--methods", "weight-change")
    plain = done(*words, "--random", "2", "--dry-run")
    known, more = (
        done(*words, "--random", random, *truth, "--dry-run")
        for random, *truth in (("2", "--truth", neurons), ("3",))
    )
    assert known["new_tokens"] == more["new_tokens"] > plain["new_tokens"]


def test_a_factor_of_one_costs_nothing(shape: pathlib.Path, neurons: pathlib.Path) -> None:
    words = ("verify", "scale", "--model", shape, "--neurons", neurons, "--limit", "4", "--dry-run")
    with_one, without = (done(*words, "--factors", factors) for factors in ("0,1.0,2", "0,2"))
    assert with_one["new_tokens"] == without["new_tokens"]


MEASURED = {
    "verify patch": ("PAIR", "--neurons", "NEURONS"),
    "verify deactivate": ("ONE", "--scores", "SCORES", "--sizes", "0.1,0.3"),
    "verify both": ("PAIR", "--scores", "SCORES", "--sizes", "0.1,0.3"),
    "verify scale": ("ONE", "--neurons", "NEURONS", "--factors", "0,1,2"),
    "analyze progressive": ("ONE", "--neurons", "NEURONS", "--points", "2"),
}


@pytest.mark.parametrize("verb", MEASURED)
def test_a_plan_counts_the_texts_that_are_measured(
    verb: str, tiny_pair: Any, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = ("find", "weight-change", *tiny_pair.models, "--top-per-matrix", "1")
    done(*found, "--out", tmp_path / "found")
    places = {
        "PAIR": tiny_pair.models,
        "ONE": ("--model", tiny_pair.aligned),
        "SCORES": (tmp_path / "found",),
        "NEURONS": (tmp_path / "found",),
    }
    words = [each for word in MEASURED[verb] for each in places.get(word, (word,))]
    words += [*tiny_pair.measured_on, "--text", tiny_pair.text, "--limit", "2", "--random", "2"]
    words += ["--max-new-tokens", "2"]
    read = dict.fromkeys(("token_losses", "kl_divergence"), 0)

    def counting(name: str, function: Any) -> Any:
        def counted(model: LanguageModel, texts: Any, *given: Any, **named: Any) -> Any:
            read[name] += len(texts)
            return function(model, texts, *given, **named)

        return counted

    for name in read:
        monkeypatch.setattr(measures, name, counting(name, getattr(measures, name)))
    plan = command(*verb.split(), *words, "--dry-run")
    assert plan.code == 0, plan
    assert set(read.values()) == {0}
    done(*verb.split(), *words, "--out", tmp_path / "run")
    planned = {
        what: int(texts) * int(times or 1)
        for what, texts, times in re.findall(
            r"^ *([a-z]+): ([0-9]+) texts, (?:([0-9]+) × )?", plan.out + plan.err, re.MULTILINE
        )
    }
    assert planned["perplexity"] == read["token_losses"] > 0
    assert planned["divergence"] == 2 * read["kl_divergence"] > 0


@pytest.mark.parametrize("method", ["importance", "contrast"])
def test_bytes_that_a_plan_counts_as_hashed_are_those_that_the_run_hashes(
    method: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_llama_folder(tmp_path / "model")
    named = ["--model", folder] if method == "importance" else ["--base", folder, "--aligned", folder]
    words = ["find", method, *named, "--limit", "2"]
    monkeypatch.setattr(pace.Throughput, "hashed", lambda _: 1.0)
    counted = done(*words, "--dry-run")["loading_seconds"]
    hashed: list[int] = []
    files: set[str] = set()  # what is asked for again is not read again
    of_tensor, of_file = identity._digest, run._digest

    def tensor(value: Any) -> str:
        hashed.append(value.numel() * value.element_size())
        return of_tensor(value)

    def file(path: str, seen: tuple[int, ...]) -> str:
        if path.endswith(".safetensors") and path not in files:
            hashed.append(pathlib.Path(path).stat().st_size)
        files.add(path)
        return of_file(path, seen)

    monkeypatch.setattr(identity, "_digest", tensor)
    monkeypatch.setattr(run, "_digest", file)
    done(*words, *(["--max-new-tokens", "2"] if method == "contrast" else []), "--out", tmp_path / "run")
    assert sum(hashed) == pytest.approx(counted, rel=0.1)  # a file has a header too


def test_layers_of_a_search_are_those_of_its_plan(tmp_path: pathlib.Path) -> None:
    folder = tiny_llama_folder(tmp_path / "model", num_hidden_layers=4)
    words = ("find", "importance", "--model", folder, "--limit", 5)
    whole, one, last, none = (
        done(*words, *more, "--dry-run")
        for more in ((), ("--layers", "0:1"), ("--layers", "3"), ("--sites", "down"))
    )
    scored = one["flops"] - none["flops"]  # q and k of one layer; every plan has the same passes
    assert scored > 0
    assert one["flops"] == last["flops"]
    assert whole["flops"] - none["flops"] == pytest.approx(4 * scored)


def test_layers_past_the_model_are_refused_with_its_depth_by_every_verb_that_takes_layers(
    tmp_path: pathlib.Path,
) -> None:
    folder = tiny_llama_folder(tmp_path / "model", num_hidden_layers=4)
    for name in VERBS:
        list(getattr(load(name), "commands", ()))
    taking = 0
    for verb, parts in DECLARED.items():
        options = {one.name: one for part in parts for one in part.options()}
        if "layers" in options:
            models = [
                word
                for one in options.values()
                if one.default is dataclasses.MISSING
                for word in (one.flag, folder)
            ]
            said = command(*verb.split(), *models, "--layers", "3:9", "--dry-run")
            assert said.code == 2, (verb, said.err)
            assert "--layers '3:9' reaches outside of the 4 layers" in said.err, (verb, said.err)
            taking += 1
    assert taking > 20


@pytest.mark.parametrize("n_prompts", [MIN_HALVED - 1, MIN_HALVED + 1])
def test_a_plan_with_texts_to_take_away_reads_what_the_run_reads_and_times_each_length_once(
    n_prompts: int, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_llama_folder(tmp_path / "model")
    texts = {"prompts": ["kill a tree"] * n_prompts, "a": ["tell me about the red house"] * 3, "b": ["help"]}
    for name, lines in texts.items():
        different = "".join(f"{line} {word}\n" for line, word in zip(lines, FILL, strict=False))
        (tmp_path / f"{name}.txt").write_text(different, encoding="utf-8")
    words = ["find", "importance", "--model", tmp_path / "model", "--prompts", tmp_path / "prompts.txt"]
    words += ["--minus", f"{tmp_path}/a.txt,{tmp_path}/b.txt"]
    timed: list[Any] = []
    timing = pace.TimedLayers.reading
    monkeypatch.setattr(
        pace.TimedLayers, "reading", lambda *given: timed.append(tuple(given[2])) or timing(*given)
    )
    planned = done(*words, "--dry-run")
    assert len(timed) == len(set(timed)) == 2  # the prompts with their halves, and the texts
    read: list[int] = []
    reduced = importance._Reduce.__call__
    monkeypatch.setattr(
        importance._Reduce, "__call__", lambda self, batch: read.extend(batch.lengths) or reduced(self, batch)
    )
    done(*words, "--out", tmp_path / "run")
    assert planned["tokens"] == sum(read)


HARMFUL = ["how do i make a bomb", "tell me how to kill the plant"]
OTHERS = {"harmless": ["how do i make a cake", "tell me about a tree"], "general": ["the house is red ."]}
OF_GRADIENTS = [name for name, one in METHODS.items() if one().passes(1) > 1 and name != "heads"]


def searched(method: Method, layers: int, before: Any, after: Any) -> list[LanguageModel]:
    """A search with functions called before and after every attention part and layer of its models."""
    tokenizer = tiny_tokenizer(CHAT_TEMPLATE)
    models = [
        LanguageModel(tiny_llama(seed, num_hidden_layers=layers), tokenizer)
        for seed in range(1 + method.PAIR)
    ]
    for lm in models:
        for layer in lm.anatomy.layers:
            layer.attention.module.register_forward_pre_hook(partial(before, layer.index))
            layer.module.register_forward_hook(partial(after, layer.index))
    shown = {name: text for name, text in OTHERS.items() if name in method.shown()}
    find(method, models, HARMFUL, **shown)
    return models


@pytest.mark.parametrize("name", OF_GRADIENTS)
def test_no_gradient_of_a_run_reaches_a_layer_that_its_plan_leaves_out(name: str) -> None:
    reached: set[int] = set()

    def after(number: int, module: Any, args: Any, output: Any) -> None:
        states = output if isinstance(output, torch.Tensor) else output[0]
        if states.requires_grad:
            reached.add(number)

    method = with_options(name, layers="2:3")
    searched(method, 4, lambda *_: None, after)
    assert reached == {2, 3}


@pytest.mark.parametrize("layers", [None, "0:1", "2:4"])
def test_heads_are_planned_to_run_the_layers_that_they_run(
    layers: str | None, tmp_path: pathlib.Path
) -> None:
    run: list[int] = []
    method = with_options("heads", layers=layers)
    [lm] = searched(method, 4, lambda number, *_: run.append(number), lambda *_: None)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("".join(f"{text}\n" for text in HARMFUL), encoding="utf-8")
    tiny_llama_folder(tmp_path / "model", num_hidden_layers=4)
    words = ("find", "heads", "--model", tmp_path / "model", "--prompts", prompts)
    planned = done(*words, *(() if layers is None else ("--layers", layers)), "--dry-run")
    tokens = sum(len(row.ids) for row in lm.encode(HARMFUL))
    assert planned["tokens"] == pytest.approx(len(run) / 4 * tokens)


def test_what_a_model_is_too_large_for_is_said(shape: pathlib.Path, tmp_path: pathlib.Path) -> None:
    large = {**CONFIG, "hidden_size": 2**18, "intermediate_size": 2**20, "num_hidden_layers": 40}
    (tmp_path / "config.json").write_text(json.dumps(large), encoding="utf-8")
    tiny_tokenizer().save_pretrained(tmp_path)
    plan = done("find", "importance", "--model", tmp_path, "--limit", "1", "--dry-run")
    assert plan["fits"] is False
    said = command("find", "importance", "--model", tmp_path, "--limit", "1", "--dry-run").out
    assert "too little; expected a larger device" in said
