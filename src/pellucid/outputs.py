"""The result of a request: its completions, their logprobs, its times and their explanation. Names
and classes are vLLM's.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Literal

__all__ = [
    "CompletionOutput",
    "EmbeddingOutput",
    "EmbeddingRequestOutput",
    "Explanation",
    "FinishReason",
    "Logprob",
    "LogprobsOnePosition",
    "PhaseTime",
    "PooledOutput",
    "RequestMetrics",
    "RequestOutput",
    "SpeculationReceipt",
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


class _Shared:
    """Has a place for the list of token ids to which an engine appends, and for how many of them an
    output has. They are no dataclass fields, so `asdict`, `repr` and comparison see `token_ids`.
    """

    __slots__ = ("_growing", "_num_tokens")
    token_ids: list[int]

    def share_tokens(self, growing: list[int]) -> None:
        """Have the tokens that are in a list now; more are only ever appended to it.

        They are copied when `token_ids` is first asked for. A stream makes an output for each token
        and needs few of these copies, each of which would touch every token before it.
        """
        self._growing, self._num_tokens = growing, len(growing)
        del self.token_ids

    @property
    def num_tokens(self) -> int:
        """How many tokens it has; this copies none."""
        try:
            return self._num_tokens
        except AttributeError:
            return len(self.token_ids)

    if not TYPE_CHECKING:  # so that mypy still finds a wrong name

        def __getattr__(self, name: str) -> list[int]:
            """`token_ids` after `share_tokens`."""
            if name != "token_ids":
                raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
            self.token_ids = self._growing[: self._num_tokens]
            return self.token_ids


@dataclass(slots=True)
class CompletionOutput(_Shared):
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


@dataclass(frozen=True, slots=True)
class PhaseTime:
    """Prefill or decode of one request."""

    num_tokens: int  # tokens that were computed
    seconds: float
    bound: str | None  # "memory" or "arithmetic"; None: unknown
    roof_share: float | None  # the least time at the machine's ceilings over the time taken


@dataclass(frozen=True, slots=True)
class Explanation:
    """Why a request took as long as it did."""

    sentence: str
    # what took most of the time: "memory", "arithmetic" or "queue"; None: unknown
    bound: str | None = None
    # of prefill and decode: the least time at the machine's ceilings over the time taken
    share_of_ceiling: float | None = None
    prefill: PhaseTime | None = None  # None: it gave no token
    decode: PhaseTime | None = None  # None: it gave only one token


class _Explained:
    """Has a place for the function that explains a request's times. It is not a dataclass field, so
    `asdict`, `repr` and comparison see only the figures.
    """

    __slots__ = ("explainer",)
    explainer: "Callable[[RequestMetrics], Explanation]"  # where an engine has set it


@dataclass(frozen=True, slots=True)
class _Told:
    """An explanation that was computed earlier: it is pickled with a copy for another process."""

    explanation: Explanation

    def __call__(self, _: "RequestMetrics") -> Explanation:
        return self.explanation


@dataclass(slots=True, kw_only=True)
class RequestMetrics(_Explained):
    """The times of a request in seconds of the engine's clock, which is monotonic and not the time
    of day. None: not reached yet. With `n` completions, the first or last time of any of them.

    `bound`, `share_of_ceiling` and `explanation` compare the times with the ceilings of this
    machine, where `pellucid machine` has measured them. They are computed when they are first
    asked for: until then they cost nothing.
    """

    arrival_time: float
    first_scheduled_time: float | None = None  # the start of its first step
    first_token_time: float | None = None  # of an embedding: when it was computed
    last_token_time: float | None = None
    finished_time: float | None = None
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0  # of the prompt: found in the cache
    num_output_tokens: int = 0  # of all completions
    num_completions: int = 1
    # by speculation, once it is finished: the steps in which it decoded, of all completions, and
    # the draft tokens in them; 0: it decoded without
    num_decode_steps: int = 0
    num_draft_tokens: int = 0
    # of other requests: computed from its first step to its last
    num_other_tokens: int = 0

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

    def explain(self) -> Explanation:
        """Where the time went, phase by phase, and why."""
        try:
            explainer = self.explainer
        except AttributeError:
            return Explanation("no engine made these times, so nothing explains them")
        if not isinstance(explainer, _Told):
            self.explainer = explainer = _Told(explainer(self))
        return explainer.explanation

    @property
    def bound(self) -> str | None:
        """What took most of the time: "memory", "arithmetic" or "queue"; None: unknown."""
        return self.explain().bound

    @property
    def share_of_ceiling(self) -> float | None:
        """The least time of its own work at the machine's ceilings, over the time in prefill and
        decode. None: unknown.
        """
        return self.explain().share_of_ceiling

    @property
    def explanation(self) -> str:
        """Why it took that long, in one sentence."""
        return self.explain().sentence

    def __getstate__(self) -> tuple[None, dict[str, Any]]:
        """A copy carries the explanation, and not what explains."""
        figures: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        return None, figures | {"explainer": _Told(self.explain())}


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeculationReceipt:
    """What speculative decoding did for a request, or for all since the engine's start."""

    num_steps: int  # in which it decoded
    num_drafts: int  # of them with draft tokens
    # by the place in the draft, the first token first
    num_draft_tokens_per_position: tuple[int, ...]
    num_accepted_tokens_per_position: tuple[int, ...]
    # against the same tokens without drafts, by the measured costs of steps; below 0: lost
    seconds_saved: float
    draft_seconds: float  # of the steps, in a draft model
    reason: str  # why drafts were, or were not, verified in the last step

    @property
    def num_draft_tokens(self) -> int:
        """Draft tokens that went through the model."""
        return sum(self.num_draft_tokens_per_position)

    @property
    def num_accepted_tokens(self) -> int:
        """How many of them were accepted."""
        return sum(self.num_accepted_tokens_per_position)

    @property
    def tokens_per_step(self) -> float | None:
        """Tokens that a step of decoding gave; 1 without drafts, None before the first."""
        if not self.num_steps:
            return None
        return 1 + self.num_accepted_tokens / self.num_steps

    def __str__(self) -> str:
        """The receipt as one sentence."""
        if not self.num_drafts:
            return self.reason or "no token was drafted"
        drafting = f"{self.draft_seconds:.2f} s of drafting, " if self.draft_seconds else ""
        gain = f"{abs(self.seconds_saved):.2f} s {'saved' if self.seconds_saved >= 0 else 'lost'}"
        return (
            f"{self.num_accepted_tokens} of {self.num_draft_tokens} draft tokens accepted, "
            f"{self.tokens_per_step:.2f} tokens a step, {drafting}{gain}; at last {self.reason}"
        )


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
    # None until it is finished, or where the engine does not speculate
    speculation: SpeculationReceipt | None = None


@dataclass(slots=True, kw_only=True)
class PooledOutput(RequestOutput):
    """What the engine says of a request for an embedding: a completion without tokens, and the
    embedding.
    """

    embedding: list[float] | None  # None until it is finished, or where it was aborted


@dataclass(slots=True)
class EmbeddingOutput:
    """One embedding."""

    embedding: list[float]

    @property
    def hidden_size(self) -> int:
        """How many numbers it has."""
        return len(self.embedding)


@dataclass(slots=True, kw_only=True)
class EmbeddingRequestOutput:
    """The embedding of one prompt."""

    request_id: str
    outputs: EmbeddingOutput
    prompt: str | None
    prompt_token_ids: list[int]  # those that were used: `truncate_prompt_tokens` leaves some out
    finished: bool
    metrics: RequestMetrics
    num_cached_tokens: int = 0  # of the prompt: found in the cache
