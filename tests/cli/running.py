"""Commands run in this process, as a user would type them."""

import contextlib
import dataclasses
import functools
import io
import json
import pathlib
import sys
from typing import Any
from unittest import mock

from safety_neurons.cli import verb

BUILD = functools.cache(verb.build)
"""The table of contents is the same for every command; making it once saves a sixth of a second each."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a command left: its exit code and what it said."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        """The one object on standard output; anything else there is a failure."""
        assert self.out.count("\n") == 1, self.out
        found = json.loads(self.out, parse_constant=_no_constant)
        assert isinstance(found, dict)
        return found


def _no_constant(name: str) -> None:
    raise AssertionError(f"{name} is not JSON")


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def command(*words: object, terminal: bool = False) -> Outcome:
    """Run `safety-neurons WORDS…`, in a pipe or as if on a terminal."""
    out, err = (Terminal() if terminal else io.StringIO() for _ in range(2))
    with (
        mock.patch.object(sys, "argv", ["safety-neurons", *map(str, words)]),
        mock.patch.object(verb, "build", BUILD),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            verb.run()
        except SystemExit as stop:
            return Outcome(int(stop.code or 0), out.getvalue(), err.getvalue())
    raise AssertionError("a command always exits")


def done(*words: object) -> dict[str, Any]:
    """Run with `--json` a command that has to succeed, and return its object."""
    outcome = command(*words, "--json")
    assert outcome.code == 0, outcome.out + outcome.err
    assert outcome.err == ""
    return outcome.json


def refused(*words: object, code: int = 1) -> str:
    """Run a command that has to fail, with and without `--json`.

    Both say the same one line, which is returned.
    """
    said, as_json = command(*words), command(*words, "--json")
    assert (said.code, as_json.code) == (code, code), said.err + said.out + as_json.out
    assert as_json.err == ""
    assert set(as_json.json) == {"error", "exit_code"}
    assert as_json.json["exit_code"] == code
    assert said.err == f"safety-neurons: {as_json.json['error']}\n"
    assert said.err.count("\n") == 1
    assert "not foreseen" not in said.err
    return as_json.json["error"]


def record(folder: pathlib.Path | str) -> dict[str, Any]:
    """The run record in a folder."""
    return json.loads((pathlib.Path(folder) / "run.json").read_text(encoding="utf-8"))
