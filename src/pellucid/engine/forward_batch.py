"""Builds the flat batch of a forward pass: tokens end to end, and where their keys and values lie.

Letters: G layer groups, T tokens, R requests, M blocks of the longest block table.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ..batch import AttentionMetadata, ForwardBatch
from ..kv.node import HOLE

__all__ = ["build_forward_batch"]


def build_forward_batch(
    input_ids: Sequence[int],
    positions: Sequence[int],
    cu_seqlens_q: Sequence[int],
    seq_lens: Sequence[int],
    block_tables: Sequence[Sequence[Sequence[int]]],
    logits_indices: Sequence[int],
    hidden_indices: Sequence[int],
    *,
    block_size: int,
    scratch_block: int,
) -> ForwardBatch:
    """The batch of R requests. `block_tables` are those of each request, one for each layer group;
    the scratch block stands where a request has no block.
    """
    position = np.array(positions, np.int32)  # [T]
    starts = np.array(cu_seqlens_q, np.int32)  # [R + 1]
    owner = np.repeat(np.arange(len(seq_lens)), np.diff(starts))
    tables = _stack(block_tables, scratch_block)
    blocks = tables[:, owner, position // block_size]  # of [G, R, M]: [G, T]
    slots = blocks * block_size + position % block_size  # [G, T]
    return ForwardBatch(
        input_ids=np.array(input_ids, np.int32),
        positions=position,
        logits_indices=np.array(logits_indices, np.int32),
        hidden_indices=np.array(hidden_indices, np.int32),
        attention=AttentionMetadata(
            cu_seqlens_q=starts,
            seq_lens=np.array(seq_lens, np.int32),
            block_tables=tables,
            slot_mapping=slots.astype(np.int32),
            block_size=block_size,
        ),
    )


def _stack(tables: Sequence[Sequence[Sequence[int]]], scratch_block: int) -> NDArray[np.int32]:
    """Block tables [G, R, M]; the scratch block pads them and replaces HOLEs."""
    groups = len(tables[0])
    width = max(len(of_request[0]) for of_request in tables)  # its tables are of one length
    padding = [HOLE] * width
    blocks: list[int] = []
    for g in range(groups):
        for of_request in tables:
            blocks += of_request[g]
            blocks += padding[len(of_request[g]) :]
    array = np.array(blocks, np.int32).reshape(groups, len(tables), width)
    array[array == HOLE] = scratch_block
    return array
