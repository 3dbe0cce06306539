"""How quantized checkpoints of Hugging Face folders pack small integers into int32 words: the
layouts of GPTQ, AWQ and compressed-tensors. Each has a function that packs and one that unpacks.

Codes are unsigned, uint8 [out, in], each below 2^bits. Zero points are uint8 [out, groups] in the
same range. Words are little-endian int32, and the first code of a word has its lowest bits.
`words_of` and `codes_of` are the plain layout, on which the others are built: a run of codes is one
stream of bits. Codes of 3 bits cross word borders there: 32 codes take 3 words.

    GPTQ                 words along the inputs:  [in · bits / 32, out]; zero points along the
                         outputs: [groups, out · bits / 32]
    AWQ                  words along the outputs: [in, out / 8], 4 bits, columns in AWQ_ORDER
    compressed-tensors   words along the inputs:  [out, ceil(in · bits / 32)]

References: AutoGPTQ `qlinear_cuda.py`, AutoAWQ `gemm.py`, compressed-tensors `pack_quantized`.
"""

import numpy as np
from numpy.typing import NDArray

from ..errors import FormatError

__all__ = [
    "AWQ_ORDER",
    "Codes",
    "Words",
    "awq_codes",
    "awq_stream",
    "awq_words",
    "codes_of",
    "compressed_codes",
    "compressed_width",
    "compressed_words",
    "gptq_codes",
    "gptq_words",
    "gptq_zero_words",
    "gptq_zeros",
    "pack_stream",
    "sorted_gptq_stream",
    "unpack_stream",
    "words_of",
]

Codes = NDArray[np.uint8]
Words = NDArray[np.int32]

# Place i of an AWQ word holds column AWQ_ORDER[i] of its eight.
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def pack_stream(codes: Codes, bits: int) -> NDArray[np.uint8]:
    """[n, m] codes of 2, 3, 4 or 8 bits -> [n, m · bits / 8] bytes: one stream of bits per row, the
    lowest first. m must be a multiple of 8.
    """
    n, m = codes.shape
    if bits == 8:
        return np.ascontiguousarray(codes)
    if bits == 3:  # eight codes are three bytes
        eights = codes.reshape(n, m // 8, 8).astype(np.uint32)
        shifts = np.arange(0, 24, 3, dtype=np.uint32)
        words = np.bitwise_or.reduce(eights << shifts, axis=2).astype("<u4")
        return np.ascontiguousarray(words[..., None].view(np.uint8)[..., :3]).reshape(n, -1)
    packed = np.zeros((n, m * bits // 8), np.uint8)
    for place in range(8 // bits):
        packed |= codes[:, place :: 8 // bits] << np.uint8(place * bits)
    return packed


def unpack_stream(packed: NDArray[np.uint8], bits: int) -> Codes:
    """The inverse of `pack_stream`: [n, b] bytes -> [n, 8 · b / bits] codes."""
    n, size = packed.shape
    if bits == 8:
        return packed.copy()
    if bits == 3:
        words = np.zeros((n, size // 3, 4), np.uint8)
        words[..., :3] = packed.reshape(n, size // 3, 3)
        shifts = np.arange(0, 24, 3, dtype=np.uint32)
        codes = (words.view("<u4") >> shifts) & np.uint32(7)
        return codes.astype(np.uint8).reshape(n, -1)
    unpacked = np.empty((n, size, 8 // bits), np.uint8)
    for place in range(8 // bits):
        np.right_shift(packed, np.uint8(place * bits), out=unpacked[..., place])
    unpacked &= np.uint8((1 << bits) - 1)
    return unpacked.reshape(n, -1)


def words_of(codes: Codes, bits: int) -> Words:
    """[n, m] codes -> [n, m · bits / 32] words."""
    _check_whole(codes.shape[1], bits)
    return pack_stream(codes, bits).view("<i4")


def codes_of(words: Words, bits: int) -> Codes:
    """[n, w] words -> [n, 32 · w / bits] codes."""
    _check_whole(words.shape[1] * 32 // bits, bits)
    little = np.ascontiguousarray(words, "<i4")
    return unpack_stream(little.view(np.uint8).reshape(len(words), -1), bits)


def gptq_words(codes: Codes, bits: int) -> Words:
    """GPTQ's `qweight` [in · bits / 32, out] of codes [out, in]."""
    return np.ascontiguousarray(words_of(codes, bits).T)


def gptq_codes(qweight: Words, bits: int) -> Codes:
    """Codes [out, in] of GPTQ's `qweight`."""
    return codes_of(qweight.T, bits)


def gptq_zero_words(zeros: Codes, bits: int, *, minus_one: bool) -> Words:
    """GPTQ's `qzeros` [groups, out · bits / 32] of zero points [out, groups]. With `minus_one`
    (checkpoint format "gptq", not "gptq_v2") zero - 1 is stored; 0 cannot be.
    """
    if minus_one:
        if not zeros.all():
            raise FormatError(
                "a zero point is 0, which the checkpoint format gptq cannot hold; gptq_v2 can"
            )
        zeros = zeros - np.uint8(1)
    return words_of(np.ascontiguousarray(zeros.T), bits)


def gptq_zeros(qzeros: Words, bits: int, *, minus_one: bool) -> Codes:
    """Zero points [out, groups] of GPTQ's `qzeros`. With `minus_one`, one is added to each, modulo
    2^bits: AutoGPTQ wrote 0 as the largest code.
    """
    zeros = codes_of(qzeros, bits)
    if minus_one:
        zeros = (zeros + np.uint8(1)) & np.uint8((1 << bits) - 1)
    return np.ascontiguousarray(zeros.T)


def awq_words(codes: Codes) -> Words:
    """AWQ's `qweight` [in, out / 8] of codes [out, in], or `qzeros` [groups, out / 8] of zero
    points [out, groups]. 4 bits.
    """
    _check_whole(codes.shape[0], 4)
    columns = codes.T.reshape(codes.shape[1], -1, 8)[:, :, list(AWQ_ORDER)]
    return words_of(columns.reshape(codes.shape[1], -1), 4)


def awq_codes(words: Words) -> Codes:
    """The inverse of `awq_words`."""
    places = codes_of(words, 4).reshape(len(words), -1, 8)
    columns = places[:, :, np.argsort(AWQ_ORDER)].reshape(len(words), -1)
    return np.ascontiguousarray(columns.T)


def awq_stream(words: Words) -> NDArray[np.uint8]:
    """`pack_stream(awq_codes(words), 4)` [out, in / 2], without unpacking: eight inputs by eight
    outputs are transposed at a time, in three steps of exchanges within words (Hacker's Delight,
    7-3). The number of inputs must be a multiple of 8.
    """
    inputs, columns = words.shape
    unsigned = np.ascontiguousarray(words, "<i4").view("<u4")
    rows = [unsigned[i::8].copy() for i in range(8)]  # [in / 8, out / 8], of every eighth input
    for distance, mask in ((4, 0x0000FFFF), (2, 0x00FF00FF), (1, 0x0F0F0F0F)):
        shift, low = np.uint32(4 * distance), np.uint32(mask)
        for i in range(8):
            if i & distance:
                continue
            first, second = rows[i], rows[i + distance]
            swapped = ((first >> shift) ^ second) & low
            second ^= swapped
            swapped <<= shift
            first ^= swapped
    # row p holds, of place p of each word, the codes of eight inputs
    stream = np.empty((columns, 8, inputs // 8), "<u4")
    for place, column in enumerate(AWQ_ORDER):
        stream[:, column] = rows[place].T
    return stream.view(np.uint8).reshape(8 * columns, -1)


def sorted_gptq_stream(qweight: Words, order: NDArray[np.int32]) -> NDArray[np.uint8]:
    """`pack_stream(gptq_codes(qweight, 4)[:, order], 4)` [out, in / 2]. Inputs stay the slow axis
    until they are sorted, so that whole rows are moved.
    """
    words, outputs = qweight.shape
    places = np.ascontiguousarray(qweight, "<i4").view(np.uint8).reshape(words, outputs, 4)
    pairs = np.ascontiguousarray(places.transpose(0, 2, 1)).reshape(4 * words, outputs)
    codes = np.empty((4 * words, 2, outputs), np.uint8)
    np.bitwise_and(pairs, 15, out=codes[:, 0])
    np.right_shift(pairs, 4, out=codes[:, 1])
    codes = codes.reshape(8 * words, outputs)[order].reshape(4 * words, 2, outputs)
    pairs = codes[:, 1] << np.uint8(4)
    pairs |= codes[:, 0]
    places = np.ascontiguousarray(pairs.reshape(words, 4, outputs).transpose(0, 2, 1))
    packed = np.ascontiguousarray(places.view("<u4")[..., 0].T)
    return packed.view(np.uint8).reshape(outputs, -1)


def compressed_words(codes: Codes, bits: int) -> Words:
    """The words [n, ceil(m · bits / 32)] of compressed-tensors. Zero points [out, groups] are
    packed along the outputs: `compressed_words(zeros.T, bits).T`.
    """
    n, m = codes.shape
    padded = np.zeros((n, -(-m // 32) * 32), np.uint8)
    padded[:, :m] = codes
    return np.ascontiguousarray(words_of(padded, bits)[:, : compressed_width(m, bits)])


def compressed_codes(words: Words, bits: int, count: int, *, padded: bool = False) -> Codes:
    """The inverse of `compressed_words`: the first `count` codes of each row. [n, count]

    With `padded`, no code crosses a word border, so a word of 3-bit codes holds 10 of them. Older
    versions of the library wrote such words.
    """
    if padded:
        per = 32 // bits
        shifts = np.arange(per, dtype=np.uint32) * np.uint32(bits)
        unsigned = np.ascontiguousarray(words, "<i4").view("<u4")
        places = (unsigned[..., None] >> shifts) & np.uint32((1 << bits) - 1)
        codes = places.astype(np.uint8).reshape(len(words), -1)
    else:
        n, width = words.shape
        whole = np.zeros((n, -(-count // 32) * bits), "<i4")
        whole[:, :width] = words
        codes = codes_of(whole, bits)
    return np.ascontiguousarray(codes[:, :count])


def compressed_width(count: int, bits: int, *, padded: bool = False) -> int:
    """The words of a row of `count` codes."""
    return -(-count // (32 // bits)) if padded else -(-count * bits // 32)


def _check_whole(count: int, bits: int) -> None:
    """Refuse a run of codes that does not end with a word."""
    if count * bits % 32:
        raise FormatError(f"{count} codes of {bits} bits do not fill whole words of 32 bits")
