"""Llama (Touvron et al., arXiv:2302.13971) and its kin: Llama 2 and 3, Mistral, TinyLlama, SmolLM2,
Qwen 2, 2.5 and 3.

A pre-norm decoder: RMSNorm, rotary attention with grouped queries, SwiGLU, a residual stream beside
them. All that differs within the kin is data: biases on q, k and v (Qwen 2), norms on the heads of
q and k (Qwen 3), a sliding window (Mistral), how RoPE is stretched (Llama 3), whether lm_head is
the embedding (the small ones).

Shapes: T tokens, L rows with logits, C hidden, V vocabulary.
"""

from collections.abc import Iterator, Sequence

from ..batch import ForwardBatch
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
from .params import Param

__all__ = ["forward", "parameters"]


def parameters(config: ModelConfig) -> Iterator[Param]:
    """Every tensor that `forward` reads, once."""
    yield from logits_parameters(config)
    for i in range(config.num_layers):
        yield Param(f"layers.{i}.input_norm.weight", (config.hidden_size,))
        yield from attention_parameters(config, i)
        yield Param(f"layers.{i}.pre_mlp_norm.weight", (config.hidden_size,))
        yield from gated_mlp_parameters(config, i)
    yield Param("norm.weight", (config.hidden_size,))


def forward(
    ops: Ops,
    config: ModelConfig,
    weights: Weights,
    batch: ForwardBatch,
    kv_layers: Sequence[KVLayer],
) -> Tensor:
    """Logits [L, V] of the rows in `batch.logits_indices`; the keys and values of all T tokens are
    written to `kv_layers`.
    """
    ropes = build_rope_tables(config)
    x = ops.embedding(weights["embed_tokens.weight"], batch.input_ids)  # [T, C]
    for i in range(config.num_layers):
        h = ops.rms_norm(x, weights[f"layers.{i}.input_norm.weight"], config.norm_eps)  # [T, C]
        # [T, C]
        x = ops.add(x, attention(ops, config, weights, i, h, batch, kv_layers[i], ropes[i]))
        h = ops.rms_norm(x, weights[f"layers.{i}.pre_mlp_norm.weight"], config.norm_eps)  # [T, C]
        x = ops.add(x, gated_mlp(ops, config, weights, i, h))  # [T, C]
    x = ops.take_rows(x, batch.logits_indices)  # [L, C]
    x = ops.rms_norm(x, weights["norm.weight"], config.norm_eps)  # [L, C]
    return project_to_logits(ops, config, weights, x)  # [L, V]
