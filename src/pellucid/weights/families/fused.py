"""Matrices that a file fuses into one along their outputs: q, k and v; gate and up.

Both functions return which outputs of the fused matrix belong to a parameter: (first, one past the
last, number of all outputs), or None if it is not part of the matrix.
"""

from collections.abc import Mapping

from ...config import ModelConfig
from ...models.params import Param, split_name

__all__ = ["gate_up_rows", "qkv_rows"]


def qkv_rows(config: ModelConfig, param: Param) -> tuple[int, int, int] | None:
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    return _rows({"q_proj": q, "k_proj": kv, "v_proj": kv}, param)


def gate_up_rows(config: ModelConfig, param: Param) -> tuple[int, int, int] | None:
    size = config.intermediate_size
    return _rows({"gate_proj": size, "up_proj": size}, param)


def _rows(parts: Mapping[str, int], param: Param) -> tuple[int, int, int] | None:
    """`parts`: the number of outputs of each module, in the order of the fused matrix."""
    start, module = 0, split_name(param.name)[1]
    for part, outputs in parts.items():
        if part == module:
            return start, start + outputs, sum(parts.values())
        start += outputs
    return None
