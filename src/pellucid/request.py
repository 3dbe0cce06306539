"""A request as the engine sees it: its parameters, its tokens, and its progress.

A request has two counters. `num_tokens` counts the known token ids (prompt and output),
`num_computed_tokens` those whose keys and values are in the cache. A step computes some of the
difference. This subtraction covers prefill, decode, chunked prefill, a prefix hit and recomputation
after preemption; there are no phases.
"""

import enum
from dataclasses import dataclass, field

from .constraint import Constraint
from .outputs import FinishReason, LogprobsOnePosition
from .pooling_params import Pooling
from .sampling_params import SamplingParams

__all__ = ["Request", "RequestStatus"]


class RequestStatus(enum.Enum):
    """The states of a request. PREEMPTED is WAITING after its blocks were given back."""

    WAITING = "waiting"
    RUNNING = "running"
    PREEMPTED = "preempted"
    FINISHED = "finished"


@dataclass(slots=True, kw_only=True, eq=False)
class Request:
    """One generation job. Only the engine's core changes it."""

    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    seed: int  # resolved: the parameter's, or one that was drawn
    eos_token_ids: frozenset[int] = frozenset()
    banned_sequences: tuple[tuple[int, ...], ...] = ()  # bad_words, tokenized
    constraint: Constraint | None = None  # of its output
    pooling: Pooling | None = None  # it asks for an embedding, and has no output
    max_tokens: int = 16  # resolved against the context
    priority: int = 0  # the policy "priority" serves the smallest first
    tenant: str = ""  # the policy "fair" is fair among tenants
    cache_salt: str = ""  # prefixes are shared among requests with the same salt
    arrival: int = 0  # a count, given by the scheduler
    queued_step: int = 0  # the step at which it began to wait
    status: RequestStatus = RequestStatus.WAITING
    finish_reason: FinishReason | None = None
    # the stop token or string that ended it, or what went wrong; None for end of sequence
    stop_reason: int | str | None = None
    output_token_ids: list[int] = field(default_factory=list)
    num_computed_tokens: int = 0
    num_scheduled_tokens: int = 0  # positions that this step computes, from num_computed_tokens on
    num_cached_tokens: int = 0  # of the prompt: found in the cache when the request started
    # per layer group, while it runs; kept by the KV manager
    block_tables: list[list[int]] = field(default_factory=list)
    # while it runs: the number of computed tokens at which the KV manager must act again
    next_kv_event: int = 0
    # guesses of the next tokens, computed behind the known ones; what is not drawn is dropped
    draft_token_ids: list[int] = field(default_factory=list)
    # from its first token until it is preempted: all known tokens but the last are computed
    is_decoding: bool = False
    # one per output token, if requested
    logprobs: list[LogprobsOnePosition] = field(default_factory=list)
    # one per prompt token, the first None
    prompt_logprobs: list[LogprobsOnePosition | None] = field(default_factory=list)
    # tokens that end the output: ends of sequence, and stop_token_ids
    stopping_token_ids: frozenset[int] = field(init=False)

    def __post_init__(self) -> None:
        ends = frozenset() if self.params.ignore_eos else self.eos_token_ids
        self.stopping_token_ids = ends.union(self.params.stop_token_ids or ())

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.prompt_token_ids)

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_token_ids) + len(self.output_token_ids)

    @property
    def is_sampling(self) -> bool:
        """True if this step computes the last known token, so that the next one can be drawn."""
        stop = self.num_computed_tokens + self.num_scheduled_tokens
        return self.pooling is None and stop >= self.num_tokens

    @property
    def num_reusable(self) -> int:
        """How many first tokens may come from the cache. The others must be computed: the last one,
        and those whose logprobs or hidden states are still needed.
        """
        limit = self.num_tokens - 1
        if self.params.prompt_logprobs is not None:
            limit = min(limit, max(0, len(self.prompt_logprobs) - 1))
        return limit if self.pooling is None else min(limit, self.pooling.next)

    def scored(self, start: int, stop: int) -> range:
        """The positions of start … stop - 1 whose logits give logprobs of the prompt. A position
        may be computed again, after a preemption, and is scored once.
        """
        if self.params.prompt_logprobs is None:
            return range(0)
        first = max(start, len(self.prompt_logprobs) - 1)
        return range(first, min(stop, self.num_prompt_tokens - 1))

    @property
    def num_scheduled_drafts(self) -> int:
        """Drafts that this step computes behind the known tokens."""
        return max(0, self.num_computed_tokens + self.num_scheduled_tokens - self.num_tokens)

    @property
    def is_finished(self) -> bool:
        return self.status is RequestStatus.FINISHED

    def token_ids(self, start: int, stop: int) -> list[int]:
        """Known token ids at positions start … stop - 1, from prompt and output."""
        p = len(self.prompt_token_ids)
        if start >= p:
            return self.output_token_ids[start - p : stop - p]
        return self.prompt_token_ids[start:stop] + self.output_token_ids[: max(0, stop - p)]
