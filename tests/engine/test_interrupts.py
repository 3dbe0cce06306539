"""Ctrl-C may come at any moment, and the model stays usable.

A timer raises KeyboardInterrupt in the main thread at hundreds of random moments of a call: in the
engine, and in the library code that it waits with. What an interrupt could break there is a lock
that is taken and never released, or a call that wakes nobody; then a later call hangs.
"""

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow  # hundreds of interrupts each

SCRIPT = """
import faulthandler, os, random, signal, sys, time
faulthandler.dump_traceback_later(200, exit=True)
from pellucid import LLM, SamplingParams

llm = LLM(sys.argv[1])
params = SamplingParams(temperature=0, max_tokens=2)
call = {
    "generate": lambda: llm.generate("ab", params, use_tqdm=False),
    "stream": lambda: list(llm.stream("ab", params))[-1:],
    "chat": lambda: llm.chat([{"role": "user", "content": "ab"}], params, use_tqdm=False),
    "stats": lambda: [llm.stats() for _ in range(20)] and [],
    "long": lambda: llm.generate("ab" * 3000, params, use_tqdm=False),
}[sys.argv[2]]

def interrupt(*_):
    raise KeyboardInterrupt

def answer():
    return [output.outputs[0].token_ids for output in call()]

signal.signal(signal.SIGALRM, interrupt)
expected = answer()
times = []
for _ in range(3):
    start = time.monotonic()
    answer()
    times.append(time.monotonic() - start)
random.seed(0)
num_interrupted = 0
for i in range(int(sys.argv[3])):
    try:
        signal.setitimer(signal.ITIMER_REAL, random.uniform(1e-6, min(times)))
        call()
        signal.setitimer(signal.ITIMER_REAL, 0)
    except KeyboardInterrupt:
        num_interrupted += 1
    signal.setitimer(signal.ITIMER_REAL, 0)
    faulthandler.dump_traceback_later(200, exit=True)
    assert answer() == expected, i
print(num_interrupted, "interrupts")
assert num_interrupted
os._exit(0)  # what an interrupt left to a finalizer is not the question
"""


@pytest.mark.parametrize(
    ("call", "times"),
    [("generate", 300), ("stream", 300), ("stats", 300), ("long", 20), ("chat", 150)],
)
def test_an_interrupt_at_any_moment_leaves_the_model_usable(
    call: str, times: int, long_path: Path
) -> None:
    command = [sys.executable, "-c", SCRIPT, str(long_path), call, str(times)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
