"""A row that holds NaN or infinity stays broken to its end, and no other row of the batch changes a
bit: on every set of kernels that the machine can run.

A quantized model computes with codes of 8 bits, in which NaN has no place; so each op that rounds,
takes a maximum or masks is tried here, with the broken number in each place where vectors differ.
"""

from collections.abc import Callable, Mapping

import numpy as np
import pytest
from numpy.typing import NDArray

from pellucid.backends.native.backend import NativeBackend
from pellucid.batch import ForwardBatch
from pellucid.formats import ALL_FORMATS, encode_dense
from pellucid.kv_spec import KVSpec
from pellucid.ops.case_inputs import build_attention_batch, random_weight
from pellucid.ops.protocol import KVLayer, Ops, RopeTable, Tensor

from .native_isas import USABLE

Array = NDArray[np.float32]
isas = pytest.mark.parametrize("isa", USABLE)
values = pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])

ROWS, BROKEN = 70, 5  # more rows than are decoded one by one; the one that is broken


def batch_of(rows: int, numbers: list[int] | None = None) -> ForwardBatch:
    batch = build_attention_batch([rows], [rows], np.zeros((1, rows), np.int32), 16)
    batch.input_ids[:] = np.arange(rows) if numbers is None else numbers
    return batch


def run(
    native: NativeBackend,
    arrays: Mapping[str, Array],
    op: Callable[[Ops, Mapping[str, Tensor], ForwardBatch], Tensor],
    batch: ForwardBatch,
) -> Array:
    """An op over arrays whose row i is token i's. No weight may be NaN or infinite, so these are
    made of finite tables: 3e38 · 1e9 is infinite, and the sum of two infinities of opposite signs
    is NaN.
    """
    tables = {
        name: [
            native.load_weight(encode_dense(part.astype(np.float32)))
            for part in (
                np.where(np.isfinite(rows), rows, 0),
                3e38 * (np.isnan(rows) | np.isposinf(rows)),
                -3e38 * (np.isnan(rows) | np.isneginf(rows)),
            )
        ]
        for name, rows in arrays.items()
    }

    def forward(ops: Ops, batch: ForwardBatch) -> Tensor:
        x = {}
        for name, (plain, positive, negative) in tables.items():
            x[name] = ops.embedding(plain, batch.input_ids)
            for table in (positive, negative):
                x[name] = ops.add(x[name], ops.embedding(table, batch.input_ids, 1e9))
        return op(ops, x, batch)

    return native.build_forward(forward)(batch).to_host()


def break_at(x: Array, row: int, column: int, value: float) -> Array:
    broken = x.copy()
    broken[row, column] = value
    return broken


@isas
@values
@pytest.mark.parametrize("format", ALL_FORMATS)
def test_a_linear_layer_of_a_broken_row_gives_nothing_that_looks_like_a_number(
    isa: str, value: float, format: str
) -> None:
    native, rng = NativeBackend(isa, 2), np.random.default_rng(0)
    columns = max(96, 2 * ALL_FORMATS[format].block_size)
    weight = native.load_weight(random_weight(rng, (37, columns), format))
    x = rng.normal(size=(ROWS, columns)).astype(np.float32)
    for rows in (ROWS, 8):
        plain = run(native, {"x": x}, lambda ops, x, _: ops.linear(x["x"], weight), batch_of(rows))
        for column in (0, 7, 21, columns - 1):
            found = run(
                native,
                {"x": break_at(x, BROKEN, column, value)},
                lambda ops, x, _: ops.linear(x["x"], weight),
                batch_of(rows),
            )
            assert not np.isfinite(found[BROKEN]).any(), column
            others = np.arange(rows) != BROKEN
            assert np.array_equal(found[others], plain[others])


@isas
@pytest.mark.parametrize("column", [0, 15, 31, 36])
def test_elementwise_ops_pass_what_is_no_number(isa: str, column: int) -> None:
    native, rng = NativeBackend(isa, 2), np.random.default_rng(0)
    width, others = 37, np.arange(ROWS) != BROKEN
    x, y = (rng.normal(size=(ROWS, width)).astype(np.float32) for _ in range(2))
    weight, bias = (
        native.load_weight(encode_dense(rng.normal(size=width).astype(np.float32)))
        for _ in range(2)
    )
    ops_of_rows: dict[str, Callable[[Ops, Mapping[str, Tensor], ForwardBatch], Tensor]] = {
        "add": lambda ops, x, _: ops.add(x["x"], x["y"]),
        "silu_mul": lambda ops, x, _: ops.silu_mul(x["x"], x["y"]),
        "gelu_mul": lambda ops, x, _: ops.gelu_mul(x["x"], x["y"]),
        "gelu": lambda ops, x, _: ops.gelu(x["x"]),
        "softcap": lambda ops, x, _: ops.softcap(x["x"], 3.0),
        "rope": lambda ops, x, batch: ops.rope(x["x"], batch.positions, RopeTable((1.0,) * 18)),
        "rms_norm": lambda ops, x, _: ops.rms_norm(x["x"], weight, 1e-5),
        "layer_norm": lambda ops, x, _: ops.layer_norm(x["x"], weight, bias, 1e-5),
    }
    for name, op in ops_of_rows.items():
        plain = run(native, {"x": x, "y": y}, op, batch_of(ROWS))
        assert np.isfinite(plain).all()
        for value in (np.nan, np.inf):
            if name == "softcap" and value == np.inf:  # which it caps
                continue
            found = run(
                native, {"x": break_at(x, BROKEN, column, value), "y": y}, op, batch_of(ROWS)
            )
            assert not np.isfinite(found[BROKEN, column]), (name, value)
            assert np.array_equal(found[others], plain[others]), name


@isas
@pytest.mark.parametrize("value", [2e19, 3e38])
def test_a_norm_of_numbers_whose_squares_overflow_is_no_row_of_zeros(
    isa: str, value: float
) -> None:
    native, rng = NativeBackend(isa, 2), np.random.default_rng(0)
    x = rng.normal(size=(ROWS, 37)).astype(np.float32)
    weight, bias = (native.load_weight(encode_dense(np.ones(37, np.float32))) for _ in range(2))
    broken, others = break_at(x, BROKEN, 5, value), np.arange(ROWS) != BROKEN
    ops_of_rows: list[Callable[[Ops, Mapping[str, Tensor], ForwardBatch], Tensor]] = [
        lambda ops, x, _: ops.rms_norm(x["x"], weight, 1e-5),
        lambda ops, x, _: ops.layer_norm(x["x"], weight, bias, 1e-5),
    ]
    for op in ops_of_rows:
        plain, found = (run(native, {"x": rows}, op, batch_of(ROWS)) for rows in (x, broken))
        assert np.isnan(found[BROKEN]).all()
        assert np.array_equal(found[others], plain[others])


DTYPES = [("f16", "f16"), ("f32", "f32"), ("int8", "int8"), ("int4", "int4"), ("int8", "f16")]
HEADS, KV_HEADS, D = 4, 2, 32


@isas
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("dtypes", DTYPES, ids=",".join)
@pytest.mark.parametrize("window", [None, 20])
def test_attention_breaks_the_tokens_that_see_a_broken_key_value_or_query_and_no_other(
    isa: str, threads: int, dtypes: tuple[str, str], window: int | None
) -> None:
    """Two requests of 300 tokens, which is more than one split; the first is broken."""
    native, rng = NativeBackend(isa, threads), np.random.default_rng(0)
    n, softcap = 300, 15.0 if window is None else None
    tables = np.arange(38, dtype=np.int32).reshape(2, 19)
    arrays = {
        name: rng.normal(size=(2 * n, heads * D)).astype(np.float32)
        for name, heads in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS))
    }

    def attend(arrays: Mapping[str, Array], chunks: list[tuple[int, int]]) -> Array:
        """Both requests in steps of these positions."""
        kv = KVLayer(native.new_kv_store(38, 16, KVSpec(KV_HEADS, D, D, *dtypes)))

        def op(ops: Ops, x: Mapping[str, Tensor], batch: ForwardBatch) -> Tensor:
            k, v = (ops.split_heads(x[name], KV_HEADS) for name in ("k", "v"))
            ops.kv_write(kv, k, v, batch.attention.slot_mapping)
            q = ops.split_heads(x["q"], HEADS)
            return ops.attention(q, kv, batch.attention, scale=0.2, window=window, softcap=softcap)

        parts = []
        for first, last in chunks:
            batch = build_attention_batch([last - first] * 2, [last] * 2, tables, 16)
            batch.input_ids[:] = np.concatenate([np.arange(first, last) + r * n for r in (0, 1)])
            parts.append(run(native, arrays, op, batch).reshape(2, last - first, -1))
        return np.concatenate(parts, axis=1)

    at = 130
    whole = [(0, n)]
    plain = attend(arrays, whole)
    sees = np.arange(n) >= at
    if window is not None:
        sees &= np.arange(n) < at + window
    for name in ("q", "k", "v"):
        for value in (np.nan, np.inf):
            broken = {**arrays, name: break_at(arrays[name], at, 3, value)}
            expected = np.arange(n) == at if name == "q" else sees
            for chunks in (whole, [(0, 120), (120, 140), (140, 141), (141, n)]):
                found = attend(broken, chunks)
                assert np.array_equal(found[1], plain[1]), name
                stays = np.isfinite(found[0]).all(axis=-1)
                assert np.array_equal(found[0][~expected], plain[0][~expected]), (name, value)
                if np.isnan(value) or name == "v":
                    assert np.array_equal(~stays, expected), (name, value)
                # an infinite score may be capped, or be that of a weight of 0
