"""Where the time of prefill and decode goes, op by op, compared with the roof of each op.

The model runs through the engine's own core, with the program's ledger on
(`CapturedForward.ledger`). The time of a phase is the sum of its parts:

    wall = ops of the program + Python (schedule, batch, sampling, text) + unaccounted

`unaccounted` is the time that no clock measured: waking threads, memory for the logits, the call
itself. Ceilings and work are measured alternately, because the bandwidth of a shared machine
changes within seconds.
"""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..backends.native.backend import NativeBackend
from ..backends.native.program import CapturedForward, TimedStep
from ..config import ModelConfig
from ..engine.admission import Submission
from ..engine.core import EngineCore
from ..engine.loader import open_model
from ..engine.options import build_engine_config
from ..engine.prompts import TokenizedPrompt
from ..engine.stats import StepTimes
from ..errors import ConfigError
from ..ops.cost import OpCost
from ..ops.kv_dtypes import choose_kv_dtypes
from ..sampling_params import SamplingParams
from ..weights.checkpoint import open_checkpoint
from .hardware import Ceilings, highest_peaks
from .machine import measure_ceilings
from .roofline import ModelProgram, build_model_program, total

__all__ = ["Line", "Phase", "Profile", "ProfiledStep", "profile_model", "run_prompts"]

REPEATS = 3  # of prefill and decoding
OVERHEAD_SHARE = 0.1  # an op below this share of its roof is bound by neither resource


@dataclass(frozen=True, slots=True)
class Line:
    """Entries of one label, or of one group, over all steps of a phase."""

    name: str
    entries: int  # of one step
    seconds: float
    cost: OpCost
    least_seconds: float  # at the ceilings, entry by entry
    memory_seconds: float  # the part of it in which moving bytes takes longer than arithmetic

    @property
    def roof_share(self) -> float:
        """The share of the ceiling: 1 is as fast as the machine."""
        return self.least_seconds / self.seconds if self.seconds else 0.0

    @property
    def bound(self) -> str:
        """What most of its least time is spent on; "overhead" if calls and barriers take the
        time.
        """
        if self.roof_share < OVERHEAD_SHARE:
            return "overhead"
        return "memory" if 2 * self.memory_seconds > self.least_seconds else "arithmetic"


@dataclass(frozen=True, slots=True)
class ProfiledStep:
    """One step, for the trace. Times are seconds of time.monotonic()."""

    start: float
    end: float
    times: StepTimes
    timed: TimedStep


@dataclass(frozen=True, slots=True)
class Phase:
    """Prefill or decode."""

    name: str
    num_tokens: int
    num_steps: int
    wall_seconds: float
    python: Mapping[str, float]  # seconds by activity
    ops: tuple[Line, ...]  # the longest first
    groups: tuple[Line, ...]  # in order of the layers
    cost: OpCost
    mfu: float
    mbu: float
    steps: tuple[ProfiledStep, ...]

    @property
    def op_seconds(self) -> float:
        return sum(line.seconds for line in self.ops)

    @property
    def python_seconds(self) -> float:
        return sum(self.python.values())

    @property
    def unaccounted_seconds(self) -> float:
        return self.wall_seconds - self.op_seconds - self.python_seconds

    @property
    def tokens_per_second(self) -> float:
        return self.num_tokens / self.wall_seconds

    @property
    def least_seconds(self) -> float:
        return sum(line.least_seconds for line in self.ops)

    @property
    def bound(self) -> str:
        memory = sum(line.memory_seconds for line in self.ops)
        return "memory" if 2 * memory > self.least_seconds else "arithmetic"


@dataclass(frozen=True, slots=True)
class Profile:
    """A model's prefill and decode on this machine."""

    path: Path
    config: ModelConfig
    program: ModelProgram
    ceilings: Ceilings
    working_set: int  # bytes that a step of decoding reads
    bandwidths: tuple[float, ...]  # bytes/s read from it, measured alternately with the work
    phases: tuple[Phase, ...]


def profile_model(
    path: Path, *, prompt: int, output: int, batch: int, options: Mapping[str, object]
) -> Profile:
    """Run `batch` prompts of `prompt` tokens and decode `output` tokens after each, three times.

    `options` are the engine's and the backend's, as `LLM` takes them. Raises a PellucidError if the
    model does not fit or cannot run.
    """
    # load the model, with a cache for all prompts and no shared prefixes
    config = build_engine_config(
        {
            "max_num_batched_tokens": 512,
            "max_model_len": prompt + output,
            "max_num_seqs": batch,
            "enable_prefix_caching": False,
            "speculative": None,  # a step of decoding has one row for each prompt
            **options,
        }
    )
    if config.backend != "native":
        raise ConfigError(
            f"backend is {config.backend!r}; only the native backend times its entries"
        )
    with open_model(path) as model:
        engine = model.build_engine(config)
    backend = NativeBackend(**config.backend_options)  # type: ignore[arg-type]
    dtypes = choose_kv_dtypes(config.kv_cache_dtype, backend.kv_dtypes)
    with open_checkpoint(path) as checkpoint:
        program = build_model_program(engine.model_config, checkpoint.specs(), backend, dtypes)
    # run once to touch all memory, then alternately with measuring the bandwidth
    working_set = program.weight_bytes + batch * program.kv_bytes(prompt)
    run_prompts(engine.core, program.config.vocab_size, prompt, 2, batch)
    readings = [_measure(backend, working_set, 0.1)]
    prefill: list[ProfiledStep] = []
    decode: list[ProfiledStep] = []
    for _ in range(REPEATS):
        first, rest = run_prompts(engine.core, program.config.vocab_size, prompt, output, batch)
        prefill += first
        decode += rest
        readings.append(_measure(backend, working_set, 0.05))
    ceilings = replace(readings[0], peaks=highest_peaks(readings))
    rates = [reading.bandwidth_at(working_set) for reading in readings]
    phases = [
        _phase(name, steps, program, ceilings, max(rates))
        for name, steps in (("prefill", prefill), ("decode", decode))
        if steps
    ]
    return Profile(
        path, engine.model_config, program, ceilings, working_set, tuple(rates), tuple(phases)
    )


def _measure(backend: NativeBackend, working_set: int, seconds: float) -> Ceilings:
    sizes = [1 << 16, 1 << 18, 1 << 20, 4 << 20, 16 << 20, working_set]
    return measure_ceilings(backend.isa, backend.threads, working_sets=sizes, seconds=seconds)


def run_prompts(
    core: EngineCore,
    vocab_size: int,
    prompt: int,
    output: int,
    batch: int,
    *,
    before_step: Callable[[], None] = lambda: None,
) -> tuple[list[ProfiledStep], list[ProfiledStep]]:
    """Run `batch` prompts at once, with the ledger on: (steps of prefill, steps of decode)."""
    params = SamplingParams(temperature=0, max_tokens=output, ignore_eos=True)
    forward = core.runner.forward
    assert isinstance(forward, CapturedForward)
    core.add_requests(
        [
            Submission(
                f"profile-{b}",
                TokenizedPrompt(
                    [(7919 * (i + b * prompt) + 13) % vocab_size for i in range(prompt)], None
                ),
                params,
            )
            for b in range(batch)
        ]
    )
    prefill: list[ProfiledStep] = []
    decode: list[ProfiledStep] = []
    while core.has_unfinished:
        before_step()
        forward.ledger = []
        start = time.monotonic()
        core.step()
        end = time.monotonic()
        if not forward.ledger:
            continue
        (timed,) = forward.ledger
        step = ProfiledStep(start, end, core.stats().last_step, timed)
        (decode if max(timed.shape.q_lens) == 1 else prefill).append(step)
    forward.ledger = None
    return prefill, decode


def _phase(
    name: str,
    steps: Sequence[ProfiledStep],
    program: ModelProgram,
    ceilings: Ceilings,
    bandwidth: float,
) -> Phase:
    """Add up the steps of a phase. `bandwidth` is that of reading the whole working set."""
    seconds = [0.0] * len(program.items)
    costs = [OpCost(0, 0, 0)] * len(program.items)
    least = [0.0] * len(program.items)
    memory = [0.0] * len(program.items)
    for step in steps:
        shape = step.timed.shape
        for i, (item, cost) in enumerate(zip(program.items, program.costs(shape), strict=True)):
            rate = (
                bandwidth
                if item.is_streamed
                else ceilings.bandwidth_at(program.working_set(item, cost, shape))
            )
            moving, computing = cost.bytes / rate, ceilings.arithmetic_seconds(cost)
            seconds[i] += float(step.timed.seconds[i])
            costs[i] += cost
            least[i] += max(moving, computing)
            memory[i] += moving if moving > computing else 0.0

    def line(title: str, places: Sequence[int]) -> Line:
        return Line(
            title,
            len(places),
            sum(seconds[i] for i in places),
            total([costs[i] for i in places]),
            sum(least[i] for i in places),
            sum(memory[i] for i in places),
        )

    def lines(keys: Iterable[str]) -> list[Line]:
        places: dict[str, list[int]] = {}
        for i, key in enumerate(keys):
            places.setdefault(key, []).append(i)
        return [line(title, of_it) for title, of_it in places.items()]

    cost, wall = total(costs), sum(step.end - step.start for step in steps)
    times = [step.times for step in steps]
    python = {
        "schedule": sum(t.schedule for t in times),
        "batch and sampling": sum(t.execute - t.forward for t in times),
        "text and outputs": sum(t.update for t in times),
    }
    return Phase(
        name,
        sum(step.timed.shape.num_tokens for step in steps),
        len(steps),
        wall,
        python,
        tuple(sorted(lines(i.label for i in program.items), key=lambda found: -found.seconds)),
        tuple(lines(i.group for i in program.items)),
        cost,
        ceilings.arithmetic_seconds(cost) / wall,
        cost.bytes / bandwidth / wall,
        tuple(steps),
    )
