"""A guard on disk: `guard.safetensors` with neurons and weights, `guard.json` with everything else; both are checked as what they may be.

Anyone may have written such a folder, so sizes are looked at before anything is allocated, and whatever does not fit is one line.
"""

import math
import os
import pathlib
import struct
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes

from safety_neurons import strict_json
from safety_neurons.errors import InputError, NeuronError
from safety_neurons.guard.bindings import Bindings
from safety_neurons.guard.calibration import Calibration
from safety_neurons.guard.classifier import Classifier
from safety_neurons.guard.guard import Guard
from safety_neurons.guard.operating import OperatingPoint, check_probability
from safety_neurons.guard.pooling import Pooling
from safety_neurons.guard.rechecks import Recheck
from safety_neurons.neurons import NeuronSet, Provenance
from safety_neurons.neurons.sets import header, stored_table
from safety_neurons.results import write_bytes, write_json
from safety_neurons.results.files import ordered_header

SCHEMA = "safety-neurons-guard/1"
WEIGHTS, FACTS = "guard.safetensors", "guard.json"
VECTORS = ("weights", "mean", "scale")
MEMBERS = "neurons/"
MOST_NEURONS = 5_000_000
MOST_JSON = 32 * 2**20
MOST_HEADER = 16 * 2**20


def save(guard: Guard, folder: str | os.PathLike[str]) -> None:
    """Writes both files, each in one step, the facts last.

    Raises:
        RunError: the folder cannot be written.
    """
    place = pathlib.Path(folder)
    arrays = {name: getattr(guard.classifier, name).contiguous() for name in VECTORS}
    arrays |= {MEMBERS + key: torch.from_numpy(indices.copy()) for key, indices in guard.neurons.items()}
    told = header(guard.neurons.provenance, guard.neurons.table)
    write_bytes(place / WEIGHTS, ordered_header(to_bytes(arrays, metadata={**told, "guard": SCHEMA})))
    write_json(place / FACTS, _facts(guard))


def _facts(guard: Guard) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "n_neurons": len(guard.neurons),
        "pooling": {"kind": guard.pooling.kind, "window": guard.pooling.window},
        "bias": guard.bias,
        "calibration": guard.calibration.to_json(),
        "threshold": guard.threshold,
        "in_force": guard.in_force,
        "operating_points": [point.to_json() for point in guard.operating_points],
        "recheck": None if guard.recheck is None else guard.recheck.to_json(),
        "bindings": guard.bindings.to_json(),
        "reference": dict(guard.reference),
        "report": dict(guard.report),
        "notes": list(guard.notes),
    }


def load(folder: str | os.PathLike[str]) -> Guard:
    """The guard in a folder, not bound to a model.

    Raises:
        InputError: a file is missing, too large, damaged, or of another version. NeuronError: a damaged set.
    """
    place = pathlib.Path(folder)
    facts = _read_facts(place / FACTS)
    neurons, vectors = _read_weights(place / WEIGHTS)
    try:
        return _guard(facts, neurons, vectors)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError) as error:
        raise InputError(f"{str(place / FACTS)!r} is damaged ({_words(error)}); expected what Guard.save wrote: copy it again") from error


def _guard(facts: Mapping[str, Any], neurons: NeuronSet, vectors: Mapping[str, torch.Tensor]) -> Guard:
    pooling = facts["pooling"]
    bias = facts["bias"]
    if isinstance(bias, bool) or not isinstance(bias, int | float) or not math.isfinite(bias):
        raise InputError(f"a guard with bias {str(bias)[:20]!r}; expected a finite number")
    if not isinstance(facts["operating_points"], list) or not isinstance(facts["notes"], list):
        raise InputError("a guard whose operating points or notes are no list; expected what Guard.save wrote")
    return Guard(
        neurons,
        Pooling(str(pooling["kind"]), _whole(pooling["window"])),
        Classifier(vectors["mean"], vectors["scale"], vectors["weights"], float(bias), Calibration.from_json(facts["calibration"])),
        tuple(OperatingPoint.from_json(point) for point in facts["operating_points"]),
        check_probability(facts["threshold"], "threshold"),
        str(facts["in_force"])[:200],
        Bindings.from_json(facts["bindings"]),
        _reference(facts["reference"]),
        dict(facts["report"]),
        tuple(str(note) for note in facts["notes"]),
        None if facts["recheck"] is None else Recheck.from_json(facts["recheck"]),
    )


def _reference(found: Mapping[str, Any]) -> dict[str, Any]:
    """What is kept of the calibration examples; probabilities are checked, since thresholds are weighed by them."""
    kept = found.get("probabilities")
    lists = () if kept is None else (kept["safe"], kept["unsafe"])
    for value in (value for values in lists for value in values):
        check_probability(value, "threshold")
    return dict(found)


def _whole(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= 10**6:
        raise InputError(f"a window of {str(value)[:20]!r} tokens; expected a whole number")
    return value


def _read_facts(path: pathlib.Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > MOST_JSON:
            raise InputError(f"{str(path)!r} has {path.stat().st_size:,} bytes; expected at most {MOST_JSON:,}: this is no guard")
        found = strict_json.loads(path.read_bytes())
    except OSError as error:
        raise InputError(
            f"cannot read {str(path)!r} ({error.strerror or error}); expected the folder of a guard: check the path"
        ) from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{str(path)!r} is not the JSON of a guard ({_words(error)}); expected what Guard.save wrote") from error
    if not isinstance(found, dict) or found.get("schema") != SCHEMA:
        schema = str(found.get("schema"))[:40] if isinstance(found, dict) else type(found).__name__
        raise InputError(f"{str(path)!r} is of schema {schema!r}; expected {SCHEMA!r}: update the package or fit the guard again")
    return found


def _read_weights(path: pathlib.Path) -> tuple[NeuronSet, dict[str, torch.Tensor]]:
    _check_header(path)
    try:
        with safe_open(path, framework="pt") as opened:
            metadata = dict(opened.metadata() or {})
            names = list(opened.keys())
            if metadata.get("guard") != SCHEMA:
                raise InputError(f"{str(path)!r} holds no weights of a guard; expected the {WEIGHTS} that Guard.save wrote")
            sizes = {name: opened.get_slice(name).get_shape() for name in names}
            _check_sizes(path, sizes)
            arrays = {name: opened.get_tensor(name) for name in names}
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"cannot read {str(path)!r} ({_words(error)}); expected a whole safetensors file: copy it again") from error
    members = {name.removeprefix(MEMBERS): value.numpy() for name, value in arrays.items() if name.startswith(MEMBERS)}
    vectors = {name: arrays[name] for name in VECTORS}
    if any(vector.dtype != torch.float32 for vector in vectors.values()):
        raise InputError(f"{str(path)!r} holds weights in {vectors['weights'].dtype}; expected float32")
    told = Provenance.from_metadata(metadata, "neurons")
    neurons = NeuronSet(members, stored_table(metadata, told), told)
    if len(neurons) != sum(len(indices) for indices in members.values()) or any(np.any(np.diff(part) <= 0) for part in members.values()):
        raise NeuronError(f"{str(path)!r} names neurons twice or out of order, so weights cannot be told apart; copy it again")
    return neurons, vectors


def _check_header(path: pathlib.Path) -> None:
    """Refuse a file whose header alone is larger than a guard's can be, before anything parses it."""
    try:
        with path.open("rb") as stream:
            start = stream.read(8)
    except OSError as error:
        raise InputError(
            f"cannot read {str(path)!r} ({error.strerror or error}); expected the folder of a guard: check the path"
        ) from error
    length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
    if not 2 <= length <= min(MOST_HEADER, path.stat().st_size - 8):
        raise InputError(f"{str(path)!r} is no safetensors file of a guard (its header is said to have {length:,} bytes); copy it again")


def _check_sizes(path: pathlib.Path, sizes: Mapping[str, Any]) -> None:
    """One axis each, as many weights as neurons, and no more than a guard can have."""
    wrong = next((name for name, shape in sizes.items() if len(shape) != 1 or not (name in VECTORS or name.startswith(MEMBERS))), None)
    if wrong is not None or not all(name in sizes for name in VECTORS):
        raise InputError(f"{str(path)!r} holds {str(wrong)[:60]!r}; expected vectors {', '.join(VECTORS)} and {MEMBERS}KEY: copy it again")
    count = sum(shape[0] for name, shape in sizes.items() if name.startswith(MEMBERS))
    if not 0 < count <= MOST_NEURONS or any(sizes[name][0] != count for name in VECTORS):
        raise InputError(f"{str(path)!r} holds {count:,} neurons and {sizes['weights'][0]:,} weights; expected one weight a neuron")


def _words(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:120]
