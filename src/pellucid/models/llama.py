"""Llama (Touvron et al., arXiv:2302.13971) and models built like it: Llama 2 and 3, Mistral,
TinyLlama, SmolLM2, Qwen 2, 2.5 and 3, Phi-3 and 4.

A pre-norm decoder: RMSNorm, rotary attention with grouped queries, SwiGLU, and a residual stream.
These models differ only in data: biases on q, k and v (Qwen 2), norms on the heads of q and k (Qwen
3), a sliding window (Mistral), scaling of RoPE (Llama 3), and an lm_head that is the embedding
(small models).

Shapes: T tokens, L rows with logits, C hidden, V vocabulary.
"""

from collections.abc import Iterator, Sequence

from ..batch import ForwardBatch, IntArray
from ..config import ModelConfig
from ..ops.protocol import KVLayer, Ops, Tensor
from .blocks import (
    Weights,
    attention,
    attention_parameters,
    build_rope_tables,
    gated_mlp,
    gated_mlp_parameters,
    logits_parameters,
    project_to_logits,
)
from .params import Feeds, Param

__all__ = ["embed", "head", "layers", "norm_rows", "parameters"]


def parameters(config: ModelConfig) -> Iterator[Param]:
    """Every tensor that the three parts read."""
    c = config.hidden_size
    yield from logits_parameters(config)
    for i in range(config.num_layers):
        name = f"layers.{i}"
        yield Param(f"{name}.input_norm.weight", (c,), feeds=Feeds(f"{name}.attn_input"))
        yield from attention_parameters(config, i)
        yield Param(f"{name}.pre_mlp_norm.weight", (c,), feeds=Feeds(f"{name}.mlp_input"))
        yield from gated_mlp_parameters(config, i)
    yield Param("norm.weight", (c,))


def embed(ops: Ops, config: ModelConfig, weights: Weights, batch: ForwardBatch) -> Tensor:
    """Hidden states [T, C] of the tokens in `batch.input_ids`, before the first layer."""
    return ops.embedding(weights["embed_tokens.weight"], batch.input_ids, config.embedding_scale)


def layers(
    ops: Ops,
    config: ModelConfig,
    weights: Weights,
    batch: ForwardBatch,
    span: range,
    kv_layers: Sequence[KVLayer],
    x: Tensor,
) -> Tensor:
    """Hidden states [T, C] after the layers of `span`; `kv_layers` are their caches."""
    ropes = build_rope_tables(config)
    for i, kv in zip(span, kv_layers, strict=True):
        h = ops.rms_norm(x, weights[f"layers.{i}.input_norm.weight"], config.norm_eps)  # [T, C]
        x = ops.add(x, attention(ops, config, weights, i, h, batch, kv, ropes[i]))  # [T, C]
        h = ops.rms_norm(x, weights[f"layers.{i}.pre_mlp_norm.weight"], config.norm_eps)  # [T, C]
        x = ops.add(x, gated_mlp(ops, config, weights, i, h))  # [T, C]
    return x


def head(ops: Ops, config: ModelConfig, weights: Weights, batch: ForwardBatch, x: Tensor) -> Tensor:
    """Hidden states [T, C] -> logits [L, V] of the rows in `batch.logits_indices`."""
    x = norm_rows(ops, config, weights, x, batch.logits_indices)  # [L, C]
    return project_to_logits(ops, config, weights, x)  # [L, V]


def norm_rows(ops: Ops, config: ModelConfig, weights: Weights, x: Tensor, rows: IntArray) -> Tensor:
    """These rows of x [T, C], after the final norm: what logits and embeddings are made of."""
    return ops.rms_norm(ops.take_rows(x, rows), weights["norm.weight"], config.norm_eps)
