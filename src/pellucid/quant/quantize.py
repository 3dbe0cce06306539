"""Quantizes a model into a GGUF file, tensor by tensor.

`plan_quantization` decides the format of every tensor and refuses what cannot be done, before
anything is written. `write_quantized` then reads a tensor, encodes it in slices of rows, and writes
it. So the memory needed is one tensor as stored, and some slices. The file appears whole or not at
all. Sizes are in bytes.
"""

# `files.read_at` imports it when it is needed, and a signal during an import ends the process at
# once. No import may run while an unfinished file lies on the disk.
import concurrent.futures.thread  # noqa: F401
import math
import shutil
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ..backends.native.backend import available_cpus
from ..errors import ConfigError
from ..files import check_output, files_of
from ..formats import HostTensor, dequantize, packed_bytes
from ..formats.finite import check_finite, naming
from ..formats.tensor import TensorSpec
from ..weights.gguf_metadata import Typed, ValueType
from ..weights.gguf_writer import GGUFWriter
from .encode import Encoder
from .source import Source
from .type_map import DENSE, FileType, ModelFacts, Rule, choose_formats

__all__ = ["Encode", "Plan", "TensorReport", "plan_quantization", "write_quantized"]

Floats: TypeAlias = NDArray[np.float32]
# (name of the tensor, values [rows, columns], format, importance [columns] or None) -> the tensor.
# Methods that choose codes by other means than the format's own search are such functions.
Encode: TypeAlias = Callable[[str, Floats, str, Floats | None], HostTensor]

QUANTIZATION_VERSION = 2  # of ggml's block formats
SLICE_VALUES = 1 << 22  # encoded at a time: 16 MiB of float32
_SPARE_BYTES = 1 << 20  # for the header, which is not counted


@dataclass(frozen=True, slots=True)
class Plan:
    """What will be written."""

    file_type: FileType
    before: dict[str, TensorSpec]  # in the order of the file
    after: dict[str, TensorSpec]

    @property
    def num_weights(self) -> int:
        return sum(math.prod(spec.shape) for spec in self.after.values())

    @property
    def source_bytes(self) -> int:
        return sum(packed_bytes(spec) for spec in self.before.values())

    @property
    def num_bytes(self) -> int:
        """Of all tensors, without the header."""
        return sum(packed_bytes(spec) for spec in self.after.values())


@dataclass(frozen=True, slots=True)
class TensorReport:
    """A tensor that was written. `error` is the root of its mean squared error, relative to the
    root mean square of its values; None: it was copied.
    """

    name: str
    before: TensorSpec
    after: TensorSpec
    error: float | None
    weighted: bool  # whether an importance matrix weighed its columns

    @property
    def num_bytes(self) -> int:
        return packed_bytes(self.after)


def plan_quantization(
    source: Source,
    file_type: FileType,
    *,
    importance: Mapping[str, Floats] | None = None,
    is_calibrated: bool = False,
    rules: Sequence[Rule] = (),
    allow_requantize: bool = False,
) -> Plan:
    """The format of each tensor. With importance, or where the encoder `is_calibrated` by other
    means, some mixtures differ. Raises ConfigError if a tensor is quantized already and would
    change, or if the importance does not fit the model.
    """
    formats = choose_formats(
        file_type,
        source.specs,
        _facts(source),
        has_importance=importance is not None or is_calibrated,
        rules=rules,
    )
    before = {name: source.specs[name] for name in formats}
    if not allow_requantize:
        _check_requantize(source, formats)
    if importance is not None:
        _check_importance(source, importance)
    after = {name: TensorSpec(formats[name], spec.shape) for name, spec in before.items()}
    return Plan(file_type, before, after)


def write_quantized(
    source: Source,
    out: Path,
    plan: Plan,
    *,
    importance: Mapping[str, Floats] | None = None,
    encode: Encode | None = None,
    added: Mapping[str, object] | None = None,
    threads: int | None = None,
) -> Generator[TensorReport, None, None]:
    """Write the file, and yield each tensor after it is written; the file is there when the
    iteration has ended, and nothing is left if it is broken off.

    `encode` replaces the formats' own search for all tensors that change; it sees whole tensors.
    `added` are more values of metadata. `threads`: None, as many as there are CPUs.
    """
    _check_place(source, out, plan)
    metadata = _metadata(source, plan, added or {})
    encoder = Encoder(threads or available_cpus())
    with GGUFWriter(out, metadata, list(plan.after.items())) as writer:
        for name, spec in plan.after.items():
            tensor = source.tensor(name)
            weights = (importance or {}).get(name)
            slices = _encode(name, tensor, spec.format, weights, encode, encoder)
            squares, lost = 0.0, 0.0
            for data, size, error in slices:
                writer.write(data)
                squares += size
                lost += error
            copied = tensor.format == spec.format
            relative = None if copied else math.sqrt(lost / squares) if squares else 0.0
            yield TensorReport(
                name, tensor.spec, spec, relative, weights is not None and not copied
            )
            del tensor


def _encode(
    name: str,
    tensor: HostTensor,
    format: str,
    importance: Floats | None,
    encode: Encode | None,
    encoder: Encoder,
) -> Iterator[tuple[NDArray[np.uint8], float, float]]:
    """The bytes of a tensor in `format`, in slices of rows; of each its sum of squares, and its sum
    of squared errors.
    """
    columns = tensor.shape[-1]
    step = max(1, SLICE_VALUES // columns) if encode is None else len(tensor.data)
    for start in range(0, len(tensor.data), step):
        rows = tensor.data[start : start + step]
        given = replace(tensor, shape=(len(rows), columns), data=rows)
        values = dequantize(given)
        check_finite(name, bool(np.isfinite(values).all()))
        if tensor.format == format:
            yield rows, 0.0, 0.0
            continue
        if encode is None:
            with naming(f"tensor {name!r} becomes {format}"):
                made = encoder.encode(values, format, importance)
        else:
            made = encode(name, values, format, importance)
        lost = dequantize(made)
        lost -= values
        yield made.data, _sum_of_squares(values), _sum_of_squares(lost)


def _sum_of_squares(values: Floats) -> float:
    flat = values.reshape(-1)
    return float(np.dot(flat, flat))


def _facts(source: Source) -> ModelFacts:
    config = source.config
    architecture = source.metadata["general.architecture"]
    if isinstance(architecture, Typed):
        architecture = architecture.value
    return ModelFacts(str(architecture), config.num_layers, config.num_heads, config.num_kv_heads)


def _check_requantize(source: Source, formats: Mapping[str, str]) -> None:
    for name, format in formats.items():
        spec = source.specs[name]
        if spec.format not in (*DENSE, format):
            raise ConfigError(
                f"{source.path} is quantized already: tensor {name!r} is {spec.format} and would "
                f"become {format}, which adds to its error; --allow-requantize permits it"
            )


def _check_importance(source: Source, importance: Mapping[str, Floats]) -> None:
    if not any(name in source.specs for name in importance):
        some = next(iter(importance), "none")
        raise ConfigError(
            f"the importance matrix has no tensor of {source.path} (it has {some!r}); it was made "
            "for another model"
        )
    for name, weights in importance.items():
        if name not in source.specs:
            continue
        columns = source.specs[name].shape[-1]
        if weights.shape != (columns,):
            raise ConfigError(
                f"the importance matrix has {weights.size} values for tensor {name!r}, whose rows "
                f"have {columns}; it was made for another model"
            )
        if not np.isfinite(weights).all() or (weights < 0).any():
            raise ConfigError(
                f"the importance matrix has a negative or non-finite value for tensor {name!r}"
            )


def _check_place(source: Source, out: Path, plan: Plan) -> None:
    """Raise ConfigError if the file cannot be written where it should be."""
    check_output(out, files_of(source.path))
    free = shutil.disk_usage(out.parent).free
    if free < plan.num_bytes + _SPARE_BYTES:
        raise ConfigError(
            f"{out} will take {plan.num_bytes} bytes, and its disk has {free} left; free "
            f"{plan.num_bytes + _SPARE_BYTES - free} first"
        )


def _metadata(source: Source, plan: Plan, added: Mapping[str, object]) -> dict[str, Any]:
    """The source's values, with what the file is now behind them, as llama-quantize writes them."""
    replaced = ("general.quantization_version", "general.file_type")
    values = {key: value for key, value in source.metadata.items() if key not in replaced}
    values["general.quantization_version"] = Typed(QUANTIZATION_VERSION, ValueType.UINT32)
    values["general.file_type"] = Typed(plan.file_type.number, ValueType.UINT32)
    return {**values, **added}
