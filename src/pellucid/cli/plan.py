"""`pellucid plan`: what a model needs and how fast it will be, before anything is loaded.

Headers are read and no weights. The memory is added up with its arithmetic, and the speed follows
from the roofline: decode reads all weights and the cache for each token, prefill multiplies.
"""

import json
from typing import TYPE_CHECKING, Any

import click

from ..errors import CapacityError, UnsupportedError
from ..units import format_bytes, format_count
from .options import debug_option, json_option
from .terminal import print_table

if TYPE_CHECKING:
    from ..measure.hardware import Ceilings
    from ..measure.kv_formula import LatentCache
    from ..measure.plan import MemoryPlan, Speed

__all__ = ["plan"]

_KERNELS = "kernels and barriers"


@click.command()
@click.argument("model", metavar="MODEL")
@click.option(
    "--ctx",
    type=click.IntRange(2, 1 << 24),
    help="Tokens of a request.  [default: the model's context, 4096 at most]",
)
@click.option(
    "--batch",
    type=click.IntRange(1, 1 << 16),
    default=1,
    show_default=True,
    help="Requests at once.",
)
@click.option(
    "--kv-dtype",
    default="auto",
    show_default=True,
    help="What keys and values are kept in: f16, bf16, f32, int8, int4, or two of them, K,V.",
)
@click.option(
    "--hardware",
    metavar="NAME",
    help="A device by its data sheet (h100, mi300x, rtx4070 …).  [default: this machine]",
)
@click.option(
    "--tp",
    type=click.IntRange(1, 1024),
    default=1,
    show_default=True,
    help="Devices that share the model by tensor parallelism.",
)
@click.option("--threads", type=click.IntRange(1, 256), help="Threads of this machine.")
@json_option
@debug_option
@click.pass_context
def plan(
    context: click.Context,
    model: str,
    ctx: int | None,
    batch: int,
    kv_dtype: str,
    hardware: str | None,
    tp: int,
    threads: int | None,
    as_json: bool,
) -> None:
    """Plan the memory and predict the speed of MODEL. Nothing is loaded.

    MODEL is a .gguf file, a folder, a config.json alone, or a name; of a model that is not here the
    headers are fetched and nothing else (of ORG/NAME:QUANT that of its GGUF file).
    """
    from ..backends.native.backend import NativeBackend
    from ..measure.hardware import data_sheet
    from ..measure.headers import config_json_of, find_headers, read_config_json, read_headers
    from ..measure.kv_formula import read_latent_cache
    from ..measure.plan import build_memory_plan, predict, this_machine

    device = None if hardware is None else data_sheet(hardware)
    path = find_headers(model)
    try:
        headers = read_headers(path)
    except UnsupportedError:
        # DeepSeek's attention is not built, but the size of its cache is known.
        config_json = config_json_of(path)
        if config_json is None:
            raise
        latent = read_latent_cache(read_config_json(config_json), kv_dtype, str(config_json))
        if latent is None:
            raise
        _show_latent(latent, ctx or 4096, batch, tp, as_json)
        return
    backend = NativeBackend(threads=threads)
    found = build_memory_plan(
        headers, backend, ctx=ctx, batch=batch, kv_dtype=kv_dtype, hardware=device, tp=tp
    )
    ceilings = device or this_machine(found, backend)
    speeds = predict(found, ceilings, backend if device is None else None)
    if as_json:
        click.echo(json.dumps(_report(found, ceilings, speeds)))
    else:
        _print(found, ceilings, speeds)
    if not found.fits:
        error = CapacityError(_too_large(found))
        if as_json:
            context.exit(1)
        raise error


def _too_large(found: "MemoryPlan") -> str:
    """Why it does not fit, in one sentence."""
    return (
        f"{found.batch} x {found.ctx} tokens do not fit: {format_bytes(found.needed)} are needed, "
        f"and {found.device} has {format_bytes(found.available)} for them"
        + (
            f"; at most {_requests(found.largest_batch)} of {found.ctx} tokens fit"
            if found.largest_batch
            else f"; at most {found.largest_ctx} tokens fit"
            if found.largest_ctx
            else "; the weights and a step alone are larger"
            if found.weight_bytes + sum(found.step_bytes.values()) > found.available
            else ""
        )
    )


def _print(found: "MemoryPlan", ceilings: "Ceilings", speeds: "dict[str, Speed]") -> None:
    headers, config = found.headers, found.headers.config
    share = f", one of {found.tp} parts" if found.tp > 1 else ""
    assumed = (
        f"; no file with weights is here: they are planned as {headers.assumed}"
        if headers.assumed
        else ""
    )
    click.echo(f"{headers.path} ({config.architecture}){assumed}\n")
    # memory
    rows = [
        [g.name, f"{g.parameters:,}", ", ".join(g.formats), format_bytes(g.num_bytes)]
        for g in found.weights
    ]
    rows.append(
        [
            "all",
            f"{sum(g.parameters for g in found.weights):,}",
            "",
            format_bytes(found.weight_bytes),
        ]
    )
    print_table([f"weights{share}", "parameters", "format", "size"], rows)
    click.echo(f"\nKV cache{share}")
    for line in found.formula:
        click.echo(f"  {line}")
    click.echo(
        f"  {found.ctx:,} tokens: {_binary(found.program.kv_bytes(found.ctx))} per request; "
        f"{found.batch} of them in blocks of {found.program.layout.block_size} tokens: "
        f"{format_bytes(found.kv_bytes)}\n"
    )
    rows = [["weights", format_bytes(found.weight_bytes)]]
    rows += [[name, format_bytes(size)] for name, size in found.step_bytes.items() if size]
    rows.append([f"KV cache of {found.batch} x {found.ctx} tokens", format_bytes(found.kv_bytes)])
    rows.append(["needed", format_bytes(found.needed)])
    rows.append([f"available on {found.device}", format_bytes(found.available)])
    print_table(["memory", "size"], rows)
    click.echo(
        f"\n{'It fits.' if found.fits else 'It does not fit.'} With {_requests(found.batch)} the "
        f"largest context is {found.largest_ctx:,} tokens; at {found.ctx:,} tokens the largest "
        f"batch is {found.largest_batch:,}.\n"
    )
    # speed
    _print_speeds(found, ceilings, speeds)


def _print_speeds(found: "MemoryPlan", ceilings: "Ceilings", speeds: "dict[str, Speed]") -> None:
    streamed = found.weight_bytes + found.kv_bytes
    bandwidth = ceilings.bandwidth_range(streamed).median
    how = (
        f"measured now, {ceilings.isa}, {format_count(ceilings.threads, 'thread')}"
        if ceilings.is_measured
        else f"{ceilings.source}; a bound that no program reaches"
    )
    peaks = ", ".join(f"{name} {peak / 1e9:,.0f} GOP/s" for name, peak in ceilings.peaks.items())
    click.echo(f"{ceilings.name} ({how}): {bandwidth / 1e9:,.1f} GB/s, {peaks}")
    rows = []
    for name, speed in speeds.items():
        work = f"{found.ctx} tokens" if name == "prefill" else f"{found.batch} x 1 at {found.ctx}"
        parts = ", ".join(
            f"{_name(part)} {seconds / speed.seconds:.0%}"
            for part, seconds in sorted(speed.parts.items(), key=lambda part: -part[1])
            if seconds >= 0.005 * speed.seconds
        )
        rate, time = f"{speed.tokens_per_second:,.1f}", f"{speed.seconds * 1e3:,.2f}"
        rows.append([name, work, rate, time, _name(speed.bound), parts])
    print_table(["predicted", "of", "tokens/s", "ms", "bound by", "time goes to"], rows)
    decode = speeds["decode"]
    click.echo(
        f"A step of decode reads {format_bytes(decode.weight_bytes)} of weights and "
        f"{format_bytes(decode.kv_bytes)} of keys and values."
    )


def _name(part: str) -> str:
    return _KERNELS if part == "kernels" else part


def _requests(count: int) -> str:
    return f"{count:,} request{'s' if count != 1 else ''}"


def _binary(num_bytes: int) -> str:
    """KV caches are told in MiB, as in papers."""
    mib = num_bytes / (1 << 20)
    return f"{num_bytes:,} bytes ({mib:,.0f} MiB)" if mib >= 1 else f"{num_bytes:,} bytes"


def _show_latent(latent: "LatentCache", ctx: int, batch: int, tp: int, as_json: bool) -> None:
    if as_json:
        report = {
            "architecture": latent.architecture,
            "runs": False,
            "kv_formula": [latent.formula],
            "kv_bytes_per_token": latent.bytes_per_token,
            "kv_bytes": latent.bytes_per_token * ctx * batch,
        }
        click.echo(json.dumps(report))
        return
    click.echo(f"KV cache\n  {latent.formula}")
    each = latent.bytes_per_token * ctx
    click.echo(
        f"  {ctx:,} tokens: {_binary(each)} per request; {batch} of them: "
        f"{format_bytes(each * batch)}"
    )
    if tp > 1:
        click.echo(f"  Each of {tp} devices keeps all of it: a latent has no heads to divide.")
    click.echo(f"\nPellucid does not run {latent.architecture}: weights and speed are not planned.")


def _report(
    found: "MemoryPlan", ceilings: "Ceilings", speeds: "dict[str, Speed]"
) -> dict[str, Any]:
    return {
        "model": str(found.headers.path),
        "architecture": found.headers.config.architecture,
        "runs": True,
        "device": ceilings.name,
        "source": ceilings.source,
        "tp": found.tp,
        "ctx": found.ctx,
        "batch": found.batch,
        "weights": {
            g.name: {"parameters": g.parameters, "bytes": g.num_bytes, "formats": list(g.formats)}
            for g in found.weights
        },
        "weight_bytes": found.weight_bytes,
        "kv_formula": list(found.formula),
        "kv_bytes_per_token": found.program.layout.bytes_per_token,
        "kv_bytes_per_request": found.program.kv_bytes(found.ctx),
        "kv_bytes": found.kv_bytes,
        "step_bytes": dict(found.step_bytes),
        "needed": found.needed,
        "available": found.available,
        "fits": found.fits,
        "largest_ctx": found.largest_ctx,
        "largest_batch": found.largest_batch,
        "predicted": {
            name: {
                "tokens_per_second": speed.tokens_per_second,
                "seconds": speed.seconds,
                "bound": speed.bound,
                "seconds_by_bound": dict(speed.parts),
                "weight_bytes": speed.weight_bytes,
                "kv_bytes": speed.kv_bytes,
            }
            for name, speed in speeds.items()
        },
    }
