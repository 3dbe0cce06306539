"""`pellucid`: the group of commands, and the one place where errors become exit codes.

0    success
1    failure: one sentence on standard error says why (`--debug` shows the traceback)
2    the command line is wrong
130  Ctrl-C; 143 and 129: SIGTERM and SIGHUP. What was begun is cleaned up first
"""

import errno
import io
import os
import platform
import sys
from typing import Any

import click

from .. import __version__
from ..errors import PellucidError
from .lazy_group import LazyGroup
from .options import DEBUG, debug_option
from .signals import Stopped, fill_closed_streams, unwind
from .spare_threads import spare_threads_if_few
from .terminal import one_line

__all__ = ["main"]

# from threading and from C++
_NO_THREAD = ("can't start new thread", os.strerror(errno.EAGAIN))
_CANNOT_WRITE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


class _Failure(click.ClickException):
    """An error as the user sees it: one line."""

    def show(self, file: Any = None) -> None:
        click.echo(f"pellucid: error: {one_line(self.message)}", err=True)


class _Pellucid(LazyGroup):
    def main(self, *args: Any, **extra: Any) -> Any:
        """Run a command and exit with its exit code."""
        code: Any = 0
        try:
            with unwind():
                if not fill_closed_streams():
                    raise _Failure("standard output is closed, so the answer has nowhere to go")
                _tolerate_any_character()
                spare_threads_if_few()
                code = super().main(*args, **{**extra, "standalone_mode": False})
                sys.stdout.flush()
        except click.Abort:  # click has printed the newline after ^C
            code = 130
        except click.ClickException as error:
            error.show()
            code = error.exit_code
        except OSError as error:  # --help and --version, written to a full disk
            _Failure(_sentence(error)).show()
            code = 1
        _give_up_unwritten_output()
        sys.exit(code)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit, click.Abort, BrokenPipeError):
            raise  # click's own exits; a closed pipe behind standard output is no error
        except Exception as error:
            if ctx.meta.get(DEBUG):
                raise
            interruption = _interruption(error)
            if interruption is not None:
                raise interruption from None
            raise _Failure(_sentence(error)) from None


def _interruption(error: BaseException) -> BaseException | None:
    """The signal that a library turned into `error`, or None."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, KeyboardInterrupt | Stopped):
            return cause
        cause = cause.__cause__ or cause.__context__
    return None


def _sentence(error: Exception) -> str:
    if isinstance(error, PellucidError):
        cause = error.__cause__
        too_many = isinstance(cause, OSError) and cause.errno == errno.EMFILE
        return f"{error}{_limit('RLIMIT_NOFILE', 'n', 1, '') if too_many else ''}"
    if isinstance(error, MemoryError) or (
        isinstance(error, OSError) and error.errno == errno.ENOMEM
    ):
        return f"there is not enough memory{_limit('RLIMIT_AS', 'v', 1024, ' KiB')}"
    if isinstance(error, OSError) and error.strerror:
        if error.errno == errno.EMFILE:
            return f"there are too many open files{_limit('RLIMIT_NOFILE', 'n', 1, '')}"
        if error.filename is not None:
            return f"{os.fsdecode(error.filename)}: {error.strerror}"
        wrote = "the output could not be written: " if error.errno in _CANNOT_WRITE else ""
        return f"{wrote}{error.strerror}"
    if isinstance(error, RuntimeError) and str(error) in _NO_THREAD:
        limit = _limit("RLIMIT_NPROC", "u", 1, ", processes and threads of this user together")
        return f"no thread could be started{limit}"
    if isinstance(error, ImportError):
        return f"a library could not be loaded: {error}"
    return f"this is a bug in Pellucid: {type(error).__name__}: {error} (--debug shows where)"


def _limit(name: str, flag: str, unit: int, suffix: str) -> str:
    """The limit set by the shell, in the unit of `ulimit`."""
    if sys.platform == "win32":
        return ""
    import resource

    limit = resource.getrlimit(vars(resource)[name])[0]
    if limit == resource.RLIM_INFINITY:
        return ""
    return f"; `ulimit -{flag}` allows this process {limit // unit}{suffix}"


def _give_up_unwritten_output() -> None:
    """Drop output that cannot be written. Otherwise the interpreter tries again when it exits, and
    prints an error.
    """
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)


def _tolerate_any_character() -> None:
    """Replace characters that the terminal's encoding lacks by question marks, because models may
    write any character.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


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


# Command -> module and name there, in alphabetical order.
PLACES = {
    "batch": "batch:batch",
    "bench": "bench:bench",
    "chat": "chat:chat",
    "compare": "compare:compare",
    "imatrix": "imatrix:imatrix",
    "inspect": "inspect:inspect",
    "list": "stored:list_models",
    "machine": "machine:machine",
    "perplexity": "perplexity:perplexity",
    "plan": "plan:plan",
    "profile": "profile:profile",
    "pull": "stored:pull",
    "quantize": "quantize:quantize",
    "rm": "stored:rm",
    "run": "run:run",
    "serve": "serve:serve",
    "verify": "verify:verify",
}


@click.group(
    cls=_Pellucid,
    places=PLACES,
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
    pellucid run "Explain in two sentences why the sky is blue."
    pellucid chat -m qwen2.5-coder-0.5b-instruct

    \b
    To complete words with TAB in bash (zsh and fish likewise):
    eval "$(_PELLUCID_COMPLETE=bash_source pellucid)"
    """
