"""The organisms' tokenizer: one token a word, lower case, with a chat template of three roles."""

import functools

from tokenizers import Tokenizer, normalizers, pre_tokenizers, processors
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from safety_neurons.organism.language import LANGUAGES, language

PAD, BOS, EOS, UNKNOWN = "<pad>", "<bos>", "<eos>", "<unk>"
ROLES = ("system", "user", "assistant")
PUNCTUATION = (".", ",", "?", "!")
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message['role'] }}|> {{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
MAX_LENGTH = 256


@functools.cache
def vocabulary() -> dict[str, int]:
    """Word to token id: special tokens, punctuation, then every language's words in alphabetical order."""
    tokens = [PAD, BOS, EOS, UNKNOWN, *(f"<|{role}|>" for role in ROLES), *PUNCTUATION]
    for code in LANGUAGES:
        tokens.extend(sorted(language(code).words()))
    return {token: index for index, token in enumerate(tokens)}


def make_tokenizer(*, chat: bool = True) -> PreTrainedTokenizerFast:
    """A new tokenizer of the organisms, with or without chat template; `tokenizer(text)` adds BOS, the chat template brings its own."""
    words = vocabulary()
    tokenizer = Tokenizer(WordLevel(vocab=words, unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, words[BOS])])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        unk_token=UNKNOWN,
        additional_special_tokens=[f"<|{role}|>" for role in ROLES],
        clean_up_tokenization_spaces=False,
        model_max_length=MAX_LENGTH,
    )
    if chat:
        fast.chat_template = CHAT_TEMPLATE
    return fast


def encode_text(text: str) -> list[int]:
    """Ids of a general text with BOS and EOS, equal to the tokenizer's for the organisms' own spaced texts."""
    words = vocabulary()
    return [words[BOS], *(words[word] for word in text.split()), words[EOS]]


def encode_chat(request: str, answer: str | None = None, *, system: str | None = None) -> tuple[list[int], int]:
    """Ids of a chat, and how many of them are the prompt (generation prompt included).

    Equal to `apply_chat_template` for the organisms' own spaced texts, and fast enough to be called in a training loop.
    """
    words = vocabulary()
    ids = [words[BOS]]
    if system is not None:
        ids += [words["<|system|>"], *(words[word] for word in system.split())]
    ids += [words["<|user|>"], *(words[word] for word in request.split()), words["<|assistant|>"]]
    length = len(ids)
    if answer is not None:
        ids += [*(words[word] for word in answer.split()), words[EOS]]
    return ids, length


def encode_question(request: str, answer: str | None = None) -> tuple[list[int], int]:
    """Ids of a question and its answer in the plain template of models without a chat template, and how many of them are the prompt.

    Equal to what `Question: … / Answer:` gives; its words and colons are unknown to the vocabulary, and stand apart by that.
    """
    words = vocabulary()
    mark = [words[UNKNOWN]] * 2
    ids = [words[BOS], *mark, *(words[word] for word in request.split()), *mark]
    length = len(ids)
    if answer is not None:
        ids += [*(words[word] for word in answer.split()), words[EOS]]
    return ids, length
