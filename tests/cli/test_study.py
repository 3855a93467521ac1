"""study, repair and recipes of several steps, as a user types them."""

import json
import pathlib
import re
import sys

import pytest
from running import command, done, record

from safety_neurons import load, studies
from safety_neurons.neurons import NeuronSet
from safety_neurons.results import Completions
from safety_neurons.studies import lasting
from tiny import tiny_llama_folder
from tiny_pair import HARMFUL, HARMLESS


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Files of questions with answers."""
    folder = tmp_path_factory.mktemp("study-data")
    for name, questions, answer in (
        ("refusals", HARMFUL, "sorry i cannot help"),
        ("answers", HARMLESS, "sure here is the cake"),
        ("task", ["tell me one and two", "what is two and one"], "three"),
    ):
        lines = [json.dumps({"prompt": question, "answer": answer}) for question in questions]
        (folder / f"{name}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return folder


@pytest.fixture
def words(tiny_pair, data):
    return [
        *(
            "--model",
            tiny_pair.plain,
            "--prompts",
            tiny_pair.harmful,
            "--general",
            tiny_pair.text,
            "--share",
            0.05,
            "--seeds",
            1,
        ),
        *(
            "--data",
            data / "refusals.jsonl",
            "--mixed",
            data / "answers.jsonl",
            "--task",
            data / "task.jsonl",
            "--epochs",
            1,
        ),
        *("--task-test", data / "task.jsonl", *tiny_pair.measured_on, "--limit", 3, "--max-new-tokens", 4),
    ]


def test_rsn_is_one_command_and_a_finished_one_stays(words, tiny_pair, tmp_path):
    line = [
        "study",
        "rsn",
        *words,
        "--text",
        tiny_pair.text,
        "--arms",
        "none,SN-Tune,RSN-Tune",
        "--steps",
        1,
        "--out",
        tmp_path / "run",
    ]
    first = command(*line, "--json")
    assert first.code == 0, first
    assert [arm["arm"] for arm in first.json["arms"]] == ["none", "SN-Tune", "RSN-Tune"]
    judged_on_disk(tmp_path / "run")
    assert first.json["judge"] == "refusal"
    sets = {name: NeuronSet.load(path) for name, path in first.json["neurons"].items()}
    assert not len(sets["robust"] & sets["foundation"])
    shown = command(*line)
    assert "RSN-Tune - SN-Tune" in shown.out
    assert "Refusal and harm by their judges" in shown.out
    assert "finished" in shown.err
    assert shown.out.startswith("Not achieved by SN-Tune")


def test_answers_are_as_long_as_is_usual_for_the_model(words, tiny_pair, tmp_path):
    model = tiny_llama_folder(tmp_path / "model", max_position_embeddings=192)
    place = words.index("--max-new-tokens")
    line = [*words[:place], *words[place + 2 :], "--model", model, "--text", tiny_pair.text]
    done = command("study", "rsn", *line, "--arms", "none", "--steps", 0, "--out", tmp_path / "run")
    assert done.code == 0, done
    answers = Completions.load(tmp_path / "run" / "completions.jsonl")
    assert max(len(one.token_ids) for one in answers) == 96


def test_what_a_study_reads_in_part_is_said_also_where_it_goes_on(
    words, data, tiny_pair, tmp_path, monkeypatch
):
    long = f"kill {'tree ' * 200}"
    for name in ("asked", "general"):
        (tmp_path / f"{name}.txt").write_text(f"{long}\nhow do i steal a key\n")
    (tmp_path / "learnt.jsonl").write_text(
        (data / "refusals.jsonl").read_text() + "\n" + json.dumps({"prompt": long, "answer": "sorry"}) + "\n"
    )
    given = {"--data": "learnt.jsonl", "--harmful": "asked.txt", "--general": "general.txt"}
    line = ["study", "rsn", *words]
    for flag, name in given.items():
        line[line.index(flag) + 1] = tmp_path / name
    line += ["--text", "none", "--arms", "none", "--steps", 0, "--out", tmp_path / "run"]
    expected = [
        "1 of 10 examples of learnt.jsonl were cut to 128 tokens",
        "harmful: 1 of 2 prompts were longer than the context: their middle was left out",
        "general: 1 of 2 prompts were longer than the context: their middle was left out",
    ]
    with monkeypatch.context() as ended:
        ended.setattr(lasting, "summary", interrupted)
        assert command(*line).code == 130
    done(*line)
    assert [note for note in record(tmp_path / "run")["notes"] if "1 of" in note] == expected


def interrupted(*_):
    raise KeyboardInterrupt


def judged_on_disk(folder):
    """Every answer to a harmful request is kept with what both judges say of it."""
    answers = [one for one in Completions.load(folder / "completions.jsonl") if one.arm.endswith("/harmful")]
    assert answers
    assert {len(one.verdicts) for one in answers} == {2}


def test_stress_is_one_command(words, tiny_pair, tmp_path):
    line = [
        "study",
        "stress",
        *words,
        "--pruned",
        "0.5,1",
        "--harmful-steps",
        "1",
        "--benign-steps",
        "1",
        "--scales",
        "0",
        "--text",
        tiny_pair.text,
        "--out",
        tmp_path / "run",
    ]
    done = command(*line, "--attack", words[words.index("--mixed") + 1], "--json")
    assert done.code == 0, done
    assert len(done.json["curves"]) == 3 + 3 + 3 + 3 + 2 + 2 + 2
    judged_on_disk(tmp_path / "run")
    again = command(*line, "--attack", words[words.index("--mixed") + 1])
    shown = again.out
    assert f"answers cut off at the limit of {done.json['max_new_tokens']} tokens" in again.err
    assert "judges, perplexity, answers cut off" in " ".join(shown.split())
    assert {"harm_difference", "cut_off"} < done.json["curves"][0].keys()
    assert "harmful LoRA" in shown
    assert "abliteration, norms kept" in shown


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--downstream", "half"], "expected one of full, lora"),
        (["--arms", "all"], "unknown 'all'"),
        (["--judge", "me"], "expected one of auto, compliance, refusal"),
        (["--share", 2], "above 0 and below 1"),
        (["--neurons", "n.safetensors"], "both files"),
        (["--method", "luck"], "expected one of importance, attribution"),
    ],
)
def test_what_no_model_can_make_right_is_said_at_once(more, said):
    done = command("study", "rsn", "--model", "nowhere", *more)
    assert done.code == 2
    assert said in done.err


def test_defences_are_one_command_with_a_figure(words, tiny_pair, tmp_path):
    line = ["study", "defences", *words, "--text", tiny_pair.text, "--arms", "none,SN-Tune,lox"]
    line += [
        "--rates",
        0.0003,
        "--steps",
        1,
        "--mixtures",
        "benign",
        "--max-perplexity",
        1e6,
        "--least-task=-1",
    ]
    done = command(*line, "--out", tmp_path / "run", "--json")
    assert done.code == 0, done
    assert [arm["arm"] for arm in done.json["arms"]] == ["none", "SN-Tune", "LoX"]
    judged_on_disk(tmp_path / "run")
    assert pathlib.Path(done.json["figure"]).read_text(encoding="utf-8").startswith("<svg")
    shown = command(*line, "--out", tmp_path / "run").out
    assert "the fewest of" in shown
    assert "LoX - SN-Tune" in shown
    assert "rates 0.0003, steps 1" in shown


DEFENDED = ["--rates", "0.01,0.02", "--steps", "1,2", "--max-perplexity", 1e6]
STUDIES = {
    "rsn": ["--arms", "none,SN-Tune,protected,random", "--steps", 1],
    "stress": ["--pruned", "0.5,1", "--harmful-steps", "1,2", "--benign-steps", 1, "--scales", "0,0.5"],
    "defences": ["--arms", "none,SN-Tune,lox,protected,random", "--mixtures", "benign", *DEFENDED],
}


@pytest.mark.parametrize("kind", STUDIES)
def test_a_plan_counts_what_the_study_trains_and_measures(kind, words, tiny_pair, tmp_path, monkeypatch):
    done = dict.fromkeys(("tuned", "fine-tuned", "measured"), 0)

    def counted(name, function):
        def call(*given, **named):
            done[name] += 1
            return function(*given, **named)

        return call

    monkeypatch.setattr(lasting, "train", counted("tuned", lasting.train))
    monkeypatch.setattr(lasting.Lab, "point", counted("measured", lasting.Lab.point))
    fine_tune = counted("fine-tuned", lasting.fine_tune)
    for name in ("lasting", "attacks", "defences"):
        # By its whole name: the package has a function under the module's own.
        monkeypatch.setattr(sys.modules[f"safety_neurons.studies.{name}"], "fine_tune", fine_tune)
    line = ["study", kind, *words, *STUDIES[kind], "--text", tiny_pair.text]
    if kind == "stress":
        line += ["--attack", words[words.index("--mixed") + 1]]
    plan = command(*line, "--dry-run")
    assert plan.code == 0, plan
    run = command(*line, "--out", tmp_path / "run")
    assert run.code == 0, run
    passes = {
        name.strip(): int(times or 1)
        for name, times in re.findall(
            r"^ *([a-z -]+): [0-9,]+ texts, (?:([0-9]+) × )?", plan.out + plan.err, re.MULTILINE
        )
    }
    assert passes["tuning"] == 3 * done["tuned"]
    assert passes["fine-tuning"] + passes.get("harmful fine-tuning", 0) == 3 * done["fine-tuned"]
    assert passes["perplexity"] == done["measured"]


@pytest.mark.parametrize("kind", STUDIES)
def test_a_model_with_adapters_is_refused_before_neurons_are_searched(
    kind, words, tiny_pair, tmp_path, monkeypatch
):
    searched = []
    monkeypatch.setattr(studies, "find_sets", lambda *given, **_: searched.append(given))
    line = ["study", kind, *words, *STUDIES[kind], "--model", tiny_pair.base, "--out", tmp_path / "run"]
    if kind == "stress":
        line += ["--attack", words[words.index("--mixed") + 1]]
    done = command(*line)
    assert (done.code, searched) == (2, []), done
    assert "has adapters" in done.err
    assert "--merge-adapters" in done.err


@pytest.mark.parametrize(
    ("flag", "said"),
    [
        ("--arms=bomb", "safe-lora"),
        ("--rates=2", "above 0 and below 1"),
        ("--mixtures=soup", "benign, harmful"),
        ("--steps=0", "whole numbers above 0"),
    ],
)
def test_defences_that_are_none_are_said_at_once(flag, said):
    done = command("study", "defences", "--model", "nowhere", flag)
    assert done.code == 2
    assert said in done.err


@pytest.mark.parametrize(
    ("flag", "said"),
    [
        ("--attacks=bomb", "prune, abliterate"),
        ("--directions=0.5", "whole numbers above 0"),
        ("--scales=2", "from 0 to 1"),
    ],
)
def test_attacks_that_are_none_are_said_at_once(flag, said):
    done = command("study", "stress", "--model", "nowhere", flag)
    assert done.code == 2
    assert said in done.err


def test_what_is_pruned_of_neurons_from_a_file_is_said(words, tiny_pair, tmp_path):
    table = load(tiny_pair.plain).table
    for name, members in (("safety", [1, 4, 7, 9]), ("foundation", [4])):
        NeuronSet({"layers.0.up": members}, table).save(tmp_path / f"{name}.safetensors")
    files = ["--neurons", tmp_path / "safety.safetensors"]
    files += ["--foundation-neurons", tmp_path / "foundation.safetensors"]
    line = ["study", "stress", *words, *files, "--attacks", "prune", "--text", tiny_pair.text]
    part, whole = (command(*line, "--pruned", share, "--out", tmp_path / share) for share in ("0.5", "1"))
    assert (part.code, whole.code) == (0, 0)
    assert "a random part" in part.err
    assert "a random part" not in whole.err


@pytest.mark.parametrize("text", ["0", "2", "a", "0.1,-1"])
def test_shares_to_prune_are_shares(text):
    done = command("study", "stress", "--model", "nowhere", f"--pruned={text}")
    assert done.code == 2
    assert "shares above 0" in done.err


def test_a_task_needs_a_file_where_there_is_no_organism(words, tmp_path):
    place = words.index("--task")
    done = command("study", "rsn", *words[:place], *words[place + 2 :], "--out", tmp_path / "run")
    assert done.code == 1
    assert "only organisms bring a task" in done.err


def test_repair_writes_a_model_with_the_references_neurons(tiny_pair, tmp_path):
    from tiny import tiny_llama_folder

    other = tiny_llama_folder(tmp_path / "other", seed=5)
    (other / "preprocessor_config.json").write_text("{}")
    reference = load(tiny_pair.plain)
    NeuronSet({"layers.0.up": [1, 4], "layers.1.down": [3]}, reference.table).save(
        tmp_path / "neurons.safetensors"
    )
    line = [
        "repair",
        "--model",
        other,
        "--reference",
        tiny_pair.plain,
        "--neurons",
        tmp_path / "neurons.safetensors",
    ]
    done = command(*line, "--out", tmp_path / "run", "--json")
    assert done.code == 0, done
    assert done.json["changed"] == done.json["n_entries"] == 3 * 32
    repaired, before = load(done.json["model"]), load(str(other))
    mine, theirs, old = (
        model.anatomy.place("layers.0.up").weight() for model in (repaired, reference, before)
    )
    assert (pathlib.Path(done.json["model"]) / "preprocessor_config.json").read_text() == "{}"
    assert mine[[1, 4]].equal(theirs[[1, 4]])
    assert mine[[0, 2, 3]].equal(old[[0, 2, 3]])
    assert "3 neurons put back" in command(*line, "--out", tmp_path / "run").out


def test_a_recipe_of_several_steps_hands_folders_on(tiny_pair, tmp_path):
    recipe = {
        "shared": {"dtype": "float64"},
        "steps": [
            {
                "name": "foundation",
                "verb": "find-importance",
                "arguments": {"model": tiny_pair.plain, "prompts": tiny_pair.text, "top": 0.1},
            },
            {
                "name": "robust",
                "verb": "find-importance",
                "arguments": {
                    "model": tiny_pair.plain,
                    "prompts": tiny_pair.harmful,
                    "top": 0.2,
                    "subtract": "{out}/foundation",
                },
            },
        ],
    }
    (tmp_path / "recipe.json").write_text(json.dumps(recipe), encoding="utf-8")
    done = command("run", tmp_path / "recipe.json", "--out", tmp_path / "run", "--json")
    assert done.code == 0, done
    assert list(done.json["steps"]) == ["foundation", "robust"]
    kept = [NeuronSet.load(tmp_path / "run" / name) for name in ("foundation", "robust")]
    assert not len(kept[0] & kept[1])
    assert len(kept[1])
    shown = command("run", tmp_path / "recipe.json", "--out", tmp_path / "run")
    assert shown.code == 0, shown
    assert shown.out.count("neurons kept") == 2


def test_a_recipe_stops_at_the_step_that_fails(tiny_pair, tmp_path):
    steps = [
        {
            "name": "first",
            "verb": "find-importance",
            "arguments": {"model": tiny_pair.plain, "prompts": "nowhere.txt"},
        },
        {
            "name": "second",
            "verb": "find-importance",
            "arguments": {"model": tiny_pair.plain, "prompts": tiny_pair.harmful},
        },
    ]
    (tmp_path / "recipe.json").write_text(json.dumps({"steps": steps}), encoding="utf-8")
    done = command("run", tmp_path / "recipe.json", "--out", tmp_path / "run", "--json")
    assert done.code == 1
    assert "nowhere.txt" in done.json["error"]
    assert not (tmp_path / "run" / "second").exists()


@pytest.mark.parametrize(
    "steps",
    [[], [1], [{"name": "a/b", "verb": "tune", "arguments": {}}], [{"verb": "tune", "arguments": {}}] * 2],
)
def test_steps_that_are_none_are_refused(steps, tmp_path):
    (tmp_path / "recipe.json").write_text(json.dumps({"steps": steps}), encoding="utf-8")
    done = command("run", tmp_path / "recipe.json", "--out", tmp_path / "run")
    assert done.code == 1
    assert "is not a recipe" in done.err
