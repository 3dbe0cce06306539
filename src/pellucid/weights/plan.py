"""The plan of loading: for each declared parameter, the tensors of the file that it is made from,
and the fold that makes it.

The tensors of each declared parameter must be in the file, with the shapes that the config implies.
A tensor of the file that no parameter uses is an error. So no tensor is guessed from its name and
none is dropped in silence. Building the plan needs only the file's table of contents. It reads no
weights, and the plan has the format and shape of every parameter.
"""

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import BinaryIO

from ..config import ModelConfig
from ..errors import FormatError, UnsupportedError
from ..formats import FORMATS
from ..formats.tensor import HostTensor, StoredMatrix, TensorSpec
from ..models.params import Param
from ..models.registry import get_graph
from .folds import Fold, InterleavedToHalfSplit
from .scratch import Scratch

__all__ = [
    "ParamSource",
    "Plan",
    "PlannedParam",
    "build_plan",
    "is_ignored",
    "read_plan",
    "stored_matrices",
]

Shape = tuple[int, ...]

# Buffers that old checkpoints hold beside the parameters: rotary frequencies, causal masks and
# their fill value. They are not read; the engine computes its own.
_IGNORED = re.compile(
    r"(.+\.)?(rotary_emb\.inv_freq|h\.\d+\.attn\.(bias|masked_bias)"
    r"|blk\.\d+\.attn_rot_embd(\.weight)?)"
)


@dataclass(frozen=True, slots=True)
class ParamSource:
    """The tensors of the file that make one parameter, by name: each with its required shape, in
    the order in which `fold` takes them. Without a fold there is one tensor, used unchanged.
    `packed`: the tensors are parts of a quantized matrix, and the fold checks their types.
    """

    tensors: Mapping[str, Shape]
    fold: Fold | None = None
    packed: bool = False


@dataclass(frozen=True, slots=True)
class PlannedParam:
    """A declared parameter: its canonical name, its source, and its format and shape."""

    name: str
    source: ParamSource
    spec: TensorSpec


Plan = list[PlannedParam]


def build_plan(
    config: ModelConfig,
    source_of: Callable[[ModelConfig, Param], ParamSource],
    tensors: Mapping[str, TensorSpec],
    where: str,
    formats: Collection[str] = FORMATS.keys(),
    ignored: Callable[[str], bool] = lambda name: False,
) -> Plan:
    """How each declared parameter is made from the `tensors` of a file. `where` names the file in
    messages; `formats` are the formats that can be read from such a file. `ignored` says whether a
    tensor that no parameter uses may be there.

    Raises FormatError if a tensor is missing, misshapen or unexpected, and UnsupportedError if its
    format cannot be used.
    """
    plan = []
    # check that the file has the tensors of each parameter
    for param in get_graph(config.graph).parameters(config):
        source = source_of(config, param)
        for name, shape in source.tensors.items():
            _check_tensor(config, param, tensors, name, shape, where)
            if not source.packed and tensors[name].format not in formats:
                raise UnsupportedError(
                    f"{where}: tensor {name!r} is of type {tensors[name].format}; those that can "
                    f"be read are {', '.join(formats)}"
                )
        # ask the fold for the format and shape of the result
        specs = [tensors[name] for name in source.tensors]
        try:
            spec = specs[0] if source.fold is None else source.fold.spec(*specs)
        except UnsupportedError as error:
            names = ", ".join(source.tensors)
            raise UnsupportedError(f"{where}: tensor {names!r}: {error}") from error
        assert spec.shape == param.shape, (param, spec)
        plan.append(PlannedParam(param.name, source, spec))
    # refuse tensors that no parameter uses
    used = {name for planned in plan for name in planned.source.tensors}
    extra = [n for n in tensors if n not in used and not is_ignored(n) and not ignored(n)]
    if extra:
        others = f" and {len(extra) - 1} more" if len(extra) > 1 else ""
        raise FormatError(
            f"{where} holds the tensor {extra[0]!r}{others}, which {config.architecture} with "
            "this config does not have"
        )
    return plan


def read_plan(
    plan: Plan, tensor: Callable[[str, Scratch], HostTensor]
) -> Iterator[tuple[str, HostTensor]]:
    """Carry out the plan, one parameter at a time: canonical name and tensor. A tensor that the
    next parameter needs too is kept for it, so that a fused matrix is read once. Nothing else is
    kept.
    """
    scratch = Scratch()
    kept: dict[str, HostTensor] = {}
    for planned, following in zip(plan, [*plan[1:], None], strict=True):
        wanted = following.source.tensors if following is not None else {}
        parameter, kept = _read_parameter(planned.source, tensor, scratch, kept, wanted)
        yield planned.name, parameter
        del parameter


def stored_matrices(
    plan: Plan, place: Callable[[str], tuple[BinaryIO, int, str]]
) -> dict[str, StoredMatrix]:
    """The parameters of the plan that a backend can read from their files by itself."""
    found = {}
    for planned in plan:
        fold, spec = planned.source.fold, planned.spec
        if len(spec.shape) == 2 and (fold is None or isinstance(fold, InterleavedToHalfSplit)):
            heads = 0 if fold is None else fold.num_heads
            (name,) = planned.source.tensors
            found[planned.name] = StoredMatrix(spec, *place(name), heads)
    return found


def _read_parameter(
    source: ParamSource,
    tensor: Callable[[str, Scratch], HostTensor],
    scratch: Scratch,
    kept: Mapping[str, HostTensor],
    wanted: Collection[str],
) -> tuple[HostTensor, dict[str, HostTensor]]:
    """The parameter, from the `kept` tensors and the file; and those of its tensors that are
    `wanted` next.
    """
    sources = {n: kept[n] if n in kept else tensor(n, scratch) for n in source.tensors}
    tensors = list(sources.values())
    parameter = tensors[0] if source.fold is None else source.fold(*tensors)
    return parameter, {name: sources[name] for name in sources if name in wanted}


def is_ignored(name: str) -> bool:
    """Whether a tensor that no parameter uses may be ignored."""
    return _IGNORED.fullmatch(name) is not None


def _check_tensor(
    config: ModelConfig,
    param: Param,
    tensors: Mapping[str, TensorSpec],
    name: str,
    shape: Shape,
    where: str,
) -> None:
    """Check that the file has one tensor that `param` needs, with the right shape."""
    if name not in tensors:
        raise FormatError(
            f"{where} lacks the tensor {name!r} (parameter {param.name} of {config.architecture})"
        )
    if tensors[name].shape != shape:
        raise FormatError(
            f"{where}: tensor {name!r} has shape {list(tensors[name].shape)}; its config implies "
            f"{list(shape)}"
        )
