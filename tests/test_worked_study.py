"""The worked study says what its commands gave, its commands are still commands, and its first find still
finds the same.
"""

import importlib.util
import json
import pathlib
import re

import pytest

from safety_neurons.cli import verb as command_line
from safety_neurons.detectors import find_contrast
from safety_neurons.organism import load_pair

DOCS = pathlib.Path(__file__).resolve().parents[1] / "docs"


@pytest.fixture(scope="module")
def study():
    spec = importlib.util.spec_from_file_location("worked_study", DOCS / "worked_study.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def page(study):
    return study.PAGE.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def kept(study):
    return json.loads(study.PAGE.with_suffix(".json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", ["worked-study.md", "real-models.md"])
def test_every_number_of_a_page_is_what_its_command_gave(study, name):
    page = (DOCS / name).read_text(encoding="utf-8")
    kept = json.loads((DOCS / name).with_suffix(".json").read_text(encoding="utf-8"))
    assert len(study.quoted(page)) > 40
    assert study.wrong(page, kept) == []


def test_every_command_on_real_models_is_understood(study):
    commands = study.commands((DOCS / "real-models.md").read_text(encoding="utf-8"))
    assert len(commands) >= 8
    for words in commands.values():
        if words[0] == "python":
            assert (DOCS.parent / words[1]).is_file()
        else:
            parse(words)


def test_numbers_stay_where_a_command_has_no_new_record_and_is_unchanged(study, page, kept, tmp_path):
    assert study.keep(page, tmp_path, kept) == kept
    changed = page.replace("--top 0.02 --out runs/study/found", "--top 0.03 --out runs/study/found")
    without = study.keep(changed, tmp_path, kept)
    assert set(kept["commands"]) - set(without["commands"]) == {"found"}
    assert not any(path.startswith("found.") for path in without["numbers"])


def test_the_value_of_a_rate_that_was_kept_whole_is_known_without_a_record(study, page, kept, tmp_path):
    path, rate = next(
        (path, value)
        for path, value in kept["numbers"].items()
        if isinstance(value, dict) and value.get("low") is not None
    )
    quoting = f"{page}\n<!--{path}.low|.3f-->?<!--/-->\n"
    numbers = study.keep(quoting, tmp_path, kept)["numbers"]
    assert numbers == {**kept["numbers"], f"{path}.low": rate["low"]}


def test_a_number_or_a_command_that_is_changed_by_hand_is_noticed(study, page, kept):
    mark = next(mark for mark in study.MARK.finditer(page) if re.fullmatch(r"\d+", mark["text"]))
    forged = page.replace(mark[0], mark[0].replace(f">{mark['text']}<", f">{int(mark['text']) + 1}<"))
    assert [line.split(":")[0] for line in study.wrong(forged, kept)] == [mark["path"]]
    assert study.filled(forged, kept["numbers"]) == page
    other = page.replace("--top 0.02 --out runs/study/found", "--top 0.03 --out runs/study/found")
    assert study.wrong(other, kept) == ["found: another command than the one that was run"]


def test_every_command_of_the_page_is_understood(study, page):
    commands = study.commands(page)
    assert len(commands) >= 10
    for words in commands.values():
        parse(words)
    with pytest.raises(Exception, match="no such option|No such option"):
        parse([*commands["found"], "--no-such"])


def parse(words):
    """Read the arguments as the command line does, without running anything."""
    group, rest = command_line.build(), list(words)
    context = group.make_context("safety-neurons", rest, resilient_parsing=True)
    while hasattr(group, "resolve_command"):
        name, group, rest = group.resolve_command(context, rest)
        if not hasattr(group, "resolve_command"):
            return group.make_context(name, rest, parent=context)
        context = group.make_context(name, list(rest), parent=context, resilient_parsing=True)
    raise AssertionError


def test_what_the_page_says_of_its_first_sets_is_found_again(study, page, kept):
    words = study.commands(page)["changed"]
    pair = load_pair(words[words.index("--base") + 1], words[words.index("--aligned") + 1], offline=True)
    asked = pair.base.prompts("builtin:harmful", limit=int(words[words.index("--limit") + 1]))
    found = find_contrast(
        pair.base, pair.aligned, asked, top=float(words[words.index("--top") + 1]), max_new_tokens=20
    )
    assert len(found.neurons) == kept["numbers"]["found.n_neurons"]
    assert found.neurons.share_of_parameters == pytest.approx(kept["numbers"]["found.share_of_parameters"])
    assert len(found.neurons.only(layers=[3])) == kept["numbers"]["where.sets.1.by_layer.3.members"]
    assert found.prompts.used == kept["numbers"]["found.prompts.used"]


def test_a_path_leads_to_names_with_dots_and_to_rows_by_their_names(study):
    results = {"rows": [{"value": "a b", "tpr": {"0.01": {"it's": 3}}}, {"name": "c", "tpr": 4}]}
    assert study.at(results, "rows.a b.tpr.0.01.it's") == 3
    assert study.at(results, "rows.c.tpr") == study.at(results, "rows.1.tpr") == 4
    mark = study.MARK.search("<!--run.rows.a, b.tpr.0.01.it's|.3f-->0<!--/-->")
    assert (mark["path"], mark["format"]) == ("run.rows.a, b.tpr.0.01.it's", ".3f")
