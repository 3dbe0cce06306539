"""GPT-2 (Radford et al., "Language Models are Unsupervised Multitask Learners", 2019).

It predates RoPE and RMSNorm. Positions are learned vectors that are added to the embedding. Norms
subtract the mean and have biases. The MLP is two matrices with a GELU between them. Every linear
layer has a bias, and each head has its own keys and values.

Shapes: T tokens, L rows with logits, C hidden, F intermediate, V vocabulary.
"""

from collections.abc import Iterator, Sequence

from ..batch import ForwardBatch, IntArray
from ..config import ModelConfig
from ..ops.protocol import KVLayer, Ops, Tensor
from .blocks import (
    Weights,
    attention,
    attention_parameters,
    linear,
    logits_parameters,
    project_to_logits,
)
from .params import Feeds, Param, linear_parameters

__all__ = ["embed", "head", "layers", "norm_rows", "parameters"]


def parameters(config: ModelConfig) -> Iterator[Param]:
    """Every tensor that the three parts read."""
    c, f = config.hidden_size, config.intermediate_size
    yield from logits_parameters(config)
    yield Param("embed_positions.weight", (config.max_position_embeddings, c))
    for i in range(config.num_layers):
        name = f"layers.{i}"
        yield from _norm_parameters(f"{name}.input_norm", c, Feeds(f"{name}.attn_input"))
        yield from attention_parameters(config, i)
        yield from _norm_parameters(f"{name}.pre_mlp_norm", c, Feeds(f"{name}.mlp_input"))
        yield from linear_parameters(
            f"{name}.up_proj", f, c, "column", f"{name}.mlp_input", config.mlp_bias
        )
        yield from linear_parameters(
            f"{name}.down_proj", c, f, "row", f"{name}.mlp_hidden", config.mlp_bias
        )
    yield from _norm_parameters("norm", c)


def embed(ops: Ops, config: ModelConfig, weights: Weights, batch: ForwardBatch) -> Tensor:
    """Hidden states [T, C] of the tokens in `batch.input_ids`, before the first layer."""
    tokens = ops.embedding(weights["embed_tokens.weight"], batch.input_ids, config.embedding_scale)
    places = ops.embedding(weights["embed_positions.weight"], batch.positions)  # [T, C]
    return ops.add(tokens, places)


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
    for i, kv in zip(span, kv_layers, strict=True):
        h = _norm(ops, config, weights, f"layers.{i}.input_norm", x)  # [T, C]
        x = ops.add(x, attention(ops, config, weights, i, h, batch, kv, None))  # [T, C]
        h = _norm(ops, config, weights, f"layers.{i}.pre_mlp_norm", x)  # [T, C]
        x = ops.add(x, _mlp(ops, config, weights, i, h))  # [T, C]
    return x


def head(ops: Ops, config: ModelConfig, weights: Weights, batch: ForwardBatch, x: Tensor) -> Tensor:
    """Hidden states [T, C] -> logits [L, V] of the rows in `batch.logits_indices`."""
    x = norm_rows(ops, config, weights, x, batch.logits_indices)  # [L, C]
    return project_to_logits(ops, config, weights, x)  # [L, V]


def norm_rows(ops: Ops, config: ModelConfig, weights: Weights, x: Tensor, rows: IntArray) -> Tensor:
    """These rows of x [T, C], after the final norm: what logits and embeddings are made of."""
    return _norm(ops, config, weights, "norm", ops.take_rows(x, rows))


def _mlp(ops: Ops, config: ModelConfig, weights: Weights, layer: int, x: Tensor) -> Tensor:
    """down(gelu(up(x))): x [T, C] -> [T, C]."""
    hidden = ops.gelu(linear(ops, weights, f"layers.{layer}.up_proj", x, config.mlp_bias))  # [T, F]
    # [T, C]
    return ops.all_reduce(
        linear(ops, weights, f"layers.{layer}.down_proj", hidden, config.mlp_bias)
    )


def _norm_parameters(name: str, size: int, feeds: Feeds | None = None) -> Iterator[Param]:
    yield Param(f"{name}.weight", (size,), feeds=feeds)
    yield Param(f"{name}.bias", (size,), feeds=feeds)


def _norm(ops: Ops, config: ModelConfig, weights: Weights, name: str, x: Tensor) -> Tensor:
    return ops.layer_norm(x, weights[f"{name}.weight"], weights[f"{name}.bias"], config.norm_eps)
