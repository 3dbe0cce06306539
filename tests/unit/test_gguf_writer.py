"""The GGUF writer: what it writes is read back by our reader and by the `gguf` package's, and a
file appears whole or not at all.
"""

import math
from collections.abc import Callable, Iterator
from pathlib import Path

import gguf
import numpy as np
import pytest

from pellucid.errors import ConfigError, FormatError, UnsupportedError
from pellucid.formats import FORMATS, HostTensor, encode_dense, host_tensor
from pellucid.weights.gguf import GGUFFile
from pellucid.weights.gguf_writer import Typed, ValueType, write_gguf

from . import gguf_corpus as corpus

METADATA: dict[str, object] = {
    "general.architecture": "llama",
    "a.string": "Größe 猫 🐈\n",
    "a.yes": True,
    "a.no": False,
    "an.unsigned": 4_000_000_000,
    "a.negative": -5,
    "a.large": 1 << 40,
    "a.large.negative": -(1 << 40),
    "a.float": 0.5,
    "a.double": Typed(0.1, ValueType.FLOAT64),
    "a.short": Typed(7, ValueType.UINT16),
    "some.strings": ["a", "", "é"],
    "some.flags": [True, False],
    "some.integers": [1, 2, 3],
    "some.large.integers": [1, 4_000_000_000],
    "some.floats": [0.5, -1.0, math.inf],
    "some.bytes": Typed([1, 255], ValueType.UINT8),
    "nothing": Typed([], ValueType.STRING),
}
PLAIN = {key: value.value if isinstance(value, Typed) else value for key, value in METADATA.items()}


def random_tensors() -> Iterator[tuple[str, HostTensor]]:
    """One tensor of random bytes in each format, of one to four dimensions."""
    rng = np.random.default_rng(0)
    shapes: tuple[tuple[int, ...], ...] = ((1,), (3, 2), (2, 3, 1), (2, 1, 3, 2))
    for i, format in enumerate(FORMATS.values()):
        shape = (*shapes[i % 4][:-1], shapes[i % 4][-1] * format.block_size)
        nbytes = math.prod(shape) // format.block_size * format.block_bytes
        yield (
            f"blk.{i}.{format.name}",
            host_tensor(format.name, shape, rng.integers(0, 256, nbytes, dtype=np.uint8)),
        )


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    tensors = dict(random_tensors())
    write_gguf(tmp_path / "m.gguf", METADATA, iter(tensors.items()))
    with GGUFFile.open(tmp_path / "m.gguf") as file:
        assert file.version == 3
        assert dict(file.metadata) == PLAIN
        assert list(file.tensors) == list(tensors)
        for name, tensor in tensors.items():
            back = file.tensor(name)
            assert (back.format, back.shape) == (tensor.format, tensor.shape)
            np.testing.assert_array_equal(back.data, tensor.data)


def test_the_gguf_package_reads_what_is_written(tmp_path: Path) -> None:
    tensors = dict(random_tensors())
    write_gguf(tmp_path / "m.gguf", METADATA, tensors.items())
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    values = {
        key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")
    }
    assert {**values, "nothing": []} == PLAIN
    types = {key: field.types[-1].name for key, field in reader.fields.items()}
    assert (
        types["a.double"] == "FLOAT64"
        and types["a.short"] == "UINT16"
        and types["some.bytes"] == "UINT8"
    )
    assert types["an.unsigned"] == "UINT32" and types["a.negative"] == "INT32"
    assert types["a.large"] == "UINT64" and types["a.large.negative"] == "INT64"
    assert types["some.integers"] == "INT32" and types["some.large.integers"] == "UINT32"
    assert (
        types["a.float"] == types["some.floats"] == "FLOAT32"
        and types["a.yes"] == types["some.flags"] == "BOOL"
    )
    for found in reader.tensors:
        expected = tensors[found.name]
        assert found.tensor_type.name == expected.format
        assert tuple(found.shape.tolist()[::-1]) == expected.shape
        assert found.data.tobytes() == expected.data.tobytes()


def test_a_file_is_copied_bit_for_bit(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(corpus.SOUND)
    with GGUFFile.open(tmp_path / "m.gguf") as file:
        write_gguf(
            tmp_path / "copy.gguf",
            file.metadata,
            ((name, file.tensor(name)) for name in file.tensors),
        )
    copy = (tmp_path / "copy.gguf").read_bytes()
    assert copy[: len(corpus.SOUND)] == corpus.SOUND and not copy[len(corpus.SOUND) :].strip(b"\0")


def test_a_file_may_be_rewritten_from_its_own_tensors(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    write_gguf(path, METADATA, random_tensors())
    with GGUFFile.open(path) as file:
        write_gguf(
            path,
            {**file.metadata.typed(), "new": 1},
            ((name, file.tensor(name)) for name in list(file.tensors)[::-1]),
        )
    with GGUFFile.open(path) as file:
        assert dict(file.metadata) == {**PLAIN, "new": 1}
        for name, tensor in random_tensors():
            np.testing.assert_array_equal(file.tensor(name).data, tensor.data)


def test_tensors_lie_at_the_alignment_that_the_metadata_names(tmp_path: Path) -> None:
    for alignment, metadata in (
        (32, {}),
        (128, {"general.alignment": 128}),
        (8, {"general.alignment": Typed(8, ValueType.UINT32)}),
    ):
        write_gguf(tmp_path / "m.gguf", metadata, random_tensors())
        with GGUFFile.open(tmp_path / "m.gguf") as file:
            assert math.gcd(*(info.offset for info in file.tensors.values())) == alignment
            for name, tensor in random_tensors():
                np.testing.assert_array_equal(file.tensor(name).data, tensor.data)


def test_rows_taken_out_of_a_tensor_are_written_as_they_are(tmp_path: Path) -> None:
    tensor = encode_dense(np.arange(40, dtype=np.float32).reshape(5, 8))
    columns = HostTensor("F32", (5, 4), tensor.data[:, 16:])
    write_gguf(tmp_path / "m.gguf", {}, [("columns", columns)])
    with GGUFFile.open(tmp_path / "m.gguf") as file:
        np.testing.assert_array_equal(file.tensor("columns").data, columns.data)


def test_a_failure_leaves_the_old_file_and_no_scraps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "m.gguf"
    write_gguf(path, {"old": True}, [])
    before = path.read_bytes()

    def full_disk(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(ConfigError, match=r"m\.gguf cannot be written: No space left on device"):
        write_gguf(path, METADATA, random_tensors())
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"m\.gguf cannot be written: No such file or directory"):
        write_gguf(tmp_path / "absent" / "m.gguf", {}, [])


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (None, "holds NoneType"),
        (b"bytes", "holds bytes"),
        ([], "holds nothing"),
        ([1, "a"], "holds int, str"),
        ([1, True], "holds bool, int"),
        ([[1]], "holds list"),
        (np.float32(1), "holds float32"),
        (1 << 64, "holds int"),
        (-(1 << 63) - 1, "holds int"),
        ([-1, 1 << 63], "holds int"),
        (1e300, "does not fit FLOAT32"),
        ("\ud800", "cannot be written as UTF-8"),
        (Typed(256, ValueType.UINT8), "does not fit UINT8"),
        (Typed(1, ValueType.BOOL), "holds 1, which cannot be written as BOOL"),
        (Typed(True, ValueType.INT32), "holds True, which cannot be written as INT32"),
        (Typed(0.5, ValueType.INT32), "holds 0.5, which cannot be written as INT32"),
        (Typed(["a", 1], ValueType.STRING), "holds 1; it must be a string"),
        (Typed([1], ValueType.ARRAY), "given the type ARRAY"),
    ],
)
def test_values_that_cannot_be_written_are_refused(
    tmp_path: Path, value: object, says: str
) -> None:
    with pytest.raises(ConfigError, match="metadata 'k'") as caught:
        write_gguf(tmp_path / "m.gguf", {"k": value}, [])
    assert says in str(caught.value) and not list(tmp_path.iterdir())


ONE = encode_dense(np.ones((2, 2), np.float32))


@pytest.mark.parametrize(
    ("write", "error", "says"),
    [
        (
            lambda path: write_gguf(path, {"": 1}, []),
            ConfigError,
            "a metadata key is '', of 0 bytes",
        ),
        (lambda path: write_gguf(path, {"k" * 65_536: 1}, []), ConfigError, "of 65536 bytes"),
        (lambda path: write_gguf(path, {}, [("", ONE)]), ConfigError, "a tensor's name is ''"),
        (
            lambda path: write_gguf(path, {}, [("n" * 64, ONE)]),
            ConfigError,
            "of 64 bytes; it must be of 1 to 63",
        ),
        (
            lambda path: write_gguf(path, {}, [("n", ONE), ("n", ONE)]),
            ConfigError,
            "'n' is given twice",
        ),
        (
            lambda path: write_gguf(path, {}, [("n", encode_dense(np.ones((1,) * 5, np.float32)))]),
            ConfigError,
            "5 dimensions",
        ),
        (
            lambda path: write_gguf(path, {}, [("n", HostTensor("F32", (3, 2), ONE.data))]),
            FormatError,
            "takes 24 bytes, not 16",
        ),
        (
            lambda path: write_gguf(
                path, {}, [("n", HostTensor("INT4_G32", (1, 32), np.zeros((1, 20), np.uint8)))]
            ),
            UnsupportedError,
            "'n' is INT4_G32; a GGUF file holds F32, F16",
        ),
        (
            lambda path: write_gguf(path, {"general.alignment": 48}, []),
            FormatError,
            "'general.alignment' is 48",
        ),
        (
            lambda path: write_gguf(path, {"general.alignment": "32"}, []),
            ConfigError,
            "'general.alignment' is '32'",
        ),
    ],
)
def test_a_file_that_no_reader_would_take_is_not_written(
    tmp_path: Path, write: Callable[[Path], None], error: type, says: str
) -> None:
    with pytest.raises(error, match=says):
        write(tmp_path / "m.gguf")
    assert not list(tmp_path.iterdir())
