"""The arithmetic of the KV cache: how many bytes a token costs, which layers share blocks, and how
many blocks a request holds.

Each layer keeps one key and one value of `head_dim` numbers for each of its KV heads and each
token:

    bytes per token = num_layers · token_bytes        token_bytes = num_kv_heads · (bytes of a key + of a value)

so grouped-query attention (Ainslie et al., arXiv:2305.13245) saves the factor num_heads /
num_kv_heads. Memory is handed out in blocks of `block_size` tokens (Kwon et al., arXiv:2309.06180).

A layer with a sliding window forgets what lies behind it, so its blocks can be given back while
those of other layers stay. Layers are put in groups, one block table per group, and every group has
the same number of layers: then a block is the same number of bytes whoever holds it, and one pool
serves all. Layer j of each group lies in store j; a block belongs to one group at a time. Sizes are
in bytes.
"""

from dataclasses import dataclass

from ..config import ModelConfig

__all__ = ["KVLayout", "LayerGroup", "build_layout"]


@dataclass(frozen=True, slots=True)
class LayerGroup:
    """Layers that share a block table."""

    layers: tuple[int, ...]
    window: int | None  # how many last tokens they see, the newest included; None: all

    def first_needed(self, num_computed_tokens: int, block_size: int) -> int:
        """The first block that a token at that position, or any later one, reads."""
        return (
            0
            if self.window is None
            else max(0, num_computed_tokens - self.window + 1) // block_size
        )


@dataclass(frozen=True, slots=True)
class KVLayout:
    """The shape of the cache of one model."""

    groups: tuple[LayerGroup, ...]
    num_kv_heads: int
    head_dim: int
    block_size: int  # tokens per block
    token_bytes: int  # of one layer's key and value of one token
    # that keys and values are kept in; None: the backend's default
    dtypes: tuple[str | None, str | None] = (None, None)

    @property
    def num_layers(self) -> int:
        return sum(len(group.layers) for group in self.groups)

    @property
    def num_stores(self) -> int:
        """Layers per group; the last group of a kind may have fewer, and leaves the rest of its
        blocks unused.
        """
        return max(len(group.layers) for group in self.groups)

    @property
    def bytes_per_token(self) -> int:
        """Of a token that every layer keeps."""
        return self.num_layers * self.token_bytes

    @property
    def bytes_per_block(self) -> int:
        return self.num_stores * self.block_size * self.token_bytes

    def columns_for(self, num_tokens: int) -> int:
        """Blocks in one group's table of num_tokens: rounded up."""
        return -(-num_tokens // self.block_size)

    def blocks_for(self, num_tokens: int, chunk: int) -> int:
        """Blocks, of all groups together, that one request of num_tokens ever holds at once,
        computed `chunk` tokens at a time.
        """
        return sum(self.group_blocks_for(group, num_tokens, chunk) for group in self.groups)

    def group_blocks_for(self, group: LayerGroup, num_tokens: int, chunk: int) -> int:
        """The same of one group."""
        whole = self.columns_for(num_tokens)
        if group.window is None:
            return whole
        # a chunk and what it sees, at any offset
        return min(whole, (group.window + min(chunk, num_tokens) - 2) // self.block_size + 2)

    def tokens_in(self, num_blocks: int, chunk: int, at_most: int) -> int:
        """The longest request, up to `at_most` tokens, that so many blocks hold."""
        low, high = 0, at_most
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (
                (middle, high)
                if self.blocks_for(middle, chunk) <= num_blocks
                else (low, middle - 1)
            )
        return low


def build_layout(
    config: ModelConfig,
    block_size: int,
    token_bytes: int,
    dtypes: tuple[str | None, str | None] = (None, None),
) -> KVLayout:
    """The cache that a model needs. Layers of one window form a kind; the rarest kind gives the
    number of layers per group.
    """
    kinds: dict[int | None, list[int]] = {}
    for layer, window in enumerate(config.windows):
        kinds.setdefault(window, []).append(layer)
    size = min(len(layers) for layers in kinds.values())
    groups = tuple(
        LayerGroup(tuple(layers[i : i + size]), window)
        for window, layers in kinds.items()
        for i in range(0, len(layers), size)
    )
    return KVLayout(groups, config.num_kv_heads, config.head_dim, block_size, token_bytes, dtypes)
