"""Doctor on every supported family at both ends of what the project allows, and every verb from a bare wheel.

    python benchmarks/compatibility.py [--rows oldest newest …] [--work FOLDER]
    python benchmarks/compatibility.py --table          # prints the table of what is there

For each row a virtual environment is made with that Python, the wheel of this tree is installed without
extras beside the row's versions (torch is pinned, since a looser one brings a build for GPUs), and in it

1. the command line: `demo --quick`, and the help of every verb;
2. `doctor` on a tiny random model of every family of the contract test (`tests/families.py`).

One JSON file per row in benchmarks/results/compatibility; a row whose Python or versions the index does not
have says so. Rows are what was measured, not what is promised.
"""

import argparse
import json
import pathlib
import shutil
import subprocess
import sys
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "compatibility"
ROWS: dict[str, tuple[str, dict[str, str]]] = {
    "oldest": (
        "3.11",
        {"torch": "2.13.0", "transformers": "4.57.1", "peft": "0.18.0", "accelerate": "1.10.0"},
    ),
    "newest": ("3.11", {"torch": "2.13.0", "transformers": "", "peft": "", "accelerate": ""}),
    "python-3.12": ("3.12", {"torch": "2.13.0"}),
    "python-3.13": ("3.13", {"torch": "2.13.0"}),
    "python-3.14": ("3.14", {"torch": "2.13.0"}),
    "torch-2.6": ("3.11", {"torch": "2.6.0"}),
}
"""By row its Python, and versions; an empty one is the newest of the index."""

FAMILIES = """
import json, sys, types, warnings
warnings.simplefilter("ignore")
sys.path.insert(0, sys.argv[1])
import torch, transformers

class Skipped(Exception):
    pass

def skip(reason, **_):
    raise Skipped(reason)

# families.py needs one name of pytest, for what an old transformers does not have; no extras are there.
sys.modules["pytest"] = types.SimpleNamespace(skip=skip)
import families
del sys.modules["pytest"]
from tiny import tiny_tokenizer
from safety_neurons import doctor
from safety_neurons.model import LanguageModel
torch.set_num_threads(1)
found = {}
for family in (*families.FAMILIES, *families.MOE_FAMILIES, *families.HYBRID_FAMILIES):
    try:
        model = LanguageModel(families.build(family), tiny_tokenizer())
        examined = doctor(model, n_sampled=1)
        bad = [check.check for check in examined.checks if check.passed is False]
        found[family] = "healthy" if examined.healthy else "failed: " + ", ".join(bad)
    except Exception as error:
        kind = type(error).__name__
        found[family] = ("not there: " if kind == "Skipped" else f"{kind}: ") + str(error)[:160]
print(json.dumps(found))
"""
VERBS = """
import json
from safety_neurons.cli.verb import build
def verbs(group, before=""):
    for name in group.list_commands(None):
        command = group.commands[name]
        yield from verbs(command, f"{before}{name} ") if hasattr(command, "commands") else [before + name]
print(json.dumps(list(verbs(build()))))
"""


def run(command: list[str], **given: Any) -> subprocess.CompletedProcess[str]:
    """A command, its output kept."""
    return subprocess.run(command, capture_output=True, text=True, check=False, **given)


def wheel(work: pathlib.Path) -> pathlib.Path:
    """The wheel of this tree."""
    made = run([sys.executable, "-m", "build", "--wheel", "--outdir", str(work / "dist"), str(ROOT)])
    if made.returncode:
        raise SystemExit(f"no wheel: {made.stderr[-500:]}")
    return max((work / "dist").glob("*.whl"), key=lambda file: file.stat().st_mtime)


def measured(row: str, work: pathlib.Path, package: pathlib.Path) -> dict[str, Any]:
    """What a row gave."""
    python, versions = ROWS[row]
    interpreter = shutil.which(f"python{python}")
    if interpreter is None:
        return {"row": row, "python": python, "why": f"no python{python} on this machine"}
    home = work / row
    shutil.rmtree(home, ignore_errors=True)
    run([interpreter, "-m", "venv", str(home)])
    pip, here = [str(home / "bin" / "python"), "-m", "pip", "--quiet"], str(home / "bin" / "python")
    wanted = [f"{name}=={version}" if version else name for name, version in versions.items()]
    for names in ([wanted[0]], [str(package), *wanted]):
        installed = run([*pip, "install", "--disable-pip-version-check", *names])
        if installed.returncode:
            shutil.rmtree(home, ignore_errors=True)
            return {"row": row, "python": python, "why": installed.stderr.strip().splitlines()[-1][:300]}
    frozen = dict(
        line.split("==") for line in run([*pip, "freeze"]).stdout.splitlines() if line.count("==") == 1
    )
    program = str(home / "bin" / "safety-neurons")
    demo = run([program, "demo", "--quick", "--out", str(work / f"demo-{row}"), "--overwrite"], cwd=work)
    helped = _verbs(here, program, work)
    families = run([here, "-c", FAMILIES, str(ROOT / "tests")], cwd=work)
    shutil.rmtree(work / f"demo-{row}", ignore_errors=True)
    shutil.rmtree(home, ignore_errors=True)
    return {
        "row": row,
        "python": python,
        "versions": {
            name: frozen.get(name) for name in ("torch", "transformers", "peft", "accelerate", "numpy")
        },
        "demo": "ends with its report" if demo.returncode == 0 else (demo.stderr or demo.stdout)[-300:],
        "verbs": helped,
        "families": json.loads(families.stdout.splitlines()[-1])
        if families.returncode == 0
        else families.stderr[-300:],
    }


def _verbs(here: str, program: str, work: pathlib.Path) -> dict[str, str]:
    """The help of every verb that is declared."""
    names = run([here, "-c", VERBS], cwd=work)
    if names.returncode:
        return {"": names.stderr[-300:]}
    told = {}
    for name in json.loads(names.stdout):
        done = run([program, *name.split(), "--help"], cwd=work)
        told[name] = "there" if done.returncode == 0 else (done.stderr or done.stdout)[-200:]
    return told


def table() -> str:
    """The rows as Markdown."""
    lines = [
        "| row | Python | torch | transformers | peft | demo | verbs | families healthy in doctor |",
        "|---" * 8 + "|",
    ]
    for row in ROWS:
        file = RESULTS / f"{row}.json"
        if not file.is_file():
            continue
        found = json.loads(file.read_text(encoding="utf-8"))
        if "why" in found:
            lines.append(f"| {row} | {found['python']} | not measured: {found['why']} | | | | | |")
            continue
        versions, families, verbs = found["versions"], found["families"], found["verbs"]
        families = families if isinstance(families, dict) else {"all": families}
        healthy = [name for name, word in families.items() if word == "healthy"]
        absent = [name for name, word in families.items() if word.startswith("not there")]
        rest = [f"{name} ({word})" for name, word in families.items() if name not in (*healthy, *absent)]
        said = f"{len(healthy)} of {len(families)}" + (
            f"; not in this transformers: {', '.join(absent)}" if absent else ""
        )
        said += f"; {'; '.join(rest)}" if rest else ""
        there = sum(word == "there" for word in verbs.values())
        lines.append(
            f"| {row} | {found['python']} | {versions['torch']} | {versions['transformers']} "
            f"| {versions['peft']} "
            f"| {found['demo']} | {there} of {len(verbs)} | {said} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure the rows, then print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", nargs="*", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--work", type=pathlib.Path, default=pathlib.Path("compatibility"))
    parser.add_argument("--table", action="store_true", help="only print the table")
    given = parser.parse_args()
    if not given.table:
        work = given.work.resolve()
        work.mkdir(parents=True, exist_ok=True)
        RESULTS.mkdir(parents=True, exist_ok=True)
        package = wheel(work)
        for row in given.rows:
            found = json.dumps(measured(row, work, package), indent=1, ensure_ascii=False)
            (RESULTS / f"{row}.json").write_text(found + "\n", encoding="utf-8")
    print(table())


if __name__ == "__main__":
    main()
