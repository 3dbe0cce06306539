"""The ops that models call and backends implement: about twenty operations, each big enough to be
fast and small enough to read.

A model is written once, over `Ops`, and never imports an array library. The reference backend
defines each op in NumPy. Every other backend must agree with it within the budget of
`ops/budget.py` on the cases of `ops/case_lists.py`. A backend may compute at once (reference) or
record the calls and replay them later (captured programs). So ops take and return opaque `Tensor`s,
only `kv_write` has a side effect, and a model never branches on a value inside a tensor.

Shapes: T tokens of the batch, L rows whose logits are wanted, H query heads, KH key/value heads, D
head_dim (Dv: of values), C hidden, F intermediate, V vocabulary. Activations are float32.
"""

from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

from ..batch import AttentionMetadata, IntArray

__all__ = ["KVLayer", "Ops", "RopeTable", "Tensor"]

Tensor: TypeAlias = Any  # the backend's own type: an array, a handle, a symbol


@dataclass(frozen=True, slots=True)
class KVLayer:
    """Where one layer's keys and values lie. Layers of different groups may share a store."""

    store: Any  # the backend's own type: paged keys and values, from `Backend.new_kv_store`
    group: int = 0  # which of the batch's block tables and slot mappings this layer uses


@dataclass(frozen=True, slots=True)
class RopeTable:
    """Rotary frequencies: pair i at position p turns by the angle p · inv_freq[i]."""

    inv_freq: tuple[float, ...]  # [rotary_dim / 2]
    scale: float = 1.0  # what cos and sin are multiplied by


class Ops(Protocol):
    """The operations of a forward pass."""

    def embedding(self, table: Tensor, input_ids: IntArray, scale: float = 1.0) -> Tensor:
        """Rows of `table` [V, C], times `scale` -> [T, C]."""

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [T, in] · weightᵀ, weight [out, in], + bias [out] -> [T, out]."""

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """x / sqrt(mean(x²) + eps) · weight, last axis (Zhang & Sennrich, arXiv:1910.07467)."""

    def layer_norm(self, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        """(x - mean) / sqrt(var + eps) · weight + bias, last axis (Ba et al., arXiv:1607.06450)."""

    def add(self, x: Tensor, y: Tensor) -> Tensor:
        """x + y, of one shape."""

    def silu_mul(self, gate: Tensor, up: Tensor) -> Tensor:
        """gate · sigmoid(gate) · up [T, F]: SwiGLU (Shazeer, arXiv:2002.05202)."""

    def gelu_mul(self, gate: Tensor, up: Tensor) -> Tensor:
        """gelu(gate) · up [T, F], gelu by its tanh formula: GeGLU."""

    def gelu(self, x: Tensor) -> Tensor:
        """0.5·x·(1 + tanh(sqrt(2/π)·(x + 0.044715·x³))) (Hendrycks & Gimpel, arXiv:1606.08415)."""

    def softcap(self, x: Tensor, cap: float) -> Tensor:
        """cap · tanh(x / cap)."""

    def split_heads(self, x: Tensor, num_heads: int) -> Tensor:
        """[T, H·D] seen as [T, H, D]: no data moves."""

    def rope(self, x: Tensor, positions: IntArray, table: RopeTable) -> Tensor:
        """Turn dimensions i and i + len(inv_freq) of x [T, H, D] by position; the rest stay."""

    def kv_write(self, kv: KVLayer, k: Tensor, v: Tensor, slot_mapping: IntArray) -> None:
        """Store k [T, KH, D] and v [T, KH, Dv] in the slots that slot_mapping[kv.group] names."""

    def attention(
        self,
        q: Tensor,
        kv: KVLayer,
        metadata: AttentionMetadata,
        *,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
    ) -> Tensor:
        """Causal attention of q [T, H, D] over the cached keys and values of each token's own
        request -> [T, H·Dv].

        A token at position p sees positions max(0, p - window + 1) … p. Scores are q·k·scale, then
        softcapped. Query head h reads KV head h // (H / KH). This step's own keys and values have
        been written already.
        """

    def take_rows(self, x: Tensor, indices: IntArray) -> Tensor:
        """x[indices]: [T, C] -> [L, C]."""

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum of x over the tensor-parallel ranks, in rank order; x itself on one rank."""
