"""What every op means, told once more, from its formula and in the plainest way: loops over tokens,
heads and keys.

It shares no code with any backend. Evaluated in float64 it is taken as exact; in float32 it is the
naive evaluation from which the error budgets come (`pellucid/ops/budget.py`). Rotary angles are
computed in float64 in both: they belong to the position, not to the activations.
"""

from collections.abc import Mapping
from typing import Any, TypeAlias

import numpy as np

from pellucid.formats import dequantize
from pellucid.ops.case_inputs import Inputs
from pellucid.ops.cases import (
    AttentionCase,
    Case,
    ElementwiseCase,
    EmbeddingCase,
    LinearCase,
    NormCase,
    RopeCase,
    TakeRowsCase,
)

__all__ = ["Array", "attention", "evaluate", "request_rows"]

Array: TypeAlias = Any  # of the dtype that is asked for


def evaluate(case: Case, inputs: Inputs, dtype: type[np.floating[Any]]) -> Array:
    """The result of a case, [rows, numbers], computed in dtype."""
    weights = {name: dequantize(tensor).astype(dtype) for name, tensor in inputs.weights.items()}
    x = {name: rows.astype(dtype) for name, rows in inputs.activations.items()}
    # exp and cubes of large numbers: infinite here, and right in the end
    with np.errstate(over="ignore"):
        match case:
            case EmbeddingCase():
                return np.array(
                    [weights["table"][i] * dtype(case.scale) for i in inputs.batch.input_ids]
                )
            case LinearCase():
                rows = x["x"] if case.logits_indices is None else _take(x["x"], case.logits_indices)
                return linear(rows, weights["weight"], weights.get("bias"))
            case NormCase():
                heads = x["x"].reshape(-1, case.width)
                normed = [norm(case, row, weights, dtype) for row in heads]
                return np.array(normed).reshape(case.tokens, -1)
            case ElementwiseCase():
                return elementwise(case, x, dtype)
            case TakeRowsCase():
                return _take(x["x"], case.indices)
            case RopeCase():
                return rope(case, x["x"], inputs.batch.positions, dtype)
            case AttentionCase():
                return attention_case(case, inputs, x, dtype)
    raise AssertionError(f"the oracle does not know {case}")


def _take(x: Array, indices: tuple[int, ...]) -> Array:
    return np.array([x[i] for i in indices], x.dtype).reshape(len(indices), x.shape[1])


def linear(x: Array, weight: Array, bias: Array | None) -> Array:
    out = np.zeros((len(x), len(weight)), x.dtype)
    for t, row in enumerate(x):
        for o, w in enumerate(weight):
            out[t, o] = np.dot(row, w) + (0 if bias is None else bias[o])
    return out


def norm(
    case: NormCase, row: Array, weights: Mapping[str, Array], dtype: type[np.floating[Any]]
) -> Array:
    n, eps = dtype(len(row)), dtype(case.eps)
    if case.op == "rms_norm":
        return row / np.sqrt(np.sum(row**2) / n + eps) * weights["weight"]
    mean = np.sum(row) / n
    variance = np.sum((row - mean) ** 2) / n
    return (row - mean) / np.sqrt(variance + eps) * weights["weight"] + weights["bias"]


def elementwise(
    case: ElementwiseCase, x: Mapping[str, Array], dtype: type[np.floating[Any]]
) -> Array:
    a = x["x"]
    one, half = dtype(1), dtype(0.5)
    match case.op:
        case "add":
            return a + x["y"]
        case "silu_mul":
            return a * (one / (one + np.exp(-a))) * x["y"]
        case "gelu" | "gelu_mul":
            inner = dtype(np.sqrt(2 / np.pi)) * (a + dtype(0.044715) * a * a * a)
            gelu = half * a * (one + np.tanh(inner))
            return gelu * x["y"] if case.op == "gelu_mul" else gelu
        case "softcap":
            return dtype(case.cap) * np.tanh(a / dtype(case.cap))
        case "all_reduce":
            return a


def rope(case: RopeCase, x: Array, positions: Array, dtype: type[np.floating[Any]]) -> Array:
    """Pair i of a head is a complex number; a token at position p multiplies it by scale · exp(1j ·
    p · inv_freq[i]).
    """
    pairs = case.rotary_dim // 2
    out = x.reshape(case.tokens, case.num_heads, case.head_dim).copy()
    for t, position in enumerate(positions):
        turn = [case.scale * np.exp(1j * float(position) * f) for f in case.table.inv_freq]
        for head in out[t]:
            for i in range(pairs):
                re, im = dtype(turn[i].real), dtype(turn[i].imag)
                a, b = head[i], head[i + pairs]
                head[i], head[i + pairs] = a * re - b * im, a * im + b * re
    return out.reshape(case.tokens, -1)


def request_rows(case: AttentionCase, inputs: Inputs, name: str, request: int) -> Array:
    """All keys ("k") or values ("v") of a request in order, earlier steps first -> [S, KH, D].
    Blocks play no part in it.
    """
    earlier = [s - q for q, s in zip(case.q_lens, case.seq_lens, strict=True)]
    rows = []
    for lens, arrays in ((earlier, inputs.history), (case.q_lens, inputs.activations)):
        if lens[request]:
            begin = sum(lens[:request])
            rows.append(arrays[name][begin : begin + lens[request]])
    return np.concatenate(rows).reshape(-1, case.num_kv_heads, case.head_dim)


def attention_case(
    case: AttentionCase, inputs: Inputs, x: Mapping[str, Array], dtype: type[np.floating[Any]]
) -> Array:
    out, begin = [], 0
    for r, q_len in enumerate(case.q_lens):
        q = x["q"][begin : begin + q_len].reshape(q_len, case.num_heads, case.head_dim)
        k, v = (request_rows(case, inputs, name, r).astype(dtype) for name in ("k", "v"))
        result, _ = attention(
            q, k, v, scale=case.head_dim**-0.5, window=case.window, softcap=case.softcap
        )
        out.append(result.reshape(q_len, -1))
        begin += q_len
    return np.concatenate(out)


def attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    scale: float,
    q_start: int | None = None,
    window: int | None = None,
    softcap: float | None = None,
) -> tuple[Array, Array]:
    """One request, token by token and head by head, in the dtype of q: out [T, H, D] and lse [T,
    H]. Query i sits at key q_start + i.
    """
    dtype = q.dtype.type
    tokens, num_heads, _ = q.shape
    group = num_heads // k.shape[1]
    start = len(k) - tokens if q_start is None else q_start
    out, lse = np.zeros_like(q), np.full((tokens, num_heads), -np.inf, q.dtype)
    for t in range(tokens):
        position = start + t
        seen = [
            j for j in range(len(k)) if j <= position and (window is None or j > position - window)
        ]
        if not seen:
            continue
        for h in range(num_heads):
            scores = np.array([np.dot(q[t, h], k[j, h // group]) * dtype(scale) for j in seen])
            if softcap is not None:
                scores = dtype(softcap) * np.tanh(scores / dtype(softcap))
            weights = np.exp(scores - max(scores))
            for w, j in zip(weights / np.sum(weights), seen, strict=True):
                out[t, h] += w * v[j, h // group]
            lse[t, h] = max(scores) + np.log(np.sum(weights))
    return out, lse
