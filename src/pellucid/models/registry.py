"""Graphs by name: the parameters that each declares, and how it runs.

A graph has three parts: `embed` turns token ids into hidden states, `layers` runs a range of
layers, `head` gives logits. A pipeline stage uses the parts that it needs; `forward` runs all
three.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from ..batch import ForwardBatch, IntArray
from ..config import GraphName, ModelConfig
from ..ops.protocol import KVLayer, Ops, Tensor
from . import gemma, gpt2, llama
from .blocks import Weights
from .params import Param

__all__ = ["GRAPHS", "Graph", "get_graph"]


@dataclass(frozen=True, slots=True)
class Graph:
    """The parts of a forward pass. `parameters(config)` declares the tensors that they read.

    `embed(ops, config, weights, batch)` -> hidden states [T, C]. `layers(…, span, kv_layers, x)` ->
    hidden states after the layers of `span`, whose caches are `kv_layers` in order. `head(…, x)` ->
    logits [L, V] of the rows in `batch.logits_indices`. `norm_rows(…, x, rows)` -> these rows of x
    after the final norm: what logits and embeddings are made of.
    """

    parameters: Callable[[ModelConfig], Iterator[Param]]
    embed: Callable[[Ops, ModelConfig, Weights, ForwardBatch], Tensor]
    layers: Callable[
        [Ops, ModelConfig, Weights, ForwardBatch, range, Sequence[KVLayer], Tensor], Tensor
    ]
    head: Callable[[Ops, ModelConfig, Weights, ForwardBatch, Tensor], Tensor]
    norm_rows: Callable[[Ops, ModelConfig, Weights, Tensor, IntArray], Tensor]

    def forward(
        self,
        ops: Ops,
        config: ModelConfig,
        weights: Weights,
        batch: ForwardBatch,
        kv_layers: Sequence[KVLayer],
    ) -> Tensor:
        """Logits [L, V] of the rows in `batch.logits_indices`. The keys and values of all T tokens
        are written to `kv_layers`, one for each layer.
        """
        x = self.embed(ops, config, weights, batch)  # [T, C]
        x = self.layers(ops, config, weights, batch, range(config.num_layers), kv_layers, x)
        return self.head(ops, config, weights, batch, x)  # [L, V]

    def forward_with_hidden(
        self,
        ops: Ops,
        config: ModelConfig,
        weights: Weights,
        batch: ForwardBatch,
        kv_layers: Sequence[KVLayer],
    ) -> tuple[Tensor, Tensor]:
        """The same, and the hidden states [E, C] of the rows in `batch.hidden_indices`, after the
        final norm.
        """
        x = self.embed(ops, config, weights, batch)  # [T, C]
        x = self.layers(ops, config, weights, batch, range(config.num_layers), kv_layers, x)
        hidden = self.norm_rows(ops, config, weights, x, batch.hidden_indices)  # [E, C]
        return self.head(ops, config, weights, batch, x), hidden  # [L, V]


GRAPHS: Mapping[GraphName, Graph] = MappingProxyType(
    {
        "gpt2": Graph(gpt2.parameters, gpt2.embed, gpt2.layers, gpt2.head, gpt2.norm_rows),
        "llama": Graph(llama.parameters, llama.embed, llama.layers, llama.head, llama.norm_rows),
        "gemma": Graph(gemma.parameters, gemma.embed, gemma.layers, gemma.head, gemma.norm_rows),
    }
)


def get_graph(name: GraphName) -> Graph:
    """The graph named by `ModelConfig.graph`, which was checked when the config was built."""
    return GRAPHS[name]
