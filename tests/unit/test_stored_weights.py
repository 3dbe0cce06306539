"""Weights that the native backend reads from a file by itself. A file that is cut short, a disk
that fails and a damaged number are one error each.
"""

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from pellucid.backends.native.backend import NativeBackend
from pellucid.batch import AttentionMetadata, ForwardBatch
from pellucid.errors import FormatError
from pellucid.formats import dequantize, quantize
from pellucid.formats.tensor import HostTensor, StoredMatrix
from pellucid.ops.protocol import Ops, Tensor
from pellucid.weights.folds import InterleavedToHalfSplit

ROWS, COLUMNS = 8 * 36, 1024  # several pieces for each thread, and a last tile that is half full


def random_matrix(format: str) -> HostTensor:
    rows = np.random.default_rng(5).normal(size=(ROWS, COLUMNS)).astype(np.float32)
    return quantize(rows, format)


def write(path: Path, tensor: HostTensor) -> Path:
    path.write_bytes(b"header" + tensor.data.tobytes())
    return path


def rows_of(backend: NativeBackend, weight: Tensor) -> NDArray[np.float32]:
    """All rows of a loaded matrix, as an embedding gives them."""

    def forward(ops: Ops, batch: ForwardBatch) -> Tensor:
        return ops.take_rows(ops.embedding(weight, batch.input_ids), batch.logits_indices)

    ids = np.arange(ROWS, dtype=np.int32)
    metadata = AttentionMetadata(
        cu_seqlens_q=np.array([0, ROWS], np.int32),
        seq_lens=np.array([ROWS], np.int32),
        block_tables=np.zeros((1, 1, 1), np.int32),
        slot_mapping=np.zeros((1, ROWS), np.int32),
        block_size=16,
    )
    return backend.build_forward(forward)(ForwardBatch(ids, ids, ids, ids[:0], metadata)).to_host()


@pytest.mark.parametrize("heads", [0, 8])
@pytest.mark.parametrize("format", ["F32", "F16", "BF16", "Q4_1", "Q8_0"])
def test_a_stored_matrix_is_loaded_as_its_bytes_are(
    format: str, heads: int, tmp_path: Path
) -> None:
    tensor = random_matrix(format)
    backend = NativeBackend(threads=2)
    with write(tmp_path / "file", tensor).open("rb") as file:
        stored = {"w": StoredMatrix(tensor.spec, file, len(b"header"), "tensor 'w'", heads)}
        weight = backend.load_stored(stored)["w"]
    expected = InterleavedToHalfSplit(heads)(tensor) if heads else tensor
    assert (rows_of(backend, weight) == dequantize(expected)).all()


def test_a_file_that_is_cut_short_and_a_disk_that_fails_are_errors(tmp_path: Path) -> None:
    tensor = random_matrix("Q8_0")
    path = write(tmp_path / "file", tensor)
    backend = NativeBackend(threads=2)
    with path.open("r+b") as file:
        file.truncate(100_000)
        with pytest.raises(FormatError, match=r"tensor 'w', at offset \d+, is missing: the file "):
            backend.load_stored({"w": StoredMatrix(tensor.spec, file, 6, "tensor 'w'")})
    with path.open("ab") as file, pytest.raises(FormatError, match="cannot be read: Bad file desc"):
        backend.load_stored({"w": StoredMatrix(tensor.spec, file, 6, "tensor 'w'")})


def test_a_damaged_number_is_told_with_the_name_of_its_parameter(tmp_path: Path) -> None:
    tensor = random_matrix("F32")
    values = dequantize(tensor)
    values[ROWS - 1, COLUMNS - 1] = np.nan
    path = tmp_path / "file"
    path.write_bytes(values.tobytes())
    with path.open("rb") as file, pytest.raises(FormatError, match=r"'layers\.0\.w' holds NaN"):
        stored = StoredMatrix(tensor.spec, file, 0, "tensor 'w'")
        NativeBackend(threads=2).load_stored({"layers.0.w": stored})
