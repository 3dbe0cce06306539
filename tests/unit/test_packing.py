"""Packed integers of GPTQ, AWQ and compressed-tensors: each bit is where the format's description
says, and unpacking gives back what was packed.
"""

import numpy as np
import pytest
from numpy.typing import NDArray

from pellucid.errors import FormatError
from pellucid.formats.packing import (
    awq_codes,
    awq_stream,
    awq_words,
    codes_of,
    compressed_codes,
    compressed_words,
    gptq_codes,
    gptq_words,
    gptq_zero_words,
    gptq_zeros,
    pack_stream,
    sorted_gptq_stream,
    words_of,
)

BITS = (2, 3, 4, 8)


def random_codes(bits: int, rows: int, columns: int) -> NDArray[np.uint8]:
    return np.random.default_rng(bits).integers(0, 1 << bits, (rows, columns)).astype(np.uint8)


def whole_number(words: NDArray[np.int32]) -> int:
    """The words as one number, the first word lowest."""
    return int.from_bytes(words.astype("<i4").tobytes(), "little")


@pytest.mark.parametrize("bits", BITS)
def test_a_gptq_column_is_one_stream_of_bits(bits: int) -> None:
    codes = random_codes(bits, 5, 96)
    words = gptq_words(codes, bits)
    assert words.shape == (96 * bits // 32, 5) and words.dtype == np.int32
    for row, column in zip(codes, words.T, strict=True):
        expected = sum(int(code) << (bits * i) for i, code in enumerate(row))
        assert whole_number(column) == expected
    assert np.array_equal(gptq_codes(words, bits), codes)


def test_codes_of_three_bits_cross_words() -> None:
    """GPTQ's description: code 10 has two bits at the top of word 0 and one at the bottom of word
    1; code 21 has one bit at the top of word 1 and two at the bottom of word 2.
    """
    codes = np.zeros((1, 32), np.uint8)
    codes[0, 10], codes[0, 21] = 0b111, 0b111
    words = words_of(codes, 3).view(np.uint32)[0]
    assert words.tolist() == [0b11 << 30, 1 | 1 << 31, 0b11]


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("minus_one", [False, True])
def test_gptq_zero_points_lie_along_the_outputs(bits: int, minus_one: bool) -> None:
    zeros = np.maximum(random_codes(bits, 64, 3), 1)
    words = gptq_zero_words(zeros, bits, minus_one=minus_one)
    assert words.shape == (3, 64 * bits // 32)
    for group, row in zip(zeros.T, words, strict=True):
        assert whole_number(row) == sum(
            (int(zero) - minus_one) << (bits * i) for i, zero in enumerate(group)
        )
    assert np.array_equal(gptq_zeros(words, bits, minus_one=minus_one), zeros)


def test_symmetric_zero_points_of_four_bits() -> None:
    eights = np.full((8, 1), 8, np.uint8)
    assert gptq_zero_words(eights, 4, minus_one=True).tolist() == [[0x77777777]]
    assert gptq_zero_words(eights, 4, minus_one=False).view(np.uint32).tolist() == [[0x88888888]]


def test_a_stored_largest_zero_point_minus_one_is_zero() -> None:
    stored = np.array([[-1]], np.int32)
    assert not gptq_zeros(stored, 4, minus_one=True).any()
    with pytest.raises(FormatError, match=r"zero point is 0.*gptq_v2"):
        gptq_zero_words(np.zeros((8, 1), np.uint8), 4, minus_one=True)


def test_awq_words_hold_eight_columns_in_awqs_order() -> None:
    codes = random_codes(4, 16, 3)
    words = awq_words(codes).view(np.uint32)
    assert words.shape == (3, 2)
    for k in range(3):
        for word in range(2):
            for place, column in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):
                assert words[k, word] >> (4 * place) & 15 == codes[8 * word + column, k]
    assert np.array_equal(awq_codes(words.view(np.int32)), codes)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("count", [96, 37])
def test_a_row_of_compressed_words_is_one_stream_of_bits(bits: int, count: int) -> None:
    codes = random_codes(bits, 4, count)
    words = compressed_words(codes, bits)
    assert words.shape == (4, -(-count * bits // 32))
    for row, found in zip(codes, words, strict=True):
        assert whole_number(found) == sum(int(code) << (bits * i) for i, code in enumerate(row))
    assert np.array_equal(compressed_codes(words, bits, count), codes)


def test_older_compressed_words_hold_ten_codes_of_three_bits() -> None:
    words = np.array([[0o7654321076, 0o0000000005]], np.uint32).view(np.int32)
    codes = compressed_codes(words, 3, 11, padded=True)
    assert codes.tolist() == [[6, 7, 0, 1, 2, 3, 4, 5, 6, 7, 5]]


def test_codes_that_fill_no_whole_words_are_refused() -> None:
    with pytest.raises(FormatError, match="12 codes of 4 bits do not fill whole words"):
        words_of(np.zeros((1, 12), np.uint8), 4)
    with pytest.raises(FormatError, match="12 codes of 4 bits"):
        awq_words(np.zeros((12, 1), np.uint8))


def test_a_transposed_array_is_packed_as_it_reads() -> None:
    codes = random_codes(4, 32, 32)
    assert np.array_equal(words_of(codes.T, 4), words_of(np.ascontiguousarray(codes.T), 4))
    assert np.array_equal(codes_of(words_of(codes, 4), 4), codes)


@pytest.mark.parametrize(("outputs", "inputs"), [(8, 8), (16, 64), (24, 160), (128, 32)])
def test_words_become_a_stream_without_being_unpacked(outputs: int, inputs: int) -> None:
    rng = np.random.default_rng(outputs + inputs)
    codes = rng.integers(0, 16, (outputs, inputs), np.uint8)
    assert np.array_equal(awq_stream(awq_words(codes)), pack_stream(codes, 4))
    order = rng.permutation(inputs).astype(np.int32)
    sorted_codes = pack_stream(codes[:, order], 4)
    assert np.array_equal(sorted_gptq_stream(gptq_words(codes, 4), order), sorted_codes)
