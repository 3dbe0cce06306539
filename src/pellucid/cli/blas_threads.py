"""The threads that NumPy's BLAS starts when NumPy is imported.

OpenBLAS starts one per CPU, and they spin for about a tenth of a second. The native backend has
threads of its own and multiplies nothing with NumPy, so a command that computes with it needs none.
Without them a start keeps its second core, and a process that may start few threads can start.
"""

import os
import sys

__all__ = ["spare_blas_threads"]


def spare_blas_threads(backend: str) -> None:
    """Let OpenBLAS start no thread, if `backend` does not use it. Call it before NumPy is imported.
    The user's own OPENBLAS_NUM_THREADS is kept.
    """
    if backend == "native" and "numpy" not in sys.modules:
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
