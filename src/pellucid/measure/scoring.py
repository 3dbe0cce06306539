"""Runs windows of tokens through a model and yields the logits that score them.

A window is a sequence of its own: it begins at position 0, and does not see other windows. Short
windows share a step, and a long one takes several. Rows come in the order of the text, in small
parts, so memory is bounded for any vocabulary: the logits of a step take at most STEP_BYTES, or
those of MIN_STEP tokens.

The engine loads the model and runs the steps, without its scheduler: no window is a request,
nothing is sampled, and rows that are not scored skip the lm_head.

Letters: T tokens in the step, L rows with logits, V vocabulary, G layer groups, R windows in the
step, M blocks per window.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from ..batch import AttentionMetadata, ForwardBatch
from ..engine.loader import OpenModel
from ..engine_config import EngineConfig
from ..errors import ConfigError

__all__ = ["STEP_BYTES", "ScoredRows", "Scorer", "Windows", "check_context"]

MAX_STEP = 512  # tokens of a step: more are not faster
MIN_STEP = 64
STEP_BYTES = 256 << 20  # of a step's logits
PART_NUMBERS = 1 << 18  # logits that are processed together, so that they stay in the CPU's cache


@dataclass(frozen=True, slots=True)
class Windows:
    """Windows of tokens. The tokens at positions `first + 1` … n_ctx - 1 of each are scored."""

    token_ids: NDArray[np.int32]  # [windows, n_ctx]
    first: int  # the first position whose prediction is scored

    @property
    def n_ctx(self) -> int:
        return int(self.token_ids.shape[1])

    @property
    def rows_per_window(self) -> int:
        """Scored tokens of each window."""
        return self.n_ctx - 1 - self.first

    def begin(self, count: int | None) -> "Windows":
        """The first `count`, or all."""
        return Windows(self.token_ids[:count], self.first)

    def __len__(self) -> int:
        return len(self.token_ids)


@dataclass(frozen=True, slots=True)
class ScoredRows:
    """Logits of one step, and the token that each row predicts."""

    logits: NDArray[np.float32]  # [L, V], to be read only
    targets: NDArray[np.int64]  # [L]  the token that follows in the text
    num_windows: int  # windows that are complete after this step

    def parts(self) -> Iterator[slice]:
        """Slices of rows that are best processed together."""
        size = max(1, PART_NUMBERS // self.logits.shape[1])
        for start in range(0, len(self.targets), size):
            yield slice(start, min(start + size, len(self.targets)))


@dataclass(frozen=True, slots=True)
class _Piece:
    """Tokens of a window that a step computes."""

    window: int
    start: int
    stop: int


def check_context(model: OpenModel, config: EngineConfig, n_ctx: int) -> None:
    """Raise ConfigError if `n_ctx` is beyond the model's context."""
    context = model.model_config.max_position_embeddings
    limit = min(context, config.max_model_len or context)
    if n_ctx > limit:
        raise ConfigError(
            f"n_ctx is {n_ctx}; {model.path.name} sees at most {limit} tokens at once"
        )


class Scorer:
    """A model with a KV cache for the windows of one step."""

    def __init__(self, model: OpenModel, config: EngineConfig, n_ctx: int) -> None:
        """Load the model. Raises ConfigError if `n_ctx` is beyond its context, CapacityError if it
        does not fit in memory.
        """
        check_context(model, config, n_ctx)
        self._n_ctx = n_ctx
        self.vocab_size = model.model_config.vocab_size
        self._step = max(MIN_STEP, min(MAX_STEP, STEP_BYTES // (4 * self.vocab_size)))
        self._windows = max(1, self._step // n_ctx)  # windows that share a step
        layout = model.layout(config)
        self._block_size = layout.block_size
        self._columns = layout.columns_for(n_ctx)
        self._groups = len(layout.groups)
        num_blocks = self._windows * self._groups * self._columns
        engine = model.build_engine(
            replace(
                config,
                max_model_len=n_ctx,
                max_num_batched_tokens=self._step,
                max_num_seqs=self._windows,
                kv_cache_memory=num_blocks * layout.bytes_per_block,
                enable_prefix_caching=False,
                preemption="recompute",
            ),
            num_logits=self._step,
        )
        self._forward = engine.core.runner.forward

    def run(self, windows: Windows) -> Iterator[ScoredRows]:
        """The logits of all windows, in order."""
        for pieces in self._plan(windows):
            batch, targets = self._build_batch(windows, pieces)
            done = sum(piece.stop == self._n_ctx for piece in pieces)
            yield ScoredRows(self._forward(batch).to_host(), targets, done)

    def _plan(self, windows: Windows) -> Iterator[Sequence[_Piece]]:
        """The steps: several windows each, or a part of one."""
        for i in range(0, len(windows), self._windows):
            together = range(i, min(i + self._windows, len(windows)))
            for begin in range(0, self._n_ctx, self._step):
                end = min(begin + self._step, self._n_ctx)
                yield [_Piece(window, begin, end) for window in together]

    def _build_batch(
        self, windows: Windows, pieces: Sequence[_Piece]
    ) -> tuple[ForwardBatch, NDArray[np.int64]]:
        """The tokens of all pieces end to end, and the targets of the scored rows."""
        start, stop = pieces[0].start, pieces[0].stop  # the same in all pieces of a step
        count, length = len(pieces), stop - start
        tokens = windows.token_ids[[piece.window for piece in pieces]]  # [R, n_ctx]
        positions = np.arange(start, stop, dtype=np.int32)
        # the rows that predict a scored token
        read = np.arange(max(start, windows.first), min(stop, self._n_ctx - 1))
        rows = (np.arange(count)[:, None] * length + (read - start)).ravel()
        # window r has the r-th share of each group's blocks
        shape = (self._groups, self._windows, self._columns)
        tables = np.arange(np.prod(shape), dtype=np.int32).reshape(shape)[:, :count]
        slots = tables[:, :, positions // self._block_size] * self._block_size
        slots = (slots + positions % self._block_size).reshape(self._groups, -1)  # [G, T]
        batch = ForwardBatch(
            input_ids=np.ascontiguousarray(tokens[:, start:stop].ravel(), np.int32),
            positions=np.tile(positions, count),
            logits_indices=rows.astype(np.int32),
            hidden_indices=np.zeros(0, np.int32),
            attention=AttentionMetadata(
                cu_seqlens_q=np.arange(count + 1, dtype=np.int32) * np.int32(length),
                seq_lens=np.full(count, stop, np.int32),
                block_tables=np.ascontiguousarray(tables),
                slot_mapping=slots.astype(np.int32),
                block_size=self._block_size,
            ),
        )
        return batch, tokens[:, read + 1].ravel().astype(np.int64)
