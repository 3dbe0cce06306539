"""What a model will need and how fast it will be, before anything is loaded: weights, KV cache and
activations, how many requests fit, and the speed that the roofline predicts.

    on a device of a data sheet   seconds = Σ over the ops of max(bytes / bandwidth, FLOPs / peak)
    on this machine               seconds = Σ over the ops of the time measured + time outside them

On a device of a data sheet this is the roofline alone: nothing there was ever run, so real programs
are slower. On this machine a few layers run (`kernel_times.py`), because neither a sum nor the
larger of the two times is right for every op. Weights are one stream that a kernel prefetches, so
reading overlaps with arithmetic; in attention the two times about add up. The time outside the ops
is measured too (`step_overhead.py`).

Tensor parallelism cuts the heads, the MLP and the vocabulary into equal parts, one per device; two
sums over all devices per layer go over the link (2·(N-1)/N of the hidden states, as in a ring).
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from ..backends.native.backend import NativeBackend
from ..backends.native.costs import StepShape
from ..config import ModelConfig
from ..engine.memory import count_logits, engine_bytes
from ..engine_config import EngineConfig
from ..errors import ConfigError
from ..formats import packed_bytes
from ..formats.tensor import TensorSpec
from ..models.params import split_name
from ..models.registry import get_graph
from ..ops.cost import OpCost
from ..ops.kv_dtypes import choose_kv_dtypes
from .hardware import Ceilings
from .headers import Headers
from .kernel_times import FewLayers, load_few_layers, measure_kernel_times
from .kv_formula import KV_ALIASES, kv_formula
from .machine import measure_ceilings
from .roofline import ModelProgram, build_model_program
from .step_overhead import measure_step_overhead

__all__ = ["MemoryPlan", "Speed", "WeightGroup", "build_memory_plan", "predict", "this_machine"]

CHUNK = 512  # tokens of a step of prefill: EngineConfig's default
USABLE = 0.9  # of a device's memory, vLLM's default too


@dataclass(frozen=True, slots=True)
class WeightGroup:
    """Parameters of one part of the model."""

    name: str
    parameters: int
    num_bytes: int
    formats: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Speed:
    """The prediction of one phase."""

    tokens_per_second: float
    seconds: float  # of the step or steps
    bound: str  # "memory", "arithmetic", "kernels", "Python" or "link": what takes most of it
    parts: Mapping[str, float]  # seconds by what binds
    weight_bytes: int  # that a step reads
    kv_bytes: int


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Sizes in bytes, per device."""

    headers: Headers
    program: ModelProgram  # of one device
    device: str
    tp: int
    ctx: int
    batch: int
    weights: tuple[WeightGroup, ...]
    formula: tuple[str, ...]
    kv_bytes: int  # of `batch` requests of `ctx` tokens, in whole blocks
    step_bytes: Mapping[str, int]  # activations, logits, sampling …
    available: int
    largest_ctx: int  # at this batch
    largest_batch: int  # at this ctx

    @property
    def weight_bytes(self) -> int:
        return self.program.weight_bytes

    @property
    def needed(self) -> int:
        return self.weight_bytes + sum(self.step_bytes.values()) + self.kv_bytes

    @property
    def fits(self) -> bool:
        return self.needed <= self.available


def build_memory_plan(
    headers: Headers,
    backend: NativeBackend,
    *,
    ctx: int | None = None,
    batch: int = 1,
    kv_dtype: str = "auto",
    hardware: Ceilings | None = None,
    tp: int = 1,
) -> MemoryPlan:
    """Add up the memory of an engine. `hardware` is a data sheet; None: this machine. `ctx` None:
    the model's own context, 4,096 tokens at most.
    """
    config = headers.config
    longest = config.max_position_embeddings
    ctx = min(longest, 4096) if ctx is None else ctx
    if not 2 <= ctx <= longest:
        raise ConfigError(
            f"ctx is {ctx}; it must be between 2 and {longest}, which the model was made for"
        )
    if tp > 1 and hardware is None:
        raise ConfigError(
            f"tp is {tp}; on this machine one process runs the model: name --hardware"
        )
    # Cut the model for one device.
    asked = [name.strip() for name in kv_dtype.split(",")]
    plain = ",".join(KV_ALIASES.get(name, name) for name in asked)
    dtypes = choose_kv_dtypes(plain, backend.kv_dtypes, field="kv_dtype")
    names = tuple(
        d if a == "auto" else a for a, d in zip((asked[0], asked[-1]), dtypes, strict=True)
    )
    part, specs = _part(config, headers.specs, tp)
    program = build_model_program(part, specs, backend, dtypes)
    layout = program.layout
    # Compute the memory of the largest step.
    if hardware is None:
        engine = EngineConfig(max_model_len=ctx)
        rows = count_logits(part, engine, batch)
        taken = backend.step_bytes(program.forward(), CHUNK, rows, ctx)
        items = engine_bytes(part, engine, batch, program.weight_bytes, taken)
        del items["weights"]
        available = backend.available_memory()
    else:  # activations of 16 bits, logits in float32
        items = {
            "activations": program.plan.bytes_per_token * max(CHUNK, batch) // 2,
            "logits": batch * program.result.width * 4,
        }
        available = int(hardware.memory_bytes * USABLE)
    # Compute the rest, for the KV cache.
    rest = available - program.weight_bytes - sum(items.values())
    blocks = max(0, rest) // layout.bytes_per_block
    formula = kv_formula(part, layout, (names[0], names[1]))
    return MemoryPlan(
        headers=headers,
        program=program,
        device=hardware.name if hardware is not None else "this machine",
        tp=tp,
        ctx=ctx,
        batch=batch,
        weights=tuple(_weight_groups(specs)),
        formula=tuple(formula),
        kv_bytes=batch * layout.blocks_for(ctx, CHUNK) * layout.bytes_per_block,
        step_bytes=items,
        available=available,
        largest_ctx=layout.tokens_in(blocks // batch, CHUNK, longest),
        largest_batch=blocks // layout.blocks_for(ctx, CHUNK),
    )


def _part(
    config: ModelConfig, specs: Mapping[str, TensorSpec], tp: int
) -> tuple[ModelConfig, Mapping[str, TensorSpec]]:
    """The part of the model that one of `tp` devices holds."""
    if tp == 1:
        return config, specs
    for name, size in (
        ("num_heads", config.num_heads),
        ("intermediate_size", config.intermediate_size),
    ):
        if size % tp:
            raise ConfigError(f"tp is {tp}; {name} is {size}, which it does not divide")
    kv_heads = config.num_kv_heads
    if kv_heads % tp and tp % kv_heads:
        raise ConfigError(f"tp is {tp}; num_kv_heads is {kv_heads}: one must divide the other")
    part = replace(
        config,
        num_heads=config.num_heads // tp,
        num_kv_heads=max(1, kv_heads // tp),  # more devices than KV heads: each has a copy
        intermediate_size=config.intermediate_size // tp,
        vocab_size=-(-config.vocab_size // tp),
    )
    return part, {
        param.name: TensorSpec(specs[param.name].format, param.shape)
        for param in get_graph(part.graph).parameters(part)
    }


def _weight_groups(specs: Mapping[str, TensorSpec]) -> list[WeightGroup]:
    groups: dict[str, list[TensorSpec]] = {}
    tied = "lm_head.weight" not in specs
    for name, spec in specs.items():
        module = split_name(name)[1]
        if module.startswith("embed"):
            group = "embedding, and lm_head" if tied else "embedding"
        elif module == "lm_head":
            group = "lm_head"
        elif module.endswith("norm"):
            group = "norms"
        elif module in ("q_proj", "k_proj", "v_proj", "o_proj"):
            group = "attention"
        else:
            group = "mlp"
        groups.setdefault(group, []).append(spec)
    return [
        WeightGroup(
            name,
            sum(_count(spec) for spec in found),
            sum(map(packed_bytes, found)),
            tuple(dict.fromkeys(spec.format for spec in found)),
        )
        for name, found in groups.items()
    ]


def _count(spec: TensorSpec) -> int:
    rows = spec.shape[0] if len(spec.shape) == 2 else 1
    return rows * spec.shape[-1]


def this_machine(plan: MemoryPlan, backend: NativeBackend, seconds: float = 0.1) -> Ceilings:
    """Measure the ceilings at the sizes of this model, in about five times `seconds`."""
    step = plan.program.weight_bytes + plan.batch * plan.program.kv_bytes(plan.ctx)
    sizes = [4 << 20, min(step, 2 << 30)]
    return measure_ceilings(backend.isa, backend.threads, working_sets=sizes, seconds=seconds)


def predict(
    plan: MemoryPlan, ceilings: Ceilings, backend: NativeBackend | None
) -> dict[str, Speed]:
    """Prefill of one prompt of `ctx` tokens, and decode of `batch` requests that have `ctx` tokens
    each. With a backend (this machine), its kernels are timed.
    """
    ctx, batch = plan.ctx, plan.batch
    few = None if backend is None else load_few_layers(plan.program, backend)
    # The time outside the ops, by the number of requests.
    outside = {1: 0.0, batch: 0.0}
    if backend is not None and few is not None:
        outside = {n: measure_step_overhead(few, backend, n) for n in outside}
    # Prefill: the mean of the first and the last chunk, times their number.
    chunk = min(CHUNK, ctx)
    ends = [StepShape((chunk,), (length,), 1) for length in dict.fromkeys((chunk, ctx))]
    chunks = [_step(plan, ceilings, backend, few, step, outside[1]) for step in ends]
    scale = ctx / chunk / len(chunks)
    prefill = {name: scale * sum(parts[name] for parts in chunks) for name in chunks[0]}
    # Decode: one step.
    step = StepShape((1,) * batch, (ctx,) * batch, batch)
    decode = _step(plan, ceilings, backend, few, step, outside[batch])
    return {
        "prefill": _speed(plan, ctx, prefill, ends[0]),
        "decode": _speed(plan, batch, decode, step),
    }


def _speed(plan: MemoryPlan, tokens: int, parts: Mapping[str, float], step: StepShape) -> Speed:
    seconds = sum(parts.values())
    weights = sum(
        cost.bytes_read
        for item, cost in zip(plan.program.items, plan.program.costs(step), strict=True)
        if item.entry.weight is not None
    )
    return Speed(
        tokens / seconds,
        seconds,
        max(parts, key=lambda name: parts[name]),
        parts,
        weights,
        sum(map(plan.program.kv_bytes, step.seq_lens)),
    )


def _step(
    plan: MemoryPlan,
    ceilings: Ceilings,
    backend: NativeBackend | None,
    few: FewLayers | None,
    step: StepShape,
    outside: float,
) -> dict[str, float]:
    """Seconds of a step by what binds each of its ops; `outside` are seconds beside them. Without
    the few layers no kernel is timed, which matters little where layers are that large.
    """
    program = plan.program
    kernels = None
    if backend is not None and few is not None:
        kernels = measure_kernel_times(few, backend, step)
    parts = {"memory": 0.0, "arithmetic": 0.0, "kernels": 0.0}
    for i, (item, cost) in enumerate(zip(program.items, program.costs(step), strict=True)):
        if backend is None and ceilings.float_dtype != "float32":
            cost = _on_accelerator(cost, is_small=not item.is_streamed)
        working_set = program.working_set(item, cost, step)
        times = {
            "memory": cost.bytes / ceilings.bandwidth_range(working_set).median,
            "arithmetic": ceilings.arithmetic_seconds(cost),
            "kernels": 0.0 if kernels is None else kernels.seconds[i],
        }
        bound = max(times, key=lambda name: times[name])
        if kernels is not None:
            bound = next(
                (n for n in ("memory", "arithmetic") if times[n] > times["kernels"] / 2), "kernels"
            )
            parts[bound] += times["kernels"]
        else:
            parts[bound] += times[bound]
    if few is not None:
        parts["Python"] = outside
    if plan.tp > 1 and ceilings.link_bandwidth:
        sums = 2 * program.config.num_layers
        sent = sums * step.num_tokens * program.config.hidden_size * 2 * 2 * (plan.tp - 1) / plan.tp
        parts["link"] = sent / ceilings.link_bandwidth
    return parts


def _on_accelerator(cost: OpCost, *, is_small: bool) -> OpCost:
    """The cost on a device that multiplies weights and stores activations in 16 bits."""
    halves = 2 if is_small else 1
    return OpCost(cost.flops, cost.bytes_read // halves, cost.bytes_written // halves)
