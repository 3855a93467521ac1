"""A run from the command line: its folder, its models and prompts, and how its result is kept and shown."""

import contextlib
import functools
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal

from safety_neurons.cli import console
from safety_neurons.cli.inputs import inputs_of, resolve
from safety_neurons.cli.options import NOT_A_FILE, Common, batch_size, named, parse_object
from safety_neurons.declarations import Declaration, Reads
from safety_neurons.errors import GateError

Result = dict[str, Any]


class Session:
    """Everything around one verb. `options` are the verb's own: with the common ones they are the run's configuration."""

    def __init__(self, verb: str, common: Common, parts: Sequence[Declaration]) -> None:
        self.common = common
        self.verb = verb
        own, shared = (_configuration(declared) for declared in (parts, [common]))
        self.options = own
        self.config = {name: _plain(value) for name, value in {**own, **shared}.items()}
        self.reads = {one.name: one.reads for part in parts for one in part.options() if one.reads is not None}
        self.notes: list[str] = []
        self.models: list[Any] = []
        self.device: str | None = None
        self.hashes: dict[str, str] = {}

    @functools.cached_property
    def folder(self) -> Any:
        """The run's folder, made when it is first needed."""
        from safety_neurons.results import RunFolder

        out = self.common.out or default_folder(self.verb, time.strftime("%Y%m%d-%H%M%S"))
        return RunFolder(out, self.verb, self.config, self.common.overwrite, inputs_of(self.options, self.reads, self.common))

    @property
    def quiet(self) -> bool:
        """Whether nothing but the JSON object may be printed."""
        return self.common.json

    def run(self, work: Callable[[], Result], show: Callable[[Result], None]) -> Result:
        """Do the work unless this run is finished, keep its result, and show it."""
        self.foresee()
        finished = self.folder.finished
        if not finished:
            self._work(work)
        result, notes = self.folder.record["result"], self.folder.record.get("notes") or []
        if not self.common.json:
            if finished:
                console.tell(f"this run is finished: {console.line_of(self.folder.folder)} (start it again with --overwrite)\n")
            self._show(result, show)
            console.print_notes(notes)
            console.say(("dim", "\nrun "), str(self.folder.folder))
        return {**result, "run": str(self.folder.folder.absolute())}

    def _show(self, result: Result, show: Callable[[Result], None]) -> None:
        """Show a result; it is kept already, so that nothing that goes wrong here may end the run."""
        try:
            show(result)
        except BrokenPipeError:
            raise
        except Exception as error:
            if self.common.debug:
                raise
            problem = f"{type(error).__name__}: {error}"
            console.print_notes([f"the result cannot be shown ({problem}); it is whole in {self.folder.folder / 'run.json'}"])

    def _work(self, work: Callable[[], Result]) -> None:
        """Do the work and keep its result; a run that fails before it wrote anything leaves nothing behind."""
        try:
            result = work()
        except KeyboardInterrupt:
            self.folder.abandon()
            raise KeyboardInterrupt(f"nothing finished is lost; the same command with --out {self.folder.folder} continues") from None
        except BaseException:
            self.folder.abandon()
            raise
        of_models = [note for model in self.models for note in model.notes]
        self.folder.finish(result, notes=list(dict.fromkeys([*of_models, *self.notes])), device=self.device, hashes=self.hashes)

    def foresee(self) -> None:
        """Read the files the options name, so that a wrong one is found before a model is loaded.

        Words such as `none` name no file, nor does what other options leave unused.
        """
        from safety_neurons.neurons import NeuronSet, Scores
        from safety_neurons.prompt_lists import prompts

        for name, reads in self.reads.items():
            source = self.options[name]
            if not isinstance(source, str) or source in reads.words or (name == "foundation" and self.options["subtract"] != name):
                continue
            for path in [path for _, path in named(source)] if reads.several else [source]:
                if path.startswith(NOT_A_FILE):
                    continue
                if reads.kind == "prompts":
                    prompts(path, **self._columns(reads))
                elif reads.kind in ("neurons", "scores"):
                    (NeuronSet if reads.kind == "neurons" else Scores).load(path)

    def _columns(self, reads: Reads) -> dict[str, Any]:
        """The columns that `--column` and `--answer-column` name, where they are meant for these prompts."""
        asked = {"column": reads.column, "answer_column": reads.answers}
        return {name: self.options.get(name) if wanted else None for name, wanted in asked.items()}

    # Models and prompts

    def model(self, spec: str) -> Any:
        """The model of a `--model` argument."""
        from safety_neurons.model import load

        with self.status(f"load {spec}"):
            model = load(spec, **self._loading())
        self._remember(model)
        return model

    def pair(self, base: str, aligned: str) -> Any:
        """The models of `--base` and `--aligned`; adapters on one base share it."""
        from safety_neurons.model import load_pair

        with self.status(f"load {base} and {aligned}"):
            pair = load_pair(base, aligned, **self._loading())
        self._remember(pair.base, pair.aligned)
        return pair

    def several(self, specs: Sequence[str]) -> list[Any]:
        """Models that are compared with one another; adapters on one base share it."""
        from safety_neurons.model import load_several

        with self.status(f"load {' and '.join(specs)}"):
            models = load_several(specs, **self._loading())
        self._remember(*models)
        return models

    def read(self, name: str, model: Any, limit: int | None = None) -> Any:
        """The prompts that an option names, by the columns that are meant for it; None where it names none."""
        source, reads = self.options[name], self.reads[name]
        return None if source is None or source in reads.words else self.prompts(source, model, limit=limit, **self._columns(reads))

    def prompts(self, source: str, model: Any, limit: int | None = None, **columns: str | None) -> Any:
        """Prompts by name or file; `builtin:` names mean the organism's own where the model is one."""
        from safety_neurons.prompt_lists import prompts

        read = prompts(source, limit=limit, folder=None if model is None else model.prompt_folder, **columns)
        self.notes.extend(f"{source}: {note}" for note in read.notes)
        self.hashes[f"prompts {source}"] = read.sha256
        return read

    def neurons(self, path: str, model: Any) -> Any:
        """A neuron file, checked against the model."""
        from safety_neurons.neurons import NeuronSet

        loaded = NeuronSet.load(resolve(path)).on(model.table, [model.name])
        self.notes.extend(loaded.notes)
        return loaded

    def scores(self, path: str, model: Any) -> Any:
        """A score file, checked against the model."""
        from safety_neurons.neurons import Scores

        loaded = Scores.load(path)
        self.notes.extend(loaded.check(model.table, [model.name]))
        return Scores(dict(loaded.items()), model.table, loaded.provenance)

    def batch_size(self) -> int | Literal["auto"]:
        """`auto`, or a positive number."""
        return batch_size(self.common.batch_size)

    @property
    def running(self) -> dict[str, Any]:
        """Seed and batch size, as studies take them."""
        return {"seed": self.common.seed, "batch_size": self.batch_size()}

    @property
    def judging(self) -> dict[str, Any]:
        """Where judges run, as they take it."""
        return {name: value for name, value in (("device", self.common.device), ("offline", self.common.offline)) if value}

    def own(self, name: str) -> None:
        """Note the files of a folder inside the run's as its own."""
        root = self.folder.folder.absolute()
        for file in sorted(path for path in (root / name).rglob("*") if path.is_file()):
            self.folder.path(str(file.relative_to(root)))

    def gated(self, result: Result, gate: pathlib.Path | None) -> Result:
        """Hold a result, also of a run that was finished before, to a gate; where it is not met, say every miss and exit with 3."""
        if gate is None:
            return result
        from safety_neurons.results import Gate

        missed = Gate.load(gate).check(result)
        result = {**result, "gate": {"passed": not missed, "missed": missed}}
        if not missed:
            return result
        if self.common.json:
            failure = {"error": "; ".join(missed), "exit_code": GateError.exit_code}
            console.streams().out.write(console.json_line({**failure, **result}))
            console.streams().out.flush()
        else:
            console.tell("".join(f"gate not met: {console.line_of(line)}\n" for line in missed))
        raise SystemExit(GateError.exit_code)

    def progress(self, title: str) -> contextlib.AbstractContextManager[console.Report | None]:
        """A progress bar on a terminal, None elsewhere."""
        return console.progress_bar(title, quiet=self.quiet)

    def status(self, title: str) -> contextlib.AbstractContextManager[Callable[[str], None] | None]:
        """A line that names the step at work, on a terminal."""
        return console.status(title, quiet=self.quiet)

    def _remember(self, model: Any, *others: Any) -> None:
        self.models += [model, *others]
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
            "think_end": common.think_end,
            "offline": common.offline,
            "merge_adapters": common.merge_adapters,
            "trust_remote_code": common.trust_remote_code,
        }


def _configuration(parts: Sequence[Declaration]) -> dict[str, Any]:
    """What tells runs apart, by name of the option."""
    incidental = {one.name for part in parts for one in part.options() if one.incidental}
    return {name: value for part in parts for name, value in part.values().items() if name not in incidental}


def default_folder(verb: str, stamp: str) -> pathlib.Path:
    """runs/VERB-TIME, with a number behind it where that exists."""
    first = pathlib.Path("runs") / f"{verb}-{stamp}"
    candidates = (first.with_name(f"{first.name}-{number}") for number in range(2, 10_000))
    return first if not first.exists() else next(path for path in candidates if not path.exists())


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, pathlib.Path) else value
