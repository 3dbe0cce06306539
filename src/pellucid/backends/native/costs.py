"""What each entry of a program costs: FLOPs and bytes, from its shapes, for a step of given
lengths.

One idea: an entry knows its weight, its widths and its cache, so the ledger of a step is
arithmetic; nothing has to run. The counting rules are those of `ops/cost.py`, with what is
particular to this backend: quantized weights read activations of 8 bits, which an entry of its own
makes; keys and values take what their store says; the angles of RoPE are computed once for all
layers.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from ...formats import format_of_ggml_type
from ...ops import cost
from ...ops.cost import OpCost
from .capture import Entry, Op
from .plan import bytes_per_row

__all__ = ["StepShape", "entry_cost"]

QUANTIZE = 6  # FLOPs per number: |x|, max, times 1 / scale, round, and a term of a sum


@dataclass(frozen=True, slots=True)
class StepShape:
    """The lengths of a step: request r computes its last q_lens[r] tokens of seq_lens[r];
    `num_logits` rows of logits are wanted.
    """

    q_lens: Sequence[int]
    seq_lens: Sequence[int]
    num_logits: int

    @property
    def num_tokens(self) -> int:
        return sum(self.q_lens)


def entry_cost(entry: Entry, step: StepShape) -> OpCost:
    """FLOPs and bytes of one entry in such a step."""
    output = entry.output
    rows = step.num_logits if output is not None and output.logits_rows else step.num_tokens
    width = 0 if output is None else output.width
    match entry.op:
        case Op.EMBED:
            assert entry.weight is not None
            return cost.embedding(rows, width, format=_format(entry), scaled=entry.floats[0] != 1.0)
        case Op.QUANTIZE:
            assert output is not None
            return OpCost(
                rows * width * QUANTIZE,
                rows * width * cost.ACTIVATION_BYTES,
                rows * bytes_per_row(output),
            )
        case Op.LINEAR:
            assert entry.weight is not None
            (x,) = entry.inputs
            plain = cost.linear(
                rows, x.width, width, format=_format(entry), bias=bool(entry.vectors)
            )
            saved = rows * (x.width * cost.ACTIVATION_BYTES - bytes_per_row(x))
            of_bytes = 2 * rows * x.width * width if x.quantized else 0
            return OpCost(plain.flops, plain.bytes_read - saved, plain.bytes_written, of_bytes)
        case Op.RMS_NORM:
            return cost.rms_norm(rows * (width // entry.ints[0]), entry.ints[0])
        case Op.LAYER_NORM:
            return cost.layer_norm(rows * (width // entry.ints[0]), entry.ints[0])
        case Op.ADD:
            return cost.add(rows, width)
        case Op.SILU_MUL:
            return cost.silu_mul(rows, width)
        case Op.GELU_MUL:
            return cost.gelu_mul(rows, width) if len(entry.inputs) > 1 else cost.gelu(rows, width)
        case Op.SOFTCAP:
            return cost.softcap(rows, width)
        case Op.ROPE_ANGLES:  # per pair: the angle, cos, sin and two scalings
            return OpCost(
                rows * width // 2 * 5,
                (len(entry.floats) - 1) * cost.ACTIVATION_BYTES,
                rows * width * cost.ACTIVATION_BYTES,
            )
        case Op.ROPE:  # per pair of each head: 4 products and 2 sums
            heads, angles = entry.ints[0], entry.inputs[1].width
            moved = OpCost(
                0,
                rows * (width + angles) * cost.ACTIVATION_BYTES,
                rows * width * cost.ACTIVATION_BYTES,
            )
            return moved + OpCost(rows * heads * angles // 2 * 6, 0, 0)
        case Op.KV_WRITE:
            assert entry.kv is not None
            return cost.kv_write(
                rows, entry.kv.kv_heads, entry.kv.head_dim, kv_token_bytes=entry.kv.token_bytes
            )
        case Op.ATTENTION:
            assert entry.kv is not None
            heads, head_dim, window, _ = entry.ints
            return cost.attention(
                step.q_lens,
                step.seq_lens,
                num_heads=heads,
                num_kv_heads=entry.kv.kv_heads,
                head_dim=head_dim,
                window=window or None,
                softcap=entry.floats[1] != 0.0,
                kv_token_bytes=entry.kv.token_bytes,
            )
        case Op.TAKE_ROWS:
            return cost.take_rows(rows, width)
    raise AssertionError(f"no cost is known for {entry.op!r}")


def _format(entry: Entry) -> str:
    assert entry.weight is not None
    return format_of_ggml_type(entry.weight.ggml_type).name
