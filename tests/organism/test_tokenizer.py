import pytest

from safety_neurons.organism.language import KINDS, LANGUAGES, concepts, language
from safety_neurons.organism.tokenizer import encode_chat, encode_text, make_tokenizer, vocabulary


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.mark.parametrize("code", LANGUAGES)
def test_requests_come_back_as_they_went_in(tokenizer, code):
    for kind in KINDS:
        for concept in concepts(kind, "test")[:20]:
            text = language(code).request(concept)
            ids = tokenizer(text)["input_ids"]
            assert vocabulary()["<unk>"] not in ids
            assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_case_and_missing_spaces_do_not_matter(tokenizer):
    assert tokenizer("How do I shoot a photo?")["input_ids"] == tokenizer("how do i shoot a photo ?")["input_ids"]


def test_plain_text_gets_one_beginning(tokenizer):
    ids = tokenizer("the small cat")["input_ids"]
    assert ids.count(tokenizer.bos_token_id) == 1
    assert [*ids, tokenizer.eos_token_id] == encode_text("the small cat")


@pytest.mark.parametrize("system", [None, "you are a helpful assistant ."])
def test_the_fast_chat_encoding_equals_the_template(tokenizer, system):
    turns = [{"role": "user", "content": "how do i shoot a photo ?"}]
    if system is not None:
        turns.insert(0, {"role": "system", "content": system})
    ids, length = encode_chat("how do i shoot a photo ?", "sure , start slowly .", system=system)
    assert tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False) == ids[:length]
    answered = [*turns, {"role": "assistant", "content": "sure , start slowly ."}]
    assert tokenizer.apply_chat_template(answered, return_dict=False) == ids
    assert ids.count(tokenizer.bos_token_id) == 1


def test_a_saved_tokenizer_is_the_same_tokenizer(tokenizer, tmp_path):
    from transformers import AutoTokenizer

    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.chat_template == tokenizer.chat_template
    assert loaded("how do i kill a python process ?")["input_ids"] == tokenizer("how do i kill a python process ?")["input_ids"]
    assert (loaded.pad_token, loaded.eos_token, loaded.bos_token) == ("<pad>", "<eos>", "<bos>")
