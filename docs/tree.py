"""Prints the tree of the package, one line a module from the modules' own docstrings.

`make format` puts it into the pages.

The README shows the boxes, `docs/house.md` every module.
"""

import ast
import pathlib
import sys

ROOT = pathlib.Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src" / "safety_neurons"
FLOORS = (
    "errors.py counting.py strict_json.py arguments.py declarations.py",
    "prompt_lists neurons results analysis display",
    "model",
    "organism detectors interventions tuning guard judges suites capability",
    "studies",
    "report",
    "cli",
)
START, END = "<!-- tree -->", "<!-- end of tree -->"
PAGES = {"README.md": False, "docs/house.md": True}
"""Page -> whether it lists every module."""


def line_of(path: pathlib.Path) -> str:
    """First sentence of a module's docstring."""
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return " ".join(text.split("\n\n")[0].split()).rstrip(".")


def tree(modules: bool = True) -> str:
    """The floors from the bottom up; every box, and where asked every module, with its line."""
    lines = []
    for level, names in enumerate(FLOORS):
        for name in names.split():
            folder = SOURCE / name
            if folder.is_file():
                lines.append(f"{level}  {name:<16}{line_of(folder)}")
            elif folder.exists():
                lines.append(f"{level}  {name + '/':<16}{line_of(folder / '__init__.py')}")
                lines += listed(folder) if modules else []
    return "\n".join(["```", *lines, "```"])


def listed(folder: pathlib.Path, indent: str = "     ") -> list[str]:
    """A line for every module of a box, what lies in its folders included."""
    width = 37 - len(indent)
    lines = [
        f"{indent}{path.name:<{width}}{line_of(path)}"
        for path in sorted(folder.glob("*.py"))
        if path.name != "__init__.py"
    ]
    for inner in sorted(path.parent for path in folder.glob("*/__init__.py")):
        lines.append(f"{indent}{inner.name + '/':<{width}}{line_of(inner / '__init__.py')}")
        lines += listed(inner, indent + "  ")
    return lines


def with_tree(page: str, modules: bool = True) -> str:
    """A page's text with the tree brought up to date."""
    if page.count(START) != 1 or page.count(END) != 1:
        raise SystemExit(f"expected one {START} and one {END} around the tree; put them back")
    before, rest = page.split(START)
    _, after = rest.split(END)
    return f"{before}{START}\n{tree(modules)}\n{END}{after}"


if __name__ == "__main__":
    for name, modules in PAGES.items():
        page = ROOT / name
        text = with_tree(page.read_text(encoding="utf-8"), modules)
        if "--write" in sys.argv:
            page.write_text(text, encoding="utf-8")
    if "--write" not in sys.argv:
        sys.stdout.write(tree() + "\n")
