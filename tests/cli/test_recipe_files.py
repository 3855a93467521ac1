"""What a recipe or run.json may say: what to do, and nothing that it takes a person to allow."""

import json

import pytest
from running import command, done, record, refused

PERMISSIONS = ["trust_remote_code", "overwrite", "offline", "force", "json", "debug"]


def recipe(folder, arguments, *, verb="find-importance", steps=False, shared=None, name="step"):
    path = folder / "recipe.json"
    one = {"name": name, "verb": verb, "arguments": arguments}
    path.write_text(json.dumps({"steps": [one], "shared": shared or {}} if steps else one), encoding="utf-8")
    return path


@pytest.fixture
def arguments(tiny_pair):
    return {"model": tiny_pair.plain, "prompts": tiny_pair.harmful, "limit": 2, "top": 0.1}


@pytest.mark.parametrize(
    "spelled", [*PERMISSIONS, *(name.replace("_", "-") for name in PERMISSIONS if "_" in name), "out"]
)
@pytest.mark.parametrize("how", ["single", "step", "shared"])
def test_a_permission_comes_from_the_command_line_alone(spelled, how, arguments, tmp_path):
    value = str(tmp_path / "elsewhere") if spelled == "out" else True
    more = {spelled: value}
    if how == "shared":
        path = recipe(tmp_path, arguments, steps=True, shared=more)
    else:
        path = recipe(tmp_path, arguments | more, steps=how == "step")
    words = ["run", path, *(["--out", tmp_path / "run"] if spelled != "out" else [])]
    if spelled == "out" and how != "single":
        return  # the folder of a step is always that of its name
    said = command(*words)
    assert said.code == 1
    assert f"--{spelled.replace('_', '-')}, which no file can give" in said.err
    assert not (tmp_path / "elsewhere").exists()
    assert not (tmp_path / "run").exists()


def test_code_of_a_model_is_not_run_by_a_record_that_says_so(tiny_pair, tmp_path):
    import pathlib
    import shutil

    model = pathlib.Path(shutil.copytree(tiny_pair.plain, tmp_path / "model"))
    config = json.loads((model / "config.json").read_text())
    config |= {"auto_map": {"AutoConfig": "code.Config"}, "model_type": "of_its_own"}
    (model / "config.json").write_text(json.dumps(config))
    (model / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').write('x')\nclass Config: pass\n")
    path = recipe(tmp_path, {"model": str(model), "trust_remote_code": True}, verb="doctor")
    assert "--trust-remote-code" in refused("run", path, "--out", tmp_path / "run")
    assert not (tmp_path / "ran").exists()


def test_a_permission_that_the_command_line_gives_is_given(arguments, tmp_path):
    path = recipe(tmp_path, arguments | {"trust_remote_code": True, "offline": True, "overwrite": False})
    assert done("run", path, "--out", tmp_path / "run", "--trust-remote-code", "--offline")["n_neurons"]


@pytest.mark.parametrize("value", [["a", "b"], [], True, False, ["a", True]])
def test_an_option_of_one_value_takes_no_list_of_which_it_would_keep_the_last(value, arguments, tmp_path):
    said = command("run", recipe(tmp_path, arguments | {"sites": value}), "--out", tmp_path / "run")
    assert said.code == 2, said
    assert "sites is " in said.err
    assert "takes one value" in said.err or "expected text or a number" in said.err
    assert said.err.count("\n") == 1


@pytest.mark.parametrize(
    "more",
    [
        {"prompts": ["--trust-remote-code"]},
        {"x": ["--trust-remote-code"]},
        {"seed=1 --trust-remote-code": 1},
        {"": 1},
        {"-h": True},
        {"help": True},
        {"limit": {"a": 1}},
        {"limit": [[1]]},
        {"as_published": "yes"},
        {"merge_adapters": 3},
        {"limit": "two"},
        {"version": True},
    ],
)
def test_nothing_else_becomes_a_word_of_the_command_line(more, arguments, tmp_path):
    said = command("run", recipe(tmp_path, arguments | more), "--out", tmp_path / "run")
    assert said.code in (1, 2), said
    assert said.err.count("\n") == 1, said.err
    assert said.err.startswith("safety-neurons: ")
    assert "not foreseen" not in said.err
    assert said.out == ""


@pytest.mark.parametrize(
    "verb",
    [
        "run",
        "demo",
        "guard-serve",
        "dance",
        "",
        "-",
        "find",
        "find-",
        "find-importance --overwrite",
        "../find",
    ],
)
def test_a_verb_that_is_none_or_does_not_end_by_itself_is_refused(verb, tmp_path):
    said = command("run", recipe(tmp_path, {}, verb=verb), "--out", tmp_path / "run")
    assert said.code in (1, 2)
    assert said.err.count("\n") == 1
    assert "not foreseen" not in said.err


@pytest.mark.parametrize(
    "name",
    [
        "..",
        ".",
        "",
        "/",
        "/etc/x",
        "a/b",
        "a\\b",
        "a\0b",
        "a\nb",
        "\x1b[31m",
        ".lock",
        "nul",
        "x" * 300,
        3.5e300,
        None,
    ],
)
def test_a_step_is_called_by_a_name(name, arguments, tmp_path):
    (tmp_path / "in").mkdir()
    path = recipe(tmp_path, arguments, steps=True, name=name)
    before = sorted(tmp_path.rglob("*"))
    if name is None or isinstance(name, float):
        return  # text of a number is a name
    assert "is not a plain name" in refused("run", path, "--out", tmp_path / "in" / "run")
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("verb", "more"),
    [
        ("evaluate", {"endpoint": "http://127.0.0.1:9/v1#m"}),
        ("evaluate", {"judge": "refusal,openai:http://127.0.0.1:9/v1#m"}),
        ("guard-fit", {"completions": "x", "judge": "openai:http://127.0.0.1:9/v1#m"}),
    ],
)
def test_a_file_does_not_send_keys_and_prompts_to_a_server_of_its_choice(verb, more, tiny_pair, tmp_path):
    path = recipe(tmp_path, {"model": tiny_pair.plain, **more}, verb=verb)
    assert "--allow-servers" in refused("run", path, "--out", tmp_path / "run")


def test_options_by_another_word_than_their_name_are_repeated_too(tiny_pair, tmp_path):
    from safety_neurons.model import load
    from safety_neurons.neurons import NeuronSet

    NeuronSet({"layers.0.down": [0, 1]}, load(tiny_pair.plain).table).save(tmp_path / "neurons.safetensors")
    words = [
        "--neurons",
        tmp_path / "neurons.safetensors",
        "--model",
        tiny_pair.plain,
        "--to",
        "nnsight",
        "--out",
        tmp_path / "a",
    ]
    first = done("export", "neurons", *words)
    again = done("run", tmp_path / "a" / "run.json", "--out", tmp_path / "b")
    assert {**first, "names": 0, "run": 0} == {**again, "names": 0, "run": 0}
    first = done("analyze", "layers", f"one={tmp_path / 'neurons.safetensors'}", "--out", tmp_path / "c")
    again = done("run", tmp_path / "c" / "run.json", "--out", tmp_path / "d")
    assert {**first, "figure": 0, "run": 0} == {**again, "figure": 0, "run": 0}


@pytest.mark.parametrize("part", ["../plain", "/etc", "..", "a/b"])
def test_an_organism_names_folders_of_its_own(part, tmp_path):
    from safety_neurons.errors import InputError
    from safety_neurons.model.files import open_organism

    record = {"name": "x", "stages": {"sft": [part]}, "base": "sft", "aligned": "sft"}
    (tmp_path / "organism.json").write_text(json.dumps(record))
    with pytest.raises(InputError, match="is not a plain name"):
        _ = open_organism(tmp_path).base
    with pytest.raises(InputError, match="is not a plain name"):
        open_organism(tmp_path).spec(f"{part}/truth")
    (tmp_path / "organism.json").write_text(json.dumps(record | {"name": part}))
    with pytest.raises(InputError, match="is not a plain name"):
        open_organism(tmp_path)


def test_a_language_is_no_path(tmp_path):
    from safety_neurons import prompts
    from safety_neurons.errors import InputError

    (tmp_path / "prompts").mkdir()
    (tmp_path / "x.jsonl").write_text('{"prompt": "of another folder"}\n')
    with pytest.raises(InputError, match="is no language"):
        prompts("builtin:harmful/../x", folder=tmp_path / "prompts")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda found: found | {"publshed": []}, "it says 'publshed'"),
        (lambda found: found | {"verb": "doctor", "arguments": {}}, "it says 'verb'"),
        (lambda found: found | {"steps": [found["steps"][0] | {"trail": {}}]}, "it says 'trail'"),
        (lambda found: found | {"trial": {"limti": 1}}, "`trial` gives 'limti'"),
        (lambda found: found | {"schema": "safety-neurons/2"}, "of schema 'safety-neurons/2'"),
    ],
)
def test_a_word_of_a_recipe_that_nobody_reads_is_refused(change, said, arguments, tmp_path):
    path = recipe(tmp_path, arguments, steps=True)
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    assert said in refused("run", path, "--trial", "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_steps_that_lack_a_place_are_said_where_nothing_was_published_too(arguments, tmp_path):
    steps = [
        {"name": "whole", "verb": "find-importance", "arguments": arguments},
        {"name": "open", "verb": "find-importance", "arguments": arguments | {"prompts": "{data}"}},
    ]
    found = {"places": {"data": {"about": "prompts of your own"}}, "steps": steps}
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps(found))
    words = ["run", path, "--out", tmp_path / "run"]
    assert "note: step open is left out: it needs --with data=…: prompts of your own" in command(*words).err
    result = done(*words)
    assert (list(result["steps"]), list(result["left_out"])) == (["whole"], ["open"])
    path.write_text(json.dumps(found | {"steps": steps[1:]}))
    assert "no step that can be run: open needs --with data=…" in refused(*words, code=2)
    twice = [*words, "--with", "data=a.txt", "--with", "data=b.txt"]
    assert "--with data=… is given twice" in refused(*twice, code=2)


def test_what_a_repeated_run_reads_anew_is_noted(tiny_pair, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("how do i make a cake\nhow do i grow a tree\n")
    asked = ["--model", tiny_pair.plain, "--prompts", "prompts.txt", "--count", 5]
    done("find", "importance", *asked, "--out", "first")

    def notes(out, *more):
        done("run", "first/run.json", "--out", out, *more)
        return [note for note in record(out)["notes"] if "repeated" in note]

    assert notes("same") == []
    prompts.write_text("tell me about water\n")
    assert notes("other") == ["--prompts 'prompts.txt' has other content than in the run that is repeated"]
