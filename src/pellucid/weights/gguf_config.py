"""GGUF metadata -> `ModelConfig`. Keys are "<architecture>.<name>"; where llama.cpp has a default
for an absent key, it is the default here.

One idea: metadata and tensors together are the config. Biases, and an lm_head of its own, are there
when their tensors are. Keys that would change the forward pass and are not understood are refused;
keys that cannot (names, datasets, training facts) are not looked at.

Facts follow llama.cpp's converter and loader: attention windows and their pattern, Gemma's scale
for its 27B models, `rope_freqs.weight`.
"""

import math
from collections.abc import Mapping, Sequence

from ..config import MAX_LAYERS, ModelConfig, RopeConfig
from ..errors import FormatError, UnsupportedError
from .fields import Fields, config_from_file

__all__ = ["ROPE_FREQS", "build_gguf_config"]

ROPE_FREQS = "rope_freqs.weight"  # [rotary_dim / 2]: what each inverse frequency is divided by
_KNOWN = ("gpt2", "llama", "qwen2", "qwen3", "gemma2", "gemma3")
_GEMMA = ("gemma2", "gemma3")
# these alone scale scores by hidden_size / num_heads, and no key says so
_GEMMA_27B_LAYERS = {"gemma2": 46, "gemma3": 62}
_HARMLESS = ("rope.scaling.finetuned",)  # says how the model was trained
# what may change the forward pass begins with one of these
_TELLING = ("attention.", "rope.", "expert_")
# or ends so: logit_scale, embedding_scale, use_parallel_residual
_TELLING_ENDS = ("_scale", "_residual", "_softcapping")


def build_gguf_config(
    metadata: Mapping[str, object],
    shapes: Mapping[str, tuple[int, ...]],
    rope_freqs: Sequence[float] | None,
    where: str,
) -> ModelConfig:
    """The config of a GGUF file, from its metadata, the shapes of its tensors by name, and its
    rotary factors if it has them.
    """
    general = Fields(where, metadata, "general.")
    architecture = general.text("architecture")
    kind = general.text("type", "model")
    if kind != "model":
        raise UnsupportedError(f"{where} is a GGUF file of type {kind!r}; only 'model' can be run")
    if architecture not in _KNOWN:
        raise UnsupportedError(
            f"{where}: architecture is {architecture!r}; known ones are: {', '.join(_KNOWN)}"
        )
    fields = Fields(where, metadata, f"{architecture}.")
    if fields.integer("expert_count", 0):
        raise UnsupportedError(
            f"{where}: {architecture} with expert_count {fields.integer('expert_count')} is a "
            "mixture of experts; only dense models run"
        )
    with config_from_file(where):
        config = _build(architecture, fields, shapes, rope_freqs)
    _check_unread(fields)
    return config


def _build(
    architecture: str,
    fields: Fields,
    shapes: Mapping[str, tuple[int, ...]],
    rope_freqs: Sequence[float] | None,
) -> ModelConfig:
    hidden_size = fields.integer("embedding_length")
    num_layers = fields.integer("block_count")
    num_heads = fields.integer("attention.head_count")
    if not (1 <= num_heads <= hidden_size and 1 <= num_layers <= MAX_LAYERS):
        raise FormatError(
            f"{fields.where}: embedding_length is {hidden_size}, head_count {num_heads} and "
            f"block_count {num_layers}; "
            f"there must be 1 to embedding_length heads and 1 to {MAX_LAYERS} blocks"
        )
    head_dim = fields.integer("attention.key_length", hidden_size // num_heads)
    if fields.integer("attention.value_length", head_dim) != head_dim:
        raise UnsupportedError(
            f"{fields.where}: attention.value_length differs from key_length; heads of one size "
            "are needed"
        )
    if not fields.flag("attention.causal", True):
        raise UnsupportedError(f"{fields.where}: attention.causal is false; only causal models run")
    windows = _windows(architecture, fields, num_layers)
    gemma = architecture in _GEMMA
    wide_scale = gemma and num_layers == _GEMMA_27B_LAYERS[architecture]
    eps = "layer_norm_epsilon" if architecture == "gpt2" else "layer_norm_rms_epsilon"
    return ModelConfig(
        architecture=architecture,
        vocab_size=fields.integer("vocab_size", shapes.get("token_embd.weight", (0,))[0]),
        hidden_size=hidden_size,
        intermediate_size=fields.integer("feed_forward_length"),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=fields.integer("attention.head_count_kv", num_heads),
        head_dim=head_dim,
        max_position_embeddings=fields.integer("context_length"),
        norm_eps=fields.number(f"attention.{eps}"),
        activation="gelu_tanh" if gemma or architecture == "gpt2" else "silu",
        qkv_bias="blk.0.attn_q.bias" in shapes or "blk.0.attn_qkv.bias" in shapes,
        o_bias="blk.0.attn_output.bias" in shapes,
        mlp_bias="blk.0.ffn_down.bias" in shapes,
        qk_norm=architecture in ("qwen3", "gemma3"),
        tie_word_embeddings="output.weight" not in shapes,
        embedding_scale=hidden_size**0.5 if gemma else 1.0,
        softmax_scale=(hidden_size // num_heads) ** -0.5 if wide_scale else None,
        attn_softcap=(fields.number("attn_logit_softcapping", 50.0) or None)
        if architecture == "gemma2"
        else None,
        final_softcap=(
            fields.number("final_logit_softcapping", 30.0 if architecture == "gemma2" else 0.0)
            or None
        )
        if gemma
        else None,
        windows=windows,
        rope=None if architecture == "gpt2" else _rope(architecture, fields, head_dim, rope_freqs),
        rope_local=_rope_local(architecture, fields, head_dim),
    )


def _windows(architecture: str, fields: Fields, num_layers: int) -> tuple[int | None, ...]:
    """Gemma's layers take turns, the last of each group seeing all; a window of Mistral holds for
    all layers. 0 is none.
    """
    size = fields.integer("attention.sliding_window", 4096 if architecture == "gemma2" else 0)
    if size == 0:
        return ()
    if size < 0 or architecture not in ("llama", *_GEMMA):
        raise UnsupportedError(
            f"{fields.where}: attention.sliding_window is {size}, which is not understood for "
            f"{architecture}"
        )
    if architecture == "llama":
        return (size,) * num_layers
    pattern = fields.value("attention.sliding_window_pattern")
    period = {"gemma2": 2, "gemma3": 6}[architecture] if pattern is None else pattern
    if isinstance(period, int) and not isinstance(period, bool) and period > 0:
        return tuple(size if i % period < period - 1 else None for i in range(num_layers))
    if isinstance(pattern, Sequence) and len(pattern) == num_layers:
        return tuple(size if windowed else None for windowed in pattern)
    raise fields.error(
        "attention.sliding_window_pattern",
        f"neither a positive number nor a list of {num_layers}, one for each layer",
    )


def _rope(
    architecture: str, fields: Fields, head_dim: int, rope_freqs: Sequence[float] | None
) -> RopeConfig:
    rotary_dim = fields.integer("rope.dimension_count", head_dim)
    if architecture == "llama" and rotary_dim != head_dim:
        raise UnsupportedError(
            f"{fields.where}: rope.dimension_count is {rotary_dim}; only whole heads, {head_dim}, "
            "can be turned in this layout"
        )
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
    if rope_freqs is not None:
        if scaling != "none":
            raise UnsupportedError(
                f"{fields.where}: rope.scaling.type {scaling!r} together with {ROPE_FREQS} is not "
                "supported"
            )
        return RopeConfig(
            theta=theta, rotary_dim=rotary_dim, scaling="factors", freq_factors=tuple(rope_freqs)
        )
    if scaling == "none":
        return RopeConfig(theta=theta, rotary_dim=rotary_dim)
    if scaling == "linear":
        return RopeConfig(theta=theta, rotary_dim=rotary_dim, scaling="linear", factor=factor)
    if scaling != "yarn":
        raise UnsupportedError(
            f"{fields.where}: rope.scaling.type is {scaling!r}; known ones are: none, linear, yarn"
        )
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


def _rope_local(architecture: str, fields: Fields, head_dim: int) -> RopeConfig | None:
    """Gemma's windowed layers may turn with a base of their own, unscaled: 10 000 in Gemma 3 unless
    a key says otherwise.
    """
    theta = fields.optional_number("rope.freq_base_swa") if architecture in _GEMMA else None
    if theta is None and architecture != "gemma3":
        return None
    return RopeConfig(
        theta=theta or 10_000.0, rotary_dim=fields.integer("rope.dimension_count", head_dim)
    )


def _check_unread(fields: Fields) -> None:
    """Refuse a key that may change the forward pass and was not understood, unless its value says
    "no".
    """
    for name in fields.unread():
        if name in _HARMLESS or not (name.startswith(_TELLING) or name.endswith(_TELLING_ENDS)):
            continue
        value = fields.value(name)
        if any(value) if isinstance(value, Sequence) and not isinstance(value, str) else value:
            raise UnsupportedError(
                f"{fields.where}: {name} is set, which may change what the model computes and is "
                "not supported"
            )
