"""Gemma 2 (arXiv:2408.00118) and Gemma 3 (arXiv:2503.19786).

Differences from Llama: norms before *and* after attention and MLP ("sandwich"), embeddings scaled
by sqrt(hidden_size), GeGLU, and two kinds of layers. Most layers see a sliding window; every second
(Gemma 2) or sixth (Gemma 3) sees the whole context. Gemma 2 softcaps scores and logits. Gemma 3
norms the heads of q and k instead, and its windowed layers have RoPE frequencies of their own.
Hugging Face stores norm weights as w for a factor of 1 + w; the 1 is added at load.

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
)
from .llama import embed, head, norm_rows
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
        yield Param(f"{name}.post_attn_norm.weight", (c,))
        yield Param(f"{name}.pre_mlp_norm.weight", (c,), feeds=Feeds(f"{name}.mlp_input"))
        yield from gated_mlp_parameters(config, i)
        yield Param(f"{name}.post_mlp_norm.weight", (c,))
    yield Param("norm.weight", (c,))


def layers(
    ops: Ops,
    config: ModelConfig,
    weights: Weights,
    batch: ForwardBatch,
    span: range,
    kv_layers: Sequence[KVLayer],
    x: Tensor,
) -> Tensor:
    """Hidden states [T, C] after the layers of `span`. The keys and values of all T tokens are
    written to `kv_layers`, one for each layer of the span.
    """
    ropes = build_rope_tables(config)
    for i, kv in zip(span, kv_layers, strict=True):
        name, eps = f"layers.{i}", config.norm_eps
        h = ops.rms_norm(x, weights[f"{name}.input_norm.weight"], eps)  # [T, C]
        h = attention(ops, config, weights, i, h, batch, kv, ropes[i])  # [T, C]
        x = ops.add(x, ops.rms_norm(h, weights[f"{name}.post_attn_norm.weight"], eps))  # [T, C]
        h = ops.rms_norm(x, weights[f"{name}.pre_mlp_norm.weight"], eps)  # [T, C]
        h = gated_mlp(ops, config, weights, i, h)  # [T, C]
        x = ops.add(x, ops.rms_norm(h, weights[f"{name}.post_mlp_norm.weight"], eps))  # [T, C]
    return x
