"""How the authors of a model pool its hidden states into an embedding.

A GGUF file has it in its key `<architecture>.pooling_type`, by llama.cpp's numbers; a folder in
`1_Pooling/config.json`, as sentence-transformers writes it. Most files say nothing.
"""

from collections.abc import Mapping
from pathlib import Path

from ..errors import FormatError
from ..files import is_there, read_json
from .fields import Fields

__all__ = ["read_pooling"]

_FILE = Path("1_Pooling") / "config.json"
_MAX_BYTES = 1 << 16
_GGUF_NAMES = ("none", "mean", "cls", "last", "rank")
_FLAGS = {
    "pooling_mode_lasttoken": "last",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len",
    "pooling_mode_weightedmean_tokens": "weightedmean",
}


def read_pooling(source: Path | Mapping[str, object]) -> str | None:
    """The pooling of a folder, or of the metadata of a GGUF file: "last", "mean" or the name of
    another kind. None if it says nothing.

    Raises FormatError for a value of a wrong type, or a number that llama.cpp does not have.
    """
    if isinstance(source, Path):
        path = source / _FILE
        if not is_there(path):
            return None
        fields = Fields(str(path), read_json(path, _MAX_BYTES, within=source))
        named = [name for flag, name in _FLAGS.items() if fields.flag(flag, False)]
        return "+".join(named) or None
    architecture = Fields("the file", source, "general.").text("architecture")
    number = Fields("the file", source, f"{architecture}.").optional_integer("pooling_type")
    if number is None:
        return None
    if not 0 <= number < len(_GGUF_NAMES):
        raise FormatError(
            f"the file: {architecture}.pooling_type is {number}; it must be between 0 and "
            f"{len(_GGUF_NAMES) - 1}"
        )
    return _GGUF_NAMES[number] if number else None
