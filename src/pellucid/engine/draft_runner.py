"""Runs a draft model: builds its flat batches, computes, and draws its guesses.

The draft model's layers lie in the stores of the same blocks as the model's, so a request's block
table serves both. `DraftCoverage` knows which tokens the draft has computed. Drafts are written
behind the known tokens. If they are accepted, their keys and values are kept; if not, they are
written over.

Letters: R requests, V vocabulary.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..batch import ForwardBatch
from ..errors import PellucidError, RequestError
from ..kv.draft_coverage import DraftCoverage
from ..kv.manager import KVCacheManager
from ..kv.storage import KVStorage
from ..ops.backend import Logits
from ..request import Request
from ..sampling import SamplingRow, sample
from ..speculative.draft_model import DraftSpan, Guess
from .forward_batch import build_forward_batch

__all__ = ["DraftRunner"]


@dataclass(slots=True)
class _Written:
    """Drafts whose keys and values were computed, before anybody knew whether they are right."""

    tables: list[list[int]]  # the request's own object: another if it was preempted since
    # its block table then: published blocks may be replaced, and blocks behind the known tokens be
    # lent to others
    blocks: list[tuple[int, int]]
    start: int  # the position of the first draft
    token_ids: list[int]


class DraftRunner:
    """Implements `speculative.draft_model.DraftRunner` for a model that is bound to its weights and
    its part of the cache.
    """

    def __init__(
        self,
        forward: Callable[[ForwardBatch], Logits],
        kv: KVCacheManager,
        storage: KVStorage,
        coverage: DraftCoverage,
        *,
        vocab_sizes: tuple[int, int],
        context: int,
        max_tokens: int,
    ) -> None:
        """`vocab_sizes`: rows of logits of the model and of the draft, which may be padded
        differently. `context`: tokens of a request that the draft model can see. `max_tokens`: of a
        pass.
        """
        self.context = context
        self.max_tokens = max_tokens
        self._cpu_seconds = 0.0  # in the draft model
        self._forward = forward
        self._kv = kv
        self._storage = storage
        self._coverage = coverage
        self._block_size = kv.layout.block_size
        self._vocab_size, self._own_vocab_size = vocab_sizes
        self._written: dict[str, _Written] = {}

    def take_cpu_seconds(self) -> float:
        """CPU time of this thread in the draft model since the last call."""
        seconds, self._cpu_seconds = self._cpu_seconds, 0.0
        return seconds

    def num_missing(self, request: Request) -> int:
        """See the protocol."""
        [table] = request.block_tables
        written = self._written.pop(request.request_id, None)
        if written is not None and written.tables is request.block_tables:
            self._keep_accepted(request, table, written)
        return request.num_tokens - self._coverage.count(table, request.num_tokens)

    def _keep_accepted(self, request: Request, table: list[int], written: _Written) -> None:
        """Drafts that were accepted need not be computed again, where their blocks are the same."""
        start, size = written.start, self._block_size
        if self._coverage.count(table, start) < start:
            return
        stop, first = start, start // size
        owners = self._coverage.owners(table[first:])
        for token_id in request.token_ids(start, start + len(written.token_ids)):
            column = stop // size - first
            if (
                token_id != written.token_ids[stop - start]
                or column == len(owners)  # given back since
                or owners[column] != written.blocks[column]
            ):
                break
            stop += 1
        self._coverage.extend(table, stop)

    def reserve(self, request: Request, count: int) -> int:
        """See the protocol."""
        [table] = request.block_tables
        if len(table) * self._block_size < request.num_tokens + count:
            self._kv.allocate_slots(request, 1 + count)
            # evicted blocks are saved before the draft writes to them
            self._storage.run(self._kv.take_ops())
        return min(count, len(table) * self._block_size - request.num_tokens)

    def compute(self, spans: Sequence[DraftSpan]) -> list[Guess | None]:
        """See the protocol."""
        batch, guessing = self._build_batch(spans)
        cpu = time.thread_time()
        logits = self._forward(batch)
        self._cpu_seconds += time.thread_time() - cpu
        for span in spans:
            [table] = span.request.block_tables
            if not span.drafts:
                self._coverage.extend(table, span.start + len(span.token_ids))
            else:
                self._written[span.request.request_id] = _Written(
                    span.request.block_tables,
                    self._coverage.owners(table[span.request.num_tokens // self._block_size :]),
                    span.request.num_tokens,
                    list(span.drafts),
                )
        guesses: list[Guess | None] = [None] * len(spans)
        if guessing:
            array = self._fit(logits.to_host())
            for i, guess in zip(
                guessing, self._guess(array, [spans[i] for i in guessing]), strict=True
            ):
                guesses[i] = guess
        return guesses

    def _build_batch(self, spans: Sequence[DraftSpan]) -> tuple[ForwardBatch, list[int]]:
        """The tokens of all spans, and which spans have a row of logits."""
        input_ids: list[int] = []
        positions: list[int] = []
        logits_indices: list[int] = []
        guessing: list[int] = []
        cu_seqlens_q, seq_lens = [0], []
        for i, span in enumerate(spans):
            input_ids += span.token_ids
            positions += range(span.start, span.start + len(span.token_ids))
            cu_seqlens_q.append(len(input_ids))
            seq_lens.append(span.start + len(span.token_ids))
            if span.is_guessed:
                logits_indices.append(len(input_ids) - 1)
                guessing.append(i)
        if self._own_vocab_size < self._vocab_size:
            # the rows that only the model has are padding, which no text is cut into
            input_ids = [min(token_id, self._own_vocab_size - 1) for token_id in input_ids]
        batch = build_forward_batch(
            input_ids,
            positions,
            cu_seqlens_q,
            seq_lens,
            [span.request.block_tables for span in spans],
            logits_indices,
            [],
            block_size=self._block_size,
            scratch_block=self._storage.scratch_block,
        )
        return batch, guessing

    def _fit(self, logits: NDArray[np.float32]) -> NDArray[np.float32]:
        """The draft's logits [R, V], for the model's vocabulary."""
        if self._own_vocab_size >= self._vocab_size:
            return logits[:, : self._vocab_size]
        fitted = np.full((len(logits), self._vocab_size), -np.inf, np.float32)
        fitted[:, : self._own_vocab_size] = logits
        return fitted

    @staticmethod
    def _guess(logits: NDArray[np.float32], spans: Sequence[DraftSpan]) -> list[Guess | None]:
        """Draw from each row of logits [R, V] as the model would; None where that fails."""
        rows: dict[int, SamplingRow] = {}
        for i, span in enumerate(spans):
            try:
                mask = None if span.constraint is None else span.constraint.masks([])[0]
            except RequestError:  # the model's own step will say so
                continue
            request = span.request
            rows[i] = SamplingRow(
                request.params,
                request.seed,
                request.num_tokens + len(span.drafts),
                request.prompt_token_ids,
                [*request.output_token_ids, *span.drafts],
                request.banned_sequences,
                request.eos_token_ids,
                mask,
            )
        guesses: list[Guess | None] = [None] * len(spans)
        chosen = logits if len(rows) == len(spans) else logits[list(rows)]
        for i, token_id in zip(rows, sample(chosen, list(rows.values())), strict=True):
            if not isinstance(token_id, PellucidError):
                temperature = spans[i].request.params.temperature or 1.0
                guesses[i] = Guess(token_id, _probability(logits[i], token_id, temperature))
        return guesses

    def finish(self, request: Request) -> None:
        """See the protocol."""
        self._written.pop(request.request_id, None)


def _probability(logits: NDArray[np.float32], token_id: int, temperature: float) -> float:
    """The probability of a token under softmax(logits [V] / temperature)."""
    z = logits - logits[token_id]
    if temperature != 1.0:
        z /= np.float32(temperature)
    with np.errstate(over="ignore"):  # far below the likeliest token, it is 0
        return 1.0 / float(np.exp(z, out=z).sum())
