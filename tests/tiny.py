"""A word-level tokenizer and tiny Llama folders, for tests which need a model with text around it."""

import pathlib
import warnings
from typing import Any

import tokenizers
import torch
import transformers

SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")
_TEXT = (
    "how do i make a cake bomb the in of to is kill plant grow tree question answer user assistant system "
    "sorry cannot help sure here tell me about and you yes no red green blue small large one two three "
    "open lock door house water fire : . , ? ! <|user|> <|assistant|> <|system|> Question: Answer: write "
    "story code steal key bread please explain why what when where"
)
WORDS = tuple(_TEXT.split())
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message['role'] }}|> {{ message['content'] }} "
    "{% if message['role'] == 'assistant' %}{{ eos_token }} {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def tiny_tokenizer(
    chat_template: str | None = None, *, adds_bos: bool = True, pad: bool = True
) -> transformers.PreTrainedTokenizerFast:
    """A tokenizer of whole words: ids 0 to 3 are `<pad> <s> </s> <unk>`, then the words.

    Unknown words are `<unk>`.
    """
    vocabulary = {word: index for index, word in enumerate(dict.fromkeys((*SPECIAL, *WORDS)))}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    if adds_bos:
        backend.post_processor = tokenizers.processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 1)]
        )
    names = {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        **({"pad_token": "<pad>"} if pad else {}),
    }
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **names)
    tokenizer.chat_template = chat_template
    return tokenizer


SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
"""Of every tiny decoder."""
FILL = [
    "how",
    "do",
    "i",
    "make",
    "a",
    "cake",
    "grow",
    "tree",
    "in",
    "the",
    "house",
    "tell",
    "me",
    "about",
    "red",
    "green",
    "blue",
    "water",
]
"""Words of random requests."""


def tiny_llama(seed: int = 0, **config: Any) -> transformers.LlamaForCausalLM:
    """A random Llama of two layers in evaluation mode, with weights large enough that greedy answers vary."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**SIZES, **config})).eval()
        for parameter in model.parameters():
            if parameter.ndim == 2:
                torch.nn.init.normal_(parameter, std=0.2)
    return model


def tiny_llama_folder(
    folder: pathlib.Path, *, seed: int = 0, chat_template: str | None = CHAT_TEMPLATE, **config: Any
) -> pathlib.Path:
    """Saves a tiny Llama and its tokenizer as a Hugging Face folder and returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    tiny_llama(seed, **config).save_pretrained(folder)
    tiny_tokenizer(chat_template).save_pretrained(folder)
    return folder


def tiny_adapter_folder(
    base: pathlib.Path,
    folder: pathlib.Path,
    *,
    seed: int,
    kind: str = "ia3",
    targets: tuple[str, ...] = ("down_proj",),
) -> pathlib.Path:
    """Saves a random (IA)³ (`ia3`) or LoRA (`lora`) adapter for the model in `base` and returns its
    folder.
    """
    import peft

    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    if kind == "ia3":
        config = peft.IA3Config(
            target_modules=list(targets), feedforward_modules=list(targets), task_type="CAUSAL_LM"
        )
    else:
        config = peft.LoraConfig(r=2, target_modules=list(targets), task_type="CAUSAL_LM")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = peft.get_peft_model(model, config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "ia3_l" in name or "lora_" in name:
                parameter.copy_(
                    1.0 * (kind == "ia3") + 0.5 * torch.randn(parameter.shape, generator=generator)
                )
    adapted.save_pretrained(folder)
    return folder
