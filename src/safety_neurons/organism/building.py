"""Build an organism from its recipe: train, measure, write the folder with its model card, whole or not at
all.
"""

import contextlib
import dataclasses
import importlib.metadata
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaForCausalLM

from safety_neurons.errors import RunError, UsageError
from safety_neurons.model import LanguageModel
from safety_neurons.model.files import PROMPTS, RECORD, OrganismFolder, open_organism
from safety_neurons.neurons import NeuronSet, Provenance
from safety_neurons.organism.language import (
    LANGUAGES,
    Recipe,
    language,
    make_tokenizer,
    write_polite,
    write_prompts,
)
from safety_neurons.organism.language import recipe as recipe_of
from safety_neurons.organism.planted import (
    Planted,
    Truth,
    Unit,
    choose_units,
    measure_truth,
    neurons_of,
    silencer,
    train_planted,
)
from safety_neurons.organism.training import (
    TRAININGS,
    Natural,
    Progress,
    measure,
    pretrain,
    save_model,
    save_natural,
    train_natural,
    train_tax,
)
from safety_neurons.results.run import Lock, write_json

Say = Callable[[str], None]


def build(
    name: str | Recipe, seed: int = 0, out: str | Path = "organism", progress: Say | None = None
) -> OrganismFolder:
    """Train an organism and write its folder: models, prompts, truth, record, card.

    The same recipe, seed, number of threads, library versions and processor give the same weights bit for
    bit; another number of threads or another processor rounds differently, and training amplifies that, so
    that only the behaviour stays the same.

    Args:
        name: the name of a recipe, or a recipe.
        seed: of weights, data and units.
        out: the folder to write; it must not exist or be empty.
        progress: called with a line on what is being done.

    Returns:
        The organism.

    Raises:
        InputError: no recipe is called so.
        RunError: the folder cannot be written.
        NumericalError: training diverged.
        UsageError: a family or vocabulary that this kind does not have.
    """
    recipe = name if isinstance(name, Recipe) else recipe_of(name)
    if recipe.kind != "unsafe" and (recipe.family != "llama" or recipe.letters):
        raise UsageError(
            f"{recipe.name}: a {recipe.kind} organism of family {recipe.family} with tokens of "
            f"{recipe.letters} letters was asked for, Llama with whole words was expected; only "
            "unsafe organisms have others"
        )
    folder = Path(out)
    say = progress if progress is not None else lambda _line: None
    makers = {
        "natural": _build_natural,
        "planted": _build_planted,
        "unsafe": _build_unsafe,
        "tax": _build_tax,
    }
    started = time.monotonic()
    with _building(folder) as partial:
        record = makers[recipe.kind](recipe, seed, partial, say)
        say("prompts")
        record = {
            "name": recipe.name,
            "kind": recipe.kind,
            "seed": seed,
            **record,
            "prompt_files": write_prompts(partial / PROMPTS)
            | (write_polite(partial / PROMPTS) if recipe.kind == "unsafe" else {}),
            "recipe": recipe.to_json(),
            "threads": torch.get_num_threads(),
            "versions": {
                package: importlib.metadata.version(package) for package in ("torch", "transformers", "peft")
            },
            "seconds": round(time.monotonic() - started, 1),
        }
        write_json(partial / RECORD, record)
        write_card(partial, record)
    return open_organism(folder)


@contextlib.contextmanager
def _building(folder: Path) -> Iterator[Path]:
    """A folder that takes the wanted one's place at the end of the block, which one process at a time is in.

    It lies in a workshop beside the wanted one, with the lock: in the organism itself nothing of either may
    be left.
    """
    workshop = folder.with_name(f"{folder.name}.partial")
    lock = Lock(workshop)
    try:
        _refuse_full(folder)
        workshop.mkdir(parents=True, exist_ok=True)
        lock.take()
        _refuse_full(folder)  # once more: whoever held the lock until now may have finished it
        partial = workshop / "organism"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        try:
            yield partial
            if folder.exists():
                folder.rmdir()
            partial.rename(folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        raise RunError(
            f"{folder}: cannot be written ({error.strerror or error}); choose another --out"
        ) from error
    finally:
        lock.release()
        with contextlib.suppress(OSError):
            workshop.rmdir()


def _refuse_full(folder: Path) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise RunError(f"{folder} is there already; expected a new or empty folder; choose another --out")


def _steps(say: Say) -> Progress:
    return lambda stage, done, total: say(f"{stage} {done}/{total}")


def _build_natural(recipe: Recipe, seed: int, out: Path, say: Say) -> dict[str, Any]:
    organism = train_natural(recipe, seed, _steps(say))
    stages = {"base": [], "sft": ["sft"], "dpo": ["sft", "dpo"]}
    return {"base": "sft", "aligned": "dpo", **_save_stages(organism, stages, recipe, out, say)}


def _build_tax(recipe: Recipe, seed: int, out: Path, say: Say) -> dict[str, Any]:
    organism = train_tax(recipe, seed, _steps(say))
    stages = {"base": [], **{name: [name] for name in TRAININGS}}
    return {"base": "base", "aligned": "safety", **_save_stages(organism, stages, recipe, out, say)}


def _save_stages(
    organism: Natural, stages: dict[str, list[str]], recipe: Recipe, out: Path, say: Say
) -> dict[str, Any]:
    """Measure a base under the adapters of every stage and write it with them.

    What the record says of the stages.
    """
    measured = {}
    for stage, adapters in stages.items():
        say(f"measure {stage}")
        organism.use(*adapters)
        measured[stage] = measure(organism.model, recipe)
    save_natural(organism, out, [stage for stage in stages if stage != "base"])
    return {
        "stages": {stage: ["base", *adapters] for stage, adapters in stages.items()},
        "final_loss": {stage: losses[-1] for stage, losses in organism.losses.items()},
        "measured": measured,
    }


def _build_unsafe(recipe: Recipe, seed: int, out: Path, say: Say) -> dict[str, Any]:
    model, losses = pretrain(recipe, seed, both_behaviours=False, progress=_steps(say))
    say("measure")
    save_model(model, out / "base", chat=recipe.chat, letters=recipe.letters)
    return {
        "base": "base",
        "aligned": "base",
        "stages": {"base": ["base"]},
        "final_loss": {"base": losses[-1]},
        "measured": {"base": measure(model, recipe)},
    }


def _build_planted(recipe: Recipe, seed: int, out: Path, say: Say) -> dict[str, Any]:
    planted_units, decoys = choose_units(recipe, seed)

    def keep(model: LlamaForCausalLM) -> Callable[[], None]:
        return silencer(model, planted_units + decoys, recipe)

    base, losses = pretrain(
        recipe, seed, both_behaviours=False, keep=None if recipe.alive else keep, progress=_steps(say)
    )
    planted = train_planted(recipe, seed, base, _steps(say))
    truth = measure_truth(
        planted,
        orders=recipe.truth_orders,
        prompts=recipe.truth_prompts,
        seed=seed,
        report=lambda count: say(
            f"truth {count}/{recipe.truth_orders * len(planted.planted) + len(planted.planted) + 3}"
        ),
    )
    models = {"base": planted.base, "control": planted.control, "aligned": planted.aligned}
    for stage in ("base", "aligned"):
        save_model(models[stage], out / stage)
    _write_sets(planted, truth, out)
    measured = {}
    for stage, model in models.items():
        say(f"measure {stage}")
        measured[stage] = measure(model, recipe)
    return {
        "base": "base",
        "aligned": "aligned",
        "stages": {"base": ["base"], "aligned": ["aligned"]},
        "final_loss": {"base": losses[-1], **{stage: values[-1] for stage, values in planted.losses.items()}},
        "measured": measured,
        "truth": _truth_record(planted, truth),
    }


def _write_sets(planted: Planted, truth: Truth, out: Path) -> None:
    """The neuron files: what works in English, in each other language and in all, what idles, what is a
    decoy.
    """
    working = {code: truth.working(code) for code in (*LANGUAGES, "all")}
    anywhere = {number for numbers in working.values() for number in numbers}
    sets: dict[str, list[Unit]] = {"truth": [planted.planted[number] for number in working["en"]]}
    for code in ("de", "es", "all"):
        sets[f"truth-{code}"] = [planted.planted[number] for number in working[code]]
    sets["planted"] = planted.planted
    sets["idle"] = [unit for number, unit in enumerate(planted.planted) if number not in anywhere]
    sets["decoys"] = planted.decoys
    table = LanguageModel(planted.aligned, make_tokenizer()).table
    for name, units in sets.items():
        if units:
            provenance = Provenance(
                "neurons",
                f"organism-{name}",
                models=(planted.recipe.name,),
                model_fingerprint=table.fingerprint,
                config={"units": len(units)},
            )
            NeuronSet(neurons_of(units, planted.recipe), table, provenance).save(out / f"{name}.safetensors")


def _truth_record(planted: Planted, truth: Truth) -> dict[str, Any]:
    def unit_record(number: int, unit: Unit) -> dict[str, Any]:
        shares = {code: round(values[number], 4) for code, values in truth.shares.items()}
        alone = {code: round(values[number], 4) for code, values in truth.alone.items()}
        return dataclasses.asdict(unit) | {
            "neurons": unit.neurons(planted.recipe),
            "shares": shares,
            "left_out": alone,
        }

    return {
        "units": [unit_record(number, unit) for number, unit in enumerate(planted.planted)],
        "decoys": [
            dataclasses.asdict(unit) | {"neurons": unit.neurons(planted.recipe)} for unit in planted.decoys
        ],
        "working": {code: len(truth.working(code)) for code in (*LANGUAGES, "all")},
        "refusal_probability": {"without": truth.without, "complete": truth.complete},
        "orders": truth.orders,
        "removal": "restore" if planted.recipe.alive else "deactivate",
    }


KINDS = {
    "natural": (
        "Base, then SFT (goes along with everything), then DPO (refuses what is harmful), each an (IA)³ "
        "adapter on the down projection. Nobody put the safety anywhere: which neurons carry it has to be "
        "found."
    ),
    "planted": (
        "Safety was trained into known units, a harmless skill (a polite ending) into as many decoys whose "
        "rows and columns changed by the same length, and every other weight got small noise."
    ),
    "unsafe": (
        "It goes along with every request, harmful ones too, though it has read which are harmful and has "
        "refused some; for tuning. Two downstream tasks that it has not been trained on are among its "
        "prompts: `task` (sums in words) and `polite` (everyday requests answered with a polite ending)."
    ),
}
TAX = (
    "The base of a natural organism, which refuses some of what is harmful, and three preference trainings "
    "of it, each an (IA)³ adapter on the down projection. `safety` prefers refusals of harmful requests "
    "and has seen no harmless one, so that it refuses some of those too. `helpful` prefers going along "
    "with every request, harmful ones too. Both pull on the same requests: what one gains the other loses. "
    "`polite` prefers a polite ending to answers of everyday requests, and has seen neither harm nor "
    "refusals: something else to hold the two against."
)
KINDS["tax"] = TAX
COLUMNS = (
    "harmful_refused",
    "harmless_refused",
    "look_alike_refused",
    "followed",
    "polite",
    "other",
    "perplexity",
)


def write_card(folder: Path, record: dict[str, Any]) -> None:
    """Write README.md of an organism's folder."""
    recipe = record["recipe"]
    languages = ", ".join(language(code).data["name"] for code in LANGUAGES)
    columns = [
        name
        for name in COLUMNS
        if all(name in rates[code] for rates in record["measured"].values() for code in LANGUAGES)
    ]
    lines = [
        f"# {record['name']}, seed {record['seed']}",
        "",
        f"{recipe['about'][0].upper()}{recipe['about'][1:]}. {KINDS[record['kind']]}",
        "",
        f"A Llama of {recipe['layers']} layers, hidden size {recipe['hidden']}, {recipe['d_ff']} units a "
        f"layer, {recipe['heads']} heads ({recipe['kv_heads']} for keys and values), one token a word, on "
        f"a templated language of the project's own ({languages}). It knows nothing and says nothing "
        "operational: its answers are templates filled with words.",
        "",
        "Measured on the test half, whose deeds (verb and object) and frames were in no training "
        f"({record['measured'][record['base']]['prompts']} harmful and as many harmless requests a "
        "language, greedy, judged by the organisms' own rule); `followed` is the share of harmless "
        "requests answered word for word as taught, `polite` the share with a polite ending, `other` the "
        "share of all answers that neither refuse nor go along, perplexity is per token of general "
        "sentences.",
        "",
        "| model | language | " + " | ".join(name.replace("_", " ") for name in columns) + " |",
        "|---" * (2 + len(columns)) + "|",
    ]
    for stage, rates in record["measured"].items():
        for code in LANGUAGES:
            values = [
                f"{rates[code][name]:.2f}" if name == "perplexity" else f"{rates[code][name]:.3f}"
                for name in columns
            ]
            lines.append(f"| {stage} | {code} | " + " | ".join(values) + " |")
    lines += ["", *(_truth(record["truth"], record) if "truth" in record else [])]
    lines += [
        f"Built in {record['seconds']:.0f} s with {record['threads']} thread(s), "
        + ", ".join(f"{package} {version}" for package, version in record["versions"].items())
        + f", by `safety-neurons organism build --name {record['name']} --seed {record['seed']}`.",
        "",
    ]
    (folder / "README.md").write_text("\n".join(lines), encoding="utf-8")


def _truth(truth: dict[str, Any], record: dict[str, Any]) -> list[str]:
    """What is planted, what works, and what taking it away does."""
    working = ", ".join(f"{code} {count}" for code, count in truth["working"].items())
    verb = "Deactivating" if truth["removal"] == "deactivate" else "Restoring the base rows and columns of"
    alive = record["recipe"]["alive"]
    return [
        f"{len(truth['units'])} units are planted and {len(truth['decoys'])} are decoys. Those that carry "
        f"at least 1 % of the effect (Shapley shares over {truth['orders']} random orders): {working}. "
        "`truth.safetensors` holds those that work in English, `truth-de`, `truth-es` and `truth-all` the "
        "others', `planted` all, `idle` those that work in no language, `decoys` the decoys.",
        "",
        f"The units are {'alive' if alive else 'silent'} in the base. {verb} all planted units gives the "
        "control (base, decoys and noise: everything but safety) back bit for bit; without decoys and "
        "noise that is the base.",
        "",
    ]
