"""Where the weights of a model go, and in how many bits they are kept: `--device`, `--quantize`,
`--device-map` and `--max-memory`.

Where weights lie changes no number, so a device map and memory limits are no part of what a run is told apart
by; bits and types are. Without bitsandbytes transformers has no quantisation of its own that runs while a
checkpoint is loaded.
"""

import importlib.util
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from safety_neurons import strict_json
from safety_neurons.errors import ModelError, UsageError
from safety_neurons.model import ranks

QUANTISATIONS = ("none", "8bit", "4bit")
"""How weights may be kept: as they are, or in bitsandbytes 8 or 4 bits."""

_STRATEGIES = ("auto", "balanced", "balanced_low_0", "sequential")

_SIZE = re.compile(r"\d+(\.\d+)?([KMGT]i?B)?", re.IGNORECASE)

_PLACE = re.compile(r"cpu|disk|mps|(cuda|xpu|npu|hpu)(:\d+)?|\d+")


def memory_limits(given: str | Mapping[Any, Any] | None) -> dict[int | str, int | str] | None:
    """The most memory that weights may take by device, as transformers' `max_memory`: numbers of GPUs and
    `cpu` to sizes.

    Args:
        given: `0=20GiB,cpu=48GiB`, a JSON object, or a mapping; None for no limits.

    Raises:
        UsageError: Another form, a device or a size that is none, or a device that is there twice.
    """
    if given is None:
        return None
    pairs = list(given.items()) if isinstance(given, Mapping) else _pairs(given)
    limits: dict[int | str, int | str] = {}
    for device, size in pairs:
        name = str(device).strip()
        if name not in ("cpu", "mps", "disk") and not (name.isascii() and name.isdigit()):
            raise _wrong_memory(given, f"device {name!r}")
        text = str(size).strip()
        if isinstance(size, bool) or not _SIZE.fullmatch(text) or float(re.sub("[^0-9.]", "", text)) == 0:
            raise _wrong_memory(given, f"{name}={text[:40]!r}")
        key: int | str = int(name) if name.isdigit() else name
        if key in limits:
            raise _wrong_memory(given, f"device {name!r} twice")
        limits[key] = int(text) if text.isdigit() else text
    if not limits:
        raise _wrong_memory(given, "no device")
    return limits


def _pairs(text: str) -> list[tuple[str, Any]]:
    if text.lstrip().startswith("{"):
        try:
            return list(strict_json.loads(text).items())
        except ValueError as error:
            raise _wrong_memory(text, f"no JSON ({str(error)[:80]})") from None
    parts = [part.partition("=") for part in text.split(",")]
    if not all(sign for _, sign, _ in parts):
        raise _wrong_memory(text, "a part without =")
    return [(device, size) for device, _, size in parts]


def _wrong_memory(given: object, what: str) -> UsageError:
    return UsageError(
        f"--max-memory {str(given)[:120]!r} has {what}; expected sizes by number of the GPU or cpu, such as "
        '0=20GiB,cpu=48GiB or {"0": "20GiB"}'
    )


def device_places(given: Any) -> Any:
    """A device map as `from_pretrained` takes it.

    Args:
        given: A strategy (`auto`, `balanced`, `balanced_low_0`, `sequential`), a device, a JSON object of
            modules to devices, or what `from_pretrained` takes already; None for none.

    Raises:
        UsageError: Text that is none of these.
    """
    if not isinstance(given, str) or given in _STRATEGIES:
        return given
    if _PLACE.fullmatch(given):
        return {"": int(given) if given.isdigit() else given}
    try:
        places = strict_json.loads(given) if given.lstrip().startswith("{") else None
    except ValueError:
        places = None
    if not isinstance(places, dict) or not all(_PLACE.fullmatch(str(value)) for value in places.values()):
        raise UsageError(
            f"--device-map {given[:120]!r}: expected one of {', '.join(_STRATEGIES)}, a device such as "
            'cuda:1, or a JSON object of modules to devices such as {"model": 0, "lm_head": "cpu"}'
        )
    return places


@dataclass(frozen=True)
class Placement:
    """What `load` is told of where weights go and how they are kept.

    Attributes:
        device: To move the whole model to; None where a map or a quantisation places it.
        arguments: Of `from_pretrained`.
    """

    device: torch.device | None
    arguments: dict[str, Any]

    @classmethod
    def of(cls, device: str | torch.device | None, options: Mapping[str, Any]) -> "Placement":
        """Takes `quantize`, `device_map`, `max_memory` and arguments of `from_pretrained` apart.

        Raises:
            UsageError: Values that are none, or contradict one another. ModelError: A device that this
            machine does not have, or bitsandbytes that is not installed.
        """
        arguments = {name: value for name, value in options.items() if value is not None}
        for name in ("tp_plan", "tp_size"):
            if name in arguments:
                raise UsageError(
                    f"{name} {arguments[name]!r}: tensor parallel splits weights between processes, and here "
                    "each process reads, hashes and edits whole ones; expected --device-map auto, or "
                    "--quantize 4bit"
                )
        quantize = arguments.pop("quantize", "none")
        if quantize not in QUANTISATIONS:
            raise UsageError(f"--quantize {quantize!r}: expected one of {', '.join(QUANTISATIONS)}")
        if quantize != "none":
            arguments[f"load_in_{quantize}"] = True
        limits, places = (
            memory_limits(arguments.pop("max_memory", None)),
            device_places(arguments.pop("device_map", None)),
        )
        chosen = None if device is None or str(device) == "auto" else device
        if chosen is not None and (places is not None or limits is not None):
            raise UsageError(f"--device {device} and --device-map or memory limits: expected one of them")
        if limits is not None:
            arguments["max_memory"] = limits
            places = "auto" if places is None else places
        if places is not None:
            arguments["device_map"] = places
        for used in (*(limits or ()), *(places.values() if isinstance(places, dict) else ())):
            if str(used) != "disk":
                _present(f"cuda:{used}" if str(used).isdigit() else used)
        _quantised(arguments)
        placed = bool({"device_map", "quantization_config"} & arguments.keys())
        if chosen is None:
            return cls(None if placed else cls.first(None), arguments)
        found = _present(chosen)
        if placed:
            arguments["device_map"] = {"": str(found)}
        return cls(None if placed else found, arguments)

    @staticmethod
    def first(device: str | torch.device | None) -> torch.device:
        """The device that is asked for, or the fastest present.

        Raises:
            As for `of`.
        """
        if device is not None and str(device) != "auto":
            return _present(device)
        return ranks.fastest()


def _quantised(arguments: dict[str, Any]) -> None:
    """Puts `load_in_8bit` and `load_in_4bit` as the quantisation configuration that transformers takes."""
    bits = {name: arguments.pop(name) for name in ("load_in_8bit", "load_in_4bit") if name in arguments}
    if not any(bits.values()):
        return
    if len(bits) > 1 or "quantization_config" in arguments:
        raise UsageError(
            "more than one of --quantize, load_in_8bit, load_in_4bit and quantization_config: expected one "
            "of them"
        )
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ModelError(
            "8 and 4 bits need bitsandbytes, which is not installed: pip install 'safety-neurons[quantize]', "
            "or --dtype bfloat16"
        )
    import transformers

    # It says at every product of a float32 model that its inputs are rounded to half precision.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    arguments["quantization_config"] = transformers.BitsAndBytesConfig(**bits)


def _present(name: str | torch.device) -> torch.device:
    """A device that this machine has."""
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"device {name!r}: expected 'cpu', 'cuda', 'cuda:0', 'mps', …") from error
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            raise ModelError(
                f"device {name}: this machine has {count} CUDA devices; use --device cpu, or a build of "
                "torch with CUDA"
            )
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ModelError(f"device {name}: not available on this machine; use --device cpu")
    return device
