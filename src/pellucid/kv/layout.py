"""The arithmetic of the KV cache: how many bytes a token costs, and how many tokens fit.

Each layer keeps one key and one value of `head_dim` numbers for each of its KV heads and each token:

    bytes per token = 2 · num_layers · num_kv_heads · head_dim · element_bytes

so grouped-query attention (Ainslie et al., arXiv:2305.13245) saves the factor num_heads / num_kv_heads. Memory is handed out in blocks of
`block_size` tokens (Kwon et al., arXiv:2309.06180), and one block id is valid in all layers. Sizes are in bytes; no array is touched here.
"""

from dataclasses import dataclass

from ..config import ModelConfig

__all__ = ["KVLayout", "build_layout"]


@dataclass(frozen=True, slots=True)
class KVLayout:
    """The shape of the cache of one model."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    block_size: int  # tokens per block
    element_bytes: int  # 4: float32

    @property
    def bytes_per_token(self) -> int:
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * self.element_bytes

    @property
    def bytes_per_block(self) -> int:
        return self.bytes_per_token * self.block_size

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold num_tokens: rounded up."""
        return -(-num_tokens // self.block_size)

    def blocks_in(self, memory: int) -> int:
        """Blocks that fit in `memory` bytes: rounded down."""
        return memory // self.bytes_per_block


def build_layout(config: ModelConfig, block_size: int, element_bytes: int) -> KVLayout:
    """The cache that a model needs."""
    return KVLayout(config.num_layers, config.num_kv_heads, config.head_dim, block_size, element_bytes)
