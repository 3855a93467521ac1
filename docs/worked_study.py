"""A study's commands run, and its numbers kept: what the page says is what the commands gave.

    python docs/worked_study.py [--page PAGE] --run FOLDER [--data FOLDER]
        run every command of the page in FOLDER, keep the numbers it quotes, put them into the page
    python docs/worked_study.py --keep FOLDER    the same from runs that are finished there; of other commands
        what was kept before stays
    python docs/worked_study.py --write          put the kept numbers into the page

A number in the page stands between two comments, `<!--RUN.PATH-->` and `<!--/-->`: RUN is the last part of
the command's --out, PATH leads into its JSON result (of a benchmark's, the first part is the name of its
row's file). `|FORMAT` behind the path is a Python format; without one a rate is shown with its interval. A
command that is finished is not run again, and one that was killed goes on. `DATA` in a command is the folder
of `--data`, with public data in their original formats. A command that fails is said, and the others are run.
"""

import argparse
import json
import pathlib
import re
import shlex
import subprocess
import sys
from typing import Any

HERE = pathlib.Path(__file__).resolve().parent
PAGE = HERE / "worked-study.md"
MARK = re.compile(r"<!--(?P<path>[\w.,' -]+?)(?:\|(?P<format>[^>]*?))?-->(?P<text>[^<]*)<!--/-->")


def commands(page: str) -> dict[str, list[str]]:
    """The commands of the page by the last part of their --out, in order."""
    found = {}
    for block in re.findall(r"^```sh\n(.*?)^```", page, re.S | re.M):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words[:1] in (["safety-neurons"], ["python"]) and "--out" in words:
                found[_out(words).stem] = words[words[0] == "safety-neurons" :]
    return found


def _out(words: list[str]) -> pathlib.PurePath:
    return pathlib.PurePath(words[words.index("--out") + 1])


def quoted(page: str) -> list[str]:
    """The paths of all numbers in the page."""
    return [mark["path"] for mark in MARK.finditer(page)]


def at(results: Any, path: str) -> Any:
    """The value at a path of names and list places. A name may hold dots (`tpr_at_fpr.0.01`) and spaces; of a
    list of rows that have names (`value`, `name`, `source`) a row may be called by its own.
    """
    parts = path.split(".")
    while parts:
        if isinstance(results, list):
            part = parts.pop(0)
            results = results[int(part)] if part.isdigit() else _called(results, part)
            continue
        names = (".".join(parts[:length]) for length in range(1, len(parts) + 1))
        name = next((name for name in names if name in results), parts[0])
        results = results[name]
        parts = parts[name.count(".") + 1 :]
    if isinstance(results, dict):
        return {name: results[name] for name in ("value", "low", "high") if name in results}
    return results


def _called(rows: list[Any], name: str) -> Any:
    keys = ("value", "name", "source")
    return next(row for row in rows if name in [row.get(key) for key in keys])


def shown(value: Any, form: str | None) -> str:
    """A value as the page shows it."""
    if isinstance(value, dict):
        form = form or ".2f"
        if value["value"] is None:
            return "undefined"
        return f"{value['value']:{form}} [{value['low']:{form}}, {value['high']:{form}}]"
    if isinstance(value, str | bool) or (isinstance(value, int) and not form):
        return str(value)
    return format(value, form or ".2f")


def filled(page: str, numbers: dict[str, Any]) -> str:
    """The page with every kept number in its place."""

    def put(mark: re.Match[str]) -> str:
        if mark["path"] not in numbers:
            return mark[0]
        return f"{mark[0][: mark[0].index('-->') + 3]}{shown(numbers[mark['path']], mark['format'])}<!--/-->"

    return MARK.sub(put, page)


def wrong(page: str, kept: dict[str, Any]) -> list[str]:
    """What the page says that the commands did not give: numbers that differ, and commands that were changed
    since.
    """
    said = [(mark["path"], mark["text"], mark["format"]) for mark in MARK.finditer(page)]
    numbers = kept["numbers"]
    found = [f"{path}: nothing kept" for path, _, _ in said if path not in numbers]
    told = [(path, text, shown(numbers[path], form)) for path, text, form in said if path in numbers]
    found += [
        f"{path}: the page says {text}, the command gave {right}"
        for path, text, right in told
        if text != right
    ]
    now = {name: shlex.join(words) for name, words in commands(page).items()}
    return found + [
        f"{name}: another command than the one that was run"
        for name in now
        if kept["commands"].get(name) != now[name]
    ]


def run(page: str, folder: pathlib.Path, data: pathlib.Path | None) -> None:
    """Run every command in the folder; one that is finished there is not run again."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, words in commands(page).items():
        if "DATA" in " ".join(words) and data is None:
            sys.stderr.write(f"{name}: not run; it reads public data, give their folder with --data\n")
            continue
        given = [word.replace("DATA", str(data and data.resolve())) for word in words]
        sys.stderr.write(shlex.join(given) + "\n")
        benchmark = given[0] == "python"
        program = (
            [str(HERE.parent / given[1]), *given[2:]]
            if benchmark
            else ["-m", "safety_neurons", *given, "--json"]
        )
        done = subprocess.run([sys.executable, *program], cwd=folder, capture_output=True, text=True)
        if done.returncode:
            sys.stderr.write(f"{name} ended with {done.returncode}: {done.stdout}{done.stderr[-2000:]}\n")


def keep(page: str, folder: pathlib.Path, before: dict[str, Any]) -> dict[str, Any]:
    """The values that the page quotes, from the records of the finished runs, and the commands they come
    from; of a command without a record there, what was kept before from the same command.
    """
    records: dict[str, Any] = {}
    for name, words in commands(page).items():
        out = folder / _out(words)
        if (out / "run.json").is_file():
            records[name] = json.loads((out / "run.json").read_text(encoding="utf-8")).get("result", {})
        elif words[0] == "python":
            rows = sorted(out.glob("*.json"))
            if not rows:
                continue
            records[name] = {row.stem: json.loads(row.read_text(encoding="utf-8")) for row in rows}
    now = {name: shlex.join(words) for name, words in commands(page).items()}
    unchanged = {name for name, said in now.items() if before["commands"].get(name) == said}
    numbers = {}
    for path in quoted(page):
        name = path.split(".")[0]
        if name not in records and name in unchanged:
            whole, _, part = path.rpartition(".")
            kept = before["numbers"].get(whole)  # A rate is kept whole, and a page may quote its value alone.
            known = {path: kept[part]} if isinstance(kept, dict) and part in kept else before["numbers"]
            if path in known:
                numbers[path] = known[path]
                continue
        try:
            numbers[path] = at(records, path)
        except (KeyError, IndexError, TypeError, StopIteration):
            sys.stderr.write(f"{path}: the command gave no such value\n")
    said = {name: command for name, command in now.items() if name in records or name in unchanged}
    return {"commands": said, "numbers": numbers}


def main() -> None:
    """Run or write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--page", type=pathlib.Path, default=PAGE)
    parser.add_argument("--data", type=pathlib.Path, metavar="FOLDER")
    parser.add_argument("--run", type=pathlib.Path, metavar="FOLDER")
    parser.add_argument("--keep", type=pathlib.Path, metavar="FOLDER")
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    file, kept_file = options.page, options.page.with_suffix(".json")
    page = file.read_text(encoding="utf-8")
    if options.run:
        run(page, options.run, options.data)
    kept: dict[str, Any] = {"commands": {}, "numbers": {}}
    if kept_file.is_file():
        kept = json.loads(kept_file.read_text(encoding="utf-8"))
    if options.run or options.keep:
        kept = keep(page, options.run or options.keep, kept)
        kept_file.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
    if options.run or options.keep or options.write:
        file.write_text(filled(page, kept["numbers"]), encoding="utf-8")
    for line in wrong(file.read_text(encoding="utf-8"), kept):
        sys.stderr.write(line + "\n")


if __name__ == "__main__":
    main()
