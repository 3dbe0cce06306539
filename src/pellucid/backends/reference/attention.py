"""Exact attention, and the paged store that it reads. Every faster attention is tested against it.

    softmax(mask(softcap(q·kᵀ·scale))) · v                  (Vaswani et al., arXiv:1706.03762)

A request's keys lie in blocks anywhere in the cache, in the order of its block table (paged
attention, Kwon et al., arXiv:2309.06180). `read_kv` copies the positions that some query sees into
one array [S, KH, D]; the rest is plain attention.

Heads are grouped (Ainslie et al., arXiv:2305.13245): the G = H / KH query heads that share a key
head are stacked and computed by one matrix product per key head. Query i sits at key index `q_start
+ i`. So the same code computes a whole prompt, a chunk of one, a single token, and attention to a
part of the keys. Scores take H·T·S numbers at once; `flash_attention.py` needs fewer.
"""

from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ...batch import IntArray
from ...ops.protocol import KVLayer
from .kv_dtypes import round_trip

__all__ = [
    "Array",
    "PagedKV",
    "attend",
    "attention_scores",
    "group_heads",
    "kv_write",
    "read_kv",
    "softmax",
    "ungroup_heads",
]

# float32; Any, because NumPy's annotations lose the dtype in sums with Python numbers
Array: TypeAlias = NDArray[Any]


@dataclass(frozen=True, slots=True)
class PagedKV:
    """Keys and values of one layer. Slot block · B + offset holds one token."""

    k: Array  # [N·B, KH, D]
    v: Array  # [N·B, KH, Dv]
    block_size: int  # B
    k_dtype: str = "f32"  # the dtypes to which keys and values are rounded when written
    v_dtype: str = "f32"


def kv_write(kv: KVLayer, k: Array, v: Array, slot_mapping: IntArray) -> None:
    """Store k [T, KH, D] and v [T, KH, Dv] in the slots of slot_mapping [G, T]."""
    store: PagedKV = kv.store
    slots = slot_mapping[kv.group]  # [T]
    store.k[slots] = round_trip(k, store.k_dtype, keys=True)
    store.v[slots] = round_trip(v, store.v_dtype, keys=False)


def read_kv(
    kv: PagedKV, blocks: IntArray, block_size: int, start: int, stop: int
) -> tuple[Array, Array]:
    """Keys and values at positions start … stop - 1 of the request whose block table is `blocks` ->
    [stop - start, KH, D] and [stop - start, KH, Dv].

    No other slot affects the result. Consecutive blocks give a view; others are gathered into a
    copy.
    """
    first = start // block_size
    used = blocks[first : -(-stop // block_size)]
    skip, size = start - first * block_size, stop - start
    if np.all(used[1:] - used[:-1] == 1):
        begin = int(used[0]) * block_size + skip
        return kv.k[begin : begin + size], kv.v[begin : begin + size]
    # [blocks·B, KH, ·]
    k, v = (
        x.reshape(-1, block_size, *x.shape[1:])[used].reshape(-1, *x.shape[1:])
        for x in (kv.k, kv.v)
    )
    return k[skip : skip + size], v[skip : skip + size]


def softmax(x: Array) -> Array:
    """Softmax over the last axis. The largest is subtracted: exp never overflows, -inf gives 0."""
    weights: Array = np.exp(x - x.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    return weights


def group_heads(q: Array, num_kv_heads: int) -> Array:
    """[T, H, D] -> [KH, G·T, D]: the queries of all heads that read one key head, stacked."""
    tokens, heads, dim = q.shape
    return (
        q.reshape(tokens, num_kv_heads, heads // num_kv_heads, dim)
        .transpose(1, 2, 0, 3)
        .reshape(num_kv_heads, -1, dim)
    )


def ungroup_heads(x: Array, tokens: int) -> Array:
    """[KH, G·T, D] -> [T, H, D]: the inverse."""
    kv_heads, rows, dim = x.shape
    return (
        x.reshape(kv_heads, rows // tokens, tokens, dim)
        .transpose(2, 0, 1, 3)
        .reshape(tokens, -1, dim)
    )


def attention_scores(
    grouped: Array,
    k: Array,
    *,
    tokens: int,
    q_start: int,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Array:
    """Queries [KH, G·T, D] · keys [S, KH, D] -> [KH, G·T, S], -inf where a key is not seen."""
    # [KH, G·T, D] @ [KH, D, S] -> [KH, G·T, S]
    scores: Array = (grouped * scale) @ k.transpose(1, 2, 0)
    if softcap is not None:
        scores = softcap * np.tanh(scores / softcap)
    keys = len(k)
    everyone_sees_the_last_key = q_start >= keys - 1
    everyone_sees_the_first_key = window is None or q_start + tokens - 1 < window
    if everyone_sees_the_last_key and everyone_sees_the_first_key:  # as in decode: no mask
        return scores
    # [T, S]  distance of the key behind the query
    distance = (q_start + np.arange(tokens))[:, None] - np.arange(keys)
    hidden = distance < 0 if window is None else (distance < 0) | (distance >= window)  # [T, S]
    # the mask [T, S] is broadcast over [KH, G, T, S]
    np.copyto(scores.reshape(len(scores), -1, tokens, keys), -np.inf, where=hidden)
    return scores


def attend(
    q: Array,
    k: Array,
    v: Array,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Array:
    """Causal: q [T, H, D] of the last T tokens over k [S, KH, D], v [S, KH, Dv] -> [T, H, Dv]."""
    tokens, (keys, kv_heads, _) = len(q), k.shape
    scores = attention_scores(
        group_heads(q, kv_heads),
        k,
        tokens=tokens,
        q_start=keys - tokens,
        scale=scale,
        window=window,
        softcap=softcap,
    )
    # [KH, G·T, S] @ [KH, S, Dv] -> [KH, G·T, Dv] -> [T, H, Dv]
    return ungroup_heads(softmax(scores) @ v.transpose(1, 0, 2), tokens)
