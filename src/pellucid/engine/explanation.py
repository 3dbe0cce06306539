"""Explains the times of an engine's requests by `measure/explain.py`, which is imported when an
explanation is first requested.

Costs are known only for the native backend's programs. For another backend only the times are
given.
"""

from collections.abc import Callable, Mapping
from functools import cache

from ..config import ModelConfig
from ..engine_config import EngineConfig
from ..formats.tensor import TensorSpec
from ..kv.layout import KVLayout
from ..ops.backend import Backend
from ..outputs import Explanation, RequestMetrics

__all__ = ["Explain", "build_explain"]

Explain = Callable[[RequestMetrics], Explanation]


def build_explain(
    model: ModelConfig,
    specs: Mapping[str, TensorSpec],
    backend: Backend,
    layout: KVLayout,
    config: EngineConfig,
) -> Explain:
    """The explanation of requests of one engine. It keeps no weights and no threads."""
    from ..backends.native.backend import NativeBackend

    name = backend.name
    kv_dtypes = layout.specs[0].k_dtype, layout.specs[0].v_dtype
    options = (
        (backend.isa, backend.threads, config.max_num_batched_tokens)
        if isinstance(backend, NativeBackend)
        else None
    )

    @cache
    def ledger() -> Explain:
        from ..measure.explain import Explainer, explain_times

        if options is None:
            reason = f"the {name} backend has no ledger, so what bound it is unknown"
            return lambda metrics: explain_times(metrics, reason)
        return Explainer(model, specs, kv_dtypes, *options)

    return lambda metrics: ledger()(metrics)
