"""How folders of other programs store a quantized matrix: its tensors, and what config.json says.

    GPTQ                 NAME.qweight .qzeros .scales .g_idx   AutoGPTQ, GPTQModel, vLLM
    AWQ                  NAME.qweight .qzeros .scales          AutoAWQ's `gemm`
    pack-quantized       NAME.weight_packed .weight_scale      compressed-tensors, W4A16 and W8A16
                         .weight_shape
    int-quantized        NAME.weight .weight_scale             compressed-tensors, W8A8

A layout knows no model. `formats/packing.py` has the words, `weights/packed.py` reads them.
Matrices are [out, in]; there are `groups` scales in a row.
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ..formats.packing import (
    awq_words,
    compressed_width,
    compressed_words,
    gptq_words,
    gptq_zero_words,
)
from ..formats.tensor import TensorSpec
from .gptq import GroupedCodes

__all__ = ["AWQ", "GPTQ", "IntQuantized", "Layout", "PackQuantized", "Parts", "Specs"]

Specs: TypeAlias = dict[str, TensorSpec]  # of the parts of a matrix, by the part's name
Parts: TypeAlias = dict[str, NDArray[Any]]
# module -> inputs per scale, None: a row has one; and the modules that stay as they are
GroupSizes: TypeAlias = Mapping[str, int | None]

# modules that vLLM joins into one, by the modules that it joins
_FUSED = {("q_proj", "k_proj", "v_proj"): "qkv_proj", ("gate_proj", "up_proj"): "gate_up_proj"}


class Layout(Protocol):
    """A layout, with the bits of its codes and the inputs per scale (None: a row has one scale)."""

    @property
    def bits(self) -> int: ...

    @property
    def group_size(self) -> int | None: ...

    @property
    def mixes_group_sizes(self) -> bool:
        """Whether config.json can give some modules another group size."""
        ...

    @property
    def takes_conv1d(self) -> bool:
        """Whether readers know GPT-2's linear layers, which are stored as [in, out]."""
        ...

    @property
    def moves_scales(self) -> bool:
        """Whether its methods move scales of activations into norms and other weights."""
        ...

    def problem(self, outputs: int, inputs: int) -> str | None:
        """Why a matrix of this size cannot be stored; None if it can."""
        ...

    def specs(self, outputs: int, inputs: int, groups: int) -> Specs:
        """The parts of a matrix."""
        ...

    def parts(self, codes: GroupedCodes) -> Parts:
        """The same with their numbers."""
        ...

    def config(self, group_sizes: GroupSizes, left_out: Collection[str]) -> dict[str, Any]:
        """`quantization_config` of config.json. `group_sizes` are those of all quantized modules;
        the modules `left_out` are not quantized, though they are linear layers.
        """
        ...


@dataclass(frozen=True, slots=True)
class GPTQ:
    """AutoGPTQ's layout, which GPTQModel calls `gptq`; `gptq_v2` if it is not symmetric.

    The first format stores zero points minus one, so it cannot hold a zero point of 0. Those of
    symmetric matrices are all in the middle, and every reader knows the first format. So it is used
    for these, and the second one for all others.

    Groups are those of the stored order, so no kernel has to permute its inputs: `act_order` says
    only in which order columns were rounded (AutoGPTQ's `static_groups`).
    """

    bits: int
    group_size: int | None
    symmetric: bool = True
    act_order: bool = False
    mixes_group_sizes = True
    takes_conv1d = True
    moves_scales = False

    def problem(self, outputs: int, inputs: int) -> str | None:
        return _words_problem(self.bits, outputs=outputs, inputs=inputs)

    def specs(self, outputs: int, inputs: int, groups: int) -> Specs:
        return {
            "qweight": TensorSpec("I32", (inputs * self.bits // 32, outputs)),
            "qzeros": TensorSpec("I32", (groups, outputs * self.bits // 32)),
            "scales": TensorSpec("F16", (groups, outputs)),
            "g_idx": TensorSpec("I32", (inputs,)),
        }

    def parts(self, codes: GroupedCodes) -> Parts:
        return {
            "qweight": gptq_words(codes.codes, self.bits),
            "qzeros": gptq_zero_words(codes.zeros, self.bits, minus_one=self.symmetric),
            "scales": codes.scales.T.astype(np.float16),
            "g_idx": codes.group_of,
        }

    def config(self, group_sizes: GroupSizes, left_out: Collection[str]) -> dict[str, Any]:
        dynamic: dict[str, Any] = {f"-:{_pattern(names)}": {} for names in [left_out] if names}
        for size, modules in _by_size(group_sizes).items():
            if size != self.group_size:
                dynamic[f"+:{_pattern(modules)}"] = {"group_size": size or -1}
        format = "gptq" if self.symmetric else "gptq_v2"
        config: dict[str, Any] = {
            "quant_method": "gptq",
            "checkpoint_format": format,
            "bits": self.bits,
            "group_size": self.group_size or -1,
            "sym": self.symmetric,
            "desc_act": False,
            "static_groups": self.act_order,
            "damp_percent": 0.01,
            "true_sequential": True,
            "lm_head": False,
            "pack_dtype": "int32",
        }
        return config | ({"dynamic": dynamic} if dynamic else {})


@dataclass(frozen=True, slots=True)
class AWQ:
    """AutoAWQ's `gemm`: 4 bits with zero points, and one group size for all modules."""

    group_size: int | None
    bits = 4
    mixes_group_sizes = False
    takes_conv1d = False
    moves_scales = True

    def problem(self, outputs: int, inputs: int) -> str | None:
        return _words_problem(4, outputs=outputs)

    def specs(self, outputs: int, inputs: int, groups: int) -> Specs:
        return {
            "qweight": TensorSpec("I32", (inputs, outputs // 8)),
            "qzeros": TensorSpec("I32", (groups, outputs // 8)),
            "scales": TensorSpec("F16", (groups, outputs)),
        }

    def parts(self, codes: GroupedCodes) -> Parts:
        return {
            "qweight": awq_words(codes.codes),
            "qzeros": awq_words(codes.zeros),
            "scales": codes.scales.T.astype(np.float16),
        }

    def config(self, group_sizes: GroupSizes, left_out: Collection[str]) -> dict[str, Any]:
        (size,) = {*group_sizes.values()}
        return {
            "quant_method": "awq",
            "version": "gemm",
            "bits": 4,
            "group_size": size or -1,
            "zero_point": True,
            "modules_to_not_convert": sorted(left_out) or None,
        }


@dataclass(frozen=True, slots=True)
class PackQuantized:
    """compressed-tensors' `pack-quantized`: symmetric codes in words, activations as they are."""

    bits: int
    group_size: int | None
    act_order: bool = False
    mixes_group_sizes = True
    takes_conv1d = False
    moves_scales = False

    def problem(self, outputs: int, inputs: int) -> str | None:
        return None

    def specs(self, outputs: int, inputs: int, groups: int) -> Specs:
        return {
            "weight_packed": TensorSpec("I32", (outputs, compressed_width(inputs, self.bits))),
            "weight_scale": TensorSpec("F16", (outputs, groups)),
            "weight_shape": TensorSpec("I64", (2,)),
        }

    def parts(self, codes: GroupedCodes) -> Parts:
        return {
            "weight_packed": compressed_words(codes.codes, self.bits),
            "weight_scale": codes.scales.astype(np.float16),
            "weight_shape": np.array(codes.codes.shape, "<i8"),
        }

    def config(self, group_sizes: GroupSizes, left_out: Collection[str]) -> dict[str, Any]:
        order = "static" if self.act_order else None
        return _compressed("pack-quantized", self.bits, group_sizes, left_out, order, None)


@dataclass(frozen=True, slots=True)
class IntQuantized:
    """compressed-tensors' `int-quantized`, W8A8: int8 with a scale per row, and activations in int8
    with a scale per token.
    """

    bits = 8
    group_size = None
    mixes_group_sizes = True
    takes_conv1d = False
    moves_scales = True

    def problem(self, outputs: int, inputs: int) -> str | None:
        return None

    def specs(self, outputs: int, inputs: int, groups: int) -> Specs:
        return {
            "weight": TensorSpec("I8", (outputs, inputs)),
            "weight_scale": TensorSpec("F16", (outputs, 1)),
        }

    def parts(self, codes: GroupedCodes) -> Parts:
        return {
            "weight": (codes.codes ^ np.uint8(0x80)).view(np.int8),
            "weight_scale": codes.scales.astype(np.float16),
        }

    def config(self, group_sizes: GroupSizes, left_out: Collection[str]) -> dict[str, Any]:
        inputs = {
            "num_bits": 8,
            "type": "int",
            "symmetric": True,
            "strategy": "token",
            "dynamic": True,
        }
        return _compressed("int-quantized", 8, group_sizes, left_out, None, inputs)


def _compressed(
    format: str,
    bits: int,
    group_sizes: GroupSizes,
    left_out: Collection[str],
    order: str | None,
    inputs: dict[str, Any] | None,
) -> dict[str, Any]:
    """The config of compressed-tensors, with one group of modules for each group size."""
    sizes = _by_size(group_sizes)
    groups = {}
    for number, (size, modules) in enumerate(sizes.items()):
        groups[f"group_{number}"] = {
            "targets": ["Linear"] if len(sizes) == 1 else [f"re:{_pattern(modules)}"],
            "weights": {
                "num_bits": bits,
                "type": "int",
                "symmetric": True,
                "strategy": "channel" if size is None else "group",
                "group_size": size,
                "dynamic": False,
                "actorder": order,
                "observer": "minmax",
                "block_structure": None,
            },
            "input_activations": inputs,
            "output_activations": None,
            "format": format,
        }
    return {
        "quant_method": "compressed-tensors",
        "format": format,
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": ["lm_head", *sorted(left_out)],
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def _by_size(group_sizes: GroupSizes) -> dict[int | None, list[str]]:
    """The modules of each group size, the most frequent size first."""
    found: dict[int | None, list[str]] = {}
    for module, size in group_sizes.items():
        found.setdefault(size, []).append(module)
    return dict(sorted(found.items(), key=lambda item: -len(item[1])))


def _pattern(modules: Collection[str]) -> str:
    """A regular expression that matches these modules: by the last two parts of their names, which
    have one size in all layers. vLLM joins some modules, and looks for the name of the joined one.
    """
    names = list(dict.fromkeys(".".join(module.split(".")[-2:]) for module in modules))
    for parent in dict.fromkeys(name.partition(".")[0] for name in names):
        for parts, joined in _FUSED.items():
            if {f"{parent}.{part}" for part in parts} <= set(names):
                names.append(f"{parent}.{joined}")
    return rf".*\.(?:{'|'.join(map(re.escape, names))})$"


def _words_problem(bits: int, **sizes: int) -> str | None:
    """Why codes of `bits` along these axes do not fill whole words of 32 bits; None if they do."""
    for what, size in sizes.items():
        if size * bits % 32:
            return f"{size} {what} of {bits} bits do not fill whole words of 32 bits"
    return None
