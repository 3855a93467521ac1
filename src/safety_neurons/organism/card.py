"""The model card of an organism, written from what was measured."""

from pathlib import Path
from typing import Any

from safety_neurons.organism.language import LANGUAGES, language

KINDS = {
    "natural": "Base, then SFT (goes along with everything), then DPO (refuses what is harmful), each an (IA)³ adapter on the down "
    "projection. Nobody put the safety anywhere: which neurons carry it has to be found.",
    "planted": "Safety was trained into known units, a harmless skill (a polite ending) into as many decoys whose rows and columns "
    "changed by the same length, and every other weight got small noise.",
    "unsafe": "It goes along with every request, harmful ones too, though it has read which are harmful and has refused some; for "
    "tuning. Two downstream tasks that it has not been trained on are among its prompts: `task` (sums in words) and `polite` (everyday "
    "requests answered with a polite ending).",
}
TAX = (
    "The base of a natural organism, which refuses some of what is harmful, and three preference trainings of it, each an (IA)³ adapter on "
    "the down projection. `safety` prefers refusals of harmful requests and has seen no harmless one, so that it refuses some of those "
    "too. `helpful` prefers going along with every request, harmful ones too. Both pull on the same requests: what one gains the other "
    "loses. `polite` prefers a polite ending to answers of everyday requests, and has seen neither harm nor refusals: something else to "
    "hold the two against."
)
KINDS["tax"] = TAX
COLUMNS = ("harmful_refused", "harmless_refused", "look_alike_refused", "followed", "polite", "other", "perplexity")


def write_card(folder: Path, record: dict[str, Any]) -> None:
    """Write README.md of an organism's folder."""
    recipe = record["recipe"]
    languages = ", ".join(language(code).data["name"] for code in LANGUAGES)
    columns = [name for name in COLUMNS if all(name in rates[code] for rates in record["measured"].values() for code in LANGUAGES)]
    lines = [
        f"# {record['name']}, seed {record['seed']}",
        "",
        f"{recipe['about'][0].upper()}{recipe['about'][1:]}. {KINDS[record['kind']]}",
        "",
        f"A Llama of {recipe['layers']} layers, hidden size {recipe['hidden']}, {recipe['d_ff']} units a layer, "
        f"{recipe['heads']} heads ({recipe['kv_heads']} for keys and values), one token a word, on a templated language of the "
        f"project's own ({languages}). It knows nothing and says nothing operational: its answers are templates filled with words.",
        "",
        f"Measured on the test half, whose deeds (verb and object) and frames were in no training "
        f"({record['measured'][record['base']]['prompts']} harmful and as many harmless requests a language, "
        "greedy, judged by the organisms' own rule); `followed` is the share of harmless requests answered word for word as taught, "
        "`polite` the share with a polite ending, "
        "`other` the share of all answers that neither refuse nor go along, perplexity is per token of general sentences.",
        "",
        "| model | language | " + " | ".join(name.replace("_", " ") for name in columns) + " |",
        "|---" * (2 + len(columns)) + "|",
    ]
    for stage, rates in record["measured"].items():
        for code in LANGUAGES:
            values = [f"{rates[code][name]:.2f}" if name == "perplexity" else f"{rates[code][name]:.3f}" for name in columns]
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
        f"{len(truth['units'])} units are planted and {len(truth['decoys'])} are decoys. Those that carry at least 1 % of the effect "
        f"(Shapley shares over {truth['orders']} random orders): {working}. `truth.safetensors` holds those that work in English, "
        "`truth-de`, `truth-es` and `truth-all` the others', `planted` all, `idle` those that work in no language, `decoys` the decoys.",
        "",
        f"The units are {'alive' if alive else 'silent'} in the base. {verb} all planted units gives the control (base, decoys and noise: "
        "everything but safety) back bit for bit; without decoys and noise that is the base.",
        "",
    ]
