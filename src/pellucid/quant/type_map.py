"""Which tensor gets which format: llama.cpp's mixtures, by their names.

A type such as q4_k_m is a base format and some exceptions: tensors whose errors cost most get more
bits. These are the output, the values and outputs of attention, and ffn_down, in the first and last
layers more than in the middle. A format whose blocks do not fit a row's width is replaced by one of
smaller blocks. The result is llama-quantize's, tensor for tensor, for the architectures that run
here (llama_tensor_get_type_impl in src/llama-quant.cpp of llama.cpp).

Tensors have their names and shapes in GGUF files. This module reads no weights.
"""

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from ..errors import ConfigError, FormatError
from ..files import read_bytes
from ..formats import FORMATS, get_format
from ..formats.tensor import TensorSpec

__all__ = [
    "FILE_TYPES",
    "FileType",
    "ModelFacts",
    "Rule",
    "check_rule",
    "choose_formats",
    "find_file_type",
    "find_format",
    "fits",
    "in_file_order",
    "is_quantizable",
    "read_rules",
    "unused_rules",
]

DENSE = ("F32", "F16", "BF16")
# where a row's width is no multiple of 256
_SMALLER_BLOCKS = MappingProxyType(
    {
        "Q2_K": "Q4_0",
        "Q3_K": "Q4_0",
        "Q4_K": "Q5_0",
        "Q5_K": "Q5_1",
        "Q6_K": "Q8_0",
        "IQ4_XS": "IQ4_NL",
    }
)
MAX_RULES_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class FileType:
    """A type of a whole file: its name, the format of most tensors, its number in GGUF files."""

    name: str
    base: str
    number: int  # general.file_type


FILE_TYPES: Mapping[str, FileType] = MappingProxyType(
    {
        name: FileType(name, base, number)
        for name, base, number in (
            ("f32", "F32", 0),
            ("f16", "F16", 1),
            ("bf16", "BF16", 32),
            ("q8_0", "Q8_0", 7),
            ("q6_k", "Q6_K", 18),
            ("q5_k_m", "Q5_K", 17),
            ("q5_k_s", "Q5_K", 16),
            ("q5_1", "Q5_1", 9),
            ("q5_0", "Q5_0", 8),
            ("q4_k_m", "Q4_K", 15),
            ("q4_k_s", "Q4_K", 14),
            ("q4_1", "Q4_1", 3),
            ("q4_0", "Q4_0", 2),
            ("iq4_nl", "IQ4_NL", 25),
            ("iq4_xs", "IQ4_XS", 30),
            ("q3_k_l", "Q3_K", 13),
            ("q3_k_m", "Q3_K", 12),
            ("q3_k_s", "Q3_K", 11),
            ("q2_k", "Q2_K", 10),
        )
    }
)
_SHORT_NAMES = MappingProxyType({"q3_k": "q3_k_m", "q4_k": "q4_k_m", "q5_k": "q5_k_m"})


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What the mixtures depend on beside tensors."""

    architecture: str  # general.architecture
    num_layers: int
    num_heads: int
    num_kv_heads: int

    @property
    def is_70b(self) -> bool:
        """Whether llama.cpp takes it for a model of 70B, whose values of attention are few."""
        if self.architecture == "llama":
            return self.num_layers == 80 and self.num_heads != self.num_kv_heads
        return self.architecture == "qwen2" and self.num_layers == 80


@dataclass(frozen=True, slots=True)
class Rule:
    """A line of a type map: tensors whose name holds `pattern` get `format`."""

    pattern: re.Pattern[str]
    format: str


def find_file_type(name: str) -> FileType:
    """The type called `name`, in any case."""
    key = _SHORT_NAMES.get(name.lower(), name.lower())
    if key not in FILE_TYPES:
        near = difflib.get_close_matches(key, FILE_TYPES, n=1)
        guess = f" (did you mean {near[0]}?)" if near else ""
        raise ConfigError(f"type is {name!r}{guess}; there are {', '.join(FILE_TYPES)}")
    return FILE_TYPES[key]


def find_format(name: str, where: str) -> str:
    """The format called `name`, in any case. `where` begins the message of an error."""
    if name.upper() not in FORMATS:
        near = difflib.get_close_matches(name.upper(), FORMATS, n=1)
        guess = f" (did you mean {near[0]}?)" if near else ""
        raise ConfigError(f"{where}: format is {name!r}{guess}; there are {', '.join(FORMATS)}")
    return name.upper()


def read_rules(path: Path) -> list[Rule]:
    """The rules of a type map: words PATTERN=FORMAT, as in llama-quantize's --tensor-type-file. A
    line that begins with # is a comment.
    """
    try:
        text = read_bytes(path, MAX_RULES_BYTES).decode()
    except UnicodeDecodeError as error:
        raise FormatError(f"{path} is not a text file ({error.reason})") from None
    rules = []
    for number, line in enumerate(text.splitlines(), 1):
        for word in [] if line.lstrip().startswith("#") else line.split():
            where = f"{path}, line {number}"
            pattern, equals, format = word.rpartition("=")
            if not (pattern and equals and format):
                raise FormatError(f"{where}: {word[:100]!r} is not of the form PATTERN=FORMAT")
            try:
                rules.append(Rule(re.compile(pattern), find_format(format, where)))
            except (re.error, RecursionError, OverflowError) as error:
                raise FormatError(
                    f"{where}: {pattern[:100]!r} is not a regular expression ({error})"
                ) from None
    if not rules:
        raise FormatError(f"{path} has no word PATTERN=FORMAT")
    return rules


def unused_rules(rules: Sequence[Rule], tensors: Mapping[str, TensorSpec]) -> list[Rule]:
    """The rules that decide for no tensor: their pattern is found in no name, or only where another
    rule comes first or the format must not change.
    """
    names = [name for name, spec in tensors.items() if is_quantizable(name, spec.shape)]
    used = {next((i for i, r in enumerate(rules) if r.pattern.search(n)), None) for n in names}
    return [rule for i, rule in enumerate(rules) if i not in used]


def fits(format: str, columns: int) -> bool:
    """Whether rows of so many values can be stored in the format."""
    return columns % get_format(format).block_size == 0


def in_file_order(names: Sequence[str]) -> list[str]:
    """Names of tensors in the order in which llama-quantize writes them: those without a layer,
    then layer by layer, each in alphabetical order.
    """

    def key(name: str) -> tuple[int, bytes]:
        layer = re.match(r"blk\.(\d+)\.", name)
        return int(layer[1]) if layer else -1, name.encode()

    return sorted(names, key=key)


def is_quantizable(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a mixture may change the format of a tensor: weights of two and more dimensions but
    norms and positions.
    """
    return (
        sum(size > 1 for size in shape[:-1]) > 0  # ggml counts no leading dimensions of 1
        and name.endswith("weight")
        and "_norm.weight" not in name
        and name != "position_embd.weight"
    )


def choose_formats(
    file_type: FileType,
    tensors: Mapping[str, TensorSpec],
    model: ModelFacts,
    *,
    has_importance: bool = False,
    rules: Sequence[Rule] = (),
) -> dict[str, str]:
    """The format of each tensor, in the order of the file. The first of the `rules` that finds a
    tensor decides; the mixture decides for the others. Tensors that must not be quantized keep
    their format.
    """
    names = in_file_order(list(tensors))
    tied = "output.weight" not in tensors
    num_values = sum(_role(name) == "attn_v" for name in names)
    seen = {"attn_v": 0, "ffn_down": 0}  # tensors of this role so far
    chosen = {}
    for name in names:
        spec = tensors[name]
        if not is_quantizable(name, spec.shape):
            chosen[name] = spec.format
            continue
        rule = next((rule for rule in rules if rule.pattern.search(name)), None)
        if rule is not None:
            chosen[name] = check_rule(rule, name, spec.shape[-1])
            continue
        role = _role(name)
        if role == "token_embd" and tied:
            role = "output"
        count = num_values if role == "attn_v" else model.num_layers
        format = _mixed(
            file_type, role, seen.get(role, 0), count, spec.shape[-1], model, has_importance
        )
        if role in seen:
            seen[role] += 1
        chosen[name] = _fallback(format, spec.shape[-1])
    return chosen


def _mixed(
    file_type: FileType,
    role: str,
    index: int,
    count: int,
    columns: int,
    model: ModelFacts,
    has_importance: bool,
) -> str:
    """The format of tensor `index` of the `count` tensors with this role, before fallbacks."""
    name, base = file_type.name, file_type.base
    if base in DENSE:
        return base
    gqa = model.num_heads // model.num_kv_heads
    more_bits = index < count // 8 or index >= 7 * count // 8 or (index - count // 8) % 3 == 2
    if role == "output":
        if not fits(base, columns):
            return "Q8_0"
        return base if base == "Q8_0" else "Q6_K"
    if role == "attn_v":
        format = {
            "q2_k": "Q4_K" if gqa >= 4 else "Q3_K",
            "q3_k_m": "Q5_K" if index < 2 else "Q4_K",
            "q3_k_l": "Q5_K",
            "q4_k_s": "Q5_K" if index < 4 else base,
            "q4_k_m": "Q6_K" if more_bits else base,
            "q5_k_m": "Q6_K" if more_bits else base,
            "iq4_nl": "Q5_K" if gqa >= 4 else base,
            "iq4_xs": "Q5_K" if gqa >= 4 else base,
        }.get(name, base)
        return "Q5_K" if model.is_70b and format in ("Q3_K", "Q4_K") else format
    if role == "attn_output":
        return {"q2_k": "Q3_K", "q3_k_m": "Q4_K", "q3_k_l": "Q5_K"}.get(name, base)
    if role == "ffn_down":
        first = index < count // 8
        return {
            "q2_k": "Q3_K",
            "q3_k_m": "Q5_K" if index < count // 16 else "Q4_K",
            "q3_k_l": "Q5_K",
            "q4_k_s": "Q5_K" if first else base,
            "q4_k_m": "Q6_K" if more_bits else base,
            "q5_k_m": "Q6_K" if more_bits else base,
            "iq4_nl": "Q5_K" if first and not has_importance else base,
            "iq4_xs": "Q5_K" if first and not has_importance else base,
            "q4_0": "Q4_1" if first and has_importance else base,
            "q5_0": "Q5_1" if first and has_importance else base,
        }.get(name, base)
    return base


def _role(name: str) -> str:
    """What a tensor is for, as far as mixtures tell tensors apart."""
    if name == "output.weight":
        return "output"
    if name == "token_embd.weight":
        return "token_embd"
    if "attn_qkv.weight" in name or "attn_v.weight" in name:
        return "attn_v"
    if "attn_output.weight" in name:
        return "attn_output"
    if "ffn_down" in name:
        return "ffn_down"
    return "other"


def _fallback(format: str, columns: int) -> str:
    """`format`, or what replaces it for rows of this width."""
    if fits(format, columns):
        return format
    smaller = _SMALLER_BLOCKS.get(format, format)
    return smaller if fits(smaller, columns) else "F16"


def check_rule(rule: Rule, name: str, columns: int) -> str:
    """The rule's format, which the user has named and nothing replaces."""
    if not fits(rule.format, columns):
        able = [f for f in FORMATS if fits(f, columns)]
        raise ConfigError(
            f"the type map gives tensor {name!r} the format {rule.format}, whose blocks hold "
            f"{get_format(rule.format).block_size} values; its rows have {columns}, which fit "
            f"{', '.join(able)}"
        )
    return rule.format
