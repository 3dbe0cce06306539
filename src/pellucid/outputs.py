"""The result of a request: its completions, their logprobs, and its times. Names and classes are
vLLM's.
"""

from dataclasses import dataclass
from typing import Literal

__all__ = [
    "CompletionOutput",
    "FinishReason",
    "Logprob",
    "LogprobsOnePosition",
    "RequestMetrics",
    "RequestOutput",
]

FinishReason = Literal["stop", "length", "abort", "error"]


@dataclass(frozen=True, slots=True)
class Logprob:
    """One candidate at one position, by the model's own distribution: before bias, penalties and
    temperature (as vLLM's raw_logprobs).
    """

    logprob: float
    rank: int  # 1 = the likeliest
    # the token as text; part of a character shows as U+FFFD; None with detokenize=False
    decoded_token: str | None = None
    # its bytes (OpenAI's `bytes`); the parts of a character, joined, are the character
    token_bytes: bytes | None = None


LogprobsOnePosition = dict[int, Logprob]  # token id -> Logprob


@dataclass(slots=True)
class CompletionOutput:
    """One completion of a prompt."""

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None
    logprobs: list[LogprobsOnePosition] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None

    def finished(self) -> bool:
        """True if no token follows."""
        return self.finish_reason is not None


@dataclass(slots=True, kw_only=True)
class RequestMetrics:
    """The times of a request in seconds of the engine's clock, which is monotonic and not the time
    of day. None: not reached yet. With `n` completions, the first or last time of any of them.
    """

    arrival_time: float
    first_scheduled_time: float | None = None  # the start of its first step
    first_token_time: float | None = None
    last_token_time: float | None = None
    finished_time: float | None = None

    @property
    def time_in_queue(self) -> float | None:
        """Seconds from arrival to the first step."""
        if self.first_scheduled_time is None:
            return None
        return self.first_scheduled_time - self.arrival_time

    @property
    def time_in_prefill(self) -> float | None:
        """Seconds from the first step to the first token."""
        if self.first_scheduled_time is None or self.first_token_time is None:
            return None
        return self.first_token_time - self.first_scheduled_time

    @property
    def time_in_decode(self) -> float | None:
        """Seconds from the first token to the last so far; 0 where there is one."""
        if self.first_token_time is None or self.last_token_time is None:
            return None
        return self.last_token_time - self.first_token_time


@dataclass(slots=True, kw_only=True)
class RequestOutput:
    """The answer to one prompt: whole if `finished`, else the answer so far."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    metrics: RequestMetrics
    # one per prompt token, the first None; None if not requested
    prompt_logprobs: list[LogprobsOnePosition | None] | None = None
    num_cached_tokens: int = 0  # of the prompt: found in the cache
