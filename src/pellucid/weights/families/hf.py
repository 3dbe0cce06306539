"""What most families have in common in Hugging Face folders: fields of config.json, and names of
tensors.

Defaults for absent fields are those of transformers' config classes; sizes have none. `hf_rope.py`
reads the rotary fields.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import TypedDict

from ...config import MAX_LAYERS, Activation, ModelConfig
from ...errors import FormatError, UnsupportedError
from ...models.params import Param, split_name
from ..fields import Fields
from ..hf_rope import served_context
from ..plan import ParamSource

__all__ = [
    "HF_NAMES",
    "HFCommon",
    "activation",
    "common_fields",
    "hf_name",
    "hf_source",
    "layer_windows",
    "number_of_heads",
    "number_of_layers",
    "optional_window",
    "positive_number",
    "size_of_heads",
]

ACTIVATIONS: Mapping[str, Activation] = MappingProxyType(
    {"silu": "silu", "swish": "silu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}
)

# module of a canonical name -> its name in the file; {} is the layer
HF_NAMES: Mapping[str, str] = MappingProxyType(
    {
        "embed_tokens": "model.embed_tokens",
        "norm": "model.norm",
        "lm_head": "lm_head",
        "input_norm": "model.layers.{}.input_layernorm",
        "q_proj": "model.layers.{}.self_attn.q_proj",
        "k_proj": "model.layers.{}.self_attn.k_proj",
        "v_proj": "model.layers.{}.self_attn.v_proj",
        "q_norm": "model.layers.{}.self_attn.q_norm",
        "k_norm": "model.layers.{}.self_attn.k_norm",
        "o_proj": "model.layers.{}.self_attn.o_proj",
        "pre_mlp_norm": "model.layers.{}.post_attention_layernorm",
        "gate_proj": "model.layers.{}.mlp.gate_proj",
        "up_proj": "model.layers.{}.mlp.up_proj",
        "down_proj": "model.layers.{}.mlp.down_proj",
    }
)


def hf_name(param: Param, names: Mapping[str, str] = HF_NAMES) -> str:
    """The name of `param` in the file, if it is a tensor of its own there."""
    layer, module, kind = split_name(param.name)
    return f"{names[module].format(layer)}.{kind}"


def hf_source(config: ModelConfig, param: Param) -> ParamSource:
    """Llama's layout: each parameter is one tensor, used unchanged."""
    return ParamSource({hf_name(param): param.shape})


class HFCommon(TypedDict):
    """The fields that all families but GPT-2 have under the same names."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    norm_eps: float


def common_fields(
    fields: Fields,
    *,
    num_kv_heads: int | None = None,
    head_dim: int | None = None,
    norm_eps: float = 1e-6,
    original_context: int | None = None,
) -> HFCommon:
    """The fields of `HFCommon`. The keywords are the family's defaults; None means num_heads for
    `num_kv_heads`, hidden_size / num_heads for `head_dim`, and no default for the training context.
    """
    hidden_size = fields.integer("hidden_size")
    num_heads = number_of_heads(fields, "num_attention_heads")
    absent = not fields.has("num_key_value_heads")  # null means num_heads
    return {
        "vocab_size": fields.integer("vocab_size"),
        "hidden_size": hidden_size,
        "intermediate_size": fields.integer("intermediate_size"),
        "num_layers": number_of_layers(fields, "num_hidden_layers"),
        "num_heads": num_heads,
        "num_kv_heads": fields.integer(
            "num_key_value_heads", num_kv_heads if absent and num_kv_heads else num_heads
        ),
        "head_dim": fields.optional_integer("head_dim")
        or head_dim
        or size_of_heads(fields, hidden_size, num_heads),
        "max_position_embeddings": served_context(fields, original_context),
        "norm_eps": fields.number("rms_norm_eps", norm_eps),
    }


def optional_window(fields: Fields, default: int | None) -> int | None:
    """`sliding_window`: null means none, and an absent field the family's default."""
    return fields.optional_integer("sliding_window") if fields.has("sliding_window") else default


def layer_windows(
    fields: Fields, window: int | None, default: list[int | None]
) -> tuple[int | None, ...]:
    """The window of each layer: by `layer_types` if the file has it, else `default`."""
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


def activation(
    fields: Fields, name: str, default: str, only: Activation | None = None
) -> Activation:
    """The activation in the field `name`. `only`: the one that the family's graph supports."""
    value = fields.text(name, default)
    if value not in ACTIVATIONS or only not in (None, ACTIVATIONS[value]):
        known = [key for key, known in ACTIVATIONS.items() if only in (None, known)]
        raise UnsupportedError(
            f"{fields.where}: {name} is {value!r}; known ones are: {', '.join(known)}"
        )
    return ACTIVATIONS[value]


def number_of_layers(fields: Fields, name: str) -> int:
    value = number_of_heads(fields, name)
    if value > MAX_LAYERS:
        raise fields.error(name, f"{value}; it must be at most {MAX_LAYERS}")
    return value


def number_of_heads(fields: Fields, name: str) -> int:
    value = fields.integer(name)
    if value < 1:
        raise fields.error(name, f"{value}; it must be at least 1")
    return value


def positive_number(fields: Fields, name: str, default: float) -> float:
    value = fields.number(name, default)
    if value <= 0:
        raise fields.error(name, f"{value}; it must be above 0")
    return value


def size_of_heads(fields: Fields, hidden_size: int, num_heads: int) -> int:
    """head_dim if the file does not give it: hidden_size / num_heads."""
    if hidden_size % num_heads:
        raise FormatError(
            f"{fields.where}: hidden size {hidden_size} is not a multiple of the number of heads, "
            f"{num_heads}, and head_dim is not given"
        )
    return hidden_size // num_heads
