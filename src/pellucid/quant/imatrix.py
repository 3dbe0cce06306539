"""llama.cpp's importance matrix (imatrix): for each weight the sum of the squares of its input, per
column, over a calibration text.

`collect_imatrix` makes one, and files are interchangeable with those of llama-imatrix and
llama-quantize:

    general.type         "imatrix"
    imatrix.datasets     names of the texts
    imatrix.chunk_count  uint32, windows of text
    imatrix.chunk_size   uint32, tokens of a window
    NAME.in_sum2         F32 [matrices, columns], NAME is the weight's name in GGUF files
    NAME.counts          F32 [matrices, 1], tokens that were summed; one matrix but for experts

Reference: tools/imatrix/imatrix.cpp and common/imatrix-loader.cpp of llama.cpp. Its older format
(.dat) is not read.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..errors import FormatError
from ..formats import dequantize, encode_dense
from ..formats.finite import check_activation
from ..weights.checkpoint import Checkpoint
from ..weights.families import gguf_source_of
from ..weights.gguf import GGUFFile
from ..weights.gguf_metadata import Typed, ValueType
from ..weights.gguf_writer import write_gguf
from .calibrate import Floats, Walk, loader

__all__ = ["Entry", "ImportanceMatrix", "collect_imatrix", "read_imatrix", "write_imatrix"]

_SUMS, _COUNTS = ".in_sum2", ".counts"
MAX_COUNT = 1 << 40  # tokens


@dataclass(frozen=True, slots=True)
class Entry:
    """Sums of squares of one weight's input."""

    sums: Floats  # [matrices, columns]
    counts: Floats  # [matrices]

    @property
    def means(self) -> Floats:
        """The mean square of each column, [matrices · columns]; 1 for a matrix without tokens."""
        counts = np.maximum(self.counts, 1)[:, None]
        means = np.where(self.counts[:, None] > 0, self.sums / counts, np.float32(1))
        return means.astype(np.float32).ravel()


@dataclass(frozen=True, slots=True)
class ImportanceMatrix:
    """The entries by name of the weight in GGUF files, and what they were made from."""

    entries: dict[str, Entry]
    datasets: tuple[str, ...]
    chunk_count: int
    chunk_size: int

    def importance(self) -> dict[str, Floats]:
        """How much each column of each weight matters: the mean square of its input."""
        return {name: entry.means for name, entry in self.entries.items()}


def collect_imatrix(
    checkpoint: Checkpoint,
    windows: NDArray[np.int32],
    dataset: str,
    *,
    with_output: bool = False,
    on_layer: Callable[[], object] = lambda: None,
) -> ImportanceMatrix:
    """Run the windows [W, n] through the model. `dataset` names their text. `on_layer` is called
    after each layer.

    `with_output`: also for the weight that makes the logits (output.weight, or token_embd.weight if
    it is tied), as `llama-imatrix --process-output`. Raises FormatError if an activation is NaN or
    infinite.
    """
    walk = Walk(checkpoint.config, loader(checkpoint), windows)
    config, sums = walk.config, dict[str, NDArray[np.float64]]()

    def observe(group: str, x: Floats) -> None:
        squares = np.einsum("ti,ti->i", x, x).astype(np.float64)
        is_finite = bool(np.isfinite(squares).all())
        check_activation(f"{checkpoint.path}: the input of {group}", is_finite)
        sums[group] = sums.get(group, 0) + squares

    for layer in range(config.num_layers):
        walk.run_layer(layer, walk.load_layer(layer), observe)
        on_layer()
    if with_output:
        walk.run_head(observe)
    # an entry for each tensor of a GGUF file that a group's weights come from
    source_of = gguf_source_of(config.architecture)
    counts = np.array([walk.num_tokens], np.float32)
    entries = {}
    for param in walk.params.values():
        if param.group in sums:
            for name in source_of(config, param).tensors:
                entries[name] = Entry(sums[param.group].astype(np.float32)[None], counts)
    return ImportanceMatrix(entries, (dataset,), len(windows), windows.shape[1])


def write_imatrix(path: Path, matrix: ImportanceMatrix) -> None:
    """Write a file for llama-quantize. Raises ConfigError if it cannot be written."""
    metadata = {
        "general.type": "imatrix",
        "imatrix.datasets": Typed(list(matrix.datasets), ValueType.STRING),
        "imatrix.chunk_count": Typed(matrix.chunk_count, ValueType.UINT32),
        "imatrix.chunk_size": Typed(matrix.chunk_size, ValueType.UINT32),
    }
    tensors = []
    for name, entry in sorted(matrix.entries.items()):
        # ggml drops leading dimensions of 1
        flat = entry.sums[0] if len(entry.sums) == 1 else entry.sums
        counts = entry.counts if len(entry.counts) == 1 else entry.counts[:, None]
        tensors += [(name + _SUMS, encode_dense(flat)), (name + _COUNTS, encode_dense(counts))]
    write_gguf(path, metadata, tensors)


def read_imatrix(path: Path) -> ImportanceMatrix:
    """Read a file of llama-imatrix or `write_imatrix`. Raises FormatError if it is none."""
    with GGUFFile.open(path) as file:
        values = file.metadata
        if values.get("general.type") != "imatrix":
            raise FormatError(f"{path} is no importance matrix: its general.type is not 'imatrix'")
        datasets = values.get("imatrix.datasets", [])
        if not isinstance(datasets, list) or not all(isinstance(d, str) for d in datasets):
            raise FormatError(f"{path}: imatrix.datasets is not a list of strings")
        numbers = [
            values.integer(f"imatrix.{key}", 0, (1 << 32) - 1, 0)
            for key in ("chunk_count", "chunk_size")
        ]
        names = [n.removesuffix(_SUMS) for n in file.tensors if n.endswith(_SUMS)]
        if not names:
            raise FormatError(f"{path} is an importance matrix without entries")
        entries = {name: _read_entry(file, name) for name in names}
    return ImportanceMatrix(entries, tuple(datasets), *numbers)


def _read_entry(file: GGUFFile, name: str) -> Entry:
    for suffix in (_SUMS, _COUNTS):
        info = file.tensors.get(name + suffix)
        if info is None or info.format != "F32":
            raise FormatError(f"{file.path}: {name + suffix!r} is missing or not F32")
    sums, counts = (dequantize(file.tensor(name + suffix)) for suffix in (_SUMS, _COUNTS))
    counts = counts.ravel()
    if sums.size % counts.size:
        raise FormatError(
            f"{file.path}: {name!r} has {counts.size} counts for {sums.size} sums of squares"
        )
    for array in (sums, counts):
        if not (np.isfinite(array).all() and array.min() >= 0):
            raise FormatError(f"{file.path}: {name!r} has a negative or non-finite number")
    if counts.max() > MAX_COUNT:
        raise FormatError(f"{file.path}: {name!r} counts {counts.max():g} tokens, which is absurd")
    return Entry(sums.reshape(counts.size, -1), counts)
