"""What each layer keeps in the KV cache: one `KVSpec` per layer, as plain data.

Everything about the KV cache is derived from these: the layer groups and the bytes of a block
(`kv/layout.py`), the memory plan, the second tier, and each backend's stores. Widths are numbers
per head and token; dtypes are names of `Backend.kv_dtypes`. Nothing assumes that two layers have
the same widths.

Two kinds of layer exist: full attention (`window` is None) and sliding-window attention. Two more
kinds are planned:

- Multi-head latent attention keeps one latent vector of `kv_lora_rank + qk_rope_head_dim` numbers
  per token in place of keys and values per head. Its spec has one KV head, keys of that width, and
  values of width 0, because the values are a prefix of the keys (DeepSeek-V2, arXiv:2405.04434).
- A recurrent layer (Mamba, linear attention) keeps a state of a fixed size per request. It needs a
  new kind of spec, with one state per block and a number of blocks that does not grow with the
  tokens.
"""

from dataclasses import dataclass, replace

from .config import ModelConfig

__all__ = ["KVSpec", "build_kv_specs"]


@dataclass(frozen=True, slots=True)
class KVSpec:
    """Keys and values of one layer."""

    num_kv_heads: int
    k_dim: int  # numbers of a key, per KV head and token
    v_dim: int  # numbers of a value
    k_dtype: str  # what keys are kept in
    v_dtype: str
    window: int | None = None  # how many last tokens the layer sees, the newest included; None: all

    @property
    def shape(self) -> "KVSpec":
        """The same without the window: layers of equal shape may share a store."""
        return replace(self, window=None)


def build_kv_specs(config: ModelConfig, k_dtype: str, v_dtype: str) -> tuple[KVSpec, ...]:
    """What each layer of the model keeps, in order of the layers."""
    return tuple(
        KVSpec(config.num_kv_heads, config.head_dim, config.head_dim, k_dtype, v_dtype, window)
        for window in config.windows
    )
