"""Gradients of the loss with respect to the output of every linear layer, layer by layer.

They say how much an error matters: to second order, the KL divergence between the model and a
slightly changed one is half the mean square of (gradient · change), where the gradients are those
of -ln p(y) and each token y is drawn from the model's own prediction (the Fisher information;
Martens, arXiv:1412.1193, section 5). A small change to an early layer and one to a late layer so
have one scale.

A forward pass keeps the hidden states at the entrance of each layer, and nothing else. Then the
layers run again from the last to the first, on a tape of the reference's ops, window by window.
Memory: the weights of a layer, and (layers + 1) · tokens · C float32 of hidden states.

This module knows ops and no model: a graph of `models/` runs on the tape as on any backend.

Shapes: W windows of n tokens, T tokens of a window, C hidden, V vocabulary, H heads, D head_dim.
"""

from collections.abc import Callable, Collection, Mapping
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ..batch import AttentionMetadata, ForwardBatch
from ..config import ModelConfig
from ..formats.finite import check_activation
from ..models.params import split_name
from ..models.registry import get_graph
from ..ops.protocol import KVLayer
from .tape import Floats, Observe, Tape

__all__ = ["Gradients", "Load", "draw_gradient", "window_batch"]

# names of parameters -> these parameters
Load: TypeAlias = Callable[[Collection[str]], dict[str, Floats]]


class Gradients:
    """The windows of a text, whose gradients move through the model from its end to its beginning.

    Call `run_head`, then `run_layer` for each layer from the last to the first.
    """

    @np.errstate(over="ignore", invalid="ignore")  # what is not finite is refused
    def __init__(
        self, config: ModelConfig, load: Load, windows: NDArray[np.int32], seed: int = 0
    ) -> None:
        """Run the windows [W, n] forward. `seed`: of the tokens that are drawn. Raises FormatError
        if a hidden state is NaN or infinite.
        """
        self.config = config
        self._load, self._windows = load, windows
        self._graph = get_graph(config.graph)
        self._draw = np.random.default_rng(seed)
        names = [param.name for param in self._graph.parameters(config)]
        self._layers = [
            [n for n in names if split_name(n)[0] == i] for i in range(config.num_layers)
        ]
        self._others = [n for n in names if split_name(n)[0] is None]
        # the hidden states before each layer, and behind the last
        shape = (config.num_layers + 1, *windows.shape, config.hidden_size)
        self._hidden = np.empty(shape, np.float32)
        weights = load(self._others)
        for i in range(len(windows)):
            self._hidden[0, i] = self._embed(Tape(weights), weights, i).value
        for layer in range(config.num_layers):
            weights = self.load_layer(layer)
            for i in range(len(windows)):
                _, out = self._layer(Tape(weights), weights, layer, i)
                is_finite = bool(np.isfinite(out.value).all())
                check_activation(f"the output of layer {layer}", is_finite)
                self._hidden[layer + 1, i] = out.value
        self._grads = np.empty(shape[1:], np.float32)

    @property
    def num_tokens(self) -> int:
        return self._windows.size

    def load_layer(self, layer: int) -> dict[str, Floats]:
        """The weights of a layer."""
        return self._load(self._layers[layer])

    def load_others(self) -> dict[str, Floats]:
        """The weights that embedding and head read."""
        return self._load(self._others)

    def run_head(self, weights: Mapping[str, Floats], observe: Observe) -> None:
        """Draw a token after each token, and observe the head."""
        for i in range(len(self._windows)):
            tape = Tape(weights, observe)
            x = tape.input(self._hidden[-1, i])
            logits = self._graph.head(tape, self.config, weights, window_batch(self._windows[i]), x)
            tape.run_back(logits, draw_gradient(logits.value, self._draw))
            self._grads[i] = x.grad

    def run_layer(self, layer: int, weights: Mapping[str, Floats], observe: Observe) -> None:
        """Observe a layer. The gradients become those before it."""
        for i in range(len(self._windows)):
            tape = Tape(weights, observe)
            x, out = self._layer(tape, weights, layer, i)
            tape.run_back(out, self._grads[i])
            self._grads[i] = x.grad

    def embedding_gradients(self) -> tuple[NDArray[np.int32], Floats]:
        """After the first layer: the tokens [W·n], and the gradients [W·n, C] of their hidden
        states before the first layer.
        """
        return self._windows.ravel(), self._grads.reshape(-1, self._grads.shape[-1])

    def _embed(self, tape: Tape, weights: Mapping[str, Floats], window: int) -> Any:
        return self._graph.embed(tape, self.config, weights, window_batch(self._windows[window]))

    def _layer(
        self, tape: Tape, weights: Mapping[str, Floats], layer: int, window: int
    ) -> tuple[Any, Any]:
        """What goes into a layer, and what comes out."""
        x = tape.input(self._hidden[layer, window])
        out = self._graph.layers(
            tape,
            self.config,
            weights,
            window_batch(self._windows[window]),
            range(layer, layer + 1),
            [KVLayer(tape.new_store())],
            x,
        )
        return x, out


def window_batch(tokens: NDArray[np.int32]) -> ForwardBatch:
    """The tokens of a window as a request from position 0. A tape needs no block tables."""
    places = np.arange(len(tokens), dtype=np.int32)
    none = np.zeros((1, 0), np.int32)
    return ForwardBatch(
        input_ids=tokens,
        positions=places,
        logits_indices=places,
        hidden_indices=none[0],
        attention=AttentionMetadata(
            cu_seqlens_q=np.array([0, len(tokens)], np.int32),
            seq_lens=np.array([len(tokens)], np.int32),
            block_tables=none[None],
            slot_mapping=none,
            block_size=1,
        ),
    )


def draw_gradient(logits: Floats, draw: np.random.Generator) -> Floats:
    """Draw a token y from each row of logits [T, V]: the gradient of -ln p(y), p less 1 at y."""
    p: Floats = logits - logits.max(axis=1, keepdims=True)
    np.exp(p, out=p)
    p /= p.sum(axis=1, keepdims=True)
    points = draw.random((len(p), 1))
    drawn = (np.cumsum(p, axis=1) < points).sum(axis=1).clip(max=p.shape[1] - 1)
    p[np.arange(len(p)), drawn] -= 1
    return p
