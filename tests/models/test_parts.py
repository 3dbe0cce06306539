"""The three parts of a graph, used apart: two pipeline stages, each with its weights and caches,
compute what one forward pass computes.
"""

from collections.abc import Sequence

import numpy as np
import pytest

from pellucid.batch import ForwardBatch
from pellucid.config import ModelConfig
from pellucid.models.params import split_name
from pellucid.models.registry import get_graph
from pellucid.ops.protocol import KVLayer, Ops, Tensor

from .harness import GOLDEN, GOLDEN_NAMES, Chunk, Session, load

Weights = dict[str, Tensor]


def cut_weights(config: ModelConfig, weights: Weights, cut: int) -> tuple[Weights, Weights]:
    """What the stage of the layers below `cut` holds, and what the other one holds."""
    first, second = {}, {}
    for name, weight in weights.items():
        layer, module, _ = split_name(name)
        if module in ("embed_tokens", "embed_positions") or (layer is not None and layer < cut):
            first[name] = weight
        else:
            second[name] = weight
    if config.tie_word_embeddings:
        second["embed_tokens.weight"] = weights["embed_tokens.weight"]
    return first, second


@pytest.mark.parametrize("name", GOLDEN_NAMES)
def test_two_pipeline_stages_give_the_bits_of_one_forward_pass(name: str) -> None:
    loaded = load(GOLDEN / name, "reference")
    graph, num_layers = get_graph(loaded.config.graph), loaded.config.num_layers
    input_ids = np.load(GOLDEN / name / "expected.npz")["input_ids"]
    for cut in range(1, num_layers):
        first, second = cut_weights(loaded.config, loaded.weights, cut)

        def stages(
            ops: Ops,
            config: ModelConfig,
            weights: Weights,
            batch: ForwardBatch,
            kv_layers: Sequence[KVLayer],
            cut: int = cut,
            first: Weights = first,
            second: Weights = second,
        ) -> Tensor:
            x = graph.embed(ops, config, first, batch)
            x = graph.layers(ops, config, first, batch, range(cut), kv_layers[:cut], x)
            sent = np.array(x).tobytes()  # what one machine sends to the other
            x = np.frombuffer(sent, np.float32).reshape(x.shape)
            span = range(cut, num_layers)
            x = graph.layers(ops, config, second, batch, span, kv_layers[cut:], x)
            return graph.head(ops, config, second, batch, x)

        one, two = Session(loaded), Session(loaded, forward=stages)
        blocks = one.take_blocks(len(input_ids)), two.take_blocks(len(input_ids))
        for start, stop in ((0, 13), (13, 14), (14, len(input_ids))):
            expected, found = (
                session.run([Chunk(input_ids[start:stop], start, own)])
                for session, own in zip((one, two), blocks, strict=True)
            )
            np.testing.assert_array_equal(found, expected)
