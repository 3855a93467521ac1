"""A run from the command line: options that verbs share, its folder, models and prompts, the content of what
it reads, its result.
"""

import contextlib
import contextvars
import dataclasses
import functools
import os
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from safety_neurons import strict_json
from safety_neurons.cli import console, processes
from safety_neurons.declarations import (
    Count,
    Declaration,
    Emptiable,
    Incidental,
    OneOf,
    Panel,
    Positive,
    Reads,
    listed,
)
from safety_neurons.errors import GateError, UsageError

TEMPLATES = ("auto", "none", "tulu")
SUITE = "suite:"
"""Before the name of a suite of the catalogue, where prompts are named."""
NOT_A_FILE = ("builtin:", "organism:", SUITE)


@dataclasses.dataclass(frozen=True)
class RunOptions(Declaration):
    """Where a run is kept and how it is shown."""

    PANEL: ClassVar[str | None] = "Running"

    out: Annotated[pathlib.Path | None, Incidental] = None
    """Folder of this run. [default: runs/VERB-TIME]"""
    json: Annotated[bool, Incidental] = False
    """Print one JSON object on stdout and nothing else."""
    seed: int = 0
    """Seed of everything that is random."""
    batch_size: str = "auto"
    """Prompts per forward pass: auto or a number."""
    overwrite: Annotated[bool, Incidental] = False
    """Start a finished run again."""
    dry_run: Annotated[bool, Incidental] = False
    """Say what memory, time and disk it would take, from the models' config.json alone, and stop."""
    debug: Annotated[bool, Incidental] = False
    """Show the traceback of an error."""


@dataclasses.dataclass(frozen=True)
class Common(RunOptions):
    """What every verb accepts."""

    PANEL: ClassVar[str | None] = "Model and template"

    device: Annotated[str | None, Incidental] = None
    """cpu, cuda, cuda:1, mps … [default: the fastest present]"""
    dtype: Annotated[str, OneOf("auto", "float32", "float64", "bfloat16", "float16")] = "auto"
    """auto, float32, float64, bfloat16 or float16."""
    quantize: Annotated[str, OneOf("none", "8bit", "4bit")] = "none"
    """Keep weights in 8 or 4 bits, by bitsandbytes (pip install 'safety-neurons[quantize]')."""
    device_map: Annotated[str | None, Incidental] = None
    """Spread the weights: auto, balanced, sequential, a device, or JSON of modules to devices."""
    max_memory: Annotated[str | None, Incidental] = None
    """Most memory that weights take, by GPU and cpu: 0=20GiB,cpu=48GiB or JSON."""
    offline: Annotated[bool, Incidental] = False
    """Never open a socket."""
    template: str = "auto"
    """auto, none, tulu or a Jinja file."""
    system: Annotated[str | None, Emptiable] = None
    """System prompt put before every prompt."""
    template_args: str | None = None
    """JSON object for the chat template."""
    think_end: str | None = None
    """Text that ends the model's thinking; what follows is judged."""
    merge_adapters: bool = False
    """Merge adapters into the weights."""
    trust_remote_code: bool = False
    """Run code that comes with the model."""

    def check(self) -> None:
        """Also seed, batch size and the template's arguments."""
        super().check()
        if self.seed < 0:
            raise UsageError(f"--seed {self.seed} is negative; expected 0 or more")
        batch_size(self.batch_size)
        parse_object("--template-args", self.template_args)
        if self.device_map is not None or self.max_memory is not None:
            from safety_neurons.model.placement import device_places, memory_limits

            device_places(self.device_map)
            memory_limits(self.max_memory)

    def look(self) -> None:
        """The template."""
        super().look()
        if self.template not in TEMPLATES and not pathlib.Path(self.template).expanduser().is_file():
            raise UsageError(
                f"--template {self.template!r} is no file; expected {', '.join(TEMPLATES)} or the path "
                "of a Jinja template"
            )


ModelName = Annotated[str, Reads("model")]
PromptFile = Annotated[str, Reads("prompts", column=True)]
OtherText = Annotated[str, Reads("prompts", words=("none",))]
"""Prompts that `--column` does not name a column of; `none` for none."""
NeuronFile = Annotated[str, Reads("neurons")]
ScoreFile = Annotated[str, Reads("scores")]


@dataclasses.dataclass(frozen=True, kw_only=True)
class OneModel(Declaration):
    """The model."""

    PANEL: ClassVar[str | None] = "Models"

    model: ModelName
    """ID[@REVISION][+ADAPTER…], a folder, a .gguf file, organism:NAME or real:NAME."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TwoModels(Declaration):
    """A base and an aligned model."""

    PANEL: ClassVar[str | None] = "Models"

    base: ModelName
    """The less safe model: ID[@REVISION][+ADAPTER…] or organism:NAME/base."""
    aligned: ModelName
    """The safer model of the same architecture."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Some(Declaration):
    """How prompts are taken from a file."""

    PANEL: ClassVar[str | None] = "Prompts"

    column: str | None = None
    """Column that holds the prompts."""
    limit: Positive | None = None
    """Use the first N prompts."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Requested(Declaration):
    """Requests that a model is measured on."""

    PANEL: ClassVar[str | None] = "Prompts"

    harmful: PromptFile = "builtin:harmful-test"
    """Harmful requests: a file or builtin:NAME[/LANG]."""
    harmless: PromptFile = "builtin:harmless-test"
    """Harmless requests: a file or builtin:NAME[/LANG]."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationPrompts(Requested):
    """What a model is measured on."""

    PANEL: ClassVar[str | None] = "Prompts"

    text: OtherText = "builtin:general-test"
    """General text for perplexity: a file or builtin:NAME[/LANG]."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Repeats(Declaration):
    """How often and how long."""

    random: Count = 5
    """Random control sets for each size."""
    max_new_tokens: Annotated[Positive | None, Panel("Prompts")] = None
    """Length of a completion, in tokens. [default: 256, on organisms 64]"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class JudgedBy(Declaration):
    """Who says what is harm."""

    harm_judge: Annotated[str, Reads("judges"), Panel("Prompts")] = "goes-along"
    """Judge of harm beside refusals: goes-along (built in), or a guard by name, as for evaluate."""


def parse_sizes(text: str | None, option: str = "--sizes") -> list[float]:
    """`--sizes`, or another option, as sorted, distinct shares."""
    try:
        shares = sorted(
            {float(part) for part in ("0.005,0.01,0.02,0.05,0.1,0.2" if text is None else text).split(",")}
        )
    except ValueError:
        raise UsageError(f"{option} {text!r}: expected comma-separated shares such as 0.01,0.05") from None
    if not all(0 < share <= 1 for share in shares):
        raise UsageError(f"{option} {text!r}: expected shares above 0 and at most 1")
    return shares


def named(text: str | None) -> list[tuple[str, str]]:
    """(name, file) of every part of a comma-separated list of FILE, NAME=FILE, builtin:NAME, suite:NAME."""
    parts = []
    for part in listed(text) or ():
        name, sign, path = part.partition("=")
        if not sign or pathlib.Path(part).exists():
            name, path = (
                (part if part.startswith(NOT_A_FILE) else pathlib.Path(part).name.partition(".")[0]),
                part,
            )
        parts.append((name, path))
    return parts


def batch_size(text: str) -> int | Literal["auto"]:
    """`auto`, or a positive number."""
    if text == "auto":
        return "auto"
    if not (text.isascii() and text.isdigit()) or int(text) < 1:
        raise UsageError(f"--batch-size {text}: expected auto or a number of at least 1")
    return int(text)


def parse_object(option: str, text: str | None) -> dict[str, Any] | None:
    """An option that holds a JSON object."""
    if text is None:
        return None
    try:
        value = strict_json.loads(text)
    except ValueError as error:
        raise UsageError(
            f"{option} {text[:200]!r} is not JSON ({str(error)[:100]}); expected an object such as {{}}"
        ) from None
    if not isinstance(value, dict):
        raise UsageError(
            f"{option} {text!r} is a {type(value).__name__}, expected a JSON object such as {{}}"
        )
    return value


Result = dict[str, Any]
NOTHING = "nothing was written"
"""What an interrupted command leaves that has begun nothing."""


class Session:
    """Everything around one verb.

    `options` are the verb's own: with the common ones they are the run's configuration.
    """

    def __init__(self, verb: str, common: Common, parts: Sequence[Declaration]) -> None:
        self.common = common
        self.verb = verb
        own, shared = (_configuration(declared) for declared in (parts, [common]))
        self.options = own
        self.config = {name: _plain(value) for name, value in {**own, **shared}.items()}
        self.reads = {
            one.name: one.reads for part in parts for one in part.options() if one.reads is not None
        }
        self.notes: list[str] = []
        self.models: list[Any] = []
        self.device: str | None = None
        self.hashes: dict[str, str] = {}
        self.stays = NOTHING
        self._place: pathlib.Path | None = None
        self._seen: int | None = None
        self._keeps_run = False

    @functools.cached_property
    def folder(self) -> Any:
        """The run's folder, made when it is first needed."""
        from safety_neurons.results import RunFolder

        inputs = inputs_of(self.options, self.reads, self.common)
        self.notes += _otherwise(_REPEATED.get() or {}, self.config, inputs)
        self._keeps_run = True

        def opened(out: pathlib.Path, copied: bool) -> RunFolder:
            self.writes(out)
            # A copy is never begun anew: it is held against what rank 0 is given.
            return RunFolder(out, self.verb, self.config, self.common.overwrite and not copied, inputs)

        return processes.folder(opened, lambda: self.into(self.verb))

    def into(self, name: str) -> pathlib.Path:
        """The folder that the command writes into: `--out`, or a new one of this name."""
        return self.writes(self.common.out or default_folder(name, time.strftime("%Y%m%d-%H%M%S")))

    def writes(self, place: pathlib.Path) -> pathlib.Path:
        """Remember the file or folder that the command writes."""
        self._place, self._seen = place, _changed_at(place)
        return place

    def left(self) -> str:
        """What there is of an interrupted command: nothing, or where it lies and how it goes on."""
        if self._place is None:
            return self.stays
        from safety_neurons.results.run import RECORD, read_json

        place, named = self._place, processes.place_of(self._place)
        runs = [*place.glob(RECORD if self._keeps_run else f"*/{RECORD}")]
        goes_on = f"nothing finished is lost; the same command with --out {named} continues"
        if named != str(place):  # Rank 0 knows better.
            return goes_on
        if not runs:
            changed = not self._keeps_run and _changed_at(place) != self._seen
            return f"what was written is in {named}" if changed else self.stays
        finished = self._keeps_run and read_json(runs[0])["status"] == "finished"
        return f"the run is finished, and whole in {named}" if finished else goes_on

    @property
    def quiet(self) -> bool:
        """Whether nothing but the JSON object may be printed."""
        return self.common.json

    def run(self, work: Callable[[], Result]) -> Result:
        """Do the work unless this run is finished, keep its result, and show it."""
        self.foresee()
        finished = self.folder.finished
        if not finished:
            self._work(work)
        result, notes = self.folder.record["result"], self.folder.record.get("notes") or []
        if not self.common.json:
            if finished:
                console.tell(
                    f"this run is finished: {console.line_of(self.folder.folder)} (start it again with "
                    "--overwrite)\n"
                )
            self._show()
            console.print_notes(notes)
            folder = str(self.folder.folder.absolute())
            console.say(("dim", "\nrun   "), str(self.folder.folder))
            for name, value in result.items():
                if isinstance(value, str) and str(pathlib.Path(value).absolute()).startswith(folder + os.sep):
                    console.say(("dim", f"{name:5} "), value)
        return {**result, "run": str(self.folder.folder.absolute())}

    def _show(self) -> None:
        """Show the result; it is kept already, so that nothing that goes wrong here may end the run."""
        from safety_neurons.display import ReportedRun

        try:
            console.show(ReportedRun(self.folder.folder, self.folder.record))
        except BrokenPipeError:
            raise
        except Exception as error:
            if self.common.debug:
                raise
            problem = f"{type(error).__name__}: {error}"
            console.print_notes(
                [f"the result cannot be shown ({problem}); it is whole in {self.folder.folder / 'run.json'}"]
            )

    def _work(self, work: Callable[[], Result]) -> None:
        """Do the work and keep its result.

        A run that fails before it wrote anything leaves nothing behind.
        """
        try:
            result = work()
            of_models = [note for model in self.models for note in model.notes]
            self.folder.finish(
                result,
                notes=list(dict.fromkeys([*self.folder.notes, *of_models, *self.notes])),
                device=self.device,
                hashes=self.hashes,
            )
        except BaseException:
            processes.ending()
            self.folder.abandon()
            raise

    def foresee(self) -> None:
        """Read the files the options name, so that a wrong one is found before a model is loaded.

        Words such as `none` name no file, nor does what other options leave unused.
        """
        from safety_neurons.neurons import NeuronSet, Scores

        for name, reads in self.reads.items():
            source = self.options[name]
            if (
                not isinstance(source, str)
                or source in reads.words
                or (name == "foundation" and self.options["subtract"] != name)
            ):
                continue
            for path in [path for _, path in named(source)] if reads.several else [source]:
                if path.startswith(NOT_A_FILE) and not path.startswith(SUITE):
                    continue
                if reads.kind == "prompts":
                    self._prompts(path, None, None, **self.columns(reads))
                elif reads.kind in ("neurons", "scores"):
                    (NeuronSet if reads.kind == "neurons" else Scores).load(path)

    def columns(self, reads: Reads) -> dict[str, Any]:
        """The columns that options name for these prompts and for their answers."""
        named_by = {"column": "column" if reads.column else "", "answer_column": reads.answers}
        return {name: self.options.get(option) if option else None for name, option in named_by.items()}

    # Models and prompts

    def model(self, spec: str) -> Any:
        """The model of a `--model` argument."""
        from safety_neurons.model import load

        with self.status(f"load {spec}"):
            model = load(spec, **self.loading())
        self._remember(model)
        return model

    def pair(self, base: str, aligned: str) -> Any:
        """The models of `--base` and `--aligned`; adapters on one base share it."""
        from safety_neurons.model import load_pair

        with self.status(f"load {base} and {aligned}"):
            pair = load_pair(base, aligned, **self.loading())
        self._remember(pair.base, pair.aligned)
        return pair

    def several(self, specs: Sequence[str]) -> list[Any]:
        """Models that are compared with one another; adapters on one base share it."""
        from safety_neurons.model import load_several

        with self.status(f"load {' and '.join(specs)}"):
            models = load_several(specs, **self.loading())
        self._remember(*models)
        return models

    def read(self, name: str, model: Any, limit: int | None = None) -> Any:
        """The prompts that an option names, by the columns that are meant for it.

        None where it names none.
        """
        from safety_neurons.prompt_lists.labels import asks_for, labelled_otherwise

        source, reads = self.options[name], self.reads[name]
        if source is None or source in reads.words:
            return None
        read = self.prompts(source, model, limit=limit, **self.columns(reads))
        if (kind := asks_for(name)) or name == "prompts":
            self.notes.extend(f"{source}: {note}" for note in labelled_otherwise(read, kind))
        return read

    def lists(self, name: str, model: Any, limit: int | None = None) -> list[Any]:
        """The prompts of every part of an option that names several lists, each under its name."""
        from safety_neurons.prompt_lists import Prompts

        columns = self.columns(self.reads[name])
        found = []
        for label, source in named(self.options[name]):
            read = self.prompts(source, model, limit, **columns)
            found.append(Prompts(read, label, read.notes))
        return found

    def prompts(self, source: str, model: Any, limit: int | None = None, **columns: str | None) -> Any:
        """Prompts by name or file; `builtin:` names mean the organism's own where the model is one."""
        read = self._prompts(source, limit, None if model is None else model.prompt_folder, **columns)
        self.notes.extend(f"{source}: {note}" for note in read.notes)
        self.hashes[f"prompts {source}"] = read.sha256
        return read

    def _prompts(self, source: str, limit: int | None, folder: Any, **columns: str | None) -> Any:
        if not source.startswith(SUITE):
            from safety_neurons.prompt_lists import prompts

            return prompts(source, limit=limit, folder=folder, **columns)
        from safety_neurons.suites import suite

        if columns.get("answer_column"):
            raise UsageError(
                f"{source}: a suite knows which column holds its answers, got {columns['answer_column']!r}; "
                "leave the option for the column away"
            )
        name, offline = source.removeprefix(SUITE), self.common.offline
        return suite(name, limit=limit, offline=offline, column=columns.get("column")).prompts

    def neurons(self, path: str, model: Any) -> Any:
        """A neuron file, checked against the model."""
        from safety_neurons.neurons import NeuronSet

        loaded = NeuronSet.load(resolve(path)).on(model.table, [model.name])
        self.notes.extend(loaded.notes)
        return loaded

    def scores(self, path: str, model: Any) -> Any:
        """A score file, checked against the model."""
        from safety_neurons.neurons import Scores

        loaded = Scores.load(path).on(model.table, [model.name])
        self.notes.extend(loaded.notes)
        return loaded

    def batch_size(self) -> int | Literal["auto"]:
        """`auto`, or a positive number."""
        return batch_size(self.common.batch_size)

    @property
    def running(self) -> dict[str, Any]:
        """Seed and batch size, as studies take them."""
        return {"seed": self.common.seed, "batch_size": self.batch_size()}

    def answer_length(self, asked: int | None) -> int:
        """Tokens of an answer of the loaded models; where that was left to the default, it is said."""
        from safety_neurons.studies.lengths import answer_length

        longest = asked or answer_length(*self.models)
        if asked is None:
            self.notes.append(
                f"answers have up to {longest} tokens, the default for this model (--max-new-tokens)"
            )
        return longest

    @property
    def judging(self) -> dict[str, Any]:
        """Where judges run, as they take it."""
        return {
            name: value
            for name, value in (("device", self.common.device), ("offline", self.common.offline))
            if value
        }

    def own(self, name: str) -> None:
        """Note the files of a folder inside the run's as its own."""
        root = self.folder.folder.absolute()
        for file in sorted(path for path in (root / name).rglob("*") if path.is_file()):
            self.folder.path(str(file.relative_to(root)))

    def judge(self, name: str) -> Any:
        """A judge by name, with the run's device."""
        from safety_neurons.judges import HARM_JUDGE, judge

        if name != HARM_JUDGE:
            self.folder.path("judgements.sqlite")
        return judge(name, **self.judging)

    def drawn(self, result: Result, file: pathlib.Path) -> Result:
        """The result, and where its figures are: drawn into a file that needs no report."""
        from safety_neurons.display import ReportedRun, part_of
        from safety_neurons.display.charts import standalone
        from safety_neurons.display.parts import plain
        from safety_neurons.results import write_bytes

        figures = part_of(ReportedRun.of(self.verb, result, self.folder.folder, self.config)).figures
        write_bytes(
            file, standalone([(figure.drawing, plain(figure.caption)) for figure in figures]).encode()
        )
        return {**result, "figure": str(file)}

    def gated(self, result: Result, gate: pathlib.Path | None) -> Result:
        """Hold a result, also of a run that was finished before, to a gate.

        Where it is not met, say every miss and exit with 3.
        """
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

    def loading(self) -> dict[str, Any]:
        """How models are loaded, as `load` takes it."""
        common = self.common
        return {
            "device": common.device,
            "dtype": None if common.dtype == "auto" else common.dtype,
            "quantize": common.quantize,
            "device_map": common.device_map,
            "max_memory": common.max_memory,
            "template": common.template,
            "system": common.system,
            "template_args": parse_object("--template-args", common.template_args),
            "think_end": common.think_end,
            "offline": common.offline,
            "merge_adapters": common.merge_adapters,
            "trust_remote_code": common.trust_remote_code,
        }


_REPEATED: contextvars.ContextVar[Mapping[str, Any] | None] = contextvars.ContextVar("repeated", default=None)


@contextlib.contextmanager
def repeating(record: Mapping[str, Any]) -> Iterator[None]:
    """The command of the block repeats the run of this record, and notes what is not as it was then."""
    before = _REPEATED.set(record)
    try:
        yield
    finally:
        _REPEATED.reset(before)


def _otherwise(
    record: Mapping[str, Any], config: Mapping[str, Any], inputs: Mapping[str, "Contents"]
) -> list[str]:
    """What a repeated run read that has other content now, though it is called the same."""
    named, read = (record.get(part) for part in ("arguments", "inputs"))
    if not isinstance(named, Mapping) or not isinstance(read, Mapping):
        return []  # a recipe, which was never run
    return [
        f"--{name.replace('_', '-')} {str(config[name])[-200:]!r} has other content than in the run that is "
        "repeated"
        for name, contents in inputs.items()
        if name in read and read[name] != contents and str(named.get(name)) == str(config.get(name))
    ]


def _changed_at(place: pathlib.Path) -> int | None:
    return place.stat().st_mtime_ns if place.exists() else None


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


# What a run reads: for every option that names files, the content of what it names, by which runs are told
# apart

Contents = dict[str, str]
"""As in `safety_neurons.results.run`, which is imported when it is needed: it brings numpy along."""


def inputs_of(options: Mapping[str, Any], reads: Mapping[str, Reads], common: Common) -> dict[str, Contents]:
    """By option the content of what it names.

    What is no file (a built-in list, a suite by name) counts by its name.

    Raises:
        InputError: a file that cannot be read. ModelError: no such model.
    """
    from safety_neurons.results.run import contents_of

    contents = {
        name: _contents(kind.kind, options[name], options, common)
        for name, kind in reads.items()
        if options[name] is not None
    }
    if common.template not in TEMPLATES:
        contents["template"] = contents_of(pathlib.Path(common.template).expanduser())
    return contents


def _contents(kind: str, value: Any, options: Mapping[str, Any], common: Common) -> Contents:
    from safety_neurons.results.run import within

    parts = [str(part) for part in (value if isinstance(value, list | tuple) else [value])]
    if kind != "model" and not any(pathlib.Path(part).exists() for part in parts):
        parts = [piece for part in parts for piece in listed(part) or ()]
    if any("{language}" in part for part in parts):
        parts = [
            part.replace("{language}", code)
            for part in parts
            for code in listed(options.get("languages")) or ()
        ]
    contents: Contents = {}
    for number, part in enumerate(parts):
        label, path = ("", part) if kind == "judges" else _labelled(part)
        prefix = f"{label}={number}" if label else str(number) if len(parts) > 1 else ""
        read = _READERS[kind](path, options, common)
        contents |= within(prefix, read) if prefix else read
    return contents


def _labelled(part: str) -> tuple[str, str]:
    """(label, path) of `NAME=PATH` and `KIND:PATH`.

    No label for what exists as it is, or is not of such a form.
    """
    if not pathlib.Path(part).exists() and not part.startswith(NOT_A_FILE):
        label, sign, path = part.partition("=")
        if sign:
            return label, path
        label, sign, path = part.partition(":")
        if sign and pathlib.Path(path).expanduser().exists():
            return label, path
    return "", part


def _file(path: str, _options: Mapping[str, Any], _common: Common) -> Contents:
    """A file or folder, or words."""
    from safety_neurons.results.run import contents_of

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
    from safety_neurons.results.run import contents_of

    folder = pathlib.Path(path)
    return (
        contents_of(folder, ("neurons.safetensors", "scores.safetensors"))
        if folder.is_dir()
        else _file(path, options, common)
    )


def resolve(spec: str) -> str:
    """A model argument with `organism:NAME[/STAGE]` replaced by the folders it stands for."""
    if not spec.startswith("organism:"):
        return spec
    from safety_neurons.model.files import organism_spec

    return organism_spec(spec.removeprefix("organism:"))


def _model(text: str, _options: Mapping[str, Any], common: Common) -> Contents:
    from safety_neurons.model.files import model_contents
    from safety_neurons.model.loading import folders_of
    from safety_neurons.results.run import within

    folders = folders_of(text, offline=common.offline, trust_remote_code=common.trust_remote_code)
    if len(folders) == 1:
        return model_contents(folders[0])
    parts = [within(number or "base", model_contents(folder)) for number, folder in enumerate(folders)]
    return {place: digest for part in parts for place, digest in part.items()}


def _judge(name: str, options: Mapping[str, Any], common: Common) -> Contents:
    """The weights or the list of phrases that a judge's name stands for: on the hub too, other weights are
    another judge.
    """
    from safety_neurons.judges.registry import model_behind

    spec, path = model_behind(name), name.partition(":")[2]
    if spec is not None:
        return _model(spec, options, common)
    return _file(path if path and pathlib.Path(path).expanduser().exists() else name, options, common)


def _suite(name: str, options: Mapping[str, Any], common: Common) -> Contents:
    if name == "none" or name.startswith(NOT_A_FILE) or pathlib.Path(name).exists():
        return _file(name, options, common)
    from safety_neurons.results.run import within
    from safety_neurons.suites import suite

    read = suite(name, folder=options.get("folder"), offline=common.offline, column=options.get("column"))
    return within(
        "suite", {str(number) if number else "": digest for number, digest in enumerate(read.sha256)}
    )


def _prompts(name: str, options: Mapping[str, Any], common: Common) -> Contents:
    """A prompt file, or the files of a suite."""
    if name.startswith(SUITE):
        return _suite(name.removeprefix(SUITE), {"column": options.get("column")}, common)
    return _file(name, options, common)


def _organism(name: str, _options: Mapping[str, Any], _common: Common) -> Contents:
    from safety_neurons.model.files import open_organism
    from safety_neurons.results.run import contents_of

    return contents_of(open_organism(pathlib.Path(name) if pathlib.Path(name).is_dir() else name).path)


_READERS: dict[str, Callable[[str, Mapping[str, Any], Common], Contents]] = {
    "files": _file,
    "prompts": _prompts,
    "sets": _set,
    "neurons": _set,
    "scores": _set,
    "model": _model,
    "suites": _suite,
    "judges": _judge,
    "organism": _organism,
    "folder": lambda *_: {},  # Where suites are looked for: what is read there counts, not where it lies.
}
