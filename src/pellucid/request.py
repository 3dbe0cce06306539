"""A request: what is asked (`SamplingParams`), how far it has come (`Request`), and what is answered (`RequestOutput`).

One idea: a request has two counters. `num_tokens` is how many token ids are known (prompt and output), `num_computed_tokens` how many of
them have their keys and values in the cache. A step computes some of the difference. Prefill, decode, chunked prefill, a prefix hit and
recomputation after preemption are all that one subtraction; there are no phases.

Names, defaults and shapes of `SamplingParams`, `RequestOutput` and `CompletionOutput` are vLLM's.
"""

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from .errors import ConfigError

__all__ = [
    "CompletionOutput",
    "FinishReason",
    "Logprob",
    "LogprobsOnePosition",
    "Request",
    "RequestOutput",
    "RequestStatus",
    "SamplingParams",
]

FinishReason = Literal["stop", "length", "abort", "error"]
MAX_LOGPROBS = 1024  # logprobs per position that one request may ask for
MAX_STOP_STRINGS = 64
MAX_N = 128


class RequestStatus(enum.Enum):
    """The only states. PREEMPTED is WAITING with its work thrown away or swapped out."""

    WAITING = "waiting"
    RUNNING = "running"
    PREEMPTED = "preempted"
    FINISHED = "finished"


@dataclass(slots=True, kw_only=True)
class SamplingParams:
    """How the next token is chosen, and when to stop.

    The order in which they act on a row of logits: logit_bias, allowed and banned tokens, penalties, temperature, top_k, typical_p,
    top_p, min_p, then one draw (`sampling/sampler.py`). `temperature=0` is greedy: the first of the largest logits after bias, bans and penalties.
    """

    n: int = 1  # completions per prompt
    temperature: float = 1.0
    top_k: int = 0  # keep the k likeliest tokens; 0 or -1: all
    top_p: float = 1.0  # keep the fewest likeliest tokens that hold this much probability
    min_p: float = 0.0  # keep tokens at least this likely, relative to the likeliest
    typical_p: float = 1.0  # keep the tokens whose surprise is nearest the entropy, this much probability of them (arXiv:2202.00666)
    repetition_penalty: float = 1.0  # divides positive and multiplies negative logits of tokens in prompt or output (arXiv:1909.05858)
    presence_penalty: float = 0.0  # subtracted once from each token that the output holds
    frequency_penalty: float = 0.0  # subtracted once per occurrence in the output
    logit_bias: Mapping[int, float] | None = None
    allowed_token_ids: Sequence[int] | None = None  # nothing else may be drawn
    bad_words: Sequence[str] | None = None  # strings that may not be completed
    seed: int | None = None  # a request with a seed gives the same text whatever else runs
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    max_tokens: int | None = 16  # None: as many as the context holds
    min_tokens: int = 0  # no end of sequence or stop before so many
    logprobs: int | None = None  # so many likeliest tokens per output position, beside the chosen one; -1: the whole vocabulary
    prompt_logprobs: int | None = None  # the same for the prompt's positions
    skip_special_tokens: bool = True
    detokenize: bool = True

    def __post_init__(self) -> None:
        self.stop = [self.stop] if isinstance(self.stop, str) else list(self.stop or ())
        self.check()

    def check(self) -> None:
        """Raise ConfigError, naming the field, its value and what is allowed, where a value is impossible."""
        raise NotImplementedError


@dataclass(frozen=True, slots=True)
class Logprob:
    """One candidate at one position, under the model's own distribution: before bias, penalties and temperature (as vLLM's raw_logprobs)."""

    logprob: float
    rank: int  # 1 = the likeliest
    decoded_token: str | None = None


LogprobsOnePosition = dict[int, Logprob]  # token id -> Logprob


@dataclass(slots=True, kw_only=True, eq=False)
class Request:
    """One generation job as the engine sees it. Only the engine's core changes it."""

    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    seed: int  # resolved: the parameter's, or one drawn for it
    eos_token_ids: frozenset[int] = frozenset()
    banned_sequences: tuple[tuple[int, ...], ...] = ()  # bad_words, tokenized
    max_tokens: int = 16  # resolved against the context
    status: RequestStatus = RequestStatus.WAITING
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None  # the stop token or string that ended it; None for end of sequence
    output_token_ids: list[int] = field(default_factory=list)
    num_computed_tokens: int = 0
    logprobs: list[LogprobsOnePosition] = field(default_factory=list)  # one per output token, where asked for
    prompt_logprobs: list[LogprobsOnePosition | None] = field(default_factory=list)  # one per prompt token, the first None

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.prompt_token_ids)

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_token_ids) + len(self.output_token_ids)

    @property
    def is_finished(self) -> bool:
        return self.status is RequestStatus.FINISHED

    def token_ids(self, start: int, stop: int) -> list[int]:
        """Known token ids at positions start … stop - 1, across the border of prompt and output."""
        p = len(self.prompt_token_ids)
        return self.prompt_token_ids[start:stop] + self.output_token_ids[max(0, start - p) : max(0, stop - p)]


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

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None


@dataclass(slots=True)
class RequestOutput:
    """The answer to one prompt, whole or as far as it has come (`finished` tells)."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    prompt_logprobs: list[LogprobsOnePosition | None] | None = None
    num_cached_tokens: int = 0
    metrics: dict[str, Any] = field(default_factory=dict)  # arrival, first_token and finished times in seconds of a monotonic clock
