"""What most families write into GGUF files: the keys of `gguf.py` the other way round.

The values are under their keys without the architecture's name. A difference that these keys cannot
hold is found by `gguf_header.py`, which reads back what is written.
"""

from collections.abc import Sequence

from ...config import ModelConfig, RopeConfig

__all__ = ["common_values", "window_values"]


def common_values(
    config: ModelConfig, norm_eps: str = "layer_norm_rms_epsilon"
) -> dict[str, object]:
    """The keys of `gguf.common_keys`, and those of the rotary embedding. `norm_eps` is the family's
    name of that key.
    """
    return {
        "vocab_size": config.vocab_size,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_heads,
        "attention.head_count_kv": config.num_kv_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        f"attention.{norm_eps}": config.norm_eps,
        **({} if config.rope is None else _rope_values(config.rope)),
    }


def _rope_values(rope: RopeConfig) -> dict[str, object]:
    """The keys of a rotary embedding. Factors of single pairs are tensors: llama3's too."""
    values: dict[str, object] = {
        "rope.dimension_count": rope.rotary_dim,
        "rope.freq_base": rope.theta,
    }
    if rope.scaling in ("linear", "yarn"):
        values |= {"rope.scaling.type": rope.scaling, "rope.scaling.factor": rope.factor}
    if rope.scaling == "yarn":
        values |= {
            "rope.scaling.original_context_length": rope.original_max_position_embeddings,
            "rope.scaling.yarn_beta_fast": rope.beta_fast,
            "rope.scaling.yarn_beta_slow": rope.beta_slow,
        }
        if rope.attention_factor is not None:
            values["rope.scaling.yarn_attn_factor"] = rope.attention_factor
    if rope.scaling == "factors" and rope.attention_factor is not None:
        values["rope.scaling.attn_factor"] = rope.attention_factor
    return values


def window_values(windows: Sequence[int | None], period: int | None = None) -> dict[str, object]:
    """The window of the layers that have one; 0: none has. Without a `period` all layers have it.
    With one, the last of so many layers has none; a list says it where other layers have none.
    """
    sizes = {window for window in windows if window is not None}
    values: dict[str, object] = {"attention.sliding_window": max(sizes, default=0)}
    flags = [window is not None for window in windows]
    if (
        period is not None
        and sizes
        and flags != [i % period < period - 1 for i in range(len(flags))]
    ):
        values["attention.sliding_window_pattern"] = flags
    return values
