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
from .capture import Symbol, capture
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
        num_logits, num_hidden = len(self.batch.logits_indices), len(self.batch.hidden_indices)
        return StepShape(q_lens, a.seq_lens.tolist(), num_logits, num_hidden)


class CapturedForward:
    """A function of a batch that returns the results of the forward pass, in new memory."""

    def __init__(self, forward: Forward, isa: str, pool: _native.ThreadPool) -> None:
        captured = capture(forward)
        self.entries, self._result, self._hidden = (
            captured.entries,
            captured.result,
            captured.hidden,
        )
        self.plan = plan = build_plan(captured)
        index = plan.index
        buffers = [(p.offset, p.width, p.quantized, int(p.rows)) for p in plan.buffers]
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
            for entry, barrier in zip(self.entries, plan.barriers, strict=True)
        ]
        self._program = _native.new_program(
            isa, pool, buffers, plan.bytes_per_token, plan.output, plan.hidden, entries
        )
        # If this is a list, each step is appended to it with the time of each entry.
        self.ledger: list[TimedStep] | None = None

    def __call__(self, batch: ForwardBatch) -> HostLogits:
        if self.ledger is None:
            return self._run(batch, None)
        step = TimedStep(batch, time.monotonic(), np.zeros(len(self.entries), np.float32))
        self.ledger.append(step)
        return self._run(batch, step.seconds)

    def _run(self, batch: ForwardBatch, seconds: NDArray[np.float32] | None) -> HostLogits:
        out = _room_for(self._result, batch)
        hidden = None if self._hidden is None else _room_for(self._hidden, batch)
        a = batch.attention
        self._program.run(
            batch.input_ids,
            batch.positions,
            batch.logits_indices,
            batch.hidden_indices,
            a.cu_seqlens_q,
            a.seq_lens,
            a.block_tables,
            a.slot_mapping,
            out,
            hidden,
            seconds,
        )
        return HostLogits(out, hidden)


def _room_for(result: Symbol, batch: ForwardBatch) -> NDArray[np.float32]:
    """Memory for a result of a run."""
    rows = (batch.input_ids, batch.logits_indices, batch.hidden_indices)[result.rows]
    return np.empty((len(rows), result.width), np.float32)
