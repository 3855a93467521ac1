"""What the pages and the README name of the package: every function they call exists under that name."""

import importlib
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
PAGES = ["README.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))]
PACKAGE = "safety_neurons"
CALLED = re.compile(rf"\b({PACKAGE}|sn)((?:\.[A-Za-z_]+)+)\(")
IMPORTED = re.compile(rf"^ *from ({PACKAGE}[\w.]*) import (\w+(?:, \w+)*)", re.MULTILINE)
BLOCK = re.compile(r"```python\n(.*?)```", re.DOTALL)


def found(path: str) -> object:
    """What a dotted name stands for."""
    names = path.split(".")
    place: object = importlib.import_module(names[0])
    for number, name in enumerate(names[1:], 2):
        if not hasattr(place, name):
            importlib.import_module(".".join(names[:number]))
        place = getattr(place, name)
    return place


@pytest.mark.parametrize("page", PAGES)
def test_what_a_page_calls_can_be_called(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    for package, name in CALLED.findall(text):
        path = f"{PACKAGE}{name}" if package == "sn" else f"{package}{name}"
        assert callable(found(path)), f"{page} calls {path}"


@pytest.mark.parametrize("page", PAGES)
def test_what_the_python_of_a_page_imports_is_there(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    for module, names in IMPORTED.findall("\n".join(BLOCK.findall(text))):
        there = importlib.import_module(module)
        assert [name for name in names.split(", ") if not hasattr(there, name)] == []
