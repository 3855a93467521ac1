"""The identity of a run is the content of everything it reads: other content under the same words is never
taken for the same run.
"""

import dataclasses
import json
import pathlib
import re
import shutil

import pytest
from running import command, done, record, refused
from safetensors.numpy import load_file, save_file

from safety_neurons import organism
from safety_neurons.cli import verb
from safety_neurons.cli.session import Common, Session, inputs_of
from safety_neurons.cli.verb import DECLARED
from safety_neurons.declarations import Reads
from safety_neurons.model import load
from safety_neurons.neurons import NeuronSet, Scores

# Every option is known to name what is read, or not to


def commands(group, name=""):
    for one in group.list_commands(None):
        command_of = group.commands[one]
        yield from (
            commands(command_of, f"{name} {one}")
            if hasattr(command_of, "commands")
            else [(f"{name} {one}", command_of)]
        )


NAMES_FILES = re.compile(r"\b(TOML|[Ff]iles?|[Ff]olders?|run\.json)\b|ID\[@|builtin:|FILE|URL#MODEL")
KEEP_NO_RUN = ("run", "report", "guard serve", "data verify", "import attacks")
NOT_PART_OF_A_RUN = {
    "gate": "held against results that are there",
    "endpoint": "a server",
    "at": "instead of a file",
}


def test_every_option_that_names_a_file_or_a_model_is_declared_to_be_read():
    listed = list(commands(verb.build()))  # All are imported by being listed.
    assert len(DECLARED) >= len(listed) > 40
    silent = [
        (words, one.flag, one.help)
        for words, kinds in DECLARED.items()
        for kind in kinds
        for one in kind.options()
        if one.reads is None
        and one.type not in (bool, int, float)
        and words not in KEEP_NO_RUN
        and one.name not in NOT_PART_OF_A_RUN
    ]
    assert not [option for option in silent if NAMES_FILES.search(option[2])]
    assert len(silent) > 100


# Every verb, every file


@dataclasses.dataclass
class Place:
    """Everything that verbs read, in one folder that a test may change."""

    folder: pathlib.Path

    def __getattr__(self, name):
        return str(next(path for path in self.folder.iterdir() if path.stem == name))

    @property
    def models(self):
        return ["--base", f"{self.plain}+{self.sft}", "--aligned", f"{self.plain}+{self.dpo}"]


@pytest.fixture(scope="module")
def made(tiny_pair, tmp_path_factory):
    folder = tmp_path_factory.mktemp("read")
    for name in ("plain", "sft", "dpo"):
        shutil.copytree(tiny_pair.folder / name, folder / name)
    for name in ("harmful", "harmless", "general"):
        shutil.copy(tiny_pair.folder / f"{name}.txt", folder / f"{name}.txt")
    rows = [
        {"prompt": f"how do i {n}", "answer": "No.", "label": "unsafe" if n % 2 else "safe"} for n in range(8)
    ]
    (folder / "labelled.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    model = load(str(folder / "plain"))
    NeuronSet({"layers.0.down": [0, 1]}, model.table).save(folder / "neurons.safetensors")
    NeuronSet({"layers.1.down": [0]}, model.table).save(folder / "others.safetensors")
    Scores(
        {"layers.0.down": [0.5] * dict((info.key, info.size) for info in model.table.sites)["layers.0.down"]},
        model.table,
    ).save(folder / "scores.safetensors")
    return folder


@pytest.fixture
def place(made, tmp_path):
    return Place(shutil.copytree(made, tmp_path / "read"))


VERBS = {
    "find importance": (
        lambda p: ["--model", p.plain, "--prompts", p.harmful, "--subtract", p.others],
        "plain harmful others",
    ),
    "find attribution": (
        lambda p: ["--model", f"{p.plain}+{p.sft}", "--prompts", p.harmful],
        "plain sft harmful",
    ),
    "find contrast": (
        lambda p: [*p.models, "--prompts", p.harmful, "--template", p.template],
        "plain sft dpo harmful template",
    ),
    "find mask": (
        lambda p: [*p.models, "--prompts", p.harmful, "--harmless", p.harmless],
        "plain dpo harmful harmless",
    ),
    "verify deactivate": (
        lambda p: [
            "--model",
            p.plain,
            "--neurons",
            p.neurons,
            "--harmful",
            p.harmful,
            "--harmless",
            p.harmless,
            "--text",
            p.general,
        ],
        "plain neurons harmful harmless general",
    ),
    "verify patch": (
        lambda p: [
            *p.models,
            "--scores",
            p.scores,
            "--harmful",
            p.harmful,
            "--harmless",
            p.harmless,
            "--text",
            "none",
        ],
        "plain sft dpo scores harmful harmless",
    ),
    "compare": (
        lambda p: [*p.models, "--truth", p.others, "--prompts", p.harmful, "--find-harmless", p.harmless],
        "sft dpo others harmful harmless",
    ),
    "tune": (
        lambda p: [
            "--model",
            p.plain,
            "--neurons",
            p.neurons,
            "--protect",
            p.others,
            "--data",
            p.labelled,
            "--harmless",
            p.harmless,
        ],
        "plain neurons others labelled harmless",
    ),
    "evaluate": (
        lambda p: [
            *("--model", p.plain, "--suite", f"{p.harmful},mine={p.labelled}", "--over-refusal", p.harmless),
            "--deactivate",
            p.neurons,
            "--capability",
            f"perplexity:{p.general}",
        ],
        "plain harmful labelled harmless neurons general",
    ),
    "guard fit": (
        lambda p: ["--model", p.plain, "--neurons", p.neurons, "--labelled", p.labelled],
        "plain neurons labelled",
    ),
    "study rsn": (
        lambda p: ["--model", p.plain, "--prompts", p.harmful, "--data", p.labelled, "--task", p.general],
        "plain harmful labelled general",
    ),
    "analyze layers": (lambda p: [f"one={p.neurons}", p.others], "neurons others"),
    "analyze languages": (
        lambda p: [
            "--model",
            p.plain,
            "--languages",
            "harmful,harmless",
            "--find-prompts",
            str(p.folder / "{language}.txt"),
            "--test-prompts",
            str(p.folder / "{language}.txt"),
        ],
        "plain harmful harmless",
    ),
    "doctor": (lambda p: ["--model", p.plain], "plain"),
    "repair": (lambda p: ["--model", p.plain, "--reference", p.dpo, "--neurons", p.neurons], "plain neurons"),
    "export neurons": (lambda p: ["--model", p.plain, "--neurons", p.neurons], "plain neurons"),
}


def changed(path):
    """Other content that can still be read."""
    if path.is_dir():
        file = next(iter(sorted(path.glob("*.safetensors"))))
        arrays = load_file(file)
        name = sorted(arrays)[-1]
        save_file({**arrays, name: arrays[name] + 1}, file, metadata={"format": "pt"})
    elif path.suffix == ".safetensors":
        kept = Scores.load(path) if path.stem == "scores" else NeuronSet.load(path)
        if path.stem == "scores":
            Scores({key: values + 1 for key, values in kept.items()}, kept.table).save(path)
        else:
            NeuronSet({key: [*values, 5] for key, values in kept.items()}, kept.table).save(path)
    else:
        path.write_text(
            path.read_text()
            + path.read_text().splitlines()[0].replace("0", "9")
            + " more\n" * (path.suffix == ".txt")
        )


@pytest.mark.parametrize("name", VERBS)
def test_a_finished_run_is_the_same_by_content_alone(name, place, tmp_path, monkeypatch):
    monkeypatch.setattr(
        Session, "_work", lambda self, _work: self.folder.finish({"healthy": True, "number": 1})
    )
    if name == "repair":
        shutil.copy(place.folder / "plain" / "config.json", place.folder / "dpo" / "config.json")
    options, read = VERBS[name]
    words = [*name.split(), *options(place), "--out", str(tmp_path / "run")]
    first = done(*words)
    assert done(*words) == first
    before = (tmp_path / "run" / "run.json").read_bytes()
    for stem in read.split():
        path = next(path for path in place.folder.iterdir() if path.stem == stem)
        kept = (
            shutil.copytree(path, tmp_path / "kept")
            if path.is_dir()
            else shutil.copy2(path, tmp_path / "kept")
        )
        changed(path)
        outcome = command(*words, "--json")
        said = outcome.json["error"]
        assert outcome.code == 1
        assert "has changed" in said, (stem, said)
        assert "--overwrite" in said, said
        assert "--out" in said, said
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        shutil.move(kept, path)
    assert done(*words) == first
    assert (tmp_path / "run" / "run.json").read_bytes() == before


def test_a_renamed_file_is_the_same_run_and_a_moved_run_shows_its_own_files(tiny_pair, tmp_path):
    prompts = pathlib.Path(shutil.copy(tiny_pair.harmful, tmp_path / "a.txt"))
    words = ["find", "importance", "--model", tiny_pair.plain, "--limit", "2", "--top", "0.1"]
    first = done(*words, "--prompts", prompts, "--out", tmp_path / "run")
    assert str(tmp_path) not in json.dumps(record(tmp_path / "run")["result"])
    (tmp_path / "run").rename(tmp_path / "moved")
    shutil.copytree(tiny_pair.plain, tmp_path / "model")
    words[3] = str(tmp_path / "model")
    again = done(*words, "--prompts", prompts.rename(tmp_path / "b.txt"), "--out", tmp_path / "moved")
    assert again["neurons"] == str(tmp_path / "moved" / "neurons.safetensors")
    assert {**first, "neurons": 0, "scores": 0, "run": 0} == {**again, "neurons": 0, "scores": 0, "run": 0}
    shown = command(*words, "--prompts", tmp_path / "b.txt", "--out", tmp_path / "moved")
    assert shown.code == 0
    assert "neurons" in shown.out


@pytest.mark.parametrize(
    "name", ["wildguard:org/judge", "cost:org/judge", "hf-classifier:org/judge@main", "harmbench"]
)
def test_a_judge_from_the_hub_is_told_by_what_is_there(name, tmp_path, monkeypatch):
    import huggingface_hub

    folder = tmp_path / "models" / "snapshots" / ("a" * 40)
    folder.mkdir(parents=True)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(folder))
    before = inputs_of({"judge": f"refusal,{name}"}, {"judge": Reads("judges")}, Common())["judge"]
    later = folder.rename(folder.with_name("b" * 40))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(later))
    after = inputs_of({"judge": f"refusal,{name}"}, {"judge": Reads("judges")}, Common())["judge"]
    assert "a" * 40 in before.values()
    assert {key: value for key, value in before.items() if after[key] != value} == {"1/commit": "a" * 40}


def test_a_gate_does_not_pass_on_the_numbers_of_other_weights(tiny_pair, tmp_path):
    model = pathlib.Path(shutil.copytree(tiny_pair.plain, tmp_path / "model"))
    (tmp_path / "gate.toml").write_text("harm = 1.0\nunscored = 1.0\n")
    words = [
        "evaluate",
        "--model",
        model,
        "--suite",
        tiny_pair.harmful,
        "--over-refusal",
        "none",
        "--limit",
        "2",
        "--max-new-tokens",
        "2",
        "--gate",
        tmp_path / "gate.toml",
        "--out",
        tmp_path / "run",
    ]
    assert done(*words)["gate"]["passed"]
    changed(model)
    assert "another model" in refused(*words)


def test_common_options_that_name_no_file_are_compared_as_words():
    assert {field.name for field in dataclasses.fields(Common)} - {"template"} <= {
        *(
            "out",
            "json",
            "seed",
            "batch_size",
            "overwrite",
            "debug",
            "device",
            "dtype",
            "quantize",
            "device_map",
            "max_memory",
            "offline",
            "system",
            "template_args",
            "think_end",
        ),
        *("merge_adapters", "trust_remote_code", "dry_run"),
    }


@pytest.mark.parametrize(
    "word", ["organism:planted/truth", "organism:planted/planted", "organism:planted/decoys"]
)
@pytest.mark.parametrize("kind", ["sets", "neurons", "scores"])
def test_a_set_of_an_organism_is_read_as_the_file_that_it_stands_for(kind, word):
    file, reads = organism.spec(word.removeprefix("organism:")), {"neurons": Reads(kind)}
    assert inputs_of({"neurons": word}, reads, Common()) == inputs_of({"neurons": str(file)}, reads, Common())
