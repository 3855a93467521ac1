"""Tiny random models of every family the anatomy promises to support, built from their configurations without
any download.

`build("llama")` gives one ready in evaluation mode. All parameters are drawn anew, biases and norm weights
included, so that no term of a formula is hidden by a zero or a one; windows are five tokens, soft-caps bite,
and query heads outnumber key heads where a family has that.
"""

import copy
from collections.abc import Mapping
from typing import Any

import pytest
import torch
import transformers

from tiny import SIZES

OLD_TRANSFORMERS = int(transformers.__version__.split(".")[0]) < 5
VOCABULARY = 96
WINDOW = 5

_COMMON: dict[str, Any] = {**SIZES, "attention_dropout": 0.0}
_ONE_KEY_HEAD_PER_QUERY_HEAD: dict[str, Any] = {"num_key_value_heads": None}
_WITHOUT_GROUPS = {**_COMMON, **_ONE_KEY_HEAD_PER_QUERY_HEAD}
_GPT2: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_inner": 48,
    "n_positions": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
}
_FALCON: dict[str, Any] = {
    **{
        name: value
        for name, value in _COMMON.items()
        if name not in ("num_key_value_heads", "intermediate_size")
    },
    "ffn_hidden_size": 48,
    "bias": True,
    "alibi": False,
    "hidden_dropout": 0.0,
}
_MIXED_LAYERS = ["sliding_attention", "full_attention"]

_CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {**_COMMON, "attention_bias": True, "mlp_bias": True}),
    "mistral": ("Mistral", {**_COMMON, "sliding_window": WINDOW, "head_dim": 12}),
    "qwen2": (
        "Qwen2",
        {
            **_COMMON,
            "use_sliding_window": True,
            "sliding_window": WINDOW,
            "max_window_layers": 1,
            "layer_types": _MIXED_LAYERS[::-1],
        },
    ),
    "qwen3": ("Qwen3", {**_COMMON, "head_dim": 16}),
    "gemma": ("Gemma", {**_COMMON, "head_dim": 16, "num_key_value_heads": 1}),
    "gemma2": (
        "Gemma2",
        {
            **_COMMON,
            "head_dim": 16,
            "sliding_window": WINDOW,
            "layer_types": _MIXED_LAYERS,
            "attn_logit_softcapping": 5.0,
            "final_logit_softcapping": 10.0,
            "query_pre_attn_scalar": 24,
        },
    ),
    "gemma3": (
        "Gemma3Text",
        {
            **_COMMON,
            "head_dim": 16,
            "sliding_window": WINDOW,
            "layer_types": _MIXED_LAYERS,
            "query_pre_attn_scalar": 24,
        },
    ),
    "phi": ("Phi", {**_COMMON, "partial_rotary_factor": 0.5, "resid_pdrop": 0.0, "embd_pdrop": 0.0}),
    "phi_qk_norm": ("Phi", {**_COMMON, "partial_rotary_factor": 0.5, "qk_layernorm": True}),
    "phi3": ("Phi3", {**_COMMON, "sliding_window": WINDOW, "resid_pdrop": 0.0, "embd_pdrop": 0.0}),
    "gpt2": ("GPT2", _GPT2),
    "gpt_neox": (
        "GPTNeoX",
        {
            **{name: value for name, value in _COMMON.items() if name != "num_key_value_heads"},
            "rotary_pct": 0.5,
            "hidden_dropout": 0.0,
        },
    ),
    "gpt_neox_sequential": (
        "GPTNeoX",
        {
            **{name: value for name, value in _COMMON.items() if name != "num_key_value_heads"},
            "use_parallel_residual": False,
        },
    ),
    "gptj": ("GPTJ", {**_GPT2, "rotary_dim": 4}),
    "opt": (
        "OPT",
        {
            **{
                name: value
                for name, value in _COMMON.items()
                if name not in ("num_key_value_heads", "intermediate_size")
            },
            "ffn_dim": 48,
            "word_embed_proj_dim": 32,
            "dropout": 0.0,
        },
    ),
    "bloom": (
        "Bloom",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "n_layer": 2,
            "n_head": 4,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "tie_word_embeddings": False,
            "hidden_dropout": 0.0,
            "attention_dropout": 0.0,
        },
    ),
    "falcon_multi_query": (
        "Falcon",
        {**_FALCON, "multi_query": True, "new_decoder_architecture": False, "parallel_attn": True},
    ),
    "falcon": ("Falcon", {**_FALCON, "new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon_alibi": (
        "Falcon",
        {
            **_FALCON,
            "multi_query": False,
            "new_decoder_architecture": False,
            "alibi": True,
            "parallel_attn": False,
        },
    ),
    "stablelm": (
        "StableLm",
        {**_COMMON, "use_qkv_bias": True, "partial_rotary_factor": 0.5, "hidden_dropout": 0.0},
    ),
    "stablelm_qk_norm": (
        "StableLm",
        {**_COMMON, "qk_layernorm": True, "use_parallel_residual": True, "partial_rotary_factor": 0.5},
    ),
    "starcoder2": (
        "Starcoder2",
        {
            **_COMMON,
            "sliding_window": WINDOW,
            "use_bias": True,
            "residual_dropout": 0.0,
            "embedding_dropout": 0.0,
        },
    ),
    "olmo2": ("Olmo2", dict(_COMMON)),
    "granite": (
        "Granite",
        {
            **_COMMON,
            "attention_bias": True,
            "mlp_bias": True,
            "attention_multiplier": 0.3,
            "residual_multiplier": 0.7,
            "embedding_multiplier": 2.0,
            "logits_scaling": 1.5,
        },
    ),
    "cohere2": (
        "Cohere2",
        {**_COMMON, "sliding_window": WINDOW, "layer_types": _MIXED_LAYERS, "logit_scale": 0.5},
    ),
    "smollm3": ("SmolLM3", {**_COMMON, "no_rope_layers": [1, 0], "attention_bias": True}),
}
_EXPERTS: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": (
        "Mixtral",
        {
            **_COMMON,
            "intermediate_size": 24,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": WINDOW,
        },
    ),
    "qwen3_moe": (
        "Qwen3Moe",
        {
            **_COMMON,
            "head_dim": 16,
            "moe_intermediate_size": 16,
            "num_experts": 6,
            "num_experts_per_tok": 2,
            "norm_topk_prob": True,
            "mlp_only_layers": [0],
        },
    ),
    "gpt_oss": (
        "GptOss",
        {
            **_COMMON,
            "head_dim": 16,
            "intermediate_size": 24,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": WINDOW,
            "layer_types": _MIXED_LAYERS,
        },
    ),
    "qwen2_moe": (
        "Qwen2Moe",
        {
            **_COMMON,
            "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 20,
            "num_experts": 4,
            "num_experts_per_tok": 2,
        },
    ),
}

_LINEAR: dict[str, Any] = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
_FEW_EXPERTS: dict[str, Any] = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
}
_MAMBA: dict[str, Any] = {
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_d_state": 8,
    "mamba_n_groups": 1,
    "mamba_expand": 2,
    "mamba_chunk_size": 4,
}
_HYBRIDS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3_5": ("Qwen3_5Text", {**_COMMON, **_LINEAR, "head_dim": 16}),
    "qwen3_next": ("Qwen3Next", {**_COMMON, **_LINEAR, **_FEW_EXPERTS, "head_dim": 16}),
    "lfm2": (
        "Lfm2",
        {**_COMMON, "layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
    ),
    "nemotron_h": (
        "NemotronH",
        {
            **_COMMON,
            "num_hidden_layers": 4,
            "hybrid_override_pattern": "M*-E",
            "head_dim": 16,
            "mamba_num_heads": 4,
            "mamba_head_dim": 16,
            "ssm_state_size": 8,
            "n_groups": 2,
            "chunk_size": 4,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "moe_shared_expert_intermediate_size": 16,
        },
    ),
    "granite4": (
        "GraniteMoeHybrid",
        {
            **_COMMON,
            **_MAMBA,
            "layer_types": ["mamba", "attention"],
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "shared_intermediate_size": 24,
        },
    ),
    "jamba": (
        "Jamba",
        {
            **_COMMON,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "mamba_d_state": 8,
            "mamba_dt_rank": 4,
        },
    ),
    "bamba": ("Bamba", {**_COMMON, **_MAMBA, "attn_layer_indices": [1]}),
    "falcon_h1": ("FalconH1", {**_COMMON, **_MAMBA, "head_dim": 8, "mamba_d_ssm": 64}),
}

FAMILIES: tuple[str, ...] = tuple(_CONFIGS)
"""Families and variants with a dense feed-forward layer."""

MOE_FAMILIES: tuple[str, ...] = tuple(_EXPERTS)
"""Families whose experts are three-dimensional parameters."""

HYBRID_FAMILIES: tuple[str, ...] = tuple(_HYBRIDS)
"""Families with recurrent or convolutional mixers beside attention; some have experts too."""


def config_of(family: str, **over: Any) -> transformers.PretrainedConfig:
    """The tiny configuration of a family, with fields overridden."""
    name, fields = {**_CONFIGS, **_EXPERTS, **_HYBRIDS}[family]
    merged: Mapping[str, Any] = {**fields, **over}
    merged = {name: value for name, value in merged.items() if value is not None}
    return getattr(transformers, f"{name}Config")(**merged)


def redraw(model: torch.nn.Module, seed: int = 0) -> None:
    """Draw every parameter anew: one-axis ones (biases, norm weights) around what they were, others with
    standard deviation 1/√in.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            if parameter.ndim == 1:
                start = parameter.double().clamp(-1.0, 1.0)
                parameter.copy_(start + 0.3 * noise)
            else:
                parameter.copy_(noise / parameter.shape[-1] ** 0.5)


def build(
    family: str, dtype: torch.dtype = torch.float32, seed: int = 0, **over: Any
) -> transformers.PreTrainedModel:
    """A tiny causal language model of `family` with random parameters, on the CPU, in evaluation mode.

    Args:
        family: one of `FAMILIES`, `MOE_FAMILIES` or `HYBRID_FAMILIES`.
        dtype: of all parameters. Values are drawn in float64, so two types hold the same numbers up to
            rounding.
        seed: of the parameters; nothing global is seeded by it for later code.
        over: fields of the configuration to override (`num_hidden_layers=3`, `attn_implementation="eager"`
            …).
    """
    if OLD_TRANSFORMERS and (family not in FAMILIES or family == "stablelm_qk_norm"):
        pytest.skip(
            "transformers 4 has no experts interface"
            if family in MOE_FAMILIES
            else "transformers 4 cannot make this model"
        )
    implementation = over.pop("attn_implementation", None)
    state = torch.random.get_rng_state()
    try:
        model = transformers.AutoModelForCausalLM.from_config(
            config_of(family, **over), attn_implementation=implementation
        )
    finally:
        torch.random.set_rng_state(state)
    model = model.to(dtype).eval()
    if family not in FAMILIES and dtype == torch.float64 and hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("batched_mm")  # the grouped product takes no float64
    redraw(model, seed)
    return model


def sibling(model: torch.nn.Module, seed: int = 7, size: float = 0.05) -> torch.nn.Module:
    """The same architecture with every parameter moved a little."""
    other = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(size * torch.randn(parameter.shape, generator=generator).to(parameter))
    return other


def random_ids(shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    """Random token ids that are no special token."""
    return torch.randint(3, VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))
