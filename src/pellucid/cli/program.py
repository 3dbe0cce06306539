"""`pellucid inspect --program`: the forward pass as the native backend runs it, kernel call by
kernel call, with what each costs.

With one token nearly every line has an intensity below ten FLOPs per byte, so the step is
memory-bound. With hundreds of tokens the linear layers are above the ridge of the machine's
roofline, so the step is compute-bound. No weights are read: their formats and shapes are enough.
Only the measurement of the machine's ceilings runs.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click

from ..backends.native.backend import NativeBackend
from ..backends.native.capture import Entry, capture, kv_spec_of, spec_of
from ..backends.native.costs import StepShape, entry_cost
from ..backends.native.plan import build_plan
from ..formats.tensor import TensorSpec
from ..kv.layout import build_layout
from ..kv_spec import build_kv_specs
from ..measure.hardware import Ceilings
from ..measure.machine import measure_ceilings
from ..models.registry import get_graph
from ..ops.cost import OpCost
from ..ops.kv_dtypes import choose_kv_dtypes
from ..ops.protocol import KVLayer
from ..units import format_bytes, format_count
from ..weights.checkpoint import open_checkpoint
from .terminal import print_table

__all__ = ["Listing", "build_listing", "print_listing", "report_listing"]

BLOCK_SIZE = 16


@dataclass(frozen=True, slots=True)
class _Line:
    barrier: bool
    op: str
    rows: int
    width: int  # numbers per row of the result; 0 without a result
    detail: str
    format: str | None
    cost: OpCost


@dataclass(frozen=True, slots=True)
class Listing:
    """A captured program, and its step of some tokens of one request."""

    num_tokens: int
    lines: list[_Line]
    weight_bytes: int
    arena_bytes: int
    ceilings: Ceilings

    @property
    def total(self) -> OpCost:
        return sum((line.cost for line in self.lines), OpCost(0, 0, 0))


def build_listing(path: Path, num_tokens: int) -> Listing:
    """Capture the model's forward pass from the declarations of its weights, and measure the
    machine's ceilings at this model's size.
    """
    backend = NativeBackend()
    with open_checkpoint(path) as checkpoint:
        config, weights = checkpoint.config, checkpoint.specs()
    backend.check_model(config)
    graph = get_graph(config.graph)
    specs = build_kv_specs(config, *choose_kv_dtypes("auto", backend.kv_dtypes))
    # the groups of layers do not matter: nothing is written to a cache
    layout = build_layout(specs, [backend.kv_token_bytes(spec) for spec in specs], BLOCK_SIZE)
    groups = {layer: g for g, group in enumerate(layout.groups) for layer in group.layers}
    caches = [KVLayer(replace(spec), groups[layer]) for layer, spec in enumerate(specs)]
    captured = capture(
        lambda ops, batch: graph.forward_with_hidden(ops, config, weights, batch, caches)
    )
    plan = build_plan(captured)
    step = StepShape((num_tokens,), (num_tokens,), 1)
    names = {id(spec): name for name, spec in weights.items()}
    weight_bytes = sum(map(backend.weight_bytes, weights.values()))
    lines = [
        _line(entry, barrier, step, names)
        for entry, barrier in zip(captured.entries, plan.barriers, strict=True)
    ]
    ceilings = measure_ceilings(
        backend.isa, backend.threads, working_sets=[weight_bytes], seconds=0.1
    )
    return Listing(num_tokens, lines, weight_bytes, plan.bytes_per_token * num_tokens, ceilings)


def _line(entry: Entry, barrier: bool, step: StepShape, names: dict[int, str]) -> _Line:
    output, weight = entry.output, entry.weight
    parts = [
        names[id(part)]
        for part in ([weight] if weight is not None else entry.vectors)
        if id(part) in names
    ]
    if entry.kv is not None:
        kv = kv_spec_of(entry.kv)
        parts.append(f"{kv.num_kv_heads} KV heads of {kv.k_dim}")
    return _Line(
        barrier=barrier,
        op=entry.op,
        rows=step.num_tokens if output is None else step.num_rows(output.rows),
        width=0 if output is None else output.width,
        detail=", ".join(parts),
        format=None if weight is None else _matrix(spec_of(weight)),
        cost=entry_cost(entry, step),
    )


def _matrix(spec: TensorSpec) -> str:
    outputs, inputs = spec.shape
    return f"{spec.format} {outputs} × {inputs}"


def print_listing(listing: Listing) -> None:
    """One line per entry, then the totals and the shortest time that a step can take on this
    machine.
    """
    cells = [
        [
            str(i),
            "wait" if line.barrier else "",
            line.op,
            f"{line.rows} × {line.width}" if line.width else "–",
            line.format or "",
            line.detail,
            f"{line.cost.flops:,}",
            f"{line.cost.bytes:,}",
            f"{line.cost.arithmetic_intensity:.2f}",
        ]
        for i, line in enumerate(listing.lines)
    ]
    print_table(
        ["entry", "barrier", "op", "result", "weight", "of", "FLOPs", "bytes", "FLOP/byte"], cells
    )
    total, ceilings = listing.total, listing.ceilings
    bandwidth = ceilings.bandwidth_at(listing.weight_bytes)
    binds = "memory" if ceilings.is_memory_bound(total, listing.weight_bytes) else "arithmetic"
    least = ceilings.least_seconds(total, listing.weight_bytes)
    click.echo(
        f"\n{len(cells)} entries, "
        f"{format_count(sum(line.barrier for line in listing.lines), 'barrier')}, "
        f"{format_bytes(listing.arena_bytes)} of buffers; "
        f"{format_count(listing.num_tokens, 'token')} of one request\n"
        f"{total.flops:,} FLOPs, {total.bytes:,} bytes: {total.arithmetic_intensity:.2f} "
        "FLOP/byte\n"
        f"measured here ({ceilings.isa}, {format_count(ceilings.threads, 'thread')}): "
        f"{bandwidth / 1e9:.1f} GB/s read from {format_bytes(listing.weight_bytes)}, "
        f"{ceilings.int8_peak / 1e9:.0f} GOP/s on bytes, {ceilings.float_peak / 1e9:.0f} on "
        "float32\n"
        f"a step takes at least {least * 1e3:.3f} ms, {listing.num_tokens / least:,.0f} tokens/s: "
        f"{binds} binds"
    )


def report_listing(listing: Listing) -> dict[str, Any]:
    """The same as JSON."""
    return {
        "num_tokens": listing.num_tokens,
        "entries": [
            {
                "index": i,
                "barrier": line.barrier,
                "op": line.op,
                "rows": line.rows,
                "width": line.width,
                "weight": line.format,
                "of": line.detail,
                **_cost(line.cost),
            }
            for i, line in enumerate(listing.lines)
        ],
        "total": _cost(listing.total),
        "weight_bytes": listing.weight_bytes,
        "arena_bytes": listing.arena_bytes,
        "isa": listing.ceilings.isa,
        "threads": listing.ceilings.threads,
        "read_bandwidth": listing.ceilings.bandwidth_at(listing.weight_bytes),
        "int8_peak": listing.ceilings.int8_peak,
        "float_peak": listing.ceilings.float_peak,
        "least_seconds": listing.ceilings.least_seconds(listing.total, listing.weight_bytes),
    }


def _cost(cost: OpCost) -> dict[str, float]:
    return {
        "flops": cost.flops,
        "int8_flops": cost.int8_flops,
        "scale_flops": cost.scale_flops,
        "bytes": cost.bytes,
        "arithmetic_intensity": cost.arithmetic_intensity,
    }
