"""The native backend: weights in tiles, keys and values in float16 or fewer bits, a forward pass
that is captured once and replayed.

A token's results do not depend on the batch, the chunking or the number of threads
(csrc/kernels.h). The kernels are chosen by the CPU's features. A requested instruction set that the
CPU lacks is an error.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ... import _native, host_memory
from ...config import ModelConfig
from ...control_groups import CGROUP_ROOT, group_folders, read_membership
from ...cpu import detect_cpu
from ...errors import ConfigError, UnsupportedError
from ...files import unread
from ...formats import dequantize, get_format, packed_bytes
from ...formats.finite import check_finite
from ...formats.tensor import HostTensor, StoredMatrix, TensorSpec
from ...kv_spec import KVSpec
from ...ops.backend import Forward
from ...ops.kv_dtypes import check_kv_dtype
from .kv_store import KVStore, token_bytes
from .program import CapturedForward
from .step_memory import step_bytes

__all__ = ["ISAS", "NativeBackend", "available_cpus", "choose_isa"]

CHUNK = 16  # tokens that the kernels read at once: a KV block is a whole number of them

# The CPU features that each set of kernels of this build needs, the best set first. "amx" comes
# after "avx512", so it runs only if requested.
ISAS: dict[str, frozenset[str]] = {
    name: frozenset(needs.split()) for name, needs in _native.kernels().items()
}


class NativeBackend:
    """Implements `ops.backend.Backend` over `pellucid._native`."""

    name = "native"
    device = "cpu"
    devices = ("cpu",)
    dtypes = ("float32",)
    kv_dtypes = tuple(_native.kv_types())
    is_batch_invariant = True
    default_max_num_seqs = 256
    default_prefix_caching = True
    block_multiple = CHUNK

    def __init__(self, isa: str | None = None, threads: int | None = None) -> None:
        self.isa = choose_isa(isa)
        self.threads = available_cpus() if threads is None else threads
        if not 1 <= self.threads <= 256:
            raise ConfigError(f"threads is {self.threads}; it must be between 1 and 256")
        self._pool = _native.ThreadPool(self.threads)
        self._memory = _native.WeightMemory()

    def available_memory(self) -> int:
        return host_memory.available_memory()

    def weight_bytes(self, spec: TensorSpec) -> int:
        # the file's packed size; the last tile of 16 rows may be padded
        return packed_bytes(spec)

    def step_bytes(
        self, forward: Forward, num_tokens: int, num_logits: int, context: int
    ) -> dict[str, int]:
        return step_bytes(forward, self.isa, self.threads, num_tokens, num_logits, context)

    def check_model(self, config: ModelConfig) -> None:
        limits = _native.limits()
        rows = {
            "hidden_size": config.hidden_size,
            "intermediate_size": config.intermediate_size,
            "vocab_size": config.vocab_size,
            "num_heads · head_dim": config.num_heads * config.head_dim,
            "num_kv_heads · head_dim": config.num_kv_heads * config.head_dim,
        }
        sizes = [
            ("head_dim", config.head_dim, limits["head_dim"]),
            ("num_kv_heads", config.num_kv_heads, limits["num_kv_heads"]),
            ("max_position_embeddings", config.max_position_embeddings, limits["tokens"]),
            (
                "a sliding window",
                max((w for w in config.windows if w), default=0),
                limits["tokens"],
            ),
            *((name, size, limits["row_width"]) for name, size in rows.items()),
        ]
        for name, size, limit in sizes:
            if size > limit:
                raise UnsupportedError(
                    f"{config.architecture}: {name} is {size}; the native backend computes at "
                    f"most {limit}"
                )

    def load_weight(self, tensor: HostTensor, name: str = "a parameter") -> Any:
        if len(tensor.shape) == 1:
            vector = dequantize(tensor)
            check_finite(name, bool(np.isfinite(vector).all()))
            return _native.Vector(vector.tolist())
        if len(tensor.shape) != 2:
            raise UnsupportedError(
                f"{name} has shape {list(tensor.shape)}; the native backend has vectors and "
                "matrices"
            )
        rows = np.ascontiguousarray(tensor.data).reshape(tensor.shape[0], -1)
        weight = _native.load_weight(
            self._pool,
            self._memory,
            get_format(tensor.format).ggml_type,
            tensor.shape[1],
            rows,
            tensor.input_order,
        )
        check_finite(name, weight.finite)
        return weight

    def load_stored(self, matrices: Mapping[str, StoredMatrix]) -> dict[str, _native.Weight]:
        places = []
        for m in matrices.values():
            outputs, inputs = m.spec.shape
            ggml_type = get_format(m.spec.format).ggml_type
            places.append(
                (ggml_type, outputs, inputs, m.file.fileno(), m.offset, m.interleaved_heads)
            )
        weights, failure = _native.load_stored_weights(self._pool, self._memory, places)
        if failure is not None:
            index, offset, errno = failure
            matrix = list(matrices.values())[index]
            error = OSError(errno, os.strerror(errno)) if errno else None
            raise unread(matrix.file, offset, matrix.what, error) from error
        for name, weight in zip(matrices, weights, strict=True):
            check_finite(name, weight.finite)
        return dict(zip(matrices, weights, strict=True))

    def kv_token_bytes(self, spec: KVSpec) -> int:
        if spec.k_dim != spec.v_dim:
            raise ConfigError(
                f"keys have {spec.k_dim} numbers per head and values {spec.v_dim}; the native "
                "backend keeps both of one width"
            )
        check_kv_dtype(spec.k_dtype, self.kv_dtypes, spec.k_dim)
        check_kv_dtype(spec.v_dtype, self.kv_dtypes, spec.v_dim)
        return token_bytes(spec)

    def new_kv_store(self, num_blocks: int, block_size: int, spec: KVSpec) -> KVStore:
        if block_size % CHUNK:
            raise ConfigError(
                f"block_size is {block_size}; the native backend needs a multiple of {CHUNK}"
            )
        self.kv_token_bytes(spec)  # raises ConfigError if it cannot be stored
        slots = _native.limits()["slots"]
        if num_blocks * block_size > slots:
            raise ConfigError(
                f"a KV cache of {num_blocks} blocks of {block_size} tokens is too large; the "
                f"native backend numbers at most {slots} tokens"
            )
        chunks, heads = block_size // CHUNK, spec.num_kv_heads
        store = _native.new_kv_store(
            num_blocks, heads, spec.k_dim, chunks, spec.k_dtype, spec.v_dtype
        )
        return KVStore(spec, store)

    def copy_blocks(self, store: KVStore, pairs: Sequence[tuple[int, int]]) -> None:
        store.copy(pairs)

    def save_blocks(self, store: KVStore, blocks: Sequence[int]) -> NDArray[np.uint8]:
        return store.save(blocks)

    def load_blocks(self, store: KVStore, blocks: Sequence[int], saved: NDArray[np.uint8]) -> None:
        store.load(blocks, saved)

    def build_forward(self, forward: Forward) -> "CapturedForward":
        return CapturedForward(forward, self.isa, self._pool)


def choose_isa(asked: str | None) -> str:
    """The kernels to run: the requested ones, or the best that this CPU can run. Raises ConfigError
    if it cannot run the requested ones.
    """
    cpu = detect_cpu()
    usable = [name for name, needs in ISAS.items() if needs <= set(cpu.features)]
    if asked is None:
        return usable[0]
    if asked not in usable:
        raise ConfigError(f"isa is {asked!r}; on {cpu} it must be one of: {', '.join(usable)}")
    return asked


def available_cpus() -> int:
    """CPUs that this process may use: its affinity, within the quotas of its control groups."""
    try:
        cpus = len(os.sched_getaffinity(0))
    except AttributeError:  # not Linux
        cpus = os.cpu_count() or 1
    return max(1, min([cpus, *_quotas(CGROUP_ROOT, read_membership())]))


def _quotas(root: Path, membership: str) -> Iterator[int]:
    """The CPU quotas, in whole CPUs, of this process's control groups and those above them."""
    for folder, version in group_folders("cpu", root, membership):
        files = ["cpu.max"] if version == 2 else ["cpu.cfs_quota_us", "cpu.cfs_period_us"]
        try:
            quota, period = " ".join((folder / file).read_text() for file in files).split()
        except (OSError, ValueError):  # no such controller here
            continue
        if quota not in ("max", "-1"):
            yield int(quota) // int(period)
