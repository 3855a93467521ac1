"""What a run reads: for every option that names files, the content of what it names, by which runs are told apart."""

import pathlib
from collections.abc import Callable, Mapping
from typing import Any

from safety_neurons.cli.options import NOT_A_FILE, TEMPLATES, Common, listed
from safety_neurons.declarations import Reads

Contents = dict[str, str]
"""As in `safety_neurons.results.files`, which is imported when it is needed: it brings numpy along."""


def inputs_of(options: Mapping[str, Any], reads: Mapping[str, Reads], common: Common) -> dict[str, Contents]:
    """By option the content of what it names; what is no file (a built-in list, a suite by name) counts by its name.

    Raises:
        InputError: a file that cannot be read. ModelError: no such model.
    """
    from safety_neurons.results.files import contents_of

    contents = {name: _contents(kind.kind, options[name], options, common) for name, kind in reads.items() if options[name] is not None}
    if common.template not in TEMPLATES:
        contents["template"] = contents_of(pathlib.Path(common.template).expanduser())
    return contents


def _contents(kind: str, value: Any, options: Mapping[str, Any], common: Common) -> Contents:
    from safety_neurons.results.files import within

    parts = [str(part) for part in (value if isinstance(value, list | tuple) else [value])]
    if kind != "model" and not any(pathlib.Path(part).exists() for part in parts):
        parts = [piece for part in parts for piece in listed(part) or ()]
    if any("{language}" in part for part in parts):
        parts = [part.replace("{language}", code) for part in parts for code in listed(options.get("languages")) or ()]
    contents: Contents = {}
    for number, part in enumerate(parts):
        label, path = ("", part) if kind == "judges" else _labelled(part)
        place = f"{label}={number}" if label else str(number) if len(parts) > 1 else ""
        read = _READERS[kind](path, options, common)
        contents |= within(place, read) if place else read
    return contents


def _labelled(part: str) -> tuple[str, str]:
    """(label, path) of `NAME=PATH` and `KIND:PATH`; no label for what exists as it is, or is not of such a form."""
    if not pathlib.Path(part).exists() and not part.startswith(NOT_A_FILE):
        label, found, path = part.partition("=")
        if found:
            return label, path
        label, found, path = part.partition(":")
        if found and pathlib.Path(path).expanduser().exists():
            return label, path
    return "", part


def _file(path: str, _options: Mapping[str, Any], _common: Common) -> Contents:
    """A file or folder, or words."""
    from safety_neurons.results.files import contents_of

    source = pathlib.Path(path).expanduser()
    if path.startswith("organism:"):
        source = pathlib.Path(resolve(path))
    if not source.exists():
        return {"": f"named {path}"}
    if (source / "config.json").is_file():
        from safety_neurons.model.files import model_contents

        return model_contents(source)
    return contents_of(source)


def _set(path: str, options: Mapping[str, Any], common: Common) -> Contents:
    """A neuron or score file; a folder means those in it."""
    from safety_neurons.results.files import contents_of

    folder = pathlib.Path(path)
    return contents_of(folder, ("neurons.safetensors", "scores.safetensors")) if folder.is_dir() else _file(path, options, common)


def resolve(spec: str) -> str:
    """A model argument with `organism:NAME[/STAGE]` replaced by the folders it stands for."""
    if not spec.startswith("organism:"):
        return spec
    from safety_neurons.model.files import organism_spec

    return organism_spec(spec.removeprefix("organism:"))


def _model(text: str, _options: Mapping[str, Any], common: Common) -> Contents:
    from safety_neurons.model.files import model_contents
    from safety_neurons.model.loading import folders_of
    from safety_neurons.results.files import within

    folders = folders_of(text, offline=common.offline, trust_remote_code=common.trust_remote_code)
    if len(folders) == 1:
        return model_contents(folders[0])
    parts = [within(number or "base", model_contents(folder)) for number, folder in enumerate(folders)]
    return {place: digest for part in parts for place, digest in part.items()}


def _judge(name: str, options: Mapping[str, Any], common: Common) -> Contents:
    """The weights or the list of phrases that a judge's name stands for: on the hub too, other weights are another judge."""
    from safety_neurons.judges.registry import model_behind

    spec, path = model_behind(name), name.partition(":")[2]
    if spec is not None:
        return _model(spec, options, common)
    return _file(path if path and pathlib.Path(path).expanduser().exists() else name, options, common)


def _suite(name: str, options: Mapping[str, Any], common: Common) -> Contents:
    if name == "none" or name.startswith(NOT_A_FILE) or pathlib.Path(name).exists():
        return _file(name, options, common)
    from safety_neurons.results.files import within
    from safety_neurons.suites import suite

    read = suite(name, folder=options.get("folder"), offline=common.offline, column=options.get("column"))
    return within("suite", {str(number) if number else "": digest for number, digest in enumerate(read.sha256)})


def _organism(name: str, _options: Mapping[str, Any], _common: Common) -> Contents:
    from safety_neurons.model.files import open_organism
    from safety_neurons.results.files import contents_of

    return contents_of(open_organism(pathlib.Path(name) if pathlib.Path(name).is_dir() else name).path)


_READERS: dict[str, Callable[[str, Mapping[str, Any], Common], Contents]] = {
    "files": _file,
    "prompts": _file,
    "sets": _set,
    "neurons": _set,
    "scores": _set,
    "model": _model,
    "suites": _suite,
    "judges": _judge,
    "organism": _organism,
    "folder": lambda *_: {},  # Where suites are looked for: what is read there counts, not where it lies.
}
