"""The entry of the command line, as the script `pellucid` and as `python -m pellucid`.

It handles signals before it imports anything, so that Ctrl-C in the first moments ends the program
without a traceback.
"""

import _signal  # type: ignore[import-not-found]  # in C; `signal` itself imports other modules

# The default handler of SIGINT is Python's, which raises. The system's ends the process.
if _signal.getsignal(_signal.SIGINT) is _signal.default_int_handler:
    _signal.signal(_signal.SIGINT, _signal.SIG_DFL)

from .cli.signals import leave_at_once

__all__ = ["main"]


def main() -> None:
    """Run the command line of this process."""
    leave_at_once()
    from .cli.main import main as run

    run(prog_name="pellucid")


if __name__ == "__main__":
    main()
