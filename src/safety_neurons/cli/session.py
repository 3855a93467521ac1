"""A run from the command line: its folder, its models and prompts, and how its result is kept and shown."""

import contextlib
import functools
import json
import pathlib
import time
from collections.abc import Callable, Mapping
from typing import Any

from safety_neurons.cli import console
from safety_neurons.cli.options import HOW_A_RUN_IS_SHOWN, Common
from safety_neurons.errors import UsageError

Result = dict[str, Any]


class Session:
    """Everything around one verb. `options` are the verb's own options: with the common ones they are the run's configuration."""

    def __init__(self, verb: str, common: Common, options: Mapping[str, Any]) -> None:
        self.common = common
        self.verb = verb
        shared = {name: value for name, value in vars(common).items() if name not in HOW_A_RUN_IS_SHOWN}
        self.config = {name: _plain(value) for name, value in {**options, **shared}.items()}
        self.notes: list[str] = []
        self.device: str | None = None
        self.hashes: dict[str, str] = {}

    @functools.cached_property
    def folder(self) -> Any:
        """The run's folder, made when it is first needed."""
        from safety_neurons.results import RunFolder

        out = self.common.out or default_folder(self.verb, time.strftime("%Y%m%d-%H%M%S"))
        return RunFolder(out, self.verb, self.config, overwrite=self.common.overwrite)

    @property
    def quiet(self) -> bool:
        """Whether nothing but the JSON object may be printed."""
        return self.common.json

    def run(self, work: Callable[[], Result], show: Callable[[Result], None]) -> Result:
        """Do the work unless this run is finished, keep its result, and show it."""
        finished = self.folder.finished
        result = self.folder.record["result"] if finished else work()
        if not finished:
            self.folder.finish(result, notes=self.notes, device=self.device, hashes=self.hashes)
        if not self.common.json:
            if finished:
                console.err().print(f"this run is finished: {self.folder.folder} (start it again with --overwrite)", style="dim")
            show(result)
            console.print_notes(self.notes)
            console.out().print(f"\n[dim]run[/dim] {self.folder.folder}", soft_wrap=True)
        return {**result, "run": str(self.folder.folder.absolute())}

    # Models and prompts

    def model(self, spec: str) -> Any:
        """The model of a `--model` argument."""
        from safety_neurons.model import load

        model = load(resolve(spec), **self._loading())
        self._remember(model)
        return model

    def pair(self, base: str, aligned: str) -> Any:
        """The models of `--base` and `--aligned`; adapters on one base share it."""
        from safety_neurons.model import load_pair

        pair = load_pair(resolve(base), resolve(aligned), **self._loading())
        self._remember(pair.base)
        return pair

    def prompts(self, source: str, model: Any, column: str | None = None, limit: int | None = None) -> Any:
        """The prompts of an argument; `builtin:` names mean the organism's own where the model is one."""
        from safety_neurons.prompts import prompts

        found = prompts(source, column=column, limit=limit, folder=prompt_folder(model))
        self.notes.extend(f"{source}: {note}" for note in found.notes)
        self.hashes[f"prompts {source}"] = found.sha256
        return found

    def neurons(self, path: str, model: Any) -> Any:
        """A neuron file, checked against the model."""
        from safety_neurons.neurons import NeuronSet

        loaded = NeuronSet.load(path).on(model.table, [model.name])
        self.notes.extend(loaded.notes)
        return loaded

    def batch_size(self) -> int | str:
        """`auto`, or a positive number."""
        text = self.common.batch_size
        if text == "auto":
            return text
        if not text.isdigit() or int(text) < 1:
            raise UsageError(f"--batch-size {text}: expected auto or a number of at least 1")
        return int(text)

    def progress(self, title: str) -> contextlib.AbstractContextManager[console.Report | None]:
        """A progress bar on a terminal, None elsewhere."""
        return console.progress_bar(title, quiet=self.quiet)

    def status(self, title: str) -> contextlib.AbstractContextManager[Callable[[str], None] | None]:
        """A line that names the step at work, on a terminal."""
        return console.status(title, quiet=self.quiet)

    def _remember(self, model: Any) -> None:
        self.device = f"{model.device}, {str(model.dtype).removeprefix('torch.')}"
        self.hashes["model_fingerprint"] = model.fingerprint

    def _loading(self) -> dict[str, Any]:
        common = self.common
        return {
            "device": common.device,
            "dtype": None if common.dtype == "auto" else common.dtype,
            "template": common.template,
            "system": common.system,
            "template_args": parse_object("--template-args", common.template_args),
            "offline": common.offline,
            "merge_adapters": common.merge_adapters,
            "trust_remote_code": common.trust_remote_code,
        }


def default_folder(verb: str, stamp: str) -> pathlib.Path:
    """runs/VERB-TIME, with a number behind it where that exists."""
    first = pathlib.Path("runs") / f"{verb}-{stamp}"
    candidates = (first.with_name(f"{first.name}-{number}") for number in range(2, 10_000))
    return first if not first.exists() else next(path for path in candidates if not path.exists())


def resolve(spec: str) -> str:
    """A model argument with `organism:NAME[/STAGE]` replaced by the folders it stands for."""
    if not spec.startswith("organism:"):
        return spec
    from safety_neurons import organism

    return organism.spec(spec.removeprefix("organism:"))


def prompt_folder(model: Any) -> pathlib.Path | None:
    """The folder of an organism's own prompts; None for every other model."""
    if model is None or model.folder is None:
        return None
    for folder in (model.folder, model.folder.parent):
        if (folder / "organism.json").is_file() and (folder / "prompts").is_dir():
            return folder / "prompts"
    return None


def parse_object(option: str, text: str | None) -> dict[str, Any] | None:
    """An option that holds a JSON object."""
    if text is None:
        return None
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise UsageError(f"{option} {text!r} is not JSON ({error.msg} at character {error.pos}); expected an object such as {{}}") from None
    if not isinstance(value, dict):
        raise UsageError(f"{option} {text!r} is a {type(value).__name__}, expected a JSON object such as {{}}")
    return value


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, pathlib.Path) else value
