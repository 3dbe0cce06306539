"""A request: its parameters (`SamplingParams`), its progress (`Request`), and its answer
(`RequestOutput`).

One idea: a request has two counters. `num_tokens` is how many token ids are known (prompt and
output), `num_computed_tokens` how many of them have their keys and values in the cache. A step
computes some of the difference. Prefill, decode, chunked prefill, a prefix hit and recomputation
after preemption are all that one subtraction; there are no phases.

Names, defaults and shapes of `SamplingParams`, `RequestOutput` and `CompletionOutput` are vLLM's.
"""

import enum
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Literal

from .checks import Bounds, check_fields, option, show, unknown_name
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
    "RequestMetrics",
    "RequestOutput",
    "RequestStatus",
    "SamplingParams",
    "TokenId",
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

_DIGITS = re.compile("[0-9]{1,9}")  # a token id as a key of JSON

TokenId = Annotated[int, Bounds(low=0, high=MAX_TOKEN_ID)]
Text = Annotated[str, Bounds(low=1, high=MAX_STRING)]  # a stop string or a bad word


class RequestStatus(enum.Enum):
    """The only states. PREEMPTED is WAITING with its work thrown away or swapped out."""

    WAITING = "waiting"
    RUNNING = "running"
    PREEMPTED = "preempted"
    FINISHED = "finished"


@dataclass(slots=True, kw_only=True)
class SamplingParams:
    """How the next token is chosen, and when to stop. Names, meanings and defaults are vLLM's.

    The order in which they act on a row of logits: logit_bias, allowed and banned tokens (and the
    mask of a constrained output), penalties, temperature, top_k, typical_p, top_p, min_p, then one
    draw (`sampling/sampler.py`).
    `temperature=0` is greedy: the largest logit after bias, bans and penalties. Ties go to the
    lower token id. Types and bounds are checked when it is built, and again when a request is
    submitted; nothing is clamped. Lists and mappings are copied.
    """

    n: int = option(1, low=1, high=MAX_N, help="Completions per prompt")
    temperature: float = option(
        1.0, low=0.0, high=MAX_SCALE, help="Logits are divided by it; 0: the likeliest token"
    )
    top_k: int = option(0, low=-1, high=MAX_INT, help="Keep the k likeliest tokens; 0 or -1: all")
    top_p: float = option(
        1.0, above=0.0, high=1.0, help="Keep the fewest likeliest tokens that hold this probability"
    )
    min_p: float = option(
        0.0, low=0.0, high=1.0, help="Keep tokens at least this likely, relative to the likeliest"
    )
    typical_p: float = option(
        1.0,
        above=0.0,
        high=1.0,
        help="Keep the tokens whose surprise is nearest the entropy, this much probability of them "
        "(arXiv:2202.00666)",
    )
    repetition_penalty: float = option(
        1.0,
        above=0.0,
        high=MAX_SCALE,
        help="Divides positive and multiplies negative logits of tokens that prompt or output hold "
        "(arXiv:1909.05858)",
    )
    presence_penalty: float = option(
        0.0, low=-2.0, high=2.0, help="Subtracted once from each token that the output holds"
    )
    frequency_penalty: float = option(
        0.0, low=-2.0, high=2.0, help="Subtracted for each occurrence of a token in the output"
    )
    logit_bias: Mapping[TokenId, Annotated[float, Bounds(low=-100.0, high=100.0)]] | None = option(
        None, high=MAX_LOGIT_BIAS, help="Token id to what is added to its logit"
    )
    allowed_token_ids: Sequence[TokenId] | None = option(
        None, low=1, high=MAX_TOKEN_ID + 1, help="No other token may be drawn"
    )
    bad_words: Sequence[Text] | None = option(
        None, high=MAX_BAD_WORDS, help="Strings that may not be completed"
    )
    seed: int | None = option(
        None,
        low=-(1 << 63),
        high=(1 << 64) - 1,
        help="A request with a seed gives the same text whatever else runs; None or -1: drawn",
    )
    stop: str | Sequence[Text] | None = option(
        None, high=MAX_STOP_STRINGS, help="The text ends before the first of these; kept as a list"
    )
    stop_token_ids: Sequence[TokenId] | None = option(
        None, high=MAX_STOP_TOKEN_IDS, help="Tokens that end the output, beside the model's own"
    )
    include_stop_str_in_output: bool = option(
        False, help="The stop string that ended the output is part of its text"
    )
    ignore_eos: bool = option(False, help="An end of sequence is a token like any other")
    max_tokens: int | None = option(
        16, low=1, high=MAX_INT, help="Tokens of the output; None: as many as the context holds"
    )
    min_tokens: int = option(
        0, low=0, high=MAX_INT, help="No end of sequence or stop before so many tokens"
    )
    logprobs: int | None = option(
        None,
        low=-1,
        high=MAX_LOGPROBS,
        help="Report so many likeliest tokens at each position of the output, beside the chosen "
        "one; -1: the whole vocabulary",
    )
    prompt_logprobs: int | None = option(
        None, low=-1, high=MAX_LOGPROBS, help="The same for each position of the prompt"
    )
    truncate_prompt_tokens: int | None = option(
        None,
        low=-1,
        high=MAX_INT,
        help="Use only so many last tokens of the prompt; -1: as many as leave room for max_tokens",
    )
    skip_special_tokens: bool = option(True, help="Special tokens are left out of the text")
    detokenize: bool = option(True, help="Turn tokens into text; False: token ids alone")

    def __post_init__(self) -> None:
        self.check()

    def check(self) -> None:
        """Raise ConfigError, naming the field, its value and what is allowed, where a value is
        impossible; convert and copy the others as declared.

        What only the model can tell (token ids beyond its vocabulary, prompts beyond its context)
        is checked by the engine.
        """
        if self.stop is None or isinstance(self.stop, str):
            self.stop = [] if self.stop is None else [self.stop]
        check_fields(self)
        if self.seed == -1:
            self.seed = None
        if self.truncate_prompt_tokens == 0:
            raise ConfigError(
                "truncate_prompt_tokens is 0; it must be at least 1, -1 for what fits, or None"
            )
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ConfigError(
                f"min_tokens is {self.min_tokens}; it must be at most max_tokens, which is "
                f"{self.max_tokens}"
            )
        if self.stop and not self.detokenize:
            raise ConfigError(
                f"stop is {show(self.stop)}; stop strings are found in text, so detokenize must "
                "be True"
            )

    def clone(self) -> "SamplingParams":
        """A checked copy that shares no list or mapping with this one. Each request runs with a
        clone, so that later changes by the caller reach no running request.
        """
        return replace(self)

    @classmethod
    def from_optional(cls, **fields: object) -> "SamplingParams":
        """Build from fields of JSON, as vLLM's method does: null means the default, and keys of
        logit_bias may be strings of digits. Raises ConfigError for an unknown name.
        """
        names = tuple(cls.__dataclass_fields__)
        for name in fields:
            if name not in names:
                raise ConfigError(unknown_name("sampling parameter", name, names))
        # max_tokens has a meaning for None that is not its default.
        given = {
            name: value
            for name, value in fields.items()
            if value is not None or name == "max_tokens"
        }
        bias = given.get("logit_bias")
        if isinstance(bias, Mapping):
            given["logit_bias"] = {
                int(key) if isinstance(key, str) and _DIGITS.fullmatch(key) else key: value
                for key, value in bias.items()
            }
        return cls(**given)  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True)
class Logprob:
    """One candidate at one position, by the model's own distribution: before bias, penalties and
    temperature (as vLLM's raw_logprobs).
    """

    logprob: float
    rank: int  # 1 = the likeliest
    # the token as text: a part of a character shows as U+FFFD; None with detokenize=False
    decoded_token: str | None = None
    # the same as bytes (OpenAI's `bytes`): parts of a character, put together, are the character
    token_bytes: bytes | None = None


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
    # while it runs: the KV manager has nothing to do for it before so many tokens are computed
    next_kv_event: int = 0
    # proposed for the positions after the known tokens; they are computed with them, and those that
    # are not drawn are dropped
    draft_token_ids: list[int] = field(default_factory=list)
    # from its first token until it is preempted: all but the last known token are computed
    is_decoding: bool = False
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
    def is_sampling(self) -> bool:
        """True where this step reaches the last known token, so that the next one can be drawn."""
        return self.num_computed_tokens + self.num_scheduled_tokens >= self.num_tokens

    @property
    def num_scheduled_drafts(self) -> int:
        """Drafts that this step computes behind the known tokens."""
        return max(0, self.num_computed_tokens + self.num_scheduled_tokens - self.num_tokens)

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

    def finished(self) -> bool:
        """True where no token follows."""
        return self.finish_reason is not None


@dataclass(slots=True, kw_only=True)
class RequestMetrics:
    """When a request came how far: seconds of the engine's clock, which is monotonic, and not the
    time of day. None: not yet. With `n` completions, the first or last of any of them.
    """

    arrival_time: float
    first_scheduled_time: float | None = None  # the first step that computed some of it began
    first_token_time: float | None = None
    last_token_time: float | None = None
    finished_time: float | None = None

    @property
    def time_in_queue(self) -> float | None:
        """Seconds from arrival to the first step."""
        if self.first_scheduled_time is None:
            return None
        return self.first_scheduled_time - self.arrival_time


@dataclass(slots=True, kw_only=True)
class RequestOutput:
    """The answer to one prompt, whole or as far as it has come (`finished` tells)."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    metrics: RequestMetrics
    # one per prompt token, the first None; None where they were not asked for
    prompt_logprobs: list[LogprobsOnePosition | None] | None = None
    num_cached_tokens: int = 0  # of the prompt: found in the cache
