"""Hidden states, of which embeddings are made: those of transformers after its final norm.

Where torch is missing, the golden logits take their place: the lm_head makes them of the hidden
states.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from pellucid.backends.reference import ops as reference_ops
from pellucid.models.blocks import project_to_logits
from pellucid.models.registry import get_graph
from pellucid.ops.protocol import Tensor

from .harness import GOLDEN, GOLDEN_NAMES, Loaded, Session, check_close, load


def prefill_hidden(loaded: Loaded, input_ids: NDArray[np.int32]) -> NDArray[np.float32]:
    """The hidden states [T, C] of one request after the final norm."""
    graph = get_graph(loaded.config.graph)

    def forward(ops: Any, config: Any, weights: Any, batch: Any, kv: Sequence[Any]) -> Tensor:
        x = graph.embed(ops, config, weights, batch)
        x = graph.layers(ops, config, weights, batch, range(config.num_layers), kv, x)
        return graph.norm_rows(ops, config, weights, x, batch.logits_indices)

    return Session(loaded, forward=forward).prefill(input_ids)


@pytest.mark.parametrize("name", GOLDEN_NAMES)
def test_the_head_makes_the_golden_logits_of_them(name: str) -> None:
    loaded = load(GOLDEN / name, "reference")
    golden = np.load(GOLDEN / name / "expected.npz")
    hidden = prefill_hidden(loaded, golden["input_ids"])
    assert hidden.shape == (len(golden["input_ids"]), loaded.config.hidden_size)
    ops: Any = reference_ops
    check_close(project_to_logits(ops, loaded.config, loaded.weights, hidden), golden["logits"])


@pytest.mark.parametrize("name", GOLDEN_NAMES)
def test_they_are_those_of_transformers(name: str) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    torch.set_num_threads(1)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        GOLDEN / name, dtype=torch.float32, attn_implementation="eager"
    )
    input_ids = np.load(GOLDEN / name / "expected.npz")["input_ids"]
    with torch.no_grad():
        ids = torch.from_numpy(input_ids.astype(np.int64))[None]
        expected = model.eval().base_model(ids).last_hidden_state[0].numpy()  # after the norm
    check_close(prefill_hidden(load(GOLDEN / name, "reference"), input_ids), expected)
