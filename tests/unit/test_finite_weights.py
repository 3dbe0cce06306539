"""Every backend refuses a NaN or infinite weight by name when it is loaded: a norm or a bias, a
scale or a minimum of any block, a plain number anywhere in a matrix.
"""

import numpy as np
import pytest

from pellucid.backends.registry import BACKENDS, get_backend
from pellucid.errors import FormatError
from pellucid.formats import FORMATS, BlockFormat, encode_dense
from pellucid.formats.groups import GROUP_FORMATS
from pellucid.formats.tensor import HostTensor
from pellucid.ops.case_inputs import F16_SCALES, random_weight

backends = pytest.mark.parametrize("backend", BACKENDS)
BROKEN = {"F16": 0x7C00, "BF16": 0xFFC0, "F32": 0x7F800001}  # infinity, NaN, NaN


def changed(tensor: HostTensor, at: int, value: int, dtype: str) -> HostTensor:
    """The bytes of a tensor with one number at byte `at` replaced."""
    data = tensor.data.copy()
    number = np.array([value], dtype).view(np.uint8)
    data.reshape(-1)[at : at + len(number)] = number
    return HostTensor(tensor.format, tensor.shape, data)


@backends
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_vector_with_a_broken_number_is_refused_by_name(backend: str, value: float) -> None:
    vector = np.ones(37, np.float32)
    vector[36] = value
    with pytest.raises(FormatError, match=r"'layers\.0\.input_norm\.weight' holds NaN or infinity"):
        get_backend(backend).load_weight(encode_dense(vector), "layers.0.input_norm.weight")


@backends
@pytest.mark.parametrize("format", F16_SCALES)
def test_a_broken_scale_or_minimum_of_any_block_is_refused(backend: str, format: str) -> None:
    native, f = get_backend(backend), FORMATS[format]
    tensor = random_weight(np.random.default_rng(0), (37, 2 * f.block_size), format)
    native.load_weight(tensor, "w")
    for block in (0, 1, 16, 73):
        for offset in F16_SCALES[format]:
            at = block * f.block_bytes + offset
            for value in (0x7C00, 0xFE01):  # infinity, NaN
                with pytest.raises(FormatError, match="'w' holds NaN"):
                    native.load_weight(changed(tensor, at, value, "<u2"), "w")


@backends
@pytest.mark.parametrize("format", [f for f in GROUP_FORMATS if not f.row_scale])
def test_a_broken_scale_of_any_group_is_refused(backend: str, format: BlockFormat) -> None:
    native = get_backend(backend)
    shape = (37, 2 * format.block_size)
    tensor = random_weight(np.random.default_rng(0), shape, format.name)
    native.load_weight(tensor, "w")
    for block in (0, 1, 16, 73):
        for value in (0x7F800000, 0xFFC00001):  # infinity, NaN
            with pytest.raises(FormatError, match="'w' holds NaN"):
                native.load_weight(changed(tensor, block * format.block_bytes, value, "<u4"), "w")


@backends
def test_a_broken_scale_of_any_row_is_refused(backend: str) -> None:
    native = get_backend(backend)
    tensor = random_weight(np.random.default_rng(0), (37, 64), "INT8_ROW")
    native.load_weight(tensor, "w")
    for row in (0, 15, 16, 36):
        with pytest.raises(FormatError, match="'w' holds NaN"):
            native.load_weight(changed(tensor, row * 68, 0x7FC00000, "<u4"), "w")


@backends
@pytest.mark.parametrize("format", BROKEN)
def test_a_broken_number_anywhere_in_a_plain_matrix_is_refused(backend: str, format: str) -> None:
    native = get_backend(backend)
    tensor = random_weight(np.random.default_rng(0), (37, 71), format)
    native.load_weight(tensor, "w")
    size = 4 if format == "F32" else 2
    for index in (0, 70, 71 * 16, 37 * 71 - 1):
        with pytest.raises(FormatError, match="'w' holds NaN"):
            native.load_weight(changed(tensor, index * size, BROKEN[format], f"<u{size}"), "w")
