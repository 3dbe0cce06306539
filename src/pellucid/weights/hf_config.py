"""Hugging Face `config.json` -> `ModelConfig`. `model_type` decides the family; fields mean what
transformers makes of them.

One idea: a field that transformers' model of that type reads is read here or refused; a field that
it does not read changes nothing there and nothing here. Defaults are those of transformers' config
classes, for files that leave them out; sizes have none.

Rotary fields have a file of their own, `hf_rope.py`.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TypedDict

from ..config import MAX_LAYERS, Activation, ModelConfig
from ..errors import FormatError, UnsupportedError
from .fields import Fields, config_from_file
from .hf_rope import build_local_rope, build_rope

__all__ = ["build_hf_config"]

_ACTIVATIONS: Mapping[str, Activation] = MappingProxyType(
    {"silu": "silu", "swish": "silu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}
)


def build_hf_config(values: Mapping[str, object], where: str) -> ModelConfig:
    """The config that the JSON object `values` describes. `where` names the file in messages."""
    fields = Fields(where, values)
    model_type = fields.text("model_type")
    if fields.section("vision_config") is not None or fields.section("text_config") is not None:
        raise UnsupportedError(
            f"{where}: model_type {model_type!r} has text and images; only text models run"
        )
    for name in ("num_local_experts", "num_experts", "n_routed_experts"):
        if fields.optional_integer(name):
            raise UnsupportedError(
                f"{where}: {model_type} with {name} {fields.integer(name)} is a mixture of "
                "experts; only dense models run"
            )
    if model_type not in _FAMILIES:
        raise UnsupportedError(
            f"{where}: model_type is {model_type!r}; known ones are: {', '.join(_FAMILIES)}"
        )
    for architecture in fields.optional_texts("architectures") or ():
        if not architecture.endswith(("ForCausalLM", "LMHeadModel")):
            raise UnsupportedError(
                f"{where}: architectures names {architecture!r}; only causal language models "
                "(…ForCausalLM) run"
            )
    quantization = fields.section("quantization_config")
    if quantization is not None:
        raise UnsupportedError(
            f"{where}: weights are quantized by "
            f"{quantization.text('quant_method', 'an unnamed method')!r}, which is not supported"
        )
    for name in ("use_bidirectional_attention", "is_encoder_decoder", "add_cross_attention"):
        if fields.flag(name, False):
            raise UnsupportedError(f"{where}: {name} is true; only causal decoders run")
    with config_from_file(where):
        return _FAMILIES[model_type](fields)


def _gpt2(fields: Fields) -> ModelConfig:
    if fields.flag("scale_attn_by_inverse_layer_idx", False):
        raise UnsupportedError(
            f"{fields.where}: scale_attn_by_inverse_layer_idx is true, which is not supported"
        )
    hidden_size, num_heads = fields.integer("n_embd"), _positive(fields, "n_head")
    return ModelConfig(
        architecture="gpt2",
        vocab_size=fields.integer("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=fields.integer("n_inner", 4 * hidden_size),
        num_layers=_num_layers(fields, "n_layer"),
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_dim=_head_dim(fields, hidden_size, num_heads),
        max_position_embeddings=fields.integer("n_positions"),
        norm_eps=fields.number("layer_norm_epsilon", 1e-5),
        activation=_activation(fields, "activation_function", "gelu_new", only="gelu_tanh"),
        qkv_bias=True,
        o_bias=True,
        mlp_bias=True,
        tie_word_embeddings=fields.flag("tie_word_embeddings", True),
        softmax_scale=None if fields.flag("scale_attn_weights", True) else 1.0,
    )


class _Common(TypedDict):
    """What all but GPT-2 call by the same names."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    norm_eps: float


def _common(fields: Fields, *, num_kv_heads: int | None, head_dim: int | None) -> _Common:
    """`num_kv_heads` and `head_dim` are the family's defaults; None: num_heads, and hidden_size /
    num_heads.
    """
    hidden_size, num_heads = fields.integer("hidden_size"), _positive(fields, "num_attention_heads")
    absent = not fields.has("num_key_value_heads")  # null means num_heads
    return {
        "vocab_size": fields.integer("vocab_size"),
        "hidden_size": hidden_size,
        "intermediate_size": fields.integer("intermediate_size"),
        "num_layers": _num_layers(fields, "num_hidden_layers"),
        "num_heads": num_heads,
        "num_kv_heads": fields.integer(
            "num_key_value_heads", num_kv_heads if absent and num_kv_heads else num_heads
        ),
        "head_dim": fields.optional_integer("head_dim")
        or head_dim
        or _head_dim(fields, hidden_size, num_heads),
        "max_position_embeddings": fields.integer("max_position_embeddings"),
        "norm_eps": fields.number("rms_norm_eps", 1e-6),
    }


def _llama(fields: Fields) -> ModelConfig:
    common = _common(fields, num_kv_heads=None, head_dim=None)
    bias = fields.flag("attention_bias", False)
    return ModelConfig(
        architecture="llama",
        **common,
        activation=_activation(fields, "hidden_act", "silu"),
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=fields.flag("mlp_bias", False),
        tie_word_embeddings=fields.flag("tie_word_embeddings", False),
        rope=build_rope(fields, common["head_dim"]),
    )


def _mistral(fields: Fields) -> ModelConfig:
    common = _common(fields, num_kv_heads=8, head_dim=None)
    if fields.optional_texts("layer_types") is not None:
        raise UnsupportedError(
            f"{fields.where}: layer_types is set, which is not supported for mistral"
        )
    window = fields.optional_integer("sliding_window") if fields.has("sliding_window") else 4096
    return ModelConfig(
        architecture="mistral",
        **common,
        activation=_activation(fields, "hidden_act", "silu"),
        tie_word_embeddings=fields.flag("tie_word_embeddings", False),
        windows=(window,) * common["num_layers"],
        rope=build_rope(fields, common["head_dim"]),
    )


def _qwen2(fields: Fields) -> ModelConfig:
    return _qwen(
        "qwen2",
        fields,
        _common(fields, num_kv_heads=32, head_dim=None),
        qkv_bias=True,
        o_bias=False,
    )


def _qwen3(fields: Fields) -> ModelConfig:
    bias = fields.flag("attention_bias", False)
    return _qwen(
        "qwen3", fields, _common(fields, num_kv_heads=32, head_dim=128), qkv_bias=bias, o_bias=bias
    )


def _qwen(
    architecture: str, fields: Fields, common: _Common, *, qkv_bias: bool, o_bias: bool
) -> ModelConfig:
    window = None
    if fields.flag("use_sliding_window", False):
        window = fields.optional_integer("sliding_window") if fields.has("sliding_window") else 4096
    num_full = fields.integer("max_window_layers", 28)  # the first so many layers see all
    default = [window if i >= num_full else None for i in range(common["num_layers"])]
    return ModelConfig(
        architecture=architecture,
        **common,
        activation=_activation(fields, "hidden_act", "silu"),
        qkv_bias=qkv_bias,
        o_bias=o_bias,
        qk_norm=architecture == "qwen3",
        tie_word_embeddings=fields.flag("tie_word_embeddings", False),
        windows=_windows(fields, window, default),
        rope=build_rope(fields, common["head_dim"]),
    )


def _gemma2(fields: Fields) -> ModelConfig:
    return _gemma("gemma2", fields, period=2)


def _gemma3(fields: Fields) -> ModelConfig:
    return _gemma(
        "gemma3",
        fields,
        period=fields.integer(
            "sliding_window_pattern", fields.integer("_sliding_window_pattern", 6)
        ),
    )


def _gemma(architecture: str, fields: Fields, *, period: int) -> ModelConfig:
    """The last layer of each `period` sees all, the others a window."""
    if period < 1:
        raise FormatError(
            f"{fields.where}: sliding_window_pattern is {period}; it must be at least 1"
        )
    common = _common(fields, num_kv_heads=4, head_dim=256)
    window = fields.optional_integer("sliding_window") if fields.has("sliding_window") else 4096
    default = [window if (i + 1) % period else None for i in range(common["num_layers"])]
    bias = fields.flag("attention_bias", False)
    second = architecture == "gemma2"
    attn_cap, final_cap = (50.0, 30.0) if second else (None, None)
    head_dim = common["head_dim"]
    return ModelConfig(
        architecture=architecture,
        **common,
        activation=_activation(fields, "hidden_activation", "gelu_pytorch_tanh"),
        qkv_bias=bias,
        o_bias=bias,
        qk_norm=not second,
        tie_word_embeddings=fields.flag("tie_word_embeddings", True),
        embedding_scale=common["hidden_size"] ** 0.5,
        softmax_scale=_positive_number(fields, "query_pre_attn_scalar", 256.0) ** -0.5,
        attn_softcap=fields.optional_number("attn_logit_softcapping")
        if fields.has("attn_logit_softcapping")
        else attn_cap,
        final_softcap=fields.optional_number("final_logit_softcapping")
        if fields.has("final_logit_softcapping")
        else final_cap,
        windows=_windows(fields, window, default),
        rope=build_rope(fields, head_dim)
        if second
        else build_rope(fields, head_dim, layer_type="full_attention", theta=1_000_000.0),
        rope_local=None if second else build_local_rope(fields, head_dim),
    )


def _windows(
    fields: Fields, window: int | None, default: list[int | None]
) -> tuple[int | None, ...]:
    """The window of each layer: by `layer_types` where the file has it."""
    types = fields.optional_texts("layer_types")
    if types is None:
        return tuple(default)
    unknown = [t for t in types if t not in ("full_attention", "sliding_attention")]
    if unknown:
        raise UnsupportedError(
            f"{fields.where}: layer_types names {unknown[0]!r}; known ones are: full_attention, "
            "sliding_attention"
        )
    if window is None and "sliding_attention" in types:
        raise FormatError(
            f"{fields.where}: layer_types names 'sliding_attention' but there is no sliding_window"
        )
    return tuple(window if t == "sliding_attention" else None for t in types)


def _activation(
    fields: Fields, name: str, default: str, only: Activation | None = None
) -> Activation:
    value = fields.text(name, default)
    if value not in _ACTIVATIONS or only not in (None, _ACTIVATIONS[value]):
        known = [key for key, activation in _ACTIVATIONS.items() if only in (None, activation)]
        raise UnsupportedError(
            f"{fields.where}: {name} is {value!r}; known ones are: {', '.join(known)}"
        )
    return _ACTIVATIONS[value]


def _num_layers(fields: Fields, name: str) -> int:
    value = _positive(fields, name)
    if value > MAX_LAYERS:
        raise fields.error(name, f"{value}; it must be at most {MAX_LAYERS}")
    return value


def _positive(fields: Fields, name: str) -> int:
    value = fields.integer(name)
    if value < 1:
        raise fields.error(name, f"{value}; it must be at least 1")
    return value


def _positive_number(fields: Fields, name: str, default: float) -> float:
    value = fields.number(name, default)
    if value <= 0:
        raise fields.error(name, f"{value}; it must be above 0")
    return value


def _head_dim(fields: Fields, hidden_size: int, num_heads: int) -> int:
    if hidden_size % num_heads:
        raise FormatError(
            f"{fields.where}: hidden size {hidden_size} is not a multiple of the number of heads, "
            f"{num_heads}, and head_dim is not given"
        )
    return hidden_size // num_heads


_FAMILIES: Mapping[str, Callable[[Fields], ModelConfig]] = MappingProxyType(
    {
        "gpt2": _gpt2,
        "llama": _llama,
        "mistral": _mistral,
        "qwen2": _qwen2,
        "qwen3": _qwen3,
        "gemma2": _gemma2,
        "gemma3_text": _gemma3,
    }
)
