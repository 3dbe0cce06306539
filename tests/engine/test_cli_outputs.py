"""Files that a command writes at its end: never in place of what it reads, nor of what is no file;
whole or not at all, whatever interrupts it.
"""

import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from .conftest import write_tiny
from .test_cli_signals import ENVIRONMENT, PROGRAM, start, wait_until_signals_are_handled

pytestmark = pytest.mark.slow  # each test starts processes

COMMANDS = {
    "quantize": "quantize MODEL OUT --to q4_k_m",
    "quantize, error feedback": "quantize MODEL OUT --to q8_0 --calibration TEXT",
    "imatrix": "imatrix MODEL --text TEXT -o OUT --n-ctx 32",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model, a text and a pipe."""
    write_tiny(tmp_path / "model.gguf")
    (tmp_path / "text").write_text("the words of a text " * 200)
    (tmp_path / "out").mkdir()
    os.mkfifo(tmp_path / "pipe")
    return tmp_path


def words(command: str, folder: Path, out: Path) -> list[str]:
    names = {"MODEL": folder / "model.gguf", "TEXT": folder / "text", "OUT": out}
    return [str(names.get(word, word)) for word in command.split()]


def run(*arguments: str | Path, **options: object) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(  # type: ignore[call-overload, no-any-return]
        [*PROGRAM, *map(str, arguments)],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
        **options,
    )


@pytest.mark.parametrize("name", COMMANDS)
def test_nothing_that_is_read_or_is_no_file_is_replaced(folder: Path, name: str) -> None:
    hard, soft = folder / "hard", folder / "soft"
    hard.hardlink_to(folder / "model.gguf")
    soft.symlink_to(folder / "model.gguf")
    places = {
        folder / "model.gguf": "which is read; give another name",
        hard: "which is read; give another name",
        soft: "which is read; give another name",
        folder / "pipe": "which is a pipe; give the name of a file",
        folder / "none" / "x": "there is no folder",
    }
    if "TEXT" in COMMANDS[name]:
        places[folder / "text"] = "which is read; give another name"
    before = {path: path.lstat() for path in folder.iterdir()}
    for out, sentence in places.items():
        done = run(*words(COMMANDS[name], folder, out))
        assert done.returncode == 1 and sentence in done.stderr, (out, done.stderr)
        assert done.stderr.startswith("pellucid: error: out is ") and done.stderr.count("\n") == 1
    done = run(*words(COMMANDS[name], folder, folder / "out"))
    assert done.returncode != 0 and "Traceback" not in done.stderr
    after = {path: path.lstat() for path in folder.iterdir()}
    assert {p: (s.st_ino, s.st_mtime_ns) for p, s in after.items()} == {
        p: (s.st_ino, s.st_mtime_ns) for p, s in before.items()
    }


@pytest.mark.parametrize("name", COMMANDS)
def test_a_full_disk_leaves_nothing_and_is_one_sentence(folder: Path, name: str) -> None:
    out = folder / "out" / "x.gguf"
    done = run(
        *words(COMMANDS[name], folder, out),
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (2048, 2048)),
    )
    assert done.returncode == 1 and list((folder / "out").iterdir()) == []
    assert f"pellucid: error: {out} cannot be written: File too large" in done.stderr


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="/proc tells what is handled")
@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_at_any_moment_leaves_the_whole_file_or_nothing(
    folder: Path, name: str, number: signal.Signals
) -> None:
    out = folder / "out" / "x.gguf"
    arguments = words(COMMANDS[name], folder, out)
    began = time.monotonic()
    assert run(*arguments).returncode == 0
    seconds, whole = time.monotonic() - began, out.read_bytes()
    moments = random.Random(0)
    for _ in range(8):
        out.unlink(missing_ok=True)
        moment = moments.uniform(0, seconds)
        with start(*arguments) as process:
            wait_until_signals_are_handled(process)
            time.sleep(moment)
            process.send_signal(number)
            _, errors = process.communicate(timeout=600)
        assert process.returncode in (0, 128 + number, -number), (moment, errors)
        assert b"Traceback" not in errors and b"Error" not in errors, (moment, errors)
        left = list((folder / "out").iterdir())
        assert left in ([], [out]), moment
        assert not left or out.read_bytes() == whole


@pytest.mark.parametrize("name", COMMANDS)
def test_a_reader_that_has_gone_is_no_error_and_a_closed_output_is_told(
    folder: Path, name: str
) -> None:
    out = folder / "out" / "x.gguf"
    quoted = " ".join(f"'{word}'" for word in words(COMMANDS[name], folder, out))
    for redirection, sentence in (
        ("| true", ""),
        (">&-", "standard output is closed"),
        (">/dev/full", "the output could not be written: No space left"),
    ):
        done = subprocess.run(
            ["sh", "-c", f'"$0" -m pellucid {quoted} {redirection}', sys.executable],
            env=ENVIRONMENT,
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )
        assert sentence in done.stderr and (done.returncode != 0) == bool(sentence)
        assert "Traceback" not in done.stderr and "Exception" not in done.stderr
