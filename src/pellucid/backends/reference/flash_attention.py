"""FlashAttention-2 (Dao, arXiv:2307.08691) in NumPy: attention in tiles, with only one tile of
scores in memory.

A softmax can be summed in parts. Keep for each query the largest score so far `m`, the
sum `l` of exp(score - m) and the sum `acc` of exp(score - m) · v. A new tile of keys may raise m; l
and acc are then multiplied by exp(m_old - m_new) (the online softmax of Milakov & Gimelshein,
arXiv:1805.02867). At the end

    out = acc / l        lse = m + log(l)

`lse` is the log of the softmax's denominator. With it `merge_states` merges results over disjoint
sets of keys. A tile of keys that no query of the tile sees (the future, or behind the window) is
skipped, so a causal prompt costs half.

Memory: H · TILE_Q · TILE_K scores instead of H · T · S. The reference uses it if the whole matrix
would be too large, and merges states if a context is too long to be copied out of its blocks at
once (`ops.attention`). It must agree with `attention.attend` within the error budget of
`ops/budget.py`.
"""

import numpy as np

from .attention import Array, attention_scores, group_heads, ungroup_heads

__all__ = ["TILE_K", "TILE_Q", "flash_attention", "merge_states"]

TILE_Q = 128  # queries per tile
# keys per tile: the scores of one tile and a few heads fit in the L2 cache
TILE_K = 256


def flash_attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    scale: float,
    q_start: int | None = None,
    window: int | None = None,
    softcap: float | None = None,
    tile_q: int = TILE_Q,
    tile_k: int = TILE_K,
) -> tuple[Array, Array]:
    """Causal attention of q [T, H, D] over k [S, KH, D] and v [S, KH, Dv] -> out [T, H, Dv],
    lse [T, H].

    Query i sits at key index q_start + i, by default at the end. k may be a part of the keys: a
    query that sees none of them gets out 0 and lse -inf, which `merge_states` ignores.
    """
    tokens, keys, kv_heads = len(q), len(k), k.shape[1]
    start = keys - tokens if q_start is None else q_start
    out = np.empty((*q.shape[:2], v.shape[-1]), q.dtype)  # [T, H, Dv]
    lse = np.empty(q.shape[:2], np.float32)  # [T, H]
    for t in range(0, tokens, tile_q):
        # Start a tile of queries: m, l and acc are empty.
        tile = q[t : t + tile_q]
        rows, first = len(tile), start + t  # its key indices: first … first + rows - 1
        grouped = group_heads(tile, kv_heads)  # [KH, G·t, D]
        m = np.full((*grouped.shape[:2], 1), -np.inf, np.float32)  # [KH, G·t, 1]
        l = np.zeros_like(m)
        acc = np.zeros((*grouped.shape[:2], v.shape[-1]), q.dtype)  # [KH, G·t, Dv]
        # Go over the keys that some query of the tile sees.
        begin = 0 if window is None else max(0, first - window + 1)
        end = min(keys, first + rows)
        for s in range(begin, end, tile_k):
            stop = min(s + tile_k, end)
            scores = attention_scores(
                grouped,
                k[s:stop],
                tokens=rows,
                q_start=first - s,
                scale=scale,
                window=window,
                softcap=softcap,
            )
            # Add this tile of keys to the sums, relative to the new largest score.
            largest = np.maximum(m, scores.max(axis=-1, keepdims=True))
            # a query that has seen no key yet: exp(-inf - 0) = 0
            shift = np.where(largest == -np.inf, 0.0, largest)
            scores -= shift
            p = np.exp(scores, out=scores)  # [KH, G·t, s]
            decay = np.exp(m - shift)
            l *= decay
            l += p.sum(axis=-1, keepdims=True)
            acc *= decay
            acc += p @ v[s:stop].transpose(1, 0, 2)  # [KH, G·t, s] @ [KH, s, Dv]
            m = largest
        # The sums are complete: normalize.
        seen = l > 0
        denominator = np.where(seen, l, 1.0)
        out[t : t + rows] = ungroup_heads(acc / denominator, rows)
        lse[t : t + rows] = ungroup_heads(np.where(seen, m + np.log(denominator), -np.inf), rows)[
            ..., 0
        ]
    return out, lse


def merge_states(out_a: Array, lse_a: Array, out_b: Array, lse_b: Array) -> tuple[Array, Array]:
    """Merge attention over two disjoint sets of keys: outs [T, H, D], lses [T, H] -> (out, lse)."""
    largest = np.maximum(lse_a, lse_b)
    shift = np.where(largest == -np.inf, 0.0, largest)
    # [T, H]  each part's weight, before normalization
    a, b = np.exp(lse_a - shift), np.exp(lse_b - shift)
    total = np.where(a + b > 0, a + b, 1.0)
    out: Array = out_a * (a / total)[..., None] + out_b * (b / total)[..., None]
    return out, largest + np.log(total)
