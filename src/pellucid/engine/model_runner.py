"""From a plan to tokens: builds the flat batch, runs the model, samples. Nothing here is of one
model or of one backend.

One idea: the scheduler's integers become arrays here and nowhere else. For each scheduled request
the tokens `num_computed_tokens … + num_scheduled_tokens - 1` go in; logits come out for the rows
that somebody reads: the last known token (to draw the next), and prompt tokens whose logprobs are
asked for.

Letters: G layer groups, T tokens, R requests, L rows with logits, V vocabulary.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from ..batch import AttentionMetadata, ForwardBatch
from ..errors import PellucidError
from ..kv.node import HOLE
from ..kv.storage import KVStorage
from ..ops.protocol import Logits
from ..request import LogprobsOnePosition, Request
from ..sampling import SamplingRow, top_logprobs
from ..scheduler import ScheduledStep

__all__ = ["ModelRunner", "StepResult"]

Forward = Callable[[ForwardBatch], Logits]
_MANY_TOKENS = 16  # in a step: its speed is that of prefill


@dataclass(slots=True)
class StepResult:
    """What a step gave, by request_id."""

    # the next token of each request that sampled
    sampled: dict[str, int] = field(default_factory=dict)
    # of that token, where asked for
    logprobs: dict[str, LogprobsOnePosition] = field(default_factory=dict)
    # of this step's prompt positions, in order
    prompt_logprobs: dict[str, list[LogprobsOnePosition]] = field(default_factory=dict)
    # requests that could not be sampled; the others are not disturbed
    errors: dict[str, PellucidError] = field(default_factory=dict)
    forward_seconds: float = 0.0  # in the model


@dataclass(frozen=True, slots=True)
class _Rows:
    """Which rows of the logits belong to a request: first the prompt positions whose next token it
    scores, then the one it samples from.
    """

    request: Request
    positions: list[int]

    @property
    def num_scored(self) -> int:
        return len(self.positions) - self.request.samples


class ModelRunner:
    """Runs steps. `forward` is a model bound to its weights and cache: ForwardBatch -> logits [L,
    V].
    """

    def __init__(
        self,
        forward: Forward,
        storage: KVStorage,
        *,
        block_size: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._forward = forward
        self._storage = storage
        self._block_size = block_size
        self._clock = clock
        # of the last step that was bound by arithmetic, as recomputing is
        self._seconds_per_token: float | None = None

    def execute(self, step: ScheduledStep) -> StepResult:
        """Compute a step's tokens, write their keys and values, and draw the next token of each
        request that reached its end.
        """
        self._storage.run(step.block_ops)
        rows = [_Rows(r, _logits_positions(r)) for r in step.requests]
        batch = self._build_batch(rows)
        start = self._clock()
        logits = self._forward(batch)  # [L, V]
        result = StepResult(forward_seconds=self._clock() - start)
        if len(batch.input_ids) >= _MANY_TOKENS:
            self._seconds_per_token = result.forward_seconds / len(batch.input_ids)
        self._score_prompts(rows, logits, result)
        self._sample(rows, logits, result)
        return result

    def saving_pays(self) -> bool:
        """Whether saving a block and loading it again costs less than computing it again; yes, as
        long as no computing was measured.
        """
        computing = (
            math.inf
            if self._seconds_per_token is None
            else self._seconds_per_token * self._block_size
        )
        return self._storage.seconds_per_block() < computing

    def _build_batch(self, rows: list[_Rows]) -> ForwardBatch:
        input_ids: list[int] = []
        positions: list[int] = []
        logits_indices: list[int] = []
        cu_seqlens_q = [0]
        for r in rows:
            start = r.request.num_computed_tokens
            stop = start + r.request.num_scheduled_tokens
            logits_indices += [len(input_ids) + p - start for p in r.positions]
            input_ids += r.request.token_ids(start, stop)
            positions += range(start, stop)
            cu_seqlens_q.append(len(input_ids))
        position = np.array(positions, np.int32)  # [T]
        owner = np.repeat(np.arange(len(rows)), np.diff(cu_seqlens_q))  # [T]
        # [G, R, M]
        tables = _block_tables([r.request.block_tables for r in rows], self._storage.scratch_block)
        # [G, T]
        slots = (
            tables[:, owner, position // self._block_size] * self._block_size
            + position % self._block_size
        )
        return ForwardBatch(
            input_ids=np.array(input_ids, np.int32),
            positions=position,
            logits_indices=np.array(logits_indices, np.int32),
            attention=AttentionMetadata(
                cu_seqlens_q=np.array(cu_seqlens_q, np.int32),
                seq_lens=np.array(
                    [r.request.num_computed_tokens + r.request.num_scheduled_tokens for r in rows],
                    np.int32,
                ),
                block_tables=tables,
                slot_mapping=slots.astype(np.int32),
                block_size=self._block_size,
            ),
        )

    @staticmethod
    def _score_prompts(rows: list[_Rows], logits: Logits, result: StepResult) -> None:
        """Logprobs of prompt tokens: the row at position i scores the token at i + 1."""
        first = 0
        for r in rows:
            if r.num_scored:
                request = r.request
                chosen = [request.prompt_token_ids[p + 1] for p in r.positions[: r.num_scored]]
                scored = top_logprobs(
                    logits.to_host(range(first, first + r.num_scored)),
                    chosen,
                    [request.params.prompt_logprobs] * r.num_scored,
                )
                for row in scored:
                    if isinstance(row, PellucidError):
                        result.errors[request.request_id] = row
                    elif row is not None:
                        result.prompt_logprobs.setdefault(request.request_id, []).append(row)
            first += len(r.positions)

    @staticmethod
    def _sample(rows: list[_Rows], logits: Logits, result: StepResult) -> None:
        """Draw the next token of every request that reached its last known token, in one pass."""
        last = (np.cumsum([len(r.positions) for r in rows]) - 1).tolist()
        drawing = [i for i, r in enumerate(rows) if r.request.samples]
        if not drawing:
            return
        requests = [rows[i].request for i in drawing]
        drawn = logits.sample([last[i] for i in drawing], [_sampling_row(r) for r in requests])
        for request, token in zip(requests, drawn, strict=True):
            if isinstance(token, PellucidError):
                result.errors[request.request_id] = token
            else:
                result.sampled[request.request_id] = token
        scored = [
            i
            for i, r in enumerate(requests)
            if r.params.logprobs is not None and r.request_id in result.sampled
        ]
        if scored:
            tokens = [result.sampled[requests[i].request_id] for i in scored]
            found = top_logprobs(
                logits.to_host([last[drawing[i]] for i in scored]),
                tokens,
                [requests[i].params.logprobs for i in scored],
            )
            for i, row in zip(scored, found, strict=True):
                if isinstance(row, PellucidError):
                    result.errors[requests[i].request_id] = row
                elif row is not None:
                    result.logprobs[requests[i].request_id] = row


def _block_tables(tables: list[list[list[int]]], scratch_block: int) -> NDArray[np.int32]:
    """The tables of R requests in G groups as one array [G, R, M]. It is padded with the scratch
    block, which also stands for blocks behind a window.
    """
    groups = len(tables[0])
    # the tables of a request are of one length
    width = max(len(of_request[0]) for of_request in tables)
    array = np.full((groups, len(tables), width), HOLE, np.int32)
    for r, of_request in enumerate(tables):
        for g, table in enumerate(of_request):
            array[g, r, : len(table)] = table
    array[array == HOLE] = scratch_block
    return array


def _logits_positions(request: Request) -> list[int]:
    """Positions of a request whose logits this step needs, rising."""
    start = request.num_computed_tokens
    last = start + request.num_scheduled_tokens - 1
    positions: list[int] = []
    if request.params.prompt_logprobs is not None:
        # it may be computed again, after a preemption, and is scored once
        scored = len(request.prompt_logprobs) - 1
        positions = list(range(max(start, scored), min(last, request.num_prompt_tokens - 2) + 1))
    return [*positions, last] if request.samples else positions


def _sampling_row(request: Request) -> SamplingRow:
    return SamplingRow(
        params=request.params,
        seed=request.seed,
        position=request.num_tokens,
        prompt_token_ids=request.prompt_token_ids,
        output_token_ids=request.output_token_ids,
        banned_sequences=request.banned_sequences,
        eos_token_ids=request.eos_token_ids,
    )
