"""`pellucid`: the group of commands, and the one place where errors become exit codes.

0    it worked
1    it did not: one sentence on standard error says why (`--debug` shows the traceback)
2    the command line is wrong
130  Ctrl-C;  143, 129: ended by SIGTERM, SIGHUP — what was begun is cleaned up first
"""

import io
import platform
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click

from .. import __version__
from ..errors import PellucidError
from .batch import batch
from .chat import chat
from .inspect import inspect
from .models import models, pull
from .options import DEBUG, debug_option
from .perplexity import perplexity
from .run import run
from .terminal import one_line
from .verify import verify

__all__ = ["main"]


class _Failure(click.ClickException):
    """An error as the user sees it: one line."""

    def show(self, file: Any = None) -> None:
        click.echo(f"pellucid: error: {one_line(self.message)}", err=True)


class _Pellucid(click.Group):
    def invoke(self, ctx: click.Context) -> Any:
        _tolerate_any_character()
        try:
            with _signals_unwind():
                return super().invoke(ctx)
        except KeyboardInterrupt:
            click.echo(err=True)
            raise click.exceptions.Exit(130) from None
        except (click.ClickException, click.exceptions.Exit, click.Abort, BrokenPipeError):
            raise  # click's own ways to end; a reader of our output that went away is no error
        except Exception as error:
            if ctx.meta.get(DEBUG):
                raise
            raise _Failure(_sentence(error)) from None


def _sentence(error: Exception) -> str:
    if isinstance(error, PellucidError):
        return str(error)
    if isinstance(error, OSError) and error.strerror:
        return (
            f"{error.filename}: {error.strerror}" if error.filename is not None else error.strerror
        )
    if isinstance(error, MemoryError):
        return "the memory is not enough"
    return f"this is a bug in Pellucid: {type(error).__name__}: {error} (--debug shows where)"


def _tolerate_any_character() -> None:
    """Models write any character; a terminal with a small character set gets question marks instead
    of a crash.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


@contextmanager
def _signals_unwind() -> Iterator[None]:
    """Let SIGTERM and SIGHUP end the program as Ctrl-C does: through every `finally`, so that no
    child and no half-made file is left.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(number: int, _: Any) -> None:
        raise SystemExit(128 + number)

    numbers = [signal.SIGTERM] if sys.platform == "win32" else [signal.SIGTERM, signal.SIGHUP]
    before = {
        n: signal.signal(n, leave) for n in numbers if signal.getsignal(n) is not signal.SIG_IGN
    }
    try:
        yield
    finally:
        for n, handler in before.items():
            signal.signal(n, handler)


def _print_version(ctx: click.Context, _: click.Parameter, value: bool) -> None:
    if not value or ctx.resilient_parsing:
        return
    import numpy as np

    from ..cpu import detect_cpu

    click.echo(
        f"pellucid {__version__}\nPython {platform.python_version()}\nNumPy {np.__version__}\nCPU "
        f"{detect_cpu()}"
    )
    ctx.exit()


@click.group(
    cls=_Pellucid,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
)
@click.option(
    "--version",
    is_flag=True,
    expose_value=False,
    is_eager=True,
    callback=_print_version,
    help="Show the version, and what it runs on.",
)
@debug_option
def main() -> None:
    """Pellucid: an LLM inference engine that you can see through.

    \b
    pellucid run "Explain in two sentences what a KV cache is."
    pellucid chat -m qwen2.5-coder-0.5b-instruct
    """


for _command in (run, chat, batch, pull, models, inspect, perplexity, verify):
    main.add_command(_command)
