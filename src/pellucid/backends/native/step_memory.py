"""The memory that a step of a model will take, before anything is loaded.

The forward pass is captured over the declarations of its weights in place of the weights, and
planned as it will be when it runs. Sizes are in bytes.
"""

from dataclasses import dataclass
from typing import Any

from ...formats import FORMATS
from ...formats.tensor import TensorSpec
from ...ops.protocol import Forward
from .capture import Op, Recorder, Symbol, capture
from .plan import build_plan

__all__ = ["step_bytes"]

TILE_ROWS, TILE_INPUTS = 16, 32  # csrc/tile.h


@dataclass(frozen=True, slots=True)
class _Shape:
    """A weight without numbers, as capture reads it."""

    outputs: int
    inputs: int
    quantized: bool
    size: int  # of a vector


def _shape(spec: TensorSpec) -> Any:  # it stands where capture expects a loaded weight
    *rows, width = spec.shape
    return _Shape(rows[0] if rows else 1, width, FORMATS[spec.format].block_size > 1, width)


class _SpecRecorder(Recorder):
    """Captures ops whose weights are `TensorSpec`s."""

    def embedding(self, table: Any, input_ids: Any, scale: float = 1.0) -> Symbol:
        return super().embedding(_shape(table), input_ids, scale)

    def linear(self, x: Symbol, weight: Any, bias: Any = None) -> Symbol:
        return super().linear(x, _shape(weight), None if bias is None else _shape(bias))

    def rms_norm(self, x: Symbol, weight: Any, eps: float) -> Symbol:
        return super().rms_norm(x, _shape(weight), eps)

    def layer_norm(self, x: Symbol, weight: Any, bias: Any, eps: float) -> Symbol:
        return super().layer_norm(x, _shape(weight), _shape(bias), eps)


def step_bytes(forward: Forward, threads: int, num_tokens: int, num_logits: int) -> dict[str, int]:
    """What a step of so many tokens takes, by what it is for."""
    entries, result = capture(forward, _SpecRecorder())
    plan = build_plan(entries, result)
    capacity = -(-num_tokens // 16) * 16  # csrc/program.cpp, make_room
    widest = max((e.weight.inputs for e in entries if e.op is Op.LINEAR and e.weight), default=0)
    # csrc/kernels.h, scratch_bytes: the codes of one row of tiles, and their scales and sums
    scratch = TILE_ROWS * (widest + widest // TILE_INPUTS * 4 * 4)
    return {
        "activations": plan.bytes_per_token * capacity,
        "logits": num_logits * result.width * 4,
        f"scratch of {threads} threads": threads * scratch,
    }
