"""Where keys and values lie: one paged store per layer, in whatever layout the backend's kernels like.

The only file of this room that touches arrays, and it does so through the backend. A block id means the same place in each layer.
"""

from ..ops.protocol import Backend, KVLayer
from .layout import KVLayout

__all__ = ["KVStorage"]


class KVStorage:
    """Owns the memory of the cache; `layers[i]` is what layer i's `kv_write` and `attention` take."""

    def __init__(self, backend: Backend, layout: KVLayout, num_blocks: int) -> None:
        self.layers: list[KVLayer] = [
            KVLayer(backend.new_kv_store(num_blocks, layout.block_size, layout.num_kv_heads, layout.head_dim))
            for _ in range(layout.num_layers)
        ]
