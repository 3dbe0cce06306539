"""What a model is, as frozen plain data: checked once, when it is built, and never changed.

`ModelConfig` holds every difference between families that is data. A family needs code of its own
only where the *graph* differs (`models/`), so a new Llama-like model is a row of values here.
Readers of checkpoints (`weights/`) build it; models read it.

Sizes are in elements. Names follow Hugging Face's `config.json`, shortened as docs/glossary.md
says.
"""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from .checks import Bounds, check_fields, option
from .errors import ConfigError

__all__ = [
    "MAX_HEAD_DIM",
    "MAX_LAYERS",
    "Activation",
    "GraphName",
    "ModelConfig",
    "RopeConfig",
    "RopeScaling",
]

GraphName = Literal["gpt2", "llama", "gemma"]
Activation = Literal["silu", "gelu_tanh"]
RopeScaling = Literal["none", "linear", "yarn", "llama3", "factors"]
MAX_TOKENS = 1 << 24  # of a context, and of a vocabulary
MAX_SIZE = 1 << 24  # of a layer's width, and of its number of heads
MAX_WINDOW = (1 << 32) - 1  # what files write for "no window" too
MAX_LAYERS = 4096
MAX_HEAD_DIM = 1 << 16
# bounds of theta and of every factor, so that no power or quotient overflows
MIN_ROPE_NUMBER, MAX_ROPE_NUMBER = 1e-15, 1e15


def _rope_number(default: float | None, help: str) -> Any:
    """A field that holds a number of RoPE."""
    return option(default, low=MIN_ROPE_NUMBER, high=MAX_ROPE_NUMBER, help=help)


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeConfig:
    """Rotary position embedding (Su et al., arXiv:2104.09864) and how its frequencies are stretched
    for long contexts.

    `models/rope.py` turns it into `rotary_dim / 2` inverse frequencies, and says what each scaling
    does. Only the `half_split` layout exists at run time: dimension i turns with i + rotary_dim/2.
    Files that store the `interleaved` layout (GGUF's "llama") are permuted when loaded.
    """

    theta: float = option(10_000.0, above=1, high=MAX_ROPE_NUMBER, help="The base")
    rotary_dim: int = option(
        low=2, high=MAX_HEAD_DIM, help="How many of head_dim's dimensions turn; an even number"
    )
    scaling: RopeScaling = "none"
    factor: float = _rope_number(1.0, "How many times longer than the training context")
    original_max_position_embeddings: int = option(
        0, low=0, high=MAX_TOKENS, help="The training context, for yarn and llama3"
    )
    low_freq_factor: float = _rope_number(
        1.0, "llama3: wavelengths above original/low are stretched in full"
    )
    high_freq_factor: float = _rope_number(
        4.0, "llama3: wavelengths below original/high are left alone"
    )
    beta_fast: float = _rope_number(
        32.0, "yarn: pairs that turn more often in the training context are left alone"
    )
    beta_slow: float = _rope_number(
        1.0, "yarn: pairs that turn less often in it are interpolated in full"
    )
    truncate: bool = option(True, help="yarn: the ramp begins and ends at whole pairs")
    attention_factor: float | None = _rope_number(
        None, "Scale of cos and sin; None: 0.1·ln(factor) + 1 for yarn, 1 for factors"
    )
    freq_factors: tuple[
        Annotated[float, Bounds(low=MIN_ROPE_NUMBER, high=MAX_ROPE_NUMBER)], ...
    ] = option((), high=MAX_HEAD_DIM, help="factors: what each inverse frequency is divided by")

    def __post_init__(self) -> None:
        check_fields(self, prefix="rope ")
        if self.rotary_dim % 2:
            raise ConfigError(f"rope rotary_dim is {self.rotary_dim}; it must be an even number")
        if self.scaling == "factors" and len(self.freq_factors) != self.rotary_dim // 2:
            raise ConfigError(
                f"rope has {len(self.freq_factors)} freq_factors; rotary_dim {self.rotary_dim} "
                f"needs {self.rotary_dim // 2}"
            )
        if self.scaling in ("yarn", "llama3") and not self.original_max_position_embeddings:
            raise ConfigError(
                f"rope scaling {self.scaling!r} needs original_max_position_embeddings"
            )
        if self.scaling == "llama3" and self.low_freq_factor >= self.high_freq_factor:
            raise ConfigError(
                f"rope low_freq_factor is {self.low_freq_factor}; it must be below "
                f"high_freq_factor, {self.high_freq_factor}"
            )


def _size(help: str, high: int = MAX_SIZE) -> Any:
    """A field that holds one of a model's sizes."""
    return option(low=1, high=high, help=help)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """The sizes and properties of one model; C F V H KH D are the letters of shapes in comments."""

    architecture: str = option(low=1, high=100, help='The family, as its files call it: "qwen2"')
    graph: GraphName = option("llama", help="Its parameters and forward pass: models/registry.py")
    vocab_size: int = _size("V", MAX_TOKENS)
    hidden_size: int = _size("C")
    intermediate_size: int = _size("F")
    num_layers: int = _size("Layers", MAX_LAYERS)
    num_heads: int = _size("H")
    num_kv_heads: int = _size("KH; H / KH query heads share one KV head")
    head_dim: int = _size("D", MAX_HEAD_DIM)
    max_position_embeddings: int = _size("Longest context that the model was made for", MAX_TOKENS)
    norm_eps: float = option(1e-5, above=0, high=1, help="Added to the mean square of a norm")
    activation: Activation = "silu"
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = option(False, help="RMSNorm over each head's q and k before RoPE")
    tie_word_embeddings: bool = option(False, help="lm_head is embed_tokens")
    embedding_scale: float = option(1.0, above=0, help="Gemma: sqrt(hidden_size)")
    softmax_scale: float | None = option(None, above=0, help="None: 1/sqrt(head_dim)")
    attn_softcap: float | None = option(None, above=0, help="Scores become cap·tanh(scores/cap)")
    final_softcap: float | None = option(None, above=0, help="The same on the logits")
    windows: tuple[Annotated[int, Bounds(low=1, high=MAX_WINDOW)] | None, ...] = option(
        (), high=MAX_LAYERS, help="Per layer: how many last tokens it sees, itself included"
    )
    rope: RopeConfig | None = option(None, help="None: learned positions, or none")
    rope_local: RopeConfig | None = option(None, help="Of layers with a window, if they differ")

    def __post_init__(self) -> None:
        """Check each field, then how they fit together. No window is longer than the context."""
        where = f"{self.architecture}: "
        check_fields(self, prefix=where)
        # Heads.
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"{where}num_heads {self.num_heads} is not a multiple of num_kv_heads "
                f"{self.num_kv_heads}"
            )
        # Windows, one per layer.
        windows = self.windows or (None,) * self.num_layers
        if len(windows) != self.num_layers:
            raise ConfigError(
                f"{where}{len(windows)} windows are given for {self.num_layers} layers"
            )
        length = self.max_position_embeddings
        within = tuple(None if w is None else min(w, length) for w in windows)
        object.__setattr__(self, "windows", within)
        # Positions, and what the graph can do.
        for rope in (self.rope, self.rope_local):
            if rope is not None and rope.rotary_dim > self.head_dim:
                raise ConfigError(
                    f"{where}rope rotary_dim {rope.rotary_dim} is larger than head_dim "
                    f"{self.head_dim}"
                )
        if self.graph == "gpt2" and (
            self.activation != "gelu_tanh" or self.rope or self.rope_local
        ):
            raise ConfigError(
                f"{where}graph 'gpt2' has the activation 'gelu_tanh' and no rope; activation is "
                f"{self.activation!r}, rope is {self.rope}"
            )

    @property
    def attention_scale(self) -> float:
        """The factor of q·k before the softmax."""
        return self.softmax_scale if self.softmax_scale is not None else self.head_dim**-0.5

    def layer_rope(self, layer: int) -> RopeConfig | None:
        """The rotary embedding of one layer: windowed layers may have their own."""
        has_own = self.rope_local is not None and self.windows[layer] is not None
        return self.rope_local if has_own else self.rope
