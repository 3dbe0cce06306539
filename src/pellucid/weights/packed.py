"""Packed matrices of Hugging Face folders: the parts of one quantized matrix, and the fold that
puts them together.

GPTQ, AWQ and compressed-tensors store a matrix [out, in] as several tensors: integers packed into
words, scales, zero points, and in act-order the group of each input. `packed_source` finds these
parts in a file's table of contents, and the fold turns them into one tensor of a group-wise format
(`formats/groups.py`), without rounding. A matrix of which no group-wise format can hold the groups
(they are not a multiple of 32 inputs) is decoded to float32.

Everything that a file's author can get wrong is checked: shapes and types when the folder is
opened, and the values of zero points and groups when the matrix is read.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..config import ModelConfig
from ..errors import FormatError, UnsupportedError
from ..formats import dequantize, encode_dense, get_format
from ..formats.groups import (
    GROUP_SIZES,
    INT8_ROW,
    MAX_ROW_INPUTS,
    group_blocks,
    group_format,
    row_blocks,
)
from ..formats.packing import (
    awq_codes,
    awq_stream,
    compressed_codes,
    compressed_width,
    gptq_codes,
    gptq_zeros,
    pack_stream,
    sorted_gptq_stream,
)
from ..formats.tensor import HostTensor, TensorSpec
from ..models.params import Param
from .families import SourceOf
from .folds import Fold, SliceOutputs, Transpose
from .plan import ParamSource
from .quantization import Quantization

__all__ = ["PackedMatrix", "declared_spec", "packed_format", "packed_source"]

Shape = tuple[int, ...]
Array = NDArray[np.generic]

_DTYPES = {"I8": "<i1", "I32": "<i4", "I64": "<i8"}
_FLOATS = ("F16", "BF16", "F32")
_WORDS = ("I32",)


@dataclass(frozen=True, slots=True)
class PackedMatrix:
    """The fold from the parts of a quantized matrix to one tensor.

    `parts` are the names of the parts without the module's name, in the order of the tensors that
    the fold is given: "qweight", "qzeros", … `then` is the fold that the family applies to the
    matrix.
    """

    quantization: Quantization
    module: str
    parts: tuple[str, ...]
    shape: tuple[int, int]  # [out, in]
    bits: int
    group_size: int  # inputs per scale
    then: Fold | None = None

    @property
    def format(self) -> str:
        """The format of the matrix."""
        if self.is_row_scaled:
            return INT8_ROW
        return packed_format(self.bits, self.group_size, self.shape[1], zeros=self._has_zeros)

    @property
    def is_row_scaled(self) -> bool:
        """Whether it is int8 with a scale per row, for activations in int8."""
        return (
            self.quantization.int8_activations
            and self.parts[0] == "weight"
            and not self._has_zeros
            and self.group_size == self.shape[1]
            and self.shape[1] % 32 == 0
            and self.shape[1] <= MAX_ROW_INPUTS
        )

    @property
    def _has_zeros(self) -> bool:
        """Whether it has zero points. GPTQ stores those of symmetric matrices too, all alike."""
        if self.quantization.method == "gptq" and self.quantization.symmetric:
            return False
        return any("zero" in part for part in self.parts)

    @property
    def _is_permuted(self) -> bool:
        sorted_groups = self.quantization.desc_act and self.group_size < self.shape[1]
        return sorted_groups and any("g_idx" in part for part in self.parts)

    def packed_spec(self) -> TensorSpec:
        """Format and shape of the whole matrix, before `then`."""
        return TensorSpec(self.format, self.shape, self._is_permuted and self.format != "F32")

    def spec(self, *sources: TensorSpec) -> TensorSpec:
        for part, source in zip(self.parts, sources, strict=True):
            allowed = _dtypes_of(part)
            if source.format not in allowed:
                raise UnsupportedError(
                    f"{part} is of type {source.format}; it must be one of: {', '.join(allowed)}"
                )
        spec = self.packed_spec()
        return spec if self.then is None else self.then.spec(spec)

    def __call__(self, *sources: HostTensor) -> HostTensor:
        arrays = {part: _array(source) for part, source in zip(self.parts, sources, strict=True)}
        matrix = self._matrix(arrays)
        return matrix if self.then is None else self.then(matrix)

    def _matrix(self, arrays: Mapping[str, Array]) -> HostTensor:
        """The whole matrix."""
        rows, inputs = self.shape
        self._check_shape(arrays)
        scales, order = self._scales(arrays), self._order(arrays)
        if self.is_row_scaled:
            return HostTensor(
                INT8_ROW, self.shape, row_blocks(arrays["weight"].view(np.int8), scales[:, 0])
            )
        zeros = self._zeros(arrays)
        unit = _unit(self.group_size, inputs)
        if unit is None:
            return self._decoded(self._codes(arrays), scales, zeros, order)
        # codes as one stream of bits per row, in the order of groups
        stream = self._stream(arrays, order)
        if stream is None:
            codes = self._codes(arrays)
            stream = pack_stream(codes if order is None else codes[:, order], self.bits)
        # repeat the scales so that each block of the format has one
        repeat = np.arange(inputs // unit) * unit // self.group_size
        format = get_format(self.format)
        blocks = group_blocks(
            stream, scales[:, repeat], None if zeros is None else zeros[:, repeat], format
        )
        return HostTensor(format.name, (rows, inputs), blocks, order)

    def _decoded(
        self,
        codes: NDArray[np.uint8],
        scales: NDArray[np.float32],
        zeros: NDArray[np.uint8] | None,
        order: NDArray[np.int32] | None,
    ) -> HostTensor:
        """The matrix in float32, from codes in the order of the inputs."""
        if order is not None:
            codes = codes[:, order]
        group = np.arange(self.shape[1]) // self.group_size
        middle = np.float32(1 << (self.bits - 1))
        centre = middle if zeros is None else zeros[:, group].astype(np.float32)
        values = scales[:, group] * (codes.astype(np.float32) - centre)
        if order is not None:
            values[:, order] = values.copy()
        return encode_dense(values)

    def _check_shape(self, arrays: Mapping[str, Array]) -> None:
        """Check compressed-tensors' own word for the shape."""
        shape = list(map(int, arrays["weight_shape"])) if "weight_shape" in arrays else None
        if shape is not None and shape != list(self.shape):
            raise FormatError(
                f"{self.module}.weight_shape is {shape}; its config implies {list(self.shape)}"
            )

    def _stream(
        self, arrays: Mapping[str, Array], order: NDArray[np.int32] | None
    ) -> NDArray[np.uint8] | None:
        """The codes [out, in · bits / 8] in this order, where they need not be unpacked; None where
        they must be.
        """
        rows, inputs = self.shape
        if self.quantization.method == "awq":
            return awq_stream(_words(arrays["qweight"]))
        if order is not None:
            if self.quantization.method == "gptq" and self.bits == 4:
                return sorted_gptq_stream(_words(arrays["qweight"]), order)
            return None
        words: Array | None = None
        if self.quantization.method == "gptq":
            words = arrays["qweight"].T
        elif (
            "weight_packed" in arrays and inputs * self.bits % 32 == 0 and not self._padded(arrays)
        ):
            words = arrays["weight_packed"]
        if words is None:
            return None
        return np.ascontiguousarray(words).view(np.uint8).reshape(rows, -1)

    def _codes(self, arrays: Mapping[str, Array]) -> NDArray[np.uint8]:
        """Unsigned codes [out, in], in the order of the inputs."""
        if self.quantization.method == "gptq":
            return gptq_codes(_words(arrays["qweight"]), self.bits)
        if self.quantization.method == "awq":
            return awq_codes(_words(arrays["qweight"]))
        if "weight_packed" in arrays:
            words, padded = _words(arrays["weight_packed"]), self._padded(arrays)
            return compressed_codes(words, self.bits, self.shape[1], padded=padded)
        return arrays["weight"].view(np.uint8) ^ np.uint8(0x80)

    def _padded(self, arrays: Mapping[str, Array]) -> bool:
        """Whether no code of compressed-tensors crosses a word border."""
        width = compressed_width(self.shape[1], self.bits)
        return "weight_packed" in arrays and arrays["weight_packed"].shape[1] != width

    def _zeros(self, arrays: Mapping[str, Array]) -> NDArray[np.uint8] | None:
        """Zero points [out, groups], unless the format has none."""
        q, bits, (rows, inputs) = self.quantization, self.bits, self.shape
        middle = np.uint8(1 << (bits - 1))
        if q.method == "awq":
            return awq_codes(_words(arrays["qzeros"]))
        if q.method == "gptq":
            zeros = gptq_zeros(_words(arrays["qzeros"]), bits, minus_one=q.zeros_minus_one)
            if q.symmetric and (zeros != middle).any():
                raise FormatError(
                    f"{self.module}.qzeros has a zero point of {int(zeros[zeros != middle][0])}; "
                    f"quantization_config says sym, and then all are {middle}"
                )
            return zeros if self._needs_zeros else None
        # compressed-tensors: packed along the outputs, or one int8 each
        points = arrays.get("weight_zero_point")
        if points is None:
            full = np.full((rows, math.ceil(inputs / self.group_size)), middle)
            return full if self._needs_zeros else None
        if points.dtype == np.int32:
            padded = self._padded(arrays)
            return compressed_codes(_words(points).T, bits, rows, padded=padded).T
        unsigned = points.view(np.uint8).reshape(len(points), -1) + middle
        return np.broadcast_to(unsigned, (rows, unsigned.shape[1]))

    @property
    def _needs_zeros(self) -> bool:
        """Whether the format has zero points, also where they are all the middle."""
        return self.format.startswith("UINT") or (self.format == "F32" and self._has_zeros)

    def _scales(self, arrays: Mapping[str, Array]) -> NDArray[np.float32]:
        """Scales [out, groups]. Those of a whole tensor are repeated for its rows."""
        if self.quantization.method == "compressed-tensors":
            scales = arrays["weight_scale"].astype(np.float32)
            scales = np.broadcast_to(
                scales.reshape(len(scales), -1), (self.shape[0], scales.size // len(scales))
            )
        else:
            scales = np.ascontiguousarray(arrays["scales"].astype(np.float32).T)
        if not np.isfinite(scales).all():
            raise FormatError(
                f"{self.module}: its scales hold NaN or infinity; the file is damaged, or was "
                "quantized wrongly"
            )
        return scales

    def _order(self, arrays: Mapping[str, Array]) -> NDArray[np.int32] | None:
        """The inputs sorted by their groups, or None if they are."""
        name = next((part for part in self.parts if "g_idx" in part), None)
        groups = math.ceil(self.shape[1] / self.group_size)
        if name is None or groups == 1:
            return None
        group_of = arrays[name].astype(np.int64)
        expected = np.arange(self.shape[1]) // self.group_size
        if np.array_equal(group_of, expected):
            return None
        order = np.argsort(group_of, kind="stable")
        if not np.array_equal(group_of[order], expected):
            raise FormatError(
                f"{self.module}.{name} does not put {self.group_size} inputs into each of "
                f"{groups} groups"
            )
        return order.astype(np.int32)


def packed_format(bits: int, group_size: int, inputs: int, *, zeros: bool) -> str:
    """The format of rows of so many inputs with a scale per `group_size` of them."""
    unit = _unit(group_size, inputs)
    if unit is None:
        return "F32"
    return group_format(bits, unit, zeros=zeros or bits < 4)


def declared_spec(quantization: Quantization | None, param: Param) -> TensorSpec | None:
    """Format and shape of a parameter of which only the config is known; None if it is not packed.
    Linear layers are, but for lm_head, which quantizers leave out.
    """
    if quantization is None or param.group is None or len(param.shape) != 2:
        return None
    if param.name in ("embed_tokens.weight", "lm_head.weight"):
        return None
    rows, inputs = param.shape
    zeros = not quantization.symmetric
    if quantization.int8_activations and inputs % 32 == 0 and inputs <= MAX_ROW_INPUTS:
        return TensorSpec(INT8_ROW, (rows, inputs))
    size = quantization.group_size or inputs
    format = packed_format(max(quantization.bits), size, inputs, zeros=zeros)
    return TensorSpec(format, (rows, inputs), quantization.desc_act and size < inputs)


def packed_source(
    quantization: Quantization, source: SourceOf, tensors: Mapping[str, TensorSpec]
) -> SourceOf:
    """`source`, in a file with these tensors: matrices that are packed there come from their
    parts.
    """

    def packed(config: ModelConfig, param: Param) -> ParamSource:
        found = source(config, param)
        if len(found.tensors) != 1 or len(param.shape) != 2:
            return found
        ((name, shape),) = found.tensors.items()
        module = name.removesuffix(".weight")
        parts = _parts(quantization, module, tensors)
        if not parts:
            return found
        # GPT-2's Conv1D is stored as [in, out], but packed as a linear layer
        fold = found.fold
        if isinstance(fold, Transpose):
            shape = (shape[1], shape[0])
            fold = SliceOutputs(fold.start, shape[0] if fold.stop is None else fold.stop)
        return _matrix_source(quantization, module, parts, (shape[0], shape[1]), tensors, fold)

    return packed


def _parts(
    quantization: Quantization, module: str, tensors: Mapping[str, TensorSpec]
) -> tuple[str, ...]:
    """The parts of `module` in the file, which are none if it is not quantized."""

    def there(*parts: str) -> tuple[str, ...]:
        return tuple(part for part in parts if f"{module}.{part}" in tensors)

    if quantization.method != "compressed-tensors":
        if not there("qweight"):
            return ()
        return ("qweight", "qzeros", "scales", *there("g_idx"))
    optional = there("weight_zero_point", "weight_shape", "weight_g_idx")
    if there("weight_packed"):
        return ("weight_packed", "weight_scale", *optional)
    weight = tensors.get(f"{module}.weight")
    if weight is not None and weight.format == "I8":
        return ("weight", "weight_scale", *optional)
    return ()


def _matrix_source(
    quantization: Quantization,
    module: str,
    parts: tuple[str, ...],
    shape: tuple[int, int],
    tensors: Mapping[str, TensorSpec],
    then: Fold | None,
) -> ParamSource:
    """The source of a packed matrix: its parts with the shapes that they must have."""
    rows, inputs = shape
    bits, group_size = _bits_of(quantization, module, parts, shape, tensors), inputs
    if quantization.method != "compressed-tensors" and (rows * bits % 32 or inputs * bits % 32):
        raise UnsupportedError(
            f"{module}.qweight: a matrix of {rows} outputs and {inputs} inputs with {bits} bits "
            "does not fill whole words of 32 bits"
        )
    if quantization.group_size is not None:
        group_size = min(quantization.group_size, inputs)
    if quantization.overrides:
        group_size = _group_size_of(quantization, module, inputs, tensors)
    groups, padded = math.ceil(inputs / group_size), False
    if "weight_packed" in parts:
        width = tensors[f"{module}.weight_packed"].shape[-1:]
        padded = width == (compressed_width(inputs, bits, padded=True),)
    if quantization.method == "awq":
        words, zeros = (inputs, rows // 8), (groups, rows // 8)
    else:
        words, zeros = (inputs * bits // 32, rows), (groups, rows * bits // 32)
    shapes: dict[str, Shape] = {
        "qweight": words,
        "qzeros": zeros,
        "scales": (groups, rows),
        "g_idx": (inputs,),
        "weight_packed": (rows, compressed_width(inputs, bits, padded=padded)),
        "weight": shape,
        "weight_shape": (2,),
        "weight_g_idx": (inputs,),
    }
    for part, whole in (("weight_scale", rows), ("weight_zero_point", rows)):
        found = tensors.get(f"{module}.{part}", TensorSpec("I32", ()))
        if part == "weight_zero_point" and found.format == "I32" and "weight" not in parts:
            whole = compressed_width(rows, bits, padded=padded)
        of_tensor = groups == 1 and found.shape == (1,)  # one scale for the whole tensor
        shapes[part] = (1,) if of_tensor else (whole, groups)
    fold = PackedMatrix(quantization, module, parts, shape, bits, group_size, then)
    return ParamSource({f"{module}.{p}": shapes[p] for p in parts}, fold, packed=True)


def _bits_of(
    quantization: Quantization,
    module: str,
    parts: tuple[str, ...],
    shape: tuple[int, int],
    tensors: Mapping[str, TensorSpec],
) -> int:
    """The bits of a module's codes: of the config, or where modules differ, of its words."""
    if "weight" in parts:
        return 8
    if len(quantization.bits) > 1:
        found = tensors[f"{module}.{parts[0]}"].shape
        for bits in sorted(quantization.bits):
            of_gptq = (shape[1] * bits // 32, shape[0])
            widths = {compressed_width(shape[1], bits, padded=padded) for padded in (False, True)}
            of_compressed = [(shape[0], width) for width in widths]
            if found in ([of_gptq] if quantization.method == "gptq" else of_compressed):
                return bits
    return min(quantization.bits)


def _group_size_of(
    quantization: Quantization, module: str, inputs: int, tensors: Mapping[str, TensorSpec]
) -> int:
    """The group size of a module, by the number of its scales."""
    part = "scales" if quantization.method == "gptq" else "weight_scale"
    shape = tensors.get(f"{module}.{part}", TensorSpec("F16", ())).shape
    groups = 1
    if len(shape) == 2:
        groups = shape[0] if quantization.method == "gptq" else shape[1]
    if quantization.group_size is not None:
        usual = min(quantization.group_size, inputs)
        if math.ceil(inputs / usual) == groups:
            return usual
    if groups and inputs % groups == 0:
        return inputs // groups
    for size in reversed(GROUP_SIZES):
        if math.ceil(inputs / size) == groups:
            return size
    return inputs


def _unit(group_size: int, inputs: int) -> int | None:
    """The longest block of a group-wise format that crosses no border of groups."""
    for unit in reversed(GROUP_SIZES):
        if inputs % unit == 0 and (group_size % unit == 0 or group_size >= inputs):
            return unit
    return None


def _dtypes_of(part: str) -> tuple[str, ...]:
    """The types that a part may have."""
    if "scale" in part:
        return _FLOATS
    if part == "weight":
        return ("I8",)
    return {
        "weight_zero_point": ("I32", "I8"),
        "weight_shape": ("I64", "I32"),
        "g_idx": ("I32", "I64"),
        "weight_g_idx": ("I32", "I64"),
    }.get(part, _WORDS)


def _array(tensor: HostTensor) -> Array:
    """A part as an array."""
    if tensor.format in _DTYPES:
        data = np.ascontiguousarray(tensor.data).reshape(-1)
        return data.view(_DTYPES[tensor.format]).reshape(tensor.shape)
    return dequantize(tensor)


def _words(array: Array) -> NDArray[np.int32]:
    return array.astype(np.int32, copy=False)
