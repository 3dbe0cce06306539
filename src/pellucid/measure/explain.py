"""Why a request took as long as it did: queue, prefill and decode, what bound each, and how near to
the machine's ceilings it ran, in one sentence.

It holds for a request that had the engine to itself, as with `pellucid run`: other requests of a
batch share the steps, and the reading of the weights.
"""

from dataclasses import dataclass

from ..backends.native.costs import StepShape
from ..errors import ConfigError
from ..outputs import RequestOutput
from .hardware import Ceilings
from .roofline import ModelProgram

__all__ = ["Explanation", "PhaseTime", "explain_request"]


@dataclass(frozen=True, slots=True)
class PhaseTime:
    """Prefill or decode of one request."""

    num_tokens: int  # that were computed
    seconds: float
    bound: str  # "memory" or "arithmetic"
    roof_share: float  # the least time at the ceilings over the time taken


@dataclass(frozen=True, slots=True)
class Explanation:
    """Where the time of a finished request went. Times are seconds."""

    time_in_queue: float
    num_cached_tokens: int  # of the prompt, found in the prefix cache
    prefill: PhaseTime
    decode: PhaseTime | None  # None: the first token was the last

    @property
    def sentence(self) -> str:
        """Why it took that long."""
        parts = {"waiting in the queue": self.time_in_queue}
        cached = f", {self.num_cached_tokens} more from the cache" if self.num_cached_tokens else ""
        prefill = _text("prefill", self.prefill, f"{self.prefill.num_tokens} tokens{cached}")
        parts[prefill] = self.prefill.seconds
        if self.decode is not None:
            decode = _text("decode", self.decode, f"{self.decode.num_tokens} tokens")
            parts[decode] = self.decode.seconds
        whole = sum(parts.values())
        told = [
            f"{seconds / whole:.0%} {name}"
            for name, seconds in sorted(parts.items(), key=lambda part: -part[1])
            if seconds >= 0.01 * whole
        ]
        return f"{whole:.2f} s: {', '.join(told)}"


def explain_request(
    output: RequestOutput, program: ModelProgram, ceilings: Ceilings, chunk: int
) -> Explanation:
    """Explain a finished output of one completion. `chunk`: the engine's max_num_batched_tokens.
    Raises ConfigError where the request never gave a token.
    """
    metrics = output.metrics
    scheduled, first = metrics.first_scheduled_time, metrics.first_token_time
    last = metrics.last_token_time
    if scheduled is None or first is None or last is None:
        raise ConfigError(f"request {output.request_id} gave no token; there is nothing to explain")
    # Prefill: the prompt in chunks, after what the cache had.
    prompt, cached = len(output.prompt_token_ids), output.num_cached_tokens
    starts = range(cached, prompt, chunk)
    ends = [min(start + chunk, prompt) for start in starts]
    prefill = [StepShape((e - s,), (e,), 1) for s, e in zip(starts, ends, strict=True)]
    # Decode: one step for each further token; all are near the one in the middle.
    steps = max(len(completion.token_ids) for completion in output.outputs) - 1
    middle = StepShape((1,), (prompt + (steps + 1) // 2,), 1)
    return Explanation(
        metrics.time_in_queue or 0.0,
        cached,
        _phase(program, ceilings, prefill, 1, prompt - cached, first - scheduled),
        _phase(program, ceilings, [middle], steps, steps, last - first) if steps > 0 else None,
    )


def _phase(
    program: ModelProgram,
    ceilings: Ceilings,
    shapes: list[StepShape],
    times: int,
    num_tokens: int,
    seconds: float,
) -> PhaseTime:
    """Each shape was run so many `times`."""
    least = memory = 0.0
    for shape in shapes:
        for item, cost in zip(program.items, program.costs(shape), strict=True):
            rate = ceilings.bandwidth_at(program.working_set(item, cost, shape))
            moving, computing = cost.bytes / rate, ceilings.arithmetic_seconds(cost)
            least += times * max(moving, computing)
            memory += times * moving if moving > computing else 0.0
    bound = "memory" if 2 * memory > least else "arithmetic"
    return PhaseTime(num_tokens, seconds, bound, least / seconds if seconds > 0 else 0.0)


def _text(name: str, phase: PhaseTime, tokens: str) -> str:
    return (
        f"{name} ({tokens}), bound by {phase.bound} and at {phase.roof_share:.0%} of the "
        "machine's ceiling"
    )
