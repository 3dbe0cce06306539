"""Explains the time of a request in one sentence: queue, prefill and decode, what bound each, and
its share of the machine's ceilings.

The least time of its own tokens at the ceilings is compared with the time taken. Other requests of
a batch share the steps and the reading of the weights, so the sentence also gives their part of the
computed tokens.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from ..backends.native.backend import NativeBackend
from ..backends.native.capture import kv_spec_of, spec_of
from ..backends.native.costs import StepShape, entry_cost
from ..config import ModelConfig
from ..errors import PellucidError
from ..formats.tensor import TensorSpec
from ..outputs import Explanation, PhaseTime, RequestMetrics
from .hardware import Ceilings
from .machine import default_machine_file, load_machine
from .roofline import Item, ModelProgram, build_model_program

__all__ = ["Explainer", "Ledger", "explain_request", "explain_times"]

MEASURE_FIRST = "run `pellucid machine` once to learn what bound it"


class Ledger:
    """The least time of a step: each kind of op is counted once, with the number of its entries.
    Layers repeat, so a program of hundreds of entries has about twenty kinds.
    """

    def __init__(self, program: ModelProgram, ceilings: Ceilings) -> None:
        counts = Counter(map(_kind, program.items))
        first: dict[object, Item] = {}
        for item in program.items:
            first.setdefault(_kind(item), item)
        self._items = [(item, counts[kind]) for kind, item in first.items()]
        self._program, self._ceilings = program, ceilings

    def least_seconds(self, shapes: list[StepShape]) -> tuple[float, float]:
        """The least time of these steps: of the ops that memory binds, and of those that arithmetic
        binds.
        """
        memory = arithmetic = 0.0
        for shape in shapes:
            for item, count in self._items:
                cost = entry_cost(item.entry, shape)
                rate = self._ceilings.bandwidth_at(self._program.working_set(item, cost, shape))
                moving, computing = cost.bytes / rate, self._ceilings.arithmetic_seconds(cost)
                if moving > computing:
                    memory += count * moving
                else:
                    arithmetic += count * computing
        return memory, arithmetic


def _kind(item: Item) -> object:
    """What the cost of an entry depends on."""
    entry = item.entry
    return (
        entry.op,
        None if entry.weight is None else spec_of(entry.weight),
        None if entry.kv is None else kv_spec_of(entry.kv),
        tuple((x.width, x.quantized) for x in entry.inputs),
        None if entry.output is None else (entry.output.width, entry.output.rows),
        tuple(sorted(entry.attributes.items())),
        bool(entry.vectors),
    )


@dataclass(frozen=True)
class Explainer:
    """Explains requests of one engine. The model's program is captured, and the ceilings of this
    machine are read, when it is first called. Nothing is measured.
    """

    config: ModelConfig
    specs: Mapping[str, TensorSpec]
    kv_dtypes: tuple[str, str]
    isa: str
    threads: int
    chunk: int  # the engine's max_num_batched_tokens

    def __call__(self, metrics: RequestMetrics) -> Explanation:
        """Where this machine was not measured, the sentence says so and gives the times alone."""
        try:
            ledger = self._ledger
        except PellucidError as error:
            return explain_times(metrics, f"{error}; {MEASURE_FIRST}")
        return explain_request(metrics, ledger, self.chunk)

    @cached_property
    def _ledger(self) -> Ledger:
        ceilings = load_machine(default_machine_file()).ceilings(self.isa, self.threads)
        backend = NativeBackend(isa=self.isa, threads=self.threads)
        program = build_model_program(self.config, self.specs, backend, self.kv_dtypes)
        return Ledger(program, ceilings)


def explain_request(metrics: RequestMetrics, ledger: Ledger, chunk: int) -> Explanation:
    """Compare the times of a request with the ceilings. `chunk`: the engine's
    max_num_batched_tokens.
    """
    prefill_seconds, decode_seconds = metrics.time_in_prefill, metrics.time_in_decode
    if prefill_seconds is None or decode_seconds is None:
        return explain_times(metrics, "no token came")
    # Prefill: the prompt in chunks, after what the cache had.
    prompt, cached = metrics.num_prompt_tokens, metrics.num_cached_tokens
    starts = range(cached, prompt, chunk)
    ends = [min(start + chunk, prompt) for start in starts]
    # Only the last chunk gives logits, and that of an embedding a hidden state instead.
    rows = (1, 0) if metrics.num_output_tokens else (0, 1)
    shapes = [
        StepShape((e - s,), (e,), *(rows if e == prompt else (0, 0)))
        for s, e in zip(starts, ends, strict=True)
    ]
    least = ledger.least_seconds(shapes)
    prefill = _phase(prompt - cached, prefill_seconds, least)
    # Decode: one step for each further token, or as many as speculation needed, with its drafts;
    # all are near the one in the middle.
    n = metrics.num_completions
    num_tokens = max(0, metrics.num_output_tokens - n)
    decode = None
    if num_tokens:
        steps = (metrics.num_decode_steps or num_tokens) / n
        length = prompt + round((num_tokens / n + 1) / 2)
        drafts = metrics.num_draft_tokens / max(1, metrics.num_decode_steps)
        moving, computing = _decode_seconds(ledger, n, length, drafts)
        decode = _phase(num_tokens, decode_seconds, (steps * moving, steps * computing))
        least = (least[0] + steps * moving, least[1] + steps * computing)
    # What took most of the time, and the share of all of it.
    waited = metrics.time_in_queue or 0.0
    seconds = prefill_seconds + decode_seconds
    longest = prefill if decode is None or prefill.seconds >= decode.seconds else decode
    return Explanation(
        sentence=_sentence(metrics, prefill, decode),
        bound="queue" if waited > longest.seconds else longest.bound,
        share_of_ceiling=sum(least) / seconds if seconds > 0 else None,
        prefill=prefill,
        decode=decode,
    )


def _decode_seconds(ledger: Ledger, n: int, length: int, drafts: float) -> tuple[float, float]:
    """The least time of a step of `n` completions with `drafts` draft tokens each, on average."""
    few = int(drafts)
    shares = {few + 1: 1 + few - drafts, few + 2: drafts - few}  # by rows of a completion
    moving = computing = 0.0
    for rows, share in shares.items():
        if share:
            step = StepShape((rows,) * n, (length,) * n, rows * n)
            memory, arithmetic = ledger.least_seconds([step])
            moving, computing = moving + share * memory, computing + share * arithmetic
    return moving, computing


def explain_times(metrics: RequestMetrics, reason: str) -> Explanation:
    """The times alone, and the reason why no more is known."""
    prefill = decode = None
    if metrics.time_in_prefill is not None and metrics.time_in_decode is not None:
        computed = metrics.num_prompt_tokens - metrics.num_cached_tokens
        prefill = PhaseTime(computed, metrics.time_in_prefill, None, None)
        num_tokens = metrics.num_output_tokens - metrics.num_completions
        if num_tokens > 0:
            decode = PhaseTime(num_tokens, metrics.time_in_decode, None, None)
    sentence = f"{_sentence(metrics, prefill, decode)}; {reason}"
    return Explanation(sentence, prefill=prefill, decode=decode)


def _phase(num_tokens: int, seconds: float, least: tuple[float, float]) -> PhaseTime:
    memory, arithmetic = least
    bound = "memory" if memory > arithmetic else "arithmetic"
    return PhaseTime(num_tokens, seconds, bound, sum(least) / seconds if seconds > 0 else None)


def _sentence(metrics: RequestMetrics, prefill: PhaseTime | None, decode: PhaseTime | None) -> str:
    """The parts of the time, the largest first; those of less than 1 % are left out."""
    cached = metrics.num_cached_tokens
    parts = {"waiting in the queue": metrics.time_in_queue or 0.0}
    if prefill is not None:
        more = f", {cached} more from the cache" if cached else ""
        parts[_text("prefill", prefill, more)] = prefill.seconds
    if decode is not None:
        parts[_text("decode", decode, "")] = decode.seconds
    whole = sum(parts.values())
    told = [
        f"{seconds / whole:.0%} {name}"
        for name, seconds in sorted(parts.items(), key=lambda part: -part[1])
        if whole > 0 and seconds >= 0.01 * whole
    ]
    # The work of others in the same steps.
    phases = [phase for phase in (prefill, decode) if phase is not None]
    own = sum(phase.num_tokens for phase in phases)
    others = metrics.num_other_tokens
    shared = (
        f"; {others / (others + own):.0%} of the tokens computed meanwhile were of other requests"
        if others
        else ""
    )
    # Ceilings that were measured in a slow minute of the machine.
    slower = (
        "; more than 100% says that the machine was slower when `pellucid machine` measured it"
        if any((phase.roof_share or 0.0) >= 1.005 for phase in phases)
        else ""
    )
    return f"{whole:.2f} s: {', '.join(told) or 'nothing was computed'}{shared}{slower}"


def _text(name: str, phase: PhaseTime, more: str) -> str:
    tokens = f"{name} ({phase.num_tokens} token{'' if phase.num_tokens == 1 else 's'}{more})"
    if phase.bound is None or phase.roof_share is None:
        return tokens
    return (
        f"{tokens}, bound by {phase.bound} and at {phase.roof_share:.0%} of the machine's ceiling"
    )
