"""What the reference backend promises beyond its numbers: weights are decoded once and never
change; no formula overflows in its middle.
"""

import numpy as np
import pytest

from pellucid.backends.reference import ops
from pellucid.backends.reference.backend import ReferenceBackend
from pellucid.formats import ALL_FORMATS, dequantize
from pellucid.formats.tensor import HostTensor
from pellucid.kv_spec import KVSpec
from pellucid.ops.case_inputs import build_attention_batch, random_weight
from pellucid.ops.protocol import KVLayer, RopeTable

LARGEST = float(np.finfo(np.float32).max)


@pytest.mark.parametrize("format", ALL_FORMATS)
def test_a_weight_is_decoded_once_into_memory_of_its_own_that_cannot_be_written(
    format: str,
) -> None:
    host = random_weight(np.random.default_rng(0), (6, 512), format)
    backend = ReferenceBackend()
    weight = backend.load_weight(host)
    assert weight.dtype == np.float32 and weight.flags.c_contiguous and weight.shape == (6, 512)
    assert np.array_equal(weight, dequantize(host)) and not np.may_share_memory(weight, host.data)
    assert weight.nbytes == backend.weight_bytes(host.spec)
    with pytest.raises(ValueError, match="read-only"):
        weight[0, 0] = 1.0


@pytest.mark.parametrize("format", ALL_FORMATS)
def test_random_weights_have_the_size_of_real_ones(format: str) -> None:
    values = dequantize(random_weight(np.random.default_rng(0), (64, 512), format))
    assert np.isfinite(values).all()
    assert np.sqrt(np.mean(values**2) * 512) == pytest.approx(1.0, rel=0.1)


def test_a_one_dimensional_parameter_keeps_its_shape() -> None:
    host = HostTensor("F32", (3,), np.array([[1.0, -2.0, 3.5]], "<f4").view(np.uint8))
    assert ReferenceBackend().load_weight(host).tolist() == [1.0, -2.0, 3.5]


def test_a_kv_layer_takes_the_bytes_that_the_plan_says() -> None:
    backend = ReferenceBackend()
    spec = KVSpec(3, 64, 32, "f32", "f32")
    kv = backend.new_kv_store(5, 16, spec)
    assert kv.k.nbytes + kv.v.nbytes == 5 * 16 * backend.kv_token_bytes(spec)


def test_activations_of_the_largest_numbers_reach_their_limits() -> None:
    x, one = np.array([[-LARGEST, -1e4, 1e4, LARGEST]], np.float32), np.ones((1, 4), np.float32)
    limits = [[0.0, 0.0, np.float32(1e4), LARGEST]]
    assert ops.silu_mul(x, one).tolist() == limits
    assert ops.gelu(x).tolist() == ops.gelu_mul(x, one).tolist() == limits
    assert ops.softcap(x, 30.0).tolist() == [[-30.0, -30.0, 30.0, 30.0]]


def test_a_saturated_softmax_gives_the_value_of_the_largest_score() -> None:
    backend = ReferenceBackend()
    kv = KVLayer(backend.new_kv_store(1, 4, KVSpec(1, 2, 2, "f32", "f32")))
    k = np.array([[[0, 0]], [[1e5, 0]], [[-1e5, 0]]], np.float32)
    v = np.array([[[1, 2]], [[3, 4]], [[5, 6]]], np.float32)
    metadata = build_attention_batch([3], [3], np.zeros((1, 1), np.int32), 4).attention
    ops.kv_write(kv, k, v, metadata.slot_mapping)
    q = np.full((3, 1, 2), 1e5, np.float32)
    assert ops.attention(q, kv, metadata, scale=1.0).tolist() == [[1, 2], [3, 4], [3, 4]]


def test_rope_is_exact_at_far_positions() -> None:
    x = np.array([[[1.0, 0.0]]], np.float32)
    position = 1_000_003
    turned = ops.rope(x, np.array([position], np.int32), RopeTable((0.1,)))
    # float32 angles would be off by 0.004
    expected = [[[np.float32(np.cos(position * 0.1)), np.float32(np.sin(position * 0.1))]]]
    assert turned.tolist() == expected


def test_no_op_changes_what_it_is_given_or_gives_it_back() -> None:
    x = np.random.default_rng(0).normal(size=(4, 6)).astype(np.float32)
    x.flags.writeable = False
    heads, row, ids = ops.split_heads(x, 3), x[0], np.array([0, 3], np.int32)
    results = [
        ops.embedding(x, ids, 2.0),
        ops.linear(x, x, x[:, 0]),
        ops.rms_norm(x, row, 1e-5),
        ops.layer_norm(x, row, row, 1e-5),
        ops.silu_mul(x, x),
        ops.gelu_mul(x, x),
        ops.softcap(x, 3.0),
        ops.rope(heads, np.arange(4, dtype=np.int32), RopeTable((1.0,))),
        ops.take_rows(x, ids),
        ops.all_reduce(ops.add(x, x)),
    ]  # a write to x would have raised
    assert not any(np.may_share_memory(result, x) for result in results)
