"""Tensors and importance of columns for tests of quantizers, the same on every machine: they come
from NumPy's frozen generator through products alone.
"""

import hashlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pellucid.formats import dequantize
from pellucid.weights.gguf import GGUFFile

Floats = NDArray[np.float32]

SYNTHETIC = {"wide": (24, 1024), "narrow": (24, 288)}  # name -> rows, columns
# three tensors of each real model: hidden size to hidden size, the widest, the embedding
REAL_TENSORS = ("blk.0.attn_q.weight", "blk.1.ffn_down.weight", "token_embd.weight")
REAL_MODELS = ("smollm2-135m-instruct-q4_1", "gemma-3-270m-q4_k_m", "qwen2.5-coder-0.5b-q4")
REAL_ROWS = 16
# whole files: every mixture rule that a small model can show
REAL_FILES = (
    *(("smollm2-135m-instruct-q4_1", t) for t in ("q4_k_m", "q5_k_s", "q3_k_m", "iq4_xs", "q2_k")),
    ("gemma-3-270m-q4_k_m", "q4_k_s"),
    ("qwen2.5-coder-0.5b-q4", "q4_k_m"),
)
SEARCHED_IN_32 = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL")
SEARCHED_IN_256 = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS")


def formats_for(columns: int) -> tuple[str, ...]:
    """The formats that can hold rows of so many columns."""
    return SEARCHED_IN_32 if columns % 256 else SEARCHED_IN_32 + SEARCHED_IN_256


def heavy_tailed(rows: int, columns: int, seed: int) -> Floats:
    """Values with the tails of real weights, and rows with the edge cases of a search: zeros, equal
    values, one sign, tiny and large values, values on a coarse grid.
    """
    u = np.random.RandomState(seed).random_sample((5, rows, columns)) - 0.5
    x: Floats = (0.5 * u[0] * u[1] * u[2] / (u[3] * u[3] + 0.01) + 0.02 * u[4]).astype(np.float32)
    x[0, : columns // 2] = 0
    x[1, :64] = 0.5
    x[2] = np.abs(x[2]) + 1
    x[3] = -np.abs(x[3]) - np.float32(0.3)
    x[4] = x[4, 0]
    x[5] *= np.float32(1e-6)
    x[6] = np.round(x[6] * 100) / 100
    x[7] *= np.float32(1e-20)
    x[8] *= np.float32(1e3)
    return x


def zeros_of_both_signs() -> Floats:
    """Rows of 0 and -0, in which either comes first, and of one alone; then beside other values."""
    x = np.zeros((6, 256), np.float32)
    x[1] = -0.0
    x[2, 1::3] = -0.0
    x[3, ::3] = -0.0
    x[4, ::2] = np.arange(128)
    x[4, 1::4] = -0.0
    x[5] = x[4, ::-1]
    return x


def importance_of(columns: int, seed: int) -> Floats:
    """Importance that differs by orders of magnitude, and is 0 for some columns."""
    u = np.random.RandomState(seed).random_sample((2, columns))
    importance: Floats = (u[0] * u[0] * u[0] * u[1] * 10).astype(np.float32)
    importance[::50] = 0
    return importance


def real_rows(path: Path, name: str) -> Floats:
    """The first rows of a tensor, moved off the grid on which the file stores them."""
    with GGUFFile.open(path) as file:
        x = dequantize(file.tensor(name))[:REAL_ROWS]
    u = np.random.RandomState(len(name)).random_sample(x.shape) - 0.5
    moved: Floats = (x + u * (0.1 * np.float64(np.abs(x).max()))).astype(np.float32)
    return moved


def digest(data: NDArray[np.uint8]) -> str:
    return hashlib.sha256(data.tobytes()).hexdigest()[:32]


def map_digest(formats: dict[str, str]) -> str:
    """A hash of the formats of all tensors in their order."""
    lines = "".join(f"{name}={format}\n" for name, format in formats.items())
    return hashlib.sha256(lines.encode()).hexdigest()[:16]
