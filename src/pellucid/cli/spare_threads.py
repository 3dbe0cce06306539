"""The threads that libraries start by themselves: OpenBLAS's when NumPy is imported, and Rust's
when a text is cut into tokens. Environment variables turn them off, before the libraries are
imported.
"""

import _thread
import os
import sys

__all__ = ["spare_blas_threads", "spare_threads_if_few"]

_MOST = 64  # threads that are tried
_LOOKS = 10_000  # for their end: a tenth of a second


def spare_blas_threads(backend: str) -> None:
    """Let OpenBLAS start no thread, if `backend` does not use it. Call it before NumPy is imported.
    The user's own OPENBLAS_NUM_THREADS is kept.

    OpenBLAS starts one per CPU, and they spin for about a tenth of a second. The native backend has
    threads of its own and multiplies nothing with NumPy. Without OpenBLAS's a start keeps its
    second core.
    """
    if backend == "native" and "numpy" not in sys.modules:
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")


def spare_threads_if_few() -> None:
    """Let both libraries start no thread, if this process may not start as many as they want.

    Where a thread cannot be started, OpenBLAS ends the process, and Rust prints a backtrace.
    """
    if not _can_start(min(2 * (os.cpu_count() or 1), _MOST)):
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def _can_start(count: int) -> bool:
    """Whether so many threads can run at once. They wait for a lock and end before this returns."""
    gate, before = _thread.allocate_lock(), _num_threads()

    def wait() -> None:
        with gate:
            pass

    can = True
    with gate:
        try:
            for _ in range(count):
                _thread.start_new_thread(wait, ())
        except RuntimeError:
            can = False
    # a thread that is ending still counts: a library that starts one too soon would fail
    for _ in range(_LOOKS):
        if _num_threads() <= before:
            break
        os.sched_yield()
    return can


def _num_threads() -> int:
    """Threads of this process that the system knows; 0 where it does not tell."""
    try:
        return len(os.listdir("/proc/self/task"))
    except OSError:  # not Linux, or no file can be opened
        return 0
