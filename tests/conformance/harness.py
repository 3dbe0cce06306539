"""What the conformance tests share: one case held to the formula, on any backend.

The formula is evaluated in plain Python loops (oracle.py), which takes longer than any kernel: so its values are kept, and each set of
kernels is compared with the same ones.
"""

import functools
from collections.abc import Hashable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pellucid.formats import FORMATS
from pellucid.ops.budget import check_dense, check_int8_activations
from pellucid.ops.cases import AttentionCase, Case, Inputs, LinearCase, build_case
from pellucid.ops.protocol import Backend

from .oracle import evaluate

__all__ = ["check_case"]


def check_case(backend: Backend, case: Case, *, float32_activations: bool) -> None:
    """Assert that a backend computes a case within its budget; with float32_activations that of dense products holds for all weights."""
    assert isinstance(case, Hashable)  # frozen, as all cases are
    inputs = case.build_inputs()
    float16_cache = isinstance(case, AttentionCase) and backend.kv_element_bytes == 2
    if float16_cache:  # the formula over what the cache holds
        inputs = _with_float16_cache(inputs)
    actual = build_case(backend, case, inputs)()
    exact = _formula(case, float16_cache, np.float64)
    assert actual.dtype == np.float32
    quantized = isinstance(case, LinearCase) and FORMATS[case.format].block_size > 1
    if quantized:
        verdict = check_int8_activations(actual, exact)
        assert verdict.ok, f"NMSE: {verdict}"
    if not quantized or float32_activations:
        condition = max(1.0, case.magnitude) if isinstance(case, AttentionCase) else 1.0  # large scores
        verdict = check_dense(actual, exact, _formula(case, float16_cache, np.float32), condition=condition)
        assert verdict.ok, str(verdict)


@functools.cache
def _formula(case: Case, float16_cache: bool, dtype: type[np.floating[Any]]) -> Any:
    inputs = case.build_inputs()
    return evaluate(case, _with_float16_cache(inputs) if float16_cache else inputs, dtype)


def _with_float16_cache(inputs: Inputs) -> Inputs:
    return replace(inputs, activations=_in_float16(inputs.activations), history=_in_float16(inputs.history))


def _in_float16(arrays: Mapping[str, NDArray[np.float32]]) -> dict[str, NDArray[np.float32]]:
    return {name: rows.astype(np.float16).astype(np.float32) if name in ("k", "v") else rows for name, rows in arrays.items()}
