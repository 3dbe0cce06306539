"""GPT-2: q, k and v are one matrix, and Hugging Face's files store linear layers as [in, out]."""

from collections.abc import Mapping
from types import MappingProxyType

from ...config import ModelConfig
from ...errors import UnsupportedError
from ...models.params import Param, split_name
from ..fields import Fields
from ..folds import SliceOutputs, Transpose
from ..plan import ParamSource
from .family import Family, GGUFHeader, GGUFReader, HFReader
from .fused import qkv_rows
from .gguf import common_keys, gguf_source
from .gguf_values import common_values
from .hf import activation, hf_name, number_of_heads, number_of_layers, size_of_heads

__all__ = ["GPT2"]

HF_NAMES: Mapping[str, str] = MappingProxyType(
    {
        "embed_tokens": "transformer.wte",
        "embed_positions": "transformer.wpe",
        "norm": "transformer.ln_f",
        "lm_head": "lm_head",
        "input_norm": "transformer.h.{}.ln_1",
        "q_proj": "transformer.h.{}.attn.c_attn",
        "k_proj": "transformer.h.{}.attn.c_attn",
        "v_proj": "transformer.h.{}.attn.c_attn",
        "o_proj": "transformer.h.{}.attn.c_proj",
        "pre_mlp_norm": "transformer.h.{}.ln_2",
        "up_proj": "transformer.h.{}.mlp.c_fc",
        "down_proj": "transformer.h.{}.mlp.c_proj",
    }
)


def _config(fields: Fields) -> ModelConfig:
    if fields.flag("scale_attn_by_inverse_layer_idx", False):
        raise UnsupportedError(
            f"{fields.where}: scale_attn_by_inverse_layer_idx is true, which is not supported"
        )
    hidden_size = fields.integer(_alias(fields, "hidden_size", "n_embd"))
    num_heads = number_of_heads(fields, _alias(fields, "num_attention_heads", "n_head"))
    return ModelConfig(
        architecture="gpt2",
        graph="gpt2",
        vocab_size=fields.integer("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=fields.integer("n_inner", 4 * hidden_size),
        num_layers=number_of_layers(fields, _alias(fields, "num_hidden_layers", "n_layer")),
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_dim=size_of_heads(fields, hidden_size, num_heads),
        max_position_embeddings=fields.integer(
            _alias(fields, "max_position_embeddings", "n_positions")
        ),
        norm_eps=fields.number("layer_norm_epsilon", 1e-5),
        activation=activation(fields, "activation_function", "gelu_new", only="gelu_tanh"),
        qkv_bias=True,
        o_bias=True,
        mlp_bias=True,
        tie_word_embeddings=fields.flag("tie_word_embeddings", True),
        softmax_scale=None if fields.flag("scale_attn_weights", True) else 1.0,
    )


def _alias(fields: Fields, name: str, own: str) -> str:
    """GPT-2 has its own names for sizes. transformers also accepts the common name, and prefers
    it.
    """
    return name if fields.has(name) else own


def _source(config: ModelConfig, param: Param) -> ParamSource:
    name, module = hf_name(param, HF_NAMES), split_name(param.name)[1]
    rows = qkv_rows(config, param)
    if rows is not None:
        start, stop, total = rows
        if len(param.shape) == 1:
            return ParamSource({name: (total,)}, SliceOutputs(start, stop))
        return ParamSource({name: (config.hidden_size, total)}, Transpose(start, stop))
    if len(param.shape) == 2 and module.endswith("_proj"):
        return ParamSource({name: param.shape[::-1]}, Transpose())
    return ParamSource({name: param.shape})


def _gguf_config(header: GGUFHeader) -> ModelConfig:
    return ModelConfig(
        architecture="gpt2",
        graph="gpt2",
        **common_keys(header, "layer_norm_epsilon"),
        activation="gelu_tanh",
    )


def _gguf_values(config: ModelConfig) -> dict[str, object]:
    return common_values(config, "layer_norm_epsilon")


def _gguf_source(config: ModelConfig, param: Param) -> ParamSource:
    layer, _, kind = split_name(param.name)
    rows = qkv_rows(config, param)
    if rows is None:
        return gguf_source(config, param)
    start, stop, total = rows
    fused = {f"blk.{layer}.attn_qkv.{kind}": (total, *param.shape[1:])}
    return ParamSource(fused, SliceOutputs(start, stop))


GPT2 = Family(
    name="gpt2",
    hf=HFReader("gpt2", _config, _source, prefix="transformer."),
    gguf=GGUFReader("gpt2", _gguf_config, _gguf_source, _gguf_values),
)
