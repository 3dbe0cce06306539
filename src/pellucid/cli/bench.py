"""`pellucid bench`: the group of benchmarks. A subcommand is imported when it is asked for."""

import click

from .lazy_group import LazyGroup

__all__ = ["bench"]


@click.group(
    cls=LazyGroup,
    places={
        "latency": "bench_latency:latency",
        "throughput": "bench_throughput:throughput",
        "serve": "bench_serve:serve",
    },
)
def bench() -> None:
    """Measure speed, alone or beside another engine in the same run."""
