"""Builds an EngineConfig from the keywords of `LLM(...)`: options of the engine and of its backend.
A name that is neither raises an error that suggests another.
"""

from collections.abc import Mapping
from types import MappingProxyType

from ..backends.registry import BACKENDS, backend_kind
from ..checks import declarations, unknown_name
from ..engine_config import EngineConfig
from ..errors import ConfigError
from ..sampling_params import MAX_LOGPROBS

__all__ = ["build_engine_config"]

_ONE_PROCESS = "one process computes the whole model; threads is the number of its CPU threads"
_MODEL_FILE = "it is what the model's files say"
# Options of vLLM and llama.cpp that have another name here, or none.
ELSEWHERE: Mapping[str, str] = MappingProxyType(
    {
        "cpu_offload_gb": "weights are in this machine's memory anyway",
        "data_parallel_size": _ONE_PROCESS,
        "device": "backend chooses what computes",
        "download_dir": "its name here is cache_dir",
        "dtype": "weights keep the format of their file; kv_cache_dtype is that of the KV cache",
        "enable_chunked_prefill": "prompts above max_num_batched_tokens are always chunked",
        "enforce_eager": "there are no CUDA graphs",
        "gpu_memory_utilization": "kv_cache_memory, as a share below 1, is that of free memory",
        "hf_overrides": _MODEL_FILE,
        "kv_cache_memory_bytes": "its name here is kv_cache_memory, in bytes",
        "load_format": _MODEL_FILE,
        "max_logprobs": f"a request may always ask for {MAX_LOGPROBS}, or for all by -1",
        "n_batch": "its name here is max_num_batched_tokens",
        "n_ctx": "its name here is max_model_len",
        "num_gpu_blocks_override": "kv_cache_memory is the size of the KV cache",
        "pipeline_parallel_size": _ONE_PROCESS,
        "preemption_mode": "its name here is preemption: auto, recompute or swap",
        "tensor_parallel_size": _ONE_PROCESS,
        "tokenizer": _MODEL_FILE,
        "trust_remote_code": "code of a model's repository is never run",
    }
)


def build_engine_config(options: Mapping[str, object]) -> EngineConfig:
    """EngineConfig of keywords: its own fields, and options of the backend, which go to
    `backend_options`. Raises ConfigError for any other name; the message has the nearest name and
    all names.
    """
    own = {told.name: told for told in declarations(EngineConfig)}
    loose = {name: value for name, value in options.items() if name not in own}
    given = {name: value for name, value in options.items() if name in own}
    if loose:
        # Check the engine's own fields first: `backend` decides which other names exist.
        backend = EngineConfig(**given).backend  # type: ignore[arg-type]
        known = backend_kind(backend).option_names
        for name in loose:
            if name not in known:
                of_others = {
                    option: f"it is an option of the {other} backend"
                    for other, kind in BACKENDS.items()
                    for option in kind.option_names
                }
                hints = {**ELSEWHERE, **of_others}
                raise ConfigError(unknown_name("option", name, [*own, *known], hints))
        nested = given.get("backend_options", {})
        assert isinstance(nested, Mapping)  # EngineConfig has checked it
        given["backend_options"] = {**nested, **loose}
    return EngineConfig(**given)  # type: ignore[arg-type]
