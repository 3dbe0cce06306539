"""What the conformance tests share: one case held to the formula, on any backend.

The formula is evaluated in plain Python loops (oracle.py), which takes longer than any kernel: so
its values are kept, and each set of kernels is compared with the same ones.
"""

import functools
from collections.abc import Hashable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pellucid.backends.reference.kv_dtypes import round_trip
from pellucid.formats import ALL_FORMATS
from pellucid.ops.backend import Backend
from pellucid.ops.budget import check_dense, check_int8_activations
from pellucid.ops.build_case import build_case
from pellucid.ops.cases import AttentionCase, Case, LinearCase

from .oracle import evaluate

__all__ = ["check_case"]


def check_case(backend: Backend, case: Case, *, float32_activations: bool) -> None:
    """Assert that a backend computes a case within its budget; with float32_activations that of
    dense products holds for all weights.
    """
    assert isinstance(case, Hashable)  # frozen, as all cases are
    inputs = case.build_inputs()
    dtypes = (
        (case.kv_dtypes or (backend.kv_dtypes[0],) * 2) if isinstance(case, AttentionCase) else None
    )
    actual = build_case(backend, case, inputs)()
    exact = _formula(case, dtypes, np.float64)
    assert actual.dtype == np.float32
    quantized = isinstance(case, LinearCase) and ALL_FORMATS[case.format].block_size > 1
    if quantized:
        verdict = check_int8_activations(actual, exact)
        assert verdict.ok, f"NMSE: {verdict}"
    if not quantized or float32_activations:
        # large scores
        condition = max(1.0, case.magnitude) if isinstance(case, AttentionCase) else 1.0
        verdict = check_dense(
            actual, exact, _formula(case, dtypes, np.float32), condition=condition
        )
        assert verdict.ok, str(verdict)


@functools.cache
def _formula(case: Case, dtypes: tuple[str, str] | None, dtype: type[np.floating[Any]]) -> Any:
    inputs = case.build_inputs()
    # the formula over what the cache holds
    if isinstance(case, AttentionCase) and dtypes is not None:
        inputs = replace(
            inputs,
            activations=_kept(inputs.activations, case, dtypes),
            history=_kept(inputs.history, case, dtypes),
        )
    return evaluate(case, inputs, dtype)


def _kept(
    arrays: Mapping[str, NDArray[np.float32]], case: AttentionCase, dtypes: tuple[str, str]
) -> dict[str, NDArray[np.float32]]:
    kept = dict(arrays)
    for name, dtype in zip(("k", "v"), dtypes, strict=True):
        if name in kept:
            heads = kept[name].reshape(-1, case.num_kv_heads, case.head_dim)
            kept[name] = round_trip(heads, dtype, keys=name == "k").reshape(kept[name].shape)
    return kept
