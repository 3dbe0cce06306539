"""An upper bound of the memory that a step will take in NumPy, before anything is loaded.

The forward pass runs over the widths of its tensors alone. NumPy frees an array when no name refers
to it, so the peak is within one op: its inputs, its result, a few temporaries as wide as the
result, and the arrays that the layer still needs. Sizes are in bytes.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from ...batch import AttentionMetadata, ForwardBatch, IntArray
from ...formats.tensor import TensorSpec
from ...ops.backend import Forward
from ...ops.protocol import KVLayer, Ops

__all__ = ["step_bytes"]

ELEMENT_BYTES = 4  # float32
TEMPORARIES = 4  # temporary arrays of an op; gelu has the most
KEPT = 3  # arrays of the hidden size that a layer keeps during an op
_LOGITS_INDICES = np.zeros(0, np.int32)  # rows that `take_rows` takes by another array are tokens


class _Rows(NamedTuple):
    """A tensor whose rows are the batch's tokens, or its rows with logits."""

    width: int
    of_logits: bool = False


class _Widths:
    """Implements `ops.protocol.Ops` over `_Rows`, with `TensorSpec`s for weights."""

    def __init__(self) -> None:
        # numbers per row of the largest op: over tokens, over rows with logits
        self.most = {False: 0, True: 0}
        self.hidden = 0

    def _op(self, width: int, *inputs: _Rows) -> _Rows:
        result = _Rows(width, any(x.of_logits for x in inputs))
        needs = sum(x.width for x in inputs) + (1 + TEMPORARIES) * width
        self.most[result.of_logits] = max(self.most[result.of_logits], needs)
        return result

    def embedding(self, table: TensorSpec, input_ids: IntArray, scale: float = 1.0) -> _Rows:
        self.hidden = max(self.hidden, table.shape[1])
        return self._op(table.shape[1])

    def linear(self, x: _Rows, weight: TensorSpec, bias: TensorSpec | None = None) -> _Rows:
        return self._op(weight.shape[0], x)

    def split_heads(self, x: _Rows, num_heads: int) -> _Rows:
        return x

    def kv_write(self, kv: KVLayer, k: _Rows, v: _Rows, slot_mapping: IntArray) -> None:
        self._op(k.width, k, v)

    def attention(
        self,
        q: _Rows,
        kv: KVLayer,
        metadata: AttentionMetadata,
        *,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
    ) -> _Rows:
        return self._op(q.width // kv.store.k_dim * kv.store.v_dim, q)

    def take_rows(self, x: _Rows, indices: IntArray) -> _Rows:
        return self._op(x.width, _Rows(x.width, of_logits=indices is _LOGITS_INDICES))

    def all_reduce(self, x: _Rows) -> _Rows:
        return x

    def __getattr__(self, name: str) -> Callable[..., _Rows]:
        """Every other op returns a result as wide as its first input."""
        if name not in vars(Ops):
            raise AttributeError(name)
        return lambda x, *others: self._op(
            x.width, x, *(other for other in others if isinstance(other, _Rows))
        )


def step_bytes(forward: Forward, num_tokens: int, num_logits: int) -> dict[str, int]:
    """Bytes that a step of `num_tokens` tokens takes, by purpose."""
    widths: Any = _Widths()
    nothing = np.zeros(0, np.int32)
    metadata = AttentionMetadata(nothing, nothing, nothing, nothing, block_size=1)
    found = forward(widths, ForwardBatch(nothing, nothing, _LOGITS_INDICES, nothing, metadata))
    of_tokens = widths.most[False] + KEPT * widths.hidden
    memory = {
        "activations": num_tokens * of_tokens * ELEMENT_BYTES,
        "logits": num_logits * widths.most[True] * ELEMENT_BYTES,
    }
    if not isinstance(found, _Rows):  # logits, and the hidden states of embeddings
        memory["hidden states"] = num_tokens * found[1].width * ELEMENT_BYTES
    return memory
