"""Texts that a user names, as regular files, pipes, terminals and devices."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import pellucid

PROGRAM = [sys.executable, "-m", "pellucid"]
ENVIRONMENT = dict(os.environ, PYTHONPATH=str(Path(pellucid.__file__).parents[1]))


def run(*arguments: str | Path) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [*PROGRAM, *map(str, arguments)],
        env=ENVIRONMENT,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


@contextmanager
def started(*arguments: str | Path) -> Iterator["subprocess.Popen[str]"]:
    """The program, which is killed at the end of the block if it still runs."""
    with subprocess.Popen(
        [*PROGRAM, *map(str, arguments)],
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def first_message(process: "subprocess.Popen[str]") -> str:
    assert process.stderr is not None
    return process.stderr.readline()


@pytest.fixture
def fifo(tmp_path: Path) -> Path:
    os.mkfifo(tmp_path / "fifo")
    return tmp_path / "fifo"


COMMANDS = {"run": ["run", "-n", "1", "-q", "-f"], "batch": ["batch"], "perplexity": ["perplexity"]}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_pipe_that_nobody_writes_to_is_told(command: str, fifo: Path, tiny_path: Path) -> None:
    with started(*COMMANDS[command], fifo, "-m", tiny_path) as process:
        assert first_message(process) == f"[waiting for input from {fifo}]\n"


def test_a_pipe_is_read_whenever_its_writer_comes(fifo: Path, tiny_path: Path) -> None:
    with started("batch", fifo, "-m", tiny_path, "-n", "2") as process:
        first_message(process)  # it waits
        fifo.write_text('{"prompt": "ab"}\n' * 3)
        answers, _ = process.communicate(timeout=600)
    assert (process.returncode, answers.count("\n")) == (0, 3)


def test_answers_go_to_a_pipe_whenever_its_reader_comes(
    fifo: Path, tiny_path: Path, tmp_path: Path
) -> None:
    (tmp_path / "requests").write_text('{"prompt": "ab"}\n' * 3)
    options: list[str | Path] = ["-m", tiny_path, "-n", "2", "-o", fifo]
    with started("batch", tmp_path / "requests", *options) as process:
        assert first_message(process) == f"[waiting for a program that reads {fifo}]\n"
        answers = fifo.read_text()
        process.communicate(timeout=600)
    assert (process.returncode, len(answers.splitlines())) == (0, 3)


def test_substitution_of_a_shell_is_a_file_like_any_other(tiny_path: Path) -> None:
    script = '"$0" -m pellucid run -n 1 -q --json -m "$1" -f <(printf ab)'
    done = subprocess.run(
        ["bash", "-c", script, sys.executable, str(tiny_path)],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["prompt_tokens"] > 0


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("/dev/zero", "is a device; it must be a file, a pipe or a terminal"),
        ("/dev/full", "is a device; it must be a file, a pipe or a terminal"),
        ("/proc/self/mem", "cannot be read: Input/output error"),
    ],
)
def test_what_is_no_text_is_refused(
    command: str, name: str, sentence: str, tiny_path: Path
) -> None:
    done = run(*COMMANDS[command], name, "-m", tiny_path)
    assert (done.returncode, done.stderr) == (1, f"pellucid: error: {name} {sentence}\n")


def test_a_line_that_never_ends_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from pellucid.cli import batch_lines
    from pellucid.errors import RequestError

    class Endless:
        def readline(self, size: int) -> bytes:
            return b"\0" * size

    monkeypatch.setattr(batch_lines, "MAX_SKIPPED", 1 << 26)
    with pytest.raises(RequestError, match="line 1 does not end within 67108864 bytes"):
        next(batch_lines.read_lines(Endless()))  # type: ignore[arg-type]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="/dev/full stands for a full disk")
def test_messages_that_cannot_be_written_cost_no_answer(tiny_path: Path, tmp_path: Path) -> None:
    (tmp_path / "requests").write_text('{"prompt": "ab"}\n' * 3)
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [*PROGRAM, "batch", tmp_path / "requests", "-m", tiny_path, "-n", "2"],
            env=ENVIRONMENT,
            stdout=subprocess.PIPE,
            stderr=full,
            timeout=600,
            check=False,
        )
    assert (done.returncode, done.stdout.count(b"\n")) == (0, 3)


def test_a_load_that_is_interrupted_at_its_start_does_not_go_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from pellucid.engine.background import Background

    start, begun, go_on = threading.Thread.start, threading.Event(), threading.Event()

    def interrupted(thread: threading.Thread) -> None:
        start(thread)
        begun.wait()
        raise KeyboardInterrupt

    def work() -> Iterator[int]:
        for i in range(5):
            yield i
            begun.set()
            go_on.wait()

    background = Background(work)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", interrupted)
        with pytest.raises(KeyboardInterrupt), background:
            pass
    go_on.set()
    assert background.result() == [0, 1]
