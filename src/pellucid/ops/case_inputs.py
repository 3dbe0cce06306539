"""The inputs of conformance cases: batches, random activations and random weights in every format.

The generator is seeded by the name of the case, so inputs are the same on every machine. Shapes: T
tokens, R requests, M blocks per request, G layer groups.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from ..batch import AttentionMetadata, ForwardBatch
from ..formats import FORMATS, dequantize, get_format, quantize
from ..formats.groups import INT8_ROW, group_blocks, row_blocks
from ..formats.tensor import HostTensor

__all__ = ["Inputs", "build_attention_batch", "normal", "plain_batch", "random_weight"]

Array: TypeAlias = NDArray[np.float32]

DENSE = ("F32", "F16", "BF16")

# Offsets of the float16 scales in a quant_block. Its other bytes may be random; these must be
# numbers of a usual size.
F16_SCALES: Mapping[str, tuple[int, ...]] = {
    "Q4_0": (0,),
    "Q4_1": (0, 2),
    "Q5_0": (0,),
    "Q5_1": (0, 2),
    "Q8_0": (0,),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
    "IQ4_NL": (0,),
    "IQ4_XS": (0,),
}


@dataclass(frozen=True, slots=True)
class Inputs:
    """The inputs of a case. `history` holds keys and values of earlier steps, which are written
    before the op runs.
    """

    batch: ForwardBatch
    weights: Mapping[str, HostTensor] = field(default_factory=dict)
    activations: Mapping[str, Array] = field(default_factory=dict)  # each [T, n]
    # "k", "v": each [earlier tokens, KH·D]
    history: Mapping[str, Array] = field(default_factory=dict)
    history_batch: ForwardBatch | None = None
    num_blocks: int = 0


def build_attention_batch(
    q_lens: Sequence[int],
    seq_lens: Sequence[int],
    block_tables: NDArray[np.int32],
    block_size: int,
    logits_indices: Sequence[int] = (),
    hidden_indices: Sequence[int] = (),
) -> ForwardBatch:
    """A batch in which request r computes the last q_lens[r] of its seq_lens[r] tokens; input_ids
    are 0 … T-1.

    block_tables are [G, R, M], or [R, M] for one group.
    """
    tables = block_tables if block_tables.ndim == 3 else block_tables[None]
    owner = np.repeat(np.arange(len(q_lens)), q_lens)  # [T]
    # [T]
    positions = np.concatenate([np.arange(s - q, s) for q, s in zip(q_lens, seq_lens, strict=True)])
    # [G, T]
    slots = tables[:, owner, positions // block_size] * block_size + positions % block_size
    return ForwardBatch(
        input_ids=np.arange(len(owner), dtype=np.int32),
        positions=positions.astype(np.int32),
        logits_indices=np.array(logits_indices, np.int32),
        hidden_indices=np.array(hidden_indices, np.int32),
        attention=AttentionMetadata(
            cu_seqlens_q=np.concatenate([[0], np.cumsum(q_lens)]).astype(np.int32),
            seq_lens=np.array(seq_lens, np.int32),
            block_tables=tables,
            slot_mapping=slots.astype(np.int32),
            block_size=block_size,
        ),
    )


def plain_batch(tokens: int, logits_indices: Sequence[int] = ()) -> ForwardBatch:
    """One whole request, for ops that do not look at other tokens."""
    return build_attention_batch(
        [tokens], [tokens], np.zeros((1, 1), np.int32), tokens, logits_indices
    )


def random_weight(rng: np.random.Generator, shape: tuple[int, int], format: str) -> HostTensor:
    """A matrix [out, in] of numbers of about 1/sqrt(in). Quantized blocks hold random bytes, so
    that every code occurs.
    """
    rows, columns = shape
    spread = columns**-0.5
    if format in DENSE:
        return quantize((rng.normal(size=shape) * spread).astype(np.float32), format)
    # random bytes with random scales
    if format not in FORMATS:
        return _random_groups(rng, shape, format)
    layout = FORMATS[format]
    data = rng.integers(
        0, 256, (rows, columns // layout.block_size, layout.block_bytes), dtype=np.uint8
    )
    scales = (
        rng.uniform(0.5, 1.5, (*data.shape[:2], len(F16_SCALES[format])))
        * rng.choice([-1, 1], data.shape[:2])[..., None]
    )
    _put_scales(data, format, scales)
    # rescale by the size of the decoded numbers; they are linear in the scales
    sample = data[:64].reshape(min(rows, 64), -1)
    rms = float(
        np.sqrt(
            np.mean(
                np.square(
                    dequantize(HostTensor(format, (len(sample), columns), sample)), dtype=np.float64
                )
            )
        )
    )
    _put_scales(data, format, scales * (spread / rms))
    return HostTensor(format, shape, data.reshape(rows, -1))


def _random_groups(rng: np.random.Generator, shape: tuple[int, int], format: str) -> HostTensor:
    """The same in a group-wise format, with zero points near the middle of the codes."""
    layout, (rows, columns) = get_format(format), shape
    bits = int(format.removeprefix("U")[3])
    codes = rng.integers(0, 256, (rows, columns * bits // 8), dtype=np.uint8)
    of_row = format == INT8_ROW
    groups = 1 if of_row else columns // layout.block_size
    scales = rng.uniform(0.5, 1.5, (rows, groups)).astype(np.float32)
    middle = 1 << (bits - 1)
    zeros = rng.integers(middle * 3 // 4, middle * 5 // 4 + 1, (rows, groups)).astype(np.uint8)

    def build(scales: NDArray[np.float32]) -> HostTensor:
        if of_row:
            return HostTensor(format, shape, row_blocks(codes.view(np.int8), scales[:, 0]))
        data = group_blocks(codes, scales, zeros if format.startswith("U") else None, layout)
        return HostTensor(format, shape, data)

    # rescale by the size of the decoded numbers; they are linear in the scales
    values = dequantize(build(scales))
    rms = float(np.sqrt(np.mean(np.square(values, dtype=np.float64))))
    return build(scales * np.float32(columns**-0.5 / rms))


def _put_scales(data: NDArray[np.uint8], format: str, scales: NDArray[np.float64]) -> None:
    """Write scales [rows, blocks, fields] where the format keeps them, as little-endian float16."""
    for i, at in enumerate(F16_SCALES[format]):
        data[..., at : at + 2] = np.ascontiguousarray(scales[..., i : i + 1], "<f2").view(np.uint8)


def normal(
    rng: np.random.Generator, *shape: int, magnitude: float = 1.0, mean: float = 0.0
) -> Array:
    """Normally distributed numbers, float32."""
    return (rng.normal(size=shape) * magnitude + mean).astype(np.float32)
