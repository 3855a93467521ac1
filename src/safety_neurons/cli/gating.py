"""Gates on the command line: a result is held to thresholds in a file, and what is not met ends with exit code 3."""

import pathlib
from typing import Any

from safety_neurons.cli import console
from safety_neurons.errors import GateError


def gated(result: dict[str, Any], gate: pathlib.Path | None, *, as_json: bool) -> dict[str, Any]:
    """Holds a result, also of a run that was finished before, to the gate; where it is not met, says every miss and exits with 3."""
    if gate is None:
        return result
    from safety_neurons.results import Gate

    missed = Gate.load(gate).check(result)
    result = {**result, "gate": {"passed": not missed, "missed": missed}}
    if not missed:
        return result
    if as_json:
        said = {"error": "; ".join(missed), "exit_code": GateError.exit_code}
        console.streams().out.write(console.json_line({**said, **result}))
        console.streams().out.flush()
    else:
        console.tell("".join(f"gate not met: {console.line_of(line)}\n" for line in missed))
    raise SystemExit(GateError.exit_code)
