"""`ModelConfig` -> the values of a Hugging Face `config.json`: the inverse of `hf_config.py`.

What is written is read back and must be the same model. A config that transformers' model of the
family cannot express is refused, not changed.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from types import MappingProxyType
from typing import Any

import numpy as np

from ..config import ModelConfig, RopeConfig
from ..errors import UnsupportedError
from .hf_config import build_hf_config

__all__ = ["hf_values"]

_CLASSES = MappingProxyType(
    {
        "llama": "LlamaForCausalLM",
        "mistral": "MistralForCausalLM",
        "qwen2": "Qwen2ForCausalLM",
        "qwen3": "Qwen3ForCausalLM",
        "gemma2": "Gemma2ForCausalLM",
        "gemma3_text": "Gemma3ForCausalLM",
        "phi3": "Phi3ForCausalLM",
        "gpt2": "GPT2LMHeadModel",
    }
)
# Llama 3.1 and 3.2: GGUF files hold the factors of these methods
_LLAMA3 = tuple(
    RopeConfig(
        theta=500_000.0,
        rotary_dim=2,
        scaling="llama3",
        factor=factor,
        original_max_position_embeddings=8192,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
    )
    for factor in (8.0, 32.0)
)


def hf_values(config: ModelConfig, where: str) -> dict[str, Any]:
    """The values of config.json, but for token ids and the types of weights. `where` names the
    model in messages.

    Raises UnsupportedError if transformers' model of this family has no field for a difference.
    """
    writers: Mapping[str, Callable[[ModelConfig], dict[str, Any]]] = {
        "llama": _llama,
        "mistral": _llama,
        "qwen2": _qwen,
        "qwen3": _qwen,
        "gemma2": _gemma,
        "gemma3": _gemma,
        "phi3": _phi3,
        "gpt2": _gpt2,
    }
    if config.architecture not in writers:
        raise UnsupportedError(f"{where}: a config.json of {config.architecture} cannot be written")
    values = writers[config.architecture](config)
    values = {"architectures": [_CLASSES[values["model_type"]]], **values}
    # read it back
    found = _normal(build_hf_config(values, where))
    expected = replace(_normal(config), architecture=found.architecture)
    for field in fields(ModelConfig):
        ours, theirs = getattr(expected, field.name), getattr(found, field.name)
        if ours != theirs:
            raise UnsupportedError(
                f"{where}: a config.json of {values['model_type']} cannot say that {field.name} is "
                f"{str(ours)[:100]}"
            )
    return values


def _common(config: ModelConfig) -> dict[str, Any]:
    """The fields that all families but GPT-2 have."""
    values: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": _short(config.norm_eps),
        "tie_word_embeddings": config.tie_word_embeddings,
    }
    return values | (_rope(config.rope) if config.rope is not None else {})


def _llama(config: ModelConfig) -> dict[str, Any]:
    """Llama, or Mistral if its layers have a window or it is called so."""
    window = next((w for w in config.windows if w is not None), None)
    activation = {"hidden_act": _activation(config)}
    if window is not None or config.architecture == "mistral":
        return {"model_type": "mistral", **_common(config), **activation, "sliding_window": window}
    bias = {"attention_bias": config.qkv_bias, "mlp_bias": config.mlp_bias}
    return {"model_type": "llama", **_common(config), **activation, **bias}


def _qwen(config: ModelConfig) -> dict[str, Any]:
    window = next((w for w in config.windows if w is not None), None)
    values: dict[str, Any] = {
        "model_type": config.architecture,
        **_common(config),
        "hidden_act": _activation(config),
        "use_sliding_window": window is not None,
    }
    if window is not None:
        first = next(i for i, w in enumerate(config.windows) if w is not None)
        values |= {"sliding_window": window, "max_window_layers": first}
    if config.architecture == "qwen3":
        values["attention_bias"] = config.qkv_bias
    return values


def _gemma(config: ModelConfig) -> dict[str, Any]:
    scale = config.softmax_scale or config.head_dim**-0.5
    window = next((w for w in config.windows if w is not None), None)
    values: dict[str, Any] = {
        "model_type": "gemma2" if config.architecture == "gemma2" else "gemma3_text",
        **_common(config),
        "hidden_activation": _activation(config),
        "attention_bias": config.qkv_bias,
        "query_pre_attn_scalar": round(scale**-2),
        "sliding_window": window,
        "layer_types": [
            "full_attention" if w is None else "sliding_attention"
            for w in config.windows or (None,) * config.num_layers
        ],
        "attn_logit_softcapping": config.attn_softcap,
        "final_logit_softcapping": config.final_softcap,
    }
    if config.rope_local is not None:
        values["rope_local_base_freq"] = config.rope_local.theta
    return values


def _phi3(config: ModelConfig) -> dict[str, Any]:
    window = next((w for w in config.windows if w is not None), None)
    values = {
        "model_type": "phi3",
        **_common(config),
        "hidden_act": _activation(config),
        "sliding_window": window,
        # longrope's factors are those of sequences within the served context
        "original_max_position_embeddings": config.max_position_embeddings,
    }
    if config.rope is not None and config.rope.rotary_dim != config.head_dim:
        values["partial_rotary_factor"] = config.rope.rotary_dim / config.head_dim
    return values


def _gpt2(config: ModelConfig) -> dict[str, Any]:
    return {
        "model_type": "gpt2",
        "vocab_size": config.vocab_size,
        "n_positions": config.max_position_embeddings,
        "n_embd": config.hidden_size,
        "n_layer": config.num_layers,
        "n_head": config.num_heads,
        "n_inner": config.intermediate_size,
        "layer_norm_epsilon": _short(config.norm_eps),
        "activation_function": "gelu_new",
        "tie_word_embeddings": config.tie_word_embeddings,
    }


def _activation(config: ModelConfig) -> str:
    return {"silu": "silu", "gelu_tanh": "gelu_pytorch_tanh"}[config.activation]


def _rope(rope: RopeConfig) -> dict[str, Any]:
    """`rope_theta`, and `rope_scaling` if frequencies are stretched."""
    values: dict[str, Any] = {"rope_theta": _short(rope.theta)}
    scaling: dict[str, Any] = {"factor": _short(rope.factor)}
    original = {"original_max_position_embeddings": rope.original_max_position_embeddings}
    rope = _as_llama3(rope)
    match rope.scaling:
        case "none":
            return values
        case "linear":
            scaling |= {"rope_type": "linear"}
        case "yarn":
            scaling |= {"rope_type": "yarn", **original}
            scaling |= {"beta_fast": rope.beta_fast, "beta_slow": rope.beta_slow}
            if rope.attention_factor is not None:
                scaling["attention_factor"] = rope.attention_factor
        case "llama3":
            scaling = {
                "rope_type": "llama3",
                "factor": rope.factor,
                "low_freq_factor": rope.low_freq_factor,
                "high_freq_factor": rope.high_freq_factor,
                "original_max_position_embeddings": rope.original_max_position_embeddings,
            }
        case "factors":
            factors = [_short(factor) for factor in rope.freq_factors]
            scaling = {"rope_type": "longrope", "short_factor": factors, "long_factor": factors}
            scaling["attention_factor"] = rope.attention_factor or 1.0
    return values | {"rope_scaling": scaling}


def _as_llama3(rope: RopeConfig) -> RopeConfig:
    """Llama 3's method, if it is what the factors come from; else the same."""
    if rope.scaling != "factors" or rope.attention_factor not in (None, 1.0):
        return rope
    for known in _LLAMA3:
        candidate = replace(known, theta=rope.theta, rotary_dim=rope.rotary_dim)
        if np.allclose(_llama3_factors(candidate), rope.freq_factors, rtol=1e-5, atol=0):
            return candidate
    return rope


def _llama3_factors(rope: RopeConfig) -> list[float]:
    """What each inverse frequency is divided by (`models/rope.py`)."""
    found = []
    for i in range(rope.rotary_dim // 2):
        turns = rope.original_max_position_embeddings * rope.theta ** (-2 * i / rope.rotary_dim)
        keep = (turns / (2 * math.pi) - rope.low_freq_factor) / (
            rope.high_freq_factor - rope.low_freq_factor
        )
        keep = min(max(keep, 0.0), 1.0)
        found.append(1 / ((1 - keep) / rope.factor + keep))
    return found


def _normal(config: ModelConfig) -> ModelConfig:
    """The same model, with each number as it is used: float32, and no default left open."""
    return replace(
        config,
        norm_eps=_short(config.norm_eps),
        softmax_scale=_short(config.softmax_scale or config.head_dim**-0.5),
        embedding_scale=_short(config.embedding_scale),
        windows=config.windows or (None,) * config.num_layers,
        rope=_normal_rope(config.rope),
        rope_local=_normal_rope(config.rope_local if any(config.windows) else None),
    )


def _normal_rope(rope: RopeConfig | None) -> RopeConfig | None:
    if rope is None:
        return None
    rope, factor = _as_llama3(rope), rope.attention_factor
    if factor is None and rope.scaling == "yarn":
        factor = 0.1 * math.log(max(rope.factor, 1.0)) + 1.0
    if rope.scaling == "factors":
        factor = factor or 1.0
    return replace(
        rope,
        theta=_short(rope.theta),
        factor=_short(rope.factor),
        attention_factor=None if factor is None else _short(factor),
        freq_factors=tuple(map(_short, rope.freq_factors)),
    )


def _short(number: float) -> float:
    """The shortest number with the same float32: GGUF files hold 1e-5 as 9.99999975e-06."""
    return float(str(np.float32(number)))
