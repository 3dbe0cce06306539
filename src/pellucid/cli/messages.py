"""Reads the user's messages in a chat.

A terminal gets a line editor (prompt_toolkit): arrow keys, history, and pasted text that stays one
message however many lines it has. Enter sends. Alt-Enter begins a new line, and so does Enter in a
message that begins with three quotation marks. The history is not saved.

Without a terminal, or on one that cannot move its cursor (TERM=dumb), each line is a message, and
three quotation marks hold several lines together.
"""

import os
import sys
from collections.abc import Callable, Iterator

import click

__all__ = ["QUOTES", "is_interactive", "read_messages"]

QUOTES = '"""'
_PROMPT, _MORE = ">>> ", "... "
MAX_MESSAGE = 1 << 26  # characters
_Reader = Callable[[], str]  # raises EOFError at the end


def is_interactive() -> bool:
    """Whether a user types: then a prompt is shown, and Ctrl-C does not end the program."""
    return sys.stdin.isatty()


def read_messages(say: Callable[[str], None]) -> Iterator[str]:
    """Every message until the end of the input; blank ones are left out. `say` reports an invalid
    message to the user.
    """
    read = _editor() if _has_editor() else _read_plainly
    while True:
        try:
            message = read()
            message.encode()  # a lone surrogate: the input was not UTF-8
        except EOFError:
            if is_interactive():
                click.echo(err=True)
            return
        except UnicodeError:
            say("that was not UTF-8 text")
            continue
        except KeyboardInterrupt:
            if not is_interactive():
                raise
            click.echo(err=True)
            say("Ctrl-D or /exit leaves")
            continue
        if len(message) > MAX_MESSAGE:
            say(f"the message is longer than {MAX_MESSAGE} characters")
        elif message.strip():
            yield message


def _has_editor() -> bool:
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        return False
    return os.environ.get("TERM", "dumb") not in ("dumb", "unknown", "")


def _read_plainly() -> str:
    """One line, or several between quotation marks. The end of the input closes them."""
    line = _read_line(_PROMPT)
    if not line.startswith(QUOTES):
        return line
    lines, rest = [], line[len(QUOTES) :]
    try:
        while not rest.endswith(QUOTES):
            lines.append(rest)
            rest = _read_line(_MORE)
        lines.append(rest.removesuffix(QUOTES))
    except EOFError:
        pass
    return "\n".join(lines[1:] if lines[0] == "" and len(lines) > 1 else lines)


def _read_line(prompt: str) -> str:
    if is_interactive():
        click.echo(prompt, nl=False, err=True)
    line = sys.stdin.readline(MAX_MESSAGE + 2)
    if not line:
        raise EOFError
    return line.rstrip("\r\n")


def _editor() -> _Reader:
    from prompt_toolkit import PromptSession
    from prompt_toolkit.history import InMemoryHistory
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

    keys = KeyBindings()

    @keys.add("enter")
    def _(event: KeyPressEvent) -> None:
        if _is_open(event.current_buffer.text):
            event.current_buffer.insert_text("\n")
        else:
            event.current_buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    session: PromptSession[str] = PromptSession(
        _PROMPT,
        history=InMemoryHistory(),
        key_bindings=keys,
        multiline=True,
        prompt_continuation=_MORE,
        enable_suspend=True,
        enable_open_in_editor=False,
    )
    return lambda: _without_quotes(session.prompt())


def _is_open(text: str) -> bool:
    """Whether a message begins with quotation marks that are not closed yet."""
    inside = text.removeprefix(QUOTES)
    return inside != text and not inside.rstrip().endswith(QUOTES)


def _without_quotes(text: str) -> str:
    if not text.startswith(QUOTES):
        return text
    inside = text.removeprefix(QUOTES).rstrip().removesuffix(QUOTES)
    return inside.removeprefix("\n")
