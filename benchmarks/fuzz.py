"""Feed damaged files to every reader: whatever they hold, a reader gives its result or one error of this
package, within bounds of time and memory.

Inputs are valid files, changed a few times over: bytes flipped, cut out, doubled, cut off or spliced with
another valid file's; in JSON (also in lines, in the header of safetensors and in texts within it) values
replaced by odd ones, names dropped, renamed and doubled. A reader runs in a fork of its own, in this process'
memory; where the fork dies or hangs, the input it was reading is kept, and another fork goes on.

nice python benchmarks/fuzz.py --seconds 180

A run of some readers leaves the others' rows in the record.
"""

import argparse
import copy
import functools
import gc
import gzip
import io
import json
import os
import pathlib
import random
import re
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from paired import RESULTS, machine

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "tests"))
import tiny
from safety_neurons import SafetyNeuronsError
from safety_neurons.neurons import NeuronSet, Scores, SiteInfo, SiteTable

SECONDS = 5.0
"""One input may take this long, on a machine that others use as well."""
MEMORY = 1 << 30
"""One input may take this many bytes of address space; the package's own bound of a prompt file is half."""
LARGEST = 1 << 16
"""Bytes of an input."""
ODD: list[Any] = [
    None,
    True,
    False,
    0,
    1,
    -1,
    2,
    3.5,
    -0.0,
    1e308,
    1e-320,
    float("nan"),
    float("inf"),
    2**31,
    2**53 + 1,
    2**63,
    -(2**63) - 1,
    10**70,
    "",
    " ",
    "a",
    "\x00",
    "\ud800",
    "é" * 300,
    "a" * 5000,
    "../../x",
    "/etc/passwd",
    "NaN",
    "1",
    "layers.0.down",
    "layers.99.down",
    "{}",
    "[]",
    "[[",
    "%s{0}",
    "\n\r\u2028",
    [],
    {},
    [[]],
    [None],
    [0] * 300,
    {"a": 1},
    {"": None},
    ["a", 1, None, {"b": []}],
]
PIECES = [
    b"",
    b"\x00",
    b"\xff\xfe",
    b"\xef\xbb\xbf",
    b"{",
    b"}",
    b"[",
    b"]",
    b",",
    b":",
    b'"',
    b"\\",
    b"\n",
    b"\r",
    b"\t",
    b";",
    b"'",
    b"null",
    b"NaN",
    b"-Infinity",
    b"1e999",
    b"9" * 40,
    b"[" * 200,
    b'{"a":' * 100,
    b"\\ud800",
    b'"""',
    b"sep=;\n",
    b"{1, 2}",
    b"set()",
    b"\xc3",
]


@dataclass
class Reader:
    """A reader, and valid files by the name under which it takes them.

    Attributes:
        name: of the reader.
        read: takes a folder, with one of its files damaged, and the name of that file.
        files: valid contents by name.
        share: how many of the inputs that are asked for it gets.
    """

    name: str
    read: Callable[[pathlib.Path, str], object]
    files: dict[str, bytes]
    share: float = 1.0
    counts: Counter[str] = field(default_factory=Counter)


def changed(draw: random.Random, content: bytes, others: Sequence[bytes]) -> bytes:
    """A valid file, damaged: one time in two by its structure, one in two by its bytes, now and then both."""
    kind = draw.random()
    if kind < 0.6:
        content = restructured(draw, content)
    if kind > 0.5:
        for _ in range(draw.choice((1, 1, 1, 2, 4, 16))):
            content = bytes_changed(draw, content, others)
    return content[:LARGEST]


def bytes_changed(draw: random.Random, content: bytes, others: Sequence[bytes]) -> bytes:
    """One change of the bytes."""
    size = len(content)
    start = draw.randrange(size + 1)
    end = min(size, start + draw.choice((1, 1, 2, 4, 8, 64, size)))
    match draw.randrange(7):
        case 0 if start < size:
            return content[:start] + bytes([content[start] ^ 1 << draw.randrange(8)]) + content[start + 1 :]
        case 1 if start < size:
            return content[:start] + draw.randbytes(1) + content[start + 1 :]
        case 2:
            return content[:start]
        case 3:
            return content[:start] + content[end:]
        case 4:
            return content[:end] + content[start:end] * draw.choice((1, 1, 3, 50)) + content[end:]
        case 5:
            other = draw.choice(others)
            return content[:start] + other[draw.randrange(len(other) + 1) :]
    return content[:start] + draw.choice(PIECES) + content[end if draw.random() < 0.5 else start :]


def restructured(draw: random.Random, content: bytes) -> bytes:
    """One value or name of the JSON in a file changed, wherever that stands; other files as they are."""
    if content[:2] == b"\x1f\x8b":
        with_inside = restructured(draw, gzip.decompress(content))
        return gzip.compress(with_inside, compresslevel=1)
    if len(content) > 8 and content[8:9] == b"{" and struct.unpack("<Q", content[:8])[0] < len(content):
        size = struct.unpack("<Q", content[:8])[0]
        header = restructured(draw, content[8 : 8 + size])
        return struct.pack("<Q", len(header)) + header + content[8 + size :]
    text = content.decode("utf-8", errors="replace")
    try:
        return dumped(draw, json.loads(text))
    except ValueError:
        pass
    lines = text.split("\n")
    place = draw.randrange(len(lines))
    try:
        lines[place] = dumped(draw, json.loads(lines[place])).decode()
    except ValueError:
        numbers = list(re.finditer(r"-?\d+", text))
        if numbers:
            one = draw.choice(numbers)
            return (text[: one.start()] + str(draw.choice(ODD)) + text[one.end() :]).encode(errors="replace")
        return content
    return "\n".join(lines).encode()


def dumped(draw: random.Random, value: Any) -> bytes:
    """JSON of a value with one to three changes in it."""
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        value = edited(draw, value)
    return json.dumps(value).encode()


def edited(draw: random.Random, value: Any) -> Any:
    """The value with one change, at a place reached by going down at random."""
    if isinstance(value, str) and value[:1] in ("{", "[") and draw.random() < 0.9:
        try:
            return dumped(draw, json.loads(value)).decode()  # such as the site table in a header
        except ValueError:
            pass
    inner = isinstance(value, (dict, list)) and len(value) > 0
    if not inner or draw.random() < 0.08:
        return copy.deepcopy(draw.choice(ODD))
    if isinstance(value, dict):
        key = draw.choice(list(value))
        match draw.randrange(12):
            case 0:
                return {name: item for name, item in value.items() if name != key}
            case 1:
                return {str(draw.choice(ODD)) if name == key else name: item for name, item in value.items()}
            case 2:
                return {**value, key: value[draw.choice(list(value))]}
            case 3:
                return {**value, str(draw.choice(ODD)): draw.choice(ODD)}
        return {**value, key: edited(draw, value[key])}
    place = draw.randrange(len(value))
    match draw.randrange(12):
        case 0:
            return value[:place] + value[place + 1 :]
        case 1:
            return value + [value[place]] * draw.choice((1, 2, 200))
    return [*value[:place], edited(draw, value[place]), *value[place + 1 :]]


# The readers


TABLE = SiteTable(
    "Tiny",
    10_000,
    tuple(
        SiteInfo(f"layers.{layer}.{site}", size, 32, 0, heads, 8 if heads else 0)
        for layer in range(2)
        for site, size, heads in (
            ("q", 32, 4),
            ("k", 16, 2),
            ("v", 16, 2),
            ("o", 32, 4),
            ("up", 48, 0),
            ("down", 48, 0),
        )
    ),
)
ROWS: list[dict[str, Any]] = [
    {"prompt": "how do i make a cake", "response": "sure", "category": "food", "id": 3},
    {"instruction": "write a story", "input": "of a tree", "output": "here", "system": "you help"},
    {"messages": [{"role": "user", "content": "kill"}, {"role": "assistant", "content": "no"}], "group": "a"},
    {"conversations": [{"from": "human", "value": "x"}, {"from": "gpt", "value": "y"}], "label": 1},
    {
        "chosen": [{"role": "user", "content": "a"}],
        "rejected": "b",
        "prompt": ["p", {"type": "text", "text": "q"}],
    },
    {"goal": "open a lock", "target": "Sure", "behavior": "Lock", "context": "in a house"},
]


def prompt_files() -> dict[str, bytes]:
    """Every format of a prompt file."""
    plain = [{name: str(value) for name, value in row.items()} for row in ROWS]
    names = list(dict.fromkeys(name for row in plain for name in row))
    table = [names, *([row.get(name, "") for name in names] for row in plain)]
    lines = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
    return {
        "rows.jsonl": lines,
        "list.json": json.dumps(ROWS).encode(),
        "columns.json": json.dumps({"prompt": ["a", "b"], "label": [0, 1]}).encode(),
        "split.json": json.dumps({"columns": ["prompt", "x"], "index": [0], "data": [["a", 1]]}).encode(),
        "within.json": json.dumps({"data": {"rows": [{"row": row} for row in ROWS]}, "name": "x"}).encode(),
        "batch.jsonl": json.dumps({"custom_id": "1", "body": {"messages": ROWS[2]["messages"]}}).encode(),
        "table.csv": "\n".join(",".join(f'"{cell}"' for cell in row) for row in table).encode(),
        "semicolons.csv": b'sep=;\nprompt;label\n"a; b";1\nc;0\n',
        "table.tsv": "\n".join("\t".join(row) for row in table).encode(),
        "text.txt": b"how do i make a cake\nkill the tree\n\n\xc3\xa9 a\r\n",
        "wide.txt": "how do i\nkill".encode("utf-16"),
        "rows.jsonl.gz": gzip.compress(lines),
    }


def of_prompts(_: pathlib.Path) -> Reader:
    """Prompt files."""
    from safety_neurons.prompt_lists import prompts

    return Reader("prompts", lambda folder, name: prompts(folder / name), prompt_files())


def of_neurons(work: pathlib.Path) -> Reader:
    """Sets of neurons."""
    return Reader(
        "neurons", lambda folder, name: NeuronSet.load(folder / name), {"n.safetensors": a_set(work)}
    )


def of_scores(work: pathlib.Path) -> Reader:
    """Scores."""
    values = {site.key: np.linspace(0, 1, site.size, dtype=np.float32) for site in TABLE.sites}
    Scores(values, TABLE).save(work / "scores.safetensors")
    content = (work / "scores.safetensors").read_bytes()
    return Reader("scores", lambda folder, name: Scores.load(folder / name), {"s.safetensors": content})


def of_guard(work: pathlib.Path) -> Reader:
    """Guards."""
    from safety_neurons.guard import Guard

    made = {path.name: path.read_bytes() for path in a_guard(work).iterdir() if path.is_file()}
    return Reader("guard", lambda folder, _: Guard.load(folder), made)


def of_adapters(work: pathlib.Path) -> Reader:
    """Adapters of other libraries."""
    from safety_neurons.model import adapters

    made = {}
    for kind in ("ia3", "lora"):
        folder = tiny.tiny_adapter_folder(a_model(work), work / kind, seed=1, kind=kind)
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            made[f"{kind}/{name}"] = (folder / name).read_bytes()
    return Reader("adapters", lambda folder, name: adapters.adapter_config((folder / name).parent), made)


def of_completions(work: pathlib.Path) -> Reader:
    """Completions."""
    from safety_neurons.results import Completion, Completions

    verdicts, meta = {"refusal": {"label": "full"}}, {"messages": ROWS[2]["messages"]}
    made = [
        Completion(f"p{n}", "how", "sure", (1, 2), arm="treated", verdicts=verdicts, meta=meta)
        for n in range(4)
    ]
    Completions(made).save(work / "completions.jsonl")
    content = (work / "completions.jsonl").read_bytes()
    return Reader("completions", lambda folder, name: Completions.load(folder / name), {"c.jsonl": content})


def of_run(work: pathlib.Path) -> Reader:
    """Run folders, opened to go on."""

    def read(folder: pathlib.Path, _: str) -> object:
        opened = a_run(folder)
        found = opened.record
        opened.abandon()
        return found

    return Reader("run.json", read, a_finished_run(work))


def of_recipes(work: pathlib.Path) -> Reader:
    """Recipes, and records as recipes."""
    from safety_neurons.cli import recipes

    find = {"prompts": "x", "top": 0.1, "sites": ["down"]}
    steps = [
        {"name": "a", "verb": "find-contrast", "arguments": find},
        {"name": "b", "verb": "find-importance", "arguments": {"model": "{out}/a", "prompts": "p"}},
    ]
    recipe = json.dumps({"steps": steps, "shared": {"seed": 1}}).encode()

    def read(folder: pathlib.Path, name: str) -> object:
        file = folder / name
        content = recipes.parsed(file)
        if "steps" not in content:
            return recipes.command_words(*recipes.read(content, file), {}, file, servers=False)
        return [
            recipes.command_words(words, arguments, {}, file, servers=False)
            for _, words, arguments in recipes.steps_of(content, file)
        ]

    record = a_finished_run(work)["run.json"]
    return Reader("recipes", read, {"run.json": record, "recipe.json": recipe})


def of_report(work: pathlib.Path) -> Reader:
    """Run folders, shown on a page; what is drawn takes a hundred times as long as what is read."""
    from safety_neurons.report import page

    def read(folder: pathlib.Path, _: str) -> object:
        return page.render(page.read_runs([folder]), title="x")

    return Reader("report", read, a_finished_run(work), share=0.02)


def of_imports(_: pathlib.Path) -> Reader:
    """Neuron files of other projects."""
    import torch
    from safetensors.numpy import save

    from safety_neurons.model import files
    from safety_neurons.neurons import foreign

    def torched(value: Any) -> bytes:
        stream = io.BytesIO()
        torch.save(value, stream)
        return stream.getvalue()

    def read(folder: pathlib.Path, name: str) -> object:
        file = folder / name
        if name == "sn.txt":
            return foreign.read_sn_tune(file, TABLE)
        if name == "change.pt":
            return foreign.change_scores(files.read_torch(file), TABLE, file)
        if name.startswith("probe"):
            return foreign.probe_scores(files.read_named(file), TABLE, file)
        return foreign.weight_scores(files.read_weights(file), None, TABLE, path=file)

    ranks = torch.stack(torch.unravel_index(torch.arange(96), (2, 48)), 1)
    probe = {"model.layers.0.mlp.up_proj": np.linspace(-1, 1, 48, dtype=np.float32)}
    matrix = {"model.layers.0.mlp.down_proj": np.eye(32, 48, dtype=np.float32)}
    made = {
        "sn.txt": b"{0: {1, 2}, 1: set()}\n{0: {np.int64(3)}}\n{1: [4, 5]}\n{}\n{0: {1}}\n",
        "change.pt": torched((torch.linspace(1, 0, 96).reshape(2, 48), ranks, None)),
        "probe.safetensors": save(probe),
        "probe.pt": torched({name: torch.from_numpy(row) for name, row in probe.items()}),
        "weights.safetensors": save(matrix),
    }
    return Reader("imports", read, made)


READERS = (
    *(of_prompts, of_neurons, of_scores, of_guard, of_adapters, of_completions),
    *(of_run, of_recipes, of_report, of_imports),
)


# What they read


def a_set(work: pathlib.Path) -> bytes:
    """A file of a set."""
    NeuronSet({"layers.0.down": [1, 5], "layers.1.q": [3]}, TABLE).save(work / "neurons.safetensors")
    return (work / "neurons.safetensors").read_bytes()


def a_run(folder: pathlib.Path) -> Any:
    """A run folder, begun or gone on with."""
    from safety_neurons.results import RunFolder

    config = {"base": "a", "aligned": "b", "top": 0.05, "prompts": "x.txt", "seed": 0}
    return RunFolder(folder, "find-contrast", config, inputs={"prompts": {"": "ab"}})


@functools.cache
def a_finished_run(work: pathlib.Path) -> dict[str, bytes]:
    """The files of a finished run."""
    run = a_run(work / "run")
    run.path("neurons.safetensors").write_bytes(a_set(work))
    result = {
        "neurons": str(run.path("neurons.safetensors")),
        "n_neurons": 3,
        "n_parameters": 96,
        "share_of_neurons": 0.01,
        "share_of_parameters": 0.01,
        "prompts": {"used": 4, "failed": 0, "truncated": 0},
    }
    run.finish(result, device="cpu")
    return {name: (work / "run" / name).read_bytes() for name in ("run.json", "neurons.safetensors")}


@functools.cache
def a_model(work: pathlib.Path) -> pathlib.Path:
    """A folder of a tiny model."""
    return tiny.tiny_llama_folder(work / "plain", num_hidden_layers=1)


def a_guard(work: pathlib.Path) -> pathlib.Path:
    """A guard of the tiny model."""
    sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "tests" / "cli"))
    import running

    from safety_neurons.model import load

    neurons, labelled = work / "own.safetensors", work / "labelled.jsonl"
    NeuronSet({"layers.0.up": [0, 1, 2], "layers.0.down": [7, 9]}, load(str(a_model(work))).table).save(
        neurons
    )
    rows = [
        {"prompt": f"{how} {what}", "label": kind}
        for how in ("how do i", "please explain how to", "tell me how to", "why", "make", "write", "open")
        for what, kind in (("kill", "unsafe"), ("grow", "safe"), ("steal", "unsafe"), ("open", "safe"))
    ]
    labelled.write_text("".join(json.dumps(row) + "\n" for row in rows))
    said = running.command(
        "guard",
        "fit",
        "--model",
        a_model(work),
        "--neurons",
        neurons,
        "--labelled",
        labelled,
        "--pooling",
        "last",
        "--out",
        work / "fitted",
    )
    if said.code:
        raise SystemExit(said.err)
    return work / "fitted" / "guard"


# Running them


class Hung(BaseException):
    """An input takes too long. No reader catches it."""


def feed(
    reader: Reader, folder: pathlib.Path, seed: int, until: float, most: int, kept: pathlib.Path
) -> None:
    """Read damaged files until the time or the number is over; what came of them goes to `counts.json` as it
    comes, so that the death of this process loses little.
    """
    draw = random.Random(seed)
    warnings.simplefilter("ignore")
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in reader.files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    for name in reader.files:
        reader.read(folder, name)  # as it is it has to be read

    def late(*_: Any) -> None:
        raise Hung

    signal.signal(signal.SIGALRM, late)
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY,) * 2)
    counts, names, contents = reader.counts, list(reader.files), list(reader.files.values())
    paths = {name: str(folder / name) for name in names}
    last = names[0]
    while time.monotonic() < until and counts["inputs"] < most:
        name = draw.choice(names)
        content = changed(draw, reader.files[name], contents)
        if name != last:
            written(paths[last], reader.files[last])
        written(paths[name], content)
        last = name
        signal.setitimer(signal.ITIMER_REAL, SECONDS)
        try:
            reader.read(folder, name)
            counts["read"] += 1
        except SafetyNeuronsError as error:
            counts["refused"] += 1
            if "\n" in str(error):
                keep(kept, reader.name, name, content, "several lines", error)
                counts["faults"] += 1
        except BaseException as error:
            signal.setitimer(signal.ITIMER_REAL, 0)
            counts["faults"] += 1
            keep(kept, reader.name, name, content, type(error).__name__, error)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        counts["inputs"] += 1
        if counts["inputs"] % 256 == 0:
            (folder / ".counts").write_text(json.dumps(counts))
    (folder / ".counts").write_text(json.dumps(counts))


def written(path: str, content: bytes) -> None:
    """Put the content in the file's place in as few calls as there are."""
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    os.write(file, content)
    os.close(file)


def keep(kept: pathlib.Path, reader: str, name: str, content: bytes, kind: str, error: BaseException) -> None:
    """Keep an input once for each place in the code where it went wrong, with the traceback."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if "safety_neurons" in frame.filename] or frames[-1:] or [None]
    where = f"{pathlib.Path(ours[-1].filename).stem}-{ours[-1].lineno}" if ours[-1] else "nowhere"
    folder = kept / f"{reader}-{kind}-{where}".replace("/", "-")
    if folder.exists():
        return
    folder.mkdir(parents=True)
    (folder / pathlib.Path(name).name).write_bytes(content)
    (folder / "traceback.txt").write_text("".join(traceback.format_exception(error))[-6000:])


def fuzzed(reader: Reader, work: pathlib.Path, options: argparse.Namespace) -> dict[str, Any]:
    """Forks that feed one reader, until its time or number is over."""
    started, total, round_ = time.monotonic(), Counter[str](), 0
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    until, most = started + options.seconds, round(options.inputs * reader.share)
    gc.freeze()  # A fork would copy what was imported each time it looks for garbage in it.
    while time.monotonic() < until and total["inputs"] < most:
        folder = work / f"{reader.name}-{round_}"
        child = os.fork()
        if not child:
            try:
                feed(
                    reader,
                    folder,
                    options.seed * 1000 + round_,
                    until,
                    most - total["inputs"],
                    options.kept,
                )
                os._exit(0)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
        _, status = os.waitpid(child, 0)
        if (folder / ".counts").is_file():
            total.update(json.loads((folder / ".counts").read_text()))
        code = os.waitstatus_to_exitcode(status)
        if code:
            total["faults"] += 1
            now = {name: (folder / name).read_bytes() for name in reader.files if (folder / name).is_file()}
            name = next((name for name, content in now.items() if content != reader.files[name]), "")
            content = now.get(name, b"")
            keep(
                options.kept,
                reader.name,
                name or "none",
                content,
                f"died {code}",
                RuntimeError("the process died"),
            )
            if not name:
                break
        shutil.rmtree(folder, ignore_errors=True)
        round_ += 1
    seconds = time.monotonic() - started
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - spent.ru_utime - spent.ru_stime
    return {
        "reader": reader.name,
        **{name: total[name] for name in ("inputs", "read", "refused", "faults")},
        "seconds": round(seconds),
        "per_second": round(total["inputs"] / seconds),
        "per_processor_second": round(total["inputs"] / cpu),
    }


def main(words: Sequence[str] | None = None) -> int:
    """Fuzz the readers one after the other, print and record the counts; 1 where one gave a fault."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60.0, help="for each reader")
    parser.add_argument(
        "--inputs", type=int, default=1_000_000, help="at most, for each reader; the report gets its share"
    )
    parser.add_argument("--readers", default="", help="a part of them, by name, with commas")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--kept",
        type=pathlib.Path,
        default=pathlib.Path("fuzz-faults"),
        help="folder for inputs that went wrong",
    )
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS, help="folder for the JSON record")
    options = parser.parse_args(words)
    options.kept = options.kept.absolute()
    memory = pathlib.Path("/dev/shm")  # noqa: S108 - a file system in memory, so that no disk sets the pace
    work = pathlib.Path(tempfile.mkdtemp(prefix="fuzz-", dir=memory if memory.is_dir() else None))
    os.fsync = lambda _: None  # type: ignore[assignment]  # nothing here has to outlive a power failure
    try:
        (work / "made").mkdir()
        rows = []
        for reader in (made(work / "made") for made in READERS):
            if not options.readers or reader.name in options.readers.split(","):
                rows.append(fuzzed(reader, work, options))
                print(json.dumps(rows[-1]), flush=True)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    settings = {"seed": options.seed, "seconds": options.seconds, "inputs": options.inputs}
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / "fuzz.json"
    fed = {row["reader"] for row in rows}
    before = json.loads(file.read_text(encoding="utf-8"))["rows"] if file.is_file() else []
    kept = [row for row in before if row["reader"] not in fed and "machine" in row]
    made_on = [{**row, "settings": settings, "machine": machine()} for row in rows]
    record = {"benchmark": "fuzz", "rows": [*kept, *made_on]}
    file.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return int(any(row["faults"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
