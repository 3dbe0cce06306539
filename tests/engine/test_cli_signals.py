"""Signals and broken standard streams, met by the real program in a process of its own."""

import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
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


# Runs a command as another user, by its real id, who may have so many processes and threads. The
# effective id keeps root's right to read files, without the rights that lift the limit.
FEW_THREADS = """
import ctypes, os, resource, sys
libc, count = ctypes.CDLL(None), int(sys.argv[1])
for capability in (21, 24):  # CAP_SYS_ADMIN, CAP_SYS_RESOURCE
    libc.prctl(24, capability, 0, 0, 0)  # PR_CAPBSET_DROP
resource.setrlimit(resource.RLIMIT_NPROC, (count, count))
os.setresuid(int(sys.argv[2]), 0, 0)
os.execv(sys.argv[3], sys.argv[3:])
"""
LIMITS = range(1, 7)
ALL_USERS = ["0", "0", str((1 << 32) - 1)]


def can_become_any_user() -> bool:
    """Whether this is root, and not of a namespace with few users."""
    users = Path("/proc/self/uid_map")
    return users.exists() and os.getuid() == 0 and users.read_text().split() == ALL_USERS


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that every user can enter; pytest closes its own."""
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o755)
        yield Path(name)


@pytest.mark.skipif(not can_become_any_user(), reason="only root can become a user without threads")
@pytest.mark.parametrize(
    "command",
    [
        "run hi -q -n 1 -m MODEL",
        "run hi -q -n 1 -m MODEL --backend reference",
        "inspect MODEL",
        "perplexity TEXT -m MODEL --n-ctx 32 --chunks 1",
        "quantize MODEL OUT --to q8_0",
        "imatrix MODEL --text TEXT -o OUT --n-ctx 32 --chunks 1",
    ],
)
def test_where_few_threads_can_be_started_all_goes_well_or_one_sentence_says_so(
    tiny_path: Path, open_folder: Path, command: str
) -> None:
    text = open_folder / "text"
    text.write_text("the words of a text " * 20)
    names = {"MODEL": str(tiny_path), "TEXT": str(text), "OUT": str(open_folder / "out.gguf")}
    arguments = [names.get(word, word) for word in command.split()]
    for limit in LIMITS:
        user = str(60_000 + random.randrange(1 << 30))  # who has no other process
        done = subprocess.run(
            [sys.executable, "-c", FEW_THREADS, str(limit), user, *PROGRAM, *arguments],
            env=ENVIRONMENT,
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )
        errors = done.stderr.splitlines()
        if done.returncode == 0:
            assert not any("thread" in line or "OpenBLAS" in line for line in errors)
            continue
        assert done.returncode == 1 and "Traceback" not in done.stderr
        assert errors[-1].startswith("pellucid: error: no ")
        assert "thread could be started; `ulimit -u` allows" in errors[-1] or (
            "no process could be started to render the chat template" in errors[-1]
        )
        assert len([line for line in errors if "thread" in line]) == 1
