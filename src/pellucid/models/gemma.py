"""Gemma 2 (arXiv:2408.00118) and Gemma 3 (arXiv:2503.19786).

Beside Llama: a norm before *and* after attention and MLP ("sandwich"), embeddings scaled by
sqrt(hidden_size), GeGLU, and layers that take turns: most see a sliding window, every second (Gemma
2) or sixth (Gemma 3) sees all. Gemma 2 softcaps scores and logits. Gemma 3 norms the heads of q and
k instead, and its windowed layers turn with RoPE frequencies of their own. Norm weights are stored
by Hugging Face as w for a factor of 1 + w; the 1 is added when they are loaded.

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
        yield Param(f"layers.{i}.post_attn_norm.weight", (config.hidden_size,))
        yield Param(f"layers.{i}.pre_mlp_norm.weight", (config.hidden_size,))
        yield from gated_mlp_parameters(config, i)
        yield Param(f"layers.{i}.post_mlp_norm.weight", (config.hidden_size,))
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
    # [T, C]
    x = ops.embedding(weights["embed_tokens.weight"], batch.input_ids, config.embedding_scale)
    for i in range(config.num_layers):
        h = ops.rms_norm(x, weights[f"layers.{i}.input_norm.weight"], config.norm_eps)  # [T, C]
        h = attention(ops, config, weights, i, h, batch, kv_layers[i], ropes[i])  # [T, C]
        # [T, C]
        x = ops.add(
            x, ops.rms_norm(h, weights[f"layers.{i}.post_attn_norm.weight"], config.norm_eps)
        )
        h = ops.rms_norm(x, weights[f"layers.{i}.pre_mlp_norm.weight"], config.norm_eps)  # [T, C]
        h = gated_mlp(ops, config, weights, i, h)  # [T, C]
        # [T, C]
        x = ops.add(
            x, ops.rms_norm(h, weights[f"layers.{i}.post_mlp_norm.weight"], config.norm_eps)
        )
    x = ops.take_rows(x, batch.logits_indices)  # [L, C]
    x = ops.rms_norm(x, weights["norm.weight"], config.norm_eps)  # [L, C]
    return project_to_logits(ops, config, weights, x)  # [L, V]
