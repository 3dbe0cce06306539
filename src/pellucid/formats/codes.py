"""The grids of block formats: which numbers a block with given scales can hold, and blocks with
other codes or scales.

A value of a block is base + step · level[code]. Base and step of each value follow from the scales
that are stored; level is the code itself, or an entry of IQ4's table. Methods that choose codes by
more than the nearest number (error feedback) read the grid of blocks that a search made, choose
codes, and put them into the same blocks. Nothing here chooses anything.

Grids come from the decoders: base and step are what a block decodes to with chosen codes. So there
is one definition of each layout's scales. Blocks are uint8 [n, B], codes uint8 [n, S], values
float32 [n, S].
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from . import ALL_FORMATS
from .base import Blocks, Values, block_fields, pack_planes
from .iq4 import IQ4_LEVELS, IQ4_NL_LAYOUT, IQ4_XS_LAYOUT
from .kquants_layout import Q2_K_LAYOUT, Q3_K_LAYOUT, Q4_K_LAYOUT, Q5_K_LAYOUT, Q6_K_LAYOUT
from .legacy import Q4_0_LAYOUT, Q4_1_LAYOUT, Q5_0_LAYOUT, Q5_1_LAYOUT, Q8_0_LAYOUT

__all__ = ["GRIDS", "Codes", "Grid", "GridFormat", "grid_of", "scale_parts", "with_codes"]

Codes = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class GridFormat:
    """How a format stores codes and scales."""

    layout: np.dtype[np.void]
    num_codes: int
    put: Callable[[NDArray[np.void], Codes], None]  # writes codes [n, S] into structs [n]
    scales: tuple[str, ...]  # the fields of float16 scales, in which values are linear
    uneven: bool = False  # levels are IQ4's


@dataclass(frozen=True, slots=True)
class Grid:
    """The numbers that blocks can hold: base + step · level[code]."""

    base: Values  # [n, S]
    step: Values  # [n, S]; 0 where a block's scale is 0
    levels: Values  # [codes], rising


def grid_of(blocks: Blocks, name: str) -> Grid:
    """The grid of blocks of the format called `name`, which must be one of GRIDS."""
    format = GRIDS[name]
    decode, size = ALL_FORMATS[name].dequantize_blocks, ALL_FORMATS[name].block_size

    def decoded(code: int) -> Values:
        return decode(with_codes(blocks, np.full((len(blocks), size), code, np.uint8), name))

    if format.uneven:
        step = decoded(IQ4_LEVELS.index(1))
        return Grid(np.zeros_like(step), step, np.array(IQ4_LEVELS, np.float32))
    base = decoded(0)
    step = decoded(1)
    step -= base
    return Grid(base, step, np.arange(format.num_codes, dtype=np.float32))


def with_codes(blocks: Blocks, codes: Codes, name: str) -> Blocks:
    """The same blocks with other codes."""
    format, changed = GRIDS[name], blocks.copy()
    format.put(block_fields(changed, format.layout), codes)
    return changed


def scale_parts(blocks: Blocks, name: str) -> list[Values]:
    """For each field of `GridFormat.scales`, the values of the blocks where that scale is 1 and the
    others are 0: [n, S] each. The blocks' values are the sum of these times the scales.
    """
    format, parts = GRIDS[name], []
    for chosen in format.scales:
        changed = blocks.copy()
        fields = block_fields(changed, format.layout)
        for scale in format.scales:
            fields[scale] = scale == chosen
        parts.append(ALL_FORMATS[name].dequantize_blocks(changed))
    return parts


def _put_nibbles(fields: NDArray[np.void], codes: Codes) -> None:
    fields["qs"] = pack_planes(codes, 4, 16)


def _put_fifths(fields: NDArray[np.void], codes: Codes) -> None:
    fields["qs"] = pack_planes(codes & np.uint8(15), 4, 16)
    fields["qh"] = np.packbits(codes >> np.uint8(4), axis=1, bitorder="little")


def _put_bytes(fields: NDArray[np.void], codes: Codes) -> None:
    fields["qs"] = codes.astype(np.int16) - 127


def _put_q2_k(fields: NDArray[np.void], codes: Codes) -> None:
    fields["qs"] = pack_planes(codes, 2, 32)


def _put_q3_k(fields: NDArray[np.void], codes: Codes) -> None:
    fields["qs"] = pack_planes(codes & np.uint8(3), 2, 32)
    fields["hmask"] = pack_planes(codes >> np.uint8(2), 1, 32)


def _put_q4_k(fields: NDArray[np.void], codes: Codes) -> None:
    fields["qs"] = pack_planes(codes, 4, 32)


def _put_q5_k(fields: NDArray[np.void], codes: Codes) -> None:
    fields["qs"] = pack_planes(codes & np.uint8(15), 4, 32)
    fields["qh"] = pack_planes(codes >> np.uint8(4), 1, 32)


def _put_q6_k(fields: NDArray[np.void], codes: Codes) -> None:
    fields["ql"] = pack_planes(codes & np.uint8(15), 4, 64)
    fields["qh"] = pack_planes(codes >> np.uint8(4), 2, 32)


GRIDS: Mapping[str, GridFormat] = MappingProxyType(
    {
        "Q4_0": GridFormat(Q4_0_LAYOUT, 16, _put_nibbles, ("d",)),
        "Q4_1": GridFormat(Q4_1_LAYOUT, 16, _put_nibbles, ("d", "m")),
        "Q5_0": GridFormat(Q5_0_LAYOUT, 32, _put_fifths, ("d",)),
        "Q5_1": GridFormat(Q5_1_LAYOUT, 32, _put_fifths, ("d", "m")),
        "Q8_0": GridFormat(Q8_0_LAYOUT, 255, _put_bytes, ("d",)),
        "Q2_K": GridFormat(Q2_K_LAYOUT, 4, _put_q2_k, ("d", "dmin")),
        "Q3_K": GridFormat(Q3_K_LAYOUT, 8, _put_q3_k, ("d",)),
        "Q4_K": GridFormat(Q4_K_LAYOUT, 16, _put_q4_k, ("d", "dmin")),
        "Q5_K": GridFormat(Q5_K_LAYOUT, 32, _put_q5_k, ("d", "dmin")),
        "Q6_K": GridFormat(Q6_K_LAYOUT, 64, _put_q6_k, ("d",)),
        "IQ4_NL": GridFormat(IQ4_NL_LAYOUT, 16, _put_nibbles, ("d",), uneven=True),
        "IQ4_XS": GridFormat(IQ4_XS_LAYOUT, 16, _put_nibbles, ("d",), uneven=True),
    }
)
