"""The ways to choose the codes of a GGUF file: plainly, by importance, or with error feedback.

Each is what `quantize.py` needs of it: the importance of columns for the formats' own search, and
for error feedback an encoder in its place.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ..backends.native.backend import available_cpus
from ..weights.checkpoint import open_checkpoint
from .calibrate import Floats
from .encode import Encoder
from .imatrix import ImportanceMatrix, collect_imatrix
from .quantize import Encode, Plan
from .sequential import SequentialFeedback
from .source import Source

__all__ = ["Method", "MethodName", "feedback_method", "imatrix_method", "measure_importance"]

MethodName = Literal["ef", "imatrix", "rtn"]


@dataclass(frozen=True, slots=True)
class Method:
    """What a calibrated method gives to `plan_quantization` and `write_quantized`."""

    importance: Mapping[str, Floats] | None = None
    windows: NDArray[np.int32] | None = None  # of error feedback
    metadata: Mapping[str, object] | None = None

    @property
    def is_calibrated(self) -> bool:
        return self.importance is not None or self.windows is not None

    def with_more_importance(self, importance: Mapping[str, Floats]) -> "Method":
        """The same with the importance of tensors that had none, such as that of the output; a
        method without calibration stays as it is.
        """
        if not self.is_calibrated:
            return self
        return replace(self, importance={**importance, **(self.importance or {})})

    def encode(self, source: Source, plan: Plan, threads: int | None = None) -> Encode | None:
        """The encoder that replaces the formats' own search, or None. `threads` None: as many as
        this process may use.
        """
        if self.windows is None:
            return None
        return SequentialFeedback(
            source, plan, self.windows, Encoder(threads or available_cpus()).encode
        )


def imatrix_method(matrix: ImportanceMatrix, file: str) -> Method:
    """The formats' own search with this importance. `file` is recorded as llama-quantize does: it
    cuts texts to 127 bytes, and leaves out numbers that are 0.
    """
    texts = {"file": file}
    if matrix.datasets:
        texts["dataset"] = matrix.datasets[0]
    numbers = {"entries_count": len(matrix.entries), "chunks_count": matrix.chunk_count}
    values: dict[str, object] = {
        key: text.encode()[:127].decode(errors="ignore") for key, text in texts.items()
    }
    values |= {key: number for key, number in numbers.items() if number > 0}
    metadata = {f"quantize.imatrix.{key}": value for key, value in values.items()}
    return Method(matrix.importance(), metadata=metadata)


def feedback_method(windows: NDArray[np.int32]) -> Method:
    """Error feedback, calibrated on these windows [W, n]."""
    return Method(windows=windows)


def measure_importance(path: Path, windows: NDArray[np.int32], dataset: str) -> ImportanceMatrix:
    """The importance matrix of the model at `path`."""
    with open_checkpoint(path) as checkpoint:
        return collect_imatrix(checkpoint, windows, dataset)
