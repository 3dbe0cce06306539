"""`pellucid chat` on a terminal: its line editor, what is pasted, and lines that end between
words.
"""

import io
import sys
from pathlib import Path

import pytest

from pellucid import LLM
from pellucid.cli.messages import read_messages
from pellucid.cli.terminal import StreamPrinter, text_width

from .terminal import Terminal, terminal

pytestmark = pytest.mark.slow  # each test starts a program in a terminal

PASTED = b"\x1b[200~one\rtwo\rthree\x1b[201~"


def num_prompt_tokens(llm: LLM, message: str) -> bytes:
    [output] = llm.chat([{"role": "user", "content": message}], use_tqdm=False)
    return str(len(output.prompt_token_ids)).encode()


def test_pasted_lines_are_one_message(tiny: LLM, tiny_path: Path) -> None:
    with terminal("chat", "-m", tiny_path, "-n", "2", term="xterm") as screen:
        screen.wait_for(rb">>>")
        screen.type(PASTED)
        screen.wait_for(rb"three")
        screen.type(b"\r")
        tokens = screen.wait_for(rb"\[prompt (\d+) tokens")
        assert tokens[1] == num_prompt_tokens(tiny, "one\ntwo\nthree")
        screen.wait_for(rb">>>")
        screen.type(b"\x04")
        status, rest = screen.wait_for_end()
        assert status == 0 and b"Traceback" not in rest


@pytest.mark.parametrize(
    ("pasted", "message"),
    [
        ('def f():\n\treturn \'"""\'\n', 'def f():\n\treturn \'"""\'\n'),
        ('say """hello\nthere""" now', 'say """hello\nthere""" now'),
        ("one\r\ntwo\r\nthree", "one\ntwo\nthree"),
        ("naïve 日本語 🙂\nand more", "naïve 日本語 🙂\nand more"),
        ("\n\nafter two lines", "\n\nafter two lines"),
        ("ends with a line\n\n", "ends with a line\n\n"),
        ("/exit\n/clear", "/exit\n/clear"),
        ("{% raw %}\n<|im_end|>", "{% raw %}\n<|im_end|>"),
        ("a\x1b[31mred\x1b[0m\nb", "a\x1b[31mred\x1b[0m\nb"),
        ("bell\x07 and\x03 and\x04\nend", "bell\x07 and\x03 and\x04\nend"),
    ],
    ids=[
        "code",
        "quotes",
        "crlf",
        "unicode",
        "begins",
        "ends",
        "commands",
        "special",
        "esc",
        "ctl",
    ],
)
def test_a_paste_is_one_message_whatever_is_in_it(
    tmp_path: Path, pasted: str, message: str
) -> None:
    """What the line editor hands over after a bracketed paste and Enter."""
    script = tmp_path / "read.py"
    script.write_text(
        "from pellucid.cli.messages import read_messages\n"
        "messages = read_messages(print)\n"
        "print('got', ascii(next(messages)), 'end')\n"
    )
    screen = Terminal([sys.executable, "-X", "utf8", str(script)], term="xterm", columns=200)
    try:
        screen.wait_for(rb">>>")
        screen.type(b"\x1b[200~" + pasted.encode() + b"\x1b[201~\r")
        found = screen.wait_for(rb"got ([^\r]*) end")
        assert found[1].decode() == ascii(message)
    finally:
        screen.close()


def test_the_editor_joins_lines_in_quotation_marks_and_has_a_history(
    tiny: LLM, tiny_path: Path
) -> None:
    with terminal("chat", "-m", tiny_path, "-n", "2", term="xterm") as screen:
        screen.wait_for(rb">>>")
        screen.type(b'"""one\r')
        screen.wait_for(rb"\.\.\.")
        screen.type(b'two"""\r')
        tokens = screen.wait_for(rb"\[prompt (\d+) tokens")
        assert tokens[1] == num_prompt_tokens(tiny, "one\ntwo")
        screen.wait_for(rb">>>")
        screen.type(b"/clear\r")
        screen.wait_for(rb"a new conversation")
        screen.wait_for(rb">>>")
        screen.type(b"\x1b[A\x1b[A\r")  # up twice: the message before /clear
        again = screen.wait_for(rb"\[prompt (\d+) tokens")
        assert again[1] == tokens[1]


def test_ctrl_c_stops_an_answer_under_the_editor_and_sigterm_ends_it(long_path: Path) -> None:
    with terminal("chat", "-m", long_path, term="xterm") as screen:
        screen.wait_for(rb">>>")
        screen.type(b"hello\r")
        screen.wait_for(rb"\r\n.{40}")
        screen.type(b"\x03")
        screen.wait_for(rb"stopped\]")
        screen.wait_for(rb">>>")
        screen.type(b"\x03")
        screen.wait_for(rb"Ctrl-D or /exit leaves")
        screen.wait_for(rb">>>")
        screen.process.terminate()
        status, rest = screen.wait_for_end()
        assert status == 143 and b"Traceback" not in rest


@pytest.mark.parametrize(
    ("typed", "messages"),
    [
        ('"""one\ntwo', ["one\ntwo"]),
        ('"""', []),
        ('"""\none\n"""\nnext\n', ["one\n", "next"]),
        ('"""one"""\n\n  \nlast', ["one", "last"]),
    ],
)
def test_the_end_of_the_input_ends_a_message_in_quotation_marks(
    monkeypatch: pytest.MonkeyPatch, typed: str, messages: list[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
    assert list(read_messages(lambda _: None)) == messages


def test_a_model_without_a_template_is_named_and_not_shown_as_an_object(tmp_path: Path) -> None:
    from click.testing import CliRunner

    from pellucid.cli.main import main
    from pellucid.weights.gguf import GGUFFile
    from pellucid.weights.gguf_writer import write_gguf

    from .conftest import write_tiny

    path = write_tiny(tmp_path / "tiny.gguf")
    with GGUFFile.open(path) as file:
        said = {k: v for k, v in file.metadata.typed().items() if k != "tokenizer.chat_template"}
        bare = tmp_path / "bare.gguf"
        write_gguf(bare, said, ((name, file.tensor(name)) for name in file.tensors))
    result = CliRunner().invoke(main, ["chat", "-m", str(bare)])
    assert result.stderr.startswith(f"pellucid: error: {bare} has no chat template")


# ---- lines that end between words


def printed(tmp_path: Path, text: str, columns: int, step: int = 1) -> list[str]:
    """The lines of `text`, which came so many characters at a time, on a terminal."""
    script = tmp_path / "print.py"
    script.write_text(
        "import sys\nfrom pathlib import Path\n"
        "from pellucid.cli.terminal import StreamPrinter\n"
        f"text = {text!r}\nprinter = StreamPrinter()\n"
        f"for end in range(0, len(text) + {step}, {step}):\n    printer.show(text[:end])\n"
        "printer.end()\n"
    )
    screen = Terminal([sys.executable, "-X", "utf8", str(script)], columns=columns)
    try:
        status, seen = screen.wait_for_end()
    finally:
        screen.close()
    assert status == 0
    return seen.decode().replace("\r\n", "\n").removesuffix("\n").split("\n")


@pytest.mark.parametrize("step", [1, 3, 100])
def test_words_are_not_cut_at_the_edge(tmp_path: Path, step: int) -> None:
    text = "the quick brown fox jumps over\n  the lazy dog, and then it sleeps"
    lines = printed(tmp_path, text, 12, step)
    assert [line.rstrip() for line in lines] == [
        "the quick", "brown fox", "jumps over", "  the lazy", "dog, and", "then it", "sleeps",
    ]  # fmt: skip


def test_wide_characters_count_twice_and_need_no_spaces(tmp_path: Path) -> None:
    lines = printed(tmp_path, "日本語のテキスト is wide 🙂🙂 naïve", 10)
    assert all(text_width(line) <= 10 for line in lines)
    assert "".join(line.strip() for line in lines).replace(" ", "") == (
        "日本語のテキストiswide🙂🙂naïve"
    )


def test_a_word_longer_than_a_line_is_shown_and_a_pipe_gets_the_text_as_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "".join(printed(tmp_path, "see " + "x" * 50 + " end", 20)).replace(" ", "") == (
        "see" + "x" * 50 + "end"
    )
    printer = StreamPrinter()
    printer.show("a long text that would be wrapped " * 9)
    printer.end()
    assert capsys.readouterr().out == "a long text that would be wrapped " * 9 + "\n"
