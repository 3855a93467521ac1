"""A run from the command line: its folder, its models and prompts, and how its result is kept and shown."""

import contextlib
import functools
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from safety_neurons.cli import choices, console
from safety_neurons.cli.inputs import NOT_A_FILE, READS, inputs_of
from safety_neurons.cli.options import HOW_A_RUN_IS_SHOWN, Common, batch_size, parse_object
from safety_neurons.declarations import Declaration, Reads

Result = dict[str, Any]
PROMPT_OPTIONS = (
    "prompts",
    "harmful",
    "harmless",
    "unsafe",
    "safe",
    "labelled",
    "text",
    "foundation",
    "data",
    "test_harmful",
    "test_harmless",
)
OF_ANOTHER_SHAPE = {"text", "foundation"}
"""Prompt options that `--column` does not name a column of; where there is `--data`, it is of that alone."""


class Session:
    """Everything around one verb. `options` are the verb's own options: with the common ones they are the run's configuration."""

    def __init__(self, verb: str, common: Common, options: Mapping[str, Any] | Sequence[Declaration]) -> None:
        self.reads: dict[str, Reads] | None = None
        if isinstance(options, Mapping):
            choices.check(options)
        else:
            self.reads = {one.name: one.reads for part in options for one in part.options() if one.reads is not None}
            options = {name: value for part in options for name, value in part.values().items() if name not in HOW_A_RUN_IS_SHOWN}
        self.common = common
        self.options = options
        self.verb = verb
        shared = {name: value for name, value in vars(common).items() if name not in HOW_A_RUN_IS_SHOWN}
        self.config = {name: _plain(value) for name, value in {**options, **shared}.items()}
        self.notes: list[str] = []
        self.models: list[Any] = []
        self.device: str | None = None
        self.hashes: dict[str, str] = {}

    @functools.cached_property
    def folder(self) -> Any:
        """The run's folder, made when it is first needed."""
        from safety_neurons.results import RunFolder

        out = self.common.out or default_folder(self.verb, time.strftime("%Y%m%d-%H%M%S"))
        kinds = READS if self.reads is None else {name: reads.kind for name, reads in self.reads.items()}
        return RunFolder(out, self.verb, self.config, self.common.overwrite, inputs_of(self.options, self.common, kinds))

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
        """Read the files the options name, so that a wrong one is found before a model is loaded."""
        from safety_neurons.neurons import NeuronSet, Scores
        from safety_neurons.prompts import prompts

        if self.reads is not None:
            self._foresee(self.reads)
            return
        for name in PROMPT_OPTIONS:
            source = self.options.get(name)
            unused = (name == "foundation" and self.options.get("subtract") != "foundation") or (
                source == "none" and (name == "text" or (name == "harmless" and self.options.keys() & {"data", "caution"}))
            )
            if source is not None and not unused and not source.startswith(NOT_A_FILE):
                apart = name in OF_ANOTHER_SHAPE or ("data" in self.options and name != "data")
                answers = self.options.get("answer_column") if name == "data" else None
                prompts(source, column=None if apart else self.options.get("column"), answer_column=answers)
        for name in ("neurons", "truth", "subtract", "scores", "protect"):
            path = self.options.get(name)
            if path is not None and path != "foundation" and not path.startswith(NOT_A_FILE):
                (Scores if name == "scores" else NeuronSet).load(path)

    def _foresee(self, declared: Mapping[str, Reads]) -> None:
        """The same for declared options; words such as `none` name no file, nor what other options leave unused."""
        from safety_neurons.neurons import NeuronSet, Scores
        from safety_neurons.prompts import prompts

        for name, reads in declared.items():
            source = self.options[name]
            if name == "foundation" and self.options.get("subtract") != "foundation":
                continue
            if not isinstance(source, str) or source in reads.words or source.startswith(NOT_A_FILE):
                continue
            if reads.kind == "prompts":
                answers = self.options.get("answer_column") if reads.answers else None
                prompts(source, column=self.options.get("column") if reads.column else None, answer_column=answers)
            elif reads.kind in ("neurons", "scores"):
                (NeuronSet if reads.kind == "neurons" else Scores).load(source)

    # Models and prompts

    def model(self, spec: str) -> Any:
        """The model of a `--model` argument."""
        from safety_neurons.organism import load

        with self.status(f"load {spec}"):
            model = load(spec, **self._loading())
        self._remember(model)
        return model

    def pair(self, base: str, aligned: str) -> Any:
        """The models of `--base` and `--aligned`; adapters on one base share it."""
        from safety_neurons.organism import load_pair

        with self.status(f"load {base} and {aligned}"):
            pair = load_pair(base, aligned, **self._loading())
        self._remember(pair.base, pair.aligned)
        return pair

    def several(self, specs: Sequence[str]) -> list[Any]:
        """Models that are compared with one another; adapters on one base share it."""
        from safety_neurons.organism.folder import load_several

        with self.status(f"load {' and '.join(specs)}"):
            models = load_several(specs, **self._loading())
        self._remember(*models)
        return models

    def prompts(
        self, source: str, model: Any, column: str | None = None, limit: int | None = None, answer_column: str | None = None
    ) -> Any:
        """The prompts of an argument; `builtin:` names mean the organism's own where the model is one."""
        from safety_neurons.prompts import prompts

        found = prompts(
            source, column=column, answer_column=answer_column, limit=limit, folder=None if model is None else model.prompt_folder
        )
        self.notes.extend(f"{source}: {note}" for note in found.notes)
        self.hashes[f"prompts {source}"] = found.sha256
        return found

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


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, pathlib.Path) else value
