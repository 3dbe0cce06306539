"""Signals and broken standard streams, met by the real program in a process of its own."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import pellucid

pytestmark = pytest.mark.slow  # each test starts processes

PROGRAM = [sys.executable, "-m", "pellucid"]
ENVIRONMENT = dict(os.environ, PYTHONPATH=str(Path(pellucid.__file__).parents[1]))


def start(*arguments: str | Path) -> "subprocess.Popen[bytes]":
    return subprocess.Popen(
        [*PROGRAM, *map(str, arguments)],
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def wait_until_signals_are_handled(process: "subprocess.Popen[bytes]") -> None:
    """Wait for the program's first lines: before them, Python itself is being started."""
    handled = 1 << (signal.SIGTERM - 1)
    while process.poll() is None:
        status = Path(f"/proc/{process.pid}/status").read_text()
        caught = next(line for line in status.splitlines() if line.startswith("SigCgt"))
        if int(caught.split()[1], 16) & handled:
            return
        time.sleep(0.001)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="/proc tells what is handled")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_in_the_first_second_ends_the_program_without_a_traceback(
    long_path: Path, number: signal.Signals
) -> None:
    moments = random.Random(0)
    for _ in range(20):
        moment = moments.uniform(0, 1)
        with start("run", "hi", "-m", long_path, "-q", "--max-tokens", "90000") as process:
            wait_until_signals_are_handled(process)
            time.sleep(moment)
            process.send_signal(number)
            _, errors = process.communicate(timeout=600)
        assert (process.returncode, errors.strip()) == (128 + number, b""), moment


@pytest.mark.parametrize(
    ("arguments", "redirection", "sentence"),
    [
        ("run hi -m MODEL", ">&-", "standard output is closed, so the answer has nowhere to go"),
        ("--help", ">&-", "standard output is closed, so the answer has nowhere to go"),
        ("run hi -m MODEL", ">/dev/full", "the output could not be written: No space left"),
        ("run --help", ">/dev/full", "the output could not be written: No space left"),
        ("--version", ">/dev/full", "the output could not be written: No space left"),
        ("run -m MODEL", "<&-", "the prompt is empty"),
        ("chat -m MODEL", "<&-", ""),
        ("run hi -q -m MODEL", "2>&-", ""),
        ("run hi -q -m MODEL", "| true", ""),
    ],
)
def test_broken_standard_streams_are_told_in_one_sentence(
    tiny_path: Path, arguments: str, redirection: str, sentence: str
) -> None:
    command = f'"$0" -m pellucid {arguments} {redirection}'.replace("MODEL", '"$1"')
    done = subprocess.run(
        ["sh", "-c", command, sys.executable, str(tiny_path)],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert "Traceback" not in done.stderr and "Exception" not in done.stderr
    assert sentence in done.stderr and (done.returncode != 0) == bool(sentence)
    if sentence and "empty" not in sentence:
        assert done.stderr.startswith("pellucid: error: ") and done.stderr.count("\n") == 1


@pytest.mark.parametrize("limit", [3, 4, 5, 6, 7])
def test_too_many_open_files_are_told_with_the_limit(tiny_path: Path, limit: int) -> None:
    """At the limits 3 and 4 a module or the model cannot be opened. At 5, 6 and 7 it depends on
    what the command imports: the template's process may not start, or all goes well.
    """
    script = (
        "import resource, pellucid.engine.llm; from pellucid.cli.main import main; "
        f"resource.setrlimit(resource.RLIMIT_NOFILE, ({limit}, {limit})); main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, "run", "hi", "-n", "1", "-m", str(tiny_path)],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    if done.returncode == 0 and limit > 4:
        return
    assert done.returncode == 1
    assert done.stderr.startswith("pellucid: error: ") and done.stderr.count("\n") == 1
    assert done.stderr.lower().endswith(f"open files; `ulimit -n` allows this process {limit}\n")


def test_signals_are_handled_before_anything_large_is_imported() -> None:
    script = "import sys, pellucid.__main__; print({'click', 'pellucid.cli.main'} & {*sys.modules})"
    done = subprocess.run(
        [sys.executable, "-c", script], env=ENVIRONMENT, capture_output=True, text=True, check=True
    )
    assert done.stdout == "set()\n"


def test_signals_are_handled_before_any_other_import() -> None:
    """Until then Ctrl-C would end the program with a traceback."""
    script = """
import runpy, signal, sys
seen = []

def note(event, arguments):
    if event == "import" and arguments[0].startswith("pellucid.cli"):
        seen.append(signal.getsignal(signal.SIGINT) is signal.default_int_handler)

sys.addaudithook(note)
import pellucid.__main__
assert seen and not any(seen), seen
"""
    done = subprocess.run(
        [sys.executable, "-c", script], env=ENVIRONMENT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
