"""Help pages: sections, whole sentences, colour only on a terminal, and no slow import behind them."""

import subprocess
import sys

import pytest

from every_verb import LINES, WITHOUT
from safety_neurons.cli.verb import VERBS, build, sentence


def command(words: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "safety_neurons", *words], capture_output=True, text=True, encoding="utf-8"
    )


def test_the_contents_describe_every_verb_in_a_whole_sentence():
    text = " ".join(command(["--help"]).stdout.split())
    for verb, words in {
        "doctor": "coverage, identity, padding, self-patch, exactness, cost.",
        "find": "Score neurons by one method and keep the ones a selection takes.",
        "verify": "beside random sets and the ceiling.",
    }.items():
        assert f" {verb} " in text
        assert words in text


def test_options_stand_under_their_headings_and_brackets_are_not_escaped():
    text = command(["find", "contrast", "--help"]).stdout
    headings = [
        line.rstrip(":") for line in text.splitlines() if line.endswith(":") and not line.startswith(" ")
    ]
    assert headings == [
        "Models",
        "Prompts",
        "Which neurons are kept",
        "Running",
        "Model and template",
        "Options",
    ]
    assert "builtin:NAME[/LANG]" in text
    assert "\\" not in text
    assert "\x1b" not in text


@pytest.mark.parametrize("words", [[], ["find"], ["verify"]])
def test_a_command_without_a_verb_shows_its_verbs_and_is_bad_usage(words):
    done = command(words)
    assert done.returncode == 2
    assert "Commands:" in done.stdout + done.stderr


def test_help_imports_nothing_that_takes_long():
    code = (
        "import sys; sys.argv = ['safety-neurons', 'find', 'importance', '--help']\nfrom "
        "safety_neurons.cli import main\ntry:\n    main()\nexcept SystemExit:\n    print([m for m in "
        "('rich', 'numpy', 'torch', 'typer.rich_utils') if m in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, encoding="utf-8"
    )
    assert done.stderr.strip() == "[]"


def test_terms_are_coloured_where_a_terminal_shows_the_page():
    group = build()
    with group.make_context("safety-neurons", ["find"], resilient_parsing=True) as context:
        assert "\x1b[36m" in context.get_help()


def test_the_contents_say_of_each_verb_what_its_own_page_says():
    verbs = build().commands
    assert {name: sentence(verbs[name]) for name in VERBS} == {
        name: text for name, (_, text) in VERBS.items()
    }


def test_the_contents_import_no_verb():
    code = (
        "import sys; sys.argv = ['safety-neurons', '--help']\nfrom safety_neurons.cli import main\ntry:\n  "
        "  main()\nexcept SystemExit:\n    print([m for m in ('find', 'verify') if 'safety_neurons.cli.' + "
        "m in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, encoding="utf-8"
    )
    assert done.stderr.strip() == "[]"


def test_a_misspelt_verb_is_answered_with_the_nearest():
    done = command(["verfy"])
    assert done.returncode == 2
    assert "'verify'" in done.stderr


def test_groups_hold_their_verbs():
    groups = build().commands
    assert list(groups["import"].commands) == ["attacks", "neurons"]
    assert list(groups["guard"].commands) == ["fit", "recalibrate", "evaluate", "serve"]
    assert list(groups["analyze"].commands) == [
        "layers",
        "overlap",
        "languages",
        "transfer",
        "vocabulary",
        "progressive",
        "tax",
    ]


def test_every_verb_has_a_command_that_is_tried_from_a_bare_wheel():
    def verbs(group, before=""):
        for name in group.list_commands(None):
            one = group.commands[name]
            yield from verbs(one, f"{before}{name} ") if hasattr(one, "commands") else [before + name]

    assert sorted([*LINES, *WITHOUT]) == sorted(verbs(build()))
