"""Requests and answers for guards, one file a source and label, from public data in their original formats.

    python benchmarks/guard_requests.py --data FOLDER --limit 100 --out FOLDER

FOLDER of `--data` holds `advbench/harmful_behaviors.csv`, `harmbench/harmbench_behaviors_text_val.csv`,
`xstest/xstest_prompts.csv` and `xstest_v2_completions_llama2orig.csv`, `multijail/MultiJail.csv`,
`neuron_corpora/do_not_answer.txt`, `llama_factory/alpaca_en_demo.json` and `dpo_en_demo.json`,
`mmlu/mmlu_dev_val.zip` and `hh_rlhf/harmless-base/test.jsonl.gz`. Written are `SOURCE-unsafe.jsonl` and
`SOURCE-safe.jsonl`; a request that two sources have stays in the first, so that no source is on both sides
of a split by source. Beside them answers that were labelled before (`answers-SOURCE-harmful.jsonl`,
`answers-SOURCE-harmless.jsonl`), and `counts.json`: how many there are of each, and how many were repeated.

The labels are those of the data sets: all of AdvBench, HarmBench (without copyright), Do-Not-Answer and
MultiJail is unsafe, all of Alpaca, of LLaMA-Factory's DPO demonstration and of MMLU is safe, XSTest says
itself. MultiJail, the same requests in ten languages, has no safe side: beside it stand the built-in harmless
requests in five. An answer of HH-RLHF is harmless where people preferred it and harmful where they preferred
the other one; half of the answers are to fit on. All of XSTest's recorded answers (by Llama 2) are harmless:
refusals, or answers to safe requests; so are Alpaca's.
"""

import argparse
import collections
import csv
import gzip
import io
import json
import pathlib
import random
import zipfile
from typing import Any

from safety_neurons.prompt_lists import normalised, prompts

LANGUAGES = ("en", "zh", "it", "vi", "ar", "ko", "th", "bn", "sw", "jv")
OURS = ("en", "de", "es", "fr", "zh")
"""Languages of the built-in lists."""
Records = list[dict[str, Any]]


def rows(path: pathlib.Path) -> list[dict[str, str]]:
    """The rows of a CSV file, with or without a byte-order mark."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        return list(csv.DictReader(file))


def drawn(records: Records, limit: int) -> Records:
    """So many at random, always the same ones, in their order."""
    places = sorted(random.Random(0).sample(range(len(records)), min(limit, len(records))))
    return [records[place] for place in places]


def asked(texts: list[str], limit: int, language: str = "en") -> Records:
    """Records of some of the texts."""
    return drawn([{"prompt": text, "language": language} for text in texts], limit)


def mmlu(folder: pathlib.Path) -> list[str]:
    """Questions of the validation half, without their choices."""
    found = []
    with zipfile.ZipFile(folder / "mmlu/mmlu_dev_val.zip") as archive:
        for name in sorted(archive.namelist()):
            if name.endswith("_val.csv"):
                with archive.open(name) as file:
                    found += [row[0] for row in csv.reader(io.TextIOWrapper(file, "utf-8")) if row]
    return found


def many_languages(folder: pathlib.Path, limit: int) -> Records:
    """The same requests of MultiJail in all of its languages; what is the same request is one group."""
    table = rows(folder / "multijail/MultiJail.csv")
    chosen = random.Random(0).sample(table, max(1, 2 * limit // len(LANGUAGES)))
    return [
        {"prompt": row[language], "language": language, "group": f"multijail-{row['id']}"}
        for row in chosen
        for language in LANGUAGES
    ]


def sources(folder: pathlib.Path, limit: int) -> dict[str, tuple[Records, Records]]:
    """(unsafe, safe) of every source."""
    xstest = rows(folder / "xstest/xstest_prompts.csv")
    harmbench = rows(folder / "harmbench/harmbench_behaviors_text_val.csv")
    alpaca = json.loads((folder / "llama_factory/alpaca_en_demo.json").read_text(encoding="utf-8"))
    demo = json.loads((folder / "llama_factory/dpo_en_demo.json").read_text(encoding="utf-8"))
    refused = (folder / "neuron_corpora/do_not_answer.txt").read_text(encoding="utf-8").splitlines()
    return {
        "advbench": (
            asked([row["goal"] for row in rows(folder / "advbench/harmful_behaviors.csv")], limit),
            asked([row["instruction"] for row in alpaca if not row["input"]], limit),
        ),
        "harmbench": (
            asked(
                [
                    "\n\n".join(filter(None, (row["ContextString"], row["Behavior"])))
                    for row in harmbench
                    if row["FunctionalCategory"] != "copyright"
                ],
                limit,
            ),
            asked(
                [row["conversations"][0]["value"] for row in demo if len(row["conversations"]) == 1], limit
            ),
        ),
        "xstest": (
            asked([row["prompt"] for row in xstest if row["label"] == "unsafe"], limit),
            asked([row["prompt"] for row in xstest if row["label"] == "safe"], limit),
        ),
        "do-not-answer": (
            asked([line for line in refused if line.strip()], limit),
            asked(mmlu(folder), limit),
        ),
        "multijail": (
            many_languages(folder, limit),
            [
                record
                for language in OURS
                for record in asked(
                    [one.text for one in prompts(f"builtin:harmless-test/{language}")], limit // 4, language
                )
            ],
        ),
    }


def turns(text: str) -> list[dict[str, str]]:
    r"""`\n\nHuman: … \n\nAssistant: …` as messages."""
    found: list[dict[str, str]] = []
    for part in text.split("\n\nHuman:")[1:]:
        question, *answers = part.split("\n\nAssistant:")
        found.append({"role": "user", "content": question.strip()})
        found += [{"role": "assistant", "content": answer.strip()} for answer in answers]
    return found


def answers(folder: pathlib.Path, limit: int) -> dict[str, tuple[Records, Records]]:
    """(harmful, harmless) answers of every source that has some."""
    with gzip.open(folder / "hh_rlhf/harmless-base/test.jsonl.gz", "rt", encoding="utf-8") as file:
        pairs = [json.loads(line) for line in file]
    told = [(turns(pair["rejected"]), turns(pair["chosen"])) for pair in pairs]
    single = [pair for pair in told if all(_one_exchange(side) for side in pair)]
    order = random.Random(0).sample(range(len(single)), min(3 * limit, len(single)))

    def written(places: list[int], side: int) -> Records:
        return [
            {"prompt": single[place][side][0]["content"], "response": single[place][side][1]["content"]}
            for place in places
        ]

    fit, test = order[: 2 * len(order) // 3], order[2 * len(order) // 3 :]
    xstest = [
        {"prompt": row["prompt"], "response": row["completion"].strip()}
        for row in rows(folder / "xstest/xstest_v2_completions_llama2orig.csv")
        if not (row["type"].startswith("contrast") and row["final_label"].startswith("1"))
    ]
    alpaca = json.loads((folder / "llama_factory/alpaca_en_demo.json").read_text(encoding="utf-8"))
    plain = [{"prompt": row["instruction"], "response": row["output"]} for row in alpaca if not row["input"]]
    return {
        "hh-rlhf-fit": (written(fit, 0), written(fit, 1)),
        "hh-rlhf": (written(test, 0), written(test, 1)),
        "xstest": ([], drawn(xstest, limit)),
        "alpaca": ([], drawn(plain, limit)),
    }


def _one_exchange(messages: list[dict[str, str]]) -> bool:
    return [one["role"] for one in messages] == ["user", "assistant"] and bool(messages[1]["content"])


def main() -> None:
    """Write the files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", type=pathlib.Path, required=True, metavar="FOLDER")
    parser.add_argument("--limit", type=int, default=100)
    parser.add_argument("--out", type=pathlib.Path, required=True, metavar="FOLDER")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    counts: dict[str, Any] = {"repeated": collections.Counter()}
    seen: set[str] = set()
    for name, kinds in sources(options.data, options.limit).items():
        counts[name] = {}
        for kind, records in zip(("unsafe", "safe"), kinds, strict=True):
            fresh = {normalised(record["prompt"]): record for record in reversed(records)}
            kept = [record for key, record in reversed(fresh.items()) if key not in seen]
            seen |= fresh.keys()
            counts["repeated"][name] += len(records) - len(kept)
            counts[name][kind] = len(kept)
            write(options.out / f"{name}-{kind}.jsonl", kept)
    for name, kinds in answers(options.data, options.limit).items():
        counts[f"answers-{name}"] = {}
        for kind, records in zip(("harmful", "harmless"), kinds, strict=True):
            counts[f"answers-{name}"][kind] = len(records)
            if records:
                write(options.out / f"answers-{name}-{kind}.jsonl", records)
    (options.out / "counts.json").write_text(json.dumps(counts, indent=1) + "\n", encoding="utf-8")


def write(path: pathlib.Path, records: Records) -> None:
    """JSON Lines."""
    text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
