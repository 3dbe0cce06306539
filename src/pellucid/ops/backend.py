"""The interface between the engine and a backend: memory, weights, the KV cache, and a runnable
forward pass.

Models never see a `Backend`; they call `Ops` (`ops/protocol.py`). Device arrays stay inside the
backend. Only block ids, saved blocks, sampled tokens and requested logits cross this interface.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ..batch import ForwardBatch
from ..config import ModelConfig
from ..errors import PellucidError
from ..formats.tensor import HostTensor, StoredMatrix, TensorSpec
from ..kv_spec import KVSpec
from ..sampling.row import SamplingRow
from .protocol import Ops, Tensor

__all__ = ["Backend", "Forward", "Logits"]

# a model with its weights and caches bound: -> logits [L, V], or a pair of them and hidden states
# [E, C]
Forward: TypeAlias = Callable[[Ops, ForwardBatch], Tensor | tuple[Tensor, Tensor]]


class Logits(Protocol):
    """The result of a forward pass, kept on the backend's device: a row for each of the batch's
    `logits_indices`, and for each of its `hidden_indices` if the pass returns hidden states.
    """

    @property
    def hidden(self) -> NDArray[np.float32] | None:
        """The hidden states [E, C] in host memory; None if the forward pass returns none."""

    @property
    def num_rows(self) -> int: ...

    def to_host(self, rows: Sequence[int] | None = None) -> NDArray[np.float32]:
        """These rows, or all, as float32 [L, V] in host memory; read-only."""

    def sample(
        self, rows: Sequence[int], sampling: Sequence[SamplingRow]
    ) -> Sequence[int | PellucidError]:
        """A token for each of these rows, chosen by its `SamplingRow`, or an error if none can be
        chosen.
        """


class Backend(Protocol):
    """A way to compute: it stores weights and caches, and runs forward passes.

    It answers every question that depends on the device: its memory, the dtypes of keys and values,
    the sizes of blocks, and how many requests run at once.
    """

    @property
    def name(self) -> str:
        """Its key in `backends.registry`."""

    @property
    def device(self) -> str:
        """The device of its weights and caches, one of `devices`."""

    @property
    def devices(self) -> tuple[str, ...]:
        """The devices of this machine that a backend of this kind can use, the default first."""

    @property
    def dtypes(self) -> tuple[str, ...]:
        """The dtypes that activations may be computed in, the default first."""

    @property
    def kv_dtypes(self) -> tuple[str, ...]:
        """The dtypes of keys and of values, chosen separately. The first is the default; it has no
        measurable loss.
        """

    @property
    def is_batch_invariant(self) -> bool:
        """True if a token's bits do not depend on other requests in the batch or on how its request
        was cut into steps.
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
        """Bytes of memory that `load_weight` will keep for such a parameter."""

    def step_bytes(
        self, forward: Forward, num_tokens: int, num_logits: int, context: int
    ) -> dict[str, int]:
        """Bytes of memory that a step takes beside weights and caches, by purpose. The step has
        `num_tokens` tokens and `num_logits` rows of logits; no request is longer than `context`
        tokens.

        Nothing is loaded: `forward` is bound to a `TensorSpec` in place of each weight, and to a
        `KVSpec` in place of each store.
        """

    def load_weight(self, tensor: HostTensor, name: str = "a parameter") -> Tensor:
        """Copy one parameter to the device, in the layout of the kernels. The host bytes are not
        used afterwards. Raises FormatError, with its name, if a number or a block's scale is NaN or
        infinite.
        """

    def load_stored(self, matrices: Mapping[str, StoredMatrix]) -> dict[str, Tensor]:
        """Load those of the matrices that the backend can read from their files by itself, piece by
        piece; by name. The others are to be read and given to `load_weight`. The errors are those
        of `load_weight`, and FormatError where a file cannot be read.
        """

    def check_model(self, config: ModelConfig) -> None:
        """Raise UnsupportedError, with the field and the limit, if the kernels cannot compute a
        size of the model. Reads no weights.
        """

    def kv_token_bytes(self, spec: KVSpec) -> int:
        """Bytes of one token's key and value in one layer. Raises ConfigError if the backend cannot
        store them.
        """

    def new_kv_store(self, num_blocks: int, block_size: int, spec: KVSpec) -> Any:
        """Memory for num_blocks · block_size tokens of one layer's keys and values, zeroed. Raises
        ConfigError if the backend cannot store them.
        """

    def copy_blocks(self, store: Any, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy blocks of a store, in order: (source, target)."""

    def save_blocks(self, store: Any, blocks: Sequence[int]) -> NDArray[np.uint8]:
        """A copy of these blocks in host memory, [blocks, block_size · kv_token_bytes], in a layout
        that only `load_blocks` reads.
        """

    def load_blocks(self, store: Any, blocks: Sequence[int], saved: NDArray[np.uint8]) -> None:
        """Fill these blocks with what `save_blocks` returned, row by row."""

    def build_forward(self, forward: Forward) -> Callable[[ForwardBatch], Logits]:
        """Make `forward` runnable: the result takes a batch and returns its logits."""
