"""Scales of activation channels, moved from an activation into the weights that multiply it:

    y = W x = (W · diag(s)) (diag(s)⁻¹ x)

Where x is linear in the rows of other parameters (a norm's weight, the matrix before), x / s costs
nothing: these rows are divided by s once. So the outputs of the model stay the same, and what is
quantized later has other channels that are large. AWQ and SmoothQuant choose s.

`Param.feeds` says which rows make which channels; nothing here knows a model. No activation is
scaled that something else reads too. So there are no scales for the input of an lm_head whose
matrix is the embedding, for the hidden states of GPT-2's MLP (GELU is not linear), or for the
residual stream behind the norms that follow Gemma's attention and MLP.

Shapes: n channels, m rows of the parameters before; m < n where query heads share values.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from ..models.params import Feeds, Param

__all__ = ["Migration", "find_migrations"]

Floats: TypeAlias = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Migration:
    """An activation whose scales can be moved."""

    group: str
    producers: tuple[str, ...]  # their rows make the channels
    consumers: tuple[str, ...]  # they multiply the activation
    rows: NDArray[np.int64]  # [n]: the row that makes each channel

    @property
    def num_rows(self) -> int:
        return int(self.rows.max()) + 1

    def largest(self, channels: Floats) -> Floats:
        """The largest of the channels [n] that each row makes: [m]."""
        found = np.full(self.num_rows, -np.inf, np.float32)
        np.maximum.at(found, self.rows, channels)
        return found

    def mean(self, channels: Floats) -> Floats:
        """The mean of the channels [n] that each row makes: [m]."""
        sums = np.bincount(self.rows, channels, self.num_rows)
        return (sums / np.bincount(self.rows, minlength=self.num_rows)).astype(np.float32)

    def move(self, weights: Mapping[str, Floats], scales: Floats) -> dict[str, Floats]:
        """The weights of a layer, with the scales [m] moved; they must be above 0."""
        changed = dict(weights)
        for name in self.producers:
            rows = weights[name]
            changed[name] = rows / scales.reshape(-1, *[1] * (rows.ndim - 1))
        for name in self.consumers:
            changed[name] = weights[name] * scales[self.rows]
        return changed


def find_migrations(params: Mapping[str, Param], names: Collection[str]) -> list[Migration]:
    """The activations among the parameters `names` whose scales can be moved, in the order in which
    they are declared.
    """
    consumers: dict[str, list[str]] = {}
    producers: dict[str, list[str]] = {}
    for name in names:
        param = params[name]
        if param.group is not None:
            consumers.setdefault(param.group, []).append(name)
        if param.feeds is not None:
            producers.setdefault(param.feeds.group, []).append(name)
    found = []
    for group, behind in consumers.items():
        before = producers.get(group, ())
        maps = {(params[name].shape[0], params[name].feeds) for name in before}
        if not before:
            continue
        ((size, feeds),) = maps  # all of them are scaled alike
        assert feeds is not None
        found.append(Migration(group, tuple(before), tuple(behind), _rows(size, feeds)))
    return found


def _rows(size: int, feeds: Feeds) -> NDArray[np.int64]:
    """The row of each channel, of a parameter with `size` rows."""
    units = np.arange(size).reshape(-1, feeds.unit)
    return np.repeat(units, feeds.copies, axis=0).reshape(-1)
