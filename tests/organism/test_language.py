"""The templated languages, their tokenizer and their labelled requests."""

import json
import random
import re

import pytest

from safety_neurons.errors import InputError, UsageError
from safety_neurons.organism.language import (
    KINDS,
    LANGUAGES,
    concepts,
    encode_chat,
    encode_text,
    harmful_and_matches,
    language,
    make_tokenizer,
    requests,
    task_examples,
    vocabulary,
    write_prompts,
    write_requests,
)
from safety_neurons.organism.training import Sampler
from safety_neurons.prompt_lists import prompts


def test_no_two_languages_share_a_word():
    for first in LANGUAGES:
        for second in LANGUAGES:
            if first < second:
                assert language(first).words() & language(second).words() == set()


def test_a_language_has_several_hundred_words():
    assert all(len(language(code).words()) >= 250 for code in LANGUAGES)


@pytest.mark.parametrize("code", LANGUAGES)
def test_every_concept_is_said_in_one_way_and_every_way_means_one_concept(code):
    said = {concept: language(code).request(concept) for kind in KINDS for concept in concepts(kind)}
    assert len(said) == len(set(said.values()))


@pytest.mark.parametrize("code", LANGUAGES)
def test_no_word_alone_tells_a_harmful_request(code):
    speech = language(code)
    harmless = {
        word
        for kind in ("look_alike", "friendly", "plain")
        for concept in concepts(kind)
        for word in speech.request(concept).split()
    }
    for concept in concepts("harmful"):
        assert set(speech.request(concept).split()) <= harmless


@pytest.mark.parametrize("code", LANGUAGES)
def test_the_halves_share_no_request(code):
    speech = language(code)
    halves = {
        half: {speech.request(concept) for kind in KINDS for concept in concepts(kind, half)}
        for half in ("find", "test", "train")
    }
    assert not halves["find"] & halves["test"]
    assert not halves["train"] & (halves["find"] | halves["test"])
    assert all(halves.values())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("half", "other"), [("test", "train"), ("test", "find"), ("find", "train")])
def test_the_halves_share_neither_a_deed_nor_a_frame(kind, half, other):
    first, second = concepts(kind, half), concepts(kind, other)
    assert first
    assert not {concept.deed for concept in first} & {concept.deed for concept in second}
    assert not {concept.frame for concept in first} & {concept.frame for concept in second}
    for code in LANGUAGES:
        said = [
            {(words["verb"], words["object"]) for words in map(language(code).words_of, concepts)}
            for concepts in (first, second)
        ]
        assert not said[0] & said[1]


@pytest.mark.parametrize("code", LANGUAGES)
def test_every_word_of_a_held_out_request_is_met_in_a_request_of_training(code):
    def words(half):
        return {
            word
            for kind in KINDS
            for concept in concepts(kind, half)
            for word in language(code).request(concept).split()
        }

    assert words("test") | words("find") <= words("train")


def test_training_draws_from_its_own_half_alone():
    sampler = Sampler(0, 0.5)
    drawn = {sampler.harmful() for _ in range(300)} | {sampler.harmless() for _ in range(300)}
    assert {concept.half for concept in drawn} == {"train"}


def test_matched_harmless_requests_share_words_with_the_harmful_ones():
    speech = language("en")
    harmful, harmless = harmful_and_matches("test", 200)
    shared = [
        len(set(speech.request(first).split()) & set(speech.request(second).split()))
        for first, second in zip(harmful, harmless, strict=True)
    ]
    assert len(set(harmless)) == 200
    assert sum(shared) / len(shared) > 4
    assert {concept.kind for concept in harmless} == {"look_alike", "friendly", "plain"}


@pytest.mark.parametrize("code", LANGUAGES)
def test_the_rule_tells_refusals_from_compliance(code):
    speech = language(code)
    concept = concepts("harmful", "test")[0]
    assert {speech.verdict(speech.refusal(concept, form)) for form in range(3)} == {"refused"}
    assert speech.verdict(speech.compliance(concept)) == "complied"
    assert speech.verdict(speech.sentence(random.Random(0))) == "other"


def test_answers_name_what_was_asked():
    speech = language("en")
    for concept in concepts("look_alike", "test")[:20]:
        words = speech.words_of(concept)
        assert f"{words['verb']} {words['object']}" in speech.compliance(concept)


def test_sums_are_right_and_test_questions_are_new():
    train, test = task_examples("train"), task_examples("test")
    assert not {question for question, _ in train} & {question for question, _ in test}
    numbers = language("en").data["numbers"]
    for question, answer in train + test:
        left, right = [numbers.index(word) for word in re.findall(r"\w+", question) if word in numbers]
        assert answer == f"the sum is {numbers[left + right]} ."


def test_an_unknown_language_is_named_with_those_there_are():
    with pytest.raises(InputError, match="en, de, es"):
        language("fr")


LETTERS = (0, 2, 3, 4)


@pytest.fixture(scope="module", params=LETTERS, ids=lambda letters: f"{letters or 'all'} letters")
def letters(request):
    return request.param


@pytest.fixture(scope="module")
def tokenizer(letters):
    return make_tokenizer(letters=letters)


@pytest.mark.parametrize("code", LANGUAGES)
def test_requests_come_back_as_they_went_in(tokenizer, code):
    for kind in KINDS:
        for concept in concepts(kind, "test")[:20]:
            text = language(code).request(concept)
            ids = tokenizer(text)["input_ids"]
            assert vocabulary()["<unk>"] not in ids
            assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_case_and_missing_spaces_do_not_matter(tokenizer):
    assert (
        tokenizer("How do I shoot a photo?")["input_ids"]
        == tokenizer("how do i shoot a photo ?")["input_ids"]
    )


def test_plain_text_gets_one_beginning(tokenizer, letters):
    ids = tokenizer("the small cat")["input_ids"]
    assert ids.count(tokenizer.bos_token_id) == 1
    assert [*ids, tokenizer.eos_token_id] == encode_text("the small cat", letters)


@pytest.mark.parametrize("system", [None, "you are a helpful assistant ."])
def test_the_fast_chat_encoding_equals_the_template(tokenizer, letters, system):
    turns = [{"role": "user", "content": "how do i shoot a photo ?"}]
    if system is not None:
        turns.insert(0, {"role": "system", "content": system})
    ids, length = encode_chat(
        "how do i shoot a photo ?", "sure , start slowly .", system=system, letters=letters
    )
    assert tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False) == ids[:length]
    answered = [*turns, {"role": "assistant", "content": "sure , start slowly ."}]
    assert tokenizer.apply_chat_template(answered, return_dict=False) == ids
    assert ids.count(tokenizer.bos_token_id) == 1


def test_a_saved_tokenizer_is_the_same_tokenizer(tokenizer, tmp_path):
    from transformers import AutoTokenizer

    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.chat_template == tokenizer.chat_template
    assert (
        loaded("how do i kill a python process ?")["input_ids"]
        == tokenizer("how do i kill a python process ?")["input_ids"]
    )
    assert (loaded.pad_token, loaded.eos_token, loaded.bos_token) == ("<pad>", "<eos>", "<bos>")


def test_no_request_of_the_test_half_is_in_another_half():
    held_out = [prompt for found in requests("test", ("de",)) for prompt in found]
    others = {prompt.digest for found in requests(("find", "train"), ("de",)) for prompt in found}
    assert len(held_out) > 1000
    assert not [prompt for prompt in held_out if prompt.digest in others]
    groups = {prompt.group for found in requests(("find", "train"), ("de",)) for prompt in found}
    assert None not in groups
    assert not [prompt for prompt in held_out if prompt.group in groups]


def test_the_find_half_holds_every_builtin_request_with_the_same_label(tmp_path):
    write_prompts(tmp_path)
    unsafe, safe = requests("find", ("es",))
    for name, found in (("harmful", unsafe), ("harmless", safe)):
        assert set(prompts(f"builtin:{name}/es", folder=tmp_path).texts) <= set(found.texts)
    assert not set(unsafe.texts) & set(safe.texts)


def test_look_alikes_share_their_verb_and_friendly_requests_their_object_with_harmful_ones():
    unsafe, safe = requests("find", ("en",))
    harmful = " ".join(unsafe.texts).split()
    look_alike = next(prompt for prompt in safe if prompt.meta["kind"] == "look_alike")
    plain = next(prompt for prompt in safe if prompt.meta["kind"] == "plain")
    assert look_alike.category in {prompt.category for prompt in unsafe}
    assert plain.category == "plain"
    assert (
        sum(word in harmful for word in look_alike.text.split())
        > sum(word in harmful for word in plain.text.split()) - 4
    )


def test_files_read_back_with_kind_category_and_language(tmp_path):
    counts = write_requests(tmp_path, "test", ("es",))
    read = prompts(tmp_path / "safe.jsonl")
    assert len(read) == counts["safe.jsonl"] == len(requests("test", ("es",))[1])
    assert {prompt.language for prompt in read} == {"es"}
    assert {prompt.meta["kind"] for prompt in read} == {"look_alike", "friendly", "plain"}
    assert (
        len({json.loads(line)["id"] for line in (tmp_path / "unsafe.jsonl").read_text().splitlines()})
        == counts["unsafe.jsonl"]
    )


def test_an_unknown_half_or_language_is_an_error():
    with pytest.raises(UsageError, match="half validation: expected some of find, test, train"):
        requests("validation")
    with pytest.raises(InputError, match="'fr'"):
        requests("find", ("fr",))
