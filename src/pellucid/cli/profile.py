"""`pellucid profile`: where the time of prefill and decode goes, op by op, beside the roof of each
op.

Prefill computes many tokens with each weight that it reads and is bound by arithmetic. Decode reads
all weights for one token and is bound by memory. The two halves of the table show it.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import ConfigError
from ..units import format_bytes, format_count
from ..weights import hub
from .options import debug_option, json_option
from .terminal import print_table

if TYPE_CHECKING:
    from ..measure.profile import Line, Phase, Profile

__all__ = ["profile"]

_HEADER = ("ms", "share", "FLOPs", "bytes", "FLOP/byte", "of roof", "bound by")


@click.command()
@click.argument("model", metavar="MODEL")
@click.option(
    "--prompt",
    type=click.IntRange(2, 1 << 20),
    default=512,
    show_default=True,
    help="Tokens of each prompt.",
)
@click.option(
    "--output",
    type=click.IntRange(2, 1 << 20),
    default=64,
    show_default=True,
    help="Tokens that are decoded after each prompt.",
)
@click.option(
    "--batch",
    type=click.IntRange(1, 1 << 12),
    default=1,
    show_default=True,
    help="Requests at once.",
)
@click.option("--threads", type=click.IntRange(1, 256), help="Threads of the native backend.")
@click.option("--isa", help="Its kernels, by their instruction set.")
@click.option(
    "--kv-dtype", default="auto", show_default=True, help="What keys and values are kept in."
)
@click.option(
    "--plot",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE.svg",
    help="Draw the roofline, each op a dot (needs matplotlib).",
)
@click.option(
    "--trace",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE.json",
    help="Write each step and op as a trace that Perfetto opens.",
)
@json_option
@debug_option
def profile(
    model: str,
    prompt: int,
    output: int,
    batch: int,
    threads: int | None,
    isa: str | None,
    kv_dtype: str,
    plot: Path | None,
    trace: Path | None,
    as_json: bool,
) -> None:
    """Show where the time of MODEL goes: each op's time, FLOPs, bytes, and share of the ceiling.

    MODEL is a .gguf file, a folder of safetensors, or a name; a name that is not here is fetched.
    Nothing else should run on the machine meanwhile.
    """
    from ..measure.profile import profile_model
    from ..measure.report import plot_roofline, write_trace

    for path in (plot, trace):  # before the work, not after it
        if path is not None and not path.parent.is_dir():
            raise ConfigError(f"{path}: there is no folder {str(path.parent)!r}")
    options = {
        "kv_cache_dtype": kv_dtype,
        **({} if threads is None else {"threads": threads}),
        **({} if isa is None else {"isa": isa}),
    }
    found = profile_model(
        hub.resolve_model(model, progress=True),
        prompt=prompt,
        output=output,
        batch=batch,
        options=options,
    )
    if plot is not None:
        plot_roofline(found, plot)
    if trace is not None:
        write_trace(found, trace)
    if as_json:
        click.echo(json.dumps(_report(found)))
    else:
        _print(found)


def _print(found: "Profile") -> None:
    ceilings = found.ceilings
    rates = sorted(found.bandwidths)
    click.echo(
        f"{found.path.name}: {ceilings.isa}, {format_count(ceilings.threads, 'thread')}; measured "
        f"in turns with the work: {rates[0] / 1e9:.1f} to {rates[-1] / 1e9:.1f} GB/s read from "
        f"{format_bytes(found.working_set)}, {ceilings.int8_peak / 1e9:.0f} GOP/s on bytes, "
        f"{ceilings.float_peak / 1e9:.0f} on float32\n"
    )
    for phase in found.phases:
        click.echo(
            f"{phase.name}: {phase.tokens_per_second:,.1f} tokens/s, "
            f"{format_count(phase.num_steps, 'step')} of "
            f"{phase.wall_seconds / phase.num_steps * 1e3:.3f} ms; MFU {phase.mfu:.0%}, MBU "
            f"{phase.mbu:.0%}; bound by {phase.bound}"
        )
    click.echo()
    _print_lines("op", [phase.ops for phase in found.phases], found)
    _print_rest(found.phases)
    click.echo()
    _print_lines("layers", [phase.groups for phase in found.phases], found)
    click.echo(
        "\nms, FLOPs and bytes are of one step; least time at the ceilings over the time taken is "
        '"of roof"'
    )


def _print_lines(title: str, columns: Sequence[Sequence["Line"]], found: "Profile") -> None:
    """One row per name, with a half for each phase."""
    names = list(dict.fromkeys(line.name for lines in columns for line in lines))
    rows = []
    for name in names:
        row = [name]
        for phase, lines in zip(found.phases, columns, strict=True):
            row += _cells(next(line for line in lines if line.name == name), phase)
        rows.append(row)
    header = [title]
    for phase in found.phases:
        header += [f"{phase.name} ms", *_HEADER[1:]]
    print_table(header, rows)


def _cells(line: "Line", phase: "Phase") -> list[str]:
    return [
        f"{line.seconds / phase.num_steps * 1e3:.3f}",
        f"{line.seconds / phase.wall_seconds:.1%}",
        _short(line.cost.flops / phase.num_steps),
        _short(line.cost.bytes / phase.num_steps),
        f"{line.cost.arithmetic_intensity:.2f}",
        f"{line.roof_share:.0%}",
        line.bound,
    ]


def _print_rest(phases: Sequence["Phase"]) -> None:
    """The time outside of ops. The sum of all lines is the wall time."""
    rows = [
        ["ops together", *(_time(p.op_seconds, p) for p in phases)],
        ["Python", *(_time(p.python_seconds, p) for p in phases)],
        *([f"  {name}", *(_time(p.python[name], p) for p in phases)] for name in phases[0].python),
        ["unaccounted", *(_time(p.unaccounted_seconds, p) for p in phases)],
        ["wall", *(_time(p.wall_seconds, p) for p in phases)],
    ]
    click.echo()
    print_table(["the sum", *(p.name for p in phases)], rows)


def _time(seconds: float, phase: "Phase") -> str:
    return f"{seconds / phase.num_steps * 1e3:.3f} ms  {seconds / phase.wall_seconds:6.1%}"


def _short(count: float) -> str:
    for unit, scale in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= scale:
            return f"{count / scale:.2f} {unit}"
    return f"{count:.0f}"


def _report(found: "Profile") -> dict[str, Any]:
    """The same for programs. Seconds, FLOPs and bytes are sums over the steps of a phase."""
    return {
        "model": str(found.path),
        "isa": found.ceilings.isa,
        "threads": found.ceilings.threads,
        "working_set": found.working_set,
        "read_bandwidth": list(found.bandwidths),
        "int8_peak": found.ceilings.int8_peak,
        "float_peak": found.ceilings.float_peak,
        "phases": {
            phase.name: {
                "tokens": phase.num_tokens,
                "steps": phase.num_steps,
                "wall_seconds": phase.wall_seconds,
                "tokens_per_second": phase.tokens_per_second,
                "bound": phase.bound,
                "mfu": phase.mfu,
                "mbu": phase.mbu,
                "roof_share": phase.least_seconds / phase.wall_seconds,
                "ops_share": phase.op_seconds / phase.wall_seconds,
                "python_share": phase.python_seconds / phase.wall_seconds,
                "unaccounted_share": phase.unaccounted_seconds / phase.wall_seconds,
                "python_seconds": dict(phase.python),
                "ops": [_line(line) for line in phase.ops],
                "layers": [_line(line) for line in phase.groups],
            }
            for phase in found.phases
        },
    }


def _line(line: "Line") -> dict[str, Any]:
    return {
        "name": line.name,
        "entries": line.entries,
        "seconds": line.seconds,
        "flops": line.cost.flops,
        "int8_flops": line.cost.int8_flops,
        "bytes": line.cost.bytes,
        "arithmetic_intensity": line.cost.arithmetic_intensity,
        "roof_share": line.roof_share,
        "bound": line.bound,
    }
