"""Output for terminals: control characters escaped, lines broken between words, sizes, tables.

A model's output, a file's metadata and an error that quotes them are untrusted text. Control
characters in it could move the cursor, set the window's title or write the clipboard, so on a
terminal they are escaped. A pipe gets the text as it is.
"""

import os
import re
import sys
import textwrap
import unicodedata
from collections.abc import Sequence
from contextlib import suppress
from typing import IO, Any

import click

__all__ = [
    "StreamPrinter",
    "character_width",
    "harmless",
    "one_line",
    "print_table",
    "progress_bar",
    "say",
    "text_width",
]

# All of C0 but tab and newline, DEL, and C1: ESC begins a sequence in the first, U+009B does so in
# the last.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_CONTROL_OR_BREAK = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")


def _name(match: re.Match[str]) -> str:
    return f"\\x{ord(match[0]):02x}" if ord(match[0]) < 256 else f"\\u{ord(match[0]):04x}"


def harmless(text: str) -> str:
    """`text` with control characters escaped: "\\x1b[2J" instead of a cleared screen. Works on
    pieces of a text.
    """
    return _CONTROL.sub(_name, text)


def one_line(text: str) -> str:
    """The same for text that must stay on its line."""
    return _CONTROL_OR_BREAK.sub(_name, text)


class StreamPrinter:
    """Writes the new part of a growing text to standard output.

    On a terminal, a word that would cross the right edge begins a new line. A word is shown when it
    is complete, because only then its width is known. A pipe gets the text unchanged and at once.
    """

    def __init__(self) -> None:
        self._shown = 0
        self._last = ""
        self._column = 0
        self._word = ""  # the part of the last word that is not shown yet
        self._terminal = sys.stdout.isatty()

    def show(self, text: str) -> None:
        """Write the part of `text`, the whole text so far, that is not shown yet."""
        new = text[self._shown :]
        if not new:
            return
        self._shown = len(text)
        self._last = new[-1]
        if not self._terminal:
            click.echo(new, nl=False)
            return
        columns = _columns(sys.stdout)
        written = "".join(self._wrap(character, columns) for character in harmless(new))
        if written:
            click.echo(written, nl=False)

    def end(self) -> None:
        """Show the last word, and end the line if it is open."""
        if self._word:
            click.echo(self._take_word(_columns(sys.stdout)), nl=False)
        if self._last != "\n":
            click.echo()

    def _wrap(self, character: str, columns: int) -> str:
        """What to write after `character` is added."""
        if character not in " \t\n":
            # Chinese and Japanese have no spaces: a line may end before each wide character
            ended = self._take_word(columns) if character_width(character) == 2 else ""
            self._word += character
            # a word longer than a line is not worth waiting for
            if text_width(self._word) >= columns:
                ended += self._take_word(columns)
            return ended
        written = self._take_word(columns)
        if character == "\n":
            self._column = 0
            return written + character
        width = 8 - self._column % 8 if character == "\t" else 1
        if self._column + width > columns:  # a space at the edge: the terminal breaks there
            return written
        self._column += width
        return written + character

    def _take_word(self, columns: int) -> str:
        word, self._word = self._word, ""
        width = text_width(word)
        if self._column > 0 and self._column + width > columns:
            self._column = 0
            word = "\n" + word
        self._column += width
        if width > columns:  # the terminal has broken the line
            self._column %= columns
        return word


def progress_bar(*, disable: bool | None = None, **options: Any) -> Any:
    """A bar of tqdm on standard error, by default if that is a terminal. `options` are tqdm's."""
    from tqdm import tqdm

    tqdm.monitor_interval = 0  # no thread that redraws bars of work that hangs
    return tqdm(disable=disable, **options)


def say(text: str) -> None:
    """Write a message to standard error, with control characters escaped; on a terminal, lines are
    broken between words. If it cannot be written (a full disk), the work goes on without it.
    """
    text = one_line(text)
    if sys.stderr.isatty():
        width = min(_columns(sys.stderr), 1000)
        text = textwrap.fill(text, width, break_long_words=False, break_on_hyphens=False)
    with suppress(OSError):
        click.echo(text, err=True)


def character_width(character: str) -> int:
    """Columns that a character takes: 2 for wide ones (Chinese, emoji), 0 for marks on another."""
    if unicodedata.category(character) in ("Mn", "Me", "Cf"):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def text_width(text: str) -> int:
    """Columns that a text takes on one line."""
    return len(text) if text.isascii() else sum(map(character_width, text))


def _columns(stream: IO[str]) -> int:
    """The width of the terminal; if it reports none, no line is broken."""
    try:
        columns = os.get_terminal_size(stream.fileno()).columns
    except OSError:
        columns = 0
    return columns or 1 << 30


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]], *, err: bool = False) -> None:
    """Print a table with columns as wide as their longest cell. Columns in which every row begins
    with a digit are aligned right.
    """
    clean = [[one_line(cell) for cell in row] for row in rows]
    widths = [max(text_width(row[i]) for row in [list(header), *clean]) for i in range(len(header))]
    right = [bool(clean) and all(row[i][:1].isdigit() for row in clean) for i in range(len(header))]
    for row in [list(header), *clean]:
        cells = [
            " " * (w - text_width(cell)) + cell if r else cell + " " * (w - text_width(cell))
            for cell, w, r in zip(row, widths, right, strict=True)
        ]
        click.echo("  ".join(cells).rstrip(), err=err)
