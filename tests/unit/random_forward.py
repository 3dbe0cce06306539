"""Forward passes that no model has: random ops over random symbols, for tests of the native
backend's plans and programs.

Widths are few, so that dead symbols' places are taken again, among them by symbols of the same size
that lie otherwise: 48 floats take the 192 bytes of 128 quantized numbers, and an angle of 32 pairs
those of 64 floats.
"""

import functools

import numpy as np

from pellucid.backends.native.backend import NativeBackend
from pellucid.batch import ForwardBatch
from pellucid.formats import encode_dense, quantize
from pellucid.kv_spec import KVSpec
from pellucid.ops.backend import Forward
from pellucid.ops.case_inputs import build_attention_batch
from pellucid.ops.protocol import KVLayer, Ops, RopeTable, Tensor

__all__ = ["HEAD_DIM", "TOKENS", "VOCAB", "batch_of", "random_forward"]

WIDTHS = (32, 48, 64, 96, 128, 256)
HEAD_DIM, TOKENS, VOCAB = 32, 64, 20


@functools.cache
def _weight(outputs: int, inputs: int, format: str) -> Tensor:
    rng = np.random.default_rng(outputs * 1000 + inputs)
    matrix = (rng.normal(size=(outputs, inputs)) * inputs**-0.5).astype(np.float32)
    return NativeBackend(threads=1).load_weight(quantize(matrix, format))


@functools.cache
def _vector(width: int) -> Tensor:
    return NativeBackend(threads=1).load_weight(
        encode_dense(np.linspace(0.5, 1.5, width, dtype=np.float32))
    )


def random_forward(seed: int, num_ops: int = 20) -> Forward:
    """The same ops in the same order at every call; a cache is new at every call of this
    function. Every second one returns hidden states too.
    """
    caches: list[KVLayer] = [
        KVLayer(
            NativeBackend(threads=1).new_kv_store(
                TOKENS // 16, 16, KVSpec(n, HEAD_DIM, HEAD_DIM, "f16", "f16")
            )
        )
        for n in (1, 2)
    ]
    tables = [RopeTable(tuple(1.0 / (1 + i) for i in range(pairs))) for pairs in (16, 12)]

    def forward(ops: Ops, batch: ForwardBatch) -> Tensor | tuple[Tensor, Tensor]:
        rng = np.random.default_rng(seed)
        live: list[tuple[Tensor, int]] = []  # with their widths
        for width in rng.choice(WIDTHS, 3):
            live.append(
                (ops.embedding(_weight(VOCAB, int(width), "F32"), batch.input_ids), int(width))
            )

        def pick(width: int | None = None) -> tuple[Tensor, int]:
            fitting = [x for x in live if width is None or x[1] == width]
            return fitting[rng.integers(len(fitting))]

        def project(x: tuple[Tensor, int], width: int) -> Tensor:
            format = "Q8_0" if x[1] % 32 == 0 and rng.random() < 0.7 else "F32"
            return ops.linear(
                x[0], _weight(width, x[1], format), _vector(width) if rng.random() < 0.3 else None
            )

        for _ in range(num_ops):
            x, width = pick()
            match rng.integers(8):
                case 0 | 1:
                    wanted = int(rng.choice(WIDTHS))
                    made, width = project((x, width), wanted), wanted
                case 2:
                    made = ops.rms_norm(x, _vector(width), 1e-5)
                case 3:
                    made = ops.add(x, pick(width)[0])
                case 4:
                    made = ops.silu_mul(x, pick(width)[0]) if rng.random() < 0.5 else ops.gelu(x)
                case 5:
                    made = ops.softcap(x, 3.0)
                case 6 if width % HEAD_DIM == 0:
                    turned = ops.rope(
                        ops.split_heads(x, width // HEAD_DIM),
                        batch.positions,
                        tables[rng.integers(2)],
                    )
                    made = ops.split_heads(turned, 1)
                case _:
                    kv_heads = int(rng.integers(1, 3))
                    k, v = (
                        ops.split_heads(project((x, width), kv_heads * HEAD_DIM), kv_heads)
                        for _ in range(2)
                    )
                    ops.kv_write(caches[kv_heads - 1], k, v, batch.attention.slot_mapping)
                    q = ops.split_heads(project((x, width), 4 * HEAD_DIM), 4)
                    made, width = (
                        ops.attention(q, caches[kv_heads - 1], batch.attention, scale=0.2),
                        4 * HEAD_DIM,
                    )
            live.append((made, width))
            if len(live) > 4:
                del live[rng.integers(len(live) - 1)]
        made, width = live[-1]
        hidden = None
        if seed % 2:
            hidden = ops.take_rows(made, batch.hidden_indices)
            hidden = ops.rms_norm(hidden, _vector(width), 1e-5)
        if rng.random() < 0.5:
            made = ops.take_rows(made, batch.logits_indices)
        normed = ops.rms_norm(made, _vector(width), 1e-5)
        logits = ops.linear(normed, _weight(48, width, "Q8_0" if width % 32 == 0 else "F32"))
        if rng.random() < 0.5:
            logits = ops.softcap(logits, 5.0)
        return logits if hidden is None else (logits, hidden)

    return forward


def batch_of(tokens: int) -> ForwardBatch:
    """One new request; the logits of every third token, the hidden states of every fourth."""
    table = np.arange(TOKENS // 16, dtype=np.int32)[None, ::-1].copy()
    rows = range(0, tokens, 3), range(0, tokens, 4)
    batch = build_attention_batch([tokens], [tokens], table, 16, *rows)
    batch.input_ids[:] %= VOCAB
    return batch
