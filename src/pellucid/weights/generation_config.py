"""The sampling parameters that the authors of a model recommend.

A folder has them in `generation_config.json`, a GGUF file in its keys `general.sampling.*`. The
result uses the names of `SamplingParams`, and holds only the values of the file:

    {"temperature": 0.7, "top_k": 20, "top_p": 0.8, "repetition_penalty": 1.05}

As in Hugging Face's files, `"do_sample": false` means greedy decoding, even beside a temperature or
top_p. A file with filters (top_k, top_p, …) and no temperature means temperature 1. Settings
without a counterpart here (beam search, Mirostat) are left out, as in vLLM. Ranges are checked when
`SamplingParams` is built.
"""

from collections.abc import Mapping
from pathlib import Path

from ..files import is_there, read_json
from .fields import Fields

__all__ = ["gguf_sampling", "read_generation_config"]

_FILE = "generation_config.json"
_MAX_BYTES = 1 << 20

# (our name, name in generation_config.json, key in GGUF after "general.sampling.")
_NUMBERS = (
    ("temperature", "temperature", "temp"),
    ("top_p", "top_p", "top_p"),
    ("min_p", "min_p", "min_p"),
    ("typical_p", "typical_p", None),
    ("repetition_penalty", "repetition_penalty", "penalty_repeat"),
)
_INTEGERS = (("top_k", "top_k", "top_k"), ("max_tokens", "max_new_tokens", None))
_CHOICE = ("top_k", "top_p", "min_p", "typical_p")


def read_generation_config(source: Path | Mapping[str, object]) -> dict[str, float | int]:
    """The recommendation of a folder, or of the metadata of a GGUF file; empty if there is none.

    Raises FormatError for a value of a wrong type.
    """
    if isinstance(source, Path):
        path = source / _FILE
        if not is_there(path):
            return {}
        fields = Fields(str(path), read_json(path, _MAX_BYTES, within=source))
        return _recommendation(fields, gguf=False)
    return _recommendation(Fields("the file", source, "general.sampling."), gguf=True)


def gguf_sampling(folder: Path) -> dict[str, object]:
    """The recommendation of a folder as the keys `general.sampling.*` of a GGUF file, those that
    there are.
    """
    values = read_generation_config(folder)
    keys = {ours: key for ours, _, key in (*_NUMBERS, *_INTEGERS) if key is not None}
    return {f"general.sampling.{keys[name]}": values[name] for name in values.keys() & keys.keys()}


def _recommendation(fields: Fields, *, gguf: bool) -> dict[str, float | int]:
    found: dict[str, float | int] = {}
    # a GGUF file holds float32: 0.7 is stored as 0.699999988
    for ours, theirs, key in _NUMBERS:
        name = key if gguf else theirs
        value = None if name is None else fields.optional_number(name)
        if value is not None:
            found[ours] = float(f"{value:.7g}") if gguf else value
    for ours, theirs, key in _INTEGERS:
        name = key if gguf else theirs
        number = None if name is None else fields.optional_integer(name)
        if number is not None:
            found[ours] = number
    # greedy decoding, or a draw from filtered tokens
    draws = gguf or fields.flag("do_sample", True)
    if not draws:
        found = {name: value for name, value in found.items() if name not in _CHOICE}
        found["temperature"] = 0.0
    elif found.keys() & set(_CHOICE) or fields.value("do_sample") is True:
        found.setdefault("temperature", 1.0)
    return found
