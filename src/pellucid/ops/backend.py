"""What the engine asks of a backend: memory, weights, the KV cache, and a forward pass that runs.

Models never see a `Backend`; they speak `Ops` (`ops/protocol.py`). Device arrays stay inside it:
block ids, saved blocks, sampled tokens and the logits that somebody asks for cross the boundary.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ..batch import ForwardBatch
from ..config import ModelConfig
from ..errors import PellucidError
from ..formats.tensor import HostTensor, TensorSpec
from ..kv_spec import KVSpec
from ..sampling.row import SamplingRow
from .protocol import Ops, Tensor

__all__ = ["Backend", "Forward", "Logits"]

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
