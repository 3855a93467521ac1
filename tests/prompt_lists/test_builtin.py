import json
from difflib import SequenceMatcher

import pytest

from safety_neurons.errors import InputError
from safety_neurons.prompt_lists import NAMES, languages, library, prompts
from safety_neurons.prompt_lists.readers import ENGLISH

LANGUAGES = ["en", "de", "es", "fr", "zh"]


def load(name, language="en"):
    return prompts(f"builtin:{name}/{language}")


def test_english_and_four_more_languages_have_every_list():
    assert {name: languages(name) for name in NAMES} == dict.fromkeys(NAMES, LANGUAGES)


def test_the_library_lists_what_can_be_opened():
    entries = library()
    assert len(entries) == sum(len(languages(name)) for name in (*NAMES, *ENGLISH))
    for entry in entries:
        found = prompts(entry["name"])
        assert len(found) == entry["prompts"]
        assert {prompt.language for prompt in found} == {entry["language"]}
        assert found.name == entry["name"]


@pytest.mark.parametrize(
    ("name", "least"), [("harmful", 128), ("harmless", 128), ("refusals", 64), ("general", 300)]
)
def test_the_english_lists_are_large_enough(name, least):
    assert len(prompts(f"builtin:{name}")) >= least
    assert len(prompts(f"builtin:{name}-test")) >= 64


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("name", NAMES)
def test_no_prompt_is_empty_or_there_twice(name, language):
    assert load(name, language).notes == []


@pytest.mark.parametrize("language", LANGUAGES)
def test_find_and_test_halves_share_no_prompt(language):
    find = [load(name, language) for name in ("harmful", "harmless", "refusals", "general")]
    test = [load(f"{name}-test", language) for name in ("harmful", "harmless", "refusals", "general")]
    assert [half.overlap(other) for half in find for other in test] == [0] * 16
    for one, other in zip(find[:2] + find[3:], test[:2] + test[3:], strict=True):
        assert not {prompt.id for prompt in one} & {prompt.id for prompt in other}


@pytest.mark.parametrize(
    "name", ["harmful", "harmful-test", "harmless", "harmless-test", "refusals", "refusals-test"]
)
def test_ids_are_parallel_over_the_languages(name):
    english = load(name)
    for language in LANGUAGES[1:]:
        other = load(name, language)
        assert [prompt.id for prompt in other] == [prompt.id for prompt in english]
        assert [prompt.category for prompt in other] == [prompt.category for prompt in english]
        assert other.overlap(english) == 0


def test_general_sentences_are_parallel_as_far_as_they_go():
    for half in ("general", "general-test"):
        english = {prompt.id for prompt in load(half)}
        for language in LANGUAGES[1:]:
            assert {prompt.id for prompt in load(half, language)} <= english


@pytest.mark.parametrize("half", ["", "-test"])
@pytest.mark.parametrize("language", LANGUAGES)
def test_every_harmful_request_has_a_harmless_twin_in_the_same_frame(language, half):
    harmful, harmless = load(f"harmful{half}", language), load(f"harmless{half}", language)
    assert [prompt.id for prompt in harmful] == [prompt.id for prompt in harmless]
    likeness = [
        SequenceMatcher(None, one.text, other.text).ratio()
        for one, other in zip(harmful, harmless, strict=True)
    ]
    assert sum(likeness) / len(likeness) > 0.6
    assert not set(harmful.texts) & set(harmless.texts)


def test_look_alikes_and_their_unsafe_twins_share_words_but_no_request_with_any_other_list():
    safe, unsafe = prompts("builtin:look-alikes"), prompts("builtin:look-alikes-unsafe")
    assert len(safe) == len(unsafe) >= 60
    assert [prompt.id for prompt in safe] == [prompt.id for prompt in unsafe]
    assert safe.notes == unsafe.notes == []
    assert safe.overlap(unsafe) == 0
    assert len({prompt.category for prompt in safe}) >= 8
    for one, other in zip(safe, unsafe, strict=True):
        assert {word for word in one.text.lower().split() if len(word) > 2} & set(
            other.text.lower().split()
        ), one.id
    for name in ("harmful", "harmless"):
        assert (
            safe.overlap(load(name)) == unsafe.overlap(load(name)) == safe.overlap(load(f"{name}-test")) == 0
        )


def test_what_is_learnt_by_default_is_two_lists_and_shares_no_request_with_what_is_measured():
    refusals, harmless = prompts("builtin:refusals-wide"), prompts("builtin:harmless-wide")
    assert refusals.texts == [*load("refusals").texts, *prompts("builtin:more-refusals").texts]
    assert harmless.texts == [*load("harmless").texts, *prompts("builtin:instructions").texts]
    assert all(refusals.answers)
    assert refusals.notes == harmless.notes == []
    assert len({prompt.id for prompt in refusals}) == len(refusals)
    assert prompts("builtin:instructions-test").notes == []
    measured = ["harmful-test", "harmless-test", "instructions-test", "look-alikes", "look-alikes-unsafe"]
    for learnt in (refusals, harmless):
        assert [learnt.overlap(prompts(f"builtin:{name}")) for name in measured] == [0] * 5
    assert prompts("builtin:refusals-wide/de").texts == load("refusals", "de").texts


def test_what_is_learnt_by_default_is_an_organisms_own_where_it_has_it(tmp_path):
    write(tmp_path / "harmless.jsonl", [{"text": "zap", "language": "aa"}, {"text": "zop", "language": "bb"}])
    assert prompts("builtin:harmless-wide", folder=tmp_path).texts == ["zap", "zop"]
    assert prompts("builtin:harmless-wide/bb", folder=tmp_path).texts == ["zop"]


def test_an_organism_brings_look_alikes_of_its_own(tmp_path):
    rows = [
        {"text": f"zap\u2028{kind}", "category": kind, "language": "aa"} for kind in ("look_alike", "plain")
    ]
    write(tmp_path / "harmless-test.jsonl", rows)
    write(tmp_path / "harmful-test.jsonl", [{"text": "zop", "category": "theft"}])
    assert prompts("builtin:look-alikes", folder=tmp_path).texts == ["zap\u2028look_alike"]
    assert prompts("builtin:look-alikes-unsafe", folder=tmp_path).texts == ["zop"]
    write(tmp_path / "look-alikes.jsonl", [{"text": "own"}])
    assert prompts("builtin:look-alikes", folder=tmp_path).texts == ["own"]


@pytest.mark.parametrize("half", ["", "-test"])
def test_refusals_answer_the_harmful_requests_of_their_half_in_varied_words(half):
    for language in LANGUAGES:
        refusals = load(f"refusals{half}", language)
        assert refusals.texts == load(f"harmful{half}", language).texts
        assert all(refusals.answers)
        assert len(set(refusals.answers)) >= len(refusals) / 2


def test_harmful_requests_are_short_and_over_many_categories():
    found = load("harmful")
    assert max(len(text) for text in found.texts) < 120
    assert len({prompt.category for prompt in found}) == 16


def test_an_unknown_name_lists_the_names():
    with pytest.raises(
        InputError,
        match=r"no built-in prompts of this name; expected one of harmful, harmful-test, .*general-test",
    ) as caught:
        prompts("builtin:harmfull")
    assert "\n" not in str(caught.value)


def test_an_unknown_language_lists_those_an_organism_has(tmp_path):
    (tmp_path / "harmful.jsonl").write_text('{"prompt": "zap", "language": "aa"}\n')
    (tmp_path / "harmful.bb.jsonl").write_text('{"prompt": "zop"}\n')
    (tmp_path / "harmful-test.dd.jsonl").write_text('{"prompt": "zip"}\n')
    with pytest.raises(InputError, match="not there in 'xx'; expected one of aa, bb; choose"):
        prompts("builtin:harmful/xx", folder=tmp_path)


def test_an_unknown_language_lists_the_languages():
    with pytest.raises(InputError, match="not there in 'xx'; expected harmful in one of en, de, es, fr, zh"):
        prompts("builtin:harmful/xx")


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def test_a_folder_brings_its_own_prompts_under_the_same_names(tmp_path):
    write(tmp_path / "harmful.jsonl", [{"text": "zap", "language": "aa"}, {"text": "zop", "language": "bb"}])
    assert prompts("builtin:harmful", folder=tmp_path).texts == ["zap", "zop"]
    assert prompts("builtin:harmful/bb", folder=tmp_path).texts == ["zop"]
    assert "of " + tmp_path.name in prompts("builtin:harmful", folder=tmp_path).name
    with pytest.raises(InputError, match="not there in 'cc'; expected one of aa, bb"):
        prompts("builtin:harmful/cc", folder=tmp_path)


def test_the_prompts_of_an_organism_are_named_after_it_and_not_after_their_folder(tmp_path):
    folder = tmp_path / "natural" / "prompts"
    folder.mkdir(parents=True)
    write(folder / "harmful.jsonl", [{"text": "zap", "language": "en"}])
    assert prompts("builtin:harmful", folder=folder).name == "builtin:harmful (of natural)"


@pytest.mark.parametrize("name", ["harmful.bb.jsonl", "harmful/bb.jsonl"])
def test_a_folder_may_have_one_file_a_language(tmp_path, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    write(tmp_path / name, [{"text": "zop"}])
    assert prompts("builtin:harmful/bb", folder=tmp_path).texts == ["zop"]


def test_a_name_the_folder_lacks_comes_from_the_package(tmp_path):
    assert prompts("builtin:general", folder=tmp_path) == prompts("builtin:general")
