"""Gemma 2 and 3 (text). Hugging Face stores their norms as w for a factor of 1 + w; in GGUF files
the 1 is added already.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType

from ...config import ModelConfig, RopeConfig
from ...errors import FormatError
from ...models.params import Param, split_name
from ..fields import Fields
from ..folds import AddOne
from ..hf_rope import build_local_rope, build_rope
from ..plan import ParamSource
from .family import Family, GGUFHeader, GGUFReader, HFReader
from .gguf import common_keys, gguf_source, rope_keys
from .gguf_values import common_values, window_values
from .hf import (
    HF_NAMES,
    HFCommon,
    activation,
    common_fields,
    hf_name,
    layer_windows,
    optional_window,
    positive_number,
)

__all__ = ["GEMMA2", "GEMMA3"]

# here post_attention_layernorm really follows the attention
NAMES: Mapping[str, str] = MappingProxyType(
    {
        **HF_NAMES,
        "post_attn_norm": "model.layers.{}.post_attention_layernorm",
        "pre_mlp_norm": "model.layers.{}.pre_feedforward_layernorm",
        "post_mlp_norm": "model.layers.{}.post_feedforward_layernorm",
    }
)


# ---- Hugging Face


def _gemma2_config(fields: Fields) -> ModelConfig:
    common = _common(fields)
    return replace(
        _config("gemma2", fields, common, period=2),
        attn_softcap=_softcap(fields, "attn_logit_softcapping", 50.0),
        final_softcap=_softcap(fields, "final_logit_softcapping", 30.0),
        rope=build_rope(fields, common["head_dim"]),
    )


def _gemma3_config(fields: Fields) -> ModelConfig:
    common = _common(fields)
    period = fields.integer("sliding_window_pattern", 6)
    if period < 1:
        raise FormatError(
            f"{fields.where}: sliding_window_pattern is {period}; it must be at least 1"
        )
    return replace(
        _config("gemma3", fields, common, period=period),
        qk_norm=True,
        final_softcap=_softcap(fields, "final_logit_softcapping", None),
        rope=build_rope(fields, common["head_dim"], layer_type="full_attention", theta=1_000_000.0),
        rope_local=build_local_rope(fields, common["head_dim"]),
    )


def _common(fields: Fields) -> HFCommon:
    return common_fields(fields, num_kv_heads=4, head_dim=256)


def _config(architecture: str, fields: Fields, common: HFCommon, *, period: int) -> ModelConfig:
    """The config of both. The last layer of each `period` sees the whole context, the others a
    window.
    """
    window = optional_window(fields, 4096)
    default = [window if (i + 1) % period else None for i in range(common["num_layers"])]
    bias = fields.flag("attention_bias", False)
    return ModelConfig(
        architecture=architecture,
        graph="gemma",
        **common,
        activation=activation(fields, "hidden_activation", "gelu_pytorch_tanh"),
        qkv_bias=bias,
        o_bias=bias,
        tie_word_embeddings=fields.flag("tie_word_embeddings", True),
        embedding_scale=common["hidden_size"] ** 0.5,
        softmax_scale=positive_number(fields, "query_pre_attn_scalar", 256.0) ** -0.5,
        windows=layer_windows(fields, window, default),
    )


def _softcap(fields: Fields, name: str, default: float | None) -> float | None:
    """A softcap: null means none, and an absent field the family's default."""
    return fields.optional_number(name) if fields.has(name) else default


def _source(config: ModelConfig, param: Param) -> ParamSource:
    is_norm = split_name(param.name)[1].endswith("norm")
    return ParamSource({hf_name(param, NAMES): param.shape}, AddOne() if is_norm else None)


# ---- GGUF


def _gguf_gemma2(header: GGUFHeader) -> ModelConfig:
    """Windowed layers have the same RoPE as the others, unless a key gives them a base of their
    own.
    """
    fields, config = header.fields, _gguf_config("gemma2", header)
    rope = rope_keys(header, config.head_dim)
    base = fields.optional_number("rope.freq_base_swa")
    return replace(
        config,
        softmax_scale=_wide_scale(config) if config.num_layers == 46 else None,
        attn_softcap=fields.number("attn_logit_softcapping", 50.0) or None,
        final_softcap=fields.number("final_logit_softcapping", 30.0) or None,
        windows=_windows(header, config.num_layers, size=4096, period=2),
        rope=rope,
        rope_local=None if base is None else replace(rope, theta=base),
    )


def _gguf_gemma3(header: GGUFHeader) -> ModelConfig:
    """Windowed layers have a RoPE base of their own, unscaled."""
    fields, config = header.fields, _gguf_config("gemma3", header)
    return replace(
        config,
        qk_norm=True,
        softmax_scale=_wide_scale(config) if config.num_layers == 62 else None,
        final_softcap=fields.number("final_logit_softcapping", 0.0) or None,
        windows=_windows(header, config.num_layers, size=0, period=6),
        rope=rope_keys(header, config.head_dim),
        rope_local=RopeConfig(
            theta=fields.number("rope.freq_base_swa", 10_000.0),
            rotary_dim=fields.integer("rope.dimension_count", config.head_dim),
        ),
    )


def _gemma2_values(config: ModelConfig) -> dict[str, object]:
    values = {
        **common_values(config),
        "attn_logit_softcapping": config.attn_softcap or 0.0,
        "final_logit_softcapping": config.final_softcap or 0.0,
        **window_values(config.windows, period=2),
    }
    if config.rope_local is not None:
        values["rope.freq_base_swa"] = config.rope_local.theta
    return values


def _gemma3_values(config: ModelConfig) -> dict[str, object]:
    values = {**common_values(config), **window_values(config.windows, period=6)}
    if config.final_softcap is not None:
        values["final_logit_softcapping"] = config.final_softcap
    if config.rope_local is not None:
        values["rope.freq_base_swa"] = config.rope_local.theta
    return values


def _gguf_config(architecture: str, header: GGUFHeader) -> ModelConfig:
    common = common_keys(header)
    return ModelConfig(
        architecture=architecture,
        graph="gemma",
        **common,
        activation="gelu_tanh",
        embedding_scale=common["hidden_size"] ** 0.5,
    )


def _wide_scale(config: ModelConfig) -> float:
    """Only the 27B models scale scores by hidden_size / num_heads. No key says so; like llama.cpp,
    the readers above recognize them by their number of layers.
    """
    return float((config.hidden_size // config.num_heads) ** -0.5)


def _windows(
    header: GGUFHeader, num_layers: int, *, size: int, period: int
) -> tuple[int | None, ...]:
    """The window of each layer. The last layer of each `period` sees the whole context. `size` and
    `period` are the family's defaults; a window of 0 means none.
    """
    fields = header.fields
    size = fields.integer("attention.sliding_window", size)
    pattern = fields.value("attention.sliding_window_pattern")
    if size == 0:
        return ()
    every = period if pattern is None else pattern
    if isinstance(every, int) and not isinstance(every, bool) and every > 0:
        return tuple(size if i % every < every - 1 else None for i in range(num_layers))
    if isinstance(pattern, Sequence) and len(pattern) == num_layers:
        return tuple(size if windowed else None for windowed in pattern)
    raise fields.error(
        "attention.sliding_window_pattern",
        f"neither a positive number nor a list of {num_layers}, one for each layer",
    )


GEMMA2 = Family(
    name="gemma2",
    hf=HFReader("gemma2", _gemma2_config, _source),
    gguf=GGUFReader("gemma2", _gguf_gemma2, gguf_source, _gemma2_values),
)
GEMMA3 = Family(
    name="gemma3",
    hf=HFReader("gemma3_text", _gemma3_config, _source),
    gguf=GGUFReader("gemma3", _gguf_gemma3, gguf_source, _gemma3_values),
)
