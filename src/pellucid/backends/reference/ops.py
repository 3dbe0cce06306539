"""The definition of every op, in NumPy. The functions of this module, taken together, are an `Ops`
(`ops/protocol.py`).

Each op is its paper's formula in float32, with the shape on each line. Only `kv_write` changes an
argument, and no function keeps state. No intermediate value overflows, so large inputs give large
results and never a NaN or a warning.

Matrix products go to BLAS, whose sums differ in the last bits with the number of rows. So the
results of a token alone and in a batch agree within the error budget, not bit for bit.
"""

import math
from collections.abc import Callable
from functools import partial, reduce
from itertools import pairwise

import numpy as np

from ...batch import AttentionMetadata, IntArray
from ...ops.protocol import KVLayer, RopeTable
from .attention import Array, attend, kv_write, read_kv
from .flash_attention import TILE_K, TILE_Q, flash_attention, merge_states

__all__ = [
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
]

# Up to this many scores a request's attention is computed at once. A larger matrix does not fit in
# the CPU's cache (for a prompt of 8k tokens it would take gigabytes). Tiles need one or two
# megabytes, and are up to twice as fast.
MAX_SCORE_BYTES = 4 << 20
# A longer context is computed in parts of this many keys, which are merged in order. So only one
# part is copied out of its blocks at a time.
PART_KEYS = 4096
SQRT_2_OVER_PI = math.sqrt(2.0 / math.pi)
GELU_SATURATES = 16.0  # beyond ±16 the tanh of gelu is exactly ±1 in float32


def embedding(table: Array, input_ids: IntArray, scale: float = 1.0) -> Array:
    rows = table[input_ids]  # [V, C], [T] -> [T, C]
    return rows if scale == 1.0 else rows * scale


def linear(x: Array, weight: Array, bias: Array | None = None) -> Array:
    y: Array = x @ weight.T  # [T, in] @ [in, out] -> [T, out]
    if bias is not None:
        y += bias
    return y


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    mean_square: Array = np.mean(x * x, axis=-1, keepdims=True)  # [..., 1]
    return x / np.sqrt(mean_square + eps) * weight


def layer_norm(x: Array, weight: Array, bias: Array, eps: float) -> Array:
    centered: Array = x - np.mean(x, axis=-1, keepdims=True)
    variance: Array = np.mean(centered * centered, axis=-1, keepdims=True)  # [..., 1]
    return centered / np.sqrt(variance + eps) * weight + bias


def add(x: Array, y: Array) -> Array:
    return x + y


def _sigmoid(x: Array) -> Array:
    with np.errstate(over="ignore"):  # exp(-x) may overflow to infinity, and 1 / inf is 0
        sigmoid: Array = 1.0 / (1.0 + np.exp(-x))
    return sigmoid


def silu_mul(gate: Array, up: Array) -> Array:
    return gate * _sigmoid(gate) * up  # [T, F]


def gelu(x: Array) -> Array:
    near = np.clip(x, -GELU_SATURATES, GELU_SATURATES)  # so that the cube does not overflow
    inner = SQRT_2_OVER_PI * (near + 0.044715 * near * near * near)
    return x * _sigmoid(2.0 * inner)  # 0.5 · (1 + tanh z) = sigmoid(2 z)


def gelu_mul(gate: Array, up: Array) -> Array:
    return gelu(gate) * up  # [T, F]


def softcap(x: Array, cap: float) -> Array:
    capped: Array = cap * np.tanh(x / cap)
    return capped


def split_heads(x: Array, num_heads: int) -> Array:
    return x.reshape(len(x), num_heads, -1)  # [T, H·D] -> [T, H, D]


def rope(x: Array, positions: IntArray, table: RopeTable) -> Array:
    # [T, P] in float64, so that the angle of position 100,000 is exact enough
    angles = np.multiply.outer(positions, np.array(table.inv_freq))
    cos = (np.cos(angles) * table.scale).astype(np.float32)[:, None]  # [T, 1, P]
    sin = (np.sin(angles) * table.scale).astype(np.float32)[:, None]
    pairs = len(table.inv_freq)
    # [T, H, P]  dimension i is rotated with dimension i + P
    first, second = x[..., :pairs], x[..., pairs : 2 * pairs]
    turned = x.copy()
    turned[..., :pairs] = first * cos - second * sin
    turned[..., pairs : 2 * pairs] = second * cos + first * sin
    return turned


def attention(
    q: Array,
    kv: KVLayer,
    metadata: AttentionMetadata,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Array:
    tokens, heads, _ = q.shape
    out = np.empty((tokens, heads, kv.store.v.shape[-1]), q.dtype)  # [T, H, Dv]
    borders, seq_lens = metadata.cu_seqlens_q.tolist(), metadata.seq_lens.tolist()
    for begin, end, seq_len, blocks in zip(
        borders[:-1], borders[1:], seq_lens, metadata.block_tables[kv.group], strict=True
    ):
        own, first_position = q[begin:end], seq_len - (end - begin)
        # the oldest key that the first query sees
        oldest = 0 if window is None else max(0, first_position - window + 1)
        keys, read = seq_len - oldest, partial(read_kv, kv.store, blocks, metadata.block_size)
        if keys <= PART_KEYS and heads * len(own) * keys * own.itemsize <= MAX_SCORE_BYTES:
            out[begin:end] = attend(
                own, *read(oldest, seq_len), scale=scale, window=window, softcap=softcap
            )
        else:
            out[begin:end] = _attend_in_parts(
                own, read, oldest, seq_len, scale=scale, window=window, softcap=softcap
            )
    return out.reshape(tokens, heads * out.shape[-1])


def _attend_in_parts(
    q: Array,
    read: Callable[[int, int], tuple[Array, Array]],
    oldest: int,
    seq_len: int,
    *,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> Array:
    """`attend` over keys oldest … seq_len - 1, in parts that end at multiples of PART_KEYS."""
    tile_k = max(TILE_K, TILE_Q * TILE_K // len(q))  # for few queries a tile has more keys
    borders = [oldest, *range((oldest // PART_KEYS + 1) * PART_KEYS, seq_len, PART_KEYS), seq_len]
    states = (
        flash_attention(
            q,
            *read(a, b),
            scale=scale,
            q_start=seq_len - len(q) - a,
            window=window,
            softcap=softcap,
            tile_k=tile_k,
        )
        for a, b in pairwise(borders)
    )
    out, _ = reduce(lambda whole, part: merge_states(*whole, *part), states)
    return out


def take_rows(x: Array, indices: IntArray) -> Array:
    return x[indices]  # [T, C] -> [L, C]


def all_reduce(x: Array) -> Array:
    return x  # one rank
