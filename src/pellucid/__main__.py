"""The entry of the command line, as the script `pellucid` and as `python -m pellucid`.

It imports as little as possible before signals are handled, so that Ctrl-C in the first moments
ends the program without a traceback.
"""

from .cli.signals import leave_at_once

__all__ = ["main"]


def main() -> None:
    """Run the command line of this process."""
    leave_at_once()
    from .cli.main import main as run

    run(prog_name="pellucid")


if __name__ == "__main__":
    main()
