"""Llama 1 to 3 and models with the same model_type: TinyLlama, SmolLM2, Yi. Also Mistral, which
GGUF files call Llama too.
"""

from ...config import ModelConfig
from ...errors import UnsupportedError
from ...models.params import Param, split_name
from ..fields import Fields
from ..folds import InterleavedToHalfSplit
from ..hf_rope import build_rope
from ..plan import ParamSource
from .family import Family, GGUFHeader, GGUFReader, HFReader
from .gguf import common_keys, gguf_source, rope_keys
from .gguf_values import common_values, window_values
from .hf import activation, common_fields, hf_source, optional_window

__all__ = ["LLAMA", "MISTRAL"]


def _llama_config(fields: Fields) -> ModelConfig:
    common = common_fields(fields)
    bias = fields.flag("attention_bias", False)
    return ModelConfig(
        architecture="llama",
        **common,
        activation=activation(fields, "hidden_act", "silu"),
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=fields.flag("mlp_bias", False),
        tie_word_embeddings=fields.flag("tie_word_embeddings", False),
        rope=build_rope(fields, common["head_dim"]),
    )


def _mistral_config(fields: Fields) -> ModelConfig:
    common = common_fields(fields, num_kv_heads=8)
    if fields.optional_texts("layer_types") is not None:
        raise UnsupportedError(
            f"{fields.where}: layer_types is set, which is not supported for mistral"
        )
    return ModelConfig(
        architecture="mistral",
        **common,
        activation=activation(fields, "hidden_act", "silu"),
        tie_word_embeddings=fields.flag("tie_word_embeddings", False),
        windows=(optional_window(fields, 4096),) * common["num_layers"],
        rope=build_rope(fields, common["head_dim"]),
    )


def _gguf_config(header: GGUFHeader) -> ModelConfig:
    """A window, which files of Mistral may have, applies to all layers; 0 means none."""
    fields, common = header.fields, common_keys(header)
    rope = rope_keys(header, common["head_dim"])
    if rope.rotary_dim != common["head_dim"]:
        raise UnsupportedError(
            f"{fields.where}: rope.dimension_count is {rope.rotary_dim}; only whole heads, "
            f"{common['head_dim']}, can be turned in this layout"
        )
    window = fields.integer("attention.sliding_window", 0) or None
    return ModelConfig(
        architecture="llama", **common, windows=(window,) * common["num_layers"], rope=rope
    )


def _gguf_values(config: ModelConfig) -> dict[str, object]:
    windows = window_values(config.windows) if any(config.windows) else {}
    return {**common_values(config), **windows}


def _gguf_source(config: ModelConfig, param: Param) -> ParamSource:
    """The rows of q and k are in the interleaved RoPE layout; only files of this family have it."""
    plain = gguf_source(config, param)
    heads = {"q_proj": config.num_heads, "k_proj": config.num_kv_heads}
    module = split_name(param.name)[1]
    if module in heads:
        return ParamSource(plain.tensors, InterleavedToHalfSplit(heads[module]))
    return plain


LLAMA = Family(
    name="llama",
    hf=HFReader("llama", _llama_config, hf_source),
    gguf=GGUFReader("llama", _gguf_config, _gguf_source, _gguf_values),
)
MISTRAL = Family(name="mistral", hf=HFReader("mistral", _mistral_config, hf_source), gguf=None)
