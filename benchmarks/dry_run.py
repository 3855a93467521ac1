"""`--dry-run` against what is then measured: peak memory, disk and processor time of `find` on real models.

    python benchmarks/dry_run.py --models real:smollm2-135m-instruct,real:qwen2.5-coder-0.5b-instruct

Every search runs in a process of its own, after its own dry run there, so that libraries are imported and the
rate of the machine is known. Memory is the largest resident size above the one at the start; time is of the
processor, since other programs may run beside it.
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
METHODS = {"importance": (), "contrast": ("--max-new-tokens", "16")}


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


def measured(method: str, model: str, limit: int) -> dict[str, Any]:
    """A dry run and the run itself, in this process."""
    import transformers

    named = ["--base", model, "--aligned", model] if method == "contrast" else ["--model", model]
    words = ["find", method, *named, *METHODS[method], "--limit", str(limit), "--device", "cpu"]
    plan = called([*words, "--dry-run"])
    _ = transformers.AutoModelForCausalLM, transformers.AutoTokenizer
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    before = status("VmRSS")
    pathlib.Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    started, clock = time.process_time(), time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        called([*words, "--out", folder + "/run"])
        disk = sum(file.stat().st_size for file in pathlib.Path(folder).rglob("*") if file.is_file())
    real = {
        "memory_bytes": status("VmHWM") - before,
        "disk_bytes": disk,
        "seconds": time.process_time() - started,
        "wall_seconds": time.perf_counter() - clock,
    }
    return {
        "what": f"find {method}, {limit} prompts",
        "model": model,
        "plan": plan,
        "measured": real,
        "ratios": {name: plan[name] / real[name] for name in ("memory_bytes", "disk_bytes", "seconds")},
    }


def main() -> None:
    """Measure every model and method, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", default="real:smollm2-135m-instruct")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--limit", type=int, default=8)
    parser.add_argument("--out", type=pathlib.Path, default=RESULT)
    parser.add_argument("--one", nargs=2, metavar=("METHOD", "MODEL"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measured(*options.one, options.limit)))
        return
    rows = []
    for model in options.models.split(","):
        for method in options.methods.split(","):
            words = [sys.executable, __file__, "--one", method, model, "--limit", str(options.limit)]
            done = subprocess.run(words, capture_output=True, text=True, check=False)
            if done.returncode:
                sys.exit(done.stderr[-2000:] + done.stdout[-2000:])
            rows.append(json.loads(done.stdout.strip().splitlines()[-1]))
            ratios = {name: round(value, 2) for name, value in rows[-1]["ratios"].items()}
            print(rows[-1]["what"], model, ratios)
            options.out.parent.mkdir(parents=True, exist_ok=True)
            there = options.out.is_file()
            kept = json.loads(options.out.read_text(encoding="utf-8"))["rows"] if there else []
            mine = {(row["what"], row["model"]) for row in rows}
            kept = [row for row in kept if (row["what"], row["model"]) not in mine]
            kept = sorted(kept + rows, key=lambda row: (row["model"], row["what"]))
            record = {"benchmark": "dry_run", "rows": kept}
            options.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
