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
from typing import Annotated, Literal

from .checks import Bounds, check_fields, option
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
RopeScaling = Literal["none", "linear", "yarn", "llama3", "factors"]
MAX_TOKENS = 1 << 24  # of a context, and of a vocabulary
MAX_REQUESTS = 1 << 16
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
    truncate: bool = True  # yarn: the ramp begins and ends at whole pairs
    # yarn, factors: scale of cos and sin; None = 0.1·ln(factor) + 1 for yarn, 1 for factors
    attention_factor: float | None = None
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
    """How the engine runs a model. Where a name is vLLM's, so are its meaning and its unit.

    Types and bounds are checked when it is built; ConfigError names the field. The command line
    makes its engine options from these declarations.
    """

    max_model_len: int | None = option(
        None,
        low=1,
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
    threads: int | None = option(
        None,
        low=1,
        high=256,
        help="Threads of the native backend; None: the CPUs that this process may use",
    )
    isa: str | None = option(
        None,
        low=1,
        high=64,
        help="Instruction set of the native backend's kernels; None: the best of this CPU",
    )

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def swap_bytes(self) -> int:
        """`swap_space` in bytes."""
        return int(self.swap_space * (1 << 30))
