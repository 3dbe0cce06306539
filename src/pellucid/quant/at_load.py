"""Quantizes a float model while it is loaded: no file is written, and no more than one parameter is
in memory as floats.

`quantize_at_load` wraps a checkpoint. Formats and bytes are those that `pellucid quantize` would
write: a GGUF type keeps its mixture and its search, `int8` and `w8a8` are the nearest values with a
scale per row. Types that need a calibration text are made by that command alone.
"""

import difflib
import logging
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from ..backends.native.backend import available_cpus
from ..config import ModelConfig
from ..errors import ConfigError
from ..files import Closing
from ..formats import HostTensor, dequantize, get_format
from ..formats.finite import check_finite
from ..formats.groups import INT8_ROW, MAX_ROW_INPUTS, group_blocks, row_blocks
from ..formats.tensor import StoredMatrix, TensorSpec
from ..models.registry import get_graph
from ..weights.checkpoint import Checkpoint
from ..weights.families import gguf_reader_of
from ..weights.gguf_checkpoint import GGUFCheckpoint
from ..weights.packed import packed_format
from ..weights.safetensors_checkpoint import SafetensorsCheckpoint
from ..weights.unfold import file_tensors
from .calibrate import Floats
from .encode import Encoder
from .smoothquant import quantize_rows
from .type_map import DENSE, FILE_TYPES, ModelFacts, choose_formats, find_file_type, is_quantizable

__all__ = ["quantize_at_load"]

_log = logging.getLogger(__name__)

ROW_TYPES = ("int8", "w8a8")
# what vLLM calls the methods of files that are quantized already
METHODS = ("gptq", "awq", "compressed-tensors", "gguf")
SLICE_VALUES = 1 << 22  # encoded at a time: 16 MiB of float32


def quantize_at_load(checkpoint: Checkpoint, name: str) -> Checkpoint:
    """The checkpoint with its matrices in the type called `name`, in any case. The name of a method
    that the files have already, such as gptq, changes nothing.

    Raises ConfigError for an unknown name, or if the model is quantized already.
    """
    name = name.lower()
    if name in METHODS:
        found = _method(checkpoint)
        if found != name:
            raise ConfigError(
                f"quantization is {name!r}; {checkpoint.path} is "
                + ("not quantized" if found is None else f"quantized by {found!r}")
            )
        return checkpoint
    if name not in (*FILE_TYPES, *ROW_TYPES):
        names = (*ROW_TYPES, *FILE_TYPES, *METHODS)
        near = difflib.get_close_matches(name, names, n=1)
        guess = f" (did you mean {near[0]}?)" if near else ""
        raise ConfigError(
            f"quantization is {name!r}{guess}; there are {', '.join(names)}; `pellucid quantize` "
            "makes types that need a calibration text"
        )
    for parameter, spec in checkpoint.specs().items():
        if spec.format not in DENSE:
            raise ConfigError(
                f"quantization is {name!r}, and {checkpoint.path} is quantized already: "
                f"{parameter} is {spec.format}; leave the option out to run it as it is"
            )
    formats = _row_formats(checkpoint, name) if name in ROW_TYPES else _formats(checkpoint, name)
    return _Quantized(checkpoint, formats)


def _method(checkpoint: Checkpoint) -> str | None:
    """The method by which the files of a model are quantized, as vLLM calls it."""
    if isinstance(checkpoint, GGUFCheckpoint):
        return "gguf"
    if isinstance(checkpoint, SafetensorsCheckpoint):
        for matrix in checkpoint.packed_matrices().values():
            return matrix.quantization.method
    return None


def _formats(checkpoint: Checkpoint, name: str) -> dict[str, str]:
    """The format of each parameter that changes, for a type of GGUF files."""
    config, stored = checkpoint.config, checkpoint.specs()
    reader = gguf_reader_of(config.architecture)
    tensors = file_tensors(config, reader.source)
    specs = {n: TensorSpec(t.format(stored), t.shape) for n, t in tensors.items()}
    facts = ModelFacts(
        reader.architecture, config.num_layers, config.num_heads, config.num_kv_heads
    )
    chosen = choose_formats(find_file_type(name), specs, facts)
    return {
        parameter: format
        for n, format in chosen.items()
        for parameter in tensors[n].parameters
        if is_quantizable(n, tensors[n].shape) and format != stored[parameter].format
    }


def _row_formats(checkpoint: Checkpoint, name: str) -> dict[str, str]:
    """The format of each matrix of a linear layer, for int8 with a scale per row. The lm_head and
    rows of which no format holds the width stay as they are.
    """
    formats: dict[str, str] = {}
    for param in get_graph(checkpoint.config.graph).parameters(checkpoint.config):
        if not param.quantizable or param.name in ("embed_tokens.weight", "lm_head.weight"):
            continue
        inputs = param.shape[-1]
        format = packed_format(8, inputs, inputs, zeros=False)
        if format == "F32":
            _log.warning("%s keeps its format: %d inputs are no multiple of 32", param.name, inputs)
            continue
        by_token = name == "w8a8" and inputs <= MAX_ROW_INPUTS
        formats[param.name] = INT8_ROW if by_token else format
    return formats


class _Quantized(Closing):
    """A checkpoint whose parameters get other `formats`, by canonical name, when they are read."""

    def __init__(self, checkpoint: Checkpoint, formats: Mapping[str, str]) -> None:
        self._checkpoint = checkpoint
        self._formats = formats

    @property
    def config(self) -> ModelConfig:
        return self._checkpoint.config

    @property
    def path(self) -> Path:
        return self._checkpoint.path

    @property
    def tokenizer_source(self) -> Path | Mapping[str, object]:
        return self._checkpoint.tokenizer_source

    def specs(self) -> dict[str, TensorSpec]:
        return {
            name: replace(spec, format=self._formats.get(name, spec.format))
            for name, spec in self._checkpoint.specs().items()
        }

    def stored_matrices(self) -> dict[str, StoredMatrix]:
        stored = self._checkpoint.stored_matrices()
        return {name: matrix for name, matrix in stored.items() if name not in self._formats}

    def parameters(self, without: Collection[str] = ()) -> Iterator[tuple[str, HostTensor]]:
        encoder = Encoder(available_cpus())
        for name, tensor in self._checkpoint.parameters(without):
            format = self._formats.get(name)
            yield name, tensor if format is None else _encode(name, tensor, format, encoder)

    def close(self) -> None:
        self._checkpoint.close()


def _encode(name: str, tensor: HostTensor, format: str, encoder: Encoder) -> HostTensor:
    """A matrix in another format, encoded in slices of rows."""
    columns = tensor.shape[-1]
    step = max(1, SLICE_VALUES // columns)
    made = []
    for start in range(0, len(tensor.data), step):
        rows = tensor.data[start : start + step]
        values = dequantize(replace(tensor, shape=(len(rows), columns), data=rows))
        check_finite(name, bool(np.isfinite(values).all()))
        by_row = format == INT8_ROW or format.startswith("INT8_G")
        slice = _by_rows(values, format) if by_row else encoder.encode(values, format, None)
        made.append(slice.data)
    return HostTensor(format, tensor.shape, np.concatenate(made))


def _by_rows(values: Floats, format: str) -> HostTensor:
    """Rows in int8 with a scale each, which a group-wise format repeats."""
    rounded = quantize_rows(values)
    if format == INT8_ROW:
        signed = (rounded.codes ^ np.uint8(0x80)).view(np.int8)
        return HostTensor(INT8_ROW, values.shape, row_blocks(signed, rounded.scales[:, 0]))
    block = get_format(format)
    scales = np.repeat(rounded.scales, values.shape[1] // block.block_size, axis=1)
    return HostTensor(format, values.shape, group_blocks(rounded.codes, scales, None, block))
