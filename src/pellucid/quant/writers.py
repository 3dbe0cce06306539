"""Writes folders of quantized models in the layouts of other programs (`layouts.py`).

`plan_folder` decides for every linear layer which group size it gets, and refuses what cannot be
done, before anything is computed. A method then yields a `Replacement` for each parameter that
changes, in any order, and `write_folder` writes each tensor when all of its parts are there. All
other tensors and the small files follow. Methods know canonical names alone; names, fused and
transposed matrices of the folder are added here.

The memory needed is that of the method, and of one tensor. Sizes are in bytes.
"""

from collections import Counter
from collections.abc import Generator, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import ConfigError, UnsupportedError
from ..formats import packed_bytes
from ..formats.tensor import TensorSpec
from ..weights.folder_writer import FolderWriter, check_target, tensor_bytes
from .calibrate import Floats
from .folder_model import DENSE, FolderModel
from .gptq import GroupedCodes
from .layouts import Layout
from .migration import find_migrations

__all__ = [
    "FolderPlan",
    "FolderReport",
    "Replacement",
    "plan_folder",
    "relative_error",
    "write_folder",
]

FALLBACK_SIZES = (128, 64, 32)  # of groups, where the one that is wanted does not divide the inputs


@dataclass(frozen=True, slots=True)
class Replacement:
    """What becomes of a parameter: integers, or other values (a norm that scales were moved into).
    `error` as in `FolderReport`.
    """

    name: str  # canonical
    value: GroupedCodes | Floats
    error: float | None = None


@dataclass(frozen=True, slots=True)
class FolderPlan:
    """What will be written. Parameters by canonical names, tensors by those of the folder."""

    layout: Layout
    # inputs per scale of each parameter that becomes integers; None: a row has one scale
    group_sizes: Mapping[str, int | None]
    quantized: Mapping[str, int | None]  # the same for the folder's tensors
    left_out: tuple[str, ...]  # tensors of linear layers that cannot be quantized
    moved: frozenset[str]  # parameters that scales are moved into (`migration.py`)
    before: Mapping[str, TensorSpec]  # all tensors, with their formats in the source
    after: Mapping[str, dict[str, TensorSpec]]  # what each becomes: parts by their full names
    notes: tuple[str, ...]  # sentences on exceptions

    @property
    def specs(self) -> dict[str, TensorSpec]:
        """All tensors of the folder."""
        return {name: spec for parts in self.after.values() for name, spec in parts.items()}

    @property
    def num_bytes(self) -> int:
        """Of all tensors, without the small files."""
        return sum(map(tensor_bytes, self.specs.values()))

    @property
    def source_bytes(self) -> int:
        return sum(map(packed_bytes, self.before.values()))

    @property
    def num_weights(self) -> int:
        return sum(int(np.prod(spec.shape)) for spec in self.before.values())

    def config(self) -> dict[str, Any]:
        """`quantization_config` of config.json."""
        sizes = {_module(name): size for name, size in self.quantized.items()}
        return self.layout.config(sizes, [_module(name) for name in self.left_out])


@dataclass(frozen=True, slots=True)
class FolderReport:
    """A tensor that was written. `error` is the root of its mean squared error, relative to the
    root mean square of its values; None: it was copied, or not measured.
    """

    name: str
    before: TensorSpec
    format: str
    num_bytes: int
    error: float | None


def plan_folder(
    model: FolderModel, layout: Layout, *, allow_requantize: bool = False
) -> FolderPlan:
    """Which tensors become integers, in which groups. Raises ConfigError if the model is quantized
    already, and UnsupportedError if the layout can hold none of its matrices.
    """
    matrices = _matrices(model, layout, allow_requantize)
    # the group size of each matrix, or the reason for which it stays as it is
    sizes: dict[str, int | None] = {}
    problems: dict[str, str] = {}
    for name, (outputs, inputs) in matrices.items():
        problem = layout.problem(outputs, inputs)
        size = _group_size(layout.group_size, inputs)
        if problem is None and size == 0:
            problem = f"groups of {FALLBACK_SIZES[-1]} do not divide {inputs} inputs"
        if problem is None:
            sizes[name] = size
        else:
            problems[name] = problem
    if not sizes:
        problem = next(iter(problems.values()), "it has no linear layers")
        raise UnsupportedError(f"no matrix of {model.checkpoint.path} can be quantized: {problem}")
    if not layout.mixes_group_sizes:
        smallest = min((size for size in sizes.values() if size is not None), default=None)
        sizes = dict.fromkeys(sizes, smallest)
    group_sizes = {p: s for n, s in sizes.items() for p in model.tensors[n].parameters}
    moved = _moved(model, group_sizes) if layout.moves_scales else frozenset[str]()
    # what each tensor becomes
    after = {}
    for name, tensor in model.tensors.items():
        if name not in sizes:
            spec = model.spec(name)
            # a scale may be large, and bfloat16 has 8 bits: vectors are kept in full
            if len(spec.shape) == 1 and not moved.isdisjoint(tensor.parameters):
                spec = TensorSpec("F32", spec.shape)
            after[name] = {name: spec}
            continue
        outputs, inputs = matrices[name]
        parts = layout.specs(outputs, inputs, inputs // (sizes[name] or inputs))
        after[name] = {f"{_module(name)}.{part}": spec for part, spec in parts.items()}
    return FolderPlan(
        layout=layout,
        group_sizes=group_sizes,
        quantized=sizes,
        left_out=tuple(problems),
        moved=moved,
        before={n: TensorSpec(model.source_format(n), t.shape) for n, t in model.tensors.items()},
        after=after,
        notes=(*_size_notes(layout, matrices, sizes), *_problem_notes(problems)),
    )


def write_folder(
    model: FolderModel, out: Path, plan: FolderPlan, replacements: Iterable[Replacement]
) -> Generator[FolderReport, None, None]:
    """Write the folder `out`, and yield each tensor after it is written; the folder is there when
    the iteration has ended, and nothing is left if it is broken off. Raises ConfigError if the
    folder cannot be written.
    """
    check_target(out, plan.num_bytes)
    files = model.files(plan.config())
    tensor_of = {p: name for name, t in model.tensors.items() for p in t.parameters}
    with FolderWriter(out, plan.specs) as writer:
        waiting: dict[str, Replacement] = {}  # parts of matrices whose other parts are not there
        changed: dict[str, Floats] = {}
        done: set[str] = set()
        for found in replacements:
            if not isinstance(found.value, GroupedCodes):
                changed[found.name] = found.value
                continue
            waiting[found.name] = found
            name = tensor_of[found.name]
            parameters = model.tensors[name].parameters
            if all(parameter in waiting for parameter in parameters):
                parts = [waiting.pop(parameter) for parameter in parameters]
                _write_codes(writer, plan, name, parts)
                done.add(name)
                yield _report(plan, name, parts)
        # the other tensors
        for name in model.tensors:
            if name not in done:
                writer.write(name, model.dense(name, changed, plan.after[name][name].format))
                yield _report(plan, name, [])
        for file, data in files.items():
            writer.write_file(file, data)


def relative_error(values: Floats, exact: Floats) -> float:
    """The root of the mean squared error of `values`, relative to the root mean square of what they
    stand for.
    """
    size = float(np.linalg.norm(exact))
    return float(np.linalg.norm(values - exact)) / size if size else 0.0


def _matrices(
    model: FolderModel, layout: Layout, allow_requantize: bool
) -> dict[str, tuple[int, int]]:
    """Outputs and inputs of the linear layers, by the names of their tensors."""
    found = {}
    for name in model.tensors:
        shape = model.matrix_shape(name)
        if shape is None:
            continue
        if model.is_transposed(name) and not layout.takes_conv1d:
            raise UnsupportedError(
                f"{model.checkpoint.path}: {model.config.architecture} stores its linear layers "
                "transposed (Conv1D), which programs that read this type do not know; gptq types "
                "and those of GGUF files can be written"
            )
        format = model.source_format(name)
        if format not in DENSE and not allow_requantize:
            raise ConfigError(
                f"{model.checkpoint.path} is quantized already: tensor {name!r} is {format}, and "
                "quantizing it again adds to its error; --allow-requantize permits it"
            )
        found[name] = shape
    return found


def _moved(model: FolderModel, group_sizes: Mapping[str, int | None]) -> frozenset[str]:
    """The parameters that change when scales of activations are moved."""
    return frozenset(
        name
        for migration in find_migrations(model.params, model.params)
        if not group_sizes.keys().isdisjoint(migration.consumers)
        for name in (*migration.producers, *migration.consumers)
    )


def _group_size(wanted: int | None, inputs: int) -> int | None:
    """The largest group size that divides the inputs; 0 if there is none."""
    if wanted is None:
        return None
    sizes = (size for size in (wanted, *FALLBACK_SIZES) if size <= wanted)
    return next((size for size in sizes if inputs % size == 0), 0)


def _size_notes(
    layout: Layout, matrices: Mapping[str, tuple[int, int]], sizes: Mapping[str, int | None]
) -> list[str]:
    """Sentences on the matrices whose group size is not the one that is wanted."""
    counted = Counter(
        (matrices[name][1], size) for name, size in sizes.items() if size != layout.group_size
    )
    return [
        f"{count} of {len(matrices)} matrices have groups of {size}, because groups of "
        + (
            f"{layout.group_size} do not divide their {inputs} inputs"
            if layout.group_size is None or inputs % layout.group_size
            else f"{layout.group_size} do not divide the inputs of others, and all must be alike"
        )
        for (inputs, size), count in counted.items()
    ]


def _problem_notes(problems: Mapping[str, str]) -> list[str]:
    """Sentences on the matrices that are not quantized."""
    counted = Counter(problems.values())
    return [f"{count} matrices are not quantized: {problem}" for problem, count in counted.items()]


def _write_codes(
    writer: FolderWriter, plan: FolderPlan, name: str, parts: list[Replacement]
) -> None:
    """Write the tensors of a matrix, whose parameters lie one after another."""
    codes = [part.value for part in parts if isinstance(part.value, GroupedCodes)]
    whole = replace(
        codes[0],
        codes=np.concatenate([c.codes for c in codes]),
        scales=np.concatenate([c.scales for c in codes]),
        zeros=np.concatenate([c.zeros for c in codes]),
    )
    arrays: dict[str, NDArray[Any]] = plan.layout.parts(whole)
    for part, array in arrays.items():
        writer.write(f"{_module(name)}.{part}", array)


def _report(plan: FolderPlan, name: str, parts: list[Replacement]) -> FolderReport:
    before, specs = plan.before[name], plan.after[name]
    format = next(iter(specs.values())).format
    error = None
    if parts:
        size = plan.quantized[name]
        format = f"INT{plan.layout.bits} {'rows' if size is None else f'g{size}'}"
        errors = [part.error for part in parts if part.error is not None]
        error = float(np.sqrt(np.mean(np.square(errors)))) if errors else None
    return FolderReport(name, before, format, sum(map(tensor_bytes, specs.values())), error)


def _module(name: str) -> str:
    return name.removesuffix(".weight")
