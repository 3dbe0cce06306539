"""Error feedback into the grids of GGUF's block formats: better codes in ordinary files.

The format's own search, weighted by the importance of columns, fixes scales and minima. Then only
the codes are chosen anew, so the file has the same bytes, the same layout and the same kernels:

1. GPTQ's error feedback (`gptq.py`) rounds column by column, those with the largest inputs first.
   The order is free, because the grid is fixed.
2. Sweeps of coordinate descent give each code its best value while all others stay.
3. The float16 scales of the blocks are fitted again to the codes, one at a time, and one more sweep
   follows.

Each step of 2 and 3 lowers the loss tr((W - Ŵ) H (W - Ŵ)ᵀ) or changes nothing. The result is used
only if it lowers the loss on other text too, against the format's own search (do no harm).

Shapes: R rows, n columns; weights are worked on transposed, [n, R].
"""

from collections.abc import Callable
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from ..formats import HostTensor, dequantize, get_format, host_tensor
from ..formats.base import block_fields
from ..formats.codes import GRIDS, grid_of, scale_parts, with_codes
from .gptq import BLOCK, Doubles, Factor, Floats, factorize, feed_back

__all__ = ["Search", "error_feedback", "quadratic_loss"]

Codes: TypeAlias = NDArray[np.uint8]
# (values [R, n], format, importance [n] or None) -> the tensor: a format's own search
Search: TypeAlias = Callable[[Floats, str, Floats | None], HostTensor]


def error_feedback(
    values: Floats,
    hessian: Doubles,
    format: str,
    search: Search,
    *,
    held_out: Doubles | None = None,
    factor: Factor | None = None,
    sweeps: int = 2,
    refits: int = 1,
) -> HostTensor:
    """Quantize a weight [R, n] to `format`, one of `formats.codes.GRIDS`. `hessian` [n, n] is that
    of its input, `held_out` that of other text. `factor` is `factorize(hessian, act_order=True)`,
    if it is there already.
    """
    searched = search(values, format, np.diag(hessian).astype(np.float32))
    factor = factor or factorize(hessian, act_order=True)
    # feed errors back, then descend
    work = _Work(values, hessian, format, searched)
    work.feed_back(factor)
    for _ in range(sweeps):
        work.sweep()
    for _ in range(refits):
        work.refit_scales()
        work.sweep()
    found = work.tensor()
    if held_out is None:
        return found
    before = quadratic_loss(values - dequantize(searched), held_out)
    after = quadratic_loss(values - dequantize(found), held_out)
    return found if after < before else searched


def quadratic_loss(error: Floats, hessian: NDArray[np.floating]) -> float:
    """tr(E H Eᵀ) of an error [R, n]."""
    product = error @ hessian.astype(np.float32)
    return float(np.einsum("rn,rn->", product, error, dtype=np.float64))


class _Work:
    """A weight, its blocks with their grid, and the codes chosen so far."""

    def __init__(self, values: Floats, hessian: Doubles, format: str, searched: HostTensor) -> None:
        self._format = format
        self._shape = values.shape
        self._blocks = searched.data.reshape(-1, get_format(format).block_bytes).copy()
        self._weight = np.ascontiguousarray(values.T)  # [n, R]
        self._hessian = hessian.astype(np.float32)
        self._codes = np.zeros((values.shape[1], len(values)), np.uint8)
        self._values = np.zeros_like(self._weight)  # of the codes
        # H (W - Ŵ)ᵀ, which descent keeps up to date
        self._gradient: Floats | None = None
        self._read_grid()

    def feed_back(self, factor: Factor) -> None:
        """Choose all codes, with the errors of earlier columns fed back."""
        columns = self._weight[factor.order]

        def round_column(i: int, x: Floats) -> Floats:
            j = int(factor.order[i])
            code = self._round(j, x)
            self._codes[j] = code
            value: Floats = self._base[j] + self._step[j] * self._levels[code]
            return value

        feed_back(columns, factor.upper, round_column)
        self._values[factor.order] = columns

    def sweep(self) -> None:
        """Give each code, column by column, the value that is best while all others stay."""
        gradient, n = self._current_gradient(), len(self._weight)
        diagonal = np.diag(self._hessian).copy()
        diagonal[diagonal == 0] = 1
        for start in range(0, n, BLOCK):
            stop = min(start + BLOCK, n)
            changes = np.zeros((stop - start, self._weight.shape[1]), np.float32)
            for j in range(start, stop):
                own = gradient[j]
                if j > start:
                    own = own - self._hessian[start:j, j] @ changes[: j - start]
                code = self._round(j, self._values[j] + own / diagonal[j])
                value = self._base[j] + self._step[j] * self._levels[code]
                np.subtract(value, self._values[j], out=changes[j - start])
                self._codes[j], self._values[j] = code, value
            gradient -= self._hessian[:, start:stop] @ changes

    def refit_scales(self) -> None:
        """Fit each float16 scale to the codes, one field and one block of columns at a time. A
        scale changes only where that lowers the loss.
        """
        grids, size = GRIDS[self._format], get_format(self._format).block_size
        gradient, (rows, n) = self._current_gradient(), self._shape
        blocks = with_codes(self._blocks, self._by_block(self._codes), self._format)
        fields = block_fields(blocks, grids.layout).reshape(rows, n // size)
        for name, flat in zip(grids.scales, scale_parts(blocks, self._format), strict=True):
            part = np.ascontiguousarray(flat.reshape(rows, n).T)  # [n, R]
            for block in range(n // size):
                span = slice(block * size, (block + 1) * size)
                a = part[span]
                slope = np.einsum("nr,nr->r", a, gradient[span])
                curve = np.einsum("nr,nr->r", a, self._hessian[span, span] @ a)
                old = fields[name][:, block].astype(np.float32)
                best = old + np.divide(slope, curve, out=np.zeros_like(slope), where=curve > 0)
                new = np.clip(best, -65504, 65504).astype(np.float16)
                change = new.astype(np.float32) - old
                better = change * (change * curve - 2 * slope) < 0
                change = np.where(better, change, np.float32(0))
                fields[name][:, block] = np.where(better, new, fields[name][:, block])
                gradient -= self._hessian[:, span] @ (a * change)
        self._blocks = blocks
        self._read_grid()
        # the values as they are now, without the roundings of the sums above
        flat_values = get_format(self._format).dequantize_blocks(blocks)
        self._values = np.ascontiguousarray(flat_values.reshape(rows, n).T)
        self._gradient = None

    def tensor(self) -> HostTensor:
        blocks = with_codes(self._blocks, self._by_block(self._codes), self._format)
        return host_tensor(self._format, self._shape, blocks.reshape(-1))

    def _read_grid(self) -> None:
        grid = grid_of(self._blocks, self._format)
        self._levels = grid.levels
        self._uneven = GRIDS[self._format].uneven
        self._middles = (grid.levels[1:] + grid.levels[:-1]) / np.float32(2)
        self._base, self._step = (
            np.ascontiguousarray(part.reshape(self._shape).T) for part in (grid.base, grid.step)
        )
        self._inverse = np.divide(
            np.float32(1), self._step, out=np.zeros_like(self._step), where=self._step != 0
        )

    def _round(self, j: int, x: Floats) -> Codes:
        """The codes of the numbers nearest to x [R] in column j."""
        scaled = (x - self._base[j]) * self._inverse[j]
        if self._uneven:
            places: Codes = np.searchsorted(self._middles, scaled).astype(np.uint8)
            return places
        np.rint(scaled, out=scaled)
        np.clip(scaled, 0, len(self._levels) - 1, out=scaled)
        codes: Codes = scaled.astype(np.uint8)
        return codes

    def _current_gradient(self) -> Floats:
        if self._gradient is None:
            self._gradient = self._hessian @ (self._weight - self._values)
        return self._gradient

    def _by_block(self, columns: Codes) -> Codes:
        """[n, R] as the blocks of the rows, [blocks, S]."""
        size = get_format(self._format).block_size
        return np.ascontiguousarray(columns.T).reshape(-1, size)
