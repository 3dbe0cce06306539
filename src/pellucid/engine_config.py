"""How the engine runs a model, as frozen plain data: checked once, when it is built.

Each field is declared with its type, unit, bounds and help (`checks.py`). The command line makes
its engine options from these declarations, so a new option is a field here and its use in the
engine.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

from .checks import Bounds, check_fields, option
from .config import MAX_TOKENS
from .errors import ConfigError
from .named_fields import named_fields

__all__ = ["Batching", "EngineConfig", "Preemption", "SchedulingPolicy"]

SchedulingPolicy = Literal["fcfs", "priority", "lpm", "fair"]
Batching = Literal["continuous", "static", "dynamic"]
Preemption = Literal["auto", "recompute", "swap"]
MAX_REQUESTS = 1 << 16


@named_fields("option")
@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """How the engine runs a model. Where a name is vLLM's, so are its meaning and its unit.

    Types and bounds are checked when it is built. ConfigError names the field.
    """

    max_model_len: int | None = option(
        None,
        low=2,  # one of a prompt, and one of its answer
        high=MAX_TOKENS,
        unit="tokens",
        help="Longest prompt and output of a request together; None: the model's own, or what "
        "the KV cache holds",
    )
    max_num_batched_tokens: int = option(
        512,
        low=1,
        high=MAX_TOKENS,
        unit="tokens",
        help="Tokens that one step computes at most; longer prompts are computed in chunks",
    )
    max_num_seqs: int | None = option(
        None,
        low=1,
        high=MAX_REQUESTS,
        help="Requests that run at once; None: the backend's own number",
    )
    block_size: int = option(16, low=1, high=1024, unit="tokens", help="Tokens per KV block")
    kv_cache_memory: (
        Annotated[int, Bounds(low=1)] | Annotated[float, Bounds(above=0, below=1)] | None
    ) = option(
        None,
        unit="bytes",
        help="Memory for keys and values: bytes, or a share (below 1) of what the weights leave "
        "free; None: what max_num_seqs requests need, a quarter of the free memory at most",
    )
    kv_cache_dtype: str = option(
        "auto",
        low=1,
        high=64,
        help="What keys and values are kept in: a name of the backend's, or two, K,V; auto: one "
        "without measurable loss",
    )
    quantization: str | None = option(
        None,
        low=1,
        high=64,
        help="Quantize a float model while it is loaded: int8, w8a8, or a type of GGUF files such "
        "as q8_0 or q4_k_m; None: weights stay as the files have them",
    )
    enable_prefix_caching: bool | None = option(
        None,
        help="Compute common beginnings of prompts once; None: yes, unless results of the backend "
        "depend on the batch",
    )
    scheduling_policy: SchedulingPolicy = option(
        "fcfs",
        help="Which waiting request is next: the first that came, by priority, the one with the "
        "longest prefix in the cache, or the tenant served least",
    )
    batching: Batching = option(
        "continuous", help="When waiting requests may join: at every step, or between batches"
    )
    preemption: Preemption = option(
        "auto",
        help="What becomes of the blocks of a preempted request: computed again, saved to the "
        "swap file, or whichever costs less",
    )
    swap_space: float = option(
        1.0,
        low=0,
        high=1 << 20,
        unit="GiB",
        help="Size of the file to which evicted blocks are saved",
    )
    speculative: str | None = option(
        "auto",
        low=1,
        high=4096,
        help="Where draft tokens come from: ngram, suffix, draft:MODEL (a smaller model with the "
        "same vocabulary), auto (the best of those without a model, and only while they save "
        "time) or none. Answers stay the same",
    )
    num_speculative_tokens: int | None = option(
        None,
        low=1,
        high=64,
        unit="tokens",
        help="Draft tokens of a request and step at most; None: 15. As many are verified as pay",
    )
    max_waiting_requests: int | None = option(
        None, low=1, help="Requests that may wait; more are refused. None: any number"
    )
    max_waiting_tokens: int | None = option(
        None,
        low=1,
        unit="tokens",
        help="Prompt tokens of all waiting requests together; more are refused. None: any number",
    )
    seed: int | None = option(
        0,
        low=-(1 << 63),
        high=(1 << 64) - 1,
        help="Requests without a seed of their own draw one from it; None: another at every start",
    )
    backend: str = option("native", low=1, high=64, help="A key of backends.registry")
    backend_options: Mapping[str, object] = option(
        default_factory=dict, high=64, help="Options of the backend, by their names"
    )

    def __post_init__(self) -> None:
        check_fields(self)
        drafts = self.num_speculative_tokens
        if drafts is not None and drafts >= self.max_num_batched_tokens:
            raise ConfigError(
                f"num_speculative_tokens is {drafts}; a step of max_num_batched_tokens, "
                f"{self.max_num_batched_tokens}, has room for a token and at most "
                f"{self.max_num_batched_tokens - 1} drafts"
            )
        if drafts is not None and self.speculative is None:
            raise ConfigError(f"num_speculative_tokens is {drafts}, and speculative is None")

    @property
    def swap_bytes(self) -> int:
        """`swap_space` in bytes."""
        return int(self.swap_space * (1 << 30))
