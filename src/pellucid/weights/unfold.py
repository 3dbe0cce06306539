"""The inverse of a plan: the tensors of a file, made from a model's parameters.

A family says for each declared parameter which tensors of a file make it, and by which fold
(`families/`). Read the other way, this says how to write such a file: `file_tensors` turns the same
declaration around, so a writer has no names and no layouts of its own.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..config import ModelConfig
from ..formats import dequantize, encode_dense, host_tensor
from ..formats.tensor import HostTensor, TensorSpec
from ..models.registry import get_graph
from .families import SourceOf
from .folds import AddOne, Fold, InterleavedToHalfSplit, SliceOutputs, Transpose

__all__ = ["FileTensor", "file_tensors"]


@dataclass(frozen=True, slots=True)
class FileTensor:
    """One tensor of a file: its shape, and the parameters in it, by canonical name. Several lie one
    after another, with a fold each.
    """

    shape: tuple[int, ...]
    parameters: tuple[str, ...]
    folds: tuple[Fold | None, ...]

    def format(self, specs: Mapping[str, TensorSpec]) -> str:
        """The format of the tensor, if the parameters have these `specs`: theirs, if they agree and
        need not be computed with.
        """
        formats = {specs[name].format for name in self.parameters}
        computed = any(isinstance(fold, AddOne) for fold in self.folds)
        return formats.pop() if len(formats) == 1 and not computed else "F32"

    def build(self, parameters: Mapping[str, HostTensor]) -> HostTensor:
        """The tensor, from its parameters."""
        parts = [
            _unfold(parameters[name], fold)
            for name, fold in zip(self.parameters, self.folds, strict=True)
        ]
        if len(parts) == 1:
            return parts[0]
        if len({part.format for part in parts}) > 1:
            parts = [encode_dense(dequantize(part)) for part in parts]
        # Conv1D's matrices [in, out] lie beside each other, all other parts one after another
        beside = len(self.shape) == 1 or isinstance(self.folds[0], Transpose)
        data = np.concatenate([part.data for part in parts], axis=1 if beside else 0)
        whole = host_tensor(parts[0].format, self.shape, data.reshape(-1))
        return HostTensor(whole.format, whole.shape, whole.data, parts[0].input_order)


def file_tensors(config: ModelConfig, source_of: SourceOf) -> dict[str, FileTensor]:
    """The tensors of a file whose parameters lie where `source_of` says, by name."""
    found: dict[str, list[tuple[int, str, Fold | None]]] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for param in get_graph(config.graph).parameters(config):
        source = source_of(config, param)
        ((name, shape),) = source.tensors.items()
        start = source.fold.start if isinstance(source.fold, SliceOutputs | Transpose) else 0
        found.setdefault(name, []).append((start, param.name, source.fold))
        shapes[name] = shape
    return {name: _file_tensor(shapes[name], parts) for name, parts in found.items()}


def _file_tensor(
    shape: tuple[int, ...], parts: Sequence[tuple[int, str, Fold | None]]
) -> FileTensor:
    in_order = sorted(parts, key=lambda part: part[0])
    return FileTensor(
        shape, tuple(name for _, name, _ in in_order), tuple(fold for *_, fold in in_order)
    )


def _unfold(parameter: HostTensor, fold: Fold | None) -> HostTensor:
    """The part of a tensor that `fold` made this parameter from."""
    match fold:
        case None | SliceOutputs():
            return parameter
        case InterleavedToHalfSplit():
            return _interleaved(parameter, fold.num_heads)
        case Transpose():
            return encode_dense(_dense(parameter).T)
        case AddOne():
            return encode_dense(dequantize(parameter) - np.float32(1.0))
        case _:
            raise TypeError(f"{fold} has no inverse")


def _interleaved(parameter: HostTensor, num_heads: int) -> HostTensor:
    """The outputs of q or k in the interleaved RoPE layout."""
    rows = len(parameter.data) if len(parameter.shape) == 2 else math.prod(parameter.shape)
    halves = parameter.data.reshape(num_heads, 2, rows // num_heads // 2, -1)
    moved = np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(parameter.data.shape)
    return HostTensor(parameter.format, parameter.shape, moved, parameter.input_order)


def _dense(parameter: HostTensor) -> NDArray[Any]:
    """The values as they are stored; those of a block format in float32."""
    dtypes = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}
    if parameter.format not in dtypes:
        return dequantize(parameter)
    return parameter.data.view(dtypes[parameter.format]).reshape(parameter.shape)
