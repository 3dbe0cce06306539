"""The cost of each entry of a program, FLOPs and bytes, from its shapes and a step's lengths.

An entry knows the format and shape of its weight, its widths and its cache, so the costs of a step
are computed without loading or running anything. The counting rules are those of `ops/cost.py`,
with three differences. Products with quantized weights read 8-bit activations, which a separate
entry writes. Keys and values have the size of their cache dtype. The angles of RoPE are computed
once for all layers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ...formats.groups import GROUP_FORMATS, INT8_ROW
from ...ops import cost
from ...ops.cost import OpCost
from .capture import Entry, Rows, kv_spec_of, spec_of
from .kv_store import token_bytes
from .plan import bytes_per_row

__all__ = ["StepShape", "entry_cost"]

# Multiplications by scales for each output and 32 inputs: one by the activation's scale, one by
# each scale of the weight, one by each minimum (csrc/kernels/linear_codes.inc).
SCALE_PRODUCTS = {
    **dict.fromkeys(("Q4_0", "Q5_0", "Q8_0", "IQ4_NL", "IQ4_XS"), 2),
    **dict.fromkeys(("Q4_1", "Q5_1", "Q4_K", "Q5_K", "Q3_K", "Q6_K"), 3),
    "Q2_K": 5,
    **{f.name: 3 if f.name.startswith("UINT") else 2 for f in GROUP_FORMATS},
    INT8_ROW: 0,  # two for each output, which do not depend on the inputs
}
QUANTIZE = 6  # FLOPs per number: |x|, max, times 1 / scale, round, and a term of a sum


@dataclass(frozen=True, slots=True)
class StepShape:
    """The lengths of a step: request r computes its last q_lens[r] tokens of seq_lens[r], and the
    step returns `num_logits` rows of logits and `num_hidden` of hidden states.
    """

    q_lens: Sequence[int]
    seq_lens: Sequence[int]
    num_logits: int
    num_hidden: int = 0

    @property
    def num_tokens(self) -> int:
        return sum(self.q_lens)

    def num_rows(self, rows: Rows) -> int:
        """The number of rows of a tensor."""
        return (self.num_tokens, self.num_logits, self.num_hidden)[rows]


def entry_cost(entry: Entry, step: StepShape) -> OpCost:
    """FLOPs and bytes of one entry in a step of these lengths."""
    output, a = entry.output, entry.attributes
    rows = step.num_tokens if output is None else step.num_rows(output.rows)
    width = 0 if output is None else output.width
    if rows == 0:  # the kernel reads nothing
        return OpCost(0, 0, 0)
    match entry.op:
        case "embed":
            assert entry.weight is not None
            format = spec_of(entry.weight).format
            return cost.embedding(rows, width, format=format, scaled=a["scale"] != 1.0)
        case "quantize" | "quantize_rows":
            assert output is not None
            return OpCost(
                rows * width * QUANTIZE,
                rows * width * cost.ACTIVATION_BYTES,
                rows * bytes_per_row(output),
            )
        case "linear":
            assert entry.weight is not None
            (x,) = entry.inputs
            format = spec_of(entry.weight).format
            plain = cost.linear(rows, x.width, width, format=format, bias=bool(entry.vectors))
            saved = rows * (x.width * cost.ACTIVATION_BYTES - bytes_per_row(x))
            of_bytes = 2 * rows * x.width * width if x.quantized else 0
            of_scales = of_bytes * SCALE_PRODUCTS[format] // 32 if x.quantized else 0
            return OpCost(
                plain.flops, plain.bytes_read - saved, plain.bytes_written, of_bytes, of_scales
            )
        case "rms_norm" | "layer_norm":
            norm = _int(a["width"])
            return _by_name(entry.op, rows * (width // norm), norm)
        case "rope_angles":  # per pair: the angle, cos, sin and two scalings
            return OpCost(
                rows * width // 2 * 5,
                width // 2 * cost.ACTIVATION_BYTES,
                rows * width * cost.ACTIVATION_BYTES,
            )
        case "rope":  # per pair of each head: 4 products and 2 sums
            angles = entry.inputs[1].width
            moved = OpCost(
                0,
                rows * (width + angles) * cost.ACTIVATION_BYTES,
                rows * width * cost.ACTIVATION_BYTES,
            )
            return moved + OpCost(rows * _int(a["heads"]) * angles // 2 * 6, 0, 0)
        case "kv_write":
            assert entry.kv is not None
            kv = kv_spec_of(entry.kv)
            return cost.kv_write(rows, kv.num_kv_heads, kv.k_dim, kv_token_bytes=token_bytes(kv))
        case "attention":
            assert entry.kv is not None
            kv = kv_spec_of(entry.kv)
            return cost.attention(
                step.q_lens,
                step.seq_lens,
                num_heads=_int(a["heads"]),
                num_kv_heads=kv.num_kv_heads,
                head_dim=kv.k_dim,
                window=_int(a["window"]) or None,
                softcap=a["cap"] != 0.0,
                kv_token_bytes=token_bytes(kv),
            )
    return _by_name(entry.op, rows, width)


def _by_name(op: str, rows: int, width: int) -> OpCost:
    """The cost of an op that depends only on its rows and its width. An op that `ops/cost.py` lacks
    is an error.
    """
    function: Any = getattr(cost, op)
    found: OpCost = function(rows, width)
    return found


def _int(attribute: Any) -> int:
    assert isinstance(attribute, int)
    return attribute
