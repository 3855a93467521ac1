"""One is counted as one: `1 prompt`, not `1 prompts`."""

import ast
import pathlib
import re
from collections.abc import Iterator

import pytest

import safety_neurons
from safety_neurons.counting import numbered

SOURCE = pathlib.Path(safety_neurons.__file__).parent
MANY = """answers batches cells completions conversations entries experts groups heads layers matrices models
neurons pairs probes prompts records requests rows runs scores seeds sets sites steps texts tokens turns units
weights""".split()  # noqa: SIM905
COUNTED = re.compile(rf" (?:[a-z]+ )?({'|'.join(MANY)})\b")
NO_NUMBER = {"kind", "name", "word"}
"""What stands before a noun and says of which kind it is."""


@pytest.mark.parametrize(
    ("quantity", "words", "said"),
    [
        (1, ("row",), "1 row"),
        (0, ("row",), "0 rows"),
        (1200, ("row",), "1,200 rows"),
        (1, ("matrix", "matrices"), "1 matrix"),
        (2, ("row holds", "rows hold"), "2 rows hold"),
    ],
)
def test_a_number_and_what_is_counted_agree(quantity, words, said):
    assert numbered(quantity, *words) == said


def test_notes_and_displays_put_no_bare_number_before_several():
    """A number that begins a sentence, or follows `left out`, may be one."""
    found = [
        f"{path.name}:{value.lineno} {{{ast.unparse(value.value)}}}{behind}"
        for path in sorted(SOURCE.rglob("*.py"))
        for text in told(path)
        for value, before, behind in numbers(text)
        if (not before or before.endswith("left out ")) and COUNTED.match(behind)
    ]
    assert found == []


def told(path: pathlib.Path) -> Iterator[ast.JoinedStr]:
    """Texts that become notes, and all those of displays."""
    shown = path.parent.name == "display"
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.stmt) and not hasattr(node, "body") and (shown or said(node)):
            yield from (one for one in ast.walk(node) if isinstance(one, ast.JoinedStr))


def said(node: ast.AST) -> bool:
    """Whether a statement makes notes."""
    return any(
        (isinstance(one, ast.Name) and one.id == "notes")
        or (isinstance(one, ast.Attribute) and one.attr == "notes")
        for one in ast.walk(node)
    )


def numbers(text: ast.JoinedStr) -> Iterator[tuple[ast.FormattedValue, str, str]]:
    """What is put into a text, with the words before and behind it."""
    words = [part.value if isinstance(part, ast.Constant) else None for part in text.values]
    for place, part in enumerate(text.values):
        if isinstance(part, ast.FormattedValue):
            called = part.value.func if isinstance(part.value, ast.Call) else part.value
            if getattr(called, "id", "") not in {*NO_NUMBER, "numbered", "plural"}:
                yield (
                    part,
                    (place and words[place - 1]) or "",
                    (words[place + 1 : place + 2] or [""])[0] or "",
                )
