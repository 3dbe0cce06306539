"""`pellucid bench`: the group of benchmarks. A subcommand is imported when it is asked for."""

from importlib import import_module

import click

__all__ = ["bench"]

# Subcommand -> module of this package, which has a command of the subcommand's name.
_MODULES = {"latency": "bench_latency"}


class _Benchmarks(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_MODULES)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _MODULES:
            return None
        command: click.Command = getattr(
            import_module(f".{_MODULES[cmd_name]}", __package__), cmd_name
        )
        return command


@click.group(cls=_Benchmarks)
def bench() -> None:
    """Measure speed, alone or beside another engine in the same run."""
