"""`quantization_config` of a config.json: how the weights of a Hugging Face folder are quantized.

GPTQ (`gptq`, `gptq_v2`), AWQ (`gemm`) and compressed-tensors (`pack-quantized`, `int-quantized`)
can be read. Any other method, and any option of these that changes the meaning of the weights, is
refused in one sentence. Other fields, such as those that tell how the weights were made, have no
effect, as in transformers.

The file's tensors say which modules are quantized, so lists of modules (`ignore`, `targets`,
`modules_to_not_convert`, `dynamic`) are not evaluated: they hold regular expressions.

References: AutoGPTQ and GPTQModel `quantization/config.py`, AutoAWQ `models/_config.py`,
compressed-tensors `quantization/quant_args.py`.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from ..errors import UnsupportedError
from .fields import Fields

__all__ = ["BITS", "Method", "Quantization", "read_quantization"]

Method = Literal["gptq", "awq", "compressed-tensors"]
BITS = (2, 3, 4, 8)
# of config_groups.*.weights and .input_activations in compressed-tensors
_ARGUMENTS = {
    "num_bits",
    "type",
    "symmetric",
    "group_size",
    "strategy",
    "block_structure",
    "dynamic",
    "actorder",
    "observer",
    "observer_kwargs",
    "scale_dtype",
    "zp_dtype",
}
_MAX_GROUPS = 64


@dataclass(frozen=True, slots=True)
class Quantization:
    """How a folder's quantized matrices are stored."""

    method: Method
    bits: frozenset[int]  # of codes; several if groups of modules differ
    group_size: int | None  # inputs per scale; None: a row has one, or the tensors say it
    symmetric: bool  # whether zero points are all 2^(bits - 1)
    desc_act: bool  # whether inputs may be sorted into groups: g_idx
    zeros_minus_one: bool = False  # GPTQ's first format stores zero points minus one
    overrides: bool = False  # whether some modules differ in bits or group size (`dynamic`)
    # W8A8: activations are quantized as they come, with one scale per token
    int8_activations: bool = False


def read_quantization(values: Mapping[str, object], where: str) -> Quantization | None:
    """The quantization that config.json's `values` describe, or None. `where` names the file.

    Raises UnsupportedError for a method or an option that cannot be read, and FormatError for a
    value of the wrong type.
    """
    fields = Fields(where, values)
    if (mlx := fields.section("quantization")) is not None and mlx.has("group_size"):
        raise UnsupportedError(
            f"{where}: weights are quantized by MLX ({mlx.integer('bits', 4)} bits), which is not "
            "supported; the model's original folder or a GGUF file of it can be read"
        )
    section = fields.section("quantization_config")
    if section is None:
        return None
    method = section.text("quant_method", "an unnamed method")
    readers = {"gptq": _gptq, "awq": _awq, "compressed-tensors": _compressed}
    if method not in readers:
        raise UnsupportedError(
            f"{where}: weights are quantized by {method!r}, which is not supported; methods that "
            f"are: {', '.join(readers)}"
        )
    return readers[method](section)


def _gptq(fields: Fields) -> Quantization:
    """AutoGPTQ's and GPTQModel's fields. GPTQModel writes the format as `format` too."""
    format = fields.text("checkpoint_format", fields.text("format", "gptq"))
    if fields.flag("is_marlin_format", False):
        format = "marlin"
    _check_one_of(fields, "checkpoint_format", format, ("gptq", "gptq_v2"))
    _check_one_of(fields, "pack_dtype", fields.text("pack_dtype", "int32"), ("int32",))
    overrides = fields.section("dynamic") is not None
    return Quantization(
        "gptq",
        frozenset(BITS) if overrides else frozenset([_bits(fields, "bits", BITS)]),
        _group_size(fields),
        symmetric=fields.flag("sym", True),
        desc_act=fields.flag("desc_act", False),
        zeros_minus_one=format == "gptq",
        overrides=overrides,
    )


def _awq(fields: Fields) -> Quantization:
    """AutoAWQ's fields; older folders say `w_bit`, `q_group_size` and `version`."""
    version = fields.text("version", fields.text("format", "gemm")).lower()
    if fields.optional_text("backend") == "llm-awq":
        version = "llm-awq"
    _check_one_of(fields, "version", version, ("gemm",))
    fields.flag("zero_point", True)  # its type: zeros are read where the file has them
    _check_names(fields, "modules_to_not_convert")
    return Quantization(
        "awq",
        frozenset([_bits(fields, "w_bit" if fields.has("w_bit") else "bits", (4,))]),
        _group_size(fields, "q_group_size" if fields.has("q_group_size") else "group_size"),
        symmetric=False,
        desc_act=False,
    )


def _compressed(fields: Fields) -> Quantization:
    """The fields of compressed-tensors, whose groups of modules may differ in bits."""
    formats = ("pack-quantized", "int-quantized", "naive-quantized", "mixed-precision")
    _check_one_of(fields, "format", fields.text("format", "pack-quantized"), formats)
    for name in ("kv_cache_scheme", "transform_config"):
        if fields.value(name):
            raise UnsupportedError(f"{fields.where}: {name} is set, which is not supported")
    sparsity = fields.section("sparsity_config")
    if sparsity is not None:
        _check_one_of(sparsity, "format", sparsity.text("format", "dense"), ("dense",))
    # the groups of modules
    _check_names(fields, "ignore")
    groups = fields.section("config_groups")
    names = [] if groups is None else groups.unread()
    if groups is None or not 1 <= len(names) <= _MAX_GROUPS:
        raise fields.error(
            "config_groups", f"missing, or not an object of 1 to {_MAX_GROUPS} groups"
        )
    bits, orders, activations = set(), set(), set()
    sizes: set[int | None] = set()
    symmetric = set()
    for name in names:
        group = groups.section(name)
        weights = None if group is None else group.section("weights")
        if group is None or weights is None:
            raise groups.error(name, "a group without weights")
        if group.optional_text("format") is not None:
            _check_one_of(group, "format", group.text("format"), formats[:3])
        _check_names(group, "targets")
        if group.value("output_activations") is not None:
            raise UnsupportedError(f"{group.where}: output_activations are not supported")
        bits.add(_check_weights(weights))
        sizes.add(_group_size(weights) if weights.value("group_size") is not None else None)
        symmetric.add(weights.flag("symmetric", True))
        orders.add(weights.value("actorder") in ("group", "dynamic", True))
        inputs = group.section("input_activations")
        activations.add(inputs is not None and _are_int8_per_token(inputs))
    return Quantization(
        "compressed-tensors",
        frozenset(bits),
        min(sizes, key=lambda size: size or math.inf),
        symmetric=all(symmetric),
        desc_act=any(orders),
        overrides=True,
        int8_activations=all(activations),
    )


def _check_weights(weights: Fields) -> int:
    """The bits of a group's weights, whose other arguments are checked."""
    _check_arguments(weights)
    _check_one_of(weights, "type", weights.text("type", "int"), ("int",))
    strategies = ("group", "channel", "tensor")
    _check_one_of(weights, "strategy", weights.text("strategy", "tensor"), strategies)
    if weights.flag("dynamic", False):
        raise UnsupportedError(f"{weights.where}: dynamic weights are not supported")
    return _bits(weights, "num_bits", BITS)


def _are_int8_per_token(inputs: Fields) -> bool:
    """Whether activations are to be quantized to int8 with a scale per token. Fewer bits, floats
    and static scales are refused.
    """
    _check_arguments(inputs)
    _check_one_of(inputs, "type", inputs.text("type", "int"), ("int",))
    _bits(inputs, "num_bits", (8,))
    if not inputs.flag("dynamic", False):
        raise UnsupportedError(
            f"{inputs.where}: dynamic is false; activations can only be quantized as they come"
        )
    return inputs.text("strategy", "tensor") == "token" and inputs.flag("symmetric", True)


def _check_arguments(fields: Fields) -> None:
    unknown = sorted(set(fields.unread()) - _ARGUMENTS)
    if unknown:
        raise UnsupportedError(
            f"{fields.where}: the field {unknown[0][:60]!r} is not known; those that are: "
            f"{', '.join(sorted(_ARGUMENTS))}"
        )


def _bits(fields: Fields, name: str, allowed: tuple[int, ...]) -> int:
    bits = fields.integer(name)
    if bits not in allowed:
        raise UnsupportedError(
            f"{fields.where}: {name} is {bits}; it must be one of: {', '.join(map(str, allowed))}"
        )
    return bits


def _group_size(fields: Fields, name: str = "group_size") -> int | None:
    """Inputs per scale. -1, one group per row, becomes None."""
    size = fields.integer(name, 128)
    if size != -1 and size < 1:
        raise fields.error(name, f"{size}; it must be -1 or at least 1")
    return None if size == -1 else size


def _check_names(fields: Fields, name: str) -> None:
    """Check a list of modules. It is not used: a module is quantized if its tensors are packed."""
    value = fields.value(name)
    is_list = isinstance(value, list) and all(isinstance(entry, str) for entry in value)
    if value is not None and not is_list:
        raise fields.error(name, f"{value!r:.60}; it must be a list of strings")


def _check_one_of(fields: Fields, name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise UnsupportedError(
            f"{fields.where}: {name} is {value!r}, which is not supported; it must be one of: "
            f"{', '.join(allowed)}"
        )
