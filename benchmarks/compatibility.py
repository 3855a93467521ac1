"""Doctor on every supported family at both ends of what the project allows, and every verb from a bare wheel.

    python benchmarks/compatibility.py [--rows oldest newest …] [--work FOLDER]
    python benchmarks/compatibility.py --table          # prints the table of what is there

For each row a virtual environment is made with that Python, the wheel of this tree is installed without
extras beside the row's versions (torch first and alone, so that nothing later chooses another), and in it

1. `demo --quick`, to its report;
2. every verb that needs no extra, on a tiny pair of models (`tests/every_verb.py`), and the help of others;
3. `doctor` on a tiny random model of every family of the contract test (`tests/families.py`).

All rows are in benchmarks/results/compatibility.json; a row whose Python or versions the index does not have
says so. Rows are what was measured, not what is promised. An environment that is there keeps its versions and
gets this tree's wheel. `lower bounds` has of every dependency the lowest version that pyproject.toml allows.
A build of torch for GPUs, which the index has for most versions, takes about 6 GB; it is run without one.
"""

import argparse
import json
import pathlib
import shutil
import subprocess
import sys
import tempfile
import tomllib
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "compatibility.json"
DEPENDENCIES: list[str] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"][
    "dependencies"
]
BOUNDS = {name: bound.split(",")[0] for name, bound in (one.split(">=") for one in DEPENDENCIES)}
"""By dependency the lowest version that is allowed, torch first as in the file."""

ROWS: dict[str, tuple[str, dict[str, str]]] = {
    "lower bounds": ("3.11", BOUNDS),
    "oldest": (
        "3.11",
        {"torch": "2.13.0", "transformers": "4.57.1", "peft": "0.18.0", "accelerate": "1.10.0"},
    ),
    "old transformers": ("3.11", {"torch": "2.13.0", "transformers": "4.57.1"}),
    "old peft": ("3.11", {"torch": "2.13.0", "peft": "0.18.0"}),
    "newest": ("3.11", {"torch": "2.13.0"}),
    "torch 2.14": ("3.11", {"torch": "2.14.1"}),
    "old torch": ("3.11", {"torch": BOUNDS["torch"]}),
    "Python 3.12": ("3.12", {"torch": "2.14.1"}),
    "Python 3.13": ("3.13", {"torch": "2.14.1"}),
    "Python 3.14": ("3.14", {"torch": "2.14.1"}),
}
"""By row its Python, and versions; what is not named is the newest of the index."""

BEGIN = """
import json, os, pathlib, sys, tempfile, warnings
warnings.simplefilter("ignore")
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/cli"]
import pytest, torch
torch.set_num_threads(1)
"""
FAMILIES = (
    BEGIN
    + """
import families
from tiny import tiny_tokenizer
from safety_neurons import doctor
from safety_neurons.model import LanguageModel
found = {}
for family in (*families.FAMILIES, *families.MOE_FAMILIES, *families.HYBRID_FAMILIES):
    try:
        model = LanguageModel(families.build(family), tiny_tokenizer())
        examined = doctor(model, n_sampled=1)
        bad = [check.check for check in examined.checks if check.passed is False]
        found[family] = "healthy" if examined.healthy else "failed: " + ", ".join(bad)
    except pytest.skip.Exception as missing:
        found[family] = f"not there: {missing}"
    except Exception as error:
        found[family] = f"{type(error).__name__}: {error}"[:200]
print(json.dumps(found))
"""
)
VERBS = (
    BEGIN
    + """
import every_verb, running
folder = pathlib.Path(tempfile.mkdtemp(dir=os.getcwd()))
os.chdir(folder)
places = every_verb.inputs(folder)
found = {}
for verb in every_verb.LINES:
    done = running.command(*every_verb.words_of(verb, places))
    found[verb] = "works" if done.code == 0 else " ".join((done.err or done.out).split())[-300:]
for verb in every_verb.WITHOUT:
    done = running.command(*verb.split(), "--help")
    found[verb] = "shows its help" if done.code == 0 else " ".join((done.err or done.out).split())[-300:]
print(json.dumps(found))
"""
)


def run(command: list[str], **given: Any) -> subprocess.CompletedProcess[str]:
    """A command, its output kept."""
    return subprocess.run(command, capture_output=True, text=True, check=False, **given)


def wheel(work: pathlib.Path) -> pathlib.Path:
    """The wheel of this tree."""
    made = run([sys.executable, "-m", "build", "--wheel", "--outdir", str(work / "dist"), str(ROOT)])
    if made.returncode:
        raise SystemExit(f"no wheel: {made.stderr[-500:]}")
    return max((work / "dist").glob("*.whl"), key=lambda file: file.stat().st_mtime)


def interpreter_of(python: str) -> str | None:
    """A Python of this version: on the path, or among those that pyenv keeps."""
    kept = sorted(pathlib.Path.home().glob(f".pyenv/versions/{python}.*/bin/python"))
    return str(kept[-1]) if kept else shutil.which(f"python{python}")


def measured(row: str, work: pathlib.Path, package: pathlib.Path) -> dict[str, Any]:
    """What a row gave."""
    python, versions = ROWS[row]
    interpreter = interpreter_of(python)
    if interpreter is None:
        return {"python": python, "why": f"no Python {python} on this machine"}
    home = work / row.replace(" ", "-")
    here = str(home / "bin" / "python")
    pip = [here, "-m", "pip", "--quiet"]
    steps, new = [["--no-deps", "--force-reinstall", str(package)]], not home.is_dir()
    if new:
        run([interpreter, "-m", "venv", str(home)])
        wanted = [f"{name}=={version}" for name, version in versions.items()]
        steps = [[wanted[0]], [str(package), *wanted]]
    for names in steps:
        installed = run([*pip, "install", "--disable-pip-version-check", *names])
        if installed.returncode:
            if new:
                shutil.rmtree(home, ignore_errors=True)
            return {"python": python, "why": installed.stderr.strip().splitlines()[-1][:300]}
    frozen = dict(
        line.lower().replace("_", "-").split("==")
        for line in run([*pip, "freeze"]).stdout.splitlines()
        if line.count("==") == 1
    )
    with tempfile.TemporaryDirectory(dir=work) as place:
        demo = run([here, "-m", "safety_neurons", "demo", "--quick", "--out", "demo"], cwd=place)
        run([*pip, "install", "pytest"])  # Files of the tests name it; nothing of the package does.
        said = {
            name: run([here, "-c", program, str(ROOT / "tests")], cwd=place)
            for name, program in (("verbs", VERBS), ("families", FAMILIES))
        }
    return {
        "python": run([here, "-c", "import platform; print(platform.python_version())"]).stdout.strip(),
        "versions": {name: frozen.get(name) for name in BOUNDS},
        "demo": "ends with its report" if demo.returncode == 0 else (demo.stderr or demo.stdout)[-300:],
        **{
            name: json.loads(done.stdout.splitlines()[-1])
            if done.returncode == 0
            else {"all": done.stderr[-300:]}
            for name, done in said.items()
        },
    }


def recorded() -> dict[str, dict[str, Any]]:
    """What was measured so far, by row."""
    if not RESULTS.is_file():
        return {}
    rows: dict[str, dict[str, Any]] = json.loads(RESULTS.read_text(encoding="utf-8"))["rows"]
    return rows


def table() -> str:
    """The rows as Markdown."""
    lines = [
        "| row | Python | torch | transformers | peft | demo | verbs | families healthy in doctor |",
        "|---" * 8 + "|",
    ]
    for row, found in recorded().items():
        if "why" in found:
            lines.append(f"| {row} | {found['python']} | not measured: {found['why']} | | | | | |")
            continue
        versions, families, verbs = found["versions"], found["families"], found["verbs"]
        healthy = [name for name, word in families.items() if word == "healthy"]
        absent = [name for name, word in families.items() if word.startswith("not there")]
        rest = [f"{name} ({word})" for name, word in families.items() if name not in (*healthy, *absent)]
        said = f"{len(healthy)} of {len(families)}" + (
            f"; not in this transformers: {', '.join(absent)}" if absent else ""
        )
        said += f"; {'; '.join(rest)}" if rest else ""
        run_here = {name: word for name, word in verbs.items() if word != "shows its help"}
        broken = [f"{name} ({word.split(': ')[-1]})" for name, word in run_here.items() if word != "works"]
        worked = f"{len(run_here) - len(broken)} of {len(run_here)}"
        worked += f"; {'; '.join(broken)}" if broken else ""
        lines.append(
            f"| {row} | {found['python']} | {versions['torch']} | {versions['transformers']} "
            f"| {versions['peft']} | {found['demo']} | {worked} | {said} |"
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
        package = wheel(work)
        for row in given.rows:
            found = measured(row, work, package)
            rows = {**recorded(), row: found}  # read last: another process may have measured others meanwhile
            record = {
                "benchmark": "compatibility",
                "rows": {name: rows[name] for name in ROWS if name in rows},
            }
            RESULTS.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(table())


if __name__ == "__main__":
    main()
