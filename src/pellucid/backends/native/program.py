"""A captured forward pass, ready to run: Python's handle on the list that csrc/program.cpp
replays.
"""

import numpy as np
from numpy.typing import NDArray

from ... import _native
from ...batch import ForwardBatch
from ...ops.backend import Forward
from ..host_logits import HostLogits
from .capture import capture
from .kv_store import KVStore
from .plan import build_plan

__all__ = ["CapturedForward"]


class CapturedForward:
    """Called with a batch, it returns the forward pass's result [rows, width], in memory of its
    own.
    """

    def __init__(self, forward: Forward, isa: str, pool: _native.ThreadPool) -> None:
        self.entries, self._result = capture(forward)
        self.plan = build_plan(self.entries, self._result)
        index = self.plan.index
        buffers = [(p.offset, p.width, p.quantized, p.logits_rows) for p in self.plan.buffers]
        entries = [
            (
                entry.op,
                [index[s.storage] for s in entry.inputs],
                -1 if entry.output is None else index[entry.output.storage],
                entry.weight if isinstance(entry.weight, _native.Weight) else None,
                [v for v in entry.vectors if isinstance(v, _native.Vector)],
                entry.kv.native if isinstance(entry.kv, KVStore) else None,
                barrier,
                entry.attributes,
            )
            for entry, barrier in zip(self.entries, self.plan.barriers, strict=True)
        ]
        self._program = _native.new_program(
            isa, pool, buffers, self.plan.bytes_per_token, self.plan.output, entries
        )

    def __call__(self, batch: ForwardBatch) -> HostLogits:
        return HostLogits(self._run(batch, None))

    def profile(self, batch: ForwardBatch) -> NDArray[np.float32]:
        """Run a batch with a barrier around each entry: the seconds that each took, in order."""
        seconds = np.zeros(len(self.entries), np.float32)
        self._run(batch, seconds)
        return seconds

    def _run(self, batch: ForwardBatch, seconds: NDArray[np.float32] | None) -> NDArray[np.float32]:
        rows = len(batch.logits_indices if self._result.logits_rows else batch.input_ids)
        out = np.empty((rows, self._result.width), np.float32)
        a = batch.attention
        self._program.run(
            batch.input_ids,
            batch.positions,
            batch.logits_indices,
            a.cu_seqlens_q,
            a.seq_lens,
            a.block_tables,
            a.slot_mapping,
            out,
            seconds,
        )
        return out
