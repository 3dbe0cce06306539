"""The plan of the house (docs/design.md) as data, which `test_architecture.py` enforces: who may
import whom, which libraries have which rooms, and how much may be written.
"""

# Whom each room may import, beside itself. A room that is not here may not exist: give it a row,
# and docs/design.md a line. "kv.manager" means that module alone. The rows run from the top of the
# house to its ground.
REQUEST = (
    *("request", "sampling_params", "structured_params", "pooling_params"),
    *("outputs", "constraint"),
)
PLAIN = ("config", "engine_config", "checks", "kv_spec", *REQUEST, "batch", "errors")
BELOW_ENGINE = (
    *("scheduler", "speculative", "sampling", "parallel", "quant", "models", "weights"),
    *("structured", "tokenizer", "kv", "backends", "ops", "formats"),
)
MAY_IMPORT: dict[str, tuple[str, ...]] = {
    "__main__": ("cli",),
    "cli": (
        *("pellucid", "lab", "server", "measure", "engine", *BELOW_ENGINE),
        *(*PLAIN, "files", "cpu", "units"),
    ),
    "lab": ("pellucid", "measure", *PLAIN),
    "server": ("pellucid", "engine", "tokenizer", *PLAIN),
    "measure": ("engine", *BELOW_ENGINE, *PLAIN, "files", "cpu", "host_memory", "units", "_native"),
    "engine": (*BELOW_ENGINE, *PLAIN, "files", "cpu", "host_memory", "units"),
    # the ledger, the part of `measure` that stands below the engine: an output asks it why it took
    # that long
    **dict.fromkeys(
        ("measure.explain", "measure.machine", "measure.roofline", "measure.hardware"),
        (*BELOW_ENGINE, *PLAIN, "files", "cpu", "host_memory", "_native"),
    ),
    "engine.explanation": ("measure.explain", *BELOW_ENGINE, *PLAIN),
    "scheduler": ("kv.manager", *PLAIN),
    "speculative": PLAIN,
    "sampling": PLAIN,
    "parallel": ("models.params", "ops", *PLAIN),
    "quant": (
        *("models", "weights", "tokenizer", "backends", "ops", "formats", "_native"),
        *(*PLAIN, "files"),
    ),
    "models": ("ops.protocol", "config", "batch", "errors"),
    "weights": (
        *("models.params", "models.registry", "models.rope", "formats"),
        *("config", "files", "errors"),
    ),
    "tokenizer": ("config", "files", "errors"),
    "structured": ("tokenizer", *PLAIN),
    "kv": ("config", "kv_spec", "request", "batch", "errors"),
    "kv.storage": ("ops", "config", "kv_spec", "batch", "errors", "host_memory"),
    "backends": (
        *("ops", "sampling", "formats", "cpu", "host_memory", "files", "control_groups", "_native"),
        *PLAIN,
    ),
    "ops": ("sampling.row", "formats", "config", "kv_spec", "batch", "errors"),
    "formats": ("errors",),
    "cpu": ("_native", "errors"),
    "host_memory": ("control_groups",),
    "control_groups": (),
    "units": (),
    "kv_spec": ("config",),
    "config": ("checks", "errors"),
    "engine_config": ("checks", "config", "named_fields", "errors"),
    "request": ("sampling_params", "pooling_params", "outputs", "constraint", "errors"),
    "sampling_params": ("structured_params", "named_fields", "checks", "errors", "units"),
    "structured_params": ("named_fields", "checks", "errors"),
    "pooling_params": ("named_fields", "checks", "errors"),
    "named_fields": ("checks", "errors"),
    "constraint": (),
    "outputs": (),
    "checks": ("errors",),
    "batch": (),
    "files": ("errors",),
    "errors": (),
    "pellucid": ("engine", *PLAIN),  # the package's own __init__: public names only
}

MAY_NOT_USE: dict[str, frozenset[str]] = {
    "models": frozenset({"numpy", "torch"}),
    "scheduler": frozenset({"numpy", "torch", "time", "asyncio", "threading"}),
    "kv": frozenset({"numpy", "torch", "time", "asyncio", "threading"}),
    "speculative": frozenset({"numpy", "torch", "time", "asyncio", "threading"}),
    "server": frozenset({"numpy", "torch"}),
}
# every library has its rooms; the oracles of tests have none
LIBRARY_IS_USED_BY: dict[str, tuple[str, ...]] = {
    "click": ("cli",),
    "prompt_toolkit": ("cli",),
    **dict.fromkeys(
        ("fastapi", "starlette", "pydantic", "uvicorn", "prometheus_client", "opentelemetry"),
        ("server",),
    ),
    "tqdm": ("cli", "engine", "weights"),  # progress bars, where they are asked for
    "aiohttp": ("measure",),  # the client of a load test; the extra `bench`
    "huggingface_hub": ("weights",),
    "safetensors": (),
    "tokenizers": ("tokenizer",),
    "jinja2": ("tokenizer",),
    "llguidance": ("structured",),
    "torch": ("backends", "parallel", "measure"),  # measure: in the process of a peer
    "multiprocessing": ("parallel",),
    "gguf": (),
    "transformers": ("measure",),  # in the process of a peer, as the next two
    "vllm": ("measure",),
    "llama_cpp": ("measure",),
    "pickle": (),
    "marshal": (),
    "shelve": (),
}

# the hub: XDG_CACHE_HOME, where the platform keeps caches; the worker sets what a peer reads
READS_THE_ENVIRONMENT = ("cli", "weights.catalogue", "measure.bench_worker")

MAX_FILE_LINES = 500
MAX_CORE_LINES = 3400
CORE_PATH = (  # what a reader finishes in a morning
    "config.py",
    "request.py",
    "batch.py",
    "ops/protocol.py",
    "backends/reference/ops.py",
    "backends/reference/attention.py",
    "backends/reference/flash_attention.py",
    "models/blocks.py",
    "models/llama.py",
    "kv/layout.py",
    "kv/block_pool.py",
    "kv/node.py",
    "kv/radix_tree.py",  # the order of eviction and the second tier are read apart
    "kv/manager.py",
    "kv/storage.py",
    "scheduler/scheduler.py",  # its policies and its log are read apart
    "engine/core.py",
    "engine/model_runner.py",
    "engine/forward_batch.py",
)
MAX_IMPORT_SECONDS = 0.5
