"""What goes to a terminal, and in what shape: text made harmless, sizes, tables.

One idea: a model's output, a file's metadata and an error that quotes them are text of strangers. A
terminal obeys control characters (moves the cursor, sets the window's title, writes the clipboard),
so on a terminal they are written out and not sent. A pipe gets the text as it is.
"""

import re
import sys
from collections.abc import Sequence

import click

__all__ = ["StreamPrinter", "harmless", "one_line", "print_table"]

# All of C0 but tab and newline, DEL, and C1: ESC begins a sequence in the first, U+009B does so in
# the last.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_CONTROL_OR_BREAK = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")


def _name(match: re.Match[str]) -> str:
    return f"\\x{ord(match[0]):02x}" if ord(match[0]) < 256 else f"\\u{ord(match[0]):04x}"


def harmless(text: str) -> str:
    """`text` with control characters written out: "\\x1b[2J" instead of a cleared screen. Works
    piece by piece.
    """
    return _CONTROL.sub(_name, text)


def one_line(text: str) -> str:
    """The same for text that must stay on its line."""
    return _CONTROL_OR_BREAK.sub(_name, text)


class StreamPrinter:
    """Writes to standard output the part of a growing text that is new."""

    def __init__(self) -> None:
        self._shown = 0
        self._last = ""
        self._terminal = sys.stdout.isatty()

    def show(self, text: str) -> None:
        """Write what `text`, all of it so far, has beyond what was shown."""
        new = text[self._shown :]
        if new:
            self._shown = len(text)
            self._last = new[-1]
            click.echo(harmless(new) if self._terminal else new, nl=False)

    def end(self) -> None:
        """End the line, if it is not ended."""
        if self._last != "\n":
            click.echo()


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Columns as wide as they must be. Columns of figures, which begin with a digit in each row,
    are set flush right.
    """
    clean = [[one_line(cell) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in [list(header), *clean]) for i in range(len(header))]
    right = [bool(clean) and all(row[i][:1].isdigit() for row in clean) for i in range(len(header))]
    for row in [list(header), *clean]:
        cells = [
            cell.rjust(w) if r else cell.ljust(w)
            for cell, w, r in zip(row, widths, right, strict=True)
        ]
        click.echo("  ".join(cells).rstrip())
