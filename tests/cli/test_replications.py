"""The recipes that ship, each followed from end to end on a tiny random model of its architecture, and what a
recipe's list of published numbers may say.
"""

import json
import pathlib

import pytest
from running import command, done, record, refused

from families import build
from judges.tiny_judges import cost_folder
from safety_neurons.cli import recipes, verb
from safety_neurons.results.replication import Ran, number_of, quantities_of
from tiny import CHAT_TEMPLATE, tiny_adapter_folder, tiny_tokenizer
from tiny_pair import GENERAL, HARMFUL, HARMLESS

FOLDER = pathlib.Path(__file__).resolve().parents[2] / "recipes"
RECIPES = sorted(FOLDER.glob("*.json"))


def rows(folder, texts, **more):
    folder.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"prompt": text, **more}) for text in texts]
    folder.write_text("\n".join(lines), encoding="utf-8")
    return folder


def more(texts):
    """Enough of a kind to fit and to hold a guard against."""
    return [f"{text} {end}" for text in texts for end in ("please", "now", "for me")]


def tiny(folder, family):
    """A random model of an architecture, with the tokenizer of whole words."""
    folder.mkdir(parents=True, exist_ok=True)
    build(family, max_position_embeddings=2048).save_pretrained(folder)
    tiny_tokenizer(CHAT_TEMPLATE).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Files for every place of every recipe, by place."""
    root = tmp_path_factory.mktemp("places")
    requests = rows(root / "requests.jsonl", HARMFUL)
    attacked = root / "attacked.jsonl"
    entry = {
        "behavior_id": "a",
        "goal": HARMFUL[0],
        "method": "AutoDAN",
        "source_model": "m",
        "adaptive": True,
    }
    attacked.write_text(json.dumps({**entry, "prompt": f"{HARMFUL[0]} please"}), encoding="utf-8")
    mmlu = root / "mmlu" / "data"
    for part in ("dev", "val", "test"):
        (mmlu / part).mkdir(parents=True)
        (mmlu / part / f"food_{part}.csv").write_text("what is red,cake,tree,water,fire,A\n" * 3)
    sums = root / "gsm8k.jsonl"
    one = {"question": "what is two and one ?", "answer": "two and one is three #### 3"}
    sums.write_text("\n".join([json.dumps(one)] * 4), encoding="utf-8")
    labelled = root / "labelled"
    rows(labelled / "unsafe.jsonl", more(HARMFUL))
    rows(labelled / "safe.jsonl", more(HARMLESS))
    cost, _ = cost_folder(root / "cost")
    files = {
        **dict.fromkeys(("advbench", "find", "held-out", "harmful", "jbb", "requests", "prompts"), requests),
        **dict.fromkeys(("autodan", "pair", "autodan-tuned", "pair-tuned"), attacked),
        **dict.fromkeys(("gsm8k", "gsm8k-train", "gsm8k-test"), sums),
        **dict.fromkeys(("redteam", "harmbench", "jailbreakllms"), requests),
        **dict.fromkeys(("harmless", "held-out-harmless"), rows(root / "harmless.jsonl", HARMLESS)),
        **dict.fromkeys(("general", "text"), rows(root / "general.jsonl", GENERAL)),
        "mmlu": mmlu.parent,
        "judge": f"cost:{cost}",
        "train": labelled,
    }
    return files, requests, labelled


LEFT_OUT = ("openai-mod", "aegis-1", "aegis-2", "wildguard", "safe-rlhf", "redteam", "jailbreakllms")
"""Places that nobody fills: their steps do what those of others do, and take time."""


def places(path, data, **more):
    """The words that fill every place of a recipe."""
    files, requests, labelled = data
    benchmark = labelled if path.stem == "siren-f1" else requests
    wanted = json.loads(path.read_text(encoding="utf-8"))["places"]
    given = {name: more.get(name, files.get(name, benchmark)) for name in wanted}
    return [
        word
        for name, value in given.items()
        if name not in LEFT_OUT
        for word in ("--with", f"{name}={value}")
    ]


ARCHITECTURES = {
    "cna-jbb": "qwen2",
    "paper1-headline": "llama",
    "paper1-table4": "mistral",
    "paper2-table1": "gemma",
    "siren-f1": "qwen3",
}


@pytest.fixture(scope="module")
def followed(data, tmp_path_factory):
    """Every recipe on a tiny model, once: its words, its object and its folder."""
    runs = {}

    def follow(path):
        if path.stem not in runs:
            root = tmp_path_factory.mktemp(path.stem)
            model = tiny(root / "model", ARCHITECTURES[path.stem])
            pair = {}
            if path.stem == "paper2-table1":
                sft = tiny_adapter_folder(model, root / "sft", seed=1)
                dpo = tiny_adapter_folder(model, root / "dpo", seed=2)
                pair = {"base": f"{model}+{sft}", "aligned": f"{model}+{sft}+{dpo}", "pair": "tiny, SFT"}
                pair["layers"] = "0:1"
            words = ["run", path, "--trial", *places(path, data, model=model, **pair), "--out", root / "run"]
            runs[path.stem] = words, done(*words), root / "run"
        return runs[path.stem]

    return follow


@pytest.mark.whole
@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_that_ships_works_from_end_to_end(path, followed):
    _, result, folder = followed(path)
    found, known = result["replication"], json.loads(path.read_text(encoding="utf-8"))
    left_out = [step["name"] for step in found["steps"] if step["why"] is not None]
    unfilled = [f"{{{name}}}" for name in LEFT_OUT]
    assert left_out == [
        step["name"] for step in known["steps"] if any(mark in json.dumps(step) for mark in unfilled)
    ]
    assert list(result["steps"]) == [step["name"] for step in found["steps"] if step["name"] not in left_out]
    own = [row for row in found["published"] if row["of"] == found["of"]]
    assert [row["what"] for row in own] == [entry["what"] for entry in known["published"]]
    for row, entry in zip(own, known["published"], strict=True):
        lacks = any(f'"step": "{name}"' in json.dumps(entry) for name in left_out)
        assert (row["measured"] is None) == lacks, row
    assert {row.get("unpublished") for row in own} <= {"not published", "not found", "not in the paper"}
    assert all(row["published"] is None for row in own)  # Nothing was published of this model.
    others = [row for row in found["published"] if row["of"] != found["of"]]
    assert others
    assert {row["why"] for row in others} == {"not run here"}
    assert all(row["difference"] is None for row in found["published"])
    assert record(folder)["result"] == found


@pytest.mark.whole
@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_its_table_is_reported(path, followed, tmp_path):
    _, result, folder = followed(path)
    page = pathlib.Path(done("report", folder, "--out", tmp_path / "page.html")["report"]).read_text()
    assert "Do published numbers replicate?" in page
    assert page.count("not run here") >= sum(
        row["measured"] is None for row in result["replication"]["published"]
    )


@pytest.mark.whole
def test_its_table_is_shown_at_the_end(followed):
    words, _, folder = followed(FOLDER / "cna-jbb.json")
    shown = command(*words)  # Its steps are finished, so that only the table is made again.
    assert shown.code == 0, shown
    for text in (
        "A trial",
        "not run here",
        "not published",
        "not in the paper",
        "Published and measured",
        "0.975",
    ):
        assert text in shown.out, text
    assert record(folder / "cna")["status"] == "finished"


def test_what_was_measured_before_a_step_failed_is_kept(data, tmp_path):
    recipe = json.loads((FOLDER / "cna-jbb.json").read_text(encoding="utf-8"))
    recipe["steps"][2]["arguments"]["harmful"] = "nowhere.txt"
    path, model = tmp_path / "recipe.json", tiny(tmp_path / "model", "qwen2")
    path.write_text(json.dumps(recipe), encoding="utf-8")
    failed = command(
        "run", path, "--trial", *places(FOLDER / "cna-jbb.json", data, model=model), "--out", tmp_path / "run"
    )
    assert failed.code == 1
    assert "nowhere.txt" in failed.err
    kept = record(tmp_path / "run")["result"]
    assert [step["why"] for step in kept["steps"]] == [None, None, "not run here"]
    assert [row["measured"] is None for row in kept["published"] if row["of"] == str(model)][:3] == [
        False,
        False,
        True,
    ]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_uses_verbs_and_options_that_exist(path):
    steps = recipes.steps_of(recipes.parsed(path), path)
    for _, words, arguments in steps:
        page = verb.build()
        for word in words:
            page = page.commands[word]
        assert set(arguments) <= {parameter.name for parameter in page.params}


def test_there_is_a_recipe_for_every_claim():
    assert [path.stem for path in RECIPES] == sorted(ARCHITECTURES)


def test_a_number_of_the_published_model_has_its_difference(data, tmp_path):
    recipe = json.loads((FOLDER / "cna-jbb.json").read_text(encoding="utf-8"))
    model = tiny(tmp_path / "model", "qwen2")
    recipe["published"] = [
        {**recipe["published"][0], "values": {str(model): 25.0, "another/model": 50}},
    ]
    (tmp_path / "recipe.json").write_text(json.dumps(recipe), encoding="utf-8")
    path = tmp_path / "recipe.json"
    files, requests, _ = data
    recipe["steps"] = recipe["steps"][:2]
    for step in recipe["steps"]:
        step["arguments"] |= {"limit": 2} | ({"max_new_tokens": 4} if step["name"] == "jbb" else {"top": 0.1})
    recipe["shared"] = {}
    path.write_text(json.dumps(recipe), encoding="utf-8")
    out = tmp_path / "run"
    words = ["run", path, *places(path, data, model=model), "--out", out]
    first, other = done(*words)["replication"]["published"]
    measured = record(out / "jbb")["result"]["untreated"]["suites"][0]["judges"]
    refusal = next(one for one in measured.values() if one["name"] == "refusal")["refused"]
    assert first["measured"]["value"] == 100 * refusal["value"]
    assert first["difference"] == 100 * refusal["value"] - 25.0
    assert (other["published"], other["measured"], other["why"]) == (50, None, "not run here")
    again = done("run", out / "run.json", "--out", tmp_path / "again")  # What was given is in the record.
    assert again["replication"]["published"] == [first, other]


def test_a_step_that_lacks_a_place_is_left_out_and_so_is_what_needs_it(tmp_path):
    steps = [
        {"name": "one", "verb": "find-importance", "arguments": {"model": "{model}", "prompts": "{file}"}},
        {
            "name": "two",
            "verb": "verify-deactivate",
            "arguments": {"model": "{model}", "neurons": "{out}/one"},
        },
    ]
    asked = {
        "what": "x",
        "source": "y",
        "unit": "%",
        "values": {"m": 1},
        "measured": {"step": "two", "at": ["a"]},
    }
    never = {
        "what": "z",
        "source": "y",
        "values": {"m": None},
        "measured": None,
        "note": "no verb averages that",
    }
    recipe = {
        "about": "nothing",
        "told_apart_by": "model",
        "places": {"model": {"default": "m"}, "file": {"about": "requests"}},
        "steps": steps,
        "published": [asked, never],
    }
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps(recipe), encoding="utf-8")
    found = done("run", path, "--out", tmp_path / "run")
    assert found["steps"] == {}
    assert [step["why"] for step in found["replication"]["steps"]] == [
        "needs --with file=…: requests",
        "needs step one",
    ]
    assert [row["why"] for row in found["replication"]["published"]] == [
        "not run here: two needs step one",
        "no verb gives it",
    ]
    shown = command("run", path, "--out", tmp_path / "run")
    for words in (
        "1.0\u00a0%",
        "not found",
        "not run here",
        "no verb gives it",
        "no verb averages that",
        "0 of 1",
    ):
        assert words.replace("\u00a0", " ") in shown.out.replace("\u00a0", " "), words
    assert "has no such place; expected one of model, file" in refused("run", path, "--with", "x=1", code=2)
    assert "expected NAME=VALUE" in refused("run", path, "--with", "file", code=2)


@pytest.mark.parametrize(
    ("published", "said"),
    [
        ({}, "is a dict"),
        ([{"what": "x"}], "has other keys"),
        (
            [{"what": "x", "source": "", "values": {"m": "1"}, "measured": None, "note": "n"}],
            "to be a number",
        ),
        ([{"what": "x", "source": "", "values": {}, "measured": None}], "says nothing of how"),
        ([{"what": "x", "source": "", "values": {}, "measured": {"step": "b", "at": [1]}}], "names step 'b'"),
        (
            [{"what": "x", "source": "", "values": {}, "measured": {"step": "a", "at": []}}],
            "expected step and at",
        ),
        ([{"what": "x", "source": "", "values": {}, "measured": {"mean": []}}], "expected step and at"),
        (
            [{"what": "x", "source": "", "values": {}, "measured": {"restored": [1, 2]}}],
            "expected step and at",
        ),
        ([{"what": "x", "source": "", "values": [], "measured": None, "note": "n"}], "by name"),
    ],
)
def test_a_list_of_published_numbers_of_another_shape_is_refused_before_anything_is_run(
    published, said, tmp_path
):
    steps = [{"name": "a", "verb": "doctor", "arguments": {"model": "nowhere"}}]
    (tmp_path / "recipe.json").write_text(
        json.dumps({"steps": steps, "published": published}), encoding="utf-8"
    )
    assert said in refused("run", tmp_path / "recipe.json", "--out", tmp_path / "run")


@pytest.mark.parametrize(
    ("told", "code", "said"),
    [
        ({}, 1, "`told_apart_by` is 'None', expected the place"),
        ({"told_apart_by": "modle"}, 1, "`told_apart_by` is 'modle', expected the place"),
        ({"told_apart_by": ["model"]}, 1, "expected the place that tells its rows apart, one of model, pair"),
        ({"told_apart_by": "pair"}, 2, "expected --with pair=…: which pair this is"),
    ],
)
def test_numbers_of_several_models_are_refused_where_nothing_says_of_which_one_a_run_is(
    told, code, said, tmp_path
):
    steps = [{"name": "a", "verb": "doctor", "arguments": {"model": "nowhere"}}]
    measured = {"step": "a", "at": ["x"]}
    published = [{"what": "x", "source": "y", "values": {"m": 1, "n": 2}, "measured": measured}]
    places = {"model": {"default": "m"}, "pair": {"about": "which pair this is"}}
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps({"steps": steps, "places": places, "published": published, **told}))
    assert said in refused("run", path, "--out", tmp_path / "run", code=code)


def test_the_recipe_for_pairs_wants_to_know_which_pair_it_is(tmp_path):
    words = ["--with", "base=b", "--with", "aligned=a", "--trial", "--out", tmp_path / "run"]
    assert "--with pair=…" in refused("run", FOLDER / "paper2-table1.json", *words, code=2)


def test_a_recipe_that_is_refused_leaves_the_table_of_an_earlier_one(data, tmp_path):
    files, requests, _ = data
    recipe = json.loads((FOLDER / "cna-jbb.json").read_text(encoding="utf-8"))
    recipe["steps"] = recipe["steps"][1:2]
    del recipe["steps"][0]["arguments"]["deactivate"]
    recipe["published"] = recipe["published"][:1]
    path, model, out = tmp_path / "recipe.json", tiny(tmp_path / "model", "qwen2"), tmp_path / "run"
    path.write_text(json.dumps(recipe), encoding="utf-8")
    words = ["run", path, "--trial", "--with", f"jbb={requests}", "--out", out]
    done(*words, "--with", f"model={model}")
    before = (out / "run.json").read_bytes()
    other = tiny(tmp_path / "other", "llama")
    assert "holds a run with model" in refused(*words, "--with", f"model={other}")
    assert (out / "run.json").read_bytes() == before


def test_numbers_are_found_and_made():
    estimate = {"value": 0.25, "low": 0.1, "high": 0.5, "n": 8, "unscored": 1}
    results = {
        "a": {"rows": [{"name": "x", "rate": estimate}, {"name": "y", "rate": {**estimate, "value": 0.75}}]}
    }
    ran = Ran(results, {"a": "evaluate"}, {})
    x, y = ({"step": "a", "at": ["rows", {"name": name}, "rate"]} for name in "xy")
    found = number_of(x, ran)
    assert (found.value, found.low, found.high, found.n, found.unscored) == (0.25, 0.1, 0.5, 8, 1)
    turned = number_of({"one minus": x}, ran)
    assert (turned.value, turned.low, turned.high) == (0.75, 0.5, 0.9)
    assert number_of({"mean": [x, y]}, ran).value == 0.5
    assert number_of({"restored": [x, {"mean": [x, y]}, y]}, ran).value == 0.5
    assert number_of({"restored": [x, y, x]}, ran).value is None
    quantity = quantities_of([{"what": "q", "source": "s", "values": {}, "measured": x}], "here", ["a"])[0]
    assert [row["of"] for row in quantity.rows(ran)] == [""]


@pytest.mark.parametrize(
    ("at", "why"),
    [
        (["rows", 3, "rate"], "the result of step a has no rows / 3 / rate"),
        (["rows"], "rows of step a is no number"),
        (["rows", 0], "rows / 0 of step a is no number"),
        (["rows", 0, "name"], "rows / 0 / name of step a is no number"),
        (["text"], "text of step a is no number"),
    ],
)
def test_what_is_no_number_in_a_result_is_said_in_its_row(at, why):
    results = {"a": {"rows": [{"name": "x"}], "text": {"value": "many"}}}
    entry = {"what": "q", "source": "s", "values": {"m": 1}, "measured": {"step": "a", "at": at}}
    (row,) = quantities_of([entry], "here", ["a"])[0].rows(Ran(results, {"a": "evaluate"}, {}, of="m"))
    assert (row["measured"], row["difference"], row["why"]) == (None, None, why)


def test_an_undefined_number_keeps_its_reason():
    undefined = {"value": None, "low": None, "high": None, "n": 4, "unscored": 0, "why": "both alike"}
    ran = Ran({"a": {"effect": undefined}}, {"a": "verify-patch"}, {})
    assert number_of({"step": "a", "at": ["effect"]}, ran).to_json() == undefined


def test_costs_are_averaged_over_the_answers(data, tmp_path):
    files, requests, _ = data
    model = tiny(tmp_path / "model", "llama")
    words = ["evaluate", "--model", model, "--suite", requests, "--judge", files["judge"], "--limit", 4]
    found = done(*words, "--over-refusal", "none", "--max-new-tokens", 4, "--out", tmp_path / "run")
    (judged,) = found["untreated"]["suites"][0]["judges"].values()
    lines = (tmp_path / "run" / "completions.jsonl").read_text().splitlines()
    costs = [next(iter(json.loads(line)["verdicts"].values()))["score"] for line in lines]
    assert judged["score"]["value"] == pytest.approx(sum(costs) / len(costs))
