"""Cold start: a fresh process from its start to its first token and to its end, and the most memory
that it held. Ours is `pellucid run` with a prompt of one word and one token to answer.

The peak is the largest resident set, pages of the model's file included; /proc tells it while the
process runs, on Linux only.
"""

import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Thread

from ..errors import PellucidError

__all__ = ["ColdStart", "PeakMeter", "measure_own_start"]

POLL_SECONDS = 0.005


@dataclass(frozen=True, slots=True)
class ColdStart:
    """Seconds from the start of a process, and bytes."""

    first_token: float
    end: float
    peak: int  # 0: the system does not tell it


class PeakMeter:
    """Reads the largest resident set of a process until `stop`, which returns it."""

    def __init__(self, pid: int) -> None:
        self._status = Path(f"/proc/{pid}/status")
        self._peak = 0
        self._ended = Event()
        self._thread = Thread(target=self._watch, daemon=True)
        self._thread.start()

    def stop(self) -> int:
        """Bytes; 0 where the system does not tell."""
        self._ended.set()
        self._thread.join()
        return self._peak

    def _watch(self) -> None:
        while True:
            try:
                lines = self._status.read_text().splitlines()
            except OSError:
                return
            for line in lines:
                if line.startswith("VmHWM:"):
                    self._peak = max(self._peak, int(line.split()[1]) * 1024)
            if self._ended.wait(POLL_SECONDS):
                return


def measure_own_start(path: Path, options: Sequence[str]) -> ColdStart:
    """One fresh `pellucid run`. `options` are more words of its command line."""
    command = [sys.executable, "-m", "pellucid", "run", "-q", "-m", str(path), *options]
    command += ["--max-tokens", "1", "--", "Hi"]
    start = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        meter = PeakMeter(process.pid)
        try:
            assert process.stdout is not None and process.stderr is not None
            answered = process.stdout.read(1)
            first = time.perf_counter() - start
            process.stdout.read()
            complaint = process.stderr.read().decode(errors="replace")
            code = process.wait()
        except BaseException:
            process.kill()
            raise
        finally:
            peak = meter.stop()
    end = time.perf_counter() - start
    if code or not answered:
        raise PellucidError(f"pellucid run ended with {code}: {' '.join(complaint.split())[:300]}")
    return ColdStart(first, end, peak)
