"""The types of folders that can be written, by name, and the methods that choose their integers.

    gptq-int{2,3,4,8}-g{32,64,128,-1}[-asym][-actorder]   GPTQ, or nearest values
    w4a16[-g{32,64,128,-1}]  w8a16[-g…]                   the same for compressed-tensors
    awq-int4-g{32,64,128}                                 AWQ, or nearest values
    int8                                                  nearest values, a scale per row
    w8a8                                                  SmoothQuant, or the same as int8, for
                                                          activations in int8

A method yields replacements in the order of the forward pass (`writers.py`). GPTQ's Hessians are
those behind everything that is quantized already, as in `sequential.py`.
"""

import difflib
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ..errors import ConfigError
from ..formats.finite import naming
from .awq import awq_layers
from .calibrate import Floats, Walk, mean_hessian
from .folder_model import FolderModel
from .gptq import GroupedCodes, gptq, round_to_nearest
from .layouts import AWQ, GPTQ, IntQuantized, Layout, PackQuantized
from .smoothquant import quantize_rows, smooth_layers
from .type_map import FILE_TYPES, FileType, find_file_type
from .writers import FolderPlan, Replacement, relative_error

__all__ = [
    "INT2",
    "FolderType",
    "Quantize",
    "Windows",
    "find_folder_type",
    "find_type",
    "folder_type_names",
    "quantize_rows",
]

Windows: TypeAlias = NDArray[np.int32]
# the model, the plan of the folder, the calibration text [W, n] or None -> the replacements
Quantize: TypeAlias = Callable[[FolderModel, FolderPlan, Windows | None], Iterator[Replacement]]

INT2 = "int2"  # q2_k with error feedback, without which it is not worth its name
NAMES = (
    "gptq-int{2,3,4,8}-g{32,64,128,-1}[-asym][-actorder]",
    "awq-int4-g{32,64,128}",
    "w4a16[-g…]",
    "w8a16[-g…]",
    "w8a8",
    "int8",
)
_GPTQ = re.compile(r"gptq-int([2348])-g(-1|32|64|128)(-asym)?(-actorder)?")
_AWQ = re.compile(r"awq-int4-g(32|64|128)")
_PACKED = re.compile(r"w([48])a16(?:-g(-1|32|64|128))?")


@dataclass(frozen=True, slots=True)
class FolderType:
    """A type of folders."""

    name: str
    layout: Layout
    quantize: Quantize  # without windows, each value becomes the nearest one
    # whether a calibration text is used; "optional": --method rtn needs none
    calibration: Literal["needed", "optional", "unused"]


def find_folder_type(name: str) -> FolderType | None:
    """The type called `name`, in any case; None if it is no type of folders."""
    name = name.lower()
    if found := _GPTQ.fullmatch(name):
        layout = GPTQ(
            int(found[1]), _size(found[2]), symmetric=not found[3], act_order=bool(found[4])
        )
        method = _by_gptq(layout.symmetric, layout.act_order)
        return FolderType(name, layout, method, "optional")
    if found := _PACKED.fullmatch(name):
        # llm-compressor's defaults: groups of 128 for 4 bits, rows for 8
        size = _size(found[2] or ("128" if found[1] == "4" else "-1"))
        packed = PackQuantized(int(found[1]), size, act_order=True)
        return FolderType(name, packed, _by_gptq(True, True), "optional")
    if found := _AWQ.fullmatch(name):
        return FolderType(name, AWQ(int(found[1])), _by_awq, "optional")
    if name == "w8a8":
        return FolderType(name, IntQuantized(), _by_smoothquant, "optional")
    if name == "int8":
        return FolderType(name, PackQuantized(8, None), _by_rows, "unused")
    return None


def find_type(name: str) -> FolderType | FileType:
    """The type of folders or of GGUF files called `name`, in any case. int2 is found as q2_k."""
    found = find_folder_type(name)
    if found is not None:
        return found
    if name.lower() == INT2:
        return FILE_TYPES["q2_k"]
    try:
        return find_file_type(name)
    except ConfigError:
        names = [*FILE_TYPES, INT2]
        near = difflib.get_close_matches(name.lower(), [*names, *folder_type_names()], n=1)
        guess = f" (did you mean {near[0]}?)" if near else ""
        raise ConfigError(
            f"type is {name[:80]!r}{guess}; there are {', '.join([*names, *NAMES])}"
        ) from None


def folder_type_names() -> list[str]:
    """Names of all types."""
    sizes = [f"g{size}" for size in (32, 64, 128, -1)]
    ends = ["", "-actorder", "-asym", "-asym-actorder"]
    names = [f"gptq-int{bits}-{size}{end}" for bits in "2348" for size in sizes for end in ends]
    names += [f"w{bits}a16{end}" for bits in "48" for end in ("", *(f"-{size}" for size in sizes))]
    names += [f"awq-int4-g{size}" for size in (32, 64, 128)]
    return [*names, "int8", "w8a8"]


def _size(text: str) -> int | None:
    return None if text == "-1" else int(text)


def _by_gptq(symmetric: bool, act_order: bool) -> Quantize:
    """GPTQ with a calibration text, the nearest values without one."""

    def quantize(
        model: FolderModel, plan: FolderPlan, windows: Windows | None
    ) -> Iterator[Replacement]:
        if windows is None:
            yield from _nearest(model, plan, symmetric)
            return
        walk = Walk(model.config, model.load, windows)
        for layer in range(model.config.num_layers):
            weights = walk.load_layer(layer)
            for group in walk.groups_of(layer, weights):
                names = [
                    name
                    for name in weights
                    if model.params[name].group == group and name in plan.group_sizes
                ]
                if not names:
                    continue
                # all weights of the group at once: they have one Hessian and one group size
                hessian = mean_hessian(walk, layer, weights, group)
                with naming(f"tensor {names[0]!r}"):
                    found = gptq(
                        np.concatenate([weights[name] for name in names]),
                        hessian,
                        bits=plan.layout.bits,
                        group_size=plan.group_sizes[names[0]],
                        symmetric=symmetric,
                        act_order=act_order,
                    )
                start = 0
                for name in names:
                    stop = start + len(weights[name])
                    codes = _rows(found, slice(start, stop))
                    start, values = stop, codes.values()
                    error = relative_error(values, weights[name])
                    weights[name] = values  # what later matrices see
                    yield Replacement(name, codes, error)
            walk.run_layer(layer, weights)

    return quantize


def _nearest(model: FolderModel, plan: FolderPlan, symmetric: bool) -> Iterator[Replacement]:
    """Each value becomes the nearest one of its group's grid."""
    for name, size in plan.group_sizes.items():
        weight = model.load([name])[name]
        with naming(f"tensor {name!r}"):
            codes = round_to_nearest(
                weight, bits=plan.layout.bits, group_size=size, symmetric=symmetric
            )
        yield Replacement(name, codes, relative_error(codes.values(), weight))


def _by_rows(
    model: FolderModel, plan: FolderPlan, windows: Windows | None
) -> Iterator[Replacement]:
    """Naive int8: row r becomes rint(row / s) with s = max |row| / 127."""
    for name in plan.group_sizes:
        weight = model.load([name])[name]
        with naming(f"tensor {name!r}"):
            codes = quantize_rows(weight)
        yield Replacement(name, codes, relative_error(codes.values(), weight))


def _by_awq(model: FolderModel, plan: FolderPlan, windows: Windows | None) -> Iterator[Replacement]:
    """AWQ with a calibration text, the nearest values without one."""
    if windows is None:
        yield from _nearest(model, plan, symmetric=False)
        return
    walk = Walk(model.config, model.load, windows)
    for layer in awq_layers(walk, plan.group_sizes):
        yield from _layer(layer.codes, layer.floats, plan)


def _by_smoothquant(
    model: FolderModel, plan: FolderPlan, windows: Windows | None
) -> Iterator[Replacement]:
    """SmoothQuant with a calibration text, the nearest values without one."""
    if windows is None:
        yield from _by_rows(model, plan, None)
        return
    walk = Walk(model.config, model.load, windows)
    for layer in smooth_layers(walk, list(plan.group_sizes)):
        yield from _layer(layer.codes, layer.floats, plan)


def _layer(
    codes: Mapping[str, GroupedCodes], floats: Mapping[str, Floats], plan: FolderPlan
) -> Iterator[Replacement]:
    """The parameters of a layer whose scales were moved. `floats` are all of them before rounding,
    so an error is that of the rounding alone.
    """
    for name, values in floats.items():
        if name in codes:
            yield Replacement(name, codes[name], relative_error(codes[name].values(), values))
        elif name in plan.moved:
            yield Replacement(name, values)


def _rows(whole: GroupedCodes, rows: slice) -> GroupedCodes:
    return replace(
        whole, codes=whole.codes[rows], scales=whole.scales[rows], zeros=whole.zeros[rows]
    )
