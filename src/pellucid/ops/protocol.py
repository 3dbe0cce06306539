"""The vocabulary that models speak and backends implement: about twenty operations, each big enough
to be fast and small enough to read.

A model is written once, over `Ops`, and never imports an array library. The reference backend
defines each op in NumPy. Every other backend must agree with it within the budget of
`ops/budget.py` on the cases of `ops/case_lists.py`. A backend may compute at once (reference) or
record the calls and replay them later (captured programs). So ops take and return opaque `Tensor`s,
only `kv_write` changes anything, and a model never branches on a value inside a tensor.

A `Backend` is used by the engine, never by a model. Device arrays stay inside it: block ids, saved
blocks, sampled tokens and the logits that somebody asks for cross the boundary.

Shapes: T tokens of the batch, L rows whose logits are wanted, H query heads, KH key/value heads, D
head_dim (Dv: of values), C hidden, F intermediate, V vocabulary. Activations are float32 at this
boundary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ..batch import AttentionMetadata, ForwardBatch, IntArray
from ..config import ModelConfig
from ..errors import PellucidError
from ..formats.tensor import HostTensor, TensorSpec
from ..kv_spec import KVSpec
from ..sampling.row import SamplingRow

__all__ = ["Backend", "Forward", "KVLayer", "Logits", "Ops", "RopeTable", "Tensor"]

Tensor: TypeAlias = Any  # a backend's own: an array, a handle, a symbol


@dataclass(frozen=True, slots=True)
class KVLayer:
    """Where one layer's keys and values lie. Layers of different groups may share a store: a block
    of it belongs to one group at a time.
    """

    store: Any  # a backend's own: paged keys and values, from `Backend.new_kv_store`
    group: int = 0  # which of the batch's block tables and slot mappings are this layer's


@dataclass(frozen=True, slots=True)
class RopeTable:
    """Rotary frequencies, ready to use: pair i at position p turns by the angle p · inv_freq[i];
    cos and sin are multiplied by `scale`.
    """

    inv_freq: tuple[float, ...]  # [rotary_dim / 2]
    scale: float = 1.0


class Ops(Protocol):
    """What a forward pass may do."""

    def embedding(self, table: Tensor, input_ids: IntArray, scale: float = 1.0) -> Tensor:
        """Rows of `table` [V, C], times `scale` -> [T, C]."""

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [T, in] · weightᵀ, weight [out, in], + bias [out] -> [T, out]."""

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """x / sqrt(mean(x²) + eps) · weight over the last axis, as large as weight -> shape of x
        (Zhang & Sennrich, arXiv:1910.07467).
        """

    def layer_norm(self, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        """(x - mean) / sqrt(var + eps) · weight + bias over the last axis -> shape of x (Ba et al.,
        arXiv:1607.06450).
        """

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
        """Turn the first 2·len(inv_freq) dimensions of each head by its token's position
        (half-split pairs); the rest pass. [T, H, D].
        """

    def kv_write(self, kv: KVLayer, k: Tensor, v: Tensor, slot_mapping: IntArray) -> None:
        """Store k [T, KH, D] and v [T, KH, Dv] in the slots of `slot_mapping` [G, T], the row of
        the layer's group. The only op that changes anything.
        """

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
        """The sum of x over the ranks of the tensor-parallel group, in rank order; x itself where
        there is one rank.
        """


# a model with its weights and caches bound: -> logits [L, V]
Forward: TypeAlias = Callable[[Ops, ForwardBatch], Tensor]


class Logits(Protocol):
    """The result of a forward pass, kept where the backend computed it: a row for each of the
    batch's `logits_indices`.
    """

    @property
    def num_rows(self) -> int: ...

    def to_host(self, rows: Sequence[int] | None = None) -> NDArray[np.float32]:
        """These rows, or all, as float32 [L, V] in host memory; to be read only."""

    def sample(
        self, rows: Sequence[int], sampling: Sequence[SamplingRow]
    ) -> Sequence[int | PellucidError]:
        """A token for each of these rows, chosen as its `SamplingRow` says; an error for a row
        from which none can be chosen.
        """


class Backend(Protocol):
    """A way to compute: where weights and caches live, and how a forward pass is run.

    Everything that depends on the device is the backend's own answer: its memory, what it can keep
    keys and values in, the sizes of blocks, and how many requests run at once.
    """

    @property
    def name(self) -> str:
        """Its key in `backends.registry`."""

    @property
    def device(self) -> str:
        """Where its weights and caches lie, one of `devices`."""

    @property
    def devices(self) -> tuple[str, ...]:
        """The devices of this machine that a backend of this kind can use, the default first."""

    @property
    def dtypes(self) -> tuple[str, ...]:
        """What activations may be computed in, the default first."""

    @property
    def kv_dtypes(self) -> tuple[str, ...]:
        """What keys and values may be kept in, each for itself. The first is the default: it has no
        measurable loss.
        """

    @property
    def is_batch_invariant(self) -> bool:
        """True where a token's bits do not depend on what else is in the batch, or on how its
        request was cut into steps.
        """

    @property
    def default_max_num_seqs(self) -> int:
        """How many requests run at once, unless the configuration says otherwise."""

    @property
    def default_prefix_caching(self) -> bool:
        """Whether requests share computed prefixes, unless the configuration says otherwise."""

    @property
    def block_multiple(self) -> int:
        """The tokens of a KV block must be a multiple of this."""

    def available_memory(self) -> int:
        """Bytes that can still be taken on the device."""

    def weight_bytes(self, spec: TensorSpec) -> int:
        """Memory that `load_weight` will keep for such a parameter."""

    def step_bytes(
        self, forward: Forward, num_tokens: int, num_logits: int, context: int
    ) -> dict[str, int]:
        """Memory that a step of so many tokens and rows of logits takes beside weights and caches,
        by what it is for, where no request is longer than `context` tokens.

        Nothing is loaded for it: `forward` is bound to a `TensorSpec` in place of each weight, and
        to a `KVSpec` in place of each store.
        """

    def load_weight(self, tensor: HostTensor, name: str = "a parameter") -> Tensor:
        """Take over one parameter, in whatever layout the kernels like. The host bytes may be
        dropped afterwards. Raises FormatError, with its name, where a number or a block's scale is
        NaN or infinite.
        """

    def check_model(self, config: ModelConfig) -> None:
        """Raise UnsupportedError, with the field and the limit, where some size of the model is
        beyond what the kernels can do. Reads no weights.
        """

    def kv_token_bytes(self, spec: KVSpec) -> int:
        """Bytes of one token's key and value in one layer. Raises ConfigError where the backend
        cannot keep them so.
        """

    def new_kv_store(self, num_blocks: int, block_size: int, spec: KVSpec) -> Any:
        """Room for num_blocks · block_size tokens of one layer's keys and values, zeroed. Raises
        ConfigError where the backend cannot keep them so.
        """

    def copy_blocks(self, store: Any, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy blocks of a store, in order: (source, target)."""

    def save_blocks(self, store: Any, blocks: Sequence[int]) -> NDArray[np.uint8]:
        """The bytes of these blocks in host memory, [blocks, block_size · kv_token_bytes]: a copy,
        in a layout that only `load_blocks` reads.
        """

    def load_blocks(self, store: Any, blocks: Sequence[int], saved: NDArray[np.uint8]) -> None:
        """Fill these blocks with what `save_blocks` returned, row by row."""

    def build_forward(self, forward: Forward) -> Callable[[ForwardBatch], Logits]:
        """Make `forward` runnable: the result takes a batch and returns its logits."""
