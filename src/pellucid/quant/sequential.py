"""Error feedback through a whole model, layer by layer.

The Hessian of each matrix is that of its input behind everything that is quantized already: the
layers before, and within the layer the matrices that the forward pass reaches first (GPTQ's "true
sequential" order). A second walk gives the exact inputs, and each weight is changed so that it
makes up for the difference (`prefix_error.py`). A part of the calibration text is held out. It
decides how large that change is, and a matrix for which error feedback does not help there keeps
the codes of the format's own search.

`SequentialFeedback` is an `Encode` of `quantize.py`. It quantizes a whole layer when the first
tensor of the layer is asked for, and keeps one layer.
"""

from collections.abc import Collection, Mapping

import numpy as np
from numpy.typing import NDArray

from ..backends.registry import get_backend
from ..config import ModelConfig
from ..formats import HostTensor, dequantize
from ..formats.codes import GRIDS
from ..formats.finite import check_activation, check_finite, naming
from ..models.params import split_name
from ..models.registry import get_graph
from ..weights.families import gguf_source_of
from .calibrate import Floats, Load, Walk
from .error_feedback import Search, error_feedback
from .gptq import factorize
from .prefix_error import Moments, corrected, mean_moments
from .quantize import Plan
from .source import Source

__all__ = ["SequentialFeedback", "source_loader"]

HELD_OUT = 8  # one of so many windows is held out


class _Text:
    """A text on its way through the quantized model, and through the exact one."""

    def __init__(self, config: ModelConfig, load: Load, windows: NDArray[np.int32]) -> None:
        self.walk = Walk(config, load, windows)
        self.exact = Walk(config, load, windows)


class SequentialFeedback:
    """Encodes the tensors of a plan in the order of the file, layer by layer."""

    def __init__(
        self, source: Source, plan: Plan, windows: NDArray[np.int32], search: Search
    ) -> None:
        """`windows` [W, n] are the calibration text, `search` the formats' own encoder. Raises
        FormatError if an activation is NaN or infinite.
        """
        self._source, self._plan, self._search = source, plan, search
        self._encoded: dict[str, HostTensor] = {}  # of the layer at hand
        self._layer = -1  # the last layer that was quantized
        held_out = np.zeros(len(windows), bool)
        # At random, because texts of several kinds in turns have a period.
        chosen = np.random.default_rng(0).permutation(len(windows))[: len(windows) // HELD_OUT]
        held_out[chosen] = True
        load = source_loader(source)
        self._calibration = _Text(source.config, load, windows[~held_out])
        self._held_out = None
        if held_out.any():
            self._held_out = _Text(source.config, load, windows[held_out])
        # the layer of each tensor, and the group that each matrix belongs to
        self._layers: dict[str, int] = {}
        self._groups: dict[str, str] = {}
        source_of = gguf_source_of(source.config.architecture)
        for param in self._calibration.walk.params.values():
            layer = split_name(param.name)[0]
            for name in source_of(source.config, param).tensors:
                if layer is not None:
                    self._layers[name] = layer
                    if param.group is not None:
                        self._groups[name] = param.group

    def __call__(
        self, name: str, values: Floats, format: str, importance: Floats | None
    ) -> HostTensor:
        layer = self._layers.get(name)
        if layer is not None:
            while self._layer < layer:
                self._layer += 1
                self._quantize_layer(self._layer)
            if name in self._encoded:
                return self._encoded.pop(name)
        with naming(f"tensor {name!r} becomes {format}"):
            return self._search(values, format, importance)

    def _quantize_layer(self, layer: int) -> None:
        self._encoded = {}
        weights = exact = self._calibration.walk.load_layer(layer)
        names_of = {
            group: [n for n, g in self._groups.items() if g == group and self._changes(n)]
            for group in self._calibration.walk.groups_of(layer, weights)
        }
        changing = [group for group, names in names_of.items() if names]
        for group in changing:
            names, is_last = names_of[group], group == changing[-1]
            # the group's inputs, behind what is quantized and exact
            found = self._moments(self._calibration, layer, weights, exact, group, is_last)
            factor = factorize(found.hessian, act_order=True)
            other = None
            if self._held_out is not None:
                other = self._moments(self._held_out, layer, weights, exact, group, is_last)
            for name in names:
                values, format = self._values(name), self._plan.after[name].format
                with naming(f"tensor {name!r} becomes {format}"):
                    self._encoded[name] = error_feedback(
                        values if other is None else corrected(values, found, factor, other),
                        found.hessian,
                        format,
                        self._search,
                        held_out=None if other is None else other.hessian,
                        factor=factor,
                    )
            weights = source_loader(self._source, self._encoded)(weights)
        for text in filter(None, (self._calibration, self._held_out)):
            text.walk.run_layer(layer, weights)
            if not changing:
                text.exact.run_layer(layer, exact)

    def _moments(
        self,
        text: "_Text",
        layer: int,
        weights: Mapping[str, Floats],
        exact: Mapping[str, Floats],
        group: str,
        is_last: bool,
    ) -> Moments:
        """The moments of a group's inputs. Behind the last group of a layer the exact walk goes on
        to the layer's end, because nothing of it changes.
        """
        moments = mean_moments(
            zip(
                text.walk.inputs(layer, weights, group),
                text.exact.inputs(layer, exact, group, advance=is_last),
                strict=True,
            )
        )
        is_finite = bool(np.isfinite(np.diag(moments.hessian)).all())
        check_activation(f"the input of {group}", is_finite)
        return moments

    def _changes(self, name: str) -> bool:
        """Whether the plan gives the tensor a format with a grid that it does not have yet."""
        after = self._plan.after[name].format
        return after in GRIDS and after != self._plan.before[name].format

    def _values(self, name: str) -> Floats:
        values = dequantize(self._source.tensor(name))
        check_finite(name, bool(np.isfinite(values).all()))
        return values


def source_loader(source: Source, replaced: Mapping[str, HostTensor] | None = None) -> Load:
    """Loads parameters from a source, with some of its tensors replaced."""
    backend, others = get_backend("reference"), replaced or {}
    source_of = gguf_source_of(source.config.architecture)
    params = {p.name: p for p in get_graph(source.config.graph).parameters(source.config)}

    def load(names: Collection[str]) -> dict[str, Floats]:
        found = {}
        for name in names:
            made_of = source_of(source.config, params[name])
            tensors = [others.get(t) or source.tensor(t) for t in made_of.tensors]
            whole = tensors[0] if made_of.fold is None else made_of.fold(*tensors)
            found[name] = backend.load_weight(whole, name)
        return found

    return load
