"""Grids of block formats, against their decoders."""

import numpy as np
import pytest

from pellucid.formats import ALL_FORMATS, dequantize, quantize
from pellucid.formats.base import block_fields
from pellucid.formats.codes import GRIDS, grid_of, scale_parts, with_codes


def random_blocks(name: str) -> tuple[np.ndarray, np.ndarray]:
    """Blocks that a quantizer made, and other codes for them."""
    rng = np.random.default_rng(0)
    values = rng.standard_t(4, (6, 512)).astype(np.float32)
    tensor = quantize(values, name, np.ones(512, np.float32))
    blocks = tensor.data.reshape(-1, ALL_FORMATS[name].block_bytes)
    shape = (len(blocks), ALL_FORMATS[name].block_size)
    return blocks, rng.integers(0, GRIDS[name].num_codes, shape).astype(np.uint8)


@pytest.mark.parametrize("name", GRIDS)
def test_blocks_with_other_codes_decode_to_the_grid(name: str) -> None:
    blocks, codes = random_blocks(name)
    grid = grid_of(blocks, name)
    expected = grid.base + grid.step * grid.levels[codes]
    found = ALL_FORMATS[name].dequantize_blocks(with_codes(blocks, codes, name))
    np.testing.assert_allclose(found, expected, atol=1e-6 * float(np.abs(expected).max()))
    assert (np.diff(grid.levels) > 0).all()


@pytest.mark.parametrize("name", GRIDS)
def test_the_quantizers_own_codes_are_the_nearest_of_the_grid(name: str) -> None:
    """So the grid is that of the blocks, and not of neighbours."""
    rng = np.random.default_rng(1)
    values = rng.normal(size=(4, 512)).astype(np.float32)
    tensor = quantize(values, name)
    blocks = tensor.data.reshape(-1, ALL_FORMATS[name].block_bytes)
    grid, x = grid_of(blocks, name), values.reshape(len(blocks), -1)
    numbers = grid.base[..., None] + grid.step[..., None] * grid.levels
    nearest = np.abs(numbers - x[..., None]).min(axis=-1)
    error = np.abs(dequantize(tensor).reshape(x.shape) - x)
    # codes of some formats were chosen before their scale was rounded to float16
    assert (error <= nearest + 2e-3 * np.abs(x).max()).all()


@pytest.mark.parametrize("name", GRIDS)
def test_values_are_the_sum_of_the_parts_of_their_scales(name: str) -> None:
    blocks, _ = random_blocks(name)
    fields = block_fields(blocks, GRIDS[name].layout)
    scales = [fields[scale].astype(np.float32)[:, None] for scale in GRIDS[name].scales]
    parts = scale_parts(blocks, name)
    total = sum(scale * part for scale, part in zip(scales, parts, strict=True))
    values = ALL_FORMATS[name].dequantize_blocks(blocks)
    np.testing.assert_allclose(total, values, atol=1e-6 * float(np.abs(values).max()))
