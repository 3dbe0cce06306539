"""The arithmetic of the KV cache: how many bytes a token costs, which layers share blocks, and how
many blocks a request holds.

Each layer keeps one key and one value for each of its KV heads and each token (`kv_spec.py`):

    token_bytes = num_kv_heads · (bytes of a key + bytes of a value)

so grouped-query attention (Ainslie et al., arXiv:2305.13245) saves the factor num_heads /
num_kv_heads. Memory is handed out in blocks of `block_size` tokens (Kwon et al., arXiv:2309.06180).

A layer with a sliding window never reads what lies behind it, so its blocks there can be given back
while those of other layers stay. Layers form groups with one block table each, and every group has
the same number of layers. Then a block is the same number of bytes in every group, and one pool
serves all. Layer j of each group lies in store j, and a block belongs to one group at a time.

Layers share a store only if their keys and values have the same shape. A model whose layers differ
in shape has one group of all its layers and a store for each, so blocks behind a window are not
given back. Sizes are in bytes.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from ..kv_spec import KVSpec

__all__ = ["KVLayout", "LayerGroup", "build_layout"]


@dataclass(frozen=True, slots=True)
class LayerGroup:
    """Layers that share a block table."""

    layers: tuple[int, ...]
    window: int | None  # how many last tokens they see, the newest included; None: all

    def first_needed(self, num_computed_tokens: int, block_size: int) -> int:
        """The first block that a token at that position, or any later one, reads."""
        if self.window is None:
            return 0
        return max(0, num_computed_tokens - self.window + 1) // block_size


@dataclass(frozen=True, slots=True)
class KVLayout:
    """The shape of the cache of one model."""

    groups: tuple[LayerGroup, ...]
    specs: tuple[KVSpec, ...]  # per layer
    token_bytes: tuple[int, ...]  # per layer: of one token's key and value
    block_size: int  # tokens per block

    @property
    def stores(self) -> tuple[KVSpec, ...]:
        """The KVSpec of each store. A group with fewer layers than stores leaves some unused."""
        return tuple(self.specs[layer] for layer in self.groups[0].layers)

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one token in all layers."""
        return sum(self.token_bytes)

    @property
    def bytes_per_block(self) -> int:
        """Bytes of one block in all stores."""
        return self.block_size * sum(self.token_bytes[layer] for layer in self.groups[0].layers)

    def columns_for(self, num_tokens: int) -> int:
        """Blocks in one group's table for num_tokens, rounded up."""
        return -(-num_tokens // self.block_size)

    def blocks_for(self, num_tokens: int, chunk: int) -> int:
        """The most blocks of all groups that a request computed in chunks holds at a time."""
        return sum(self.group_blocks_for(group, num_tokens, chunk) for group in self.groups)

    def group_blocks_for(self, group: LayerGroup, num_tokens: int, chunk: int) -> int:
        """The same for one group."""
        whole = self.columns_for(num_tokens)
        if group.window is None:
            return whole
        # a chunk and its window, at any offset in a block
        return min(whole, (group.window + min(chunk, num_tokens) - 2) // self.block_size + 2)

    def tokens_in(self, num_blocks: int, chunk: int, at_most: int) -> int:
        """The tokens of the longest request, up to `at_most`, that this many blocks hold."""
        lengths = range(1, at_most + 1)  # a longer request never needs fewer blocks
        return bisect_right(lengths, num_blocks, key=lambda n: self.blocks_for(n, chunk))


def build_layout(
    specs: Sequence[KVSpec], token_bytes: Sequence[int], block_size: int, *, keep_all: bool = False
) -> KVLayout:
    """The cache of a model whose layers keep `specs`; layer i takes `token_bytes[i]` per token.

    Layers of one window form a kind. The kind with the fewest layers gives the number of layers per
    group. `keep_all`: one group that gives no block back, for layers that are computed later than
    others (a draft model's).
    """
    if keep_all:
        group = LayerGroup(tuple(range(len(specs))), None)
        return KVLayout((group,), tuple(specs), tuple(token_bytes), block_size)
    windows: dict[int | None, list[int]] = {}
    for layer, spec in enumerate(specs):
        windows.setdefault(spec.window, []).append(layer)
    if len({spec.shape for spec in specs}) > 1:
        # one group with the largest window
        farthest = None if None in windows else max(w for w in windows if w is not None)
        windows = {farthest: list(range(len(specs)))}
    size = min(len(layers) for layers in windows.values())
    groups = tuple(
        LayerGroup(tuple(layers[i : i + size]), window)
        for window, layers in windows.items()
        for i in range(0, len(layers), size)
    )
    return KVLayout(groups, tuple(specs), tuple(token_bytes), block_size)
