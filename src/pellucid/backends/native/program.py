"""A captured forward pass, ready to run: the Python handle of the program that csrc/program.cpp
replays.
"""

import time
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ... import _native
from ...batch import ForwardBatch
from ...ops.backend import Forward
from ..host_logits import HostLogits
from .capture import capture
from .costs import StepShape
from .kv_store import KVStore
from .plan import build_plan

__all__ = ["CapturedForward", "TimedStep"]


@dataclass(frozen=True, slots=True)
class TimedStep:
    """A step in the ledger. Times are in seconds; `start` is from time.monotonic()."""

    batch: ForwardBatch
    start: float  # of the forward pass
    seconds: NDArray[np.float32]  # of each entry, in order

    @property
    def shape(self) -> StepShape:
        """The lengths of the step."""
        a = self.batch.attention
        q_lens: list[int] = np.diff(a.cu_seqlens_q).tolist()
        return StepShape(q_lens, a.seq_lens.tolist(), len(self.batch.logits_indices))


class CapturedForward:
    """A function of a batch that returns the logits of the forward pass, in new memory."""

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
        # If this is a list, each step is appended to it with the time of each entry.
        self.ledger: list[TimedStep] | None = None

    def __call__(self, batch: ForwardBatch) -> HostLogits:
        if self.ledger is None:
            return HostLogits(self._run(batch, None))
        step = TimedStep(batch, time.monotonic(), np.zeros(len(self.entries), np.float32))
        self.ledger.append(step)
        return HostLogits(self._run(batch, step.seconds))

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
