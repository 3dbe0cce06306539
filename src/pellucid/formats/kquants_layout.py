"""The C structs of the k-quants, as NumPy dtypes; `kquants.py` explains their fields."""

import numpy as np

__all__ = ["Q2_K_LAYOUT", "Q3_K_LAYOUT", "Q4_K_LAYOUT", "Q5_K_LAYOUT", "Q6_K_LAYOUT"]

Q2_K_LAYOUT = np.dtype([("scales", "u1", 16), ("qs", "u1", 64), ("d", "<f2"), ("dmin", "<f2")])
Q3_K_LAYOUT = np.dtype([("hmask", "u1", 32), ("qs", "u1", 64), ("scales", "u1", 12), ("d", "<f2")])
Q4_K_LAYOUT = np.dtype([("d", "<f2"), ("dmin", "<f2"), ("scales", "u1", 12), ("qs", "u1", 128)])
Q5_K_LAYOUT = np.dtype(
    [("d", "<f2"), ("dmin", "<f2"), ("scales", "u1", 12), ("qh", "u1", 32), ("qs", "u1", 128)]
)
Q6_K_LAYOUT = np.dtype([("ql", "u1", 128), ("qh", "u1", 64), ("scales", "i1", 16), ("d", "<f2")])
