"""A model on a backend, driven without the engine: steps of one or many sequences of equal length.

This is what llama-bench and llama-batched-bench time of llama.cpp: logits are computed, no token is
chosen, and no text is made. Each sequence has its own part of the KV cache. Token ids are a fixed
function of position and sequence.
"""

import time
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import numpy as np

from ..backends.native.backend import NativeBackend
from ..backends.native.costs import StepShape, entry_cost
from ..backends.native.program import CapturedForward
from ..backends.registry import get_backend
from ..batch import AttentionMetadata, ForwardBatch
from ..errors import CapacityError, ConfigError
from ..kv.layout import build_layout
from ..kv.storage import KVStorage
from ..kv_spec import build_kv_specs
from ..models.registry import get_graph
from ..ops.backend import Backend
from ..ops.cost import OpCost
from ..ops.kv_dtypes import choose_kv_dtypes
from ..ops.protocol import KVLayer
from ..quant.at_load import quantize_at_load
from ..units import format_bytes
from ..weights.checkpoint import open_checkpoint
from .hardware import Ceilings, Range, highest_peaks
from .kv_formula import KV_ALIASES
from .machine import ReadMeter, measure_ceilings

__all__ = ["BenchModel", "Roof", "backend_label", "file_bytes"]

BLOCK_SIZE = 16


class BenchModel:
    """A loaded model with a cache for `sequences` sequences of `longest` tokens each, in steps of
    at most `chunk` tokens.
    """

    def __init__(
        self,
        path: Path,
        *,
        backend: str = "native",
        options: dict[str, object] | None = None,
        kv_dtype: str = "auto",
        quantization: str | None = None,
        sequences: int = 1,
        longest: int = 4096,
        chunk: int = 512,
    ) -> None:
        """`options` are the backend's own; `quantization` is that of the engine, while a float
        model is loaded. Raises a PellucidError where the model cannot run, and CapacityError where
        it does not fit, before its weights are loaded.
        """
        self.path, self.sequences, self.longest, self.chunk = path, sequences, longest, chunk
        self.backend = get_backend(backend, options)
        with open_checkpoint(path) as stored:
            # What can be refused before anything is loaded.
            checkpoint = stored if quantization is None else quantize_at_load(stored, quantization)
            self.config = checkpoint.config
            self.backend.check_model(self.config)
            limit = self.config.max_position_embeddings
            if longest > limit:
                raise ConfigError(
                    f"{path.name} was made for at most {limit} tokens; the test needs {longest}"
                )
            plain = ",".join(KV_ALIASES.get(d.strip(), d.strip()) for d in kv_dtype.split(","))
            self.kv_dtypes = choose_kv_dtypes(plain, self.backend.kv_dtypes, field="kv_dtype")
            specs = build_kv_specs(self.config, *self.kv_dtypes)
            layout = build_layout(
                specs, [self.backend.kv_token_bytes(spec) for spec in specs], BLOCK_SIZE
            )
            self._groups = len(layout.groups)
            self._width = -(-longest // BLOCK_SIZE)  # blocks of a sequence in each group
            num_blocks = self._groups * self._width * sequences
            shapes = checkpoint.specs()
            self.weight_bytes = sum(map(self.backend.weight_bytes, shapes.values()))
            self.file_bytes = file_bytes(path)
            self.num_parameters = sum(int(np.prod(spec.shape)) for spec in shapes.values())
            graph = get_graph(self.config.graph).forward
            declared = [KVLayer(spec) for spec in layout.specs]
            step = self.backend.step_bytes(
                lambda ops, batch: graph(ops, self.config, shapes, batch, declared),
                chunk,
                sequences,
                longest,
            )
            kv_bytes = num_blocks * layout.bytes_per_block
            needed = self.weight_bytes + kv_bytes + sum(step.values())
            available = self.backend.available_memory()
            if needed > available:
                raise CapacityError(
                    f"{path.name} does not fit: {format_bytes(needed)} are needed "
                    f"(weights {format_bytes(self.weight_bytes)}, KV cache of {sequences} x "
                    f"{longest} tokens {format_bytes(kv_bytes)}), and {format_bytes(available)} "
                    "are available"
                )
            # Load the weights.
            weights = {
                name: self.backend.load_weight(tensor, name)
                for name, tensor in checkpoint.parameters()
            }
        storage = KVStorage(self.backend, layout, num_blocks)
        self.forward = self.backend.build_forward(
            lambda ops, batch: graph(ops, self.config, weights, batch, storage.layers)
        )
        self.filled = (0, 0)  # sequences, and tokens of each that the cache holds
        self.prefill(1, 0, min(chunk, longest))  # touches all memory for the first time

    @cached_property
    def roof(self) -> "Roof | None":
        """What the machine allows; None where the cost of a step is not known: on the native
        backend alone it is.
        """
        return Roof(self) if isinstance(self.forward, CapturedForward) else None

    def prefill(self, sequences: int, start: int, tokens: int) -> float:
        """Seconds of positions start … start + tokens - 1 of each sequence, in chunks."""
        width = max(1, self.chunk // sequences)
        begin = time.perf_counter()
        for first in range(start, start + tokens, width):
            self.step(sequences, first, min(width, start + tokens - first))
        return time.perf_counter() - begin

    def decode(self, sequences: int, start: int, tokens: int) -> float:
        """Seconds of as many steps, one token of each sequence in each."""
        begin = time.perf_counter()
        for position in range(start, start + tokens):
            self.step(sequences, position, 1)
        return time.perf_counter() - begin

    def fill(self, sequences: int, depth: int) -> None:
        """Compute the first `depth` tokens of each sequence, where the cache does not hold them."""
        held, tokens = self.filled
        if held != sequences or tokens < depth:
            self.prefill(sequences, 0, depth)

    def step(self, sequences: int, start: int, tokens: int) -> None:
        """One step: the same positions of each sequence."""
        # Each sequence has its own blocks in each group.
        blocks = np.arange(self._groups * sequences * self._width, dtype=np.int32)
        tables = blocks.reshape(self._groups, sequences, self._width)  # [G, R, M]
        positions = np.tile(np.arange(start, start + tokens, dtype=np.int32), sequences)  # [T]
        owner = np.repeat(np.arange(sequences), tokens)  # [T]
        slots = tables[:, owner, positions // BLOCK_SIZE] * BLOCK_SIZE + positions % BLOCK_SIZE
        metadata = AttentionMetadata(
            cu_seqlens_q=np.arange(sequences + 1, dtype=np.int32) * np.int32(tokens),
            seq_lens=np.full(sequences, start + tokens, np.int32),
            block_tables=tables,
            slot_mapping=slots.astype(np.int32),
            block_size=BLOCK_SIZE,
        )
        ids = (positions.astype(np.int64) * 7919 + owner * 104729 + 13) % self.config.vocab_size
        last = np.arange(1, sequences + 1, dtype=np.int32) * np.int32(tokens) - np.int32(1)
        no_rows = np.zeros(0, np.int32)
        self.forward(ForwardBatch(ids.astype(np.int32), positions, last, no_rows, metadata))
        # What the cache holds now, from the first position on.
        held, known = self.filled
        if held != sequences:
            known = 0
        self.filled = (sequences, max(known, start + tokens) if start <= known else known)


def file_bytes(path: Path) -> int:
    """Of a .gguf file, or of the safetensors of a folder."""
    files = [path] if path.is_file() else list(path.glob("*.safetensors"))
    return sum(file.stat().st_size for file in files)


class Roof:
    """The least time that this machine allows for steps of a model on the native backend: bytes at
    the read bandwidth, FLOPs at the peaks.

    Before each round of work (`take`) the bandwidth of all weights and the peaks are read, because
    a shared machine changes within seconds. A round is compared with its own bandwidth and with the
    highest peaks of all rounds: a peak that was disturbed would make a share larger than 100 %.
    """

    def __init__(self, model: BenchModel) -> None:
        assert isinstance(model.backend, NativeBackend)
        backend = model.backend
        self._model = model
        self._readings = [self._peaks(0.2)]
        self._meter = ReadMeter(backend.isa, backend.threads, model.weight_bytes)

    def _peaks(self, seconds: float) -> Ceilings:
        backend = self._model.backend
        assert isinstance(backend, NativeBackend)
        return measure_ceilings(
            backend.isa, backend.threads, working_sets=[1 << 20], seconds=seconds
        )

    def take(self) -> float:
        """Read the peaks, and return the bandwidth that the machine reaches now, in bytes/s."""
        self._readings.append(self._peaks(0.03))
        return self._meter.take()

    def least_seconds(
        self, bandwidth: float, sequences: int, start: int, tokens: int, chunk: int
    ) -> tuple[float, float]:
        """(seconds at least, those of them in which memory is the bound) of positions
        start … start + tokens - 1 of each sequence, in steps of `chunk` tokens of each.
        """
        forward = self._model.forward
        assert isinstance(forward, CapturedForward)
        ceilings = replace(
            self._readings[0],
            peaks=highest_peaks(self._readings),
            read_bandwidth={self._model.weight_bytes: Range.of([bandwidth])},
        )
        least = memory = 0.0
        for first in range(start, start + tokens, chunk):
            last = min(first + chunk, start + tokens)
            step = StepShape((last - first,) * sequences, (last,) * sequences, sequences)
            cost = sum((entry_cost(entry, step) for entry in forward.entries), OpCost(0, 0, 0))
            seconds = ceilings.least_seconds(cost, self._model.weight_bytes)
            least += seconds
            if ceilings.is_memory_bound(cost, self._model.weight_bytes):
                memory += seconds
        return least, memory


def backend_label(backend: Backend) -> str:
    """How a backend is named in a table: with the instruction set of its kernels."""
    return f"native {backend.isa}" if isinstance(backend, NativeBackend) else backend.name
