"""Qwen 2, 2.5 and 3: Llama's graph with biases on q, k and v (Qwen 2) or norms on the heads of q
and k (Qwen 3), and a window on the last layers if `use_sliding_window` is true.
"""

from ...config import ModelConfig
from ..fields import Fields
from ..hf_rope import build_rope
from .family import Family, GGUFHeader, GGUFReader, HFReader
from .gguf import common_keys, gguf_source, rope_keys
from .gguf_values import common_values
from .hf import HFCommon, activation, common_fields, hf_source, layer_windows, optional_window

__all__ = ["QWEN2", "QWEN3"]


def _qwen2_config(fields: Fields) -> ModelConfig:
    common = common_fields(fields, num_kv_heads=32)
    return _config("qwen2", fields, common, qkv_bias=True, o_bias=False)


def _qwen3_config(fields: Fields) -> ModelConfig:
    common = common_fields(fields, num_kv_heads=32, head_dim=128)
    bias = fields.flag("attention_bias", False)
    return _config("qwen3", fields, common, qkv_bias=bias, o_bias=bias)


def _config(
    architecture: str, fields: Fields, common: HFCommon, *, qkv_bias: bool, o_bias: bool
) -> ModelConfig:
    used = fields.flag("use_sliding_window", False)
    window = optional_window(fields, 4096) if used else None
    num_full = fields.integer("max_window_layers", 28)  # so many first layers see the whole context
    default = [window if i >= num_full else None for i in range(common["num_layers"])]
    return ModelConfig(
        architecture=architecture,
        **common,
        activation=activation(fields, "hidden_act", "silu"),
        qkv_bias=qkv_bias,
        o_bias=o_bias,
        qk_norm=architecture == "qwen3",
        tie_word_embeddings=fields.flag("tie_word_embeddings", False),
        windows=layer_windows(fields, window, default),
        rope=build_rope(fields, common["head_dim"]),
    )


def _gguf_qwen2(header: GGUFHeader) -> ModelConfig:
    common = common_keys(header)
    rope = rope_keys(header, common["head_dim"])
    return ModelConfig(architecture="qwen2", **common, rope=rope)


def _gguf_qwen3(header: GGUFHeader) -> ModelConfig:
    common = common_keys(header)
    rope = rope_keys(header, common["head_dim"])
    return ModelConfig(architecture="qwen3", **common, qk_norm=True, rope=rope)


QWEN2 = Family(
    name="qwen2",
    hf=HFReader("qwen2", _qwen2_config, hf_source),
    gguf=GGUFReader("qwen2", _gguf_qwen2, gguf_source, common_values),
)
QWEN3 = Family(
    name="qwen3",
    hf=HFReader("qwen3", _qwen3_config, hf_source),
    gguf=GGUFReader("qwen3", _gguf_qwen3, gguf_source, common_values),
)
