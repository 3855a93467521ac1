"""`--dry-run` against what is then measured: peak memory, disk and processor time of `find`, and of `verify
deactivate` of a hundredth of the neurons beside three random sets, on real models.

    python benchmarks/dry_run.py --models real:smollm2-135m-instruct,real:qwen2.5-coder-0.5b-instruct
    python benchmarks/dry_run.py --shapes      # plans of a 70B and of a 235B-A22B, by their configurations

Every dry run and every search runs in a process of its own. Memory is the largest resident size above the one
when libraries are imported; time is of the processor, from the start of Python on, since other programs may
run beside it.
"""

import argparse
import contextlib
import ctypes
import io
import json
import pathlib
import subprocess
import sys
import tempfile
import time
from typing import Any

RESULT = pathlib.Path(__file__).parent / "results" / "dry_run.json"
GPU_RATE = 3e14
"""Operations a second that plans take for granted: a third of what an H100's sheet says of bfloat16."""
LABELLED = ("--unsafe", "builtin:harmful", "--safe", "builtin:harmless")
COMPARED = ("memory_bytes", "disk_bytes", "seconds")
METHODS = {"importance": (), "contrast": ("--max-new-tokens", "16")}
VERIFY = ("--random", "3", "--max-new-tokens", "16")


def status(name: str) -> int:
    """Bytes that the kernel says of this process."""
    for line in pathlib.Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{name}:"):
            return 1024 * int(line.split()[1])
    raise KeyError(name)


def called(words: list[str]) -> dict[str, Any]:
    """What a command prints with `--json`."""
    from safety_neurons.cli.verb import build

    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        try:
            build()([*words, "--json"], prog_name="safety-neurons", standalone_mode=False)
        except SystemExit as stop:
            if stop.code:
                raise RuntimeError(said.getvalue()) from None
    found: dict[str, Any] = json.loads(said.getvalue())
    return found


def a_hundredth(outline: Any, file: pathlib.Path) -> str:
    """Write a set of the first hundredth of every site's neurons."""
    from safety_neurons.neurons import NeuronSet

    sizes = {key: size for key, size in outline.table.sizes.items() if key in outline.anatomy.places}
    NeuronSet({key: range(max(1, size // 100)) for key, size in sizes.items()}, outline.table).save(file)
    return str(file)


def words_of(method: str, model: str, limit: int, layers: str | None, place: pathlib.Path) -> list[str]:
    """The command of a search, or of `verify`."""
    if method == "verify":
        from safety_neurons.model.outline import outlines

        [outline], _ = outlines([model], device="cpu")
        neurons = a_hundredth(outline, place / "neurons.safetensors")
        words = ["verify", "deactivate", "--model", model, "--neurons", neurons, *VERIFY]
        return [*words, "--limit", str(limit), "--device", "cpu"]
    named = ["--base", model, "--aligned", model] if method == "contrast" else ["--model", model]
    some = [] if layers is None else ["--layers", layers]
    return ["find", method, *named, *METHODS[method], "--limit", str(limit), *some, "--device", "cpu"]


def measured(words: list[str]) -> dict[str, Any]:
    """The run itself, in this process."""
    from safety_neurons.model.outline import outlines

    outlines([words[3]], device="cpu")  # imports what is imported anyway, which is no memory of the run
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    before = status("VmRSS")
    pathlib.Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    clock = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        called([*words, "--out", folder + "/run"])
        disk = sum(file.stat().st_size for file in pathlib.Path(folder).rglob("*") if file.is_file())
    return {
        "memory_bytes": status("VmHWM") - before,
        "disk_bytes": disk,
        "seconds": time.process_time(),
        "wall_seconds": time.perf_counter() - clock,
    }


def alone(words: list[str], *, plan: bool) -> dict[str, Any]:
    """What a process of its own plans, or measures."""
    call = [sys.executable, __file__, "--plan" if plan else "--run", json.dumps(words)]
    done = subprocess.run(call, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr[-2000:] + done.stdout[-2000:])
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def planned_shapes() -> list[dict[str, Any]]:
    """Plans of verbs for two large public shapes: a hundredth of the neurons, built-in prompts."""
    from safety_neurons.model.outline import outlines

    sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "tests"))
    from model.test_cost import LLAMA_70B, QWEN_235B

    rows = []
    with tempfile.TemporaryDirectory() as place:
        for name, config in (("70B", LLAMA_70B), ("235B-A22B", QWEN_235B)):
            one, other = (pathlib.Path(place) / f"{name}{which}" for which in ("", "-other"))
            for folder in (one, other):
                folder.mkdir()
                (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
            [outline], _ = outlines([one])
            neurons = a_hundredth(outline, pathlib.Path(place) / f"{name}.safetensors")
            for what, words in {
                "find importance": ["--model", str(one)],
                "find contrast": ["--base", str(one), "--aligned", str(other)],
                "verify deactivate": ["--model", str(one), "--neurons", neurons],
                "tune": ["--model", str(one), "--neurons", neurons],
                "guard fit": ["--model", str(one), "--neurons", neurons, *LABELLED],
            }.items():
                plan = alone([*what.split(), *words, "--device", "cpu"], plan=True)
                rows.append({"what": what, "model": name, "plan": plan})
                print(
                    what, name, {key: f"{plan[key]:.3g}" for key in ("memory_bytes", "disk_bytes", "flops")}
                )
    return rows


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Lines of docs/scale.md: plans of the shapes, and plans beside what was measured."""
    lines = []
    for row in rows:
        plan, name = row["plan"], f"| {row['model'].removeprefix('real:')} | {row['what']} |"
        if "measured" in row:
            ratios = [f"{row['ratios'][key]:.2f}" for key in COMPARED]
            both = f"{plan['memory_bytes'] / 1e6:,.0f} ÷ {row['measured']['memory_bytes'] / 1e6:,.0f} MB"
            lines.append(f"{name} {both} = {ratios[0]} | {ratios[1]} | {ratios[2]} |")
            continue
        parts = ("activations_bytes", "cache_bytes", "logits_bytes", "statistics_bytes")
        beside = sum(plan[key] for key in parts)
        gigabytes = [f"{size / 1e9:,.1f}" for size in (plan["weights_bytes"], beside, plan["memory_bytes"])]
        kept = [f"{plan[key] / 1e6:,.0f}" for key in ("disk_bytes", "working_disk_bytes")]
        minutes = plan["flops"] / GPU_RATE / 60
        cells = [*gigabytes, f"{plan['flops'] / 1e15:.2f}", f"{minutes:.1f}", *kept]
        lines.append(" | ".join([name.removesuffix(" |"), *cells]) + " |")
    return lines


def kept_with(rows: list[dict[str, Any]], file: pathlib.Path) -> None:
    """Write the rows in the place of what the record says of the same."""
    before = json.loads(file.read_text(encoding="utf-8"))["rows"] if file.is_file() else []
    mine = {(row["what"], row["model"]) for row in rows}
    kept = [row for row in before if (row["what"], row["model"]) not in mine]
    kept = sorted(kept + rows, key=lambda row: (row["model"], row["what"]))
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"benchmark": "dry_run", "rows": kept}, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    """Measure every model and method, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", default="real:smollm2-135m-instruct")
    parser.add_argument("--methods", default=",".join(METHODS), help="or verify")
    parser.add_argument("--limit", type=int, default=8)
    parser.add_argument("--layers", help="search these alone, A:B")
    parser.add_argument("--out", type=pathlib.Path, default=RESULT)
    parser.add_argument("--shapes", action="store_true", help="plan the large shapes, measure nothing")
    parser.add_argument("--table", action="store_true", help="print the tables of docs/scale.md")
    parser.add_argument("--plan", type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument("--run", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.plan or options.run:
        print(json.dumps(called([*options.plan, "--dry-run"]) if options.plan else measured(options.run)))
        return
    if options.table:
        print("\n".join(table(json.loads(options.out.read_text(encoding="utf-8"))["rows"])))
        return
    if options.shapes:
        kept_with(planned_shapes(), options.out)
        return
    with tempfile.TemporaryDirectory() as place:
        for model in options.models.split(","):
            for method in options.methods.split(","):
                words = words_of(method, model, options.limit, options.layers, pathlib.Path(place))
                plan, real = alone(words, plan=True), alone(words, plan=False)
                ratios = {name: plan[name] / real[name] for name in COMPARED}
                what = f"{words[0]} {words[1]}, {options.limit} prompts"
                what += f", layers {options.layers}" if options.layers else ""
                row = {"what": what, "model": model, "plan": plan, "measured": real, "ratios": ratios}
                kept_with([row], options.out)
                print(what, model, {name: round(value, 2) for name, value in ratios.items()})


if __name__ == "__main__":
    main()
