"""The reference against PyTorch's own operators, for those that both have: its float64 is the exact
result, its float32 the naive one.

Skipped where torch is not installed.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from pellucid.backends.reference import ops
from pellucid.backends.reference.attention import attend
from pellucid.backends.reference.flash_attention import flash_attention
from pellucid.ops.budget import Verdict, check_dense

torch = pytest.importorskip(
    "torch", reason="torch is not installed; it is the second oracle of the ops"
)
F = torch.nn.functional


def normal(*shape: int, magnitude: float = 1.0) -> Any:
    return (np.random.default_rng(len(shape) + sum(shape)).normal(size=shape) * magnitude).astype(
        np.float32
    )


def compare(actual: Any, function: Callable[..., Any], *arrays: Any) -> Verdict:
    """Hold `actual` to the error of torch's float32."""
    exact = function(*(torch.from_numpy(a).double() for a in arrays))
    naive = function(*(torch.from_numpy(a) for a in arrays))
    return check_dense(actual, exact.numpy(), naive.numpy())


@pytest.mark.parametrize("magnitude", [1e-3, 1.0, 30.0, 1e5])
def test_rms_norm(magnitude: float) -> None:
    x, weight = normal(7, 96, magnitude=magnitude), normal(96)
    assert compare(
        ops.rms_norm(x, weight, 1e-5), lambda x, w: F.rms_norm(x, (96,), w, 1e-5), x, weight
    ).ok


@pytest.mark.parametrize("magnitude", [1e-3, 1.0, 30.0, 1e5])
def test_layer_norm(magnitude: float) -> None:
    x, weight, bias = normal(7, 96, magnitude=magnitude), normal(96), normal(96, magnitude=0.1)
    assert compare(
        ops.layer_norm(x, weight, bias, 1e-5),
        lambda x, w, b: F.layer_norm(x, (96,), w, b, 1e-5),
        x,
        weight,
        bias,
    ).ok


@pytest.mark.parametrize("magnitude", [1e-3, 1.0, 30.0, 1e5])
def test_gated_activations(magnitude: float) -> None:
    gate, up = normal(5, 70, magnitude=magnitude), normal(5, 70)
    assert compare(ops.silu_mul(gate, up), lambda g, u: F.silu(g) * u, gate, up).ok
    assert compare(
        ops.gelu_mul(gate, up), lambda g, u: F.gelu(g, approximate="tanh") * u, gate, up
    ).ok
    assert compare(ops.gelu(gate), lambda g: F.gelu(g, approximate="tanh"), gate).ok


def test_linear_and_embedding() -> None:
    x, weight, bias = normal(5, 70), normal(33, 70), normal(33)
    assert compare(ops.linear(x, weight, bias), F.linear, x, weight, bias).ok
    ids = np.array([3, 32, 0, 3], np.int32)
    assert np.array_equal(
        ops.embedding(weight, ids),
        F.embedding(torch.from_numpy(ids), torch.from_numpy(weight)).numpy(),
    )


@pytest.mark.parametrize(
    ("heads", "kv_heads", "tokens", "keys"),
    [(4, 4, 20, 20), (9, 3, 1, 77), (8, 1, 13, 40), (6, 2, 64, 64)],
)
@pytest.mark.parametrize("window", [None, 9])
def test_attention(heads: int, kv_heads: int, tokens: int, keys: int, window: int | None) -> None:
    q, k, v = normal(tokens, heads, 32), normal(keys, kv_heads, 32), normal(keys, kv_heads, 32)
    distance = np.arange(keys - tokens, keys)[:, None] - np.arange(keys)
    visible = torch.from_numpy((distance >= 0) & (distance < (window or keys)))

    def torch_attention(q: Any, k: Any, v: Any) -> Any:
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))  # [1, H, T, D]
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=visible, scale=0.17, enable_gqa=True
        )[0].transpose(0, 1)

    assert compare(attend(q, k, v, scale=0.17, window=window), torch_attention, q, k, v).ok
    out, _ = flash_attention(q, k, v, scale=0.17, window=window, tile_q=16, tile_k=8)
    assert compare(out, torch_attention, q, k, v).ok
