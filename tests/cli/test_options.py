"""Options: what can be refused before anything is loaded is, with exit code 2 and what may be said
instead.
"""

import ast
import importlib.util
import inspect
import json
import pathlib
import re

import pytest
from running import command, done, refused

import safety_neurons
from safety_neurons.cli import session as options
from safety_neurons.cli.guard import Variants
from safety_neurons.cli.verb import DECLARED, VERBS, build, load
from safety_neurons.errors import UsageError

CONTRAST = ["find", "contrast", "--base", "nowhere/b", "--aligned", "nowhere/a"]
GUARDED = ["--model", "nowhere/m", "--guard", "nowhere"]
VERIFY = ["verify", "deactivate", "--model", "nowhere/m"]


@pytest.fixture(autouse=True)
def _nothing_is_loaded(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for name in ("load", "load_pair"):
        monkeypatch.setattr(
            f"safety_neurons.model.{name}", lambda *_, **__: pytest.fail("a model was loaded")
        )
    yield
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([*CONTRAST, "--batch-size", "0"], "auto or a number of at least 1"),
        ([*CONTRAST, "--batch-size", "-3"], "auto or a number of at least 1"),
        ([*CONTRAST, "--batch-size", "many"], "auto or a number of at least 1"),
        ([*CONTRAST, "--seed", "-1"], "0 or more"),
        ([*CONTRAST, "--seed", "one"], "--seed"),
        ([*CONTRAST, "--positions", "answer"], "completion-predicting, prompt, prompt-last"),
        ([*CONTRAST, "--generate-with", "donor"], "base, aligned"),
        ([*CONTRAST, "--sites", "down,mlp"], "q k v o gate up down"),
        ([*CONTRAST, "--sites", ","], "names no site"),
        ([*CONTRAST, "--layers", "first"], "A:B"),
        ([*CONTRAST, "--layers", "3:1:2"], "A:B"),
        ([*CONTRAST, "--layers", "5:2"], "selects none"),
        ([*CONTRAST, "--dtype", "int8"], "float64"),
        ([*CONTRAST, "--top", "5"], "0 to 1"),
        ([*CONTRAST, "--top", "nan"], "0 to 1"),
        ([*CONTRAST, "--count", "0"], "--count"),
        (
            ["tune", "--model", "m/m", "--neurons", "n", "--anchor", "inf"],
            "--anchor inf: expected a finite number",
        ),
        (
            ["tune", "--model", "m/m", "--neurons", "n", "--max-perplexity", "0.5"],
            "0 for no limit, or at least 1",
        ),
        ([*CONTRAST, "--top", "0.1", "--count", "3"], "expected one rule"),
        ([*CONTRAST, "--agreement", "2"], "share of the prompts"),
        ([*CONTRAST, "--agreement", "0"], "share of the prompts"),
        ([*CONTRAST, "--max-new-tokens", "0"], "--max-new-tokens"),
        ([*CONTRAST, "--limit", "0"], "--limit"),
        ([*CONTRAST, "--template-args", "{"], "not JSON"),
        ([*CONTRAST, "--template-args", "[1]"], "a JSON object"),
        (
            ["find", "importance-contrast", *CONTRAST[2:], "--compare", "swapped"],
            "swap, swap-attribution, absolute, relative, same-input",
        ),
        (["find", "attribution-patching", *CONTRAST[2:], "--at", "end"], "path, base"),
        (["find", "importance", "--model", "m/m", "--space", "logit"], "output, probability"),
        ([*VERIFY], "neither of --neurons and --scores"),
        ([*VERIFY, "--neurons", "n", "--scores", "s"], "both of --neurons and --scores"),
        ([*VERIFY, "--neurons", "n", "--sizes", "0.1"], "--sizes needs --scores"),
        ([*VERIFY, "--scores", "s", "--sizes", "0.1,x"], "comma-separated shares"),
        ([*VERIFY, "--scores", "s", "--sizes", "0.1,2"], "at most 1"),
        ([*VERIFY, "--scores", "s", "--sizes", ","], "comma-separated shares"),
        ([*VERIFY, "--neurons", "n", "--random", "-1"], "--random"),
        (["compare", *CONTRAST[2:], "--methods", "contrast,magic"], "weight-change"),
        (["compare", *CONTRAST[2:], "--top", "0"], "above 0"),
        (["compare", *CONTRAST[2:], "--top", "0.1,0.2"], "one --top"),
        (["compare", *CONTRAST[2:], "--organism", "natural"], "leave --base"),
        (["find", "mask", *CONTRAST[2:], "--move", "weights"], "auto, activations, parameters"),
        (["find", "contrast"], "--base"),
        (["find", "magic"], "magic"),
        (["dance"], "dance"),
        ([*CONTRAST, "--colour", "red"], "--colour"),
        (["find", "mask", *CONTRAST[2:], "--units", "3", "--top", "0.1"], "neither --top nor --count"),
        (
            ["import", "attacks", "f.txt", "--as", "lists"],
            "--as 'lists' is unknown; expected one of prompts, ",
        ),
        (
            ["guard", "serve", *GUARDED, "--on-unsafe", "refus"],
            "--on-unsafe 'refus' is unknown; expected one of refuse, ",
        ),
        (["guard", "serve", *GUARDED, "--timeout", "0"], "--timeout 0.0: expected above 0"),
        (["guard", "serve", *GUARDED, "--fpr", "2"], "--fpr 2.0: expected above 0 and below 1"),
        (["guard", "serve", *GUARDED, "--pass-field", "seed"], "--pass-field without --upstream"),
        (["guard", "serve", *GUARDED, "--threshold=-1"], "Invalid value for '--threshold'"),
    ],
    ids=lambda value: " ".join(value[-2:]) if isinstance(value, list) else "",
)
def test_wrong_words_are_refused_before_anything_is_loaded(words, said):
    assert said in refused(*words, code=2)


@pytest.mark.parametrize("option", ["attacks", "perturbations"])
def test_a_list_of_names_that_takes_all_and_none_says_so_of_a_wrong_name(option):
    for words in ("all", "none"):
        Variants(**{option: words}).check()
    for words, wrong in (("nonne", "nonne"), ("all,none", "all")):
        with pytest.raises(UsageError, match=f"{option} '{wrong}' is unknown; expected all, none or some of"):
            Variants(**{option: words}).check()


def test_no_message_names_an_option_by_its_field():
    """Messages name `--on-unsafe`, which `errors` turns into `on_unsafe` for who calls from Python."""
    for name in VERBS:
        list(getattr(load(name), "commands", ()))
    fields = {
        one.name
        for kinds in DECLARED.values()
        for kind in kinds
        for one in kind.options()
        if "_" in one.name and one.flag == f"--{one.name.replace('_', '-')}"
    }
    assert {"on_unsafe", "top_per_matrix", "as_published", "max_new_tokens"} <= fields
    field = re.compile(rf"(?<![\w.`'])({'|'.join(sorted(fields))})(?![\w(='])")
    assert field.search("leave as_published out")
    named = [
        f"{path.name}:{node.lineno} {text}"
        for path in pathlib.Path(safety_neurons.__file__).parent.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args
        for text in words_of(node.exc.args[0])
        if field.search(text)
    ]
    assert named == []


def words_of(message: ast.expr) -> list[str]:
    """What is written out in a message, without what is put into it."""
    parts = message.values if isinstance(message, ast.JoinedStr) else [message]
    return [str(part.value) for part in parts if isinstance(part, ast.Constant)]


def test_an_empty_text_is_refused_by_every_verb_and_option_but_where_it_says_something():
    """What a variable that was never set leaves: as a path it would be the current folder."""
    allowed = set()
    for words, verb in options_page().commands(build()):
        declared = {one.name: one for kind in (*DECLARED[words], options.Common) for one in kind.options()}
        needed = [f"{one.opts[0]}=x" for one in verb.params if one.required and one.opts[0].startswith("-")]
        for name, option in declared.items():
            flag = name.upper() if option.positional else option.flag
            if option.emptiable:
                allowed.add(flag)
            elif option.type not in (bool, int, float):
                empty = [""] if option.positional else [f"{option.flag}="]
                behind = ["x" for one in declared.values() if one.positional and one is not option]
                said = command(*words.split(), *needed, *empty, *behind)
                assert (said.code, said.out) == (2, ""), (words, flag, said)
                assert said.err == f"safety-neurons: {flag} is empty; give it a value or leave it out\n"
    assert allowed == {"--system"}


def test_a_wrong_option_is_named_before_a_file_that_is_missing():
    """`--seed` is checked last of all options."""
    asked = 0
    for words, verb in options_page().commands(build()):
        declared = [one for kind in (*DECLARED[words], options.Common) for one in kind.options()]
        needed = {
            one.opts[0]: "nowhere" for one in verb.params if one.required and one.opts[0].startswith("-")
        }
        behind = ["nowhere" for one in declared if one.positional]
        for option in declared:
            if option.positional or option.type not in (str, pathlib.Path, list[pathlib.Path]):
                continue
            given = {**needed, option.flag: "nowhere"}
            said = command(
                *words.split(), *(f"{flag}={value}" for flag, value in given.items()), *behind, "--seed=-1"
            )
            assert said.code == 2, (words, option.flag, said)
            asked += "--seed -1 is negative" in said.err
    assert asked > 100


def test_help_names_every_verb_and_every_option_has_words():
    said = command("--help")
    assert said.code == 0
    for name in ("demo", "doctor", "find", "verify", "compare", "report", "run", "organism", "data"):
        assert name in said.out
    for words in (
        ["find", "importance"],
        ["find", "contrast"],
        ["verify", "patch"],
        ["compare"],
        ["doctor"],
        ["run"],
    ):
        verb = build()
        for word in words:
            verb = verb.commands[word]
        assert verb.help
        assert [
            option.name for option in verb.params if option.param_type_name == "option" and not option.help
        ] == []


def test_every_verb_has_the_common_options_of_the_design():
    names = {field for field in inspect.signature(options.Common).parameters}
    assert names >= {
        "out",
        "json",
        "seed",
        "device",
        "dtype",
        "batch_size",
        "offline",
        "template",
        "system",
        "template_args",
        "debug",
    }


def test_answers_that_are_judged_are_as_long_everywhere_as_is_usual_for_the_model():
    """64 tokens of a real model's answer are often cut before what a judge looks for. Answers that a method
    reads are judged by nobody, and a server's limit is its operator's.
    """
    lengths = {
        words: option.default
        for words, _ in options_page().commands(build())
        for kind in DECLARED[words]
        for option in kind.options()
        if option.flag == "--max-new-tokens"
    }
    judged = {words: length for words, length in lengths.items() if words.split()[0] != "find"}
    assert len(judged) > 12
    assert {words for words, length in judged.items() if length is not None} == {"guard serve"}


def options_page():
    """The script that makes the page of options."""
    spec = importlib.util.spec_from_file_location(
        "options_page", pathlib.Path(__file__).parents[2] / "docs" / "options.py"
    )
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


def test_the_page_of_options_is_up_to_date():
    script = options_page()
    assert script.page() == script.PAGE.read_text(encoding="utf-8"), "run `python docs/options.py --write`"


def test_no_words_at_all_print_the_help_and_exit_with_2():
    outcome = command()
    assert outcome.code == 2
    assert "find" in outcome.out


def test_debug_shows_where_an_error_comes_from():
    outcome = command(*CONTRAST, "--batch-size", "0", "--debug")
    assert outcome.code == 2
    assert "Traceback" in outcome.err
    assert outcome.err.endswith("expected auto or a number of at least 1\n")


def test_built_in_prompts_and_organisms_are_listed():
    prompts = done("data", "list")["prompts"]
    assert {"builtin:harmful", "builtin:harmless-test"} <= {row["name"] for row in prompts}
    assert all(row["prompts"] > 0 for row in prompts)
    assert "builtin:harmful" in command("data", "list").out
    organisms = done("organism", "list")["organisms"]
    assert "natural" in {row["name"] for row in organisms}
    assert "natural" in command("organism", "list").out


def test_an_unforeseen_error_is_one_line_too(monkeypatch):
    monkeypatch.setattr("safety_neurons.prompt_lists.library", lambda: 1 / 0)
    outcome = command("data", "list", "--json")
    assert outcome.code == 1
    assert "ZeroDivisionError" in json.loads(outcome.out)["error"]
