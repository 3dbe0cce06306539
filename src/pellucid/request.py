"""A request: what is asked (`SamplingParams`), how far it has come (`Request`), and what is
answered (`RequestOutput`).

One idea: a request has two counters. `num_tokens` is how many token ids are known (prompt and
output), `num_computed_tokens` how many of them have their keys and values in the cache. A step
computes some of the difference. Prefill, decode, chunked prefill, a prefix hit and recomputation
after preemption are all that one subtraction; there are no phases.

Names, defaults and shapes of `SamplingParams`, `RequestOutput` and `CompletionOutput` are vLLM's.
"""

import enum
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from .errors import ConfigError

__all__ = [
    "MAX_LOGPROBS",
    "MAX_N",
    "MAX_STOP_STRINGS",
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
MAX_LOGIT_BIAS = 4096  # entries
MAX_STOP_TOKEN_IDS = 1024
MAX_BAD_WORDS = 1024
MAX_STRING = 1024  # characters of one stop string or bad word
# the largest that any vocabulary holds (ModelConfig); the engine checks against the model's own
MAX_TOKEN_ID = (1 << 24) - 1
MAX_SCALE = 1e6  # of temperature and repetition_penalty: what lies beyond is a mistake
MAX_INT = (1 << 63) - 1


class RequestStatus(enum.Enum):
    """The only states. PREEMPTED is WAITING with its work thrown away or swapped out."""

    WAITING = "waiting"
    RUNNING = "running"
    PREEMPTED = "preempted"
    FINISHED = "finished"


@dataclass(slots=True, kw_only=True)
class SamplingParams:
    """How the next token is chosen, and when to stop.

    The order in which they act on a row of logits: logit_bias, allowed and banned tokens,
    penalties, temperature, top_k, typical_p, top_p, min_p, then one draw (`sampling/sampler.py`).
    `temperature=0` is greedy: the largest logit after bias, bans and penalties. Ties go to the
    lower token id. Impossible values are refused when it is built (`check`), never clamped.
    """

    n: int = 1  # completions per prompt
    temperature: float = 1.0  # logits are divided by it; 0: greedy
    top_k: int = 0  # keep the k likeliest tokens; 0 or -1: all
    top_p: float = 1.0  # keep the fewest likeliest tokens that hold this much probability
    min_p: float = 0.0  # keep tokens at least this likely, relative to the likeliest that is left
    # keep the tokens whose surprise is nearest the entropy, this much probability of them
    # (arXiv:2202.00666)
    typical_p: float = 1.0
    # divides positive and multiplies negative logits of tokens in prompt or output
    # (arXiv:1909.05858)
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0  # -2 … 2; subtracted once from each token that the output holds
    frequency_penalty: float = 0.0  # -2 … 2; subtracted once per occurrence in the output
    logit_bias: Mapping[int, float] | None = None  # token id -> -100 … 100, added to its logit
    allowed_token_ids: Sequence[int] | None = None  # nothing else may be drawn
    bad_words: Sequence[str] | None = None  # strings that may not be completed
    seed: int | None = None  # a request with a seed gives the same text whatever else runs
    # the text ends before the first of these; kept as a list
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None  # beside the model's own ends of sequence
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False  # an end of sequence is a token like any other
    max_tokens: int | None = 16  # None: as many as the context holds
    min_tokens: int = 0  # no end of sequence or stop before so many
    # so many likeliest tokens per output position, beside the chosen one; -1: the whole vocabulary
    logprobs: int | None = None
    prompt_logprobs: int | None = None  # the same for the prompt's positions
    skip_special_tokens: bool = True
    detokenize: bool = True

    def __post_init__(self) -> None:
        if self.stop is None or isinstance(self.stop, str):
            self.stop = [] if self.stop is None else [self.stop]
        self.check()
        self.stop = list(self.stop)

    def check(self) -> None:
        """Raise ConfigError, naming the field, its value and what is allowed, where a value is
        impossible.

        What only the model can tell (token ids beyond its vocabulary, prompts beyond its context)
        is checked by the engine.
        """
        _check_int("n", self.n, 1, MAX_N)
        _check_real("temperature", self.temperature, 0.0, MAX_SCALE)
        _check_int("top_k", self.top_k, -1, MAX_INT)
        _check_real("top_p", self.top_p, 0.0, 1.0, above=True)
        _check_real("min_p", self.min_p, 0.0, 1.0)
        _check_real("typical_p", self.typical_p, 0.0, 1.0, above=True)
        _check_real("repetition_penalty", self.repetition_penalty, 0.0, MAX_SCALE, above=True)
        _check_real("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _check_real("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        if self.logit_bias is not None:
            _check_logit_bias(self.logit_bias)
        if self.allowed_token_ids is not None:
            _check_token_ids("allowed_token_ids", self.allowed_token_ids, 1, MAX_TOKEN_ID + 1)
        if self.bad_words is not None:
            _check_strings("bad_words", self.bad_words, MAX_BAD_WORDS)
        if self.seed is not None:
            _check_int("seed", self.seed, -(1 << 63), (1 << 64) - 1)
        if self.stop is not None:
            _check_strings("stop", self.stop, MAX_STOP_STRINGS)
        if self.stop_token_ids is not None:
            _check_token_ids("stop_token_ids", self.stop_token_ids, 0, MAX_STOP_TOKEN_IDS)
        for name in (
            "include_stop_str_in_output",
            "ignore_eos",
            "skip_special_tokens",
            "detokenize",
        ):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(
                    f"{name} is {_show(getattr(self, name))}; it must be True or False"
                )
        if self.max_tokens is not None:
            _check_int("max_tokens", self.max_tokens, 1, MAX_INT)
        _check_int("min_tokens", self.min_tokens, 0, MAX_INT)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ConfigError(
                f"min_tokens is {self.min_tokens}; it must be at most max_tokens, which is "
                f"{self.max_tokens}"
            )
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                _check_int(name, getattr(self, name), -1, MAX_LOGPROBS)
        if self.stop and not self.detokenize:
            raise ConfigError(
                f"stop is {_show(self.stop)}; stop strings are found in text, so detokenize must "
                "be True"
            )


def _show(value: object) -> str:
    """A value as a message shows it: short, whatever a stranger sent."""
    if isinstance(value, int) and value.bit_length() > 128:
        return f"an integer of {value.bit_length()} bits"
    return reprlib.repr(value)


def _check_int(name: str, value: object, low: int, high: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise ConfigError(
            f"{name} is {_show(value)}; it must be an integer between {low} and {high}"
        )


def _check_real(name: str, value: object, low: float, high: float, *, above: bool = False) -> None:
    """`above`: the lower end itself is not allowed."""
    # a NaN is not
    sound = isinstance(value, (int, float)) and not isinstance(value, bool) and low <= value <= high
    if not sound or (above and value == low):
        allowed = (
            f"above {low:g} and at most {high:g}" if above else f"between {low:g} and {high:g}"
        )
        raise ConfigError(f"{name} is {_show(value)}; it must be a number {allowed}")


def _check_list(name: str, value: object, low: int, high: int, of: str) -> Sequence[object]:
    if not isinstance(value, Sequence) or isinstance(value, (str, bytes, bytearray, memoryview)):
        raise ConfigError(f"{name} is {_show(value)}; it must be a list of {of}")
    if not low <= len(value) <= high:
        raise ConfigError(f"{name} has {len(value)} entries; it must have between {low} and {high}")
    return value


def _check_token_ids(name: str, value: object, low: int, high: int) -> None:
    for i, token_id in enumerate(_check_list(name, value, low, high, "token ids")):
        _check_int(f"{name}[{i}]", token_id, 0, MAX_TOKEN_ID)


def _check_strings(name: str, value: object, high: int) -> None:
    for i, text in enumerate(_check_list(name, value, 0, high, "strings")):
        if not isinstance(text, str) or not 1 <= len(text) <= MAX_STRING:
            raise ConfigError(
                f"{name}[{i}] is {_show(text)}; it must be a string of 1 to {MAX_STRING} characters"
            )


def _check_logit_bias(value: object) -> None:
    if not isinstance(value, Mapping):
        raise ConfigError(f"logit_bias is {_show(value)}; it must map token ids to numbers")
    if len(value) > MAX_LOGIT_BIAS:
        raise ConfigError(
            f"logit_bias has {len(value)} entries; it must have at most {MAX_LOGIT_BIAS}"
        )
    for token_id, bias in value.items():
        _check_int("a token id of logit_bias", token_id, 0, MAX_TOKEN_ID)
        _check_real(f"logit_bias[{token_id}]", bias, -100.0, 100.0)


@dataclass(frozen=True, slots=True)
class Logprob:
    """One candidate at one position, by the model's own distribution: before bias, penalties and
    temperature (as vLLM's raw_logprobs).
    """

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
    priority: int = 0  # the smaller is served first, where the policy is "priority"
    tenant: str = ""  # who asks: what the policy "fair" is fair to
    cache_salt: str = ""  # prefixes are shared among requests of one salt
    arrival: int = 0  # a count, given by the scheduler
    queued_step: int = 0  # the step at which it began to wait
    status: RequestStatus = RequestStatus.WAITING
    finish_reason: FinishReason | None = None
    # the stop token or string that ended it, or what went wrong; None for end of sequence
    stop_reason: int | str | None = None
    output_token_ids: list[int] = field(default_factory=list)
    num_computed_tokens: int = 0
    # this step computes positions num_computed_tokens … num_computed_tokens + num_scheduled_tokens
    # - 1
    num_scheduled_tokens: int = 0
    num_cached_tokens: int = 0  # of the prompt: found in the cache when the request started
    # per layer group, while it runs; kept by the KV manager
    block_tables: list[list[int]] = field(default_factory=list)
    # while it runs: up to so many computed tokens the KV manager has nothing to do for it, and need
    # not be asked
    kv_border: int = 0
    # one per output token, where asked for
    logprobs: list[LogprobsOnePosition] = field(default_factory=list)
    # one per prompt token, the first None
    prompt_logprobs: list[LogprobsOnePosition | None] = field(default_factory=list)
    # an output may end with these: ends of sequence, and stop_token_ids
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
    def samples(self) -> bool:
        """True where this step reaches the last known token, so that the next one can be drawn."""
        return self.num_computed_tokens + self.num_scheduled_tokens == self.num_tokens

    @property
    def is_finished(self) -> bool:
        return self.status is RequestStatus.FINISHED

    def token_ids(self, start: int, stop: int) -> list[int]:
        """Known token ids at positions start … stop - 1, across the border of prompt and output."""
        p = len(self.prompt_token_ids)
        return (
            self.prompt_token_ids[start:stop]
            + self.output_token_ids[max(0, start - p) : max(0, stop - p)]
        )


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
    # arrival, first_token and finished times in seconds of a monotonic clock
    metrics: dict[str, Any] = field(default_factory=dict)
