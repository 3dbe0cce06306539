"""One step's work for the model, as flat ragged arrays: what `engine/model_runner.py` builds and
models, ops and kernels read.

The tokens of all requests lie end to end in one batch of T tokens, without padding. A request in
prefill has many tokens, one in decode has one, and `cu_seqlens_q` has the first row of each. Keys
and values are read through block tables (paged attention, Kwon et al., arXiv:2309.06180), so a
request's tokens may lie anywhere in the cache. Layers that keep the same tokens form a group and
share a block table. Layers with a sliding window form another group, because they give back blocks
that other layers still need.

Arrays are int32 buffers of the backend's array library (NumPy on a CPU); this module imports none.
Letters: T tokens in the batch, R requests, G groups of layers, B block_size.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

__all__ = ["AttentionMetadata", "BlockOp", "ForwardBatch", "IntArray"]

# an int32 array: numpy.ndarray, torch.Tensor, or anything that they can view without a copy
IntArray: TypeAlias = Any


@dataclass(frozen=True, slots=True)
class AttentionMetadata:
    """Which tokens each token attends to, and where their keys and values lie. Query token t of
    request r is at position `seq_lens[r] - (cu_seqlens_q[r+1] - t)`.
    """

    # [R + 1]  request r owns batch tokens cu_seqlens_q[r] … cu_seqlens_q[r+1] - 1
    cu_seqlens_q: IntArray
    # [R]      tokens of request r whose KV is in the cache once this step has written: what its
    # last token sees
    seq_lens: IntArray
    # [G, R, M]  the KV blocks of request r in order, padded with a block that no request owns;
    # position i lies in block [g, r, i // B]
    block_tables: IntArray
    slot_mapping: IntArray  # [G, T]     where this step's keys and values go: block · B + offset
    block_size: int  # B


@dataclass(frozen=True, slots=True)
class ForwardBatch:
    """The whole input of a forward pass."""

    input_ids: IntArray  # [T]
    positions: IntArray  # [T]  position of each token in its own request
    logits_indices: IntArray  # [L], rising: the rows whose logits are needed
    hidden_indices: IntArray  # [E], rising: the rows whose hidden states are needed
    attention: AttentionMetadata


class BlockOp(NamedTuple):
    """A change to the bytes of one block, made before the step runs, in the order of its list."""

    kind: str  # "copy" block -> block, "save" block -> slot, "load" slot -> block
    source: int
    target: int
