"""Programs and batches that are wrong are refused by `_native`, or run within their memory: see
native_fuzzer.py.
"""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_no_program_and_no_batch_leaves_its_memory(seed: int) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.unit.native_fuzzer", str(seed), "1500"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) > 300  # of 1500 programs: enough ran to mean something
