"""Prints the tree of the package with one line a module, from the modules' own docstrings. `make format` puts it into the README."""

import ast
import pathlib
import sys

ROOT = pathlib.Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src" / "safety_neurons"
FLOORS = (
    "errors.py",
    "prompts neurons results",
    "model",
    "organism detectors interventions tuning guard judges suites capability",
    "studies",
    "analysis report",
    "cli",
)
START, END = "<!-- tree -->", "<!-- end of tree -->"


def line_of(path: pathlib.Path) -> str:
    """First sentence of a module's docstring."""
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return " ".join(text.split("\n\n")[0].split()).rstrip(".")


def tree() -> str:
    """The floors from the bottom up; every module with its line."""
    lines = []
    for level, names in enumerate(FLOORS):
        for name in names.split():
            folder = SOURCE / name
            if not folder.exists():
                continue
            if folder.is_file():
                lines.append(f"{level}  {name:<34}{line_of(folder)}")
                continue
            lines.append(f"{level}  {name + '/':<34}{line_of(folder / '__init__.py')}")
            modules = sorted(path for path in folder.glob("*.py") if path.name != "__init__.py")
            lines += [f"     {path.name:<32}{line_of(path)}" for path in modules]
    return "\n".join(["```", *lines, "```"])


def with_tree(readme: str) -> str:
    """The README's text with the tree brought up to date."""
    if readme.count(START) != 1 or readme.count(END) != 1:
        raise SystemExit(f"README.md: expected one {START} and one {END} around the tree; put them back")
    before, rest = readme.split(START)
    _, after = rest.split(END)
    return f"{before}{START}\n{tree()}\n{END}{after}"


if __name__ == "__main__":
    readme = ROOT / "README.md"
    text = with_tree(readme.read_text(encoding="utf-8"))
    if "--write" in sys.argv:
        readme.write_text(text, encoding="utf-8")
    else:
        sys.stdout.write(tree() + "\n")
