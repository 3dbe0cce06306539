"""Executes a step's plan: builds the flat batch, runs the model, samples. It works for every model
and every backend.

The scheduler's integers become arrays in `forward_batch`. For each scheduled request the tokens
`num_computed_tokens … + num_scheduled_tokens - 1` go in. Logits come out for prompt tokens whose
logprobs are asked for, for the last known token, to draw the next, and for each draft behind it, to
draw the token that follows if the draft is accepted.

A draft is accepted if it equals the token that is drawn at its position. Noise is keyed by (seed,
position), so the request gets the same tokens as without drafts.

Letters: L rows with logits, V vocabulary.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import islice, zip_longest
from typing import NamedTuple

from ..batch import ForwardBatch
from ..errors import PellucidError, RequestError
from ..kv.storage import KVStorage
from ..ops.backend import Logits
from ..outputs import LogprobsOnePosition
from ..request import Request
from ..sampling import SamplingRow, top_logprobs
from ..scheduler import ScheduledStep
from .forward_batch import build_forward_batch
from .pooling import needed_positions, pool_hidden_states

__all__ = ["ModelRunner", "StepResult"]

Forward = Callable[[ForwardBatch], Logits]
_MANY_TOKENS = 16  # in a step: its speed is that of prefill


@dataclass(slots=True)
class StepResult:
    """The results of a step, by request_id."""

    # the new tokens of each request that sampled: the accepted drafts and one more
    sampled: dict[str, list[int]] = field(default_factory=dict)
    # of those tokens, if requested
    logprobs: dict[str, list[LogprobsOnePosition]] = field(default_factory=dict)
    # of this step's prompt positions, in order
    prompt_logprobs: dict[str, list[LogprobsOnePosition]] = field(default_factory=dict)
    # why a request could not be sampled; it keeps the tokens in `sampled`
    errors: dict[str, PellucidError] = field(default_factory=dict)
    forward_seconds: float = 0.0  # in the model
    # in which this thread ran in the model, or copied, saved and loaded KV blocks
    kernel_cpu_seconds: float = 0.0


class _Rows(NamedTuple):
    """A request's rows of logits: prompt positions to score, then positions to sample from."""

    request: Request
    positions: list[int]  # rising
    # the rows of these positions: first those to score, then the last known token and its drafts
    scored: range
    sampled: range


class ModelRunner:
    """Runs steps. `forward` is a model bound to its weights and cache: ForwardBatch -> logits."""

    def __init__(
        self,
        forward: Forward,
        storage: KVStorage,
        *,
        block_size: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.forward = forward
        self._storage = storage
        self._block_size = block_size
        self._clock = clock
        self.before_forward: Callable[[], None] = lambda: None  # called in each step
        # in the last compute-bound step, as recomputing is one; infinite until then
        self._seconds_per_token = math.inf

    def execute(self, step: ScheduledStep) -> StepResult:
        """Compute a step's tokens; draw for each request whose known tokens are then computed."""
        began = time.thread_time()
        if step.block_ops:
            self._storage.run(step.block_ops)
        moving = time.thread_time() - began
        rows = _plan_rows(step.requests)
        batch = self._build_batch(rows)
        self.before_forward()
        start, cpu = self._clock(), time.thread_time()
        logits = self.forward(batch)  # [L, V]
        result = StepResult(forward_seconds=self._clock() - start)
        result.kernel_cpu_seconds = moving + time.thread_time() - cpu
        if len(batch.input_ids) >= _MANY_TOKENS:
            self._seconds_per_token = result.forward_seconds / len(batch.input_ids)
        self._score_prompts(rows, logits, result)
        self._sample(rows, logits, result)
        if len(batch.hidden_indices):
            pool_hidden_states(step.requests, logits.hidden, result.errors)
        return result

    @property
    def swap_file_bytes(self) -> int:
        """The size of the file to which evicted blocks are saved; 0 while there is none."""
        return self._storage.swap_file_bytes

    def saving_pays(self) -> bool:
        """Whether saving and loading a block costs less than computing it; True until measured."""
        return self._storage.seconds_per_block() < self._seconds_per_token * self._block_size

    def _build_batch(self, rows: list[_Rows]) -> ForwardBatch:
        """The scheduled tokens of all requests end to end."""
        input_ids: list[int] = []
        positions: list[int] = []
        logits_indices: list[int] = []
        hidden_indices: list[int] = []
        cu_seqlens_q, seq_lens = [0], []
        for r in rows:
            start = r.request.num_computed_tokens
            stop = start + r.request.num_scheduled_tokens
            first = len(input_ids) - start
            logits_indices += [first + p for p in r.positions]
            if r.request.pooling is not None:
                hidden_indices += [first + p for p in needed_positions(r.request)]
            input_ids += r.request.token_ids(start, stop)
            if len(r.sampled) > 1:
                input_ids += r.request.draft_token_ids[: len(r.sampled) - 1]
            positions += range(start, stop)
            cu_seqlens_q.append(len(input_ids))
            seq_lens.append(stop)
        return build_forward_batch(
            input_ids,
            positions,
            cu_seqlens_q,
            seq_lens,
            [r.request.block_tables for r in rows],
            logits_indices,
            hidden_indices,
            block_size=self._block_size,
            scratch_block=self._storage.scratch_block,
        )

    @staticmethod
    def _score_prompts(rows: list[_Rows], logits: Logits, result: StepResult) -> None:
        """Logprobs of prompt tokens: the row at position i scores the token at i + 1."""
        for r in rows:
            if not r.scored:
                continue
            name, wanted = r.request.request_id, r.request.params.prompt_logprobs
            chosen = [r.request.prompt_token_ids[p + 1] for p in r.positions[: len(r.scored)]]
            found = top_logprobs(logits.to_host(r.scored), chosen, [wanted] * len(r.scored))
            for row in found:
                if isinstance(row, PellucidError):
                    result.errors[name] = row
                elif row is not None:
                    result.prompt_logprobs.setdefault(name, []).append(row)

    @staticmethod
    def _sample(rows: list[_Rows], logits: Logits, result: StepResult) -> None:
        """Draw at each last known token and its drafts in one pass; take the accepted tokens."""
        drawing: list[_Rows] = []
        sampling: list[SamplingRow] = []
        for r in rows:
            if r.sampled and r.request.request_id not in result.errors:
                try:
                    mine = _sampling_rows(r.request, len(r.sampled))
                except RequestError as error:  # its constraint cannot be computed
                    result.errors[r.request.request_id] = error
                    continue
                sampling += mine
                is_whole = len(mine) == len(r.sampled)
                drawing.append(r if is_whole else r._replace(sampled=r.sampled[: len(mine)]))
        if not drawing:
            return
        # Draw.
        drawn = iter(logits.sample([i for r in drawing for i in r.sampled], sampling))
        # Take the accepted drafts and the token after them, up to the first error.
        wanted: list[tuple[str, int, int, int | None]] = []  # name, row, token, number of logprobs
        for r in drawing:
            request, tokens = r.request, list(islice(drawn, len(r.sampled)))
            standing: list[int] = []
            for token, draft in zip_longest(tokens, request.draft_token_ids[: len(tokens) - 1]):
                if isinstance(token, PellucidError):
                    result.errors[request.request_id] = token
                    break
                standing.append(token)
                if token != draft:
                    break
            if standing:
                result.sampled[request.request_id] = standing
            if request.params.logprobs is not None:
                taken = zip(r.sampled, standing, strict=False)
                name, n = request.request_id, request.params.logprobs
                wanted += [(name, row, token, n) for row, token in taken]
        # Score the tokens that were taken, if logprobs are requested.
        if wanted:
            found = top_logprobs(
                logits.to_host([row for _, row, _, _ in wanted]),
                [token for _, _, token, _ in wanted],
                [n for _, _, _, n in wanted],
            )
            for (name, *_), logprobs in zip(wanted, found, strict=True):
                if isinstance(logprobs, PellucidError):
                    raise AssertionError(f"a token was drawn from a row that fails: {logprobs}")
                if logprobs is not None:
                    result.logprobs.setdefault(name, []).append(logprobs)


def _plan_rows(requests: list[Request]) -> list[_Rows]:
    """The rows of logits that each request of a step needs."""
    rows, first = [], 0
    for request in requests:
        start = request.num_computed_tokens
        stop = start + request.num_scheduled_tokens
        positions = [*request.scored(start, stop)]
        sampled = first + len(positions)
        num_sampled = max(0, stop - request.num_tokens + 1) if request.pooling is None else 0
        positions += range(stop - num_sampled, stop)
        end = sampled + num_sampled
        rows.append(_Rows(request, positions, range(first, sampled), range(sampled, end)))
        first = end
    return rows


def _sampling_rows(request: Request, count: int) -> list[SamplingRow]:
    """Rows for the last known token and `count - 1` drafts; fewer where a draft has no mask."""
    output, drafts = request.output_token_ids, request.draft_token_ids
    constraint = request.constraint
    masks = constraint.masks(drafts[: count - 1]) if constraint is not None else [None] * count
    return [
        SamplingRow(
            request.params,
            request.seed,
            request.num_tokens + i,
            request.prompt_token_ids,
            [*output, *drafts[:i]] if i else output,
            request.banned_sequences,
            request.eos_token_ids,
            mask,
        )
        for i, mask in enumerate(masks)
    ]
