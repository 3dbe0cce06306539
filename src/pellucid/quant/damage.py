"""Measures what each format would cost each tensor: the KL divergence between the model and the
model with this one tensor quantized, to second order.

For the weight W of a linear layer with input x and output gradients g (`gradients.py`), rounding
errors E = W - Ŵ cost

    ½ mean over tokens of (Σ g_r E_rj x_j)²  ≈  ½ Σ mean(g_r²) mean(x_j²) E_rj²

because rounding errors of different weights are as good as independent. Damages of tensors add up
while they are small. A weight that many rows of an embedding share costs what the tokens of the
text cost. Nothing is estimated from names or sizes.

A layer at a time is in memory, and no tensor but those of the layer. Damages are in nats per token.
"""

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import partial
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from ..errors import FormatError
from ..formats import dequantize
from ..formats.finite import check_finite
from ..models.registry import get_graph
from ..weights.families import gguf_source_of
from .error_feedback import Search
from .gradients import Gradients
from .sequential import source_loader
from .source import Source
from .tape import Floats, Observe

__all__ = ["DamageMeter", "Damages"]

# name of a tensor -> format -> nats per token; infinite for a format that cannot hold its values
Damages: TypeAlias = dict[str, dict[str, float]]
# (errors of some rows of a weight, these rows) -> twice the damage
Loss: TypeAlias = Callable[[Floats, slice], float]
SLICE_VALUES = 1 << 22  # encoded at a time: 16 MiB of float32


class _Squares:
    """Mean squares of the inputs and of the output gradients of each weight that was observed."""

    def __init__(self) -> None:
        self._inputs: dict[str, NDArray[np.float64]] = {}
        self._grads: dict[str, NDArray[np.float64]] = {}
        self._count: dict[str, int] = {}

    def observe(self, name: str, x: Floats, g: Floats) -> None:
        for sums, array in ((self._inputs, x), (self._grads, g)):
            squares = np.einsum("ti,ti->i", array, array).astype(np.float64)
            sums[name] = sums.get(name, 0) + squares
        self._count[name] = self._count.get(name, 0) + len(x)

    def means(self) -> Iterator[tuple[str, Floats, Floats]]:
        """Of each weight: its name, and the means of the inputs [in] and of the gradients [out]."""
        for name, count in self._count.items():
            x, g = (s[name] / count for s in (self._inputs, self._grads))
            check_finite(name, bool(np.isfinite(x).all() and np.isfinite(g).all()))
            yield name, x.astype(np.float32), g.astype(np.float32)


class DamageMeter:
    """Measures the damages of a model's tensors."""

    def __init__(
        self,
        source: Source,
        windows: NDArray[np.int32],
        candidates: Mapping[str, Collection[str]],
        search: Search,
    ) -> None:
        """`windows` [W, n] of text; `candidates`: the formats that are tried, by tensor; `search`:
        the formats' own encoder.
        """
        self._candidates, self._search = candidates, search
        self._gradients = Gradients(source.config, source_loader(source), windows)
        config, source_of = source.config, gguf_source_of(source.config.architecture)
        self._tensors = {
            param.name: tuple(source_of(config, param).tensors)
            for param in get_graph(config.graph).parameters(config)
        }
        self._embedding = "embed_tokens.weight"
        self._damages: Damages = {}
        # mean squares of the columns of each matrix, by tensor
        self.importance: dict[str, Floats] = {}

    def run(self, on_layer: Callable[[], object] = lambda: None) -> Damages:
        """Measure all tensors. Those that no linear layer and no embedding reads are left out.
        `on_layer` is called after each layer.
        """
        gradients = self._gradients
        others = gradients.load_others()
        self._measure(others, partial(gradients.run_head, others))
        for layer in reversed(range(gradients.config.num_layers)):
            weights = gradients.load_layer(layer)
            self._measure(weights, partial(gradients.run_layer, layer, weights))
            on_layer()
        self._measure_embedding(others[self._embedding])
        return self._damages

    def _measure(self, weights: Mapping[str, Floats], run: Callable[[Observe], None]) -> None:
        """Add the damages of the linear weights that `run` observes."""
        squares = _Squares()
        run(squares.observe)
        for param, columns, rows in squares.means():
            self.importance |= dict.fromkeys(self._tensors[param], columns)

            self._add(param, weights[param], columns, partial(_loss, columns, rows))

    def _measure_embedding(self, table: Floats) -> None:
        """Add the damages of the embedding [V, C] as the input of the first layer."""
        tokens, grads = self._gradients.embedding_gradients()
        used, places = np.unique(tokens, return_inverse=True)
        squares = np.zeros((len(used), table.shape[1]), np.float32)
        np.add.at(squares, places, np.square(grads))
        squares /= np.float32(len(tokens))

        def loss(errors: Floats, part: slice) -> float:
            return float(np.vdot(squares[part], np.square(errors)))

        columns = self.importance.get(self._tensors[self._embedding][0])
        self._add(self._embedding, table[used], columns, loss)

    def _add(self, param: str, weight: Floats, importance: Floats | None, loss: Loss) -> None:
        """Add the damages of rows of a parameter to those of its tensors."""
        step = max(1, SLICE_VALUES // weight.shape[1])
        for name in self._tensors[param]:
            found = self._damages.setdefault(name, {})
            for format in self._candidates.get(name, ()):
                total = 0.0
                try:
                    for start in range(0, len(weight), step):
                        part = slice(start, start + step)
                        made = self._search(weight[part], format, importance)
                        total += loss(weight[part] - dequantize(made), part)
                except FormatError:  # a value is too large for the format
                    total = math.inf
                found[format] = found.get(format, 0.0) + total / 2


def _loss(columns: Floats, rows: Floats, errors: Floats, part: slice) -> float:
    """Mean squares of a weight's inputs and gradients, and the errors of some rows: their loss."""
    return float(rows[part] @ (np.square(errors) @ columns))
