"""Every block format against the `gguf` package, bit for bit, and whole tensors encoded, decoded
and refused.
"""

import tracemalloc
from typing import Any

import gguf
import numpy as np
import pytest
from numpy.typing import NDArray

from pellucid.errors import FormatError, UnsupportedError
from pellucid.formats import (
    FORMATS,
    HostTensor,
    dequantize,
    encode_dense,
    format_of_ggml_type,
    get_format,
    host_tensor,
    quantize,
    row_bytes,
)

DENSE = ("F32", "F16", "BF16")
BLOCKS_OF_32 = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")
WRITABLE = DENSE + BLOCKS_OF_32
# Where the float16 scales lie in a block.
SCALES_AT = {
    "Q4_0": (0,),
    "Q4_1": (0, 2),
    "Q5_0": (0,),
    "Q5_1": (0, 2),
    "Q8_0": (0,),
    "IQ4_NL": (0,),
    "IQ4_XS": (0,),
}
SCALES_AT |= {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}
# Float16 bits: zeros, the smallest and largest subnormals, the smallest and largest normals, one,
# of both signs.
EXTREME_SCALES = np.array(
    [
        0x0000,
        0x8000,
        0x0001,
        0x8001,
        0x03FF,
        0x83FF,
        0x0400,
        0x8400,
        0x7BFF,
        0xFBFF,
        0x3C00,
        0xBC00,
    ],
    np.uint16,
)


def oracle_dequantize(data: NDArray[np.uint8], name: str) -> NDArray[np.float32]:
    """The `gguf` package's values for rows of bytes."""
    with np.errstate(all="ignore"):
        return np.asarray(gguf.quants.dequantize(data, gguf.GGMLQuantizationType[name]), np.float32)


def oracle_quantize(values: NDArray[np.float32], name: str) -> NDArray[np.uint8]:
    """The `gguf` package's bytes for rows of values."""
    with np.errstate(all="ignore"):
        return np.asarray(gguf.quants.quantize(values, gguf.GGMLQuantizationType[name])).view(
            np.uint8
        )


def random_rows(name: str, rows: int, blocks: int, seed: int = 0) -> NDArray[np.uint8]:
    """Rows of random codes under finite scales, extreme ones among them. uint8 [rows, blocks ·
    B]
    """
    rng = np.random.default_rng(seed)
    data = rng.integers(0, 256, (rows * blocks, FORMATS[name].block_bytes), dtype=np.uint8)
    for at in SCALES_AT.get(name, ()):
        ordinary = rng.uniform(-2, 2, rows * blocks).astype(np.float16).view(np.uint16)
        scales = np.where(
            rng.random(rows * blocks) < 0.3, rng.choice(EXTREME_SCALES, rows * blocks), ordinary
        )
        data[:, at : at + 2] = scales.astype("<u2").view(np.uint8).reshape(-1, 2)
    return data.reshape(rows, -1)


def hard_values(name: str) -> NDArray[np.float32]:
    """Blocks that rounding may go wrong on, float32 [n, 32]: constants, single spikes, ties, and
    random ones over thirty binades.
    """
    rng = np.random.default_rng(1)
    spikes = np.zeros((64, 32), np.float32)
    spikes[np.arange(64), np.arange(64) % 32] = np.where(np.arange(64) < 32, 3.0, -3.0)
    constants = np.repeat(
        np.array([[0.0], [-0.0], [1.0], [-1.0], [1e-7], [-6e4], [1e-30], [-1e-40]], np.float32),
        32,
        axis=1,
    )
    # many of these lie half-way between two codes
    grid = rng.integers(-16, 17, (200, 32)).astype(np.float32) / 2
    ramps = np.linspace(-1, 1, 32, dtype=np.float32) * np.array(
        [[1.0], [127.0], [15.0], [-31.0], [1e-4]], np.float32
    )
    wild = rng.standard_normal((2000, 32)) * np.exp2(rng.uniform(-20, 12, (2000, 1)))
    offset = rng.standard_normal((200, 32)) * 0.01 + 5
    values = np.concatenate([spikes, constants, grid, ramps, wild, offset]).astype(np.float32)
    return values.clip(-65504, 65504) if name == "F16" else values


def bits(values: NDArray[np.float32]) -> NDArray[np.uint32]:
    """What is compared: -0 is not 0, and a NaN equals itself."""
    return np.where(np.isnan(values), np.uint32(0x7FC00000), values.view(np.uint32))


@pytest.mark.parametrize("number", [1000, 1002, 1059, 1100])
def test_numbers_of_our_own_are_no_ggml_types(number: int) -> None:
    """A GGUF file with such a type is refused."""
    with pytest.raises(UnsupportedError, match=f"ggml type {number} cannot be read"):
        format_of_ggml_type(number)


@pytest.mark.parametrize("name", FORMATS)
def test_sizes_and_numbers_are_ggmls(name: str) -> None:
    kind = gguf.GGMLQuantizationType[name]
    assert (FORMATS[name].block_size, FORMATS[name].block_bytes) == gguf.GGML_QUANT_SIZES[kind]
    assert FORMATS[name].ggml_type == int(kind)
    assert format_of_ggml_type(int(kind)) is get_format(name) is FORMATS[name]


@pytest.mark.parametrize("name", FORMATS)
def test_decoding_equals_gguf_bit_for_bit(name: str) -> None:
    rows, blocks = 60, 20
    data = random_rows(name, rows, blocks)
    values = dequantize(HostTensor(name, (rows, blocks * FORMATS[name].block_size), data))
    assert values.dtype == np.float32 and values.flags.owndata | values.flags.writeable
    np.testing.assert_array_equal(bits(values), bits(oracle_dequantize(data, name)))


@pytest.mark.parametrize("name", SCALES_AT)
def test_damaged_scales_decode_to_infinities_and_nans(name: str) -> None:
    data = random_rows(name, 1, 2)
    first = SCALES_AT[name][0]
    data[0, first : first + 2] = (0x00, 0x7C)  # infinity
    # a signalling NaN
    data[0, FORMATS[name].block_bytes + first : FORMATS[name].block_bytes + first + 2] = (
        0x01,
        0xFC,
    )
    values = dequantize(HostTensor(name, (2 * FORMATS[name].block_size,), data))
    np.testing.assert_array_equal(np.isnan(values), np.isnan(oracle_dequantize(data, name)[0]))
    assert not np.isfinite(values).any()


@pytest.mark.parametrize("name", WRITABLE)
def test_encoding_equals_gguf_bit_for_bit(name: str) -> None:
    values = hard_values(name)
    if name in BLOCKS_OF_32:
        values += np.float32(0)  # a scale may be 0 or -0 after -0: test_encoders.py says which
    # 1/d is infinite: gguf's result is undefined there
    tiny = (np.abs(values).max(axis=1) < 1e-37) & (np.abs(values).max(axis=1) > 0)
    np.testing.assert_array_equal(
        quantize(values, name).data[~tiny], oracle_quantize(values, name)[~tiny]
    )


@pytest.mark.parametrize("name", WRITABLE)
def test_what_is_encoded_decodes_to_nearby_values(name: str) -> None:
    values = hard_values(name)
    error = np.abs(dequantize(quantize(values, name)) - values)
    span, largest = np.ptp(values, axis=1, keepdims=True), np.abs(values).max(axis=1, keepdims=True)
    step = {"F32": 0, "F16": largest * 2**-10, "BF16": largest * 2**-7, "Q8_0": largest / 127}.get(
        name
    )
    if step is None:
        step = (
            span / {"Q4_1": 15, "Q5_1": 31}[name]
            if name.endswith("_1")
            else largest / {"Q4_0": 8, "Q5_0": 16}[name]
        )
    # the symmetric grids of even size lack one end
    worst = step if name in ("Q4_0", "Q5_0") else step / 2
    # and scales are rounded to float16
    assert (error <= worst * 1.01 + largest * 2**-9 + 2**-18).all()


@pytest.mark.parametrize("name", BLOCKS_OF_32)
def test_blocks_too_small_for_their_scale_become_zeros(name: str) -> None:
    tiny = np.full((4, 32), 1e-42, np.float32) * np.array([[1], [-1], [0], [100]], np.float32)
    assert not dequantize(quantize(tiny, name)).any()


@pytest.mark.parametrize("name", BLOCKS_OF_32)
@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan, 3e38, -3e38])
def test_values_that_a_format_cannot_hold_are_refused(name: str, bad: float) -> None:
    values = np.zeros((2, 32), np.float32)
    values[1, 7] = bad
    with pytest.raises(FormatError, match=f"{name} cannot hold"):
        quantize(values, name)


def test_a_finite_value_beyond_f16_is_refused_and_infinities_pass() -> None:
    with pytest.raises(FormatError, match="F16 cannot hold the value 70000"):
        quantize(np.array([1, 70_000], np.float32), "F16")
    special = np.array([np.inf, -np.inf, np.nan, 65504], np.float32)
    np.testing.assert_array_equal(dequantize(quantize(special, "F16")), special)
    np.testing.assert_array_equal(dequantize(quantize(special[:3], "BF16")), special[:3])


def test_bf16_rounds_to_even_and_keeps_nans() -> None:
    patterns = np.array(
        [
            0x3F808000,
            0x3F818000,
            0x3F808001,
            0x7F7FFFFF,
            0x7F800001,
            0xFFFFFFFF,
            0x00000001,
            0x80007FFF,
        ],
        np.uint32,
    )
    expected = np.array([0x3F80, 0x3F82, 0x3F81, 0x7F80, 0x7FC0, 0xFFFF, 0x0000, 0x8000], np.uint16)
    np.testing.assert_array_equal(
        quantize(patterns.view(np.float32), "BF16").data.view(np.uint16)[0], expected
    )


@pytest.mark.parametrize("dtype", [np.float64, np.float16, np.int32])
def test_other_dtypes_are_encoded_as_their_float32_values(dtype: Any) -> None:
    values = np.random.default_rng(3).integers(-50, 50, (3, 64)).astype(dtype)
    assert (
        quantize(values, "Q8_0").data.tobytes()
        == quantize(values.astype(np.float32), "Q8_0").data.tobytes()
    )


def test_dense_arrays_are_kept_as_they_are() -> None:
    values = np.random.default_rng(4).standard_normal((5, 7)).astype(np.float32)
    for array, name in (
        (values, "F32"),
        (values.astype(np.float16), "F16"),
        (values.view(np.uint16)[:, ::2], "BF16"),
    ):
        tensor = encode_dense(array)
        assert (tensor.format, tensor.shape) == (name, array.shape)
        assert tensor.data.tobytes() == array.tobytes()
    np.testing.assert_array_equal(dequantize(encode_dense(values)), values)
    np.testing.assert_array_equal(dequantize(encode_dense(values.T)), values.T)
    np.testing.assert_array_equal(dequantize(encode_dense(values.astype(">f4"))), values)
    with pytest.raises(UnsupportedError, match="an array of float64"):
        encode_dense(values.astype(np.float64))


@pytest.mark.parametrize("name", FORMATS)
def test_rows_may_be_permuted_and_split_as_bytes(name: str) -> None:
    columns = 4 * FORMATS[name].block_size
    tensor = HostTensor(name, (10, columns), random_rows(name, 10, 4))
    values = dequantize(tensor)
    order = np.random.default_rng(5).permutation(10)
    np.testing.assert_array_equal(
        dequantize(HostTensor(name, (10, columns), tensor.data[order])), values[order]
    )
    np.testing.assert_array_equal(
        dequantize(HostTensor(name, (3, columns), tensor.data[4:7])), values[4:7]
    )
    # a split of columns at a block border
    half = HostTensor(name, (10, columns // 2), tensor.data[:, tensor.data.shape[1] // 2 :])
    np.testing.assert_array_equal(dequantize(half), values[:, columns // 2 :])


@pytest.mark.parametrize("name", ["F16", "Q5_0", "Q6_K"])
def test_a_tensor_of_many_slices_is_decoded_whole_in_little_memory(name: str) -> None:
    shape = (3, 700, 1024)  # four slices and a rest
    data = random_rows(name, 3 * 700, 1024 // FORMATS[name].block_size)
    tracemalloc.start()
    try:
        values = dequantize(HostTensor(name, shape, data))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert values.shape == shape
    assert peak < values.nbytes + (16 << 20)
    np.testing.assert_array_equal(bits(values), bits(oracle_dequantize(data, name).reshape(shape)))


def test_a_tensor_of_many_slices_is_encoded_whole() -> None:
    values = np.random.default_rng(6).standard_normal((1000, 1056)).astype(np.float32)
    np.testing.assert_array_equal(quantize(values, "Q8_0").data, oracle_quantize(values, "Q8_0"))


def test_what_does_not_fit_is_refused_by_name() -> None:
    with pytest.raises(UnsupportedError, match="'Q9_9' is not known; there are F32, F16"):
        get_format("Q9_9")
    with pytest.raises(UnsupportedError, match=r"ggml type 16 \(IQ2_XXS\) cannot be read"):
        format_of_ggml_type(16)
    with pytest.raises(UnsupportedError, match="ggml type 99 cannot be read"):
        format_of_ggml_type(99)
    with pytest.raises(
        FormatError,
        match="a row of 100 values cannot be stored as Q4_K: its blocks hold 256 values",
    ):
        row_bytes("Q4_K", 100)
    with pytest.raises(FormatError, match="a row of 33 values"):
        quantize(np.zeros((2, 33), np.float32), "Q4_0")
    for shape in ((), (0,), (3, 0)):
        with pytest.raises(FormatError, match="no axis may be empty"):
            quantize(np.zeros(shape, np.float32), "F32")
    with pytest.raises(
        FormatError, match=r"a Q8_0 tensor of shape \(2, 32\) takes 68 bytes, not 67"
    ):
        host_tensor("Q8_0", (2, 32), np.zeros(67, np.uint8))
    with pytest.raises(FormatError, match="takes 68 bytes, not 34"):
        dequantize(HostTensor("Q8_0", (2, 32), np.zeros((1, 34), np.uint8)))
