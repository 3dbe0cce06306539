"""The GGUF reader: what it makes of sound files, and that it refuses every broken one with one
sentence and little memory.
"""

import math
import os
import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from pellucid.errors import FormatError, PellucidError
from pellucid.formats import dequantize
from pellucid.weights.gguf import GGUFFile
from pellucid.weights.gguf_metadata import Typed, ValueType

from . import gguf_corpus as corpus

CUTS = corpus.cut_files()


def open_bytes(folder: Path, content: bytes) -> GGUFFile:
    """Those bytes as an open file."""
    path = folder / "model.gguf"
    path.write_bytes(content)
    return GGUFFile.open(path)


def read_all(folder: Path, content: bytes) -> None:
    """Open a file and read everything in it."""
    with open_bytes(folder, content) as file:
        for key in file.metadata:
            assert file.metadata[key] is not None
        for name, info in file.tensors.items():
            assert dequantize(file.tensor(name)).shape == info.shape


def test_a_sound_file_gives_every_type_of_value(tmp_path: Path) -> None:
    metadata = open_bytes(tmp_path, corpus.SOUND).metadata
    assert metadata["general.architecture"] == "llama"
    assert metadata["general.name"] == "Größe 猫 🐈"
    assert metadata["flag"] is True
    assert metadata["flags"] == [True, False, True]
    assert metadata["tokens"] == ["a", "", "é", "<s>"]
    assert metadata["nothing"] == []
    for value_type, code, number in corpus.NUMBERS:
        stored = struct.unpack("<" + code, struct.pack("<" + code, number))[0]
        assert metadata[f"scalar.{value_type}"] == stored
        assert metadata[f"array.{value_type}"] == [stored, 1]
        assert metadata.typed()[f"array.{value_type}"] == Typed([stored, 1], ValueType(value_type))


def test_metadata_is_a_mapping(tmp_path: Path) -> None:
    metadata = open_bytes(tmp_path, corpus.SOUND).metadata
    assert len(metadata) == len(list(metadata)) == len(corpus.VALUES)
    assert "tokens" in metadata and "absent" not in metadata
    assert metadata.get("absent", 7) == 7
    assert metadata["tokens"] is metadata["tokens"], "a list is decoded once"
    with pytest.raises(KeyError):
        metadata["absent"]


def test_a_sound_file_gives_its_tensors(tmp_path: Path) -> None:
    file = open_bytes(tmp_path, corpus.SOUND)
    assert file.version == 3
    assert {name: (t.shape, t.format) for name, t in file.tensors.items()} == {
        "norm": ((6,), "F32"),
        "weight": ((3, 32), "Q4_0"),
        "cube": ((2, 3, 2), "F16"),
    }
    weight = file.tensor("weight")
    assert weight.data.shape == (3, 18) and weight.data.tobytes() == corpus.WEIGHT
    assert not weight.data.flags.writeable
    np.testing.assert_array_equal(dequantize(file.tensor("norm")), [1, 2, 3, 4, 5, 6])
    np.testing.assert_array_equal(dequantize(file.tensor("cube")), np.arange(12).reshape(2, 3, 2))
    info = file.tensors["weight"]
    assert corpus.SOUND[info.offset : info.offset + info.nbytes] == corpus.WEIGHT


@pytest.mark.parametrize(
    ("content", "tensors"),
    [
        pytest.param(
            corpus.build(corpus.VALUES, corpus.TENSORS, corpus.DATA, version=2), 3, id="version 2"
        ),
        pytest.param(corpus.build([], [], b""), 0, id="nothing but a header"),
        pytest.param(corpus.build(corpus.VALUES, [], b"")[:-1], 0, id="no tensors, and no padding"),
        pytest.param(
            corpus.build([], corpus.TENSORS, corpus.DATA + bytes(999)),
            3,
            id="more bytes than tensors need",
        ),
        pytest.param(
            corpus.build([], corpus.TENSORS[::-1], corpus.DATA), 3, id="tensors out of order"
        ),
        pytest.param(
            corpus.build([], corpus.TENSORS[::2], corpus.DATA), 2, id="a gap between tensors"
        ),
        pytest.param(
            corpus.build([], [corpus.tensor(b"n" * 64, (1, 1, 1, 30), 0, 0)], corpus.DATA),
            1,
            id="longest name, four dimensions",
        ),
        pytest.param(
            corpus.build(
                [corpus.value(b"k" * 65_535, corpus.U8, b"\1")], corpus.TENSORS, corpus.DATA
            ),
            3,
            id="longest key",
        ),
        pytest.param(
            corpus.build([corpus.value(b"split.count", corpus.U16, b"\1\0")], [], b""),
            0,
            id="the only part",
        ),
        pytest.param(
            corpus.build(
                [corpus.value(b"general.alignment", corpus.U32, corpus.u32(8))],
                corpus.TENSORS,
                corpus.DATA,
                alignment=8,
            ),
            3,
            id="alignment 8",
        ),
    ],
)
def test_unusual_files_are_read(tmp_path: Path, content: bytes, tensors: int) -> None:
    read_all(tmp_path, content)
    assert len(open_bytes(tmp_path, content).tensors) == tensors


def refused(folder: Path, content: bytes) -> str:
    """The sentence with which a file is refused; memory stays bounded meanwhile."""
    tracemalloc.start()
    try:
        with pytest.raises(PellucidError) as caught:
            read_all(folder, content)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 1 << 20, f"{peak} bytes for a file of {len(content)}"
    sentence = str(caught.value)
    assert (
        "model.gguf" in sentence and "\n" not in sentence and len(sentence) < 400 + len(str(folder))
    )
    return sentence


@pytest.mark.parametrize("name", CUTS)
def test_a_file_that_is_cut_short_is_refused(tmp_path: Path, name: str) -> None:
    refused(tmp_path, CUTS[name])


@pytest.mark.parametrize("name", corpus.BROKEN)
def test_a_broken_file_is_refused_and_told_why(tmp_path: Path, name: str) -> None:
    assert corpus.BROKEN[name].says in refused(tmp_path, corpus.BROKEN[name].content)


def test_the_corpus_is_large() -> None:
    assert len(CUTS) > 100 and len(corpus.BROKEN) > 60


def test_a_vocabulary_is_decoded_only_on_access(tmp_path: Path) -> None:
    count = 200_000
    tokens = corpus.array(
        b"tokens",
        corpus.STRING,
        count,
        b"".join(corpus.text(f"token {i}".encode()) for i in range(count)),
    )
    content = corpus.build([tokens], corpus.TENSORS, corpus.DATA)
    tracemalloc.start()
    try:
        file = open_bytes(tmp_path, content)
        # the header's bytes, and not the Python strings, which take ten times as much
        assert tracemalloc.get_traced_memory()[0] < 2 * len(content)
    finally:
        tracemalloc.stop()
    assert file.metadata["tokens"] == [f"token {i}" for i in range(count)]


def test_tensors_and_metadata_outlive_the_file(tmp_path: Path) -> None:
    with open_bytes(tmp_path, corpus.SOUND) as file:
        weight = file.tensor("weight")
    assert weight.data.tobytes() == corpus.WEIGHT
    assert file.metadata["flags"] == [True, False, True]
    with pytest.raises(ValueError, match="closed"):
        file.tensor("norm")


def test_an_unknown_tensor_is_named(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="no tensor 'absent'"):
        open_bytes(tmp_path, corpus.SOUND).tensor("absent")


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="is a folder; it must be a regular file"):
        GGUFFile.open(tmp_path)
    with pytest.raises(FormatError, match=r"absent.gguf cannot be read: No such file"):
        GGUFFile.open(tmp_path / "absent.gguf")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_a_file_that_may_not_be_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "secret.gguf"
    path.write_bytes(corpus.SOUND)
    path.chmod(0)
    with pytest.raises(FormatError, match="cannot be read"):
        GGUFFile.open(path)


def test_numbers_are_read_as_they_are(tmp_path: Path) -> None:
    payload = struct.pack("<3f", math.inf, -math.inf, math.nan)
    floats = open_bytes(
        tmp_path, corpus.build([corpus.array(b"k", corpus.F32, 3, payload)], [], b"")
    ).metadata["k"]
    assert isinstance(floats, list)
    assert floats[:2] == [math.inf, -math.inf] and math.isnan(floats[2])
