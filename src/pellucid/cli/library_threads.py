"""The threads that libraries start by themselves: OpenBLAS's when NumPy is imported, and Rust's
when a text is cut into tokens. Environment variables turn them off, before the libraries are
imported.
"""

import _thread
import os
import sys

__all__ = ["spare_blas_threads", "spare_threads_if_few"]

_MOST = 64  # threads that are tried


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
    """Whether so many threads can run at once. They wait for a lock and end."""
    gate = _thread.allocate_lock()

    def wait() -> None:
        with gate:
            pass

    with gate:
        try:
            for _ in range(count):
                _thread.start_new_thread(wait, ())
        except RuntimeError:
            return False
    return True
