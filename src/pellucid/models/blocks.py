"""The parts of decoders: attention, the gated MLP, embedding and logits. Each is a declaration of
parameters and a function.

A part declares its parameters right above the function that reads them, so that the two stay in
agreement. Differences between families are read from `ModelConfig`; no code here asks for the
family.

Shapes: T tokens, L rows with logits, H query heads, KH key/value heads, D head_dim, C hidden, F
intermediate, V vocabulary.
"""

from collections.abc import Iterator, Mapping, Sequence

from ..batch import ForwardBatch
from ..config import ModelConfig
from ..ops.protocol import KVLayer, Ops, RopeTable, Tensor
from .params import Feeds, Param, linear_parameters
from .rope import build_rope_table

__all__ = [
    "Weights",
    "attention",
    "attention_parameters",
    "build_rope_tables",
    "gated_mlp",
    "gated_mlp_parameters",
    "linear",
    "logits_parameters",
    "project_to_logits",
]

Weights = Mapping[str, Tensor]  # canonical name -> the backend's own tensor


def linear(ops: Ops, weights: Weights, name: str, x: Tensor, bias: bool) -> Tensor:
    return ops.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"] if bias else None)


def attention_parameters(config: ModelConfig, layer: int) -> Iterator[Param]:
    name, c = f"layers.{layer}", config.hidden_size
    q_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    # the weights of attention sum to 1, so its output is linear in values and their bias
    values = Feeds(f"{name}.attn_output", config.head_dim, config.num_heads // config.num_kv_heads)
    for module, size in (("q_proj", q_size), ("k_proj", kv_size), ("v_proj", kv_size)):
        feeds = values if module == "v_proj" else None
        yield from linear_parameters(
            f"{name}.{module}", size, c, "column", f"{name}.attn_input", config.qkv_bias, feeds
        )
    if config.qk_norm:
        yield Param(f"{name}.q_norm.weight", (config.head_dim,))
        yield Param(f"{name}.k_norm.weight", (config.head_dim,))
    yield from linear_parameters(
        f"{name}.o_proj", c, q_size, "row", f"{name}.attn_output", config.o_bias
    )


def attention(
    ops: Ops,
    config: ModelConfig,
    weights: Weights,
    layer: int,
    x: Tensor,
    batch: ForwardBatch,
    kv: KVLayer,
    rope: RopeTable | None,
) -> Tensor:
    """x [T, C] -> [T, C]: each token attends to its own request's tokens, up to itself."""
    name, bias = f"layers.{layer}", config.qkv_bias
    # project each token to queries [T, H, D], keys and values [T, KH, D]
    q = ops.split_heads(linear(ops, weights, f"{name}.q_proj", x, bias), config.num_heads)
    k = ops.split_heads(linear(ops, weights, f"{name}.k_proj", x, bias), config.num_kv_heads)
    v = ops.split_heads(linear(ops, weights, f"{name}.v_proj", x, bias), config.num_kv_heads)
    # norm the heads, then turn them by their positions
    if config.qk_norm:
        q = ops.rms_norm(q, weights[f"{name}.q_norm.weight"], config.norm_eps)  # [T, H, D]
        k = ops.rms_norm(k, weights[f"{name}.k_norm.weight"], config.norm_eps)  # [T, KH, D]
    if rope is not None:
        q = ops.rope(q, batch.positions, rope)  # [T, H, D]
        k = ops.rope(k, batch.positions, rope)  # [T, KH, D]
    # store this step's keys and values, then attend to all of the request's
    ops.kv_write(kv, k, v, batch.attention.slot_mapping)
    seen = ops.attention(
        q,
        kv,
        batch.attention,
        scale=config.attention_scale,
        window=config.windows[layer],
        softcap=config.attn_softcap,
    )  # [T, H·D]
    return ops.all_reduce(linear(ops, weights, f"{name}.o_proj", seen, config.o_bias))  # [T, C]


def gated_mlp_parameters(config: ModelConfig, layer: int) -> Iterator[Param]:
    name, c, f = f"layers.{layer}", config.hidden_size, config.intermediate_size
    # act(gate) · up is linear in up alone
    for module, feeds in (("gate_proj", None), ("up_proj", Feeds(f"{name}.mlp_hidden"))):
        yield from linear_parameters(
            f"{name}.{module}", f, c, "column", f"{name}.mlp_input", config.mlp_bias, feeds
        )
    yield from linear_parameters(
        f"{name}.down_proj", c, f, "row", f"{name}.mlp_hidden", config.mlp_bias
    )


def gated_mlp(ops: Ops, config: ModelConfig, weights: Weights, layer: int, x: Tensor) -> Tensor:
    """down(act(gate(x)) · up(x)) (Shazeer, arXiv:2002.05202). x [T, C] -> [T, C]."""
    name = f"layers.{layer}"
    gate = linear(ops, weights, f"{name}.gate_proj", x, config.mlp_bias)  # [T, F]
    up = linear(ops, weights, f"{name}.up_proj", x, config.mlp_bias)  # [T, F]
    # [T, F]
    hidden = ops.silu_mul(gate, up) if config.activation == "silu" else ops.gelu_mul(gate, up)
    # [T, C]
    return ops.all_reduce(linear(ops, weights, f"{name}.down_proj", hidden, config.mlp_bias))


def logits_parameters(config: ModelConfig) -> Iterator[Param]:
    """The embedding and the lm_head, which may be one matrix."""
    shape, tied = (config.vocab_size, config.hidden_size), config.tie_word_embeddings
    group = "lm_head_input" if tied else None
    yield Param("embed_tokens.weight", shape, "vocab", group=group, quantizable=True)
    if not tied:
        yield Param("lm_head.weight", shape, "vocab", group="lm_head_input", quantizable=True)


def project_to_logits(ops: Ops, config: ModelConfig, weights: Weights, x: Tensor) -> Tensor:
    """Normed rows [L, C] -> logits [L, V]."""
    matrix = "embed_tokens" if config.tie_word_embeddings else "lm_head"
    logits = linear(ops, weights, matrix, x, bias=False)  # [L, V]
    return ops.softcap(logits, config.final_softcap) if config.final_softcap is not None else logits


def build_rope_tables(config: ModelConfig) -> Sequence[RopeTable | None]:
    """The rotary table of each layer; layers with the same frequencies share one object."""
    tables = {r: build_rope_table(r) for r in (config.rope, config.rope_local) if r is not None}
    ropes = [config.layer_rope(layer) for layer in range(config.num_layers)]
    return [tables[rope] if rope is not None else None for rope in ropes]
