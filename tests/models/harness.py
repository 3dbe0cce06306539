"""What the tests of models share: a checkpoint loaded into a backend, a paged cache with shuffled
blocks, and batches built by hand.

The engine is left out on purpose: these tests are about models, weights and the cache's layout
alone.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pellucid.backends.registry import get_backend
from pellucid.batch import AttentionMetadata, ForwardBatch
from pellucid.config import ModelConfig
from pellucid.kv_spec import build_kv_specs
from pellucid.models.registry import get_graph
from pellucid.ops.backend import Backend
from pellucid.ops.kv_dtypes import choose_kv_dtypes
from pellucid.ops.protocol import KVLayer, Tensor
from pellucid.weights.checkpoint import open_checkpoint

__all__ = [
    "GOLDEN",
    "GOLDEN_NAMES",
    "NATIVE_BUDGET",
    "RELATIVE_BUDGET",
    "Chunk",
    "Loaded",
    "Session",
    "check_close",
    "load",
    "round_as_native",
]

GOLDEN = Path(__file__).parents[1] / "golden" / "models"
GOLDEN_NAMES = sorted(
    folder.name for folder in GOLDEN.iterdir() if (folder / "config.json").is_file()
)
# tokens; the smallest that a backend takes, so that a short prompt crosses many borders
BLOCK_SIZES = {"reference": 4, "native": 16}

# Two float32 evaluations of one model differ by the rounding of both. A tiny model here makes about
# 30 roundings in a row (3 layers of 10), each of about sqrt(48) · 2^-24 = 4e-7 of its result (sums
# of up to 48 products): sqrt(30) · 4e-7 = 2e-6 if they are independent, which is what is seen
# (2.2e-6 at most), and 1.2e-5 for each of the two if they all pull one way.
RELATIVE_BUDGET = 2e-5  # of the largest logit

# The native backend keeps keys and values in float16, and `round_as_native` does the same to the
# reference. What is left is float32's rounding again; but where a key lies next to the middle
# between two float16 numbers, that rounding decides which of them it becomes. One such flip, 2^-11
# of one of the D numbers that make a score, is what the largest difference seen (1e-4) comes from.
NATIVE_BUDGET = 4e-4  # of the largest logit


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model's weights in a backend's hands."""

    config: ModelConfig
    backend: Backend
    weights: dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class Chunk:
    """Consecutive tokens of one request: `start` of them are cached already. `blocks` hold the
    request's tokens in order.
    """

    input_ids: NDArray[np.int32]
    start: int
    blocks: NDArray[np.int32]


class Session:
    """A model with a cache of its own, whose blocks are handed out in shuffled order."""

    def __init__(
        self,
        loaded: Loaded,
        num_blocks: int = 64,
        seed: int = 0,
        change_ops: Callable[[Any], Any] = lambda ops: ops,
        forward: Callable[..., Any] | None = None,
    ) -> None:
        """`forward` takes the place of the graph's own, with its arguments."""
        config = loaded.config
        self._block_size = BLOCK_SIZES[loaded.backend.name]
        layers = [
            KVLayer(loaded.backend.new_kv_store(num_blocks, self._block_size, spec))
            for spec in build_kv_specs(config, *choose_kv_dtypes("auto", loaded.backend.kv_dtypes))
        ]
        run = forward or get_graph(config.graph).forward
        self._forward = loaded.backend.build_forward(
            lambda ops, batch: run(change_ops(ops), config, loaded.weights, batch, layers)
        )
        self._free = np.random.default_rng(seed).permutation(num_blocks).astype(np.int32)

    def take_blocks(self, num_tokens: int) -> NDArray[np.int32]:
        """Blocks for a new request of that many tokens."""
        count = -(-num_tokens // self._block_size)
        taken, self._free = self._free[:count], self._free[count:]
        assert len(taken) == count
        return taken

    def run(
        self, chunks: Sequence[Chunk], logits_indices: Sequence[int] | None = None
    ) -> NDArray[np.float32]:
        """One step: the logits of all rows, or of those asked for."""
        lengths = [len(c.input_ids) for c in chunks]
        positions = np.concatenate(
            [np.arange(c.start, c.start + n) for c, n in zip(chunks, lengths, strict=True)]
        )
        tables = np.zeros((len(chunks), max(len(c.blocks) for c in chunks)), np.int32)
        for table, chunk in zip(tables, chunks, strict=True):
            table[: len(chunk.blocks)] = chunk.blocks
        owner = np.repeat(np.arange(len(chunks)), lengths)
        slots = (
            tables[owner, positions // self._block_size] * self._block_size
            + positions % self._block_size
        )
        rows = range(len(positions)) if logits_indices is None else logits_indices
        batch = ForwardBatch(
            input_ids=np.concatenate([c.input_ids for c in chunks]).astype(np.int32),
            positions=positions.astype(np.int32),
            logits_indices=np.array(rows, np.int32),
            hidden_indices=np.zeros(0, np.int32),
            attention=AttentionMetadata(
                cu_seqlens_q=np.cumsum([0, *lengths]).astype(np.int32),
                seq_lens=np.array(
                    [c.start + n for c, n in zip(chunks, lengths, strict=True)], np.int32
                ),
                block_tables=tables[None],
                slot_mapping=slots[None].astype(np.int32),
                block_size=self._block_size,
            ),
        )
        return self._forward(batch).to_host()

    def prefill(self, input_ids: NDArray[np.int32]) -> NDArray[np.float32]:
        """All logits [T, V] of one new request, in one step."""
        return self.run([Chunk(input_ids, 0, self.take_blocks(len(input_ids)))])


def load(path: Path, backend_name: str) -> Loaded:
    backend = get_backend(backend_name)
    with open_checkpoint(path) as checkpoint:
        return Loaded(
            checkpoint.config,
            backend,
            {name: backend.load_weight(tensor) for name, tensor in checkpoint.parameters()},
        )


def round_as_native(ops: Any, *, activations: bool = False) -> Any:
    """The reference's ops with the roundings that the native backend makes on purpose: keys and
    values to float16, and where `activations` says that the weights are quantized, the inputs of a
    product to 8 bits in blocks of 32."""

    def kv_write(
        kv: Any, k: NDArray[np.float32], v: NDArray[np.float32], slot_mapping: NDArray[np.int32]
    ) -> None:
        ops.kv_write(
            kv,
            k.astype(np.float16).astype(np.float32),
            v.astype(np.float16).astype(np.float32),
            slot_mapping,
        )

    def linear(x: NDArray[np.float32], weight: Any, bias: Any = None) -> Any:
        return ops.linear(
            _round_to_8_bits(x) if activations and x.shape[-1] % 32 == 0 else x, weight, bias
        )

    return SimpleNamespace(
        **{name: getattr(ops, name) for name in ops.__all__}
        | {"kv_write": kv_write, "linear": linear}
    )


def _round_to_8_bits(x: NDArray[np.float32]) -> NDArray[np.float32]:
    blocks = x.reshape(-1, 32)
    largest = np.abs(blocks).max(axis=-1, keepdims=True)
    inverse = np.divide(np.float32(127), largest, out=np.zeros_like(largest), where=largest > 0)
    rounded: NDArray[np.float32] = np.rint(blocks * inverse) * (largest / np.float32(127))
    return rounded.reshape(x.shape)


def check_close(
    actual: NDArray[np.float32], expected: NDArray[np.float32], budget: float = RELATIVE_BUDGET
) -> None:
    """Assert that logits agree within `budget` of the largest."""
    assert actual.shape == expected.shape
    error, limit = float(np.abs(actual - expected).max()), budget * float(np.abs(expected).max())
    assert error <= limit, f"logits differ by {error:.3g}, limit {limit:.3g}"
