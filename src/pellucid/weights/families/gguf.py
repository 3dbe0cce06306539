"""What most families have in common in GGUF files: keys and their defaults, rotary keys, and names
of tensors.

The config follows from metadata and tensors: a model has biases, or an lm_head of its own, if the
file has their tensors. Defaults for absent keys are llama.cpp's.
"""

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import TypedDict

from ...config import MAX_LAYERS, ModelConfig, RopeConfig
from ...errors import FormatError, UnsupportedError
from ...models.params import Param, split_name
from ..hf_rope import warn_of_short_context
from ..plan import ParamSource
from .family import GGUFHeader

__all__ = [
    "GGUF_NAMES",
    "ROPE_FACTORS",
    "ROPE_FREQS",
    "ROPE_SHORT",
    "GGUFCommon",
    "common_keys",
    "gguf_name",
    "gguf_source",
    "rope_keys",
]

# Tensors [rotary_dim / 2] of factors by which the inverse frequencies are divided. Longrope has
# factors for sequences within the training context, and others for longer ones.
ROPE_FREQS = "rope_freqs.weight"
ROPE_SHORT = "rope_factors_short.weight"
ROPE_FACTORS = (ROPE_FREQS, ROPE_SHORT, "rope_factors_long.weight")

# module of a canonical name -> its name in the file; {} is the layer
GGUF_NAMES: Mapping[str, str] = MappingProxyType(
    {
        "embed_tokens": "token_embd",
        "embed_positions": "position_embd",
        "norm": "output_norm",
        "lm_head": "output",
        "input_norm": "blk.{}.attn_norm",
        "q_proj": "blk.{}.attn_q",
        "k_proj": "blk.{}.attn_k",
        "v_proj": "blk.{}.attn_v",
        "q_norm": "blk.{}.attn_q_norm",
        "k_norm": "blk.{}.attn_k_norm",
        "o_proj": "blk.{}.attn_output",
        "post_attn_norm": "blk.{}.post_attention_norm",
        "pre_mlp_norm": "blk.{}.ffn_norm",
        "gate_proj": "blk.{}.ffn_gate",
        "up_proj": "blk.{}.ffn_up",
        "down_proj": "blk.{}.ffn_down",
        "post_mlp_norm": "blk.{}.post_ffw_norm",
    }
)


def gguf_name(param: Param) -> str:
    """The name of `param` in the file, if it is a tensor of its own there."""
    layer, module, kind = split_name(param.name)
    return f"{GGUF_NAMES[module].format(layer)}.{kind}"


def gguf_source(config: ModelConfig, param: Param) -> ParamSource:
    """The layout of most families: each parameter is one tensor, used unchanged."""
    return ParamSource({gguf_name(param): param.shape})


class GGUFCommon(TypedDict):
    """The fields that all families have under the same keys, and those that follow from their
    tensors.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    norm_eps: float
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    tie_word_embeddings: bool


def common_keys(header: GGUFHeader, norm_eps: str = "layer_norm_rms_epsilon") -> GGUFCommon:
    """The fields of `GGUFCommon`. `norm_eps` is the family's name of that key."""
    fields, shapes = header.fields, header.shapes
    # sizes that others are computed from
    hidden_size = fields.integer("embedding_length")
    num_layers = fields.integer("block_count")
    num_heads = fields.integer("attention.head_count")
    if not (1 <= num_heads <= hidden_size and 1 <= num_layers <= MAX_LAYERS):
        raise FormatError(
            f"{fields.where}: embedding_length is {hidden_size}, head_count {num_heads} and "
            f"block_count {num_layers}; there must be 1 to embedding_length heads and 1 to "
            f"{MAX_LAYERS} blocks"
        )
    # refuse kinds of attention that do not exist here
    head_dim = fields.integer("attention.key_length", hidden_size // num_heads)
    if fields.integer("attention.value_length", head_dim) != head_dim:
        raise UnsupportedError(
            f"{fields.where}: attention.value_length differs from key_length; heads of one size "
            "are needed"
        )
    if not fields.flag("attention.causal", True):
        raise UnsupportedError(f"{fields.where}: attention.causal is false; only causal models run")
    return {
        "vocab_size": fields.integer("vocab_size", shapes.get("token_embd.weight", (0,))[0]),
        "hidden_size": hidden_size,
        "intermediate_size": fields.integer("feed_forward_length"),
        "num_layers": num_layers,
        "num_heads": num_heads,
        "num_kv_heads": fields.integer("attention.head_count_kv", num_heads),
        "head_dim": head_dim,
        "max_position_embeddings": _served_context(header),
        "norm_eps": fields.number(f"attention.{norm_eps}"),
        "qkv_bias": "blk.0.attn_q.bias" in shapes or "blk.0.attn_qkv.bias" in shapes,
        "o_bias": "blk.0.attn_output.bias" in shapes,
        "mlp_bias": "blk.0.ffn_down.bias" in shapes,
        "tie_word_embeddings": "output.weight" not in shapes,
    }


def _served_context(header: GGUFHeader) -> int:
    """The longest sequence that is served: the model's context, except for longrope
    (`hf_rope.py`).
    """
    length = header.fields.integer("context_length")
    if ROPE_SHORT not in header.rope_factors:
        return length
    original = header.fields.integer("rope.scaling.original_context_length", length)
    return warn_of_short_context(header.fields.where, length, original)


def rope_keys(header: GGUFHeader, head_dim: int) -> RopeConfig:
    """The rotary embedding, from the keys and the factors of a file."""
    fields = header.fields
    rotary_dim = fields.integer("rope.dimension_count", head_dim)
    theta = fields.number("rope.freq_base", 10_000.0)
    factor = (
        fields.optional_number("rope.scaling.factor")
        or fields.optional_number("rope.scale_linear")
        or 1.0
    )
    scaling = fields.text("rope.scaling.type", "linear" if factor != 1.0 else "none")
    original = fields.integer(
        "rope.scaling.original_context_length", fields.integer("context_length")
    )
    # factors of the file, one for each pair
    for name in (ROPE_FREQS, ROPE_SHORT):
        if name not in header.rope_factors:
            continue
        if scaling not in ("none", "longrope"):
            raise UnsupportedError(
                f"{fields.where}: rope.scaling.type {scaling!r} together with {name} is not "
                "supported"
            )
        return RopeConfig(
            theta=theta,
            rotary_dim=rotary_dim,
            scaling="factors",
            freq_factors=tuple(header.rope_factors[name]),
            attention_factor=fields.optional_number("rope.scaling.attn_factor"),
        )
    # one factor for all pairs, or none
    if scaling == "none":
        return RopeConfig(theta=theta, rotary_dim=rotary_dim)
    if scaling == "linear":
        return RopeConfig(theta=theta, rotary_dim=rotary_dim, scaling="linear", factor=factor)
    if scaling != "yarn":
        raise UnsupportedError(
            f"{fields.where}: rope.scaling.type is {scaling!r}; known ones are: none, linear, yarn"
        )
    # yarn
    if (
        fields.number("rope.scaling.yarn_ext_factor", 1.0) != 1.0
        or fields.number("rope.scaling.yarn_log_multiplier", 0.0) != 0.0
    ):
        raise UnsupportedError(
            f"{fields.where}: yarn_ext_factor must be 1 and yarn_log_multiplier 0 where they are "
            "given"
        )
    attention_factor = (
        fields.optional_number("rope.scaling.yarn_attn_factor")
        or 0.1 * math.log(max(factor, 1.0)) + 1.0
    )
    return RopeConfig(
        theta=theta,
        rotary_dim=rotary_dim,
        scaling="yarn",
        factor=factor,
        original_max_position_embeddings=original,
        beta_fast=fields.number("rope.scaling.yarn_beta_fast", 32.0),
        beta_slow=fields.number("rope.scaling.yarn_beta_slow", 1.0),
        attention_factor=attention_factor * fields.number("rope.scaling.attn_factor", 1.0),
    )
