"""Tiny random judges of the real architectures, with a tokenizer of bytes, so that every adapter's real code
path runs.
"""

import json
import pathlib
import warnings
from typing import Any

import safetensors.torch
import tokenizers
import torch
import transformers

SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")
SIZES: dict[str, Any] = {
    "vocab_size": 264,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
CHAT = (
    "{{ bos_token }}Task: is the last turn harmful? {{ guideline | default('') }}{{ (guardian_config | "
    "default({})) | tojson }}\n{% for message in messages %}{{ message['role'] }}: {{ message['content'] | "
    "trim }}\n{% endfor %}{% if add_generation_prompt %}judge:{% endif %}"
)
LISTED = (
    "{{ bos_token }}{% for message in messages %}{{ message['role'] }}: {% for part in message['content'] %}"
    "{{ part['text'] | trim }}{% endfor %}\n{% endfor %}judge:"
)


def byte_tokenizer(
    chat_template: str | None = None, *, pad: bool = True
) -> transformers.PreTrainedTokenizerFast:
    """A tokenizer of bytes behind four special tokens."""
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate((*SPECIAL, *letters))}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, [], unk_token="<unk>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(list(SPECIAL))
    pairs = {"single": "<s> $A", "pair": "<s> $A </s> $B:1", "special_tokens": [("<s>", 1), ("</s>", 2)]}
    backend.post_processor = tokenizers.processors.TemplateProcessing(**pairs)
    names = {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        **({"pad_token": "<pad>"} if pad else {}),
    }
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **names)
    tokenizer.chat_template = chat_template
    return tokenizer


def judge_folder(
    folder: pathlib.Path, kind: str, config: Any, *, chat_template: str | None = None, seed: int = 0
) -> pathlib.Path:
    """Saves a random model of a class of transformers, and the tokenizer of bytes."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = getattr(transformers, kind)(config).eval()
        for parameter in model.parameters():
            if parameter.ndim == 2:
                torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    byte_tokenizer(chat_template).save_pretrained(folder)
    return folder


def adapter_folder(base: pathlib.Path, folder: pathlib.Path) -> pathlib.Path:
    """Saves a random LoRA for the model in `base`."""
    import peft

    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = peft.get_peft_model(
            model, peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
        )
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.copy_(
                    0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
                )
    adapted.save_pretrained(folder)
    return folder


def cost_folder(folder: pathlib.Path, **facts: Any) -> tuple[pathlib.Path, dict[str, torch.Tensor]]:
    """Saves a checkpoint laid out as the Beaver cost model: a Llama under `model.`, `score_head` and
    `normalizer` beside it.
    """
    judge_folder(folder, "LlamaForCausalLM", transformers.LlamaConfig(**SIZES))
    file = folder / "model.safetensors"
    tensors = {
        name: tensor
        for name, tensor in safetensors.torch.load_file(file).items()
        if not name.startswith("lm_head")
    }
    generator = torch.Generator().manual_seed(3)
    head = {
        "score_head.weight": torch.randn(1, 32, generator=generator),
        "score_head.bias": torch.tensor([0.3]),
        "normalizer.mean": torch.tensor([2.0]),
        "normalizer.var": torch.tensor([4.0]),
        "normalizer.count": torch.tensor(7),
    }
    safetensors.torch.save_file({**tensors, **head}, file, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "architectures": ["LlamaModelForScore"],
        "score_type": "cost",
        "do_normalize": False,
        "bias": True,
        **facts,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder, head
