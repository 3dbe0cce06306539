"""Phi-3, Phi-3.5 and Phi-4 (text): Llama's graph in files that fuse q, k and v into one matrix, and
gate and up into another. Phi-4-mini rotates a part of each head. Models with long contexts use
longrope (see `hf_rope.py`).
"""

from ...config import ModelConfig
from ...models.params import Param, split_name
from ..fields import Fields
from ..folds import SliceOutputs
from ..hf_rope import build_rope
from ..plan import ParamSource
from .family import Family, GGUFHeader, GGUFReader, HFReader
from .fused import gate_up_rows, qkv_rows
from .gguf import common_keys, gguf_source, rope_keys
from .gguf_values import common_values, window_values
from .hf import activation, common_fields, hf_source, optional_window

__all__ = ["PHI3"]

ORIGINAL_CONTEXT = 4096  # longrope's training context, if config.json does not have it
HF_FUSED = {
    "qkv": "model.layers.{}.self_attn.qkv_proj",
    "gate_up": "model.layers.{}.mlp.gate_up_proj",
}
GGUF_FUSED = {"qkv": "blk.{}.attn_qkv", "gate_up": "blk.{}.ffn_up"}


def _config(fields: Fields) -> ModelConfig:
    common = common_fields(fields, norm_eps=1e-5, original_context=ORIGINAL_CONTEXT)
    return ModelConfig(
        architecture="phi3",
        **common,
        activation=activation(fields, "hidden_act", "silu"),
        tie_word_embeddings=fields.flag("tie_word_embeddings", False),
        windows=(optional_window(fields, None),) * common["num_layers"],
        rope=build_rope(
            fields,
            common["head_dim"],
            kinds=("default", "longrope"),
            partial=True,
            original=ORIGINAL_CONTEXT,
        ),
    )


def _gguf_config(header: GGUFHeader) -> ModelConfig:
    """A window applies to all layers; 0 means none."""
    common = common_keys(header)
    window = header.fields.integer("attention.sliding_window", 0) or None
    return ModelConfig(
        architecture="phi3",
        **common,
        windows=(window,) * common["num_layers"],
        rope=rope_keys(header, common["head_dim"]),
    )


def _gguf_values(config: ModelConfig) -> dict[str, object]:
    return {
        **common_values(config),
        **window_values(config.windows),
        # llama.cpp takes the factors of long contexts for longer sequences
        "rope.scaling.original_context_length": config.max_position_embeddings,
    }


def _fused(config: ModelConfig, param: Param, names: dict[str, str]) -> ParamSource | None:
    """The source of `param`, if it is part of a fused matrix. `names` are those of the matrices."""
    layer, _, kind = split_name(param.name)
    for name, rows in (("qkv", qkv_rows(config, param)), ("gate_up", gate_up_rows(config, param))):
        if rows is not None:
            start, stop, total = rows
            tensors = {f"{names[name].format(layer)}.{kind}": (total, *param.shape[1:])}
            return ParamSource(tensors, SliceOutputs(start, stop))
    return None


def _source(config: ModelConfig, param: Param) -> ParamSource:
    return _fused(config, param, HF_FUSED) or hf_source(config, param)


def _gguf_source(config: ModelConfig, param: Param) -> ParamSource:
    return _fused(config, param, GGUF_FUSED) or gguf_source(config, param)


PHI3 = Family(
    name="phi3",
    hf=HFReader("phi3", _config, _source),
    gguf=GGUFReader("phi3", _gguf_config, _gguf_source, _gguf_values),
)
