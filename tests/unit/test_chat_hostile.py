"""Hostile chat templates: each ends soon with one sentence, in little memory, while signals are
handled; and a process that renders can be lost at any time.
"""

import itertools
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from pellucid.errors import CapacityError, RequestError
from pellucid.tokenizer.chat_template import ChatTemplate
from pellucid.tokenizer.template_process import CPU_SECONDS, Answer, TemplateProcesses, _Process

from .hostile_templates import HOSTILE, loops

pytestmark = pytest.mark.slow  # seconds of templates that do not end

PROGRAM = Path(__file__).with_name("hostile_templates.py")
USER: list[dict[str, Any]] = [{"role": "user", "content": "Hello"}]
ECHO = "<{{ messages[0].content }}>"
BIG = "{% set x = [] %}" + "".join(f"{{% set x{i} = '\U0001f600' * 4000000 %}}" for i in range(7))


# ---- every hostile template, in a process that would be seen to crash


@pytest.fixture(scope="module")
def told() -> dict[str, dict[str, Any]]:
    command = [sys.executable, "-W", "error", str(PROGRAM), "0.15"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200, check=False)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr[-2000:]
    return {line["name"]: line for line in map(json.loads, done.stdout.splitlines())}


def test_there_is_a_hostile_template_for_each_kind() -> None:
    assert len(HOSTILE) >= 120


@pytest.mark.slow
@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_template_harms_nothing(name: str, told: dict[str, dict[str, Any]]) -> None:
    line = told[name]
    kind, _, sentence = line["outcome"].partition(": ")
    if not kind.endswith(" characters"):  # harmless
        assert kind in ("RequestError", "FormatError", "UnsupportedError")
        assert len(sentence) < 1000 and "bug" not in sentence
    assert line["memory"] < 100
    assert line["memory_of_processes"] < 600
    # CPU time of this process; that of the processes which render has a limit
    assert line["seconds"] < 5
    assert line["without_signals"] < 2


# ---- the processes


@pytest.fixture
def processes() -> TemplateProcesses:
    return TemplateProcesses()


def render(source: str, processes: TemplateProcesses, content: str = "Hello") -> str:
    messages = [{"role": "user", "content": content}]
    return ChatTemplate(source, {}, processes=processes).render(messages).plain


def idle(processes: TemplateProcesses) -> list[_Process]:
    """The processes that wait for a job."""
    return [place.process for place in processes._places if place.process is not None]


def pid_of(processes: TemplateProcesses) -> int:
    return idle(processes)[0]._process.pid


def test_a_process_serves_many_renderings(processes: TemplateProcesses) -> None:
    assert render(ECHO, processes) == "<Hello>"
    first = pid_of(processes)
    assert [render(ECHO, processes, text) for text in "ab"] == ["<a>", "<b>"]
    with pytest.raises(RequestError, match="refuses the messages: no"):
        render("{{ raise_exception('no') }}", processes)
    with pytest.raises(RequestError, match="UndefinedError"):
        render("{{ messages[0].x.y }}", processes)
    assert pid_of(processes) == first


def test_a_process_that_was_started_early_serves_the_first_chat(
    processes: TemplateProcesses,
) -> None:
    processes.start()
    first = pid_of(processes)
    processes.start()
    assert render(ECHO, processes) == "<Hello>"
    assert pid_of(processes) == first


def test_an_early_start_that_fails_is_told_at_the_first_chat(
    processes: TemplateProcesses, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", "/no/such/python")
    processes.start()
    with pytest.raises(CapacityError, match="no process could be started"):
        render(ECHO, processes)


def test_a_pause_of_the_whole_program_is_not_counted_as_waiting(
    processes: TemplateProcesses, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The clock seems to run ten minutes between any two looks at it."""
    now = itertools.count(0.0, 600.0)
    monkeypatch.setattr(time, "monotonic", lambda: next(now))
    assert render(ECHO, processes) == "<Hello>"


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGKILL])
def test_a_crash_is_told_and_the_next_chat_is_served(
    number: signal.Signals, processes: TemplateProcesses
) -> None:
    render(ECHO, processes)
    pid = pid_of(processes)
    (process,) = idle(processes)
    ask = process.ask

    def ask_one_that_crashes(job: bytes, seconds: float) -> Answer:
        threading.Timer(0.2, os.kill, (pid, number)).start()
        return ask(job, seconds)

    process.ask = ask_one_that_crashes  # type: ignore[method-assign]
    with pytest.raises(RequestError, match=r"was stopped: (it crashed|the system killed)"):
        render(loops(), processes)
    assert render(ECHO, processes) == "<Hello>"


def test_a_process_that_was_killed_while_idle_is_replaced(processes: TemplateProcesses) -> None:
    render(ECHO, processes)
    (process,) = idle(processes)
    os.kill(pid_of(processes), signal.SIGKILL)
    assert wait_for(lambda: not process.is_running)
    assert render(ECHO, processes) == "<Hello>"


NESTED = (
    "{% set n = namespace(x=()) %}{% for i in range(COUNT) %}{% set n.x = (n.x,) %}{% endfor %}"
    "{{ n.x | length }}"
)


def test_values_may_be_nested_within_the_limit(processes: TemplateProcesses) -> None:
    assert render(NESTED.replace("COUNT", "100"), processes) == "1"


@pytest.mark.parametrize(
    ("limits", "source", "message"),
    [
        ({"cpu_seconds": 0.2}, loops(), "computes for more than 0.2 seconds"),
        ({"wall_seconds": 2, "cpu_seconds": 60}, loops(), "runs for more than 2 seconds"),
        ({"memory_bytes": 100 << 20}, BIG, "needs too much memory"),
        ({}, NESTED.replace("COUNT", "200"), "nests values more than 128 deep"),
    ],
)
def test_each_limit_has_its_sentence(limits: dict[str, Any], source: str, message: str) -> None:
    if "memory_bytes" in limits and sys.platform == "darwin":
        pytest.skip("macOS does not enforce a limit on memory")
    processes = TemplateProcesses(**limits)
    with pytest.raises(RequestError, match=f"was stopped: it {message}"):
        render(source, processes)
    assert render(ECHO, processes) == "<Hello>"


def test_an_interrupt_ends_the_wait_at_once(processes: TemplateProcesses) -> None:
    render(ECHO, processes)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with pytest.raises(KeyboardInterrupt):
        threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
        render("{{ ('a' * 4000000).rfind('ab' ~ 'a' * 1500000) }}", processes)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime - before.ru_utime < 0.75 * CPU_SECONDS  # nobody waited for its limit
    assert render(ECHO, processes) == "<Hello>"


def test_many_threads_ask_at_once(processes: TemplateProcesses) -> None:
    texts = [f"text {i} \ud800 é😀" for i in range(100)]
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda text: render(ECHO, processes, text), texts))
    assert answers == [f"<{text}>" for text in texts]
    assert 1 <= len(idle(processes)) <= 4


@pytest.mark.skipif(sys.platform != "linux", reason="it reads /proc")
def test_a_process_can_open_no_file_and_holds_no_array_library(
    processes: TemplateProcesses,
) -> None:
    render(ECHO, processes)
    place = Path("/proc") / str(pid_of(processes))
    lines = (place / "limits").read_text().splitlines()
    limits = {line[:26].strip(): line[26:46].strip() for line in lines}
    assert limits["Max open files"] == limits["Max file size"] == "0"
    maps = (place / "maps").read_text()
    assert "numpy" not in maps and "tokenizers" not in maps and "_native" not in maps


@pytest.mark.parametrize(
    ("executable", "message"),
    [("/no/such/python", "no process could be started"), ("false", "did not start: .* code 1")],
)
def test_a_process_that_cannot_be_started_is_told(
    executable: str, message: str, processes: TemplateProcesses, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", executable)
    with pytest.raises(CapacityError, match=message):
        render(ECHO, processes)


def run(program: str) -> str:
    command = [sys.executable, "-W", "error", "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr[-2000:]
    return done.stdout


SETUP = """
from pellucid.tokenizer import chat_template
template = chat_template.ChatTemplate("<{{ messages[0].content }}>", {})
def render(text): return template.render([{"role": "user", "content": text}]).plain
def idle(): return [p.process for p in chat_template._shared_processes()._places if p.process]
def pid(): return idle()[0]._process.pid
"""


def gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def wait_for(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 600
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return condition()


def test_processes_end_with_the_one_that_started_them() -> None:
    pid = int(run(SETUP + "render('x'); print(pid())"))
    assert wait_for(lambda: gone(pid))
    killed = run(SETUP + "import os, sys; render('x'); print(pid(), flush=True); os._exit(0)")
    assert wait_for(lambda: gone(int(killed)))


def test_a_fork_starts_its_own() -> None:
    program = """
import gc, os
render("x")
before = pid()
if child := os.fork():
    _, status = os.waitpid(child, 0)
    print(status, render("parent"), pid() == before)
else:
    ok = render("child") == "<child>" and pid() != before
    gc.collect()
    os._exit(0 if ok else 1)
"""
    assert run(SETUP + program) == "0 <parent> True\n"


def test_no_process_is_started_before_the_first_chat() -> None:
    assert run(SETUP + "print(idle())") == "[]\n"
