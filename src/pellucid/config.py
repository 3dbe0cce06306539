"""What a model is and how the engine runs it, as frozen plain data. Validated once, when built;
never changed afterwards.

`ModelConfig` holds every difference between families that is data. A family needs code of its own
only where the *graph* differs (`models/`), so a new Llama-like model is a row of values here.
Readers of checkpoints (`weights/`) build it; models read it.

Units: sizes in elements, `kv_cache_memory` in bytes. Names follow Hugging Face's `config.json`,
shortened as docs/glossary.md says.
"""

import math
from dataclasses import dataclass
from typing import Literal, get_args

from .errors import ConfigError

__all__ = [
    "MAX_HEAD_DIM",
    "MAX_LAYERS",
    "Activation",
    "Batching",
    "EngineConfig",
    "ModelConfig",
    "Preemption",
    "RopeConfig",
    "RopeScaling",
    "SchedulingPolicy",
]

Activation = Literal["silu", "gelu_tanh"]
SchedulingPolicy = Literal["fcfs", "priority", "lpm", "fair"]
Batching = Literal["continuous", "static", "dynamic"]
Preemption = Literal["auto", "recompute", "swap"]
RopeScaling = Literal["none", "linear", "ntk", "yarn", "llama3", "factors"]
MAX_LAYERS = 4096
MAX_HEAD_DIM = 1 << 16
# bounds of theta and of every factor, so that no power or quotient overflows
MIN_ROPE_NUMBER, MAX_ROPE_NUMBER = 1e-15, 1e15


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeConfig:
    """Rotary position embedding (Su et al., arXiv:2104.09864) and how its frequencies are stretched
    for long contexts.

    `models/rope.py` turns it into `rotary_dim / 2` inverse frequencies, and says what each scaling
    does. Only the `half_split` layout exists at run time: dimension i turns with i + rotary_dim/2.
    Files that store the `interleaved` layout (GGUF's "llama") are permuted when loaded.
    """

    theta: float = 10_000.0
    rotary_dim: int  # how many of head_dim's dimensions turn; even
    scaling: RopeScaling = "none"
    factor: float = 1.0  # how many times longer than the training context
    original_max_position_embeddings: int = 0  # the training context: yarn, llama3
    low_freq_factor: float = 1.0  # llama3: wavelengths above original/low are stretched in full
    high_freq_factor: float = 4.0  # llama3: wavelengths below original/high are left alone
    # yarn: dimensions that turn more often than this in the training context are left alone
    beta_fast: float = 32.0
    # yarn: dimensions that turn less often than this are interpolated in full
    beta_slow: float = 1.0
    attention_factor: float | None = None  # yarn: scale of cos and sin; None = 0.1·ln(factor) + 1
    # factors: each inverse frequency is divided by its own factor (GGUF `rope_freqs.weight`)
    freq_factors: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if not 0 < self.rotary_dim <= MAX_HEAD_DIM or self.rotary_dim % 2:
            raise ConfigError(
                f"rope rotary_dim is {self.rotary_dim}; it must be an even number from 2 to "
                f"{MAX_HEAD_DIM}"
            )
        if not 1 < self.theta <= MAX_ROPE_NUMBER:
            raise ConfigError(
                f"rope theta is {self.theta}; it must be above 1 and at most {MAX_ROPE_NUMBER:g}"
            )
        for name in (
            "factor",
            "low_freq_factor",
            "high_freq_factor",
            "beta_fast",
            "beta_slow",
            "attention_factor",
        ):
            value = getattr(self, name)
            if value is not None and not MIN_ROPE_NUMBER <= value <= MAX_ROPE_NUMBER:
                raise ConfigError(
                    f"rope {name} is {value}; it must be from {MIN_ROPE_NUMBER:g} to "
                    f"{MAX_ROPE_NUMBER:g}"
                )
        if self.scaling == "factors" and len(self.freq_factors) != self.rotary_dim // 2:
            raise ConfigError(
                f"rope has {len(self.freq_factors)} freq_factors; rotary_dim {self.rotary_dim} "
                f"needs {self.rotary_dim // 2}"
            )
        if any(not MIN_ROPE_NUMBER <= f <= MAX_ROPE_NUMBER for f in self.freq_factors):
            raise ConfigError(
                f"a rope freq_factor is not a number from {MIN_ROPE_NUMBER:g} to "
                f"{MAX_ROPE_NUMBER:g}"
            )
        if self.scaling in ("yarn", "llama3") and self.original_max_position_embeddings <= 0:
            raise ConfigError(
                f"rope scaling {self.scaling!r} needs original_max_position_embeddings"
            )
        if self.scaling == "llama3" and self.low_freq_factor >= self.high_freq_factor:
            raise ConfigError(
                f"rope low_freq_factor is {self.low_freq_factor}; it must be below "
                f"high_freq_factor, {self.high_freq_factor}"
            )
        if self.scaling == "ntk" and self.rotary_dim < 4:
            raise ConfigError(
                f"rope rotary_dim is {self.rotary_dim}; scaling 'ntk' needs at least 4"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """The shape and dialect of one model. The letters C F V H KH D of shapes in comments are the
    sizes named here.
    """

    architecture: str  # the family, as its files call it: "gpt2", "llama", "qwen2", …
    graph: str = "llama"  # a key of models.registry: its parameters and forward pass
    vocab_size: int  # V
    hidden_size: int  # C
    intermediate_size: int  # F
    num_layers: int
    num_heads: int  # H
    num_kv_heads: int  # KH; H / KH query heads share one KV head
    head_dim: int  # D
    max_position_embeddings: int  # the longest context the model was made for
    norm_eps: float = 1e-5
    activation: Activation = "silu"
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False  # RMSNorm over each head's q and k before RoPE (Qwen3, Gemma 3)
    tie_word_embeddings: bool = False  # lm_head is embed_tokens
    embedding_scale: float = 1.0  # Gemma: sqrt(hidden_size)
    softmax_scale: float | None = None  # None = 1/sqrt(head_dim)
    attn_softcap: float | None = None  # Gemma 2: cap·tanh(scores/cap)
    final_softcap: float | None = None  # the same on the logits
    # per layer: how many last tokens it sees, itself included; None = all
    windows: tuple[int | None, ...] = ()
    rope: RopeConfig | None = None  # None: learned positions (GPT-2)
    # Gemma 3: layers with a window turn with these frequencies instead
    rope_local: RopeConfig | None = None

    def __post_init__(self) -> None:
        sizes = (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_layers",
            "num_heads",
            "num_kv_heads",
            "head_dim",
            "max_position_embeddings",
        )
        for name in sizes:
            value = getattr(self, name)
            if not 1 <= value <= 1 << 24:
                raise ConfigError(
                    f"{self.architecture}: {name} is {value}; it must be between 1 and {1 << 24}"
                )
        for name, limit in (("num_layers", MAX_LAYERS), ("head_dim", MAX_HEAD_DIM)):
            if getattr(self, name) > limit:
                raise ConfigError(
                    f"{self.architecture}: {name} is {getattr(self, name)}; it must be at most "
                    f"{limit}"
                )
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"{self.architecture}: num_heads {self.num_heads} is not a multiple of "
                f"num_kv_heads {self.num_kv_heads}"
            )
        if not self.windows:
            object.__setattr__(self, "windows", (None,) * self.num_layers)
        if len(self.windows) != self.num_layers:
            raise ConfigError(
                f"{self.architecture}: {len(self.windows)} windows are given for "
                f"{self.num_layers} layers"
            )
        if any(w is not None and w < 1 for w in self.windows):
            raise ConfigError(f"{self.architecture}: a sliding window must be at least 1")
        for rope in (self.rope, self.rope_local):
            if rope is not None and rope.rotary_dim > self.head_dim:
                raise ConfigError(
                    f"{self.architecture}: rope rotary_dim {rope.rotary_dim} is larger than "
                    f"head_dim {self.head_dim}"
                )
        for name in (
            "norm_eps",
            "embedding_scale",
            "softmax_scale",
            "attn_softcap",
            "final_softcap",
        ):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise ConfigError(
                    f"{self.architecture}: {name} is {value}; it must be a positive number"
                )

    @property
    def attention_scale(self) -> float:
        """What q·k is multiplied by before the softmax."""
        return self.softmax_scale if self.softmax_scale is not None else self.head_dim**-0.5

    def layer_rope(self, layer: int) -> RopeConfig | None:
        """The rotary embedding of one layer: windowed layers may have their own."""
        return (
            self.rope_local
            if self.rope_local is not None and self.windows[layer] is not None
            else self.rope
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """How the engine runs a model. Names and meanings are vLLM's."""

    # longest prompt + output of a request; None: the model's own, or what the KV cache holds
    max_model_len: int | None = None
    # tokens that one step computes at most: a longer prompt is computed in chunks
    max_num_batched_tokens: int = 512
    # requests that run at once; None: 256, or 1 where a backend's results depend on the batch
    max_num_seqs: int | None = None
    block_size: int = 16  # tokens per KV block
    # bytes, or a share (below 1) of what the weights leave free; None: a quarter at most
    kv_cache_memory: int | float | None = None
    # of keys and values, a name of the backend's or two, "K,V"; auto: one that loses nothing that
    # shows
    kv_cache_dtype: str = "auto"
    # None: yes, but where a backend's results depend on the batch
    enable_prefix_caching: bool | None = None
    # who of those that wait is next: fcfs, priority, lpm or fair
    scheduling_policy: SchedulingPolicy = "fcfs"
    batching: Batching = "continuous"  # when they may join: continuous, static or dynamic
    # what becomes of blocks that must go: recompute, swap, or whichever costs less here
    preemption: Preemption = "auto"
    swap_space: int = 1 << 30  # bytes of the file to which `swap` saves blocks
    max_waiting_requests: int | None = None  # more are refused
    max_waiting_tokens: int | None = None
    seed: int = 0  # from which requests without a seed of their own draw one
    backend: str = "native"  # a key of backends.registry
    # of the native backend; None: as many as the CPUs that this process may use
    threads: int | None = None
    # the instruction set of the native backend's kernels; None: the best that the CPU has
    isa: str | None = None

    def __post_init__(self) -> None:
        for name in ("max_num_batched_tokens", "block_size", "swap_space"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 1")
        for name in (
            "max_model_len",
            "max_num_seqs",
            "threads",
            "max_waiting_requests",
            "max_waiting_tokens",
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} is {value}; it must be at least 1")
        memory = self.kv_cache_memory
        if memory is not None and not (
            0 < memory < 1 if isinstance(memory, float) else memory >= 1
        ):
            raise ConfigError(
                f"kv_cache_memory is {memory}; it must be a number of bytes, or a share above 0 "
                "and below 1"
            )
        for name, kind in (
            ("scheduling_policy", SchedulingPolicy),
            ("batching", Batching),
            ("preemption", Preemption),
        ):
            if getattr(self, name) not in get_args(kind):
                raise ConfigError(
                    f"{name} is {getattr(self, name)!r}; it must be one of: "
                    f"{', '.join(get_args(kind))}"
                )
        if self.block_size > 1024:
            raise ConfigError(f"block_size is {self.block_size}; it must be at most 1024")
