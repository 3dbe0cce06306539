"""`pellucid machine`: what this machine can do at most, measured once and kept."""

import sys
from typing import TYPE_CHECKING

import click

from ..units import format_bytes, format_count
from .options import debug_option, json_option
from .terminal import print_table, say

if TYPE_CHECKING:
    from ..measure.hardware import Range
    from ..measure.machine import Machine

__all__ = ["machine"]


@click.command()
@click.option("--refresh", is_flag=True, help="Measure again, though nothing has changed.")
@json_option
@debug_option
def machine(refresh: bool, as_json: bool) -> None:
    """Measure this machine: read bandwidth, peaks of each instruction set, barriers, the disk.

    It takes about 20 seconds, in which nothing else should run. The figures are kept until the CPU,
    the number of usable CPUs, the system or Pellucid's kernels change.
    """
    from ..errors import PellucidError
    from ..measure.machine import default_machine_file, load_machine, machine_json

    found = None
    if not refresh:
        try:
            found = load_machine(default_machine_file())
        except PellucidError as reason:
            click.echo(f"{reason}: measuring, about 20 seconds", err=True)
    if found is None:
        found = _measure()
    if as_json:
        click.echo(machine_json(found))
    else:
        _print(found)


def _measure() -> "Machine":
    """Measure with a line of progress, and keep the result where the cache can be written."""
    from ..measure.machine import default_machine_file, measure_machine, save_machine

    def show(share: float) -> None:
        if sys.stderr.isatty():
            click.echo(f"\r\x1b[Kmeasuring: {share:.0%}", err=True, nl=False)

    found = measure_machine(progress=show)
    if sys.stderr.isatty():
        click.echo("\r\x1b[K", err=True, nl=False)
    try:
        save_machine(found, default_machine_file())
    except OSError as error:
        say(f"the figures are not kept: {default_machine_file()}: {error.strerror}")
    return found


def _print(found: "Machine") -> None:
    """Tables: a row per working set, a row per instruction set."""
    from ..measure.hardware import SCALE_SHARES

    about = found.fingerprint
    cpus = "1 usable CPU" if about["usable_cpus"] == "1" else f"{about['usable_cpus']} usable CPUs"
    click.echo(
        f"{about['cpu'] or 'unnamed CPU'}, {cpus}, "
        f"{about['system']}; measured {found.measured_at} in {found.seconds:.0f} s\n"
        "Each figure: median (least – most)\n"
    )

    # reading
    threads = list(found.read_bandwidth)
    sizes = list(found.read_bandwidth[threads[-1]])
    rows = [
        [format_bytes(size), *(_range(found.read_bandwidth[n].get(size), 1e9) for n in threads)]
        for size in sizes
    ]
    print_table(["read, GB/s", *(_threads(n) for n in threads)], rows)

    # multiplying; the best instruction set first
    click.echo()
    rows = [
        [f"{isa} {dtype}", *(_range(by[n][dtype], 1e9) for n in threads)]
        for isa, by in found.peaks.items()
        for dtype in ("int8", "float32")
    ]
    best = next(iter(found.peaks))
    for formats, products in SCALE_SHARES.items():
        share = found.ceilings(best, threads[-1]).int8_share(products)
        rows.append([f"{best} int8, scales of {formats}", *("" for _ in threads[1:])])
        rows[-1].append(f"{share * found.ceilings(best, threads[-1]).int8_peak / 1e9:.0f}")
    print_table(["peak, G operations/s", *(_threads(n) for n in threads)], rows)

    # waiting
    click.echo()
    for n, barrier in found.barrier_seconds.items():
        click.echo(f"barrier of {_threads(n)}: {_range(barrier, 1e-6, 2)} µs")
    disk = found.disk_bandwidth
    if disk is None:
        click.echo("disk: not measured; files cannot be read past the page cache here")
    else:
        click.echo(f"disk, not from the page cache: {_range(disk, 1e9, 2)} GB/s")


def _threads(n: int) -> str:
    return format_count(n, "thread")


def _range(range: "Range | None", unit: float, digits: int = 0) -> str:
    if range is None:
        return "–"
    least, median, most = (
        f"{x / unit:.{digits}f}" for x in (range.least, range.median, range.most)
    )
    return f"{median} ({least} – {most})"
