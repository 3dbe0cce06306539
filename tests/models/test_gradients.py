"""Gradients at the outputs of linear layers, on every family: against differences of the loss, and
layer by layer against the whole model at once.
"""

import gc
import weakref
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from pellucid.config import ModelConfig
from pellucid.models.registry import get_graph
from pellucid.ops.protocol import KVLayer
from pellucid.quant.calibrate import loader
from pellucid.quant.gradients import Gradients, draw_gradient, window_batch
from pellucid.quant.tape import Node, Tape
from pellucid.weights.checkpoint import open_checkpoint

from .harness import GOLDEN, GOLDEN_NAMES

Array = NDArray[Any]
TOKENS = np.random.default_rng(1).integers(3, 60, (2, 24)).astype(np.int32)
STEP = 1e-4  # of an output, where weights are float64


class Nudged(Tape):
    """Adds a change to the output of one weight."""

    def __init__(self, weights: dict[str, Array], name: str, change: Array) -> None:
        super().__init__(weights)
        self.target, self.change = id(weights[name]), change

    def linear(self, x: Node, weight: Array, bias: Array | None = None) -> Node:
        node = super().linear(x, weight, bias)
        if id(weight) == self.target:
            node.value = node.value + self.change
        return node


def run(config: ModelConfig, weights: dict[str, Array], tape: Tape, tokens: Array) -> Node:
    """The logits of the whole model, on one tape."""
    graph, batch = get_graph(config.graph), window_batch(tokens)
    x = graph.embed(tape, config, weights, batch)
    stores = [KVLayer(tape.new_store()) for _ in range(config.num_layers)]
    x = graph.layers(tape, config, weights, batch, range(config.num_layers), stores, x)
    logits: Node = graph.head(tape, config, weights, batch, x)
    return logits


def weights_of(name: str) -> tuple[ModelConfig, dict[str, Array]]:
    with open_checkpoint(GOLDEN / name) as checkpoint:
        names = [p.name for p in get_graph(checkpoint.config.graph).parameters(checkpoint.config)]
        return checkpoint.config, dict(loader(checkpoint)(names))


@pytest.mark.parametrize("name", GOLDEN_NAMES)
def test_gradients_are_slopes_of_the_loss(name: str) -> None:
    config, single = weights_of(name)
    weights = {key: value.astype(np.float64) for key, value in single.items()}
    seen: dict[str, Array] = {}
    logits = run(
        config, weights, tape := Tape(weights, lambda n, _, g: seen.update({n: g})), TOKENS[0]
    )
    rng = np.random.default_rng(2)
    slope = rng.normal(size=logits.value.shape)  # the loss is a sum of logits times these
    tape.run_back(logits, slope)
    assert len(seen) >= 4 * config.num_layers
    for weight, gradient in seen.items():
        change = rng.normal(size=gradient.shape)
        above, below = (
            np.vdot(
                slope, run(config, weights, Nudged(weights, weight, s * change), TOKENS[0]).value
            )
            for s in (STEP, -STEP)
        )
        expected = (above - below) / (2 * STEP)
        assert np.vdot(gradient, change) == pytest.approx(expected, rel=1e-4, abs=1e-4), weight


@pytest.mark.parametrize("name", GOLDEN_NAMES)
def test_layer_by_layer_gives_the_gradients_of_the_whole_model(name: str) -> None:
    config, weights = weights_of(name)
    expected: dict[str, list[Array]] = {}
    draw = np.random.default_rng(0)
    for tokens in TOKENS:
        tape = Tape(weights, lambda n, x, g: expected.setdefault(n, []).append(x.mean() + g))
        logits = run(config, weights, tape, tokens)
        tape.run_back(logits, draw_gradient(logits.value, draw))
    found: dict[str, list[Array]] = {}

    def observe(name: str, x: Array, g: Array) -> None:
        found.setdefault(name, []).append(x.mean() + g)

    def load(names: Any) -> dict[str, Array]:
        return {name: weights[name] for name in names}

    gradients = Gradients(config, load, TOKENS)
    gradients.run_head(gradients.load_others(), observe)
    for layer in reversed(range(config.num_layers)):
        gradients.run_layer(layer, gradients.load_layer(layer), observe)
    assert found.keys() == expected.keys()
    for key, parts in expected.items():
        for one, other in zip(parts, found[key], strict=True):
            np.testing.assert_allclose(other, one, rtol=1e-4, atol=1e-5 * np.abs(one).max())


def test_a_tape_that_ran_back_frees_its_arrays_at_once() -> None:
    weights = {"w": np.ones((3, 4))}
    gc.disable()
    try:
        tape = Tape(weights, lambda *_: None)
        node = tape.linear(tape.input(np.ones((2, 4))), weights["w"])
        kept = weakref.ref(node.value)
        tape.run_back(node, np.ones((2, 3)))
        del tape, node
        assert kept() is None
    finally:
        gc.enable()
