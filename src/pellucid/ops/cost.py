"""The costs of each op, FLOPs and bytes, as plain functions of its shapes and formats.

Arithmetic intensity, FLOPs / bytes, decides which resource binds an op (the roofline: Williams et
al., CACM 2009). A linear layer over T tokens does 2·T FLOPs for each weight it reads: with one
token it is bound by memory, with hundreds by arithmetic.

The rules of counting:
- A multiply-add is 2 FLOPs. Any other arithmetic operation, comparison or function (exp, tanh,
  sqrt) on one number is 1.
- Bytes are the fewest that must move: each input is read once, each output written once. Weights
  count in their packed format; activations and the KV cache are float32 unless stated otherwise. Of
  a gathered table only the rows that are read count. Index arrays do not count.
- Attention counts only visible pairs of a query and a key. A key that no query sees is not read.

Each op has a function of its name. Sizes are in elements and tokens. This module computes with
shapes only, never with data.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from ..formats import row_bytes

__all__ = [
    "OpCost",
    "add",
    "all_reduce",
    "attention",
    "embedding",
    "gelu",
    "gelu_mul",
    "kv_write",
    "layer_norm",
    "linear",
    "rms_norm",
    "rope",
    "silu_mul",
    "softcap",
    "split_heads",
    "take_rows",
    "visible_pairs",
]

ACTIVATION_BYTES = 4  # float32

# FLOPs per number
SIGMOID = 3  # exp(-x), 1 + ·, 1 / ·
SILU_MUL = SIGMOID + 2
GELU = 5 + 1 + SIGMOID + 1  # x + c·x·x·x, times a constant, sigmoid, times x
SOFTCAP = 3  # /, tanh, ·
SOFTMAX = 4  # max, subtract, exp, sum


@dataclass(frozen=True, slots=True)
class OpCost:
    """FLOPs, and bytes in each direction. Costs add up."""

    flops: int
    bytes_read: int
    bytes_written: int
    # the part of `flops` that a backend computes as products of bytes, which are faster
    int8_flops: int = 0
    # beside `flops`: multiplications by the scales of quantized weights; each counts 2, because it
    # takes a multiplier as long as a multiply-add
    scale_flops: int = 0

    @property
    def bytes(self) -> int:
        return self.bytes_read + self.bytes_written

    @property
    def arithmetic_intensity(self) -> float:
        """FLOPs per byte; 0 if nothing moves."""
        return self.flops / self.bytes if self.bytes else 0.0

    def __add__(self, other: "OpCost") -> "OpCost":
        return OpCost(
            self.flops + other.flops,
            self.bytes_read + other.bytes_read,
            self.bytes_written + other.bytes_written,
            self.int8_flops + other.int8_flops,
            self.scale_flops + other.scale_flops,
        )


def _elementwise(count: int, flops_each: int, inputs: int = 1, parameters: int = 0) -> OpCost:
    """`count` outputs from `inputs` arrays of the same size and `parameters` numbers that are read
    once.
    """
    return OpCost(
        count * flops_each,
        (inputs * count + parameters) * ACTIVATION_BYTES,
        count * ACTIVATION_BYTES,
    )


def embedding(
    tokens: int, hidden_size: int, *, format: str = "F32", scaled: bool = False
) -> OpCost:
    """One row of the table per token."""
    return OpCost(
        tokens * hidden_size * scaled,
        tokens * row_bytes(format, hidden_size),
        tokens * hidden_size * ACTIVATION_BYTES,
    )


def linear(
    tokens: int, in_features: int, out_features: int, *, format: str = "F32", bias: bool = False
) -> OpCost:
    """The packed weight is read once for all tokens of the batch: this is why batching pays."""
    outputs = tokens * out_features
    read = (
        out_features * row_bytes(format, in_features)
        + (tokens * in_features + bias * out_features) * ACTIVATION_BYTES
    )
    return OpCost(2 * outputs * in_features + bias * outputs, read, outputs * ACTIVATION_BYTES)


def rms_norm(rows: int, width: int) -> OpCost:
    """`rows` is tokens · heads if each head is normed. Per number: square, sum, divide, times
    weight; per row: mean, + eps, sqrt.
    """
    return _elementwise(rows * width, 4, parameters=width) + OpCost(3 * rows, 0, 0)


def layer_norm(rows: int, width: int) -> OpCost:
    """Per number: sum, subtract, square, sum, divide, times weight, + bias; per row: two means, +
    eps, sqrt.
    """
    return _elementwise(rows * width, 7, parameters=2 * width) + OpCost(4 * rows, 0, 0)


def add(tokens: int, width: int) -> OpCost:
    return _elementwise(tokens * width, 1, inputs=2)


def silu_mul(tokens: int, width: int) -> OpCost:
    return _elementwise(tokens * width, SILU_MUL, inputs=2)


def gelu(tokens: int, width: int) -> OpCost:
    return _elementwise(tokens * width, GELU)


def gelu_mul(tokens: int, width: int) -> OpCost:
    return _elementwise(tokens * width, GELU + 1, inputs=2)


def softcap(tokens: int, width: int) -> OpCost:
    return _elementwise(tokens * width, SOFTCAP)


def split_heads() -> OpCost:
    """No cost: a view of the same bytes."""
    return OpCost(0, 0, 0)


def rope(tokens: int, num_heads: int, head_dim: int, rotary_dim: int) -> OpCost:
    """Per token and pair: the angle, cos, sin and two scalings, shared by the heads; per head and
    pair: a turn of 4 products and 2 sums.
    """
    pairs = tokens * rotary_dim // 2
    return _elementwise(tokens * num_heads * head_dim, 0, parameters=rotary_dim // 2) + OpCost(
        pairs * (5 + 6 * num_heads), 0, 0
    )


def kv_write(
    tokens: int, num_kv_heads: int, head_dim: int, *, kv_token_bytes: int | None = None
) -> OpCost:
    """`kv_token_bytes`: bytes of one token in the cache; by default those of float32."""
    row = 2 * num_kv_heads * head_dim * ACTIVATION_BYTES  # keys and values
    return OpCost(0, tokens * row, tokens * (row if kv_token_bytes is None else kv_token_bytes))


def visible_pairs(q_len: int, seq_len: int, window: int | None = None) -> int:
    """The number of (query, key) pairs that the mask lets through. The last q_len of seq_len tokens
    see the tokens before them, at most `window` keys each.
    """
    # keys that the first query sees without a window; the last sees seq_len
    first = seq_len - q_len + 1
    if window is None or window >= seq_len:
        return q_len * (first + seq_len) // 2
    growing = max(0, window - first)  # queries that see fewer keys than the window holds
    return growing * (first + first + growing - 1) // 2 + (q_len - growing) * window


def attention(
    q_lens: Sequence[int],
    seq_lens: Sequence[int],
    *,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    window: int | None = None,
    softcap: bool = False,
    kv_token_bytes: int | None = None,
) -> OpCost:
    """Per head and visible pair: q·k, the scale, the softmax, and p·v; per number of the result: a
    division by the softmax's sum.

    Each request reads its own keys and values once, however many queries and heads share them.
    """
    tokens = sum(q_lens)
    pairs = sum(visible_pairs(q, s, window) for q, s in zip(q_lens, seq_lens, strict=True))
    # keys that some query sees
    keys = sum(
        s if window is None else min(s, q + window - 1)
        for q, s in zip(q_lens, seq_lens, strict=True)
    )
    per_pair = 2 * head_dim + 1 + softcap * SOFTCAP + SOFTMAX + 2 * head_dim
    activations = tokens * num_heads * head_dim
    row = (
        2 * num_kv_heads * head_dim * ACTIVATION_BYTES if kv_token_bytes is None else kv_token_bytes
    )
    return OpCost(
        num_heads * pairs * per_pair + activations,
        activations * ACTIVATION_BYTES + keys * row,
        activations * ACTIVATION_BYTES,
    )


def take_rows(rows: int, width: int) -> OpCost:
    return _elementwise(rows * width, 0)


def all_reduce(tokens: int, width: int, *, ranks: int = 1) -> OpCost:
    """In local memory: each rank reads the parts of the others and writes the sum. With one rank
    there is no cost.
    """
    return _elementwise(tokens * width, ranks - 1, inputs=ranks) if ranks > 1 else OpCost(0, 0, 0)
