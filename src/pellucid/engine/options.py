"""Builds an EngineConfig from the keywords of `LLM(...)`: options of the engine and of its backend.
A name that is neither raises an error that suggests another.
"""

from collections.abc import Mapping
from types import MappingProxyType

from ..backends.registry import BACKENDS, backend_kind
from ..checks import declarations, show, unknown_name
from ..engine_config import EngineConfig
from ..errors import ConfigError, FormatError
from ..files import parse_json
from ..sampling_params import MAX_LOGPROBS
from ..speculative.methods import DRAFT, check_method

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
    options = _with_speculation(options)
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
    config = EngineConfig(**given)  # type: ignore[arg-type]
    check_method(config.speculative)
    return config


def _with_speculation(options: Mapping[str, object]) -> Mapping[str, object]:
    """vLLM's `speculative_config`, as a mapping or as JSON (also under `speculative`), as our
    options. None means none, as in vLLM.
    """
    told = options.get("speculative_config")
    method = options.get("speculative")
    if told is not None and method is not None:
        raise ConfigError(
            "speculative_config and speculative are the same option; give one of them"
        )
    if isinstance(method, str) and method.lstrip()[:1] in ("{", "["):
        told = method
    if told is None:
        rest = {name: value for name, value in options.items() if name != "speculative_config"}
        return rest if "speculative_config" not in options else {"speculative": None, **rest}
    # Read it.
    if isinstance(told, str):
        told = _parse_config(told)
    if not isinstance(told, Mapping):
        raise ConfigError(f"speculative_config is {show(told)}; it must be a mapping")
    for name, value in told.items():
        if name not in _SPECULATIVE_FIELDS:
            raise ConfigError(
                unknown_name(
                    "field of speculative_config", name, _SPECULATIVE_FIELDS, _SPECULATIVE_ELSEWHERE
                )
            )
        # The governor learns which lengths of a match pay, so bounds of it change nothing.
        if name.startswith("prompt_lookup") and (type(value) is not int or value < 1):
            raise ConfigError(f"{name} is {show(value)}; it must be a whole number of at least 1")
    least, most = (told.get(f"prompt_lookup_{end}") for end in ("min", "max"))
    if least is not None and most is not None and least > most:
        raise ConfigError(f"prompt_lookup_min is {least}, and prompt_lookup_max only {most}")
    method = told.get("method", "draft_model" if "model" in told else None)
    if method is None:
        raise ConfigError("speculative_config has no method and no model")
    model = told.get("model")
    if method == "draft_model":
        if not isinstance(model, str) or not model:
            raise ConfigError(
                f"the model of speculative_config is {show(model)}; it must be a name"
            )
        method = f"{DRAFT}{model}"
    elif model is not None:
        raise ConfigError(f"speculative_config has the method {show(method)}, which has no model")
    # Give our options.
    rest = {n: v for n, v in options.items() if n not in ("speculative_config", "speculative")}
    if "num_speculative_tokens" in told:
        if "num_speculative_tokens" in rest:
            raise ConfigError("num_speculative_tokens is given twice")
        rest["num_speculative_tokens"] = told["num_speculative_tokens"]
    return {**rest, "speculative": method}


def _parse_config(text: str) -> Mapping[str, object]:
    if len(text) > _MAX_CONFIG:
        raise ConfigError(
            f"speculative_config has {len(text)} characters; at most {_MAX_CONFIG} are read"
        )
    try:
        return parse_json(text.encode(), "speculative_config")
    except (FormatError, UnicodeError) as error:
        raise ConfigError(str(error)) from None


_MAX_CONFIG = 4096  # characters
_SPECULATIVE_FIELDS = (
    *("method", "model", "num_speculative_tokens", "prompt_lookup_min", "prompt_lookup_max"),
)
_GOVERNED = "drafts are verified only where they save time"
_SPECULATIVE_ELSEWHERE = {
    "disable_by_batch_size": _GOVERNED,
    "draft_tensor_parallel_size": _ONE_PROCESS,
    "max_model_len": "a draft model drafts as far as its own context reaches",
    "quantization": "the draft model keeps the format of its file",
    "rejection_sample_method": "answers are those without drafts, bit for bit",
}
