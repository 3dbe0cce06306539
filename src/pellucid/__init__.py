"""Pellucid: an LLM inference engine that you can see through.

The public names are below. Everything else may change; docs/design.md describes it. Importing this
package loads no array library, uses no device and starts no thread: a name is imported when it is
first used (PEP 562).
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .engine.async_engine import AsyncEngine
    from .engine.llm import LLM
    from .engine.prompts import TextPrompt, TokensPrompt
    from .engine_config import EngineConfig
    from .errors import PellucidError
    from .outputs import (
        CompletionOutput,
        EmbeddingOutput,
        EmbeddingRequestOutput,
        Logprob,
        RequestMetrics,
        RequestOutput,
    )
    from .pooling_params import PoolingParams
    from .sampling_params import SamplingParams
    from .structured_params import StructuredOutputsParams

__all__ = [
    "LLM",
    "AsyncEngine",
    "CompletionOutput",
    "EmbeddingOutput",
    "EmbeddingRequestOutput",
    "EngineConfig",
    "Logprob",
    "PellucidError",
    "PoolingParams",
    "RequestMetrics",
    "RequestOutput",
    "SamplingParams",
    "StructuredOutputsParams",
    "TextPrompt",
    "TokensPrompt",
    "__version__",
]

__version__ = "0.1.0"

_HOME = {
    "LLM": ".engine.llm",
    "AsyncEngine": ".engine.async_engine",
    "CompletionOutput": ".outputs",
    "EmbeddingOutput": ".outputs",
    "EmbeddingRequestOutput": ".outputs",
    "EngineConfig": ".engine_config",
    "Logprob": ".outputs",
    "PellucidError": ".errors",
    "PoolingParams": ".pooling_params",
    "RequestMetrics": ".outputs",
    "RequestOutput": ".outputs",
    "SamplingParams": ".sampling_params",
    "StructuredOutputsParams": ".structured_params",
    "TextPrompt": ".engine.prompts",
    "TokensPrompt": ".engine.prompts",
}


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'pellucid' has no attribute {name!r}")
    return getattr(import_module(_HOME[name], __name__), name)


def __dir__() -> list[str]:
    return __all__
