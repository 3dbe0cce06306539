"""Chooses the formats of all tensors by measured damage, within a number of bytes.

`damage.py` measures what each format costs each tensor, and `allocate.py` finds the choice with the
least sum. A mixture such as q4_k_m does the same by rules of thumb, which were made for large
models: on a model whose rows do not hold 256 values, fallbacks take most of its bytes.

The result is a list of rules, as a type map has them, so that it can be written down and used
again.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..errors import ConfigError
from ..formats import get_format, packed_bytes
from ..formats.tensor import TensorSpec
from .allocate import Option, allocate
from .damage import DamageMeter
from .error_feedback import Search
from .source import Source
from .tape import Floats
from .type_map import DENSE, FILE_TYPES, FileType, Rule, check_rule, fits, is_quantizable

__all__ = ["AutoTypes", "Budget", "choose_types", "find_candidates", "plan_budget"]

# the formats that are tried: each has its use for some width and some number of bits
BLOCK_FORMATS = (
    *("Q2_K", "Q3_K", "IQ4_XS", "Q4_K", "Q5_K", "Q6_K"),
    *("Q4_0", "IQ4_NL", "Q4_1", "Q5_0", "Q5_1", "Q8_0"),
)
MAX_WINDOWS = 16  # of text, on which damages are measured


@dataclass(frozen=True, slots=True)
class Budget:
    """How many bytes the tensors may take, and what may be chosen for each."""

    num_bytes: int
    candidates: Mapping[str, tuple[str, ...]]  # formats by tensor; all tensors of the file


@dataclass(frozen=True, slots=True)
class AutoTypes:
    """The choice."""

    file_type: FileType
    rules: tuple[Rule, ...]  # one for each tensor that may change
    importance: dict[str, Floats]  # mean squares of the columns of each matrix, by tensor
    damage: float  # its estimate: KL divergence from the source, nats per token


def find_candidates(source: Source, rules: Sequence[Rule]) -> dict[str, tuple[str, ...]]:
    """The formats that each tensor may get. A rule leaves one; so does a tensor that must not be
    quantized.
    """
    candidates: dict[str, tuple[str, ...]] = {}
    for name, spec in source.specs.items():
        rule = next((rule for rule in rules if rule.pattern.search(name)), None)
        if not is_quantizable(name, spec.shape):
            candidates[name] = (spec.format,)
        elif rule is not None:
            candidates[name] = (check_rule(rule, name, spec.shape[-1]),)
        else:
            own = () if spec.format in BLOCK_FORMATS else (spec.format,)
            half = ("F16",) if spec.format == "F32" else ()
            blocks = tuple(f for f in BLOCK_FORMATS if fits(f, spec.shape[-1]))
            candidates[name] = (*blocks, *half, *own)
    return candidates


def plan_budget(
    source: Source,
    num_bytes: int,
    what: str,
    rules: Sequence[Rule] = (),
    *,
    allow_requantize: bool = False,
) -> Budget:
    """Check that a file of `num_bytes` is possible. `what` names the option that asks for it, and
    begins the message of errors.
    """
    candidates = find_candidates(source, rules)
    weights = sum(math.prod(spec.shape) for spec in source.specs.values())
    least = sum(min(_sizes(source, name, formats)) for name, formats in candidates.items())
    most = sum(packed_bytes(spec) for spec in source.specs.values())
    free = {n: f for n, f in candidates.items() if len(f) > 1}
    if not any(get_format(f).block_size > 1 for formats in free.values() for f in formats):
        raise ConfigError(
            f"{what}: {source.path} has no tensor whose format can be chosen; rows must hold a "
            "multiple of 32 values, and the type map must leave them free"
        )
    for name in free:
        format = source.specs[name].format
        if format not in DENSE and not allow_requantize:
            raise ConfigError(
                f"{source.path} is quantized already: tensor {name!r} is {format}, and another "
                "format would add to its error; --allow-requantize permits it"
            )
    if num_bytes < least:
        smallest = math.ceil(800 * least / weights) / 100
        raise ConfigError(f"{what}; the smallest file of {source.path} has {smallest:.2f}")
    if num_bytes > most:
        largest = math.floor(800 * most / weights) / 100
        raise ConfigError(
            f"{what}; {source.path} itself has {largest:.2f}, and a larger file would gain nothing"
        )
    return Budget(num_bytes, candidates)


def choose_types(
    source: Source,
    budget: Budget,
    windows: NDArray[np.int32],
    search: Search,
    *,
    on_layer: Callable[[], object] = lambda: None,
) -> AutoTypes:
    """Measure damages on some of the windows [W, n], and choose. `search` is the formats' own
    encoder. `on_layer` is called after each layer.
    """
    # windows from all parts of the text
    count = min(MAX_WINDOWS, len(windows))
    places = np.linspace(0, len(windows) - 1, count).astype(np.int64)
    free = {name: formats for name, formats in budget.candidates.items() if len(formats) > 1}
    meter = DamageMeter(source, windows[places], free, search)
    damages = meter.run(on_layer)
    # a tensor that nothing reads costs nothing in any format
    names = list(budget.candidates)
    options = [
        [
            Option(size, damages.get(name, {}).get(format, 0.0))
            for format, size in zip(
                budget.candidates[name], _sizes(source, name, budget.candidates[name]), strict=True
            )
        ]
        for name in names
    ]
    chosen = allocate(options, budget.num_bytes)
    formats = {n: budget.candidates[n][i] for n, i in zip(names, chosen, strict=True)}
    rules = tuple(
        Rule(re.compile(f"^{re.escape(name)}$"), formats[name])
        for name in names
        if is_quantizable(name, source.specs[name].shape)
    )
    damage = sum(o[i].damage for o, i in zip(options, chosen, strict=True))
    return AutoTypes(_file_type(source, formats), rules, meter.importance, damage)


def _sizes(source: Source, name: str, formats: Sequence[str]) -> list[int]:
    shape = source.specs[name].shape
    return [packed_bytes(TensorSpec(format, shape)) for format in formats]


def _file_type(source: Source, formats: Mapping[str, str]) -> FileType:
    """The type that a file is said to have: the one of the format of most weights."""
    counted: Counter[str] = Counter()
    for name, format in formats.items():
        counted[format] += math.prod(source.specs[name].shape)
    base = counted.most_common(1)[0][0]
    number = next(t.number for t in FILE_TYPES.values() if t.base == base)
    return FileType("auto", base, number)
