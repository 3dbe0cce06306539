"""Types of the compiled module; its source is csrc/bindings.cpp and csrc/bindings_native.cpp."""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

# op, inputs, output, weight, vectors, cache, barrier, attributes: csrc/ops.inc
Entry = tuple[
    str,
    Sequence[int],
    int,
    Weight | None,
    Sequence[Vector],
    KVStore | None,
    bool,
    Mapping[str, int | float | tuple[float, ...]],
]

def cpu_architecture() -> str: ...
def cpu_name() -> str: ...
def cpu_features() -> dict[str, bool]: ...
def kernels() -> dict[str, str]: ...
def ops() -> dict[str, tuple[str, list[str]]]: ...
def kv_types() -> list[str]: ...
def kv_head_bytes(type: str, head_dim: int) -> int: ...
def linear_scratch_bytes(inputs: int) -> int: ...
def attention_scratch_bytes(isa: str, kv_heads: int, head_dim: int) -> int: ...
def attention_partials_bytes(
    isa: str, threads: int, heads: int, head_dim: int, tokens: int, context: int
) -> int: ...
def limits() -> dict[str, int]: ...

class ThreadPool:
    def __init__(self, threads: int) -> None: ...
    @property
    def size(self) -> int: ...

class ReadBuffer:
    def __init__(self, pool: ThreadPool, bytes: int) -> None: ...
    def read(self, isa: str, pool: ThreadPool, bytes: int, seconds: float) -> float: ...

class WeightMemory:
    def __init__(self) -> None: ...

class Weight:
    @property
    def outputs(self) -> int: ...
    @property
    def inputs(self) -> int: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def ggml_type(self) -> int: ...
    @property
    def quantized(self) -> bool: ...
    @property
    def order(self) -> bytes: ...
    @property
    def finite(self) -> bool: ...

class Vector:
    def __init__(self, values: list[float]) -> None: ...
    @property
    def size(self) -> int: ...

class KVStore:
    def block_bytes(self) -> list[NDArray[np.uint8]]: ...

class Program:
    def run(
        self,
        input_ids: NDArray[np.int32],
        positions: NDArray[np.int32],
        logits_indices: NDArray[np.int32],
        hidden_indices: NDArray[np.int32],
        cu_seqlens_q: NDArray[np.int32],
        seq_lens: NDArray[np.int32],
        block_tables: NDArray[np.int32],
        slot_mapping: NDArray[np.int32],
        out: NDArray[np.float32],
        hidden: NDArray[np.float32] | None = None,
        seconds: NDArray[np.float32] | None = None,
    ) -> None: ...
    @property
    def size(self) -> int: ...

def load_weight(
    pool: ThreadPool,
    memory: WeightMemory,
    ggml_type: int,
    inputs: int,
    rows: NDArray[np.uint8],
    order: NDArray[np.int32] | None = None,
) -> Weight: ...

# a matrix: ggml's number of its format, outputs, inputs, file descriptor, offset, interleaved heads
# the second result: which matrix could not be read, at which offset, and errno (0: the file ends)
def load_stored_weights(
    pool: ThreadPool, memory: WeightMemory, matrices: Sequence[tuple[int, int, int, int, int, int]]
) -> tuple[list[Weight], tuple[int, int, int] | None]: ...
def encoders() -> list[str]: ...

# False: a value or a scale is beyond what the format holds
def encode(
    pool: ThreadPool,
    isa: str,
    ggml_type: int,
    values: NDArray[np.float32],
    importance: NDArray[np.float32] | None,
    out: NDArray[np.uint8],
) -> bool: ...
def new_kv_store(
    num_blocks: int, kv_heads: int, head_dim: int, chunks_per_block: int, k_type: str, v_type: str
) -> KVStore: ...
def new_program(
    isa: str,
    pool: ThreadPool,
    buffers: list[tuple[int, int, bool, int]],
    bytes_per_token: int,
    output: int,
    hidden: int,
    entries: Sequence[Entry],
) -> Program: ...
def measure_barrier(pool: ThreadPool, stages: int) -> float: ...
def measure_int8_peak(isa: str, pool: ThreadPool, seconds: float) -> float: ...
def measure_float_peak(isa: str, pool: ThreadPool, seconds: float) -> float: ...
