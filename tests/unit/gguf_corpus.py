"""GGUF files built by hand, byte for byte: one that is sound, and many that are each broken in one
way.

One idea: a sound file is a list of named pieces, so that it can be cut inside and between every two
of them, and a broken one is the sound one with one claim changed. Nothing here uses the reader or
the writer.
"""

import struct
from dataclasses import dataclass

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)  # value types
GGML_F32, GGML_F16, GGML_Q4_0, GGML_Q4_K = 0, 1, 2, 12
HUGE = (1 << 64) - 1

Piece = tuple[str, bytes]


def u32(number: int) -> bytes:
    """A 32-bit number."""
    return struct.pack("<I", number)


def u64(number: int) -> bytes:
    """A 64-bit number."""
    return struct.pack("<Q", number)


def text(content: bytes) -> bytes:
    """A string: its length, then its bytes."""
    return u64(len(content)) + content


def value(key: bytes, value_type: int, payload: bytes) -> bytes:
    """One entry of the metadata."""
    return text(key) + u32(value_type) + payload


def array(key: bytes, element_type: int, count: int, payload: bytes) -> bytes:
    """One entry that is an array."""
    return value(key, ARRAY, u32(element_type) + u64(count) + payload)


def tensor(name: bytes, dims: tuple[int, ...], ggml_type: int, offset: int) -> bytes:
    """One entry of the table of tensors. Dimensions are in the file's order, the innermost
    first.
    """
    return text(name) + u32(len(dims)) + b"".join(map(u64, dims)) + u32(ggml_type) + u64(offset)


def build(
    values: list[bytes], tensors: list[bytes], data: bytes, *, alignment: int = 32, version: int = 3
) -> bytes:
    """A whole file out of its entries."""
    head = (
        b"GGUF"
        + u32(version)
        + u64(len(tensors))
        + u64(len(values))
        + b"".join(values)
        + b"".join(tensors)
    )
    return head + bytes(-len(head) % alignment) + data


# The sound file: every type of value, and three tensors of which one is quantized.
NUMBERS: tuple[tuple[int, str, float], ...] = (
    *(
        (U8, "B", 200),
        (I8, "b", -100),
        (U16, "H", 60_000),
        (I16, "h", -30_000),
        (U32, "I", 4_000_000_000),
        (I32, "i", -2_000_000_000),
    ),
    *((F32, "f", 0.5), (U64, "Q", 1 << 60), (I64, "q", -(1 << 60)), (F64, "d", 0.1)),
)
VALUES = [
    value(b"general.architecture", STRING, text(b"llama")),
    value(b"general.name", STRING, text("Größe 猫 🐈".encode())),
    value(b"flag", BOOL, b"\1"),
    array(b"flags", BOOL, 3, b"\1\0\1"),
    array(b"tokens", STRING, 4, text(b"a") + text(b"") + text("é".encode()) + text(b"<s>")),
    array(b"nothing", U32, 0, b""),
    *(value(f"scalar.{t}".encode(), t, struct.pack("<" + code, n)) for t, code, n in NUMBERS),
    *(array(f"array.{t}".encode(), t, 2, struct.pack(f"<2{code}", n, 1)) for t, code, n in NUMBERS),
]
TENSORS = [
    tensor(b"norm", (6,), GGML_F32, 0),
    tensor(b"weight", (32, 3), GGML_Q4_0, 32),
    tensor(b"cube", (2, 3, 2), GGML_F16, 96),
]
NORM = struct.pack("<6f", 1, 2, 3, 4, 5, 6)
WEIGHT = bytes(range(54))
CUBE = struct.pack("<12e", *range(12))
DATA = NORM + bytes(8) + WEIGHT + bytes(10) + CUBE
SOUND = build(VALUES, TENSORS, DATA)


def sound_pieces() -> list[Piece]:
    """The sound file as named pieces, each of which is one field of it."""
    pieces = [
        ("magic", b"GGUF"),
        ("version", u32(3)),
        ("tensor count", u64(len(TENSORS))),
        ("value count", u64(len(VALUES))),
    ]
    for entry in VALUES:
        length = struct.unpack_from("<Q", entry)[0]
        key, rest = entry[8 : 8 + length].decode(), entry[8 + length :]
        pieces += [
            (f"key length of {key}", entry[:8]),
            (f"key {key}", entry[8 : 8 + length]),
            (f"type of {key}", rest[:4]),
        ]
        if rest[:4] == u32(ARRAY):
            pieces += [
                (f"element type of {key}", rest[4:8]),
                (f"count of {key}", rest[8:16]),
                (f"elements of {key}", rest[16:]),
            ]
        elif rest[:4] == u32(STRING):
            pieces += [(f"length of {key}", rest[4:12]), (f"value of {key}", rest[12:])]
        else:
            pieces += [(f"value of {key}", rest[4:])]
    for entry in TENSORS:
        length = struct.unpack_from("<Q", entry)[0]
        name, rest = entry[8 : 8 + length].decode(), entry[8 + length :]
        dims = 4 + 8 * struct.unpack_from("<I", rest)[0]
        pieces += [
            (f"name length of {name}", entry[:8]),
            (f"name {name}", entry[8 : 8 + length]),
            (f"dimension count of {name}", rest[:4]),
        ]
        pieces += [
            (f"dimension {i} of {name}", rest[at : at + 8])
            for i, at in enumerate(range(4, dims, 8))
        ]
        pieces += [
            (f"type of {name}", rest[dims : dims + 4]),
            (f"offset of {name}", rest[dims + 4 :]),
        ]
    header = sum(len(content) for _, content in pieces)
    pieces += [
        ("padding", SOUND[header : len(SOUND) - len(DATA)]),
        ("norm", NORM + bytes(8)),
        ("weight", WEIGHT + bytes(10)),
        ("cube", CUBE),
    ]
    assert b"".join(content for _, content in pieces) == SOUND
    return [(name, content) for name, content in pieces if content]


def cut_files() -> dict[str, bytes]:
    """The sound file, ended before each of its pieces and before the last byte of each."""
    cuts: dict[str, bytes] = {}
    position = 0
    for name, content in sound_pieces():
        cuts[f"ends before {name}"] = SOUND[:position]
        position += len(content)
        if len(content) > 1:
            cuts[f"ends inside {name}"] = SOUND[: position - 1]
    return cuts


@dataclass(frozen=True, slots=True)
class Broken:
    """A file that must be refused, and a part of the sentence that must say why."""

    content: bytes
    says: str


def _with_values(*values: bytes) -> bytes:
    return build([*VALUES[:1], *values], TENSORS, DATA)


def _with_tensors(*tensors: bytes, data: bytes = DATA) -> bytes:
    return build(VALUES[:1], list(tensors), data)


def _with_counts(tensors: int, values: int) -> bytes:
    return SOUND[:8] + u64(tensors) + u64(values) + SOUND[24:]


def _nested(levels: int) -> bytes:
    return value(b"nest", ARRAY, (u32(ARRAY) + u64(1)) * levels + u32(U8) + u64(1) + b"\1")


_NAMED = tensor(b"norm", (6,), GGML_F32, 0)

BROKEN: dict[str, Broken] = {
    # The first 24 bytes.
    "a zip file": Broken(b"PK\3\4" + SOUND[4:], "is not a GGUF file"),
    "all zeros": Broken(bytes(4096), "is not a GGUF file"),
    "magic in lower case": Broken(b"gguf" + SOUND[4:], "is not a GGUF file"),
    "version 0": Broken(build(VALUES, TENSORS, DATA, version=0), "GGUF version 0"),
    "version 1": Broken(build(VALUES, TENSORS, DATA, version=1), "GGUF version 1"),
    "version 4": Broken(build(VALUES, TENSORS, DATA, version=4), "GGUF version 4"),
    "version of all ones": Broken(
        build(VALUES, TENSORS, DATA, version=(1 << 32) - 1), "GGUF version 4294967295"
    ),
    "big-endian": Broken(b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
    "tensor count of all ones": Broken(
        _with_counts(HUGE, len(VALUES)), "number of tensors is 18446744073709551615"
    ),
    "tensor count beyond the limit": Broken(
        _with_counts(65_537, len(VALUES)), "must be at most 65536"
    ),
    "tensor count beyond the file": Broken(
        _with_counts(1_000, len(VALUES)), "1000 tensors take at least"
    ),
    "one tensor too many": Broken(_with_counts(len(TENSORS) + 1, len(VALUES)), "tensor 3"),
    "value count of all ones": Broken(
        _with_counts(len(TENSORS), HUGE), "number of metadata values is 18446744073709551615"
    ),
    "value count beyond the file": Broken(
        _with_counts(len(TENSORS), 5_000), "5000 metadata values take at least"
    ),
    "one value too many": Broken(_with_counts(len(TENSORS), len(VALUES) + 1), "name of tensor 0"),
    "one value too few": Broken(_with_counts(len(TENSORS), len(VALUES) - 1), "dimensions"),
    # Keys.
    "empty key": Broken(_with_values(value(b"", U8, b"\1")), "key 1 is 0 bytes long"),
    "key too long": Broken(
        _with_values(value(b"k" * 65_536, U8, b"\1")), "key 1 is 65536 bytes long"
    ),
    "key length of all ones": Broken(
        _with_values(u64(HUGE) + b"k"), "key 1 is 18446744073709551615 bytes long"
    ),
    "key longer than the file": Broken(_with_values(u64(60_000) + b"k"), "key 1 takes 60000 bytes"),
    "key of bad UTF-8": Broken(
        _with_values(value(b"k\xff", U8, b"\1")), "key 1 is not valid UTF-8"
    ),
    "key that is half a surrogate": Broken(
        _with_values(value(b"\xed\xa0\x80", U8, b"\1")), "key 1 is not valid UTF-8"
    ),
    "key twice": Broken(
        _with_values(value(b"k", U8, b"\1"), value(b"k", U8, b"\1")), "'k' occurs twice"
    ),
    # Values.
    "value type 13": Broken(_with_values(value(b"k", 13, b"\1")), "value type 13"),
    "value type of all ones": Broken(
        _with_values(value(b"k", (1 << 32) - 1, b"\1")), "value type 4294967295"
    ),
    "string length of all ones": Broken(
        _with_values(value(b"k", STRING, u64(HUGE) + b"x")), "'k' runs past the end"
    ),
    "string length that wraps to 0": Broken(
        _with_values(value(b"k", STRING, u64(HUGE - 7) + b"x")), "'k' runs past the end"
    ),
    "string longer than the file": Broken(
        _with_values(value(b"k", STRING, u64(100_000) + b"x")), "'k' runs past the end"
    ),
    "string of bad UTF-8": Broken(
        _with_values(value(b"k", STRING, text(b"caf\xe9"))), "'k' is not valid UTF-8"
    ),
    "string of overlong UTF-8": Broken(
        _with_values(value(b"k", STRING, text(b"\xc0\x80"))), "'k' is not valid UTF-8"
    ),
    "a truth value of 2": Broken(
        _with_values(value(b"k", BOOL, b"\2")), "the byte 2 as a truth value"
    ),
    "a truth value of 255 in an array": Broken(
        _with_values(array(b"k", BOOL, 3, b"\0\xff\1")), "the byte 255 as a truth value"
    ),
    # Arrays.
    "array of an unknown type": Broken(_with_values(array(b"k", 13, 1, b"\1")), "value type 13"),
    "array of arrays": Broken(_with_values(_nested(1)), "array of arrays"),
    "array nested a thousand deep": Broken(_with_values(_nested(1_000)), "array of arrays"),
    "array nested for ever": Broken(
        _with_values(array(b"k", ARRAY, HUGE, (u32(ARRAY) + u64(HUGE)) * 99)), "array of arrays"
    ),
    "array count of all ones": Broken(
        _with_values(array(b"k", U32, HUGE, b"")),
        "elements of metadata 'k' is 18446744073709551615",
    ),
    "array whose bytes wrap to 8": Broken(
        _with_values(array(b"k", U64, (1 << 61) + 1, bytes(8))), "elements of metadata 'k' is 23058"
    ),
    "array count beyond the limit": Broken(
        _with_values(array(b"k", U8, (1 << 24) + 1, b"")), "must be at most 1048576"
    ),
    "array count beyond the file": Broken(
        _with_values(array(b"k", F64, 1_000, bytes(80))),
        "1000 elements of metadata 'k' take at least",
    ),
    "array of too many strings": Broken(
        _with_values(array(b"k", STRING, 1_000, text(b"x") * 9)),
        "1000 elements of metadata 'k' take",
    ),
    "array of strings that run out": Broken(
        _with_values(array(b"k", STRING, 40, text(b"x" * 30) * 9)), "'k' runs past the end"
    ),
    "array with a huge string": Broken(
        _with_values(array(b"k", STRING, 2, text(b"x") + u64(HUGE) + b"x")), "'k' runs past the end"
    ),
    "array with a last string too long": Broken(
        _with_values(array(b"k", STRING, 1, u64(10_000) + b"x")), "'k' runs past the end"
    ),
    "array with bad UTF-8": Broken(
        _with_values(array(b"k", STRING, 2, text(b"x") + text(b"\x80"))),
        "'k' element 1 is not valid UTF-8",
    ),
    # Keys that the reader itself obeys.
    "alignment 0": Broken(
        _with_values(value(b"general.alignment", U32, u32(0))), "'general.alignment' is 0"
    ),
    "alignment 4": Broken(
        _with_values(value(b"general.alignment", U32, u32(4))), "'general.alignment' is 4"
    ),
    "alignment 24": Broken(
        _with_values(value(b"general.alignment", U32, u32(24))), "'general.alignment' is 24"
    ),
    "alignment beyond the limit": Broken(
        _with_values(value(b"general.alignment", U32, u32(1 << 17))),
        "'general.alignment' is 131072",
    ),
    "alignment of all ones": Broken(
        _with_values(value(b"general.alignment", U32, u32((1 << 32) - 1))),
        "'general.alignment' is 42949",
    ),
    "negative alignment": Broken(
        _with_values(value(b"general.alignment", I32, struct.pack("<i", -32))),
        "'general.alignment' is -32",
    ),
    "alignment that is a float": Broken(
        _with_values(value(b"general.alignment", F32, struct.pack("<f", 32))), "is 32.0"
    ),
    "alignment that is a string": Broken(
        _with_values(value(b"general.alignment", STRING, text(b"32"))), "is '32'"
    ),
    "alignment that is an array": Broken(
        _with_values(array(b"general.alignment", U32, 1, u32(32))), "is a list of 1"
    ),
    "one of three parts": Broken(
        _with_values(value(b"split.count", U16, b"\3\0")), "one of the 3 parts"
    ),
    "a number of parts that is a string": Broken(
        _with_values(value(b"split.count", STRING, text(b"3"))), "'split.count' is '3'"
    ),
    # The table of tensors.
    "tensor without a name": Broken(
        _with_tensors(tensor(b"", (6,), GGML_F32, 0)), "name of tensor 0 is 0 bytes long"
    ),
    "tensor name too long": Broken(
        _with_tensors(tensor(b"n" * 65, (6,), GGML_F32, 0)), "name of tensor 0 is 65 bytes long"
    ),
    "tensor name length of all ones": Broken(
        _with_tensors(u64(HUGE) + _NAMED[8:]), "name of tensor 0 is 18446744073709551615"
    ),
    "tensor name of bad UTF-8": Broken(
        _with_tensors(tensor(b"n\xfe", (6,), GGML_F32, 0)), "name of tensor 0 is not valid UTF-8"
    ),
    "tensor twice": Broken(
        _with_tensors(_NAMED, tensor(b"norm", (6,), GGML_F32, 32)), "'norm' occurs twice"
    ),
    "no dimensions": Broken(
        _with_tensors(tensor(b"norm", (), GGML_F32, 0)), "'norm' has 0 dimensions"
    ),
    "five dimensions": Broken(
        _with_tensors(tensor(b"norm", (1, 1, 1, 1, 1), GGML_F32, 0)), "'norm' has 5 dimensions"
    ),
    "dimension count of all ones": Broken(
        _with_tensors(text(b"norm") + u32((1 << 32) - 1) + bytes(64)), "'norm' has 4294967295 dim"
    ),
    "a dimension of 0": Broken(
        _with_tensors(tensor(b"norm", (0,), GGML_F32, 0)), "no dimension may be 0"
    ),
    "an outer dimension of 0": Broken(
        _with_tensors(tensor(b"norm", (6, 2, 0), GGML_F32, 0)), "no dimension may be 0"
    ),
    "a dimension of all ones": Broken(
        _with_tensors(tensor(b"norm", (HUGE,), GGML_F32, 0)),
        "'norm' takes 73786976294838206460 bytes",
    ),
    "dimensions whose product wraps to 0": Broken(
        _with_tensors(tensor(b"norm", (1 << 32, 1 << 32), GGML_F32, 0)), "'norm' takes"
    ),
    "dimensions whose product wraps to 6": Broken(
        _with_tensors(tensor(b"norm", (6, (1 << 63) + 1, 2), GGML_F32, 0)), "'norm' takes"
    ),
    "four dimensions of all ones": Broken(
        _with_tensors(tensor(b"norm", (HUGE,) * 4, GGML_F32, 0)), "'norm' takes"
    ),
    "quantized bytes that wrap": Broken(
        _with_tensors(tensor(b"norm", (1 << 60, 1 << 10), GGML_Q4_0, 0)), "'norm' takes"
    ),
    "a row of half a block": Broken(
        _with_tensors(tensor(b"norm", (48,), GGML_Q4_0, 0)), "'norm': a row of 48 values"
    ),
    "a row of an eighth of a super-block": Broken(
        _with_tensors(tensor(b"norm", (32, 8), GGML_Q4_K, 0)), "'norm': a row of 32 values"
    ),
    "a type that was removed": Broken(
        _with_tensors(tensor(b"norm", (6,), 4, 0)), "'norm': ggml type 4 cannot be read"
    ),
    "a type that is not built": Broken(
        _with_tensors(tensor(b"norm", (256,), 16, 0)),
        "'norm': ggml type 16 (IQ2_XXS) cannot be read",
    ),
    "a type of all ones": Broken(
        _with_tensors(tensor(b"norm", (6,), (1 << 32) - 1, 0)),
        "'norm': ggml type 4294967295 cannot be read",
    ),
    # Where tensors lie.
    "a misaligned tensor": Broken(
        _with_tensors(tensor(b"norm", (6,), GGML_F32, 8)), "not a multiple of the alignment, 32"
    ),
    "a tensor aligned for another alignment": Broken(
        build(
            [value(b"general.alignment", U32, u32(64))],
            [tensor(b"norm", (6,), GGML_F32, 32)],
            DATA,
            alignment=64,
        ),
        "not a multiple of the alignment, 64",
    ),
    "an offset of all ones, aligned": Broken(
        _with_tensors(tensor(b"norm", (6,), GGML_F32, HUGE - 31)),
        "'norm' takes 24 bytes at offset 18",
    ),
    "an offset at the end": Broken(
        _with_tensors(tensor(b"norm", (6,), GGML_F32, 128)), "'norm' takes 24 bytes at offset"
    ),
    "a tensor that ends beyond the end": Broken(
        _with_tensors(tensor(b"norm", (31,), GGML_F32, 0)), "'norm' takes 124 bytes at offset"
    ),
    "no tensor bytes": Broken(_with_tensors(_NAMED, data=b""), "'norm' takes 24 bytes at offset"),
    "two tensors at one offset": Broken(
        _with_tensors(_NAMED, tensor(b"twin", (6,), GGML_F32, 0)), "overlap"
    ),
    "two tensors that overlap": Broken(
        _with_tensors(tensor(b"norm", (9,), GGML_F32, 0), tensor(b"other", (6,), GGML_F32, 32)),
        "'norm' and 'other' overlap",
    ),
    "a tensor inside another": Broken(
        _with_tensors(tensor(b"in", (1,), GGML_F32, 64), tensor(b"out", (30,), GGML_F32, 0)),
        "'out' and 'in' overlap",
    ),
}
