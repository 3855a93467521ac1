import random
import re

import pytest

from safety_neurons.errors import InputError
from safety_neurons.organism.language import KINDS, LANGUAGES, concepts, harmful_and_matches, language, task_examples
from safety_neurons.organism.train import Sampler


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
        word for kind in ("look_alike", "friendly", "plain") for concept in concepts(kind) for word in speech.request(concept).split()
    }
    for concept in concepts("harmful"):
        assert set(speech.request(concept).split()) <= harmless


@pytest.mark.parametrize("code", LANGUAGES)
def test_the_halves_share_no_request(code):
    speech = language(code)
    halves = {half: {speech.request(concept) for kind in KINDS for concept in concepts(kind, half)} for half in ("find", "test", "train")}
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
        said = [{(words["verb"], words["object"]) for words in map(language(code).words_of, concepts)} for concepts in (first, second)]
        assert not said[0] & said[1]


@pytest.mark.parametrize("code", LANGUAGES)
def test_every_word_of_a_held_out_request_is_met_in_a_request_of_training(code):
    def words(half):
        return {word for kind in KINDS for concept in concepts(kind, half) for word in language(code).request(concept).split()}

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
