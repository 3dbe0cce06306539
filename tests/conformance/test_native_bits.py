"""Law 1 on the native backend: a token's results are the same bits alone and among others, in any
chunk, on any number of threads.

Each test takes one way of computing as the measure (a row alone on one thread; a whole prompt at
once) and compares the others with it by `array_equal`. Every set of kernels that the machine can
run is held to it.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from pellucid.backends.native.backend import NativeBackend
from pellucid.batch import ForwardBatch
from pellucid.formats import ALL_FORMATS, encode_dense
from pellucid.kv_spec import KVSpec
from pellucid.ops.backend import Forward
from pellucid.ops.case_inputs import build_attention_batch, random_weight
from pellucid.ops.case_lists import CASES
from pellucid.ops.cases import AttentionCase, Case, TakeRowsCase
from pellucid.ops.protocol import KVLayer, Ops, Tensor

from .native_isas import USABLE

Array = NDArray[np.float32]
Run = Callable[[ForwardBatch], Array]

THREADS = (1, 2, 3, 4)
isas = pytest.mark.parametrize("isa", USABLE)


@functools.cache
def backend(isa: str, threads: int) -> NativeBackend:
    return NativeBackend(isa, threads)


def plain_batch(input_ids: Sequence[int], positions: Sequence[int] | None = None) -> ForwardBatch:
    """Tokens that do not look at each other."""
    n = len(input_ids)
    batch = build_attention_batch([n], [n], np.zeros((1, 1), np.int32), n)
    return replace(
        batch,
        input_ids=np.array(input_ids, np.int32),
        positions=np.array(positions or input_ids, np.int32),
    )


# ---- ops on each token by itself


@isas
@pytest.mark.parametrize("format", ALL_FORMATS)
@pytest.mark.parametrize("outputs", [1, 37, 64])
def test_a_linear_row_is_the_same_bits_in_every_batch_on_every_number_of_threads(
    isa: str, format: str, outputs: int
) -> None:
    rng = np.random.default_rng(outputs)
    columns = (
        71 if ALL_FORMATS[format].block_size == 1 else max(96, 2 * ALL_FORMATS[format].block_size)
    )
    matrix = random_weight(rng, (outputs, columns), format)
    bias, rows = (rng.normal(size=shape).astype(np.float32) for shape in (outputs, (80, columns)))
    rows[7] *= 1e3
    runs = [_linear(backend(isa, threads), matrix, bias, rows) for threads in THREADS]
    alone = np.concatenate([runs[0](plain_batch([i])) for i in range(80)])
    assert np.abs(alone).max() > 0
    for threads, run in zip(THREADS, runs, strict=True):
        for n in (
            (*range(2, 41), 64, 65, 66, 80)
            if threads == 1
            else (1, 2, 3, 5, 8, 13, 17, 31, 40, 65, 80)
        ):
            chosen = rng.permutation(80)[:n]
            assert np.array_equal(run(plain_batch(chosen.tolist())), alone[chosen]), (threads, n)


def _linear(native: NativeBackend, matrix: Any, bias: Array, rows: Array) -> Run:
    weight, vector, table = (
        native.load_weight(t) for t in (matrix, encode_dense(bias), encode_dense(rows))
    )
    return _on_host(
        native, lambda ops, batch: ops.linear(ops.embedding(table, batch.input_ids), weight, vector)
    )


def _on_host(native: NativeBackend, forward: Forward) -> Run:
    run = native.build_forward(forward)
    return lambda batch: run(batch).to_host()


@isas
@pytest.mark.parametrize("threads", THREADS)
def test_every_op_on_single_tokens_gives_them_the_same_bits_alone_and_together(
    isa: str, threads: int
) -> None:
    cases = [
        c
        for c in CASES
        if not isinstance(c, AttentionCase | TakeRowsCase)
        and len(c.build_inputs().batch.logits_indices) == 0
    ]
    several = 0
    for case in cases:
        inputs = case.build_inputs()
        together = _single_tokens(backend(isa, threads), case)(inputs.batch)
        if not len(together) > 1:
            continue
        several += 1
        run = _single_tokens(backend(isa, 1), case)
        for i, row in enumerate(together):
            one = plain_batch([inputs.batch.input_ids[i]], [int(inputs.batch.positions[i])])
            assert np.array_equal(run(one)[0], row), case.name
    assert several > 60


def _single_tokens(native: NativeBackend, case: Case) -> Run:
    inputs = case.build_inputs()
    weights = {name: native.load_weight(tensor) for name, tensor in inputs.weights.items()}
    tables = {
        name: native.load_weight(encode_dense(rows)) for name, rows in inputs.activations.items()
    }

    def forward(ops: Ops, batch: ForwardBatch) -> Tensor:
        x = weights | {
            name: ops.embedding(table, batch.input_ids) for name, table in tables.items()
        }
        return case.apply(ops, x, batch, KVLayer(None))

    return _on_host(native, forward)


# ---- attention


@dataclass(frozen=True)
class Shape:
    heads: int
    kv_heads: int
    head_dim: int
    block_size: int = 16
    window: int | None = None
    softcap: float | None = None
    kv_dtypes: tuple[str, str] = ("f16", "f16")


SHAPES = [
    Shape(6, 2, 24, 16),
    Shape(9, 3, 64, 32, window=100),
    Shape(4, 1, 20, 16, window=600, softcap=15.0),
    Shape(1, 1, 7, 48, softcap=4.0),
    Shape(6, 2, 32, 16, kv_dtypes=("int8", "int4")),
    Shape(4, 4, 64, 16, window=300, kv_dtypes=("int4", "f32")),
]
LENGTHS = (
    2300,
    700,
    257,
    16,
    1,
    # of requests: with several splits of 256 positions, with two, with one and a little, one chunk,
    # one token
)


class Requests:
    """Requests of LENGTHS, their keys and values in scattered blocks, with every query's result of
    one pass over the whole.
    """

    def __init__(self, isa: str, shape: Shape) -> None:
        rng = np.random.default_rng(3)
        self._isa, self._shape = isa, shape
        blocks = [-(-n // shape.block_size) for n in LENGTHS]
        order = rng.permutation(sum(blocks))
        self._tables = np.zeros((len(LENGTHS), max(blocks)), np.int32)
        for table, count, end in zip(self._tables, blocks, np.cumsum(blocks), strict=True):
            table[:count] = order[end - count : end]
        self.starts = np.concatenate([[0], np.cumsum(LENGTHS)])
        total = int(self.starts[-1])
        widths = {
            "q": shape.heads * shape.head_dim,
            "k": shape.kv_heads * shape.head_dim,
            "v": shape.kv_heads * shape.head_dim,
        }
        self._arrays = {
            name: rng.normal(size=(total, width)).astype(np.float32) * 1.5
            for name, width in widths.items()
        }
        self._kv = KVLayer(
            backend(isa, 1).new_kv_store(
                sum(blocks),
                shape.block_size,
                KVSpec(shape.kv_heads, shape.head_dim, shape.head_dim, *shape.kv_dtypes),
            )
        )
        self._runs = [self._build(threads, self._kv) for threads in THREADS]
        self.whole = np.concatenate([self.run(2, [(r, 0, n)]) for r, n in enumerate(LENGTHS)])

    def _build(self, threads: int, kv: KVLayer) -> Run:
        native, shape = backend(self._isa, threads), self._shape
        tables = {
            name: native.load_weight(encode_dense(rows)) for name, rows in self._arrays.items()
        }

        def forward(ops: Ops, batch: ForwardBatch) -> Tensor:
            x = {name: ops.embedding(table, batch.input_ids) for name, table in tables.items()}
            k, v = (ops.split_heads(x[name], shape.kv_heads) for name in ("k", "v"))
            ops.kv_write(kv, k, v, batch.attention.slot_mapping)
            q = ops.split_heads(x["q"], shape.heads)
            return ops.attention(
                q,
                kv,
                batch.attention,
                scale=shape.head_dim**-0.5,
                window=shape.window,
                softcap=shape.softcap,
            )

        return _on_host(native, forward)

    def run(self, threads: int, chunks: Sequence[tuple[int, int, int]]) -> Array:
        """Attention of each (request, first position, end), in one batch. Their keys and values are
        written again, to the same bits.
        """
        owners = [r for r, _, _ in chunks]
        q_lens, seq_lens = [end - first for _, first, end in chunks], [end for _, _, end in chunks]
        batch = build_attention_batch(
            q_lens, seq_lens, self._tables[owners], self._shape.block_size
        )
        ids = np.concatenate(
            [np.arange(self.starts[r] + first, self.starts[r] + end) for r, first, end in chunks]
        )
        return self._runs[THREADS.index(threads)](replace(batch, input_ids=ids.astype(np.int32)))

    def expected(self, chunks: Sequence[tuple[int, int, int]]) -> Array:
        return np.concatenate(
            [self.whole[self.starts[r] + first : self.starts[r] + end] for r, first, end in chunks]
        )


@functools.cache
def requests(isa: str, shape: Shape) -> Requests:
    return Requests(isa, shape)


@isas
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("threads", THREADS)
def test_attention_of_a_token_is_the_same_bits_alone_in_chunks_and_beside_others(
    isa: str, shape: Shape, threads: int
) -> None:
    built = requests(isa, shape)
    assert np.isfinite(built.whole).all() and np.abs(built.whole).max() > 0
    batches: list[list[tuple[int, int, int]]] = [
        # decode alone: by splits
        *([(0, p, p + 1)] for p in (0, 1, 15, 16, 255, 256, 257, 511, 512, 1023, 2047, 2048, 2299)),
        # chunks of a prompt
        *([(0, p, p + n)] for p, n in ((0, 3), (250, 13), (1000, 40), (2040, 16), (2200, 100))),
        [(1, 699, 700), (2, 256, 257)],  # decode together, each split where it is
        [(0, 2299, 2300), (1, 500, 503), (2, 0, 257), (3, 15, 16), (4, 0, 1)],  # ragged
        [(4, 0, 1), (3, 3, 9), (0, 2290, 2300)],
        [(r, n - 1, n) for r, n in enumerate(LENGTHS)] * 1,
    ]
    for chunks in batches:
        assert np.array_equal(built.run(threads, chunks), built.expected(chunks)), chunks


@isas
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("size", [1, 3, 16, 100])
def test_a_prompt_in_chunks_of_any_size_gives_the_bits_of_one_pass(
    isa: str, threads: int, size: int
) -> None:
    built = requests(isa, SHAPES[0])
    chunks = [[(1, first, min(first + size, 700))] for first in range(0, 700, size)]
    found = np.concatenate([built.run(threads, c) for c in chunks])
    assert np.array_equal(found, built.expected([(1, 0, 700)]))


def test_a_window_and_a_softcap_show() -> None:
    """So that the tests above can fail."""
    plain = requests(USABLE[0], SHAPES[0]).whole
    for changed in (replace(SHAPES[0], window=100), replace(SHAPES[0], softcap=4.0)):
        assert not np.array_equal(Requests(USABLE[0], changed).whole, plain)
